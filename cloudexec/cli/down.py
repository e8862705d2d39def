"""``cloudexec down``: remove what ``cloudexec up`` has set up, and check that nothing is left."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from cloudexec._aws.remnants import Remnant
    from cloudexec._aws.teardown import Stock

_HELP = """Remove what `cloudexec up` has set up.

The command first says what would be lost, and asks. Then it ends all jobs in the queues, empties
the bucket and the image repository, deregisters job definitions, and deletes the stack and the
profile. At the end it asks AWS for everything that carries the stack's tag.

After an interruption, the same command continues. If there is nothing to remove, it says so.
"""

_EPILOG = """\b
Exit codes:
  0    nothing is left
  1    something is left, and is listed, or you said no to its question
  2    the command line is wrong
  3    AWS refused, or cannot be reached
  130  Ctrl-C interrupted the command; the same command continues
"""


@click.command(
    "down",
    help=_HELP,
    epilog=_EPILOG,
    short_help="Remove what `cloudexec up` has set up.",
    context_settings={"max_content_width": 100},
)
@click.option(
    "--name", default="default", show_default=True, metavar="NAME", help="Name of the profile."
)
@click.option(
    "--region",
    metavar="REGION",
    help="AWS region; by default that of the profile, or else of the AWS SDK.",
)
@click.option("-y", "--yes", "is_sure", is_flag=True, help="Do not ask.")
def down_command(name: str, region: str | None, is_sure: bool) -> int:
    """Say what would be lost, delete it, and list what is left."""
    from cloudexec._aws.clients import AwsClients
    from cloudexec._aws.names import stack_name
    from cloudexec._aws.teardown import down, take_stock
    from cloudexec.cli._errors import INTERRUPTED, CommandError
    from cloudexec.cli._steps import Steps, run_or_explain
    from cloudexec.cli.up import region_of

    async def look() -> tuple[str, list[str]]:
        async with AwsClients(region or region_of(name)) as clients:
            return clients.region, _losses(await take_stock(clients, name))

    async def work(steps: Steps) -> tuple[Remnant, ...]:
        async with AwsClients(region or region_of(name)) as clients:
            return await down(clients, name, steps.show)

    with Steps() as steps:
        if not is_sure:
            # The question is asked outside of the event loop, so that Ctrl-C interrupts it.
            where, losses = run_or_explain(look())
            if losses:
                steps.say(f"The stack {stack_name(name)} in {where} would be deleted, with:")
                for loss in losses:
                    steps.say(f"  {loss}")
                if not sys.stdin.isatty():
                    raise CommandError(
                        "this needs a confirmation, and standard input is no terminal: add --yes"
                    )
                if not click.confirm("Delete all this?", err=True):
                    steps.say("Nothing was deleted.")
                    return 1
        try:
            left = run_or_explain(work(steps))
        except KeyboardInterrupt:
            steps.say(
                "Interrupted. CloudFormation finishes what it has begun. Run the same command "
                "again to continue."
            )
            return INTERRUPTED
        if left:
            steps.say("These still exist, or are not known to be deleted:", style="red")
            for each in left:
                steps.say(f"  {each.kind}: {each.id}", style="red")
            steps.say(
                "Run the same command again. If something is left then, delete it in the AWS "
                "console."
            )
            return 1
        steps.say(f"Nothing of {stack_name(name)} is left.")
    return 0


def _losses(stock: Stock) -> list[str]:
    """Return what would be lost, one line for each kind; empty if there is no stack."""
    from cloudexec._aws.steps import counted

    losses = []
    if stock.jobs:
        losses.append(f"{counted(stock.jobs, 'job')} not finished (an array counts once)")
    if stock.runs:
        names = ", ".join(stock.runs[:10]) + (", ..." if len(stock.runs) > 10 else "")
        losses.append(f"among them {counted(len(stock.runs), 'run')} of `cloudexec run`: {names}")
    if stock.objects:
        more = " or more" if stock.has_more_objects else ""
        losses.append(f"{counted(stock.objects, 'object')}{more} in its bucket")
    if stock.images:
        losses.append(f"{counted(stock.images, 'image')} in its repository")
    if stock.definitions:
        losses.append(counted(stock.definitions, "job definition"))
    if stock.stack is not None:
        losses.append("its queues, roles, logs, and the key of its workers")
    return losses
