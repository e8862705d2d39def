"""The script ``__main__``: which objects are pickled as a name in it, and how its classes are made.

The process that runs tasks has a copy of the client's script; see ``worker/main_module.py``.
"""

from __future__ import annotations

import ast
import contextlib
import enum
import functools
import os
import pickle
import runpy
import sys
import types
import weakref
from collections.abc import Iterator, Mapping
from types import CellType, CodeType, FunctionType
from typing import Any

import cloudpickle

from cloudexec._describing import is_a
from cloudexec._errors import PayloadError

__all__ = [
    "NAMED",
    "NAMES",
    "Again",
    "fill_class",
    "fill_enum",
    "former",
    "function",
    "hooked",
    "is_defined_only",
    "instances_in",
    "make_class",
    "make_enum",
    "name_of",
    "namespace",
    "refill_class",
    "shared_cells",
    "way_to_script",
]

NAMED = frozenset({FunctionType, type, type(functools.lru_cache(len))})
"""Types of objects that know the name under which a module defines them; classes do so, too."""
_LOOKED_AT = 10_000
NAMES = frozenset({"__main__", "__mp_main__"})
"""Names of the script's module, in a program and in a process that ``multiprocessing`` spawned."""
hooked = set(NAMES)
"""Modules whose metaclasses and ``__init_subclass__`` do not run when a class is made from a
pickle, as their effects are sent."""
_ABSENT = object()
_ATOMS = frozenset({bool, bytes, complex, float, int, str, types.NoneType})


def namespace() -> dict[str, Any]:
    """Return the globals of the script."""
    return sys.modules["__main__"].__dict__


def name_of(obj: Any) -> str | None:
    """Return the name of a function or class among the script's globals, or ``None``."""
    try:
        name, module = obj.__qualname__, obj.__module__
    except Exception:
        return None
    if module not in NAMES or type(name) is not str:
        return None
    first, _, rest = name.partition(".")
    found = namespace().get(first, _ABSENT)
    while rest and found is not _ABSENT:
        first, _, rest = rest.partition(".")
        try:
            found = getattr(found, first)
        except Exception:
            return None
    return name if found is obj else None


def function(code: CodeType, closure: tuple[CellType, ...] | None) -> FunctionType:
    """Make a function that shares the globals of the script."""
    return FunctionType(code, namespace(), None, None, closure)


def shared_cells(
    fn: FunctionType, empty: tuple[CellType, ...] | None
) -> tuple[CellType, ...] | None:
    """Return what a function's closure is made from: cells that others may share, or empty ones.

    Functions that share a variable which one of them assigns to must go on sharing it. Other values
    are set later, as they may refer to the function. They are shared themselves.
    """
    if not empty:
        return empty
    pairs = zip(fn.__closure__ or (), empty, strict=True)
    return tuple(cell if _holds_atom(cell) else other for cell, other in pairs)


def _holds_atom(cell: CellType) -> bool:
    try:
        return type(cell.cell_contents) in _ATOMS
    except ValueError:
        return False  # it is empty


class Former:
    """The script as it was when this process was copied from the client.

    Attributes:
        space: The script's globals; empty if this process is no copy.
    """

    def __init__(self) -> None:
        self.space: dict[str, Any] = {}
        self._taken: set[type] = set()

    def take(self, qualname: str, meta: type, bases: tuple[type, ...]) -> type | None:
        """Return a class that is to become the client's of this name, if the script has it.

        Libraries that the client has told of a class know this one, and no other.
        """
        first, *rest = qualname.split(".")
        found = self.space.get(first)
        for name in rest:
            found = vars(found).get(name) if is_a(found, type) else None
        if not is_a(found, type) or found in self._taken:
            return None
        if type(found) is not meta or found.__bases__ != bases or found.__module__ not in NAMES:
            return None
        self._taken.add(found)
        return found


former = Former()


def _slots(content: Mapping[str, Any]) -> tuple[str, ...] | None:
    slots = content.get("__slots__")
    return slots if slots is None else (slots,) if isinstance(slots, str) else tuple(slots)


def make_class(
    meta: type,
    name: str,
    bases: tuple[type, ...],
    content: dict[str, Any],
    tracker: Any,
    extra: Any,
) -> type:
    """Make an empty class for a pickle by value, without running the hooks of a class definition.

    cloudpickle makes such classes as if they were defined anew. Here ``__init_subclass__`` and
    metaclasses of the script do not run, as the effects that they had in the client are pickled
    with the class and with the objects that they changed. If they ran again, a class would be
    registered twice, and keyword arguments of the definition would be missing.
    """
    track = cloudpickle.cloudpickle
    known = track._DYNAMIC_CLASS_TRACKER_BY_ID.get(tracker)
    if known is not None:
        return known  # type: ignore[no-any-return]
    resolved = types.resolve_bases(bases)
    found = former.take(content.get("__qualname__", name), meta, resolved)
    if found is not None and _slots(vars(found)) == _slots(content):
        return track._lookup_class_or_track(tracker, found)  # type: ignore[no-any-return]
    maker: Any = _maker(meta)
    try:
        with _no_hooks(resolved):
            if maker is meta:
                return track._make_skeleton_class(  # type: ignore[no-any-return]
                    meta, name, bases, content, tracker, extra
                )
            if resolved is not bases:
                content = {**content, "__orig_bases__": bases}
            made: Any = maker.__new__(meta, name, resolved, content)
            maker.__init__(made, name, resolved, content)
    except Exception:
        # Its metaclass makes it from a definition only.
        made = _defined(content.get("__qualname__", name))
        if made is None:
            raise
    return track._lookup_class_or_track(tracker, made)  # type: ignore[no-any-return]


