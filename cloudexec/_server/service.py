"""The part of an executor that the workers' calls may use; they never see the driver."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

from cloudexec._core.tasks import Task
from cloudexec._future import BatchFuture
from cloudexec._log import Log
from cloudexec._objects.store import Blob, BlobStore
from cloudexec._records import Composed
from cloudexec._server.bucket import BucketTransfers
from cloudexec._server.dialed import Dialed
from cloudexec._server.direct import Delivered
from cloudexec._server.engine import Engine
from cloudexec._server.futures import Futures
from cloudexec._server.keeper import Keeper
from cloudexec._server.launches import Launches
from cloudexec._server.output import OutputThread
from cloudexec._server.refusals import Refusals
from cloudexec._server.requirements import name_at, requirements_of
from cloudexec._server.sessions import Sessions
from cloudexec._server.submission import Setup
from cloudexec._server.workers import Workers

if TYPE_CHECKING:
    from cloudexec._server.takeover import Takeover

__all__ = ["Hold", "Service"]

_logger = Log()


class Hold:
    """Keeps a task from being sent while ``cancel()`` decides about it.

    Attributes:
        was_kept: Whether the task would have been sent and was kept back.
    """

    __slots__ = ("was_kept",)

    def __init__(self) -> None:
        self.was_kept = False


class Service:
    """One executor, as its workers' calls see it. Used on the loop thread only.

    Args:
        engine: The engine, which is fed with what workers report.
        setup: The settings that each worker receives.
        store: The client's blobs.
        sessions: The sessions of enrolled workers.
        workers: Is told when a worker connects or is lost.
        launches: Knows which workers were launched.
        keeper: Looks after results that stay on workers.
        futures: The futures of all tasks.
        refusals: Counts peers that are refused.
        output: Shows what tasks print; ``None`` if that is not shown.
    """

    def __init__(
        self,
        *,
        engine: Engine,
        setup: Setup,
        store: BlobStore,
        sessions: Sessions,
        workers: Workers,
        launches: Launches,
        keeper: Keeper,
        futures: Futures,
        refusals: Refusals,
        output: OutputThread | None,
    ) -> None:
        self.engine = engine
        self.machine = engine.machine
        self.portal = engine.portal
        self.feed = engine.feed
        self.create_task = engine.create_task
        self.setup = setup
        self.store = store
        self.sessions = sessions
        self.workers = workers
        self.launches = launches
        self.keeper = keeper
        self.initializer_failed = futures.initializer_failed
        self.refused = refusals.add
        self.output = output
        self.takeover: Takeover | None = None
        """Takes over workers of an earlier process; ``None`` if workers do not survive theirs."""
        self.transfers: BucketTransfers | None = None
        """What goes through the bucket, where there is one."""
        self.dialed: Dialed | None = None
        """What workers dial, if the port is the one that is listened on."""
        self.direct_path = ""
        """Path of the direct channel's socket; empty if workers are on other machines."""
        self.holds: dict[BatchFuture[Any], Hold] = {}
        """Futures that are being cancelled, whose tasks must not be sent."""
        self.blob_ranges = itertools.count(1)
        """Counts the ranges of numbers that workers give to their own blobs."""
        self.bytes_sent = 0
        self.bytes_received = 0

    @property
    def compresses(self) -> bool:
        """Whether blobs to and from workers may be compressed."""
        return self.setup.objects.compression and not self.direct_path

    def session_of(self, token: bytes) -> Any:
        """Return the session that a token belongs to, or ``None``."""
        return self.sessions.of_token(token)

    def requirements_of(self, worker: str, task: Task) -> tuple[dict[str, str], int, bool]:
        """Say what a worker must know of a task; see ``requirements.requirements_of``."""
        return requirements_of(self.machine, worker, task)

    def name_of(self, worker: str, lease: int) -> str:
        """Return the name of the task of a lease, or an empty string."""
        return name_at(self.machine, worker, lease)

    def blob_of(self, token: bytes, number: int) -> Blob | None:
        """Return a blob that a worker fetches through the direct channel; count it as sent."""
        session = self.session_of(token)
        blob: Blob | None = None if session is None else session.told.blob(number)
        if blob is None or blob.origin is not None:
            return None  # the blob is not here: the worker that kept it is gone
        self.bytes_sent += blob.size
        return blob

    def expects(self, token: bytes, lease: int) -> bool:
        """Say whether a worker holds a lease, so that its result is expected."""
        return self.workers.expects(self.session_of(token), lease)

    def deliver(self, token: bytes, lease: int, delivered: Delivered | Composed) -> None:
        """Take a result that a worker delivered through the direct channel."""
        if self.expects(token, lease):
            self.session_of(token).results.delivered[lease] = delivered

    def count_sent(self, size: int) -> None:
        """Count bytes of content that were sent to a worker."""
        self.bytes_sent += size

    def transfer_failed(self, session: Any, why: str) -> None:
        """Log that a part of a result arrived damaged; the worker sends it again."""
        worker = session.worker_id
        extra = self.engine.fields("transfer_failed", worker=worker, reason=why)
        _logger.warning("a part of a result from %s: %s", worker, why, extra=extra)
