"""Decides which globals of the script ``__main__`` are sent to workers, and when.

In the process that runs tasks, the functions and classes of the script are in one module, as in a
process pool, and changes that tasks and the initializer make to it stay. The rules are:

- A global is sent when a task uses it, that is, when the task's function, or a function that this
  one uses, names it.
- It is sent again when it has changed in the client since. Only then the changes that tasks made to
  it are overwritten. A changed global is one whose pickle differs, or, if it is immutable, one that
  is another object.
- Until it is sent for the first time, a task sees what an initializer or a task has assigned to its
  name.
- Functions, classes and small values that no task names are sent once, because ``pickle.loads()``,
  ``eval()`` and annotations that are strings look them up at run time.
- Globals that refer to one another are sent together, so that one object does not become two.
- Locks, caches and similar objects are made anew in the worker (``_anew``). For other globals that
  cannot be sent, the script is run once more in the process that runs tasks, as a process pool
  does. This requires that the worker is on this machine and that the script has the guard
  ``if __name__ == "__main__":``.
"""

from __future__ import annotations

import contextlib
import io
import logging
import pickle
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import cloudpickle

from cloudexec import _main, _module_state
from cloudexec._anew import reduce_anew
from cloudexec._annotations import annotations_of, names_in
from cloudexec._describing import describe, is_a, is_interrupt
from cloudexec._errors import PayloadError
from cloudexec._fingerprints import Definition, Unstable, lookup
from cloudexec._payload import INLINE_BYTES, Collector, Pickler
from cloudexec._records import Composed, Payload
from cloudexec._registrations import registrations
from cloudexec._shared_state import shared_by

if TYPE_CHECKING:
    from cloudexec._objects.store import BlobStore

__all__ = ["Script"]

F = TypeVar("F")
"""What tells workers of a global."""

_logger = logging.getLogger("cloudexec")
_ABSENT = object()
_ANSWERS_KEPT = 512
_DURING = " during iteration"
"""Part of Python's message when another thread changes a container while it is pickled."""
_TRIES = 100
_HELD_BYTES = 256 * 1024
"""Larger values are not kept alive for the check whether they are still the same objects."""
_ALONE = (str, bytes, int, float, complex, type(None), ModuleType)
"""Types whose objects refer to no other global."""
_NOT_SHARED = (*_ALONE, tuple, frozenset)
"""Types of which two copies cannot be told from one object."""


_DEFINED = (FunctionType, BuiltinFunctionType, type, ModuleType)
"""Types for which ``_is_definition`` looks at more than the type."""


class _TooLarge(Exception):
    """A value is so large that it is only sent if a task uses it."""


class _DefinedOnlyError(TypeError):
    """A class cannot be made without its definition."""


class _Small(Collector):
    """Collects a pickle, and raises ``_TooLarge`` if it is not small."""

    def __init__(self, store: BlobStore) -> None:
        super().__init__(store)
        self._left = INLINE_BYTES

    def write(self, data: Any) -> int:
        self._left -= len(data)
        if self._left < 0:
            raise _TooLarge
        return super().write(data)

    def take_buffer(self, buffer: Any) -> bool:
        if buffer.raw().nbytes > INLINE_BYTES:
            raise _TooLarge
        return True


class _DefinitionPickler(Pickler):
    """Pickles some globals by value, and all other globals that they refer to by name.

    Args:
        file: The file that the pickle is written to.
        own: Names of the globals that are pickled by value.
        shared: Names of all globals that must not be copied, by the id of their object.
        modules: The objects of the user's own modules that are pickled as their places.
        values: The objects that are pickled by value.
    """

    marks = False

    def __init__(
        self,
        file: Collector,
        own: frozenset[str],
        shared: dict[int, str],
        modules: _module_state.ModuleState,
        values: list[Any],
    ) -> None:
        super().__init__(file, protocol=5, buffer_callback=file.take_buffer)
        self.names = set()
        self.links: set[str] = set()
        self._own = own
        self._shared = shared
        self._modules = modules
        self._values = values

    def persistent_id(self, obj: Any) -> Any:
        name = self._shared.get(id(obj))
        if name is None:
            if id(obj) not in self._modules.places or any(obj is each for each in self._values):
                return None
            return self._modules.find(obj)
        if name in self._own:
            return None
        self.links.add(name)
        return name

    def refers(self, name: str) -> bool:
        if name in self._own:
            return False
        self.links.add(name)
        return True

    def _reduce(self, obj: Any) -> Any:
        if isinstance(obj, type) and obj.__module__ in _main.NAMES and _main.is_defined_only(obj):
            raise _DefinedOnlyError(
                f"the class {obj.__qualname__} cannot be sent, as a library keeps a table of the "
                f"classes that are defined with it: define it in a module of its own, which "
                f"workers import"
            )
        reduced = reduce_anew(obj)
        if reduced is None and isinstance(obj, io.TextIOWrapper):
            raise TypeError(f"an open file ({obj.name}) cannot be sent")
        if reduced is not None:
            return reduced
        reduced = super()._reduce(obj)
        if len(self._own) > 1 and type(reduced) is tuple and reduced[-1] is _main.fill_class:
            return *reduced[:-1], _main.refill_class
        return reduced