_only_defined: set[type] = set()
"""Classes that are as the script has defined them here."""


def _defined(qualname: str) -> type | None:
    """Return a class that the script defines where it is run once more, or ``None``."""
    way, _ = way_to_script()
    try:
        found: Any = _run_again(*way)[qualname] if way is not None else None
    except Exception:
        return None
    if is_a(found, type):
        type.__setattr__(found, "__module__", "__main__")
        _only_defined.add(found)
        return found
    return None


_DEFINED_ONLY = frozenset(
    {"django", "mongoengine", "msgspec", "peewee", "pony", "sqlalchemy", "sqlmodel", "tortoise"}
)
"""Packages that keep tables of the classes that are defined with them."""


def is_defined_only(cls: type) -> bool:
    """Return whether a class of the script cannot be made without its definition."""
    return _maker(type(cls)).__module__.partition(".")[
        0
    ] in _DEFINED_ONLY or "_sa_class_manager" in vars(cls)


def make_enum(
    meta: type,
    bases: tuple[type, ...],
    name: str,
    qualname: str,
    kind: Any,
    members: list[tuple[str, Any, Any]],
    module: str,
    tracker: Any,
    extra: Any,
) -> type:
    """Make an empty enum for a pickle by value, with its members' values but no member's state."""
    track = cloudpickle.cloudpickle
    known = track._DYNAMIC_CLASS_TRACKER_BY_ID.get(tracker)
    if known is not None:
        return known  # type: ignore[no-any-return]
    found: Any = former.take(qualname, meta, bases)
    if found is not None and [(key, each.value) for key, each in found.__members__.items()] == [
        (key, value) for key, _, value in members
    ]:
        return track._lookup_class_or_track(tracker, found)  # type: ignore[no-any-return]
    maker: Any = _maker(meta)
    turns = iter(members)

    def __new__(cls: type, *_args: Any) -> Any:  # noqa: N807
        _name, plain, value = next(turns)
        has_args = kind.__new__ is not object.__new__
        member = kind.__new__(cls, plain) if has_args else object.__new__(cls)
        member._value_ = value
        return member

    content = maker.__prepare__(name, bases)
    head = {"__module__": module, "__qualname__": qualname, "__new__": __new__}
    for word, each in {**head, "__init__": lambda *_: None}.items():
        content[word] = each
    for key, _plain, each in members:
        content[key] = enum.member(each)
    with _no_hooks(bases):
        made = maker.__new__(meta, name, bases, content)
    for each in ("__init__", "__new_member__"):  # the enum's own attributes are set afterwards
        if each in vars(made):
            type.__delattr__(made, each)
    return track._lookup_class_or_track(tracker, made)  # type: ignore[no-any-return]


_filled: weakref.WeakKeyDictionary[type, dict[str, object]] = weakref.WeakKeyDictionary()
"""Names of the attributes that each class was last filled with, and what tells their data apart."""


def fill_class(made: type, state: tuple[dict[str, Any], Any]) -> None:
    """Set the attributes of a class that have changed, and delete those that it no longer has.

    Data that are those of the last time are left as tasks have changed them since: a class may
    count its objects in the client, and keep a model that tasks have loaded.
    """
    if made in _only_defined:
        return
    content, slots = state
    before, now = _filled.get(made, {}), {name: _data_of(content[name]) for name in content}
    for name in before.keys() - now:
        if name in vars(made):
            type.__delattr__(made, name)
    _filled[made] = now
    changed = {
        name: value
        for name, value in content.items()
        if now[name] is None or before.get(name) != now[name] or name not in vars(made)
    }
    cloudpickle.cloudpickle._class_setstate(made, (changed, slots))


def refill_class(made: type, state: tuple[dict[str, Any], Any]) -> None:
    """Set all attributes of a class: it comes with globals that may share objects with it."""
    _filled.pop(made, None)
    fill_class(made, state)


def _data_of(value: object) -> object:
    """Return what tells data of the same kind apart, or ``None`` for what is no data."""
    kind = type(value)
    if kind in _ATOMS:
        return kind, value
    if kind in (dict, frozenset, list, set, tuple):
        try:
            return pickle.dumps(value, 5)
        except Exception:
            return None
    return None


def fill_enum(made: Any, state: tuple[Any, dict[str, dict[str, Any]]]) -> None:
    """Set the attributes of an enum and of its members."""
    content, attributes = state
    cloudpickle.cloudpickle._class_setstate(made, content)
    for name, found in attributes.items():
        vars(made._member_map_[name]).update(found)


