"""Digests a call so that the digest is the same in every run of a program.

The digest covers what the pickle of the call carries: the function, the arguments and, for objects
that are pickled by value, their code, closures, globals and attributes. The pickle that is sent to
a worker cannot be digested itself, because it differs from run to run: sets have another order in
each process, cloudpickle numbers classes at random, and two equal strings are pickled otherwise
than one string that occurs twice. So the call is pickled once more in a canonical form: sets are
sorted, immutable values are written by their content, and code by its place in the program.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import marshal
import pickle
from collections import deque
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import Future
from types import (
    BuiltinFunctionType,
    CodeType,
    FunctionType,
    MethodType,
    ModuleType,
    NoneType,
)
from typing import Any, NamedTuple, TypeVar

import cloudpickle

from cloudexec import _payload
from cloudexec._describing import attribute_of, is_a, type_name
from cloudexec._journal.program import Program
from cloudexec._objects.ref import Ref
from cloudexec._objects.segments import same_bytes
from cloudexec._objects.store import Blob
from cloudexec._payload import Unfinished
from cloudexec._records import NUMBER, Composed, Payload

__all__ = ["Unkeyed", "arguments_digest", "bare", "blobs_of", "digest_of", "name_of"]

_NUMBERS = frozenset({int, float, complex, bool, NoneType, type(Ellipsis)})
_ATOMS = _NUMBERS | {str, bytes}
_CONTAINERS = frozenset({tuple, frozenset, list, dict, set})
_SETS_REDUCE = (set.__reduce__, frozenset.__reduce__)
_CONTENT = 2
"""Version of marshal's format. From version 3 on, marshal writes an object that occurs again as a
reference, so that equal values can have different bytes. marshal sorts sets (bpo-37596)."""
_LARGE = 64 * 1024
_LONG = 1024
_FEW = 32
"""Containers with at most this many values are examined again each time, and not remembered."""
_DIGEST_BYTES = 1024 * 1024


_func_of: Any = vars(functools.partial)["func"].__get__
_names_in: Any = vars(type)["__dict__"].__get__


class Unkeyed(Exception):
    """A call has no key: its arguments hold something that another run cannot have."""


def name_of(fn: Any) -> str:
    """Return a callable's module and qualified name, such as ``"script:work"``."""
    fn = _plain(fn)
    module, name = attribute_of(fn, "__module__"), attribute_of(fn, "__qualname__")
    return (
        f"{module if type(module) is str else '?'}:{name if type(name) is str else type_name(fn)}"
    )


def bare(fn: Any) -> Any:
    """Return a callable without the objects that are bound to it.

    A bound method is replaced by the class of its object and the function, a ``partial`` by its
    function. Any other callable is returned as it is.
    """
    if is_a(fn, functools.partial):
        return bare(_func_of(fn))
    if is_a(fn, MethodType):
        return _class_of(fn.__self__), bare(fn.__func__)
    if is_a(fn, BuiltinFunctionType) and not is_a(fn.__self__, ModuleType):
        return _class_of(fn.__self__), fn.__name__  # a bound method that is written in C
    if "_called_for_each" in _names_in(type(fn)):  # a chunk of ``map()``
        return bare(fn._called_for_each)
    return fn


def _class_of(obj: object) -> type:
    return obj if is_a(obj, type) else type(obj)


def _plain(fn: Any) -> Any:
    """Return the function or class behind a callable."""
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
    """Digest a value and all objects that its pickle carries.

    Args:
        value: A callable, arguments, or both together.
        program: The program that the code belongs to.
        blobs: The large pieces of the value as it was pickled to be sent. A blob remembers its
            digest, so that its content is hashed only once.

    Raises:
        Unkeyed: If the value holds a future or a ``Ref`` that has no key.
        Exception: Whatever pickling raises.
    """
    return _Canonical(program, blobs).digest(value)


def arguments_digest(
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    program: Program,
    payload: Payload | Unfinished | None,
) -> bytes:
    """Digest the arguments of a call; a future among them counts by the key of its own call.

    Args:
        args: The positional arguments.
        kwargs: The keyword arguments. Their order counts, as a function can observe it.
        program: The program that the arguments' code belongs to.
        payload: The pickle of the arguments, if they were pickled without the function.

    Raises:
        Unkeyed: If a future or a ``Ref`` among the arguments has no key.
        Exception: Whatever pickling raises.
    """
    if not kwargs and _payload._is_plain(args):
        return hashlib.sha256(marshal.dumps(args, _CONTENT)).digest()
    return digest_of((args, list(kwargs.items())), program, blobs_of(payload))


