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
def fetch_command(run: str, folder: Path, deletes: bool, profile: str | None) -> None:
    """Bring back the files that a run has written into its outputs, also while it runs.

    They go to the same places below the folder as in the run, and replace files of the same name.
    A file that is there already with the same content is not fetched again.
    """
    from cloudexec._runs.run import RunsClient

    with RunsClient(profile) as client:
        client.call(client.runs.bucket(run).plan())  # complains if there is none
        where = Path(os.path.abspath(folder))
        files = client.call(client.runs.fetch(run, where))
        for each in files:
            click.echo(str(folder / each.path))
        if deletes:
            count = client.call(client.runs.delete(run))
            click.echo(f"deleted {count:,} objects of the run {run}", err=True)
