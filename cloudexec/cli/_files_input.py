"""An input of files that match a glob: each is one call, with its path as the only argument."""

from __future__ import annotations

import glob
import os
import pathlib
from collections.abc import Iterator

from cloudexec.cli._errors import CommandError
from cloudexec.cli._parameters import Parameters
from cloudexec.cli._rows import Arguments, Row

_BESIDE = (".program", ".journal", ".rewriting")
"""Suffixes of files that belong to an output. They follow the output's name."""


def _is_own(path: str, output: str | None) -> bool:
    if output is None:
        return False
    path = os.path.abspath(path)
    return path == output or path.startswith(tuple([output + each for each in _BESIDE]))


class FilesSource:
    """The files that matched, sorted by path."""

    columns: tuple[str, ...] | None = None

    def __init__(
        self, pattern: str, parameters: Parameters, *, output: pathlib.PurePath | None
    ) -> None:
        """Find the files.

        Args:
            pattern: A glob; ``**`` matches any number of folders.
            parameters: The function's parameters: it must be callable with one value.
            output: The file for the results. It is no input even if the glob matches it, and
                neither are the files that this command keeps beside it.

        Raises:
            CommandError: If nothing matches, a file cannot be read, or the function cannot be
                called with one path.
        """
        self.name = pattern
        literal = os.path.lexists(pattern)  # a file's name may contain brackets, as globs do
        matches = [pattern] if literal else sorted(glob.iglob(pattern, recursive=True))
        own = None if output is None else os.path.abspath(output)
        self._paths = [path for path in matches if os.path.isfile(path) and not _is_own(path, own)]
        if not self._paths:
            folders = " (only folders do)" if matches else ""
            raise CommandError(f"no file matches {pattern!r}{folders}")
        for path in self._paths:
            if not os.access(path, os.R_OK):
                raise CommandError(f"{path} cannot be read: no permission")
        if parameters.one_value is not None:
            raise CommandError(
                f"{parameters.title} cannot be called with a file's path alone: "
                f"{parameters.one_value}"
            )
        first = parameters.first
        self._as_path = first is not None and parameters.annotated.get(first) == "path"
        self.total: int | None = len(self._paths)

    def bind(self, row: Row) -> Arguments:
        """Pass the path as the only argument."""
        return (row.passed,), {}

    def describe(self) -> str:
        """Say how many files there are, and how a path is passed."""
        kind = "pathlib.Path" if self._as_path else "str"
        noun = "file" if self.total == 1 else "files"
        return f"{self.total} {noun} (each passed as its path, a {kind})"

    def rows(self) -> Iterator[Row]:
        """Number the paths in order."""
        for number, path in enumerate(self._paths, start=1):
            yield Row(number, path, pathlib.Path(path) if self._as_path else path)