def blobs_of(payload: Payload | Unfinished | None) -> Sequence[Blob]:
    """Return the large pieces of a payload, without its small pickle."""
    if type(payload) is Unfinished:
        payload = payload.payload
    return payload.blobs if type(payload) is Composed else ()


class _Canonical(cloudpickle.Pickler):  # type: ignore[misc]
    """Writes a pickle that is the same in every process. It is only digested, and cannot be loaded.

    Args:
        program: The program that the code belongs to.
        blobs: The large pieces of the value as it was pickled to be sent.
        order: Sorts the items of sets; ``None`` makes a new one.
    """

    def __init__(
        self, program: Program, blobs: Sequence[Blob], order: _Order | None = None
    ) -> None:
        self._pieces: list[tuple[bytes, Any]] = []
        super().__init__(_File(self._pieces), protocol=5, buffer_callback=self._take)
        self._program = program
        self._blobs = blobs
        self._order = _Order(program, blobs) if order is None else order
        self._numbers: dict[int, int] = {}  # the number of each container, by its id
        # The number of each function's global namespace, by its id; its content is not digested.
        self._namespaces: dict[int, int] = {}
        self._held: list[Any] = []  # keeps objects alive, so that Python does not reuse their ids

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
        """Return a mark and the bytes to digest: a small piece itself, or a large one's SHA-256.

        A blob with the same content may know its digest already, and comparing is much faster than
        hashing.
        """
        view = memoryview(piece).cast("B")
        if len(view) < _LARGE:
            return b"whole", piece
        like_it = self._order.blobs.get(len(view), deque[Blob]())
        for _ in range(len(like_it)):
            blob = like_it[0]
            like_it.rotate(-1)
            if blob.content is piece or same_bytes(view, blob.view()):
                if not blob.sha256:
                    blob.sha256 = _sha256(view)
                return b"digest", blob.sha256
        return b"digest", _sha256(view)

    # Values that pickle writes by itself.

    def persistent_id(self, obj: Any) -> Any:
        kind = type(obj)
        if kind is str or kind is bytes:
            return self._plain(obj)
        return self._container(obj, kind) if kind in _CONTAINERS else None

    def _plain(self, obj: Any) -> Any:
        """Return what is pickled instead of an immutable value: bytes that depend on its content.

        A large value is digested once, however often it occurs, and is written as a number. The
        number is needed because pickle would write a bytes object that occurs again as a reference.
        """
        known = self._order.large.get(id(obj))
        if known is None:
            is_bytes = type(obj) is bytes and len(obj) >= _LARGE
            data = obj if is_bytes else marshal.dumps(obj, _CONTENT)
            if len(data) < _LONG:
                return data
            digest = self._content(data)[1] if is_bytes else _sha256(memoryview(data))
            number = int.from_bytes(digest) * 2 + is_bytes
            known = self._order.large[id(obj)] = number, obj
        return "large", known[0]

    def _container(self, obj: Any, kind: Any) -> Any:
        """Return what is pickled instead of a container; ``None`` to pickle its items one by one.

        A mutable container gets a number, too, so that its identity counts: it matters to a
        function that changes a list whether two of its arguments are the same list.
        """
        is_set = kind is set or kind is frozenset
        is_plain = self._order.is_plain(obj, kind)
        if kind is tuple or (kind is frozenset and is_plain):
            return self._plain(obj) if is_plain else None
        if not is_plain and not is_set:
            return None
        number = self._numbers.get(id(obj))
        if number is not None:
            return number
        number = self._number(obj, self._numbers)
        content = marshal.dumps(obj, _CONTENT) if is_plain else self._order.sorted(obj)
        self._held.append(content)
        return kind.__name__, number, content

    def _number(self, obj: Any, numbers: dict[int, int]) -> int:
        self._held.append(obj)
        return numbers.setdefault(id(obj), len(numbers))

    # Objects that pickle reduces to a callable and its arguments.

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
        elif _is_reduced_as_a_set(kind):
            make, _, *rest = obj.__reduce_ex__(5)
            # A frozenset instead of a list, because the list's order differs from run to run.
            return make, (frozenset(obj),), *rest
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
        """Return what stands for a function that is pickled by value, without its file's path.

        The number of its global namespace is part of it: functions that share one namespace see
        each other's assignments to globals, and functions with two equal namespaces do not.
        """
        code, namespace, *rest = args
        name, package = namespace.get("__name__"), namespace.get("__package__")
        number = self._number(namespace, self._namespaces)
        return self._program.code(code, package or ""), number, name, package, *rest


