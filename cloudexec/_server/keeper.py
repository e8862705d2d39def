"""Results that stay on the workers that made them: brought when wanted, made again when lost."""

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
from cloudexec._payload import Composed, Payload
from cloudexec._proto import tasks_pb2 as pb
from cloudexec._server.bucket import BucketTransfers
from cloudexec._server.engine import Engine
from cloudexec._server.sessions import Sessions
from cloudexec._server.splicing import Spliced
from cloudexec._server.submission import Submission

__all__ = ["Keeper", "Recipe"]

_FAR_BYTES = 256 * 1024
"""Blobs from this size on are worth a preference for workers that have them."""
_NOWHERE = "bucket"
"""Stands for the worker that has a blob, where only the bucket has it."""
_PULL_TIMEOUT = 60.0
"""Seconds in which a worker that is asked for what it keeps must hand over something."""
_EVACUATION = 30.0
"""Seconds in which a worker that is to end hands over what it keeps."""


class Recipe:
    """How to make a kept result again.

    Of what the task took and can be made again itself, it knows only how: otherwise, of a long
    chain of kept results all would stay for as long as the last one is needed.

    Args:
        task: That made it, while it still has its function and payload.
    """

    __slots__ = ("_call", "_inputs", "_made", "function", "requirements", "retries", "stats")

    def __init__(self, task: Submission) -> None:
        self.function = task.function
        self.stats = task.stats
        self.retries = task.retries
        self.requirements = task.requirements
        self._made: weakref.ref[Composed] | None = None  # what it stands for, while that is needed
        self._inputs: tuple[Payload | Recipe, ...] | None = None
        if isinstance(task.payload, Spliced):
            self._call: Any = task.payload.call
            self._inputs = tuple(map(_way_to, task.payload.inputs))
        else:
            self._call = task.payload

    def payload(self, store: BlobStore) -> Any:
        """Return what the task takes; of what is not there any more, something that is lost."""
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
    """Return how a part of a payload can be made, or itself."""
    if type(part) is not Composed or part.recipe is None:
        return part
    if not part.blobs:
        part.recipe = None  # small: it is here, and cannot be lost
        return part
    recipe: Recipe = part.recipe
    recipe._made = weakref.ref(part)
    return recipe


