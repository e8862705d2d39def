"""Whatever the order in which a supervisor and its slots go on, each task has one true outcome."""

from __future__ import annotations

import importlib
import itertools
import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from stepping import Action, Run, Stop, many_stops, one_stop, search

from cloudexec import worker
from cloudexec.worker.tasks import KILLED

SIZES = [(1, 4, False), (1, 6, True), (1, 9, False), (2, 8, False)]
"""Slots, tasks, and whether some of these have results that are left in the slot's file."""


@pytest.fixture(autouse=True)
def no_fork_hooks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slots that live in this process would stay for its life if they were told of its forks."""
    monkeypatch.setattr(os, "register_at_fork", lambda **_: None)


def steps_of(items: int, slots: int, large: bool) -> int:
    run = Run(items, slots=slots, large=large).go()
    assert run.judge() == ""
    return run.steps


@pytest.mark.parametrize(("slots", "items", "large"), SIZES)
def test_tasks_run_once_wherever_one_side_is_stopped(slots: int, items: int, large: bool) -> None:
    """Either side may be stopped for long before any line that touches what they share."""
    assert search(items, one_stop(steps_of(items, slots, large)), slots=slots, large=large) == ""


@pytest.mark.parametrize(("slots", "items", "large"), SIZES)
def test_tasks_run_once_wherever_both_sides_are_stopped(
    slots: int, items: int, large: bool
) -> None:
    """They may be stopped several times, in turn."""
    schedules = many_stops(random.Random(items), 200, steps_of(items, slots, large))
    assert search(items, schedules, slots=slots, large=large) == ""


@pytest.mark.parametrize(("slots", "items", "large"), SIZES)
def test_a_slot_that_dies_anywhere_takes_one_task_with_it(
    slots: int, items: int, large: bool
) -> None:
    """The others have their results, or run elsewhere: none of them twice, and none is lost."""
    steps = steps_of(items, slots, large)
    assert search(items, one_stop(steps, kill=True), slots=slots, large=large) == ""
    schedules = many_stops(random.Random(items), 120, steps, kill=True)
    assert search(items, schedules, slots=slots, large=large) == ""


def asked(
    rng: random.Random, runs: int, steps: int, ask: Any, items: int
) -> Iterator[tuple[list[Stop], Action]]:
    """Stop at some steps, and have the client ask for something about one of the tasks."""
    for stops, _ in many_stops(rng, runs, steps):
        when, lease = rng.randint(0, 8), rng.randint(1, items)

        def during(pool: Any, looks: int, when: int = when, lease: int = lease) -> None:
            if looks == when:
                ask(pool, lease)

        yield list(stops), during


@pytest.mark.parametrize(("slots", "items", "large"), SIZES)
def test_what_a_recall_returns_has_not_run(slots: int, items: int, large: bool) -> None:
    """``cancel()`` is true of what was returned, and of nothing that ran."""

    def recall(pool: Any, lease: int) -> None:
        pool.recall([number for number in (lease, lease + 2) if number in pool.leases()])

    schedules = asked(random.Random(items), 120, steps_of(items, slots, large), recall, items)
    assert search(items, schedules, slots=slots, large=large) == ""


@pytest.mark.parametrize(("slots", "items", "large"), SIZES)
def test_a_task_that_is_killed_takes_no_other_with_it(slots: int, items: int, large: bool) -> None:
    """The slot may be done with it, and have begun another, in the moment in which it is killed."""

    def kill(pool: Any, lease: int) -> None:
        if lease in pool.leases():
            pool.kill([lease], KILLED)

    def is_theirs(run: Run) -> bool:
        return all(failure.kind == KILLED for failure in run.failures)

    for stops, during in asked(
        random.Random(items), 120, steps_of(items, slots, large), kill, items
    ):
        run = Run(items, stops, slots=slots, large=large, during=during).go()
        assert run.judge() == "", stops
        assert is_theirs(run), (stops, run.failures)


@pytest.mark.parametrize(("slots", "items", "large"), SIZES)
def test_a_pool_that_drains_returns_what_has_not_begun(slots: int, items: int, large: bool) -> None:
    """Each task has its result, or is handed back and has not run."""

    def drain(pool: Any, lease: int) -> None:
        pool.drain()

    schedules = asked(random.Random(items), 80, steps_of(items, slots, large), drain, items)
    assert search(items, schedules, slots=slots, large=large) == ""


def changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str, before: str, after: str
) -> tuple[ModuleType, ModuleType]:
    """Return the supervisor and the slot of a copy of the package whose code has one mistake."""
    copy = tmp_path / "changed_worker"
    copy.mkdir()
    for file in Path(worker.__path__[0]).glob("*.py"):
        text = file.read_text()
        if file.stem == part:
            assert text.count(before) == 1
            text = text.replace(before, after)
        (copy / file.name).write_text(text.replace("cloudexec.worker", copy.name))
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] == copy.name]:
        del sys.modules[name]  # of the mistake before this one
    supervisor = importlib.import_module(f"{copy.name}.supervisor")
    return supervisor, importlib.import_module(f"{copy.name}.slot")


MISTAKES = {
    "the fence is read before the delivery is named": (
        "slot",
        """            cells[CURRENT] = delivery
            if cells[FENCE] >= delivery:  # must be read after CURRENT has been written