class _Outline(_Canonical):
    """Pickles one object without the objects that it refers to, and lists those as ``children``."""

    def __init__(self, program: Program, blobs: Sequence[Blob], order: _Order) -> None:
        super().__init__(program, blobs, order)
        self.children: list[Any] = []
        self._has_begun = False

    def persistent_id(self, obj: Any) -> Any:
        kind = type(obj)
        if kind is str or kind is bytes:
            return self._plain(obj)
        if kind in _ATOMS:
            return None
        if not self._has_begun:
            self._has_begun = True
            return None
        if kind in _CONTAINERS and self._order.is_plain(obj, kind):
            return self._plain(obj)
        self.children.append(obj)
        return len(self.children)


class _Node(NamedTuple):
    """An object and what it refers to."""

    obj: Any
    outline: bytes
    """Digest of the object itself, without its children."""
    children: list[int]
    """The ids of the objects that it refers to."""
    is_set: bool
    """Whether the object is a set, so that its children have no order."""


class _Order:
    """Sorts the items of sets by their content, not by their addresses in memory.

    Each object gets a digest of itself and of all objects that it refers to, directly or not. It is
    computed once, however many sets the object is in. Objects that refer to themselves in a circle
    get their digests in rounds: each round digests the digests of the round before, until a round
    distinguishes no more objects than the last one. The digests decide the order only: two objects
    with equal digests are still pickled separately, each with its own content.
    """

    def __init__(self, program: Program, blobs: Sequence[Blob]) -> None:
        self._program = program
        self._blobs = blobs
        self._digests: dict[int, bytes] = {}
        self._held: list[Any] = []  # keeps objects alive, so that Python does not reuse their ids
        self._written: dict[int, int] = {}  # by id: the position at which an item was first sorted
        self._mixed: dict[int, Any] = {}  # by id: containers that hold other than plain values
        self.large: dict[int, tuple[int, Any]] = {}
        """By id: the number that is written instead of a large value, and the value itself, which
        keeps its id from being reused."""
        self.blobs: dict[int, deque[Blob]] = {}
        """The blobs of each size. They are rotated, as values mostly come in the blobs' order."""
        for blob in blobs:
            if blob.origin is None:
                self.blobs.setdefault(blob.size, deque()).append(blob)

    def is_plain(self, obj: Any, kind: Any) -> bool:
        """Say whether all items of a container are numbers, strings, bytes or ``None``."""
        if id(obj) in self.large:
            return True
        if id(obj) in self._mixed:
            return False
        found = _are_plain(obj) and (kind is not dict or _are_plain(obj.values()))
        if not found and len(obj) > _FEW:
            self._mixed[id(obj)] = obj
        return found

    def sorted(self, items: Collection[Any]) -> list[Any]:
        """Return the items of a set in an order that is the same in every process."""
        self._look_at(items)
        unwritten = len(self._written)
        found = sorted(
            items,
            key=lambda item: (
                self._digests[id(item)],
                self._written.get(id(item), unwritten),
            ),
        )
        for item in found:
            self._written.setdefault(id(item), len(self._written))
        return found

    def _look_at(self, items: Iterable[Any]) -> None:
        """Digest objects, and all objects that they refer to."""
        nodes: dict[int, _Node] = {}
        waiting = list(items)
        while waiting:
            obj = waiting.pop()
            if id(obj) in self._digests or id(obj) in nodes:
                continue
            kind = type(obj)
            if kind in _ATOMS or (kind in _CONTAINERS and self.is_plain(obj, kind)):
                self._held.append(obj)
                self._digests[id(obj)] = hashlib.sha256(marshal.dumps(obj, _CONTENT)).digest()
                continue
            is_set = kind is set or kind is frozenset
            if is_set:
                outline, children = kind.__name__.encode(), list(obj)
            else:
                pickler = _Outline(self._program, self._blobs, self)
                outline, children = pickler.digest(obj), pickler.children
            nodes[id(obj)] = _Node(obj, outline, list(map(id, children)), is_set)
            self._held.append(children)  # also children that were made by reducing an object
            waiting += children
        self._held += [node.obj for node in nodes.values()]
        parents: dict[int, list[int]] = {at: [] for at in nodes}
        for at, node in nodes.items():
            for child in node.children:
                if child in nodes:
                    parents[child].append(at)
        children_of = {at: node.children for at, node in nodes.items()}
        for at in _in_turn(nodes, children_of, parents):
            self._digests[at] = self._digest_of(nodes.pop(at))
        # Objects that refer to a circle without being in one follow once the circles are digested.
        above = _in_turn(nodes, parents, children_of)
        circles = nodes.keys() - above
        self._digests.update({at: nodes[at].outline for at in circles})
        told, before = len({self._digests[at] for at in circles}), 0
        while told > before:
            self._digests.update({at: self._digest_of(nodes[at]) for at in circles})
            told, before = len({self._digests[at] for at in circles}), told
        for at in reversed(above):
            self._digests[at] = self._digest_of(nodes[at])

    def _digest_of(self, node: _Node) -> bytes:
        below = [self._digests[child] for child in node.children]
        if node.is_set:
            below.sort()
        return hashlib.sha256(node.outline + b"".join(below)).digest()


