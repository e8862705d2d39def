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
import operator
import sys
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable
from types import FunctionType, ModuleType
from typing import Any, cast

import cloudpickle

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
_held: deque[Any] = deque(maxlen=1024)
"""What weak references point to lives on: what holds it in the client may not have been sent."""
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


def _bare(kind: Any) -> Any:
    """Make an object whose ``__init__`` is still to be called."""
    return kind.__new__(kind)


def _attributes(obj: Any) -> dict[str, Any]:
    """Return all attributes of an object, those in slots too."""
    found = dict(getattr(obj, "__dict__", ()))
    for name in copyreg._slotnames(type(obj)):  # type: ignore[attr-defined]
        with contextlib.suppress(AttributeError):
            found[name] = getattr(obj, name)
    return found


def _own_attributes(obj: Any, base: type, parameters: dict[str, Any]) -> dict[str, Any]:
    """Return the attributes that a class of the user's has added to one of the library's."""
    usual = _attributes(base(**parameters))
    return {name: value for name, value in _attributes(obj).items() if name not in usual}


def _reduce_by_init(
    obj: Any, base: type, parameters: dict[str, Any], kept: dict[str, Any]
) -> tuple[Any, ...]:
    state = (base, parameters, _own_attributes(obj, base, parameters) | kept)
    return _bare, (type(obj),), state, None, None, _initialize


def _initialize(obj: Any, state: tuple[type[Any], dict[str, Any], dict[str, Any]]) -> None:
    base, parameters, attributes = state
    base.__init__(obj, **parameters)
    for name, value in attributes.items():
        setattr(obj, name, value)


def _reduce_remade(
    base: type, parameters: dict[str, str], kept: tuple[str, ...], obj: Any
) -> tuple[Any, ...]:
    given = {name: getattr(obj, attribute) for name, attribute in parameters.items()}
    # While others use it: a queue's items are taken at one moment.
    with getattr(obj, "mutex", None) or contextlib.nullcontext():
        rest = {name: _copied(getattr(obj, name)) for name in kept}
    return _reduce_by_init(obj, base, given, rest)


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


def _is_importable(fn: Any) -> bool:
    """Whether a function travels by its name: it is in a module that can be imported elsewhere."""
    module = getattr(fn, "__module__", None)
    if _is_of_script(module):
        return False
    found: Any = sys.modules.get(module) if isinstance(module, str) else None
    try:
        for part in fn.__qualname__.split("."):
            found = getattr(found, part)
    except AttributeError:
        return False
    return found is fn


def _is_of_script(module: Any) -> bool:
    """Whether what is in the module of that name travels by value."""
    if not isinstance(module, str) or module in ("__main__", "__mp_main__"):
        return True
    by_value = cloudpickle.list_registry_pickle_by_value()
    while by_value and module:
        if module in by_value:
            return True
        module = module.rpartition(".")[0]
    return False


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


def _set_attributes(obj: Any, attributes: dict[str, Any]) -> None:
    for name, value in attributes.items():
        setattr(obj, name, value)


def _reduce_cached(wrapper: Any) -> tuple[Any, ...] | None:
    if not hasattr(wrapper, "__wrapped__") or not hasattr(wrapper, "cache_parameters"):
        return None
    if _is_importable(wrapper):
        return None
    parameters = wrapper.cache_parameters()
    state = _wrapper_attributes(wrapper, ["cache_parameters"])
    args = wrapper.__wrapped__, parameters["maxsize"], parameters["typed"]
    return _make_cached, args, state, None, None, _set_attributes


def _make_cached(fn: Callable[..., Any], maxsize: int | None, typed: bool) -> Any:
    return functools.lru_cache(maxsize=maxsize, typed=typed)(fn)


