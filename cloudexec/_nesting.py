"""Refuses executors that start while a module is imported for a task, or in deeply nested tasks.

A script without the guard ``if __name__ == "__main__":`` starts its executor when a worker imports
the script to find a function. The workers of that executor would import it as well, and so on,
until the machine has no memory left.
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
"""Environment variable with the number of executors that this process is nested in."""
_MOST = 4


class Loading:
    """Whether this process unpickles for a task, and which modules are imported for that.

    Attributes:
        active: True while this process unpickles. If ``others`` is not ``None``, ``ended()`` must
            be called afterwards.
        others: Threads that existed when the first module was imported; ``None`` if no module was.
    """

    def __init__(self) -> None:
        self.active = False
        self.others: frozenset[threading.Thread] | None = None
        self._who = self._caller = ""
        self._threads: weakref.WeakSet[threading.Thread] = weakref.WeakSet()
        self._refused: dict[str, str] = {}

    def watch(self, who: str, caller: str) -> None:
        """Watch the imports that happen while this process unpickles.

        Args:
            who: Name, for messages, of what unpickles.
            caller: Name of the module that unpickles.
        """
        self._who, self._caller = who, caller
        self._refused.clear()
        if self not in sys.meta_path:
            sys.meta_path.insert(0, self)

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        """Find no module, but refuse to import a module again that has tried to start an executor.

        Raises:
            NestingError: If the module has tried so during an earlier import.
        """
        if self.active:
            if self.others is None:
                self.others = frozenset(threading.enumerate())
            if name in self._refused:
                raise NestingError(self._refused[name])

    def ended(self) -> None:
        """Note that unpickling has ended; threads that the imported modules started may go on."""
        if self.others is not None:
            self._threads.update(set(threading.enumerate()) - self.others)
            self.others = None

    def check(self) -> None:
        """Refuse an executor if a module that is imported for a task calls this.

        Raises:
            NestingError: If such a module calls this; the message names the module.
        """
        if not (self.active or self._threads or self.others is not None):
            return
        # ``frame`` must not stay the frame of this call: it would refer to itself, and so keep the
        # callers' variables alive.
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
            f"{self._who} imports it to find the function of a task: start the executor under "
            f'`if __name__ == "__main__":`, or in a function that your program calls'
        )
        raise NestingError(self._refused[module])


loading = Loading()


def depth() -> int:
    """Return the number of executors that this process is nested in; 0 outside of tasks."""
    found = os.environ.get(DEPTH, "")
    return int(found) if found.isdecimal() else 0


def check() -> None:
    """Refuse an executor that must not start in this process.

    Raises:
        NestingError: If no executor may start here.
    """
    loading.check()
    if depth() >= _MOST:
        raise NestingError(
            f"this process runs a task inside {depth()} nested executors, and at most {_MOST} are "
            f"allowed ({DEPTH}): have the outer tasks return the work to be done, and submit it to "
            f"the outermost executor"
        )
