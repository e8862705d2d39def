"""``cloudexec cost``: what executors cost."""

from __future__ import annotations

import click

from cloudexec.cli._aws_options import aws_options, echo_json, ends_well


@click.command("cost", short_help="Show what executors cost.")
@click.option("-e", "--executor", metavar="ID", help="Show only this executor.")
@click.option(
    "--refresh",
    is_flag=True,
    help="Look up today's list prices first, and keep them. This needs pricing:GetProducts.",
)
@aws_options
@ends_well
def cost_command(
    executor: str | None,
    refresh: bool,
    profile: str | None,
    region: str | None,
    as_json: bool,
) -> None:
    """Show what executors have cost so far. AWS Batch remembers their jobs for 7 days or more,
    Amazon ECS and Amazon EC2 for about an hour. `cloudexec runs` has the cost of a run for longer.

    The costs are the list prices of vCPUs, memory, storage and public addresses while workers ran;
    "~" marks estimates. Downloads of images, logs, data transfer, discounts and taxes are not
    included, so the bill of AWS will differ.
    """
    from cloudexec._aws.monitor import Monitor
    from cloudexec.cli._table import Column, duration, show, since, usd

    with Monitor(profile, region) as monitor:
        report = monitor.cost(executor, refresh=refresh)
    if as_json:
        echo_json(report.to_dict())
        return
    if not report.executors:
        click.echo("No executors.")
    else:
        rows = []
        for each in report.executors:
            rows.append(
                (
                    each.executor,
                    each.user,
                    each.project,
                    since(each.created_at),
                    f"{each.runs:,}",
                    duration(each.run_seconds),
                    f"{each.vcpu_hours:,.2f}",
                    f"{each.gib_hours:,.2f}",
                    usd(each.cost_usd - each.relay_usd, is_estimate=each.is_estimate),
                    usd(each.per_hour_usd, is_estimate=each.is_estimate)
                    if each.per_hour_usd
                    else "",
                )
            )
            if each.relay_seconds:
                ran, cost = duration(each.relay_seconds), usd(each.relay_usd)
                rows.append(("  its relay", "", "", "", "", ran, "", "", cost, ""))
        if len(rows) > 1:
            rows.append(
                (
                    "total",
                    "",
                    "",
                    "",
                    f"{sum(each.runs for each in report.executors):,}",
                    duration(sum(each.run_seconds for each in report.executors)),
                    f"{sum(each.vcpu_hours for each in report.executors):,.2f}",
                    f"{sum(each.gib_hours for each in report.executors):,.2f}",
                    usd(report.cost_usd, is_estimate=report.is_estimate),
                    usd(report.per_hour_usd, is_estimate=report.is_estimate)
                    if report.per_hour_usd
                    else "",
                )
            )
        show(
            (
                Column(title="EXECUTOR"),
                Column(title="USER", least=8),
                Column(title="PROJECT", leaves=2, least=8),
                Column(title="AGE", right=True),
                Column(title="RUNS", right=True),
                Column(title="RAN", right=True),
                Column(title="VCPU-HOURS", right=True, leaves=3),
                Column(title="GIB-HOURS", right=True, leaves=4),
                Column(title="COST", right=True),
                Column(title="PER HOUR", right=True, leaves=1),
            ),
            rows,
        )
    for note in (
        f"{report.prices_region} list prices of {report.prices_dated} ({report.prices_source})",
        *report.notes,
    ):
        click.echo(f"note: {note}", err=True)