class _Global:
    """A global of the script, or several that refer to one another, as they were last sent."""

    __slots__ = ("behind", "function", "links", "names", "pickled", "uses", "watch")

    def __init__(self, names: frozenset[str]) -> None:
        self.names = names
        self.uses: set[str] = set()
        self.links: set[str] = set()
        self.pickled: Payload | None = None
        self.behind: list[Any] = []
        self.watch: list[tuple[str, Definition | _Same]] | None = None
        self.function: Any = None  # of this pickle, behind these

    def holds(self) -> bool:
        """Return whether it is known, without pickling it, to be unchanged."""
        if self.watch is None:
            return False
        space = _main.namespace()
        for name, definition in self.watch:  # noqa: SIM110 (all() takes twice as long)
            if not definition.holds(space.get(name, _ABSENT)):
                return False
        return True


class _Snapshot:
    """The script's globals at one time, to find out later whether a definition has been replaced.

    This is checked for each ``map()``, so it takes only a few comparisons for each global.

    Args:
        names: Names and values of the globals.
    """

    def __init__(self, names: list[tuple[str, Any]]) -> None:
        self.definitions: dict[str, Any] = {}
        self._kept: dict[str, Any] = {}
        self._kinds: dict[str, type] = {}
        for name, value in names:
            if _is_definition(name, value):
                self.definitions[name] = self._kept[name] = value
            elif is_a(value, _DEFINED):
                self._kept[name] = value
            else:
                self._kinds[name] = type(value)  # the value may be too large to keep it alive

    def is_current(self, names: list[tuple[str, Any]]) -> bool:
        """Return whether all definitions are the same objects, and there is no new definition."""
        kept, kinds = self._kept, self._kinds
        if len(names) != len(kept) + len(kinds):
            return False
        for name, value in names:
            if kept.get(name, _ABSENT) is value:
                continue
            if kinds.get(name) is not type(value):
                return False
            # Whether a value is a definition follows from its type. A callable is an exception, as
            # it may wrap a function.
            if callable(value) and _is_definition(name, value):
                return False
        return True


_Answer = tuple[tuple[tuple[_Global, Any], ...], frozenset[str], tuple[Any, ...]]
"""What some names need: the globals as they were sent, the names without a global, and the numbered
definitions."""
_NO_ANSWER: _Answer = ((), frozenset(), ())


