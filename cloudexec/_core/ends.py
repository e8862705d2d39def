"""Decides when a worker is lost; it reads from top to bottom. ``losses`` decides what follows.

A worker has a connection and a process. Each has an end, of which the machine is told by an event.
The worker is lost when both ends are known, so that its last messages have been read and the cause
is known, or when the second one has been waited for long enough:

- If the connection was cut, the worker may connect again within ``reconnect_grace``.
- If the connection has ended for good, the launcher may report the end of the process within
  ``last_words``.
- If the process has ended, the connection may last a few seconds.

A worker is given up that does not come back in time, is silent for too long, or drains, has no
tasks left, and does not end. Its tasks run elsewhere at once, while the worker itself is told to
end. A worker that was told to end has a moment to do so, and is then ended by force. So is the
process of a lost worker, if its end was not reported.
"""

from __future__ import annotations

from cloudexec._config import ServerConfig
from cloudexec._core import commands, events, facts
from cloudexec._core.decisions import Decisions
from cloudexec._core.events import ProcessEnded
from cloudexec._core.losses import Losses
from cloudexec._core.pool import Pool
from cloudexec._core.queue import Queues
from cloudexec._core.workers import STAGES, Stage, Worker

__all__ = ["Ends"]

_TERMINATION = 2.0
"""Seconds that a worker has to end by itself after it was told to end at once, or was lost."""
_LAST_MESSAGES = 5.0
"""Seconds that a worker's connection may last after its process was reported to have ended."""
_PROMPT = 0.1
"""Seconds in which the end of a process is reported that was told to end, if at all."""
_FAREWELL = 10.0
"""Seconds that a worker may take to end at the end of the executor; its slots have five of them."""
_HAND_OVER = 90.0
"""Seconds that a worker may take to end before that. Its kept results may be needed: handing them
over takes up to half a minute, and waiting until they were taken as long again."""


