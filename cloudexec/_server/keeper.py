"""Looks after results that stay on the workers that made them (``keep=True``).

A kept result is brought to the client when it is needed there, from its worker or the bucket. If
its worker is lost, the task that made it runs again. A worker that ends hands over its kept results
before.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from cloudexec import _payload, _records
from cloudexec._core import events
from cloudexec._core.events import Failure, FailureKind
from cloudexec._describing import cause_of, describe, is_interrupt, presentable
from cloudexec._errors import CloudexecError, PayloadError, RefLostError
from cloudexec._future import BatchFuture, Owner
from cloudexec._objects.places import FileSource, open_shared
from cloudexec._objects.ref import Ref
from cloudexec._objects.store import Blob, BlobStore
from cloudexec._proto import tasks_pb2 as pb
from cloudexec._records import Composed, Payload
from cloudexec._server.bucket import BucketTransfers
from cloudexec._server.engine import Engine
from cloudexec._server.sessions import Sessions
from cloudexec._server.splicing import Spliced
from cloudexec._server.submission import Submission

__all__ = ["Keeper", "Recipe"]

_FAR_BYTES = 256 * 1024
"""Bytes: a task prefers workers that have a blob of at least this size among its arguments."""
_NOWHERE = "bucket"
"""Stands for the worker in ``Blob.origin``, if only the bucket has the blob."""
_PULL_TIMEOUT = 60.0
"""Seconds within which a worker that is asked for a kept result must make progress."""
_EVACUATION = 30.0
"""Seconds that a worker which is about to end has to hand over its kept results."""


class Recipe:
    """The function and arguments of a task, to compute its kept result again.

    If an argument is itself a kept result that can be computed again, the recipe refers to that
    one's recipe and not to the result. Otherwise a long chain of kept results would stay in memory
    for as long as the last one is needed.

    Args:
        task: The task that made the result, while it still has its function and payload.
    """

    __slots__ = ("_call", "_inputs", "_made", "function", "requirements", "retries", "stats")

    def __init__(self, task: Submission) -> None:
        self.function = task.function
        self.stats = task.stats
        self.retries = task.retries
        self.requirements = task.requirements
        self._made: weakref.ref[Composed] | None = None  # the result, as long as it is in use
        self._inputs: tuple[Payload | Recipe, ...] | None = None
        if isinstance(task.payload, Spliced):
            self._call: Any = task.payload.call
            self._inputs = tuple(map(_way_to, task.payload.inputs))
        else:
            self._call = task.payload

    def payload(self, store: BlobStore) -> Any:
        """Return the task's payload, in which dropped results are represented by lost blobs."""
        if self._inputs is None:
            return self._call
        inputs = [
            each._result(store) if isinstance(each, Recipe) else each for each in self._inputs
        ]
        return Spliced(self._call, inputs)

    def _result(self, store: BlobStore) -> Composed:
        made = None if self._made is None else self._made()
        if made is None:
            made = Composed(b"", (store.nothing(),))
            made.shared = True
            made.recipe = self
            self._made = weakref.ref(made)
        return made


def _way_to(part: Payload) -> Payload | Recipe:
    """Return the recipe of a part of a payload, or the part itself if it has none."""
    if type(part) is not Composed or part.recipe is None:
        return part
    if not part.blobs:
        part.recipe = None  # it is so small that it is in the client, and cannot be lost
        return part
    recipe: Recipe = part.recipe
    recipe._made = weakref.ref(part)
    return recipe


