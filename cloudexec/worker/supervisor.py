"""Creates and connects the parts that run tasks in slots, and is the interface to all of them."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable

from cloudexec.worker.answers import AnswerReader
from cloudexec.worker.blobs import BlobCache
from cloudexec.worker.child import Child
from cloudexec.worker.dispatch import Dispatch
from cloudexec.worker.footprint import Footprint
from cloudexec.worker.frames import CURRENT
from cloudexec.worker.functions import Functions
from cloudexec.worker.large_results import LargeResults
from cloudexec.worker.reporting import Answers
from cloudexec.worker.slots import Settings, Slots
from cloudexec.worker.taking_back import TakingBack
from cloudexec.worker.tasks import SLOT_LOST, Failure, WorkItem
from cloudexec.worker.waiting import WaitingTasks

__all__ = ["SlotPool"]


class SlotPool:
    """Runs tasks in slot processes. Used on one event loop.

    Args:
        settings: The client's settings.
        answers: Takes the answers.
        zygote: The socket to the zygote.
        on_zygote_gone: Called when the zygote has died, so that the worker cannot go on.
        blobs: The blobs that tasks and callables refer to.
    """

    def __init__(
        self,
        settings: Settings,
        answers: Answers,
        zygote: socket.socket,
        on_zygote_gone: Callable[[], None],
        blobs: BlobCache,
    ) -> None:
        self._settings = settings
        self._answers = answers
        self._loop = asyncio.get_running_loop()
        # Each part knows only parts that are made before it. Of later parts it knows at most a
        # function that it is given to call.
        self._functions = Functions(blobs)
        self._waiting = WaitingTasks(self._functions, blobs, answers, self._go_on)
        self._slots = Slots(
            settings,
            zygote,
            self._functions,
            blobs,
            answers,
            watch=lambda slot: self._reader.watch(slot),
            exited=self._on_exit,
            may_fork=self._go_on,
            on_zygote_gone=on_zygote_gone,
        )
        self._large = LargeResults(
            self._slots, answers, blobs.store.limits.memory, self._on_results_taken
        )
        self._footprint = Footprint(
            settings.memory_mib * 2**20,
            settings.slots,
            lambda leases, kind: self._taking_back.kill(leases, kind),
        )
        self._reader = AnswerReader(
            self._slots, self._waiting, self._large, self._footprint, answers, self._on_answers
        )
        self._dispatch = Dispatch(
            settings.slots, self._functions, blobs, self._slots, self._waiting, self._footprint
        )
        self._taking_back = TakingBack(
            self._slots, self._waiting, self._reader, answers, self._on_answers
        )
        self.idle = asyncio.Event()
        """Set when no task is left after ``drain``."""
        self.stopped = self._slots.stopped
        """Set when no slot is left after ``stop``."""
        # Methods of single parts.
        self.start = self._slots.start
        self.add_functions = self._functions.add
        self.recall = self._taking_back.recall
        self.kill = self._taking_back.kill
        self.reclaim = self._taking_back.reclaim
        self.groups = self._slots.groups
        self.kill_groups = self._slots.kill_groups
        self.let_go = self._large.let_go
        self.spill = self._slots.spill
        self.resume_output = self._reader.resume
        self.close = self._slots.close

    # Requests of the client.

    def add(self, items: list[WorkItem]) -> None:
        """Add tasks, in order; a task whose blobs are missing waits for them."""
        self._waiting.add(items)
        self._go_on()

    def forget_functions(self, numbers: list[int]) -> None:
        """Drop callables that no later task will name."""
        self._functions.forget(numbers, self._slots.children.values())

    def announced(self) -> None:
        """Begin to run tasks, as the client was told that a slot is ready."""
        self._slots.announced = True
        self._go_on()

    def drain(self) -> None:
        """Hand back tasks that have not begun, and accept no more."""
        self._waiting.drain()
        self._taking_back.drain()
        self._note_idle()
        self._answers.wake()

    def hand_back(self) -> list[int]:
        """Hand back tasks that have not begun, and accept more; return the leases of the others."""
        running = self._taking_back.hand_back()
        self._note_idle()  # this may have read the last answers
        return running

    def stop(self, *, kill: bool) -> None:
        """End all slots; ``stopped`` is set when the last one has exited."""
        self._waiting.is_draining = True
        self._slots.stop(kill=kill)

    # The pool's state.

    @property
    def has_begun(self) -> bool:
        """Whether the client was told that a slot is ready."""
        return self._slots.announced

    @property
    def running(self) -> int:
        """Number of slots that have a task."""
        return sum(1 for slot in self._slots.children.values() if slot.held)

    @property
    def queued(self) -> int:
        """Number of tasks that wait for a slot."""
        return len(self._waiting)

    def started(self) -> list[int]:
        """Return the leases of tasks that run and were not reported as running yet."""
        now = self._loop.time()
        found = []
        for slot in self._slots.children.values():
            if slot.held and (item := slot.begun(slot.cells[CURRENT], now)) is not None:
                found.append(item.lease)
        return found

    def leases(self) -> list[int]:
        """Return the leases of all tasks of this worker."""
        held = [slot.held.values() for slot in self._slots.children.values()]
        return [*self._waiting.leases(), *(item.lease for items in held for item in items)]

    def functions(self) -> list[int]:
        """Return the numbers of all callables that tasks may name."""
        return self._functions.all_but_needed(self._settings.initializer_needs)

    def blobs_in_use(self) -> set[int]:
        """Return the blobs that this worker's tasks or callables refer to."""
        used = set(self._settings.initializer_blobs) | self._waiting.blobs()
        for function in self._functions.known.values():
            used.update(function.blobs)
        for slot in self._slots.children.values():
            for item in slot.held.values():
                used.update(item.blobs or ())
        return used

    def audit(self) -> None:
        """Find slots that have lost tasks; see ``TakingBack.audit``."""
        self._taking_back.audit()
        self._note_idle()

    # Events.

    def _go_on(self) -> None:
        """Send tasks that can be sent, and set the timers, after something has changed."""
        self._dispatch.dispatch()
        self._taking_back.arrange_tick()
        self._slots.arrange_trim()
        if self._waiting.is_draining:
            self._note_idle()

    def _on_answers(self) -> None:
        self._go_on()
        self._answers.wake()

    def _on_results_taken(self) -> None:
        if self._waiting.queue:
            self._loop.call_soon(self._go_on)

    def _note_idle(self) -> None:
        if self._waiting.is_draining and not self.running:
            self.idle.set()

    def _on_exit(self, slot: Child, status: int, peak: int) -> None:
        self._reader.read_last(slot)
        self._slots.remove(slot)
        self._large.close(slot)
        self._footprint.end(slot)
        code = os.waitstatus_to_exitcode(status)
        self._report_losses(slot, code, peak)
        if slot.start_is_open and not slot.kill_reason:
            self._slots.note_failed_start(code)
        self._on_answers()

    def _report_losses(self, slot: Child, code: int, peak: int) -> None:
        """Report the task that a slot ran when it died; its other tasks never began."""
        guilty = slot.at_fault(slot.cells[CURRENT])
        ran_out = bool(guilty) and self._footprint.ran_out(code, peak)
        for number in guilty:
            item = slot.held.pop(number)
            killed_us = slot.kill_reason and slot.kill_lease in (0, item.lease)
            self._answers.failure(
                Failure(
                    item.lease,
                    slot.kill_reason if killed_us else SLOT_LOST,
                    message=slot.kill_message,
                    output=self._reader.tail(slot, number),
                    exit_code=code,
                    peak_memory_bytes=peak,
                    seconds=self._loop.time() - slot.progress_at,
                    out_of_memory=ran_out and not slot.kill_reason,
                )
            )
        self._waiting.requeue(list(slot.held.values()))
        slot.held.clear()