""",
        """            fence = cells[FENCE]
            cells[CURRENT] = delivery
            if fence >= delivery:
""",
    ),
    "a dropped task is not told of": ("slot", "outlet.send(Kind.DROPPED, delivery)", "pass"),
    "the next one is named before the answer is there": (
        "outlet",
        """        self.used += size
        self.cells[USED] = self.used
""",
        """        self.cells[CURRENT] = 0
        self.used += size
        self.cells[USED] = self.used
""",
    ),
    "the fence is not written": (
        "taking_back",
        "            slot.cells[FENCE] = slot.fence\n",
        "",
    ),
    "the delivery that runs is taken back": (
        "slot_model",
        "if number != current and number <= self.fence",
        "if number <= self.fence",
    ),
    "a slot that died has begun nothing": (
        "slot_model",
        "[n for n in self.held if n == current or n in self.unopened]",
        "[n for n in self.held if n in self.unopened]",
    ),
    "results are looked for before the delivery that runs": (
        "answers",
        """        for slot, _ in found:
            results = self._finished(slot)
            self._read(slot, rest=True)  # first, as the output of these tasks is in the pipe
            self._take_finished(slot, results)
        return found
""",
        """        for slot, _ in found:
            results = self._finished(slot)
            self._read(slot, rest=True)
            self._take_finished(slot, results)
        return [(slot, slot.cells[CURRENT]) for slot in slots]
""",
    ),
    "the file of a dead slot is closed while results in it have not been read": (
        "large_results",
        "            elif slot.number not in self._slots.children:\n",
        "            else:\n",
    ),
    "a slot is killed while it holds other tasks": (
        "taking_back",
        "            if len(slot.held) > 1 and marked:\n",
        """            current = slot.held.get(slot.cells[CURRENT])
            if len(slot.held) > 1 and current is not None and current.kill:
                slot.kill_reason, slot.kill_lease = kind, current.lease
                self._slots.kill(slot)
            elif len(slot.held) > 1 and marked:
""",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_search_finds_a_mistake(
    mistake: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A search that finds nothing says something only if it would have found this."""
    modules = changed(tmp_path, monkeypatch, *MISTAKES[mistake])
    for slots, items, large in SIZES:
        steps = steps_of(items, slots, large)
        rng = random.Random(items)
        schedules = itertools.chain(one_stop(steps, kill=True), many_stops(rng, 300, steps))
        if search(items, schedules, slots=slots, large=large, modules=modules):
            return

        def kill(pool: Any, lease: int) -> None:
            if lease in pool.leases():
                pool.kill([lease], KILLED)

        for stops, during in asked(rng, 200, steps, kill, items):
            run = Run(items, stops, slots=slots, large=large, during=during, modules=modules).go()
            if run.judge() or any(failure.kind != KILLED for failure in run.failures):
                return
    pytest.fail("not found")
