"""The page on `cloudexec run`: its commands do what it shows, in an emulated account."""

from __future__ import annotations

import os
import re
import subprocess
import sys
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
    folder: Path, environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    with (
        pytest.MonkeyPatch.context() as patch,
        account(tmp_path_factory.mktemp("profiles"), patch),
    ):
        path = os.pathsep.join((os.path.dirname(sys.executable), os.environ["PATH"]))
        wide = {"COLUMNS": environment["COLUMNS"], "PYTHONPATH": environment["PYTHONPATH"]}
        settings = {**os.environ, **wide, "PATH": path}
        ran = 0
        for block, line in blocks(DOCS / "how-to" / "run.md"):
            text = block["text"]
            if block["mark"] == "file":
                (folder / block["file"]).write_text(text)
            if block["kind"] != "console":
                continue
            commands = [each[2:] for each in text.splitlines() if each.startswith("$ ")]
            shown = "".join(each for each in text.splitlines(True) if not each.startswith("$ "))
            done = subprocess.run(
                ["bash", "-e"],
                input="\n".join(commands),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=200,
                cwd=folder,
                env=settings,
                check=False,
            )
            assert done.returncode == 0, f"run.md:{line}: {done.stdout}"
            assert expression(shown).fullmatch(done.stdout), f"run.md:{line} prints\n{done.stdout}"
            ran += len(commands)
        assert ran == 8
    assert (folder / "elsewhere" / "results" / "losses.json").read_text() == "[1.0, 0.5]"
    assert (folder / "train.log").read_text().startswith("step 0: 1.000\n")
