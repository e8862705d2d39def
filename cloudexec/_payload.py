"""Callables, arguments, results and exceptions <-> cloudpickle bytes.

A payload is plain ``bytes`` as long as it is small. A large one is :class:`Composed`: a head, which
is small, and the blobs that it refers to: large ``bytes`` objects, by reference, and the buffers of
arrays and the like. The head travels as small payloads do; each worker receives each blob once.
"""

from __future__ import annotations

import copyreg
import enum
import io
import pickle
import sys
from collections import ChainMap
from collections.abc import Callable
from concurrent.futures import Future
from multiprocessing.connection import _ConnectionBase
from types import CodeType, FunctionType, MemberDescriptorType, MethodType, NoneType
from typing import TYPE_CHECKING, Any, ClassVar

import cloudpickle

from cloudexec import _inputs, _main, _sharing
from cloudexec._anew import reduce_anew
from cloudexec._annotations import names_in, reduce_forward, settle, with_annotations
from cloudexec._describing import (
    attribute_of,
    describe,
    format_plainly,
    if_not_found,
    is_a,
    is_interrupt,
    set_cause,
    text_of,
    traceback_of,
    try_to_format,
    type_name,
    with_sources,
)
from cloudexec._errors import PayloadError, RemoteTraceback
from cloudexec._objects.ref import Ref
from cloudexec._records import (
    BUFFER_BLOB,
    END_RECORD,
    HEAD_BLOB,
    IN_BAND,
    IN_BAND_BLOB,
    NUMBER,
    READONLY_BLOB,
    RECORD,
    Composed,
    Payload,
)

if TYPE_CHECKING:
    from cloudexec._objects.store import Blob, BlobStore

__all__ = [
    "INLINE_BYTES",
    "Unfinished",
    "dumps",
    "dumps_call",
]

INLINE_BYTES = 64 * 1024
"""Largest payload that travels inside a control message (gRPC moves small messages whole)."""
_REFERENCED_BYTES = 256 * 1024
"""Pieces of a pickle from this size on are objects of the user's, not frames of the pickler's."""

EXCEPTION_BYTES = 4 * 1024 * 1024
"""Largest exception that travels as itself: it rides in a control message."""
_TEXT_KEPT = 16 * 1024
_TRACEBACK_KEPT = 128 * 1024

_ATOMS = frozenset({int, float, complex, bool, NoneType})
_loads = pickle.loads


Dependency = Future[Any] | Ref[Any]


class Unfinished:
    """A call that was pickled with placeholders for the futures and handles among its arguments.

    Attributes:
        payload: The pickle; it cannot be unpickled alone.
        futures: Whose results belong in the placeholders, by index, or handles to values. Each
            stands here once, however often it stands among the arguments.
    """

    __slots__ = ("futures", "payload")

    def __init__(self, payload: Payload, futures: list[Dependency]) -> None:
        self.payload = payload
        self.futures = futures


class _Edge:
    """Stands before and behind what a function or class refers to, as the pickler walks along."""

    __slots__ = ("step",)

    def __init__(self, step: int) -> None:
        self.step = step


def _place_of_file_name() -> int | None:
    """Find where among the arguments that make a code object its file's name stands."""
    code = _place_of_file_name.__code__
    make, args = cloudpickle.Pickler.dispatch_table[CodeType](code)
    for place, arg in enumerate(args):
        if type(arg) is str:
            made = make(*args[:place], "a file's name", *args[place + 1 :])
            if made.co_filename == "a file's name":
                return place
    return None


_FILE_NAME = _place_of_file_name()


def _reduce_text_file(file: io.TextIOWrapper) -> Any:
    """Pickle no open file but the standard ones, by their names.

    cloudpickle sends a copy of what is in a file, and nobody notices that it is one.

    Raises:
        TypeError: As plain pickling does, and ``ProcessPoolExecutor`` with it.
    """
    for name in ("stdout", "stderr"):
        if file is getattr(sys, name):
            return getattr, (sys, name)
    raise TypeError(f"cannot pickle '{type(file).__module__}.{type_name(file)}' object")


