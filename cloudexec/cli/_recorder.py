"""Writes records to an output, with the header that its format needs."""

from __future__ import annotations

from cloudexec.cli._output_file import Output, OutputFile
from cloudexec.cli._records import Format, Record


class Recorder:
    """Appends each record at once, so that a crash loses only the record being written."""

    def __init__(self, output: Output, form: Format, *, has_rows: bool, highest: int) -> None:
        """Begin to write to an output.

        Args:
            output: The output.
            form: The format of its records.
            has_rows: Whether the output has records, and so a header, already.
            highest: The highest row number in the output; 0 without records.
        """
        self._output = output
        self._form = form
        self._needs_header = not has_rows
        self._highest = highest
        self.is_in_order = True
        """Whether each record's number was higher than those before."""

    def write(self, record: Record) -> None:
        """Append a record."""
        if self._form.widen(record) and isinstance(self._output, OutputFile):
            self._output.replace(self._form.widened(self._output.lines()))
        header = self._form.header() if self._needs_header else b""
        self._output.append(header + self._form.encode(record))
        self._needs_header = False
        self.is_in_order &= record.row > self._highest
        self._highest = max(self._highest, record.row)

    def finish(self) -> None:
        """Write the header if no record was written."""
        header = self._form.header() if self._needs_header else b""
        if header:
            self._output.append(header)
            self._needs_header = False
