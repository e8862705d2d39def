"""A slot's states, and what its supervisor concludes from what the two share."""

from __future__ import annotations

import itertools

import pytest

from cloudexec.worker.slot_model import TRANSITIONS, SlotModel, SlotState
from cloudexec.worker.tasks import KILLED, RECLAIMED, SLOT_LOST, TIMED_OUT, WorkItem

PATHS = {
    SlotState.STARTING: (),
    SlotState.READY: (SlotState.READY,),
    SlotState.FULL: (SlotState.READY, SlotState.FULL),
    SlotState.TAKING_BACK: (SlotState.READY, SlotState.FULL, SlotState.TAKING_BACK),
    SlotState.STOPPING: (SlotState.READY, SlotState.STOPPING),
    SlotState.KILLED: (SlotState.READY, SlotState.STOPPING, SlotState.KILLED),
    SlotState.EXITED: (SlotState.EXITED,),
}
"""How a new slot comes to each state."""
SERVING = (SlotState.READY, SlotState.FULL, SlotState.TAKING_BACK)
"""It goes from one of these to another as it is sent tasks and answers them."""


@pytest.mark.parametrize(("before", "after"), [*itertools.product(SlotState, SlotState)])
def test_a_slot_changes_its_state_only_as_the_table_says(
    before: SlotState, after: SlotState
) -> None:
    """A transition that is not listed raises, and changes nothing."""
    slot = SlotModel(1)
    for state in PATHS[before]:
        slot.enter(state)
    if after in TRANSITIONS[before]:
        slot.enter(after)
        assert slot.state is after
    else:
        with pytest.raises(RuntimeError, match=f"cannot become {after.value}: it is"):
            slot.enter(after)
        assert slot.state is before


def test_no_state_comes_back_once_a_slot_serves_no_more() -> None:
    """A slot that was told to end, was killed or has exited takes no task any more."""
    order = list(SlotState)
    for before, following in TRANSITIONS.items():
        for after in following:
            both_serve = before in SERVING and after in SERVING
            assert both_serve or order.index(after) > order.index(before)
    assert TRANSITIONS[SlotState.EXITED] == frozenset()


def serving(*seconds: float) -> SlotModel:
    """Return a ready slot that was sent tasks: deliveries 1, 2, ... are of leases 11, 12, ..."""
    slot = SlotModel(1)
    slot.enter(SlotState.READY)
    for estimate in seconds:
        slot.sent += 1
        slot.held[slot.sent] = WorkItem(10 + slot.sent, 1, b"", slot.sent, estimate)
        slot.seconds += estimate
    return slot


def leases(items: list[WorkItem]) -> list[int]:
    return [item.lease for item in items]


def test_what_a_slot_has_not_begun_is_taken_back() -> None:
    """The task that it runs stays, and nothing is sent behind that before its answer."""
    slot = serving(0.5, 0.25, 0.125)
    assert slot.begin_taking_back()
    assert slot.fence == 3
    assert not slot.begin_taking_back()  # the fence is where it should be
    assert slot.take_out(1) is not None
    assert not slot.answered(1.0)
    assert slot.state is SlotState.TAKING_BACK
    assert leases(slot.finish_taking_back(current=2)) == [13]
    assert slot.state is SlotState.FULL
    assert slot.seconds == 0.25
    assert slot.take_out(2) is not None
    assert slot.answered(2.0)
    assert slot.state is SlotState.READY


def test_a_slot_that_answers_all_while_it_is_taken_back_from_is_ready() -> None:
    slot = serving(0.5)
    slot.begin_taking_back()
    slot.take_out(1)
    assert slot.answered(1.0)
    assert slot.state is SlotState.READY


@pytest.mark.parametrize("state", [SlotState.STOPPING, SlotState.KILLED])
def test_a_slot_that_ends_is_not_taken_back_from(state: SlotState) -> None:
    """What it has not begun comes back when it is gone."""
    slot = serving(0.5, 0.5)
    slot.enter(state)
    assert not slot.begin_taking_back()
    assert slot.fence == 0


def test_an_answer_that_was_known_opens_no_slot_that_is_full() -> None:
    """It is of a task before the one that the slot has now."""
    slot = serving(0.5)
    slot.enter(SlotState.FULL)
    assert not slot.answered(1.0)
    assert slot.state is SlotState.FULL
    assert slot.progress_at == 1.0


def test_a_task_that_has_begun_is_told_of_once_and_not_at_once() -> None:
    slot = serving(0.5, 0.5)
    assert slot.begun(1, now=0.001) is None
    item = slot.begun(1, now=0.01)
    assert item is not None
    assert item.lease == 11
    assert slot.begun(1, now=0.02) is None
    assert slot.begun(0, now=0.02) is None  # between two tasks


def test_a_delivery_behind_the_fence_has_not_begun() -> None:
    """The slot has named it, and may be about to drop it."""
    slot = serving(0.5, 0.5)
    slot.begin_taking_back()
    assert slot.begun(2, now=1.0) is None


@pytest.mark.parametrize("reason", [TIMED_OUT, KILLED, RECLAIMED])
def test_tasks_that_a_slot_has_lost_stay_lost_whatever_it_is_killed_for(reason: int) -> None:
    """Their answers may be lost: to run them again would be to run them twice."""
    slot = serving(0.5)
    slot.to_be_killed(SLOT_LOST)
    slot.to_be_killed(reason, slot.held[1].lease)
    assert (slot.kill_reason, slot.kill_lease) == (SLOT_LOST, 0)
    assert slot.at_fault(0) == [1]


def test_the_task_that_ran_is_to_blame_for_the_end_of_its_slot() -> None:
    slot = serving(0.5, 0.5, 0.5)
    slot.unopened.add(1)  # it has run; its result is gone
    assert slot.at_fault(current=2) == [1, 2]


def test_a_task_that_was_not_begun_is_spared_five_times() -> None:
    slot = serving(0.5, 0.5)
    for _ in range(5):
        assert slot.at_fault(current=0) == []
    assert slot.at_fault(current=0) == [1]


def test_all_tasks_that_a_slot_has_lost_count_as_attempts() -> None:
    slot = serving(0.5, 0.5)
    slot.written = 100
    assert not slot.has_lost(waiting=0)  # it does not wait
    assert not slot.has_lost(waiting=100)  # there is something in its pipe
    assert slot.has_lost(waiting=101)
    slot.kill_reason = SLOT_LOST
    assert slot.at_fault(current=0) == [1, 2]


def test_a_slot_that_is_taken_back_from_may_wait_for_tasks() -> None:
    """It drops what is behind the first one without a word."""
    slot = serving(0.5, 0.5)
    slot.begin_taking_back()
    assert not slot.has_lost(waiting=1)


def test_only_tasks_that_wait_behind_another_are_stuck() -> None:
    assert serving(0.5, 0.5).is_stuck(now=0.02)
    assert not serving(0.5, 0.5).is_stuck(now=0.005)
    assert not serving(0.5).is_stuck(now=60.0)