def _maker(meta: type) -> type:
    """Return the nearest base of a metaclass whose effects are not sent."""
    return next(each for each in meta.__mro__ if each.__module__ not in hooked)


@contextlib.contextmanager
def _no_hooks(bases: tuple[type, ...]) -> Iterator[None]:
    """Disable each ``__init_subclass__`` whose effects are sent while a class is made."""
    hooks = {
        each: vars(each)["__init_subclass__"]
        for base in bases
        for each in base.__mro__
        if each.__module__ in hooked and "__init_subclass__" in vars(each)
    }
    try:
        for each in hooks:
            type.__setattr__(each, "__init_subclass__", _passed_on(each))
        yield
    finally:
        for each, hook in hooks.items():
            type.__setattr__(each, "__init_subclass__", hook)


def _passed_on(cls: type) -> Any:
    def __init_subclass__(made: type) -> None:  # noqa: N807
        super(cls, made).__init_subclass__()  # type: ignore[arg-type]

    return classmethod(__init_subclass__)


class Again:
    """Globals that a process that runs tasks gets by running the script there once more.

    Args:
        way: How to run the script: ``"path"`` or ``"module"``.
        where: The path, or the module's name.
        kinds: The name of each global, with the class that its value has in the client.
    """

    def __init__(self, way: str, where: str, kinds: dict[str, str]) -> None:
        self._arguments = way, where, kinds

    def __reduce__(self) -> Any:
        return _take_again, self._arguments

    def take(self) -> dict[str, Any]:
        """Return the globals.

        Raises:
            BaseException: Whatever running the script raises.
        """
        return _take_again(*self._arguments)


@functools.cache
def _run_again(way: str, where: str) -> dict[str, Any]:
    run = runpy.run_module if way == "module" else runpy.run_path
    return run(where, run_name="__mp_main__")


def _is_current(value: object) -> bool:
    """Return whether a value is a class of no library that was imported anew."""
    if not is_a(value, type):
        return False
    for each in (type(value), *value.__mro__):
        if each.__module__ not in NAMES:
            found: Any = sys.modules.get(each.__module__)
            for name in each.__qualname__.split("."):
                found = getattr(found, name, None)
            if found is not each:
                return False
    return True


def _take_again(way: str, where: str, kinds: dict[str, str]) -> dict[str, Any]:
    found = former.space
    if not found or not all(_is_current(found.get(name)) for name in kinds):
        found = _run_again(way, where)
    for name, kind in kinds.items():
        if name not in found or (found[name] is None and kind != "builtins.NoneType"):
            raise PayloadError(
                f"global {name} cannot be sent ({kind}), and the script makes it only when it runs "
                f"as the program: make it in an initializer, or above if __name__ == '__main__':"
            )
    taken = {name: found[name] for name in kinds}
    for cls in taken.values():
        if is_a(cls, type) and cls.__module__ in NAMES:
            type.__setattr__(cls, "__module__", "__main__")
    for each, cls in instances_in(taken):
        mine: Any = sys.modules["__main__"]
        for part in cls.__qualname__.split("."):
            mine = getattr(mine, part, None)
        # Give the object the class that tasks know, whose functions use the same globals as tasks.
        with contextlib.suppress(TypeError, AttributeError):
            each.__class__ = mine
    return taken


def instances_in(value: Any) -> Iterator[tuple[Any, type]]:
    """Yield instances of the script's classes in a value that only the script can make."""
    seen: set[int] = set()
    waiting = [value]
    while waiting and len(seen) < _LOOKED_AT:
        each = waiting.pop()
        if id(each) in seen:
            continue
        seen.add(id(each))
        kind = type(each)
        if kind is dict:
            waiting += each.values()
        elif kind in (list, tuple, set):
            waiting += each
        elif kind.__module__ in NAMES and not is_a(each, type):
            yield each, kind
            waiting += getattr(each, "__dict__", {}).values()


@functools.cache
def way_to_script() -> tuple[tuple[str, str] | None, str]:
    """Return how another process on this machine can run the script up to its guard.

    The guard is the line ``if __name__ == "__main__":``.

    Returns:
        The way and the path or module name for ``Again``, or ``None``; and if it is ``None``, the
        reason, if the user can change it.
    """
    names = namespace()
    path, spec = names.get("__file__"), names.get("__spec__")
    if not isinstance(path, str) or not path.endswith(".py"):
        return None, ""
    try:
        with open(path, "rb") as file:
            tree = ast.parse(file.read())
    except (OSError, ValueError, SyntaxError):
        return None, ""
    if not any(isinstance(each, ast.If) and _is_guard(each.test) for each in tree.body):
        return None, "or put what starts the program under if __name__ == '__main__':"
    if spec is not None:
        return ("module", spec.name), ""
    return ("path", os.path.abspath(path)), ""


def _is_guard(test: ast.expr) -> bool:
    names = {each.id for each in ast.walk(test) if isinstance(each, ast.Name)}
    values = {each.value for each in ast.walk(test) if isinstance(each, ast.Constant)}
    return "__name__" in names and "__main__" in values
