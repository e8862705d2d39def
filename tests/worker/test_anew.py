"""What cannot be sent is made anew in another process, by ``reduce_anew``."""

import asyncio
import concurrent.futures
import contextvars
import ctypes
import fnmatch
import functools
import gc
import importlib.util
import io
import json
import logging
import logging.handlers
import multiprocessing.pool
import os
import pickle
import pkgutil
import queue
import random
import secrets
import struct
import subprocess
import sys
import tempfile
import threading
import types
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cloudpickle
import numpy
import pytest
import six.moves

from cloudexec import _anew

_SERVE = """
import pickle, sys
while True:
    data = pickle.load(sys.stdin.buffer)
    try:
        check, loaded = pickle.loads(data)
        found = check(loaded)
    except BaseException as exc:
        found = repr(exc)
    pickle.dump(found, sys.stdout.buffer)
    sys.stdout.buffer.flush()
"""


class Pickler(cloudpickle.Pickler):
    def reducer_override(self, obj: Any) -> Any:
        reduced = _anew.reduce_anew(obj)
        return super().reducer_override(obj) if reduced is None else reduced


def dumps(obj: Any) -> bytes:
    with io.BytesIO() as file:
        Pickler(file, protocol=5).dump(obj)
        return file.getvalue()


@pytest.fixture(scope="module", autouse=True)
def by_value() -> Iterator[None]:
    """As the functions and classes of a script, those of this module travel by value."""
    module = sys.modules[__name__]
    cloudpickle.register_pickle_by_value(module)
    yield
    cloudpickle.unregister_pickle_by_value(module)


@pytest.fixture(scope="module")
def other() -> Iterator["subprocess.Popen[bytes]"]:
    """A new process that checks what it unpickles."""
    command = [sys.executable, "-c", _SERVE]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        yield process
        process.kill()


Sees = Callable[[Any, Callable[[Any], Any]], Any]


@pytest.fixture
def sees(other: "subprocess.Popen[bytes]") -> Sees:
    """What a check finds in the copy of an object: the same here and in another process."""

    def sees(obj: Any, check: Callable[[Any], Any]) -> Any:
        data = dumps((check, obj))
        here, copy = pickle.loads(data)
        found = here(copy)
        assert other.stdin
        assert other.stdout
        pickle.dump(data, other.stdin)
        other.stdin.flush()
        assert pickle.load(other.stdout) == found
        return found

    return sees


@functools.cache
def fibonacci(n: int) -> int:
    """Add the two before."""
    return n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2)


class Shape: ...


class Square(Shape): ...


@functools.singledispatch
def describe(value: Any) -> str:
    """Describe a value."""
    return "any"


describe.register(Shape, lambda _: "shape")


@describe.register
def _describe_numbers(value: int | float) -> str:
    return "number"


class Counted:
    def __init__(self) -> None:
        self.computed = 0

    @functools.cached_property
    def value(self) -> int:
        self.computed += 1
        return self.computed

    @functools.lru_cache(maxsize=7)  # noqa: B019
    def cached(self, n: int) -> int:
        self.computed += 1
        return n

    @functools.singledispatchmethod
    def kind(self, value: Any) -> str:
        return "any"

    @kind.register
    def _(self, value: str) -> str:
        return "text"

    def add(self, a: int, b: int) -> int:
        return a + b

    increment = functools.partialmethod(add, 1)


class Named(threading.local):
    def __init__(self, name: str, *, size: int) -> None:
        self.name = name
        self.size = size


class Jobs(queue.Queue):  # type: ignore[type-arg]
    def __init__(self, label: str) -> None:
        super().__init__(5)
        self.label = label


class TracedLock:
    """Of the user's own, with a way of its own."""

    def __reduce__(self) -> Any:
        return str, ("own way",)


class OwnWayLocal(threading.local):
    def __reduce__(self) -> Any:
        return str, ("own way",)


