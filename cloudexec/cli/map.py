"""``cloudexec map``: call a function once for each row or file of an input."""

from __future__ import annotations

from pathlib import Path

import click

from cloudexec.cli._column_types import PARSERS
from cloudexec.cli._errors import CommandError

_HELP = """Call FUNCTION once for each row or file of INPUT, on many workers.

FUNCTION is package.module:name or path/to/file.py:name.

\b
INPUT is one of
  rows.csv     one call per row; columns become keyword arguments
  rows.jsonl   one call per line, a JSON object; keys become keyword arguments
  'in/*.png'   a quoted pattern; one call per file, with its path as argument
  -            JSON Lines from standard input; they are run as they arrive

RESULTS are written as calls finish, one line of JSON (or CSV) for each row. A line has "row" (the
row's number, from 1), "input", "value", "seconds", "worker", "attempts" and "function". If the call
failed, it has "error" instead of "value", with "type", "message" and "traceback". Values that JSON
cannot hold are written in the closest form that it can; if only repr() is left,
"value_has_repr" says so. In CSV, the parts of inputs and of dicts that FUNCTION returns have
columns of their own, such as input.NAME and value.KEY.

RESUMING: after an interruption or a crash, the same command continues where it stopped. It does not
run rows again that are in the output, and failed rows only with --retry-failed. It refuses an
output that another function, other input or other code made. The file OUTPUT.program notes which
code that was: the modules that FUNCTION needs, and the versions of packages and of Python. If the
code has changed, --resume keeps all rows, --retry-failed keeps the rows that succeeded, and
--overwrite keeps none.
Workers on AWS live on for two minutes when this command is killed. If you run the same command in
that time, it takes them over, with everything that they have done. The file OUTPUT.journal serves
that purpose, and is removed when all rows are done.

TYPES: a CSV column has one type in all rows. It is the type that --type names, or else that of the
parameter's annotation (str, int, float, bool, list, dict, Path). If there is neither, it is int,
float or bool if all cells of the column are that, and str otherwise. Numbers with a leading zero or
plus sign stay str. An empty cell leaves the argument to its default; without a default, it is None,
or '' in a str column. A file's path is a str, or a pathlib.Path if the parameter is annotated so.
"""

_EPILOG = """\b
Examples:
  cloudexec map shop.pricing:quote orders.csv -o quotes.jsonl
  cloudexec map resize.py:thumbnail 'photos/**/*.jpg' -o done.csv --workers 4
  generate | cloudexec map score.py:score - | jq .value

\b
Exit codes:
  0    every row succeeded, in this run and in those that it resumed
  1    at least one row failed
  2    the command line, the function, the input or the output is wrong; nothing
       was run, except the rows of a stream before a malformed one
  3    the run could not go on: no worker could be started, or the disk is full
  130  Ctrl-C interrupted the run (143: SIGTERM did); the same command continues
  141  the program that read standard output stopped reading
"""


def _parse_types(
    context: click.Context, parameter: click.Parameter, values: tuple[str, ...]
) -> dict[str, str]:
    types: dict[str, str] = {}
    for value in values:
        column, _, kind = value.rpartition("=")
        if not column or kind not in PARSERS:
            raise CommandError(
                f"--type {value} must be COLUMN=TYPE, with TYPE one of {', '.join(PARSERS)}"
            )
        types[column] = kind
    return types


def _parse_delimiter(
    context: click.Context, parameter: click.Parameter, value: str | None
) -> str | None:
    named = {"tab": "\t", "\\t": "\t", "comma": ",", "semicolon": ";"}.get(value or "", value)
    if named is not None and len(named) != 1:
        raise CommandError(f"--delimiter must be one character or 'tab', not {value!r}")
    return named


def _parse_input(
    context: click.Context, parameter: click.Parameter, values: tuple[str, ...]
) -> str:
    if len(values) > 1:
        raise CommandError(
            f"INPUT is one argument, but {len(values)} were given ({values[0]}, {values[1]}"
            f"{', ...' if len(values) > 2 else ''}): put quotes around a glob"
        )
    return values[0]


def _parse_output(
    context: click.Context, parameter: click.Parameter, value: str | None
) -> Path | None:
    return None if value in (None, "-") else Path(value)


@click.command(
    "map",
    help=_HELP,
    epilog=_EPILOG,
    short_help="Call a function once for each row or file of an input.",
    context_settings={"max_content_width": 100},
)
@click.argument("function", metavar="FUNCTION")
@click.argument("input", metavar="INPUT", nargs=-1, required=True, callback=_parse_input)
@click.option(
    "-o",
    "--output",
    metavar="PATH",
    callback=_parse_output,
    help="File for the results; without it, they go to standard output.",
)
@click.option(
    "-w",
    "--workers",
    type=click.IntRange(min=1),
    metavar="N",
    help="Number of calls at once; by default one per processor.",
)
@click.option(
    "--ordered",
    "is_ordered",
    is_flag=True,
    help="Write rows in the input's order instead of as they finish.",
)
@click.option(
    "--timeout",
    type=click.FloatRange(min=0, min_open=True),
    metavar="SECONDS",
    help="Stop a call that runs longer than this; its row fails.",
)
@click.option(
    "--retries",
    type=click.IntRange(min=0),
    default=2,
    show_default=True,
    metavar="N",
    help="How often to repeat a call whose worker died. A call that raises is not repeated.",
)
@click.option(
    "--max-failures",
    type=click.IntRange(min=1),
    metavar="N",
    help="Start no more rows when N have failed.",
)
@click.option("--fail-fast", is_flag=True, help="The same as --max-failures 1.")
@click.option(
    "--retry-failed",
    "retries_failed",
    is_flag=True,
    help="Run those rows again that failed in an earlier run.",
)
@click.option(
    "--resume",
    "is_resuming",
    is_flag=True,
    help="Keep the rows that are in --output, even if the code has changed since.",
)
@click.option("--overwrite", "is_overwriting", is_flag=True, help="Run all rows again.")
@click.option(
    "--input-format",
    type=click.Choice(["csv", "jsonl", "files"]),
    help="Format of INPUT, if its name does not tell.",
)
@click.option(
    "--output-format",
    type=click.Choice(["jsonl", "csv"]),
    help="Format of the results; by default CSV into a .csv file, and else JSON Lines.",
)
@click.option(
    "--type",
    "types",
    multiple=True,
    metavar="COLUMN=TYPE",
    callback=_parse_types,
    help="Type of a CSV column: str, int, float, bool, json or path. Can be repeated.",
)
@click.option(
    "--delimiter",
    metavar="CHAR",
    callback=_parse_delimiter,
    help="Character between CSV cells; by default a comma, and a tab in .tsv files.",
)
@click.option(
    "--ignore-extra",
    is_flag=True,
    help="Accept columns for which FUNCTION has no parameter: record them, and do not pass them.",
)
@click.option(
    "--dry-run",
    "is_dry_run",
    is_flag=True,
    help="Check everything, show what would be run, and end.",
)
@click.option("-q", "--quiet", "is_quiet", is_flag=True, help="Show nothing but errors.")
def map_command(fail_fast: bool, max_failures: int | None, **options: object) -> int:
    """Run the job that the command line describes, and return its exit code."""
    from cloudexec.cli._map_job import MapOptions, run_map

    return run_map(
        MapOptions(
            max_failures=1 if fail_fast else max_failures,
            **options,  # type: ignore[arg-type]  # click's names are the fields' names
        )
    )
