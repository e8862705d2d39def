"""The open tasks: the queues that they wait in, and their states.

A task waits in a queue with tasks of the same priority and the same request for resources. Tasks
that are in no queue are on a worker, are blocked because they wait for futures, or back off between
two attempts. Each change from one of these states to another is a method here, so that the states
and the sums over all tasks always agree. No other module assigns a task's state, and a change that
``TRANSITIONS`` does not list is refused.
"""

from __future__ import annotations

import heapq
import math
import operator
from collections import Counter, deque
from collections.abc import Iterable, Sequence

from cloudexec._core import commands, events, facts
from cloudexec._core.decisions import Decisions
from cloudexec._core.resources import ResourceRequest
from cloudexec._core.tasks import TRANSITIONS, FunctionStats, Task, TaskState

__all__ = ["Queues", "TaskQueue"]

_BLOCKED, _WAITING, _SENT = TaskState.BLOCKED, TaskState.WAITING, TaskState.SENT
_RUNNING, _BACKING_OFF, _DONE = TaskState.RUNNING, TaskState.BACKING_OFF, TaskState.DONE

# The table by the new state, with the likeliest old states first. Finding a state in a tuple costs
# 20 ns; a set would compute the state's hash, which costs ten times as much.
_BY_LIKELIHOOD = (_SENT, _RUNNING, _WAITING, _BLOCKED, _BACKING_OFF, _DONE)
_BEFORE = {
    state: tuple([before for before in _BY_LIKELIHOOD if state in TRANSITIONS[before]])
    for state in TaskState
}
_BEFORE_SENT, _BEFORE_RUNNING = _BEFORE[_SENT], _BEFORE[_RUNNING]
_BEFORE_DONE = _BEFORE[_DONE]

_requirements_of = operator.attrgetter("requirements")


def _refusal(task: Task, state: TaskState) -> RuntimeError:
    return RuntimeError(f"{task!r} cannot become {state.value}")


def _change(task: Task, state: TaskState) -> None:
    if task.state not in _BEFORE[state]:
        raise _refusal(task, state)
    task.state = state


class TaskQueue:
    """Waiting tasks with the same priority and the same request.

    Attributes:
        key: The key in ``Queues.by_key``.
        priority: The priority of its tasks; higher ones are served first.
        request: The request of each of its tasks.
        apart: Whether its tasks are suspects, which run apart from all others.
        tasks: The waiting tasks, in order; some may have been cancelled meanwhile.
        open: Number of its tasks that are not done, waiting or not. Not counted for plain tasks.
    """

    def __init__(
        self, key: object, priority: int, request: ResourceRequest, *, apart: bool = False
    ) -> None:
        self.key = key
        self.priority = priority
        self.request = request
        self.apart = apart
        self.tasks: deque[Task] = deque()
        self.open = 0

    def head(self) -> Task | None:
        """Return the first task that still waits; those cancelled before it are dropped."""
        tasks = self.tasks
        while tasks:
            if tasks[0].state is _WAITING:
                return tasks[0]
            tasks.popleft()
        return None

    def tidy(self) -> None:
        """Remove all tasks that do not wait any more."""
        self.tasks = deque(task for task in self.tasks if task.state is _WAITING)