def test_what_can_be_sent_is_left_alone() -> None:
    for obj in (1, "a", [1], Shape(), Shape, len, test_what_can_be_sent_is_left_alone, json):
        assert _anew.reduce_anew(obj) is None
    for obj in (numpy.arange(3), functools.partial(len, ()), OwnWayLocal(), TracedLock()):
        assert _anew.reduce_anew(obj) is None
    assert _anew.reduce_anew(json.dumps) is None


def test_cache_comes_empty_with_its_parameters_and_attributes(sees: Sees) -> None:
    fibonacci(20)

    def check(fn: Any) -> Any:
        before = fn.cache_info().currsize
        return before, fn(10), fn.cache_parameters(), fn.__name__, fn.__doc__, fn.note

    fibonacci.note = ["mine"]  # type: ignore[attr-defined]
    found = sees(fibonacci, check)
    assert found[0] == 0
    assert found[1:] == (
        55,
        {"maxsize": None, "typed": False},
        "fibonacci",
        "Add the two before.",
        ["mine"],
    )


def test_cache_in_a_closure_refers_to_itself(sees: Sees) -> None:
    @functools.lru_cache(maxsize=3, typed=True)
    def countdown(n: int) -> list[int]:
        return [n, *countdown(n - 1)] if n else []

    def check(fn: Any) -> Any:
        return fn(3), fn.cache_parameters(), fn.__wrapped__.__closure__[0].cell_contents is fn

    assert sees(countdown, check) == ([3, 2, 1], {"maxsize": 3, "typed": True}, True)


def test_cache_of_an_importable_module_travels_by_name() -> None:
    cached = fnmatch._compile_pattern  # type: ignore[attr-defined]
    assert cached.cache_info()
    assert _anew.reduce_anew(cached) is None
    assert pickle.loads(dumps(cached)) is cached


def test_class_keeps_its_cached_and_dispatching_methods(sees: Sees) -> None:
    def check(cls: Any) -> Any:
        one = cls()
        return (
            (one.value, one.value),
            (one.cached(3), one.cached(3), one.computed),
            cls.cached.cache_parameters()["maxsize"],
            (one.kind("a"), one.kind(1)),
            one.increment(5),
        )

    assert sees(Counted, check) == ((1, 1), (3, 3, 2), 7, ("text", "any"), 6)


def test_dispatcher_comes_with_all_registrations_in_order(sees: Sees) -> None:
    def check(fn: Any) -> Any:
        fn.registry  # noqa: B018
        names = [cls.__name__ for cls in fn.registry]
        return names, fn(1), fn(2.0), fn(None), fn.__doc__, fn.__name__

    names = ["object", "Shape", "int", "float"]
    assert sees(describe, check) == (
        names,
        "number",
        "number",
        "any",
        "Describe a value.",
        "describe",
    )

    def check_subclass(pair: Any) -> Any:
        fn, cls = pair
        return fn(cls())

    assert sees((describe, Square), check_subclass) == "shape"


def test_dispatcher_whose_implementation_calls_it(sees: Sees) -> None:
    @functools.singledispatch
    def total(value: Any) -> int:
        return int(value)

    @total.register(list)
    def _(value: list[Any]) -> int:
        return sum(map(total, value))

    assert sees(total, lambda fn: fn([1, [2, 3], "4"])) == 10


def test_what_is_registered_with_a_dispatcher_of_a_library_arrives(sees: Sees) -> None:
    dispatcher: Any = pkgutil.iter_importer_modules
    assert _anew.reduce_anew(dispatcher) is None
    dispatcher.register(Shape, lambda _: "mine")
    assert pickle.loads(dumps(dispatcher)) is dispatcher
    found = sees((dispatcher, Square), lambda pair: (pair[0](pair[1]()), pair[0].__module__))
    assert found == ("mine", "pkgutil")


def test_key_of_a_comparison(sees: Sees) -> None:
    key = functools.cmp_to_key(lambda a, b: b - a)
    assert sees(key, lambda key: sorted([1, 3, 2], key=key)) == [3, 2, 1]


@pytest.mark.parametrize("make", [threading.Lock, threading.RLock, threading._PyRLock])  # type: ignore[attr-defined]
def test_held_lock_comes_free(sees: Sees, make: Any) -> None:
    lock = make()
    with lock:
        found = sees(lock, lambda lock: (lock.acquire(blocking=False), type(lock).__name__))
    assert found[0]
    assert found[1] in ("lock", "RLock", "_RLock")


