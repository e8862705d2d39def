"""Connects the fake ECR with a registry on this machine: images that are pushed appear in ECR."""

from __future__ import annotations

import base64
import json
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any

from cloudexec.testing._aws.backends import ACCOUNT
from cloudexec.testing._aws.limits import ClientError
from cloudexec.testing._aws.wire import Call

__all__ = ["RegistryMirror"]

_READING = ("BatchDeleteImage", "BatchGetImage", "DescribeImages", "ListImages")
_MANIFESTS = (
    "application/vnd.oci.image.index.v1+json, application/vnd.oci.image.manifest.v1+json, "
    "application/vnd.docker.distribution.manifest.v2+json, "
    "application/vnd.docker.distribution.manifest.list.v2+json"
)
_TIMEOUT = 10.0


class RegistryMirror:
    """Answers ECR's login, and copies names and digests of images into moto's ECR.

    Args:
        address: The registry, ``host:port`` over plain HTTP.
    """

    def __init__(self, address: str) -> None:
        self._address = address
        # Each image is copied once, so that one that is deleted through ECR does not come back.
        self._seen: set[tuple[str, str, str]] = set()

    def answer(self, call: Call) -> Mapping[str, Any] | None:
        """Answer a call, or copy the registry's images and leave the call to moto."""
        if call.operation == "GetAuthorizationToken":
            self._get("")
            return {
                "authorizationData": [
                    {
                        "authorizationToken": base64.b64encode(b"AWS:password").decode(),
                        "expiresAt": int(time.time()) + 12 * 3600,
                        "proxyEndpoint": f"http://{self._address}",
                    }
                ]
            }
        if call.operation in _READING:
            self._copy(call.region, call.parameters["repositoryName"])
        return None

    def _copy(self, region: str, repository: str) -> None:
        from moto.ecr.models import ecr_backends

        backend = ecr_backends[ACCOUNT][region]
        if repository not in backend.repositories:
            return
        tags = json.loads(self._get(f"{repository}/tags/list")[0] or b"{}").get("tags") or []
        for tag in sorted(tags):
            manifest, headers = self._get(f"{repository}/manifests/{tag}")
            if manifest is None:
                continue
            digest = headers["Docker-Content-Digest"]
            if (repository, tag, digest) in self._seen:
                continue
            self._seen.add((repository, tag, digest))
            backend.put_image(
                repository,
                manifest.decode(),
                tag,
                image_manifest_mediatype=headers["Content-Type"],
                digest=digest,
            )

    def _get(self, path: str) -> tuple[bytes | None, Mapping[str, str]]:
        request = urllib.request.Request(
            f"http://{self._address}/v2/{path}", headers={"Accept": _MANIFESTS}
        )
        # The registry is on this machine, so no proxy must be used.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(request, timeout=_TIMEOUT) as response:
                return response.read(), response.headers
        except urllib.error.HTTPError as exc:
            exc.close()
            return None, {}
        except OSError as exc:
            raise self._is_down(exc) from exc

    def _is_down(self, exc: OSError) -> ClientError:
        """Return an error that clients do not retry, so that the user sees it at once."""
        return ClientError(
            f"FakeAWS: the registry that stands for Amazon ECR does not answer at "
            f"{self._address}: {getattr(exc, 'reason', exc)}; start it again",
            "RegistryUnreachableException",
        )
