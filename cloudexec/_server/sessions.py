"""The sessions of enrolled workers, found by the worker's id, by its launch or by its token."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, ValuesView
from typing import Any

__all__ = ["Sessions"]


class Sessions:
    """The sessions of one executor's workers. Used on the loop thread only."""

    def __init__(self) -> None:
        self._by_worker: dict[str, Any] = {}
        self._by_identity: dict[str, Any] = {}
        self._by_token: dict[bytes, Any] = {}
        # By the number of a function or, negative, of a blob: the workers that know it, and must be
        # told when it is not used any more. These are few among thousands of workers.
        self._told: dict[int, list[str]] = {}

    def __getitem__(self, worker: str) -> Any:
        return self._by_worker[worker]

    def get(self, worker: str) -> Any:
        """Return the session of a worker, or ``None``."""
        return self._by_worker.get(worker)

    def values(self) -> ValuesView[Any]:
        """Return all sessions."""
        return self._by_worker.values()

    def __contains__(self, worker: str) -> bool:
        return worker in self._by_worker

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_worker)

    def __len__(self) -> int:
        return len(self._by_worker)

    def of_launch(self, identity: str) -> Any:
        """Return the session of the worker of a launch, or ``None``."""
        return self._by_identity.get(identity)

    def of_token(self, token: bytes) -> Any:
        """Return the session that a token belongs to, or ``None``."""
        # The timing of a look-up in a hash table does not help to guess 16 random bytes.
        return self._by_token.get(token)

    def add(self, session: Any) -> None:
        """Add the session of a worker that has proved who it is."""
        self._by_worker[session.worker_id] = session
        self._by_identity[session.identity] = session
        self._by_token[session.token] = session

    def remove(self, session: Any) -> bool:
        """Remove a session; say whether it was there."""
        if self.get(session.worker_id) is not session:
            return False
        del self._by_worker[session.worker_id]
        del self._by_identity[session.identity], self._by_token[session.token]
        return True

    def note_told(self, worker: str, number: int) -> None:
        """Note that a worker knows a function or, by a negative number, a blob."""
        self._told.setdefault(number, []).append(worker)

    def forget(self, ended: Iterable[int]) -> None:
        """Tell workers to drop functions and, by negative numbers, blobs that they know."""
        told: dict[str, list[int]] = {}
        for number in ended:
            for worker in self._told.pop(number, ()):
                told.setdefault(worker, []).append(number)
        for worker, numbers in told.items():
            session = self._by_worker.get(worker)
            if session is not None:
                session.told.forget_functions([number for number in numbers if number > 0])
                session.told.forget_blobs([-number for number in numbers if number < 0])
