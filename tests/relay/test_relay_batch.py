"""AWS Batch workers, emulated, that reach a script through a relay."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click.testing
import pytest
from relay_helpers import PACKAGE

from cloudexec import Batch, BatchExecutor, ConfigError
from cloudexec.cli import _group
from cloudexec.testing import FakeAWS

pytestmark = pytest.mark.timeout(120)
IMAGE = f"registry.example/w@sha256:{'0' * 64}"


@pytest.fixture(scope="module")
def aws(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeAWS]:
    """An account with a set-up whose image is there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CLOUDEXEC_CONFIG_DIR", str(tmp_path_factory.mktemp("profiles")))
        with FakeAWS(grace=0.5, calls_per_second=1000, stack_seconds=0.1) as fake:
            for command in (["up", "--yes"], ["image", "use", IMAGE]):
                done = click.testing.CliRunner().invoke(_group, command)
                assert done.exit_code == 0, done.output
            yield fake


@pytest.fixture
def relay(aws: FakeAWS) -> Iterator[str]:
    """A relay that reads the stack's key, as a user starts it."""
    process = subprocess.Popen(
        [sys.executable, "-m", "cloudexec.cli", "relay", "--listen", "127.0.0.1:0"],
        env={**os.environ, "PYTHONPATH": PACKAGE},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout is not None
    try:
        found = re.search(r"listening on (\S+)", process.stdout.readline())
        assert found is not None
        yield found[1]
    finally:
        process.terminate()
        process.communicate(timeout=30)


def test_a_script_is_reached_through_the_relay_that_a_variable_names(
    aws: FakeAWS, relay: str, tmp_path: Path
) -> None:
    script = tmp_path / "sweep.py"
    script.write_text(
        "from cloudexec import BatchExecutor\n"
        "def square(x):\n"
        "    return x * x\n"
        "if __name__ == '__main__':\n"
        "    with BatchExecutor(max_workers=2, output='off') as executor:\n"
        "        print(sum(executor.map(square, range(500))))\n"
    )
    done = subprocess.run(
        [sys.executable, str(script)],
        env={
            **os.environ,
            "PYTHONPATH": PACKAGE,
            "CLOUDEXEC_PROFILE": "default",
            "CLOUDEXEC_RELAY": relay,
        },
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    assert done.stdout == f"{sum(x * x for x in range(500))}\n", done.stderr
    job = next(job for job in aws.jobs() if job.index is None)
    assert job.environment["CLOUDEXEC_RELAY"] == relay
    assert job.environment["CLOUDEXEC_TARGET"].endswith(".cloudexec.invalid:443")


def test_a_relay_of_ours_needs_the_key_of_a_stack(aws: FakeAWS) -> None:
    setup = aws.set_up()
    batch = Batch(
        queue=setup.queue,
        job_role=setup.job_role,
        execution_role=setup.execution_role,
        image="x",
        relay="relay.example:443",
    )
    with pytest.raises(
        ConfigError, match=r"relay='relay.example:443' needs the key .* give profile="
    ):
        BatchExecutor(1, launcher=batch).submit(abs, -1)


@pytest.mark.parametrize("given", ["", 5])
def test_what_is_no_relay_is_refused(given: object) -> None:
    with pytest.raises(ConfigError, match="relay must be a string that is not empty"):
        Batch(relay=given)  # type: ignore[arg-type]


def test_the_relay_says_where_it_cannot_listen(aws: FakeAWS) -> None:
    runner = click.testing.CliRunner()
    done = runner.invoke(_group, ["relay", "--listen", "192.0.2.1:443"], standalone_mode=False)
    assert done.return_value == 1
    assert "cannot listen on 192.0.2.1:443" in done.output
