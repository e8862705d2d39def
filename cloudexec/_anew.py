"""What cannot be sent is made anew: reducers for globals of a script that belong to a process.

A lock, a cache or a loaded library belongs to the process that made it, but another process can
make one like it. ``reduce_anew`` says how, as a pickler's ``reducer_override`` is to return it. It
is meant for what is reached from globals; an argument that cannot be sent is rather an error.

What is made anew is idle: nobody holds its locks or waits for it, caches are empty, pools have no
tasks. Random generators get a stream of their own in each process that has a number.
"""

from __future__ import annotations

import contextlib
import copyreg
import functools
import gc
import importlib
import logging
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable
from types import FunctionType, ModuleType
from typing import Any, cast

import cloudpickle

from cloudexec._anew_basics import (
    attributes_of,
    bare,
    is_importable,
    is_of_script,
    make,
    reduce_by_init,
    set_attributes,
)

__all__ = ["reduce_anew", "set_process_number"]

_Reducer = Callable[[Any], "tuple[Any, ...] | None"]

_KINDS_KEPT = 2048
_OWN_WAYS = frozenset(
    {"__reduce__", "__reduce_ex__", "__getstate__", "__getnewargs__", "__getnewargs_ex__"}
)
"""A class that has one of these knows itself how to be pickled."""
_DISPATCHER = cast("FunctionType", functools.singledispatch(len)).__code__
"""All functions that ``functools.singledispatch`` makes have the same code."""

_reducers: dict[type, _Reducer | None] = {}
_process_number: int | None = None


def set_process_number(number: int | None) -> None:
    """Number this process: generators that it makes anew get a stream that belongs to the number.

    Without a number they continue exactly where the original stands.
    """
    global _process_number
    _process_number = number


def reduce_anew(obj: Any) -> tuple[Any, ...] | None:
    """Say how to make an object like this one in another process.

    Returns:
        What a pickler's ``reducer_override`` returns, or ``None`` if the object is none of those
        that can be made anew.
    """
    kind = type(obj)
    try:
        reducer = _reducers[kind]
    except KeyError:
        reducer = _find_reducer(kind)
    except TypeError:
        return None  # a class that cannot be hashed
    return None if reducer is None else reducer(obj)


def _find_reducer(kind: type) -> _Reducer | None:
    found = _look_for_reducer(kind)
    if len(_reducers) >= _KINDS_KEPT:
        _reducers.clear()  # classes that are made again and again must be able to end
    _reducers[kind] = found
    return found


def _look_for_reducer(kind: type) -> _Reducer | None:
    if kind in copyreg.dispatch_table:
        return None
    for base in kind.__mro__[:-1]:
        name = f"{base.__module__}.{base.__qualname__}"
        reducer = _REDUCERS.get(name)
        if reducer is not None:
            return reducer
        parameters = _REMADE.get(name)
        if parameters is not None:
            return functools.partial(_reduce_remade, base, *parameters)
        if not _OWN_WAYS.isdisjoint(base.__dict__):
            return None
    if kind is ModuleType:
        return None  # cloudpickle knows how
    if issubclass(kind, ModuleType) or kind in set(map(type, list(sys.modules.values()))):
        return _reduce_module
    if kind in {type(sys.stdin), type(sys.stdout), type(sys.stderr)}:
        return _reduce_stream
    return None


# Objects that their class makes anew from a few parameters


def _reduce_remade(
    base: type, parameters: dict[str, str], kept: tuple[str, ...], obj: Any
) -> tuple[Any, ...]:
    given = {name: getattr(obj, attribute) for name, attribute in parameters.items()}
    # While others use it: a queue's items are taken at one moment.
    with getattr(obj, "mutex", None) or contextlib.nullcontext():
        rest = {name: _copied(getattr(obj, name)) for name in kept}
    return reduce_by_init(obj, base, given, rest)


def _copied(value: Any) -> Any:
    return value.copy() if isinstance(value, (list, deque)) else value


