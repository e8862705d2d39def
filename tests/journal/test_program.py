"""Programs that are run again after edits, upgrades and in other ways: from start to end."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from journal_tasks import calls

from cloudexec._journal.changes import explained
from cloudexec._journal.keys import arguments_digest, digest_of
from cloudexec._journal.program import Manifest, Program

Start = Callable[..., "subprocess.Popen[str]"]

USUAL = """
import collections, dataclasses, datetime, decimal, enum, functools, logging, pathlib, sys, uuid
import numpy
from cloudexec import BatchExecutor
from journal_tasks import count
import mine

class Color(enum.Enum):
    RED = "red"

@dataclasses.dataclass(frozen=True)
class Point:
    x: int
    tags: frozenset = frozenset({"a", "b", "c"})

class Model:
    words = {"one", "two", "three"}

    def __init__(self, weight):
        self.weight = weight
        self.seen = {"x", "y", "z"}

    def predict(self, x):
        return self.weight * x

Pair = collections.namedtuple("Pair", "a b")
TABLE = {"a": {"x", "y"}, "b": [Point(1)]}

def same(*args, **kwargs):
    return len(args), len(TABLE)

def adder(n):
    return lambda x: x + n

if __name__ == "__main__":
    logging.basicConfig()
    with BatchExecutor(1, journal=sys.argv[1]) as executor:
        submit = executor.submit
        words = {"some", "words", "in", "a", "set"}
        first = submit(adder(2), 3)
        shared = ["a b", "".join(["a", " b"])]
        futures = [
            first, submit(adder([2]), numpy.arange(3)), submit(lambda: Color.RED.value),
            submit(same, 1, 2.5, "text", b"bytes", None, True, 1j, ..., (1, ("a",)), [1], {"a": 1}),
            submit(same, words, frozenset(words), [words, words], {1: words}, (words, Color.RED)),
            submit(same, {Point(1), Point(2, frozenset(words)), "x", Color.RED, ("a", 1)}),
            submit(same, numpy.arange(100_000), numpy.zeros((3, 4))[:, ::2], numpy.float64(1)),
            submit(same, Point(3), Pair(1, words), Model(2), Color.RED, mine.Settings({"k"})),
            submit(same, datetime.datetime(2000, 1, 1), decimal.Decimal("1.5"), pathlib.Path("x"),
                   uuid.UUID(int=5), range(5), collections.OrderedDict(a=1),
                   collections.defaultdict(list, a=[1]), collections.Counter("abc")),
            submit(same, a=1, b=words, c=shared), submit(functools.partial(same, 1, k=words), 2),
            submit(Model(3).predict, 4), submit(mine.Settings({"k", "l"}).size),
            submit(same, executor.put({"put": words}), [executor.put(numpy.arange(200_000))]),
            submit(same, executor.put(Model(4)), executor.put("small")), submit(same, Model, Pair),
            submit(same, first, [first]), submit(mine.by_decorator, 5), submit(mine.by_cache, 5),
            submit(str.upper, "a"), submit("a b".split), submit(same, same, lambda: words),
            submit(same, bytes(300_000), bytearray(300_000), "s" * 300_000),
            executor.with_options(env={"B": "2", "A": "1"}).submit(same, 1),
            *[submit(same, n) for n in range(3)],
        ]
        futures += [executor.with_options(key=f"k{n}").submit(Model(n).predict, n) for n in (1, 2)]
        mapped = list(executor.map(adder(1), range(5)))
        mapped += executor.map(Model(5).predict, range(6), chunksize=2)
        results = [repr(future.result()) for future in futures]
        print(len(futures) + 5 + 3, executor.stats().tasks.resumed, *results, mapped)
"""
MINE = """
import functools
NAMES = {"p", "q", "r"}

def traced(fn):
    @functools.wraps(fn)
    def wrapper(*args):
        return fn(*args)
    wrapper.names = NAMES
    return wrapper

@traced
def by_decorator(x):
    return x

@functools.lru_cache
def by_cache(x):
    return x

class Settings:
    def __init__(self, names):
        self.names = names

    def size(self):
        return len(self.names)