def test_shared_lock_stays_shared(sees: Sees) -> None:
    lock = threading.Lock()
    pair = [lock, threading.Condition(lock), {"lock": lock}]
    assert sees(pair, lambda found: found[1]._lock is found[0] is found[2]["lock"])


def test_condition_has_no_waiters(sees: Sees) -> None:
    condition = threading.Condition()
    waits = threading.Event()

    def wait() -> None:
        with condition:
            waits.set()
            condition.wait()

    thread = threading.Thread(target=wait)
    thread.start()
    waits.wait()
    with condition:
        pass  # it waits by now

    def check(condition: Any) -> Any:
        with condition:
            condition.notify_all()
            return len(condition._waiters), condition.wait(timeout=0)

    try:
        assert sees(condition, check) == (0, False)
    finally:
        with condition:
            condition.notify_all()
        thread.join()


def test_events_semaphores_and_barriers(sees: Sees) -> None:
    is_set, is_not = threading.Event(), threading.Event()
    is_set.set()
    assert sees([is_set, is_not], lambda found: [each.is_set() for each in found]) == [True, False]

    def count(semaphore: Any) -> int:
        taken = 0
        while semaphore.acquire(blocking=False):
            taken += 1
        return taken

    semaphore, bounded = threading.Semaphore(3), threading.BoundedSemaphore(2)
    semaphore.acquire()
    bounded.acquire()
    assert sees(semaphore, count) == 2
    assert sees(bounded, count) == 2, "nobody there holds it"

    barrier = threading.Barrier(1, action=lambda: None, timeout=7)

    def pass_it(barrier: Any) -> Any:
        return barrier.wait(), barrier.parties, barrier._timeout, barrier.broken

    assert sees(barrier, pass_it) == (0, 1, 7, False)


def test_local_has_what_this_thread_has_set_and_can_be_pickled(sees: Sees) -> None:
    plain, named = threading.local(), Named("n", size=2)
    plain.value, plain.lock = 1, threading.Lock()
    named.name = "changed"
    assert sees(plain, lambda local: (local.value, hasattr(local, "lock"))) == (1, False)
    assert sees(named, lambda local: (local.name, local.size)) == ("changed", 2)


def test_thread_that_has_not_started_can_start(sees: Sees) -> None:
    found = "f"
    thread = threading.Thread(
        target=lambda a, b: found * a * b, args=(2,), kwargs={"b": 3}, name="t"
    )
    timer = threading.Timer(0.0, lambda: None)

    def check(threads: Any) -> Any:
        for thread in threads:
            thread.start()
            thread.join()
        return threads[0].name, threads[0].daemon, threads[1].finished.is_set()

    assert sees([thread, timer], check) == ("t", False, True)
    assert sees(threading.main_thread(), lambda main: main.is_alive())
    assert pickle.loads(dumps(threading.main_thread())) is threading.main_thread()


def test_copy_of_a_running_thread_does_not_run() -> None:
    """Since Python 3.13 it cannot be pickled as it is; before, it was a copy that never ran."""
    end = threading.Event()
    thread = threading.Thread(target=end.wait, name="own")
    thread.start()
    try:
        reduced = _anew.reduce_anew(thread)
        if sys.version_info < (3, 13):
            assert reduced is None
        else:
            copy = pickle.loads(dumps(thread))
            assert (copy.name, copy.is_alive()) == ("own", False)
    finally:
        end.set()
        thread.join()


@pytest.mark.parametrize("module", [queue, asyncio])
@pytest.mark.parametrize("name", ["Queue", "LifoQueue", "PriorityQueue"])
def test_queue_comes_with_its_items(sees: Sees, module: Any, name: str) -> None:
    made = getattr(module, name)(maxsize=4)
    for item in (3, 1, 2):
        made.put_nowait(item)

    def check(queue: Any) -> Any:
        found = [queue.get_nowait() for _ in range(3)]
        for _ in found:
            queue.task_done()
        return found, queue.empty(), queue.maxsize

    order = {"Queue": [3, 1, 2], "LifoQueue": [2, 1, 3], "PriorityQueue": [1, 2, 3]}[name]
    assert sees(made, check) == (order, True, 4)
    assert made.qsize() == 3


