"""What a supervisor knows of a slot, and what it concludes from the cells of their shared page.

This is the supervisor's half of the protocol that ``frames`` describes. The slot's half is
``slot.Slot``.
"""

from __future__ import annotations

import sys
from enum import Enum

from cloudexec.worker.tasks import SLOT_LOST, WorkItem

__all__ = ["TRANSITIONS", "SlotModel", "SlotState"]

_STRAGGLER = 0.01
"""Seconds after which what waits behind a task in its slot is taken back."""
_BEGUN_AFTER = 0.002
"""Seconds without an answer after which the client is told which task a slot runs."""
_SPARED = 5
"""Slots that may die before they begin a task that was sent to them, before it is to blame."""


class SlotState(Enum):
    """What a slot's process is doing. ``TRANSITIONS`` says what may follow what."""

    STARTING = "starting"
    """It is being forked, or runs the initializer."""
    READY = "ready"
    """It takes tasks, and may be sent more than it holds."""
    FULL = "full"
    """It has a task behind which nothing is to be sent: one with requirements, or a long one.
    It is ready again once that has been answered."""
    TAKING_BACK = "being taken back from"
    """What it has not begun is being taken back. Nothing is sent to it meanwhile."""
    STOPPING = "stopping"
    """It was told to end, and may take a few seconds for its exit handlers."""
    KILLED = "killed"
    """It is being killed. Nothing more is written to it, and what it wrote is still read."""
    EXITED = "exited"
    """Its process is gone. What is left in its pipes is read once more."""

    __hash__ = object.__hash__  # Enum's own is written in Python, and asked for with each task


_ENDS = frozenset((SlotState.STOPPING, SlotState.KILLED, SlotState.EXITED))
TRANSITIONS: dict[SlotState, frozenset[SlotState]] = {
    SlotState.STARTING: _ENDS | {SlotState.READY},
    SlotState.READY: _ENDS | {SlotState.FULL, SlotState.TAKING_BACK},
    SlotState.FULL: _ENDS | {SlotState.READY, SlotState.TAKING_BACK},
    SlotState.TAKING_BACK: _ENDS | {SlotState.READY, SlotState.FULL},
    SlotState.STOPPING: frozenset((SlotState.KILLED, SlotState.EXITED)),
    SlotState.KILLED: frozenset((SlotState.EXITED,)),
    SlotState.EXITED: frozenset(),
}


