"""Chooses the reader for INPUT, by its name or by ``--input-format``."""

from __future__ import annotations

import glob
import os
from collections.abc import Mapping
from pathlib import PurePath

from cloudexec.cli._byte_source import STDIN, Reopenable
from cloudexec.cli._csv_input import CsvSource
from cloudexec.cli._errors import CommandError
from cloudexec.cli._files_input import FilesSource
from cloudexec.cli._jsonl_input import JsonLinesSource
from cloudexec.cli._parameters import Parameters
from cloudexec.cli._rows import Source

_BY_SUFFIX = {
    ".csv": "csv",
    ".tsv": "csv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
}


def open_source(
    name: str,
    parameters: Parameters,
    *,
    input_format: str | None,
    types: Mapping[str, str],
    delimiter: str | None,
    ignore_extra: bool,
    output: PurePath | None,
) -> Source:
    """Open an input and check all of it that can be checked in advance.

    Args:
        name: A path, a glob, or ``-`` for standard input.
        parameters: The parameters of the function that the rows are for.
        input_format: ``"csv"``, ``"jsonl"`` or ``"files"``; None to tell from the name.
        types: Type names for CSV columns.
        delimiter: The character between CSV cells; None for a comma, or a tab in ``.tsv``.
        ignore_extra: Whether columns that the function does not take are allowed.
        output: The file that results go to, which is no input although a glob may match it.

    Returns:
        The input's rows.

    Raises:
        CommandError: If the input does not exist, is malformed, or does not fit the function.
    """
    suffix = _suffix(name)
    kind = input_format or _kind(name, suffix)
    if kind != "csv" and (types or delimiter):
        option = "--type" if types else "--delimiter"
        raise CommandError(f"{option} is for CSV input, and {name} is read as {kind}")
    if kind == "files":
        return FilesSource(name, parameters, output=output)
    if kind == "jsonl":
        data = None if name == STDIN else Reopenable(name)
        return JsonLinesSource(data, parameters, ignore_extra=ignore_extra)
    return CsvSource(
        Reopenable(name),
        parameters,
        types=types,
        delimiter=delimiter or ("\t" if suffix == ".tsv" else ","),
        ignore_extra=ignore_extra,
    )


def _suffix(name: str) -> str:
    path = PurePath(name)
    return (path.with_suffix("") if path.suffix == ".gz" else path).suffix.lower()


def _kind(name: str, suffix: str) -> str:
    if name == STDIN:
        return "jsonl"
    if not os.path.exists(name):
        if glob.has_magic(name):
            return "files"
        raise CommandError(f"there is no file {name}")
    if os.path.isdir(name):
        raise CommandError(f"{name} is a folder: name its files with a glob, '{name}/*'")
    if suffix not in _BY_SUFFIX:
        raise CommandError(
            f"cannot tell the format of {name}: say --input-format csv, jsonl, "
            "or files to pass it as a path"
        )
    return _BY_SUFFIX[suffix]
