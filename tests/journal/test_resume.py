"""Programs that are run again: what was finished is not run twice, and what changed is."""

from __future__ import annotations

import logging
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from journal_tasks import (
    Model,
    calls,
    draw,
    fails_once,
    gated,
    large,
    square,
    talks,
    total,
    words,
)

import cloudexec
from cloudexec import BatchExecutor, ConfigError, Graph, stage

Program = Callable[..., "subprocess.Popen[str]"]
Open = Callable[..., BatchExecutor]

KILLED = """
import sys
from cloudexec import BatchExecutor
from journal_tasks import gated

journal, calls, free = sys.argv[1:]
if __name__ == "__main__":
    with BatchExecutor(2, journal=journal) as executor:
        futures = [executor.submit(gated, calls, x, int(free)) for x in range(30)]
        for future in futures:
            print(future.result(), flush=True)
        print(executor.stats().tasks.resumed)
"""


@pytest.mark.timeout(60)
@pytest.mark.parametrize("seen", [1, 20])
def test_killed_program_runs_nothing_twice_that_it_had_the_result_of(
    program: Program, tmp_path: Path, ran: str, seen: int
) -> None:
    """After SIGKILL, at several points, the same program runs the rest and nothing else."""
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    first = program(script, tmp_path / "journal", ran, seen)
    assert first.stdout is not None
    assert [int(first.stdout.readline()) for _ in range(seen)] == [x * x for x in range(seen)]
    first.kill()
    first.wait()
    (tmp_path / "open").touch()
    before = calls(ran)
    second = program(script, tmp_path / "journal", ran, seen)
    out, err = second.communicate(timeout=30)
    assert second.returncode == 0, err
    *results, resumed = map(int, out.split())
    assert results == [x * x for x in range(30)]
    assert resumed == seen
    # Workers may begin what was sent ahead before they notice that their client is gone.
    assert {str(x): calls(ran)[str(x)] for x in range(seen)} == {str(x): 1 for x in range(seen)}
    assert before.keys() <= calls(ran).keys()


SCRIPT = """
import sys
from cloudexec import BatchExecutor
from journal_tasks import count

FACTOR = {factor}

def helper(x):
    return x * FACTOR

def work(directory, x, tags=frozenset({{"a", "b", "c"}})):
    count(directory, x)
    return helper(x) + len(tags & {{"b", "c", "d"}})

if __name__ == "__main__":
    import logging
    logging.basicConfig()
    with BatchExecutor(1, journal=sys.argv[1]) as executor:
        print(list(executor.map(work, [sys.argv[2]] * 4, range(4))), executor.stats().tasks.resumed)
"""


@pytest.mark.timeout(60)
def test_function_of_a_script_is_the_same_in_every_process_until_it_changes(
    program: Program, tmp_path: Path, ran: str
) -> None:
    """Neither hash seeds nor other lines make a difference; what the function does, does."""
    script = tmp_path / "script.py"

    def run(text: str, seed: str) -> tuple[str, str]:
        script.write_text(text)
        process = program(script, tmp_path / "journal", ran, PYTHONHASHSEED=seed)
        out, err = process.communicate(timeout=30)
        assert process.returncode == 0, err
        return out.strip(), err

    text = SCRIPT.format(factor=2)
    assert run(text, "1") == ("[2, 4, 6, 8] 0", "")
    assert run(f"# a comment\n\n{text}", "2") == ("[2, 4, 6, 8] 4", "")
    out, err = run(SCRIPT.format(factor=3), "3")
    assert out == "[2, 5, 8, 11] 0"
    said = "script.py has changed since 4 results were recorded; these are run again"
    assert err.count(said) == 1
    assert calls(ran) == {str(x): 2 for x in range(4)}
    assert run(text, "4")[0] == "[2, 4, 6, 8] 4"  # those of that version are still there


MODULE = """
import functools
from journal_tasks import count

CACHE = {{}}

def helper(x):
    return x {operator} 10

def traced(fn):
    @functools.wraps(fn)
    def wrapper(*args):
        CACHE[args] = 1
        return fn(*args)
    return wrapper

@traced
def work(directory, x):
    count(directory, x)
    return helper(x)
"""


@pytest.mark.timeout(60)
def test_function_of_a_module_is_known_by_its_code_and_what_that_calls(
    program: Program, tmp_path: Path, ran: str
) -> None:
    """It travels by its name alone, yet a change far below it is noticed."""
    (tmp_path / "script.py").write_text(
        "import sys, own\n"
        "from cloudexec import BatchExecutor\n"
        "if __name__ == '__main__':\n"
        "    with BatchExecutor(1, journal=sys.argv[1]) as executor:\n"
        "        futures = [executor.submit(own.work, sys.argv[2], x) for x in range(3)]\n"
        "        print([each.result() for each in futures], executor.stats().tasks.resumed)\n"
    )

    def run(operator: str) -> str:
        (tmp_path / "own.py").write_text(MODULE.format(operator=operator))
        process = program(
            tmp_path / "script.py", tmp_path / "journal", ran, PYTHONDONTWRITEBYTECODE="1"
        )
        out, err = process.communicate(timeout=30)
        assert process.returncode == 0, err
        return out.strip()

    assert run("+") == "[10, 11, 12] 0"
    assert run("+") == "[10, 11, 12] 3"
    assert run("*") == "[0, 10, 20] 0"