_REMADE: dict[str, tuple[dict[str, str], tuple[str, ...]]] = {
    "asyncio.locks.Barrier": ({"parties": "_parties"}, ()),
    "asyncio.locks.BoundedSemaphore": ({"value": "_bound_value"}, ()),
    "asyncio.locks.Condition": ({"lock": "_lock"}, ()),
    "asyncio.locks.Event": ({}, ("_value",)),
    "asyncio.locks.Lock": ({}, ()),
    "asyncio.locks.Semaphore": ({"value": "_value"}, ()),
    "asyncio.queues.LifoQueue": (
        {"maxsize": "_maxsize"},
        ("_queue", "_unfinished_tasks", "_finished"),
    ),
    "asyncio.queues.PriorityQueue": (
        {"maxsize": "_maxsize"},
        ("_queue", "_unfinished_tasks", "_finished"),
    ),
    "asyncio.queues.Queue": (
        {"maxsize": "_maxsize"},
        ("_queue", "_unfinished_tasks", "_finished"),
    ),
    "queue.LifoQueue": ({"maxsize": "maxsize"}, ("queue", "unfinished_tasks")),
    "queue.PriorityQueue": ({"maxsize": "maxsize"}, ("queue", "unfinished_tasks")),
    "queue.Queue": ({"maxsize": "maxsize"}, ("queue", "unfinished_tasks")),
    "threading.Barrier": (
        {"parties": "_parties", "action": "_action", "timeout": "_timeout"},
        (),
    ),
    # Nobody there holds it, as nobody holds a lock.
    "threading.BoundedSemaphore": ({"value": "_initial_value"}, ()),
    "threading.Condition": ({"lock": "_lock"}, ()),
    "threading.Event": ({}, ("_flag",)),
    "threading.Semaphore": ({"value": "_value"}, ()),
}
"""The parameters of their ``__init__`` with the attributes that tell these, and what is kept."""


# functools


def _wrapper_attributes(wrapper: Any, made: Iterable[str]) -> dict[str, Any]:
    """Return what a wrapper has been given besides what ``functools.update_wrapper`` copies."""
    attributes: dict[str, Any] = {}
    copied = {*functools.WRAPPER_ASSIGNMENTS, "__wrapped__", "__annotate__", "__dict__", *made}
    for name in functools.WRAPPER_ASSIGNMENTS:
        value = getattr(wrapper, name, None)
        if value != getattr(wrapper.__wrapped__, name, None):
            attributes[name] = value
    for name, value in vars(wrapper).items():
        if name not in copied and getattr(wrapper.__wrapped__, name, attributes) is not value:
            attributes[name] = value
    return attributes


def _reduce_cached(wrapper: Any) -> tuple[Any, ...] | None:
    if not hasattr(wrapper, "__wrapped__") or not hasattr(wrapper, "cache_parameters"):
        return None
    if is_importable(wrapper):
        return None
    parameters = wrapper.cache_parameters()
    state = _wrapper_attributes(wrapper, ["cache_parameters"])
    args = wrapper.__wrapped__, parameters["maxsize"], parameters["typed"]
    return _make_cached, args, state, None, None, set_attributes


def _make_cached(fn: Callable[..., Any], maxsize: int | None, typed: bool) -> Any:
    return functools.lru_cache(maxsize=maxsize, typed=typed)(fn)


def _reduce_partial_method(method: Any) -> tuple[Any, ...]:
    return make, (type(method), (method.func, *method.args), dict(method.keywords))


def _reduce_function(fn: Any) -> tuple[Any, ...] | None:
    if fn.__code__ is not _DISPATCHER:
        return None
    registry = list(fn.registry.items())
    if is_importable(fn):
        # It is there already, but not what the script has registered with it.
        own = [
            (cls, implementation)
            for cls, implementation in registry
            if is_of_script(cls.__module__)
            or is_of_script(getattr(implementation, "__module__", ""))
        ]
        if not own:
            return None
        return _find_function, (fn.__module__, fn.__qualname__), (own, {}), None, None, _register
    made = ["register", "dispatch", "registry", "_clear_cache"]
    attributes = _wrapper_attributes(fn, made)
    if registry[0] == (object, fn.__wrapped__):
        del registry[0]  # as singledispatch() itself puts it
    return _make_dispatcher, (fn.__wrapped__,), (registry, attributes), None, None, _register


def _make_dispatcher(fn: Callable[..., Any]) -> Any:
    return functools.singledispatch(fn)


def _find_function(module: str, qualname: str) -> Any:
    found: Any = importlib.import_module(module)
    for part in qualname.split("."):
        found = getattr(found, part)
    return found


def _register(dispatcher: Any, state: tuple[list[tuple[type, Any]], dict[str, Any]]) -> None:
    registry, attributes = state
    for cls, implementation in registry:
        dispatcher.register(cls, implementation)
    set_attributes(dispatcher, attributes)


def _reduce_key(key: Any) -> tuple[Any, ...] | None:
    """Reduce what ``functools.cmp_to_key`` returns."""
    compare = [each for each in gc.get_referents(key) if each is not type(key)]
    return (functools.cmp_to_key, tuple(compare)) if len(compare) == 1 else None