"""


def said_by(process: subprocess.Popen[str]) -> tuple[str, str]:
    out, err = process.communicate(timeout=55)
    assert process.returncode == 0, err
    return out.strip(), err


@pytest.mark.timeout(60)
def test_program_that_is_the_same_runs_nothing_again(program: Start, tmp_path: Path) -> None:
    """With all that people pass around, in another process with another hash seed."""
    pytest.importorskip("numpy")
    (tmp_path / "usual.py").write_text(USUAL)
    (tmp_path / "mine.py").write_text(MINE)
    runs = [
        said_by(program(tmp_path / "usual.py", tmp_path / "journal", PYTHONHASHSEED=seed))
        for seed in "12"
    ]
    count, resumed, *results = runs[0][0].split(maxsplit=2)
    assert (resumed, runs[0][1]) == ("0", "")
    assert runs[1] == (" ".join((count, count, *results)), "")


SMALL = """
import logging, sys
from cloudexec import BatchExecutor
from journal_tasks import square
if {guard}:
    import late
    logging.basicConfig()
    def own(x):
        import later
        return square({ran!r}, x) + later.go()
    with BatchExecutor(1, journal={journal!r}) as executor:
        print(executor.submit(own, 3).result(), executor.submit(late.go, 3).result(), end=" ")
        print(executor.stats().tasks.resumed)
"""


@pytest.mark.timeout(60)
@pytest.mark.parametrize("way", ["file", "-m", "package", "-c", "stdin", "ipython"])
def test_program_is_known_however_it_is_started(
    program: Start, tmp_path: Path, ran: str, way: str
) -> None:
    """And modules that only a function of it imports count, whether it has a file or none."""
    text = SMALL.format(ran=ran, journal=str(tmp_path / "journal"), guard="__name__ == '__main__'")
    (tmp_path / "prog.py").write_text(text)
    (tmp_path / "pkg").mkdir()
    (tmp_path / "pkg" / "__init__.py").touch()
    (tmp_path / "pkg" / "prog.py").write_text(text)
    (tmp_path / "late.py").write_text("def go(x): return x\n")
    command = {
        "file": ["prog.py"],
        "-m": ["-m", "prog"],
        "package": ["-m", "pkg.prog"],
        "-c": ["-c", text],
        "stdin": ["-"],
        "ipython": ["-m", "IPython", "--simple-prompt", "--no-banner", "--colors=NoColor"],
    }[way]
    if way == "ipython":
        pytest.importorskip("IPython")
    path = os.pathsep.join([str(Path(__file__).parent), str(tmp_path)])
    env = {**os.environ, "PYTHONPATH": path, "IPYTHONDIR": str(tmp_path / "ipython")}

    def run(value: int) -> str:
        (tmp_path / "later.py").write_text(f"def go(): return {value}\n")
        typed = f"exec({text!r})\n" if way == "ipython" else text
        done = subprocess.run(
            [sys.executable, "-B", *command],
            cwd=tmp_path,
            env=env,
            input=typed,
            capture_output=True,
            text=True,
            timeout=55,
            check=True,
        )
        lines = [line for line in done.stdout.splitlines() if " 3 " in line]
        assert len(lines) == 1, done.stdout + done.stderr
        return lines[0].removeprefix("In [1]: ")

    assert run(1) == "10 3 0"
    assert run(1) == "10 3 2"
    changed = run(2)
    assert changed.startswith("11 3 ")
    assert calls(ran) == {"3": 2}


def test_message_says_what_has_changed_and_what_it_costs(
    program: Start, tmp_path: Path, ran: str
) -> None:
    """Once, also where several things have; it names files, distributions and how many results."""
    (tmp_path / "script.py").write_text(
        "import logging, sys\n"
        "from cloudexec import BatchExecutor\n"
        "import mine, thing\n"
        "if __name__ == '__main__':\n"
        "    logging.basicConfig()\n"
        "    with BatchExecutor(1, journal=sys.argv[1]) as executor:\n"
        "        print(list(executor.map(mine.work, [sys.argv[2]] * 3, range(3))),\n"
        "              executor.submit(abs, -1).result(), executor.stats().tasks.resumed)\n"
    )
    site = tmp_path / "site-packages"
    (site / "thing").mkdir(parents=True)
    (site / "thing" / "__init__.py").touch()
    path = os.pathsep.join([str(Path(__file__).parent), str(site)])

    def run(factor: int, version: str) -> tuple[str, str]:
        (tmp_path / "mine.py").write_text(
            "from journal_tasks import square\n"
            f"def work(directory, x): return square(directory, x) * {factor}\n"
        )
        for old in site.glob("*.dist-info"):
            for file in old.iterdir():
                file.unlink()
            old.rmdir()
        info = site / f"thing-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: thing\nVersion: {version}\n")
        (info / "RECORD").write_text("thing/__init__.py,,\n")
        process = program(
            tmp_path / "script.py",
            tmp_path / "p.journal",
            ran,
            PYTHONPATH=path,
            PYTHONDONTWRITEBYTECODE="1",
        )
        return said_by(process)

    journal = f"WARNING:cloudexec:journal {tmp_path / 'p.journal'}:"
    assert run(1, "1.0") == ("[0, 1, 4] 1 0", "")
    assert run(2, "1.0") == (
        "[0, 2, 8] 1 0",
        f"{journal} mine.py has changed since 4 results were recorded; these are run again\n",
    )
    assert run(2, "1.0") == ("[0, 2, 8] 1 4", "")
    assert run(2, "1.1") == (
        "[0, 2, 8] 1 0",
        f"{journal} thing was 1.0 and is 1.1 since 8 results were recorded; these are run again\n",
    )
    assert run(1, "1.0") == ("[0, 1, 4] 1 4", "")  # what was there before is there again


def test_changes_are_said_in_one_sentence() -> None:
    """Python, the script's name, modules that come and go, and journals of earlier versions."""

    def manifest(python: str, **modules: str) -> Manifest:
        names = {name: [f"{name}.py", digest] for name, digest in modules.items()}
        return {"python": python, "modules": names, "distributions": {}}

    old = manifest("cpython 3.11.7", a="1", b="1", c="1", d="1", e="1", f="1")
    new = manifest("cpython 3.12.1", a="2", b="2", c="2", d="2", e="2", g="1")
    assert explained(old, new, 1) == (
        "Python was cpython 3.11.7 and is cpython 3.12.1, a.py, b.py, c.py and 2 more have "
        "changed, g.py is new, f.py is no longer used since 1 result was recorded; it is "
        "run again"
    )
    assert explained(None, new, 5) == (
        "another version of cloudexec recorded 5 results; these are run again"
    )
    assert "the rule by which calls are known has changed" in explained(old, old, 2)
    one = {**old, "modules": {"__main__": ["one.py", "1"]}}
    two = {**old, "modules": {"__main__": ["two.py", "2"]}}
    assert explained(one, two, 2).startswith("the script was one.py and is two.py since 2 results")