class Queues:
    """All open tasks.

    Attributes:
        plain: The queue of plain tasks, which were submitted without options. As long as there is
            no other queue, hardly anything is counted for a task.
        by_key: All queues; those without open tasks are dropped.
        with_inputs: Queues that have, or had, tasks with inputs. It is no set, because the order of
            a set differs between runs.
        suspects: Open tasks that run apart from others, and the number of them that may be together
            on one worker; 1 means alone.
        waiting: Number of tasks in queues, without cancelled ones.
        open_tasks: Number of tasks that are neither done nor blocked.
        blocked: Tasks that wait for futures. They need no workers yet.
        backing_off: Tasks that back off, and until when; infinite if it is not known yet.
        shutting_down: Whether no more tasks come.
        killing: Whether the remaining tasks are dropped.
    """

    def __init__(self, plain: Sequence[ResourceRequest], decisions: Decisions) -> None:
        self.plain = TaskQueue(None, 0, plain[0])
        self.by_key: dict[object, TaskQueue] = {None: self.plain}
        self.with_inputs: dict[TaskQueue, None] = {}
        self.suspects: dict[Task, int] = {}
        self.waiting = 0
        self.open_tasks = 0
        self.blocked: dict[Task, None] = {}
        self.backing_off: dict[Task, float] = {}
        self.shutting_down = False
        self.killing = False
        self._wakeups: list[tuple[float, int, Task]] = []
        self._plain_requests = plain
        self._do = decisions.commands.append
        self._state = decisions.facts.append
        self._counts = decisions.counts
        self._remind = decisions.remind

    # New tasks.

    def on_submitted(self, event: events.TasksSubmitted, now: float) -> None:
        self._counts["submitted"] += len(event.tasks)
        self._enqueue(event.tasks)

    def on_blocked(self, event: events.TasksBlocked, now: float) -> None:
        self._counts["submitted"] += len(event.tasks)
        for task in event.tasks:
            _change(task, _BLOCKED)
            self.blocked[task] = None

    def on_released(self, event: events.TasksReleased, now: float) -> None:
        self.unblock(event.tasks)

    def unblock(self, tasks: Iterable[Task]) -> None:
        """Queue those of these tasks that are still blocked.

        They are put first, because the results that they depend on take memory until they have run.
        """
        released = [task for task in tasks if task.state is _BLOCKED]
        for task in released:
            del self.blocked[task]
            _change(task, _WAITING)
        self._enqueue(released, first=True)

    def _enqueue(self, tasks: Sequence[Task], *, first: bool = False) -> None:
        """Put tasks into their queues, behind the tasks that wait there or before them."""
        if len(self._plain_requests) == 1 and not any(map(_requirements_of, tasks)):
            if first:
                self.plain.tasks.extendleft(reversed(tasks))
            else:
                self.plain.tasks.extend(tasks)
        elif first:
            for task in reversed(tasks):
                self.enter(task).tasks.appendleft(task)
        else:
            for task in tasks:
                self.enter(task).tasks.append(task)
        for task in tasks:
            if task.inputs:
                self.with_inputs[self.queue_of(task)] = None
        self.waiting += len(tasks)
        self.open_tasks += len(tasks)

    # Which queue a task belongs to.

    def request_of(self, task: Task) -> ResourceRequest:
        """Return the resources that a task takes of the worker that runs it."""
        requirements = task.requirements
        if requirements is not None and requirements.requests:
            return requirements.requests[min(task.size, len(requirements.requests) - 1)]
        return self._plain_requests[task.size]

    def queue_of(self, task: Task) -> TaskQueue:
        """Return the queue of a task, and make it if there is none."""
        requirements = task.requirements
        suspects = self.suspects
        apart = bool(suspects) and task in suspects
        if requirements is None and not task.size and not apart:
            return self.plain
        request = self.request_of(task)
        priority = 0 if requirements is None else requirements.priority
        if not priority and request is self._plain_requests[0] and not apart:
            return self.plain
        key = (priority, request, apart)
        queue = self.by_key.get(key)
        if queue is None:
            queue = self.by_key[key] = TaskQueue(key, priority, request, apart=apart)
        return queue

    def enter(self, task: Task) -> TaskQueue:
        """Count an open task in its queue, and return the queue."""
        requirements = task.requirements
        if requirements is None or not requirements.requests:
            task.size = min(max(task.size, task.stats.size), len(self._plain_requests) - 1)
        queue = self.queue_of(task)
        queue.open += queue is not self.plain
        return queue

    def leave(self, task: Task) -> None:
        """Stop counting an open task in its queue."""
        queue = self.queue_of(task)
        if queue is not self.plain:
            queue.open -= 1
            if queue.open <= 0:
                del self.by_key[queue.key]
                self.forget_inputs(queue)

    def forget_inputs(self, queue: TaskQueue) -> None:
        """Note that no task with inputs waits in a queue."""
        self.with_inputs.pop(queue, None)

    def open_in(self, queue: TaskQueue) -> int:
        """Return how many open tasks a queue has, waiting or not."""
        if queue is not self.plain:
            return queue.open
        return self.open_tasks - sum(each.open for each in self.by_key.values())

    def set_apart(self, task: Task, together: int) -> None:
        """Let a task run apart from now on, with at most ``together`` suspects on one worker."""
        if task in self.suspects:
            self.suspects[task] = together
        else:
            self._counts["suspects"] += 1
            self.leave(task)
            self.suspects[task] = together
            self.enter(task)

    def can_grow(self, task: Task, size: int) -> bool:
        """Say whether a task that ran out of memory on this size of worker may use a larger one."""
        requirements = task.requirements
        if requirements is not None and requirements.requests:
            larger = task.size + 1 < len(requirements.requests)
        else:
            larger = self._size_used(task, size) + 1 < len(self._plain_requests)
        return larger and task.retries > 0

    def grow(self, task: Task, size: int) -> None:
        """Let a task that ran out of memory on a worker of this size use larger ones only."""
        size = self._size_used(task, size)
        self.leave(task)
        task.size = size + 1
        if task.requirements is not None and task.requirements.requests:
            self.enter(task)
            return
        stats = task.stats
        before = stats.size
        stats.outgrew(size)
        self.enter(task)
        if stats.size > before and before < len(self._plain_requests) - 1:
            for queue in list(self.by_key.values()):
                if queue.request is self._plain_requests[before]:
                    self._move_on(queue, stats)

    def _size_used(self, task: Task, size: int) -> int:
        """Return the size that a task has outgrown: its worker's size if it is known here."""
        requirements = task.requirements
        has_requests = requirements is not None and bool(requirements.requests)
        if has_requests or size >= len(self._plain_requests):
            return task.size
        return max(size, task.size)

    def _move_on(self, queue: TaskQueue, stats: FunctionStats) -> None:
        """Move the waiting tasks of a function to the queue that its new tasks go to."""
        moving = [task for task in queue.tasks if task.stats is stats and task.state is _WAITING]
        if moving:
            queue.tasks = deque(task for task in queue.tasks if task.stats is not stats)
            for task in moving:
                self.leave(task)
                self.enter(task).tasks.append(task)

    # Tasks are sent to workers, and come back.

    def send(self, tasks: Sequence[Task], begun: int) -> None:
        """Note that tasks were taken from a queue for a worker.

        Args:
            tasks: The tasks.
            begun: How many of them (the first ones) begin at once; the others are sent ahead.
        """
        for task in tasks[:begun]:
            if task.state not in _BEFORE_RUNNING:
                raise _refusal(task, _RUNNING)
            task.state = _RUNNING
        for task in tasks[begun:]:
            if task.state not in _BEFORE_SENT:
                raise _refusal(task, _SENT)
            task.state = _SENT
        self.waiting -= len(tasks)

    def begin(self, task: Task) -> None:
        """Note that a task that was sent ahead runs now."""
        _change(task, _RUNNING)

    def adopt(self, task: Task) -> None:
        """Note that a worker has begun a task already that is blocked here."""
        del self.blocked[task]
        _change(task, _RUNNING)
        self.open_tasks += 1

    def requeue(self, tasks: Iterable[Task]) -> None:
        """Put tasks back at the head of their queues, keeping their order, unless they are done."""
        back = [task for task in tasks if task.state is not _DONE]
        for task in back:
            _change(task, _WAITING)
            task.worker = None
            task.lease = 0
        for task in reversed(back):
            queue = self.queue_of(task)
            queue.tasks.appendleft(task)
            if task.inputs and not queue.apart:
                self.with_inputs[queue] = None
        self.waiting += len(back)

    # Tasks back off.

    def back_off(self, task: Task) -> None:
        """Take a task out of its queue until ``back_off_until`` says for how long."""
        _change(task, _BACKING_OFF)
        self.backing_off[task] = math.inf

    def back_off_until(self, task: Task, due: float) -> None:
        """Set when a task that backs off returns to its queue."""
        self.backing_off[task] = due
        heapq.heappush(self._wakeups, (due, task.number, task))
        self._remind(due)

    def on_restored(self, event: events.InputsRestored, now: float) -> None:
        ready = [task for task in event.tasks if self.backing_off.get(task) == math.inf]
        for task in ready:
            del self.backing_off[task]
        self.requeue(ready)

    def wake(self, now: float) -> None:
        """Put tasks whose back-off has ended back into their queues."""
        wakeups = self._wakeups
        ready = []
        while wakeups and wakeups[0][0] <= now:
            due, _, task = heapq.heappop(wakeups)
            if self.backing_off.get(task) == due:
                del self.backing_off[task]
                ready.append(task)
        if wakeups:
            self._remind(wakeups[0][0])
        self.requeue(ready)

    # Tasks end.

    def finish(self, tasks: Sequence[Task]) -> None:
        """Mark tasks that have results as done."""
        for task in tasks:
            if task.state not in _BEFORE_DONE:
                raise _refusal(task, _DONE)
            task.state = _DONE
        if len(self.by_key) > 1:
            suspects = self.suspects
            for task in tasks:
                if task.requirements is not None or task.size or task in suspects:
                    self.leave(task)
                    suspects.pop(task, None)
        self.open_tasks -= len(tasks)
        self._counts["succeeded"] += len(tasks)

    def close(self, task: Task, how: str) -> None:
        """Mark a task without a result as done, in whatever state it is."""
        before = task.state
        _change(task, _DONE)
        self._counts[how] += 1
        if before is _BLOCKED:
            del self.blocked[task]
            return
        if before is _WAITING:
            self.waiting -= 1
        elif before is _BACKING_OFF:
            del self.backing_off[task]
        if len(self.by_key) > 1:
            self.leave(task)
            self.suspects.pop(task, None)
        self.open_tasks -= 1

    def on_dropped(self, event: events.TasksDropped, now: float) -> None:
        for task in event.tasks:
            if task.state is not _DONE:
                self.close(task, "failed")

    def on_cancelled(self, event: events.TasksCancelled, now: float) -> None:
        leases: dict[str, list[int]] = {}
        for task in event.tasks:
            if task.state is _DONE:
                continue
            if task.worker is not None:
                leases.setdefault(task.worker, []).append(task.lease)
            self.close(task, "cancelled")
        self._state(facts.TasksWithdrawn(event.tasks))
        if not self.waiting:
            self.clear()
        command = commands.KillTasks if event.kill else commands.RecallTasks
        for worker, numbers in leases.items():
            self._do(command(worker, numbers))

    def clear(self) -> None:
        """Empty the queues; all tasks in them are done."""
        for queue in self.by_key.values():
            queue.tasks.clear()

    def shut_down(self, *, kill: bool) -> None:
        """Note that no more tasks come, and whether the remaining ones are dropped."""
        self.shutting_down = True
        self.killing = self.killing or kill

    # Questions of other modules.

    @property
    def has_work(self) -> bool:
        """Whether any task is not done."""
        return bool(self.open_tasks or self.blocked)

    @property
    def is_emptying(self) -> bool:
        """Whether all remaining tasks are on workers, and no more will come."""
        return self.shutting_down and not (self.waiting or self.blocked or self.backing_off)

    def others_wait(self) -> bool:
        """Say whether tasks that are no suspects wait."""
        return any(not queue.apart and queue.head() is not None for queue in self.by_key.values())

    def waiting_tasks(self) -> list[Task]:
        """Return the tasks in queues, without cancelled ones."""
        queues = self.by_key.values()
        return [task for queue in queues for task in queue.tasks if task.state is _WAITING]

    def waiting_by_size(self) -> dict[int, int]:
        """Return how many tasks wait for each size of worker."""
        found: Counter[int] = Counter()
        for queue in self.by_key.values():
            if queue is not self.plain:  # the plain queue is long, and counted otherwise
                found[queue.request.size] += sum(task.state is _WAITING for task in queue.tasks)
        found[0] += self.waiting - found.total()
        return +found
