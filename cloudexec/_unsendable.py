"""Finds the part of a call or of a result that cannot be pickled, and a remedy for the message.

This runs only after pickling has failed. Each part is pickled once more by itself, with a pickler
that notes the object it is at. Then the path from the part to that object is searched. Except for
Ctrl-C no function here raises; if nothing is found, the message has the original error only.
"""

from __future__ import annotations

import pickle
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from types import (
    CodeType,
    FunctionType,
    MappingProxyType,
    MemberDescriptorType,
    MethodType,
    ModuleType,
)
from typing import Any, NamedTuple

import cloudpickle

from cloudexec import _payload
from cloudexec._describing import (
    attribute_of,
    describe,
    is_a,
    is_interrupt,
    name_of,
    presentable,
    repr_of,
    text_of,
    type_name,
    unfinished,
)
from cloudexec._errors import CloudexecError, PayloadError, PayloadTooLargeError, RefLostError
from cloudexec._fingerprints import lookup, travels_by_value

__all__ = ["explain_call", "explain_value", "pickling_error"]

_MOST_OBJECTS = 20_000
"""Most objects that are looked at in the search for the one that cannot be pickled."""
_DEEPEST = 50
_MOST_PATH = 120
_OF_RESULT = "it belongs to the worker: return data instead"
_ATOMS = (str, bytes, int, float, complex, bool, type(None))

_NO_KEYWORDS: Mapping[str, Any] = MappingProxyType({})


class _Remedy(NamedTuple):
    """The remedy for objects of some types.

    Attributes:
        names: The types, as ``module.name``. ``module.`` stands for all types of a module and of
            the modules below it.
        text: The remedy if the object is sent to a worker; ``{pass}`` stands for a fitting verb.
        of_result: The remedy if the object is returned by a call.
    """

    names: tuple[str, ...]
    text: str
    of_result: str = ""


_CONNECTIONS = (
    "MySQLdb.",
    "asyncpg.",
    "botocore.",
    "clickhouse_driver.",
    "cx_Oracle.",
    "duckdb.",
    "mysql.",
    "oracledb.",
    "psycopg.",
    "psycopg2.",
    "psycopg_pool.",
    "pymongo.",
    "pymssql.",
    "pymysql.",
    "pyodbc.",
    "redis.",
    "snowflake.",
    "sqlalchemy.",
    "sqlite3.",
)
_REMEDIES = (
    _Remedy(
        ("_io._IOBase", "tempfile._TemporaryFileWrapper", "zipfile.ZipFile", "tarfile.TarFile"),
        "it is an open file: {pass} its path, and open it in the call",
        "it is an open file: return its path, or what is in it",
    ),
    _Remedy(
        ("_socket.socket", "_ssl._SSLContext", "_ssl._SSLSocket", "http.client.HTTPConnection"),
        "it belongs to this process: connect in the call, or in an initializer",
    ),
    _Remedy(_CONNECTIONS, "it belongs to this process: open it in an initializer, or in the call"),
    _Remedy(
        ("queue.Queue", "_queue.SimpleQueue", "multiprocessing.queues.", "asyncio.queues."),
        "it belongs to this process: use a queue of a multiprocessing.Manager(), or what the call "
        "returns",
        "it belongs to the worker: return a list of what is in it",
    ),
    _Remedy(
        ("threading.Thread", "multiprocessing.process.BaseProcess", "subprocess.Popen"),
        "it belongs to this process: start it in the call",
    ),
    _Remedy(
        ("concurrent.futures._base.Executor", "multiprocessing.pool."),
        "it belongs to this process: make one in the call, or in an initializer",
    ),
    _Remedy(("logging.Handler",), "it belongs to this process: set up logging in an initializer"),
    _Remedy(
        (
            "_thread.",
            "_thread._local",
            "threading.",
            "threading.Condition",
            "multiprocessing.synchronize.",
        ),
        "it belongs to this process: make it in the call, or use one of a "
        "multiprocessing.Manager()",
    ),
    _Remedy(
        ("builtins.coroutine", "asyncio.", "_asyncio."),
        "it belongs to an event loop of this process: start it in the call, by asyncio.run()",
        "it belongs to an event loop of the worker: return what asyncio.run() makes of it",
    ),
    _Remedy(
        (
            "builtins.generator",
            "builtins.async_generator",
            "builtins.map",
            "builtins.filter",
            "builtins.zip",
            "itertools.",
            "_csv.",
        ),
        "it makes its items one by one in this process: {pass} a list of them",
    ),
    _Remedy(
        ("builtins.traceback", "builtins.frame"),
        "it refers to all variables of the functions that ran: {pass} its text, such as that of "
        "traceback.format_exc()",
    ),
    _Remedy(("mmap.mmap",), "it is memory of this process: {pass} the path of its file"),
    _Remedy(("_weakref.", "weakref."), "it is a weak reference: {pass} the object itself"),
    _Remedy(("re.Match", "re.Scanner"), "{pass} its groups() instead"),
    _Remedy(("_hashlib.", "_contextvars.", "select."), "{pass} what it was made from instead"),
)


