"""Callables, arguments, results and exceptions arrive as they were when they were sent."""

from __future__ import annotations

import dataclasses
import enum
import functools
import importlib.util
import operator
import os
import pickle
import subprocess
import sys
import traceback
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np
import pytest

import cloudexec
from cloudexec import BatchExecutor, PayloadError, RemoteTraceback

pytestmark = pytest.mark.timeout(90)

PACKAGE = str(Path(cloudexec.__file__).parents[1])


@pytest.fixture(scope="module")
def shared() -> Iterator[BatchExecutor]:
    """Two slots for all tests that leave them as they were."""
    with BatchExecutor(2) as executor:
        yield executor


@pytest.fixture
def single() -> Iterator[BatchExecutor]:
    """One slot, so that whatever it caches is used again."""
    with BatchExecutor(1) as executor:
        yield executor


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[types.ModuleType]:
    """An importable module that changes in this process only."""
    (tmp_path / "changing_helpers.py").write_text(
        "VALUE = 1\ndef get():\n    return VALUE\ndef other():\n    return -1\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    import changing_helpers  # type: ignore[import-not-found]

    yield changing_helpers
    del sys.modules["changing_helpers"]


class Adder:
    def __init__(self, by: int) -> None:
        self.by = by

    def __call__(self, n: int) -> int:
        return n + self.by

    def add(self, n: int) -> int:
        return n + self.by

    @classmethod
    def make(cls, by: int) -> Adder:
        return cls(by)

    @staticmethod
    def double(n: int) -> int:
        return 2 * n


class Color(enum.Enum):
    RED = 1
    BLUE = 2


@dataclasses.dataclass(frozen=True)
class Point:
    x: int
    y: int = 0


# Callables.


def test_callables_of_every_sort_run(shared: BatchExecutor) -> None:
    """Lambdas, closures, partials, methods, callable instances, classes and builtins all run."""
    offset = 10

    def closure(n: int) -> int:
        return n + offset

    def factorial(n: int) -> int:
        return 1 if n < 2 else n * factorial(n - 1)

    calls: list[tuple[Callable[..., Any], tuple[Any, ...], Any]] = [
        (lambda n: n + 1, (1,), 2),
        (closure, (1,), 11),
        (factorial, (10,), 3628800),
        (functools.partial(closure, 5), (), 15),
        (functools.partial(pow, exp=2), (3,), 9),
        (Adder(3), (1,), 4),
        (Adder(3).add, (1,), 4),
        (Adder.double, (4,), 8),
        (Adder.make(2).add, (1,), 3),
        (Point, (1, 2), Point(1, 2)),
        (Color, (1,), Color.RED),
        (int, ("12",), 12),
        (len, ([1, 2],), 2),
        ("abc".upper, (), "ABC"),
        ([3, 1, 2].index, (2,), 2),
        (operator.itemgetter(1), ((5, 6),), 6),
        (operator.methodcaller("upper"), ("x",), "X"),
        (str.join, (",", ["a", "b"]), "a,b"),
        (dict.fromkeys, ((1,),), {1: None}),
    ]
    for _ in range(3):
        futures = [shared.submit(fn, *args) for fn, args, _ in calls]
        assert [f.result(30) for f in futures] == [expected for _, _, expected in calls]
    for fn, args, expected in calls:
        assert list(shared.map(fn, *[[arg, arg] for arg in args], timeout=30)) == (
            [expected] * 2 if args else []
        )


def test_identity_of_importable_things_survives(shared: BatchExecutor) -> None:
    """Enum members, classes and functions that can be imported come back as themselves."""
    for value in (Color.BLUE, Color, Point, len, test_callables_of_every_sort_run, None, ...):
        assert shared.submit(lambda v: v, value).result(30) is value
    assert shared.submit(lambda p: p, Point(3, 4)).result(30) == Point(3, 4)


def test_classes_by_value_keep_their_identity(shared: BatchExecutor) -> None:
    """An enum and a dataclass defined in a function come back as the very same classes."""

    class Level(enum.Enum):
        LOW = 1
        HIGH = 2

    @dataclasses.dataclass
    class Box:
        level: Level

    def swap(box: Box) -> Box:
        assert isinstance(box, Box)
        return Box(Level.HIGH if box.level is Level.LOW else Level.LOW)

    for _ in range(3):
        result = shared.submit(swap, Box(Level.LOW)).result(30)
        assert type(result) is Box
        assert result.level is Level.HIGH
        assert result == Box(Level.HIGH)


def test_what_callable_and_arguments_share_stays_shared(shared: BatchExecutor) -> None:
    """A method's object that is also an argument is one object in the worker."""

    class Node:
        def same(self, other: object) -> bool:
            return self is other

    node = Node()
    assert shared.submit(node.same, node).result(30)
    both = [1]
    assert shared.submit(operator.is_, both, both).result(30)


def test_large_closure_runs(shared: BatchExecutor) -> None:
    """A closure over 10 MB arrives whole, each time."""
    data = os.urandom(10_000_000)
    array = np.frombuffer(data, dtype=np.uint8)
    for _ in range(2):
        assert shared.submit(lambda: hash(data)).exception(30) is None
        assert shared.submit(lambda: data[-3:]).result(30) == data[-3:]
        assert list(shared.map(lambda i: int(array[i]), range(20))) == list(data[:20])


# Late binding.


def test_change_of_a_closure_reaches_later_calls_only(single: BatchExecutor) -> None:
    """A cell that is rebound between two submits: each call sees what it was submitted with."""
    n = 0
    padding = "x" * 3000

    def small() -> int:
        return n

    def large() -> tuple[int, int]:
        return n, len(padding)

    futures = []
    for k in range(200):
        n = k
        futures.append((single.submit(small), single.submit(large)))
    n = -1
    assert [f.result(30) for f, _ in futures] == list(range(200))
    assert [f.result(30) for _, f in futures] == [(k, 3000) for k in range(200)]


def test_change_of_a_global_reaches_later_calls_only(single: BatchExecutor) -> None:
    """A global of __main__ that is rebound, or mutated in place, is seen as it was."""
    namespace: dict[str, Any] = {"__name__": "__main__", "N": 0, "L": [0], "PAD": "x"}
    exec(
        "def bound():\n    return N\n"
        "def mutated():\n    return list(L)\n"
        "def nested():\n    return [N for _ in range(1)][0], (lambda: L[0])()\n"
        "def helper():\n    return N\n"
        "def calls_helper():\n    return helper()\n",
        namespace,
    )
    names = ("bound", "mutated", "nested", "calls_helper")
    futures = []
    for k in range(100):
        namespace["N"] = k
        namespace["L"][0] = k
        futures.append([single.submit(namespace[name]) for name in names])
    namespace["N"] = namespace["L"][0] = -1
    for k, row in enumerate(futures):
        assert [f.result(30) for f in row] == [k, [k], (k, k), k]


def test_helper_that_is_redefined_reaches_later_calls(single: BatchExecutor) -> None:
    """A function or class of __main__ that is defined anew is the one later calls use."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    exec("def call():\n    return helper() + Thing().value", namespace)
    futures = []
    for k in range(20):
        exec(f"def helper():\n    return {k}\nclass Thing:\n    value = {k * 100}\n", namespace)
        futures.append(single.submit(namespace["call"]))
    assert [f.result(30) for f in futures] == [k * 101 for k in range(20)]


def test_builtin_that_is_shadowed_reaches_later_calls(single: BatchExecutor) -> None:
    """A global that begins to shadow a builtin, and ceases to, is seen at once."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    exec("def size():\n    return len([1, 2, 3])", namespace)
    first = single.submit(namespace["size"])
    namespace["len"] = abs
    namespace["len"] = int
    shadowed = single.submit(namespace["size"])
    del namespace["len"]
    last = single.submit(namespace["size"])
    assert first.result(30) == 3
    assert isinstance(shadowed.exception(30), TypeError)
    assert last.result(30) == 3


def test_changes_of_the_function_itself_reach_later_calls(single: BatchExecutor) -> None:
    """New __defaults__, __kwdefaults__, __code__, attributes, and a mutated default are seen."""

    def fn(a: int = 1, *, b: int = 10) -> int:
        return a + b

    def plain(a=1):  # type: ignore[no-untyped-def]
        return a

    def other(a=1):  # type: ignore[no-untyped-def]
        return -a

    def mutable(a=[0]):  # type: ignore[no-untyped-def] # noqa: B006
        return a[0]

    def attributed() -> int:
        return attributed.n  # type: ignore[attr-defined,no-any-return]

    futures = [single.submit(fn), single.submit(plain), single.submit(mutable)]
    fn.__defaults__ = (2,)
    plain.__defaults__ = (2,)
    mutable.__defaults__[0][0] = 2
    futures += [single.submit(fn), single.submit(plain), single.submit(mutable)]
    fn.__kwdefaults__ = {"b": 30}
    plain.__code__ = other.__code__
    futures += [single.submit(fn), single.submit(plain)]
    fn.__kwdefaults__["b"] = 40
    futures += [single.submit(fn)]
    for k in range(5):
        attributed.n = k  # type: ignore[attr-defined]
        futures.append(single.submit(attributed))
    assert [f.result(30) for f in futures] == [11, 1, 0, 12, 2, 2, 32, -2, 42, 0, 1, 2, 3, 4]


def test_state_of_objects_reaches_later_calls_only(single: BatchExecutor) -> None:
    """Callable instances, bound methods and partials travel with the state of their submit."""
    adder = Adder(0)
    items: list[int] = []
    partial = functools.partial(len, items)
    futures = []
    for k in range(50):
        adder.by = k
        futures.append(
            (single.submit(adder, 1), single.submit(adder.add, 2), single.submit(partial))
        )
        items.append(k)
    adder.by = -1
    results = [tuple(f.result(30) for f in row) for row in futures]
    assert results == [(k + 1, k + 2, k) for k in range(50)]


def test_decorated_function_is_seen_as_it_was(single: BatchExecutor) -> None:
    """A wrapper's closure, and what it wraps, may change between submits."""
    factor = 1

    def scaled(fn: Callable[[int], int]) -> Callable[[int], int]:
        @functools.wraps(fn)
        def wrapper(n: int) -> int:
            return factor * fn(n)

        return wrapper

    @scaled
    def same(n: int) -> int:
        return n

    futures = []
    for k in range(20):
        factor = k
        futures.append(single.submit(same, 3))
    assert [f.result(30) for f in futures] == [3 * k for k in range(20)]


def test_dynamic_module_is_seen_as_it_was(single: BatchExecutor) -> None:
    """A module that nobody can import travels by value: its changes reach later calls."""
    namespace: dict[str, Any] = {"__name__": "__main__", "m": types.ModuleType("made_up")}
    exec("def read():\n    return m.value", namespace)
    futures = []
    for k in range(5):
        namespace["m"].value = k
        futures.append(single.submit(namespace["read"]))
    assert [f.result(30) for f in futures] == list(range(5))


@pytest.mark.parametrize("how", ["module", "function", "direct"])
def test_module_registered_by_value_after_first_use(
    single: BatchExecutor, module: Any, how: str
) -> None:
    """cloudpickle.register_pickle_by_value() holds from the next submit on."""
    namespace: dict[str, Any] = {"__name__": "__main__", "module": module, "get": module.get}
    exec("def by_module():\n    return module.get()\ndef by_name():\n    return get()", namespace)
    fn = {
        "module": namespace["by_module"],
        "function": namespace["by_name"],
        "direct": module.get,
    }[how]
    assert single.submit(fn).result(30) == 1
    cloudpickle.register_pickle_by_value(module)
    try:
        results = []
        for k in (2, 3):
            module.VALUE = k
            results.append(single.submit(fn).result(30))
    finally:
        cloudpickle.unregister_pickle_by_value(module)
    assert results == [2, 3]


def test_replaced_attribute_of_a_module_reaches_later_calls(
    single: BatchExecutor, module: Any
) -> None:
    """A function of a module that is replaced by a lambda is the lambda from then on."""
    assert single.submit(module.get).result(30) == 1
    original, module.get = module.get, lambda: 7
    assert single.submit(module.get).result(30) == 7
    # By reference it would be the lambda's name: it goes by value now.
    assert single.submit(original).result(30) == 1


@pytest.mark.parametrize("size", [0, 5000])
def test_changed_class_reaches_later_calls_only(single: BatchExecutor, size: int) -> None:
    """A class of __main__ that is changed in place, and back, is seen as it was each time."""
    namespace: dict[str, Any] = {"__name__": "__main__", "PAD": "p" * size}
    exec(
        "class Config:\n    rate = 0\ndef rate():\n    return Config.rate, len(PAD)\n",
        namespace,
    )
    sequence = [1, 2, 1, 3, 1, 2, 3, 3, 1]
    futures = []
    for value in sequence:
        namespace["Config"].rate = value
        futures.append(single.submit(namespace["rate"]))
    assert [f.result(30)[0] for f in futures] == sequence


@pytest.mark.parametrize("size", [0, 5000])
@pytest.mark.parametrize("where", ["closure", "global", "default", "nonlocal", "rebound"])
def test_change_made_by_a_call_stays_in_that_call(
    single: BatchExecutor, size: int, where: str
) -> None:
    """What a call does to its copy of the function's state does not reach the next call."""
    namespace: dict[str, Any] = {"__name__": "__main__", "PAD": "p" * size}
    source = {
        "closure": "def make():\n    c = [0]\n    def fn():\n        PAD; c[0] += 1\n"
        "        return c[0]\n    return fn\nfn = make()\n",
        "global": "c = [0]\ndef fn():\n    PAD; c[0] += 1\n    return c[0]\n",
        "default": "def fn(c=[0]):\n    PAD; c[0] += 1\n    return c[0]\n",
        "nonlocal": "def make():\n    c = 0\n    def fn():\n        nonlocal c\n        PAD\n"
        "        c += 1\n        return c\n    return fn\nfn = make()\n",
        "rebound": "c = 0\ndef fn():\n    global c\n    PAD\n    c += 1\n    return c\n",
    }[where]
    exec(source, namespace)
    assert [single.submit(namespace["fn"]).result(30) for _ in range(4)] == [1] * 4


def test_argument_that_changes_after_submit_arrives_as_it_was(
    single: BatchExecutor, tmp_path: Path
) -> None:
    """Arguments are taken at submit(), large arrays and read-only views of them included."""
    gate = str(tmp_path / "gate")
    os.mkfifo(gate)
    blocker = single.submit(lambda: Path(gate).read_text())
    array = np.zeros(1_000_000)
    view = array.view()
    view.flags.writeable = False
    data = bytearray(1_000_000)
    items = [0]
    futures = [
        single.submit(np.sum, array),
        single.submit(np.sum, view),
        single.submit(np.sum, [view[:500_000]]),
        single.submit(sum, data),
        single.submit(sum, items),
        single.submit(np.sum, array[:100]),
    ]
    array += 1
    data[:] = b"\1" * len(data)
    items[0] = 1
    with open(gate, "w"):
        pass
    blocker.result(30)
    assert [float(f.result(30)) for f in futures] == [0.0] * 6


# Exceptions.


class NeedsArguments(Exception):
    def __init__(self, code: int, reason: str) -> None:
        super().__init__(f"{code}: {reason}")
        self.code = code
        self.reason = reason


class KeywordOnly(Exception):
    def __init__(self, *, code: int) -> None:
        super().__init__("keyword")
        self.code = code


class Detailed(Exception):
    pass


def raise_(error: BaseException) -> None:
    raise error


@pytest.mark.parametrize(
    "error",
    [
        ValueError("x"),
        KeyError("k"),
        OSError(2, "No such file", "name"),
        UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"),
        SystemExit(4),
        KeyboardInterrupt("k"),
        GeneratorExit(),
        StopIteration(5),
        StopAsyncIteration(),
        ExceptionGroup("group", [ValueError(1), TypeError(2)]),
        BaseExceptionGroup("base", [KeyboardInterrupt()]),
        subprocess.CalledProcessError(3, ["x"], b"out", b"err"),
        PayloadError("mine"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_exception_arrives_as_itself(shared: BatchExecutor, error: BaseException) -> None:
    """Builtin exceptions keep type and arguments, and have the remote traceback as cause."""
    future = shared.submit(lambda: raise_(error))
    found = future.exception(30)
    assert type(found) is type(error)
    assert repr(found) == repr(error)
    assert isinstance(found.__cause__, RemoteTraceback)
    assert "raise_" in str(found.__cause__)
    with pytest.raises(type(error)):
        future.result()
    assert shared.submit(abs, -1).result(30) == 1


def test_notes_causes_and_contexts_are_told(shared: BatchExecutor) -> None:
    """The remote traceback tells notes, __cause__ and __context__; notes stay on the exception."""

    def fail() -> None:
        try:
            try:
                raise KeyError("the first")
            except KeyError:
                raise TypeError("the second")
        except TypeError as exc:
            error = ValueError("the third")
            error.add_note("a note of mine")
            raise error from exc

    error = shared.submit(fail).exception(30)
    assert isinstance(error, ValueError)
    assert error.__notes__ == ["a note of mine"]
    text = "".join(traceback.format_exception(error))
    for part in ("the first", "the second", "the third", "a note of mine", "in fail"):
        assert part in text


def test_exception_with_attributes_arrives(shared: BatchExecutor) -> None:
    """Attributes of an exception arrive; classes defined in a function keep their identity."""

    class Local(Exception):
        pass

    def fail(cls: type[Exception]) -> None:
        error = cls("text")
        error.detail = {"a": [1]}  # type: ignore[attr-defined]
        raise error

    for cls in (Detailed, Local):
        error = shared.submit(fail, cls).exception(30)
        assert type(error) is cls
        assert error.detail == {"a": [1]}  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "make",
    [
        lambda: NeedsArguments(3, "no disk"),
        lambda: KeywordOnly(code=4),
    ],
)
def test_exception_that_cannot_be_rebuilt_fails_its_future_only(
    shared: BatchExecutor, make: Callable[[], Exception]
) -> None:
    """An exception with required arguments arrives as a PayloadError with its text."""
    text = str(make())

    def fail() -> None:
        raise make()

    futures = [shared.submit(abs, -n) for n in range(20)]
    error = shared.submit(fail).exception(30)
    futures += [shared.submit(abs, -n) for n in range(20)]
    assert isinstance(error, PayloadError)
    assert text in str(error)
    assert type(make()).__name__ in str(error)
    assert "in fail" in str(error.__cause__)
    assert [f.result(30) for f in futures] == list(range(20)) * 2


def test_exception_with_an_attribute_that_cannot_be_pickled(shared: BatchExecutor) -> None:
    """A lock on an exception does not hide what was raised."""

    def fail() -> None:
        import threading

        error = ValueError("with a lock")
        error.lock = threading.Lock()  # type: ignore[attr-defined]
        raise error

    error = shared.submit(fail).exception(30)
    assert isinstance(error, (ValueError, PayloadError))
    assert "with a lock" in str(error)
    assert "in fail" in str(error.__cause__)


def test_recursion_error_arrives(shared: BatchExecutor) -> None:
    """Endless recursion in a task is a RecursionError, with a traceback of bounded size."""

    def deeper(n: int) -> int:
        return deeper(n + 1)

    error = shared.submit(deeper, 0).exception(30)
    assert isinstance(error, RecursionError)
    assert len(str(error.__cause__)) < 100_000


def test_recursion_while_pickling_fails_its_future_only(shared: BatchExecutor) -> None:
    """A value nested too deeply, sent or returned, is a PayloadError."""
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]

    def nest() -> list[Any]:
        value: list[Any] = []
        for _ in range(100_000):
            value = [value]
        return value

    assert isinstance(shared.submit(len, deep).exception(30), PayloadError)
    assert isinstance(shared.submit(nest).exception(30), PayloadError)
    while deep:  # taken apart by hand: freeing it recurses in C
        deep = deep[0]


# What cannot be pickled.


class BreaksHere:
    """Unpickles in the process whose number it is not told."""

    def __init__(self, where: str) -> None:
        self.where = where

    def __reduce__(self) -> Any:
        return unpickle_unless, (self.where, os.getpid())


def unpickle_unless(where: str, pid: int) -> object:
    raise ArithmeticError(f"cannot be unpickled in the {where}")


def test_unpicklable_argument_and_result_fail_their_futures(shared: BatchExecutor) -> None:
    """A lock as argument or result fails that future with a PayloadError that says so."""
    import threading

    def make_lock() -> object:
        return threading.Lock()

    def make_large() -> object:
        return [b"x" * 1_000_000, threading.Lock()]

    futures = [
        shared.submit(id, threading.Lock()),
        shared.submit(id, [b"x" * 1_000_000, threading.Lock()]),
        shared.submit(threading.Lock().acquire),
        shared.submit(make_lock),
        shared.submit(make_large),
    ]
    good = [shared.submit(abs, -n) for n in range(20)]
    for future in futures:
        error = future.exception(30)
        assert isinstance(error, PayloadError)
        assert "lock" in str(error)
    assert [f.result(30) for f in good] == list(range(20))


@pytest.mark.parametrize("size", [10, 1_000_000])
def test_what_fails_to_unpickle_fails_its_future_on_either_side(
    shared: BatchExecutor, size: int
) -> None:
    """Unpickling that raises, in worker or client, is that future's PayloadError and no more."""
    padding = b"x" * size

    def give() -> object:
        return [padding, BreaksHere("client")]

    there = shared.submit(len, [padding, BreaksHere("worker")])
    here = shared.submit(give)
    good = [shared.submit(abs, -n) for n in range(20)]
    for future, where in ((there, "worker"), (here, "client")):
        error = future.exception(30)
        assert isinstance(error, PayloadError)
        assert f"cannot be unpickled in the {where}" in str(error)
        assert where in str(error)
    assert [f.result(30) for f in good] == list(range(20))


@pytest.mark.parametrize("size", [10, 1_000_000])
def test_class_that_is_unknown_here_fails_its_future(
    shared: BatchExecutor, tmp_path: Path, size: int
) -> None:
    """A result or exception of a module that only the worker can import is a PayloadError."""
    (tmp_path / "only_there.py").write_text(
        "class Thing:\n    data = None\nclass Oops(Exception):\n    pass\n"
    )

    def give() -> object:
        sys.path.insert(0, str(tmp_path))
        import only_there  # type: ignore[import-not-found]

        sys.path.remove(str(tmp_path))
        thing = only_there.Thing()
        thing.data = b"x" * size
        return thing

    def fail() -> object:
        sys.path.insert(0, str(tmp_path))
        import only_there

        sys.path.remove(str(tmp_path))
        raise only_there.Oops("what it says")

    error = shared.submit(give).exception(30)
    assert isinstance(error, PayloadError)
    assert "only_there" in str(error)
    error = shared.submit(fail).exception(30)
    assert isinstance(error, PayloadError)
    assert "only_there" in str(error)
    assert "what it says" in "".join(traceback.format_exception(error))
    assert shared.submit(abs, -1).result(30) == 1


# What pickle sends by its name.


def public_names(module: types.ModuleType) -> Iterator[tuple[str, Any]]:
    """Yield what a module and its classes have under public names."""
    for name, value in list(vars(module).items()):
        if name.startswith("_"):
            continue
        yield name, value
        if isinstance(value, type):
            for inner in list(vars(value)):
                yield f"{name}.{inner}", getattr(value, inner, None)


MODULES = "builtins collections ctypes datetime decimal functools math multiprocessing.pool "
MODULES += "operator pathlib re socket string threading types"


@pytest.mark.parametrize("name", MODULES.split())
def test_what_pickle_can_send_of_a_module_arrives(shared: BatchExecutor, name: str) -> None:
    """Methods of built-in types among it, which multiprocessing treats as its own objects."""
    sent = {}
    for each, value in public_names(importlib.import_module(name)):
        try:
            arrived = pickle.loads(pickle.dumps(value))
        except Exception:
            continue
        if arrived is value or arrived == value:
            sent[each] = value
    assert sent
    for each, there in zip(sent, shared.map(whole, sent.values(), chunksize=50), strict=True):
        assert there is sent[each] or there == sent[each], each


def whole(value: Any) -> Any:
    return value


class Text(str):
    """Has methods that are no Python functions."""

    @classmethod
    @functools.lru_cache
    def fetch(cls, text: str) -> Text:
        return cls(text)


def test_methods_with_functions_of_other_kinds_arrive(shared: BatchExecutor) -> None:
    text = Text("a")
    calls: list[tuple[Any, tuple[object, ...], object]] = [
        (Text.fetch, ("b",), "b"),
        (text.upper, (), "A"),
        (text.__add__, ("b",), "ab"),
        ([1, 2, 1].count, (1,), 2),
        (np.array([5, 7]).max, (), 7),
        (str.upper, ("b",), "B"),
    ]
    for method, args, expected in calls:
        assert shared.submit(whole, method).result()(*args) == expected
        assert shared.submit(method, *args).result() == expected


def test_what_was_put_into_an_object_or_a_class_is_what_runs(tmp_path: Path) -> None:
    """Its name would lead to another method on the workers, or to none."""
    (tmp_path / "shapes.py").write_text(
        "class Shape:\n"
        "    def area(self): return 'imported'\n"
        "    @classmethod\n"
        "    def make(cls): return 'imported'\n"
    )
    script = tmp_path / "script.py"
    script.write_text(
        "import functools, types, shapes\n"
        "from cloudexec import BatchExecutor\n"
        "def traced(fn):\n"
        "    @functools.wraps(fn)\n"
        "    def call(self): return 'traced ' + fn(self)\n"
        "    return call\n"
        "def make(cls): return 'made'\n"
        "def own(self): return 'own'\n"
        "class Here:\n"
        "    def area(self): return 'class'\n"
        "if __name__ == '__main__':\n"
        "    one, two, three = shapes.Shape(), shapes.Shape(), Here()\n"
        "    one.area = types.MethodType(own, one)\n"
        "    two.extra = types.MethodType(own, two)\n"
        "    three.area = types.MethodType(own, three)\n"
        "    with BatchExecutor(1) as executor:\n"
        "        for call in (one.area, two.extra, three.area):\n"
        "            print(executor.submit(call).result())\n"
        "        shapes.Shape.area = traced(shapes.Shape.area)\n"
        "        shapes.Shape.make = classmethod(make)\n"
        "        print(executor.submit(shapes.Shape().area).result())\n"
        "        print(executor.submit(shapes.Shape.make).result())\n"
    )
    run = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=60, check=False
    )
    assert run.stderr == ""
    assert run.stdout.split("\n")[:-1] == ["own", "own", "own", "traced imported", "made"]


def test_a_class_method_of_a_module_changes_that_module(tmp_path: Path) -> None:
    """It runs in the module that the process has imported, and not in a copy with its globals."""
    (tmp_path / "counting.py").write_text(
        "COUNT = 0\n"
        "def read(): return COUNT\n"
        "class Counter:\n"
        "    @classmethod\n"
        "    def bump(cls):\n"
        "        global COUNT\n"
        "        COUNT += 1\n"
        "        return cls.__name__, COUNT\n"
    )
    script = tmp_path / "script.py"
    script.write_text(
        "import counting\n"
        "from cloudexec import BatchExecutor\n"
        "if __name__ == '__main__':\n"
        "    with BatchExecutor(1) as executor:\n"
        "        print([executor.submit(counting.Counter.bump).result() for _ in range(2)])\n"
        "        print(executor.submit(counting.read).result(), counting.COUNT)\n"
    )
    run = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=60, check=False
    )
    assert run.stderr == ""
    assert run.stdout == "[('Counter', 1), ('Counter', 2)]\n2 0\n"


