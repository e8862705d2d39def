"""What exceptions and objects of users say, whatever their own methods do.

Formatting an exception runs code of its class (``__str__``, ``__getattr__``, ``__notes__``, ...),
which may raise anything, ``SystemExit`` too. What cloudexec says about exceptions that are not its
own it says by these functions, which raise nothing. Attributes that every exception has are read
from ``BaseException``, as a class may have put something of its own in their place.
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
    """Do as ``isinstance``, without a look at ``__class__``, which may be a property."""
    return issubclass(type(obj), kinds)


def is_interrupt(exc: BaseException) -> bool:
    """Say whether an exception may be a Ctrl-C, which is meant for the program as a whole.

    Only the main thread gets those: in any other it comes from the code that was called.
    """
    main = threading.main_thread()
    return is_a(exc, KeyboardInterrupt) and threading.current_thread() is main


def type_name(obj: object) -> str:
    """Return the name of an object's type."""
    return _name_of_type(type(obj))


def text_of(exc: BaseException) -> str:
    """Return what ``str()`` says."""
    try:
        return str.__str__(str(exc))  # of no class but str
    except BaseException as why:
        return f"<str() raised {type_name(why)}>"


def describe(exc: BaseException) -> str:
    """Return type and text, such as ``"ValueError: too large"``."""
    return f"{type_name(exc)}: {text_of(exc)}"


def attribute_of(obj: object, name: str, default: Any = None) -> Any:
    """Do as ``getattr`` with a default, which also stands for what raises anything else.

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
    """Return what people call an object: the qualified name of a callable, else its ``repr()``."""
    name = attribute_of(obj, "__qualname__")
    if type(name) is str:
        module = attribute_of(obj, "__module__", "?")
        return f"{module if type(module) is str else '?'}.{name}"
    return repr_of(obj)


def unfinished(value: object) -> str:
    """Say what a coroutine or generator is and what to do instead; ``""``: it is something else."""
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
    """Return what ``repr()`` says, or the beginning of that.

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
    """Let ``traceback`` format an exception.

    Args:
        exc: Any exception.
        tb: Where its traceback begins.

    Returns:
        ``None`` if something in it raises when it is asked what ``traceback`` asks.
    """
    try:
        exc.__traceback__  # noqa: B018 (not asked for here, but by who prints it later)
        return "".join(traceback.format_exception(type(exc), exc, tb))
    except BaseException:
        return None


def format_exception(exc: BaseException, tb: TracebackType | None) -> str:
    """Format any exception with its causes, contexts, notes and members, as ``traceback`` does.

    Args:
        exc: Any exception.
        tb: Where its traceback begins.
    """
    text = try_to_format(exc, tb)
    return format_plainly(exc, tb) if text is None else text


def presentable(exc: BaseException) -> BaseException:
    """Return an exception that can be the cause of another: itself, or one with its text.

    Nobody could print the other one, nor a program end with it in the usual way, if there was
    something in its causes that raises when it is asked what ``traceback`` asks.
    """
    if try_to_format(exc, None) is not None:
        return exc
    return RemoteTraceback(format_plainly(exc, traceback_of(exc)))


def if_not_found(exc: BaseException, advice: str) -> str:
    """Return what to add to an error of unpickling: advice that helps if something is missing."""
    return f"; {advice}" if is_a(exc, (ImportError, AttributeError)) else ""


def format_plainly(exc: BaseException, tb: TracebackType | None) -> str:
    """Format an exception without ``traceback``'s questions."""
    try:
        return "".join(_plainly(exc, tb, set(), 0))
    except BaseException:
        return f"{describe(exc)}\n"  # there is no memory left, for instance


def _plainly(exc: BaseException, tb: TracebackType | None, seen: set[int], depth: int) -> list[str]:
    """Format an exception, asking it for nothing but its text and its notes."""
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
    """Add the lines of source that a traceback's text lacks, where this process has them.

    A worker elsewhere has no copy of the script, and none has the cells of a notebook. Only files
    of modules that are loaded here are looked at, whatever the text says.
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
