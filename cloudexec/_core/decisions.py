"""What an event leads to: the commands that answer it, and when to look again.

Each component adds to these. Only the machine takes them out, so nothing is decided by what was
decided before.
"""

from __future__ import annotations

from collections import Counter

from cloudexec._core.commands import Command

__all__ = ["Decisions"]


class Decisions:
    """What the components have decided.

    Attributes:
        commands: The answer to the event at hand; always the same list.
        counts: What has happened so far, and how often.
        deadline: When to send ``DeadlinePassed`` at the latest; ``None``: not needed.
        not_before: No deadline is earlier than this.
    """

    __slots__ = ("commands", "counts", "deadline", "not_before")

    def __init__(self) -> None:
        self.commands: list[Command] = []
        self.counts: Counter[str] = Counter()
        self.deadline: float | None = None
        self.not_before = 0.0

    def take(self) -> list[Command]:
        """Hand over the commands: they hold results, which are not ours to keep alive."""
        taken = self.commands[:]
        self.commands.clear()
        return taken

    def remind(self, at: float) -> None:
        """Have everything looked at again at this time, or before."""
        if at < self.not_before:
            at = self.not_before
        if self.deadline is None or at < self.deadline:
            self.deadline = at
