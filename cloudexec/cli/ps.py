"""``cloudexec ps``: executors that have workers in the cloud."""

from __future__ import annotations

import click

from cloudexec._aws.records import ExecutorInfo
from cloudexec.cli._aws_options import aws_options, echo_json, ends_well


@click.command("ps", short_help="Show executors that have workers in the cloud.")
@click.option(
    "-a", "--all", "is_all", is_flag=True, help="Show also executors whose jobs have ended."
)
@aws_options
@ends_well
def ps_command(is_all: bool, profile: str | None, region: str | None, as_json: bool) -> None:
    """Show executors that have workers in the cloud, whoever started them, and on which machine.

    COST is what their workers and relays have cost so far, by list prices; "~" marks an estimate.
    EXPIRES is the time after which the last of them has reached its time limit.
    """
    from cloudexec._aws.monitor import Monitor
    from cloudexec.cli._table import Column, memory, show, since, until, usd

    with Monitor(profile, region) as monitor:
        executors = monitor.executors(active=None if is_all else True)
    if as_json:
        echo_json([each.to_dict() for each in executors])
        return
    if not executors:
        click.echo("No executors." if is_all else "No executor has jobs that have not ended.")
        return
    show(
        (
            Column(title="EXECUTOR"),
            Column(title="USER", least=8),
            Column(title="PROJECT", leaves=6, least=8),
            Column(title="AGE", right=True),
            Column(title="WORKERS", least=12),
            Column(title="VCPUS", right=True, leaves=1),
            Column(title="MEMORY", right=True, leaves=4),
            Column(title="COST", right=True),
            Column(title="PER HOUR", right=True, leaves=2),
            Column(title="EXPIRES", right=True, leaves=5),
        ),
        [
            (
                each.id,
                each.user,
                each.project,
                since(each.created_at),
                _counts(each),
                f"{each.vcpus:,g}" if each.vcpus else "",
                memory(each.memory_mib) if each.memory_mib else "",
                usd(each.cost_usd, is_estimate=each.is_estimate),
                usd(each.per_hour_usd, is_estimate=each.is_estimate) if each.per_hour_usd else "",
                until(each.expires_at) if each.is_active else "",
            )
            for each in executors
        ],
    )
    for each in executors:
        if each.is_active and each.expires_at and until(each.expires_at) == "over":
            click.echo(
                f"Workers of {each.id} run past their time limit: "
                f"`cloudexec stop --expired` ends them.",
                err=True,
            )
        if each.is_active and each.without_client:
            count = each.without_client
            click.echo(
                f"{count} worker{'' if count == 1 else 's'} of {each.id} could not reach the "
                f"program. If it has ended, `cloudexec stop --executor {each.id}` ends the workers "
                f"that still wait.",
                err=True,
            )


def _counts(executor: ExecutorInfo) -> str:
    """Say how many workers are in which state, and how many relays there are."""
    from cloudexec.cli._table import workers

    count = executor.relays
    relays = f"{count} relay{'' if count == 1 else 's'}" if count else ""
    return ", ".join(filter(None, (workers(dict(executor.workers)), relays)))
