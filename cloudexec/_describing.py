"""Texts about exceptions and objects of users, whose own methods may fail.

Formatting an exception runs code of its class (``__str__``, ``__getattr__``, ``__notes__``, ...),
which may raise anything, including ``SystemExit``. Wherever cloudexec describes an exception that
is not its own, it uses these functions, which raise nothing but the exceptions that they document.
Attributes that every exception has are read through ``BaseException``, because a class may define
something else under their names.
"""

from __future__ import annotations

import itertools
import linecache
import re
import sys
import threading
import traceback
from collections.abc import Callable
from types import AsyncGeneratorType, CoroutineType, GeneratorType, ModuleType, TracebackType
from typing import Any, TypeGuard, TypeVar

from cloudexec._errors import RemoteTraceback

__all__ = [
    "attribute_of",
    "cause_of",
    "describe",
    "format_exception",
    "format_plainly",
    "if_not_found",
    "is_a",
    "is_interrupt",
    "name_of",
    "presentable",
    "repr_of",
    "set_cause",
    "text_of",
    "traceback_of",
    "try_to_format",
    "type_name",
    "unfinished",
    "with_sources",
]

T = TypeVar("T")

_OF_EXCEPTIONS = vars(BaseException)
traceback_of: Callable[[BaseException], TracebackType | None]
traceback_of = _OF_EXCEPTIONS["__traceback__"].__get__
cause_of: Callable[[BaseException], BaseException | None]
cause_of = _OF_EXCEPTIONS["__cause__"].__get__
set_cause: Callable[[BaseException, BaseException | None], None]
set_cause = _OF_EXCEPTIONS["__cause__"].__set__
_context_of = _OF_EXCEPTIONS["__context__"].__get__
_suppresses_context = _OF_EXCEPTIONS["__suppress_context__"].__get__
_members_of = vars(BaseExceptionGroup)["exceptions"].__get__
_name_of_type: Callable[[type], str] = vars(type)["__name__"].__get__

_MOST_LINKS = 100
_MOST_MEMBERS = 15
_DEEPEST_GROUP = 10
_MOST_REPR = 100
_FRAME = re.compile(r'( *(?:\| *)*)  File "(.+)", line (\d+)(?:, in .*)?')


def is_a(obj: object, kinds: type[T] | tuple[type[T], ...]) -> TypeGuard[T]:
    """Do as ``isinstance``, but ignore ``__class__``, which may be a property that raises."""
    return issubclass(type(obj), kinds)


def is_interrupt(exc: BaseException) -> bool:
    """Return whether an exception may be a Ctrl-C, which is meant for the program as a whole.

    Python raises those in the main thread only. In any other thread the code that was called has
    raised the exception.
    """
    main = threading.main_thread()
    return is_a(exc, KeyboardInterrupt) and threading.current_thread() is main


def type_name(obj: object) -> str:
    """Return the name of an object's type."""
    return _name_of_type(type(obj))


def text_of(exc: BaseException) -> str:
    """Return ``str()`` of an exception, or a note that it raises."""
    try:
        return str.__str__(str(exc))  # makes an instance of a subclass of str a plain str
    except BaseException as why:
        return f"<str() raised {type_name(why)}>"


def describe(exc: BaseException) -> str:
    """Return an exception's type and text, such as ``"ValueError: too large"``."""
    return f"{type_name(exc)}: {text_of(exc)}"


def attribute_of(obj: object, name: str, default: Any = None) -> Any:
    """Do as ``getattr`` with a default, which is also returned if reading raises any exception.

    Raises:
        KeyboardInterrupt: If it may be a Ctrl-C.
    """
    try:
        return getattr(obj, name, default)
    except BaseException as exc:
        if is_interrupt(exc):
            raise
        return default


def name_of(obj: object) -> str:
    """Return a readable name: the qualified name of a callable, otherwise the ``repr()``."""
    name = attribute_of(obj, "__qualname__")
    if type(name) is str:
        module = attribute_of(obj, "__module__", "?")
        return f"{module if type(module) is str else '?'}.{name}"
    return repr_of(obj)


def unfinished(value: object) -> str:
    """Return an explanation and a remedy for a coroutine or generator; ``""`` for other values."""
    if type(value) is CoroutineType:
        return (
            f"the coroutine {value.__qualname__}(), which cannot be sent: `async def` only makes "
            f"it; submit a function that runs it, with asyncio.run()"
        )
    if type(value) is GeneratorType:
        return (
            f"the generator {value.__qualname__}(), which cannot be sent: make a list of what it "
            f"yields, there"
        )
    if type(value) is AsyncGeneratorType:
        return (
            f"the asynchronous generator {value.__qualname__}(), which cannot be sent: submit a "
            f"function that runs it, with asyncio.run(), and makes a list of what it yields"
        )
    return ""


