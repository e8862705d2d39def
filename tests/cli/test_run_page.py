"""Pages whose commands need an account of AWS: they do what the pages show, in an emulated one."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from run_helpers import account, left_nothing
from test_docs import DOCS, blocks

from cloudexec.testing import FakeAWS

pytestmark = pytest.mark.timeout(300)


def expression(shown: str) -> re.Pattern[str]:
    """Return what fits the text of a page: ``...`` stands for any text, or for any lines."""
    lines = []
    for line in shown.splitlines():
        words = r"[ ]+".join(map(re.escape, line.split()))
        lines.append("(?:.*\n)*?" if line == "..." else words.replace(r"\.\.\.", ".*?") + "\n")
    return re.compile("".join(lines))


PAGES = {
    "run.md": 8,
    "from-awsjobs.md": 3,
    "from-cloudburst.md": 1,
    "from-crew.md": 3,
    "from-dolambda.md": 1,
}
"""Pages whose blocks of ``console`` are run, with the number of their commands. The first one lists
all runs of the account."""


@pytest.fixture(scope="module")
def aws(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeAWS]:
    """An account that was set up."""
    with (
        pytest.MonkeyPatch.context() as patch,
        account(
            tmp_path_factory.mktemp("profiles"), patch, fargate=True, functions=True, grace=1.0
        ) as fake,
    ):
        yield fake


@pytest.mark.parametrize("page", PAGES)
def test_the_commands_of_a_page_print_what_it_shows(
    aws: FakeAWS,
    folder: Path,
    environment: dict[str, str],
    run_here: Callable[..., subprocess.CompletedProcess[str]],
    page: str,
) -> None:
    # Those that the account has set in this process hold, too. As in a terminal, lines appear in
    # the order in which they are printed.
    more = {"COLUMNS": environment["COLUMNS"], "PYTHONUNBUFFERED": "1"}
    environment |= {**os.environ, **more}

    def run(command: str) -> subprocess.CompletedProcess[str]:
        name, *words = shlex.split(command)
        if name == "cloudexec":
            return run_here(*words, together=True)
        assert name == "python"
        return subprocess.run(
            [sys.executable, *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=200,
            cwd=folder,
            env={**os.environ, **more},
            check=False,
        )

    ran = 0
    for block, line in blocks(DOCS / "how-to" / page):
        text = block["text"]
        if block["mark"] == "file":
            (folder / block["file"]).write_text(text)
        if block["kind"] != "console":
            continue
        printed = ""
        for command in (each[2:] for each in text.splitlines() if each.startswith("$ ")):
            done = run(command)
            printed += done.stdout
            assert done.returncode == 0, f"{page}:{line}: {printed}"
            ran += 1
        shown = "".join(each for each in text.splitlines(True) if not each.startswith("$ "))
        assert expression(shown).fullmatch(printed), f"{page}:{line} prints\n{printed}"
    assert ran == PAGES[page]
    if page == "run.md":
        assert (folder / "elsewhere" / "results" / "losses.json").read_text() == "[1.0, 0.5]"
        assert (folder / "train.log").read_text().startswith("step 0: 1.000\n")
    left_nothing(aws, within=30.0)
