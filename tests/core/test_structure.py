"""The state of tasks has one owner, and changes as its table says."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import cloudexec
from cloudexec._config import ScalingPolicy
from cloudexec._core.decisions import Decisions
from cloudexec._core.events import TasksBlocked
from cloudexec._core.queue import Queues
from cloudexec._core.resources import plain_requests
from cloudexec._core.tasks import TRANSITIONS, FunctionStats, Task, TaskState

PACKAGE = Path(cloudexec.__file__).parent
_SETS = re.compile(r"\S*setattr(__)?\(.*, 'state', ")


def state_writes(tree: ast.AST) -> Iterator[str]:
    """Yield each place that assigns an attribute called ``state``, but of workers or of ``self``.

    Only a task's own constructor says ``self.state``: a class of tasks has no other methods for it.
    """
    for node in ast.walk(tree):
        targets: list[ast.expr] = []
        value: ast.expr | None = None
        if isinstance(node, ast.Assign):
            targets, value = node.targets, node.value
        elif isinstance(node, ast.AugAssign | ast.AnnAssign | ast.For | ast.comprehension):
            targets = [node.target]
        elif isinstance(node, ast.Call) and _SETS.match(ast.unparse(node)):
            yield ast.unparse(node)
        if value is not None and ast.unparse(value).startswith("WorkerState."):
            continue
        for target in targets:
            for each in ast.walk(target):
                stores = isinstance(each, ast.Attribute) and isinstance(each.ctx, ast.Store)
                if stores and each.attr == "state" and ast.unparse(each.value) != "self":
                    yield ast.unparse(node)


def test_only_the_queue_assigns_the_state_of_a_task() -> None:
    """So that sums over all tasks agree with their states, whoever asks for the change."""
    # These know nothing of tasks: queues and environments of AWS, generators of random numbers.
    strangers = {PACKAGE / "testing" / "_aws", PACKAGE / "worker"}
    writers = {
        str(file.relative_to(PACKAGE)): writes
        for file in PACKAGE.rglob("*.py")
        if not strangers & set(file.parents)
        and (writes := list(state_writes(ast.parse(file.read_text()))))
    }
    assert list(writers) == ["_core/queue.py"], writers


@pytest.mark.parametrize(
    "code",
    [
        "task.state = TaskState.DONE",
        "a.state, b = c",
        "task.state: object = 1",
        "for task.state in states: pass",
        "setattr(task, 'state', DONE)",
        "object.__setattr__(task, 'state', DONE)",
    ],
)
def test_each_way_to_assign_a_state_is_found(code: str) -> None:
    assert list(state_writes(ast.parse(code)))


CHANGES: dict[TaskState, Callable[[Queues, Task], object]] = {
    TaskState.BLOCKED: lambda queues, task: queues.on_blocked(TasksBlocked([task]), 0.0),
    TaskState.WAITING: lambda queues, task: queues.requeue([task]),
    TaskState.SENT: lambda queues, task: queues.send([task], 0),
    TaskState.RUNNING: lambda queues, task: queues.send([task], 1),
    TaskState.BACKING_OFF: lambda queues, task: queues.back_off(task),
    TaskState.DONE: lambda queues, task: queues.finish([task]),
}


@pytest.mark.parametrize("before", TaskState)
@pytest.mark.parametrize("after", TaskState)
def test_a_state_follows_another_only_if_the_table_says_so(
    before: TaskState, after: TaskState
) -> None:
    """Looked at for each change: a task that is done is never sent, whoever asks for it."""
    queues = Queues(plain_requests(ScalingPolicy(max_slots=1)), Decisions())
    task = Task(1, FunctionStats())
    task.state = before
    if before is TaskState.DONE and after is TaskState.WAITING:
        queues.requeue([task])  # one that was cancelled on its worker is not put back
        assert task.state is TaskState.DONE
    elif after in TRANSITIONS[before]:
        CHANGES[after](queues, task)
        assert task.state is after
    else:
        with pytest.raises(RuntimeError, match=f"cannot become {after.value}"):
            CHANGES[after](queues, task)
        assert task.state is before


def test_only_the_module_of_ends_changes_how_far_the_end_of_a_worker_has_come() -> None:
    """So that each stage has its deadline, and follows the one before as the table says."""
    sets = re.compile(r"(?<!self)\.(stage|until|told_at|report) = ")
    writers = [
        file.name
        for part in ("_core", "_server")
        for file in (PACKAGE / part).rglob("*.py")
        if sets.search(file.read_text())
    ]
    assert writers == ["ends.py"]
