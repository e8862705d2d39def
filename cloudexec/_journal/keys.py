"""The name of a call that is the same in every run of a program: a digest of all that it carries.

What counts is the pickle of the call, as it travels: function, arguments, and where they travel by
value, code, closures, globals and attributes. Wire pickles are no such names themselves. Sets are
in another order in each process, classes by value are given random numbers, and equal strings are
written otherwise if they are one object. So the call is pickled once more, with sets sorted, values
that cannot change written by what they are, and code named by where it stands in its program.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import marshal
import pickle
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from types import (
    BuiltinFunctionType,
    CodeType,
    FunctionType,
    MethodType,
    ModuleType,
    NoneType,
)
from typing import Any, TypeVar

import cloudpickle

from cloudexec import _payload
from cloudexec._describing import attribute_of, is_a, type_name
from cloudexec._journal.program import Program
from cloudexec._objects.ref import Ref
from cloudexec._objects.segments import same_bytes
from cloudexec._objects.store import Blob
from cloudexec._payload import Composed, Payload, Unfinished
from cloudexec._records import NUMBER

__all__ = ["Unkeyed", "arguments_digest", "bare", "blobs_of", "digest_of", "name_of"]

_ATOMS = frozenset({int, float, complex, bool, str, bytes, NoneType, type(Ellipsis)})
_CONTAINERS = frozenset({tuple, frozenset, list, dict, set})
_CONTENT = 2
"""Version of marshal's format that says what values are, and not which of them are one object. It
sorts sets (bpo-37596)."""
_LARGE = 64 * 1024
_DIGEST_BYTES = 1024 * 1024


_func_of: Any = vars(functools.partial)["func"].__get__
_names_in: Any = vars(type)["__dict__"].__get__


class Unkeyed(Exception):
    """A call has no name that holds in another run: it takes something that nobody else knows."""


def name_of(fn: Any) -> str:
    """Return what a function is called, whatever its code is."""
    fn = _plain(fn)
    module, name = attribute_of(fn, "__module__"), attribute_of(fn, "__qualname__")
    return (
        f"{module if type(module) is str else '?'}:{name if type(name) is str else type_name(fn)}"
    )


def bare(fn: Any) -> Any:
    """Return what a callable is without the objects that are bound to it.

    Of these their class counts. A callable that is no function counts as it is.
    """
    if is_a(fn, functools.partial):
        return bare(_func_of(fn))
    if is_a(fn, MethodType):
        return _class_of(fn.__self__), bare(fn.__func__)
    if is_a(fn, BuiltinFunctionType) and not is_a(fn.__self__, ModuleType):
        return _class_of(fn.__self__), fn.__name__  # a method that is written in C
    if "_called_for_each" in _names_in(type(fn)):  # a chunk of ``map()``
        return bare(fn._called_for_each)
    return fn


def _class_of(obj: object) -> type:
    return obj if is_a(obj, type) else type(obj)


def _plain(fn: Any) -> Any:
    """Return the function, or class, that a callable leads to."""
    while True:
        if is_a(fn, functools.partial):
            fn = _func_of(fn)
        elif is_a(fn, MethodType):
            fn = fn.__func__
        elif is_a(fn, BuiltinFunctionType) and not is_a(fn.__self__, ModuleType):
            return type(fn.__self__)
        elif is_a(fn, (FunctionType, BuiltinFunctionType, type)):
            return fn
        elif "_called_for_each" in _names_in(type(fn)):
            fn = fn._called_for_each
        else:
            return type(fn)


def digest_of(value: object, program: Program, blobs: Sequence[Blob] = ()) -> bytes:
    """Digest whatever can be sent, with all that it takes along.

    Args:
        value: A callable, arguments, or both together.
        program: Where its code is.
        blobs: Of its wire pickle, whose digests are known once they were needed.

    Raises:
        Unkeyed: If it holds futures or handles that have no name.
        Exception: Whatever pickling raises.
    """
    return _Canonical(program, blobs).digest(value)


def arguments_digest(
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    program: Program,
    payload: Payload | Unfinished | None,
) -> bytes:
    """Digest arguments; a future counts as the call that it stands for.

    Args:
        args: By position.
        kwargs: By name, in their order: a function can see it.
        program: Where their code is.
        payload: Their wire pickle, if there is one of them alone.

    Raises:
        Unkeyed: If there are futures or handles among them that have no name.
        Exception: Whatever pickling raises.
    """
    if not kwargs and _payload._is_plain(args):
        return hashlib.sha256(marshal.dumps(args, _CONTENT)).digest()
    return digest_of((args, list(kwargs.items())), program, blobs_of(payload))


def blobs_of(payload: Payload | Unfinished | None) -> Sequence[Blob]:
    """Return the large pieces of a wire pickle."""
    if type(payload) is Unfinished:
        payload = payload.payload
    return payload.blobs if type(payload) is Composed else ()


class _Canonical(cloudpickle.Pickler):  # type: ignore[misc]
    """Writes a pickle that is the same in every process, and that nobody can load."""

    def __init__(
        self, program: Program, blobs: Sequence[Blob], enclosing: tuple[int, ...] = ()
    ) -> None:
        self._pieces: list[tuple[bytes, Any]] = []
        super().__init__(_File(self._pieces), protocol=5, buffer_callback=self._take)
        self._program = program
        self._blobs = blobs
        self._enclosing = enclosing  # sets that this is in
        self._numbers: dict[int, int] = {}  # of containers and namespaces, by id
        self._held: list[Any] = []  # so that no id is given twice

    def digest(self, value: object) -> bytes:
        self.dump(value)
        found = hashlib.sha256()
        for kind, piece in self._pieces:
            mark, data = self._content(piece)
            found.update(b"%b%b%d:" % (kind, mark, len(data)))
            found.update(data)
        return found.digest()

    def _take(self, buffer: pickle.PickleBuffer) -> bool:
        try:
            self._pieces.append((b"buffer", buffer.raw()))
        except BufferError:
            return True
        return False

    def _content(self, piece: Any) -> tuple[bytes, Any]:
        """Return what stands for a piece: itself, or the digest of a large one."""
        view = memoryview(piece).cast("B")
        if len(view) < _LARGE:
            return b"whole", piece
        for blob in self._blobs:
            if blob.size != len(view) or blob.origin is not None:
                continue
            if blob.content is piece or same_bytes(view, blob.view()):
                if not blob.sha256:
                    blob.sha256 = _sha256(view)
                return b"digest", blob.sha256
        return b"digest", _sha256(view)

    # What pickle writes by itself.

    def persistent_id(self, obj: Any) -> Any:
        kind = type(obj)
        if kind is str:
            return marshal.dumps(obj, _CONTENT)
        if kind is bytes:
            return marshal.dumps(obj, _CONTENT) if len(obj) < _LARGE else self._content(obj)
        return self._container(obj, kind) if kind in _CONTAINERS else None

    def _container(self, obj: Any, kind: Any) -> Any:
        """Return what stands for a container, ``None`` if what is in it is to be looked at.

        What can be changed counts as itself, too: whether two arguments are one list makes a
        difference to who changes it.
        """
        is_set = kind is set or kind is frozenset
        try:
            content: Any = _content_of(obj, kind)
        except ValueError:  # there is too much of it
            content = None
        if kind is tuple or (kind is frozenset and content is not None):
            return content
        if content is None and not is_set:
            return None
        number = self._numbers.get(id(obj))
        if number is not None:
            return number
        number = self._number(obj)
        if content is None:
            if id(obj) in self._enclosing:
                return "enclosing", self._enclosing.index(id(obj))
            inside = (*self._enclosing, id(obj))
            by_digest = [
                (_Canonical(self._program, self._blobs, inside).digest(item), item) for item in obj
            ]
            by_digest.sort(key=lambda each: each[0])
            content = [item for _, item in by_digest]
            self._held.append(content)
        return kind.__name__, number, content

    def _number(self, obj: Any) -> int:
        self._held.append(obj)
        return self._numbers.setdefault(id(obj), len(self._numbers))

    # What is reduced to something else.

    def reducer_override(self, obj: Any) -> Any:
        kind = type(obj)
        if kind is CodeType:
            return _stands_for, ("code", *self._program.code(obj, ""))
        if isinstance(obj, Future):
            return _stands_for, ("call", _future_key(obj))
        if kind is Ref:
            return _stands_for, ("ref", _ref_digest(obj))
        if kind is TypeVar:
            reduced = cloudpickle.Pickler.dispatch_table[TypeVar](obj)
        else:
            reduced = super().reducer_override(obj)
        if type(reduced) is not tuple:
            return reduced
        make, args, *rest = reduced
        number = _tracked(obj)
        if number is not None:
            args = tuple([each for each in args if type(each) is not str or each != number])
        if kind is FunctionType:
            args = self._function(args)
            rest[0][1].pop("_cloudpickle_submodules", None)
        elif isinstance(obj, type) and rest:
            _settle_class(obj, rest[0][0])
        return make, args, *rest

    def _function(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Return what makes a function by value, without where its file lies.

        Functions of one namespace share its changes, those of equal ones do not.
        """
        code, namespace, *rest = args
        name, package = namespace.get("__name__"), namespace.get("__package__")
        number = self._number(namespace)
        return self._program.code(code, package or ""), number, name, package, *rest


