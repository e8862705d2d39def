"""The journal that ``cloudexec map`` keeps beside its output, if workers are on other machines.

Such workers survive a command that is killed. If the command is run again, it takes the results of
rows that did not reach the output from them, and from the journal. When all rows are in the output,
the journal is removed.
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
    """Return the path of an output's journal."""
    return output.with_name(output.name + _SUFFIX)


def remove(journal: Path) -> None:
    """Remove a journal, which must not be open."""
    for part in _PARTS:
        journal.with_name(journal.name + part).unlink(missing_ok=True)
    shutil.rmtree(journal.with_name(f"{journal.name}.blobs"), ignore_errors=True)


def key_of(number: int, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
    """Return the journal's key of a row's call, made from the row's number and its arguments.

    As with all keys, the code of the function, of its module and of their imports counts, too.
    """
    content = repr((args, list(kwargs.items())))  # in their order, which a function can observe
    digest = hashlib.sha256(content.encode("utf-8", "surrogatepass"))
    return f"row {number} {digest.hexdigest()}"
