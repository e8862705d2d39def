"""Rows of JSON Lines: one object a line, its keys the arguments' names."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping

from cloudexec.cli._byte_source import Reopenable, stdin_lines
from cloudexec.cli._errors import CommandError
from cloudexec.cli._parameters import Parameters
from cloudexec.cli._rows import Arguments, Row


class JsonLinesSource:
    """JSON Lines from a file, which is checked in advance, or from a stream, which is not."""

    def __init__(
        self, data: Reopenable | None, parameters: Parameters, *, ignore_extra: bool
    ) -> None:
        """Read a file once; leave a stream alone.

        Args:
            data: The file's bytes, or None for standard input as it arrives.
            parameters: The function's parameters, which each row must fit.
            ignore_extra: Whether keys that the function does not take are allowed.

        Raises:
            CommandError: If a row of the file is malformed or does not fit the function.
        """
        self._parameters = parameters
        self._ignore_extra = ignore_extra
        self._fitting: set[tuple[str, ...]] = set()
        self._lines: Callable[[], Iterable[bytes]] = stdin_lines if data is None else data.lines
        self.name = "standard input" if data is None else data.name
        self.total: int | None = None
        self.columns: tuple[str, ...] | None = None
        if data is not None:
            self._scan()

    def _scan(self) -> None:
        columns: dict[str, None] = {}
        total = 0
        for row in self.rows():
            total = row.number
            assert isinstance(row.passed, Mapping)
            columns.update(dict.fromkeys(row.passed))
        self.total = total
        self.columns = tuple(columns)

    def bind(self, row: Row) -> Arguments:
        """Turn a row into keyword arguments."""
        assert isinstance(row.passed, Mapping)
        return self._parameters.bind(row.passed)

    def describe(self) -> str:
        """Say how many rows there are, and the keys found."""
        if self.total is None:
            return "JSON Lines from standard input, read as they arrive"
        plural = "s" * (self.total != 1)
        return f"{self.total} row{plural} of JSON Lines ({', '.join(self.columns or ())})"

    def rows(self) -> Iterator[Row]:
        """Read the rows, and skip blank lines."""
        number = 0
        for line_number, line in enumerate(self._lines(), start=1):
            if line_number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if not line.strip():
                continue
            number += 1
            values = self._parse(line, f"{self.name}, row {number} (line {line_number})")
            yield Row(number, values, values)

    def _parse(self, line: bytes, place: str) -> dict[str, object]:
        if line.lstrip()[:1] == b"[" and not self._fitting:
            raise CommandError(
                f"{self.name} is a JSON array; JSON Lines has one object on each line "
                "(jq -c '.[]' makes it from an array)"
            )
        try:
            values: object = json.loads(line)
        except json.JSONDecodeError as exc:
            raise CommandError(f"{place}: not JSON: {exc.msg} at column {exc.colno}") from None
        except UnicodeDecodeError:
            raise CommandError(f"{place}: not UTF-8 text") from None
        except RecursionError:
            raise CommandError(f"{place}: nested too deeply") from None
        if not isinstance(values, dict):
            raise CommandError(
                f'{place}: a row must be a JSON object such as {{"x": 1}}, not {_json_kind(values)}'
            )
        keys = tuple(values)
        if keys not in self._fitting:
            self._parameters.check_names(
                keys, place=place, noun="key", ignore_extra=self._ignore_extra
            )
            self._fitting.add(keys)
        return values


def _json_kind(value: object) -> str:
    if value is None:
        return "null"
    names = {list: "an array", str: "a string", bool: "true or false"}
    return names.get(type(value), "a number")
