"""What goes wrong with functions of AWS Lambda, and how Lambda does what it does."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import cast

from cloudexec.testing._aws.counted import take

__all__ = ["FunctionFaults"]


class FunctionFaults:
    """The faults of AWS Lambda. Every method may be called from any thread, at any time.

    Attributes:
        pending: Seconds for which a new function is Pending.
        inactive: Whether functions have become Inactive, since nobody has used them for weeks: the
            next Invoke of each is refused, and makes it Pending.
        failure: State reason and its code with which new functions become Failed; empty: they
            become Active.
        used_by_others: Invocations that other functions of the account have at once.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kill: Callable[[str], None] = lambda request_id: None
        self.clear()

    def attach(self, kill: Callable[[str], None]) -> None:
        """Take what ends an environment for want of memory, by the invocation that it has."""
        self._kill = kill

    def clear(self) -> None:
        """Undo every fault and choice."""
        self.pending = 0.0
        self.inactive = False
        self.failure = ("", "")
        self.used_by_others = 0
        self.code_storage = 75 * 2**30
        """Bytes that all archives of the account may have. "Lambda quotas", AWS Lambda Developer
        Guide."""
        self.concurrency: int | None = None
        """Invocations that the account may have at once; ``None``: the usual number."""
        self._refusals: list[list[object]] = []
        self._twice: list[list[object]] = []
        self._late: list[list[object]] = []
        self._broken: list[list[object]] = []

    def create_fails(self, message: str, code: str, count: int | None = None) -> None:
        """Let CreateFunction be refused.

        Args:
            message: AWS's words.
            code: The code of the error, such as ``"InvalidParameterValueException"``.
            count: How many calls; ``None``: all.
        """
        with self._lock:
            self._refusals.append([(message, code), count])

    def deliver_twice(self, count: int | None = None, *, after: float = 0.0) -> None:
        """Let events be delivered a second time, to another environment.

        Args:
            count: How many events; ``None``: all.
            after: Seconds between the two.
        """
        with self._lock:
            self._twice.append([(after,), count])

    def deliver_late(self, seconds: float, count: int | None = None) -> None:
        """Let events be delivered late, and more than a minute late, too.

        Args:
            seconds: How late.
            count: How many events; ``None``: all.
        """
        with self._lock:
            self._late.append([seconds, count])

    def starts_fail(self, count: int | None = None) -> None:
        """Let environments end before they ask for an event.

        Args:
            count: How many environments; ``None``: all.
        """
        with self._lock:
            self._broken.append([True, count])

    def out_of_memory(self, request_id: str) -> None:
        """End an environment, as it has run out of memory.

        Args:
            request_id: Of the invocation that runs there.
        """
        self._kill(request_id)

    # What the emulation asks.

    def refusal(self) -> tuple[str, str] | None:
        """Return with which words and code CreateFunction is refused, and count it."""
        with self._lock:
            return cast("tuple[str, str] | None", take(self._refusals, lambda _: True))

    def second_delivery(self) -> float | None:
        """Return after how many seconds this event comes again; ``None``: it does not."""
        with self._lock:
            found = take(self._twice, lambda _: True)
            return None if found is None else cast("tuple[float]", found)[0]

    def delay(self) -> float:
        """Return how late this event is delivered."""
        with self._lock:
            return cast("float", take(self._late, lambda _: True) or 0.0)

    def start_fails(self) -> bool:
        """Say whether this environment ends at once, and count it."""
        with self._lock:
            return bool(take(self._broken, lambda _: True))
