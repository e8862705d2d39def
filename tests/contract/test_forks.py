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
