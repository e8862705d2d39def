"""The sessions of the workers that are enrolled, by every name that they are looked up by."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, ValuesView
from typing import Any

__all__ = ["Sessions"]


class Sessions:
    """Sessions by the id of their worker. On the loop thread."""

    def __init__(self) -> None:
        self._by_worker: dict[str, Any] = {}
        self._by_identity: dict[str, Any] = {}
        self._by_token: dict[bytes, Any] = {}
        # Of functions, and of blobs as negative numbers: which workers are to hear of their end.
        # Among thousands, those are few.
        self._told: dict[int, list[str]] = {}

    def __getitem__(self, worker: str) -> Any:
        return self._by_worker[worker]

    def get(self, worker: str) -> Any:
        """Find the session of a worker, or ``None``."""
        return self._by_worker.get(worker)

    def values(self) -> ValuesView[Any]:
        """Return all of them."""
        return self._by_worker.values()

    def __contains__(self, worker: str) -> bool:
        return worker in self._by_worker

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_worker)

    def __len__(self) -> int:
        return len(self._by_worker)

    def of_launch(self, identity: str) -> Any:
        """Find the session of the worker of a launch, or ``None``."""
        return self._by_identity.get(identity)

    def of_token(self, token: bytes) -> Any:
        """Find the session that a token belongs to, or ``None``."""
        # A hash table gives away less by its timing than it takes to guess 16 random bytes.
        return self._by_token.get(token)

    def add(self, session: Any) -> None:
        """Take in the session of a worker that has proved who it is."""
        self._by_worker[session.worker_id] = session
        self._by_identity[session.identity] = session
        self._by_token[session.token] = session

    def remove(self, session: Any) -> bool:
        """Forget a session; say whether it was there."""
        if self.get(session.worker_id) is not session:
            return False
        del self._by_worker[session.worker_id]
        del self._by_identity[session.identity], self._by_token[session.token]
        return True

    def note_told(self, worker: str, number: int) -> None:
        """A worker is told of a function or, as a negative number, of a blob."""
        self._told.setdefault(number, []).append(worker)

    def forget(self, ended: Iterable[int]) -> None:
        """Tell workers of functions and, as negative numbers, of blobs that have ended."""
        told: dict[str, list[int]] = {}
        for number in ended:
            for worker in self._told.pop(number, ()):
                told.setdefault(worker, []).append(number)
        for worker, numbers in told.items():
            session = self._by_worker.get(worker)
            if session is not None:
                session.told.forget_functions([number for number in numbers if number > 0])
                session.told.forget_blobs([-number for number in numbers if number < 0])
