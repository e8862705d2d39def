"""A script whose tasks report what they see of the script; its argument is the kind of executor.

Each function of ``PROBES`` submits calls and returns their results. The results with
``BatchExecutor`` must be the same as with a process pool.
"""

from __future__ import annotations

import collections
import contextvars
import dataclasses
import enum
import functools
import inspect
import itertools
import json
import multiprocessing
import pickle
import queue
import sqlite3
import sys
import threading
import traceback
import types
import typing
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from decimal import Decimal
from typing import Any, NamedTuple

PROBES: dict[str, Callable[..., Any]] = {}
INITIALIZED: dict[str, tuple[Callable[..., object], tuple[Any, ...]]] = {}


def probe(fn: Callable[..., Any]) -> Callable[..., Any]:
    PROBES[fn.__name__] = fn
    return fn


# Changes that tasks make to the script stay.

count = 0
model: str | None = None
loads: list[str] = []
cache: dict[int, int] = {}


def bump(_: object = None) -> int:
    global count
    count += 1
    return count


def bump_by_name(_: object = None) -> int:
    globals()["count"] += 1
    return count


def load() -> int:
    global model
    if model is None:
        loads.append("loaded")
        model = "model"
    return len(loads)


def remember(n: int) -> list[int]:
    cache[n] = n
    return sorted(cache)


def counted(fn: Callable[..., Any]) -> Callable[..., int]:
    calls = 0

    @functools.wraps(fn)
    def inner(*args: Any) -> int:
        nonlocal calls
        calls += 1
        return calls

    return inner


@counted
def decorated() -> None:
    """Count calls."""


def attribute() -> int:
    attribute.n = getattr(attribute, "n", 0) + 1  # type: ignore[attr-defined]
    return attribute.n  # type: ignore[attr-defined,no-any-return]


class Counter:
    n = 0
    items: typing.ClassVar[list[int]] = []

    @classmethod
    def inc(cls) -> int:
        cls.n += 1
        return cls.n

    @classmethod
    def add(cls) -> int:
        cls.items.append(1)
        return len(cls.items)

    @staticmethod
    def read() -> int:
        return Counter.n

    def method(self) -> int:
        return self.inc()

    class Inner:
        def seven(self) -> int:
            return 7


def times(ex: Executor, fn: Callable[..., Any], *args: Any) -> list[Any]:
    return [ex.submit(fn, *args).result(60) for _ in range(3)]


@probe
def a_global_that_is_rebound(ex: Executor) -> Any:
    return times(ex, bump), list(ex.map(bump, range(2))), times(ex, bump_by_name)


@probe
def a_model_that_is_loaded_when_it_is_needed(ex: Executor) -> Any:
    return times(ex, load)


@probe
def a_dictionary_that_is_filled(ex: Executor) -> Any:
    return [ex.submit(remember, n).result(60) for n in range(3)]


@probe
def the_closure_of_a_decorator(ex: Executor) -> Any:
    return times(ex, decorated), decorated.__doc__


@probe
def attributes_of_a_function(ex: Executor) -> Any:
    return times(ex, attribute)


@probe
def attributes_of_a_class(ex: Executor) -> Any:
    found = [times(ex, Counter.inc), times(ex, Counter.add), ex.submit(Counter.read).result(60)]
    return found, times(ex, Counter().method), ex.submit(Counter.Inner().seven).result(60)


# Tasks that look up names of the script at run time.


@dataclasses.dataclass
class Named:
    x: int
    y: Other | None = None
    z: Decimal = Decimal(1)


class Other:
    pass


def loads_it(data: bytes) -> Any:
    return pickle.loads(data)


def dumps_it() -> bytes:
    return pickle.dumps(Named(1))


def double(x: int) -> int:
    return 2 * x


def nested(method: str) -> list[int]:
    with multiprocessing.get_context(method).Pool(1) as pool:
        return pool.map(double, range(3))


def nested_executor() -> list[int]:
    with ProcessPoolExecutor(1) as ex:
        return list(ex.map(double, range(2)))


