"""Lets a program that was killed and is run again take over the workers of the killed process.

The executor process is called the client here. Workers whose client is gone work on for
``orphan_timeout`` seconds, keep the outcomes of their tasks, and dial the client's address. An
executor with a journal therefore writes into it all that another process needs to take its place:
the address, the certificate and the key that the workers know, and the launches. The next process,
the successor, listens at that address. Workers enrol with it anew, and name the tasks that they
hold by tags. A tag contains the journal's key of the call, under a seal that only the client can
make. If the program submits a call that a worker holds, it is not sent to another worker.

At first the successor does not know which tasks its workers hold. Until all running workers have
connected, or have had the time for it, calls wait. This time is called the window below.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import secrets
import socket
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import cloudpickle

from cloudexec import _enrolment, _plain_json
from cloudexec._core import events
from cloudexec._core.tasks import TaskState
from cloudexec._journal.journal import KEY_BYTES as _KEY_BYTES
from cloudexec._log import Log
from cloudexec._records import Composed, Payload
from cloudexec._server.certificate import Certificate
from cloudexec._server.direct import Delivered
from cloudexec._server.requirements import shares_gpus
from cloudexec._wire.channel import longest_pause

if TYPE_CHECKING:
    from cloudexec._journal.journal import Journal
    from cloudexec._launchers.base import LaunchEnd, Launcher, Survivor
    from cloudexec._objects.store import BlobStore
    from cloudexec._server.engine import Engine
    from cloudexec._server.futures import Futures
    from cloudexec._server.launches import Launches
    from cloudexec._server.sessions import Sessions
    from cloudexec._server.story import Story
    from cloudexec._server.submission import Setup, Submission

__all__ = ["Takeover"]

_logger = Log()
_STATE = "takeover"
_VERSION = 1
_SAVE_AFTER = 0.2
"""Seconds for which changes are collected before they are written."""
_SLACK = 5.0
"""Seconds that a worker has to enrol, in addition to its longest pause between two tries."""
_SEAL_BYTES = 16
_CHECK_BYTES = 16
_GAP = 10_000
"""A successor numbers launches from the next multiple of this, because the killed client may not
have written down its last launches."""
_LEASES = 1 << 40
"""Number of leases that each client may give before it would reach its successor's range."""
_BLOBS = 1 << 32
_GENERATIONS = 200
"""After this many successors the ranges of blobs' numbers repeat; the first blobs are gone then."""


@dataclass(frozen=True, slots=True)
class _Estate:
    """What a client writes down for its successor."""

    generation: int
    executor_id: str
    key: bytes
    secret: bytes
    certificate: Certificate
    listen: str
    has_relay: bool
    setup: str
    orphan_timeout: float
    launches: list[tuple[str, int]]
    launcher: dict[str, Any]

    def dump(self) -> bytes:
        certificate = self.certificate
        pairs = {
            "version": _VERSION,
            "generation": self.generation,
            "executor": self.executor_id,
            "key": _text(self.key),
            "secret": _text(self.secret),
            "pem": _text(certificate.pem),
            "key_pem": _text(certificate.key_pem),
            "sha256": certificate.sha256,
            "listen": self.listen,
            "relay": self.has_relay,
            "setup": self.setup,
            "orphan_timeout": self.orphan_timeout,
            "launches": self.launches,
            "launcher": self.launcher,
        }
        data = _plain_json.encode(pairs)
        return _check_of(data) + data

    @classmethod
    def load(cls, data: bytes) -> _Estate:
        """Read what ``dump`` returned.

        Raises:
            ValueError: If another version of cloudexec wrote it, or it is damaged.
        """
        check, data = data[:_CHECK_BYTES], data[_CHECK_BYTES:]
        if check != _check_of(data):
            raise ValueError("what it left is damaged")
        try:
            found = _plain_json.decode(data)
            if found["version"] != _VERSION:
                raise ValueError("another version of cloudexec left them")
            return cls(
                int(found["generation"]),
                str(found["executor"]),
                _bytes(found["key"]),
                _bytes(found["secret"]),
                Certificate(_bytes(found["pem"]), _bytes(found["key_pem"]), found["sha256"]),
                str(found["listen"]),
                bool(found["relay"]),
                str(found["setup"]),
                float(found["orphan_timeout"]),
                [(str(launch), int(slots)) for launch, slots in found["launches"]],
                dict(found["launcher"]),
            )
        except (KeyError, TypeError) as exc:
            raise ValueError("what it left cannot be understood") from exc


