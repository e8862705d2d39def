"""The tasks of a worker that no slot has yet."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable

from cloudexec.worker.blobs import BlobCache
from cloudexec.worker.functions import Functions
from cloudexec.worker.reporting import Answers
from cloudexec.worker.tasks import UNPICKLE_FAILED, Failure, WorkItem

__all__ = ["WaitingTasks"]


class WaitingTasks:
    """Tasks that wait for a slot, or for the blobs that they refer to.

    Args:
        functions: That tasks name.
        blobs: What tasks and callables refer to.
        answers: Where tasks are handed back.
        ready: Called when a task's blobs have come, and it waits for a slot.
    """

    def __init__(
        self,
        functions: Functions,
        blobs: BlobCache,
        answers: Answers,
        ready: Callable[[], None],
    ) -> None:
        self._functions = functions
        self._blobs = blobs
        self._answers = answers
        self._ready = ready
        self.queue: deque[WorkItem] = deque()
        """In order; ``Dispatch`` takes from its head."""
        self.is_draining = False
        """Whether whatever comes, or comes back from a slot, is handed back at once."""
        self._parked: dict[int, WorkItem] = {}  # their blobs are on the way

    def __len__(self) -> int:
        return len(self.queue) + len(self._parked)

    def add(self, items: list[WorkItem]) -> None:
        """Take tasks, in order; those whose blobs are still to come wait for these."""
        if self.is_draining:  # they were sent before the client had heard of that
            self._return(items)
            self._answers.wake()
            return
        known = self._functions.known
        for item in items:
            if item.blobs is None and not item.function:
                self.queue.append(item)
                continue
            function = known.get(item.function)
            needs = item.blobs or ()
            if function is not None and function.all_blobs:
                needs += function.all_blobs
            if needs and self._blobs.missing(needs):
                self._park(item, needs)
            else:
                self.queue.append(item)

    def _park(self, item: WorkItem, needs: tuple[int, ...]) -> None:
        self._parked[item.lease] = item

        def ready(error: BaseException | None) -> None:
            if self._parked.pop(item.lease, None) is None:
                return  # it was taken back
            if error is None:
                self.queue.append(item)
                self._ready()
                return
            self._refuse(item, error)
            self._answers.wake()

        self._blobs.when_ready(needs, ready)

    def _refuse(self, item: WorkItem, error: BaseException) -> None:
        """Answer for a task whose blobs cannot be had."""
        from cloudexec._errors import PayloadError
        from cloudexec._payload import dumps_exception

        if isinstance(error, PayloadError):
            payload = dumps_exception(error)
            self._answers.failure(Failure(item.lease, UNPICKLE_FAILED, payload))
        else:
            self._answers.returned(item.lease)  # the connection failed: tried again

    def requeue(self, items: list[WorkItem]) -> None:
        """Put items that never began back at the head of the queue, or hand them back."""
        back = []
        for item in items:
            if item.recalled or self.is_draining:
                self._answers.returned(item.lease)
            else:
                back.append(item)
        self.queue.extendleft(reversed(back))

    def recall(self, leases: set[int]) -> set[int]:
        """Hand back those of these that wait for a slot; return which these were.

        Those that wait for blobs are forgotten without a word.
        """
        for lease in leases:
            self._parked.pop(lease, None)
        found = [item for item in self.queue if item.lease in leases]
        if found:
            self._return(found)
            self.queue = deque(item for item in self.queue if item.lease not in leases)
        return {item.lease for item in found}

    def drain(self) -> None:
        """Hand back all, and whatever comes from now on."""
        self.is_draining = True
        self._return([*self._parked.values(), *self.queue])
        self._parked.clear()
        self.queue.clear()

    def _return(self, items: Iterable[WorkItem]) -> None:
        for item in items:
            self._answers.returned(item.lease)

    def leases(self) -> list[int]:
        """Return the leases of all that wait."""
        return [*self._parked, *(item.lease for item in self.queue)]

    def blobs(self) -> set[int]:
        """Return the blobs that these refer to."""
        return {
            number for item in (*self._parked.values(), *self.queue) for number in item.blobs or ()
        }