# Arrays and buffers.


def arrays() -> list[Any]:
    big = np.arange(300_000, dtype=np.float64)
    matrix = big.reshape(500, 600)
    frozen = big.copy()
    frozen.flags.writeable = False
    frozen_small = np.arange(5)
    frozen_small.flags.writeable = False
    structured = np.zeros(40_000, dtype=[("a", "i4"), ("b", "f8")])
    structured["a"] = np.arange(40_000)
    return [
        pytest.param(big, id="big"),
        pytest.param(np.arange(5), id="small"),
        pytest.param(matrix.T, id="transposed"),
        pytest.param(big[::3], id="strided"),
        pytest.param(np.asfortranarray(matrix), id="fortran"),
        pytest.param(frozen, id="read-only"),
        pytest.param(frozen_small, id="small-read-only"),
        pytest.param(np.array([1, "a", None, [2]], dtype=object), id="object"),
        pytest.param(structured, id="structured"),
        pytest.param(np.broadcast_to(np.arange(10), (10_000, 10)), id="broadcast"),
        pytest.param(np.array(3.5), id="scalar"),
        pytest.param(np.zeros((0, 5)), id="empty"),
        pytest.param(np.array(["a", "bcd"] * 20_000), id="text"),
        pytest.param(np.array(["2026-01-01"] * 20_000, dtype="datetime64[D]"), id="dates"),
    ]


