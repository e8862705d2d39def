"""The README and the pages of docs/: their code runs, and their links lead somewhere.

An HTML comment in the line above a block of code says what is done with it:

``<!-- file: NAME -->``  The block is written to that file, for later blocks of the same page.
``<!-- continued -->``   The Python block goes on with the one before it: both are one program.
``<!-- compiled -->``    The Python block is compiled, and its names and parameters are looked up.
``<!-- run -->``         The lines of a ``console`` block that begin with ``$`` are run in a shell.
``<!-- laptop -->``      ``tests/images/test_from_anywhere.py`` runs the lines that begin with ``$``
                         on a laptop behind NAT, and compares what they print.
``<!-- output -->``      The text is what the program before it prints; ``...`` stands for any text.

Every other Python block is run as a program of its own, in a folder that the page's blocks share.
"""

from __future__ import annotations

import ast
import doctest
import inspect
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

import cloudexec
from cloudexec.testing import FakeAWS

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted(DOCS.rglob("*.md"))]
_FENCE = re.compile(
    r"(?:^<!-- (?P<mark>[a-z]+)(?:: (?P<file>\S+))? -->\n)?^```(?P<kind>\w*)\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
_MARKS = {None, "file", "continued", "compiled", "run", "laptop", "output"}
_CHECKED: dict[str, Callable[..., Any]] = {
    "Batch": cloudexec.Batch,
    "BatchExecutor": cloudexec.BatchExecutor,
    "FakeAWS": FakeAWS,
    "Fallback": cloudexec.Fallback,
    "EC2": cloudexec.EC2,
    "Fargate": cloudexec.Fargate,
    "Lambda": cloudexec.Lambda,
    "Local": cloudexec.Local,
    "ObjectOptions": cloudexec.ObjectOptions,
    "stage": cloudexec.stage,
    "with_options": cloudexec.BatchExecutor.with_options,
}
"""Callables whose keywords are looked up wherever a page gives some."""


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


@dataclass
class Program:
    """Blocks of a page that run as one program, and what they print."""

    code: str
    line: int
    output: str | None = None
    is_shell: bool = False
    files: dict[str, str] = field(default_factory=dict)


def blocks(page: Path) -> Iterator[tuple[re.Match[str], int]]:
    text = page.read_text()
    for block in _FENCE.finditer(text):
        assert block["mark"] in _MARKS, f"{name_of(page)}: unknown mark {block['mark']!r}"
        yield block, text.count("\n", 0, block.start("text")) + 1


def programs(page: Path) -> list[Program]:
    """Return what is to be run of a page, in its order."""
    found: list[Program] = []
    files: dict[str, str] = {}
    for block, line in blocks(page):
        mark, kind, text = block["mark"], block["kind"], block["text"]
        if mark == "file":
            files[block["file"]] = text
        elif mark == "output":
            assert found, f"{name_of(page)}:{line}: nothing was run that could print this"
            found[-1].output = (found[-1].output or "") + text
        elif mark == "run":
            assert kind == "console", f"{name_of(page)}:{line}"
            commands = [each[2:] for each in text.splitlines() if each.startswith("$ ")]
            shown = [each for each in text.splitlines(True) if not each.startswith("$ ")]
            program = Program("\n".join(commands), line, "".join(shown), is_shell=True)
            found.append(program)
            program.files, files = files, {}
        elif kind == "python" and mark == "continued":
            found[-1].code += text
        elif kind == "python" and mark is None:
            # Line numbers of tracebacks are those of the page.
            found.append(Program("\n" * (line - 1) + text, line))
            found[-1].files, files = files, {}
    return found


@pytest.mark.parametrize("page", [page for page in PAGES if programs(page)], ids=name_of)
def test_the_code_of_a_page_runs_and_prints_what_the_page_shows(page: Path, tmp_path: Path) -> None:
    path = os.pathsep.join((os.path.dirname(sys.executable), os.environ["PATH"]))
    env = {**os.environ, "PYTHONWARNINGS": "error", "PATH": path}
    for program in programs(page):
        for name, text in program.files.items():
            (tmp_path / name).write_text(text)
        where = f"{name_of(page)}:{program.line}"
        command = ["bash", "-e"] if program.is_shell else [sys.executable, "example.py"]
        if not program.is_shell:
            (tmp_path / "example.py").write_text(program.code)
        done = subprocess.run(
            command,
            input=program.code if program.is_shell else None,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT if program.is_shell else subprocess.PIPE,
            text=True,
            timeout=60,
            cwd=tmp_path,
            env=env,
            check=False,
        )
        assert (done.returncode, done.stderr or "") == (0, ""), f"{where}: {done.stdout}"
        if program.output is not None:
            same = doctest.OutputChecker().check_output(
                program.output, done.stdout, doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
            )
            assert same, f"{where} prints\n{done.stdout}"


def keywords(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """Yield callables of ours, each with a keyword that it is called with."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called = node.func
            name = called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", "")
            for keyword in node.keywords:
                if name in _CHECKED and keyword.arg:
                    yield name, keyword.arg


def test_python_blocks_use_names_and_parameters_that_exist() -> None:
    """Those that are not run, too, such as the ones that need an account of AWS."""
    seen = 0
    for page in PAGES:
        for block, line in blocks(page):
            if block["kind"] != "python":
                continue
            seen += 1
            where = f"{name_of(page)}:{line}"
            tree = ast.parse(block["text"], where)
            for node in ast.walk(tree):
                if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("cloudexec"):
                    exec(compile(ast.Module([node], []), where, "exec"), {})
            for name, keyword in keywords(tree):
                accepted = inspect.signature(_CHECKED[name]).parameters
                assert keyword in accepted, f"{where}: {name}() takes no {keyword}="
    assert seen > 20


def slug(heading: str) -> str:
    """Return the anchor of a heading, as GitHub and MkDocs make it."""
    return re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", heading.strip().lower()))


def anchors(page: Path) -> set[str]:
    text = _FENCE.sub("", page.read_text())
    return {slug(each) for each in re.findall(r"^#+ (.*)$", text, re.MULTILINE)}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_of_a_page_lead_to_files_and_headings_that_exist(page: Path) -> None:
    text = _FENCE.sub("", page.read_text())
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{link}: no such file"
        if anchor:
            assert anchor in anchors(target), f"{link}: no such heading"


def texts() -> Iterator[str]:
    """Yield the strings of the package's source, f-strings without what they are filled with."""
    for path in Path(cloudexec.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                yield "\0".join(
                    str(each.value) for each in node.values if isinstance(each, ast.Constant)
                )
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def test_messages_that_the_page_on_troubleshooting_explains_exist() -> None:
    """Users look for the words that they see: a message that changes takes its entry along."""
    page = (DOCS / "troubleshooting.md").read_text()
    headings = [each.split("`")[1] for each in re.findall(r"^### (`.*)$", page, re.MULTILINE)]
    parts = {part.strip() for heading in headings for part in heading.split("…")} - {""}
    known = {"cannot schedule new futures after shutdown", "BudgetExceededError", "RuntimeError"}
    everything = "\0".join(texts())
    assert not [part for part in parts - known if part not in everything]
    assert len(parts) > 40


def test_every_page_is_in_the_index() -> None:
    """Who reads the files instead of the site finds each page from the first one."""
    index = (DOCS / "index.md").read_text()
    missing = [
        str(page.relative_to(DOCS))
        for page in DOCS.rglob("*.md")
        if page.name != "index.md" and f"({page.relative_to(DOCS)})" not in index
    ]
    assert not missing


def test_the_readme_fits_on_few_screens() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_ci_runs_the_test_command_of_the_readme() -> None:
    """People and CI run the same command."""
    readme = (ROOT / "README.md").read_text()
    command = re.search(r"^    (python3 -m venv .*pytest)$", readme, re.MULTILINE)
    assert command is not None
    assert command[1] in (ROOT / ".ci" / "run").read_text()
