"""``cloudexec logs``: print the log of a worker."""

from __future__ import annotations

import json
from collections.abc import Sequence

import click

from cloudexec._aws.names import JOB_PREFIX
from cloudexec._errors import CloudexecError
from cloudexec.cli._aws_options import aws_options, ends_well

_NONE: Sequence[tuple[int, str]] = ()


@click.command("logs", short_help="Print the log of a worker.")
@click.argument("job", metavar="RUN|JOB|WORKER")
@click.option(
    "-f", "--follow", is_flag=True, help="Wait for further lines until the job has ended."
)
@click.option(
    "-n",
    "--tail",
    type=click.IntRange(min=0, max=10_000),
    metavar="N",
    help="Begin with the last N lines of the last attempt.",
)
@click.option("-t", "--timestamps", is_flag=True, help="Begin each line with its time, in UTC.")
@aws_options
@ends_well
def logs_command(
    job: str,
    follow: bool,
    tail: int | None,
    timestamps: bool,
    profile: str | None,
    region: str | None,
    as_json: bool,
) -> None:
    """Print the log of a worker from CloudWatch Logs: how it started, and why it ended.

    The output of tasks is not in the log: it goes to the program that submitted them. The log of a
    run is the output of its program.

    \b
    RUN|JOB|WORKER is one of
      a run's name                train-kvxqz
      a job's name or id          cloudexec-0f3a7c9912ab44de-1
      a worker of an array        cloudexec-0f3a7c9912ab44de-1:7, ID:7
      a worker as errors name it  worker-8, or 0f3a7c9912ab44de/worker-8

    For an array of up to 100 workers, the logs of all are printed, one after the other. With
    --json, each line is an object.
    """
    from cloudexec._aws.monitor import Monitor

    where, log_group, streams = profile, "", _NONE
    if region is None and not job.startswith(JOB_PREFIX):
        where, log_group, streams = _attempts_of(job, profile)
    with Monitor(where, region) as monitor:
        shown: tuple[str, int] | None = None
        if streams:
            lines = monitor.logs_of_attempts(log_group, streams, follow=follow, tail=tail)
        else:
            lines = monitor.logs(job, follow=follow, tail=tail)
        for line in lines:
            if as_json:
                click.echo(json.dumps(line.to_dict()))
                continue
            source = (line.job_id, line.attempt)
            if shown is not None and source != shown:
                click.echo(f"--- {line.job_id}, attempt {line.attempt} ---", err=True)
            shown = source
            when = f"{line.time:%Y-%m-%dT%H:%M:%S}.{line.time.microsecond // 1000:03}Z "
            click.echo((when if timestamps else "") + line.message)


def _attempts_of(
    name: str, profile: str | None
) -> tuple[str | None, str, Sequence[tuple[int, str]]]:
    """Return the profile, the log group and the log streams of a run without AWS Batch.

    Amazon ECS and Amazon EC2 forget its attempts an hour after their end, and the bucket does not.
    """
    from cloudexec._runs.run import RunsClient

    try:
        with RunsClient(profile) as client:
            log_group, streams = client.call(client.runs.streams(name))
            if streams:
                return client.profile.name, log_group, streams
    except CloudexecError:
        pass  # it is no run of this profile
    return profile, "", _NONE
