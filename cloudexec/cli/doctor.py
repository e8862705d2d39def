"""``cloudexec doctor``: check a set-up, and say how to repair it."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from cloudexec.cli._aws_options import ends_well, profile_option

if TYPE_CHECKING:
    from cloudexec._aws.doctor import Check

_HELP = """Check a set-up: credentials, stack, queues, quotas, image, roles, key, network.

The command starts one worker, which connects to this machine and runs a task, and shows how long
each step took. With --dry, it starts nothing. For each failed check, it says what to do.
"""

_EPILOG = """\b
Exit codes:
  0    nothing failed; there may be warnings
  1    something failed
  2    the command line is wrong
  3    the checks could not be made
  130  Ctrl-C interrupted the command
"""

_STYLES = {"ok": "green", "warning": "yellow", "failed": "red", "skipped": "dim"}


@click.command(
    "doctor",
    help=_HELP,
    epilog=_EPILOG,
    short_help="Check a set-up, and say what to do.",
    context_settings={"max_content_width": 100},
)
@profile_option("Profile of the set-up to check.", name="name", default="default")
@click.option("--dry", "is_dry", is_flag=True, help="Start nothing.")
@click.option(
    "--advertise",
    metavar="HOST[:PORT]",
    default="",
    help="Address that workers dial, as for BatchExecutor.  [env: CLOUDEXEC_ADVERTISE]",
)
@click.option(
    "--listen",
    metavar="HOST:PORT",
    default="",
    help="Address to listen on, if it is another one.  [env: CLOUDEXEC_LISTEN]",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
@click.option(
    "--timeout",
    type=click.FloatRange(min=0, min_open=True),
    default=600,
    show_default=True,
    metavar="SECONDS",
    help="Time in which the worker must connect; the first one may take minutes.",
)
@ends_well
def doctor_command(
    name: str, is_dry: bool, advertise: str, listen: str, as_json: bool, timeout: float
) -> int:
    """Show each check as soon as it is done."""
    from cloudexec._aws.doctor import Check, examine, prevents_probe
    from cloudexec.cli._probe import probe
    from cloudexec.cli._steps import run_or_explain

    def show(check: Check) -> None:
        if not as_json:
            _show(check)

    checks = run_or_explain(examine(name, show, advertise=advertise, listen=listen))
    if is_dry:
        last = Check(name="probe worker", outcome="skipped", found="--dry starts nothing")
    else:
        if not as_json and not prevents_probe(checks):
            click.echo("starting a probe worker, which may take minutes ...", err=True)
        last = probe(name, checks, timeout=timeout, advertise=advertise, listen=listen)
    show(last)
    checks = (*checks, last)
    failed = [each for each in checks if each.outcome == "failed"]
    if as_json:
        document = {
            "profile": name,
            "ok": not failed,
            "checks": [asdict(each) for each in checks],
        }
        click.echo(json.dumps(document, indent=2))
    elif failed:
        click.echo(f"{len(failed)} of {len(checks)} checks failed.")
    return 1 if failed else 0


def _show(check: Check) -> None:
    from rich.console import Console

    console = Console(highlight=False)
    # Printed by click: rich would end the program itself if the reading program has ended.
    with console.capture() as capture:
        console.print(f"{check.outcome:<8}", style=_STYLES[check.outcome], end="")
        console.print(f"{check.name}: {check.found}", markup=False, soft_wrap=True)
        if check.remedy:
            console.print(f"        -> {check.remedy}", markup=False, soft_wrap=True)
    click.echo(capture.get(), nl=False)
