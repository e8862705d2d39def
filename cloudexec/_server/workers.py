"""Handles workers that connect, are cut off, connect again and end, and tells the core of it.

A worker is reported as lost only when both of its ends are known: that of its connection, and that
of its process, which says why. So a connection that ends becomes a lost worker after a short time,
in which the launcher may report the process's end; and an end that the launcher reports becomes a
lost worker when the connection has ended, too, or has not done so in time.
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
"""Seconds that a worker has to end by itself after it was told to end at once."""
_LAST_WORDS = 5.0
"""Seconds that a worker's connection may last after the launcher has reported its process's end."""


class Workers:
    """The workers of one executor. Used on the loop thread only.

    Args:
        engine: The executor's engine, which is fed with the workers' events.
        sessions: The sessions of enrolled workers.
        launches: The launches of all workers.
        keeper: Looks after the results that stay on workers.
        launcher: Starts and ends the workers' processes.
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
        """Takes over workers of an earlier process; ``None`` if workers do not survive theirs."""
        self.transfers: BucketTransfers | None = None
        """Transfers through the bucket; ``None`` without a bucket."""
        self.all_ended = asyncio.Event()
        """Set when a launch ends and no other one is left."""
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
        """Return the key that the worker of a launch must know."""
        return self._launcher.key_of(identity) or self._engine.key

    def pid_of(self, identity: str) -> int:
        """Return the id of the process that was started for a launch; 0 if it is not known."""
        return self._launcher.pid_of(self._engine.executor_id, identity)

    def admit(self, identity: str) -> str | None:
        """Return why the worker of a launch may not connect; ``None`` if it may."""
        machine = self._engine.machine
        if self._engine.is_closing or machine.finished:
            return "the executor has shut down"
        if self._sessions.of_launch(identity) is not None:
            return "a worker with this identity is connected already"
        if identity not in machine.launches:
            return "nobody launched a worker with this identity, or its time to connect is over"
        return None

    def returning(self, identity: str, attempt: int) -> None:
        """Report the worker's earlier process as lost, if its platform has started it again.

        Called when a worker has proved who it is. A platform starts a worker again by itself only
        if it took the machine away.

        Args:
            identity: The worker's launch.
            attempt: Which start of the launch the worker is, from 1.
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
        """Return the session that a worker wants to go on with; ``None`` if it was given up."""
        session = self._sessions.of_launch(identity)
        if session is None or not session.resumable or session.name != name:
            return None
        return None if self._engine.is_closing else session

    def connected(self, session: Any, slots: int, arrival: Arrival, dial_in: float) -> None:
        """Take a worker that has enrolled.

        Args:
            session: The worker's session.
            slots: Number of tasks that it can run at once.
            arrival: What it says of its own start.
            dial_in: Seconds that its enrolment took.
        """
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
            self.takeover.connected(session)

    def reconnected(self, session: Any) -> None:
        """Note that a worker goes on over a new connection; the old one's end may come later."""
        self.reconnections += 1
        session.is_cut = False
        self._launcher.connected(session.identity, Arrival("", session.attempt, None, None))
        # A worker that was taken over counts as back only when it has said which tasks it holds.
        if not session.taken_over:
            self._engine.feed(events.WorkerBack(session.worker_id))

    def expects(self, session: Any, lease: int) -> bool:
        """Say whether a worker holds a lease, so that its result is expected."""
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
        """Ask a worker to hand back tasks that it has not begun."""
        session = self._sessions.get(command.worker)
        if session is not None:
            session.recall(command.leases)

    def kill(self, command: commands.KillTasks) -> None:
        """Have a worker kill tasks that it runs."""
        session = self._sessions.get(command.worker)
        if session is not None:
            session.kill(command.leases)

    def drain(self, command: commands.DrainWorker) -> None:
        """Have a worker end after its tasks are done and its kept results were brought here."""
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
            if session.is_cut:  # the worker cannot be told; it is refused if it dials again
                loop.call_soon(self._lost, session, "its connection was cut")
            loop.call_later(_TERMINATION, self._end_by_force, session)

    def _end_by_force(self, session: Any) -> None:
        """End the process and the connection of a worker that was told to end and had time for it.

        The connection is closed, too, because it may belong to another process than the launcher
        can end, or to one on a machine that cannot be reached.
        """
        self._launcher.terminate([session.identity])
        self._cut_off(session, "it did not end when it was told to, and was cut off")

    def _cut_off(self, session: Any, reason: str) -> None:
        """Report a worker as lost without waiting any longer for its connection to end."""
        if self._sessions.get(session.worker_id) is session:
            self._lost(session, reason)

    # Ends.

    def draining(self, session: Any) -> None:
        """Note that a worker accepts no more tasks, by our order or because of its platform."""
        worker = self._engine.machine.workers.get(session.worker_id)
        if worker is not None and worker.state is WorkerState.ACTIVE:
            session.reclaimed = True
            self._engine.create_task(self._keeper.evacuate(session))
        self._engine.feed(events.WorkerDraining(session.worker_id))

    def launch_ended(self, launch: str, end: LaunchEnd) -> None:
        """Take the launcher's report that a worker's process has ended or could not be started."""
        if not end.relaunched:
            self._launches.running.discard(launch)
            if self.takeover is not None:
                self.takeover.launch_ended(launch)
        session = self._sessions.of_launch(launch)
        if session is not None:
            # The worker's last messages may still be unread: wait until its connection ends.
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
        """Note that a worker's connection has ended.

        Args:
            session: The worker's session.
            reason: Why the connection ended, in words.
            cut: Whether the connection failed, so that the worker may connect again.
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
            # Wait a moment for the launcher's report of how the process ended.
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
            # Without its connection the process ends by itself; terminate it if it does not.
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