def test_queue_of_a_class_of_the_users_keeps_its_attributes(sees: Sees) -> None:
    jobs = Jobs("mine")
    jobs.put(1)
    assert sees(jobs, lambda jobs: (jobs.label, jobs.maxsize, jobs.get())) == ("mine", 5, 1)


def test_simple_queue_comes_with_the_items_not_taken_yet(sees: Sees) -> None:
    simple: Any = queue.SimpleQueue()
    assert sees(simple, lambda found: found.qsize()) == 0
    for item in ([0], [1], [2]):
        simple.put(item)
    simple.get()
    assert sees(simple, lambda found: [found.get() for _ in range(found.qsize())]) == [[1], [2]]
    assert simple.qsize() == 2


def test_asyncio_primitives_belong_to_no_loop(sees: Sees) -> None:
    lock, event, semaphore = asyncio.Lock(), asyncio.Event(), asyncio.Semaphore(2)
    condition = asyncio.Condition()

    async def contend() -> None:
        await lock.acquire()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0):
                await lock.acquire()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0):
                await event.wait()

    asyncio.run(contend())
    event.set()

    def check(found: Any) -> Any:
        import asyncio

        async def use() -> Any:
            lock, event, semaphore, condition = found
            async with lock, semaphore, condition:
                await event.wait()
                return lock.locked(), semaphore._value

        return asyncio.run(use())

    assert sees((lock, event, semaphore, condition), check) == (True, 1)


def test_thread_pools_come_without_threads(sees: Sees) -> None:
    pool = concurrent.futures.ThreadPoolExecutor(2, "mine", initializer=print, initargs=("",))
    pool.submit(int).result()

    def check(pool: Any) -> Any:
        before = len(pool._threads)
        name = pool.submit(lambda: __import__("threading").current_thread().name).result()
        pool.shutdown()
        return before, pool._max_workers, name

    pool = concurrent.futures.ThreadPoolExecutor(2, "mine", initializer=str, initargs=("",))
    with pool:
        pool.submit(int).result()
        assert sees(pool, check) == (0, 2, "mine_0")

    def refuses(pool: Any) -> str:
        try:
            pool.submit(int)
        except RuntimeError as exc:
            return str(exc)
        return "accepted"

    assert sees(pool, refuses) == "cannot schedule new futures after shutdown"


def test_pool_of_threads_and_of_processes(sees: Sees) -> None:
    def check(pool: Any) -> Any:
        with pool:
            return pool.map(abs, [-1, -2]), pool._processes

    with multiprocessing.pool.ThreadPool(1) as pool:
        assert sees(pool, check) == ([1, 2], 1)
    processes = concurrent.futures.ProcessPoolExecutor(3, initializer=int, max_tasks_per_child=4)
    with processes:
        found = sees(
            processes,
            lambda pool: (pool._max_workers, pool._max_tasks_per_child, pool._initializer),
        )
    assert found == (3, 4, int)


def test_context_variable_has_its_default_and_its_value(sees: Sees) -> None:
    def check(variables: Any) -> Any:
        return [(each.name, each.get("unset")) for each in variables]

    def run() -> Any:
        plain: Any = contextvars.ContextVar("plain")
        default: Any = contextvars.ContextVar("default", default=(1,))
        changed: Any = contextvars.ContextVar("changed", default=None)
        changed.set(3)
        own: Any = contextvars.ContextVar("own")
        own.set(own.name)
        found = sees([plain, default, changed, own], check)
        assert found == [("plain", "unset"), ("default", "unset"), ("changed", 3), ("own", "own")]
        return sees(default, lambda variable: variable.get())

    assert contextvars.copy_context().run(run) == (1,)


