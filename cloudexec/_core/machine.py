"""The machine: takes events, and returns commands and facts.

The table of handlers has one line for each event, which names the module that handles it. After
each event, waiting tasks are sent, workers are launched or withdrawn, and the next deadline is set.
Calls go in one direction, from the end of this list to its head: ``queue``, ``workers``,
``quarantine``, ``pool``, ``dispatch`` and ``losses``, ``ends``, ``answers``, ``scaling`` and
``closing``, and the machine.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cloudexec._config import ServerConfig
from cloudexec._core import events
from cloudexec._core.answers import Answers
from cloudexec._core.closing import Closing
from cloudexec._core.commands import Command
from cloudexec._core.decisions import Decisions
from cloudexec._core.dispatch import Dispatch
from cloudexec._core.ends import Ends
from cloudexec._core.facts import Fact
from cloudexec._core.losses import Losses
from cloudexec._core.pool import Pool
from cloudexec._core.quarantine import Quarantine
from cloudexec._core.queue import Queues
from cloudexec._core.resources import ResourceRequest, plain_requests
from cloudexec._core.scaling import Scaling
from cloudexec._core.tasks import Task

__all__ = ["Machine"]

_LOOK_PAUSE = 1e-5
"""Seconds per worker between two checks of all workers. A check takes a small part of that time.
Without this pause, the deadlines of thousands of workers could follow each other arbitrarily close.
"""


class Machine:
    """The decisions of one executor. It is used in one thread, and holds no clock.

    Args:
        config: The settings.

    Attributes:
        config: The settings.
        workers: By id: workers that are connected or cut off.
        launches: By id: launches whose workers have not connected.
        blocked: Tasks that wait for futures.
        counts: How often each kind of event has happened so far, for statistics.
    """

    def __init__(self, config: ServerConfig) -> None:
        self.config = config
        plain = plain_requests(config.scaling)
        decisions = self._decisions = Decisions()
        queues = self._queues = Queues(plain, decisions)
        quarantine = self._quarantine = Quarantine(queues)
        pool = self._pool = Pool(config, plain[0], queues, quarantine, decisions)
        dispatch = self._dispatch = Dispatch(config, queues, pool, quarantine, decisions)
        losses = self._losses = Losses(config, queues, pool, quarantine, decisions)
        ends = self._ends = Ends(config, queues, pool, losses, decisions)
        answers = Answers(queues, pool, losses, decisions)
        scaling = self._scaling = Scaling(config, queues, pool, losses, decisions)
        closing = self._closing = Closing(queues, pool, ends, decisions)
        self.workers, self.launches = pool.workers, pool.launches
        self.blocked, self.counts = queues.blocked, decisions.counts
        self._handlers: dict[type, Callable[[Any, float], Any]] = {
            events.TasksSubmitted: queues.on_submitted,
            events.TasksBlocked: queues.on_blocked,
            events.TasksReleased: queues.on_released,
            events.TasksDropped: queues.on_dropped,
            events.TasksCancelled: queues.on_cancelled,
            events.TasksRecalled: dispatch.on_recalled,
            events.TasksTakenOver: answers.on_taken_over,
            events.TasksStarted: answers.on_started,
            events.ResultsReceived: answers.on_results,
            events.LeasesReturned: answers.on_returned,
            events.FailuresReceived: losses.on_failures,
            events.FailureJudged: losses.on_judged,
            events.InputsRestored: queues.on_restored,
            events.WorkerConnected: ends.on_connected,
            events.WorkerReady: pool.on_ready,
            events.WorkerHeard: pool.on_heard,
            events.WorkerDraining: pool.on_draining,
            events.ConnectionEnded: self._on_connection_ended,
            events.WorkerBack: ends.on_back,
            events.ProcessEnded: ends.on_process_ended,
            events.WorkerRestarted: ends.on_restarted,
            events.LaunchesRefused: scaling.on_launches_refused,
            events.LaunchesTakenOver: pool.on_launches_taken_over,
            events.ShutdownRequested: closing.on_shutdown,
            events.DeadlinePassed: self._on_deadline,
        }

    def handle(self, event: events.Event, now: float) -> list[Command]:
        """Handle one event.

        Args:
            event: What happened.
            now: Seconds on a clock that never goes back.

        Returns:
            The commands, in order.
        """
        self._handlers[type(event)](event, now)
        if self._closing.is_asking:
            self._closing.cancel_returned(now)
            if self._closing.is_asking:
                return self._decisions.take()
        if self._queues.waiting and (self._pool.available or self._quarantine.reserved):
            self._dispatch.assign(now)
        if self._queues.shutting_down and self._closing.is_due:
            self._closing.wind_down(now)
        else:
            self._scaling.scale(now)
        return self._decisions.take()

    def take_facts(self) -> list[Fact]:
        """Return what became of tasks and workers by the events since the last call."""
        facts = self._decisions.facts
        if not facts:
            return []
        taken = facts[:]
        facts.clear()
        return taken

    def next_deadline(self) -> float | None:
        """Return the latest time for ``DeadlinePassed``; ``None`` if it is not needed."""
        return self._decisions.deadline

    def _on_connection_ended(self, event: events.ConnectionEnded, now: float) -> None:
        if self._ends.on_connection_ended(event, now):
            self._closing.look_again()

    def _on_deadline(self, event: events.DeadlinePassed, now: float) -> None:
        """Check everything that depends on the time; each check sets its next deadline."""
        self._decisions.deadline = None
        everybody = len(self.workers) + len(self.launches)
        self._decisions.not_before = now + everybody * _LOOK_PAUSE
        self._losses.time_out_launches(now)
        self._queues.wake(now)
        self._ends.check(now)
        for worker in list(self.workers.values()):
            if self._ends.has_ended(worker, now) or self._scaling.retire_old(worker, now):
                continue
            self._dispatch.end_pause(worker, now)
            self._scaling.retire_idle(worker, now)
        self._dispatch.rebalance(now)

    # Questions from outside.

    @property
    def waiting(self) -> int:
        """Number of tasks in queues, without cancelled ones."""
        return self._queues.waiting

    @property
    def open_tasks(self) -> int:
        """Number of tasks that are waiting, backing off, sent or running."""
        return self._queues.open_tasks

    @property
    def shutting_down(self) -> bool:
        """Whether shutdown was requested, so that no more tasks come."""
        return self._queues.shutting_down

    @property
    def killing(self) -> bool:
        """Whether the remaining tasks are dropped."""
        return self._queues.killing

    @property
    def refusing(self) -> bool:
        """Whether no worker may be launched any more."""
        return self._scaling.refusing

    @property
    def finished(self) -> bool:
        """Whether all tasks are done and all workers gone."""
        return self._closing.finished

    def request_of(self, task: Task) -> ResourceRequest:
        """Return the resources that a task takes of the worker that runs it."""
        return self._queues.request_of(task)

    def waiting_tasks(self) -> list[Task]:
        """Return the tasks in queues, without cancelled ones."""
        return self._queues.waiting_tasks()

    def waiting_by_size(self) -> dict[int, int]:
        """Return how many tasks wait for each size of worker."""
        return self._queues.waiting_by_size()

    def backing_off_tasks(self) -> list[Task]:
        """Return the tasks between two attempts."""
        return list(self._queues.backing_off)

    def takes_back(self, worker: str) -> bool:
        """Say whether a worker may go on over another connection."""
        return self._ends.takes_back(worker)

    def validate(self) -> None:
        """Check every invariant; for tests.

        Raises:
            AssertionError: If an invariant does not hold; the message names it.
        """
        from cloudexec._core.invariants import check

        check(
            self.config,
            self._queues,
            self._pool,
            self._quarantine,
            self._ends,
            self._decisions,
        )
        if self.finished:
            assert not self._queues.has_work, "finished with tasks left"
            assert not self.workers, "finished with workers left"
