"""Checks of S3 requests that S3 makes before it looks at buckets, and that moto does not make."""

from __future__ import annotations

import base64
import calendar
import hashlib
import hmac
import re
import time
from collections.abc import Callable, Mapping
from urllib.parse import parse_qsl, quote, unquote

__all__ = ["path_style", "query_credential", "query_token", "refusal"]

Refusal = tuple[str, str, int]
"""S3's code, its message and the HTTP status."""

_VIRTUAL_HOST = re.compile(r"([a-z0-9][a-z0-9.-]+?)\.(?:s3[.-].+|localhost)(?::\d+)?")
_DIGESTS: Mapping[str, Callable[[bytes], bytes]] = {
    "x-amz-checksum-sha256": lambda body: hashlib.sha256(body).digest(),
    "x-amz-checksum-sha1": lambda body: hashlib.sha1(body, usedforsecurity=False).digest(),
    "content-md5": lambda body: hashlib.md5(body, usedforsecurity=False).digest(),
}


def path_style(host: str, path: str) -> str:
    """Return the path with the bucket in it, also if the request has it in the host's name."""
    found = _VIRTUAL_HOST.fullmatch(host)
    return f"/{found[1]}{path}" if found else path


def query_credential(query: str) -> str:
    """Return the credential of a signed URL in the form of the header, or an empty string."""
    found = dict(parse_qsl(query)).get("X-Amz-Credential")
    return f"Credential={found}" if found else ""


def query_token(query: str) -> str:
    """Return the session token of a signed URL, or an empty string."""
    return dict(parse_qsl(query)).get("X-Amz-Security-Token", "")


def refusal(
    *,
    method: str,
    path: str,
    query: str,
    headers: Mapping[str, str],
    body: bytes,
    secret: Callable[[str], str | None],
) -> Refusal | None:
    """Return why S3 would refuse a request; ``None`` if it would not.

    Args:
        method: The HTTP method.
        path: The path as it was sent.
        query: The query string as it was sent.
        headers: The headers, with names in lower case.
        body: The whole body.
        secret: Returns the secret of an access key; with ``None``, its signature is accepted.
    """
    signed = dict(parse_qsl(query, keep_blank_values=True))
    if "X-Amz-Signature" in signed:
        found = _signed_refusal(method, path, signed, headers, secret)
        if found is not None:
            return found
    for name, digest in _DIGESTS.items():
        if name in headers and headers[name] != base64.b64encode(digest(body)).decode():
            return "BadDigest", f"The {name} you specified did not match what we received.", 400
    return None


def _signed_refusal(
    method: str,
    path: str,
    signed: Mapping[str, str],
    headers: Mapping[str, str],
    secret: Callable[[str], str | None],
) -> Refusal | None:
    date = signed.get("X-Amz-Date", "")
    try:
        began = calendar.timegm(time.strptime(date, "%Y%m%dT%H%M%SZ"))
        seconds = int(signed.get("X-Amz-Expires", ""))
        key, day, region, service, _ = signed.get("X-Amz-Credential", "").split("/")
    except ValueError:
        return "AuthorizationQueryParametersError", "Query-string authentication is wrong", 400
    if time.time() > began + seconds:
        return "AccessDenied", "Request has expired", 403
    names = signed.get("X-Amz-SignedHeaders", "").split(";")
    if {name for name in headers if name.startswith("x-amz-")} - set(names):
        text = "There were headers present in the request which were not signed"
        return "AccessDenied", text, 403
    found = secret(key)
    if found is None:
        return None
    canonical = "\n".join(
        (
            method,
            quote(unquote(path), safe="/-_.~"),
            "&".join(
                sorted(
                    f"{quote(name, safe='-_.~')}={quote(value, safe='-_.~')}"
                    for name, value in signed.items()
                    if name != "X-Amz-Signature"
                )
            ),
            *(f"{name}:{headers.get(name, '').strip()}" for name in names),
            "",
            ";".join(names),
            "UNSIGNED-PAYLOAD",
        )
    )
    text = "\n".join(
        (
            "AWS4-HMAC-SHA256",
            date,
            f"{day}/{region}/{service}/aws4_request",
            hashlib.sha256(canonical.encode()).hexdigest(),
        )
    )
    signing = f"AWS4{found}".encode()
    for part in (day, region, service, "aws4_request"):
        signing = hmac.digest(signing, part.encode(), "sha256")
    signature = hmac.digest(signing, text.encode(), "sha256").hex()
    if not hmac.compare_digest(signature, signed["X-Amz-Signature"]):
        message = (
            "The request signature we calculated does not match the signature you provided. "
            "Check your key and signing method."
        )
        return "SignatureDoesNotMatch", message, 403
    return None
