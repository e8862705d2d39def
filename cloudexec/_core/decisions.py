"""The results of handling an event: the commands that answer it, facts, and the next deadline.

Each component adds to these. Only the machine reads them, so that no decision depends on an earlier
one.
"""

from __future__ import annotations

from collections import Counter

from cloudexec._core.commands import Command
from cloudexec._core.facts import Fact, OutcomesDropped

__all__ = ["Decisions"]


class Decisions:
    """The decisions of the components.

    Attributes:
        commands: The commands that answer the present event; always the same list.
        facts: What became of tasks and workers, until it is taken; always the same list.
        counts: How often each kind of event has happened so far, for statistics.
        deadline: The latest time for ``DeadlinePassed``; ``None`` if it is not needed.
        not_before: The earliest time of a deadline.
    """

    __slots__ = ("_dropped", "commands", "counts", "deadline", "facts", "not_before")

    def __init__(self) -> None:
        self.commands: list[Command] = []
        self.facts: list[Fact] = []
        self.counts: Counter[str] = Counter()
        self.deadline: float | None = None
        self.not_before = 0.0
        self._dropped = 0

    def take(self) -> list[Command]:
        """Return the commands and clear the list, as commands would keep results alive."""
        taken = self.commands[:]
        self.commands.clear()
        return taken

    def state_dropped(self) -> None:
        """State how many outcomes were dropped since the last call, because they came too late."""
        count = self.counts["duplicates"] - self._dropped
        if count:
            self._dropped += count
            self.facts.append(OutcomesDropped(count))

    def remind(self, at: float) -> None:
        """Set a deadline, unless there is an earlier one."""
        if at < self.not_before:
            at = self.not_before
        if self.deadline is None or at < self.deadline:
            self.deadline = at