class _Place(NamedTuple):
    """The position of an object, as parts of a sentence.

    Attributes:
        noun: The part that has the object, such as ``"argument 0"`` or ``"global DB"``; empty for a
            callable itself.
        of: What the part belongs to, such as ``" of work()"``.
        path: The path from the part to the object, such as ``"['db'].conn"``.
        is_variable: Whether the part is a variable of a function and not one of the call's parts.
        by: The relation of that function to the call, such as ``", which work() refers to,"``.
    """

    noun: str
    of: str
    path: str = ""
    is_variable: bool = False
    by: str = ""

    def __str__(self) -> str:
        path = self.path if len(self.path) <= _MOST_PATH else f"{self.path[:_MOST_PATH]}..."
        if not self.noun or self.is_variable:
            return f"{self.noun}{path}{self.of}{self.by}" if self.noun else f"{self.of}{path}"
        return f"{path} in {self.noun}{self.of}" if path else f"{self.noun}{self.of}"


def pickling_error(
    exc: BaseException,
    fn: object,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] = _NO_KEYWORDS,
    noun: str = "argument {}",
) -> CloudexecError:
    """Return what a call fails with that cannot be pickled: what in it, why, and what to do."""
    if is_a(exc, (PayloadTooLargeError, RefLostError)):
        return exc
    if is_a(exc, PayloadError) and exc.__cause__ is not None:
        return exc  # it says already what cannot be sent, and why
    error = PayloadError(
        _refusal(exc, fn, args, kwargs, noun)
        or explain_call(fn, args, kwargs, exc, noun=noun)
        or f"{type_name(fn)} {name_of(fn)} or its arguments could not be pickled ({describe(exc)})"
    )
    error.__cause__ = presentable(exc)
    return error


def _refusal(
    exc: BaseException, fn: object, args: tuple[Any, ...], kwargs: Mapping[str, Any], noun: str
) -> str:
    """Say what is wrong with a callable or an argument that is never sent; ``""``: nothing."""
    from cloudexec import _sharing

    chunked = attribute_of(type(fn), "_called_for_each")
    called = attribute_of(fn, "_called_for_each") if chunked else fn
    elements: dict[str, object] = {noun.format(i): each for i, each in enumerate(args)}
    elements |= {f"keyword {name!r}": each for name, each in kwargs.items()}
    if is_a(exc, _sharing.NotSharedError):
        where = _sharing.where(exc.element, called, elements)
        return f"{where}{name_of(called)}: {exc.message}"
    if why := unfinished(called):
        return f"the callable is {why}, and give submit() that function itself"
    for where, value in elements.items():
        if why := unfinished(value):
            return f"{where} of {name_of(called)} is {why}"
    return ""


def explain_call(
    fn: object,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    error: BaseException,
    *,
    noun: str = "argument {}",
) -> str:
    """Return which part of a call cannot be pickled, why, and what to do.

    Args:
        fn: The callable.
        args: Its arguments.
        kwargs: Its keyword arguments.
        error: The exception of the failed pickling.
        noun: Name of an argument, with a placeholder for its index.

    Returns:
        A sentence without its full stop; empty if nothing was found.

    Raises:
        KeyboardInterrupt: If Ctrl-C is pressed meanwhile.
    """
    calls = [args]
    real = attribute_of(type(fn), "_called_for_each")
    if real is not None and len(args) == 1:  # one task has several calls of map(chunksize=...)
        fn, calls = attribute_of(fn, "_called_for_each"), args[0]
    elif real is not None:
        fn = attribute_of(fn, "_called_for_each")
    name = _name(fn)
    is_function = is_a(fn, (FunctionType, MethodType, partial, type))
    parts = [(_Place("", name) if is_function else _Place("the callable", f" ({_type(fn)})"), fn)]
    for args in calls:
        parts += [
            (_Place(noun.format(index), f" of {name}"), arg) for index, arg in enumerate(args)
        ]
    parts += [(_Place(f"keyword {key!r}", f" of {name}"), arg) for key, arg in kwargs.items()]
    return _explain(parts, error, "pass")


