"""``cloudexec fetch``: bring back the files of a run."""

from __future__ import annotations

import os
from pathlib import Path

import click

from cloudexec.cli._aws_options import ends_well, profile_option


@click.command("fetch", short_help="Bring back the files of a run.")
@click.argument("run", metavar="RUN")
@click.option(
    "--to",
    "folder",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path(),
    metavar="DIR",
    help="Folder below which they go; by default the current one.",
)
@click.option(
    "--delete",
    "deletes",
    is_flag=True,
    help="Delete what the bucket has of the run then. It must have ended.",
)
@profile_option("Look for the run in this profile.")
@ends_well
def fetch_command(run: str, folder: Path, deletes: bool, profile: str | None) -> int:
    """Bring back the files that a run has written into its outputs, also while it runs.

    They go to the same places below the folder as in the run, and replace files of the same name.
    A file that is there already with the same content is not fetched again.

    With --delete, files that the bucket has lost are named, and the exit code is 3. If a file
    cannot be written here, nothing is deleted.
    """
    from cloudexec._runs.run import RunsClient

    lost: list[str] = []

    def report(text: str) -> None:
        click.echo(text, err=True)
        lost.append(text)

    with RunsClient(profile) as client:
        where = Path(os.path.abspath(folder))
        # What the bucket has lost would keep the rest of the run there for ever.
        files = client.call(client.runs.fetch(run, where, report if deletes else None))
        for each in files:
            click.echo(str(folder / each.path))
        if deletes:
            count = client.call(client.runs.delete(run))
            click.echo(f"deleted {count:,} objects of the run {run}", err=True)
    return 3 if lost else 0