# threading, queues, pools


def _reduce_lock(_: Any) -> tuple[Any, ...]:
    return threading.Lock, ()


def _reduce_rlock(_: Any) -> tuple[Any, ...]:
    return threading.RLock, ()


def _reduce_local(local: Any) -> tuple[Any, ...]:
    """Reduce an object whose class's ``__init__`` each thread calls with the same arguments.

    What this thread has set in it is set in the thread that runs tasks, as in a forked process. Not
    so what cannot be pickled, such as a connection, which each thread opens for itself.
    """
    referents = gc.get_referents(local)
    args = next((each for each in referents if type(each) is tuple), ())
    keywords = next(
        (each for each in referents if type(each) is dict and each and _has_names(each)), {}
    )
    state = {name: value for name, value in vars(local).items() if _can_be_pickled(value)}
    args = (type(local), args, keywords)
    return (make, args, state, None, None, set_attributes) if state else (make, args)


def _can_be_pickled(value: Any) -> bool:
    try:
        cloudpickle.dumps(value)
    except Exception:
        return False
    return True


def _has_names(keys: Iterable[Any]) -> bool:
    return all(type(key) is str for key in keys)


def _reduce_thread(thread: Any) -> tuple[Any, ...] | None:
    if thread is threading.main_thread():
        return threading.main_thread, ()
    if thread._started.is_set():
        if sys.version_info < (3, 13):
            return None
        # A copy does not run, and has neither the thread's handle nor its context.
        state = {name: value for name, value in vars(thread).items() if name not in _OF_RUNNING}
        return _make_thread, (type(thread),), state
    parameters = {
        "target": thread._target,
        "name": thread._name,
        "args": thread._args,
        "kwargs": thread._kwargs,
        "daemon": thread._daemonic,
    }
    return reduce_by_init(thread, threading.Thread, parameters, {})


_OF_RUNNING = frozenset({"_context", "_handle", "_os_thread_handle", "_started"})
"""Attributes of a thread that belong to its run."""


def _make_thread(kind: type[Any]) -> Any:
    thread = object.__new__(kind)
    threading.Thread.__init__(thread)
    return thread


def _reduce_simple_queue(simple: Any) -> tuple[Any, ...]:
    """Reduce a queue that shows its items to the garbage collector only."""
    items = [each for each in gc.get_referents(simple) if each is not type(simple)]
    if sys.version_info < (3, 13):
        # A list, whose first entries may have been taken already.
        size = simple.qsize()
        items = items[0][-size:] if size else []
    return _make_simple_queue, (type(simple), items)


def _make_simple_queue(kind: type[Any], items: list[Any]) -> Any:
    made = kind()
    for item in items:
        made.put(item)
    return made


def _reduce_thread_pool_executor(pool: Any) -> tuple[Any, ...]:
    from concurrent.futures import ThreadPoolExecutor

    parameters = {
        "max_workers": pool._max_workers,
        "thread_name_prefix": pool._thread_name_prefix,
        **_initializer_of(pool),
    }
    kept = {"_shutdown": True} if pool._shutdown else {}
    return reduce_by_init(pool, ThreadPoolExecutor, parameters, kept)


def _initializer_of(pool: Any) -> dict[str, Any]:
    if hasattr(pool, "_initializer"):
        return {"initializer": pool._initializer, "initargs": pool._initargs}
    make = pool._create_worker_context  # Python 3.14 keeps them in a closure
    cells = dict(zip(make.__code__.co_freevars, make.__closure__ or (), strict=True))
    names = [name for name in ("initializer", "initargs") if name in cells]
    return {name: cells[name].cell_contents for name in names}


def _reduce_process_pool_executor(pool: Any) -> tuple[Any, ...] | None:
    if pool._shutdown_thread or type(pool).__module__ != "concurrent.futures.process":
        return None
    parameters = {
        "max_workers": pool._max_workers,
        "initializer": pool._initializer,
        "initargs": pool._initargs,
        "max_tasks_per_child": pool._max_tasks_per_child,
    }
    method = pool._mp_context.get_start_method()
    return _make_process_pool_executor, (parameters, method)


def _make_process_pool_executor(parameters: dict[str, Any], method: str) -> Any:
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor

    context = multiprocessing.get_context(method)
    return ProcessPoolExecutor(**parameters, mp_context=context)


def _reduce_thread_pool(pool: Any) -> tuple[Any, ...] | None:
    if pool._state != "RUN":
        return None
    return make, (type(pool), (pool._processes, pool._initializer, pool._initargs), {})


