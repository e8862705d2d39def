"""Rows of a CSV file, its cells as values of one type per column."""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from cloudexec.cli._byte_source import Reopenable
from cloudexec.cli._column_types import PARSERS, ColumnGuess
from cloudexec.cli._errors import CommandError
from cloudexec.cli._parameters import Parameters
from cloudexec.cli._rows import Arguments, Row


@dataclass(frozen=True, slots=True)
class _Column:
    name: str
    kind: str
    parse: Callable[[str], object]
    empty: object
    """Value that is recorded for an empty cell."""
    is_left_out: bool
    """Whether an empty cell leaves the argument to the function's default."""


class CsvSource:
    """A CSV file that was read once: every row has the header's columns, each column a type."""

    def __init__(
        self,
        data: Reopenable,
        parameters: Parameters,
        *,
        types: Mapping[str, str],
        delimiter: str,
        ignore_extra: bool,
    ) -> None:
        """Read the file once.

        Args:
            data: The file's bytes.
            parameters: The function's parameters, which the header must fit.
            types: Type names of columns. They count more than annotations and the cells' content.
            delimiter: The character between cells.
            ignore_extra: Whether columns that the function does not take are allowed.

        Raises:
            CommandError: If the file is malformed or does not fit the function.
        """
        csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
        self._data = data
        self._parameters = parameters
        self._delimiter = delimiter
        header = self._check_header()
        for name in types:
            if name not in header:
                raise CommandError(
                    f"--type names the column {name!r}, but {data.name} has: {', '.join(header)}"
                )
        parameters.check_names(header, place=data.name, noun="column", ignore_extra=ignore_extra)
        self.columns: tuple[str, ...] | None = tuple(header)
        self._columns, self.total = self._scan(header, types)

    @property
    def name(self) -> str:
        """The input's name in messages."""
        return self._data.name

    def bind(self, row: Row) -> Arguments:
        """Turn a row into keyword arguments."""
        assert isinstance(row.passed, Mapping)
        return self._parameters.bind(row.passed)

    def describe(self) -> str:
        """Say how many rows there are, and each column's type."""
        columns = ", ".join(f"{column.name}: {column.kind}" for column in self._columns)
        return f"{self.total} row{'s' * (self.total != 1)} of CSV ({columns})"

    def rows(self) -> Iterator[Row]:
        """Read the rows, their cells converted."""
        columns = self._columns
        some_left_out = any(column.is_left_out for column in columns)
        for number, line, cells in self._records():
            self._check_width(number, line, cells, len(columns))
            shown: dict[str, object] = {}
            for column, cell in zip(columns, cells, strict=True):
                if cell:
                    try:
                        shown[column.name] = column.parse(cell)
                    except ValueError:
                        raise self._bad_cell(number, line, column.name, cell, column.kind) from None
                else:
                    shown[column.name] = column.empty
            passed = shown
            if some_left_out and "" in cells:
                passed = {
                    column.name: shown[column.name]
                    for column, cell in zip(columns, cells, strict=True)
                    if cell or not column.is_left_out
                }
            yield Row(number, shown, passed)

    def _check_header(self) -> list[str]:
        header = next(self._parsed(), None)
        if not header:
            raise CommandError(f"{self.name} is empty: its first line must name the columns")
        names = [name.strip() for name in header]
        if "" in names:
            raise CommandError(f"{self.name}: column {names.index('') + 1} has no name")
        for name in names:
            if names.count(name) > 1:
                raise CommandError(f"{self.name} has the column {name!r} twice")
        if len(names) == 1 and self._delimiter == ",":
            for other, title in (";", "';'"), ("\t", "tab"):
                if other in names[0]:
                    raise CommandError(
                        f"{self.name} seems to have {title} between its columns, not ',': "
                        f"say --delimiter {title}"
                    )
        return names

    def _scan(self, header: list[str], types: Mapping[str, str]) -> tuple[list[_Column], int]:
        known = {**self._parameters.annotated, **types}
        guesses = [(index, ColumnGuess()) for index, name in enumerate(header) if name not in known]
        checks = [
            (index, name, known[name], PARSERS[known[name]])
            for index, name in enumerate(header)
            if known.get(name, "str") != "str"
        ]
        total = 0
        for number, line, cells in self._records():
            self._check_width(number, line, cells, len(header))
            for index, guess in guesses:
                guess.see(cells[index])
            for index, name, kind, parse in checks:
                if cells[index]:
                    try:
                        parse(cells[index])
                    except ValueError:
                        raise self._bad_cell(number, line, name, cells[index], kind) from None
            total = number
        kinds = {header[index]: guess.kind for index, guess in guesses}
        return [self._column(name, known.get(name) or kinds[name]) for name in header], total

    def _column(self, name: str, kind: str | None) -> _Column:
        return _Column(
            name=name,
            kind=kind or "empty",
            parse=PARSERS[kind or "str"],
            empty="" if kind == "str" else None,
            is_left_out=name in self._parameters.defaults,
        )

    def _records(self) -> Iterator[tuple[int, int, list[str]]]:
        """Yield row number, line number and cells of each row that is not blank."""
        parsed = self._parsed()
        next(parsed, None)
        number = 0
        line = parsed.line + 1
        for cells in parsed:
            if cells:
                number += 1
                yield number, line, cells
            line = parsed.line + 1

    def _parsed(self) -> _Parsed:
        return _Parsed(self._data, self._delimiter)

    def _check_width(self, number: int, line: int, cells: list[str], width: int) -> None:
        if len(cells) != width:
            cells_there = "1 cell" if len(cells) == 1 else f"{len(cells)} cells"
            columns = "1 column" if width == 1 else f"{width} columns"
            raise CommandError(
                f"{self.name}, row {number} (line {line}): {cells_there}, "
                f"but the header has {columns}"
            )

    def _bad_cell(self, number: int, line: int, name: str, cell: str, kind: str) -> CommandError:
        shown = cell if len(cell) <= 60 else f"{cell[:57]}..."
        return CommandError(
            f"{self.name}, row {number} (line {line}), column {name!r}: "
            f"{shown!r} is not of type {kind}"
        )


class _Parsed:
    """Reads a CSV file row by row; malformed rows raise CommandError with their line number."""

    def __init__(self, data: Reopenable, delimiter: str) -> None:
        self._name = data.name
        self._rows = 0
        self._reader = csv.reader(self._text(data), delimiter=delimiter, strict=True)

    @property
    def line(self) -> int:
        """The number of the last line read."""
        return self._reader.line_num

    def __iter__(self) -> _Parsed:
        return self

    def __next__(self) -> list[str]:
        start = self.line + 1
        try:
            cells = next(self._reader)
        except csv.Error as exc:
            reason = str(exc)
            if reason == "unexpected end of data":
                reason = "a quote is opened and never closed"
            where = f"row {self._rows} (line {start})" if self._rows else "the header"
            raise CommandError(f"{self._name}, {where}: {reason}") from None
        if cells:
            self._rows += 1
        return cells

    def _text(self, data: Reopenable) -> Iterator[str]:
        for line in data.lines():
            try:
                yield line.decode("utf-8-sig" if self.line == 0 else "utf-8")
            except UnicodeDecodeError as exc:
                where = f"row {self._rows} (line {self.line + 1})" if self._rows else "the header"
                raise CommandError(
                    f"{self._name}, {where}: not UTF-8 text (byte 0x{line[exc.start]:02x})"
                ) from None
