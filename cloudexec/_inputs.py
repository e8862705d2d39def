"""The worker's end of dependencies: results of other calls, put in the place of their futures.

A call that takes futures is pickled when it is submitted, with a placeholder for each of them.
When their results have come, the client writes a few opcodes in front of that pickle, which call
``hold()`` with the results as the bytes that they arrived in; unpickling a placeholder calls
``take()``. So the client neither decodes a result nor encodes it again, and pickles no argument
twice.
"""

from __future__ import annotations

import pickle
from typing import Any

from cloudexec._records import load_nested

__all__ = ["hold", "same", "set_state", "take", "writeable"]

_loads = pickle.loads
_held: list[Any] = []  # of the call that is being unpickled; a slot unpickles one at a time


def hold(*pickled: Any) -> None:
    """Keep the results that the call behind this one in the stream is about to ask for.

    Args:
        *pickled: Of each result its pickle, or a tuple of its head, the numbers of the blobs that
            this refers to, and their contents.
    """
    _held[:] = pickled


def take(index: int) -> Any:
    """Unpickle one of the results; each is asked for once, the pickler sees to that."""
    pickled, _held[index] = _held[index], None
    if type(pickled) is tuple:
        return load_nested(pickled[0], pickled[1], pickled[2:])
    return _loads(pickled)


def writeable(buffer: Any, dtype: Any, shape: tuple[int, ...], order: str) -> Any:
    """Make an array over a buffer that came read-only, and is nobody else's."""
    import numpy

    if type(buffer) is memoryview and buffer.readonly:
        whole = buffer.obj
        buffer = whole if memoryview(whole).nbytes == buffer.nbytes else bytearray(buffer)
    elif type(buffer) is bytes:
        buffer = bytearray(buffer)
    return numpy.frombuffer(buffer, dtype=dtype).reshape(shape, order=order)  # type: ignore[call-overload]


def set_state(made: Any, state: tuple[Any, tuple[Any, Any], Any]) -> None:
    """Give a function, or a class, that came by value what it refers to."""
    _, (set_of_its_kind, content), _ = state
    set_of_its_kind(made, content)


def same(value: Any) -> Any:
    """Stand for the value of a future that was done, and read, when it was submitted."""
    return value
