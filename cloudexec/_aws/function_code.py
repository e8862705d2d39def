"""The archive of a function: sent with the request, or by way of the bucket if it is large."""

from __future__ import annotations

import base64
import hashlib
from typing import Any

from cloudexec._aws.clients import AwsClients
from cloudexec._aws.names import OBJECTS_PREFIX
from cloudexec._errors import AwsError

__all__ = ["MOST_DIRECT", "archive_code", "is_refused"]

MOST_DIRECT = 52_428_800
"""Bytes of an archive that is sent with the request: 50 MB in "Lambda quotas", AWS Lambda Developer
Guide, and this number in what Lambda answers."""
_PREFIX = f"{OBJECTS_PREFIX}functions/"
"""The lifecycle rule of the bucket deletes what lies there. Functions have copies of their own."""
_REFUSALS = ("Unzipped size", "Zipped size", "runtime parameter")
"""What CreateFunction says of an archive that is too large, and of a runtime that is no longer
offered."""


async def archive_code(clients: AwsClients, data: bytes, bucket: str) -> dict[str, Any]:
    """Return where an archive is, as CreateFunction names it; send it to the bucket if it is large.

    Args:
        clients: Calls to AWS, in the region of the function and of the bucket.
        data: The archive.
        bucket: Name of the bucket.

    Raises:
        AwsError: If AWS refuses, or cannot be reached.
    """
    if len(data) <= MOST_DIRECT:
        return {"ZipFile": data}
    digest = hashlib.sha256(data).digest()
    key = f"{_PREFIX}{digest.hex()}.zip"
    checksum = base64.b64encode(digest).decode()
    there = await _checksum_of(clients, bucket, key)
    # Others may write there, too. S3 has computed the checksum from what is there.
    if there != checksum:
        await clients.call(
            "s3",
            "put_object",
            Bucket=bucket,
            Key=key,
            Body=data,
            ChecksumAlgorithm="SHA256",
            ChecksumSHA256=checksum,
        )
    return {"S3Bucket": bucket, "S3Key": key}


async def _checksum_of(clients: AwsClients, bucket: str, key: str) -> str:
    """Return the SHA-256 of an object, base64; empty: there is none, or nobody may say so."""
    try:
        found = await clients.call(
            "s3", "head_object", Bucket=bucket, Key=key, ChecksumMode="ENABLED"
        )
    except AwsError as exc:
        if exc.may_pass:
            raise
        return ""
    return str(found.get("ChecksumSHA256", ""))


def is_refused(exc: AwsError) -> bool:
    """Whether Lambda takes no archive here, while an image may do."""
    return exc.code == "CodeStorageExceededException" or any(
        each in exc.message for each in _REFUSALS
    )
