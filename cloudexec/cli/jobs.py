"""``cloudexec jobs``: the jobs of executors, and how they ended."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from cloudexec.cli._aws_options import aws_options, echo_json, ends_well

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cloudexec._aws.records import JobInfo

_STATES = ("SUBMITTED", "PENDING", "RUNNABLE", "STARTING", "RUNNING", "SUCCEEDED", "FAILED")


@click.command("jobs", short_help="Show the jobs of workers, and how they ended.")
@click.option(
    "-s",
    "--state",
    "states",
    type=click.Choice(_STATES, case_sensitive=False),
    multiple=True,
    help="Show only jobs in this state. Can be repeated.",
)
@click.option("--active", "active", flag_value="yes", help="Show only jobs that have not ended.")
@click.option("--inactive", "active", flag_value="no", help="Show only jobs that have ended.")
@click.option("-e", "--executor", metavar="ID", help="Show only jobs of this executor.")
@click.option("-w", "--workers", "each_worker", is_flag=True, help="Show each worker of arrays.")
@click.option(
    "-n",
    "--limit",
    type=click.IntRange(min=0),
    default=50,
    show_default=True,
    metavar="N",
    help="Show the N newest jobs; 0 shows all.",
)
@aws_options
@ends_well
def jobs_command(
    states: tuple[str, ...],
    active: str | None,
    executor: str | None,
    each_worker: bool,
    limit: int,
    profile: str | None,
    region: str | None,
    as_json: bool,
) -> None:
    """Show the jobs of workers, the newest first.

    A job is one worker, or an array of many. AWS Batch remembers its jobs for 7 days or more.
    Tasks of Amazon ECS and instances of Amazon EC2 are listed for about an hour after their end,
    and workers on AWS Lambda for a day. AGE counts from when it was submitted, and WORKER TIME
    adds up how long each of its workers has run. A worker that was told to end, because its
    executor did not need it any more, has `ended`: AWS Batch itself calls it failed.

    `cloudexec logs` and `cloudexec stop` accept what the column JOB shows, or the job's ID.
    """
    from cloudexec._aws.monitor import Monitor

    with Monitor(profile, region) as monitor:
        jobs = monitor.jobs(
            states or None,
            active=None if active is None else active == "yes",
            executor=executor,
            each_worker=each_worker,
            limit=limit or None,
        )
    if as_json:
        echo_json([each.to_dict() for each in jobs])
    elif jobs:
        show_jobs(jobs)
    else:
        click.echo("No jobs.")


def show_jobs(jobs: Sequence[JobInfo], *, err: bool = False) -> None:
    """Print a table of jobs."""
    from cloudexec.cli._table import Column, duration, memory, show, since, usd, workers

    show(
        (
            Column(title="JOB"),
            Column(title="WORKER", leaves=8),
            Column(title="STATE", least=10),
            Column(title="USER", leaves=5, least=8),
            Column(title="SIZE", leaves=4),
            Column(title="QUEUE", leaves=6, least=12),
            Column(title="AGE", right=True),
            Column(title="WORKER TIME", right=True, leaves=2),
            Column(title="EXIT", right=True, leaves=1),
            Column(title="COST", right=True),
            Column(title="ID", leaves=7),
            Column(title="REASON", leaves=3, least=24, yields=True),
        ),
        [
            (
                each.name if each.index is None else f"{each.name}:{each.index}",
                f"worker-{each.first_worker}"
                if each.size == 1 and each.first_worker is not None
                else "",
                workers(dict(each.workers)) if each.size > 1 else next(iter(each.workers)).lower(),
                each.user,
                # Amazon EC2 does not say how much memory an instance has.
                f"{each.vcpus:g} vCPU {memory(each.memory_mib) if each.memory_mib else ''}".strip(),
                each.queue,
                since(each.created_at),
                duration(each.run_seconds) if each.run_seconds else "",
                "" if each.exit_code is None else str(each.exit_code),
                usd(each.cost_usd, is_estimate=each.is_estimate),
                each.id,
                each.reason,
            )
            for each in jobs
        ],
        err=err,
    )
