"""Asks the metadata service of the EC2 instance that this process runs on."""

from __future__ import annotations

import http.client
import os
import urllib.parse
from typing import Any

__all__ = ["InstanceMetadata"]

_HOST = "http://169.254.169.254"
_TIMEOUT = 1.0


class InstanceMetadata:
    """The instance metadata service, version 2. Use it in ``with``.

    Raises:
        OSError: From its methods, if the service does not answer.
        http.client.HTTPException: From its methods, if what answers is something else.

    References:
        Amazon EC2 User Guide, "Use the Instance Metadata Service to access instance metadata".
    """

    def __init__(self) -> None:
        where = urllib.parse.urlsplit(
            os.environ.get("AWS_EC2_METADATA_SERVICE_ENDPOINT", "") or _HOST
        )
        self._base = where.path.rstrip("/")
        self._connection = http.client.HTTPConnection(where.netloc, timeout=_TIMEOUT)
        self._headers: dict[str, str] = {}

    def __enter__(self) -> InstanceMetadata:
        return self

    def __exit__(self, *exc_info: Any) -> None:
        self._connection.close()

    def get(self, path: str) -> str:
        """Return what the service has below ``/latest/meta-data``; empty: nothing."""
        if not self._headers:
            lifetime = {"X-aws-ec2-metadata-token-ttl-seconds": "60"}
            token = self._ask("PUT", "api/token", lifetime)
            self._headers = {"X-aws-ec2-metadata-token": token}
        return self._ask("GET", f"meta-data/{path}", self._headers)

    def _ask(self, method: str, path: str, headers: dict[str, str]) -> str:
        self._connection.request(method, f"{self._base}/latest/{path}", headers=headers)
        response = self._connection.getresponse()
        text = response.read().decode()
        return text if response.status == 200 else ""
