"""Forked children of a program that uses executors: those that leave these alone live."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")

_STORM = Path(__file__).with_name("fork_storm.py")


@pytest.mark.parametrize("first", [(), ("grpc",)], ids=["plain", "grpc imported first"])
def test_children_forked_beside_executors_live(first: tuple[str, ...]) -> None:
    """Also on a busy machine, and where gRPC was imported with its fork handlers switched on."""
    environ = {k: v for k, v in os.environ.items() if k != "GRPC_ENABLE_FORK_SUPPORT"}
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2)]
    try:
        done = subprocess.run(
            [sys.executable, str(_STORM), "3", "12", *first],
            env=environ,
            capture_output=True,
            text=True,
            timeout=50,
        )
    finally:
        for each in busy:
            each.kill()
            each.wait()
    assert done.stdout == "{'ok': 15}\n", done.stderr
    assert done.returncode == 0


def test_the_pytest_plugin_does_not_import_grpc() -> None:
    """It is loaded in every run, of whatever tests: gRPC would be there with its usual settings."""
    code = "import sys, cloudexec.testing.pytest_plugin; print('grpc' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_a_process_that_was_spawned_runs_functions_of_the_script(
    method: str, tmp_path: Path
) -> None:
    """There the script is another module than ``__main__``, which workers do not have."""
    script = tmp_path / "script.py"
    script.write_text(
        "import multiprocessing, sys\n"
        "from cloudexec import BatchExecutor\n"
        "OFFSET = 1\n"
        "class Model:\n    def predict(self, x):\n        return square(x)\n"
        "def square(x):\n    return x * x + OFFSET\n"
        "def child(queue):\n"
        "    with BatchExecutor(1) as executor:\n"
        "        futures = [executor.submit(square, 2), executor.submit(Model().predict, 3),\n"
        "                   executor.submit(lambda: square(4))]\n"
        "        queue.put([repr(f.exception(50) or f.result()) for f in futures])\n"
        "if __name__ == '__main__':\n"
        "    context = multiprocessing.get_context(sys.argv[1])\n"
        "    queue = context.Queue()\n"
        "    process = context.Process(target=child, args=(queue,))\n"
        "    process.start()\n"
        "    print(queue.get(timeout=50))\n"
        "    process.join()\n"
    )
    done = subprocess.run(
        [sys.executable, str(script), method], capture_output=True, text=True, timeout=55
    )
    assert done.stdout == "['5', '10', '17']\n", done.stderr


_FORKING = """
import atexit, logging, os, sys
from cloudexec import BatchExecutor

def forked(what):
    child = os.fork()
    if child == 0:
        if what == "code":
            sys.exit(7)
        if what == "text":
            sys.exit("so long")
        if what == "error":
            raise KeyError("gone")
        sys.stdout.write("a child\\n")  # not flushed
        return
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os.write(1, b"exit code %d\\n" % code)

def callback(future):
    forked(sys.argv[2])

def retry_on(exc):
    forked(sys.argv[2])

class Value:
    def __reduce__(self):
        forked(sys.argv[2])
        return int, ()

class Handler(logging.Handler):
    def emit(self, record):
        forked(sys.argv[2])

def fail():
    raise ValueError

if __name__ == "__main__":
    atexit.register(os.write, 1, b"at exit\\n")
    with BatchExecutor(1) as executor:
        if sys.argv[1] == "callback":
            future = executor.submit(int)
            future.add_done_callback(callback)
            future.add_done_callback(lambda future: os.write(1, b"the next callback\\n"))
        elif sys.argv[1] == "retry_on":
            executor.with_options(retry_on=retry_on).submit(fail).exception()
        elif sys.argv[1] == "value":
            from concurrent.futures import Future
            value = Future()
            future = executor.submit(abs, value)
            value.set_result(Value())
            future.result()
        elif sys.argv[1] == "task":
            executor.submit(forked, sys.argv[2]).result()
        elif sys.argv[1] == "handler":
            logging.getLogger("cloudexec").addHandler(Handler(logging.DEBUG))
            logging.getLogger("cloudexec").setLevel(logging.DEBUG)
            executor.submit(os._exit, 1).exception()
"""


@pytest.mark.parametrize(
    ("where", "what", "code"),
    [
        ("callback", "return", 0),
        ("callback", "code", 7),
        ("callback", "text", 1),
        ("callback", "error", 1),
        ("retry_on", "code", 7),
        ("value", "return", 0),
        ("task", "code", 7),
        ("handler", "return", 1),  # logging itself raises there: it has lost its own lock
    ],
)
def test_a_child_that_code_run_by_the_executor_forks_ends_with_that_code(
    where: str, what: str, code: int, tmp_path: Path
) -> None:
    """Nothing of the executor goes on in it, and it ends as it asks, with what it has written."""
    script = tmp_path / "script.py"
    script.write_text(_FORKING)
    command = [sys.executable, "-W", "ignore", str(script), where, what]
    done = subprocess.run(command, capture_output=True, text=True, timeout=50)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert f"exit code {code}" in lines, done.stderr
    assert lines.count("a child") == (what == "return") * lines.count(f"exit code {code}")
    assert lines.count("the next callback") == (where == "callback")
    # The child's own end is that of a program where it asks for that.
    in_child = where != "task" and what in ("code", "text")
    assert lines.count("at exit") == 1 + in_child * lines.count(f"exit code {code}")
    assert ("so long" in done.stderr) == (what == "text")
    assert ("KeyError: 'gone'" in done.stderr) == (what == "error")