class Pickler(cloudpickle.Pickler):  # type: ignore[misc]
    """cloudpickle's, but the script is the same module everywhere, and arrays arrive writeable.

    What the script defines under a name travels as that name: see ``_main``. Code arrives with the
    name of its file, which some versions of cloudpickle replace: without it a traceback tells
    neither the file nor the line.
    """

    dispatch_table: ClassVar[Any] = ChainMap(
        {io.TextIOWrapper: _reduce_text_file}, cloudpickle.Pickler.dispatch_table
    )
    futures: list[Dependency] | None = None
    """Those met so far, where futures may be arguments; ``None``: they may not."""
    files: list[object] | None = None
    """Those that must be held open for the pickle; ``None``: it may refer to none."""
    names: set[str] | None = None
    """Where the globals of the script are collected that the pickle refers to."""
    marks = False
    """Whether it keeps track of what it is inside of, also where there are no futures."""
    _enclosed = 0
    """How many functions by value this is inside of: what these refer to are no arguments."""

    def reducer_override(self, obj: Any) -> Any:
        kind = type(obj)
        if kind is _Edge:
            self._enclosed += obj.step
            return tuple, ()
        if kind is CodeType and _FILE_NAME is not None:
            make, args = self.dispatch_table[CodeType](obj)
            # Interned, it is written once, however many functions of one file there are.
            name = sys.intern(str.__str__(obj.co_filename))
            return make, (*args[:_FILE_NAME], name, *args[_FILE_NAME + 1 :])
        if kind.__module__ == "numpy" and kind.__name__ == "ndarray":
            if not obj.flags.writeable:
                return _reduce_readonly(obj)
            return NotImplemented
        if _sharing.is_shared_kind(kind):
            return _sharing.reduce_shared(obj, self.files)
        if issubclass(kind, _NOT_VALUES):
            return self._place(obj) if issubclass(kind, Future) else _refuse_connection(obj)
        if kind is Ref and self.futures is not None and not self._enclosed:
            self.futures.append(obj)
            return _inputs.take, (len(self.futures) - 1,)
        if kind in _main.NAMED or issubclass(kind, type):
            known_as = _main.name_of(obj)
            if known_as is not None and self.refers(known_as.partition(".")[0]):
                return known_as
            if kind is FunctionType and obj.__globals__ is _main.namespace():
                return self._mark(self._of_main(obj))
        elif kind.__module__ == "annotationlib" and kind.__name__ == "ForwardRef":
            if self.names is not None:
                self.names.update(names_in(obj.__forward_arg__))
            return self._mark(reduce_forward(obj))
        elif kind is MethodType and self._finds(obj):
            return getattr, (obj.__self__, obj.__name__)
        elif _says_its_name(kind, obj):
            reduced = obj.__reduce_ex__(5)
            if type(reduced) is not str:
                return self._mark(reduced)
            if self.refers(reduced.partition(".")[0]):
                return reduced
            return self._mark(_reduce_named(obj))
        return self._mark(self._reduce(obj))

    def refers(self, name: str) -> bool:
        """Whether what the script has under a name is to travel as that name."""
        if self.names is not None:
            self.names.add(name)
        return True

    def _finds(self, method: MethodType) -> bool:
        """Whether a method can be had from its object: not while their class is being made."""
        if not _is_found(method):
            return False
        owner = method.__self__
        kind = owner if isinstance(owner, type) else type(owner)
        known_as = _main.name_of(kind)
        if known_as is None:
            # Its function alone could not be told from a copy: a class method is found bound. But
            # workers have the class as it was imported, and not with what the script put into it.
            if attribute_of(method.__func__, "__globals__") is _main.namespace():
                return False
            return bool(cloudpickle.cloudpickle._should_pickle_by_reference(kind))
        return self.refers(known_as.partition(".")[0])

    def _reduce(self, obj: Any) -> Any:
        if self._enclosed and (reduced := reduce_anew(obj)) is not None:
            return reduced
        kind = type(obj)
        if kind is not FunctionType and not issubclass(kind, type):
            # cloudpickle takes a proxy, such as wrapt makes, for the function that it stands for.
            return NotImplemented
        # Where this returns NotImplemented, pickle would go on with ``obj`` and not with the copy.
        reduced = super().reducer_override(with_annotations(obj) if kind is FunctionType else obj)
        if type(reduced) is tuple and kind is not FunctionType and len(reduced) == 6:
            settle(obj, reduced[2][0])
            if "__slots__" in vars(obj):
                _keep_slots(obj, reduced)
            if reduced[0] is cloudpickle.cloudpickle._make_skeleton_class:
                reduced[1][3]["__qualname__"] = obj.__qualname__
                if "__class__" in reduced[2][0]:  # it can be given to a class only as it is made
                    reduced[1][3]["__class__"] = reduced[2][0].pop("__class__")
                reduced = _main.make_class, *reduced[1:5], _main.fill_class
            elif issubclass(obj, enum.Enum):
                reduced = _reduce_enum(obj, *reduced)
        return reduced

    def _of_main(self, fn: FunctionType) -> Any:
        """Pickle a function by value that shares the globals of the script."""
        reduced = self._dynamic_function_reduce(with_annotations(fn))
        _, (code, _, *_, closure), state, *rest = reduced
        state[1]["__globals__"] = {}
        closure = _main.shared_cells(fn, closure)
        if self.names is not None:  # those that are not there yet, too
            self.names.update(cloudpickle.cloudpickle._extract_code_globals(code))
        return _main.function, (code, closure), state, *rest

    def _mark(self, reduced: Any) -> Any:
        """Note, among arguments, where what a function or class refers to begins and ends."""
        if self.futures is None and not self.marks:
            return reduced
        if type(reduced) is tuple and len(reduced) == 6 and reduced[5] is not None:
            make, args, state, _, _, set_state = reduced
            marked = (_Edge(1), (set_state, state), _Edge(-1))
            return make, args, marked, None, None, _inputs.set_state
        return reduced

    def _place(self, future: Future[Any]) -> Any:
        """Pickle a future: as its value, if that is at hand, or as a placeholder."""
        futures = self.futures
        if futures is None or self._enclosed:
            raise TypeError(
                "a future cannot be sent: pass it as an argument of submit(), and the call gets "
                "its value, or pass its result()"
            )
        # Bytes that nobody has decoded yet are better passed on as they are.
        decoded = getattr(future, "_decode", None) is None
        if future.done() and decoded and not future.cancelled() and future.exception() is None:
            return _inputs.same, (future.result(),)
        futures.append(future)
        return _inputs.take, (len(futures) - 1,)


