"""Edits that change what a program does give its calls other keys; others do not."""

from __future__ import annotations

import ast
import json
import os
import py_compile
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from edit_kinds import BODIES, BY_REFERENCE, KINDS, Files

from cloudexec._journal.sources import source_of, text_source

Program = Callable[..., "subprocess.Popen[str]"]

PARTS = 4
"""So that they can be run side by side."""
FAST = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


@pytest.fixture
def folder() -> Iterator[Path]:
    """A place for many small files."""
    made = Path(tempfile.mkdtemp(dir=FAST))
    yield made
    shutil.rmtree(made)


def write(folder: Path, files: Files, value: str) -> None:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text.replace("VALUE", value))


def keys(program: Program, folder: Path, which: str = "*", seed: str = "1") -> dict[str, str]:
    """Return the key of the call of each program in a folder."""
    harness = Path(__file__).with_name("edit_keys.py")
    process = program(harness, folder, which, PYTHONHASHSEED=seed)
    out, err = process.communicate(timeout=55)
    assert process.returncode == 0, err
    assert err == ""
    found: dict[str, str] = json.loads(out)
    return found


@pytest.mark.timeout(60)
@pytest.mark.parametrize("part", range(PARTS))
def test_every_kind_of_edit_is_seen_and_nothing_else(
    program: Program, folder: Path, part: int
) -> None:
    """An edited program has another key; the same one has the same key in another process."""
    kinds = sorted(KINDS)[part::PARTS]
    for number, name in enumerate(kinds):
        for value in "12":
            write(folder / f"{number:03d}-{value}", KINDS[name], value)
    found = keys(program, folder)
    assert len(found) == 2 * len(kinds)
    names = {f"{number:03d}": name for number, name in enumerate(kinds)}
    assert [name for at, name in names.items() if found[f"{at}-1"] == found[f"{at}-2"]] == []
    again = keys(program, folder, "*-1", seed="2")
    assert [names[at[:3]] for at in again if found[at] != again[at]] == []


def test_every_kind_of_edit_of_a_source_is_seen() -> None:
    """Two sources with one edit between them are two."""
    for name, text in {**BODIES, **BY_REFERENCE}.items():
        one, other = (text_source(text.replace("VALUE", value), "") for value in "12")
        assert one.digest != other.digest, name


STYLES = """
import late  # a comment
class A:
    # another

    def g(self, x = 1, *, y = (2, 3)):
        'docstring'
        if x: pass
        while True:
            return late.go() + (x +
                1), {'a': 1, 'b': [1, 2]}, 'a' 'b', 0x10, 1_000
a = A(); b = lambda: a.g()
def f(n = b): return n()
call = f, (), {}
"""
OTHER_STYLES = {
    "comments": STYLES.replace("# a comment", "# another").replace("# another", "# "),
    "blank lines": STYLES.replace("\n\n", "\n\n\n\n"),
    "more lines before": f"\n\n# more\n\n{STYLES}",
    "another layout": ast.unparse(ast.parse(STYLES)),
    "lines in one": STYLES.replace("(x +\n                1)", "(x + 1)"),
    "line in two": STYLES.replace("if x: pass", "if x:\n            pass"),
    "tabs": STYLES.replace("    ", "\t"),
    "quotes": STYLES.replace("'", '"'),
    "numbers": STYLES.replace("0x10", "16").replace("1_000", "1000"),
    "parentheses": STYLES.replace("return n()", "return (n())"),
    "semicolons": STYLES.replace("A(); b", "A()\nb"),
    "line ends": STYLES.replace("\n", "\r\n"),
}


@pytest.mark.timeout(60)
def test_comments_and_layout_and_other_files_and_places_are_no_edits(
    program: Program, folder: Path
) -> None:
    """What a syntax tree does not have is no part of a key, in a script and in a module."""
    late = "def go(): return 1\n"
    write(folder / "base", {"script.py": STYLES, "late.py": late}, "")
    for name, text in OTHER_STYLES.items():
        assert text != STYLES, name
        write(folder / name, {"script.py": text, "late.py": f"# {name}\n{late}"}, "")
    others = {"other.py": "x = 1", "data.csv": "1,2", "pkg/__init__.py": "", "f.py": "x"}
    write(folder / "other files", {"script.py": STYLES, "late.py": late, **others}, "")
    found = keys(program, folder)
    assert {name: key for name, key in found.items() if key != found["base"]} == {}


def test_source_says_what_it_may_import() -> None:
    """Relative names count from the package; nothing of it is run."""
    text = (
        "import a.b as c, d\nfrom e import f as g, h\nfrom . import i\nfrom ..j import k\n"
        "from l import *\nraise SystemExit\n"
    )
    assert text_source(text, "p.q").imports == {
        *("a.b", "d", "e", "e.f", "e.h", "p.q", "p.q.i", "p.j", "p.j.k", "l", "l.*"),
    }
    assert text_source("from ... import x\nimport y\n", "p.q").imports == {"y"}
    assert text_source("names = ['late', 'no name', '.sub']\n", "p").imports == set()
    text = "from importlib import import_module\nnames = ['late', 'no name', '.sub']\n"
    assert text_source(text, "p").imports >= {"late", "p.sub", "importlib.import_module"}
    assert "p.*" in text_source(text, "p", is_package=True).imports


def test_source_that_python_takes_for_an_earlier_one_is_that_one(tmp_path: Path) -> None:
    """An edit within the second of an import is not seen by it: the earlier code is what runs."""
    path = tmp_path / "mine.py"
    path.write_text("def f(): return 1\n")
    py_compile.compile(str(path))
    found = path.stat()
    path.write_text("def f(): return 2\n")
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns + 10**9))
    assert source_of(str(path), "").digest == text_source("def f(): return 2\n", "").digest
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))
    stale = source_of(str(path), "").digest
    done = subprocess.run(
        [sys.executable, "-c", "import mine; print(mine.f())"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "1\n"
    assert stale != text_source("def f(): return 2\n", "").digest


def test_source_of_whatever_kind_is_known_by_its_content() -> None:
    """What is no Python, or not of this version, too; deep trees are no trouble."""
    assert text_source("print 1", "").digest != text_source("print 2", "").digest
    deep = "+".join(["1"] * 900)
    assert text_source(f"x = {deep}", "").digest != text_source(f"x = {deep}+1", "").digest
    assert text_source("x = '\ud800'.encode", "").digest != text_source("x = 'd8'", "").digest
