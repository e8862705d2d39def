"""Peers that were turned away: counted, and mentioned now and then."""

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
"""Seconds in which peers that are turned away for the same reason are mentioned once."""


class Refusals:
    """What was refused, by kind.

    Args:
        engine: Whose workers dial.
    """

    def __init__(self, engine: Engine) -> None:
        self.counts: Counter[str] = Counter()
        self._engine = engine
        self._mentioned_at: dict[str, float] = {}

    def add(self, kind: str, what: str) -> None:
        """A peer, or what it sent, was turned away.

        Counted, and logged at the first of each kind and now and then of those that follow, however
        many they are.

        Args:
            kind: Of what it did; one of a few.
            what: What happened, with nothing in it that a peer may choose at will.
        """
        engine = self._engine
        if engine.is_closing or engine.machine.finished:
            return  # it came too late, that is all
        self.counts[kind] += 1
        now = time.monotonic()
        if now - self._mentioned_at.get(kind, -math.inf) > _PAUSE:
            self._mentioned_at[kind] = now
            # A worker that was given up, and does not know it yet, is nothing to warn of.
            late = kind == "no session" and bool(engine.machine.counts["workers_connected"])
            _logger.log(
                logging.DEBUG if late else logging.WARNING,
                "connection refused (%s, %d so far): %s",
                kind,
                self.counts[kind],
                what,
                extra=engine.fields("peer_refused", reason=kind, count=self.counts[kind]),
            )
