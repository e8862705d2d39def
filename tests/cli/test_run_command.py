"""``cloudexec run`` and what it leaves, with real programs on a fake AWS."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from run_helpers import account

from cloudexec.testing import FakeAWS

pytestmark = pytest.mark.timeout(120)

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def aws(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[FakeAWS]:
    with account(tmp_path_factory.mktemp("profiles"), monkeypatch) as fake:
        yield fake


def test_a_script_runs_with_its_modules_and_its_files_come_back(
    aws: FakeAWS, run_here: Run, folder: Path
) -> None:
    (folder / "helper.py").write_text("import inner.deep\nWORD = inner.deep.WORD\n")
    (folder / "inner").mkdir()
    (folder / "inner" / "__init__.py").write_text("")
    (folder / "inner" / "deep.py").write_text("WORD = 'grüße'\n")
    (folder / "unrelated.py").write_text("raise SystemExit('not needed')\n")
    (folder / "job.py").write_text(
        "import pathlib, sys, helper\n"
        "print(helper.WORD, sys.argv[1:])\n"
        "print('to stderr', file=sys.stderr)\n"
        "pathlib.Path('out/deeper').mkdir(parents=True)\n"
        "pathlib.Path('out/deeper/a.txt').write_text('content')\n"
        "print(sorted(str(p) for p in pathlib.Path('.').rglob('*.py')))\n"
    )
    done = run_here("run", "job.py", "--epochs", "3", "--outputs", "out", "--log-file", "log.txt")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "grüße ['--epochs', '3']"
    assert "to stderr" in lines
    assert lines[-1] == "['helper.py', 'inner/__init__.py', 'inner/deep.py', 'job.py']"
    assert (folder / "out" / "deeper" / "a.txt").read_text() == "content"
    assert (folder / "log.txt").read_text() == done.stdout
    assert "succeeded with exit code 0" in done.stderr
