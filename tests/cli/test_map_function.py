"""Functions by name."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import cloudpickle
import pytest

from cloudexec.cli._errors import CommandError
from cloudexec.cli._function import load_function


@pytest.fixture(autouse=True)
def clean_imports(folder: Path) -> Iterator[None]:
    """Forget the modules and the path that a test brings in."""
    modules, path = set(sys.modules), list(sys.path)
    yield
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        del sys.modules[name]


def refusal(spec: str) -> str:
    with pytest.raises(CommandError) as caught:
        load_function(spec)
    return caught.value.message


def test_function_of_a_file_is_pickled_by_reference(folder: Path) -> None:
    """Workers import the file themselves, as they have the client's path."""
    Path("sub").mkdir()
    Path("sub/pricing.py").write_text("def quote(a): return a\n")
    target = load_function("sub/pricing.py:quote")
    assert target.function(3) == 3
    assert b"pricing" in cloudpickle.dumps(target.function)
    assert sys.path[0] == str(folder / "sub")


def test_file_named_like_another_module_travels_by_value() -> None:
    """A file that shadows a module of the standard library does not replace it."""
    import statistics

    Path("statistics.py").write_text("def mean(a): return 'mine'\n")
    target = load_function("statistics.py:mean")
    assert target.function(1) == "mine"
    assert sys.modules["statistics"] is statistics
    assert cloudpickle.loads(cloudpickle.dumps(target.function))(1) == "mine"


def test_function_of_a_module_in_the_current_folder_is_found() -> None:
    """The current folder is searched, as with ``python -m``."""
    Path("shop").mkdir()
    Path("shop/__init__.py").touch()
    Path("shop/tills.py").write_text(
        "class Till:\n    @staticmethod\n    def add(a): return a + 1\n"
    )
    assert load_function("shop.tills:Till.add").function(1) == 2


def test_identity_depends_on_the_output_folder_and_not_on_the_current_one(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same file has the same identity, wherever the command is run."""
    Path("src").mkdir()
    Path("out").mkdir()
    Path("src/billing.py").write_text("def f(): pass\n")
    first = load_function("src/billing.py:f").identity(folder / "out")
    monkeypatch.chdir(folder / "src")
    assert (
        load_function("./billing.py:f").identity(folder / "out") == first == "../src/billing.py:f"
    )


def test_what_an_import_prints_stays_off_standard_output(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Standard output may carry results."""
    Path("chatty.py").write_text("print('hello')\ndef f(): pass\n")
    load_function("chatty.py:f")
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "hello\n")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            "jobs.score",
            "FUNCTION 'jobs.score' names no function: "
            "write package.module:name or path/to/file.py:name",
        ),
        ("nosuch.py:f", "there is no file nosuch.py"),
        ("./ledger:pay", "./ledger is not a Python file; did you mean ./ledger.py:pay?"),
        ("ledger.py:pai", "ledger.py has no function 'pai'; did you mean 'pay'?"),
        ("ledger:rate", "ledger:rate is not a function but a float"),
        (
            "ledger.py:later",
            "ledger.py:later is an async function: wrap it in a plain one that calls asyncio.run()",
        ),
        (
            "ledger.py:each",
            "ledger.py:each is a generator, whose items stay in the worker: return a list instead",
        ),
        (
            "nosuch.deep:f",
            "there is no module 'nosuch' in the current folder or among the installed packages; "
            "write package.module:name or path/to/file.py:name",
        ),
        ("needy.py:f", "importing needy.py failed: No module named 'absent_dependency'"),
        (
            "broken.py:f",
            "importing broken.py failed: SyntaxError: invalid syntax (broken.py, line 1)",
        ),
        ("exits.py:f", "importing exits.py failed: SystemExit: 3 (FOLDER/exits.py, line 2)"),
    ],
)
def test_function_that_cannot_be_had_is_named(folder: Path, spec: str, message: str) -> None:
    """One line says what is wrong and what was meant."""
    Path("ledger.py").write_text(
        "def pay(): pass\nasync def later(): pass\ndef each(): yield 1\nrate = 0.5\n"
    )
    Path("needy.py").write_text("import absent_dependency\n")
    Path("broken.py").write_text("def f(:\n")
    Path("exits.py").write_text("import sys\nsys.exit(3)\n")
    assert refusal(spec) == message.replace("FOLDER", str(folder))


def test_file_of_a_package_is_to_be_named_by_its_module(folder: Path) -> None:
    """A relative import cannot work in a lone file: the message says how to name it."""
    Path("parcel").mkdir()
    Path("parcel/__init__.py").touch()
    Path("parcel/post.py").write_text("from . import stamps\n")
    assert refusal("parcel/post.py:send").endswith(
        "it belongs to a package, so write parcel.post:NAME from the folder above"
    )


def test_function_that_cannot_be_sent_is_named_before_any_worker_starts() -> None:
    """What cannot be pickled is refused at once."""
    Path("stuck.py").write_text(
        "import threading\n"
        "class Call:\n"
        "    def __init__(self): self.lock = threading.Lock()\n"
        "    def __call__(self): pass\n"
        "call = Call()\n"
    )
    assert refusal("stuck.py:call") == (
        "stuck.py:call cannot be sent to a worker: .lock in the callable (stuck.Call) "
        "cannot be sent (_thread.lock): it belongs to this process: make it in the call, or use "
        "one of a multiprocessing.Manager()"
    )


def test_a_script_that_starts_an_executor_when_it_is_imported_is_refused() -> None:
    """Its tasks' workers would start executors in their turn."""
    Path("sweep.py").write_text(
        "from cloudexec import BatchExecutor\n"
        "def f(a): return a\n"
        "print(list(BatchExecutor(1).map(f, range(3))))\n"
    )
    said = refusal("sweep.py:f")
    assert 'start the executor under `if __name__ == "__main__":`' in said
    assert "sweep.py" in said


def test_a_script_that_makes_an_executor_and_leaves_it_alone_is_taken() -> None:
    Path("sweep.py").write_text(
        "from cloudexec import BatchExecutor\nexecutor = BatchExecutor(1)\ndef f(a): return a\n"
    )
    assert load_function("sweep.py:f").function(3) == 3
