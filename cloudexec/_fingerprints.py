"""Finds out whether a function or class pickled by value has changed since it was pickled.

"By value" means that the pickle has the function's code, and "by reference" that it has only a
name. The pickle of a function by value depends on its code, defaults, annotations, attributes,
closure and the globals that it names, and on the same of each function by value among these. The
pickle of a class depends on its attributes. Where all of these are immutable, it is enough to check
that they are the same objects as before, which takes a hundredth of the time of pickling. Globals
of the script are left out, as ``_script`` watches them.
"""

from __future__ import annotations

import abc
import dis
import enum
import functools
import logging
import sys
from collections.abc import Collection, Iterator
from types import (
    BuiltinFunctionType,
    CodeType,
    FunctionType,
    GenericAlias,
    GetSetDescriptorType,
    MemberDescriptorType,
    ModuleType,
    NoneType,
    UnionType,
)
from typing import Any, Protocol

from cloudexec import _main
from cloudexec._annotations import CLASS_NAMES, evaluated
from cloudexec._describing import is_a

__all__ = ["Definition", "Fingerprint", "Unstable", "lookup", "travels_by_value"]

_MISSING = object()
_IMMUTABLE = frozenset({int, float, complex, bool, str, bytes, range, NoneType, type(Ellipsis)})
_IMMUTABLE_ELSEWHERE = {
    "datetime": {"date", "timedelta", "timezone"},
    "decimal": {"Decimal"},
    "fractions": {"Fraction"},
    "numpy": {
        *("bool", "bool_", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32"),
        *("uint64", "float16", "float32", "float64", "complex64", "complex128", "ufunc"),
    },
    "pathlib": {"PosixPath", "PurePosixPath"},
    "pathlib._local": {"PosixPath", "PurePosixPath"},
    "re": {"Pattern"},
    "uuid": {"UUID"},
}
"""Names of immutable types by module, so that these modules need not be imported."""
_NAMED = (FunctionType, BuiltinFunctionType, type(functools.lru_cache(len)))
"""Types that are pickled by name, as classes are, if they can be found under that name."""
_ALIASES = (GenericAlias, UnionType)
_ALIAS_MODULES = ("typing", "collections.abc")
"""Modules whose classes have only type hints as instances."""
_CODES_KEPT = 4096
_NOT_GLOBAL = frozenset(
    {
        "DELETE_ATTR",
        "IMPORT_FROM",
        "IMPORT_NAME",
        "LOAD_ATTR",
        "LOAD_METHOD",
        "LOAD_SUPER_ATTR",
        "STORE_ATTR",
    }
)
"""Instructions whose names are not names of globals."""
_REBINDING = frozenset({"STORE_GLOBAL", "DELETE_GLOBAL"})
_REBINDING_CELLS = frozenset({"STORE_DEREF", "DELETE_DEREF"})
_SETTING = frozenset({"STORE_ATTR", "DELETE_ATTR"})
_SETTING_NAMES = frozenset({"setattr", "delattr", "vars", "__dict__"})


class Unstable(Exception):
    """The state may change without being noticed."""


class _Watched(Protocol):
    """The state of one function, class or other object, as it was when this was made."""

    def values(self) -> Iterator[Any]:
        """Yield all objects of the state."""

    def holds(self) -> bool:
        """Return whether the state still consists of the same objects."""


class Fingerprint:
    """The state of a function by value, and of all functions that are pickled with it.

    Args:
        fn: The function.
        by_value: Modules that were registered with cloudpickle to be pickled by value.

    Raises:
        Unstable: If part of the state is mutable, or the function itself changes it.
    """

    __slots__ = ("_parts",)

    def __init__(self, fn: FunctionType, by_value: Collection[str]) -> None:
        found = [fn]
        self._parts: list[_Part] = []
        names_one = sets = False
        for each in found:  # the loop appends to this list
            part = _Part(each)
            self._parts.append(part)
            sets |= part.sets
            for value in part.values():
                for function in _functions_in(value, by_value):
                    names_one = True
                    if not any(function is other for other in found):
                        found.append(function)
        if sets and names_one:
            raise Unstable  # it may set attributes of a function that it names

    def holds(self) -> bool:
        """Return whether the function is unchanged."""
        for part in self._parts:  # noqa: SIM110 (all() takes twice as long)
            if not part.holds():
                return False
        return True


class Definition:
    """The state of a global of the script: a function, a class, or another value.

    Args:
        value: The global's value.
        by_value: Modules that were registered with cloudpickle to be pickled by value.

    Raises:
        Unstable: If the state may change without being noticed.
    """

    __slots__ = ("_parts", "_value")

    def __init__(self, value: Any, by_value: Collection[str]) -> None:
        self._value = value
        self._parts: list[_Watched] = []
        found: list[Any] = []
        if _main.name_of(value) is None:
            found += _functions_in(value, by_value)
        else:
            found.append(value)
        for each in found:  # the loop appends to this list
            part = _part_of(each)
            self._parts.append(part)
            for value in part.values():
                for function in _functions_in(value, by_value):
                    if not any(function is other for other in found):
                        found.append(function)

    def holds(self, value: Any) -> bool:
        """Return whether ``value`` is the same object as before, and unchanged."""
        if value is not self._value:
            return False
        for part in self._parts:  # noqa: SIM110
            if not part.holds():
                return False
        return True


def _part_of(value: Any) -> _Watched:
    if is_a(value, type):
        return _Class(value)
    if type(value) is FunctionType:
        return _Part(value, kept=True)
    return _Attributes(value)  # a function wrapped by functools.lru_cache


_OF_CLASS = (MemberDescriptorType, GetSetDescriptorType)
_SETTLED = frozenset({"__dataclass_fields__", "__dataclass_params__", "_abc_impl"})
"""Attributes of a class that follow from its other attributes."""


_OF_MEMBERS = frozenset({"_name_", "_value_", "__objclass__", "_sort_order_"})
"""Attributes that every member of an enum has."""


class _Class:
    """The state of a class by value."""

    __slots__ = ("_cls", "_members", "_names", "_registered")

    def __init__(self, cls: type) -> None:
        self._cls = cls
        self._names = _settled(cls)
        members: list[Any] = []
        if isinstance(cls, enum.EnumMeta):
            members += cls.__members__.values()
        self._members = [(each, dict(vars(each))) for each in members]
        self._registered = abc.get_cache_token() if isinstance(cls, abc.ABCMeta) else None

    def values(self) -> Iterator[Any]:
        if isinstance(self._cls, enum.EnumMeta):
            for _, attributes in self._members:
                for name, value in attributes.items():
                    if name not in _OF_MEMBERS:
                        yield value
            return  # all else in an enum stays as it was defined
        yield from self._cls.__bases__
        yield from (evaluated(self._cls) or {}).values()
        for name, value in self._names.items():
            if is_a(value, _OF_CLASS) or name in _SETTLED or name in CLASS_NAMES:
                continue
            if type(value) in (staticmethod, classmethod):
                yield value.__func__
            elif type(value) is property:
                yield from (value.fget, value.fset, value.fdel)
            elif name != "__annotations__":
                yield value

    def holds(self) -> bool:
        now, then = vars(self._cls), self._names
        if len(now) != len(then):
            now = _settled(self._cls)  # type: ignore[assignment]
            if len(now) != len(then):
                return False
        for name, value in then.items():
            if now.get(name, _MISSING) is not value:
                return False
        for member, attributes in self._members:
            if not _is_same(member.__dict__, attributes):
                return False
        return self._registered is None or abc.get_cache_token() == self._registered


def _settled(cls: type) -> dict[str, Any]:
    """Return the attributes of a class, without those that Python adds when the class is used."""
    found = dict(vars(cls))
    for name in ("__slotnames__", "__annotations_cache__"):
        found.pop(name, None)
    if found.get("__annotations__", True) == {}:
        del found["__annotations__"]
    return found


class _Attributes:
    """The state of an object that wraps a function: its attributes."""

    __slots__ = ("_names", "_value")

    def __init__(self, value: Any) -> None:
        self._value = value
        self._names = dict(vars(value))

    def values(self) -> Iterator[Any]:
        for name, value in self._names.items():
            if name != "__annotations__":
                yield value

    def holds(self) -> bool:
        return _is_same(vars(self._value), self._names)


class _Part:
    """The state of one function by value.

    Args:
        fn: The function.
        kept: Whether changes that the function makes to itself stay in the process that runs it.

    Raises:
        Unstable: If the function may change itself and such changes must not stay.
    """

    __slots__ = (
        "_annotations",
        "_attributes",
        "_cells",
        "_code",
        "_defaults",
        "_fn",
        "_keyword_defaults",
        "_names",
        "_words",
        "sets",
    )

    def __init__(self, fn: FunctionType, *, kept: bool = False) -> None:
        if fn.__dict__ and not kept:
            raise Unstable
        self._fn = fn
        self._code = fn.__code__
        self._attributes = dict(fn.__dict__)
        names: tuple[str, ...] = ()
        self.sets = False
        of_script = fn.__globals__ is _main.namespace()
        if not (kept and of_script):
            names, self.sets, rebinds, rebinds_cells = _anatomy(self._code)
            if (rebinds and not of_script) or rebinds_cells:
                raise Unstable  # then its state is not constant
        if of_script:
            names = ()
        self._defaults = fn.__defaults__
        self._keyword_defaults = dict(fn.__kwdefaults__ or ())
        self._annotations = dict(evaluated(fn) or ())
        self._words = (fn.__name__, fn.__qualname__, fn.__module__, fn.__doc__)
        self._cells = [(cell, contents(cell)) for cell in fn.__closure__ or ()]
        get = fn.__globals__.get
        self._names = [(name, get(name, _MISSING)) for name in names]

    def values(self) -> Iterator[Any]:
        yield from self._annotations.values()
        yield from self._attributes.values()
        yield from self._defaults or ()
        yield from self._keyword_defaults.values()
        for _, value in self._cells:
            yield value
        for _, value in self._names:
            yield value

    def holds(self) -> bool:
        fn = self._fn
        if fn.__code__ is not self._code or fn.__defaults__ is not self._defaults:
            return False
        if (fn.__dict__ or self._attributes) and not _is_same(fn.__dict__, self._attributes):
            return False
        name, qualname, module, doc = self._words
        if not (
            fn.__name__ is name
            and fn.__qualname__ is qualname
            and fn.__module__ is module
            and fn.__doc__ is doc
        ):
            return False
        annotations, then = evaluated(fn), self._annotations
        if (annotations or then) and not _is_same(annotations or {}, then):
            return False
        defaults, then = fn.__kwdefaults__, self._keyword_defaults
        if (defaults or then) and not _is_same(defaults, then):
            return False
        get = fn.__globals__.get
        for name, value in self._names:
            if get(name, _MISSING) is not value:
                return False
        for cell, value in self._cells:  # noqa: SIM110
            if contents(cell) is not value:
                return False
        return True


def _is_same(now: dict[str, Any] | None, then: dict[str, Any]) -> bool:
    """Return whether a dictionary has the same objects under the same names in the same order."""
    return (
        now is not None
        and list(now) == list(then)
        and all(now.get(name, _MISSING) is then[name] for name in then)
    )


def contents(cell: Any) -> Any:
    """Return the value in a cell of a closure, or ``_MISSING`` if the cell is empty."""
    try:
        return cell.cell_contents
    except ValueError:
        return _MISSING


def lookup(fn: Any) -> Any:
    """Return the object that a pickle by reference of ``fn`` would find.

    If ``fn`` itself is pickled by value, this is another object or ``None``.
    """
    name = getattr(fn, "__module__", None)
    if name is None or name == "__main__":
        return None
    found: Any = sys.modules.get(name)
    if found is None:
        return None
    try:
        for part in fn.__qualname__.split("."):
            found = getattr(found, part)
    except AttributeError:
        return None
    return found


def travels_by_value(module: str, by_value: Collection[str]) -> bool:
    """Return whether a module, or a package that it is in, is registered to be pickled by value."""
    while by_value and module:
        if module in by_value:
            return True
        module = module.rpartition(".")[0]
    return False


def _codes_in(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if type(constant) is CodeType:
            yield from _codes_in(constant)


@functools.lru_cache(_CODES_KEPT)
def _anatomy(code: CodeType) -> tuple[tuple[str, ...], bool, bool, bool]:
    """Return how a function uses names.

    Returns:
        The globals that the function names, and whether it sets attributes, changes its own
        globals, and changes its own closure.
    """
    names, sets, rebinds, rebinds_cells = set(), False, False, False
    for each in _codes_in(code):
        rebinds |= "globals" in each.co_names
        sets |= not _SETTING_NAMES.isdisjoint(each.co_names)
        for instruction in dis.get_instructions(each):
            operation = instruction.opname
            if operation in _REBINDING:
                rebinds = True
            elif operation in _REBINDING_CELLS and instruction.argval in each.co_freevars:
                rebinds_cells = True
            elif operation in _SETTING:
                sets = True
            elif instruction.opcode in dis.hasname and operation not in _NOT_GLOBAL:
                names.add(instruction.argval)
    return tuple(sorted(names)), sets, rebinds, rebinds_cells


def rebinds_cells(code: CodeType) -> bool:
    """Return whether a function assigns to variables of the function that it was made in."""
    return _anatomy(code)[3]


def _functions_in(value: Any, by_value: Collection[str]) -> Iterator[FunctionType]:
    """Yield the functions by value in an object of a function's state.

    Raises:
        Unstable: If the object is not immutable.
    """
    kind = type(value)
    if kind in _IMMUTABLE or value is _MISSING:
        return
    if kind is ModuleType:
        name = value.__name__
        if sys.modules.get(name) is not value or getattr(value, "__spec__", None) is None:
            raise Unstable
        if travels_by_value(name, by_value):
            raise Unstable  # all objects in the module are pickled by value, too
        return
    if kind is tuple or kind is frozenset:
        for item in value:
            yield from _functions_in(item, by_value)
        return
    if kind in (BuiltinFunctionType, type) and getattr(value, "__module__", None) == "builtins":
        return
    named = kind in _NAMED or issubclass(kind, type)  # other objects are pickled with their state
    if named and _main.name_of(value) is not None:
        return  # a global of the script, which has a Definition of its own
    if named and lookup(value) is value and not travels_by_value(value.__module__, by_value):
        return
    if kind is FunctionType:
        yield value
    elif kind in _ALIASES or (kind.__module__ in _ALIAS_MODULES and lookup(kind) is kind):
        parts = [getattr(value, name, ()) for name in ("__args__", "__metadata__")]
        for item in (getattr(value, "__origin__", None), *parts[0], *parts[1]):
            if item is not value:
                yield from _functions_in(item, by_value)
    elif kind is logging.Logger and logging.root.manager.loggerDict.get(value.name) is value:
        return  # a logger is pickled by name
    elif kind.__name__ not in _IMMUTABLE_ELSEWHERE.get(kind.__module__, ()) or (
        lookup(kind) is not kind
    ):
        raise Unstable
