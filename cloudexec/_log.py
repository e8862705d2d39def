"""Loggers that never raise, so that a failing handler cannot end the thread that logs."""

from __future__ import annotations

import logging
import sys
from collections.abc import MutableMapping
from typing import TYPE_CHECKING, Any

from cloudexec._describing import format_exception, is_interrupt, traceback_of
from cloudexec._forked import end_if_forked

if TYPE_CHECKING:
    _Adapter = logging.LoggerAdapter[logging.Logger]
else:
    _Adapter = logging.LoggerAdapter

__all__ = ["Log", "tell"]


class Log(_Adapter):
    """A logger that raises nothing, whatever its handlers and filters raise.

    Most messages are logged on the thread that serves the network, where an exception would leave
    the state half changed.

    Args:
        name: The logger's name.
    """

    def __init__(self, name: str = "cloudexec") -> None:
        super().__init__(logging.getLogger(name))

    def process(
        self, msg: Any, kwargs: MutableMapping[str, Any]
    ) -> tuple[Any, MutableMapping[str, Any]]:
        """Return the arguments unchanged; the base class would replace ``extra``."""
        return msg, kwargs

    def log(self, level: int, msg: object, *args: object, **kwargs: Any) -> None:
        """Log a message; all other methods call this one."""
        try:
            # The record names the caller of the method that called this one.
            self.logger.log(level, msg, *args, stacklevel=2, **kwargs)
            end_if_forked()
        except BaseException as exc:
            end_if_forked(exc)
            if is_interrupt(exc):
                raise
            _tell(exc, msg)

    def log_exception(
        self, message: str, *args: object, exc: BaseException, level: int = logging.ERROR
    ) -> None:
        """Log a message with an exception, even if ``traceback`` cannot format the exception."""
        tb = traceback_of(exc)
        try:
            self.logger.log(level, message, *args, exc_info=(type(exc), exc, tb), stacklevel=2)
            end_if_forked()
            return
        except BaseException as why:
            end_if_forked(why)
            if is_interrupt(why):
                raise
        # The exception itself may have raised, and not a handler: format it safely and try again.
        self.log(level, message + "\n%s", *args, format_exception(exc, tb))


def _tell(exc: BaseException, message: object) -> None:
    """Print to standard error that a message could not be logged, as ``logging`` does."""
    if not logging.raiseExceptions:
        return
    try:
        trace = format_exception(exc, traceback_of(exc))
        print(f"--- Logging error ---\n{trace}Message: {message!r}", file=sys.stderr)
    except BaseException:
        pass  # standard error does not work, either


def tell(line: str) -> None:
    """Log what is done before workers can be launched, and show it on a terminal.

    It may take minutes in which nothing else is to be seen.
    """
    Log().info("%s", line)
    if sys.stderr is not None and sys.stderr.isatty():
        print(f"cloudexec: {line}", file=sys.stderr)
