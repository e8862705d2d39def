"""The workers and launches of an executor, and the sums of their slots.

A launch becomes a worker when the worker connects. A worker is connected; it may be cut off for a
while and connect again; it drains, that is, finishes its tasks and gets no more; and then it is
gone. Each of these steps is a method here, so that the sums of slots always agree with the workers.
Other modules decide whether a step is taken: ``ends``, ``scaling`` and ``closing``.
"""

from __future__ import annotations

import itertools

from cloudexec._config import ServerConfig
from cloudexec._core import commands, events, facts
from cloudexec._core.decisions import Decisions
from cloudexec._core.quarantine import Quarantine
from cloudexec._core.queue import Queues
from cloudexec._core.resources import ResourceRequest, Resources
from cloudexec._core.workers import Allocation, Launch, Worker, WorkerState

__all__ = ["REBALANCE_AFTER", "Pool"]

REBALANCE_AFTER = 0.1
"""Seconds between two checks whether tasks wait on one worker that another one could run."""


class Pool:
    """All workers and launches.

    Attributes:
        workers: By id: workers that are connected or cut off.
        launches: By id: launches whose workers have not connected.
        available: Ids of workers that may have room for tasks; a few turn out to be full.
        leases: Numbers for new leases.
        active_slots: Slots of launches and of workers that do not drain.
        starting_slots: Slots of launches.
        total_slots: Slots of launches and all workers, which ``max_slots`` limits.
        active_by_shape: ``active_slots`` by size and slots of the worker.
    """

    def __init__(
        self,
        config: ServerConfig,
        plain: ResourceRequest,
        queues: Queues,
        quarantine: Quarantine,
        decisions: Decisions,
    ) -> None:
        self.workers: dict[str, Worker] = {}
        self.launches: dict[str, Launch] = {}
        self.available: dict[str, None] = {}
        self.leases = itertools.count(1)
        self.active_slots = 0
        self.starting_slots = 0
        self.total_slots = 0
        self.active_by_shape: dict[tuple[int, int], int] = {}
        self.plain = plain
        self.has_other_shapes = False
        """Whether there is a worker or launch with another shape than that of plain tasks."""
        self._config = config
        self._scaling = config.scaling
        self._queues = queues
        self._quarantine = quarantine
        self._counts = decisions.counts
        self._do = decisions.commands.append
        self._state = decisions.facts.append
        self._state_dropped = decisions.state_dropped
        self._remind = decisions.remind
        self._launch_numbers = itertools.count(1)
        self._machine: Allocation | None = None  # set if all workers share one machine

    # Launches.

    def launch(self, slots: int, request: ResourceRequest, now: float) -> None:
        """Launch a worker for tasks with a request."""
        number = str(next(self._launch_numbers))
        self.expect(Launch(number, slots, now, request.shape, request.whole))
        self._counts["launches"] += 1
        self._do(commands.LaunchWorker(number, slots, request.size))

    def expect(self, launch: Launch) -> None:
        """Count a launch, also one that an earlier client has made."""
        self.launches[launch.id] = launch
        self.starting_slots += launch.slots
        self.total_slots += launch.slots
        self._count_active(launch.slots, launch.shape)
        self._remind(launch.started_at + self._scaling.launch_timeout)

    def withdraw(self, launch: Launch) -> None:
        """Withdraw a launch whose worker has not connected."""
        self.end_launch(launch.id)
        self._do(commands.TerminateLaunch(launch.id))

    def end_launch(self, launch_id: str) -> Launch | None:
        """Count a launch no more; return it, if it was there."""
        launch = self.launches.pop(launch_id, None)
        if launch is None:
            return None
        self.starting_slots -= launch.slots
        self.total_slots -= launch.slots
        self._count_active(-launch.slots, launch.shape)
        return launch

    def on_launches_taken_over(self, event: events.LaunchesTakenOver, now: float) -> None:
        self.leases = itertools.count(event.last_lease + 1)
        self._launch_numbers = itertools.count(event.last_launch + 1)
        for number, slots, size, capacity in event.launches:
            if self.total_slots + slots > self._scaling.max_slots:
                self._do(commands.TerminateLaunch(number))
                continue
            whole = self.plain.whole if capacity is None else Resources.had_by(capacity)
            self.expect(Launch(number, slots, now, (size, slots), whole))

    # Workers: connected, cut off, back, draining, gone.

    def connect(self, event: events.WorkerConnected, now: float) -> Worker:
        """Add the worker of a launch."""
        launch = self.launches.get(event.launch)
        self.end_launch(event.launch)
        shape = self.plain.shape if launch is None else launch.shape
        capacity = self.plain.whole if launch is None else launch.capacity
        allocation = self._allocation(capacity, event.slots)
        worker = Worker(event.worker, event.slots, event.launch, now, shape, allocation)
        allocation.workers[worker.id] = worker
        self.workers[worker.id] = worker
        self.total_slots += worker.slots
        self._count_active(worker.slots, shape)
        self._counts["workers_connected"] += 1
        self._remind(now + self._config.lease_timeout)
        if self._scaling.max_worker_lifetime is not None:
            self._remind(now + self._scaling.max_worker_lifetime)
        if event.taken_over:
            # It gets no tasks until it has reported those that it holds.
            worker.cut_at = now
            self._remind(now + self._config.reconnect_grace)
        self.settle(worker, now)
        self._state(facts.WorkerAdded(worker.id))
        return worker

    def cut_off(self, worker: Worker, now: float) -> None:
        """Send no tasks to a worker until it has connected again."""
        self._counts["workers_cut"] += 1
        worker.cut_at = now
        self.withhold(worker)

    def mend(self, worker: Worker, now: float) -> None:
        """Go on with a worker that has connected again and was cut off."""
        self._counts["workers_back"] += 1
        self._state(facts.WorkerReconnected(worker.id, worker.attempts()))
        worker.cut_at = None
        worker.heard_at = now
        self._remind(now + self._config.lease_timeout)
        lifetime = self._scaling.max_worker_lifetime
        if lifetime is not None:
            self._remind(max(now, worker.connected_at + lifetime))
        self.settle(worker, now)

    def on_heard(self, event: events.WorkerHeard, now: float) -> None:
        worker = self.workers.get(event.worker)
        if worker is not None:
            worker.heard_at = now
        self._state_dropped()

    def on_ready(self, event: events.WorkerReady, now: float) -> None:
        worker = self.workers.get(event.worker)
        if worker is not None:
            worker.heard_at = now
            worker.ready = True

    def on_draining(self, event: events.WorkerDraining, now: float) -> None:
        worker = self.workers.get(event.worker)
        if worker is not None and worker.is_active:
            # It was not told to by a command, so its platform has told it.
            worker.reclaimed = True
            self.drain(worker)
            self._state(facts.WorkerReclaimed(worker.id))
            self._do(commands.EvacuateWorker(worker.id))

    def drain(self, worker: Worker) -> None:
        """Send no more tasks to a worker."""
        if worker.state is WorkerState.ACTIVE:
            worker.state = WorkerState.DRAINING
            self._count_active(-worker.slots, worker.shape)
            self.withhold(worker)

    def retire(self, worker: Worker) -> None:
        """Have a worker finish its tasks and end; another one is launched if it is needed."""
        if worker.state is WorkerState.ACTIVE:
            self.drain(worker)
            self._do(commands.DrainWorker(worker.id))

    def remove(self, worker: Worker) -> None:
        """Remove a worker that is gone; the caller takes its leases back."""
        self.drain(worker)
        del self.workers[worker.id]
        self.total_slots -= worker.slots
        self._quarantine.release(worker, empty=True)
        allocation = worker.allocation
        allocation.workers.pop(worker.id, None)
        allocation.give_up_saving()
        for lease in worker.leases:
            allocation.heavy.pop(lease, None)

    def withhold(self, worker: Worker) -> None:
        """Make a worker unavailable that takes no tasks, for a while or for ever."""
        self.available.pop(worker.id, None)
        self._quarantine.release(worker)
        worker.allocation.give_up_saving()

    # Workers that may be sent tasks.

    def settle(self, worker: Worker, now: float) -> None:
        """Update whether a worker is available, idle, or must end, after leases have come back."""
        if not worker.leases:
            worker.load = 0.0
            worker.idle_since = now
            if self._quarantine.reserved:
                self._quarantine.release(worker, empty=True)
            if self._scaling.idle_timeout is not None:
                self._remind(now + self._scaling.idle_timeout)
        if worker.state is WorkerState.ACTIVE:
            most = self._scaling.max_tasks_per_worker
            if most is not None and worker.completed >= most:
                self.retire(worker)
            else:
                self.welcome(worker)
        if len(self.workers) > 1 and self._queues.open_tasks:
            self._remind(now + REBALANCE_AFTER)

    def welcome(self, worker: Worker) -> None:
        """Make an active worker available if it is within reach and not reserved for suspects."""
        if worker.is_within_reach:
            reserved = self._quarantine.reserved
            if not reserved or worker.id not in reserved:
                self.available[worker.id] = None

    def pass_by(self, worker: Worker) -> None:
        """Make a worker unavailable until it has answered, as it is full or reserved."""
        self.available.pop(worker.id, None)

    # Questions of other modules.

    def capacity_of(self, shape: tuple[int, int]) -> Resources:
        """Return the resources of workers of a shape, of which at least one must exist."""
        for worker in self.workers.values():
            if worker.shape == shape:
                return worker.allocation.capacity
        return next(each.capacity for each in self.launches.values() if each.shape == shape)

    def _allocation(self, capacity: Resources, slots: int) -> Allocation:
        scaling = self._scaling
        if not scaling.one_machine:
            return Allocation(capacity, slots, self.plain)
        if self._machine is None:
            gpu_ids = scaling.sizes[0].gpu_ids if scaling.sizes else ()
            self._machine = Allocation(capacity, scaling.max_slots, self.plain, gpu_ids)
        return self._machine

    def _count_active(self, slots: int, shape: tuple[int, int]) -> None:
        self.active_slots += slots
        active = self.active_by_shape.get(shape, 0) + slots
        if active:
            self.active_by_shape[shape] = active
        else:
            self.active_by_shape.pop(shape, None)
        plain = self.plain.shape in self.active_by_shape
        self.has_other_shapes = len(self.active_by_shape) > plain