def explain_value(noun: str, value: object, error: BaseException, *, result: bool = False) -> str:
    """Return which part of a value cannot be pickled, why, and what to do.

    Args:
        noun: Name of the value, such as ``"the result"``.
        value: The value.
        error: The exception of the failed pickling.
        result: Whether a call has returned the value.

    Returns:
        A sentence without its full stop; empty if nothing was found.

    Raises:
        KeyboardInterrupt: If Ctrl-C is pressed meanwhile.
    """
    return _explain([(_Place(noun, ""), value)], error, "return" if result else "pass")


def _explain(parts: list[tuple[_Place, Any]], error: BaseException, verb: str) -> str:
    try:
        for place, part in parts:
            if type(part) in _ATOMS:
                continue
            tracer = _Tracer()
            try:
                tracer.dump(part)
            except BaseException as exc:
                if is_interrupt(exc):
                    raise
                return _sentence(place, part, tracer.last, error, verb)
    except BaseException as exc:
        if is_interrupt(exc):
            raise
    return ""


def _sentence(place: _Place, part: Any, culprit: Any, error: BaseException, verb: str) -> str:
    chain = _way(place, part, culprit) or [(place, part)]
    where, obj = chain[-1]
    if is_a(error, (RecursionError, MemoryError)) or "deep recursion" in text_of(error):
        return (
            f"{where} cannot be sent ({_type(obj)}): {describe(error)}; {verb} less, or less "
            f"deeply nested"
        )
    if is_a(error, CloudexecError) or "cannot be sent" in text_of(error):
        return f"{where}: {text_of(error)}"  # cloudexec's own message has a remedy
    for there, each in chain:
        if (remedy := _remedy(each)) is not None:
            text = remedy.text
            if verb == "return":
                text = remedy.of_result or (text if "{pass}" in text else _OF_RESULT)
            text = text.replace("{pass}", "use" if there.is_variable else verb)
            return f"{there} cannot be sent ({_type(each)}): {text}"
    return (
        f"{where} cannot be sent ({_type(obj)}): {describe(error)}; "
        f"{'use' if where.is_variable else verb} a value that pickle.dumps() accepts"
    )


class _Nowhere:
    def write(self, data: Any) -> int:
        return len(data)


class _Tracer(_payload.Pickler):
    """Pickles without keeping the bytes, and knows the object that it is at."""

    def __init__(self) -> None:
        super().__init__(_Nowhere(), protocol=5, buffer_callback=_leave_out)
        self.futures = []
        self.last: Any = None

    def persistent_id(self, obj: Any) -> None:
        self.last = obj


def _leave_out(buffer: pickle.PickleBuffer) -> bool:
    return False


# The search for the path from a part to an object in it.

_Step = tuple[Callable[[_Place], _Place], Any]


def _way(place: _Place, part: Any, culprit: Any) -> list[tuple[_Place, Any]]:
    """Return the objects on the path from a part to an object in it, with their positions.

    The list is empty if the object is not found, for instance because a ``__reduce__`` made it.
    """
    if part is culprit:
        return [(place, part)]
    came_from: dict[int, tuple[int, _Place, int]] = {id(part): (0, place, 0)}
    objects: dict[int, Any] = {id(part): part}
    waiting: deque[Any] = deque([part])
    while waiting and len(objects) < _MOST_OBJECTS:
        obj = waiting.popleft()
        _, here, depth = came_from[id(obj)]
        if depth == _DEEPEST:
            break
        for move, child in _steps(obj):
            if id(child) in came_from or type(child) in _ATOMS:
                continue
            came_from[id(child)] = id(obj), move(here), depth + 1
            objects[id(child)] = child
            if child is culprit:
                chain, at = [], id(child)
                while at:
                    before, there, _ = came_from[at]
                    chain.append((there, objects[at]))
                    at = before
                return chain[::-1]
            waiting.append(child)
    return []


def _same(place: _Place) -> _Place:
    return place


def _bound(noun: str, path: str) -> Callable[[_Place], _Place]:
    """Return a function from a callable's position to that of an object bound to the callable."""

    def move(place: _Place) -> _Place:
        if place.noun or place.path:
            return place._replace(path=place.path + path)
        return place._replace(noun=noun, of=f" of {place.of}")

    return move


def _travels(obj: Any) -> bool:
    """Return whether a function or class is pickled by value and not by its name."""
    by_value = cloudpickle.list_registry_pickle_by_value()
    module = attribute_of(obj, "__module__")
    return lookup(obj) is not obj or travels_by_value(module, by_value)


def _further(text: str) -> Callable[[_Place], _Place]:
    return lambda place: place._replace(path=place.path + text)


