"""The type of a CSV column, found from all its cells so that it is the same in every row."""

from __future__ import annotations

import json
import pathlib
import re
from collections.abc import Callable, Mapping

_INT = re.compile(r"\s*-?(0|[1-9][0-9]{0,999})\s*")
_FLOAT = re.compile(r"\s*-?((0|[1-9][0-9]*)(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?\s*")
_NOT_FINITE = re.compile(r"\s*(nan|[+-]?inf(inity)?)\s*", re.IGNORECASE)
_BOOLEANS: Mapping[str, bool] = {
    "true": True,
    "yes": True,
    "1": True,
    "false": False,
    "no": False,
    "0": False,
}


def _parse_bool(cell: str) -> bool:
    try:
        return _BOOLEANS[cell.strip().lower()]
    except KeyError:
        raise ValueError(cell) from None


PARSERS: Mapping[str, Callable[[str], object]] = {
    "str": str,
    "int": int,
    "float": float,
    "bool": _parse_bool,
    "json": json.loads,
    "path": pathlib.Path,
}
"""By a type's name: the function that turns a cell into a value, or raises ValueError."""


class ColumnGuess:
    """Narrows a column's type cell by cell.

    Whole numbers are ``int``, other numbers ``float``, ``true`` and ``false`` in any case
    ``bool``, all else ``str``. A leading zero or plus sign marks an identifier (a postcode, a
    telephone number), so such a column stays ``str``. Empty cells decide nothing.
    """

    __slots__ = ("_kind", "_pending_floats")

    def __init__(self) -> None:
        self._kind: str | None = None
        # Cells such as "nan" are text unless the column also has a number.
        self._pending_floats = False

    def see(self, cell: str) -> None:
        """Take one cell into account."""
        kind = self._kind
        if kind == "str" or not cell:
            return
        if kind in (None, "int", "float"):
            if _INT.fullmatch(cell):
                self._kind = "float" if kind == "float" or self._pending_floats else "int"
                return
            if _FLOAT.fullmatch(cell):
                self._kind = "float"
                return
            if _NOT_FINITE.fullmatch(cell):
                self._pending_floats = True
                self._kind = "float" if kind else None
                return
        if kind in (None, "bool") and not self._pending_floats:
            self._kind = "bool" if cell.strip().lower() in ("true", "false") else "str"
            return
        self._kind = "str"

    @property
    def kind(self) -> str | None:
        """The type's name, or None for a column without a value."""
        if self._kind is None and self._pending_floats:
            return "str"
        return self._kind