class Keeper:
    """The kept results of one executor's workers.

    Used on the loop thread, except for the methods that ``Ref`` calls.

    Args:
        engine: The executor's engine.
        sessions: The sessions of its workers.
        store: The client's blobs.
        owner: The owner of the futures of tasks that run again.
        numbers: Numbers tasks.
        finished: Set when the executor has ended.
    """

    def __init__(
        self,
        engine: Engine,
        sessions: Sessions,
        store: BlobStore,
        owner: Owner,
        numbers: Iterator[int],
        finished: threading.Event,
    ) -> None:
        self.is_far = not store.shared
        self.one_machine = False
        """Whether all workers are on this machine, and may open each other's kept results."""
        self.transfers: BucketTransfers | None = None
        """Transfers through the bucket, if there is one."""
        self._engine = engine
        self._sessions = sessions
        self._store = store
        self._owner = owner
        self._numbers = numbers
        self._finished = finished
        self._pulls: dict[int, asyncio.Future[None]] = {}
        self._remaking: dict[Composed, asyncio.Future[BaseException | None]] = {}
        self._downloading: set[int] = set()

    # Called by Ref, in any thread.

    def value_of(self, payload: Payload, timeout: float | None) -> Any:
        """Load the value of a handle; ``Ref.get`` lists the errors."""
        if type(payload) is bytes:
            return _loaded(lambda: _payload._loads(payload))
        assert isinstance(payload, Composed)
        if not any(blob.origin or blob.lost for blob in payload.blobs):
            return _loaded(payload.load)
        if self._engine.portal.is_this_thread:
            raise RuntimeError("Ref.get() would wait for the thread that it is called in")
        try:
            running = self._engine.portal.run(self._sources(payload))
        except RuntimeError as exc:
            raise self._gone() from exc
        try:
            head, sources = running.result(timeout)
        except concurrent.futures.CancelledError as exc:
            raise self._gone() from exc
        except TimeoutError:
            running.cancel()
            raise
        except _MadeAgainError as exc:
            raise exc.error from cause_of(exc.error)
        return _loaded(lambda: _records.load_composed(head, sources.__getitem__))

    def _gone(self) -> RefLostError:
        return RefLostError(
            "what the Ref stands for was kept on a worker, and the executor has shut down: call "
            "get() before that"
        )

    def payload_of(self, ref: Ref[Any]) -> Payload:
        """Return the payload of a handle that is among the arguments of a call.

        Raises:
            RefLostError: If the handle belongs to another executor, and its value is lost.
        """
        payload = ref._payload
        if ref._keeper is self:
            return payload
        if ref._keeper is None:  # this executor runs inside a task, and the handle came to the task
            return _payload.dumps(ref.get(), self._store)
        if type(payload) is bytes:
            return payload
        assert isinstance(payload, Composed)
        ref._keeper.parts_of(payload)
        return self.copy_of(payload)

    def has(self, payload: Composed) -> bool:
        """Say whether a payload belongs to this executor, whose workers know its blobs' numbers."""
        store = self._store
        return all(store.has(blob) for blob in payload.blobs)

    def copy_of(self, payload: Composed) -> Composed:
        """Copy the payload of another executor of this process into this executor's store.

        Raises:
            PayloadTooLargeError: If the store has no room for it.
        """
        blobs = tuple([self._store.intern(blob.view()) for blob in payload.blobs])
        return Composed(payload.head, blobs, payload.numbers)

    def is_gone(self, payload: Payload) -> bool:
        """Say whether a handle's value is lost and cannot be computed again; for any thread."""
        if type(payload) is bytes:
            return False
        assert isinstance(payload, Composed)
        ended = self._finished.is_set()
        return any(
            (blob.origin and ended) or (blob.lost and (ended or payload.recipe is None))
            for blob in payload.blobs
        )

    def note_inputs(self, task: Any) -> None:
        """Tell the core which blobs among a task's arguments are on particular workers."""
        # Blobs that are on a worker only count at any size: they may be lost, or must be brought.
        task.inputs = tuple(
            [
                blob
                for blob in _blobs_of(task.payload)
                if blob.origin or blob.lost or (self.is_far and blob.size >= _FAR_BYTES)
            ]
        )

    def parts_of(self, payload: Payload) -> tuple[bytes, bytes | None, list[Any]]:
        """Return the parts of a pickled handle: the head, and its blobs' numbers and contents."""
        if type(payload) is bytes:
            return payload, None, []
        assert isinstance(payload, Composed)
        if any(blob.origin or blob.lost for blob in payload.blobs):
            try:
                bringing = self._engine.portal.run(self._bring(payload))
            except RuntimeError as exc:
                raise self._gone() from exc
            try:
                bringing.result()
            except concurrent.futures.CancelledError as exc:
                raise self._gone() from exc
            except _MadeAgainError as exc:
                raise exc.error from cause_of(exc.error)
        views = [blob.view() for blob in payload.blobs]
        return payload.head, _payload.pack_numbers(payload), views

    # On the loop thread.

    async def _sources(self, payload: Composed) -> tuple[bytes, dict[int, Any]]:
        """Return a payload's head, and a source for each of its blobs on this machine."""
        while True:
            sources: dict[int, Any] = {}
            try:
                for number, blob in zip(payload.numbers, payload.blobs, strict=True):
                    if blob.lost:
                        raise FileNotFoundError
                    if blob.origin is None:
                        sources[number] = blob
                    elif blob.place is not None:
                        sources[number] = FileSource(blob.place)
                    else:
                        await self.pull(blob)
                        sources[number] = blob
            except FileNotFoundError:
                await self._make_again(payload)
            else:
                return payload.head, sources

    async def _bring(self, payload: Composed) -> None:
        """Bring all blobs of a payload to the client."""
        while True:
            try:
                for blob in payload.blobs:
                    await self.pull(blob)
            except FileNotFoundError:
                await self._make_again(payload)
            else:
                return

    def pull(self, blob: Blob) -> asyncio.Future[None]:
        """Bring a blob to the client, from the worker that keeps it or from the bucket.

        Returns:
            A future that is done when the blob is here. It fails with ``FileNotFoundError`` if the
            blob is lost, and with ``PayloadError`` if it cannot be taken.
        """
        loop = self._engine.portal.loop
        pulling = self._pulls.get(blob.id)
        if pulling is not None and not pulling.done():
            return pulling
        pulling = loop.create_future()
        # The caller may be gone when this fails: mark the exception as retrieved.
        pulling.add_done_callback(lambda done: None if done.cancelled() else done.exception())
        session = self._sessions.get(blob.origin or "")
        if blob.origin is not None and blob.stored and self.transfers is not None:
            self._pulls[blob.id] = pulling
            self._engine.create_task(self._download(blob))
        elif blob.lost or (blob.origin is not None and session is None):
            pulling.set_exception(FileNotFoundError())
        elif blob.origin is None:
            pulling.set_result(None)
        elif blob.place is not None:
            try:
                self._open(blob)
            except (FileNotFoundError, ProcessLookupError, PermissionError):
                pulling.set_exception(FileNotFoundError())
            except OSError as exc:  # the blob exists: the task must not run again for this
                pulling.set_exception(PayloadError(f"a kept result is there, and: {exc}"))
            except PayloadError as exc:
                pulling.set_exception(exc)
            else:
                pulling.set_result(None)
        else:
            self._pulls[blob.id] = pulling
            assert session is not None
            session.want(blob)
            self._look_later(_PULL_TIMEOUT, blob, session, loop.time())
        return pulling

    def _look_later(self, pause: float, blob: Blob, session: Any, asked_at: float) -> None:
        loop = self._engine.portal.loop
        timer = loop.call_later(pause, self._look_after, blob, session, asked_at)
        # The timer refers to the blob, and must not keep it alive once it is here.
        self._pulls[blob.id].add_done_callback(lambda _: timer.cancel())

    def _look_after(self, blob: Blob, session: Any, asked_at: float) -> None:
        """Treat a blob as lost if its worker is connected but makes no progress."""
        pulling = self._pulls.get(blob.id)
        if pulling is None or pulling.done():
            return
        loop = self._engine.portal.loop
        now = loop.time()
        # Progress with any blob counts, because this one may wait behind others.
        since = now if session.is_cut else max(asked_at, session.progress_at)
        if now < since + _PULL_TIMEOUT:
            self._look_later(since + _PULL_TIMEOUT - now, blob, session, asked_at)
            return
        blob.lost = True
        self.failed(blob.id)

    async def _download(self, blob: Blob) -> None:
        """Bring a blob from the bucket or, if that fails, from its worker."""
        transfers = self.transfers
        assert transfers is not None
        if blob.id in self._downloading:
            return
        self._downloading.add(blob.id)
        try:
            content = await transfers.download(blob)
        except (PayloadError, OSError) as exc:
            pulling = self._pulls.pop(blob.id, None)
            if pulling is not None and not pulling.done():
                pulling.set_exception(exc)
        except CloudexecError as exc:
            transfers.lost(blob, exc)
            session = self._sessions.get(blob.origin or "")
            if session is not None:
                session.want(blob)
            else:
                blob.lost = True
                self.failed(blob.id)
        else:
            self.arrived(blob.id, content, blob)
        finally:
            self._downloading.discard(blob.id)

    def _open(self, blob: Blob) -> None:
        """Take over a blob from the file of a worker on this machine."""
        place, store = blob.place, self._store
        assert place is not None
        if place.mappable:
            other = store.take_over(blob.size, fd=open_shared(place), spill=True)
        else:
            other = store.take_over(blob.size, content=FileSource(place).buffer(), spill=True)
        self._adopt(blob, other)

    def _adopt(self, blob: Blob, other: Blob) -> None:
        keeping = self._sessions.get(blob.origin or "")
        if keeping is not None:
            keeping.release([blob])  # the worker may drop it, and need not stay alive for it
        self._store.adopt(blob, other)
        for session in self._sessions.values():
            session.told.moved(blob.id)

    def waits_for(self, number: int, size: int, session: Any) -> bool:
        """Say whether a worker was asked for a blob of this size."""
        blob = session.told.blob(number)
        return number in self._pulls and blob is not None and blob.size == size

    def arrived(self, number: int, content: Blob, blob: Blob | None) -> None:
        """Note that a blob which was asked for has arrived.

        Args:
            number: The blob's number.
            content: A new blob that holds the content.
            blob: The blob itself; ``None`` if it is not used any more.
        """
        pulling = self._pulls.pop(number, None)
        if pulling is None:
            return
        if blob is not None and blob.origin is not None:
            self._adopt(blob, content)
        if not pulling.done():
            pulling.set_result(None)

    def failed(self, number: int, error: BaseException | None = None) -> None:
        """Note that a blob which was asked for did not arrive; without an error, it is lost."""
        pulling = self._pulls.pop(number, None)
        if pulling is not None and not pulling.done():
            pulling.set_exception(FileNotFoundError() if error is None else error)

    def worker_lost(self, worker: str, blobs: Iterable[Blob]) -> None:
        """Note that a worker is gone, and with it the blobs that only it had."""
        for blob in blobs:
            blob.workers.discard(worker)
            if blob.origin == worker and blob.stored:
                blob.origin = _NOWHERE
                if blob.id in self._pulls:
                    self._engine.create_task(self._download(blob))
            elif blob.origin == worker:
                blob.lost = True
                self.failed(blob.id)

    async def evacuate(self, session: Any) -> None:
        """Bring the kept results of a worker that is about to end, unless none can be needed."""
        session.ending = True
        kept = session.told.kept_blobs()
        machine = self._engine.machine
        if kept and (machine.open_tasks or machine.blocked or not machine.shutting_down):
            pulls = [self.pull(blob) for blob in kept if not blob.stored]
            done = asyncio.gather(*pulls, return_exceptions=True)
            try:
                async with asyncio.timeout(_EVACUATION):
                    await done
            except TimeoutError:
                pass
            for blob in kept:
                if blob.origin is not None and blob.stored:
                    blob.origin = _NOWHERE
        # The worker ends after this message; until then other workers may still read its results.
        session.release(kept)

    # Tasks whose arguments are lost or far away.

    def is_at_hand(self, payload: Payload | Spliced, worker: str) -> bool:
        """Say whether a worker can get all blobs of a payload, so that the task can be sent."""
        shared = self.one_machine
        for blob in _blobs_of(payload):
            near = blob.origin in (None, worker) or shared or blob.stored
            if blob.lost or not near:
                return False
        return True

    def supply(self, task: Any, worker: str, lease: int) -> None:
        """Let a task wait until its arguments have been brought to the client."""
        payload = task.payload
        failure = Failure(FailureKind.INPUT_LOST, pb.Failure(lease=lease))
        self._engine.feed(events.FailuresReceived(worker, [(lease, failure)]))
        self._engine.create_task(self._supply(task, worker, payload, failure))

    async def _supply(
        self, task: Any, worker: str, payload: Payload | Spliced, failure: Failure
    ) -> None:
        try:
            for part in _parts_of(payload):
                await self._bring(part)
        except BaseException as exc:
            error = exc.error if type(exc) is _MadeAgainError else exc
            failure.detail.payload = _payload.dumps_exception(error)
            self._engine.feed(events.FailureJudged(worker, task, failure, again=False))
            if not isinstance(exc, Exception):
                raise
        else:
            self._engine.feed(events.InputsRestored([task]))

    async def _make_again(self, payload: Composed) -> None:
        """Run the task whose kept result was lost again.

        Raises:
            RefLostError: If the task must not run again, or the executor has shut down.
            _MadeAgainError: If the task fails this time; it carries the task's exception.
        """
        remaking = self._remaking.get(payload)
        if remaking is None:
            recipe: Recipe | None = payload.recipe
            if self._engine.machine.finished:
                raise self._gone()
            if recipe is None:
                raise RefLostError(
                    "a result was kept on a worker that is gone, and it is not made again "
                    "(on_loss='raise', or it was not a task's)"
                )
            remaking = self._engine.portal.loop.create_future()
            self._remaking[payload] = remaking
            self._submit(payload, recipe)
        error = await asyncio.shield(remaking)
        if error is not None:
            raise _MadeAgainError(error)

    def _submit(self, payload: Composed, recipe: Recipe) -> None:
        future: BatchFuture[Any] = BatchFuture(self._owner)
        task = Submission(
            next(self._numbers),
            recipe.stats,
            future,
            recipe.function,
            recipe.payload(self._store),
            recipe.retries,
            recipe.requirements,
        )
        future._task = task

        def done(made: Any) -> None:  # takes the future as an argument, to avoid a reference cycle
            try:
                self._engine.portal.post(self._made_again, payload, made)
            except RuntimeError:
                pass  # the loop has closed

        future.add_done_callback(done)
        self.note_inputs(task)  # its arguments may be lost, too
        self._engine.feed(events.TasksSubmitted([task]))

    def _made_again(self, payload: Composed, future: BatchFuture[Any]) -> None:
        remaking = self._remaking.pop(payload)
        if future.cancelled():
            remaking.set_result(RefLostError("the executor was shut down meanwhile"))
            return
        error = future.exception()
        if error is not None:
            remaking.set_result(error)
            return
        ref: Ref[Any] = future.result()
        new = ref._payload
        assert isinstance(new, Composed)
        # All handles that share this payload have the new result now.
        payload.head, payload.blobs, payload.numbers = new.head, new.blobs, new.numbers
        remaking.set_result(None)

    def close(self) -> None:
        """Cancel all pending transfers and computations, as the executor ends."""
        for pulling in self._pulls.values():
            pulling.cancel()
        for remaking in self._remaking.values():
            remaking.cancel()
        self._pulls.clear()


def _loaded(load: Callable[[], Any]) -> Any:
    """Unpickle a value for ``Ref.get``.

    Raises:
        PayloadError: If unpickling raises; the exception is its cause.
        KeyboardInterrupt: If Ctrl-C is pressed meanwhile.
    """
    try:
        return load()
    except BaseException as exc:
        if is_interrupt(exc):
            raise
        error = PayloadError(f"the value could not be unpickled in the client ({describe(exc)})")
        error.__cause__ = presentable(exc)
    raise error


class _MadeAgainError(Exception):
    """Wraps the exception of a task that was run again.

    That may be an exception such as SystemExit, which must not reach the event loop.
    """

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.error = error


def _parts_of(payload: Payload | Spliced) -> list[Composed]:
    parts: list[Any] = [payload]
    if isinstance(payload, Spliced):
        parts = [payload.call, *payload.inputs]
    return [part for part in parts if type(part) is Composed]


def _blobs_of(payload: Payload | Spliced) -> list[Blob]:
    return [blob for part in _parts_of(payload) for blob in part.blobs]
