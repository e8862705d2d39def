"""Objects are written anew as they are, so that a lifecycle rule counts their age from now on."""

from __future__ import annotations

import asyncio
import contextlib
import math
from typing import Any

from cloudexec._aws.clients import AwsClients
from cloudexec._errors import AwsError

__all__ = ["copy_onto_itself"]

_COPY_LARGEST = 5 * 1024**3
"""Bytes that CopyObject takes. Amazon S3 API Reference, "CopyObject"."""
_PART = 512 * 1024**2
_PARTS_MOST = 10_000
"""Amazon S3 User Guide, "Amazon S3 multipart upload limits"."""
_AT_ONCE = 4


async def copy_onto_itself(clients: AwsClients, bucket: str, key: str, size: int) -> None:
    """Copy an object onto itself, within S3.

    Raises:
        AwsError: If S3 refuses. The object is as it was then.

    References:
        Amazon S3 API Reference, "UploadPartCopy".
    """
    where: dict[str, Any] = {"Bucket": bucket, "Key": key}
    if size <= _COPY_LARGEST:
        # S3 copies an object onto itself only if something about it is new.
        await clients.call(
            "s3",
            "copy_object",
            **where,
            CopySource=where,
            MetadataDirective="REPLACE",
            ServerSideEncryption="AES256",
        )
        return
    begun = await clients.call(
        "s3", "create_multipart_upload", **where, ServerSideEncryption="AES256"
    )
    upload: dict[str, Any] = {**where, "UploadId": begun["UploadId"]}
    try:
        parts = await _copy_parts(clients, where, upload, size)
        await clients.call(
            "s3", "complete_multipart_upload", **upload, MultipartUpload={"Parts": parts}
        )
    except BaseException:
        # What is left of it, the bucket's rule for uploads in parts deletes.
        with contextlib.suppress(AwsError):
            await asyncio.shield(clients.call("s3", "abort_multipart_upload", **upload))
        raise


async def _copy_parts(
    clients: AwsClients, where: dict[str, Any], upload: dict[str, Any], size: int
) -> list[dict[str, Any]]:
    length = max(_PART, math.ceil(size / _PARTS_MOST))
    turns = asyncio.Semaphore(_AT_ONCE)

    async def copy(number: int, start: int) -> dict[str, Any]:
        async with turns:
            last = min(start + length, size) - 1
            answer = await clients.call(
                "s3",
                "upload_part_copy",
                **upload,
                PartNumber=number,
                CopySource=where,
                CopySourceRange=f"bytes={start}-{last}",
            )
        return {"PartNumber": number, "ETag": answer["CopyPartResult"]["ETag"]}

    starts = enumerate(range(0, size, length), 1)
    parts = [asyncio.ensure_future(copy(number, start)) for number, start in starts]
    try:
        return await asyncio.gather(*parts)
    finally:
        for each in parts:
            each.cancel()