class Ends:
    """The ends of all workers.

    Attributes:
        workers: By id: workers whose session is not closed, also those that were given up.
        processes: By launch: when a process is ended by force whose worker is lost.
    """

    def __init__(
        self,
        config: ServerConfig,
        queues: Queues,
        pool: Pool,
        losses: Losses,
        decisions: Decisions,
    ) -> None:
        self.workers: dict[str, Worker] = {}
        self.processes: dict[str, float] = {}
        self._by_launch: dict[str, Worker] = {}
        self._ending: dict[str, Worker] = {}  # those that have a time ``until``
        self._config = config
        self._queues = queues
        self._pool = pool
        self._losses = losses
        self._do = decisions.commands.append
        self._state = decisions.facts.append
        self._remind = decisions.remind

    # Events.

    def on_connected(self, event: events.WorkerConnected, now: float) -> None:
        self._losses.note_connected()
        worker = self._pool.connect(event, now)
        self.workers[worker.id] = self._by_launch[worker.launch] = worker
        if self._queues.killing:
            self.terminate(worker, now)

    def on_connection_ended(self, event: events.ConnectionEnded, now: float) -> bool:
        """Wait for the worker or for the end of its process; say whether it may connect again."""
        worker = self.workers.get(event.worker)
        if worker is None or worker.stage is Stage.CLOSED:
            return False
        worker.why = event.reason
        worker.unheard = event.unheard or event.may_return
        if worker.stage is Stage.REPORTED:
            self._lose(worker, now)
        elif event.may_return and worker.told_at is None and not worker.has_drained:
            return self._cut_off(worker, now)
        elif not event.may_report:
            self._lose(worker, now)
        else:
            self._enter(worker, Stage.CLOSED)
            self._pool.withhold(worker)
            is_prompt = self._queues.killing or (worker.has_drained and not worker.reclaimed)
            self._wait(worker, now + (_PROMPT if is_prompt else self._config.last_words))
        return False

    def _cut_off(self, worker: Worker, now: float) -> bool:
        if worker.stage is Stage.CUT:
            return False
        self._enter(worker, Stage.CUT)
        self._state(facts.WorkerCutOff(worker.id, worker.attempts()))
        if worker.cut_at is None:
            self._pool.cut_off(worker, now)
            self._remind(now + self._config.reconnect_grace)
        if not self._config.reconnect_grace:
            self.give_up_cut(worker, now)
        return True

    def on_back(self, event: events.WorkerBack, now: float) -> None:
        worker = self.workers.get(event.worker)
        if worker is None or worker.stage not in (Stage.CONNECTED, Stage.CUT):
            return
        if worker.stage is Stage.CUT:
            self._enter(worker, Stage.CONNECTED)
        worker.unheard = False  # it sends again what may be lost
        if event.has_reported and worker.cut_at is not None and worker.told_at is None:
            self._pool.mend(worker, now)

    def on_process_ended(self, event: ProcessEnded, now: float) -> None:
        worker = self._by_launch.get(event.launch)
        if not event.relaunched:
            self.processes.pop(event.launch, None)
        if worker is not None:
            worker.report = event
            if worker.stage is Stage.CONNECTED:
                self._enter(worker, Stage.REPORTED)
                self._pool.withhold(worker)
                self._wait(worker, now + _LAST_MESSAGES)
            elif worker.stage is not Stage.REPORTED:
                self._lose(worker, now)
        elif not event.relaunched:
            self._losses.on_launch_failed(event, now)

    def takes_back(self, worker: str) -> bool:
        """Say whether a worker may go on over another connection."""
        known = self.workers.get(worker)
        return known is not None and known.stage is not Stage.CLOSED

    def on_restarted(self, event: events.WorkerRestarted, now: float) -> None:
        """Count the worker's earlier process as lost; it may not have been reported yet."""
        worker = self.workers.get(event.worker)
        if worker is not None:
            if worker.report is None:
                # A platform starts a worker again by itself only if it took the machine away.
                why = "its machine was taken back, and it was started again on another"
                worker.report = ProcessEnded(worker.launch, why, reclaimed=True, relaunched=True)
            self._lose(worker, now, unheard=worker.stage is not Stage.CLOSED)

    # A worker is given up.

    def has_ended(self, worker: Worker, now: float) -> bool:
        """Check whether a worker was cut off, silent, or draining without tasks for too long.

        Returns:
            Whether it is lost or about to end, so that nothing else needs to be checked.
        """
        config = self._config
        if worker.until is not None:
            return True
        if worker.cut_at is not None:
            if now >= worker.cut_at + config.reconnect_grace:
                self.give_up_cut(worker, now)
            else:
                self._remind(worker.cut_at + config.reconnect_grace)
            return True
        if now >= worker.heard_at + config.lease_timeout:
            reason = f"it was silent for {config.lease_timeout:g} s"
            self._give_up(worker, reason, now, unheard=True)
            return True
        self._remind(worker.heard_at + config.lease_timeout)
        return not worker.is_active and self._overstays(worker, now)

    def _overstays(self, worker: Worker, now: float) -> bool:
        """Give up a draining worker that has no tasks left and does not end."""
        if worker.has_work:
            worker.over_at = None
            return False
        if worker.over_at is None:
            worker.over_at = now
        # Once all tasks are done, its kept results are not needed any more.
        winding_down = self._queues.shutting_down and not self._queues.has_work
        limit = _FAREWELL if winding_down else _HAND_OVER
        if now < worker.over_at + limit:
            self._remind(worker.over_at + limit)
            return False
        reason = f"it did not end within {limit:g} s although it had nothing left to do"
        self._give_up(worker, reason, now)
        return True

    def give_up_cut(self, worker: Worker, now: float) -> None:
        """Give up a worker whose connection was cut."""
        grace = self._config.reconnect_grace
        reason = "its connection was cut"
        if grace:
            reason += f", and it did not come back within {grace:g} s (reconnect_grace)"
        self._give_up(worker, reason, now)

    def _give_up(self, worker: Worker, reason: str, now: float, *, unheard: bool = False) -> None:
        self.terminate(worker, now)
        end = ProcessEnded(worker.launch, reason)
        self._losses.lose_worker(worker, end, now, unheard=unheard)

    # A worker is to end at once.

    def terminate(self, worker: Worker, now: float) -> None:
        """Have a worker end at once, and by force if it does not do so by itself."""
        if worker.told_at is None:
            worker.told_at = now
        if worker.stage is Stage.CUT:
            # The worker cannot be told. It is refused if it connects again.
            self._close(worker, now)
            return
        if worker.stage is not Stage.CLOSED:
            self._do(commands.TerminateWorker(worker.id))
        self._wait(worker, worker.told_at + _TERMINATION)

    def check(self, now: float) -> None:
        """End what has been waited for long enough."""
        for worker in list(self._ending.values()):
            assert worker.until is not None
            if now < worker.until:
                self._remind(worker.until)
                continue
            if worker.stage is Stage.CONNECTED:
                worker.why = "it did not end when it was told to, and was cut off"
            self._lose(worker, now, unheard=worker.stage is not Stage.CLOSED)
        for launch in list(self.processes):
            self._end_by_force(launch, now)

    # A worker is lost.

    def _lose(self, worker: Worker, now: float, *, unheard: bool = False) -> None:
        """Close a worker's session, and let its tasks run elsewhere, unless it was given up.

        Args:
            worker: The worker.
            now: The time.
            unheard: Whether its connection has not ended, so that its last messages may be lost.
        """
        end = worker.report
        if end is None:
            end = ProcessEnded(worker.launch, worker.why, reclaimed=worker.reclaimed)
        if worker.id in self._pool.workers:
            self._losses.lose_worker(worker, end, now, unheard=unheard)
        self._close(worker, now)

    def _close(self, worker: Worker, now: float) -> None:
        """Close a worker's session, and have its process ended by force if it does not end."""
        self._enter(worker, Stage.LOST)
        worker.until = None
        self._ending.pop(worker.id, None)
        del self.workers[worker.id]
        if self._by_launch.get(worker.launch) is worker:
            del self._by_launch[worker.launch]
        self._do(commands.CloseSession(worker.id))
        report, launch = worker.report, worker.launch
        if report is None or (report.relaunched and launch not in self._pool.launches):
            since = now if worker.told_at is None else worker.told_at
            self.processes[launch] = since + _TERMINATION
            self._end_by_force(launch, now)

    def _end_by_force(self, launch: str, now: float) -> None:
        """Have the process of a lost worker ended, if it had time to end by itself."""
        until = self.processes[launch]
        if now < until:
            self._remind(until)
        else:
            del self.processes[launch]
            self._do(commands.TerminateLaunch(launch))

    def _enter(self, worker: Worker, stage: Stage) -> None:
        if stage not in STAGES[worker.stage]:
            before = worker.stage.value
            raise RuntimeError(f"{worker.id} is {before}, and cannot become {stage.value}")
        worker.stage = stage

    def _wait(self, worker: Worker, until: float) -> None:
        """Wait for a worker's end, but no longer than before."""
        worker.until = until if worker.until is None else min(until, worker.until)
        self._ending[worker.id] = worker
        self._remind(worker.until)
