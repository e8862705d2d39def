"""The script in tasks: one module in each process, which they share and change."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path
from typing import Any

import pytest

PROBES = Path(__file__).with_name("script_of_probes.py")


def run(*command: str | Path, cwd: Path, stdin: str | None = None) -> str:
    """Run a program of the user's, and return what it prints."""
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=cwd,
        input=stdin,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def run_script(tmp_path: Path, text: str, *arguments: str) -> str:
    (tmp_path / "program.py").write_text(textwrap.dedent(text))
    return run("program.py", *arguments, cwd=tmp_path)


@pytest.mark.skipif(sys.platform == "darwin", reason="there, a process pool does not fork")
def test_tasks_see_the_script_as_those_of_a_process_pool_do(tmp_path: Path) -> None:
    """What they change in it stays, and whatever looks for it finds it: some thirty probes."""
    kinds = ("fork", "spawn", "cloudexec")
    programs = {
        kind: subprocess.Popen(
            [sys.executable, PROBES, kind],
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        for kind in kinds
    }
    said = {kind: program.communicate(timeout=100)[0] for kind, program in programs.items()}
    fork, spawn, ours = (json.loads(said[kind]) for kind in kinds)
    assert len(ours) > 20
    assert ours == fork
    assert ours == spawn


def test_a_global_that_the_program_changes_is_sent_again_and_no_other(tmp_path: Path) -> None:
    """What tasks have made of the others stays."""
    text = """
        from cloudexec import BatchExecutor

        limit, count, config = 1, 0, {"rate": 1}

        def use():
            global count
            count += 1
            config["calls"] = config.get("calls", 0) + 1
            return limit, count, dict(config)

        if __name__ == "__main__":
            with BatchExecutor(1) as executor:
                print(executor.submit(use).result())
                print(list(executor.map(lambda _: use(), range(1))))
                limit = 2
                print(executor.submit(use).result())
                config["rate"] = 5
                print(executor.submit(use).result())
                count = 100
                print(executor.submit(use).result())
                limit = 1
                first = executor.submit(use)
                limit = 3
                print(first.result()[0], executor.submit(use).result()[0])
    """
    assert run_script(tmp_path, text).splitlines() == [
        "(1, 1, {'rate': 1, 'calls': 1})",
        "[(1, 2, {'rate': 1, 'calls': 2})]",
        "(2, 3, {'rate': 1, 'calls': 3})",
        "(2, 4, {'rate': 5, 'calls': 1})",
        "(2, 101, {'rate': 5, 'calls': 2})",
        "1 3",
    ]


def test_code_that_the_program_changes_is_sent_again(tmp_path: Path) -> None:
    """A function that is defined anew, a class that gets another attribute, a default."""
    text = """
        import enum
        from cloudexec import BatchExecutor

        class Model:
            rate = 1

            def score(self):
                return self.rate * scale()

        def scale(by=1):
            return by

        class Kind(enum.Enum):
            A = 1

            def __init__(self, value):
                self.label = value

        def label():
            return Kind.A.label

        if __name__ == "__main__":
            with BatchExecutor(1) as executor:
                print(executor.submit(Model().score).result())
                Model.rate = 3
                print(executor.submit(Model().score).result())
                scale.__defaults__ = (2,)
                print(executor.submit(Model().score).result())

                def scale():
                    return 10

                print(executor.submit(Model().score).result())
                Model.score = lambda self: -1
                print(executor.submit(Model().score).result())
                del Model.score
                print(executor.submit(hasattr, Model(), "score").result())
                print(executor.submit(label).result())
                Kind.A.label = "changed"
                print(executor.submit(label).result())
    """
    assert run_script(tmp_path, text).split() == [
        "1",
        "3",
        "6",
        "30",
        "-1",
        "False",
        "1",
        "changed",
    ]


def test_a_global_that_another_thread_fills_is_sent(tmp_path: Path) -> None:
    """It is pickled once more when it has changed meanwhile."""
    text = """
        import itertools, sys, threading
        from cloudexec import BatchExecutor

        class Value:
            pass

        table, stopped = {}, threading.Event()

        def size():
            return len(table)

        def fill():
            for i in itertools.count():
                table[i % 1000 + len(table)] = Value()
                if stopped.is_set():
                    return
                if len(table) > 500:
                    table.clear()

        if __name__ == "__main__":
            sys.setswitchinterval(1e-6)
            with BatchExecutor(1) as executor:
                thread = threading.Thread(target=fill)
                thread.start()
                sizes = [executor.submit(size).result() for _ in range(30)]
                stopped.set()
                thread.join()
                # How often it is sent while it is empty depends on the threads' turns.
                print(sum(each <= 501 for each in sizes))
                print(executor.submit(size).result() == len(table))
    """
    assert run_script(tmp_path, text).split() == ["30", "True"]


def test_a_global_that_is_defined_later_is_seen(tmp_path: Path) -> None:
    """By functions that were sent before, and in the functions that these use."""
    text = """
        from cloudexec import BatchExecutor

        def helper():
            return later

        def use():
            return helper()

        if __name__ == "__main__":
            with BatchExecutor(1) as executor:
                print(repr(executor.submit(use).exception()))
                later = 5
                print(executor.submit(use).result())
    """
    said = run_script(tmp_path, text).splitlines()
    assert said == ["NameError(\"name 'later' is not defined\")", "5"]


def test_what_a_task_defines_is_its_own(tmp_path: Path) -> None:
    """Its classes come back by value, though they say that they are the script's."""
    text = """
        from cloudexec import BatchExecutor

        def define():
            global Made
            class Made(Exception):
                code = 3
            Made.__qualname__ = "Made"
            return Made()

        def fail():
            raise Made()

        if __name__ == "__main__":
            with BatchExecutor(1) as executor:
                print(executor.submit(define).result().code, executor.submit(fail).exception().code)
    """
    assert run_script(tmp_path, text) == "3 3\n"


def test_what_no_task_uses_is_not_sent(tmp_path: Path) -> None:
    """A large table that only the program reads stays there; code that is found by name is sent."""
    text = """
        import pickle
        from cloudexec import BatchExecutor

        table = bytearray(30_000_000)
        held = list(range(3_000_000))

        class Found:
            def size(self):
                return factor()

        def factor():
            return 7

        def reads_table():
            return len(table), len(held)

        def load(data):
            return pickle.loads(data).size()

        if __name__ == "__main__":
            with BatchExecutor(1) as executor:
                print(executor.submit(load, pickle.dumps(Found())).result())
                print(executor.stats().bytes_sent < 1_000_000)
                print(executor.submit(reads_table).result())
    """
    assert run_script(tmp_path, text).splitlines() == ["7", "True", "(30000000, 3000000)"]


def test_what_becomes_a_definition_later_is_found_by_its_name(tmp_path: Path) -> None:
    """Whether its name was bound to something else before, of another type or of the same one."""
    text = """
        import functools
        from cloudexec import BatchExecutor

        number = 1
        same_type = functools.partial(abs)

        def twice(x):
            return 2 * x

        def find(name):
            return eval(name)(4)

        if __name__ == "__main__":
            with BatchExecutor(1) as executor:
                said = [*executor.map(find, ["twice"])]
                number = twice
                said += executor.map(find, ["number"])

                def same_type(x):
                    return 3 * x

                same_type = functools.update_wrapper(functools.partial(same_type), same_type)
                said += executor.map(find, ["same_type"])

                def new(x):
                    return 4 * x

                said += executor.map(find, ["new"])

                def new(x):
                    return 5 * x

                said += executor.map(find, ["new"])
                print(*said)
    """
    assert run_script(tmp_path, text) == "8 8 12 16 20\n"


@pytest.mark.parametrize("far", [False, True], ids=["here", "elsewhere"])
def test_a_global_that_cannot_be_sent_is_named_with_the_remedy(tmp_path: Path, far: bool) -> None:
    """Without a guard, or on another machine, the script cannot be run again for it."""
    text = """
        import sqlite3, sys
        from cloudexec import BatchExecutor

        DB = sqlite3.connect(":memory:")

        def helper():
            return DB.execute("select 1").fetchone()

        def work():
            return helper()

        def main():
            listen = "127.0.0.1:0" if sys.argv[1] == "elsewhere" else None
            with BatchExecutor(1, listen=listen) as executor:
                print(executor.submit(work).exception())
                print(executor.submit(abs, -1).result())

    """
    guard = "if __name__ == '__main__':\n    main()\n" if far else "main()\n"
    (tmp_path / "program.py").write_text(textwrap.dedent(text) + guard)
    said = run("program.py", "elsewhere" if far else "here", cwd=tmp_path).splitlines()
    assert said[0].startswith("global DB of helper() cannot be sent (sqlite3.Connection): ")
    assert "open it in an initializer" in said[0]
    assert ("under if __name__ == '__main__':" in said[0]) is not far
    assert said[1] == "1"


def test_what_the_script_makes_later_is_not_taken_from_it(tmp_path: Path) -> None:
    """What it makes under its guard is named; what can be sent after all is sent."""
    text = """
        import sqlite3
        from cloudexec import BatchExecutor

        DB = None
        state = {"limit": 1, "db": sqlite3.connect(":memory:")}

        def work():
            return DB.execute("select 1").fetchone()

        def limit():
            return state["limit"]

        if __name__ == "__main__":
            DB = sqlite3.connect(":memory:")
            with BatchExecutor(1) as executor:
                print(executor.submit(work).exception())
                print(executor.submit(limit).result())
                state["limit"] = 2
                del state["db"]
                print(executor.submit(limit).result())
    """
    said = run_script(tmp_path, text).splitlines()
    assert said[0].startswith("global DB cannot be sent (sqlite3.Connection), and the script makes")
    assert said[1:] == ["1", "2"]


def test_an_initializer_elsewhere_has_large_globals(tmp_path: Path) -> None:
    """They travel before the first task does."""
    text = """
        from cloudexec import BatchExecutor

        data = bytearray(b"x" * 5_000_000)
        seen = None

        def prepare(extra):
            global seen
            seen = len(data) + extra

        def use():
            return seen, len(data)

        if __name__ == "__main__":
            with BatchExecutor(1, initializer=prepare, initargs=(1,), listen="127.0.0.1:0") as ex:
                print(ex.submit(use).result())
    """
    assert run_script(tmp_path, text) == "(5000001, 5000000)\n"


def test_generators_of_random_numbers_differ_from_process_to_process(tmp_path: Path) -> None:
    """A copy in each of them would draw the same numbers; in one process they go on."""
    text = """
        import os, random
        import numpy as np
        from cloudexec import BatchExecutor

        new, old, plain = np.random.default_rng(1), np.random.RandomState(1), random.Random(1)

        def draw(_):
            return os.getpid(), float(new.normal()), float(old.normal()), plain.random()

        if __name__ == "__main__":
            with BatchExecutor(2, min_workers=2) as executor:
                draws = []
                while len({pid for pid, *_ in draws}) < 2:
                    draws += executor.map(draw, range(20))
                for i in (1, 2, 3):
                    assert len({each[i] for each in draws}) == len(draws)
            print("all differ")
    """
    assert run_script(tmp_path, text) == "all differ\n"


PROGRAM = """
from cloudexec import BatchExecutor
{imports}
count = 0

class Thing:
    pass

def bump():
    global count
    count += {step}
    return count, __name__

def make():
    return Thing()

if __name__ == "__main__":
    with BatchExecutor(1) as executor:
        print([executor.submit(bump).result() for _ in range(2)])
        print(type(executor.submit(make).result()) is Thing)
"""
SAID = "[(1, '__main__'), (2, '__main__')]\nTrue\n"


@pytest.mark.parametrize("way", ["-m package", "-m module", "zip", "-c", "-"])
def test_every_way_to_run_a_program_will_do(tmp_path: Path, way: str) -> None:
    """A package, a module, an archive, a string, standard input."""
    plain = PROGRAM.format(imports="", step=1)
    if way == "-m package":
        package = tmp_path / "package"
        package.mkdir()
        (package / "__init__.py").write_text("")
        (package / "steps.py").write_text("STEP = 1\n")
        text = PROGRAM.format(imports="from . import steps", step="steps.STEP")
        (package / "__main__.py").write_text(text)
        said = run("-m", "package", cwd=tmp_path)
    elif way == "-m module":
        (tmp_path / "module.py").write_text(plain)
        said = run("-m", "module", cwd=tmp_path)
    elif way == "zip":
        with zipfile.ZipFile(tmp_path / "program.pyz", "w") as archive:
            archive.writestr("__main__.py", plain)
        said = run("program.pyz", cwd=tmp_path)
    elif way == "-c":
        said = run("-c", plain, cwd=tmp_path)
    else:
        said = run("-", cwd=tmp_path, stdin=plain)
    assert said == SAID


@pytest.mark.skipif(
    not (importlib.util.find_spec("nbclient") and importlib.util.find_spec("ipykernel")),
    reason="nbclient and ipykernel are not installed",
)
def test_cells_that_define_something_anew_are_followed(tmp_path: Path) -> None:
    """State of a notebook stays in the processes, and what a later cell defines replaces it."""
    import nbclient
    import nbformat

    cells = [
        f"import sys; sys.path.insert(0, {str(PROBES.parents[2])!r})\n"
        "from cloudexec import BatchExecutor\nexecutor = BatchExecutor(1)\n"
        "count = 0\nclass Model:\n    rate = 1\n"
        "def use():\n    global count\n    count += 1\n    return count, Model.rate\n",
        "print(executor.submit(use).result(), executor.submit(use).result())",
        "class Model:\n    rate = 2\nprint(executor.submit(use).result())",
        "def make():\n    return Model()\n"
        "print(type(executor.submit(make).result()) is Model)\nexecutor.shutdown()",
    ]
    book: Any = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells])
    nbclient.NotebookClient(book, timeout=60).execute(cwd=str(tmp_path))
    texts = ["".join(output.get("text", "") for output in cell.outputs) for cell in book.cells]
    assert texts[1:] == ["(1, 1) (2, 1)\n", "(3, 2)\n", "True\n"]