def _reduce_function(fn: Any) -> tuple[Any, ...] | None:
    if fn.__code__ is not _DISPATCHER:
        return None
    registry = list(fn.registry.items())
    if _is_importable(fn):
        # It is there already, but not what the script has registered with it.
        own = [
            (cls, implementation)
            for cls, implementation in registry
            if _is_of_script(cls.__module__)
            or _is_of_script(getattr(implementation, "__module__", ""))
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
    _set_attributes(dispatcher, attributes)


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
    """Reduce an object whose class's ``__init__`` each thread calls with the same arguments."""
    referents = gc.get_referents(local)
    args = next((each for each in referents if type(each) is tuple), ())
    keywords = next(
        (each for each in referents if type(each) is dict and each and _has_names(each)), {}
    )
    return _make, (type(local), args, keywords)


def _has_names(keys: Iterable[Any]) -> bool:
    return all(type(key) is str for key in keys)


def _make(kind: Callable[..., Any], args: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
    return kind(*args, **keywords)


def _reduce_thread(thread: Any) -> tuple[Any, ...] | None:
    if thread is threading.main_thread():
        return threading.main_thread, ()
    if thread._started.is_set():
        return None
    parameters = {
        "target": thread._target,
        "name": thread._name,
        "args": thread._args,
        "kwargs": thread._kwargs,
        "daemon": thread._daemonic,
    }
    return _reduce_by_init(thread, threading.Thread, parameters, {})


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
    return _reduce_by_init(pool, ThreadPoolExecutor, parameters, kept)


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
    return _make, (type(pool), (pool._processes, pool._initializer, pool._initargs), {})


# contextvars and weakref


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


class _Dead:
    """Something to refer to that has ended."""

    def method(self) -> None: ...


def _reduce_reference(reference: Any) -> tuple[Any, ...] | None:
    if type(reference) is not weakref.ref:
        return None
    target = reference()
    if target is None:
        return _make_dead, (weakref.ref,)
    callback = reference.__callback__
    args = (target,) if callback is None else (target, callback)
    return _refer, (weakref.ref, target, *args)


def _reduce_weak_method(reference: Any) -> tuple[Any, ...] | None:
    method = reference()
    if method is None:
        return _make_dead, (weakref.WeakMethod,)
    return _refer, (weakref.WeakMethod, method.__self__, method)


def _reduce_proxy(proxy: Any) -> tuple[Any, ...] | None:
    try:
        target = proxy.__repr__.__self__
    except ReferenceError:
        return _make_dead, (weakref.proxy,)
    return _refer, (weakref.proxy, target, target)


def _refer(make: Callable[..., Any], target: Any, *args: Any) -> Any:
    _held.append(target)
    return make(*args)


def _make_dead(make: Callable[..., Any]) -> Any:
    dead = _Dead()
    return make(dead.method if make is weakref.WeakMethod else dead)


def _reduce_weak_container(container: Any) -> tuple[Any, ...]:
    base = next(base for base in _WEAK_CONTAINERS if isinstance(container, base))
    items = list(container if base is weakref.WeakSet else container.items())
    attributes = _own_attributes(container, base, {})
    return _bare, (type(container),), (base, items, attributes), None, None, _fill


_WEAK_CONTAINERS: tuple[type[Any], ...] = (
    weakref.WeakSet,
    weakref.WeakKeyDictionary,
    weakref.WeakValueDictionary,
)


def _fill(container: Any, state: tuple[type[Any], list[Any], dict[str, Any]]) -> None:
    base, items, attributes = state
    base.__init__(container, items)
    _set_attributes(container, attributes)
    _held.append(items)


def _reduce_finalizer(_: Any) -> tuple[Any, ...]:
    """Reduce a finalizer to one that has nothing to do: what it ends is the original's."""
    return _bare, (weakref.finalize,)


# ctypes


def _reduce_library(library: Any) -> tuple[Any, ...]:
    import ctypes

    if library is ctypes.pythonapi:
        return getattr, (ctypes, "pythonapi")
    function = library._FuncPtr
    settings = {
        name: _function_settings(value)
        for name, value in vars(library).items()
        if isinstance(value, function)
    }
    flags = function._flags_
    keywords = {
        "use_errno": bool(flags & ctypes._FUNCFLAG_USE_ERRNO),  # type: ignore[attr-defined]
        "use_last_error": bool(flags & ctypes._FUNCFLAG_USE_LASTERROR),  # type: ignore[attr-defined]
    }
    args = type(library), (library._name,), keywords
    return _make, args, settings, None, None, _set_functions


def _function_settings(function: Any) -> dict[str, Any]:
    """Return what the script has told about a function of a library."""
    kind = type(function)
    names = ("argtypes", "restype", "errcheck")
    found = {name: getattr(function, name, None) for name in names}
    usual = {"argtypes": None, "restype": kind._restype_, "errcheck": None}
    return {name: value for name, value in found.items() if value is not usual[name]}


def _set_functions(library: Any, settings: dict[str, dict[str, Any]]) -> None:
    for name, attributes in settings.items():
        _set_attributes(getattr(library, name), attributes)


def _reduce_function_pointer(function: Any) -> tuple[Any, ...] | None:
    import ctypes

    kind = type(function)
    if kind.__module__ == "ctypes" and kind.__qualname__ in _CALLBACKS:
        targets = [
            each
            for each in gc.get_referents(function)
            if callable(each) and each is not kind and not isinstance(each, type)
        ]
        return (kind, (targets[0],)) if len(targets) == 1 else None
    library = (function._objects or {}).get("0")
    name = getattr(function, "__name__", None)
    if not isinstance(library, ctypes.CDLL) or not isinstance(name, str):
        return None
    args = library, name, vars(library).get(name) is function
    state = _function_settings(function) or None
    return _find_in_library, args, state, None, None, _set_attributes


def _find_in_library(library: Any, name: str, is_attribute: bool) -> Any:
    return getattr(library, name) if is_attribute else library[name]


_CALLBACKS = {"CFUNCTYPE.<locals>.CFunctionType", "PYFUNCTYPE.<locals>.CFunctionType"}


def _reduce_function_pointer_type(kind: Any) -> tuple[Any, ...] | None:
    import ctypes

    if kind.__module__ != "ctypes" or kind.__qualname__ not in _CALLBACKS:
        return None
    args = kind._restype_, *kind._argtypes_
    if kind.__qualname__.startswith("PYFUNCTYPE"):
        return ctypes.PYFUNCTYPE, args
    flags = kind._flags_
    keywords = {
        "use_errno": bool(flags & ctypes._FUNCFLAG_USE_ERRNO),  # type: ignore[attr-defined]
        "use_last_error": bool(flags & ctypes._FUNCFLAG_USE_LASTERROR),  # type: ignore[attr-defined]
    }
    return _make, (ctypes.CFUNCTYPE, args, keywords)


def _reduce_array_type(kind: Any) -> tuple[Any, ...] | None:
    """Reduce the type of ``c_int * 3``, of which a process has one."""
    type_, length = getattr(kind, "_type_", None), getattr(kind, "_length_", None)
    if type_ is None or type_ * length is not kind:
        return None  # a class of the user's
    return operator.mul, (type_, length)


def _reduce_pointer_type(kind: Any) -> tuple[Any, ...] | None:
    import ctypes

    type_ = getattr(kind, "_type_", None)
    if type_ is None or ctypes.POINTER(type_) is not kind:
        return None
    return ctypes.POINTER, (type_,)


def _reduce_class(kind: Any) -> tuple[Any, ...] | None:
    """Reduce those classes of ctypes's classes that are found in no module."""
    if kind.__module__ != "_ctypes" or not issubclass(kind, type):
        return None
    import ctypes

    for base in (ctypes.Structure, ctypes.Union):
        if type(base) is kind:
            return type, (base,)
    return None


def _reduce_structure(kind: Any) -> tuple[Any, ...] | None:
    """Reduce a structure or union of the script's: setting ``_fields_`` makes its descriptors."""
    if _is_importable(kind):
        return None
    make, args, state, *_, _set = cloudpickle.cloudpickle._dynamic_class_reduce(kind)
    attributes, slots = state
    fields = attributes.pop("_fields_", None)
    attributes = {
        name: value
        for name, value in attributes.items()
        if f"{type(value).__module__}.{type(value).__qualname__}" != "_ctypes.CField"
    }
    if fields is not None:
        attributes["_fields_"] = fields  # behind what says how they are laid out
    return make, args, (attributes, slots), None, None, _set_structure


def _set_structure(kind: Any, state: tuple[dict[str, Any], Any]) -> Any:
    attributes, slots = state
    if "_fields_" in vars(kind):
        attributes.pop("_fields_", None)  # it has come before, and they are final
    return cloudpickle.cloudpickle._class_setstate(kind, (attributes, slots))


# What each process has one of


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
    state = _attributes(handler)
    state.pop("lock", None)
    if isinstance(handler, logging.FileHandler):
        # Opened there when it is used, and not emptied.
        state |= {"stream": None, "mode": handler.mode.replace("w", "a").replace("x", "a")}
    return _bare, (type(handler),), state, None, None, _set_handler


def _set_handler(handler: Any, state: dict[str, Any]) -> None:
    _set_attributes(handler, state)
    handler.createLock()
    logging._addHandlerRef(handler)  # type: ignore[attr-defined]


# Objects written in C that cannot be pickled although all they know can


def _reduce_struct(struct: Any) -> tuple[Any, ...]:
    return type(struct), (struct.format,)


def _reduce_json_decoder(decoder: Any) -> tuple[Any, ...]:
    state = _attributes(decoder)
    state.pop("scan_once", None)
    return _bare, (type(decoder),), state, None, None, _set_json_decoder


def _set_json_decoder(decoder: Any, state: dict[str, Any]) -> None:
    from json import scanner

    _set_attributes(decoder, state)
    decoder.scan_once = scanner.make_scanner(decoder)


# Random generators


def _reduce_random(generator: Any) -> tuple[Any, ...]:
    import random

    if generator is random._inst:
        return getattr, (random, "_inst")
    state = generator.getstate(), _attributes(generator)
    return _bare, (type(generator),), state, None, None, _set_random


def _set_random(generator: Any, state: tuple[Any, dict[str, Any]]) -> None:
    import hashlib
    import random

    stands_at, attributes = state
    _set_attributes(generator, attributes)
    generator.setstate(stands_at)
    if _process_number is not None:
        seed = hashlib.sha256(repr((stands_at, _process_number)).encode()).digest()
        random.Random.seed(generator, int.from_bytes(seed))


def _reduce_system_random(generator: Any) -> tuple[Any, ...]:
    return _bare, (type(generator),), _attributes(generator), None, None, _set_attributes


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


_REDUCERS: dict[str, _Reducer] = {
    "_contextvars.ContextVar": _reduce_context_variable,
    "_ctypes.CFuncPtr": _reduce_function_pointer,
    "_ctypes.PyCArrayType": _reduce_array_type,
    "_ctypes.PyCFuncPtrType": _reduce_function_pointer_type,
    "_ctypes.PyCPointerType": _reduce_pointer_type,
    "_ctypes.PyCStructType": _reduce_structure,
    "_ctypes.UnionType": _reduce_structure,
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
    "ctypes.CDLL": _reduce_library,
    "functools.KeyWrapper": _reduce_key,
    "functools._lru_cache_wrapper": _reduce_cached,
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
    "weakref.ProxyType": _reduce_proxy,
    "weakref.CallableProxyType": _reduce_proxy,
    "weakref.ReferenceType": _reduce_reference,
    "weakref.WeakMethod": _reduce_weak_method,
    "weakref.WeakKeyDictionary": _reduce_weak_container,
    "_weakrefset.WeakSet": _reduce_weak_container,
    "weakref.WeakValueDictionary": _reduce_weak_container,
    "weakref.finalize": _reduce_finalizer,
}
"""By the name of the class, so that nothing has to be imported for it."""

# The commonest are known beforehand.
_reducers[FunctionType] = _reduce_function
