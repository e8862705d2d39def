"""Copies settings that a script changed in the standard library, numpy and pandas to its workers.

Only settings that differ from the defaults are copied, and the client imports no module for it. A
worker imports modules of the standard library at once, and sets the settings of numpy and pandas
when a task imports these. The seeds of ``random`` and ``numpy.random`` are not copied, as all
processes would draw the same numbers.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib.util
import io
import logging
import os
import pickle
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import cloudpickle

from cloudexec._anew import reduce_anew
from cloudexec._log import Log

__all__ = ["apply", "collect", "when_imported"]

_log = Log()


class _Setting(NamedTuple):
    """One kind of setting.

    Attributes:
        module: Name of the module that has the setting.
        read: Takes the module, and returns the state that differs from the default, or ``None``.
        write: Takes the module and the state that ``read`` returned in the client, and sets it.
    """

    module: str
    read: Callable[[Any], Any]
    write: Callable[[Any, Any], None]


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc]
    """cloudpickle's pickler, except that objects of a process, such as locks, are made anew."""

    def reducer_override(self, obj: Any) -> Any:
        reduced = reduce_anew(obj)
        return super().reducer_override(obj) if reduced is None else reduced


def _dumps(obj: Any) -> bytes:
    with io.BytesIO() as file:
        _Pickler(file, protocol=5).dump(obj)
        return file.getvalue()


def collect() -> bytes:
    """Return the changed settings of this process, pickled; empty if there are none.

    It raises no exception.
    """
    found = []
    for name, setting in _SETTINGS.items():
        module = sys.modules.get(setting.module)
        if module is None:
            continue
        try:
            value = setting.read(module)
            if value is not None:
                found.append((name, _dumps(value)))
        except Exception as exc:
            _log.debug("the setting %r is not carried over to workers: %r", name, exc)
    return pickle.dumps(found, 5) if found else b""


def apply(data: bytes, *, handlers: bool = True) -> None:
    """Apply the settings of another process in this one, as far as possible.

    It raises no exception.

    Args:
        data: What ``collect`` has returned in the other process.
        handlers: Whether loggers get the handlers that they have in the other process.
    """
    if not data:
        return
    for name, pickled in pickle.loads(data):
        if handlers or name != _HANDLERS:
            setting = _SETTINGS[name]
            if setting.module.partition(".")[0] in _ELSEWHERE:
                when_imported(setting.module, functools.partial(_set, name, pickled))
            else:
                _set(name, pickled)


def _set(name: str, pickled: bytes) -> None:
    setting = _SETTINGS[name]
    try:
        setting.write(importlib.import_module(setting.module), pickle.loads(pickled))
    except Exception as exc:
        _log.debug("the client's setting %r is not carried over: %r", name, exc)


# Waiting for an import


class _Finder:
    """A finder that comes before all others, and so notices the first import of a module."""

    def __init__(self) -> None:
        self.waiting: dict[str, list[Callable[[], None]]] = {}

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        actions = self.waiting.pop(name, None)
        if actions is None:
            return None
        if not self.waiting:
            sys.meta_path.remove(self)
        # This call asks all other finders, so they need not be asked again.
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            loader: Any = spec.loader
            execute = loader.exec_module

            def execute_and_act(module: Any) -> None:
                with contextlib.suppress(AttributeError):
                    del loader.exec_module
                execute(module)
                for action in actions:
                    action()

            with contextlib.suppress(AttributeError):
                loader.exec_module = execute_and_act
        return spec


_finder = _Finder()


def when_imported(name: str, action: Callable[[], None]) -> None:
    """Call ``action`` as soon as a module has been imported, or now if it has been imported."""
    if name in sys.modules:
        action()
        return
    _finder.waiting.setdefault(name, []).append(action)
    if _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)


# The interpreter


def _stack_size() -> int:
    size = threading.stack_size()  # this call also sets the size, to the default
    threading.stack_size(size)
    return size


