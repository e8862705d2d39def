"""A call's pickle and the results that belong in it, joined by a few opcodes when it is sent."""

from __future__ import annotations

import struct
from collections.abc import Sequence

from cloudexec import _payload
from cloudexec._payload import INLINE_BYTES, Parts, Payload

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

    __slots__ = ("_inputs", "_payload")

    def __init__(self, payload: Payload, inputs: Sequence[Payload]) -> None:
        self._payload = payload
        self._inputs = inputs

    def join(self) -> Payload:
        """Return the payload: bytes if it is small, else parts that share the large inputs."""
        ops = [_HOLD]
        buffers: list[bytes | memoryview] = []
        for pickled in self._inputs:
            if type(pickled) is bytes:
                ops.append(_BINBYTES.pack(b"B", len(pickled)))
                ops.append(pickled)
            else:
                assert isinstance(pickled, Parts)
                ops.append(_with_buffers(pickled, buffers))
        ops.append(_CALL)
        size = sum(map(len, ops))
        payload = self._payload
        if type(payload) is bytes and not buffers and size + len(payload) < INLINE_BYTES:
            return b"".join((_PROTO, *ops, payload))
        # Framed: the unpickler of a stream asks for every opcode otherwise.
        head = _FRAME.pack(b"\x95", size) if size <= _LARGEST_FRAME else b""
        call = b"".join((_PROTO, head, *ops))
        pieces = [*buffers, _payload.record(_payload._IN_BAND, len(call)), call]
        if isinstance(payload, Parts):
            pieces += payload.pieces
        else:
            pieces += [_payload.record(_payload._IN_BAND, len(payload)), payload]
            pieces.append(_payload.END_RECORD)
        return Parts(pieces, sum(map(len, pieces)))


def _with_buffers(pickled: Parts, buffers: list[bytes | memoryview]) -> bytes:
    """Let a large input travel beside the call's own pickle, uncopied: its pickle is a buffer too.

    Returns:
        Opcodes that make a tuple of its pickle and its buffers.
    """
    in_band: list[bytes | memoryview] = []
    out_of_band: list[bytes | memoryview] = []
    count = 1
    for header, data in zip(pickled.pieces[:-1:2], pickled.pieces[1::2], strict=True):
        if header[0] == _payload._IN_BAND:
            in_band.append(data)
        else:
            out_of_band += (header, data)
            count += 1
    size = sum(map(len, in_band))
    buffers += (_payload.record(_payload._READONLY_BUFFER, size), *in_band, *out_of_band)
    return _MARK + _NEXT_BUFFER * count + _TUPLE