class Keeper:
    """What the workers of one executor keep. On its loop thread, but for what ``Ref`` calls.

    Args:
        engine: Whose workers.
        sessions: Of these.
        store: Of what is here.
        owner: Of the futures of tasks that are run once more.
        numbers: Of tasks.
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
        """Whether workers may open what others on this machine keep."""
        self.transfers: BucketTransfers | None = None
        """What is in the bucket, where there is one."""
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
        """Load what a handle stands for; see ``Ref.get``."""
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
        """Return what stands for a handle's value among arguments.

        Raises:
            RefLostError: If it is another executor's, and lost.
        """
        payload = ref._payload
        if ref._keeper is self:
            return payload
        if ref._keeper is None:  # in a task, whose own executor this is
            return _payload.dumps(ref.get(), self._store)
        if type(payload) is bytes:
            return payload
        assert isinstance(payload, Composed)
        ref._keeper.parts_of(payload)
        return self.copy_of(payload)

    def has(self, payload: Composed) -> bool:
        """Say whether a payload is of this executor: numbers of blobs mean nothing elsewhere."""
        store = self._store
        return all(store.has(blob) for blob in payload.blobs)

    def copy_of(self, payload: Composed) -> Composed:
        """Return another executor's payload, which is in this process, as one of this executor.

        Raises:
            PayloadTooLargeError: If there is no room for it.
        """
        blobs = tuple([self._store.intern(blob.view()) for blob in payload.blobs])
        return Composed(payload.head, blobs, payload.numbers)

    def is_gone(self, payload: Payload) -> bool:
        """Say whether what a handle stands for is lost for good; in any thread."""
        if type(payload) is bytes:
            return False
        assert isinstance(payload, Composed)
        ended = self._finished.is_set()
        return any(
            (blob.origin and ended) or (blob.lost and (ended or payload.recipe is None))
            for blob in payload.blobs
        )

    def note_inputs(self, task: Any) -> None:
        """Let the scheduler know which blobs a task takes that some workers have."""
        # Those that are on workers alone, however small: they may be lost, or have to be brought.
        task.inputs = tuple(
            [
                blob
                for blob in _blobs_of(task.payload)
                if blob.origin or blob.lost or (self.is_far and blob.size >= _FAR_BYTES)
            ]
        )

    def parts_of(self, payload: Payload) -> tuple[bytes, bytes | None, list[Any]]:
        """Return what a pickled handle takes along: head, numbers and contents of its blobs."""
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
        """Return a payload's head, and the contents of its blobs, wherever on this machine."""
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
        """Have all of a payload here."""
        while True:
            try:
                for blob in payload.blobs:
                    await self.pull(blob)
            except FileNotFoundError:
                await self._make_again(payload)
            else:
                return

    def pull(self, blob: Blob) -> asyncio.Future[None]:
        """Have a blob brought here from the worker that keeps it, or from the bucket.

        The future fails with ``FileNotFoundError`` if it is lost.
        """
        loop = self._engine.portal.loop
        pulling = self._pulls.get(blob.id)
        if pulling is not None and not pulling.done():
            return pulling
        pulling = loop.create_future()
        # Whoever asked may have gone meanwhile.
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
            except OSError as exc:  # it is there: it is not to be made again
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
        # Not to be kept by the timer once it is here.
        self._pulls[blob.id].add_done_callback(lambda _: timer.cancel())

    def _look_after(self, blob: Blob, session: Any, asked_at: float) -> None:
        """Give up a blob whose worker is there, and hands over nothing."""
        pulling = self._pulls.get(blob.id)
        if pulling is None or pulling.done():
            return
        loop = self._engine.portal.loop
        now = loop.time()
        # What waits for its turn behind others comes in time.
        since = now if session.is_cut else max(asked_at, session.progress_at)
        if now < since + _PULL_TIMEOUT:
            self._look_later(since + _PULL_TIMEOUT - now, blob, session, asked_at)
            return
        blob.lost = True
        self.failed(blob.id)

    async def _download(self, blob: Blob) -> None:
        """Bring a blob from the bucket; if it is not to be had there, from its worker."""
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
        """Take a blob over from a worker on this machine."""
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
            keeping.release([blob])  # it need not wait with its end for this one
        self._store.adopt(blob, other)
        for session in self._sessions.values():
            session.told.moved(blob.id)

    def waits_for(self, number: int, size: int, session: Any) -> bool:
        """Say whether a worker was asked for a blob of this size."""
        blob = session.told.blob(number)
        return number in self._pulls and blob is not None and blob.size == size

    def arrived(self, number: int, content: Blob, blob: Blob | None) -> None:
        """A blob that was wanted has come."""
        pulling = self._pulls.pop(number, None)
        if pulling is None:
            return
        if blob is not None and blob.origin is not None:
            self._adopt(blob, content)
        if not pulling.done():
            pulling.set_result(None)

    def failed(self, number: int, error: BaseException | None = None) -> None:
        """A blob that was wanted did not come; without an error, because it is lost."""
        pulling = self._pulls.pop(number, None)
        if pulling is not None and not pulling.done():
            pulling.set_exception(FileNotFoundError() if error is None else error)

    def worker_lost(self, worker: str, blobs: Iterable[Blob]) -> None:
        """A worker is gone: what it alone had is lost."""
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
        """Have a worker that is to end hand over what it keeps, unless nobody can need it."""
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
        # It ends once it has been told so of each; until then all stays where others look for it.
        session.release(kept)

    # Tasks that take what is lost.

    def is_at_hand(self, payload: Payload | Spliced, worker: str) -> bool:
        """Say whether a task can be sent to a worker, or must wait for what it takes."""
        shared = self.one_machine
        for blob in _blobs_of(payload):
            near = blob.origin in (None, worker) or shared or blob.stored
            if blob.lost or not near:
                return False
        return True

    def supply(self, task: Any, worker: str, lease: int) -> None:
        """Have a task wait until what it takes is here."""
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
        """Run the task once more whose result was lost.

        Raises:
            RefLostError: If it is not to be.
            _MadeAgainError: With whatever the task raises this time.
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

        def done(made: Any) -> None:  # not by its own name: it would refer to itself
            try:
                self._engine.portal.post(self._made_again, payload, made)
            except RuntimeError:
                pass  # the loop has closed

        future.add_done_callback(done)
        self.note_inputs(task)  # what it takes may be lost too
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
        # Whoever has the old one, has the new one now.
        payload.head, payload.blobs, payload.numbers = new.head, new.blobs, new.numbers
        remaking.set_result(None)

    def close(self) -> None:
        """Nobody waits any more."""
        for pulling in self._pulls.values():
            pulling.cancel()
        for remaking in self._remaking.values():
            remaking.cancel()
        self._pulls.clear()


def _loaded(load: Callable[[], Any]) -> Any:
    """Unpickle a value for ``Ref.get``.

    Raises:
        PayloadError: Whatever unpickling raises.
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
    """Carries what a task raised that was run again: it may be an exception that means something
    to an event loop, such as SystemExit."""

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
