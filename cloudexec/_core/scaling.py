"""Decides how many workers are launched and retired, from demand, supply and policy.

Demand is the number of open tasks, waiting or not, by the shape (size and slots) of worker that
they ask for. Supply is the slots of connected workers and of launches. Missing slots are launched,
within ``max_slots``, which also counts draining workers, as these still run. Surplus slots are kept
for a while (``idle_timeout``), because the next tasks may need them. Then launches are withdrawn,
and idle workers are retired.

As long as all tasks are plain and all workers have one shape, this is one comparison of two numbers
after each event. Only otherwise are shapes examined one by one.
"""

from __future__ import annotations

from cloudexec._config import ServerConfig
from cloudexec._core import events
from cloudexec._core.decisions import Decisions
from cloudexec._core.losses import Losses
from cloudexec._core.pool import Pool
from cloudexec._core.queue import Queues, TaskQueue
from cloudexec._core.resources import Resources
from cloudexec._core.workers import Worker

__all__ = ["Scaling", "sizes_to_launch"]


class _Spare:
    """Slots of a shape that has no tasks for them, and that can serve tasks of another shape."""

    def __init__(self, capacity: Resources, slots: int) -> None:
        self.capacity = capacity
        self.slots = slots


class Scaling:
    """Launches missing workers, and gives up surplus ones.

    Attributes:
        refusing: Whether no worker may be launched any more.
    """

    def __init__(
        self,
        config: ServerConfig,
        queues: Queues,
        pool: Pool,
        losses: Losses,
        decisions: Decisions,
    ) -> None:
        self.refusing = False
        self._scaling = config.scaling
        self._queues = queues
        self._pool = pool
        self._losses = losses
        self._remind = decisions.remind
        self._surplus_since: float | None = None

    def on_launches_refused(self, event: events.LaunchesRefused, now: float) -> None:
        self.refusing = True
        for launch in event.launches:
            self._pool.end_launch(launch)

    # Up.

    def scale(self, now: float) -> None:
        """Launch missing workers; withdraw launches that are not needed any more."""
        queues, pool, policy = self._queues, self._pool, self._scaling
        if pool.launches:
            self._withdraw_surplus(now)
        active, demand = pool.active_slots, queues.open_tasks
        simple = len(queues.by_key) == 1 and not pool.has_other_shapes
        enough = active >= demand and active >= policy.min_slots
        if simple and (enough or active >= policy.max_slots):
            return
        if now < self._losses.launch_not_before or self.refusing or queues.is_emptying:
            return
        if not simple:
            self._scale_shapes(now)
            return
        wanted = min(policy.max_slots, max(demand, policy.min_slots))
        room = policy.max_slots - pool.total_slots
        for slots in sizes_to_launch(wanted - active, room, policy.slots_per_worker):
            pool.launch(slots, queues.plain.request, now)

    def _demand(self) -> dict[tuple[int, int], int]:
        """Return the number of open tasks for each shape of worker."""
        demand: dict[tuple[int, int], int] = {}
        for queue in self._queues.by_key.values():
            count = self._queues.open_in(queue)
            request = queue.request
            if count:
                if self._scaling.one_machine:
                    # More workers would not have more resources, as they share one machine.
                    count = min(count, request.need.times_in(request.whole))
                if queue.apart:
                    # Each suspect needs a worker of its own, however many slots that has.
                    count *= request.slots
                demand[request.shape] = demand.get(request.shape, 0) + count
        return demand

    def _scale_shapes(self, now: float) -> None:
        """Scale each shape of worker to the tasks that need it, the largest first.

        Surplus slots of one shape count for later shapes, if their tasks fit there.
        """
        policy, pool = self._scaling, self._pool
        demand = self._demand()
        plain = self._queues.plain
        plain_shape = plain.request.shape
        demand.setdefault(plain_shape, 0)
        most_urgent: dict[tuple[int, int], TaskQueue] = {plain_shape: plain}
        for queue in self._queues.by_key.values():
            best = most_urgent.get(queue.request.shape)
            if best is None or queue.priority > best.priority:
                most_urgent[queue.request.shape] = queue
        spare = [
            _Spare(pool.capacity_of(shape), slots)
            for shape, slots in pool.active_by_shape.items()
            if shape not in most_urgent
        ]

        def rank(queue: TaskQueue) -> tuple[int, ...]:
            whole = queue.request.whole
            return -queue.priority, -whole.gpus, -whole.memory, -whole.cpus

        for shape, queue in sorted(most_urgent.items(), key=lambda item: rank(item[1])):
            request = queue.request
            wanted, have = demand[shape], pool.active_by_shape.get(shape, 0)
            if shape == plain_shape:
                wanted = max(wanted, policy.min_slots - (pool.active_slots - have))
            # A large worker also serves small tasks, if it has no others.
            for each in spare:
                if have < wanted and each.slots and request.fits(each.capacity):
                    lent = min(each.slots, wanted - have)
                    each.slots -= lent
                    have += lent
            if wanted > have and pool.total_slots >= policy.max_slots:
                self._make_room(queue, wanted - have, alone=not have)
            room = policy.max_slots - pool.total_slots
            for slots in sizes_to_launch(wanted - have, room, request.slots):
                pool.launch(slots, request, now)
                have += slots
            if have > wanted:
                spare.append(_Spare(request.whole, have - wanted))

    def _make_room(self, queue: TaskQueue, missing: int, *, alone: bool) -> None:
        """Give up workers that cannot serve a queue, to make room for workers that can.

        Idle workers are given up first. If no worker serves the queue, and it is the queue's turn,
        a worker that has other tasks is given up, too. Otherwise the queue would wait for as long
        as other queues have tasks.

        Args:
            queue: The waiting queue.
            missing: Slots that it could use.
            alone: Whether no worker or launch serves it.
        """
        pool, fits = self._pool, queue.request.fits
        demand = self._demand()
        useless = [each for each in reversed(pool.launches.values()) if not fits(each.capacity)]
        for launch in useless:
            if missing > 0 and not demand.get(launch.shape):
                missing -= launch.slots
                pool.withdraw(launch)
        drained = sum(w.slots for w in pool.workers.values() if not w.is_active)
        missing -= drained
        # Workers that are idle now cannot serve the waiting tasks, or they would have them.
        strangers = [w for w in pool.workers.values() if not fits(w.allocation.capacity)]
        for worker in strangers:
            if missing > 0 and worker.takes_tasks and not worker.leases:
                missing -= worker.slots
                drained += worker.slots
                pool.retire(worker)
        head = queue.head()
        if not alone or drained or pool.total_slots < self._scaling.max_slots or head is None:
            return
        turns = [
            (-each.priority, first.number)
            for each in self._queues.by_key.values()
            if (first := each.head()) is not None
        ]
        if min(turns) < (-queue.priority, head.number):
            return
        pending = [launch for launch in useless if launch.id in pool.launches]
        if pending:
            pool.withdraw(pending[0])
            return
        busy = [worker for worker in strangers if worker.is_within_reach]
        if busy:
            pool.retire(min(busy, key=lambda worker: worker.load))

    # Down.

    def _withdraw_surplus(self, now: float) -> None:
        """Withdraw launches that no task has needed for as long as an idle worker is kept."""
        scaling, pool, queues = self._scaling, self._pool, self._queues
        surplus = pool.active_slots - max(queues.open_tasks, scaling.min_slots)
        at_once = queues.is_emptying
        if surplus <= 0 and not at_once:
            self._surplus_since = None
            return
        if not at_once:
            if scaling.idle_timeout is None:
                return
            if self._surplus_since is None:
                self._surplus_since = now
            until = self._surplus_since + scaling.idle_timeout
            if now < until:
                self._remind(until)
                return
        demand = self._demand() if len(queues.by_key) > 1 or pool.has_other_shapes else {}
        for launch in reversed(list(pool.launches.values())):
            supply = pool.active_by_shape.get(launch.shape, 0) - launch.slots
            needed = supply < demand.get(launch.shape, 0)
            if not at_once and (surplus < launch.slots or needed):
                continue
            surplus -= launch.slots
            pool.withdraw(launch)
        self._surplus_since = None

    def retire_old(self, worker: Worker, now: float) -> bool:
        """Retire a worker that has reached its largest age; say whether it has."""
        lifetime = self._scaling.max_worker_lifetime
        if lifetime is None or not worker.is_active:
            return False
        if now < worker.connected_at + lifetime:
            self._remind(worker.connected_at + lifetime)
            return False
        self._pool.retire(worker)
        return True

    def retire_idle(self, worker: Worker, now: float) -> None:
        """Retire a worker that has been idle for too long, unless ``min_slots`` needs it."""
        scaling, pool = self._scaling, self._pool
        if worker.idle_since is None or scaling.idle_timeout is None or not worker.is_active:
            return
        if pool.active_slots - pool.starting_slots - worker.slots < scaling.min_slots:
            return
        if now >= worker.idle_since + scaling.idle_timeout:
            pool.retire(worker)
        else:
            self._remind(worker.idle_since + scaling.idle_timeout)


def sizes_to_launch(missing: int, room: int, slots_per_worker: int) -> list[int]:
    """Return the numbers of slots of the workers to launch.

    Args:
        missing: Slots that tasks need beyond those of workers and launches.
        room: Slots that may be added within ``max_slots``.
        slots_per_worker: Slots of one worker.

    Returns:
        Slots of each worker to launch, ``slots_per_worker`` or the rest up to the limit.
    """
    sizes = []
    while missing > 0 and room > 0:
        size = min(slots_per_worker, room)
        sizes.append(size)
        missing -= size
        room -= size
    return sizes
