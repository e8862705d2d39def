"""What becomes of a suite in which tests are flaky, fail, hang or end their process."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
import suite_plugin

Suite = Callable[..., subprocess.CompletedProcess[str]]

PARALLEL = ("-p", "xdist.plugin", "-n2")
SERIAL: tuple[str, ...] = ()

CONFTEST = """
    pytest_plugins = ["suite_plugin", "load_plugin"]
    import os, pathlib, pytest

    def pytest_configure():
        import suite_plugin
        suite_plugin.HANG_AFTER = 1.0

    @pytest.fixture
    def first_time(request):
        path = pathlib.Path(__file__).with_name(request.node.name + ".ran")
        there = path.exists()
        path.touch()
        return not there
"""
FLAKY = """
    def test_flaky_{n}(first_time):
        print("the state of things")
        assert not first_time, "bad luck {n}"
"""
SOUND = "def test_sound(): pass\n"


@pytest.fixture
def suite(tmp_path: Path) -> Suite:
    """Run a suite of one file: its source, and options of pytest."""

    def run(source: str, *options: str) -> subprocess.CompletedProcess[str]:
        (tmp_path / "conftest.py").write_text(textwrap.dedent(CONFTEST))
        (tmp_path / "test_it.py").write_text("import pytest\n" + textwrap.dedent(source))
        path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
        env = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("PYTEST_", "CLOUDEXEC_"))
        }
        # Other plugins have no part in this, and take long to be imported.
        env["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
        plugins = ["-p", "no:cacheprovider", "-p", "pytest_timeout"]
        return subprocess.run(
            [sys.executable, "-m", "pytest", *plugins, *options],
            cwd=tmp_path,
            env={**env, "PYTHONPATH": path},
            capture_output=True,
            text=True,
            timeout=100,
        )

    return run


def last_line(run: subprocess.CompletedProcess[str]) -> str:
    return re.sub(r" in [\d.]+s.*", "", run.stdout.splitlines()[-1].strip("= "))


@pytest.mark.parametrize("options", [PARALLEL, SERIAL], ids=["parallel", "serial"])
def test_a_test_that_passes_when_run_alone_is_listed_with_its_first_failure(
    suite: Suite, options: tuple[str, ...]
) -> None:
    run = suite(SOUND + textwrap.dedent(FLAKY.format(n=1)), *options)
    assert run.returncode == 0, run.stdout
    assert "FLAKY test_it.py::test_flaky_1\n" in run.stdout
    assert "bad luck 1" in run.stdout
    assert "the state of things" in run.stdout
    assert last_line(run) == "2 passed, 1 flaky"


def test_a_fourth_flaky_test_fails(suite: Suite) -> None:
    source = SOUND + "".join(textwrap.dedent(FLAKY.format(n=n)) for n in range(4))
    run = suite(source, *PARALLEL)
    assert run.returncode == 1, run.stdout
    assert len(re.findall("^FLAKY ", run.stdout, re.M)) == 3
    assert "more than 3 tests are flaky" in run.stdout
    assert all(f"bad luck {n}" in run.stdout for n in range(4))
    assert last_line(run) == "1 failed, 4 passed, 3 flaky"


def test_what_fails_twice_has_failed_and_says_both(suite: Suite) -> None:
    run = suite(
        SOUND
        + """
    def test_wrong(first_time):
        assert first_time == "either", "wrong the first time" if first_time else "wrong again"

    @pytest.fixture
    def broken(first_time):
        raise OSError("broken the first time" if first_time else "broken again")

    def test_with_a_broken_fixture(broken): pass

    @pytest.fixture
    def unclean(first_time):
        yield
        raise OSError("unclean the first time" if first_time else "unclean again")

    def test_that_leaves_something(unclean): pass
    """.replace("\n    ", "\n"),
        *PARALLEL,
    )
    assert run.returncode == 1, run.stdout
    for what in ("wrong", "broken", "unclean"):
        assert f"{what} the first time" in run.stdout
        assert f"{what} again" in run.stdout
    assert "FLAKY" not in run.stdout
    assert last_line(run) == "1 failed, 2 passed, 2 errors"


@pytest.mark.parametrize("options", [PARALLEL, SERIAL], ids=["parallel", "serial"])
def test_a_fixture_that_fails_once_makes_its_test_flaky(
    suite: Suite, options: tuple[str, ...]
) -> None:
    """It counts as passed once, whether the fixture fails before the test or after it."""
    run = suite(
        """
        @pytest.fixture
        def before(first_time):
            assert not first_time, "before"

        @pytest.fixture
        def after(first_time):
            yield
            assert not first_time, "after"

        def test_begin(before): pass
        def test_end(after): pass
        """,
        *options,
    )
    assert run.returncode == 0, run.stdout
    assert last_line(run) == "2 passed, 2 flaky"


def test_a_test_that_ends_its_process_fails_and_no_other(suite: Suite) -> None:
    """Each crash ends a process of its own, also when the test runs once more."""
    run = suite(
        SOUND
        + """
def test_that_ends_once(first_time):
    if first_time:
        os._exit(7)

