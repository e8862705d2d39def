"""What the methods that workers call need of one executor: they get this, and never the driver."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

from cloudexec._core.tasks import Task
from cloudexec._future import BatchFuture
from cloudexec._log import Log
from cloudexec._objects.store import Blob, BlobStore
from cloudexec._payload import Composed
from cloudexec._server.bucket import BucketTransfers
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
    """Keeps a task from being sent.

    Attributes:
        was_kept: Whether it was not sent for this.
    """

    __slots__ = ("was_kept",)

    def __init__(self) -> None:
        self.was_kept = False


class Service:
    """One executor, as its workers' calls see it. On the loop thread.

    Args:
        engine: Is told what workers say.
        setup: What each of them is told.
        store: Of blobs.
        sessions: Of those that are enrolled.
        workers: Is told when a worker comes or goes.
        launches: Knows which workers were asked for.
        keeper: Knows which results workers keep.
        futures: Has the futures of all tasks.
        refusals: Counts peers that are turned away.
        output: Shows what tasks print; ``None``: that is not shown.
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
        """Where workers outlive this process, and another one may stand in its place."""
        self.transfers: BucketTransfers | None = None
        """What goes through the bucket, where there is one."""
        self.answers_itself = False
        """Whether workers dial an address of this machine, at the port that is listened on: nobody
        in between answers in its place."""
        self.direct_path = ""
        """Socket on which workers of this machine fetch and deliver; empty: there is none."""
        self.holds: dict[BatchFuture[Any], Hold] = {}
        """Of futures that are being cancelled: their tasks are not to be sent."""
        self.blob_ranges = itertools.count(1)
        """Of the numbers that workers give to their own blobs."""
        self.bytes_sent = 0
        self.bytes_received = 0

    @property
    def compresses(self) -> bool:
        """Whether what goes to and from workers may be compressed."""
        return self.setup.objects.compression and not self.direct_path

    def session_of(self, token: bytes) -> Any:
        """Find the session that a token belongs to, or ``None``."""
        return self.sessions.of_token(token)

    def requirements_of(self, worker: str, task: Task) -> tuple[dict[str, str], int, bool]:
        """Say what a worker must know of a task; see ``requirements.requirements_of``."""
        return requirements_of(self.machine, worker, task)

    def name_of(self, worker: str, lease: int) -> str:
        """Return what people call the task of a lease, or an empty string."""
        return name_at(self.machine, worker, lease)

    def blob_of(self, token: bytes, number: int) -> Blob | None:
        """Find a blob that a worker fetches over its own socket; counts it as sent."""
        session = self.session_of(token)
        blob: Blob | None = None if session is None else session.told.blob(number)
        if blob is None or blob.origin is not None:
            return None  # the worker that has it is no longer there
        self.bytes_sent += blob.size
        return blob

    def expects(self, token: bytes, lease: int) -> bool:
        """Say whether a worker has a lease, so that a result of it is waited for."""
        return self.workers.expects(self.session_of(token), lease)

    def deliver(self, token: bytes, lease: int, delivered: Delivered | Composed) -> None:
        """Take a result that a worker delivered over its own socket."""
        if self.expects(token, lease):
            self.session_of(token).results.delivered[lease] = delivered

    def count_sent(self, size: int) -> None:
        """So many bytes of content have gone to a worker."""
        self.bytes_sent += size

    def transfer_failed(self, session: Any, why: str) -> None:
        """A part of a result has arrived damaged: say so; it is sent again."""
        worker = session.worker_id
        extra = self.engine.fields("transfer_failed", worker=worker, reason=why)
        _logger.warning("a part of a result from %s: %s", worker, why, extra=extra)