def test_equal_calls_keep_their_own_results(executor: Open, ran: str) -> None:
    """The n-th of equal calls gets what the n-th got, and those of another run are new ones."""
    with executor() as first:
        drawn = [first.submit(draw, ran).result() for _ in range(3)]
    with executor() as second:
        futures = [second.submit(draw, ran) for _ in range(4)]
        assert all(each.done() for each in futures[:3])
        again = [each.result() for each in futures]
        assert (futures[0].attempts, futures[0].worker_id) == (0, None)
        assert futures[0].run_time is not None
    assert again[:3] == drawn
    assert len(set(again)) == 4
    assert calls(ran) == {"draw": 4}


def test_arguments_are_told_apart_by_content(executor: Open, ran: str) -> None:
    """Sets in whatever order, keywords in whatever order, large ones by their bytes."""
    content = bytes(range(256)) * 4000
    for resumed in (0, 4):
        with executor() as each:
            assert each.submit(words, ran, {"x", "y", "z"}, factor=2).result() == 6
            assert each.submit(words, factor=3, words={"x"}, directory=ran).result() == 3
            assert each.submit(total, ran, bytearray(content)).result() == len(content)
            assert each.submit(total, ran, [content, {"k": {1, 2}}]).result() == 2
            assert each.stats().tasks.resumed == resumed
            changed = content[:-1] + b"?"
            assert each.submit(total, ran, [changed, {"k": {1, 2}}]).result() == 2
            assert each.stats().tasks.resumed == resumed + bool(resumed)
    assert calls(ran) == {"words": 2, "total": 3}


def test_array_in_many_calls_is_one_argument(executor: Open, ran: str) -> None:
    """NumPy arrays count by content, type and shape."""
    numpy = pytest.importorskip("numpy")
    array = numpy.arange(100_000)
    for resumed in (0, 3):
        with executor() as each:
            calls_of = [each.submit(total, ran, a) for a in (array, array.copy(), array[::2])]
            assert [call.result() for call in calls_of] == [100_000, 100_000, 50_000]
            assert each.stats().tasks.resumed == resumed
    assert calls(ran) == {"total": 3}


def test_own_keys_take_the_place_of_arguments(executor: Open, ran: str) -> None:
    """A string, or what a function makes of the arguments; the state of an object counts not."""

    def by_number(x: int) -> int:
        return x % 3

    with executor() as first:
        view = first.with_options(key="one")
        assert view.submit(square, ran, 5).result() == 25
        model = Model(ran, 10)
        view = first.with_options(key=by_number)
        assert list(view.map(model.predict, range(3))) == [0, 10, 20]
    with executor() as second:
        assert second.with_options(key="one").submit(square, ran, 6).result() == 25
        assert second.with_options(key="two").submit(square, ran, 6).result() == 36
        view = second.with_options(key=by_number)
        assert list(view.map(Model(ran, 77).predict, range(3, 6))) == [0, 10, 20]
        assert list(view.map(Model(ran, 77).predict, range(1), chunksize=2)) == [0]
        assert list(second.map(Model(ran, 77).predict, range(2))) == [0, 77]
        with pytest.raises(ConfigError, match="it must return a str, an int or bytes"):
            second.with_options(key=lambda *args: 1.5).submit(square, ran, 1).result()
    with pytest.raises(ConfigError, match="key must be a string"):
        second.with_options(key=3)  # type: ignore[arg-type]


def test_large_results_come_back_as_they_were(executor: Open, ran: str, tmp_path: Path) -> None:
    """Arrays and large pickles, in the file and beside it, as results and as arguments."""
    numpy = pytest.importorskip("numpy")
    made = []
    for _ in range(2):
        with executor() as each:
            futures = [each.submit(large, ran, size) for size in (100_000, 5_000_000)]
            futures.append(each.submit(numpy.arange, 500_000))
            made.append([bytes(future.result()) for future in futures])
            sizes = [each.submit(total, ran, future) for future in futures]
            again = [each.submit(len, future) for future in futures]
            assert [size.result() for size in sizes + again] == 2 * [
                99_984 + 16,
                5_000_000,
                500_000,
            ]
            array = futures[2].result()
            array[0] = 1  # it can be written to
            assert array.dtype == numpy.arange(1).dtype
    assert made[0] == made[1]
    assert calls(ran) == {"100000": 1, "5000000": 1, "total": 3}
    files = list((tmp_path / "journal.blobs").iterdir())
    assert len(files) == 2
    for path in (tmp_path / "journal", *files):
        assert path.stat().st_mode & 0o077 == 0
    assert (tmp_path / "journal.blobs").stat().st_mode & 0o077 == 0