def repr_of(obj: object) -> str:
    """Return ``repr()`` of an object, shortened if it is long.

    Raises:
        KeyboardInterrupt: If it may be a Ctrl-C.
    """
    try:
        text = str.__str__(repr(obj))
    except BaseException as exc:
        if is_interrupt(exc):
            raise
        return object.__repr__(obj) if type(type(obj)) is type else f"<{type_name(obj)}>"
    return text if len(text) < _MOST_REPR else f"{text[: _MOST_REPR - 3]}..."


def try_to_format(exc: BaseException, tb: TracebackType | None) -> str | None:
    """Format an exception with the module ``traceback``.

    Args:
        exc: Any exception.
        tb: The first entry of its traceback to show.

    Returns:
        The text, or ``None`` if a method of the exception, or of one that it refers to, raises.
    """
    try:
        exc.__traceback__  # noqa: B018 (a later print of it needs this attribute)
        return "".join(traceback.format_exception(type(exc), exc, tb))
    except BaseException:
        return None


def format_exception(exc: BaseException, tb: TracebackType | None) -> str:
    """Format any exception with its causes, contexts, notes and members, as ``traceback`` does.

    Args:
        exc: Any exception.
        tb: The first entry of its traceback to show.
    """
    text = try_to_format(exc, tb)
    return format_plainly(exc, tb) if text is None else text


def presentable(exc: BaseException) -> BaseException:
    """Return the exception itself if ``traceback`` can format it, otherwise one with its text.

    The returned exception can be the cause of another one. If a cause could not be formatted,
    neither could the other exception, and a program could not end with it in the usual way.
    """
    if try_to_format(exc, None) is not None:
        return exc
    return RemoteTraceback(format_plainly(exc, traceback_of(exc)))


def if_not_found(exc: BaseException, advice: str) -> str:
    """Return ``advice`` if an error of unpickling says that a name is missing, otherwise ``""``."""
    return f"; {advice}" if is_a(exc, (ImportError, AttributeError)) else ""


def format_plainly(exc: BaseException, tb: TracebackType | None) -> str:
    """Format an exception without ``traceback``, which reads attributes that may raise."""
    try:
        return "".join(_plainly(exc, tb, set(), 0))
    except BaseException:
        return f"{describe(exc)}\n"  # for instance if no memory is left


def _plainly(exc: BaseException, tb: TracebackType | None, seen: set[int], depth: int) -> list[str]:
    """Format an exception; of its own methods only those for its text and notes are called."""
    parts: list[list[str]] = []
    said = ""
    for _ in range(_MOST_LINKS):
        seen.add(id(exc))
        lines = []
        if tb is not None:
            lines += ["Traceback (most recent call last):\n", *traceback.format_tb(tb)]
        lines.append(f"{describe(exc)}\n")
        lines += _notes_of(exc)
        if is_a(exc, BaseExceptionGroup) and depth < _DEEPEST_GROUP:
            for member in itertools.islice(_members_of(exc), _MOST_MEMBERS):
                if id(member) not in seen:
                    inner = "".join(_plainly(member, traceback_of(member), seen, depth + 1))
                    lines += ["  +----------------\n"]
                    lines += [f"  | {line}\n" for line in inner.splitlines()]
        if said:
            lines.append(said)
        parts.append(lines)
        cause = cause_of(exc)
        context = None if _suppresses_context(exc) else _context_of(exc)
        if cause is not None:
            said = "\nThe above exception was the direct cause of the following exception:\n\n"
        else:
            said = "\nDuring handling of the above exception, another exception occurred:\n\n"
        linked = cause if cause is not None else context
        if linked is None or id(linked) in seen:
            break
        exc, tb = linked, traceback_of(linked)
    return [line for lines in reversed(parts) for line in lines]


def _notes_of(exc: BaseException) -> list[str]:
    try:
        notes = object.__getattribute__(exc, "__notes__")
        return [f"{note}\n" for note in notes if type(note) is str] if type(notes) is list else []
    except BaseException:
        return []


def with_sources(text: str) -> str:
    """Add the source lines that a traceback's text lacks, where this process has the source.

    A worker on another machine has no copy of the script, and no worker has the cells of a
    notebook. Only files of modules that are loaded here are read, whatever files the text names.
    """
    lines = text.split("\n")
    found = []
    known: set[str] | None = None
    for number, line in enumerate(lines):
        found.append(line)
        frame = _FRAME.fullmatch(line)
        if frame is None:
            continue
        margin, name, at = frame.groups()
        following = lines[number + 1] if number + 1 < len(lines) else ""
        if following.startswith(f"{margin}    "):
            continue
        if known is None:
            known = _files_at_hand()
        if name in known and (source := linecache.getline(name, int(at[:9])).strip()):
            found.append(f"{margin}    {source}")
    return "\n".join(found)


def _files_at_hand() -> set[str]:
    modules = [vars(each) for each in list(sys.modules.values()) if type(each) is ModuleType]
    names = [names.get("__file__") for names in modules]
    return {name for name in (*names, *list(linecache.cache)) if type(name) is str}