result_pickler: type[Pickler] = Pickler
"""Pickles results and exceptions; a process that runs tasks has one of its own."""


def _is_found(method: MethodType) -> bool:
    """Whether a method is what the class of its object has under the method's name."""
    owner = method.__self__
    try:
        if not isinstance(owner, type) and method.__name__ in vars(owner):
            return False  # what an object has itself is not there yet when this is unpickled
        return bool(getattr(owner, method.__name__) == method)
    except Exception:
        return False


_KINDS_OF_NAMES = ("NewType", "ParamSpec", "TypeAliasType", "TypeVarTuple")


def _says_its_name(kind: type, obj: Any) -> bool:
    """Whether an object of the script may travel as the name that it says it has there."""
    if kind.__module__ in ("typing", "typing_extensions"):
        return kind.__name__ in _KINDS_OF_NAMES and obj.__module__ in _main.NAMES
    if kind.__module__ not in _main.NAMES or kind in copyreg.dispatch_table:
        return False
    for base in kind.__mro__:
        if "__reduce_ex__" in vars(base) or "__reduce__" in vars(base):
            return base.__module__ in _main.NAMES
    return False


def _reduce_named(obj: Any) -> Any:
    """Pickle by value what says that it has a name, for it to be had under that."""
    kind = type(obj)
    if kind.__module__ in _main.NAMES:
        return copyreg.__newobj__, (kind,), obj.__getstate__()  # type: ignore[attr-defined]
    if kind.__name__ == "TypeAliasType":
        return kind, (obj.__name__, obj.__value__)
    args = (obj.__name__, obj.__supertype__) if kind.__name__ == "NewType" else (obj.__name__,)
    return kind, args, (None, {"__module__": obj.__module__})  # it has no ``__dict__``


