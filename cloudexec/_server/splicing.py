"""A call's pickle and the results that belong in it, joined by a few opcodes when it is sent."""

from __future__ import annotations

import struct
from collections.abc import Sequence

from cloudexec import _payload, _records
from cloudexec._objects.store import Blob, BlobStore
from cloudexec._payload import INLINE_BYTES, Composed, Payload

__all__ = ["Spliced"]

# The opcodes of pickle, by the names that ``pickletools`` gives them.
_PROTO = b"\x80\x05"
_FRAME = struct.Struct("<cQ")
_HOLD = b"ccloudexec._inputs\nhold\n("  # GLOBAL, MARK
_BINBYTES = struct.Struct("<cI")
_MARK, _TUPLE, _NEXT_BUFFER = b"(", b"t", b"\x97"
_CALL = b"tR0"  # TUPLE, REDUCE, POP: the memo stays empty, so what follows can be any pickle
_LARGEST_FRAME = 16 * 1024 * 1024


class Spliced:
    """A payload in the making: joined for each attempt, so that what waits shares its inputs.

    Args:
        payload: The call, with placeholders.
        inputs: What goes into them.
    """

    __slots__ = ("call", "inputs")

    def __init__(self, payload: Payload, inputs: Sequence[Payload]) -> None:
        self.call = payload
        self.inputs = inputs

    def blobs(self) -> list[Blob]:
        """Return the blobs that it will refer to."""
        found: dict[int, Blob] = {}
        for payload in (self.call, *self.inputs):
            if type(payload) is Composed:
                found.update((blob.id, blob) for blob in payload.blobs)
        return list(found.values())

    def join(self, store: BlobStore) -> Payload:
        """Return the payload: bytes if it is small, else composed, of the same blobs."""
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
        # Framed: the unpickler of a stream asks for every opcode otherwise.
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