_INTERPRETER: dict[str, tuple[Callable[[], Any], Callable[[Any], Any], tuple[Any, ...]]] = {
    "recursion limit": (sys.getrecursionlimit, sys.setrecursionlimit, (1000,)),
    "switch interval": (
        sys.getswitchinterval,
        # Python rounds the interval down to whole microseconds, both when reading and setting it.
        lambda seconds: sys.setswitchinterval(seconds + 1e-7),
        (0.005,),
    ),
    "digits of integers": (
        sys.get_int_max_str_digits,
        sys.set_int_max_str_digits,
        (sys.int_info.default_max_str_digits,),
    ),
    "stack size": (_stack_size, threading.stack_size, (0,)),
    "length of tracebacks": (
        lambda: getattr(sys, "tracebacklimit", None),
        lambda limit: setattr(sys, "tracebacklimit", limit),
        (None,),
    ),
    "collection of garbage": (
        gc.isenabled,
        lambda is_enabled: gc.enable() if is_enabled else gc.disable(),
        (True,),
    ),
    "thresholds of it": (
        gc.get_threshold,
        lambda thresholds: gc.set_threshold(*thresholds),
        ((700, 10, 10), (2000, 10, 10), (2000, 10, 0)),
    ),
}
"""For each setting its getter, its setter, and its defaults, which depend on Python's version."""


def _read_interpreter(_: Any) -> Any:
    found = {}
    for name, (read, _write, defaults) in _INTERPRETER.items():
        value = read()
        if value not in defaults:
            found[name] = value
    return found or None


def _write_interpreter(_: Any, found: dict[str, Any]) -> None:
    for name, value in found.items():
        try:
            _INTERPRETER[name][1](value)
        except Exception as exc:  # this process cannot have the value
            _log.debug("the client's %s is not carried over: %r", name, exc)


# Warnings

_Filter = tuple[str, Any, type[Warning], Any, int]
_USUAL_FILTERS = [
    ("default", None, DeprecationWarning, "__main__", 0),
    ("ignore", None, DeprecationWarning, None, 0),
    ("ignore", None, PendingDeprecationWarning, None, 0),
    ("ignore", None, ImportWarning, None, 0),
    ("ignore", None, ResourceWarning, None, 0),
]


def _read_warnings(_: Any) -> Any:
    filters = list(warnings.filters)
    if filters == _USUAL_FILTERS and not sys.warnoptions:
        return None
    found = []
    for each in filters:
        try:
            found.append((each[2].__module__, _dumps(each)))
        except Exception as exc:
            _log.debug("the warnings filter %r is not carried over to workers: %r", each, exc)
    return sys.warnoptions, found


def _write_warnings(_: Any, state: tuple[list[str], list[tuple[str, bytes]]]) -> None:
    sys.warnoptions[:], pickled = state
    loaded: dict[int, _Filter] = {}  # by position in the client's list

    def load(places: list[int]) -> None:
        for place in places:
            try:
                loaded[place] = pickle.loads(pickled[place][1])
            except Exception as exc:
                _log.debug("a warnings filter of the client's is not carried over: %r", exc)

    def load_later(places: list[int]) -> None:
        # The module's import has added the module's own filters. The client's list contains these
        # filters, too, so they get their place in that list, after all filters of the task.
        load(places)
        filters: list[Any] = warnings.filters  # type: ignore[assignment]
        ours = [loaded[place] for place in sorted(loaded)]
        late = [loaded[place] for place in places if place in loaded]
        kept = [each for each in ours if each in filters or each in late]
        filters[:] = [each for each in filters if each not in ours] + kept
        _forget_what_was_filtered()

    now = []
    later: dict[str, list[int]] = {}
    for place, (module, _data) in enumerate(pickled):
        package = module.partition(".")[0]
        if package in sys.modules or package == "__mp_main__":
            now.append(place)
        else:
            # The package is not imported for this, as code that gives such warnings imports it.
            later.setdefault(package, []).append(place)
    load(now)
    current: list[Any] = warnings.filters  # type: ignore[assignment]
    current[:] = [loaded[place] for place in sorted(loaded)]
    _forget_what_was_filtered()
    for package, places in later.items():
        when_imported(package, functools.partial(load_later, places))


def _forget_what_was_filtered() -> None:
    """Make the interpreter notice that the list of filters has changed."""
    with warnings.catch_warnings():
        pass


# Logging


def _loggers() -> Iterator[tuple[str, logging.Logger]]:
    yield "", logging.root
    for name, logger in sorted(logging.root.manager.loggerDict.items()):
        if isinstance(logger, logging.Logger):
            yield name, logger