def _content_of(obj: Any, kind: Any) -> bytes | None:
    """Return what is in a container, if it is only what says what it is itself."""
    if kind is dict:
        if not (_ATOMS.issuperset(map(type, obj)) and _ATOMS.issuperset(map(type, obj.values()))):
            return None
    elif not _ATOMS.issuperset(map(type, obj)):
        return None
    return marshal.dumps(obj, _CONTENT)


def _tracked(obj: Any) -> str | None:
    """Return the random number by which cloudpickle knows a class again."""
    try:
        return cloudpickle.cloudpickle._DYNAMIC_CLASS_TRACKER_BY_CLASS.get(obj)  # type: ignore[no-any-return]
    except TypeError:
        return None


def _settle_class(cls: type, values: dict[str, Any]) -> None:
    """Take out of what is in a class what differs from run to run, or where its lines are."""
    values.pop("__firstlineno__", None)
    doc = values.get("__doc__")
    if (
        "__dataclass_fields__" in values
        and isinstance(doc, str)
        and "{" in doc
        and doc == f"{cls.__name__}{inspect.signature(cls)}".replace(" -> None", "")
    ):
        del values["__doc__"]  # a set may be in it, in whatever order, and nothing that is new
    if "__static_attributes__" in values:
        values["__static_attributes__"] = sorted(values["__static_attributes__"])
    if "_abc_impl" in values:
        values["_abc_impl"] = sorted(
            values["_abc_impl"], key=lambda each: (each.__module__, each.__qualname__)
        )


class _File:
    """A file for the pickler."""

    def __init__(self, pieces: list[tuple[bytes, Any]]) -> None:
        self._pieces = pieces

    def write(self, data: Any) -> int:
        self._pieces.append((b"pickle", data if type(data) is bytes else bytes(data)))
        return len(data)


def _stands_for(*what: Any) -> Any:
    """Stands for something in a pickle that is only digested."""


def _future_key(future: Future[Any]) -> bytes:
    call = getattr(future, "_journaled", None)
    if call is None:
        raise Unkeyed("a future of a call that is not in the journal is among its arguments")
    key: bytes = call.key
    return key


def _ref_digest(ref: Ref[Any]) -> bytes:
    if ref._digest is not None:
        return ref._digest
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