class _Claim:
    """A task of the killed client that a worker runs or has run.

    Attributes:
        worker: The worker's id.
        lease: The lease under which the worker has the task.
        key: The journal's key of the call.
        version: Digest of the program and the function's name, for the journal.
        name: The function's name.
        outcome: The task's result and the seconds that it ran; ``None`` while it is not known.
    """

    __slots__ = ("key", "lease", "name", "outcome", "version", "worker")

    def __init__(self, worker: str, lease: int, told: bytes) -> None:
        self.worker = worker
        self.lease = lease
        self.key = told[:_KEY_BYTES]
        at = _KEY_BYTES + 1
        size = told[_KEY_BYTES]
        self.version = told[at : at + size]
        self.name = told[at + size :].decode("utf-8", "replace")
        self.outcome: tuple[Payload, float] | None = None


class Takeover:
    """Takes over the workers of a killed client, and prepares for a successor of this one.

    Args:
        engine: The executor's engine; it adopts the identity of the killed client.
        sessions: The sessions of its workers.
        launches: The launches of its workers.
        futures: The futures of its calls.
        story: Notes which calls are taken over.
        setup: The settings that workers receive.
        store: The client's blobs, which are numbered in a new range.
        journal: Holds what a client writes down for its successor.
        launcher: Starts the workers.
        on_end: Called by the launcher with a launch and how its process ended.
    """

    def __init__(
        self,
        *,
        engine: Engine,
        sessions: Sessions,
        launches: Launches,
        futures: Futures,
        story: Story,
        setup: Setup,
        store: BlobStore,
        journal: Journal,
        launcher: Launcher,
        on_end: Callable[[str, LaunchEnd], None],
    ) -> None:
        self.workers = 0
        """Number of workers that were taken over."""
        self.tasks = 0
        """Number of calls that were not sent, because a worker held them already."""
        self._engine = engine
        self._sessions = sessions
        self._launches = launches
        self._futures = futures
        self._story = story
        self._orphan_timeout = setup.orphan_timeout
        self._journal = journal
        self._launcher = launcher
        self._on_end = on_end
        self._setup = _digest(setup, launcher)
        self._secret = secrets.token_bytes(32)
        self._generation = 1
        self._certificate: Certificate | None = None
        self._listening = ""
        self._has_relay = False
        self._estate = self._find()
        self._alive: Mapping[str, Survivor] = {}
        self._established = False
        self._is_open = False
        self._expected: set[str] = set()  # launches whose workers run and have not connected yet
        self._claims: dict[bytes, _Claim] = {}  # by key: calls that were not submitted again yet
        self._by_lease: dict[tuple[str, int], _Claim] = {}  # the same claims, by worker and lease
        self._waiting: dict[bytes, Submission] = {}  # by key: calls that wait for the window's end
        self._save_handle: asyncio.TimerHandle | None = None
        self._changed_at = float("-inf")
        self._timers: list[asyncio.TimerHandle] = []
        if self._estate is not None:
            self._generation = self._estate.generation + 1
            self._secret = self._estate.secret
            engine.adopt_identity(self._estate.executor_id, self._estate.key)
            store.number_from((self._generation % _GENERATIONS) * _BLOBS + 1)
        # The key that this class writes down. The launcher may replace ``engine.key`` by the key of
        # its AWS stack, which must not be written.
        self._key = engine.key

    def _find(self) -> _Estate | None:
        data = self._journal.store.get_state(_STATE)
        if data is None:
            return None
        try:
            estate = _Estate.load(data)
            if estate.setup != self._setup:
                raise ValueError("versions, launcher settings, initializer or modules have changed")
            # Behind a relay, workers do not know the address.
            if not estate.has_relay and not _is_free(estate.listen):
                raise ValueError(f"{estate.listen}, where they would be waited for, is taken")
        except ValueError as exc:
            _logger.warning(
                "journal %s: workers of the run before, which was killed, are not taken over: %s. "
                "They end by themselves",
                self._journal.store.name,
                exc,
            )
            return None
        return estate

    # Preparing for a successor.

    def listen(self, wanted: str) -> str:
        """Return the killed client's address, unless the user wants a particular one.

        Where workers came through a relay, any address does.
        """
        estate = self._estate
        if estate is None or estate.has_relay or (wanted and not wanted.endswith(":0")):
            return wanted
        return estate.listen

    @property
    def certificate(self) -> Certificate | None:
        """The killed client's certificate, whose fingerprint its workers know."""
        return None if self._estate is None else self._estate.certificate

    def changed(self) -> None:
        """Write down the launches soon, because one has begun or ended.

        The first change is written at once: a worker that runs before that cannot be taken over.
        """
        if self._established and self._save_handle is None:
            loop = self._engine.portal.loop
            delay = _SAVE_AFTER if loop.time() - self._changed_at < _SAVE_AFTER else 0.0
            self._changed_at = loop.time() + delay
            self._save_handle = loop.call_later(delay, self._save)

    def _save(self) -> None:
        machine = self._engine.machine
        self._save_handle = None
        assert self._certificate is not None
        launches = [(each.launch, each.slots) for each in machine.workers.values()]
        launches += [(each.id, each.slots) for each in machine.launches.values()]
        estate = _Estate(
            self._generation,
            self._engine.executor_id,
            self._key,
            self._secret,
            self._certificate,
            self._listening,
            self._has_relay,
            self._setup,
            self._orphan_timeout,
            launches,
            self._launcher.hand_over(),
        )
        self._journal.put_state(_STATE, estate.dump())

    def close(self) -> None:
        """Remove what was written for a successor, because the executor ends in good order."""
        if self._save_handle is not None:
            self._save_handle.cancel()
            self._save_handle = None
        for timer in self._timers:
            timer.cancel()
        self._is_open = False
        if self._established:
            self._established = False
            self._journal.put_state(_STATE, None)

    def tag(self, identity: str, task: Submission) -> bytes:
        """Return the tag by which a successor identifies a task that is about to be sent.

        Returns:
            Empty if the task cannot be taken over: it has no key in the journal, its result stays
            on the worker, or it shares the worker's GPUs.
        """
        call = task.handle._journaled
        if call is None or call.kept or shares_gpus(self._engine.machine, task):
            return b""
        version, name = call.identity.version, call.identity.name.encode()
        told: bytes = call.key + bytes((len(version),)) + version + name
        return self._seal(identity, task.lease, told) + told

    def _seal(self, identity: str, lease: int, told: bytes) -> bytes:
        """Return a keyed digest, by which a tag of this client is told from a forged one."""
        sealed = b"%b %d %b" % (identity.encode(), lease, told)
        return hashlib.blake2b(sealed, digest_size=_SEAL_BYTES, key=self._secret).digest()

    # Taking over.

    async def look(self) -> None:
        """Ask the launcher which launches still exist, before workers are let in.

        Raises:
            CloudexecError: If the launcher's platform cannot be asked.
        """
        if self._estate is not None:
            self._alive = await self._launcher.take_over(self._estate.launcher, self._on_end)

    def begin(self, certificate: Certificate, listening: str, *, has_relay: bool) -> None:
        """Take over the remaining launches, and write down what a successor needs.

        Called when the server listens.

        Args:
            certificate: The server's certificate.
            listening: ``host:port`` where the server listens.
            has_relay: Whether workers connect through a relay, and not to that address.
        """
        estate, alive, feed = self._estate, self._alive, self._engine.feed
        self._certificate, self._listening = certificate, listening
        self._has_relay = has_relay
        if estate is not None:
            numbers = [int(launch) for launch, _ in estate.launches]
            last = (max(numbers, default=0) // _GAP + 1) * _GAP
            capacity = self._launcher.capacity
            launches = [
                (launch, slots, alive[launch].size, capacity(alive[launch].size))
                for launch, slots in estate.launches
                if launch in alive
            ]
            self._launches.running.update(alive)
            feed(events.LaunchesTakenOver(launches, last, self._generation * _LEASES))
            running = {launch for launch, survivor in alive.items() if survivor.running}
            self._expected = running & self._engine.machine.launches.keys()
            if self._expected:
                self._open_window(estate.orphan_timeout)
        self._established = True
        self._save()

    def _open_window(self, orphan_timeout: float) -> None:
        """Let calls wait until it is known which of them the workers hold."""
        self._is_open = True
        pause = 1.5 * longest_pause(orphan_timeout) + _SLACK
        later = self._engine.portal.loop.call_later
        self._timers = [
            later(pause, self._close_window),
            later(max(pause, orphan_timeout), self._let_go_of_unclaimed),
        ]
        _logger.info(
            "the run before was killed, and its workers (%d) may live: calls wait until they come "
            "back, for %.0f s at most",
            len(self._expected),
            pause,
        )

    @property
    def is_ready(self) -> bool:
        """Whether it is known which workers of the run before there are."""
        return self._estate is None or self._established

    def takes(self, identity: str) -> bool:
        """Say whether a worker of the killed client may enrol with this one."""
        return identity in self._alive

    def holding(self, session: Any, leases: Sequence[int], tags: Sequence[bytes]) -> None:
        """Take the list of tasks that a worker which was taken over holds.

        Args:
            session: The worker's session.
            leases: The leases under which it holds tasks.
            tags: The tasks' tags.

        Raises:
            ValueError: If no client has given these tasks to the worker.
        """
        if not session.taken_over or len(leases) != len(tags):
            raise ValueError("it holds what nobody gave it")
        session.taken_over = False  # a worker sends this list once
        self.workers += 1
        worker, unwanted = session.worker_id, []
        adopted: list[tuple[Submission, _Claim]] = []
        # After the window, calls wait in queues, or other workers have them.
        known = {} if self._is_open or not leases else self._submitted()
        for lease, tag in zip(leases, tags, strict=True):
            told = tag[_SEAL_BYTES:]
            seal = self._seal(session.identity, lease, told)
            if len(told) <= _KEY_BYTES or not hmac.compare_digest(seal, tag[:_SEAL_BYTES]):
                raise ValueError(f"it was never given lease {lease}")
            claim = _Claim(worker, lease, told)
            if claim.key in self._claims or self._journal.store.find(claim.key) is not None:
                unwanted.append(lease)
                continue
            task = self._waiting.pop(claim.key, None) or known.get(claim.key)
            if task is None or task.state is TaskState.DONE:
                self._claims[claim.key] = self._by_lease[worker, lease] = claim
            elif task.state in (TaskState.BLOCKED, TaskState.WAITING):
                adopted.append((task, claim))
            else:
                unwanted.append(lease)
        self._adopt(adopted)
        self._engine.feed(events.WorkerBack(worker))
        if unwanted:
            session.kill(unwanted)
        self._expected.discard(session.identity)
        if self._is_open and not self._expected:
            self._close_window()

    def _submitted(self) -> dict[bytes, Submission]:
        """Return the calls that wait, back off or are on a worker, by key."""
        machine = self._engine.machine
        tasks: list[Any] = [*machine.waiting_tasks(), *machine.backing_off_tasks()]
        for each in machine.workers.values():
            tasks += each.leases.values()
        calls = [(task.handle and task.handle._journaled, task) for task in tasks]
        return {call.key: task for call, task in calls if call is not None and not call.kept}

    def _adopt(self, adopted: Iterable[tuple[Submission, _Claim]]) -> None:
        """Assign tasks that were not sent to the workers that have them already."""
        sessions, feed = self._sessions, self._engine.feed
        for task, claim in adopted:
            self.tasks += 1
            feed(events.TasksTakenOver(claim.worker, [task], [claim.lease]))
            if task.lease == claim.lease:
                self._story.taken_over(task, claim.worker)
            elif claim.outcome is None and claim.worker in sessions:
                sessions[claim.worker].kill([claim.lease])  # the task needs a larger worker now
            if claim.outcome is not None:
                result, seconds = claim.outcome
                task.handle._journaled = None  # the journal has this result already
                feed(events.ResultsReceived(claim.worker, [claim.lease], [result], [seconds]))

    def sift(self, tasks: list[Submission], *, held: bool = False) -> list[Submission]:
        """Return the tasks that can be sent, without those that workers hold or may hold.

        Args:
            tasks: Tasks that were submitted, or whose dependencies are done.
            held: Whether the core knows the tasks already, and holds them back.
        """
        if not (self._is_open or self._claims):
            return tasks
        rest: list[Submission] = []
        kept: list[Submission] = []
        adopted: list[tuple[Submission, _Claim]] = []
        for task in tasks:
            call = None if task.handle is None else task.handle._journaled
            if call is None or call.kept:
                rest.append(task)
                continue
            claim = self._claims.pop(call.key, None)
            if claim is not None:
                self._by_lease.pop((claim.worker, claim.lease), None)
                if claim.outcome is not None and not held:
                    self.tasks += 1
                    self._futures.give_resumed(task, *claim.outcome)
                    continue
                adopted.append((task, claim))
            elif self._is_open:
                self._waiting[call.key] = task
            else:
                rest.append(task)
                continue
            kept.append(task)
        if kept and not held:
            self._engine.feed(events.TasksBlocked(kept))
        self._adopt(adopted)
        return rest

    def has(self, worker: str, lease: int) -> bool:
        """Say whether a worker's lease is one of the killed client, whose outcome is expected."""
        return (worker, lease) in self._by_lease

    def park(
        self, worker: str, leases: list[int], results: list[Any], seconds: list[float]
    ) -> None:
        """Remove the results of calls that were not submitted yet, and keep them for these calls.

        Args:
            worker: The worker that sent the results.
            leases: Their leases; changed in place, as are the next two.
            results: The results.
            seconds: The seconds that each task ran.
        """
        if not self._by_lease:
            return
        for index in reversed(range(len(leases))):
            claim = self._by_lease.get((worker, leases[index]))
            if claim is None:
                continue
            lease, result, took = leases.pop(index), results.pop(index), seconds.pop(index)
            if isinstance(result, Delivered):  # the result did not arrive complete
                self.gone(worker, [lease])
            else:
                claim.outcome = result, took
                self._journal.keep(claim.key, claim.version, claim.name, took, result)

    def gone(self, worker: str, leases: Iterable[int]) -> None:
        """Forget tasks of the killed client that have no result: they run if they are submitted."""
        if self._by_lease:
            for lease in leases:
                claim = self._by_lease.pop((worker, lease), None)
                if claim is not None:
                    del self._claims[claim.key]

    def worker_lost(self, session: Any) -> None:
        """Forget the tasks that a lost worker held and had not finished."""
        worker = session.worker_id
        running = [each for each in self._by_lease.values() if each.outcome is None]
        self.gone(worker, [each.lease for each in running if each.worker == worker])
        self.launch_ended(session.identity)

    def launch_ended(self, launch: str) -> None:
        """Note that a launch has ended, so that its worker will not connect."""
        self.changed()
        self._expect_no_more(launch)

    def connected(self, session: Any) -> None:
        """Note that a worker has connected that holds nothing, or that will say what it holds.

        The killed client may have launched it, and have ended before the worker connected.
        """
        self.changed()
        if session.identity in self._expected and not session.taken_over:
            self.workers += 1
            self._expect_no_more(session.identity)

    def _expect_no_more(self, launch: str) -> None:
        if launch in self._expected:
            self._expected.discard(launch)
            if self._is_open and not self._expected:
                self._engine.portal.loop.call_soon(self._close_window)

    def _close_window(self) -> None:
        """Release the waiting calls: all expected workers have connected, or are given up."""
        if not self._is_open:
            return
        self._is_open = False
        missing, self._expected = self._expected, set()
        waiting = [task for task in self._waiting.values() if task.state is TaskState.BLOCKED]
        self._waiting.clear()
        if missing:
            _logger.info(
                "%d of the workers of the run before did not come back: their tasks run again",
                len(missing),
            )
            for launch in missing:
                self._launches.running.discard(launch)
                why = "its client was killed, and it did not come back to the one after that"
                self._engine.feed(events.ProcessEnded(launch, why, reclaimed=True))
            # Terminated after the event, so that these ends do not count as failed launches.
            self._launcher.terminate(sorted(missing))
        if waiting:
            self._engine.feed(events.TasksReleased(waiting))

    def _let_go_of_unclaimed(self) -> None:
        """Kill the tasks of the killed client that run and were not submitted again."""
        for claim in self._by_lease.values():
            session = self._sessions.get(claim.worker)
            if claim.outcome is None and session is not None:
                session.kill([claim.lease])


def _digest(setup: Setup, launcher: Launcher) -> str:
    """Digest the settings in which a client and its successor must agree to share workers."""
    initializer = setup.initializer
    versions = _enrolment.WIRE_VERSION, _enrolment.python_version(), cloudpickle.__version__
    pieces: list[Any] = [
        repr(versions).encode(),
        launcher.fingerprint().encode(),
        repr((setup.max_tasks_per_child, setup.cwd, setup.sys_path)).encode(),
        setup.modules,
        setup.settings,
    ]
    if isinstance(initializer, Composed):
        pieces += [initializer.head, *[blob.view() for blob in initializer.blobs]]
    else:
        pieces.append(initializer)
    if setup.initializer_needs is not None:
        needs = [each for each in setup.initializer_needs.needs if each.globals != ("*",)]
        pieces += [each.sha256 for each in needs]
    found = hashlib.sha256()
    for piece in pieces:
        found.update(b"%d:" % len(piece))
        found.update(piece)
    return found.hexdigest()


def _is_free(listen: str) -> bool:
    """Say whether this process can listen on ``host:port``."""
    host, _, port = listen.rpartition(":")
    host = host.strip("[]")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, int(port)))
            probe.listen(1)
    except (OSError, ValueError, OverflowError):
        return False
    return True


def _check_of(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()[:_CHECK_BYTES]


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _bytes(text: str) -> bytes:
    return base64.b64decode(text, validate=True)
