"""Replaces futures among the arguments of a call by the results of their calls, in a worker.

A call that takes futures is pickled when it is submitted, with a placeholder for each future. When
the results have arrived, the client writes a few opcodes in front of that pickle. They call
``hold()`` with the bytes of the results, and unpickling a placeholder calls ``take()``. So the
client neither unpickles a result nor pickles it again, and it pickles no argument twice.
"""

from __future__ import annotations

import pickle
from typing import Any

from cloudexec._records import load_nested

__all__ = ["hold", "same", "set_state", "take", "writeable"]

_loads = pickle.loads
# The results for the call that is being unpickled; a slot unpickles one call at a time.
_held: list[Any] = []


def hold(*pickled: Any) -> None:
    """Keep the results for the call that is unpickled next.

    Args:
        *pickled: For each result its pickle, or a tuple of its head, the numbers of the blobs
        (large
            parts) that the head refers to, and their contents.
    """
    _held[:] = pickled


def take(index: int) -> Any:
    """Unpickle one of the results; the pickler makes sure that each is taken only once."""
    pickled, _held[index] = _held[index], None
    if type(pickled) is tuple:
        return load_nested(pickled[0], pickled[1], pickled[2:])
    return _loads(pickled)


def writeable(buffer: Any, dtype: Any, shape: tuple[int, ...], order: str) -> Any:
    """Make a writeable array over a buffer that arrived read-only and is used by nothing else."""
    import numpy

    if type(buffer) is memoryview and buffer.readonly:
        whole = buffer.obj
        buffer = whole if memoryview(whole).nbytes == buffer.nbytes else bytearray(buffer)
    elif type(buffer) is bytes:
        buffer = bytearray(buffer)
    return numpy.frombuffer(buffer, dtype=dtype).reshape(shape, order=order)  # type: ignore[call-overload]


def set_state(made: Any, state: tuple[Any, tuple[Any, Any], Any]) -> None:
    """Set the state of a function or class that was pickled by value."""
    _, (set_of_its_kind, content), _ = state
    set_of_its_kind(made, content)


def same(value: Any) -> Any:
    """Return the value of a future that was done and unpickled when the call was submitted."""
    return value