@pytest.mark.parametrize("array", arrays())
def test_array_goes_there_and_back(shared: BatchExecutor, array: Any) -> None:
    """Arrays of every kind keep type, shape and content both ways; results are writeable."""
    back, writeable = shared.submit(lambda a: (a, a.flags.writeable), array).result(30)
    assert back.dtype == array.dtype
    assert back.shape == array.shape
    assert np.array_equal(back, array)
    assert writeable or not array.flags.writeable
    alone = shared.submit(lambda a: a, array).result(30)
    assert np.array_equal(alone, array)
    for result in (back, alone):
        assert result.flags.writeable
        if result.size:
            result.flat[0] = result.flat[-1]


@pytest.mark.parametrize("size", [10, 100_000, 3_000_000])
def test_bytearray_and_bytes_keep_their_types(shared: BatchExecutor, size: int) -> None:
    """A bytearray stays one, and writeable; bytes stay bytes."""
    for value in (bytearray(b"a" * size), b"a" * size, memoryview(b"a" * size).tobytes()):
        result = shared.submit(lambda v: v, value).result(30)
        assert type(result) is type(value)
        assert result == value
        if isinstance(result, bytearray):
            result[0] = 98


def test_frame_goes_there_and_back(shared: BatchExecutor) -> None:
    """A pandas DataFrame arrives, and the result can be changed."""
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"a": range(100_000), "b": ["x"] * 100_000})
    result = shared.submit(lambda f: f, frame).result(30)
    assert result.equals(frame)
    result.loc[0, "a"] = 5