def _keep_slots(cls: type, reduced: tuple[Any, ...]) -> None:
    """Have a class by value made with its slots, whatever version of cloudpickle is installed."""
    if issubclass(cls, tuple) and "_fields" in vars(cls):
        return  # a named tuple, which has none, and makes them itself
    keywords, content = reduced[1][3], reduced[2][0]
    slots = vars(cls)["__slots__"]
    keywords.setdefault("__slots__", (slots,) if isinstance(slots, str) else tuple(slots))
    for name, value in list(content.items()):
        if type(value) is MemberDescriptorType:
            del content[name]


_OF_MEMBERS: dict[type, Callable[[Any], Any]] = {
    bytes: lambda member: bytes.__getitem__(member, slice(None)),
    float: float.__float__,
    int: int.__int__,
    str: str.__str__,
}
"""What members of an enum are, by the type that they derive from."""


def _reduce_enum(cls: Any, make: Any, args: tuple[Any, ...], state: Any, *_rest: Any) -> Any:
    """Pickle an enum with its aliases, and members with what its ``__init__`` has set in them."""
    kind = cls._member_type_
    if kind.__new__ is object.__new__:
        plain: Any = _nothing
    elif kind in _OF_MEMBERS:
        plain = _OF_MEMBERS[kind]
    else:
        return make, args, state, *_rest
    bases, name, qualname, _members, module, *tracked = args
    members = [(key, plain(each), each._value_) for key, each in cls.__members__.items()]
    attributes = {
        key: {word: value for word, value in vars(each).items() if word not in _OF_ENUM}
        for key, each in cls.__members__.items()
    }
    content = {key: value for key, value in state[0].items() if key not in cls.__members__}
    args = type(cls), bases, name, qualname, kind, members, module, *tracked
    return _main.make_enum, args, ((content, state[1]), attributes), None, None, _main.fill_enum


def _nothing(_: Any) -> None: ...


_OF_ENUM = frozenset({"_name_", "_value_", "__objclass__", "_sort_order_"})
_NOT_VALUES = (Future, _ConnectionBase)


def _refuse_connection(connection: _ConnectionBase[Any, Any]) -> Any:
    """Pickle no end of a pipe as its number, which means another file, or none, elsewhere."""
    kind = type(connection)
    if kind.__reduce_ex__ is not object.__reduce_ex__ or kind.__reduce__ is not object.__reduce__:
        return NotImplemented  # a class of the user's that knows how
    raise PayloadError(
        f"a multiprocessing {kind.__name__} (an end of a Pipe) cannot be sent: it is an open file "
        f"of the process that made it; use a queue of a multiprocessing.Manager(), a file, or what "
        f"the call returns"
    )


def _reduce_readonly(array: Any) -> Any:
    """Pickle an array that cannot be written to so that it can be where it arrives."""
    flags = array.flags
    if array.dtype.hasobject or not (flags.c_contiguous or flags.f_contiguous):
        return array.copy().__reduce_ex__(5)
    order = "C" if flags.c_contiguous else "F"
    try:
        buffer = pickle.PickleBuffer(array)
    except (ValueError, BufferError):
        return array.copy().__reduce_ex__(5)  # a type that has no buffer, such as datetime64
    return _inputs.writeable, (buffer, array.dtype, array.shape, order)


