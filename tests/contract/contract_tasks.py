"""Tasks of the contract tests, in a module that workers import quickly."""

from __future__ import annotations

import os
import random
import signal
import time
from typing import Any

SETTING = "unset"
COUNT = 0


def double(x: int) -> int:
    return 2 * x


def add(x: int, y: int) -> int:
    return x + y


def echo(*args: Any, **kwargs: Any) -> Any:
    return args, kwargs


def touch(path: str) -> str:
    with open(path, "x"):
        return path


def append(path: str, line: str) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(descriptor, f"{line}\n".encode())
    os.close(descriptor)


def append_and_dawdle(path: str, line: str, seconds: float) -> None:
    append(path, line)
    time.sleep(seconds)


def tell(path: str, word: str) -> None:
    """Write a word to a named pipe that the test reads."""
    append(path, word)


def hold(told: str, gate: str, word: str = "begun") -> int:
    """Report on one named pipe that the task runs, then wait for a byte on another one."""
    tell(told, word)
    with open(gate, "rb", buffering=0) as pipe:
        pipe.read(1)
    return os.getpid()


def hold_then_touch(told: str, gate: str, path: str) -> None:
    hold(told, gate)
    touch(path)


def touch_or_hold(path: str, told: str = "", gate: str = "") -> None:
    if told:
        hold(told, gate)
    else:
        touch(path)


def divide(x: int, y: int) -> float:
    return x / y


def span(path: str, seconds: float) -> None:
    """Write down when the task began and ended, by the clock that all processes share."""
    began = time.monotonic()
    time.sleep(seconds)
    append(path, f"{began} {time.monotonic()}")


def crash(path: str) -> None:
    append(path, "begun")
    os.abort()


def crash_unless_first(path: str) -> str:
    """End the process in the first run only, so that a retry succeeds."""
    try:
        touch(path)
    except FileExistsError:
        return "second attempt"
    os._exit(7)


def leave(code: int) -> None:
    os._exit(code)


def set_up(value: str) -> None:
    global SETTING
    SETTING = value


def setting(told: str, gate: str) -> tuple[int, str]:
    return hold(told, gate), SETTING


def count() -> tuple[int, int]:
    """Return the process id and how often this function has run in the process."""
    global COUNT
    COUNT += 1
    return os.getpid(), COUNT


def count_once(number: int) -> tuple[int, int]:
    return count()


def draw() -> float:
    return random.random()


def refuse(reason: str) -> None:
    raise RuntimeError(reason)


class NeedsArguments(Exception):
    def __init__(self, code: int, *, text: str) -> None:
        super().__init__(f"{code}: {text}")
        self.code = code
        self.text = text

    def __reduce__(self) -> Any:
        return _needs_arguments, (self.code, self.text)


def _needs_arguments(code: int, text: str) -> NeedsArguments:
    return NeedsArguments(code, text=text)


class CannotBeRebuilt(Exception):
    """Pickles, but does not unpickle, as ``__init__`` does not accept the exception's ``args``."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(f"{code}: {text}")


def raise_it(error: BaseException | type[BaseException], *args: Any) -> None:
    raise error(*args) if isinstance(error, type) else error


def raise_needs_arguments() -> None:
    raise NeedsArguments(3, text="three")


def put(queue: Any, value: Any) -> None:
    queue.put(value)


def take_memory(mib: int, told: str = "", gate: str = "") -> int:
    """Use ``mib`` MiB of memory; then report it on one pipe and wait for another."""
    taken = bytearray(mib * 2**20)
    for at in range(0, len(taken), 4096):
        taken[at] = 1
    if told:
        hold(told, gate)
    return len(taken)


def take_memory_in_a_child(mib: int, told: str, gate: str) -> None:
    child = os.fork()
    if child == 0:
        take_memory(mib, told, gate)
        os._exit(0)
    os.waitpid(child, 0)


def map_much_memory(gib: int) -> int:
    """Reserve memory without using it, as numerical libraries do."""
    import mmap

    with mmap.mmap(-1, gib * 2**30) as area:
        area[0] = 1
        return len(area)


def variables(*names: str, raises: bool = False) -> dict[str, str | None]:
    """Return environment variables, after changing one of them."""
    found = {name: os.environ.get(name) for name in names}
    if names:
        os.environ[names[0]] = "changed by the task"
    if raises:
        raise ValueError(found)
    return found


def fail_at_first(path: str, times: int) -> int:
    """Raise ConnectionError in the first ``times`` runs, then return the number of runs."""
    append(path, "called")
    with open(path) as file:
        calls = len(file.readlines())
    if calls <= times:
        raise ConnectionError(f"call {calls}")
    return calls


def die_once(path: str, words: str) -> str:
    """Print ``words`` and get killed in the first run only."""
    if not os.path.exists(path):
        touch(path)
        print(words, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    return "done"


def hold_if(told: str, gate: str) -> int:
    """Wait at a gate if one is given, so that calls of one function can be short or long."""
    return hold(told, gate) if told else 0


def leave_until(path: str, times: int) -> str:
    """End the process in the first ``times`` runs."""
    append(path, "called")
    with open(path) as file:
        if len(file.readlines()) <= times:
            os._exit(1)
    return "done"
