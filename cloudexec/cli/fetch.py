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
    help="Folder below which the files go; by default the current one.",
)
@click.option(
    "--delete",
    "deletes",
    is_flag=True,
    help="Then delete everything that the bucket has of the run, which must have ended.",
)
@profile_option("Look for the run in this profile.")
@ends_well
def fetch_command(run: str, folder: Path, deletes: bool, profile: str | None) -> int:
    """Bring back the files that a run has written into its outputs, even while it runs.

    The files go to the same places below the folder as in the run, and replace files of the same
    name. If a file exists with the same content, it is not fetched again.

    With --delete, the command names files that the bucket has lost, and then has exit code 3. If a
    file cannot be written here, nothing is deleted.
    """
    from cloudexec._runs.run import RunsClient

    lost: list[str] = []

    def report(text: str) -> None:
        click.echo(text, err=True)
        lost.append(text)

    with RunsClient(profile) as client:
        where = Path(os.path.abspath(folder))
        # With --delete, lost files are only reported: otherwise the run could never be deleted.
        files = client.call(client.runs.fetch(run, where, report if deletes else None))
        for each in files:
            click.echo(str(folder / each.path))
        if not files and not lost:
            click.echo(client.call(client.runs.why_no_files(run)), err=True)
        if deletes:
            count = client.call(client.runs.delete(run))
            click.echo(f"deleted {count:,} objects of the run {run}", err=True)
    return 3 if lost else 0
