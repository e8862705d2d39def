"""The server's certificate: self-signed, for one executor's life, pinned by its fingerprint."""

from __future__ import annotations

import datetime
import hashlib
from dataclasses import dataclass

__all__ = ["Certificate", "make_certificate"]


@dataclass(frozen=True, slots=True)
class Certificate:
    """A certificate and its key as PEM, and the fingerprint (SHA-256) that workers check."""

    pem: bytes
    key_pem: bytes
    sha256: str

    def __repr__(self) -> str:
        return f"Certificate(sha256={self.sha256!r})"


def make_certificate() -> Certificate:
    """Make a new P-256 key and a self-signed certificate that never expires.

    Workers accept exactly the certificate with this fingerprint, and it ends with its executor. An
    expiry date would add no safety, and would keep out workers whose clock is wrong.
    """
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "cloudexec")])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        # The earliest date that can be encoded, and the date that means "no expiry" (RFC 5280,
        # 4.1.2.5).
        .not_valid_before(datetime.datetime(1950, 1, 1))
        .not_valid_after(datetime.datetime(9999, 12, 31, 23, 59, 59))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("cloudexec")]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    der = certificate.public_bytes(serialization.Encoding.DER)
    return Certificate(
        pem=certificate.public_bytes(serialization.Encoding.PEM),
        key_pem=key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        ),
        sha256=hashlib.sha256(der).hexdigest(),
    )
