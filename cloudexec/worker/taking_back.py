"""How tasks are had back that were sent to slots: recalled, killed, or stuck behind a long one."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable

from cloudexec.worker.answers import AnswerReader
from cloudexec.worker.child import Child
from cloudexec.worker.frames import CURRENT, FENCE, WAITING
from cloudexec.worker.reporting import Answers
from cloudexec.worker.slot_model import SlotState
from cloudexec.worker.slots import Slots
from cloudexec.worker.tasks import RECLAIMED, SLOT_LOST
from cloudexec.worker.waiting import WaitingTasks

__all__ = ["TakingBack"]

_TICK = 0.005
"""Seconds between looks at slots; ``frames`` says what has to happen in less."""


class TakingBack:
    """Has tasks back from slots.

    Args:
        slots: That have the tasks.
        waiting: Where tasks go that have not begun.
        reader: Tells what slots have finished.
        answers: Where tasks are handed back.
        go_on: Called when slots have been looked at.
    """

    def __init__(
        self,
        slots: Slots,
        waiting: WaitingTasks,
        reader: AnswerReader,
        answers: Answers,
        go_on: Callable[[], None],
    ) -> None:
        self._slots = slots
        self._waiting = waiting
        self._reader = reader
        self._answers = answers
        self._go_on = go_on
        self._loop = asyncio.get_running_loop()
        self._tick_handle: asyncio.TimerHandle | None = None

    # What is asked for.

    def recall(self, leases: list[int]) -> None:
        """Hand these back unless they have begun."""
        wanted = set(leases)
        unknown = wanted - self._waiting.recall(wanted)
        for slot in self._slots.children.values():
            inside = [number for number, item in slot.held.items() if item.lease in wanted]
            for number in inside:
                slot.held[number].recalled = True
                unknown.discard(slot.held[number].lease)
            if inside and inside != [slot.cells[CURRENT]]:
                self._begin(slot)
        for lease in unknown:
            self._answers.returned(lease)  # never sent, or answered already
        self._answers.wake()

    def kill(self, leases: list[int], kind: int) -> None:
        """Kill the slots that run these; hand back those that have not begun.

        A slot that was sent other tasks as well gives these back first: it may be done with the one
        and begin with another of them while it is being killed.

        Args:
            leases: Which.
            kind: What a ``Failure`` is to say.
        """
        wanted = set(leases)
        for slot in list(self._slots.children.values()):
            marked = [item for item in slot.held.values() if item.lease in wanted]
            for item in marked:
                item.kill = kind
            if len(slot.held) > 1 and marked:
                self._begin(slot)
            elif marked:
                self._kill_marked(slot)
        self.recall(leases)

    def _kill_marked(self, slot: Child) -> None:
        """Kill a slot if the only task that it holds is to be killed."""
        (item,) = slot.held.values()
        if item.kill:
            slot.to_be_killed(item.kill, item.lease)
            self._slots.kill(slot)

    def reclaim(self) -> None:
        """Hand back, unfinished, what runs: the platform gives no more time."""
        for slot in list(self._slots.children.values()):
            if slot.held:
                slot.to_be_killed(RECLAIMED)
                self._slots.kill(slot)

    def drain(self) -> None:
        """Have back what no slot has begun."""
        for slot in self._slots.children.values():
            if len(slot.held) > 1:
                self._begin(slot)

    def hand_back(self) -> list[int]:
        """Hand back what has not begun, and go on; return the leases of what has."""
        running = []
        holders = [slot for slot in self._slots.children.values() if slot.held]
        for slot, current in self._reader.look(holders):
            if current in slot.held:
                running.append(slot.held[current].lease)
        here = [*self._waiting.leases()]
        for slot in holders:
            here.extend(item.lease for item in slot.held.values())
        self.recall([lease for lease in here if lease not in running])
        return running

    # How it is done.

    def _begin(self, slot: Child) -> None:
        """Begin to take back what the slot has not begun: see ``frames`` for how."""
        if slot.begin_taking_back():
            slot.cells[FENCE] = slot.fence
            self.arrange_tick()

    def arrange_tick(self) -> None:
        """See to it that slots are looked at which hold what they may not come to."""
        if self._tick_handle is None and any(
            slot.needs_looks() for slot in self._slots.children.values() if slot.held
        ):
            self._tick_handle = self._loop.call_later(_TICK, self._tick)

    def _tick(self) -> None:
        self._tick_handle = None
        now = self._loop.time()
        slots = list(self._slots.children.values())
        stuck = [slot for slot in slots if slot.is_stuck(now)]
        # A tick after it was written, a slot sees its fence before whatever it begins.
        for slot, current in self._reader.look(
            [slot for slot in slots if slot.state is SlotState.TAKING_BACK]
        ):
            self._finish(slot, current)
        for slot, _ in self._reader.look(stuck):
            if len(slot.held) > 1:
                self._begin(slot)
            elif slot.held and slot.state is SlotState.READY:
                slot.enter(SlotState.FULL)
        self.audit()
        self._go_on()

    def _finish(self, slot: Child, current: int) -> None:
        if slot.state is not SlotState.TAKING_BACK:
            return  # it has answered all meanwhile
        self._waiting.requeue(slot.finish_taking_back(current))
        if slot.held:
            self._kill_marked(slot)
        else:
            self._reader.note_answered(slot)

    def audit(self) -> None:
        """Find slots that wait for tasks and are believed to hold some; nothing else would.

        Whatever led to that is a fault of ours. Such a task has been lost, or its answer has: that
        counts as an attempt, and it is tried again if it may be.
        """
        for slot in self._slots.children.values():
            if slot.held and slot.has_lost(slot.cells[WAITING]):
                self._reader.look([slot])
                if slot.held:
                    leases = [item.lease for item in slot.held.values()]
                    print(f"slot {slot.pid} has lost its tasks {leases}", file=sys.stderr)
                    slot.kill_message = "the process that was to run it has lost it"
                    slot.to_be_killed(SLOT_LOST)
                    self._slots.kill(slot)