# contextvars


def _reduce_context_variable(variable: Any) -> tuple[Any, ...]:
    """Reduce a context variable: its name, its default, and what it is set to here."""
    import contextvars

    default, value = [
        [context[variable]] if variable in context else _default_of(context, variable)
        for context in (contextvars.Context(), contextvars.copy_context())
    ]
    state = value if value is not default and value != default else None
    return _make_context_variable, (variable.name, default), state, None, None, _set_variable


def _default_of(context: Any, variable: Any) -> list[Any]:
    try:
        return [context.run(variable.get)]
    except LookupError:
        return []


def _make_context_variable(name: str, default: list[Any]) -> Any:
    import contextvars

    return (
        contextvars.ContextVar(name, default=default[0])
        if default
        else contextvars.ContextVar(name)
    )


def _set_variable(variable: Any, value: list[Any]) -> None:
    variable.set(value[0])


# What each process has one of


def _reduce_class(kind: Any) -> tuple[Any, ...] | None:
    """Reduce those classes of ctypes's classes that are found in no module."""
    if kind.__module__ != "_ctypes" or not issubclass(kind, type):
        return None
    import ctypes

    for base in (ctypes.Structure, ctypes.Union):
        if type(base) is kind:
            return type, (base,)
    return None


def _reduce_module(module: Any) -> tuple[Any, ...] | None:
    """Reduce a module of an odd type, which may do anything when an attribute is read, by name."""
    name = None
    with contextlib.suppress(AttributeError):
        name = object.__getattribute__(module, "__dict__").get("__name__")
    if not isinstance(name, str) or sys.modules.get(name) is not module:
        modules = list(sys.modules.items())
        name = next((known for known, other in modules if other is module), None)
    return None if name is None else (importlib.import_module, (name,))


def _reduce_stream(stream: Any) -> tuple[Any, ...] | None:
    for name in ("stdin", "stdout", "stderr", "__stdin__", "__stdout__", "__stderr__"):
        standard = getattr(sys, name, None)
        if stream is standard:
            return getattr, (sys, name)
        if stream is getattr(standard, "buffer", None):
            return _find_buffer, (name,)
    return None


def _find_buffer(name: str) -> Any:
    return getattr(sys, name).buffer


def _reduce_environment(environment: Any) -> tuple[Any, ...] | None:
    import os

    for name in ("environ", "environb"):
        if environment is getattr(os, name, None):
            return getattr, (os, name)
    return None


def _reduce_handler(handler: Any) -> tuple[Any, ...]:
    state = attributes_of(handler)
    state.pop("lock", None)
    if isinstance(handler, logging.FileHandler):
        # Opened there when it is used, and not emptied.
        state |= {"stream": None, "mode": handler.mode.replace("w", "a").replace("x", "a")}
    return bare, (type(handler),), state, None, None, _set_handler


def _set_handler(handler: Any, state: dict[str, Any]) -> None:
    set_attributes(handler, state)
    handler.createLock()
    logging._addHandlerRef(handler)  # type: ignore[attr-defined]


# Objects written in C that cannot be pickled although all they know can


def _reduce_struct(struct: Any) -> tuple[Any, ...]:
    return type(struct), (struct.format,)


def _reduce_json_decoder(decoder: Any) -> tuple[Any, ...]:
    state = attributes_of(decoder)
    state.pop("scan_once", None)
    return bare, (type(decoder),), state, None, None, _set_json_decoder


def _set_json_decoder(decoder: Any, state: dict[str, Any]) -> None:
    from json import scanner

    set_attributes(decoder, state)
    decoder.scan_once = scanner.make_scanner(decoder)


# Random generators


def _reduce_random(generator: Any) -> tuple[Any, ...]:
    import random

    if generator is random._inst:
        return getattr, (random, "_inst")
    state = generator.getstate(), attributes_of(generator)
    return bare, (type(generator),), state, None, None, _set_random


def _set_random(generator: Any, state: tuple[Any, dict[str, Any]]) -> None:
    import hashlib
    import random

    stands_at, attributes = state
    set_attributes(generator, attributes)
    generator.setstate(stands_at)
    if _process_number is not None:
        seed = hashlib.sha256(repr((stands_at, _process_number)).encode()).digest()
        random.Random.seed(generator, int.from_bytes(seed))


def _reduce_system_random(generator: Any) -> tuple[Any, ...]:
    return bare, (type(generator),), attributes_of(generator), None, None, set_attributes


def _reduce_bit_generator(generator: Any) -> tuple[Any, ...]:
    return _make_bit_generator, tuple(generator.__reduce__())


