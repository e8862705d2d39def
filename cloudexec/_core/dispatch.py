"""Decides which task goes to which worker, and when.

After each event, the workers that may have room are visited, and take tasks from the queues. A free
slot always gets a task. Beyond that, short tasks are sent ahead, before a slot is free for them.
Tasks are served in the order of submission, with three exceptions. A task that asks for more than
one slot's share waits until a worker has that much room, and no task behind it may take that room
meanwhile. A task goes to a worker that has its inputs, if that has a free slot. And suspects (tasks
that may have killed a worker) go to workers without other tasks; see ``quarantine``.

In the usual case all tasks are plain, that is, they ask for one slot. Then no task is examined
singly: ``take_tasks`` moves them by the thousand.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence

from cloudexec._config import SendingPolicy, ServerConfig
from cloudexec._core import commands, events
from cloudexec._core.decisions import Decisions
from cloudexec._core.pool import REBALANCE_AFTER, Pool
from cloudexec._core.quarantine import Quarantine
from cloudexec._core.queue import Queues, TaskQueue
from cloudexec._core.resources import Resources
from cloudexec._core.tasks import Input, Task, TaskState
from cloudexec._core.workers import Worker

__all__ = ["Dispatch", "best_holder"]

_WAITING, _DONE = TaskState.WAITING, TaskState.DONE

_SPARE = 16
"""Number of available workers that are listed in addition to one for each waiting task, as a few
turn out to be full."""
_CANCEL_PAUSE = 0.05
"""Seconds after a cancellation in which no task is sent ahead to a worker."""
_WINDOW = 64
"""Number of tasks, in addition to one for each free slot, among which a worker looks for tasks
whose inputs it has."""
_OVERTAKEN = 64
"""Number of tasks that may overtake the first task of a queue because of their inputs."""


class Dispatch:
    """Sends tasks to workers, and recalls those that would be better elsewhere."""

    def __init__(
        self,
        config: ServerConfig,
        queues: Queues,
        pool: Pool,
        quarantine: Quarantine,
        decisions: Decisions,
    ) -> None:
        self._sending = config.sending
        self._most = config.scaling.max_tasks_per_worker
        self._queues = queues
        self._pool = pool
        self._quarantine = quarantine
        self._do = decisions.commands.append
        self._remind = decisions.remind
        self._passed: tuple[int, int] = (0, 0)  # the task that was overtaken last, and how often

    def assign(self, now: float) -> None:
        """Send waiting tasks to workers that have room."""
        queues, pool = self._queues, self._pool
        if queues.suspects or self._quarantine.reserved:
            self._assign_suspects(now)
            if not queues.others_wait():
                return
        near = bool(queues.with_inputs) and self._assign_near(now)
        simple = len(queues.by_key) == 1 and not near
        plain = queues.plain.tasks
        for name in self._in_turn():
            if not queues.waiting:
                break
            worker = pool.workers[name]
            share = max(worker.slots, -(-queues.waiting // len(pool.available)))
            if self._most is not None:
                share = self._limit(worker, share)
                if share <= 0:
                    pool.pass_by(worker)
                    continue
            allocation = worker.allocation
            if not simple or allocation.heavy or allocation.tight:
                self._serve(worker, share, now)
                continue
            tasks, begun = take_tasks(plain, worker, self._sending, pool.leases, share, now)
            if tasks:
                queues.send(tasks, begun)
                self._send(name, tasks, tasks[:begun] if begun else ())
            if len(tasks) < share and queues.waiting and worker.leases:
                # The worker took fewer tasks than offered, so it is full until it answers.
                pool.pass_by(worker)
        if near and queues.waiting:
            self._assign_near(now)  # once more, as idle workers have tasks now
        if not simple:
            for name in list(pool.available):
                worker = pool.workers[name]
                saving_for = worker.allocation.saving_for
                if saving_for is not None and saving_for.head() is None:
                    # Another worker has taken the task that this one saved room for.
                    worker.allocation.saving_for = None
                    self._serve(worker, self._limit(worker, worker.slots), now)

    def _in_turn(self) -> Iterable[str]:
        """Yield the available workers, but list no more of thousands than may be needed."""
        most = self._queues.waiting + _SPARE
        if len(self._pool.available) <= most:
            return list(self._pool.available)
        some = list(itertools.islice(self._pool.available, most))
        return itertools.chain(some, self._not_among(some))

    def _not_among(self, some: list[str]) -> Iterator[str]:
        """Yield the available workers that are not in the list, as far as they are asked for."""
        before = set(some)
        yield from [name for name in self._pool.available if name not in before]

    def _limit(self, worker: Worker, share: int) -> int:
        """Return how many more tasks a worker may be given, at most ``share``."""
        if self._most is None:
            return share
        return min(share, self._most - worker.completed - len(worker.leases))

    def _send(self, worker: str, tasks: Sequence[Task], begun: Sequence[Task]) -> None:
        if begun:
            self._do(commands.MarkRunning(begun))
        if tasks:
            self._do(commands.SendTasks(worker, tasks))

    # Several queues, and tasks that ask for more than a slot's share.

    def _serve(self, worker: Worker, share: int, now: float) -> None:
        """Send a worker as many tasks as it has room for, from one queue or several.

        If the first task of a queue does not fit yet, the worker takes no task from later queues
        until it fits. Otherwise small tasks would fill every gap, and a large task would wait as
        long as there are small ones. Each task that waits like this has one worker that saves room.
        """
        queues, allocation = self._queues, worker.allocation
        taken: list[Task] = []
        begun: list[Task] = []

        def take(tasks: list[Task], count: int) -> None:
            queues.send(tasks, count)
            taken.extend(tasks)
            begun.extend(tasks[:count])

        saving_for: TaskQueue | None = None
        for queue in in_order(queues.by_key.values(), worker):
            if share <= 0:
                break
            if queue.apart and (len(allocation.workers) == 1 or self._has_room(worker, queue)):
                continue  # ``_assign_suspects`` sends these tasks
            if allocation.needs_only_a_slot(queue.request):
                ahead = share
                if queue in queues.with_inputs:
                    ahead = min(share, worker.slots - len(worker.leases))
                if ahead > 0:
                    some, count = take_tasks(
                        queue.tasks, worker, self._sending, self._pool.leases, ahead, now
                    )
                    take(some, count)
                    share -= len(some)
                if len(worker.leases) >= worker.slots:
                    break
                continue
            room = allocation.room_left(queues.request_of)
            if room is not None and not queue.apart:
                some, room = take_fitting(queue, worker, self._pool.leases, share, room)
                take(some, len(some))
                share -= len(some)
            if queue.head() is None:
                continue
            if room is not None and len(worker.leases) >= worker.slots:
                break
            if allocation.saving_for is queue or self._savers(queue) < len(queue.tasks):
                saving_for = queue
                break
        allocation.saving_for = saving_for
        self._send(worker.id, taken, begun)
        if len(worker.leases) >= worker.slots and not queues.with_inputs:
            self._pool.pass_by(worker)

    def _savers(self, queue: TaskQueue) -> int:
        """Return how many workers, or machines, save room for a task of this queue."""
        allocations = {id(w.allocation): w.allocation for w in self._pool.workers.values()}
        return sum(allocation.saving_for is queue for allocation in allocations.values())

    def _has_room(self, worker: Worker, queue: TaskQueue) -> bool:
        """Say whether a task of a queue fits on a worker or machine beside its other tasks."""
        allocation, request = worker.allocation, queue.request
        if allocation.needs_only_a_slot(request):
            return True
        if len(allocation.workers) == 1 and not worker.leases:
            return True
        room = allocation.room_left(self._queues.request_of)
        return room is not None and request.need.within(room)

    # Suspects.

    def _assign_suspects(self, now: float) -> None:
        """Send suspects to workers without other tasks, and reserve workers for waiting suspects.

        A worker without tasks may get a suspect at once. If there are too few such workers, some
        with tasks are reserved: they get no more tasks, hand back those that they have not begun,
        and so become empty. Workers that are being launched count as empty, too.
        """
        queues, pool, quarantine = self._queues, self._pool, self._quarantine
        waiting = [q for q in queues.by_key.values() if q.apart and q.head() is not None]
        waiting.sort(key=lambda queue: (-queue.priority, queue.tasks[0].number))
        room = 0
        if waiting:  # without waiting suspects, only reserved workers need be checked
            for name, hosts in quarantine.reserved.items():
                if hosts:
                    self._top_up(pool.workers[name], now)
            room = quarantine.room(pool.workers.values(), shared=queues.others_wait())
        wanting: list[TaskQueue] = []  # one entry for each worker that must be emptied
        for queue in waiting:
            while room > 0 and (task := queue.head()) is not None:
                able = [pool.workers[name] for name in pool.available]
                able = [worker for worker in able if self._may_host(worker, queue)]
                if not able:
                    break
                self._send_apart(queue, best_holder(task.inputs, able) or able[0], now)
                room -= 1
            coming = [each for each in pool.launches.values() if queue.request.fits(each.capacity)]
            if queue.head() is not None:
                groups = -(-len(queue.tasks) // quarantine.group(queue))
                wanting += [queue] * (groups - len(coming))
        del wanting[max(room, 0) :]
        emptied = [pool.workers[name] for name, hosts in quarantine.reserved.items() if not hosts]
        for worker in emptied[len(wanting) :]:
            quarantine.release(worker)
            pool.welcome(worker)
        for queue in wanting[len(emptied) :]:
            busy = [w for w in pool.workers.values() if not self._outranked(w, queue)]
            chosen = quarantine.to_empty(queue, busy)
            if chosen is None:
                continue
            quarantine.reserve(chosen, hosts=False)
            pool.pass_by(chosen)
            sent = chosen.sent_ahead()
            if sent:
                self._do(commands.RecallTasks(chosen.id, sent))

    def _may_host(self, worker: Worker, queue: TaskQueue) -> bool:
        """Say whether a worker may get a suspect now, without other tasks beside it."""
        return (
            not worker.leases
            and self._limit(worker, 1) > 0
            and queue.request.fits(worker.allocation.capacity)
            and self._has_room(worker, queue)
            and not self._outranked(worker, queue)
        )

    def _outranked(self, worker: Worker, queue: TaskQueue) -> bool:
        """Say whether a worker could serve waiting tasks of a queue that comes before this one."""
        return any(
            each.priority > queue.priority
            and each.head() is not None
            and each.request.fits(worker.allocation.capacity)
            for each in self._queues.by_key.values()
        )

    def _send_apart(self, queue: TaskQueue, worker: Worker, now: float) -> None:
        """Send the first tasks of a queue to a worker that has only suspects of the same group."""
        leases, request = self._pool.leases, queue.request
        size = self._limit(worker, self._quarantine.group(queue, worker.leases.values()))
        if worker.allocation.needs_only_a_slot(request):
            tasks, begun = take_tasks(queue.tasks, worker, self._sending, leases, size, now)
        elif not worker.leases:
            tasks, _ = take_fitting(queue, worker, leases, 1, request.need)
            begun = 1
        else:
            return
        self._queues.send(tasks, begun)
        self._quarantine.reserve(worker, hosts=True)
        self._pool.pass_by(worker)
        self._send(worker.id, tasks, tasks[:begun])

    def _top_up(self, worker: Worker, now: float) -> None:
        """Send further suspects of its group to a worker, as it gets room."""
        if not worker.takes_tasks:
            return
        some = next((task for task in worker.leases.values() if task.state is not _DONE), None)
        if some is None or 2 * len(worker.leases) > self._queues.suspects[some]:
            return
        queue = self._queues.queue_of(some)
        if queue.head() is not None and not self._outranked(worker, queue):
            self._send_apart(queue, worker, now)

    # Tasks with inputs.

    def _assign_near(self, now: float) -> bool:
        """Send tasks to workers that have their inputs.

        This needs a free slot: if the worker with the inputs is full, the task goes to an idle one
        at once, because it is not known how long the full one takes, and the bytes can be moved
        meanwhile. Only if no slot is free anywhere are tasks sent ahead to the workers with their
        inputs.

        Returns:
            Whether tasks are left that prefer certain workers.
        """
        left = False
        for queue in list(self._queues.with_inputs):
            if queue.head() is None:
                self._queues.forget_inputs(queue)
            elif self._place(queue, now):
                left = True
        return left

    def _place(self, queue: TaskQueue, now: float) -> bool:
        available = [self._pool.workers[name] for name in self._pool.available]
        workers = [worker for worker in available if self._takes_freely(worker, queue)]
        free = sum(worker.free for worker in workers)
        head = queue.head()
        assert head is not None
        passed = self._passed[1] if self._passed[0] == head.number else 0
        most = free + (_WINDOW if passed < _OVERTAKEN else 0)
        window = [task for task in itertools.islice(queue.tasks, most) if task.state is _WAITING]
        begun: dict[str, list[Task]] = {}
        ahead: dict[str, list[Task]] = {}
        picky = False
        for task in window:
            if not task.inputs:
                continue
            holder = best_holder(task.inputs, [worker for worker in workers if worker.free])
            if holder is None and not free:
                some = [worker for worker in workers if self._takes_ahead(worker, task)]
                holder = best_holder(task.inputs, some)
            if holder is None:
                picky = picky or any(each.workers for each in task.inputs)
                continue
            begun.setdefault(holder.id, [])
            if holder.free:
                free -= 1
                begun[holder.id].append(task)
            else:
                ahead.setdefault(holder.id, []).append(task)
            holder.give(task, next(self._pool.leases))
        for name, starting in begun.items():
            tasks = starting + ahead.get(name, [])
            self._queues.send(tasks, len(starting))
            self._send(name, tasks, starting)
        if begun:
            first = queue.tasks[0]
            queue.tidy()
            if queue.tasks and queue.tasks[0] is first:
                given = sum(map(len, begun.values())) + sum(map(len, ahead.values()))
                self._passed = (first.number, passed + given)
        return picky and any(task.inputs for task in window)

    def _takes_freely(self, worker: Worker, queue: TaskQueue) -> bool:
        """Say whether a task of this queue may use any free slot of a worker."""
        allocation, request = worker.allocation, queue.request
        return (
            self._limit(worker, 1) > 0
            and request.fits(allocation.capacity)
            and allocation.needs_only_a_slot(request)
            and allocation.saving_for in (None, queue)
        )

    def _takes_ahead(self, worker: Worker, task: Task) -> bool:
        """Say whether a task may be sent ahead to a worker, before that has a free slot."""
        sending, slots, stats = self._sending, worker.slots, task.stats
        most = min(sending.max_lookahead * slots, slots + 2 * stats.samples)
        return (
            worker.load + stats.seconds <= sending.lookahead * slots
            and len(worker.leases) < most
            and not worker.paused_until
        )

    # Tasks that were sent ahead come back.

    def on_recalled(self, event: events.TasksRecalled, now: float) -> None:
        # A user who cancels one task often cancels more. So all tasks that were sent ahead come
        # back, and none is sent ahead for a moment, so that the others can be cancelled here.
        sent = [task for task in event.tasks if task.state is TaskState.SENT]
        for name in dict.fromkeys(task.worker for task in sent):
            worker = self._pool.workers.get(name or "")
            if worker is None:
                continue
            if now >= worker.paused_until:
                self._do(commands.RecallTasks(worker.id, worker.sent_ahead()))
            worker.paused_until = now + _CANCEL_PAUSE
            self._remind(worker.paused_until)

    def end_pause(self, worker: Worker, now: float) -> None:
        """Send tasks ahead to a worker again, some time after a cancellation."""
        if not worker.paused_until:
            return
        if now < worker.paused_until:
            self._remind(worker.paused_until)
            return
        worker.paused_until = 0.0
        if worker.is_active:
            self._pool.welcome(worker)

    def rebalance(self, now: float) -> None:
        """Recall tasks that wait on one worker while another has a free slot."""
        workers = self._pool.workers
        if len(workers) < 2 or (self._queues.waiting and self._queues.others_wait()):
            return
        free = sum(workers[name].free for name in self._pool.available)
        crowded = [w for w in workers.values() if len(w.leases) > w.slots and w.is_within_reach]
        if not crowded:
            return
        self._remind(now + REBALANCE_AFTER)
        if not free:
            return
        for worker in sorted(crowded, key=lambda w: len(w.leases) - w.slots, reverse=True):
            sent = worker.sent_ahead()
            some = sent[-math.ceil(len(sent) / 2) :] if sent else []
            if some:
                self._do(commands.RecallTasks(worker.id, some))
                free -= len(some)
            if free <= 0:
                break


def in_order(queues: Iterable[TaskQueue], worker: Worker) -> list[TaskQueue]:
    """Return the queues that a worker may serve, in the order in which it should serve them.

    Queues with a higher priority come first; then queues for which this size of worker was
    launched, so that large workers serve small tasks only if they have no others; then larger
    sizes; then queues whose first task was submitted earlier.
    """
    found = []
    capacity, size = worker.allocation.capacity, worker.size
    for queue in queues:
        request = queue.request
        head = queue.head()
        if head is not None and request.fits(capacity):
            stranger = request.size != size
            least = -request.whole.memory if stranger else 0
            found.append(((-queue.priority, stranger, least, head.number), queue))
    found.sort(key=lambda entry: entry[0])
    return [queue for _, queue in found]


def best_holder(inputs: Iterable[Input], workers: Iterable[Worker]) -> Worker | None:
    """Return the worker that has most bytes of a task's inputs; ``None`` if no worker has any.

    Among equals, the worker with the fewest tasks is returned.

    Args:
        inputs: The task's inputs.
        workers: The workers that may run the task, in the order in which equals are preferred.
    """
    held: dict[str, int] = {}
    for each in inputs:
        if each.size > 0:
            for name in each.workers:
                held[name] = held.get(name, 0) + each.size
    if not held:
        return None
    holders = [worker for worker in workers if worker.id in held]
    return max(holders, key=lambda w: (held[w.id], -len(w.leases)), default=None)


def take_fitting(
    queue: TaskQueue, worker: Worker, leases: Iterator[int], share: int, room: Resources
) -> tuple[list[Task], Resources]:
    """Move tasks from the head of a queue to free slots of a worker, and send none ahead.

    Args:
        queue: The queue.
        worker: The worker.
        leases: Numbers for new leases.
        share: The largest number of tasks to take.
        room: The resources that the worker has left.

    Returns:
        The tasks, which begin at once, and the resources that are left then.
    """
    taken: list[Task] = []
    request, allocation = queue.request, worker.allocation
    need = request.need
    light = allocation.is_light(request)
    while len(taken) < share and len(worker.leases) < worker.slots and need.within(room):
        task = queue.head()
        if task is None:
            break
        queue.tasks.popleft()
        worker.give(task, next(leases))
        if not light:
            allocation.heavy[task.lease] = allocation.free_gpus(need.gpus) if need.gpus else ()
        room = Resources(room.cpus - need.cpus, room.memory - need.memory, room.gpus - need.gpus)
        taken.append(task)
    return taken, room


def take_tasks(
    queue: deque[Task],
    worker: Worker,
    policy: SendingPolicy,
    leases: Iterator[int],
    share: int,
    now: float,
) -> tuple[list[Task], int]:
    """Move tasks from the head of a queue to a worker.

    A free slot always gets a task. Beyond that, tasks are sent ahead only while the estimated work
    on the worker stays below ``policy.lookahead`` seconds per slot. A function without finished
    tasks counts as long, and the number of tasks that are sent ahead grows with the number of tasks
    that have finished. So very short tasks are sent by the thousand, and a task that is longer than
    the look-ahead is sent only when a slot is free.

    Args:
        queue: The waiting tasks; cancelled ones are dropped here.
        worker: The worker.
        policy: The settings of the look-ahead.
        leases: Numbers for new leases.
        share: The largest number of tasks to take, so that other workers get theirs.
        now: The time, in seconds.

    Returns:
        The tasks, and how many of them (the first ones) begin at once in a free slot.
    """
    taken: list[Task] = []
    slots = worker.slots
    held = worker.leases
    load = worker.load
    budget = policy.lookahead * slots
    cap = policy.max_lookahead * slots
    in_flight = len(held)
    if now < worker.paused_until:
        cap = slots
    if in_flight >= slots and (2 * load > budget or 2 * in_flight > cap):
        # The worker has enough tasks. Adding some for each result would make many small messages.
        return [], 0
    free = max(0, slots - in_flight)
    name = worker.id
    last = in_flight + share
    stats = None
    while queue and in_flight < last:
        task = queue.popleft()
        if task.state is not _WAITING:
            continue
        if task.stats is not stats:
            stats = task.stats
            seconds = stats.seconds
            most = min(cap, slots + 2 * stats.samples)
        if in_flight >= slots and (in_flight >= most or load + seconds > budget):
            queue.appendleft(task)
            break
        task.lease = lease = next(leases)
        task.worker = name
        task.cost = seconds
        load += seconds
        held[lease] = task
        in_flight += 1
        taken.append(task)
    worker.load = load
    if taken:
        worker.idle_since = None
    return taken, min(free, len(taken))
