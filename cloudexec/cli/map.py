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
  'in/*.png'   a quoted glob: one call per file, its path the only argument
  -            JSON Lines from standard input, run as they arrive

RESULTS are written as calls finish, one line of JSON (or CSV) per row: "row" (its number, from
1), "input", "value" or else "error" (with "type", "message" and "traceback"), "seconds", "worker",
"attempts" and "function". What JSON does not know is written as what comes closest; where only
repr() would do, "value_has_repr" says so. In CSV, the parts of inputs and of dicts that FUNCTION
returns have columns of their own, such as input.NAME and value.KEY.

RESUMING: after an interruption or a crash, the same command goes on where it stopped. Rows that
are in the output are not run again, failed ones only with --retry-failed. An output of another
function or other input is refused. So is one that other code made: OUTPUT.program notes that
(the modules that FUNCTION needs, the versions of packages and Python). --resume keeps its rows
all the same, --retry-failed those that succeeded, and --overwrite none.
Workers on AWS outlive a command that was killed by two minutes, in which the same command takes
them over, with all that they have done (OUTPUT.journal is for that, and goes when all is done).

TYPES: a CSV column has one type in all rows. It is what --type says, else the parameter's
annotation (str, int, float, bool, list, dict, Path), else int, float or bool if all its cells are
that, else str. Numbers with a leading zero or plus sign stay str. An empty cell leaves the
argument to its default; without a default, it is None, or '' in a str column. A file's path is a
str, or a pathlib.Path where the parameter is annotated so.
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
  2    the command line, the function, the input or the output is wrong: nothing
       was run (only a stream's rows before a malformed one were)
  3    the run could not go on: no worker could be started, or the disk is full
  130  interrupted by Ctrl-C (143 by SIGTERM): the same command goes on from there
  141  whoever read standard output stopped reading
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
    help="Where results go; standard output if absent.",
)
@click.option(
    "-w",
    "--workers",
    type=click.IntRange(min=1),
    metavar="N",
    help="Calls at once; by default one per processor.",
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
    help="Stop a call that runs longer; its row fails.",
)
@click.option(
    "--retries",
    type=click.IntRange(min=0),
    default=2,
    show_default=True,
    metavar="N",
    help="Times to call again for a row whose worker died. A call that raises is not repeated.",
)
@click.option(
    "--max-failures",
    type=click.IntRange(min=1),
    metavar="N",
    help="Start no more rows once N have failed.",
)
@click.option("--fail-fast", is_flag=True, help="The same as --max-failures 1.")
@click.option(
    "--retry-failed",
    "retries_failed",
    is_flag=True,
    help="Run rows again that failed in an earlier run.",
)
@click.option(
    "--resume",
    "is_resuming",
    is_flag=True,
    help="Go on with what is in --output, even if the code has changed since.",
)
@click.option("--overwrite", "is_overwriting", is_flag=True, help="Start anew instead of resuming.")
@click.option(
    "--input-format",
    type=click.Choice(["csv", "jsonl", "files"]),
    help="What INPUT is, where its name does not tell.",
)
@click.option(
    "--output-format",
    type=click.Choice(["jsonl", "csv"]),
    help="How results are written; by default CSV into .csv, else JSON Lines.",
)
@click.option(
    "--type",
    "types",
    multiple=True,
    metavar="COLUMN=TYPE",
    callback=_parse_types,
    help="A CSV column's type: str, int, float, bool, json or path. Repeatable.",
)
@click.option(
    "--delimiter",
    metavar="CHAR",
    callback=_parse_delimiter,
    help="What separates CSV cells; by default a comma, in .tsv a tab.",
)
@click.option(
    "--ignore-extra",
    is_flag=True,
    help="Record columns that FUNCTION has no parameter for, without passing them.",
)
@click.option(
    "--dry-run",
    "is_dry_run",
    is_flag=True,
    help="Check everything, say what would be run, and stop.",
)
@click.option("-q", "--quiet", "is_quiet", is_flag=True, help="Show nothing but errors.")
def map_command(fail_fast: bool, max_failures: int | None, **options: object) -> int:
    """Hand what the command line says to the job, and return its exit code."""
    from cloudexec.cli._map_job import MapOptions, run_map

    return run_map(
        MapOptions(
            max_failures=1 if fail_fast else max_failures,
            **options,  # type: ignore[arg-type]  # click's names are the fields' names
        )
    )
