"""Small things that a program takes for granted with a process pool, all in one script."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

_PROGRAM = """
import copyreg, json, logging, multiprocessing as mp, numbers, pickle, sqlite3, sys, threading
from cloudexec import BatchExecutor

local = threading.local()
local.depth, local.connection = 3, sqlite3.connect(":memory:")

class Template:
    def __new__(cls, source):
        made = super().__new__(cls)
        made.source = source
        return made

TEMPLATE = Template("t")

class Point:
    def __init__(self, x):
        self.x = x

numbers.Number.register(Point)
copyreg.pickle(Point, lambda point: (Point, (point.x + 100,)))
sqlite3.register_adapter(Point, lambda point: point.x)

def registered():
    row = sqlite3.connect(":memory:").execute("select ?", (Point(7),)).fetchone()
    return row, isinstance(Point(1), numbers.Number), pickle.loads(pickle.dumps(Point(1))).x

class Logger(logging.Logger):
    def shout(self):
        return "HEY"

logging.setLoggerClass(Logger)
plain = json.dumps

def dumps(value):
    return "mine: " + plain(value)

json.dumps = dumps
json.JSONEncoder.default = lambda self, value: f"no {type(value).__name__}"

class Lazy(type(sys)):
    def __getattr__(self, name):
        raise RuntimeError(name)

lazy = Lazy("lazy")

def replaced():
    return json.dumps({1}), logging.getLogger("new").shout()

class Outer:
    class Inner:
        count = 0

def render():
    return TEMPLATE.source, type(TEMPLATE) is Template

def of_this_thread():
    return local.depth, hasattr(local, "connection")

def nested():
    Outer.Inner.count += 1
    pickled = pickle.dumps(Outer.Inner())
    return repr(Outer.Inner), type(pickle.loads(pickled)) is Outer.Inner, Outer.Inner()

def streams():
    return sys.stdout.name, sys.stdout.mode, sys.stderr.name, sys.stdout.buffer.mode

def put(queue, lock, value):
    with lock:
        queue.put(value)

if __name__ == "__main__":
    with BatchExecutor(1, preload=sys.argv[1] == "copy") as executor:
        print(executor.submit(of_this_thread).result())
        print(executor.submit(registered).result())
        print(executor.submit(replaced).result())
        *rest, made = executor.submit(nested).result()
        print(rest, type(made) is Outer.Inner, made.count)
        print(executor.submit(Outer.Inner).result().count)
        print(executor.submit(streams).result(), executor.submit(render).result())
        with mp.Manager() as manager:
            queue = manager.Queue()
            # Nobody but the call refers to the lock.
            executor.submit(put, queue, manager.Lock(), 5).result()
            list(executor.map(put, [queue], [manager.Lock()], [6]))
            print(queue.get(), queue.get())
"""


@pytest.mark.parametrize("way", ["copy", "fresh"])
def test_small_things_are_as_in_a_process_pool(tmp_path: Path, way: str) -> None:
    """Thread locals, nested classes, streams, what cannot be unpickled, proxies of a manager."""
    (tmp_path / "program.py").write_text(_PROGRAM)
    assert _run(tmp_path, way) == [
        "(3, False)",
        "((7,), True, 101)",
        "('mine: \"no set\"', 'HEY')",
        "[\"<class '__main__.Outer.Inner'>\", True] True 0",
        "0",
        "('<stdout>', 'w', '<stderr>', 'wb') ('t', True)",
        "5 6",
    ]


def _run(tmp_path: Path, way: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "program.py", way],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()


_LIBRARY = """
TABLE = {}


class ModelBase(type):
    def __init__(cls, name, bases, content):
        super().__init__(name, bases, content)
        if bases and "table" not in content:
            raise TypeError(f"{name} is defined without a table")
        type.__setattr__(cls, "fields", sorted(content.get("__annotations__", ())))
        TABLE[name] = cls

    def __setattr__(cls, name, value):
        raise AttributeError("defined already")


class Model(metaclass=ModelBase):
    pass
"""
_MODELS = """
import sys
import peewee
from cloudexec import BatchExecutor

class User(peewee.Model):
    table: str = "users"
    name: str = ""

class Admin(User):
    table: str = "admins"

def look(user):
    return user, user.name, peewee.TABLE["Admin"] is Admin, Admin.fields, type(user) is User

def other():
    return "other"

if __name__ == "__main__":
    user = User()
    user.name = "u"
    with BatchExecutor(1, preload=sys.argv[1] == "copy") as executor:
        print(executor.submit(other).result())
        made, *rest = executor.submit(look, user).result()
        print(rest, type(made) is User, made.name)
"""


@pytest.mark.parametrize("way", ["copy", "fresh"])
def test_classes_that_only_their_definition_makes_are_the_scripts_own(
    tmp_path: Path, way: str
) -> None:
    """Those of an object-relational mapper, which keeps a table of the classes that are defined."""
    (tmp_path / "peewee.py").write_text(_LIBRARY)
    (tmp_path / "program.py").write_text(_MODELS)
    assert _run(tmp_path, way) == [
        "other",
        "['u', True, ['table'], True] True u",
    ]
