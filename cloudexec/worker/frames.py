"""The protocol between supervisor and slot: frames over two pipes, and a shared page of memory.

A frame is a header (kind, length of the body, a number) and its body.

Each time a task is sent to a slot, that delivery has a number. Numbers count up from 1 for each
slot and are never used again: a task that is taken back and sent once more has another number. The
slot takes deliveries in the order of their numbers. So no answer of the slot, and nothing that it
has written into the shared page, can be mistaken for a later delivery of the same task.

The shared page has six cells of eight bytes, then a buffer for results:

* ``CURRENT``: the delivery that the slot runs, or 0. The slot writes it before it begins the task,
  and does not write the next one before the answer is in the buffer or in the pipe.
* ``FENCE``: the slot must not begin any delivery up to this number. The supervisor writes it to
take
  tasks back. The slot reads it after it has written ``CURRENT``, and drops the delivery if its
  number is not higher.
* ``SPILL``: whether large results go to disk rather than memory, written by the supervisor.
* ``USED``: bytes of finished results in the buffer that have not been written to the pipe yet.
* ``FLUSHES``: how often the slot has written the buffer to the pipe. If it changes while the
  supervisor reads the buffer, the bytes that were read are not valid.
* ``WAITING``: while the slot waits for its next frame, how many bytes it has read in all, plus 1;
  otherwise 0. If it has read all bytes that were ever written to it, it has answered all tasks.

The slot writes ``CURRENT`` and then reads ``FENCE``. The supervisor writes ``FENCE`` and later
reads ``CURRENT``. So at least one of them sees what the other wrote: a delivery that the supervisor
does not find in ``CURRENT`` is not begun. This holds if the writes of one processor reach the other
in time. They do so within microseconds, and the supervisor waits for milliseconds in between.

So even if a slot is killed, or is in a call that holds the GIL for minutes, the supervisor knows
which task it ran, has the results of the tasks before, and can take back the tasks behind.
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
"""Flags of a task: its payload consists of places of blobs and a head; its result stays here."""
FUNCTION_NUMBER = 0x3FFFFFFF

OK, RAISED, UNPICKLE_FAILED, PICKLE_FAILED, DELIVERED = 0, 1, 2, 3, 4
"""Status of a result. ``DELIVERED`` means that it was sent through the direct channel."""


class Kind(enum.IntEnum):
    """The kind of a frame. Parentheses say what the number in its header means."""

    # To the slot.
    SETUP = 1
    """JSON: the working directory, sys.path, argv, and settings of the client's program."""
    INITIALIZER = 2
    """Payload of (initializer, initargs) (number of the function that it needs; ``COMPOSED``)."""
    FUNCTION = 3
    """A callable (number of the function). The body has two flags (whether each task gets a copy of
    its own, and whether the pickle is composed), the size of a JSON list, that list (the functions
    that it needs, the names that it binds in the script, and the module that it is), and the
    pickle."""
    FORGET = 5
    """Drop a callable (number of the function)."""
    BATCH = 6
    """Tasks (number of the first delivery): count, then columns of leases, functions, sizes, then
    payloads. Flags in the column of functions: ``COMPOSED``, ``KEPT``."""
    STOP = 7
    """The slot must end."""
    RELEASE = 8
    """A part of a result has been taken from its file (number of the part's blob). With the number
    0: the supervisor has opened the file that small parts share."""
    ENVIRONMENT = 9
    """JSON: environment variables for one task (delivery), which comes next."""

    # From the slot.
    READY = 20
    """The slot can run tasks: its initializer has returned. Without an initializer, the supervisor
    asks for this answer by an empty frame of the same kind."""
    RESULTS = 21
    RESULT_COMPOSED = 22
    """A large result (delivery): seconds, whether it stays here, places of its blobs, its head."""
    FAILURE = 23
    """A failure too large for the buffer (delivery): seconds, status and the exception."""
    OUTPUT = 24
    """Output of a task (delivery): one byte with the number of the stream, then the text."""
    DROPPED = 25
    """A task was taken back before it began, and does not run (delivery). The tasks behind it in
    its batch do not run either."""
    INITIALIZER_FAILED = 26
    GONE = 27
    """A task does not run (delivery), because one of its blobs is not at the place that the slot
    was told."""


def write_all(fd: int, data: bytes | memoryview) -> None:
    """Write all of ``data`` to a blocking pipe."""
    done = os.write(fd, data)
    if done < len(data):
        view = memoryview(data)
        while done < len(view):
            done += os.write(fd, view[done:])