class Collector:
    """A file for the pickler: large bytes objects reach ``write`` themselves, not as copies.

    Args:
        store: Where large pieces go.
    """

    def __init__(self, store: BlobStore) -> None:
        self._store = store
        self._pieces: list[bytes] = []  # of the pickle, since the last blob
        self._head: list[bytes] = []
        self._blobs: dict[int, Blob] = {}

    def write(self, data: Any) -> int:
        if type(data) is not bytes:
            data = bytes(data)
        if len(data) >= _REFERENCED_BYTES:
            self._flush()
            self._refer(IN_BAND_BLOB, data)
        else:
            self._pieces.append(data)
        return len(data)

    def take_buffer(self, buffer: pickle.PickleBuffer) -> bool:
        try:
            raw = buffer.raw()
        except BufferError:
            return True  # not contiguous: pickled in band
        if raw.nbytes <= INLINE_BYTES:
            return True
        # A snapshot now: the caller may change a writeable buffer as soon as submit() returns.
        # Only bytes never change; a read-only view may show what others write.
        self._refer(READONLY_BLOB if raw.readonly else BUFFER_BLOB, raw)
        return False

    def _refer(self, kind: int, data: bytes | memoryview) -> None:
        blob = self._store.intern(data)
        self._blobs[blob.id] = blob
        self._head.append(RECORD.pack(kind, blob.id))

    def _flush(self) -> None:
        """Turn the pieces of the pickle so far into a record."""
        pieces, self._pieces = self._pieces, []
        if pieces:
            data = pieces[0] if len(pieces) == 1 else b"".join(pieces)
            if len(data) > INLINE_BYTES:
                self._refer(IN_BAND_BLOB, data)
            else:
                self._head += (RECORD.pack(IN_BAND, len(data)), data)

    def pickler(self) -> Pickler:
        """Return what pickles into this."""
        return Pickler(self, protocol=5, buffer_callback=self.take_buffer)

    def pickle(self, pickler: Pickler, obj: object) -> Payload:
        """Pickle an object into this, and return what has come of it."""
        files = pickler.files = [] if self._store.shared else None
        pickler.dump(obj)
        pieces = self._pieces
        if not (self._head or files) and sum(map(len, pieces)) <= INLINE_BYTES:
            return pieces[0] if len(pieces) == 1 else b"".join(pieces)
        if files and not self._blobs:  # a composed payload has one at least
            self._refer(IN_BAND_BLOB, b"".join(pieces))
            pieces.clear()
        self._flush()
        payload = compose(self._head, self._blobs, self._store)
        if files:
            payload.files = tuple(files)
        return payload


def compose(records: list[bytes], blobs: dict[int, Blob], store: BlobStore) -> Composed:
    """Join records to a payload; where they are many, they are a blob themselves."""
    head = b"".join((*records, END_RECORD))
    if len(head) > INLINE_BYTES:
        blob = store.intern(head)
        blobs[blob.id] = blob
        head = RECORD.pack(HEAD_BLOB, blob.id)
    return Composed(head, tuple(blobs.values()))


def dumps(obj: object, store: BlobStore, names: set[str] | None = None) -> Payload:
    """Pickle one object, by value what cannot be imported elsewhere.

    Args:
        obj: Which.
        store: Where large pieces go.
        names: Where the globals of the script are added that it refers to.

    Raises:
        BaseException: Whatever pickling raises.
    """
    if type(obj) in _ATOMS:
        return pickle.dumps(obj, 5)
    collector = Collector(store)
    pickler = collector.pickler()
    pickler.names = names
    pickler.marks = names is not None
    return collector.pickle(pickler, obj)


def _is_plain(values: tuple[Any, ...], depth: int = 3) -> bool:
    """Whether plain pickle, an order of magnitude faster than cloudpickle, gives the same.

    Tuples in tuples are looked at to a depth only: each may hold another one many times.
    """
    for value in values:
        kind = type(value)
        if kind in _ATOMS:
            continue
        if (kind is str or kind is bytes) and len(value) < 16384:
            continue
        if kind is tuple and len(value) <= 8 and depth and _is_plain(value, depth - 1):
            continue
        return False
    return True


def dumps_arguments(
    args: tuple[Any, ...], kwargs: dict[str, Any] | None, store: BlobStore, names: set[str]
) -> Payload | Unfinished:
    """Pickle a call's arguments: a tuple, or a list of tuple and dict where there are keywords."""
    if not kwargs:
        if _is_plain(args):
            return pickle.dumps(args, 5)
        return _dumps_unfinished(args, store, names)
    return _dumps_unfinished([args, kwargs], store, names)


def dumps_bound(fn: Callable[..., Any], store: BlobStore, names: set[str]) -> Payload | Unfinished:
    """Pickle a callable that arguments may be bound to: a partial function, a method, an object."""
    return _dumps_unfinished(fn, store, names)


def _dumps_unfinished(obj: object, store: BlobStore, names: set[str]) -> Payload | Unfinished:
    """Pickle what may have futures in it: the pickler comes by every object anyway."""
    collector = Collector(store)
    pickler = collector.pickler()
    pickler.names = names
    futures: list[Dependency] = []
    pickler.futures = futures
    payload = collector.pickle(pickler, obj)
    return Unfinished(payload, futures) if futures else payload


