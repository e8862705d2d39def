"""A registry on the loopback that has the limits of Amazon ECR, before the one of Debian.

What AWS documents are the sizes of layer parts and of manifests (Amazon ECR API Reference,
"UploadLayerPart" and "PutImage"). Whether its HTTP API takes a larger layer in one request is not
documented, so this registry can do both.
"""

from __future__ import annotations

import http.client
import http.server
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from local_registry import serving

__all__ = ["LARGEST_PART", "SMALLEST_PART", "EcrRegistry", "serving_ecr"]

LARGEST_PART = 20_971_520
SMALLEST_PART = 5 * 2**20
LARGEST_MANIFEST = 4 * 2**20
_OWN = ("connection", "content-length", "transfer-encoding")


@dataclass
class EcrRegistry:
    """The registry, and what was sent to it."""

    takes_whole: bool
    """Whether a layer may be larger than a part and be sent in one request."""
    address: str = ""
    sent: list[tuple[str, int]] = field(default_factory=list)
    """Method and bytes of each request that had a part of a layer or all of it."""
    short: set[str] = field(default_factory=set)
    """Uploads that have had a part that only the last one may be."""

    def refusal(self, method: str, path: str, size: int) -> tuple[int, str] | None:
        """Return status and code of the error for a request; ``None``: it is let through."""
        if method == "PUT" and "/manifests/" in path:
            return (413, "SIZE_INVALID") if size > LARGEST_MANIFEST else None
        if method not in ("PATCH", "PUT") or "/blobs/uploads/" not in path:
            return None
        self.sent.append((method, size))
        if size > LARGEST_PART and not self.takes_whole:
            return 413, "SIZE_INVALID"
        upload = urlsplit(path).path
        if method == "PATCH" and upload in self.short:
            return 400, "BLOB_UPLOAD_INVALID"
        if method == "PATCH" and size < SMALLEST_PART:
            self.short.add(upload)
        return None


@contextmanager
def serving_ecr(directory: Path, *, takes_whole: bool) -> Iterator[EcrRegistry]:
    """Run such a registry on the loopback."""
    registry = EcrRegistry(takes_whole)

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_any(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", "0")))
            refusal = registry.refusal(self.command, self.path, len(body))
            if refusal is not None:
                status, code = refusal
                said = {"errors": [{"code": code, "message": "as Amazon ECR would say"}]}
                self.answer(status, [], json.dumps(said).encode())
                return
            behind = http.client.HTTPConnection(backend, timeout=60)
            try:
                # With the name of this registry, which is in the places that it answers with.
                behind.request(self.command, self.path, body, dict(self.headers.items()))
                found = behind.getresponse()
                headers = [each for each in found.getheaders() if each[0].lower() not in _OWN]
                if self.command == "HEAD" and (length := found.getheader("Content-Length")):
                    self.answer(found.status, [*headers, ("Content-Length", length)], None)
                else:
                    self.answer(found.status, headers, found.read())
            finally:
                behind.close()

        def answer(self, status: int, headers: list[tuple[str, str]], body: bytes | None) -> None:
            self.send_response_only(status)
            for name, value in headers:
                self.send_header(name, value)
            if body is not None:
                self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body or b"")

        def log_message(self, *args: Any) -> None: ...

    for method in ("GET", "HEAD", "POST", "PUT", "PATCH"):
        setattr(Handler, f"do_{method}", Handler.do_any)
    with serving(directory) as backend:
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        registry.address = f"127.0.0.1:{server.server_port}"
        try:
            yield registry
        finally:
            server.shutdown()
            server.server_close()
            thread.join()
