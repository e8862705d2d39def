"""The journal beside an output, where workers are elsewhere.

They outlive a command that is killed. Run again, it gets from them, and from the journal, what they
did for rows that never reached the output; when all rows are in there, the journal has done its
work and goes.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["beside", "key_of", "remove"]

_SUFFIX = ".journal"
_PARTS = ("", "-wal", "-shm", ".lock")


def beside(output: Path) -> Path:
    """Return where the journal of an output is."""
    return output.with_name(output.name + _SUFFIX)


def remove(journal: Path) -> None:
    """Remove a journal that nobody has open."""
    for part in _PARTS:
        journal.with_name(journal.name + part).unlink(missing_ok=True)
    shutil.rmtree(journal.with_name(f"{journal.name}.blobs"), ignore_errors=True)


def key_of(number: int, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
    """Return what the journal knows a row's call by: which row it is, and what is in it.

    The code of the function, of its module and of what that imports counts as with all keys.
    """
    content = repr((args, list(kwargs.items())))  # in their order: a function can see it
    digest = hashlib.sha256(content.encode("utf-8", "surrogatepass"))
    return f"row {number} {digest.hexdigest()}"