def test_weak_references_refer_to_the_copy(sees: Sees) -> None:
    def refer() -> list[Any]:
        target = Counted()
        method = weakref.WeakMethod(target.add)
        return [target, weakref.ref(target), method, weakref.proxy(target)]

    def check(found: Any) -> Any:
        target, reference, method, proxy = found
        return reference() is target, method()(1, 2), proxy.computed

    assert sees(refer(), check) == (True, 3, 0)
    target, *references = refer()
    assert sees(references, lambda found: (found[0]() is None, found[1]()(1, 2))) == (False, 3)
    assert target.computed == 0

    dead = [weakref.ref(Shape()), weakref.WeakMethod(Counted().add), weakref.proxy(Shape())]
    gc.collect()

    def is_dead(found: Any) -> Any:
        try:
            found[2].anything  # noqa: B018
        except ReferenceError:
            return found[0](), found[1]()

    assert sees(dead, is_dead) == (None, None)


def test_weak_containers_come_with_what_lives(sees: Sees) -> None:
    keys: Any = weakref.WeakKeyDictionary({Shape: "shape", Square: "square"})
    values: Any = weakref.WeakValueDictionary({"a": Shape, "b": Shape()})
    members: Any = weakref.WeakSet([Shape, Square])
    gc.collect()
    assert sees(keys, lambda found: sorted(found.values())) == ["shape", "square"]
    assert sees(values, lambda found: [name for name, each in found.items() if each]) == ["a"]
    assert sees(members, len) == 2


def test_finalizer_has_nothing_to_do(sees: Sees, tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory(dir=tmp_path) as name:
        directory = tempfile.TemporaryDirectory(dir=name)
        found = sees(directory, lambda found: (found.name, found._finalizer.alive))
        gc.collect()
        assert found == (directory.name, False)
        assert Path(directory.name).exists()
        directory.cleanup()


def test_library_is_loaded_again_with_what_was_told_about_its_functions(sees: Sees) -> None:
    library = ctypes.CDLL("libm.so.6", use_errno=True)
    library.cos.argtypes = [ctypes.c_double]
    library.cos.restype = ctypes.c_double
    cos, again = library.cos, library["cos"]
    again.restype = ctypes.c_double

    def check(found: Any) -> Any:
        library, cos, again = found
        flags = library._FuncPtr._flags_
        return library.cos(0.0), cos(0.0), cos is library.cos, again.argtypes, flags

    flags = library._FuncPtr._flags_  # type: ignore[attr-defined]
    assert sees((library, cos, again), check) == (1.0, 1.0, True, None, flags)
    assert sees(cos, lambda cos: cos(0.0)) == 1.0


def test_interpreter_as_a_library_and_callbacks(sees: Sees) -> None:
    assert pickle.loads(dumps(ctypes.pythonapi)) is ctypes.pythonapi
    version = ctypes.pythonapi.Py_GetVersion
    assert pickle.loads(dumps(version)) is version
    compare_type = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int)
    assert sees((compare_type, compare_type(lambda n: n + 1)), lambda found: found[1](2)) == 3
    assert pickle.loads(dumps(compare_type)) is compare_type
    quick_sort = ctypes.CDLL(None).qsort
    quick_sort.restype = None
    assert sees(quick_sort, lambda found: found.restype) is None


class Point(ctypes.Structure):
    _fields_ = [
        ("x", ctypes.c_byte),
        ("y", ctypes.c_double),
        ("low", ctypes.c_uint, 3),
        ("high", ctypes.c_uint, 5),
        ("many", ctypes.c_short * 3),
    ]


class Packed(ctypes.Structure):
    _pack_ = 1
    _layout_ = "ms"  # the only one for packed structures, says Python 3.14
    _fields_ = [("x", ctypes.c_byte), ("y", ctypes.c_double)]


class Link(ctypes.Structure): ...


Link._fields_ = [("point", Point), ("next", ctypes.POINTER(Link))]