def test_stored_result_is_an_argument_of_a_new_call(executor: Open, ran: str) -> None:
    """What nobody here has unpickled goes from the journal to the worker."""
    with executor() as first:
        first.submit(large, ran, 3_000_000).result()
    with executor() as second:
        assert second.submit(total, ran, second.submit(large, ran, 3_000_000)).result() == 3_000_000
        assert second.stats().tasks.resumed == 1
    assert calls(ran) == {"3000000": 1, "total": 1}


def test_calls_that_depend_on_others_are_resumed(executor: Open, ran: str) -> None:
    """A future among the arguments stands for its call, whatever it brings."""
    for resumed in (0, 3):
        with executor() as each:
            first = each.submit(draw, ran)
            second = each.submit(total, ran, [first, first])
            third = each.submit(square, ran, second)
            assert third.result() == 4
            assert each.stats().tasks.resumed == resumed
    assert calls(ran) == {"draw": 1, "total": 1, "2": 1}


def test_graph_goes_on_where_it_was(executor: Open, ran: str) -> None:
    """Nodes that an earlier run had finished are not run, and the report says so."""

    @stage
    def load(x: int) -> int:
        return square(ran, x)

    @stage
    def merge(values: list[int]) -> int:
        if not calls(ran).get("well"):
            raise ValueError("not yet")
        return sum(values)

    with executor() as first, pytest.raises(cloudexec.StageError):
        Graph(merge([load(x) for x in range(5)])).run(first)
    Path(ran, "well.1").touch()
    with executor() as second:
        graph = Graph(merge([load(x) for x in range(6)]))
        assert graph.run(second) == 55
        assert [(each.stage, each.tasks, each.resumed) for each in graph.report] == [
            ("load", 1, 5),
            ("merge", 1, 0),
        ]
    assert calls(ran) == {**{str(x): 1 for x in range(6)}, "well": 1}


def test_call_that_failed_is_run_again_in_its_place(executor: Open, ran: str) -> None:
    """Exceptions are not recorded; whoever tries again takes the place of the call that failed."""
    with executor() as first:
        with pytest.raises(ValueError, match="the first time"):
            first.submit(fails_once, ran).result()
        assert first.submit(fails_once, ran).result() == "well"
    with executor() as second:
        assert second.submit(fails_once, ran).result() == "well"
    assert calls(ran) == {"fails": 2}


def test_what_stays_on_workers_is_not_recorded(executor: Open, ran: str) -> None:
    """A kept result is made again; calls that take it are resumed all the same."""
    for _ in range(2):
        with executor() as each:
            kept = each.with_options(keep=True).submit(square, ran, 3)
            assert each.submit(total, ran, [kept]).result() == 1
            ref = each.put({"a": 1})
            assert each.submit(words, ran, {"a"}).result() == 1
            assert each.submit(len, ref).result() == 1
            kept.result()
    assert calls(ran) == {"3": 2, "total": 1, "words": 1}


def test_start_says_what_there_is(
    executor: Open, ran: str, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    """One line, with the number of results."""
    with executor() as first:
        list(first.map(square, [ran] * 3, range(3)))
    with caplog.at_level(logging.INFO, "cloudexec"), executor():
        pass
    assert f"journal {tmp_path / 'journal'}: 3 results of earlier runs" in caplog.messages


def test_result_that_waits_for_output_is_recorded(executor: Open, ran: str) -> None:
    """What a call printed is shown before it counts as done, and the journal waits for both."""
    for resumed in (0, 1):
        with executor(output="logging") as each:
            future = each.submit(talks, ran)
        assert future.result() == "done"
        assert each.stats().tasks.resumed == resumed
        assert "journal" in str(each.explain(future)) or not resumed
    assert calls(ran) == {"talks": 1}


def test_journal_does_not_hold_up_the_rest(executor: Open, ran: str, tmp_path: Path) -> None:
    """Results are there while others still run, callbacks run, and shutting down ends it all."""
    with executor(max_workers=2) as each:
        blocked = each.submit(gated, ran, 1, 0)
        called: list[int] = []
        done = each.submit(square, ran, 7)
        done.add_done_callback(lambda future: called.append(future.result()))
        assert done.result(timeout=20) == 49
        (tmp_path / "open").touch()
        assert blocked.result() == 1
    assert called == [49]
