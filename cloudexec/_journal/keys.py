"""The name of a call that is the same in every run of a program: a digest of code and arguments.

Wire pickles are no such names: sets are in an order that differs from process to process, pickled
code tells where in its file it stands, and a function by reference is its name alone. So code is
digested by what it does (its instructions, constants and names, not its lines), sets by their
sorted items, and what a function refers to is followed: other functions and classes of the user's
own modules, constants, and, for a function that travels by value, all that travels with it.
"""

from __future__ import annotations

import functools
import hashlib
import os
import pickle
import sys
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from types import (
    BuiltinFunctionType,
    CodeType,
    FunctionType,
    MethodType,
    ModuleType,
    NoneType,
)
from typing import Any

import cloudpickle

from cloudexec import _payload
from cloudexec._fingerprints import contents, lookup, names_in
from cloudexec._modules import _installed
from cloudexec._objects.ref import Ref
from cloudexec._objects.segments import same_bytes
from cloudexec._objects.store import Blob
from cloudexec._payload import Composed, Payload, Unfinished
from cloudexec._records import NUMBER

__all__ = [
    "Unkeyed",
    "arguments_digest",
    "code_digest",
    "function_digest",
    "is_bare",
    "name_of",
]

_CHEAP = frozenset({int, float, complex, bool, str, bytes, NoneType, type(Ellipsis)})
_CHEAP_BYTES = 4096
"""Constants of a module up to this size count as part of the functions that read them."""
_SET_OPCODES = (b"\x8f", b"\x91")  # EMPTY_SET, FROZENSET
_LARGE = 64 * 1024
_DIGEST_BYTES = 1024 * 1024


class Unkeyed(Exception):
    """A call has no name that holds in another run: it takes something that nobody else knows."""


def name_of(fn: Any) -> str:
    """Return what a function is called, whatever its code is."""
    fn = _plain_callable(fn)
    return f"{getattr(fn, '__module__', '?')}:{getattr(fn, '__qualname__', type(fn).__name__)}"


def function_digest(fn: Callable[..., Any], blobs: Sequence[Blob] = ()) -> bytes:
    """Digest a callable with all that it takes along: code, defaults, closure, bound objects.

    Args:
        fn: Any callable.
        blobs: Of its wire pickle, whose digests are known once they were needed.

    Raises:
        Unkeyed: If it holds futures or handles that have no name.
        Exception: Whatever pickling raises.
    """
    return _Walk(blobs).digest(fn)


def code_digest(fn: Callable[..., Any]) -> bytes:
    """Digest a callable without the objects that are bound to it: what they stand for is said
    otherwise, by the caller's own key.

    Raises:
        Exception: Whatever pickling of what its code refers to raises.
    """
    return _Walk(()).digest(_plain_callable(fn))


def arguments_digest(
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    payload: Payload | Unfinished | None,
) -> bytes:
    """Digest arguments; a future counts as the call that it stands for.

    Args:
        args: By position.
        kwargs: By name, in any order.
        payload: Their wire pickle, if there is one of them alone.

    Raises:
        Unkeyed: If there are futures or handles among them that have no name.
        Exception: Whatever pickling raises.
    """
    if not kwargs and _payload._is_plain(args):
        # Nothing in it depends on the process, or on which objects are the same.
        data = payload if type(payload) is bytes else pickle.dumps(args, 5)
        return hashlib.sha256(data).digest()
    if type(payload) is Unfinished:
        payload = payload.payload
    blobs = payload.blobs if type(payload) is Composed else ()
    return _Walk(blobs).digest((args, sorted(kwargs.items())))


def is_bare(fn: Any) -> bool:
    """Say whether nothing is bound to a callable: no object, no arguments."""
    return _plain_callable(fn) is fn


def _plain_callable(fn: Any) -> Any:
    """Return the function, or class, that a callable leads to."""
    while True:
        if isinstance(fn, functools.partial):
            fn = fn.func
        elif isinstance(fn, MethodType):
            fn = fn.__func__
        elif isinstance(fn, BuiltinFunctionType) and not isinstance(fn.__self__, ModuleType):
            return type(fn.__self__)
        elif isinstance(fn, (FunctionType, BuiltinFunctionType, type)):
            return fn
        else:
            inner = getattr(fn, "__wrapped__", None)
            if inner is None:
                return type(fn)
            fn = inner


