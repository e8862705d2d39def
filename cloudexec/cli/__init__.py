"""The command ``cloudexec``: one module per verb, and private modules that each hold one idea.

Only click is imported here. A verb imports what it needs when it runs, so ``cloudexec --help``
costs neither grpc nor rich.
"""

from __future__ import annotations

import sys

import click

from cloudexec.cli.map import map_command

__all__ = ["main"]

_INTERRUPTED = 130


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="cloudexec", message="%(prog)s %(version)s")
def _group() -> None:
    """Run Python functions on many workers: on this machine or on AWS."""


_group.add_command(map_command)


def main() -> None:
    """Run the command line in ``sys.argv`` and exit with its code."""
    try:
        code: object = _group(prog_name="cloudexec", standalone_mode=False)
    except click.ClickException as exc:
        exc.show()
        code = exc.exit_code
    except (click.Abort, KeyboardInterrupt):
        click.echo("Interrupted.", err=True)
        code = _INTERRUPTED
    sys.exit(code if isinstance(code, int) else 0)
