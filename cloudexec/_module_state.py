"""Carries over what a program has set in its own modules, such as ``config.rate = 5``, to workers.

Workers import the user's own modules anew, so a value that the program has assigned to a global of
such a module, or to an attribute of a class in it, would be missing there. The client sends the
data in its own modules when the executor starts. A worker compares them with what it has after the
import of a module, and sets what differs. As the client's values are compared with values that the
same source has made, nothing is set in a module that the program has not changed.

Only data are sent: builtin types, those of the standard library and of numpy, and instances of the
user's own classes. If a module has something else, such as a connection, and the worker has an
object of another class in that place, the module is in a state that cannot be sent in part. It
stays as it was imported.

What such a module has been given of the script, such as a function that was registered in it, is
sent with the script's globals (``_script``), as only these can be found in a worker by then.
"""

from __future__ import annotations

import functools
import importlib
import io
import pickle
import random
import sys
from abc import ABCMeta
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from types import BuiltinFunctionType, FunctionType, MappingProxyType, ModuleType, NoneType
from typing import Any, NamedTuple

from cloudexec._log import Log
from cloudexec._main import NAMES, hooked
from cloudexec._modules import own_modules
from cloudexec._settings import when_imported

__all__ = ["ModuleState", "OfScript", "apply", "at", "collect", "take"]

_MOST_BYTES = 1 << 20
"""Most bytes of one value, and of all together: workers get them with their first message."""
_MOST_LOOKED_AT = 16 << 20
"""Bytes of data in modules after which further modules are not looked at, as that takes time."""
_ATOMS = frozenset({bool, bytes, complex, float, int, NoneType, str})
_CODE = (BuiltinFunctionType, FunctionType, ModuleType, type)
_ABSENT = object()

_log = Log()

Place = tuple[str, ...]
"""The names of a module and of a global in it, or of a class in it and of an attribute of that."""


class _NotDataError(Exception):
    """A value has something in it that is not sent."""


class _OfScriptError(Exception):
    """A value has something of the script in it."""


class _Pickler(pickle.Pickler):
    """Pickles data, by reference what is imported, and refuses all else."""

    def __init__(self, file: _Bounded, own: frozenset[str]) -> None:
        super().__init__(file, protocol=5)
        self._own = own

    def reducer_override(self, obj: Any) -> Any:
        kind = type(obj)
        if isinstance(obj, _CODE):
            if getattr(obj, "__module__", "") in NAMES:
                raise _OfScriptError
            return NotImplemented
        if isinstance(obj, random.Random):
            raise _NotDataError  # all processes would draw the same numbers
        if getattr(obj, "nbytes", 0) > _MOST_BYTES:
            raise _NotDataError
        name = kind.__module__
        top = name.partition(".")[0]
        if name in NAMES:
            raise _OfScriptError
        if (
            name in self._own
            or top in sys.stdlib_module_names
            or (top == "numpy" and not name.startswith("numpy.random"))
        ):
            return NotImplemented
        raise _NotDataError


class _Bounded(io.BytesIO):
    """Raises ``_NotDataError`` instead of becoming too large."""

    def write(self, data: Any) -> int:
        if self.tell() + len(data) > _MOST_BYTES:
            raise _NotDataError
        return super().write(data)


class _Dumper:
    """Pickles values one by one, each as if it were the only one.

    Args:
        own: Names of the user's own modules.
    """

    def __init__(self, own: frozenset[str]) -> None:
        self._file = _Bounded()
        self._pickler = _Pickler(self._file, own)

    def dumps(self, value: Any) -> tuple[bytes | None, bool]:
        """Return the pickle of a value, or ``None``; and whether the script is the reason."""
        self._file.seek(0)
        self._file.truncate()
        self._pickler.clear_memo()
        try:
            self._pickler.dump(value)
        except _OfScriptError:
            return None, True
        except Exception:
            return None, False
        return self._file.getvalue(), False


