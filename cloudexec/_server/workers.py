"""Tells the core of workers that connect, are cut off, connect again and end.

It also carries out what the core commands for workers. When a worker is lost is decided by the core
alone, in ``_core.ends``.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from cloudexec import _enrolment
from cloudexec._core import commands, events
from cloudexec._launchers.base import Arrival, LaunchEnd, Launcher
from cloudexec._server.bucket import BucketTransfers
from cloudexec._server.engine import Engine
from cloudexec._server.keeper import Keeper
from cloudexec._server.launches import Launches
from cloudexec._server.sessions import Sessions

if TYPE_CHECKING:
    from cloudexec._server.takeover import Takeover

__all__ = ["Workers"]


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

    # Enrolment.

    def key_of(self, identity: str) -> bytes:
        """Return the key that the worker of a launch must know."""
        return self._launcher.key_of(identity) or self._engine.key

    def launch_of(self, identity: str) -> str:
        """Return the launch that a worker says it is; empty: it is not known yet which that is.

        A worker that its platform starts together with others, and that cannot be told its number
        among them, says ``launch@name``: the first launch of its job, and what the platform calls
        it.
        """
        first, at, name = identity.partition("@")
        return self._launcher.launch_of(first, name) if at else identity

    def pid_of(self, identity: str) -> int:
        """Return the id of the process that was started for a launch; 0 if it is not known."""
        return self._launcher.pid_of(self._engine.executor_id, identity)

    def unheard(self, identity: str, process: bytes) -> Any:
        """Return the session of a worker whose welcome may not have arrived; ``None`` if none.

        Args:
            identity: The worker's launch.
            process: How its process names itself, so that no other one gets the session.
        """
        session = self._sessions.of_launch(identity)
        if session is None or not session.resumable or session.welcome is None or not process:
            return None
        is_same = _enrolment.proves(process, session.process)
        return session if is_same and not self._engine.is_closing else None

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

    def refused(self, identity: str, reason: str) -> None:
        """Note that the worker of a launch does not fit; its launcher says what follows of it."""
        self._tell(identity, self._launcher.refused(identity, reason))

    def returning(self, identity: str, attempt: int) -> None:
        """Note that a worker's platform has started it again, if it has.

        Called when a worker has proved who it is.

        Args:
            identity: The worker's launch.
            attempt: Which start of the launch the worker is, from 1.
        """
        session = self._sessions.of_launch(identity)
        if session is None or attempt <= session.attempt:
            return
        self._launcher.disconnected(identity, orderly=False, reclaimed=True)
        self._engine.feed(events.WorkerRestarted(session.worker_id))

    def session_to_resume(self, identity: str, name: bytes) -> Any:
        """Return the session that a worker wants to go on with; ``None`` if it was given up."""
        session = self._sessions.of_launch(identity)
        if session is None or not session.resumable or session.name != name:
            return None
        is_open = not self._engine.is_closing
        return session if is_open and self._engine.machine.takes_back(session.worker_id) else None

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
        self._launcher.connected(session.identity, Arrival("", session.attempt, None, None))
        has_reported = not session.taken_over
        self._engine.feed(events.WorkerBack(session.worker_id, has_reported))

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

    def evacuate(self, command: commands.EvacuateWorker) -> None:
        """Bring the kept results of a worker here that its platform takes back."""
        session = self._sessions.get(command.worker)
        if session is not None:
            self._engine.create_task(self._keeper.evacuate(session))

    def terminate(self, command: commands.TerminateWorker) -> None:
        """Tell a worker to end at once."""
        session = self._sessions.get(command.worker)
        if session is not None:
            session.terminate()

    def close(self, command: commands.CloseSession) -> None:
        """Close the session of a worker that is gone, and drop all that was kept for it."""
        session = self._sessions.get(command.worker)
        if session is None:
            return
        self._sessions.remove(session)
        session.close()
        if self.takeover is not None:
            self.takeover.worker_lost(session)
        self._keeper.worker_lost(command.worker, session.told.blobs())
        if self.transfers is not None:
            self.transfers.session_ended(session)
        self._launcher.clean_up(session.identity, session.slot_groups)
        self._launches.newcomers.pop(command.worker, None)

    # Ends.

    def launch_ended(self, launch: str, end: LaunchEnd) -> None:
        """Take the launcher's report that a worker's process has ended or could not be started."""
        if not end.relaunched:
            self._launches.running.discard(launch)
            if self.takeover is not None:
                self.takeover.launch_ended(launch)
        self._tell(launch, end)
        if not self._launches.running:
            self.all_ended.set()

    def _tell(self, launch: str, end: LaunchEnd) -> None:
        self._engine.feed(
            events.ProcessEnded(
                launch,
                end.reason,
                fatal=end.fatal,
                killed=end.killed,
                reclaimed=end.reclaimed,
                out_of_memory=end.out_of_memory,
                relaunched=end.relaunched,
            )
        )

    def disconnected(self, session: Any, reason: str, *, cut: bool, unheard: bool) -> None:
        """Note that a worker's connection has ended.

        Args:
            session: The worker's session.
            reason: Why the connection ended, in words.
            cut: Whether the connection failed, so that the worker may connect again.
            unheard: Whether the worker's last messages may be lost.
        """
        worker = session.worker_id
        if self._sessions.get(worker) is not session:
            return
        known = self._engine.machine.workers.get(worker)
        self._launcher.disconnected(
            session.identity,
            orderly=known is not None and known.has_drained,
            reclaimed=known is not None and known.reclaimed,
        )
        is_open = not self._engine.is_closing
        self._engine.feed(
            events.ConnectionEnded(
                worker,
                reason,
                may_return=cut and session.resumable and is_open,
                may_report=is_open,
                unheard=unheard,
            )
        )
