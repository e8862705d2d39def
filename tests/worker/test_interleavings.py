"""Whatever the order in which a supervisor and its slots go on, each task has one true outcome."""

from __future__ import annotations

import importlib.util
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

from cloudexec.worker import slot, supervisor
from cloudexec.worker.supervisor import KILLED

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
    module: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: str, after: str
) -> ModuleType:
    """Return a module whose code has one mistake."""
    assert module.__file__ is not None
    text = Path(module.__file__).read_text()
    assert text.count(before) == 1
    path = tmp_path / f"changed_{module.__name__.rpartition('.')[2]}.py"
    path.write_text(text.replace(before, after))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, path.stem, found)
    spec.loader.exec_module(found)
    return found


MISTAKES = {
    "the fence is read before the delivery is named": (
        slot,
        """            cells[CURRENT] = delivery
            if cells[FENCE] >= delivery:  # to be read after CURRENT has been written
""",
        """            fence = cells[FENCE]
            cells[CURRENT] = delivery
            if fence >= delivery:
""",
    ),
    "a dropped task is not told of": (slot, "self.send(Kind.DROPPED, delivery)", "pass"),
    "the next one is named before the answer is there": (
        slot,
        """        self._used += size
        self._cells[USED] = self._used
""",
        """        self._cells[CURRENT] = 0
        self._used += size
        self._cells[USED] = self._used
""",
    ),
    "the fence is not written": (
        supervisor,
        "slot.fence = slot.cells[FENCE] = slot.sent",
        "slot.fence = slot.sent",
    ),
    "results are looked for before the delivery that runs": (
        supervisor,
        """        for slot, _ in found:
            results = self._finished(slot)
            self._read_answers(slot, rest=True)  # first: what these tasks printed is there
            self._take_finished(slot, results)
        return found
""",
        """        for slot, _ in found:
            results = self._finished(slot)
            self._read_answers(slot, rest=True)
            self._take_finished(slot, results)
        return [(slot, slot.cells[CURRENT]) for slot in slots]
""",
    ),
    "the file of a dead slot is closed while results in it have not been read": (
        supervisor,
        "            elif not slot.small and slot.number not in self._slots:\n",
        "            elif not slot.small:\n",
    ),
    "a slot is killed while it holds other tasks": (
        supervisor,
        "            if len(slot.held) > 1 and marked:\n",
        """            current = slot.held.get(slot.cells[CURRENT])
            if len(slot.held) > 1 and current is not None and current.kill:
                slot.kill_reason, slot.kill_lease = kind, current.lease
                self._kill(slot)
            elif len(slot.held) > 1 and marked:
""",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_search_finds_a_mistake(
    mistake: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A search that finds nothing says something only if it would have found this."""
    module, before, after = MISTAKES[mistake]
    wrong = changed(module, tmp_path, monkeypatch, before, after)
    modules = (wrong, slot) if module is supervisor else (supervisor, wrong)
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