class _Walk:
    """One digest, of objects and of the code that they lead to.

    Functions and classes are numbered as they are met, and digested one after the other: nothing
    recurses along what calls what, and what calls itself is no trouble.
    """

    def __init__(self, blobs: Sequence[Blob]) -> None:
        self._hash = hashlib.sha256()
        self._numbers: dict[int, int] = {}
        self._met: deque[tuple[Any, bool]] = deque()
        self._whole = True  # whether what is met now travels with what is digested
        self._all: list[Any] = []  # so that no id is given twice
        self._blobs = blobs
        self._by_size: dict[int, list[Blob]] | None = None

    def digest(self, value: object) -> bytes:
        self._value(value)
        while self._met:
            met, whole = self._met.popleft()
            self._whole = whole and lookup(met) is not met
            if type(met) is FunctionType:
                self._function(met)
            else:
                self._class(met)
        return self._hash.digest()

    def _text(self, text: str) -> None:
        data = text.encode("utf-8", "surrogatepass")
        self._hash.update(b"%d:" % len(data))
        self._hash.update(data)

    # Objects.

    def _value(self, value: object) -> None:
        pieces: list[Any] = []
        met = len(self._met)
        _Canonical(self, pieces).dump(value)
        if any(
            opcode in piece
            for piece in pieces
            if type(piece) is bytes and len(piece) < _LARGE
            for opcode in _SET_OPCODES
        ):
            # Perhaps sets: their items are to be sorted. Without any the pickle is the same.
            pieces = []
            while len(self._met) > met:
                del self._numbers[id(self._met.pop()[0])]
            _Sorting(self, pieces).dump(value)
        for piece in pieces:
            data = self._content(piece)
            self._hash.update(b"%d:" % len(data))
            self._hash.update(data)

    def _content(self, piece: Any) -> Any:
        """Return what stands for a piece: itself, or the digest of a large one."""
        view = memoryview(piece).cast("B")
        if len(view) < _LARGE:
            return piece
        if self._by_size is None:
            self._by_size = {}
            for blob in self._blobs:
                self._by_size.setdefault(blob.size, []).append(blob)
        for blob in self._by_size.get(len(view), ()):
            if blob.origin is None and (blob.content is piece or same_bytes(view, blob.view())):
                if not blob.sha256:
                    blob.sha256 = _sha256(view)
                return blob.sha256
        return _sha256(view)

    def number_of(self, code: Any) -> int:
        """Return the number of a function or class, which is digested in its turn."""
        number = self._numbers.get(id(code))
        if number is None:
            number = self._numbers[id(code)] = len(self._numbers)
            self._met.append((code, self._whole))
            self._all.append(code)
        return number

    # Code.

    def _function(self, fn: FunctionType) -> None:
        self._text("function")
        self._text(f"{fn.__module__}:{fn.__qualname__}")
        code = fn.__code__
        self._code(code)
        for value in fn.__defaults__ or ():
            self._part("default", value)
        for name, value in sorted((fn.__kwdefaults__ or {}).items()):
            self._part(name, value)
        for cell in fn.__closure__ or ():
            self._part("cell", contents(cell))
        names = sorted(set(names_in(code)))
        for name in names:
            if name not in fn.__globals__:
                continue
            value = fn.__globals__[name]
            self._part(name, value)
            if isinstance(value, ModuleType) and _is_own(value.__name__):
                for attribute in names:
                    if attribute in vars(value):
                        self._part(f"{name}.{attribute}", vars(value)[attribute])

    def _part(self, name: str, value: Any) -> None:
        """Digest what code refers to by a name.

        Where it does not travel with the code, the worker has it from a module: what may change
        there from run to run, such as a cache, is then no part of it.
        """
        self._text(name)
        if self._whole or _is_code(value) or _is_cheap(value):
            self._value(value)
        else:
            self._text(type(value).__qualname__)

    def _class(self, cls: type) -> None:
        self._text("class")
        self._text(f"{cls.__module__}:{cls.__qualname__}")
        self._value(cls.__bases__)
        for name, value in sorted(vars(cls).items()):
            if isinstance(value, (staticmethod, classmethod)):
                value = value.__func__
            if isinstance(value, property):
                value = (value.fget, value.fset, value.fdel)
                self._text(name)
                self._value(value)
            elif _is_code(value) or (not name.startswith("__") and _is_cheap(value)):
                # Not what is noted in a class without being written there, such as line numbers.
                self._part(name, value)

    def _code(self, code: CodeType) -> None:
        self._text(code.co_qualname)
        self._hash.update(b"%d:" % len(code.co_code))
        self._hash.update(code.co_code)
        self._hash.update(code.co_exceptiontable)
        self._text(
            repr(
                (
                    code.co_argcount,
                    code.co_posonlyargcount,
                    code.co_kwonlyargcount,
                    code.co_flags,
                    code.co_names,
                    code.co_varnames,
                    code.co_freevars,
                    code.co_cellvars,
                )
            )
        )
        for constant in code.co_consts:
            self._constant(constant)

    def _constant(self, constant: Any) -> None:
        kind = type(constant)
        if kind is CodeType:
            self._code(constant)
            return
        self._text(kind.__name__)
        if kind is tuple:
            self._text(str(len(constant)))
            for item in constant:
                self._constant(item)
        elif kind is frozenset:
            self._text(repr(sorted(map(repr, constant))))
        else:
            self._text(repr(constant))


