"""What the first worker does before anybody can be dialed, and imports for all its slots."""

from __future__ import annotations

import gc
import importlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from cloudexec import BatchExecutor, PayloadError

Write = Callable[[str, str], None]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Return what writes a module that this process and its workers can import."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(name: str, source: str) -> None:
        (tmp_path / f"{name}.py").write_text(source)

    return write


def _attributes(module: str, name: str, barrier: str) -> tuple[int, object]:
    """Return the own process and an attribute of a module, once two tasks have come so far."""
    import importlib
    import os
    import time

    Path(barrier, str(os.getpid())).touch()
    while len(os.listdir(barrier)) < 2:
        time.sleep(0.001)
    value = getattr(importlib.import_module(module), name)
    return os.getpid(), value() if callable(value) else value


def _of_two_slots(
    executor: BatchExecutor, module: str, name: str, barrier: Path
) -> dict[int, object]:
    barrier.mkdir()
    futures = [executor.submit(_attributes, module, name, str(barrier)) for _ in range(2)]
    return dict(future.result(30) for future in futures)


def _run(path: Path, source: str) -> list[str]:
    path.write_text(source)
    done = subprocess.run(
        [sys.executable, str(path)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_a_module_is_imported_once_for_all_slots(write: Write, tmp_path: Path) -> None:
    """They find it as it was when they were forked."""
    write("preloaded_once", "import os\nPID = os.getpid()\n")
    with BatchExecutor(2, preload=["preloaded_once"]) as executor:
        found = _of_two_slots(executor, "preloaded_once", "PID", tmp_path / "barrier")
    assert len(found) == 2
    assert len(set(found.values())) == 1
    assert not set(found) & set(found.values())


def test_a_module_that_starts_threads_is_left_to_each_slot(write: Write, tmp_path: Path) -> None:
    """There its threads run; and the others are still imported once."""
    write("preloaded_before", "import os\nPID = os.getpid()\n")
    write(
        "with_a_thread",
        "import os, threading\n"
        "import preloaded_before\n"
        "PIDS = os.getpid(), preloaded_before.PID\n"
        "thread = threading.Thread(target=threading.Event().wait, daemon=True)\n"
        "thread.start()\n"
        "def state():\n"
        "    return (*PIDS, thread.is_alive())\n",
    )
    names = ["preloaded_before", "with_a_thread"]
    with BatchExecutor(2, preload=names) as executor:
        found = _of_two_slots(executor, "with_a_thread", "state", tmp_path / "barrier")
    assert {own for own, _, _ in found.values()} == set(found)  # type: ignore[misc]
    assert all(alive for _, _, alive in found.values())  # type: ignore[misc]
    before = {pid for _, pid, _ in found.values()}  # type: ignore[misc]
    assert len(before) == 1
    assert not before & set(found)


@pytest.mark.parametrize(
    "made",
    [
        "import random\ndraw = random.Random().random\nGENERATOR = draw.__self__",
        "import numpy\ndraw = numpy.random.rand",
        "import numpy\nGENERATOR = numpy.random.default_rng()\ndraw = GENERATOR.random",
    ],
    ids=["random", "numpy's global one", "numpy"],
)
def test_slots_draw_different_numbers_from_a_generator_of_a_module(
    made: str, write: Write, tmp_path: Path
) -> None:
    """Though they were forked with it in one state."""
    if "numpy" in made:
        pytest.importorskip("numpy")
    name = f"generators_{abs(hash(made))}"
    write(name, made + "\n")
    with BatchExecutor(2, preload=[name]) as executor:
        found = _of_two_slots(executor, name, "draw", tmp_path / "barrier")
    assert len(set(found.values())) == 2


def test_a_module_that_cannot_be_imported_in_advance_harms_nobody(write: Write) -> None:
    """Whoever needs it learns why."""
    write("preload_exits", "raise SystemExit('not here')\n")
    write(
        "preload_nests",
        "from cloudexec import BatchExecutor\nBatchExecutor(1).submit(len, '').result()\n",
    )
    names = ["preload_exits", "preload_nests", "no_such_module"]
    with BatchExecutor(1, preload=names) as executor:
        assert executor.submit(len, "abc").result(30) == 3


def test_what_the_script_and_its_own_modules_import_is_imported_in_advance(tmp_path: Path) -> None:
    """Own modules themselves are not: they may do anything. And it can be switched off."""
    (tmp_path / "own_module.py").write_text("import psutil\n")
    script = (
        "import sys\n"
        "import own_module\n"
        "from cloudexec import BatchExecutor\n"
        "def here():\n"
        "    return [name in sys.modules for name in ('psutil', 'own_module')]\n"
        "if __name__ == '__main__':\n"
        "    for preload in (True, False):\n"
        "        with BatchExecutor(1, preload=preload) as executor:\n"
        "            print(*executor.submit(here).result())\n"
    )
    assert _run(tmp_path / "script.py", script) == ["True", "False", "False", "False"]


def test_what_runs_a_test_is_not_imported_for_its_tasks(write: Write) -> None:
    """pytest adds globals to modules of tests that it has read; with xdist, it runs in execnet."""
    write(
        "test_of_a_user",
        "def here():\n"
        "    import sys\n"
        "    return [name for name in ('_pytest', 'execnet') if name in sys.modules]\n",
    )
    module = importlib.import_module("test_of_a_user")
    assert "@pytest_ar" in vars(module)
    with BatchExecutor(1) as executor:
        assert executor.submit(module.here).result(30) == []


def test_on_this_machine_nobody_imports_grpc(tmp_path: Path) -> None:
    """Neither the client nor the slots, nor what starts them."""
    script = (
        "import sys\n"
        "from cloudexec import BatchExecutor\n"
        "def here():\n"
        "    return 'grpc' in sys.modules\n"
        "if __name__ == '__main__':\n"
        "    with BatchExecutor(1) as executor:\n"
        "        print(executor.submit(here).result(), here())\n"
    )
    assert _run(tmp_path / "script.py", script) == ["False", "False"]


def test_a_worker_that_nothing_came_of_ends_with_its_executor() -> None:
    """It was started with ``put()``, before there was a task for it."""
    children = set(psutil.Process().children(recursive=True))
    with BatchExecutor(1) as executor:
        executor.put(b"x")
        started = set(psutil.Process().children()) - children
        assert len(started) == 1
    assert not any(process.is_running() for process in started)


def test_initargs_that_cannot_be_sent_leave_no_worker_behind() -> None:
    """It was started before they were pickled."""
    children = set(psutil.Process().children(recursive=True))
    with BatchExecutor(1, initializer=print, initargs=(sys._getframe(),)) as executor:
        with pytest.raises(PayloadError, match="cannot be sent"):
            executor.submit(len, "")
    assert not set(psutil.Process().children()) - children


@pytest.mark.parametrize("preload", ["numpy", 1, [1]])
def test_preload_must_be_a_switch_or_names(preload: object) -> None:
    """A name alone would be read as its letters."""
    with pytest.raises(TypeError, match="preload must be"):
        BatchExecutor(1, preload=preload)  # type: ignore[arg-type]


@pytest.mark.parametrize("preload", [[], ["fractions"]])
def test_garbage_is_collected_in_tasks(preload: list[str]) -> None:
    """It is not while a worker imports modules."""
    with BatchExecutor(1, preload=preload) as executor:
        assert executor.submit(gc.isenabled).result(30)


def _tls_of_asyncio() -> bool:
    import asyncio

    return asyncio.sslproto.ssl is not None  # type: ignore[attr-defined]


@pytest.mark.parametrize("preload", [[], ["asyncio"]])
def test_tasks_have_an_asyncio_with_tls(preload: list[str]) -> None:
    """The process above them imports its own without."""
    with BatchExecutor(1, preload=preload) as executor:
        assert executor.submit(_tls_of_asyncio).result(30)
