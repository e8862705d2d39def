"""What a program sets in its own modules holds in its tasks, as in those of a process pool."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

_CONFIG = """
import dataclasses
import os
import random
import sqlite3

rate = 1
names = []
table = {"a": 1}
draws = random.Random()


@dataclasses.dataclass
class Settings:
    debug: bool = False
    limits = {"most": 1}


settings = Settings()


def set_up(rate_):
    global rate
    rate = rate_
    names.append("set up")
    table["b"] = 2
    settings.debug = True
    Settings.limits["most"] = 9


def look():
    return rate, names, table, settings.debug, Settings.limits["most"]
"""
_STORE = """
import sqlite3

opened = False
connection = None


def open_it():
    global opened, connection
    if not opened:
        connection, opened = sqlite3.connect(":memory:"), True
    return connection.execute("select 7").fetchone()
"""
_PROGRAM = """
import sys
import config
import store
from config import names, settings
from work import look
from cloudexec import BatchExecutor

config.set_up(5)
store.open_it()
config.added = (1, 2)

def same(_):
    return names is config.names, settings is config.settings, config.added, settings.debug

if __name__ == "__main__":
    config.rate = 6
    with BatchExecutor(2, preload=sys.argv[1] == "copy") as executor:
        print(executor.submit(look).result())
        print(list(executor.map(same, [0])))
        print(executor.submit(store.open_it).result())
        print(executor.submit(config.set_up, 7).result(), config.rate)
        draws = [executor.submit(config.draws.random).result() for _ in range(2)]
"""

_REGISTRY = """
REGISTERED, HOOKS, helper = {}, [], None


def register(function):
    REGISTERED[function.__name__] = function
    return function


def run(name, x):
    return REGISTERED[name](x)


class Plugin:
    kinds = []

    def __init_subclass__(cls, **_):
        Plugin.kinds.append(cls.__name__)


class Job:
    def run(self, x):
        return x
"""
_REGISTERING = """
import registry
from registry import HOOKS, Job, Plugin, register, run
from cloudexec import BatchExecutor

count = 0

@register
def counted(x):
    global count
    count += x
    return count

class Hook(Plugin):
    name = "hook"

HOOKS.append(Hook())
registry.helper = counted
Job.run = lambda self, x: ("patched", x)

def look(x):
    run("counted", x)
    registry.helper(x)
    return count, Plugin.kinds, Job().run(x)

def same(_):
    return HOOKS is registry.HOOKS, type(HOOKS[0]) is Hook

if __name__ == "__main__":
    with BatchExecutor(1) as executor:
        print(executor.submit(look, 1).result())
        print(executor.submit(run, "counted", 5).result())
        print(list(executor.map(same, [0])))
"""


def test_what_a_program_registers_in_its_own_modules_is_there_in_tasks(tmp_path: Path) -> None:
    """Functions, classes and objects of the script, as the same ones that tasks know."""
    (tmp_path / "registry.py").write_text(_REGISTRY)
    assert _run(tmp_path, _REGISTERING) == [
        "(2, ['Hook'], ('patched', 1))",
        "7",
        "[(True, True)]",
    ]


def _run(tmp_path: Path, program: str, *arguments: str) -> list[str]:
    (tmp_path / "program.py").write_text(program)
    done = subprocess.run(
        [sys.executable, "program.py", *arguments],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()


@pytest.mark.parametrize("way", ["copy", "fresh"])
def test_what_a_program_sets_in_its_own_modules_holds_in_tasks(tmp_path: Path, way: str) -> None:
    """Globals, what they hold, and class attributes; and not half of what cannot be sent whole."""
    (tmp_path / "config.py").write_text(_CONFIG)
    (tmp_path / "store.py").write_text(_STORE)
    (tmp_path / "work.py").write_text("from config import look\n")
    assert _run(tmp_path, _PROGRAM, way) == [
        "(6, ['set up'], {'a': 1, 'b': 2}, True, 9)",
        "[(True, True, (1, 2), True)]",
        "(7,)",
        "None 6",
    ]


def test_modules_with_too_much_stay_as_they_are_imported(tmp_path: Path) -> None:
    """Nothing is logged for that in the program's thread, where a handler could interrupt it."""
    (tmp_path / "tables.py").write_text(
        "rate = 1\n" + "".join(f"table{i} = 'x' * 300_000\n" for i in range(4))
    )
    (tmp_path / "program.py").write_text(
        "import logging, tables\n"
        "from cloudexec import BatchExecutor\n"
        "class Handler(logging.Handler):\n"
        "    def emit(self, record):\n"
        "        raise KeyboardInterrupt\n"
        "def rate():\n"
        "    return tables.rate\n"
        "if __name__ == '__main__':\n"
        "    tables.rate = 5\n"
        "    logging.getLogger('cloudexec').addHandler(Handler())\n"
        "    logging.getLogger('cloudexec').setLevel(logging.DEBUG)\n"
        "    with BatchExecutor(1) as executor:\n"
        "        print(executor.submit(rate).result(60))\n"
    )
    done = subprocess.run(
        [sys.executable, str(tmp_path / "program.py")],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "1\n"


@pytest.mark.parametrize(
    "tables", [["'x' * 300_000"] * 4, ["[f'{i:0999}' for i in range(1000)]"] * 30]
)
def test_a_module_with_too_much_does_not_keep_others_from_what_they_were_given(
    tmp_path: Path, tables: list[str]
) -> None:
    """Neither one that is imported before nor one that is imported after it."""
    text = "rate = 1\n" + "".join(f"table{i} = {table}\n" for i, table in enumerate(tables))
    (tmp_path / "tables.py").write_text(text)
    for name in ("before", "within"):
        (tmp_path / f"{name}.py").write_text("rate = 1\n")
    program = """
import before, tables, within
from cloudexec import BatchExecutor

def rates():
    return before.rate, tables.rate, within.rate

if __name__ == "__main__":
    before.rate = tables.rate = within.rate = 5
    with BatchExecutor(1) as executor:
        print(*executor.submit(rates).result(60))
"""
    assert _run(tmp_path, program) == ["5 1 5"]


_LAZY = """
class Lazy:
    \"\"\"Stands for an object that is made when it is first used, and cannot be made here.\"\"\"

    @property
    def __class__(self):
        raise RuntimeError("it is not set up yet")


settings = Lazy()
rate = 1
"""


@pytest.mark.parametrize("way", ["copy", "fresh"])
def test_objects_that_are_made_when_they_are_used_are_left_alone(tmp_path: Path, way: str) -> None:
    """Such as settings of Django, wherever they are: a look at their class would make them."""
    (tmp_path / "mine.py").write_text(_LAZY)
    program = f"""
import inspect, sys, threading
import mine
from mine import settings
exec({_LAZY!r})
exec({_LAZY!r}, vars(inspect))
from cloudexec import BatchExecutor

def rates():
    return mine.rate, type(settings).__name__

if __name__ == "__main__":
    mine.rate = 5
    go_on = threading.Event()
    if sys.argv[1] == "fresh":
        threading.Thread(target=go_on.wait).start()
    with BatchExecutor(1) as executor:
        print(*executor.submit(rates).result(60))
    go_on.set()
"""
    assert _run(tmp_path, program, way) == ["5 Lazy"]
