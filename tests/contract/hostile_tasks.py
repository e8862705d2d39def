"""Exceptions and values whose own methods raise; importable by workers."""

from __future__ import annotations

import asyncio
import os
from typing import Any

from contract_tasks import append

KINDS: tuple[type[BaseException], ...] = (
    KeyError,
    SystemExit,
    KeyboardInterrupt,
    GeneratorExit,
    RecursionError,
    MemoryError,
    asyncio.CancelledError,
)
"""Exceptions for methods to raise: ordinary ones, and those that end programs, threads or loops."""

_PROPERTIES = (
    "__cause__",
    "__class__",
    "__context__",
    "__dict__",
    "__notes__",
    "__suppress_context__",
    "__traceback__",
    "args",
    "exceptions",
)
METHODS = (
    *_PROPERTIES,
    "__bool__",
    "__dir__",
    "__eq__",
    "__format__",
    "__getattr__",
    "__getattribute__",
    "__hash__",
    "__len__",
    "__reduce__",
    "__reduce_ex__",
    "__repr__",
    "__setattr__",
    "__setstate__",
    "__str__",
    "add_note",
    "with_traceback",
)
PLACES = ("itself", "cause", "context", "cycle", "group", "group in a group")


def hostile(method: str, kind: type[BaseException], base: type = Exception) -> Any:
    """Make an instance of a class one of whose methods or attributes raises."""

    def refuse(self: object, *args: object, **kwargs: object) -> Any:
        raise kind("hostile")

    body = {method: property(refuse) if method in _PROPERTIES else refuse}
    made = type("Hostile", (base,), body)
    if issubclass(made, ExceptionGroup):
        return made.__new__(made, "group", [ValueError("one")])
    return made.__new__(made)


def fail(path: str, method: str, kind: type[BaseException], place: str) -> None:
    """Write a trace, and raise a hostile exception, or one that has it in its chain."""
    append(path, f"{os.getpid()}")
    if method == "exceptions":
        raise hostile(method, kind, base=ExceptionGroup)
    exc = hostile(method, kind)
    if place == "itself":
        raise exc
    if place == "cause":
        raise ValueError("the last one") from exc
    if place == "context":
        try:
            raise exc
        except type(exc):
            raise ValueError("the last one")
    if place == "cycle":
        other = ValueError("the other one")
        other.__cause__ = exc
        vars(BaseException)["__cause__"].__set__(exc, other)
        raise exc
    group = ExceptionGroup("group", [exc])
    raise group if place == "group" else ExceptionGroup("outer", [ValueError("one"), group])


class Unpickled:
    """Raises an exception when it is unpickled in one process, and in no other.

    Args:
        pid: Id of the process.
        kind: Class of the exception.
        method: Name of the exception's method that raises, too, or an empty string.
    """

    def __init__(self, pid: int, kind: type[BaseException], method: str = "") -> None:
        self.state = pid, kind, method

    def __reduce__(self) -> Any:
        return unpickle, self.state


def unpickle(pid: int, kind: type[BaseException], method: str) -> Unpickled:
    if os.getpid() == pid:
        raise hostile(method, kind, base=kind) if method else kind("unpickling")
    return Unpickled(pid, kind, method)


class CarriesIt(Exception):
    """An exception that refers to a value, and can be pickled if the value can."""


def give(*values: Any) -> Any:
    return values if len(values) > 1 else values[0]


def raise_with(value: Any) -> None:
    raise CarriesIt(value)


def make(method: str, kind: type[BaseException]) -> Any:
    """Return an object of a hostile class that is no exception; the class is pickled by value."""
    return hostile(method, kind, base=object)


class Unpicklable:
    """Raises when it is pickled.

    Args:
        kind: Class of the exception.
        method: Name of the exception's method that raises, too, or an empty string.
    """

    def __init__(self, kind: type[BaseException], method: str = "") -> None:
        self._kind = kind
        self._method = method

    def __reduce__(self) -> Any:
        if self._method:
            raise hostile(self._method, SystemExit, base=self._kind)
        raise self._kind("pickling")

    def __call__(self) -> None:
        """Do nothing; the object is callable so that it can be submitted."""
