"""Handles the client's messages: passes tasks and orders on to the parts that carry them out."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from cloudexec._objects.places import Place
from cloudexec._proto import tasks_pb2 as pb
from cloudexec.worker.blobs import BlobCache
from cloudexec.worker.holdings import Holdings, parked
from cloudexec.worker.outbox import Outbox
from cloudexec.worker.supervisor import SlotPool
from cloudexec.worker.tasks import KILLED, Requirements, WorkItem
from cloudexec.worker.uploads import Uploads

__all__ = ["Inbox", "introduce"]


class Inbox:
    """Handles the client's messages, except for those that end the session.

    Args:
        pool: Runs tasks.
        blobs: The blobs that tasks refer to.
        outbox: Holds outcomes that have not been sent.
        uploads: Sends large results, and is told which of them the client has taken or wants.
    """

    def __init__(self, pool: SlotPool, blobs: BlobCache, outbox: Outbox, uploads: Uploads) -> None:
        self._pool = pool
        self._blobs = blobs
        self._outbox = outbox
        self._uploads = uploads
        self.holdings = Holdings()

    def take(
        self, message: pb.ServerMessage, unacknowledged: Callable[[], Sequence[pb.WorkerMessage]]
    ) -> None:
        """Handle a message.

        Args:
            message: The message.
            unacknowledged: Returns the sent messages that may not have arrived.
        """
        pool = self._pool
        if message.blobs:
            introduce(self._blobs, message.blobs)
        if message.functions:
            pool.add_functions(message.functions)
        if message.HasField("tasks"):
            if message.tasks.tags:
                self._note_tags(message.tasks, unacknowledged)
            pool.add(_items(message.tasks))
        if message.recall:
            pool.recall(list(message.recall))
        if message.kill:
            pool.kill(list(message.kill), KILLED)
        if message.forget_functions:
            pool.forget_functions(list(message.forget_functions))
        if message.forget_blobs:
            self._uploads.forget_blobs(message.forget_blobs)
        if message.taken:
            self._uploads.taken(message.taken)
        if message.wanted:
            self._uploads.deliver_kept(list(message.wanted))
        if message.output_credit and self._outbox.add_credit(message.output_credit):
            pool.resume_output()

    def _note_tags(
        self, tasks: pb.Tasks, unacknowledged: Callable[[], Sequence[pb.WorkerMessage]]
    ) -> None:
        self.holdings.take(tasks)
        if self.holdings.is_full:
            results, failures = parked(unacknowledged())
            said = [*(each[0] for each in results), *(each.lease for each in failures)]
            here = [*self._pool.leases(), *self._outbox.leases(), *tasks.leases]
            self.holdings.keep([*said, *here])


def _items(tasks: pb.Tasks) -> list[WorkItem]:
    leases = list(tasks.leases)
    items = list(
        map(
            WorkItem,
            leases,
            tasks.functions,
            tasks.payloads,
            tasks.numbers,
            tasks.estimates,
        )
    )
    if tasks.timeouts:
        for item, timeout in zip(items, tasks.timeouts, strict=True):
            item.timeout = timeout
    at = 0
    for index, count in zip(tasks.composed, tasks.blob_counts, strict=True):
        items[index].blobs = tuple(tasks.blobs[at : at + count])
        at += count
    for index in tasks.kept:
        items[index].keep = True
    for told in tasks.terms:
        items[told.index].requirements = Requirements(dict(told.env), told.memory_bytes, told.last)
    return items


def introduce(cache: BlobCache, blobs: Sequence[pb.Blob]) -> None:
    """Add the blobs that the client has announced to the cache."""
    for blob in blobs:
        place = None
        if blob.path:
            place = Place(blob.id, blob.size, blob.path, blob.offset, mappable=blob.mappable)
        cache.introduce(
            blob.id,
            blob.size,
            place,
            bucket=blob.bucket,
        )
        if blob.content:
            cache.take(blob.id, blob.content)