class Script(Generic[F]):
    """The globals of the script that an executor has sent. Used under its own lock.

    Args:
        make: Makes a numbered definition from a pickle, its names, the definitions that it refers
            to, and the name of the module if it is one.
        store: Keeps large pieces of pickles.
        is_near: Whether workers are on this machine, and so may run the script once more for
            globals that cannot be sent.
        modules: What the user's own modules have.
    """

    def __init__(
        self,
        make: Callable[[Payload, Iterable[str], tuple[F, ...], str], F],
        store: BlobStore,
        *,
        is_near: bool,
        modules: _module_state.ModuleState,
    ) -> None:
        self._make = make
        self._store = store
        self._is_near = is_near
        self._modules = modules
        self._of_modules: tuple[F, ...] | None = None
        self._lock = threading.RLock()
        self._globals: dict[str, _Global] = {}
        self._by_value: Any = None
        self._rest: tuple[F, ...] = ()
        self._answers: dict[frozenset[str], _Answer] = {}
        self._snapshot = _Snapshot([])
        self._shared_now: dict[int, str] | None = None
        self._picklers: dict[_Global, _DefinitionPickler] = {}

    def needs(self, names: frozenset[str]) -> tuple[F, ...]:
        """Return what a task is to have that refers to some globals, as they are now.

        Returns:
            The definitions, each after those that it refers to.

        Raises:
            PayloadError: If a global cannot be sent.
        """
        with self._lock:
            by_value = cloudpickle.list_registry_pickle_by_value()
            if by_value != self._by_value:
                self._by_value = by_value
                for each in self._globals.values():
                    each.watch = None
            known, absent, needs = self._answers.get(names, _NO_ANSWER)
            for each, function in known:
                if each.function is not function or not each.holds():
                    break
            else:
                if known and absent.isdisjoint(_main.namespace()):
                    return needs
            found: dict[str, _Global] = {}
            self._shared_now = None
            try:
                needs = self._needs(names, Collector, found)
            finally:
                self._picklers.clear()
            if len(self._answers) >= _ANSWERS_KEPT:
                self._answers.clear()
            known = tuple({each: each.function for each in found.values()}.items())
            used = names.union(*[each.uses for each, _ in known])
            self._answers[names] = known, used.difference(_main.namespace()), needs
            return needs

    def rest(self) -> tuple[F, ...]:
        """Return what else the script defines and is small, for what finds it at run time."""
        with self._lock:
            names = list(_main.namespace().items())
            if not self._snapshot.is_current(names):
                then, self._snapshot = self._snapshot.definitions, _Snapshot(names)
                now = self._snapshot.definitions
                if len(now) != len(then) or any(
                    then.get(name, _ABSENT) is not value for name, value in now.items()
                ):
                    self._shared_now = None
                    if self._of_modules is None:
                        self._of_modules = tuple(self._given_to_modules())
                    self._rest = (*self._needs(now, _Small, {}), *self._of_modules)
                    self._picklers.clear()
            return self._rest

    def _given_to_modules(self) -> Iterator[F]:
        """Yield what sets, in modules, what they have been given of the script."""
        given: list[tuple[str, Any, Any]] = []
        for place in self._modules.of_script:
            with contextlib.suppress(KeyError):
                value = _module_state.at(*place)
                given.append((".".join(place), _module_state.OfScript(place, value), value))
        for registration in registrations():
            name = ".".join((*registration.where, "registered"))
            given.append((name, registration, registration.entries))
        for name, sent, value in given:
            each = _Global(frozenset((name,)))
            found: dict[str, _Global] = {}
            try:
                self._pickle_into(each, _Small, {"": sent}, [value])
                yield from self._needs(each.uses | each.links, _Small, found)
                if each.links.issubset(found):
                    yield self._number(each, found, {})
            except Exception as exc:
                if is_interrupt(exc):
                    raise
                _logger.debug("%s is not as in the client: %s", name, describe(exc))

    def _needs(
        self, names: Iterable[str], collector: type[Collector], found: dict[str, _Global]
    ) -> tuple[F, ...]:
        space = _main.namespace()
        waiting = [(name, "") for name in names]
        while waiting:
            name, user = waiting.pop()
            if name in found or name not in space:
                continue
            try:
                each = self._current(name, user, collector)
            except (PayloadError, _TooLarge):
                if collector is Collector:
                    raise
                continue  # a task that names this global gets it, or the error
            for own in each.names:
                found[own] = each
            waiting += [(other, name) for other in (*each.uses, *each.links)]
        # Of a circle, each would have to be sent before the others. Of those that share an object,
        # each would get a copy. So they are sent as one.
        circle = _circle(found) or self._sharing(found)
        if circle:
            joint = _Global(circle)
            for name in circle:
                self._globals[name] = joint
            found.clear()
            return self._needs(names, collector, found)
        numbered: dict[_Global, F] = {}
        for each in found.values():
            self._number(each, found, numbered)
        return tuple(numbered.values())

    def _sharing(self, found: dict[str, _Global]) -> frozenset[str]:
        """Return the names of globals that share an object which is none itself, or an empty set.

        Only globals that were pickled just now are looked at: the others cannot change.
        """
        new = set(found.values())
        globals_ = [each for each in self._picklers if each in new]
        if len(globals_) < 2 or not any(each.function is None for each in globals_):
            return frozenset()
        pair = shared_by([self._picklers[each] for each in globals_])
        if pair is None:
            return frozenset()
        return globals_[pair[0]].names | globals_[pair[1]].names

    def _number(self, each: _Global, found: dict[str, _Global], numbered: dict[_Global, F]) -> F:
        """Number a global, behind those that it refers to."""
        if each in numbered:
            return numbered[each]
        space = _main.namespace()
        behind: list[F] = []
        for link in sorted(each.links):
            if link in found:
                function = self._number(found[link], found, numbered)
                # A worker changes a class in place, so what refers to it need not be sent again.
                if not is_a(space.get(link), type):
                    behind.append(function)
        if each.function is None or each.behind != behind:
            module = ""
            if len(each.names) == 1:
                module = _imported_from(space.get(next(iter(each.names))))
            assert each.pickled is not None
            each.behind = behind
            each.function = self._make(each.pickled, sorted(each.names), tuple(behind), module)
        function = numbered[each] = each.function
        return function

    def _current(self, name: str, user: str, collector: type[Collector]) -> _Global:
        """Return a global as it is now, pickled anew if it may have changed."""
        each = self._globals.get(name)
        if each is None:
            each = self._globals[name] = _Global(frozenset((name,)))
        elif each.holds():
            return each
        try:
            self._pickle_while_it_changes(each, collector)
        except _TooLarge:
            if each.pickled is None:
                for own in each.names:
                    del self._globals[own]
            raise
        except BaseException as exc:
            if is_interrupt(exc):
                raise
            if isinstance(exc.__cause__, RuntimeError) and _DURING in str(exc.__cause__):
                raise  # another thread changed it while it was pickled; it can be sent
            for own in each.names:
                self._globals.pop(own, None)
            if collector is _Small and is_a(exc, _DefinedOnlyError):
                raise _TooLarge from None  # the script is not run for what no task names
            self._take_from_script(each, name, user, exc)
        return each

    def _pickle_while_it_changes(self, each: _Global, collector: type[Collector]) -> None:
        """Pickle a global, and try again if another thread of the program changes it meanwhile."""
        for left in reversed(range(_TRIES)):
            try:
                return self._pickle(each, collector)
            except RuntimeError as exc:
                if _DURING not in str(exc):
                    raise
                if not left:
                    names = ", ".join(sorted(each.names))
                    raise PayloadError(f"global {names} was changed while it was pickled") from exc
        raise AssertionError

    def _pickle(self, each: _Global, collector: type[Collector]) -> None:
        space = _main.namespace()
        values = {name: space[name] for name in sorted(each.names) if name in space}
        if len(values) > 1:
            # Metaclasses and base classes come first, as they may refer to the classes made of
            # them.
            values = dict(sorted(values.items(), key=lambda item: _depth(item[1])))
        sent = values
        if self._modules.places:
            sent = {name: self._modules.reference(value) for name, value in values.items()}
        self._pickle_into(each, collector, sent, list(values.values()))
        watch: list[tuple[str, Definition | _Same]] = []
        stable = len(values) == len(each.names)
        try:
            for name, value in values.items():
                if is_a(value, (str, bytes)) and len(value) > _HELD_BYTES:
                    raise Unstable
                watch.append((name, Definition(value, self._by_value or ())))
        except Exception:
            stable = False
        each.watch = watch if stable else None

    def _pickle_into(
        self, each: _Global, collector: type[Collector], sent: object, values: list[Any]
    ) -> None:
        """Pickle values of the script, and note to which globals these refer."""
        file = collector(self._store)
        pickler = _DefinitionPickler(file, each.names, self._shared(values), self._modules, values)
        pickled = file.pickle(pickler, sent)
        self._picklers[each] = pickler
        assert pickler.names is not None
        if not _is_same(pickled, each.pickled):
            if each.pickled is not None:
                _logger.debug("%s has changed and is sent again", ", ".join(sorted(each.names)))
            each.pickled, each.function = pickled, None
        for value in values:
            pickler.names.update(_names_in_annotations(value))
        each.uses, each.links = pickler.names - each.names, pickler.links - each.names

    def _shared(self, values: list[Any]) -> dict[int, str]:
        """Return the names of globals whose objects must not be copied, by the objects' ids."""
        if all(is_a(value, _ALONE) for value in values):
            return {}
        if self._shared_now is None:
            self._shared_now = {}
            for name, value in list(_main.namespace().items()):
                if is_a(value, (*_NOT_SHARED, type)) or name.startswith("__"):
                    continue
                if type(value) not in _main.NAMED or _main.name_of(value) is None:
                    self._shared_now.setdefault(id(value), name)
        return self._shared_now

    def _take_from_script(self, each: _Global, name: str, user: str, exc: BaseException) -> None:
        """Make workers run the script to get a global that cannot be sent.

        Raises:
            PayloadError: If workers cannot run the script.
        """
        names = sorted(each.names)
        value = _main.namespace().get(name)
        again, why = _main.way_to_script() if self._is_near else (None, "")
        if again is None:
            from cloudexec._unsendable import explain_value

            noun = f"global {name}{f' of {user}()' if user else ''}"
            said = explain_value(noun, value, exc) or f"{noun} cannot be sent ({describe(exc)})"
            raise PayloadError(f"{said}{why and f'; {why}'}") from exc
        kinds = {own: _type_of(_main.namespace().get(own)) for own in names}
        pickled = pickle.dumps(_main.Again(*again, kinds), 5)
        if pickled != each.pickled:
            _logger.debug(
                "%s is taken from the script, which runs in each process", ", ".join(names)
            )
            each.pickled, each.function = pickled, None
        self._globals.update(dict.fromkeys(names, each))
        values = [(own, _main.namespace().get(own)) for own in names]
        each.uses, each.links = set(), set()
        for _, cls in _main.instances_in([value for _, value in values]):
            if (known_as := _main.name_of(cls)) is not None:
                each.links.add(known_as.partition(".")[0])
        each.links.difference_update(names)
        each.watch = None
        if not any(_may_change(value) for _, value in values):
            each.watch = [(own, _Same(value)) for own, value in values]


