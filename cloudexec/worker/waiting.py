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
        functions: The callables that tasks name.
        blobs: The blobs that tasks and callables refer to.
        answers: Takes tasks that are handed back.
        ready: Called when a task's blobs have arrived, so that it waits for a slot.
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
        """The tasks that wait for a slot, in order; ``Dispatch`` takes them from the head."""
        self.is_draining = False
        """Whether tasks that arrive, or come back from a slot, are handed back at once."""
        self._parked: dict[int, WorkItem] = {}  # by lease: tasks whose blobs are being fetched

    def __len__(self) -> int:
        return len(self.queue) + len(self._parked)

    def add(self, items: list[WorkItem]) -> None:
        """Add tasks, in order; a task whose blobs are missing waits for them."""
        if self.is_draining:  # the client sent them before it knew that this worker drains
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
                return  # the task was taken back
            if error is None:
                self.queue.append(item)
                self._ready()
                return
            self._refuse(item, error)
            self._answers.wake()

        self._blobs.when_ready(needs, ready)

    def _refuse(self, item: WorkItem, error: BaseException) -> None:
        """Fail a task whose blobs cannot be fetched, or hand it back."""
        from cloudexec._errors import PayloadError
        from cloudexec._payload import dumps_exception

        if isinstance(error, PayloadError):
            payload = dumps_exception(error)
            self._answers.failure(Failure(item.lease, UNPICKLE_FAILED, payload))
        else:
            self._answers.returned(item.lease)  # the connection has failed: the client tries again

    def requeue(self, items: list[WorkItem]) -> None:
        """Put tasks that never began back at the head of the queue, or hand them back."""
        back = []
        for item in items:
            if item.recalled or self.is_draining:
                self._answers.returned(item.lease)
            else:
                back.append(item)
        self.queue.extendleft(reversed(back))

    def recall(self, leases: set[int]) -> set[int]:
        """Hand back those of these tasks that wait for a slot, and return their leases.

        Tasks that wait for blobs are dropped without an answer.
        """
        for lease in leases:
            self._parked.pop(lease, None)
        found = [item for item in self.queue if item.lease in leases]
        if found:
            self._return(found)
            self.queue = deque(item for item in self.queue if item.lease not in leases)
        return {item.lease for item in found}

    def drain(self) -> None:
        """Hand back all waiting tasks, and all that arrive from now on."""
        self.is_draining = True
        self._return([*self._parked.values(), *self.queue])
        self._parked.clear()
        self.queue.clear()

    def _return(self, items: Iterable[WorkItem]) -> None:
        for item in items:
            self._answers.returned(item.lease)

    def leases(self) -> list[int]:
        """Return the leases of all waiting tasks."""
        return [*self._parked, *(item.lease for item in self.queue)]

    def blobs(self) -> set[int]:
        """Return the blobs that waiting tasks refer to."""
        return {
            number for item in (*self._parked.values(), *self.queue) for number in item.blobs or ()
        }