def test_types_of_ctypes_and_structures_of_the_script(sees: Sees) -> None:
    for type_ in (ctypes.c_int * 3, ctypes.POINTER(ctypes.c_double), (ctypes.c_char * 2) * 3):
        assert pickle.loads(dumps(type_)) is type_
        assert sees(type_, lambda found: found.__name__) == type_.__name__

    def check(found: Any) -> Any:
        import ctypes

        point, packed, link = found
        one = point(1, 2.5, 3, 4, (5, 6, 7))
        one.high = 31
        chain = link(one, ctypes.pointer(link(point(9))))
        values = one.x, one.y, one.low, one.high, list(one.many), chain.next[0].point.x
        sizes = [ctypes.sizeof(each) for each in found]
        return values, packed(1, 0.5).y, sizes, bytes(one)

    class Either(ctypes.Union):
        _fields_ = [("whole", ctypes.c_uint32), ("bytes", ctypes.c_uint8 * 4)]

    assert sees(Either, lambda found: found(whole=0x01010101).bytes[2]) == 1
    kinds = Point, Packed, Link
    expected = check(kinds)
    assert expected[0] == (1, 2.5, 3, 31, [5, 6, 7], 9)
    assert sees(kinds, check) == expected
    assert sees(Point(1, 2.5), lambda found: found.y) == 2.5


def test_modules_of_odd_types_go_by_name(sees: Sees, monkeypatch: pytest.MonkeyPatch) -> None:
    class Odd(types.ModuleType):
        def __getattr__(self, name: str) -> Any:
            raise AssertionError(name)

    for module in (six.moves, six.moves.urllib):
        assert pickle.loads(dumps(module)) is module
        assert sees(module, lambda module: module.__name__) == module.__name__
    odd = Odd("odd_module")
    monkeypatch.setitem(sys.modules, "odd_module", odd)
    assert pickle.loads(dumps(odd)) is odd
    monkeypatch.setitem(sys.modules, "odd_object", Jobs("module"))  # type: ignore[arg-type]
    assert _anew.reduce_anew(Jobs("no module")) is not None


def test_lazy_module_is_not_loaded_by_pickling_it(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.find_spec("this")
    assert spec
    assert spec.loader
    spec.loader = importlib.util.LazyLoader(spec.loader)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "this", module)
    spec.loader.exec_module(module)
    data = dumps(module)
    assert type(module) is not types.ModuleType, "loaded"
    assert pickle.loads(data) is module


def test_loggers_and_handlers(sees: Sees, tmp_path: Path) -> None:
    log = tmp_path / "a.log"
    with log.open("w") as file:
        file.write("kept\n")
    handler = logging.FileHandler(log, mode="a", delay=True)
    handler.mode = "w"  # as if this process had emptied it
    handler.setFormatter(logging.Formatter("%(message)s"))
    handler.setLevel(logging.INFO)

    def check(handler: Any) -> Any:
        import logging

        handler.handle(logging.LogRecord("n", logging.INFO, "p", 1, "told", (), None))
        handler.close()
        return handler.level

    assert sees(handler, check) == logging.INFO
    assert log.read_text() == "kept\ntold\ntold\n"
    stream = logging.StreamHandler()
    found = sees(stream, lambda found: found.stream is __import__("sys").stderr)
    assert found
    adapter = logging.LoggerAdapter(logging.getLogger("mine"), {"a": 1})
    assert sees(adapter, lambda found: (found.logger.name, found.extra)) == ("mine", {"a": 1})
    memory = logging.handlers.MemoryHandler(3, target=handler)
    assert sees(memory, lambda found: found.target.level) == logging.INFO