def _type_of(value: Any) -> str:
    kind = type(value)
    return f"{kind.__module__}.{kind.__qualname__}".replace("__main__.", "__mp_main__.")


def _may_change(value: Any) -> bool:
    """Return whether an object that cannot be sent now may be sendable later."""
    kind = type(value)
    return kind in (dict, list, set) or kind.__module__ in _main.NAMES


def _depth(value: Any) -> tuple[bool, int]:
    """Return a sort key that puts metaclasses first, then base classes, then all other globals."""
    if not is_a(value, type):
        return True, sys.maxsize
    return not issubclass(value, type), len(type.mro(value))


class _Same:
    """A value that counts as unchanged as long as it is the same object."""

    def __init__(self, value: Any) -> None:
        self._value = value

    def holds(self, value: Any) -> bool:
        return value is self._value


def _is_same(one: Payload, other: Payload | None) -> bool:
    if isinstance(one, Composed) and isinstance(other, Composed):
        return one.head == other.head  # the same blob numbers in a head mean the same content
    return one == other


def _is_definition(name: str, value: Any) -> bool:
    """Return whether a global is a definition that may be looked up by name at run time."""
    if name.startswith("__"):
        return type(value) is FunctionType and _main.name_of(value) is not None
    module = _imported_from(value)
    if module:
        return module.partition(".")[0] != "cloudexec"
    kind = type(value)
    return (
        _main.name_of(value) is not None
        or kind.__module__ in ("typing", "types", "typing_extensions")
        or (callable(value) and kind.__module__ == "__main__")
    )


