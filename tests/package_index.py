"""Indexes of packages under their own names, over TLS, and the certificates for that."""

from __future__ import annotations

import base64
import datetime
import http.server
import ssl
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from packaging.utils import canonicalize_name

__all__ = ["Certificates", "Index", "make_certificates", "serving_indexes"]


@dataclass(frozen=True)
class Certificates:
    """Files: what clients trust, and what a server shows."""

    authority: Path
    server: Path
    key: Path


def _usage(*, authority: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not authority,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=authority,
        crl_sign=authority,
        encipher_only=False,
        decipher_only=False,
    )


def make_certificates(folder: Path, names: list[str]) -> Certificates:
    """Make an authority, and a certificate for servers of some names."""
    now = datetime.datetime.now(datetime.UTC)
    keys = [ec.generate_private_key(ec.SECP256R1()) for _ in range(2)]
    made = Certificates(folder / "authority.pem", folder / "server.pem", folder / "server.key")
    issuer = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "Tests")])
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, names[0])])
    alternative = x509.SubjectAlternativeName([x509.DNSName(name) for name in names])
    for number, (path, name, extension) in enumerate(
        (
            (made.authority, issuer, x509.BasicConstraints(ca=True, path_length=0)),
            (made.server, subject, alternative),
        )
    ):
        certificate = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(issuer)
            .public_key(keys[number].public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=7))
            .add_extension(extension, critical=number == 0)
            # Python verifies strictly since 3.13, and asks for these.
            .add_extension(
                x509.SubjectKeyIdentifier.from_public_key(keys[number].public_key()), critical=False
            )
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(keys[0].public_key()),
                critical=False,
            )
            .add_extension(_usage(authority=number == 0), critical=True)
            .sign(keys[0], hashes.SHA256())
        )
        path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    made.key.write_bytes(
        keys[1].private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    return made


@dataclass(frozen=True)
class Index:
    """Wheels in a folder, and who may have them: ``user:password``, or everybody."""

    wheels: Path
    login: str = ""

    def page(self, project: str) -> str:
        """Return the page of a project; empty: it has no wheel."""
        names = [
            path.name
            for path in sorted(self.wheels.glob("*.whl"))
            if canonicalize_name(path.name.partition("-")[0]) == project
        ]
        return "".join(f'<a href="/files/{name}">{name}</a>\n' for name in names)


@contextmanager
def serving_indexes(
    address: str, certificates: Certificates, indexes: Mapping[str, Index]
) -> Iterator[None]:
    """Serve indexes at port 443 of an address, each by its name.

    References:
        Python Packaging User Guide, "Simple repository API".
    """

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            index = indexes.get(self.headers.get("Host", ""))
            expected = base64.b64encode((index.login if index else "").encode()).decode()
            kind, _, name = self.path.strip("/").partition("/")
            if index is None:
                self._answer(404)
            elif index.login and self.headers.get("Authorization") != f"Basic {expected}":
                self._answer(401)
            elif kind == "simple" and (page := index.page(canonicalize_name(name))):
                self._answer(200, f"<!DOCTYPE html>\n{page}".encode(), "text/html")
            elif kind == "files" and "/" not in name and (index.wheels / name).is_file():
                self._answer(200, (index.wheels / name).read_bytes())
            else:
                self._answer(404)

        def _answer(
            self, status: int, content: bytes = b"", kind: str = "application/octet-stream"
        ) -> None:
            self.send_response(status)
            if status == 401:
                self.send_header("WWW-Authenticate", 'Basic realm="packages"')
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        do_HEAD = do_GET  # noqa: N815

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificates.server, certificates.key)

    class Server(http.server.ThreadingHTTPServer):
        daemon_threads = True

        def finish_request(self, request: object, client_address: object) -> None:
            """Make the handshake in the connection's own thread."""
            with context.wrap_socket(request, server_side=True) as connection:  # type: ignore[arg-type]
                super().finish_request(connection, client_address)

        def handle_error(self, *_: object) -> None:
            """Say nothing of clients that leave."""

    with Server((address, 443), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield
        finally:
            server.shutdown()
            thread.join()
