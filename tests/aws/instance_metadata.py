"""The instance metadata service, for tests on a machine that is no EC2 instance."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest


class Instance(ThreadingHTTPServer):
    """The metadata service, version 2, of an instance with these interfaces."""

    def __init__(self, *interfaces: tuple[str, str, str]) -> None:
        super().__init__(("127.0.0.1", 0), _Metadata)
        self.answers = {}
        macs = "/latest/meta-data/network/interfaces/macs/"
        # As in the real service, the interfaces are not in the order of their numbers.
        numbered = list(enumerate(interfaces))[::-1]
        self.answers[macs] = "\n".join(f"02:00:00:00:00:0{number}/" for number, _ in numbered)
        for number, (vpc, private, public) in numbered:
            base = f"{macs}02:00:00:00:00:0{number}/"
            self.answers[f"{base}device-number"] = str(number)
            self.answers[f"{base}vpc-id"] = vpc
            self.answers[f"{base}local-ipv4s"] = private
            if public:
                self.answers[f"{base}public-ipv4s"] = public


class _Metadata(BaseHTTPRequestHandler):
    server: Instance

    def do_PUT(self) -> None:
        self._answer("token" if self.path == "/latest/api/token" else None)

    def do_GET(self) -> None:
        known = self.headers.get("X-aws-ec2-metadata-token") == "token"
        self._answer(self.server.answers.get(self.path) if known else None)

    def _answer(self, text: str | None) -> None:
        self.send_response(200 if text is not None else 404)
        self.send_header("Content-Length", str(len(text or "")))
        self.end_headers()
        self.wfile.write((text or "").encode())

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Log no requests."""


@contextlib.contextmanager
def on_instance(
    monkeypatch: pytest.MonkeyPatch, *interfaces: tuple[str, str, str]
) -> Iterator[None]:
    """Make this machine look like an EC2 instance; each interface has a VPC and addresses."""
    with Instance(*interfaces) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        endpoint = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", endpoint)
        yield
        server.shutdown()
        thread.join()
