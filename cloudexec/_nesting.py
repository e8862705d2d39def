"""Where no executor may start: while a module is imported for a task, and too deep in others.

A script without a guard starts its executor when a worker imports it to find a function. That
executor's workers would do the same, and theirs too, until the machine can take no more.
"""

from __future__ import annotations

import os
import sys
import threading
import weakref
from types import FrameType

from cloudexec._errors import NestingError

__all__ = ["DEPTH", "Loading", "check", "depth", "loading"]

DEPTH = "CLOUDEXEC_DEPTH"
"""The variable that tells a process how many executors it is inside of."""
_MOST = 4


class Loading:
    """Whether this process loads something for a task, and what is imported for that.

    Attributes:
        active: Set while something is loaded; to be followed by ``ended()`` where there are
            ``others``.
        others: Threads that were there when the first module was imported; ``None``: none was.
    """

    def __init__(self) -> None:
        self.active = False
        self.others: frozenset[threading.Thread] | None = None
        self._who = self._caller = ""
        self._threads: weakref.WeakSet[threading.Thread] = weakref.WeakSet()
        self._refused: dict[str, str] = {}

    def watch(self, who: str, caller: str) -> None:
        """Take notice of what is imported while something is loaded.

        Args:
            who: Does that.
            caller: The name of the module that does.
        """
        self._who, self._caller = who, caller
        self._refused.clear()
        if self not in sys.meta_path:
            sys.meta_path.insert(0, self)

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        """Find no module; but one that has started an executor is not run again for each task.

        Raises:
            NestingError: As it did then.
        """
        if self.active:
            if self.others is None:
                self.others = frozenset(threading.enumerate())
            if name in self._refused:
                raise NestingError(self._refused[name])

    def ended(self) -> None:
        """What was loaded is there, or failed: threads that its modules have started go on."""
        if self.others is not None:
            self._threads.update(set(threading.enumerate()) - self.others)
            self.others = None

    def check(self) -> None:
        """Say no if a module that is imported for a task asks.

        Raises:
            NestingError: If so; it names the module.
        """
        if not (self.active or self._threads or self.others is not None):
            return
        # Not the frame of this call: it would refer to itself, and keep what its callers have.
        frame: FrameType | None = sys._getframe(1)
        thread = threading.current_thread()
        if thread in self._threads or (self.others is not None and thread not in self.others):
            while frame is not None and frame.f_globals.get("__package__") == __package__:
                frame = frame.f_back
        elif self.active:
            while frame is not None and frame.f_code.co_name != "<module>":
                if frame.f_globals.get("__name__") == self._caller:
                    return
                frame = frame.f_back
        else:
            return
        if frame is None:
            return
        module = str(frame.f_globals.get("__name__"))
        self._refused[module] = (
            f"the module {module!r} ({frame.f_code.co_filename}) starts an executor while "
            f"{self._who} imports it to find the function of a task: put that under "
            f'`if __name__ == "__main__":`, or into a function that your program calls'
        )
        raise NestingError(self._refused[module])


loading = Loading()


def depth() -> int:
    """Return how many executors this process is inside of; 0: it is no task's."""
    found = os.environ.get(DEPTH, "")
    return int(found) if found.isdecimal() else 0


def check() -> None:
    """Say no if no executor may start here.

    Raises:
        NestingError: If so.
    """
    loading.check()
    if depth() >= _MOST:
        raise NestingError(
            f"this is inside of a task of an executor inside of another one, {depth()} deep, and "
            f"{_MOST} is the most ({DEPTH}): have the outer tasks return what is to be done, and "
            f"submit that to the outermost executor"
        )
