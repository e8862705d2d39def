"""The state of a slot in its supervisor, and the conclusions from the cells of their shared page.

This is the supervisor's side of the protocol that ``frames`` describes. The slot's side is
``slot.Slot``.
"""

from __future__ import annotations

import sys
from enum import Enum

from cloudexec.worker.tasks import SLOT_LOST, WorkItem

__all__ = ["TRANSITIONS", "SlotModel", "SlotState"]

_STRAGGLER = 0.01
"""Seconds that a task may run before the tasks that wait behind it in its slot are taken back."""
_BEGUN_AFTER = 0.002
"""Seconds without an answer after which the client is told which task a slot runs."""
_SPARED = 5
"""Number of slots that may die before they begin a task, until the task itself is blamed."""


class SlotState(Enum):
    """The state of a slot's process. ``TRANSITIONS`` lists which state may follow which."""

    STARTING = "starting"
    """The process is being forked, or runs the initializer."""
    READY = "ready"
    """It takes tasks, and may be sent more tasks."""
    FULL = "full"
    """It has a task behind which nothing is to be sent: one with requirements, or a long one.
    It is ready again once that has been answered."""
    TAKING_BACK = "being taken back from"
    """Tasks that it has not begun are being taken back. Nothing is sent to it meanwhile."""
    STOPPING = "stopping"
    """It was told to end, and may take a few seconds for its exit handlers."""
    KILLED = "killed"
    """It is being killed. Nothing more is written to it, but its answers are still read."""
    EXITED = "exited"
    """The process has ended. The rest in its pipes is read once more."""

    __hash__ = object.__hash__  # Enum's own is written in Python, and is called for each task


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
    """One slot: its state, the tasks that it was sent, and its progress with them.

    It does no I/O and reads no clock: its owner reads the cells, and acts on the conclusions.

    Args:
        number: The slot's number.
        last: The delivery after which the slot must end.

    Attributes:
        state: The state of its process; only ``enter`` writes it.
        is_staying: Whether the slot is neither ending nor gone.
        is_over: Whether it was killed or has exited, so that it receives nothing any more. This and
            ``is_staying`` follow from the state. They are stored because they are read for each
            task.
        held: By delivery, in that order: the tasks that it was sent and has not answered.
        seconds: Estimated seconds of work that it holds.
        sent: Number of deliveries; also the number of the last one.
        last: The delivery after which the slot must end.
        fence: The last delivery that it was told not to begin.
        written: Bytes of frames that were written for it.
        unopened: Deliveries that it has run, and whose results are lost.
        progress_at: When it last answered, or was sent a task while it held none.
        kill_reason: The kind of ``Failure`` for which the supervisor has killed it.
        kill_lease: The task for which it was killed; 0 for the task that it runs.
        kill_message: The message of that failure.
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
        self._reported = 0  # the last delivery that was reported as started

    def enter(self, state: SlotState) -> None:
        """Change the state.

        Raises:
            RuntimeError: If ``TRANSITIONS`` does not allow it; nothing has changed then.
        """
        if state not in TRANSITIONS[self.state]:
            raise RuntimeError(
                f"slot {self.number} cannot become {state.value}: it is {self.state.value}"
            )
        self.state = state
        self.is_staying = state not in _ENDS
        self.is_over = state is SlotState.KILLED or state is SlotState.EXITED

    def take_out(self, delivery: int) -> WorkItem | None:
        """Remove an answered delivery; return its task, or ``None`` if it was not held any more."""
        item = self.held.pop(delivery, None)
        if item is not None:
            self.seconds -= item.seconds
        return item

    def answered(self, now: float) -> bool:
        """Note that the slot has answered; say whether it holds no tasks now.

        A slot in the state ``FULL`` or ``TAKING_BACK`` leaves it only if it holds no tasks.
        """
        self.progress_at = now
        if self.held:
            return False
        if self.state is SlotState.FULL or self.state is SlotState.TAKING_BACK:
            # No task is left to be taken back, and tasks that are sent from now on stay.
            self.enter(SlotState.READY)
        self.seconds = 0.0
        return True

    def begun(self, current: int, now: float) -> WorkItem | None:
        """Return a task that has begun and must be reported as started; each is returned once.

        Args:
            current: The value of the cell ``CURRENT``.
            now: The time.
        """
        if now - self.progress_at <= _BEGUN_AFTER or current == self._reported:
            return None
        if current <= self.fence or current not in self.held:
            return None
        self._reported = current
        return self.held[current]

    def needs_looks(self) -> bool:
        """Say whether the slot's cells must be read again soon, even if it does not answer."""
        held = self.held
        return bool(held) and (len(held) > 1 or self._reported not in held)

    def is_stuck(self, now: float) -> bool:
        """Say whether tasks wait in the slot behind one that runs for long."""
        return (
            len(self.held) > 1
            and self.state is SlotState.READY
            and now - self.progress_at > _STRAGGLER
        )

    def begin_taking_back(self) -> bool:
        """Set the fence to the last delivery; say whether the cell must be written.

        It need not be written if tasks are being taken back already, or if the slot ends: then its
        unbegun tasks are returned when it has exited.
        """
        if self.state is not SlotState.READY and self.state is not SlotState.FULL:
            return False
        self.enter(SlotState.TAKING_BACK)
        self.fence = self.sent
        return True

    def finish_taking_back(self, current: int) -> list[WorkItem]:
        """Return the tasks that the slot has not begun. It will not, as it has seen the fence.

        Args:
            current: The value of ``CURRENT`` before the slot's results were read.
        """
        # Tasks before that one are included: they were dropped together with their batch.
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
        """Say whether the slot waits for tasks although it should hold some.

        Args:
            waiting: The value of the cell ``WAITING``.
        """
        # Not while tasks are being taken back: the slot may have dropped those without an answer.
        is_asked = not self.is_over and self.state is not SlotState.TAKING_BACK
        return bool(self.held) and is_asked and waiting == self.written + 1

    def to_be_killed(self, reason: int, lease: int = 0) -> None:
        """Note why the slot is being killed.

        Args:
            reason: A kind of ``Failure``. ``SLOT_LOST`` is never replaced by a later reason,
                because it is not known how far the slot's tasks have come.
            lease: The task for which it is killed; 0 for the task that it runs then.
        """
        if self.kill_reason != SLOT_LOST:
            self.kill_reason, self.kill_lease = reason, lease

    def at_fault(self, current: int) -> list[int]:
        """Return the deliveries that are lost with the slot, which is gone. The others never began.

        Args:
            current: The value of the cell ``CURRENT``.
        """
        if self.kill_reason == SLOT_LOST:
            return list(self.held)  # it is not known how far the slot has come with these
        found = [n for n in self.held if n == current or n in self.unopened]
        if not found and self.held:
            # The slot had begun none. No task is blamed, unless this happens repeatedly.
            number, first = next(iter(self.held.items()))
            first.spared += 1
            if first.spared > _SPARED:
                found = [number]
        return found