def hints() -> list[str]:
    return [str(each) for each in typing.get_type_hints(Named).values()]


def source() -> tuple[str, str]:
    return inspect.getsource(double), inspect.getsource(Other)


def by_its_name(name: str) -> Any:
    return getattr(sys.modules["__main__"], name)(4)


def evaluated() -> int:
    return eval("double(4)")  # type: ignore[no-any-return]


def where() -> tuple[Any, ...]:
    return __name__ in ("__main__", "__mp_main__"), __file__, double.__module__ == __name__


def imports_main() -> int:
    import __main__

    return __main__.double(5)  # type: ignore[no-any-return]


@probe
def pickles_of_a_class(ex: Executor) -> Any:
    there = ex.submit(loads_it, pickle.dumps(Named(3))).result(60)
    return there.x, type(there) is Named, pickle.loads(ex.submit(dumps_it).result(60)).x


@probe
def pools_in_tasks(ex: Executor) -> Any:
    return [ex.submit(nested, method).result(60) for method in ("fork", "spawn")]


@probe
def an_executor_in_a_task(ex: Executor) -> Any:
    return ex.submit(nested_executor).result(60)


@probe
def annotations_that_are_strings(ex: Executor) -> Any:
    # The script has another name in a spawned process.
    return [each.replace("__mp_main__", "__main__") for each in ex.submit(hints).result(60)]


@probe
def its_source(ex: Executor) -> Any:
    return ex.submit(source).result(60)


@probe
def its_own_name(ex: Executor) -> Any:
    return ex.submit(where).result(60)


@probe
def functions_by_their_name(ex: Executor) -> Any:
    found = [ex.submit(each).result(60) for each in (evaluated, imports_main)]
    return found, ex.submit(by_its_name, "double").result(60)


# Globals that refer to one another.

config = {"a": 1}
pair = (config, [config])
same = config


class Base:
    config = config
    registry: typing.ClassVar[dict[str, type]] = {}

    def __init_subclass__(cls) -> None:
        Base.registry[cls.__name__] = cls


class First(Base):
    pass


class Node:
    other: Node | None = None


left, right = Node(), Node()
left.other, right.other = right, left
handlers = {"double": double, "named": Named}


def shared() -> tuple[Any, ...]:
    config["b"] = 2
    return (
        Base.config is config,
        First.config["b"],
        pair[0] is config,
        pair[1][0] is config,
        same is config,
        Base.registry["First"] is First,
        handlers["double"] is double,
        handlers["named"] is Named,
    )


def circle() -> tuple[Any, ...]:
    return left.other is right, right.other is left, type(left) is Node


def factorial(n: int) -> int:
    return 1 if n < 2 else n * factorial(n - 1)


@probe
def what_is_one_object_stays_one(ex: Executor) -> Any:
    return ex.submit(shared).result(60), ex.submit(circle).result(60)


@probe
def functions_that_call_each_other(ex: Executor) -> Any:
    return ex.submit(factorial, 10).result(60), ex.submit(handlers["double"], 2).result(60)


# Classes whose definition has effects, which must not happen again in the worker.


class Registry:
    known: typing.ClassVar[dict[str, type]] = {}
    made = 0

    def __init_subclass__(cls, *, key: str) -> None:
        Registry.known[key] = cls
        Registry.made += 1


class Listed(Registry, key="listed"):
    pass


class Also(Listed, key="also"):
    pass


class Meta(type):
    classes: typing.ClassVar[dict[str, type]] = {}
    calls = 0

    def __new__(
        cls, name: str, bases: tuple[type, ...], content: dict[str, Any], *, option: int
    ) -> Meta:
        made = super().__new__(cls, name, bases, content)
        made.option = option  # type: ignore[attr-defined]
        Meta.classes[name] = made
        return made

    def __init__(
        cls, name: str, bases: tuple[type, ...], content: dict[str, Any], *, option: int
    ) -> None:
        super().__init__(name, bases, content)
        Meta.calls += 1


class AMade(metaclass=Meta, option=3):
    pass


