"""``cloudexec attach``: follow a run that was started before."""

from __future__ import annotations

from pathlib import Path

import click

from cloudexec.cli._aws_options import ends_well, profile_option

_EPILOG = """\b
Exit codes:
  0      the program succeeded
  1-255  its own exit code; 128 + N if signal N ended it
  2      the command line or the profile is wrong, or there is no such run
  3      AWS refused, or cannot be reached, or the machine was lost
  122    the program succeeded, and files that it has written did not come back
  125    the machine could not start the program
  130    Ctrl-C interrupted the command: the program was stopped, or left running
"""


@click.command("attach", short_help="Follow a run that was started before.", epilog=_EPILOG)
@click.argument("run", metavar="RUN")
@click.option(
    "--log-file",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Write the program's output to a file, too.",
)
@click.option("--no-fetch", is_flag=True, help="Leave the run's files in the bucket.")
@click.option("-q", "--quiet", "is_quiet", is_flag=True, help="Show only what the program prints.")
@profile_option("Look for the run in this profile.")
@ends_well
def attach_command(
    run: str, log_file: Path | None, no_fetch: bool, is_quiet: bool, profile: str | None
) -> int:
    """Show the output of a program that `cloudexec run` has started, from its first line on.

    When the program has ended, its files come back to the same places below the current folder. Any
    number of commands, on any number of machines, may follow the same run.
    """
    from cloudexec._runs.run import RunsClient
    from cloudexec.cli._following import Follower, opened_log

    def report(line: str) -> None:
        if not is_quiet:
            click.echo(line, err=True)

    with opened_log(log_file) as log, RunsClient(profile) as client:
        folder = None if no_fetch else Path()
        return Follower(client, run, report, log=log, folder=folder).follow()
