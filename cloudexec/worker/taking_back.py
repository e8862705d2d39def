"""Takes tasks back from slots: tasks that are recalled or killed, or wait behind a long one."""

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
from cloudexec.worker.tasks import RECLAIMED, SESSION_OVER, SLOT_LOST, TIMED_OUT
from cloudexec.worker.waiting import WaitingTasks

__all__ = ["TakingBack"]

_TICK = 0.005
"""Seconds between two looks at slots. A slot must see its fence in less, as ``frames`` explains."""
_SHARE_OF_SESSION = 0.05
_BEGINNING = 3.0
_MOST_OF_SESSION = 0.25
"""What counts as the beginning of a worker's time on a platform that limits it: a part of that
time, and some seconds at least, as the first process has to start."""
_LEAST_OF_SESSION = 0.25
"""A task that had less of that time is handed back in any case, as the start took the rest."""


class TakingBack:
    """Takes tasks back from slots.

    Args:
        slots: The slots.
        waiting: Takes tasks that have not begun.
        reader: Reads the results that slots have finished.
        answers: Takes tasks that are handed back to the client.
        go_on: Called after slots have been looked at.
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
        self._made_at = self._loop.time()
        self._tick_handle: asyncio.TimerHandle | None = None

    # Requests.

    def recall(self, leases: list[int]) -> None:
        """Hand tasks back to the client unless they have begun."""
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
            self._answers.returned(lease)  # the task never arrived, or was answered already
        self._answers.wake()

    def kill(self, leases: list[int], kind: int) -> None:
        """Kill the slots that run these tasks; hand back those that have not begun.

        If a slot holds other tasks as well, they are taken back first. Otherwise the slot might
        finish the task and begin another one while it is being killed.

        Args:
            leases: The tasks' leases.
            kind: The kind of ``Failure`` that is reported.
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
        """Kill a slot if it holds one task only, and that one must be killed."""
        (item,) = slot.held.values()
        if item.kill:
            slot.to_be_killed(item.kill, item.lease)
            self._slots.kill(slot)

    def reclaim(self, session: float = 0.0) -> None:
        """Hand back running tasks unfinished, because the platform ends this worker.

        Args:
            session: Seconds that every worker has on this platform; 0: it has no such limit. A task
                that began at the beginning would not get further on another worker. It fails,
                instead of being handed back for ever.
        """
        first = self._made_at + max(
            _SHARE_OF_SESSION * session, min(_BEGINNING, _MOST_OF_SESSION * session)
        )
        for slot in list(self._slots.children.values()):
            if slot.held:
                ran = self._loop.time() - slot.progress_at
                is_too_long = slot.progress_at < first and ran > _LEAST_OF_SESSION * session > 0
                if is_too_long:
                    slot.kill_message = SESSION_OVER.format(session=session)
                slot.to_be_killed(TIMED_OUT if is_too_long else RECLAIMED)
                self._slots.kill(slot)

    def drain(self) -> None:
        """Take back all tasks that no slot has begun."""
        for slot in self._slots.children.values():
            if len(slot.held) > 1:
                self._begin(slot)

    def hand_back(self) -> list[int]:
        """Hand back tasks that have not begun, and accept more; return the leases of the others."""
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

    # The steps of taking back.

    def _begin(self, slot: Child) -> None:
        """Begin to take back the tasks that a slot has not begun; ``frames`` explains the steps."""
        if slot.begin_taking_back():
            slot.cells[FENCE] = slot.fence
            self.arrange_tick()

    def arrange_tick(self) -> None:
        """Set the timer, if slots hold tasks that they may not begin soon."""
        if self._tick_handle is None and any(
            slot.needs_looks() for slot in self._slots.children.values() if slot.held
        ):
            self._tick_handle = self._loop.call_later(_TICK, self._tick)

    def _tick(self) -> None:
        self._tick_handle = None
        now = self._loop.time()
        slots = list(self._slots.children.values())
        stuck = [slot for slot in slots if slot.is_stuck(now)]
        # One tick after the fence was written, the slot sees it before it begins another task.
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
            return  # the slot has answered all its tasks meanwhile
        self._waiting.requeue(slot.finish_taking_back(current))
        if slot.held:
            self._kill_marked(slot)
        else:
            self._reader.note_answered(slot)

    def audit(self) -> None:
        """Find slots that wait for tasks although they should hold some.

        This can only be due to a bug: a task, or its answer, was lost. It counts as a lost attempt,
        so that the task is tried again if its retries allow it.
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