def test_that_always_ends(): os._exit(8)
def test_after(): pass
import os
""",
        *PARALLEL,
    )
    assert run.returncode == 1, run.stdout
    assert "FLAKY test_it.py::test_that_ends_once" in run.stdout
    assert "FAILED test_it.py::test_that_always_ends" in run.stdout
    assert "ended with 8" in run.stdout
    assert last_line(run) == "1 failed, 3 passed, 1 flaky"


@pytest.mark.parametrize("options", [PARALLEL, SERIAL], ids=["parallel", "serial"])
def test_a_hang_is_a_failure_that_names_its_test(suite: Suite, options: tuple[str, ...]) -> None:
    run = suite(
        """
        import threading

        @pytest.mark.timeout(0.5)
        def test_that_hangs(): threading.Event().wait(30)
        def test_after(): pass
        """,
        *options,
    )
    assert run.returncode == 1, run.stdout
    assert "FAILED test_it.py::test_that_hangs" in run.stdout
    assert "Timeout" in run.stdout
    assert last_line(run) == "1 failed, 1 passed"


def test_a_hang_that_no_signal_wakes_costs_its_process_and_no_other_test(suite: Suite) -> None:
    run = suite(
        """
        import signal

        @pytest.mark.timeout(0.5)
        def test_that_hangs():
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})
            signal.sigwait({signal.SIGUSR2})

        def test_after(): pass
        def test_later(): pass
        """,
        *PARALLEL,
    )
    assert run.returncode == 1, run.stdout
    assert "FAILED test_it.py::test_that_hangs" in run.stdout
    assert "in test_that_hangs" in run.stdout  # the stack, from the second run
    assert last_line(run) == "1 failed, 2 passed"


@pytest.mark.parametrize("options", [PARALLEL, SERIAL], ids=["parallel", "serial"])
def test_what_is_marked_alone_runs_when_all_others_have_ended(
    suite: Suite, tmp_path: Path, options: tuple[str, ...]
) -> None:
    """One at a time, and one that fails runs once more as any other does."""
    run = suite(
        """
        import contextlib, pathlib, time

        @contextlib.contextmanager
        def noted(what):
            with open("log", "a") as log:
                log.write(f"begin {what}\\n")
            yield
            with open("log", "a") as log:
                log.write(f"end {what}\\n")

        @pytest.mark.alone
        @pytest.mark.parametrize("n", [1, 2])
        def test_alone(n, first_time):
            with noted("alone"):
                unlucky = n == 2 and first_time
            assert not unlucky

        @pytest.mark.parametrize("n", range(6))
        def test_other(n):
            with noted("other"):
                time.sleep(0.01)
        """,
        *options,
    )
    assert run.returncode == 0, run.stdout
    assert last_line(run) == "8 passed, 1 flaky"
    log = (tmp_path / "log").read_text().splitlines()
    assert sorted(log[:12]) == ["begin other"] * 6 + ["end other"] * 6
    # Two of them, and one once more.
    assert log[12:] == ["begin alone", "end alone"] * 3


def test_where_too_many_fail_none_runs_again(suite: Suite) -> None:
    run = suite(
        """
        import pathlib

        @pytest.mark.parametrize("n", range(16))
        def test_wrong(n):
            path = pathlib.Path(f"ran-{n}")
            assert path.exists() and False, path.touch()
        """,
        *SERIAL,
    )
    assert run.returncode == 1, run.stdout
    assert last_line(run) == "16 failed"


def test_selected_tests_run_as_they_always_did(suite: Suite) -> None:
    """In one process, and once."""
    run = suite(textwrap.dedent(FLAKY.format(n=1)), "test_it.py::test_flaky_1")
    assert run.returncode == 1
    assert "workers" not in run.stdout  # as xdist says how many there are
    assert last_line(run) == "1 failed"


def test_a_suite_that_cannot_be_collected_says_so(suite: Suite) -> None:
    run = suite("import no_such_module_anywhere\n", *PARALLEL)
    assert run.returncode not in (0, 5)
    assert "no_such_module_anywhere" in run.stdout


def test_under_load_every_process_is_restless_and_has_more_time(suite: Suite) -> None:
    """And after the run none is, unless they were before."""
    ask = "import sys; print(sys.getswitchinterval())"
    before = subprocess.check_output([sys.executable, "-c", ask])
    run = suite(
        f"""
        import subprocess, sys

        @pytest.mark.timeout(2)
        def test_it(request):
            assert sys.getswitchinterval() < 1e-4
            said = subprocess.check_output([sys.executable, "-I", "-c", {ask!r}], text=True)
            assert float(said) < 1e-4
            assert request.node.get_closest_marker("timeout").args == (6.0,)
        """,
        *PARALLEL,
        "--restless",
        "--busy",
    )
    assert run.returncode == 0, run.stdout
    assert subprocess.check_output([sys.executable, "-c", ask]) == before


def test_files_that_begin_first_are_there() -> None:
    tests = Path(__file__).parent
    names = [str(path.relative_to(tests.parent)) for path in tests.rglob("test_*.py")]
    assert all(any(name.startswith(slow) for name in names) for slow in suite_plugin.SLOW)