class Generics(typing.Generic[typing.TypeVar("T")], AMade, option=4):  # type: ignore[misc]
    pass


class Checks:
    checks: typing.ClassVar[list[Callable[..., Any]]] = []

    @classmethod
    def check(cls) -> str:
        return cls.__name__


Checks.checks.append(Checks.check)


class Counts:
    def __init__(self, fn: Callable[[int], int]) -> None:
        self.fn, self.n = fn, 0
        functools.update_wrapper(self, fn)

    def __call__(self, x: int) -> tuple[int, int]:
        self.n += 1
        return self.n, self.fn(x)


@Counts
def counting(x: int) -> int:
    return x


class Proxy:
    def __init__(self, target: Any) -> None:
        self._target = target

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._target, name)

    @property
    def __class__(self) -> Any:
        return type(self._target)


@functools.lru_cache
class Cached:
    pass


proxy = Proxy(collections.Counter(a=3))
bound = functools.partial(counting, 7)
Number = typing.NewType("Number", int)
Parameters = typing.ParamSpec("Parameters")


class Sentinel:
    def __init__(self, name: str) -> None:
        self.name = name

    def __reduce__(self) -> str:
        return self.name


MISSING = Sentinel("MISSING")


def __getattr__(name: str) -> Any:
    if name == "computed":
        return 42
    raise AttributeError(name)


def registered() -> tuple[Any, ...]:
    known = Registry.known["listed"] is Listed, Registry.known["also"] is Also, Registry.made
    made = Meta.classes["AMade"] is AMade, Meta.calls, AMade.option, Generics.option  # type: ignore[attr-defined]
    return known, made


def found_by_name(missing: Any) -> tuple[Any, ...]:
    return (
        Checks.checks[0](),
        (counting(1), bound(), counting(2)),
        (Number(3), Number.__name__, Parameters.__name__),
        (isinstance(proxy, collections.Counter), proxy.most_common(), Cached() is Cached()),
        (missing is MISSING, MISSING.name, sys.modules["__main__"].computed),
    )


def returns_missing() -> Any:
    return MISSING, Number


@probe
def classes_that_were_registered(ex: Executor) -> Any:
    return times(ex, registered)


@probe
def what_says_its_name(ex: Executor) -> Any:
    missing, number = ex.submit(returns_missing).result(60)
    return times(ex, found_by_name, MISSING), missing is MISSING, number is Number


# Objects that are sent to a worker and returned.


class Point:
    __slots__ = ("_y", "x")

    def __init__(self, x: int, y: int) -> None:
        self.x, self._y = x, y

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Point) and (self.x, self._y) == (other.x, other._y)

    __hash__ = None  # type: ignore[assignment]


class OneSlot:
    __slots__ = "x"


class Private:
    __slots__ = ("__hidden", "__weakref__")

    def __init__(self) -> None:
        self.__hidden = 3

    def hidden(self) -> int:
        return self.__hidden


class Derived(Point):
    __slots__ = ("z",)


class WithDict(Point):
    pass


@dataclasses.dataclass(slots=True, frozen=True)
class Frozen:
    loss: float


@dataclasses.dataclass(slots=True)
class Slotted:
    loss: float
    rest: list[int] = dataclasses.field(default_factory=list)


class Color(enum.Enum):
    RED = 1


class Flags(enum.IntFlag):
    A = 1
    B = 2


class Planet(enum.Enum):
    EARTH = (3, 4)
    WORLD = (3, 4)

    def __init__(self, mass: int, radius: int) -> None:
        self.mass, self.radius = mass, radius


class Base16(bytes, enum.Enum):
    label: str

    def __new__(cls, value: int, label: str) -> Base16:
        made = bytes.__new__(cls, [value])
        made._value_, made.label = value, label
        return made

    X = (16, "x")


class Labelled(enum.Enum):
    def __init__(self, text: str, size: int) -> None:
        self.text = text * size


class Labels(Labelled):
    A = ("a", 2)


