"""How supervisor and slot talk: frames over two pipes, and a shared page of memory.

A frame is a header (kind, length of the body, a number) and its body. The shared page has five
cells of eight bytes, then a buffer for results:

* ``CURRENT``: the lease that the slot runs, written by the slot before it begins.
* ``EPOCH``: written by the supervisor to take back what the slot has not begun: a slot compares
  it, after it wrote ``CURRENT``, with the epoch of the batch at hand, and drops the rest if they
  differ.
* ``SPILL``: written by the supervisor: whether large results go to disk rather than memory.
* ``USED``: bytes of finished results in the buffer that have not been written to the pipe yet.
* ``FLUSHES``: how often that was done: what was read from the buffer meanwhile may be torn.

So whatever becomes of a slot - killed, or deep in a call that holds the GIL for minutes - the
supervisor knows which task it ran, has the results of those before, and can take those behind.
"""

from __future__ import annotations

import enum
import os
import struct

__all__ = [
    "COMPOSED",
    "CURRENT",
    "EPOCH",
    "FLUSHES",
    "FUNCTION_NUMBER",
    "HEADER",
    "KEPT",
    "PAGE_BYTES",
    "RESULT",
    "RESULTS_AT",
    "SPILL",
    "USED",
    "Kind",
    "write_all",
]

HEADER = struct.Struct("<BIQ")
RESULT = struct.Struct("<QfBI")
"""One result: lease, seconds, status, length of the payload that follows."""

CURRENT, EPOCH, USED, SPILL, FLUSHES = range(5)
RESULTS_AT = 64
PAGE_BYTES = 256 * 1024

COMPOSED, KEPT = 0x80000000, 0x40000000
"""A task's payload is places and the head of a composed one; its result is to stay here."""
FUNCTION_NUMBER = 0x3FFFFFFF
GONE = 0xFFFFFFFFFFFFFFFF
"""In place of an epoch: what the task takes is not where it was said to be."""

OK, RAISED, UNPICKLE_FAILED, PICKLE_FAILED, DELIVERED = 0, 1, 2, 3, 4
"""Status of a result; ``DELIVERED``: it went through the direct channel."""


class Kind(enum.IntEnum):
    """What a frame is; the number in its header is given in parentheses."""

    # To the slot.
    SETUP = 1
    """JSON: working directory, sys.path, argv."""
    INITIALIZER = 2
    """Payload of (initializer, initargs); composed if the number is 1, none if it is 2."""
    FUNCTION = 3
    """A callable (number of the function): two flags, whether each task is to have a copy of its
    own and whether it is composed, then its pickle."""
    FORGET = 5
    """Drop a callable (number of the function)."""
    BATCH = 6
    """Tasks (epoch): count, then columns of leases, functions, sizes, then payloads. Flags in the
    column of functions: ``COMPOSED``, ``KEPT``."""
    STOP = 7
    """End."""
    RELEASE = 8
    """What a result left in a file has been taken (number of the result's blob)."""
    ENVIRONMENT = 9
    """JSON: variables for one task (lease), which comes next."""

    # From the slot.
    READY = 20
    RESULTS = 21
    RESULT_COMPOSED = 22
    """A large result (lease): seconds, whether it is to be kept, places of blobs, and its head."""
    FAILURE = 23
    """A failure too large for the buffer (lease): seconds, status and the exception."""
    OUTPUT = 24
    """What a task printed (lease): one byte of stream number, then the text."""
    DROPPED = 25
    """The batch was taken back before this task began (lease): its epoch; or ``GONE``."""
    INITIALIZER_FAILED = 26


def write_all(fd: int, data: bytes | memoryview) -> None:
    """Write all of ``data`` to a blocking pipe."""
    done = os.write(fd, data)
    if done < len(data):
        view = memoryview(data)
        while done < len(view):
            done += os.write(fd, view[done:])