class ModuleState(NamedTuple):
    """The data in the user's own modules.

    Attributes:
        data: The data, pickled, for ``apply()``; empty if there are none.
        places: Where mutable objects are that are sent, and their pickles, by their ids.
        of_script: Where objects are that may have something of the script in them.
    """

    data: bytes = b""
    places: Mapping[int, tuple[Place, bytes]] = MappingProxyType({})
    of_script: Sequence[Place] = ()

    def find(self, obj: object) -> Place | None:
        """Return where an object is in one of the modules, or ``None``."""
        place, _ = self.places.get(id(obj), (None, b""))
        try:
            return place if place is not None and at(*place) is obj else None
        except Exception:
            return None

    def reference(self, obj: Any) -> Any:
        """Return what is pickled instead of a global of the script that is imported from a module.

        It is the object itself if it is none of these.
        """
        place = self.find(obj)
        if place is None:
            return obj
        now, has_script = _Dumper(frozenset(own_modules())).dumps(obj)
        if has_script:
            return OfScript(place, obj)
        if now is None:
            return obj
        return _InModule(place, b"" if now == self.places[id(obj)][1] else now)


class _InModule:
    """An object that a module has, with its state if that has changed since workers got it."""

    def __init__(self, place: Place, data: bytes) -> None:
        self._arguments = place, data

    def __reduce__(self) -> Any:
        return take, self._arguments


class OfScript:
    """Something of the script that a module has; what unpickles it sets it there, and gets it."""

    def __init__(self, place: Place, value: object) -> None:
        self._arguments = place, value

    def __reduce__(self) -> Any:
        return _put, self._arguments


def collect() -> ModuleState:
    """Return the data in the user's own modules. It raises no exception.

    If they are too large together, the largest modules are left out. Workers log which.
    """
    own = own_modules()
    dumper = _Dumper(frozenset(own))
    all_of_them: list[_Found] = []
    looked_at = 0
    for name in own:
        if looked_at <= _MOST_LOOKED_AT:
            all_of_them.append(_look_at(name, dumper))
            looked_at += all_of_them[-1].size
    room = _MOST_BYTES
    left_out = set(own)
    for module in sorted(all_of_them, key=lambda each: each.size):
        room -= module.size
        if room < 0:
            break
        left_out.remove(module.name)
    found = [module for module in all_of_them if module.name not in left_out]
    sent = [(module.name, module.entries) for module in found if module.entries]
    places = {key: value for module in found for key, value in module.places.items()}
    of_script = [place for module in found for place in module.of_script]
    if not (sent or left_out):
        return ModuleState(places=places, of_script=of_script)
    return ModuleState(pickle.dumps((frozenset(own), sent, left_out), 5), places, of_script)


class _Found:
    """The data of one module, and their size in bytes, which is too large if not all were read."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.size = 0
        self.entries: list[tuple[Place, str, Any]] = []
        self.places: dict[int, tuple[Place, bytes]] = {}
        self.of_script: list[Place] = []


def _look_at(name: str, dumper: _Dumper) -> _Found:
    found = _Found(name)
    for place, value in _values(sys.modules.get(name)):
        kind = type(value)
        data: Any = value
        if kind in (bytes, str):
            data = value if len(value) <= _MOST_BYTES else _Unsent()
            found.size += len(value) if data is value else 0
        elif kind not in _ATOMS:
            pickled, has_script = dumper.dumps(value)
            if has_script:
                found.of_script.append((name, *place))
                if not issubclass(kind, _CODE):
                    found.places[id(value)] = (name, *place), b""
                continue
            data = _Unsent() if pickled is None else _Pickled(pickled)
            if pickled is not None:
                found.size += len(pickled)
                if kind is not tuple and kind is not frozenset and kind.__module__ != "numpy":
                    found.places[id(value)] = (name, *place), pickled
        if found.size > _MOST_BYTES:
            break
        found.entries.append(((name, *place), _class_of(value), data))
    return found


class _Unsent:
    """Stands in place of a value that is not sent."""


class _Pickled:
    """A value, pickled by itself, so that it is unpickled only if it differs."""

    def __init__(self, data: bytes) -> None:
        self.data = data


def _class_of(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"


def _values(module: ModuleType | None) -> Iterator[tuple[Place, Any]]:
    """Yield the globals of a module, and the data among its classes' attributes."""
    own = getattr(module, "__name__", "")
    for name, value in list(getattr(module, "__dict__", {}).items()):
        if name.startswith("__"):
            continue
        kind = type(value)
        if kind in _ATOMS:
            yield (name,), value
        elif issubclass(kind, ModuleType):
            continue
        elif not issubclass(kind, _CODE) or getattr(value, "__module__", "") in NAMES:
            yield (name,), value
        elif kind in (type, ABCMeta) and value.__module__ == own and value.__name__ == name:
            for attribute, each in list(vars(value).items()):
                if not attribute.startswith("__") and _is_set(each):
                    yield (name, attribute), each


