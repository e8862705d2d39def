"""Callables that are sent to a worker once and then named by a number.

A worker must run a function as it is when ``submit()`` is called. A later change to its closure,
its defaults or the globals that it reads must reach later calls and must not reach earlier ones. So
a pickle is kept only where it provably stays correct: for functions that are pickled by reference,
and for functions pickled by value whose whole state is immutable and still the same objects, as is
the state of the functions that they call. All other functions are pickled anew for each call, or
once for each ``map()``. Globals of the script are sent separately; see ``_script``.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import os
import pickle
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import cloudpickle

from cloudexec import _main, _payload
from cloudexec._core.tasks import FunctionStats
from cloudexec._describing import attribute_of, is_a, is_interrupt
from cloudexec._fingerprints import Fingerprint, lookup, travels_by_value
from cloudexec._module_state import ModuleState
from cloudexec._objects.ref import Ref
from cloudexec._objects.store import BlobStore
from cloudexec._payload import Unfinished
from cloudexec._records import Composed, Payload
from cloudexec._script import Script

__all__ = ["Function", "FunctionTable"]

_Keywords = dict[str, Any] | None

_UNBOUND = frozenset({FunctionType, BuiltinFunctionType, type})
"""Types of callables that cannot have bound arguments."""
_CONSTANT = frozenset(
    {bool, bytes, complex, float, int, range, str, type(None), FunctionType, BuiltinFunctionType}
)
_KEPT = 512
_KINDS_KEPT = 4096
_REMEMBERED_BYTES = 256 * 1024
_NUMBERED_FROM = 1024
"""Bytes of a pickle from which a function gets a number even if it changes from call to call."""
_HANDLE = Ref.__init__.__module__.encode()
"""Bytes that each pickle with a ``Ref`` in it contains."""


class _End:
    """Reports that a function has ended.

    Only the function refers to this object. A ``__del__`` of the function itself would be too
    early: while it runs, other threads can still find the function by weak references, and would
    use it after it has ended.
    """

    __slots__ = ("_number", "_on_end")

    def __init__(self, number: int, on_end: Callable[[int], None]) -> None:
        self._number = number
        self._on_end = on_end

    def __del__(self) -> None:
        self._on_end(self._number)


class Function:
    """A callable, or globals of the script, that workers know by number.

    It ends when no task and no table refers to it.

    Attributes:
        number: The number that workers know it by.
        pickle: Pickle of the callable; empty if the callables come with their arguments.
        sha256: Digest of the pickle and of all functions in ``needs``.
        composed: Whether the pickle, or one in ``needs``, refers to blobs (large parts that are
            stored separately).
        needs: Functions and globals that the pickle refers to; a worker must have them first.
        globals: Names of the script's globals that this sets; empty for a callable.
        module: The module that this is, or comes from, if it is not the script's own.
        uses: Names of the script's globals that the pickle refers to.
        stats: Run times and sizes of its tasks so far.
        fresh: Whether each task gets a new copy, as if the callable were pickled with the task.
    """

    __slots__ = (
        "__weakref__",
        "_end",
        "composed",
        "fresh",
        "globals",
        "module",
        "needs",
        "number",
        "pickle",
        "sha256",
        "stats",
        "uses",
    )

    def __init__(
        self, number: int, pickle: Payload, sha256: bytes, on_end: Callable[[int], None]
    ) -> None:
        self.number = number
        self.pickle = pickle
        self.sha256 = sha256
        self.composed = type(pickle) is Composed
        self.needs: tuple[Function, ...] = ()
        self.globals: tuple[str, ...] = ()
        self.module = ""
        self.uses: frozenset[str] = frozenset()
        self.stats = FunctionStats()
        self.fresh = False
        self._end = _End(number, on_end)

    def need(self, needs: tuple[Function, ...]) -> None:
        """Set the functions and globals that a worker must have first."""
        self.needs = needs
        self.composed = self.composed or any(each.composed for each in needs)


class FunctionTable:
    """The callables of one executor. Any thread may use it; it has a lock of its own.

    Args:
        on_end: Called with the number of a function when no task and no table refers to it any
            more, in the thread that dropped the last reference.
        store: Keeps large pieces of callables and arguments.
        is_near: Whether workers are on this machine.
        modules: What the user's own modules have.
    """

    def __init__(
        self,
        on_end: Callable[[int], None],
        store: BlobStore,
        *,
        is_near: bool = False,
        modules: ModuleState | None = None,
    ) -> None:
        self._store = store
        self._on_end = on_end
        # The first number is random, so that a client which takes over workers of an earlier client
        # does not use a number that these workers know.
        self._numbers = itertools.count(int.from_bytes(os.urandom(3)) + 1)
        self._lock = threading.Lock()
        self._by_content: OrderedDict[bytes, Function] = OrderedDict()
        # Functions with large pieces end with their tasks; the store decides which pieces it keeps.
        self._large: weakref.WeakValueDictionary[bytes, Function] = weakref.WeakValueDictionary()
        self._known: OrderedDict[int, tuple[Any, Function, Any, Any]] = OrderedDict()
        self._unstable: dict[CodeType, int] = {}
        self._kinds: dict[Any, FunctionStats] = {}
        self._script = Script(
            self._define, store, is_near=is_near, modules=modules or ModuleState()
        )
        self._rest: tuple[tuple[Function, ...], Function | None] = ((), None)

    def _define(
        self, pickled: Payload, names: Iterable[str], needs: tuple[Function, ...], module: str
    ) -> Function:
        """Give a number to some globals of the script."""
        digest = hashlib.sha256(repr(names).encode())
        digest.update(pickled if isinstance(pickled, bytes) else pickled.head)
        function = Function(next(self._numbers), pickled, digest.digest(), self._on_end)
        function.globals, function.module = tuple(names), module
        function.need(needs)
        return function

    def _needs(self, names: frozenset[str], *, new: bool) -> tuple[Function, ...]:
        """Return the definitions that a callable or arguments with these names of globals need.

        Args:
            names: Names of the script's globals.
            new: Whether to look for new definitions in the script, too.
        """
        rest, bundle = self._rest
        if new or bundle is None:
            now = self._script.rest()
            if now is not rest or bundle is None:
                bundle = None
                if now:
                    bundle = Function(next(self._numbers), b"", b"", self._on_end)
                    bundle.globals = ("*",)
                    bundle.need(now)
                self._rest = now, bundle
        needs = self._script.needs(names) if names else ()
        return needs if bundle is None else (bundle, *needs)

    def extended(self, function: Function | None, names: set[str]) -> Function | None:
        """Return a function that also needs the script's globals that its arguments refer to."""
        if function is None:
            if names or self._needs(frozenset(), new=False):
                return self._numbered(b"", names, new=False)
            return None
        if not names - function.uses:
            return function
        uses = function.uses | names
        other = self._numbered(function.pickle, uses, fresh=function.fresh, new=False)
        other.stats = function.stats
        return other

    def numbered(self, fn: Callable[..., Any]) -> Function | None:
        """Pickle a callable now and number it.

        Returns:
            The function, or ``None`` if futures or handles are bound to it. Such a callable must be
            pickled with each call, whose dependencies these futures and handles are.

        Raises:
            BaseException: Whatever pickling raises.
        """
        function = self._recall(fn)
        if function is not None:
            return function
        names: set[str] = set()
        if type(fn) in _UNBOUND:
            return self._number(fn, _payload.dumps(fn, self._store, names), names)
        pickled = _payload.dumps_bound(fn, self._store, names)
        if isinstance(pickled, Unfinished):
            return None
        # A process pool pickles such a callable for each call. So no call may see what another one
        # has changed in the bound arguments.
        return self._number(fn, pickled, names, fresh=_binds_state(fn), new=True)

    def unnumbered(
        self, fn: Callable[..., Any]
    ) -> tuple[
        Function | None,
        FunctionStats,
        Callable[[tuple[Any, ...], _Keywords, BlobStore, set[str]], Payload | Unfinished],
    ]:
        """Prepare to send calls of a callable that futures or handles are bound to.

        Returns:
            The part of the callable that is numbered, or ``None``; the statistics of its kind of
            task; and a function that pickles the rest with the arguments of a call.

        Raises:
            BaseException: Whatever pickling raises.
        """
        if type(fn) is functools.partial and (inner := self.numbered(fn.func)) is not None:
            bound, named = fn.args, fn.keywords

            def arguments(
                args: tuple[Any, ...], kwargs: _Keywords, store: BlobStore, names: set[str]
            ) -> Any:
                keywords = {**named, **(kwargs or {})}
                return _payload.dumps_arguments(bound + args, keywords, store, names)

            return inner, inner.stats, arguments

        def together(
            args: tuple[Any, ...], kwargs: _Keywords, store: BlobStore, names: set[str]
        ) -> Any:
            return _payload.dumps_call(fn, args, kwargs or {}, store, names)

        return None, self._kind(fn), together

    def call(
        self, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Function | None, FunctionStats, Payload | Unfinished]:
        """Pickle a call.

        Returns:
            The function, or ``None`` if it is not numbered; the statistics of its kind of task; and
            the payload. The payload has the arguments, and the callable too if the function is
            ``None``. It is ``Unfinished`` if there are futures in it.

        Raises:
            BaseException: Whatever pickling raises.
        """
        function = self._recall(fn)
        if function is None:
            function = self._remember(fn)
        if function is None and type(fn) is FunctionType:
            uses: set[str] = set()
            pickled = _payload.dumps(fn, self._store, uses)
            # A handle in a closure stays a handle; among arguments it would become its value.
            if (
                isinstance(pickled, Composed)
                or len(pickled) >= _NUMBERED_FROM
                or _HANDLE in pickled
            ):
                function = self._number(fn, pickled, uses, fresh=True)
        names: set[str] = set()
        if function is not None:
            payload = _payload.dumps_arguments(args, kwargs, self._store, names)
            if names:
                function = self.extended(function, names)
                assert function is not None
            return function, function.stats, payload
        # Callable and arguments are pickled together, so that an object which both a method's
        # object and the arguments refer to stays one object.
        payload = _payload.dumps_call(fn, args, kwargs, self._store, names)
        return self.extended(None, names), self._kind(fn), payload

    def _recall(self, fn: Callable[..., Any]) -> Function | None:
        known = self._known.get(id(fn))
        if known is None:
            return None
        _, function, fingerprint, by_value = known
        if by_value == cloudpickle.list_registry_pickle_by_value() and (
            (_main.name_of(fn) is not None or lookup(fn) is fn)
            if fingerprint is None
            else fingerprint.holds()
        ):
            return function if self._is_current(function) else self._renewed(fn, function)
        with self._lock:
            self._known.pop(id(fn), None)
        return None

    def _remember(self, fn: Callable[..., Any]) -> Function | None:
        """Keep the pickle of a callable if it is known to stay correct."""
        kind = type(fn)
        if kind not in _UNBOUND:
            return None
        code = getattr(fn, "__code__", None)
        if code is not None and self._unstable.get(code, 0) > 3:
            return None  # functions of this code were found unstable several times
        by_value = cloudpickle.list_registry_pickle_by_value()
        fingerprint: Fingerprint | None = None
        names: set[str] = set()
        if _main.name_of(fn) is not None:
            pickled = _payload.dumps(fn, self._store, names)
        elif lookup(fn) is fn and not travels_by_value(fn.__module__, by_value):
            pickled = _payload.dumps(fn, self._store)
            if isinstance(pickled, Composed) or pickled != _plain(fn):
                return None  # it is pickled by value, although it can be imported
        elif kind is FunctionType:
            try:
                fingerprint = Fingerprint(fn, by_value)  # type: ignore[arg-type]
            except BaseException as exc:
                if is_interrupt(exc):
                    raise
                # It may change, or reading an object that it refers to has failed.
                if len(self._unstable) > _KINDS_KEPT:
                    self._unstable.clear()
                if code is not None:
                    self._unstable[code] = self._unstable.get(code, 0) + 1
                return None
            pickled = _payload.dumps(fn, self._store, names)
        else:
            return None
        if len(pickled) > _REMEMBERED_BYTES:
            return None  # too large to keep its closure alive
        function = self._number(fn, pickled, names)
        self._keep(fn, function, fingerprint, by_value)
        return function

    def _is_current(self, function: Function) -> bool:
        """Return whether the script's globals that a function uses are unchanged since sent."""
        return not function.uses or self._needs(function.uses, new=False) == function.needs

    def _renewed(self, fn: Callable[..., Any], function: Function) -> Function:
        """Return a function that needs the script's globals as they are now."""
        new = self._number(fn, function.pickle, function.uses)
        _, _, fingerprint, by_value = self._known[id(fn)]
        self._keep(fn, new, fingerprint, by_value)
        return new

    def _keep(self, fn: Any, function: Function, fingerprint: Any, by_value: Any) -> None:
        with self._lock:
            # The table refers to the callable, so that no other object can get the same id.
            self._known[id(fn)] = (fn, function, fingerprint, by_value)
            if len(self._known) > _KEPT:
                self._known.popitem(last=False)

    def _number(
        self,
        fn: Callable[..., Any],
        pickled: Payload,
        names: Iterable[str],
        *,
        fresh: bool = False,
        new: bool | None = None,
    ) -> Function:
        function = self._numbered(
            pickled, names, fresh=fresh, new=not fresh if new is None else new
        )
        # All functions with the same code object share their statistics.
        function.stats = self._kind(fn)
        return function

    def _numbered(
        self, pickled: Payload, names: Iterable[str], *, fresh: bool = False, new: bool
    ) -> Function:
        names = frozenset(names)
        needs = self._needs(names, new=new)
        digest = hashlib.sha256(b"fresh" if fresh else b"")
        # A head names blobs by number; equal content has the same number while it is stored.
        digest.update(pickled if isinstance(pickled, bytes) else pickled.head)
        digest.update(repr([each.number for each in needs]).encode())
        sha256 = digest.digest()
        with self._lock:
            function = self._by_content.get(sha256) or self._large.get(sha256)
            if function is None:
                function = Function(next(self._numbers), pickled, sha256, self._on_end)
                function.fresh, function.uses = fresh, names
                function.need(needs)
                if isinstance(pickled, Composed):
                    self._large[sha256] = function
                    return function
                self._by_content[sha256] = function
                if len(self._by_content) > _KEPT:
                    self._by_content.popitem(last=False)
            elif sha256 in self._by_content:
                self._by_content.move_to_end(sha256)
            return function

    def _kind(self, fn: Callable[..., Any]) -> FunctionStats:
        code = attribute_of(attribute_of(fn, "__func__", fn), "__code__")
        key = code if type(code) is CodeType else attribute_of(fn, "__qualname__")
        if type(key) not in (CodeType, str):
            key = type(fn)
        try:
            kind = self._kinds.get(key)
        except TypeError:
            return FunctionStats()
        if kind is None:
            if len(self._kinds) >= _KINDS_KEPT:
                self._kinds.clear()
            kind = self._kinds[key] = FunctionStats()
        return kind


_WITHOUT_STATE = ("_functools", "_operator", "builtins", "functools", "operator", "re")
"""Modules whose callables cannot be changed, besides those that bind arguments."""


def _binds_state(fn: Any) -> bool:
    """Return whether a callable has an object bound to it that its calls may change."""
    kind = type(fn)
    if attribute_of(kind, "_called_for_each"):  # of map(chunksize=...)
        return _binds_state(fn._called_for_each)
    if kind is functools.partial:
        bound = (*fn.args, *fn.keywords.values())
        return not all(map(_is_constant, bound)) or _binds_state(fn.func)
    if kind in _UNBOUND:
        return False
    if kind is MethodType:
        return not isinstance(fn.__self__, (type, ModuleType))
    return kind.__module__ not in _WITHOUT_STATE


def _is_constant(value: object, depth: int = 4) -> bool:
    kind = type(value)
    if kind is tuple or kind is frozenset:
        return depth > 0 and all(_is_constant(item, depth - 1) for item in value)  # type: ignore[attr-defined]
    return kind in _CONSTANT or is_a(value, (type, ModuleType))


def _plain(fn: Callable[..., Any]) -> bytes:
    try:
        return pickle.dumps(fn, 5)
    except Exception:
        return b""
