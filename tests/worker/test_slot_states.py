"""A slot's life goes one way: what the table does not list cannot happen."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator

import pytest

from cloudexec.worker.child import TRANSITIONS, Child, SlotState

PATHS = {
    SlotState.STARTING: (),
    SlotState.READY: (SlotState.READY,),
    SlotState.STOPPING: (SlotState.READY, SlotState.STOPPING),
    SlotState.KILLED: (SlotState.READY, SlotState.STOPPING, SlotState.KILLED),
    SlotState.EXITED: (SlotState.EXITED,),
}
"""How a new slot comes to each state."""


@pytest.fixture
def slot() -> Iterator[Child]:
    slot = Child(1)
    yield slot
    for fd in (*slot.fds(), *slot.child_fds):
        os.close(fd)


@pytest.mark.parametrize(("before", "after"), [*itertools.product(SlotState, SlotState)])
def test_a_slot_changes_its_state_only_as_the_table_says(
    slot: Child, before: SlotState, after: SlotState
) -> None:
    """A transition that is not listed raises, and changes nothing."""
    for state in PATHS[before]:
        slot.enter(state)
    if after in TRANSITIONS[before]:
        slot.enter(after)
        assert slot.state is after
    else:
        with pytest.raises(RuntimeError, match=f"cannot become {after.value}: it is"):
            slot.enter(after)
        assert slot.state is before


def test_no_state_comes_back() -> None:
    """A slot that was told to end, was killed or has exited takes no task any more."""
    order = list(SlotState)
    for before, following in TRANSITIONS.items():
        assert all(order.index(after) > order.index(before) for after in following)
    assert TRANSITIONS[SlotState.EXITED] == frozenset()
