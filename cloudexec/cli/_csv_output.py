"""Records as CSV, with a column for each part of the input, the value and the error."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator, Mapping

from cloudexec.cli._json_values import to_plain
from cloudexec.cli._records import Entry, ForeignOutputError, Record, Recorded

_LAST = (
    "error.type",
    "error.message",
    "error.traceback",
    "seconds",
    "worker",
    "attempts",
    "function",
)
_WIDEST = 200


class CsvFormat:
    """Writes each record as one CSV row.

    The columns are ``row``, the input (``input``, or ``input.NAME`` for each name), the value
    (``value``, or ``value.KEY`` for each key if the function returns dicts), the error, and how the
    call ran. A dict with new keys adds columns, for which the whole output is written again. Beyond
    200 columns, and if the output is a stream, the dict is written into ``value`` as JSON.
    """

    def __init__(self, function: str, inputs: tuple[str, ...] | None, *, can_widen: bool) -> None:
        """Choose the first columns.

        Args:
            function: The function's identity, written into each record.
            inputs: The names that rows have; ``None`` for the one column ``input``.
            can_widen: Whether the output can be written again with more columns.
        """
        csv.field_size_limit(2**31 - 1)  # tracebacks and values may be longer than 128 KiB
        self._function = function
        self._inputs = ["input"] if inputs is None else [f"input.{name}" for name in inputs]
        self._values: list[str] = []
        self._can_widen = can_widen
        self._wrote_header = False

    def header(self) -> bytes:
        """Return the line of column names."""
        self._wrote_header = True
        return _line(self._columns())

    def _columns(self) -> list[str]:
        return ["row", *self._inputs, "value", *self._values, *_LAST]

    def encode(self, record: Record) -> bytes:
        """Write a record as one CSV row."""
        cells = {
            "row": str(record.row),
            **self._input_cells(record.input),
            "seconds": _cell(record.seconds),
            "worker": _cell(record.worker),
            "attempts": _cell(record.attempts),
            "function": self._function,
        }
        if record.error is None:
            cells.update(self._value_cells(to_plain(record.value)[0]))
        else:
            cells["error.type"] = record.error.type
            cells["error.message"] = record.error.message
            cells["error.traceback"] = record.error.traceback or ""
        return _line([cells.get(column, "") for column in self._columns()])

    def _input_cells(self, shown: object) -> dict[str, str]:
        if self._inputs == ["input"] or not isinstance(shown, Mapping):
            return {"input": _cell(to_plain(shown)[0])}
        return {f"input.{name}": _cell(to_plain(item)[0]) for name, item in shown.items()}

    def _value_cells(self, value: object) -> dict[str, str]:
        if isinstance(value, dict) and value:
            cells = {f"value.{key}": _cell(item) for key, item in value.items()}
            if cells.keys() <= set(self._values):
                return cells
        return {"value": _cell(value)}

    def widen(self, record: Record) -> bool:
        """Add columns for the keys of a dict."""
        if record.error is not None:
            return False
        value = to_plain(record.value)[0]
        if not isinstance(value, dict):
            return False
        known = set(self._values)
        new = [f"value.{key}" for key in value if f"value.{key}" not in known]
        if not new or len(self._values) + len(new) > _WIDEST:
            return False
        if self._wrote_header and not self._can_widen:
            return False
        self._values += new
        return self._wrote_header

    def widened(self, lines: Iterable[bytes]) -> Iterator[bytes]:
        """Write an existing output again, with empty cells in the new columns."""
        yield self.header()
        records = _records(lines)
        old = _cells(next(records, b""))
        for raw in records:
            cells = dict(zip(old, _cells(raw), strict=False))
            yield _line([cells.get(column, "") for column in self._columns()])

    def key(self, shown: object) -> int:
        """Digest a row's input by its cells, as ``entries`` reads them back."""
        return _digest(self._input_cells(shown))

    def entries(self, lines: Iterable[bytes]) -> Iterator[Entry]:
        """Read the header, whose columns this format then uses, and the records."""
        columns: list[str] | None = None
        for raw in _records(lines):
            cells = _cells(raw)
            if columns is None:
                self._take_columns(cells, is_whole=raw.endswith(b"\n"))
                if not raw.endswith(b"\n"):
                    return
                columns = cells
                yield Entry(raw, None)
                continue
            if not raw.endswith(b"\n"):
                return
            fields = dict(zip(columns, cells, strict=False))
            if len(cells) != len(columns) or not fields["row"].isdecimal():
                raise ForeignOutputError("it holds a row that is no result of cloudexec map")
            inputs = {name: cell for name, cell in fields.items() if _is_input(name)}
            yield Entry(
                raw,
                Recorded(
                    int(fields["row"]),
                    _digest(inputs),
                    fields["error.type"] != "",
                    fields["function"],
                ),
            )

    def _take_columns(self, columns: list[str], *, is_whole: bool) -> None:
        if not is_whole:
            if _line(self._columns()).startswith(_line(columns).rstrip(b"\n")):
                return
            raise ForeignOutputError("its header is not one of cloudexec map")
        middle = columns[1 : -len(_LAST)]
        inputs = [name for name in middle if _is_input(name)]
        values = [name for name in middle if name.startswith("value.")]
        if columns != ["row", *inputs, "value", *values, *_LAST]:
            raise ForeignOutputError("its header is not one of cloudexec map")
        if inputs != self._inputs:
            raise ForeignOutputError(
                f"its input has other columns: {', '.join(inputs)} there, "
                f"{', '.join(self._inputs)} now"
            )
        self._values = values
        self._wrote_header = True


def _is_input(column: str) -> bool:
    return column == "input" or column.startswith("input.")


def _records(lines: Iterable[bytes]) -> Iterator[bytes]:
    """Join lines that belong to one record, because a quoted cell contains line ends."""
    parts: list[bytes] = []
    quotes = 0
    for line in lines:
        parts.append(line)
        quotes += line.count(b'"')
        if quotes % 2 == 0:
            yield b"".join(parts)
            parts.clear()
            quotes = 0


def _cells(raw: bytes) -> list[str]:
    text = raw.decode("utf-8", "surrogateescape")
    try:
        return next(csv.reader(io.StringIO(text, newline="")), [])
    except csv.Error as exc:
        raise ForeignOutputError(f"it is not the CSV of cloudexec map: {exc}") from exc


def _line(cells: Iterable[str]) -> bytes:
    stream = io.StringIO(newline="")
    # The writer quotes cells that contain a character of its line end. So this has both, and the
    # first is removed afterwards.
    csv.writer(stream, lineterminator="\r\n").writerow(cells)
    text = f"{stream.getvalue()[:-2]}\n"
    try:
        return text.encode("utf-8", "surrogateescape")  # a file's name may not be valid UTF-8
    except UnicodeEncodeError:
        return text.encode("utf-8", "backslashreplace")


def _cell(plain: object) -> str:
    if plain is None:
        return ""
    return plain if isinstance(plain, str) else json.dumps(plain, ensure_ascii=False)


def _digest(cells: Mapping[str, str]) -> int:
    return hash(frozenset((name, cell) for name, cell in cells.items() if cell))