class SlotModel:
    """One slot: its state, what it was sent, and how far it has come with that.

    It does no I/O and reads no clock: its owner reads the cells, and acts upon what this concludes.

    Args:
        number: Of the slot.
        last: The delivery after which it is to end.

    Attributes:
        state: What its process is doing; only ``enter`` writes it.
        is_staying: Whether nothing has begun to end it.
        is_over: Whether it was killed or has exited: nothing reaches it any more. These two follow
            from the state, and are kept as they are asked for with each task.
        held: What it was sent and has not answered, by the number of the delivery, in that order.
        seconds: Estimated, of what it holds.
        sent: Deliveries; also the number of the last one.
        last: The delivery after which it is to end.
        fence: The last delivery that it was told not to begin any more.
        written: Bytes of frames for it.
        unopened: Deliveries that it has run, and whose results are lost.
        progress_at: When it last answered, or was sent something while it held nothing.
        kill_reason: A ``Failure`` kind, if we killed it.
        kill_lease: The task that it was killed for; 0: whichever it ran.
        kill_message: What to say of that.
    """

    def __init__(self, number: int, last: int = sys.maxsize) -> None:
        self.number = number
        self.state = SlotState.STARTING
        self.is_staying = True
        self.is_over = False
        self.held: dict[int, WorkItem] = {}
        self.seconds = 0.0
        self.sent = 0
        self.last = last
        self.fence = 0
        self.written = 0
        self.unopened: set[int] = set()
        self.progress_at = 0.0
        self.kill_reason = 0
        self.kill_lease = 0
        self.kill_message = ""
        self._reported = 0  # the delivery last reported as started

    def enter(self, state: SlotState) -> None:
        """Go on to another state.

        Raises:
            RuntimeError: If ``TRANSITIONS`` does not list that; nothing has changed then.
        """
        if state not in TRANSITIONS[self.state]:
            raise RuntimeError(
                f"slot {self.number} cannot become {state.value}: it is {self.state.value}"
            )
        self.state = state
        self.is_staying = state not in _ENDS
        self.is_over = state is SlotState.KILLED or state is SlotState.EXITED

    def take_out(self, delivery: int) -> WorkItem | None:
        """Hold a delivery no more, as it was answered; return its task, if it was still held."""
        item = self.held.pop(delivery, None)
        if item is not None:
            self.seconds -= item.seconds
        return item

    def answered(self, now: float) -> bool:
        """Note that answers have come; say whether the slot now holds nothing.

        A slot that is full holds one task: one that still holds something stays as it is.
        """
        self.progress_at = now
        if self.held:
            return False
        if self.state is SlotState.FULL or self.state is SlotState.TAKING_BACK:
            # Nothing is left to be taken back, and what is sent now is not to be.
            self.enter(SlotState.READY)
        self.seconds = 0.0
        return True

    def begun(self, current: int, now: float) -> WorkItem | None:
        """Return the task that has begun and is to be reported, once.

        Args:
            current: What ``CURRENT`` says.
            now: The time.
        """
        if now - self.progress_at <= _BEGUN_AFTER or current == self._reported:
            return None
        if current <= self.fence or current not in self.held:
            return None
        self._reported = current
        return self.held[current]

    def needs_looks(self) -> bool:
        """Say whether it is to be looked at again in a while, though it answers nothing."""
        held = self.held
        return bool(held) and (len(held) > 1 or self._reported not in held)

    def is_stuck(self, now: float) -> bool:
        """Say whether tasks wait in it behind one that takes long."""
        return (
            len(self.held) > 1
            and self.state is SlotState.READY
            and now - self.progress_at > _STRAGGLER
        )

    def begin_taking_back(self) -> bool:
        """Move the fence behind all that was sent; say whether that is to be written.

        A slot that is being taken back from already has its fence there. One that ends gives back
        what it has not begun when it is gone.
        """
        if self.state is not SlotState.READY and self.state is not SlotState.FULL:
            return False
        self.enter(SlotState.TAKING_BACK)
        self.fence = self.sent
        return True

    def finish_taking_back(self, current: int) -> list[WorkItem]:
        """Return what it has not begun, and will not: it has seen the fence by now.

        Args:
            current: What ``CURRENT`` said before its results were looked for.
        """
        # Also those before that one: they were dropped, with a batch that ended before its time.
        taken = [
            self.held.pop(number)
            for number in list(self.held)
            if number != current and number <= self.fence and number not in self.unopened
        ]
        for item in taken:
            self.seconds -= item.seconds
        if self.held:
            self.enter(SlotState.FULL)
        return taken

    def has_lost(self, waiting: int) -> bool:
        """Say whether it waits for tasks and is believed to hold some.

        Args:
            waiting: What ``WAITING`` says.
        """
        # What it drops without a word while it is being taken back from is returned by that.
        is_asked = not self.is_over and self.state is not SlotState.TAKING_BACK
        return bool(self.held) and is_asked and waiting == self.written + 1

    def to_be_killed(self, reason: int, lease: int = 0) -> None:
        """Note why it is being killed.

        Args:
            reason: A ``Failure`` kind. That it has lost its tasks stays, whatever comes after it:
                nobody knows what became of these.
            lease: The task that it is killed for; 0: whichever it runs by then.
        """
        if self.kill_reason != SLOT_LOST:
            self.kill_reason, self.kill_lease = reason, lease

    def at_fault(self, current: int) -> list[int]:
        """Return the deliveries that are lost with it, now that it is gone; the others never began.

        Args:
            current: What ``CURRENT`` says.
        """
        if self.kill_reason == SLOT_LOST:
            return list(self.held)  # nobody knows what became of these
        found = [n for n in self.held if n == current or n in self.unopened]
        if not found and self.held:
            # It had not begun with any: nobody is to blame, unless this happens time and again.
            number, first = next(iter(self.held.items()))
            first.spared += 1
            if first.spared > _SPARED:
                found = [number]
        return found