class _Canonical(cloudpickle.Pickler):  # type: ignore[misc]
    """Writes pickles that are the same in every process, and that nobody can load."""

    def __init__(self, walk: _Walk, pieces: list[Any]) -> None:
        super().__init__(_Pieces(pieces), protocol=5, buffer_callback=self._take)
        self._walk = walk
        self._pieces = pieces

    def _take(self, buffer: pickle.PickleBuffer) -> bool:
        try:
            self._pieces.append(buffer.raw())
        except BufferError:
            return True
        return False

    def reducer_override(self, obj: Any) -> Any:
        kind = type(obj)
        if kind is FunctionType or isinstance(obj, type):
            if obj is _code or obj is _named:
                return NotImplemented
            if _is_followed(obj):
                return _code, (self._walk.number_of(obj),)
            return _named, (obj.__module__, obj.__qualname__)
        if kind is ModuleType:
            return _named, (obj.__name__, "")
        if kind is CodeType:
            walk = _Walk(())
            walk._code(obj)
            return _code, (walk._hash.digest(),)
        if isinstance(obj, Future):
            return _code, (_future_key(obj),)
        if kind is Ref:
            return _code, (_ref_digest(obj, self._walk),)
        if type(getattr(obj, "__wrapped__", None)) is FunctionType and callable(obj):
            return _code, (kind.__qualname__, self._walk.number_of(obj.__wrapped__))
        if kind.__module__ == "numpy":
            return NotImplemented
        return super().reducer_override(obj)


class _Sorting(_Canonical):
    """The same, with the items of sets sorted; it looks at every object, which takes its time."""

    def persistent_id(self, obj: Any) -> Any:
        kind = type(obj)
        if kind is set or kind is frozenset:
            items = sorted(_Walk(self._walk._blobs).digest(item) for item in obj)
            return kind.__name__, b"".join(items)
        return None


class _Pieces:
    """A file for the pickler."""

    def __init__(self, pieces: list[Any]) -> None:
        self._pieces = pieces

    def write(self, data: Any) -> int:
        self._pieces.append(data if type(data) is bytes else bytes(data))
        return len(data)


def _code(*what: Any) -> Any:
    """Stands for code in a pickle that is only digested."""


def _named(module: str, name: str) -> Any:
    """Stands for what another module has under a name, in a pickle that is only digested."""


def _future_key(future: Future[Any]) -> bytes:
    call = getattr(future, "_journaled", None)
    if call is None:
        raise Unkeyed("a future of a call that is not in the journal is among its arguments")
    key: bytes = call.key
    return key


def _ref_digest(ref: Ref[Any], walk: _Walk) -> bytes:
    payload: Any = ref._payload
    if type(payload) is bytes:
        return hashlib.sha256(payload).digest()
    if type(payload) is not Composed or any(blob.origin or blob.lost for blob in payload.blobs):
        raise Unkeyed("a Ref whose value is on a worker is among its arguments")
    found = hashlib.sha256()
    # By content: the numbers of blobs differ from run to run, and stand in the head.
    head = payload.head
    for number, blob in zip(payload.numbers, payload.blobs, strict=True):
        if not blob.sha256:
            blob.sha256 = _sha256(blob.view())
        found.update(blob.sha256)
        head = head.replace(NUMBER.pack(number), b"#")
    found.update(head)
    return found.digest()


def _sha256(view: memoryview) -> bytes:
    found = hashlib.sha256()
    for at in range(0, len(view), _DIGEST_BYTES):
        found.update(view[at : at + _DIGEST_BYTES])
    return found.digest()


def _is_code(value: Any) -> bool:
    return (
        isinstance(value, (FunctionType, BuiltinFunctionType, type, ModuleType, MethodType))
        or type(getattr(value, "__wrapped__", None)) is FunctionType
    )


def _is_cheap(value: Any) -> bool:
    kind = type(value)
    if kind is str or kind is bytes:
        return len(value) <= _CHEAP_BYTES
    if kind is tuple:
        return len(value) <= 64 and all(map(_is_cheap, value))
    if kind is frozenset:
        return len(value) <= 64 and all(map(_is_cheap, value))
    return kind in _CHEAP


def _is_followed(obj: Any) -> bool:
    """Say whether the code of a function or class counts, or only its name."""
    module = getattr(obj, "__module__", None)
    return module is None or _is_own(module) or lookup(obj) is not obj


@functools.lru_cache(maxsize=4096)
def _is_own(module: str) -> bool:
    """Say whether a module is the user's, not installed."""
    top = module.partition(".")[0]
    if top in ("cloudexec", "builtins") or top in sys.stdlib_module_names:
        return False
    path = getattr(sys.modules.get(module), "__file__", None)
    if not isinstance(path, str):
        return top in ("__main__", "__mp_main__")
    return not os.path.realpath(path).startswith(_installed())