def test_results_of_an_earlier_version_are_run_again(
    program: Start, tmp_path: Path, ran: str
) -> None:
    """Their keys say nothing any more; the journal takes new ones."""
    from cloudexec._journal.sqlite import SqliteStore
    from cloudexec._journal.store import Record

    store = SqliteStore(tmp_path / "journal")
    store.write([Record(b"k" * 20, b"v" * 32, "prog:own", 1.0, b"result")])
    store.close()
    text = SMALL.format(ran=ran, journal=str(tmp_path / "journal"), guard="__name__ == '__main__'")
    (tmp_path / "prog.py").write_text(text)
    (tmp_path / "late.py").write_text("def go(x): return x\n")
    (tmp_path / "later.py").write_text("def go(): return 1\n")
    out, err = said_by(program(tmp_path / "prog.py"))
    assert out == "10 3 0"
    assert "another version of cloudexec recorded 1 result; it is run again" in err
    assert said_by(program(tmp_path / "prog.py")) == ("10 3 2", "")


EDITED = """
import logging, pathlib, sys
from cloudexec import BatchExecutor
import mine
if __name__ == "__main__":
    logging.basicConfig()
    with BatchExecutor(1, journal=sys.argv[1]) as executor:
        print(executor.submit(mine.work, 1).result(), end=" ")
        mine_py = pathlib.Path(mine.__file__)
        text = mine_py.read_text()
        mine_py.write_text("# a comment\\n" + text)
        script = pathlib.Path(__file__)
        this = script.read_text()
        script.write_text("edited = True\\n" + this)
        print(executor.submit(mine.work, 2).result(), end=" ")
        script.write_text(this)
        if sys.argv[2:]:
            mine_py.write_text(text.replace("= 1", "= 2"))
        print(*[executor.submit(mine.work, x).result() for x in (3, 4)], end=" ")
        mine_py.write_text(text)
        print(executor.stats().tasks.resumed)
"""


@pytest.mark.timeout(60)
def test_what_ran_while_a_file_was_edited_is_not_recorded(program: Start, tmp_path: Path) -> None:
    """A worker may have loaded either version. Comments do not count, nor does the script, which
    no worker loads."""
    (tmp_path / "edited.py").write_text(EDITED)
    (tmp_path / "mine.py").write_text("N = 1\ndef work(x): return N * x\n")

    def run(*args: str) -> tuple[str, str]:
        return said_by(program(tmp_path / "edited.py", tmp_path / "journal", *args))

    out, err = run("edit")
    assert out == "1 2 3 4 0"
    assert err.count("mine.py has changed while the program runs") == 1
    assert run() == ("1 2 3 4 2", "")
    assert run() == ("1 2 3 4 4", "")


