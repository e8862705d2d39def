"""Counts peers that were refused, and logs them at intervals."""

from __future__ import annotations

import logging
import math
import time
from collections import Counter

from cloudexec._log import Log
from cloudexec._server.engine import Engine

__all__ = ["Refusals"]

_logger = Log()
_PAUSE = 30.0
"""Seconds in which refusals of one kind are logged once."""


class Refusals:
    """The refusals of one executor, by kind.

    Args:
        engine: The executor's engine.
    """

    def __init__(self, engine: Engine) -> None:
        self.counts: Counter[str] = Counter()
        self._engine = engine
        self._mentioned_at: dict[str, float] = {}

    def add(self, kind: str, what: str) -> None:
        """Count a refused peer or message, and log it unless that kind was logged just before.

        Args:
            kind: The kind of refusal; one of a few constants.
            what: What happened. It must not contain text that the peer has chosen.
        """
        engine = self._engine
        if engine.is_closing or engine.machine.finished:
            return  # the peer only came too late
        self.counts[kind] += 1
        now = time.monotonic()
        if now - self._mentioned_at.get(kind, -math.inf) > _PAUSE:
            self._mentioned_at[kind] = now
            # A worker that was given up and does not know it yet is no reason for a warning.
            late = kind == "no session" and bool(engine.machine.counts["workers_connected"])
            _logger.log(
                logging.DEBUG if late else logging.WARNING,
                "connection refused (%s, %d so far): %s",
                kind,
                self.counts[kind],
                what,
                extra=engine.fields("peer_refused", reason=kind, count=self.counts[kind]),
            )
