"""A launcher that starts no worker: it records requests, and a test tells it what happened."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cloudexec._config import check_count
from cloudexec._errors import LaunchError
from cloudexec._launchers.base import Contact, LaunchEnd, Launcher, LaunchRequest, Survivor

__all__ = ["ManualLaunch", "ManualLauncher"]


@dataclass(frozen=True, slots=True)
class ManualLaunch:
    """One worker that the executor asked for.

    Attributes:
        launch_id: The launch's id, which is also the identity that the worker must enrol with.
        slots: Number of tasks that the worker may run at once.
        contact: The address that the worker dials, and the key that it must know.
    """

    launch_id: str
    slots: int
    contact: Contact


class ManualLauncher(Launcher):
    """Starts no worker. The test connects workers, or does not, and reports how they ended.

    One launcher serves one executor. The executor calls it on its loop thread; ``wait()`` and
    ``end()`` are for any other thread.

    Args:
        slots_per_worker: Number of tasks that each worker may run at once.
        needs_network: Whether the executor listens on a network address with TLS, even if it was
            given none; otherwise it listens on a Unix socket in a private directory.
        ends_when_terminated: Whether a launch that the executor terminates ends at once, as a
            killed process would. If not, the executor waits until ``end()`` is called, also in
            ``shutdown()``, for half a minute.

    Attributes:
        launches: All requested launches, in order.
        terminated: Ids of launches that the executor has terminated, in order.

    Raises:
        ConfigError: If ``slots_per_worker`` is not a positive integer.
    """

    def __init__(
        self,
        *,
        slots_per_worker: int = 1,
        needs_network: bool = False,
        ends_when_terminated: bool = True,
    ) -> None:
        check_count("slots_per_worker", slots_per_worker, least=1)
        self.launches: list[ManualLaunch] = []
        self.terminated: list[str] = []
        self._slots_per_worker = slots_per_worker
        self._needs_network = needs_network
        self._ends_when_terminated = ends_when_terminated
        self._loop: asyncio.AbstractEventLoop | None = None
        # Guards the next attributes, and is notified of each launch.
        self._changed = threading.Condition()
        # By launch: the function to call at its end; None once it has ended.
        self._on_end: dict[str, Callable[[str, LaunchEnd], None] | None] = {}
        self._executor_id: str | None = None

    def slots_per_worker(self, max_workers: int) -> int:
        """Return the number of slots of one worker."""
        return min(self._slots_per_worker, max_workers)

    def needs_network(self) -> bool:
        """Say whether the executor must listen on a network address."""
        return self._needs_network

    def launch(
        self,
        contact: Contact,
        requests: Sequence[LaunchRequest],
        on_end: Callable[[str, LaunchEnd], None],
    ) -> None:
        """Record launches.

        Raises:
            LaunchError: If another executor uses this launcher already.
        """
        with self._changed:
            if self._executor_id not in (None, contact.executor_id):
                raise LaunchError("a ManualLauncher serves one executor, and has one already")
            self._executor_id = contact.executor_id
            self._loop = asyncio.get_running_loop()
            for request in requests:
                self._on_end[request.launch_id] = on_end
                launch = ManualLaunch(request.launch_id, request.slots, contact)
                self.launches.append(launch)
            self._changed.notify_all()

    def terminate(self, launch_ids: Sequence[str]) -> None:
        """Record that workers were terminated; they end if ``ends_when_terminated``."""
        for launch_id in launch_ids:
            self.terminated.append(launch_id)
            # The end of a launch that was not made yet is not reported.
            if self._ends_when_terminated and launch_id in self._on_end:
                self.end(launch_id, "it was terminated", killed=True)

    def hand_over(self) -> dict[str, Any]:
        """Return the launches whose end was not reported yet."""
        return {"running": self.running}

    async def take_over(
        self, left: dict[str, Any], on_end: Callable[[str, LaunchEnd], None]
    ) -> Mapping[str, Survivor]:
        """Take over the launches of another launcher, without adding them to ``launches``."""
        with self._changed:
            self._loop = asyncio.get_running_loop()
            self._on_end.update(dict.fromkeys(left["running"], on_end))
        return {launch_id: Survivor(0, running=True) for launch_id in left["running"]}

    def clean_up(self, launch_id: str, slot_groups: list[int]) -> None:
        """Do nothing, as this launcher starts no process."""

    def describe(self) -> str:
        """Describe the launcher in a few words."""
        return "nothing, by hand"

    def __repr__(self) -> str:
        return f"ManualLauncher(slots_per_worker={self._slots_per_worker})"

    # Methods for the test, which plays the platform.

    @property
    def running(self) -> list[str]:
        """Ids of launches whose end was not reported yet, in order."""
        with self._changed:
            return [launch for launch, on_end in self._on_end.items() if on_end is not None]

    def wait(self, count: int, timeout: float | None = None) -> list[ManualLaunch]:
        """Wait until ``count`` workers have been launched in all.

        Args:
            count: Number of launches, counted from the start.
            timeout: Seconds; ``None`` waits without limit.

        Returns:
            The first ``count`` launches.

        Raises:
            TimeoutError: If there were not that many in time.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: len(self.launches) >= count, timeout):
                raise TimeoutError(
                    f"{count} launches expected, {len(self.launches)} asked for in {timeout} s"
                )
            return self.launches[:count]

    def end(
        self,
        launch_id: str,
        reason: str = "it ended",
        *,
        killed: bool = False,
        fatal: bool = False,
    ) -> None:
        """Report that a worker's process has ended; the executor is told soon, on its loop thread.

        Args:
            launch_id: The launch. If its end was reported already, this does nothing.
            reason: The reason, for messages.
            killed: Whether it was killed from outside.
            fatal: Whether another try would fail, too.

        Raises:
            ValueError: If there was no such launch.
        """
        with self._changed:
            if launch_id not in self._on_end:
                raise ValueError(f"no worker {launch_id!r} was asked for")
            on_end = self._on_end[launch_id]
            self._on_end[launch_id] = None
            loop = self._loop
        if on_end is None:
            return
        assert loop is not None
        try:
            loop.call_soon_threadsafe(on_end, launch_id, LaunchEnd(reason, killed, fatal))
        except RuntimeError:
            pass  # the executor has ended, and its loop with it

    def end_all(self, reason: str = "it ended") -> None:
        """Report for every worker that its process has ended."""
        for launch_id in self.running:
            self.end(launch_id, reason)
