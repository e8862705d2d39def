"""Notes beside an output which code made its rows, and compares that when the run is resumed."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from cloudexec._journal.changes import differences
from cloudexec._journal.program import Manifest, Program

__all__ = ["change", "note", "this_program"]

_SUFFIX = ".program"


def this_program(program: Program) -> Manifest:
    """Return the manifest of a function's code, without the command's own script."""
    modules = {
        name: each for name, each in program.manifest["modules"].items() if name != "__main__"
    }
    return {**program.manifest, "modules": modules}


def change(output: Path, manifest: Manifest) -> str:
    """Say what has changed since an output's rows were made; empty if no change is known."""
    try:
        before: Any = json.loads(_beside(output).read_bytes())
        return "" if before == manifest else differences(before, manifest)
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError):
        return ""  # an earlier version of cloudexec wrote no such file


def note(output: Path, manifest: Manifest) -> None:
    """Write down which code makes an output's rows from now on.

    Raises:
        OSError: If the file cannot be written.
    """
    path = _beside(output)
    new = path.with_name(f"{path.name}.new")
    new.write_text(f"{json.dumps(manifest)}\n", encoding="utf-8")
    os.replace(new, path)


def _beside(output: Path) -> Path:
    return output.with_name(output.name + _SUFFIX)