class Perhaps(enum.Flag):
    A = 1
    B = 2
    BOTH = 3


class Triple(NamedTuple):
    a: int
    b: int = 2


Old = collections.namedtuple("Old", "a b")


class Lazy:
    @functools.cached_property
    def value(self) -> int:
        return 9


class Failure(Exception):
    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


def values() -> list[Any]:
    slot = OneSlot()
    slot.x = 1  # type: ignore[attr-defined]
    derived, free = Derived(1, 2), WithDict(1, 2)
    derived.z, free.w = 3, 4  # type: ignore[attr-defined]
    return [
        Point(1, 2),
        slot,
        derived,
        free,
        Frozen(1.5),
        Slotted(2.5),
        Color.RED,
        Flags.A | Flags.B,
        Triple(1),
        Old(1, 2),
        Private(),
    ]


def back(value: Any) -> Any:
    return value


def fails() -> None:
    raise Failure(7)


def is_red(color: Any) -> bool:
    return color is Color.RED


def members() -> tuple[Any, ...]:
    planet = Planet["WORLD"] is Planet.EARTH, Planet.EARTH.mass, list(Planet.__members__)
    base = bytes(Base16.X), Base16(16).label, Base16.X.value
    return planet, base, Labels.A.text, Labels(("a", 2)).name, Perhaps["BOTH"].value


def lazy(obj: Lazy) -> int:
    return obj.value


def returns_code() -> tuple[Any, ...]:
    return Point, double, Color.RED, Counter.inc


@probe
def instances_of_its_classes(ex: Executor) -> Any:
    got = ex.submit(values).result(60)
    again = [ex.submit(back, value).result(60) for value in got]
    return [
        [type(one) is type(two) is type(three), *_state(two), *_state(three)]
        for one, two, three in zip(values(), got, again, strict=True)
    ]


def _state(value: Any) -> list[Any]:
    if isinstance(value, Private):
        return [value.hidden()]
    names = ("x", "_y", "z", "w", "loss", "rest", "value", "a", "b")
    return [repr(getattr(value, name)) for name in names if hasattr(value, name)]


@probe
def members_of_an_enum(ex: Executor) -> Any:
    there = ex.submit(is_red, Color.RED).result(60), ex.submit(members).result(60)
    return there, ex.submit(back, Color.RED).result() is Color.RED


@probe
def cached_properties(ex: Executor) -> Any:
    return ex.submit(lazy, Lazy()).result(60)


@probe
def its_code_as_a_result(ex: Executor) -> Any:
    point, fn, red, method = ex.submit(returns_code).result(60)
    return point is Point, fn is double, red is Color.RED, method == Counter.inc


@probe
def its_exceptions(ex: Executor) -> Any:
    error = ex.submit(fails).exception(60)
    assert isinstance(error, Failure)
    text = str(error.__cause__)
    return error.code, __file__ in text, "raise Failure(7)" in text


# Globals that cannot be sent.

lock, rlock, event = threading.Lock(), threading.RLock(), threading.Event()
condition, semaphore = threading.Condition(), threading.BoundedSemaphore(2)
barrier = threading.Barrier(1)
local = threading.local()
context: contextvars.ContextVar[int] = contextvars.ContextVar("context", default=3)
tasks: queue.Queue[int] = queue.Queue()
simple: queue.SimpleQueue[int] = queue.SimpleQueue()
threads = ThreadPoolExecutor(2)
reference = weakref.ref(double)
weak: weakref.WeakValueDictionary[str, Any] = weakref.WeakValueDictionary(point=Point)
database = sqlite3.connect(":memory:", check_same_thread=False)
numbers = itertools.count()
generator: Iterator[int] = (n for n in range(9))
this_file = open(__file__)  # noqa: SIM115
view = memoryview(b"abc")


class Store:
    def __init__(self) -> None:
        self.database = sqlite3.connect(":memory:", check_same_thread=False)
        self.lines: list[Any] = [Other()]

    def read(self) -> tuple[Any, int]:
        return self.database.execute("select 1").fetchone(), bump()


