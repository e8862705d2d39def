"""What S3's answers to signed requests mean, and the errors of transfers."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import urllib3

from cloudexec._errors import CloudexecError
from cloudexec._transfer import SignedRequest

if TYPE_CHECKING:
    from urllib3.response import BaseHTTPResponse

__all__ = ["AgainError", "S3DigestError", "S3TransferError", "UrlRefusedError", "refusal"]

_ERROR_BYTES = 64 * 1024
_RETRIED_STATUS = frozenset({408, 429, 500, 502, 503, 504})
_RETRIED_CODE = frozenset({"RequestTimeout", "SlowDown", "InternalError", "ServiceUnavailable"})
_REFUSING_CODE = frozenset(
    {"AccessDenied", "ExpiredToken", "InvalidToken", "RequestExpired", "TokenRefreshRequired"}
)
"""Codes of refused URLs; some of them have status 400. Amazon S3 API Reference, "Error responses".
"""
_DIGEST_CODE = frozenset({"BadDigest", "XAmzContentSHA256Mismatch", "XAmzContentChecksumMismatch"})


class S3TransferError(CloudexecError):
    """An object could not be moved to or from S3.

    Attributes:
        reason: The message without the remedy.
        remedy: What can be done about it; empty if that is not known.
        status: The HTTP status of S3's answer; 0 without an answer.
        code: S3's error code, such as ``"NoSuchKey"``; ``"Unreachable"`` without an answer.
        transient: Whether the transfer may succeed later.
    """

    def __init__(
        self,
        reason: str = "",
        remedy: str = "",
        *,
        status: int = 0,
        code: str = "",
        transient: bool = False,
    ) -> None:
        super().__init__(f"{reason}; {remedy}" if remedy else reason)
        self.reason = reason
        self.remedy = remedy
        self.status = status
        self.code = code
        self.transient = transient


class UrlRefusedError(S3TransferError):
    """S3 refuses this URL, perhaps because it has expired: a fresh one may work.

    Attributes:
        early: Whether it was refused before it should have expired. Then the credentials that
            signed it may have ended, and must be read again.
    """

    early = False


class S3DigestError(S3TransferError):
    """The received or sent content does not have the announced digest."""


class AgainError(Exception):
    """A request failed, and may succeed if it is made again.

    Attributes:
        status: The HTTP status of S3's answer; 0 without an answer.
        code: S3's error code.
        after: Seconds that S3 wants one to wait before that.
    """

    def __init__(self, why: str, *, status: int = 0, code: str = "", after: float = 0.0) -> None:
        super().__init__(why)
        self.status = status
        self.code = code
        self.after = after


def refusal(what: str, response: BaseHTTPResponse, request: SignedRequest) -> Exception:
    """Return the exception for an unexpected answer.

    Args:
        what: What was to be done, for messages.
        response: The answer.
        request: What was asked.

    Raises:
        urllib3.exceptions.HTTPError: If the answer cannot be read.
    """
    body = response.read(_ERROR_BYTES, decode_content=False).decode("utf-8", "replace")
    code, status = _tag(body, "Code"), response.status
    said = f"{f'{status} {code}'.strip()}: {_tag(body, 'Message') or response.reason}"
    if status in _RETRIED_STATUS or code in _RETRIED_CODE:
        return AgainError(said, status=status, code=code, after=_wanted_pause(response))
    if status == 403 or code in _REFUSING_CODE:
        refused = UrlRefusedError(
            f"{what}: S3 refuses the URL: {said}",
            "it has expired, or the credentials that signed it have, or they may not do this "
            "(`cloudexec policy`), or this machine's clock is wrong",
            status=status,
            code=code,
        )
        refused.early = time.time() < request.expires_at
        return refused
    if code in _DIGEST_CODE:
        reason = f"{what}: what arrived is not what was announced: {said}"
        return S3DigestError(reason, status=status, code=code)
    remedy = {
        "NoSuchKey": "it has been deleted, or was never sent",
        "NoSuchBucket": "the bucket does not exist (any more)",
        "NoSuchUpload": "the upload was ended, or its executor has shut down",
    }.get(code, "")
    if 300 <= status < 400:
        remedy = "the bucket is in another region than the URL says"
    if status == 407:
        remedy = "the proxy wants a password: https_proxy=http://user:password@host:port"
    return S3TransferError(f"{what} failed: {said}", remedy, status=status, code=code or "?")


def _tag(text: str, name: str) -> str:
    """Return the text of an XML tag; empty if there is no such tag."""
    return text.partition(f"<{name}>")[2].partition(f"</{name}>")[0]


def _wanted_pause(response: BaseHTTPResponse) -> float:
    try:
        return urllib3.Retry().get_retry_after(response) or 0.0
    except urllib3.exceptions.HTTPError:
        return 0.0