def _is_set(value: Any) -> bool:
    """Return whether an attribute of a class is data, or a function of the script."""
    kind = type(value)
    if kind is FunctionType:
        return value.__module__ in NAMES
    return kind in _ATOMS or kind in (dict, list, set, tuple, frozenset)


def apply(data: bytes) -> None:
    """Set in the user's own modules what the client has set there, once each has been imported."""
    if not data:
        return
    own, found, left_out = pickle.loads(data)
    for name in left_out:
        _log.debug("%s stays as imported: modules hold more than 1 MiB of data", name)
    # What hooks of these modules have done when the script's classes were made is carried over.
    hooked.update(
        name for name, entries in found if not any(type(data) is _Unsent for _, _, data in entries)
    )
    for name, entries in found:
        when_imported(name, functools.partial(_set, name, entries, own))


def _set(name: str, entries: list[tuple[Place, str, Any]], own: frozenset[str]) -> None:
    changes: list[tuple[Any, str, Any, Any]] = []
    dumper = _Dumper(own)
    try:
        for place, kind, data in entries:
            holder = at(*place[:-1])
            here = vars(holder).get(place[-1], _ABSENT)
            if type(data) is _Unsent:
                if here is _ABSENT or _class_of(here) != kind:
                    _log.debug("%s stays as imported: %s cannot be sent", name, ".".join(place))
                    return
            elif type(data) is _Pickled:
                if here is _ABSENT or dumper.dumps(here)[0] != data.data:
                    changes.append((holder, place[-1], here, pickle.loads(data.data)))
            elif type(here) is not type(data) or here != data:
                changes.append((holder, place[-1], here, data))
        for change in changes:
            _replace(*change)
    except Exception as exc:
        _log.debug("what the client has set in %s is not carried over: %r", name, exc)


def take(place: Place, data: bytes) -> Any:
    """Return what a module has in a place, with the state that it has in the client."""
    module = importlib.import_module(place[0])
    holder = at(module.__name__, *place[1:-1])
    if data:
        _replace(holder, place[-1], vars(holder).get(place[-1], _ABSENT), pickle.loads(data))
    return vars(holder)[place[-1]]


def _put(place: Place, value: Any) -> Any:
    importlib.import_module(place[0])
    holder = at(*place[:-1])
    _replace(holder, place[-1], vars(holder).get(place[-1], _ABSENT), value)
    return vars(holder)[place[-1]]


def at(module: str, *place: str) -> Any:
    """Return what a module that has been imported has in a place.

    Raises:
        KeyError: If there is nothing.
    """
    found: Any = sys.modules[module]
    for name in place:
        found = vars(found)[name]
    return found


def _replace(holder: Any, name: str, here: Any, value: Any) -> None:
    """Set a value, in place if it can be, as other modules may have imported the object."""
    if here is value:
        return
    if type(here) is type(value):
        if isinstance(here, (dict, set)):
            here.clear()
            here.update(value)
            return
        if isinstance(here, (list, deque)):
            here.clear()
            here.extend(value)
            return
        if type(here).__module__ not in sys.stdlib_module_names and hasattr(here, "__dict__"):
            vars(here).clear()
            vars(here).update(vars(value))
            return
    setattr(holder, name, value)