def _is_reduced_as_a_set(kind: Any) -> bool:
    return kind.__reduce_ex__ is object.__reduce_ex__ and kind.__reduce__ in _SETS_REDUCE


def _are_plain(values: Collection[Any]) -> bool:
    kinds = set(map(type, values))
    if kinds <= _NUMBERS:
        return True
    # Containers with large texts are excluded: a text may occur many times, and pickle writes it
    # once, while marshal would write it each time.
    return kinds <= _ATOMS and all(
        len(each) < _LARGE for each in values if type(each) is str or type(each) is bytes
    )


def _in_turn(
    among: Iterable[int], needs: Mapping[int, list[int]], needed_by: Mapping[int, list[int]]
) -> list[int]:
    """Sort topologically: return the items that need only items which stand before them.

    Items in a circle, and items that need one of these, are left out.
    """
    missing = dict.fromkeys(among, 0)
    for at in missing:
        missing[at] = len([each for each in needs[at] if each in missing])
    found = [at for at, count in missing.items() if not count]
    for at in found:  # the loop appends to the list
        for each in needed_by[at]:
            if each in missing:
                missing[each] -= 1
                if not missing[each]:
                    found.append(each)
    return found


def _tracked(obj: Any) -> str | None:
    """Return the random number by which cloudpickle recognises a class that it has pickled."""
    try:
        return cloudpickle.cloudpickle._DYNAMIC_CLASS_TRACKER_BY_CLASS.get(obj)  # type: ignore[no-any-return]
    except TypeError:
        return None


def _settle_class(cls: type, values: dict[str, Any]) -> None:
    """Remove or sort the attributes of a class that differ from run to run or name its lines."""
    values.pop("__firstlineno__", None)
    doc = values.get("__doc__")
    if (
        "__dataclass_fields__" in values
        and isinstance(doc, str)
        and "{" in doc
        and doc == f"{cls.__name__}{inspect.signature(cls)}".replace(" -> None", "")
    ):
        # dataclass() has made this text of the signature. It adds nothing, and the default values
        # in it may be sets, whose order differs from run to run.
        del values["__doc__"]
    if "__static_attributes__" in values:
        values["__static_attributes__"] = sorted(values["__static_attributes__"])
    if "_abc_impl" in values:
        values["_abc_impl"] = sorted(
            values["_abc_impl"], key=lambda each: (each.__module__, each.__qualname__)
        )


class _File:
    """The file that the pickler writes to: it collects what is written as pieces."""

    def __init__(self, pieces: list[tuple[bytes, Any]]) -> None:
        self._pieces = pieces

    def write(self, data: Any) -> int:
        self._pieces.append((b"pickle", data if type(data) is bytes else bytes(data)))
        return len(data)


def _stands_for(*what: Any) -> Any:
    """Stand for an object in a pickle that is only digested; it is never called."""


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
    # By content: the head refers to blobs by numbers, and these differ from run to run.
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