def test_streams_and_environment_are_the_processs_own(sees: Sees) -> None:
    for obj in (sys.stdin, sys.stdout, sys.stderr, os.environ, os.environb):
        assert pickle.loads(dumps(obj)) is obj
    # What pytest has put there is of no type that is known.
    program = (
        "import pickle, sys; from cloudexec._anew import reduce_anew\n"
        "for name in ('stdin', 'stdout', 'stderr', '__stdin__', '__stderr__'):\n"
        "    for stream in (getattr(sys, name), getattr(sys, name).buffer):\n"
        "        make, args = reduce_anew(stream)\n"
        "        assert make(*args) is stream\n"
        "assert reduce_anew(open(sys.executable, 'rb')) is None\n"
        "assert reduce_anew(open(sys.executable)) is None\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=30, input=b"")


def test_objects_in_c_whose_parameters_tell_all(sees: Sees) -> None:
    assert sees(struct.Struct("<IH"), lambda found: (found.pack(1, 2), found.format)) == (
        struct.pack("<IH", 1, 2),
        "<IH",
    )
    decoder = json.JSONDecoder(object_hook=lambda found: sorted(found), strict=False)
    assert sees(decoder, lambda found: found.decode('{"b": 1, "a": [2]}')) == ["a", "b"]


GENERATORS: dict[str, Callable[[], Any]] = {
    "Random": lambda: random.Random(5),
    "Generator": lambda: numpy.random.default_rng(5),
    "MT19937": lambda: numpy.random.Generator(numpy.random.MT19937(5)),
    "Philox": lambda: numpy.random.Generator(numpy.random.Philox(5)),
    "SFC64": lambda: numpy.random.Generator(numpy.random.SFC64(5)),
    "RandomState": lambda: numpy.random.RandomState(5),
    "RandomState(PCG64)": lambda: numpy.random.RandomState(numpy.random.PCG64(5)),
}


def draw(generator: Any) -> list[float]:
    return [float(generator.random()) for _ in range(3)]


@pytest.mark.parametrize("name", GENERATORS)
def test_generator_has_a_stream_of_its_own_in_each_process(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = GENERATORS[name]()
    draw(generator)
    data = dumps(generator)
    assert draw(pickle.loads(data)) == draw(generator), "without a number, an exact copy"
    streams = []
    for number in (0, 1, 2, 0):
        monkeypatch.setattr(_anew, "_process_number", None)
        _anew.set_process_number(number)
        streams.append(draw(pickle.loads(data)))
    monkeypatch.setattr(_anew, "_process_number", None)
    assert streams[0] == streams[3], "the same number gives the same stream"
    assert len({tuple(stream) for stream in (*streams, draw(generator))}) == 4
    later = dumps(generator)
    monkeypatch.setattr(_anew, "_process_number", 0)
    assert draw(pickle.loads(later)) != streams[0], "another state gives another stream"


def test_streams_of_a_process_are_shared_as_the_generators_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bits = numpy.random.PCG64(1)
    data = dumps((bits, numpy.random.Generator(bits)))
    monkeypatch.setattr(_anew, "_process_number", 3)
    copy, generator = pickle.loads(data)
    assert generator.bit_generator is copy
    children = [generator.spawn(1)[0].random(), pickle.loads(data)[1].spawn(1)[0].random()]
    assert children[0] == children[1]


def test_generators_that_a_process_has_one_of_are_its_own(sees: Sees) -> None:
    assert pickle.loads(dumps(random.random)).__self__ is random.random.__self__  # type: ignore[attr-defined]
    assert pickle.loads(dumps(random.randint)).__self__ is random.random.__self__  # type: ignore[attr-defined]
    legacy = numpy.random.mtrand._rand  # type: ignore[attr-defined]
    assert pickle.loads(dumps(numpy.random.rand)).__self__ is legacy
    assert sees(random.SystemRandom(), lambda found: type(found).__name__) == "SystemRandom"
    assert sees(secrets.choice, lambda choice: choice([3])) == 3


def test_classes_that_are_made_again_and_again_can_end() -> None:
    references = []
    for _ in range(_anew._KINDS_KEPT + 1):
        made = type("Made", (), {})
        _anew.reduce_anew(made())
        references.append(weakref.ref(made))
    gc.collect()
    assert references[0]() is None


def test_nothing_is_imported_for_it() -> None:
    program = (
        "import cloudexec, cloudpickle, sys; before = set(sys.modules);"
        "from cloudexec import _anew; _anew.reduce_anew(object());"
        "print(*{'numpy', 'ctypes', 'queue', 'random', 'asyncio', 'concurrent.futures.process'}"
        " & set(sys.modules) - before)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=30
    )
    assert done.stdout.split() == []