stores = {"one": Store()}
event.set()


@functools.lru_cache
def table(n: int) -> int:
    return n + 1


@functools.cache
def fibonacci(n: int) -> int:
    return n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2)


@functools.singledispatch
def show(value: object) -> str:
    return "object"


@show.register
def _(value: int) -> str:
    return "int"


@show.register(list)
def _(value: list[Any]) -> str:
    return "list"


class Shown:
    @functools.singledispatchmethod
    def show(self, value: object) -> str:
        return "object"

    @show.register
    def _(self, value: int) -> str:
        return "int"


def caches() -> tuple[Any, ...]:
    return table(1), table(1), table.cache_info().hits, fibonacci(50)


def dispatched() -> tuple[Any, ...]:
    return show(1), show([]), show(""), Shown().show(1), Shown().show("")


def synchronized() -> tuple[Any, ...]:
    with lock, rlock, condition, semaphore:
        local.x = 4
        barrier.wait()
        return local.x + context.get(), event.is_set()


def queues() -> tuple[Any, ...]:
    tasks.put(1)
    simple.put(2)
    return tasks.get(), simple.get(), threads.submit(double, 4).result(10)


def references() -> tuple[Any, ...]:
    return reference() is double, weak["point"] is Point


def opened() -> tuple[Any, ...]:
    row = database.execute("select 1").fetchone()
    store = stores["one"]
    before = count
    read, after = store.read()
    mine = isinstance(store, Store), isinstance(store.lines[0], Other), after - before
    return row, next(generator), this_file.readline() != "", bytes(view), read, mine


@probe
def caches_and_dispatchers(ex: Executor) -> Any:
    return ex.submit(caches).result(60), ex.submit(dispatched).result(60)


@probe
def caches_as_the_callable(ex: Executor) -> Any:
    return ex.submit(fibonacci, 30).result(60), list(ex.map(table, range(3)))


@probe
def locks_and_the_like(ex: Executor) -> Any:
    return ex.submit(synchronized).result(60), ex.submit(queues).result(60)


@probe
def weak_references(ex: Executor) -> Any:
    return ex.submit(references).result(60)


@probe
def what_only_the_script_can_make(ex: Executor) -> Any:
    return ex.submit(opened).result(60)


# Initializers.

prepared: dict[str, Any] = {}
seen = 0


def prepare(value: int) -> None:
    global seen, made
    seen = value
    made = "made"
    prepared["value"] = value
    Counter.n = 1000
    globals()["by_name"] = value


def read_prepared() -> tuple[Any, ...]:
    global seen
    seen += 1
    return seen, made, prepared, Counter.n, by_name  # type: ignore[name-defined] # noqa: F821


@probe
def what_an_initializer_leaves(ex: Executor) -> Any:
    return times(ex, read_prepared), ex.submit(Counter.inc).result(60)


INITIALIZED["what_an_initializer_leaves"] = prepare, (100,)


def new_executor(
    kind: str, initializer: Callable[..., object] | None = None, initargs: tuple[Any, ...] = ()
) -> Executor:
    if kind == "cloudexec":
        from cloudexec import BatchExecutor

        return BatchExecutor(1, initializer=initializer, initargs=initargs)
    context = multiprocessing.get_context(kind)
    return ProcessPoolExecutor(1, context, initializer, initargs)


def outcome(fn: Callable[..., Any], ex: Executor) -> str:
    try:
        return repr(fn(ex))
    except BaseException as exc:
        return "".join(traceback.format_exception(exc))


def main(kind: str) -> None:
    found: dict[str, str] = {}
    with new_executor(kind) as ex:
        for name, fn in PROBES.items():
            if name not in INITIALIZED:
                found[name] = outcome(fn, ex)
    for name, (initializer, initargs) in INITIALIZED.items():
        with new_executor(kind, initializer, initargs) as ex:
            found[name] = outcome(PROBES[name], ex)
    print(json.dumps(found))


if __name__ == "__main__":
    assert isinstance(types, types.ModuleType)
    main(sys.argv[1])
