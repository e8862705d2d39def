"""Reads which rows an existing output has, and checks that it belongs to this job."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from cloudexec.cli._errors import CommandError
from cloudexec.cli._files_input import FilesSource
from cloudexec.cli._output_file import OutputFile
from cloudexec.cli._records import ForeignOutputError, Format
from cloudexec.cli._rows import Row, Source

_ELSE = "choose another --output, or --overwrite it"


@dataclass(frozen=True, slots=True)
class Ledger:
    """The rows that an output has, each with a digest of its input."""

    output: str
    """The output's name in messages."""
    keys: dict[int, int]
    """By a row's number: the digest of its input."""
    failed: frozenset[int]
    """The numbers of rows whose call raised."""
    good_size: int
    """Number of bytes of complete records. Bytes behind them were left incomplete by a crash."""
    ends_with_newline: bool
    """Whether the last complete record has its line end."""
    is_in_order: bool
    """Whether the rows are in the input's order."""

    def without_failed(self) -> Ledger:
        """Return a copy without the rows that failed, so that they run again."""
        keys = {row: key for row, key in self.keys.items() if row not in self.failed}
        return replace(self, keys=keys, failed=frozenset())

    def check(self, source: Source, key: Callable[[object], int]) -> None:
        """Compare the recorded rows with the input.

        Args:
            source: The input. A stream is not read here: ``remaining`` compares its rows.
            key: Digests a row's input.

        Raises:
            CommandError: If a recorded row had another input.
        """
        if source.total is None or not self.keys:
            return
        if isinstance(source, FilesSource):
            recorded = {digest: row for row, digest in self.keys.items()}
            for row in source.rows():
                recorded.pop(key(row.shown), None)
            if recorded:
                number = min(recorded.values())
                raise CommandError(
                    f"{self.output} has a result (row {number}) for a file that "
                    f"{source.name!r} does not match: {_ELSE}"
                )
            return
        if max(self.keys) > source.total:
            raise CommandError(
                f"{self.output} has a result for row {max(self.keys)}, but {source.name} "
                f"ends with row {source.total}: {_ELSE}"
            )
        for row in source.rows():
            if row.number in self.keys:
                self._check_row(row, source, key)

    def _check_row(self, row: Row, source: Source, key: Callable[[object], int]) -> None:
        if key(row.shown) != self.keys[row.number]:
            raise CommandError(
                f"{self.output} was made from a different input: its row {row.number} is not "
                f"row {row.number} of {source.name}: {_ELSE}"
            )

    def remaining(self, source: Source, key: Callable[[object], int]) -> Iterator[Row]:
        """Yield the rows that must still be run, in order.

        Files that were added to the folder since the output was begun get numbers that are free, so
        that recorded files keep theirs.

        Args:
            source: The input.
            key: Digests a row's input.

        Yields:
            Rows whose numbers are not in the output.

        Raises:
            CommandError: If a recorded row of a stream had another input.
        """
        if isinstance(source, FilesSource):
            digests = set(self.keys.values())
            numbers = _free_numbers(self.keys)
            for row in source.rows():
                if not digests or key(row.shown) not in digests:
                    yield replace(row, number=next(numbers))
            return
        for row in source.rows():
            if row.number not in self.keys:
                yield row
            elif source.total is None:
                self._check_row(row, source, key)


def _free_numbers(taken: dict[int, int]) -> Iterator[int]:
    number = 0
    while True:
        number += 1
        if number not in taken:
            yield number


def empty_ledger(output: str) -> Ledger:
    """Return the ledger of an output without rows."""
    return Ledger(
        output=output,
        keys={},
        failed=frozenset(),
        good_size=0,
        ends_with_newline=True,
        is_in_order=True,
    )


def read_ledger(name: str, lines: Iterator[bytes], form: Format, function: str) -> Ledger:
    """Read an existing output.

    Args:
        name: The output's name in messages.
        lines: Its lines, each with its line end.
        form: The format of its records.
        function: The function that this run is for.

    Returns:
        The rows that the output has.

    Raises:
        CommandError: If it was not written by this command, or for another function.
    """
    keys: dict[int, int] = {}
    failed: set[int] = set()
    good_size = 0
    last = b"\n"
    highest = 0
    is_in_order = True
    try:
        for entry in form.entries(lines):
            good_size += len(entry.raw)
            last = entry.raw
            if entry.recorded is None:
                continue
            recorded = entry.recorded
            if recorded.function != function:
                raise CommandError(
                    f"{name} holds results of {recorded.function}, not of {function}: {_ELSE}"
                )
            keys[recorded.row] = recorded.key
            if recorded.has_failed:
                failed.add(recorded.row)
            is_in_order &= recorded.row > highest
            highest = max(highest, recorded.row)
    except ForeignOutputError as exc:
        raise CommandError(f"{name} exists and is not this job's output: {exc}; {_ELSE}") from exc
    return Ledger(
        output=name,
        keys=keys,
        failed=frozenset(failed),
        good_size=good_size,
        ends_with_newline=last.endswith(b"\n"),
        is_in_order=is_in_order,
    )


def repair(output: OutputFile, ledger: Ledger) -> None:
    """Cut off an incomplete record, so that the next one starts on a line of its own."""
    if output.size > ledger.good_size:
        output.truncate(ledger.good_size)
    if not ledger.ends_with_newline:
        output.append(b"\n")


def drop_failed(output: OutputFile, form: Format) -> None:
    """Rewrite an output without the rows that failed."""
    output.replace(
        entry.raw
        for entry in form.entries(output.lines())
        if entry.recorded is None or not entry.recorded.has_failed
    )


def put_in_order(output: OutputFile, form: Format) -> None:
    """Rewrite an output with its rows in the input's order.

    Only the records' offsets are held in memory.
    """
    places: list[tuple[int, int, int]] = []
    offset = 0
    for entry in form.entries(output.lines()):
        number = 0 if entry.recorded is None else entry.recorded.row
        places.append((number, offset, len(entry.raw)))
        offset += len(entry.raw)
    places.sort()
    with output.path.open("rb") as stream:
        output.replace(_pieces(stream.seek, stream.read, places))


def _pieces(
    seek: Callable[[int], int], read: Callable[[int], bytes], places: list[tuple[int, int, int]]
) -> Iterator[bytes]:
    for _, offset, length in places:
        seek(offset)
        yield read(length)