K = 1024
SIZES = sorted(
    {0, 1, 100}
    | {base + delta for base in (16 * K, 64 * K, 1024 * K) for delta in range(-80, 81, 16)}
    | {base + delta for base in (64 * K, 1024 * K, 2048 * K) for delta in (-13, -9, -1, 0, 1, 9)}
    | {128 * K, 256 * K - 64, 256 * K, 256 * K + 64, 512 * K, 3 * 1024 * K + 7, 5 * 1024 * K}
)


def make(kind: str, size: int) -> Any:
    data = (b"0123456789abcdef" * (size // 16 + 1))[:size]
    if kind == "bytes":
        return data
    if kind == "bytearray":
        return bytearray(data)
    if kind == "str":
        return data.decode()
    if kind == "array":
        return np.frombuffer(bytearray(data), dtype=np.uint8)
    return [np.frombuffer(bytearray(data[n::3]), dtype=np.uint8) for n in range(3)]


def same(a: Any, b: Any) -> bool:
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and (
        bool(np.array_equal(a, b)) if isinstance(a, np.ndarray) else bool(a == b)
    )


@pytest.mark.parametrize("kind", ["bytes", "bytearray", "str", "array", "arrays"])
def test_values_of_every_size_go_both_ways(shared: BatchExecutor, kind: str) -> None:
    """Around every limit of the transport, payloads arrive whole in both directions."""
    futures = []
    for size in SIZES:
        value = make(kind, size)
        futures.append(
            (
                size,
                shared.submit(same, value, make(kind, size)),
                shared.submit(make, kind, size),
                shared.submit(lambda v, *, more: (v, more), value, more=size),
            )
        )
        if len(futures) % 8 == 0 or size == SIZES[-1]:
            for n, there, back, both in futures:
                assert there.result(60) is True, n
                assert same(back.result(60), make(kind, n)), n
                echo, more = both.result(60)
                assert same(echo, make(kind, n)), n
                assert more == n
            futures.clear()


def test_hundred_mebibytes_go_both_ways(shared: BatchExecutor) -> None:
    """A payload of 100 MiB arrives as argument and as result, bytes and array alike."""
    data = os.urandom(1024) * (100 * K)
    assert shared.submit(lambda d: (len(d), d[-1024:]), data).result(60) == (100 * K * K, data[:K])
    assert shared.submit(lambda: data[:K] * (100 * K)).result(60) == data
    array = np.frombuffer(data, dtype=np.uint8)
    assert np.array_equal(shared.submit(np.invert, array).result(60), ~array)


# The client's surroundings.


SURROUNDINGS = """
import os, sys
import beside
from cloudexec import BatchExecutor

def look():
    import beside as there
    return os.getcwd(), os.environ.get("MY_SETTING"), sys.argv, there.NAME, sys.path, \
        sys.executable, os.getppid() != 0, sys.flags.optimize

if __name__ == "__main__":
    os.environ["MY_SETTING"] = "42"
    sys.path.append("/my/own/path")
    with BatchExecutor(2) as executor:
        assert executor.submit(look).result() == look()
        assert executor.submit(beside.get).result() == "beside"
        assert list(executor.map(beside.get_all, "ab")) == ["beside a", "beside b"]
    print("same")
"""


def run(command: list[str], cwd: Path, stdin: str | None = None) -> str:
    done = subprocess.run(
        command,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": PACKAGE},
        capture_output=True,
        text=True,
        input=stdin,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


def test_workers_see_the_clients_surroundings(tmp_path: Path) -> None:
    """Working directory, environment, sys.path, sys.argv and modules beside the script."""
    scripts = tmp_path / "scripts"
    elsewhere = tmp_path / "elsewhere"
    scripts.mkdir()
    elsewhere.mkdir()
    (scripts / "main.py").write_text(SURROUNDINGS)
    (scripts / "beside.py").write_text(
        "NAME = 'beside'\ndef get():\n    return NAME\ndef get_all(x):\n    return f'{NAME} {x}'\n"
    )
    script = str(scripts / "main.py")
    assert run([sys.executable, script, "an argument"], elsewhere) == "same\n"
    assert run([sys.executable, "-O", "main.py"], scripts) == "same\n"
    assert run([sys.executable, "-m", "main"], scripts) == "same\n"


MAIN = """
import dataclasses, enum
from cloudexec import BatchExecutor

FACTOR = 3

class Color(enum.Enum):
    RED = 1

@dataclasses.dataclass
class Point:
    x: int
    color: Color = Color.RED
    def scaled(self):
        return Point(self.x * FACTOR, self.color)

class Base:
    def who(self):
        return "base"

class Derived(Base):
    def who(self):
        return "derived of " + super().who()

class Oops(Exception):
    def __init__(self, a, b):
        super().__init__(a, b)
        self.b = b

class Needy(Exception):
    def __init__(self, a, b):
        super().__init__(f"{a} and {b}")

def helper(n):
    return n * FACTOR

def work(n):
    return helper(n) + 1

def fib(n):
    return n if n < 2 else fib(n - 1) + fib(n - 2)

def fail():
    raise Oops(1, 2)

def fail_badly():
    raise Needy(1, 2)

if __name__ == "__main__":
    with BatchExecutor(2) as executor:
        assert list(executor.map(work, range(5))) == [1, 4, 7, 10, 13]
        assert executor.submit(fib, 12).result() == 144
        point = executor.submit(Point(2).scaled).result()
        assert type(point) is Point and point == Point(6) and point.color is Color.RED
        assert executor.submit(Color, 1).result() is Color.RED
        assert executor.submit(lambda: isinstance(Point(1).color, Color)).result()
        derived = executor.submit(Derived).result()
        assert isinstance(derived, Base) and derived.who() == "derived of base"
        error = executor.submit(fail).exception()
        assert type(error) is Oops and error.b == 2, repr(error)
        assert "in fail" in str(error.__cause__)
        error = executor.submit(fail_badly).exception()
        assert "1 and 2" in str(error), repr(error)
        FACTOR = 5
        assert executor.submit(work, 1).result() == 6
        assert executor.submit(len, [1]).result() == 1
    print("all well")
"""


@pytest.mark.parametrize("how", ["script", "-c", "stdin", "module"])
def test_functions_and_classes_of_main_work(tmp_path: Path, how: str) -> None:
    """What __main__ defines runs in workers, however that came to be."""
    (tmp_path / "program.py").write_text(MAIN)
    command = {
        "script": ["program.py"],
        "-c": ["-c", MAIN],
        "stdin": ["-"],
        "module": ["-m", "program"],
    }[how]
    stdin = MAIN if how == "stdin" else None
    assert run([sys.executable, *command], tmp_path, stdin) == "all well\n"


INITIALIZED = """
import sys
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from types import SimpleNamespace
from cloudexec import BatchExecutor

MODEL, CACHE, LOADED, STATE, KNOWN = None, {}, [], SimpleNamespace(ready=False), "as it was"

class Shared:
    model, table = None, {}

    @classmethod
    def prepare(cls, model):
        cls.model = model
        cls.table["model"] = model

    @classmethod
    def both(cls, n):
        return cls.model, cls.table, n

def helper():
    return MODEL, CACHE, LOADED, STATE.ready, KNOWN, Shared.both(0)

class Task:
    def __call__(self, n):
        return helper()

def prepare(model):
    global MODEL, MADE
    MODEL = model
    MADE = "made"
    CACHE["model"] = model
    LOADED.append(model)
    STATE.ready = KNOWN == "as it was"
    Shared.prepare(model)

def use(n):
    return n, MODEL, MADE, CACHE, LOADED, STATE.ready, KNOWN

def apply(fn, *args):
    return fn(*args)

def outcomes(kind, initializer, initargs):
    with kind(1, initializer=initializer, initargs=initargs) as executor:
        return [
            list(executor.map(use, range(3))),
            list(executor.map(use, range(3), chunksize=2)),
            executor.submit(use, 1).result(),
            executor.submit(apply, use, 2).result(),
            executor.submit(partial(apply, use), 3).result(),
            executor.submit(Task(), 4).result(),
            *executor.map(Shared.both, range(2)),
        ]

if __name__ == "__main__":
    for initializer, initargs in ((prepare, (5,)), (partial(prepare, 6), ())):
        found = outcomes(BatchExecutor, initializer, initargs)
        expected = outcomes(ProcessPoolExecutor, initializer, initargs)
        assert found == expected, (found, expected)
    with BatchExecutor(1, initializer=Shared.prepare, initargs=(8,)) as executor:
        assert executor.submit(Shared.both, 1).result() == (8, {"model": 8}, 1)
        assert executor.submit(lambda: lambda n: n + 1).result()(9) == 10
    KNOWN = "changed"
    with BatchExecutor(1, initializer=prepare, initargs=(7,)) as executor:
        assert executor.submit(use, 1).result()[-2:] == (False, "changed")
        KNOWN = "changed again"  # what the initializer left alone is as it is when submitted
        assert executor.submit(use, 1).result()[-2:] == (False, "changed again")
    print("all well")
"""


@pytest.mark.skipif(sys.platform == "darwin", reason="there, a process pool does not fork")
def test_what_an_initializer_of_main_prepares_is_there_for_the_calls(tmp_path: Path) -> None:
    """Globals of a script, as through a process pool: bound anew, or changed in place."""
    (tmp_path / "program.py").write_text(INITIALIZED)
    assert run([sys.executable, "program.py"], tmp_path) == "all well\n"


PREPARED = '''
import functools
import threading
from cloudexec import BatchExecutor

LOCK = TABLE = PROXY = None
KNOWN = "the client's"

class Point:
    shared = cache = None

    def __init__(self, x):
        self.x = x

    def norm(self):
        return TABLE is not None, LOCK is not None, self.x

def known():
    return KNOWN

def announced(fn):
    @functools.wraps(fn)
    def wrapper(*args):
        return fn(*args)
    return wrapper

class Absent:
    """Stands for what is not there yet: whoever looks at it is told so."""

    def __getattribute__(self, name):
        raise RuntimeError("nothing is there yet")

@announced
def prepare():
    global LOCK, TABLE, KNOWN, PROXY
    PROXY = Absent()
    LOCK, TABLE, KNOWN = threading.Lock(), bytearray(30_000_000), "the worker's"
    Point.shared, Point.extra = threading.Lock(), threading.Lock()

def make(x):
    point = Point(x)
    assert point.norm() == (True, True, x) and Point.shared.acquire(False)
    Point.shared.release()
    return point

def pick(_):
    assert known() == "the worker's"
    return known

def assign(value):
    global KNOWN
    KNOWN = value
    return known

if __name__ == "__main__":
    with BatchExecutor(1, initializer=prepare) as executor:
        for x in range(3):
            point = executor.submit(make, x).result()
            assert type(point) is Point and point.norm() == (False, False, x)
            assert Point.shared is None and not hasattr(Point, "extra")
            assert executor.submit(pick, 0).result()() == "the client's"
        assert [point.x for point in executor.map(make, range(3), chunksize=2)] == [0, 1, 2]
        assert executor.submit(assign, "a task's").result()() == "the client's"
        assert executor.stats().bytes_received < 1_000_000
    print("all well")
'''


def test_what_an_initializer_prepares_stays_in_the_worker(tmp_path: Path) -> None:
    """It need not survive pickling, and neither travels with results nor changes the client."""
    (tmp_path / "program.py").write_text(PREPARED)
    assert run([sys.executable, "program.py"], tmp_path) == "all well\n"


def test_script_without_a_main_guard_works(tmp_path: Path) -> None:
    """Workers never run the user's script again, so that nothing needs a guard."""
    (tmp_path / "program.py").write_text(
        "from cloudexec import BatchExecutor\n"
        "print('once')\n"
        "def double(n):\n    return n * 2\n"
        "executor = BatchExecutor(2)\n"
        "print(list(executor.map(double, range(3))))\n"
        "executor.shutdown()\n"
    )
    assert run([sys.executable, "program.py"], tmp_path) == "once\n[0, 2, 4]\n"


@pytest.mark.skipif(
    not (importlib.util.find_spec("nbclient") and importlib.util.find_spec("ipykernel")),
    reason="nbclient and ipykernel are not installed",
)
def test_notebook_works(tmp_path: Path) -> None:
    """Functions defined in the cells of a notebook run, and cells that redefine them count."""
    import nbclient
    import nbformat

    cells = [
        f"import sys; sys.path.insert(0, {PACKAGE!r})\nfrom cloudexec import BatchExecutor\n"
        "executor = BatchExecutor(2)\ndef f(n):\n    return n + K\nK = 1",
        "print(list(executor.map(f, range(3))))",
        "K = 10\nprint(executor.submit(f, 1).result())",
        "def f(n):\n    return -n\nprint(executor.submit(f, 1).result())",
        "executor.shutdown()",
    ]
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    nbclient.NotebookClient(book, timeout=60).execute(cwd=str(tmp_path))
    texts = ["".join(output.get("text", "") for output in cell.outputs) for cell in book.cells]
    assert texts[1:4] == ["[1, 2, 3]\n", "11\n", "-1\n"]
