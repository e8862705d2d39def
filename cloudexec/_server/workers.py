"""Workers come, are cut off, come back and go: what the client's side does then.

How a worker's process ended is worth waiting for, as it says why; so a lost connection becomes a
lost worker only after a moment, and an end that the launcher reports only after the connection has
ended, or has had its time.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from cloudexec._core import commands, events
from cloudexec._core.workers import WorkerState
from cloudexec._launchers.base import Arrival, LaunchEnd, Launcher
from cloudexec._server.bucket import BucketTransfers
from cloudexec._server.engine import Engine
from cloudexec._server.keeper import Keeper
from cloudexec._server.launches import Launches
from cloudexec._server.sessions import Sessions

if TYPE_CHECKING:
    from cloudexec._server.takeover import Takeover

__all__ = ["Workers"]

_TERMINATION = 2.0
"""Seconds that a worker has to end by itself once it was told to end at once."""
_LAST_WORDS = 5.0
"""Seconds in which the connection of a worker whose process has ended must end, too."""


class Workers:
    """The workers of one executor. On the loop thread.

    Args:
        engine: Is told of them.
        sessions: Of those that are enrolled.
        launches: Of all of them.
        keeper: Of what they keep.
        launcher: Starts and ends their processes.
    """

    def __init__(
        self,
        engine: Engine,
        sessions: Sessions,
        launches: Launches,
        keeper: Keeper,
        launcher: Launcher,
    ) -> None:
        self.takeover: Takeover | None = None
        """Where workers outlive this process, and another one may stand in its place."""
        self.transfers: BucketTransfers | None = None
        """What workers put into the bucket, where there is one."""
        self.all_ended = asyncio.Event()
        """Set whenever no launch is left."""
        self.reconnections = 0
        self._engine = engine
        self._sessions = sessions
        self._launches = launches
        self._keeper = keeper
        self._launcher = launcher
        self._last_words: dict[str, LaunchEnd] = {}
        self._expected_ends: dict[str, asyncio.TimerHandle] = {}

    # Enrolment.

    def key_of(self, identity: str) -> bytes:
        """Return the key that a worker with this identity must know."""
        return self._launcher.key_of(identity) or self._engine.key

    def pid_of(self, identity: str) -> int:
        """Return the process that was started for a launch; 0: it is not known here."""
        return self._launcher.pid_of(self._engine.executor_id, identity)

    def admit(self, identity: str) -> str | None:
        """Say why a worker with this identity may not connect; ``None`` if it may."""
        machine = self._engine.machine
        if self._engine.is_closing or machine.finished:
            return "the executor has shut down"
        if self._sessions.of_launch(identity) is not None:
            return "a worker with this identity is connected already"
        if identity not in machine.launches:
            return "nobody launched a worker with this identity, or its time to connect is over"
        return None

    def returning(self, identity: str, attempt: int) -> None:
        """A proven worker dials: if its platform has started it again, the one before is gone.

        A platform does so by itself only after it took the machine back.
        """
        session = self._sessions.of_launch(identity)
        if session is None or attempt <= session.attempt:
            return
        self._launcher.disconnected(identity, orderly=False, reclaimed=True)
        worker = session.worker_id
        if worker not in self._last_words:
            why = "its machine was taken back, and it was started again on another"
            self._last_words[worker] = LaunchEnd(why, reclaimed=True, relaunched=True)
        self._lost(session, "")

    def session_to_resume(self, identity: str, name: bytes) -> Any:
        """Find the session that a worker says it has, or ``None``: it was given up."""
        session = self._sessions.of_launch(identity)
        if session is None or not session.resumable or session.name != name:
            return None
        return None if self._engine.is_closing else session

    def connected(self, session: Any, slots: int, arrival: Arrival, dial_in: float) -> None:
        """A worker has proved who it is; ``dial_in`` is how long that took it."""
        self._launcher.connected(session.identity, arrival)
        self._launches.arrived(session, arrival, dial_in)
        self._sessions.add(session)
        launched = self._engine.machine.launches[session.identity].slots
        self._engine.feed(
            events.WorkerConnected(
                session.worker_id,
                min(slots, launched),
                session.identity,
                taken_over=session.taken_over,
            )
        )
        if self.takeover is not None:
            self.takeover.changed()

    def reconnected(self, session: Any) -> None:
        """A worker goes on over another connection; that of the one before may not be known yet."""
        self.reconnections += 1
        session.is_cut = False
        self._launcher.connected(session.identity, Arrival("", session.attempt, None, None))
        if not session.taken_over:  # else it is still to say what it holds, and is back then
            self._engine.feed(events.WorkerBack(session.worker_id))

    def expects(self, session: Any, lease: int) -> bool:
        """Say whether a worker has a lease, so that a result of it is waited for."""
        worker = None if session is None else self._engine.machine.workers.get(session.worker_id)
        if worker is None:
            return False
        if lease in worker.leases:
            return True
        return self.takeover is not None and self.takeover.has(worker.id, lease)

    # Commands.

    def send(self, command: commands.SendTasks) -> None:
        """Send tasks to a worker."""
        session = self._sessions.get(command.worker)
        if session is not None:
            session.send_tasks(command.tasks)

    def recall(self, command: commands.RecallTasks) -> None:
        """Have tasks back that a worker has not begun."""
        session = self._sessions.get(command.worker)
        if session is not None:
            session.recall(command.leases)

    def kill(self, command: commands.KillTasks) -> None:
        """End tasks that a worker runs."""
        session = self._sessions.get(command.worker)
        if session is not None:
            session.kill(command.leases)

    def drain(self, command: commands.DrainWorker) -> None:
        """Have a worker end when what it has is done, and what it keeps has been taken."""
        session = self._sessions.get(command.worker)
        if session is not None:
            session.drain()
            self._engine.create_task(self._keeper.evacuate(session))

    def terminate(self, command: commands.TerminateWorker) -> None:
        """Have a worker end at once."""
        session = self._sessions.get(command.worker)
        if session is not None:
            loop = self._engine.portal.loop
            session.terminate()
            if session.is_cut:  # and the machine has given it up: should it dial again, it is told
                loop.call_soon(self._lost, session, "its connection was cut")
            loop.call_later(_TERMINATION, self._end_by_force, session)

    def _end_by_force(self, session: Any) -> None:
        """A worker has had its chance to end by itself: end its process, and its connection.

        The process may not be what holds the connection, or may be on a machine out of reach.
        """
        self._launcher.terminate([session.identity])
        self._cut_off(session, "it did not end when it was told to, and was cut off")

    def _cut_off(self, session: Any, reason: str) -> None:
        """Wait no longer for a worker's stream to end: end it from here."""
        if self._sessions.get(session.worker_id) is session:
            self._lost(session, reason)

    # Ends.

    def draining(self, session: Any) -> None:
        """A worker takes nothing new: unless we told it to, its platform did."""
        worker = self._engine.machine.workers.get(session.worker_id)
        if worker is not None and worker.state is WorkerState.ACTIVE:
            session.reclaimed = True
            self._engine.create_task(self._keeper.evacuate(session))
        self._engine.feed(events.WorkerDraining(session.worker_id))

    def launch_ended(self, launch: str, end: LaunchEnd) -> None:
        """The launcher says that a worker's process has ended, or was never started."""
        if not end.relaunched:
            self._launches.running.discard(launch)
            if self.takeover is not None:
                self.takeover.launch_ended(launch)
        session = self._sessions.of_launch(launch)
        if session is not None:
            # Its stream ends too, and what it still said is to be read first.
            self._last_words[session.worker_id] = end
            if launch in self._expected_ends or session.is_cut:
                self._lost(session, end.reason)
            else:
                loop = self._engine.portal.loop
                loop.call_later(_LAST_WORDS, self._cut_off, session, end.reason)
        elif not end.relaunched:
            self._engine.feed(
                events.LaunchFailed(launch, end.reason, end.fatal, end.killed, end.reclaimed)
            )
        if not self._launches.running:
            self.all_ended.set()

    def disconnected(self, session: Any, reason: str, *, cut: bool) -> None:
        """A worker's stream has ended.

        Args:
            session: Whose.
            reason: Why.
            cut: Whether it was the connection that failed, so that the worker may come again.
        """
        worker, identity = session.worker_id, session.identity
        if self._sessions.get(worker) is not session:
            return
        engine, machine = self._engine, self._engine.machine
        known = machine.workers.get(worker)
        orderly = known is not None and not known.leases and known.state is WorkerState.DRAINING
        self._launcher.disconnected(identity, orderly=orderly, reclaimed=session.reclaimed)
        explained = worker in self._last_words
        may_return = cut and session.resumable and not orderly and not explained
        if may_return and known is not None and not engine.is_closing:
            session.is_cut = True
            engine.feed(events.WorkerCut(worker))
            return
        if not explained and identity in self._launches.running and not engine.is_closing:
            # Its process is about to end, and how it ended is worth a moment.
            hurry = (orderly and not session.reclaimed) or machine.killing
            patience = 0.1 if hurry else self._launcher.last_words
            self._expected_ends[identity] = engine.portal.loop.call_later(
                patience, self._lost, session, reason
            )
            return
        self._lost(session, reason)

    def _lost(self, session: Any, reason: str) -> None:
        worker, identity = session.worker_id, session.identity
        end = self._last_words.pop(worker, None)
        timer = self._expected_ends.pop(identity, None)
        if timer is not None:
            timer.cancel()
        if not self._sessions.remove(session):
            return
        session.close()
        if self.takeover is not None:
            self.takeover.worker_lost(session)
        self._keeper.worker_lost(worker, session.told.blobs())
        if self.transfers is not None:
            self.transfers.session_ended(session)
        self._launcher.clean_up(session.slot_groups)
        self._launches.newcomers.pop(worker, None)
        if end is None:
            end = LaunchEnd(reason, reclaimed=bool(session.reclaimed))
        if identity in self._launches.running and not end.relaunched:
            # Without its connection it ends by itself.
            self._engine.portal.loop.call_later(_TERMINATION, self._launcher.terminate, [identity])
        self._engine.feed(
            events.WorkerLost(
                worker,
                end.reason,
                reclaimed=end.reclaimed,
                out_of_memory=end.out_of_memory,
                relaunched=end.relaunched,
            )
        )
