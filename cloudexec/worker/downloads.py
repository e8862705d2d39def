"""Fetches blobs and the user's own modules from the client."""

from __future__ import annotations

import tempfile
from typing import Any, cast

from cloudexec._objects.store import Blob
from cloudexec._objects.transfer import fetch_into
from cloudexec._proto import tasks_pb2 as pb
from cloudexec.worker.blobs import Known
from cloudexec.worker.calls import Calls

__all__ = ["fetch_blob", "fetch_modules"]


async def fetch_blob(calls: Calls, number: int, known: Known, blob: Blob) -> None:
    """Fetch the content of one of the client's blobs, from the bucket if the blob is there.

    Raises:
        PayloadError: If it arrived damaged.
        OSError: If there is no room for it.
        CallError: If the connection fails.
    """
    if known.bucket and calls.bucket is not None and await calls.bucket.load(number, blob):
        return

    def chunks(offset: int) -> Any:
        return calls.fetch(pb.FetchRequest(blob=number, offset=offset))

    await fetch_into(blob, chunks, calls.is_cut)


async def fetch_modules(calls: Calls) -> str:
    """Fetch the user's own modules, and return the directory that they were put into.

    Raises:
        CallError: If the connection fails.
    """
    import zipfile  # few programs have modules of their own

    with tempfile.TemporaryFile() as file:
        async for chunk in calls.fetch(pb.FetchRequest(modules=True)):
            file.write(cast("memoryview", chunk))
        directory = tempfile.mkdtemp(prefix="cloudexec-modules-")
        with zipfile.ZipFile(file) as archive:
            archive.extractall(directory)
    return directory
