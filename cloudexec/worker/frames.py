"""How supervisor and slot talk: frames over two pipes, and a shared page of memory.

A frame is a header (kind, length of the body, a number) and its body.

Each time a task is sent to a slot, that delivery has a number. Numbers count up from 1 for each
slot and are never used again: a task that is taken back and sent once more has another number. The
slot takes deliveries in the order of their numbers. So nothing that the slot says, or has written
into the shared page, can be mistaken for a word about a later delivery of the same task.

The shared page has six cells of eight bytes, then a buffer for results:

* ``CURRENT``: the delivery that the slot runs, or 0. The slot writes it before it begins, and does
  not write the next one before the answer is in the buffer or in the pipe.
* ``FENCE``: no delivery up to this number is to be begun any more. The supervisor writes it to take
  tasks back. The slot reads it after it has written ``CURRENT``, and drops what is not beyond it.
* ``SPILL``: whether large results go to disk rather than memory, written by the supervisor.
* ``USED``: bytes of finished results in the buffer that have not been written to the pipe yet.
* ``FLUSHES``: how often that was done: what was read from the buffer meanwhile may be torn.
* ``WAITING``: while the slot waits for its next frame, how many bytes it has read in all, plus 1;
  otherwise 0. If that is all that was ever written to it, it has answered all it was sent.

The slot writes ``CURRENT`` and then reads ``FENCE``. The supervisor writes ``FENCE`` and later
reads ``CURRENT``. So at least one of them sees what the other wrote: a delivery that the supervisor
does not find in ``CURRENT`` is not begun. This holds if the writes of one processor reach the other
in time. They do so within microseconds, and the supervisor waits for milliseconds in between.

So whatever becomes of a slot - killed, or deep in a call that holds the GIL for minutes - the
supervisor knows which task it ran, has the results of those before, and can take those behind.
``tests/worker/test_interleavings.py`` runs both sides through their interleavings.
"""

from __future__ import annotations

import enum
import os
import struct

__all__ = [
    "COMPOSED",
    "CURRENT",
    "FENCE",
    "FLUSHES",
    "FUNCTION_NUMBER",
    "HEADER",
    "KEPT",
    "PAGE_BYTES",
    "RESULT",
    "RESULTS_AT",
    "SPILL",
    "USED",
    "WAITING",
    "Kind",
    "write_all",
]

HEADER = struct.Struct("<BIQ")
FUNCTION = struct.Struct("<BBI")
RESULT = struct.Struct("<QfBI")
"""One result: delivery, seconds, status, length of the payload that follows."""

CURRENT, FENCE, USED, SPILL, FLUSHES, WAITING = range(6)
RESULTS_AT = 64
PAGE_BYTES = 256 * 1024

COMPOSED, KEPT = 0x80000000, 0x40000000
"""A task's payload is places and the head of a composed one; its result is to stay here."""
FUNCTION_NUMBER = 0x3FFFFFFF

OK, RAISED, UNPICKLE_FAILED, PICKLE_FAILED, DELIVERED = 0, 1, 2, 3, 4
"""Status of a result; ``DELIVERED``: it went through the direct channel."""


class Kind(enum.IntEnum):
    """What a frame is; the number in its header is given in parentheses."""

    # To the slot.
    SETUP = 1
    """JSON: working directory, sys.path, argv, what the client's program has set."""
    INITIALIZER = 2
    """Payload of (initializer, initargs) (number of the function that it needs; ``COMPOSED``)."""
    FUNCTION = 3
    """A callable (number of the function): two flags, whether each task is to have a copy of its
    own and whether it is composed; the size of a JSON list; that list, of what it needs, what it
    binds in the script and the module that it is; then its pickle."""
    FORGET = 5
    """Drop a callable (number of the function)."""
    BATCH = 6
    """Tasks (number of the first delivery): count, then columns of leases, functions, sizes, then
    payloads. Flags in the column of functions: ``COMPOSED``, ``KEPT``."""
    STOP = 7
    """End."""
    RELEASE = 8
    """What a result left in a file has been taken (number of the result's blob); 0: the file that
    small ones share is open in the supervisor."""
    ENVIRONMENT = 9
    """JSON: variables for one task (delivery), which comes next."""

    # From the slot.
    READY = 20
    """Without an initializer, the supervisor's question for it."""
    RESULTS = 21
    RESULT_COMPOSED = 22
    """A large result (delivery): seconds, whether it is to be kept, places of blobs, its head."""
    FAILURE = 23
    """A failure too large for the buffer (delivery): seconds, status and the exception."""
    OUTPUT = 24
    """What a task printed (delivery): one byte of stream number, then the text."""
    DROPPED = 25
    """A task that had not begun is not run (delivery): it was taken back. So are those of its batch
    behind it."""
    INITIALIZER_FAILED = 26
    GONE = 27
    """A task that had not begun is not run (delivery): what it takes is not where it was said to
    be."""


def write_all(fd: int, data: bytes | memoryview) -> None:
    """Write all of ``data`` to a blocking pipe."""
    done = os.write(fd, data)
    if done < len(data):
        view = memoryview(data)
        while done < len(view):
            done += os.write(fd, view[done:])
