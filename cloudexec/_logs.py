"""Sends the log records of tasks to the handlers of the client, as in a forked process pool.

For each logger that has handlers in the client, the worker's logger of that name has one that sends
the record to the client as JSON, with the output of the task. The levels are those that the client
had when the worker started. The client adds only the worker and the task to a record. A task or an
initializer may set up more handlers in the worker.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

from cloudexec import _plain_json

__all__ = ["LOG_STREAM", "inherit", "line_of", "state_of_logging"]

LOG_STREAM = 3
"""Number of the stream of log records; 1 and 2 are standard output and standard error."""
_MOST_TEXT = 64 * 1024
_formatter = logging.Formatter()


class Forwarder(logging.Handler):
    """Sends records to the client.

    Args:
        send: Sends a record that is given as JSON. It returns False in a process that the task has
            forked, which cannot send.
    """

    def __init__(self, send: Callable[[bytes], bool], level: int) -> None:
        super().__init__(level)
        self._send = send
        # A record passes here again if a parent logger has this handler, too.
        self._last: Any = None

    def emit(self, record: logging.LogRecord) -> None:
        """Send a record unless it is the one that was sent last."""
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
            if not self._send(_plain_json.encode(fields, default=str)) and _last_resort:
                _last_resort.handle(record)
        except Exception:
            self.handleError(record)


_last_resort = logging.lastResort


def state_of_logging() -> dict[str, Any]:
    """Return the state of ``logging`` in this process that workers take over, as plain values."""
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
    """Set up ``logging`` in a slot, the process that runs tasks.

    Args:
        state: The client's state, from ``state_of_logging()``.
        send: Sends a record; see ``Forwarder``.
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
    """Return a record as a line of text, for the output that the error of a task shows."""
    try:
        fields = _plain_json.decode(data)
        return f"{fields['levelname']}:{fields['name']}:{fields['msg']}\n".encode()
    except (ValueError, KeyError, TypeError):
        return b""  # it is no record of ``Forwarder``
