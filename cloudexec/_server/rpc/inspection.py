"""Parses the messages of enrolled workers, and refuses messages with too many entries.

The entries are counted before they become objects: a few megabytes of empty entries would become
objects of hundreds of megabytes, and take seconds on the loop thread. An honest worker sends a few
thousand entries at once.
"""

from __future__ import annotations

from google.protobuf.message import DecodeError

from cloudexec._proto import tasks_pb2 as pb

__all__ = ["parse"]

_MOST_FIELDS = 65_536
"""Number of fields of one message. Each failure and each piece of output is one field."""
_MOST_NUMBERS = 1 << 20
"""Number of leases or process groups in one list. Numbers take little time, and a worker may hand
back all tasks that it was sent ahead."""


def parse(data: bytes) -> pb.WorkerMessage:
    """Parse a message of an enrolled worker.

    Raises:
        DecodeError: If the bytes are no message.
        ValueError: If the message has more entries than an honest worker sends at once.
    """
    # Each entry takes at least a byte, so a short message cannot hold too many.
    if len(data) <= _MOST_FIELDS:
        return pb.WorkerMessage.FromString(data)
    _count_fields(data)
    message = pb.WorkerMessage.FromString(data)
    results = message.results
    for numbers in (message.started, message.returned, message.slot_groups, results.leases):
        if len(numbers) > _MOST_NUMBERS:
            raise ValueError(f"a list of {len(numbers)} numbers")
    return message


def _count_fields(data: bytes) -> None:
    """Count the fields of a message, without those inside of fields.

    Raises:
        DecodeError: If the bytes are no message.
        ValueError: If there are too many fields.
    """
    at, size = 0, len(data)
    try:
        for _ in range(_MOST_FIELDS):
            if at == size:
                return
            tag, at = _varint(data, at)
            kind = tag & 7
            if kind == 0:
                _, at = _varint(data, at)
            elif kind == 1:
                at += 8
            elif kind == 2:
                length, at = _varint(data, at)
                at += length
            elif kind == 5:
                at += 4
            else:
                raise DecodeError(f"a field of type {kind}")  # groups, which proto3 does not have
    except IndexError:
        raise DecodeError("the message ends in the middle of a field") from None
    if at != size:
        raise ValueError(f"more than {_MOST_FIELDS} fields")


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while (byte := data[at]) > 0x7F:
        value |= (byte & 0x7F) << shift
        shift += 7
        at += 1
        if shift > 63:
            raise DecodeError("a number of more than ten bytes")
    return value | byte << shift, at + 1
