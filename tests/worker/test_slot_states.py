"""A slot's life goes one way: what the table does not list cannot happen."""

from __future__ import annotations

import itertools

import pytest

from cloudexec.worker.slot_model import TRANSITIONS, SlotModel, SlotState

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