@pytest.mark.parametrize("way", ["copy", "fresh"])
def test_a_proxy_is_not_taken_for_the_function_that_it_stands_for(tmp_path: Path, way: str) -> None:
    """What a decorator of wrapt does holds in tasks; a process pool cannot send it by itself."""
    proxies = """
class Decorated:
    # As a proxy of wrapt, it says that it is a function, and has what that has.
    def __init__(self, function):
        self.__dict__["_function"] = function

    @property
    def __class__(self):
        return type(self._function)

    def __getattr__(self, name):
        return getattr(self.__dict__["_function"], name)

    def __call__(self, *args):
        return self._function(*args) + 1

    def __reduce_ex__(self, protocol):
        raise NotImplementedError("object proxy must define __reduce_ex__()")
"""
    (tmp_path / "proxies.py").write_text(proxies)
    text = """
        import sys, threading
        from cloudexec import BatchExecutor, PayloadError
        from proxies import Decorated

        @Decorated
        def work(x):
            return x + 1

        def call(x):
            return work(x)

        if __name__ == "__main__":
            go_on = threading.Event()
            if sys.argv[1] == "fresh":
                threading.Thread(target=go_on.wait).start()
            with BatchExecutor(1) as executor:
                print(executor.submit(call, 1).result(), *executor.map(call, [1, 2]))
                try:
                    executor.submit(work, 1).result()
                except PayloadError as error:
                    print("must define __reduce_ex__" in str(error))
            go_on.set()
    """
    assert run_script(tmp_path, text, way) == "3 3 4\nTrue\n"
