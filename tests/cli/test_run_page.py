"""The page on `cloudexec run`: its commands do what it shows, in an emulated account."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from run_helpers import account
from test_docs import DOCS, blocks

pytestmark = pytest.mark.timeout(300)


def expression(shown: str) -> re.Pattern[str]:
    """Return what fits the text of a page: ``...`` stands for any text, or for any lines."""
    lines = []
    for line in shown.splitlines():
        words = r"[ ]+".join(map(re.escape, line.split()))
        lines.append("(?:.*\n)*?" if line == "..." else words.replace(r"\.\.\.", ".*?") + "\n")
    return re.compile("".join(lines))


def test_the_commands_of_the_page_print_what_it_shows(
    folder: Path,
    run_here: Callable[..., subprocess.CompletedProcess[str]],
    tmp_path_factory: pytest.TempPathFactory,
    environment: dict[str, str],
) -> None:
    with (
        pytest.MonkeyPatch.context() as patch,
        account(tmp_path_factory.mktemp("profiles"), patch),
    ):
        environment |= {**os.environ, "COLUMNS": environment["COLUMNS"]}
        ran = 0
        for block, line in blocks(DOCS / "how-to" / "run.md"):
            text = block["text"]
            if block["mark"] == "file":
                (folder / block["file"]).write_text(text)
            if block["kind"] != "console":
                continue
            printed = ""
            for command in (each[2:] for each in text.splitlines() if each.startswith("$ ")):
                name, *words = shlex.split(command)
                assert name == "cloudexec"
                done = run_here(*words, together=True)
                printed += done.stdout
                assert done.returncode == 0, f"run.md:{line}: {printed}"
                ran += 1
            shown = "".join(each for each in text.splitlines(True) if not each.startswith("$ "))
            assert expression(shown).fullmatch(printed), f"run.md:{line} prints\n{printed}"
        assert ran == 8
    assert (folder / "elsewhere" / "results" / "losses.json").read_text() == "[1.0, 0.5]"
    assert (folder / "train.log").read_text().startswith("step 0: 1.000\n")
