"""Which code made the rows of an output: noted beside it, and compared when it is gone on with."""

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
    """Return what a function consists of, without the command itself."""
    modules = {
        name: each for name, each in program.manifest["modules"].items() if name != "__main__"
    }
    return {**program.manifest, "modules": modules}


def change(output: Path, manifest: Manifest) -> str:
    """Say what has changed since an output's rows were made; empty: nothing, or it is not known."""
    try:
        before: Any = json.loads(_beside(output).read_bytes())
        return "" if before == manifest else differences(before, manifest)
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError):
        return ""  # an earlier version of cloudexec noted nothing


def note(output: Path, manifest: Manifest) -> None:
    """Note what makes an output's rows from now on.

    Raises:
        OSError: If it cannot be written.
    """
    path = _beside(output)
    new = path.with_name(f"{path.name}.new")
    new.write_text(f"{json.dumps(manifest)}\n", encoding="utf-8")
    os.replace(new, path)


def _beside(output: Path) -> Path:
    return output.with_name(output.name + _SUFFIX)
