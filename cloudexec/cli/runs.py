"""``cloudexec runs``: list the programs that ``cloudexec run`` has started."""

from __future__ import annotations

import click

from cloudexec._runs.info import RunInfo
from cloudexec.cli._aws_options import echo_json, ends_well, profile_option


@click.command("runs", short_help="Show programs that `cloudexec run` has started.")
@click.option("--active", "is_active", is_flag=True, help="Show only runs that have not ended.")
@click.option(
    "-n",
    "--limit",
    type=click.IntRange(min=0),
    default=50,
    show_default=True,
    metavar="N",
    help="Look at the N newest runs; 0 looks at all.",
)
@click.option("--json", "as_json", is_flag=True, help="Write JSON, for programs.")
@profile_option("Look at the runs of this profile.")
@ends_well
def runs_command(is_active: bool, limit: int, as_json: bool, profile: str | None) -> None:
    """Show programs that `cloudexec run` has started, the newest first.

    The list has all runs in the profile's bucket, whoever started them, on whatever machine. COST
    is the list price of the machine, and of the workers of executors in the run, up to now; "~"
    marks an estimate.
    """
    from cloudexec._runs.run import RunsClient
    from cloudexec.cli._table import Column, duration, show, since, usd

    with RunsClient(profile) as client:
        found = [each.info() for each in client.call(client.runs.all(limit or None))]
    if is_active:
        found = [each for each in found if each.is_active]
    if as_json:
        echo_json([{**each.to_dict(), "cost_usd": each.cost_usd} for each in found])
        return
    if not found:
        click.echo("No runs that have not ended." if is_active else "No runs.")
        return
    show(
        (
            Column(title="RUN"),
            Column(title="STATE"),
            Column(title="EXIT", right=True),
            Column(title="USER", leaves=3, least=8),
            Column(title="ON", leaves=6),
            Column(title="SIZE", leaves=4),
            Column(title="AGE", right=True),
            Column(title="RAN", right=True, leaves=1),
            Column(title="COST", right=True),
            Column(title="COMMAND", leaves=5, least=16, yields=True),
            Column(title="REASON", leaves=2, least=16, yields=True),
        ),
        [
            (
                each.name,
                each.state,
                "" if each.exit_code is None else str(each.exit_code),
                each.user,
                each.on,
                _size(each),
                since(each.created_at),
                duration(each.run_seconds) if each.run_seconds else "",
                usd(each.cost_usd, is_estimate=each.is_estimate),
                each.command,
                each.reason if each.state != "running" else "",
            )
            for each in found
        ],
    )


def _size(run: RunInfo) -> str:
    from cloudexec.cli._table import memory

    gpus = f" {run.gpus} GPU{'s' * (run.gpus != 1)}" if run.gpus else ""
    return f"{run.vcpus:g} vCPU {memory(run.memory_mib)}{gpus}{' Spot' if run.spot else ''}"