def dumps_call(
    fn: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    store: BlobStore,
    names: set[str],
) -> Payload | Unfinished:
    """Pickle a whole call together, so that what callable and arguments share stays shared."""
    return _dumps_unfinished((fn, args, kwargs), store, names)


def without_end(payload: Composed, blobs: dict[int, Blob]) -> bytes:
    """Return a payload's records, to be followed by others; its blobs are among ``blobs``."""
    head = payload.head
    kind, number = RECORD.unpack_from(head)
    if kind == HEAD_BLOB:
        head = bytes(blobs[number].view())
    return head[: -RECORD.size]


def pack_numbers(payload: Composed) -> bytes:
    """Return what a payload's head calls its blobs, as ``load_nested`` takes it."""
    return b"".join(map(NUMBER.pack, payload.numbers))


def dumps_exception(exc: BaseException) -> bytes:
    """Pickle an exception with its traceback as text, for the client; raises nothing.

    What does not survive the round trip (a required ``__init__`` argument that ``args`` does not
    hold, an attribute that cannot be pickled) arrives as a PayloadError that carries the text.
    """
    try:
        # The first frame is the worker's own.
        tb = traceback_of(exc)
        tb = tb.tb_next if tb else None
        usual = try_to_format(exc, tb)
        text = format_plainly(exc, tb) if usual is None else usual
        if len(text) > 2 * _TRACEBACK_KEPT:
            text = f"{text[:_TRACEBACK_KEPT]}\n[...]\n{text[-_TRACEBACK_KEPT:]}"
        try:
            data = _dumps_itself(exc, check=usual is None)
        except BaseException as why:
            text = text[-_TEXT_KEPT:]
            data = _dumps_replacement(exc, why)
        # Apart: the traceback arrives although the exception cannot be loaded there.
        return pickle.dumps((data, text), 5)
    except BaseException as why:
        # Whatever it is, the task has run: that it has no memory left, for instance.
        return pickle.dumps((_dumps_replacement(exc, why), ""), 5)


def _dumps_itself(exc: BaseException, *, check: bool) -> bytes:
    """Pickle an exception that can be unpickled again.

    Args:
        exc: The exception; it loses its traceback.
        check: Whether to see that it can be formatted alone. If not, it would end any program that
            does not catch it without a word: the interpreter gives up on such an exception.

    Raises:
        BaseException: If it cannot.
    """
    BaseException.with_traceback(exc, None)
    with io.BytesIO() as file:
        result_pickler(file, protocol=5).dump(exc)
        data = file.getvalue()
    if len(data) > EXCEPTION_BYTES:
        raise PayloadError(f"it has {len(data)} bytes, and {EXCEPTION_BYTES} are allowed")
    loaded = _loads(data)
    if type(loaded) is not type(exc) and type(exc).__module__ != "__main__":
        raise PayloadError("the exception changed its type in the round trip")
    if check and try_to_format(loaded, None) is None:
        raise PayloadError("it cannot be formatted, as one of its own methods raises")
    return data


def _dumps_replacement(exc: BaseException, why: BaseException) -> bytes:
    replacement = PayloadError(
        f"the task raised {type_name(exc)}, which cannot be sent "
        f"({type_name(why)}: {text_of(why)[:_TEXT_KEPT]}); make it survive "
        f"pickle.loads(pickle.dumps(exc)). Its text: {text_of(exc)[:_TEXT_KEPT]}"
    )
    return pickle.dumps(replacement, 5)


def loads_exception(data: bytes) -> BaseException:
    """Unpickle an exception; its remote traceback is its ``__cause__``.

    Raises:
        KeyboardInterrupt: If Ctrl-C is pressed meanwhile.
    """
    exc: BaseException
    text = ""
    try:
        pickled, told = _loads(data)
        text = with_sources(str(told))
        loaded = _loads(pickled)
        if not is_a(loaded, BaseException):
            raise TypeError(f"{type_name(loaded)} is no exception")
        exc = loaded
    except BaseException as why:
        if is_interrupt(why):
            raise
        exc = PayloadError(
            f"the task raised an exception that cannot be unpickled here "
            f"({describe(why)}){if_not_found(why, 'is its module importable in the client?')}"
        )
    set_cause(exc, RemoteTraceback(text))
    return exc
