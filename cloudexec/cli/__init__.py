"""The command ``cloudexec``: one module for each verb, and private modules that the verbs share.

``_map_job`` and the modules that it imports implement ``cloudexec map``. ``_aws_options`` has the
options, the errors and the exit codes that the commands for AWS have in common, ``_steps`` and
``_table`` show progress and tables. Only click is imported here: a verb imports other packages when
it runs, so that ``cloudexec --help`` need not import grpc or rich.
"""

from __future__ import annotations

import gc
import sys

import click

from cloudexec.cli._errors import INTERRUPTED
from cloudexec.cli.attach import attach_command
from cloudexec.cli.cost import cost_command
from cloudexec.cli.definitions import definitions_command
from cloudexec.cli.doctor import doctor_command
from cloudexec.cli.down import down_command
from cloudexec.cli.fetch import fetch_command
from cloudexec.cli.image import image_command
from cloudexec.cli.jobs import jobs_command
from cloudexec.cli.logs import logs_command
from cloudexec.cli.map import map_command
from cloudexec.cli.policy import policy_command
from cloudexec.cli.ps import ps_command
from cloudexec.cli.relay import relay_command
from cloudexec.cli.run import run_command
from cloudexec.cli.runs import runs_command
from cloudexec.cli.stop import stop_command
from cloudexec.cli.template import template_command
from cloudexec.cli.up import up_command

__all__ = ["main", "program"]

_COLLECT_AFTER = 50_000
"""Objects that Python creates between two garbage collections. With its default of 700, collections
take a sixth of the processor time of a command that imports the AWS SDK, and find nothing."""

_USUAL_EXIT_CODES = """\b
Exit codes:
  0    the command has done what it was asked for
  2    the command line, the profile or the AWS configuration is wrong
  3    AWS refused, or cannot be reached, or the command could not go on
  130  Ctrl-C interrupted the command
  141  the program that read standard output stopped reading
"""
"""The exit codes in the help of a command that does not list its own."""


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="cloudexec", message="%(prog)s %(version)s")
def _group() -> None:
    """Run Python functions on many workers: on this machine or on AWS."""


for _command in (
    attach_command,
    cost_command,
    definitions_command,
    doctor_command,
    down_command,
    fetch_command,
    image_command,
    jobs_command,
    logs_command,
    map_command,
    policy_command,
    ps_command,
    relay_command,
    run_command,
    runs_command,
    stop_command,
    template_command,
    up_command,
):
    _group.add_command(_command)


def _list_exit_codes(command: click.Command) -> None:
    """Add the exit codes to the help of each command."""
    if isinstance(command, click.Group):
        for each in command.commands.values():
            _list_exit_codes(each)
    elif "Exit codes:" not in (command.epilog or ""):
        command.epilog = "\n\n".join(filter(None, (command.epilog, _USUAL_EXIT_CODES)))


_list_exit_codes(_group)


def main() -> None:
    """Run the command line in ``sys.argv`` and exit with its code."""
    try:
        code: object = _group(prog_name="cloudexec", standalone_mode=False)
    except click.ClickException as exc:
        exc.show()
        code = exc.exit_code
    except (click.Abort, KeyboardInterrupt):
        click.echo("Interrupted.", err=True)
        code = INTERRUPTED
    sys.exit(code if isinstance(code, int) else 0)


def program() -> None:
    """Run the command line as the main program of a process."""
    gc.set_threshold(_COLLECT_AFTER)
    main()
