"""What a worker reports to a client that takes it over: the tasks that it holds, and their results.

A program that is killed may run again as another process, with the same journal. Each task that has
a key in the journal is sent with a tag, which means nothing to the worker. If its client is gone,
the worker goes on with those tasks, keeps their outcomes, and reports to the next client the tags
and leases that it holds.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from cloudexec._proto import tasks_pb2 as pb

__all__ = ["Holdings", "parked"]

_PRUNE_AT = 1024


class Holdings:
    """The tags of tasks that this worker has, or whose outcomes may not have arrived."""

    def __init__(self) -> None:
        self._tags: dict[int, bytes] = {}
        self._prune_at = _PRUNE_AT

    @property
    def is_full(self) -> bool:
        """Whether there are so many tags that those of finished tasks should be dropped."""
        return len(self._tags) >= self._prune_at

    def take(self, tasks: pb.Tasks) -> None:
        """Note the tags of received tasks."""
        for lease, tag in zip(tasks.leases, tasks.tags, strict=True):
            if tag:
                self._tags[lease] = tag

    def keep(self, leases: Iterable[int]) -> None:
        """Drop the tags of all tasks except these."""
        tags = self._tags
        self._tags = {lease: tags[lease] for lease in leases if lease in tags}
        self._prune_at = max(_PRUNE_AT, 2 * len(self._tags))

    def __contains__(self, lease: int) -> bool:
        return lease in self._tags

    def message(self) -> pb.Holding:
        """Return the message that reports them."""
        return pb.Holding(leases=list(self._tags), tags=list(self._tags.values()))


def parked(
    messages: Sequence[pb.WorkerMessage],
) -> tuple[list[tuple[int, bytes, float, Sequence[pb.Blob]]], list[pb.Failure]]:
    """Return the outcomes in messages that may not have arrived, to send them again.

    A result whose parts were not in the message is lost: they were sent to the client that is gone.

    Returns:
        Results (lease, payload, seconds, and the parts in the message), and failures.
    """
    results: list[tuple[int, bytes, float, Sequence[pb.Blob]]] = []
    failures: list[pb.Failure] = []
    for message in messages:
        failures.extend(message.failures)
        columns = message.results
        parts: dict[int, Sequence[pb.Blob]] = {}
        at = 0
        for index, count in zip(columns.composed, columns.blob_counts, strict=True):
            parts[index] = columns.blobs[at : at + count]
            at += count
        elsewhere = {*columns.direct, *columns.kept}
        for index, lease in enumerate(columns.leases):
            blobs = parts.get(index, ())
            if index not in elsewhere and all(len(blob.content) == blob.size for blob in blobs):
                outcome = lease, columns.payloads[index], columns.seconds[index], blobs
                results.append(outcome)
    return results, failures