def _read_logging(_: Any) -> Any:
    levels = {}
    for name, logger in _loggers():
        state = logger.level, logger.propagate, logger.disabled
        if state != (logging.NOTSET if name else logging.WARNING, True, False):
            levels[name] = state
    names: dict[int, str] = logging._levelToName
    usual = {0: "NOTSET", 10: "DEBUG", 20: "INFO", 30: "WARNING", 40: "ERROR", 50: "CRITICAL"}
    found = {
        "levels": levels,
        "names": {level: name for level, name in names.items() if usual.get(level) != name},
        "disabled": logging.root.manager.disable,
        "warnings": logging._warnings_showwarning is not None,  # type: ignore[attr-defined]
        "silent": not logging.raiseExceptions,
    }
    return found if any(found.values()) else None


def _write_logging(_: Any, found: dict[str, Any]) -> None:
    for level, name in found["names"].items():
        logging.addLevelName(level, name)
    logging.disable(found["disabled"])
    logging.raiseExceptions = not found["silent"]
    if found["warnings"]:
        logging.captureWarnings(True)
    for name, (level, propagate, disabled) in found["levels"].items():
        logger = logging.getLogger(name)
        logger.setLevel(level)
        logger.propagate = propagate
        logger.disabled = disabled


_FILES = ("FileHandler", "WatchedFileHandler", "RotatingFileHandler", "TimedRotatingFileHandler")


def _read_handlers(_: Any) -> Any:
    """Return the handlers that write to a standard stream or a file; others stay in the client."""
    found = {}
    for name, logger in _loggers():
        handlers = []
        for handler in logger.handlers:
            kind = type(handler)
            ours = kind.__module__ in ("logging", "logging.handlers") and kind.__name__ in _FILES
            stream = getattr(handler, "stream", None)
            if ours or (
                kind is logging.StreamHandler
                and any(stream is each for each in (sys.stdout, sys.stderr))
            ):
                handlers.append(handler)
        if handlers:
            try:
                found[name] = _dumps(handlers)
            except Exception as exc:
                _log.debug("handlers of the logger %r are not carried over: %r", name, exc)
    return found or None


def _write_handlers(_: Any, found: dict[str, bytes]) -> None:
    for name, pickled in found.items():
        logger = logging.getLogger(name)
        if logger.handlers:
            continue
        try:
            for handler in pickle.loads(pickled):
                logger.addHandler(handler)
        except Exception as exc:
            _log.debug("handlers of the logger %r are not carried over: %r", name, exc)


# Other modules of the standard library

_CONTEXT = ("prec", "rounding", "Emin", "Emax", "capitals", "clamp")


def _read_decimal(decimal: Any) -> Any:
    """Return the changed contexts: that of this thread, and the one that new threads get."""
    usual = {
        **dict.fromkeys(_CONTEXT),
        "prec": 28,
        "rounding": decimal.ROUND_HALF_EVEN,
        "Emin": -999999,
        "Emax": 999999,
        "capitals": 1,
        "clamp": 0,
        "traps": {decimal.InvalidOperation, decimal.DivisionByZero, decimal.Overflow},
    }
    found = []
    for context in (decimal.DefaultContext, decimal.getcontext()):
        state = {name: getattr(context, name) for name in _CONTEXT}
        state["traps"] = {signal for signal, is_on in context.traps.items() if is_on}
        found.append(state)
    if found == [usual, usual]:
        return None
    for state in found:
        state["traps"] = sorted(signal.__name__ for signal in state["traps"])
    return found


def _write_decimal(decimal: Any, found: list[dict[str, Any]]) -> None:
    for context, state in zip((decimal.DefaultContext, decimal.getcontext()), found, strict=True):
        for name in _CONTEXT:
            setattr(context, name, state[name])
        for signal in context.traps:
            context.traps[signal] = signal.__name__ in state["traps"]


_CATEGORIES = ("LC_CTYPE", "LC_COLLATE", "LC_TIME", "LC_MONETARY", "LC_NUMERIC", "LC_MESSAGES")


def _read_locale(locale: Any) -> Any:
    found = {}
    for name in _CATEGORIES:
        if hasattr(locale, name):
            value = locale.setlocale(getattr(locale, name))
            # The interpreter itself sets this category from the environment.
            by_itself = [os.environ.get(each) for each in ("LC_ALL", name, "LANG")]
            usual = ("C", "POSIX", "C.UTF-8", *by_itself) if name == "LC_CTYPE" else ("C", "POSIX")
            if value not in usual:
                found[name] = value
    return found or None


def _write_locale(locale: Any, found: dict[str, str]) -> None:
    for name, value in found.items():
        try:
            locale.setlocale(getattr(locale, name), value)
        except locale.Error as exc:  # this machine does not have the locale
            _log.debug("the client's locale %s=%s is not carried over: %r", name, value, exc)


