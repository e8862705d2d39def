"""Records as JSON Lines."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator

from cloudexec.cli._json_values import to_json
from cloudexec.cli._records import Entry, ForeignOutputError, Record, Recorded

_START = b'{"row": '


class JsonLinesFormat:
    """Writes each record as one JSON object on a line of its own."""

    def __init__(self, function: str) -> None:
        """Create the format.

        Args:
            function: The function's identity, written into each record.
        """
        self._function = json.dumps(function)

    def header(self) -> bytes:
        """Return nothing: JSON Lines has no header."""
        return b""

    def encode(self, record: Record) -> bytes:
        """Write a record as one line."""
        if record.error is None:
            value, is_repr = to_json(record.value)
            outcome = (
                f'"value": {value}, "value_has_repr": true' if is_repr else f'"value": {value}'
            )
        else:
            error = {
                "type": record.error.type,
                "message": record.error.message,
                "traceback": record.error.traceback,
            }
            outcome = f'"error": {json.dumps(error, ensure_ascii=False)}'
        line = (
            f'{{"row": {record.row}, "input": {to_json(record.input)[0]}, {outcome}, '
            f'"seconds": {json.dumps(record.seconds)}, "worker": {json.dumps(record.worker)}, '
            f'"attempts": {json.dumps(record.attempts)}, "function": {self._function}}}\n'
        )
        # A file's name may contain bytes that are not UTF-8, which Python keeps as lone surrogates:
        # "backslashreplace" writes them as JSON escapes.
        return line.encode("utf-8", "backslashreplace")

    def widen(self, record: Record) -> bool:
        """Return false, as any record fits."""
        return False

    def widened(self, lines: Iterable[bytes]) -> Iterator[bytes]:
        """Yield the lines unchanged."""
        yield from lines

    def key(self, shown: object) -> int:
        """Digest a row's input by its JSON, as ``entries`` reads it back."""
        text = to_json(shown)[0].encode("utf-8", "backslashreplace")
        return _digest(json.loads(text))

    def entries(self, lines: Iterable[bytes]) -> Iterator[Entry]:
        """Read records; the last one may be incomplete after a crash."""
        for number, line in enumerate(lines, start=1):
            is_whole = line.endswith(b"\n")
            recorded = _parse(line)
            if recorded is not None:
                yield Entry(line, recorded)
            elif is_whole or not (line.startswith(_START) or _START.startswith(line)):
                raise ForeignOutputError(f"line {number} is no result of cloudexec map")


def _parse(line: bytes) -> Recorded | None:
    try:
        fields: object = json.loads(line)
    except (ValueError, RecursionError):
        return None
    match fields:
        case {"row": int(row), "input": shown, "function": str(function), **rest}:
            return Recorded(row, _digest(shown), "error" in rest, function)
    return None


def _digest(plain: object) -> int:
    return hash(json.dumps(plain, sort_keys=True))