def _names_in_annotations(value: Any) -> Iterator[str]:
    """Yield the names in annotations that are strings, as these are evaluated at run time."""
    if is_a(value, (FunctionType, type)):
        for each in annotations_of(value).values():
            if type(each) is str:
                yield from names_in(each)


def _imported_from(value: Any) -> str:
    """Return the name of the module that a value is or is imported from, or ``""``."""
    if is_a(value, ModuleType):
        return value.__name__ if sys.modules.get(value.__name__) is value else ""
    if is_a(value, (FunctionType, BuiltinFunctionType, type)) and lookup(value) is value:
        return value.__module__
    return ""


def _circle(found: dict[str, _Global]) -> frozenset[str]:
    """Return the names of globals that refer to each other in a circle; empty if there is none."""
    state: dict[_Global, int] = {}

    def walk(each: _Global, path: list[_Global]) -> frozenset[str]:
        state[each] = 1
        path.append(each)
        for link in each.links:
            other = found.get(link)
            if other is None or other is each:
                continue
            if state.get(other) == 1:
                members = path[path.index(other) :]
                return frozenset().union(*[member.names for member in members])
            if other not in state and (circle := walk(other, path)):
                return circle
        path.pop()
        state[each] = 2
        return frozenset()

    for each in found.values():
        if each not in state and (circle := walk(each, [])):
            return circle
    return frozenset()