def _variable(noun: str, fn: FunctionType) -> Callable[[_Place], _Place]:
    name = _name(fn)

    def move(place: _Place) -> _Place:
        by = place.by
        if place.is_variable:
            by = by or f", which{place.of.removeprefix(' of')} refers to,"
        elif place.noun:
            by = f", in {place.noun}{place.of},"
        elif place.of != name:
            by = f", which {place.of} refers to,"
        return _Place(noun, f" of {name}", "", True, by)

    return move


def _steps(obj: Any) -> Iterator[_Step]:
    kind = type(obj)
    if issubclass(kind, dict):
        for key, value in list(dict.items(obj)):
            yield _further(f"[{repr_of(key)}]"), value
            yield _further(f" (its key {repr_of(key)})"), key
    elif issubclass(kind, (list, tuple, deque)):
        for index, value in enumerate(list(obj)):
            yield _further(f"[{index}]"), value
    elif issubclass(kind, (set, frozenset)):
        for value in list(obj):
            yield _further(f" (its item {repr_of(value)})"), value
    elif kind is partial:
        yield _same, obj.func
        for index, value in enumerate(obj.args):
            yield _bound(f"bound argument {index}", f".args[{index}]"), value
        for key, value in obj.keywords.items():
            yield _bound(f"bound keyword {key!r}", f".keywords[{key!r}]"), value
    elif kind is MethodType:
        yield _bound("the object", ".__self__"), obj.__self__
        yield _same, obj.__func__
    elif kind is FunctionType:
        if _travels(obj):
            yield from _steps_of_function(obj)
        return
    elif kind is ModuleType:
        return
    elif issubclass(kind, type):
        if not _travels(obj):
            return
        for name, value in list(type.__dict__["__dict__"].__get__(obj).items()):
            if isinstance(value, (staticmethod, classmethod)):
                value = value.__func__
            yield _further(f".{name}"), value
        return
    yield from _steps_of_attributes(obj, kind)
    yield _same, kind


def _steps_of_attributes(obj: Any, kind: type) -> Iterator[_Step]:
    own = _quietly(object.__getattribute__, obj, "__dict__")
    if type(own) is dict:
        for name, value in list(own.items()):
            yield _further(f".{name}"), value
    for each in kind.__mro__:
        for name, slot in list(vars(each).items()):
            if type(slot) is MemberDescriptorType:
                value = _quietly(slot.__get__, obj, kind)
                if value is not None:
                    yield _further(f".{name}"), value


def _steps_of_function(fn: FunctionType) -> Iterator[_Step]:
    variables = fn.__globals__
    for name in _names(fn.__code__):
        if name in variables:
            yield _variable(f"global {name}", fn), variables[name]
    for name, cell in zip(fn.__code__.co_freevars, fn.__closure__ or (), strict=False):
        value = _quietly(lambda cell: cell.cell_contents, cell)
        yield _variable(f"closure variable {name}", fn), value
    names = fn.__code__.co_varnames[: fn.__code__.co_argcount]
    defaults = fn.__defaults__ or ()
    for name, value in zip(names[len(names) - len(defaults) :], defaults, strict=False):
        yield _variable(f"default of parameter {name}", fn), value
    for name, value in (fn.__kwdefaults__ or {}).items():
        yield _variable(f"default of parameter {name}", fn), value
    for name, value in list(fn.__dict__.items()):
        yield _variable(f"attribute {name}", fn), value


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for const in code.co_consts:
        if type(const) is CodeType:
            yield from _names(const)


def _quietly(call: Callable[..., Any], *args: Any) -> Any:
    try:
        return call(*args)
    except BaseException as exc:
        if is_interrupt(exc):
            raise
        return None


# Names of objects, and remedies for their types.


def _name(fn: object) -> str:
    while type(fn) is partial:
        fn = fn.func
    name = attribute_of(fn, "__qualname__")
    if type(name) is not str:
        return f"{_type(fn)}()"
    name = name.replace("<locals>.", "").rpartition("<locals>")[2]
    return f"{name}()"


def _type(obj: object) -> str:
    kind = type(obj)
    module = attribute_of(kind, "__module__")
    name = attribute_of(kind, "__qualname__", "?")
    return name if module in ("builtins", "__main__") else f"{module}.{name}"


def _remedy(obj: object) -> _Remedy | None:
    if is_a(obj, (type, FunctionType)):
        return None
    for kind in type(obj).__mro__:
        name = f"{kind.__module__}.{kind.__qualname__}"
        for remedy in _REMEDIES:
            for each in remedy.names:
                if name == each:
                    return remedy
                # A remedy for a whole module does not fit classes that users derived from its own.
                if each.endswith(".") and kind is type(obj) and name.startswith(each):
                    return remedy
    return None