def _read_csv(csv: Any) -> Any:
    limit = csv.field_size_limit()
    dialects = {}
    for name in csv.list_dialects():
        if name not in ("excel", "excel-tab", "unix"):
            dialect = csv.get_dialect(name)
            dialects[name] = {each: getattr(dialect, each) for each in _DIALECT}
    return (limit, dialects) if limit != 131072 or dialects else None


_DIALECT = (
    *("delimiter", "doublequote", "escapechar", "lineterminator", "quotechar", "quoting"),
    *("skipinitialspace", "strict"),
)


def _write_csv(csv: Any, found: tuple[int, dict[str, dict[str, Any]]]) -> None:
    limit, dialects = found
    csv.field_size_limit(limit)
    for name, parameters in dialects.items():
        csv.register_dialect(name, **parameters)


def _read_tempfile(tempfile: Any) -> Any:
    found = tempfile.tempdir
    # tempfile stores the directory that it finds among these in the same variable.
    usual = tempfile._candidate_tempdir_list()
    return None if found in usual else found


def _write_tempfile(tempfile: Any, directory: Any) -> None:
    if os.path.isdir(directory):
        tempfile.tempdir = directory


# numpy and pandas

_ERRORS = {"divide": "warn", "over": "warn", "under": "ignore", "invalid": "warn"}
_PRINTING: dict[str, Any] = {
    "edgeitems": 3,
    "floatmode": "maxprec",
    "formatter": None,
    "infstr": "inf",
    "legacy": False,
    "linewidth": 75,
    "nanstr": "nan",
    "override_repr": None,
    "precision": 8,
    "sign": "-",
    "suppress": False,
    "threshold": 1000,
}


def _read_errors(numpy: Any) -> Any:
    found = numpy.geterr(), numpy.geterrcall()
    return None if found == (_ERRORS, None) else found


def _write_errors(numpy: Any, found: tuple[dict[str, str], Any]) -> None:
    errors, call = found
    numpy.seterr(**errors)
    numpy.seterrcall(call)


def _read_printing(numpy: Any) -> Any:
    found = numpy.get_printoptions()
    return {
        name: value
        for name, value in found.items()
        if name not in _PRINTING or value != _PRINTING[name]
    } or None


def _write_printing(numpy: Any, found: dict[str, Any]) -> None:
    numpy.set_printoptions(**found)


def _read_pandas(config: Any) -> Any:
    """Read the options from pandas' internal tables, as its own getter warns about some of them."""
    found = {}
    for key, option in config._registered_options.items():
        value = config._global_config
        for name in key.split("."):
            value = value[name]
        if value is not option.defval and value != option.defval:
            try:
                found[key] = _dumps(value)
            except Exception as exc:
                _log.debug("pandas's option %r is not carried over: %r", key, exc)
    return found or None


def _write_pandas(pandas: Any, found: dict[str, bytes]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for key, pickled in found.items():
            try:
                pandas.set_option(key, pickle.loads(pickled))
            except Exception as exc:
                _log.debug("pandas's option %r is not carried over: %r", key, exc)


_ELSEWHERE = ("numpy", "pandas")
"""Modules that workers do not import in order to apply settings."""
_HANDLERS = "handlers"
_SETTINGS = {
    "interpreter": _Setting("sys", _read_interpreter, _write_interpreter),
    "warnings": _Setting("warnings", _read_warnings, _write_warnings),
    "logging": _Setting("logging", _read_logging, _write_logging),
    _HANDLERS: _Setting("logging", _read_handlers, _write_handlers),
    "decimal": _Setting("decimal", _read_decimal, _write_decimal),
    "locale": _Setting("locale", _read_locale, _write_locale),
    "csv": _Setting("csv", _read_csv, _write_csv),
    "tempfile": _Setting("tempfile", _read_tempfile, _write_tempfile),
    "socket": _Setting(
        "socket",
        lambda socket: socket.getdefaulttimeout(),
        lambda socket, timeout: socket.setdefaulttimeout(timeout),
    ),
    "numpy errors": _Setting("numpy", _read_errors, _write_errors),
    "numpy printing": _Setting("numpy", _read_printing, _write_printing),
    "pandas": _Setting(
        "pandas",
        lambda pandas: _read_pandas(sys.modules["pandas._config.config"]),
        _write_pandas,
    ),
}
