"""Joins the pickle of a call with the pickled results of the futures among its arguments.

A few opcodes of pickle join them when the task is sent, so that no result is unpickled here.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from cloudexec import _payload, _records
from cloudexec._objects.store import Blob, BlobStore
from cloudexec._payload import INLINE_BYTES
from cloudexec._records import Composed, Payload

__all__ = ["Spliced"]

# The opcodes of pickle, by the names that ``pickletools`` gives them.
_PROTO = b"\x80\x05"
_FRAME = struct.Struct("<cQ")
_HOLD = b"ccloudexec._inputs\nhold\n("  # GLOBAL, MARK
_BINBYTES = struct.Struct("<cI")
_MARK, _TUPLE, _NEXT_BUFFER = b"(", b"t", b"\x97"
_CALL = b"tR0"  # TUPLE, REDUCE, POP: these leave the memo empty, so any pickle can follow
_LARGEST_FRAME = 16 * 1024 * 1024


class Spliced:
    """A payload that is joined anew for each attempt, so that waiting tasks share their inputs.

    Args:
        payload: The pickled call, with a placeholder for each future.
        inputs: The pickled results that replace the placeholders.
    """

    __slots__ = ("call", "inputs")

    def __init__(self, payload: Payload, inputs: Sequence[Payload]) -> None:
        self.call = payload
        self.inputs = inputs

    def blobs(self) -> list[Blob]:
        """Return the blobs that the joined payload refers to."""
        found: dict[int, Blob] = {}
        for payload in (self.call, *self.inputs):
            if type(payload) is Composed:
                found.update((blob.id, blob) for blob in payload.blobs)
        return list(found.values())

    def join(self, store: BlobStore) -> Payload:
        """Return the joined payload: bytes if it is small, or else ``Composed`` of these blobs."""
        ops = [_HOLD]
        records: list[bytes] = []
        for pickled in self.inputs:
            if type(pickled) is bytes:
                ops += (_BINBYTES.pack(b"B", len(pickled)), pickled)
            else:
                assert isinstance(pickled, Composed)
                numbers = _payload.pack_numbers(pickled)
                ops.append(_MARK)
                for data in (pickled.head, numbers):
                    ops += (_BINBYTES.pack(b"B", len(data)), data)
                ops += (_NEXT_BUFFER * len(pickled.blobs), _TUPLE)
                records += [_records.buffer_record(blob) for blob in pickled.blobs]
        ops.append(_CALL)
        size = sum(map(len, ops))
        payload = self.call
        if type(payload) is bytes and not records and size + len(payload) < INLINE_BYTES:
            return b"".join((_PROTO, *ops, payload))
        # Without a frame, an unpickler that reads a stream would make a call for each opcode.
        head = _FRAME.pack(b"\x95", size) if size <= _LARGEST_FRAME else b""
        call = b"".join((_PROTO, head, *ops))
        blobs = {blob.id: blob for blob in self.blobs()}
        if len(call) > INLINE_BYTES:
            blob = store.intern(call)
            blobs[blob.id] = blob
            records.append(_records.in_band_record(blob))
        else:
            records += (_records.record(0, len(call)), call)
        if type(payload) is bytes:
            records += (_records.record(0, len(payload)), payload)
        else:
            assert isinstance(payload, Composed)
            records.append(_payload.without_end(payload, blobs))
        return _payload.compose(records, blobs, store)
