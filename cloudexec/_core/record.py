"""A decorator for classes of named values that is ten times as fast as ``dataclass``.

``dataclass(frozen=True, slots=True)`` compiles half a dozen functions for each class. For the forty
classes of events and commands that took a tenth of the time until an executor's first result.
"""

from __future__ import annotations

from typing import Any, TypeVar, dataclass_transform

__all__ = ["record"]

T = TypeVar("T")


@dataclass_transform(frozen_default=True)
def record(cls: type[T]) -> type[T]:
    """Return a class with a slot for each annotation, and with ``__init__``, ``==`` and a repr.

    Its instances must not be changed, which type checkers enforce.
    """
    names = tuple(cls.__annotations__)
    body = {
        name: value
        for name, value in vars(cls).items()
        if name not in names and name not in ("__dict__", "__weakref__")
    }
    scope: dict[str, Any] = {f"_{name}": vars(cls)[name] for name in names if name in vars(cls)}
    takes = [f"{name}=_{name}" if f"_{name}" in scope else name for name in names]
    sets = [f"self.{name}={name}" for name in names] or ["pass"]
    exec(f"def __init__({','.join(['self', *takes])}):\n {';'.join(sets)}", scope)
    body |= {
        "__slots__": names,
        "__match_args__": names,
        "__init__": scope["__init__"],
        "__eq__": _is_equal,
        "__hash__": _hash,
        "__repr__": _repr,
    }
    made: type[T] = type(cls.__name__, cls.__bases__, body)
    return made


def _values(self: Any) -> tuple[Any, ...]:
    return tuple([getattr(self, name) for name in self.__slots__])


def _is_equal(self: Any, other: object) -> Any:
    return _values(self) == _values(other) if type(other) is type(self) else NotImplemented


def _hash(self: Any) -> int:
    return hash(_values(self))


def _repr(self: Any) -> str:
    values = [f"{name}={getattr(self, name)!r}" for name in self.__slots__]
    return f"{type(self).__qualname__}({', '.join(values)})"
