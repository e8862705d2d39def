"""What tasks log reaches the handlers of the client, as it does where processes are forked.

A logger that has handlers there has one here that sends the record on, as JSON, among what the task
prints; levels are those of the client when the worker started. Nothing is added to a record on its
way but which worker and task it comes from. A task, or an initializer, that sets up handlers of its
own has these as well.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["LOG_STREAM", "inherit", "line_of", "state_of_logging"]

LOG_STREAM = 3
"""Beside 1 and 2, standard output and error."""
_MOST_TEXT = 64 * 1024
_formatter = logging.Formatter()


class Forwarder(logging.Handler):
    """Sends records to the client.

    Args:
        send: Takes a record as JSON; false: this is a process that the task has forked, which
            cannot.
    """

    def __init__(self, send: Callable[[bytes], bool], level: int) -> None:
        super().__init__(level)
        self._send = send
        self._last: Any = None  # several loggers above one another may have this handler

    def emit(self, record: logging.LogRecord) -> None:
        """Send one record, once."""
        if record.__dict__.get("_sent_by") == id(self):
            return
        try:
            message = record.getMessage()
            fields = dict(record.__dict__)
            if record.exc_info and not record.exc_text:
                fields["exc_text"] = _formatter.formatException(record.exc_info)
            fields.update(msg=message[:_MOST_TEXT], args=None, exc_info=None)
            if fields["exc_text"]:
                fields["exc_text"] = fields["exc_text"][-_MOST_TEXT:]
            record.__dict__["_sent_by"] = id(self)
            if not self._send(json.dumps(fields, default=str).encode()) and _last_resort:
                _last_resort.handle(record)
        except Exception:
            self.handleError(record)


_last_resort = logging.lastResort


def state_of_logging() -> dict[str, Any]:
    """Return what ``logging`` in workers has to know of this process, as plain values."""
    manager = logging.root.manager
    loggers = {"": logging.root, **manager.loggerDict}
    return {
        "disable": manager.disable,
        "loggers": {
            name: (
                each.level,
                any(type(handler) is not logging.NullHandler for handler in each.handlers),
                bool(each.propagate),
                bool(each.disabled),
            )
            for name, each in loggers.items()
            if isinstance(each, logging.Logger)
            and (each.level or each.handlers or each.disabled or not each.propagate)
        },
    }


def inherit(state: Mapping[str, Any], send: Callable[[bytes], bool]) -> None:
    """Set up ``logging`` in a slot.

    Args:
        state: The client's: see ``state_of_logging()``.
        send: See ``Forwarder``.
    """
    forwarder = Forwarder(send, logging.NOTSET)
    logging.disable(state["disable"])
    logging.lastResort = Forwarder(send, logging.WARNING)
    for name, (level, has_handlers, propagate, disabled) in state["loggers"].items():
        logger = logging.getLogger(name)
        logger.setLevel(level)
        logger.propagate, logger.disabled = propagate, disabled
        if has_handlers:
            logger.addHandler(forwarder)


def line_of(data: bytes) -> bytes:
    """Return a record as a line of text, for the end of a failed task's output."""
    try:
        fields = json.loads(data)
        return f"{fields['levelname']}:{fields['name']}:{fields['msg']}\n".encode()
    except (ValueError, KeyError, TypeError):
        return b""  # a task has sent it by other means than this