def _make_bit_generator(make: Callable[..., Any], args: tuple[Any, ...], state: Any) -> Any:
    generator = make(*args)
    generator.__setstate__(state)
    return generator if _process_number is None else _own_stream(generator)


def _own_stream(generator: Any) -> Any:
    """Make a bit generator that is seeded by where this one stands and the process's number.

    Not jumped: a script that has jumped its own streams would meet them again.
    """
    from numpy.random import SeedSequence

    words = generator.random_raw(8).tolist()
    return type(generator)(SeedSequence([*words, _process_number]))


def _reduce_random_state(generator: Any) -> tuple[Any, ...]:
    mtrand = sys.modules["numpy.random.mtrand"]
    if generator is mtrand._rand:
        return getattr, (mtrand, "_rand")
    kinds = type(generator), type(generator._bit_generator)
    return _make_random_state, (*kinds, generator.get_state(legacy=False))


def _make_random_state(kind: type[Any], bits: type[Any], state: dict[str, Any]) -> Any:
    generator = kind(bits())
    generator.set_state(state)
    if _process_number is None:
        return generator
    return kind(_own_stream(generator._bit_generator))


def _late(module: str, name: str) -> _Reducer:
    """Return a reducer whose module is loaded when the first such object is met."""

    def reduce(obj: Any) -> tuple[Any, ...] | None:
        found = importlib.import_module(f"cloudexec._anew_{module}")
        return cast("_Reducer", getattr(found, name))(obj)

    return reduce


_REDUCERS: dict[str, _Reducer] = {
    "_contextvars.ContextVar": _reduce_context_variable,
    "_ctypes.CFuncPtr": _late("ctypes", "reduce_function_pointer"),
    "_ctypes.PyCArrayType": _late("ctypes", "reduce_array_type"),
    "_ctypes.PyCFuncPtrType": _late("ctypes", "reduce_function_pointer_type"),
    "_ctypes.PyCPointerType": _late("ctypes", "reduce_pointer_type"),
    "_ctypes.PyCStructType": _late("ctypes", "reduce_structure"),
    "_ctypes.UnionType": _late("ctypes", "reduce_structure"),
    "_io.BufferedReader": _reduce_stream,
    "_io.BufferedWriter": _reduce_stream,
    "_io.FileIO": _reduce_stream,
    "_io.TextIOWrapper": _reduce_stream,
    "_queue.SimpleQueue": _reduce_simple_queue,
    "_struct.Struct": _reduce_struct,
    "_thread.RLock": _reduce_rlock,
    "_thread._local": _reduce_local,
    "_thread.lock": _reduce_lock,
    "builtins.function": _reduce_function,
    "builtins.type": _reduce_class,
    "concurrent.futures.process.ProcessPoolExecutor": _reduce_process_pool_executor,
    "concurrent.futures.thread.ThreadPoolExecutor": _reduce_thread_pool_executor,
    "ctypes.CDLL": _late("ctypes", "reduce_library"),
    "functools.KeyWrapper": _reduce_key,
    "functools._lru_cache_wrapper": _reduce_cached,
    "functools.partialmethod": _reduce_partial_method,
    "json.decoder.JSONDecoder": _reduce_json_decoder,
    "logging.Handler": _reduce_handler,
    "multiprocessing.pool.ThreadPool": _reduce_thread_pool,
    "numpy.random.bit_generator.BitGenerator": _reduce_bit_generator,
    "numpy.random.mtrand.RandomState": _reduce_random_state,
    "os._Environ": _reduce_environment,
    "random.Random": _reduce_random,
    "random.SystemRandom": _reduce_system_random,
    "threading.Thread": _reduce_thread,
    "threading._RLock": _reduce_rlock,
    "weakref.ProxyType": _late("weak", "reduce_proxy"),
    "weakref.CallableProxyType": _late("weak", "reduce_proxy"),
    "weakref.ReferenceType": _late("weak", "reduce_reference"),
    "weakref.WeakMethod": _late("weak", "reduce_weak_method"),
    "weakref.WeakKeyDictionary": _late("weak", "reduce_weak_container"),
    "_weakrefset.WeakSet": _late("weak", "reduce_weak_container"),
    "weakref.WeakValueDictionary": _late("weak", "reduce_weak_container"),
    "weakref.finalize": _late("weak", "reduce_finalizer"),
}
"""By the name of the class, so that nothing has to be imported for it."""

# The commonest are known beforehand.
_reducers[FunctionType] = _reduce_function