ARRIVING = """
import logging, pathlib, sys
from cloudexec import BatchExecutor
import pkg
def work(x):
    import fractions
    found = getattr(fractions, "MINE", 0)
    for read in (one, two):
        try:
            found += read()
        except ImportError:
            pass
    return x + found
def one():
    import helper
    return helper.MINE
def two():
    import pkg.late
    return pkg.late.MINE
if __name__ == "__main__":
    logging.basicConfig()
    journal, *files = sys.argv[1:]
    folder = pathlib.Path(__file__).parent
    with BatchExecutor(1, journal=journal, max_tasks_per_child=1) as executor:
        print(executor.submit(work, 1).result(), end=" ")
        (folder / "notes.txt").write_text("changes the folder's time")
        (folder / "unused.py").write_text("MINE = 10")
        print(executor.submit(work, 2).result(), end=" ")
        for name in files:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text("MINE = 10")
        print(executor.submit(work, 3).result(), executor.stats().tasks.resumed)
    for name in files:
        (folder / name).unlink()
    if (folder / "helper").exists():
        (folder / "helper").rmdir()
"""


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "file", ["helper.py", "helper/__init__.py", "pkg/late.py", "fractions.py", "given/helper.py"]
)
def test_what_ran_when_a_module_had_come_is_not_recorded(
    program: Start, tmp_path: Path, file: str
) -> None:
    """One that an import did not find before, or found elsewhere; others are no matter."""
    (tmp_path / "arriving.py").write_text(ARRIVING)
    (tmp_path / "pkg").mkdir()
    (tmp_path / "pkg" / "__init__.py").touch()
    (tmp_path / "given").mkdir()

    def run(*files: str) -> tuple[str, str]:
        done = program(
            tmp_path / "arriving.py",
            tmp_path / "journal",
            *files,
            PYTHONDONTWRITEBYTECODE="1",
            PYTHONPATH=os.pathsep.join([os.environ.get("PYTHONPATH", ""), str(tmp_path / "given")]),
        )
        return said_by(done)

    out, err = run(file)
    assert out == "1 2 13 0"
    said = f": {file.removeprefix('given/')} has changed while the program runs"
    assert err.count(said) == 1
    assert run() == ("1 2 3 2", "")
    assert run() == ("1 2 3 3", "")


def test_equal_arguments_have_one_name_whichever_objects_they_are() -> None:
    """Strings, bytes and tuples that are one object, or several; sets in whatever order."""
    program = Program()
    text, again = "some words", "".join(["some", " words"])
    assert text is not again
    for one, other in (
        ([text, text, [text]], [text, again, [again]]),
        ({text: [again]}, {again: [text]}),
        ({"a", "b", text}, {again, "b", "a"}),
        ([b"ab" * 2, [b"abab"]], [b"abab", [bytes(bytearray(b"abab"))]]),
        ({("a", text), ("b", 1)}, {("b", 1), ("a", again)}),
    ):
        assert one == other
        assert digest_of(one, program) == digest_of(other, program)
    assert arguments_digest((text, text), {}, program, None) == arguments_digest(
        (text, again), {}, program, None
    )


def test_sets_that_hold_what_holds_them_have_names() -> None:
    """They can be sent, so they can be arguments."""

    class Holder:
        def __init__(self, name: str) -> None:
            self.name = name
            self.all: set[Holder] = set()

    def made(name: str) -> Holder:
        holders = [Holder("a"), Holder(name)]
        holders[0].all.update(holders)
        holders[1].all.add(holders[0])
        return holders[0]

    program = Program()
    assert digest_of(made("b"), program) == digest_of(made("b"), program)
    assert digest_of(made("b"), program) != digest_of(made("c"), program)


def test_looking_at_a_program_runs_nothing_of_it(tmp_path: Path) -> None:
    """Modules that are only named are read, not imported; those that load themselves sleep on."""
    (tmp_path / "prog.py").write_text(
        "import importlib.util, sys\n"
        "spec = importlib.util.find_spec('lazy')\n"
        "loader = importlib.util.LazyLoader(spec.loader)\n"
        "spec.loader = loader\n"
        "module = importlib.util.module_from_spec(spec)\n"
        "sys.modules['lazy'] = module\n"
        "loader.exec_module(module)\n"
        "def f():\n    import pkg.sub, lazy\n"
        "from cloudexec._journal.program import Program\n"
        "before = set(sys.modules)\n"
        "modules = Program().manifest['modules']\n"
        "print(sorted(modules), 'pkg' in sys.modules)\n"
    )
    (tmp_path / "pkg").mkdir()
    for name in ("pkg/__init__.py", "pkg/sub.py", "lazy.py"):
        (tmp_path / name).write_text("print('run')\n")
    done = subprocess.run(
        [sys.executable, tmp_path / "prog.py"], capture_output=True, text=True, check=True
    )
    assert done.stdout == "['__main__', 'lazy', 'pkg', 'pkg.sub'] False\n"
