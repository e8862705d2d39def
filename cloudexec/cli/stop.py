"""``cloudexec stop``: end jobs, including those of other users."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence

import click

from cloudexec._aws.names import user_name
from cloudexec._aws.records import JobInfo
from cloudexec._errors import AwsError, CloudexecError, ConfigError
from cloudexec.cli._aws_options import (
    aws_options,
    confirmed,
    echo_json,
    ends_well,
    parse_duration,
)
from cloudexec.cli._errors import CommandError

_EPILOG = """\b
Exit codes:
  0    all jobs were told to stop, or there were none
  1    you said no
  2    the command line is wrong, or nobody can answer the question
  3    AWS refused to stop some jobs, or cannot be reached
  130  Ctrl-C interrupted the command
"""


@click.command("stop", short_help="Stop jobs and their workers.", epilog=_EPILOG)
@click.argument("targets", metavar="[RUN|JOB|WORKER]...", nargs=-1)
@click.option("-e", "--executor", metavar="ID", help="Stop all jobs of this executor.")
@click.option("--all", "is_all", is_flag=True, help="Stop the jobs of all executors.")
@click.option(
    "--older-than",
    metavar="TIME",
    callback=parse_duration,
    help="Stop only jobs that were submitted at least so long ago: 90s, 30m, 2h, 1d.",
)
@click.option(
    "--expired",
    "is_expired",
    is_flag=True,
    help="Stop only jobs that run past their time limit, which `cloudexec doctor` names.",
)
@click.option("-y", "--yes", "is_sure", is_flag=True, help="Do not ask.")
@aws_options
@ends_well
def stop_command(
    targets: tuple[str, ...],
    executor: str | None,
    is_all: bool,
    older_than: float | None,
    is_expired: bool,
    is_sure: bool,
    profile: str | None,
    region: str | None,
    as_json: bool,
) -> None:
    """Stop jobs, and with them their workers, after showing them.

    RUN is the name of a run of `cloudexec run`: this also stops the workers of executors in the
    run. If the run is still being prepared and has no machine, it never gets one.

    What is stopped receives SIGTERM and has 30 seconds to end, on Fargate without AWS Batch 120,
    and on an EC2 instance of a run 60. Workers on AWS Lambda run on for up to 15 minutes, as
    nothing can end them, but no further ones start. An executor that still runs may start new
    workers elsewhere: end it on its own machine, or stop its jobs again.
    """
    from cloudexec._aws.monitor import Monitor
    from cloudexec.cli.jobs import show_jobs

    is_limited = older_than is not None or is_expired
    if not targets and executor is None and not is_all and not is_limited:
        raise CommandError(
            "say what to stop: a RUN or JOB, --executor ID, --older-than TIME, --expired or --all"
        )
    if is_all and (targets or executor is not None):
        raise CommandError("--all stops everything: give no JOB and no --executor with it")
    unlisted: list[str] = []
    with Monitor(profile, region) as monitor:
        try:
            jobs = monitor.stoppable(
                executor=executor,
                job=targets or None,
                everything=is_all,
                older_than=older_than,
                expired=is_expired,
            )
        except AwsError as exc:
            if exc.code == "NotFound" and region is None and executor is None:
                unlisted = _runs_among(targets, profile)
            if not unlisted or is_limited:
                raise
            others = [each for each in targets if each not in unlisted]
            jobs = monitor.stoppable(job=others) if others else []
        if unlisted and not is_sure and not confirmed(f"Stop {_count(len(unlisted), 'run')}?"):
            _say_nothing_was_stopped()
        if jobs and not is_sure:
            show_jobs(jobs, err=True)
            if not confirmed(_question(jobs)):
                _say_nothing_was_stopped()
        if region is None:
            _note_stops(jobs, profile)
        # Stop exactly the jobs that were shown, and no job that was started since then.
        stopped = (
            monitor.stop(
                job=[job.id for job in jobs],
                reason=_reason(),
            )
            if jobs
            else []
        )
    runs = {job.run for job in jobs if job.id in stopped and job.run}
    if runs and region is None:
        _forget_variables(runs, stopped, profile)
    if unlisted:
        stopped += _stop_runs(unlisted, profile)
    if as_json:
        echo_json({"stopped": stopped})
    elif not stopped:
        click.echo("Nothing to stop: no such job is active.")
    else:
        for job in jobs:
            if job.id in stopped:
                click.echo(f"stopped {_title(job)}")
        for name in unlisted:
            click.echo(f"stopped the run {name}")
        if any(job.compute == "lambda" and job.id in stopped for job in jobs):
            click.echo(
                "No more workers start on AWS Lambda, which has no way to end those that run: they "
                "end with their program, or alone, after 15 minutes at most.",
                err=True,
            )


def _question(jobs: Sequence[JobInfo]) -> str:
    """Ask for the runs and jobs that are to be stopped."""
    runs = [each for each in jobs if each.run]
    others = [each for each in jobs if not each.run]
    count = sum(
        number
        for job in others
        for state, number in job.workers.items()
        if state not in ("SUCCEEDED", "FAILED", "ENDED")
    )
    what = [_count(len(runs), "run")] if runs else []
    if others:
        what.append(f"{_count(len(others), 'job')} with {_count(count, 'worker')}")
    return f"Stop {' and '.join(what)}?"


def _title(job: JobInfo) -> str:
    if job.run:
        return f"the run {job.run}"
    return job.name if job.index is None else job.id


def _say_nothing_was_stopped() -> None:
    click.echo("Nothing was stopped.", err=True)
    click.get_current_context().exit(1)


def _runs_among(names: Iterable[str], profile: str | None) -> list[str]:
    """Return the names of runs that are being prepared, or whose jobs AWS does not list yet."""
    from cloudexec._runs.run import RunsClient

    found = []
    with contextlib.suppress(CloudexecError), RunsClient(profile) as client:
        for name in names:
            with contextlib.suppress(ConfigError):
                run = client.call(client.runs.find(name)).info()
                if run.is_active or run.state == "not started":
                    found.append(name)
    return found


def _stop_runs(names: Sequence[str], profile: str | None) -> list[str]:
    from cloudexec._runs.run import RunsClient

    with RunsClient(profile) as client:
        for name in names:
            client.call(client.runs.stop(name, _reason()))
    return list(names)


def _note_stops(jobs: Sequence[JobInfo], profile: str | None) -> None:
    """Write that no other attempt of runs is to follow, where their machines start them."""
    from cloudexec._aws.instance_search import is_instance_id
    from cloudexec._aws.task_search import is_task_id
    from cloudexec._runs.run import RunsClient

    alone = [each for each in jobs if is_task_id(each.id) or is_instance_id(each.id)]
    runs = [each.run for each in alone if each.run]
    if not runs:
        return
    # Another stack may have a run of that name, whose job is to be stopped. And a machine that is
    # not just now being taken back has no need of this.
    with contextlib.suppress(CloudexecError), RunsClient(profile) as client:
        for name in runs:
            with contextlib.suppress(CloudexecError):
                client.call(client.runs.note_stop(name, [each.id for each in jobs], _reason()))


def _forget_variables(runs: Iterable[str], stopped: Sequence[str], profile: str | None) -> None:
    """Delete the runs' variables from the bucket, as a stopped machine may not get to do that.

    If that fails, the next look at the run does it.
    """
    from cloudexec._runs.run import RunsClient

    with contextlib.suppress(CloudexecError), RunsClient(profile) as client:
        for name in runs:
            # The stopped job may be of a run with this name in another stack.
            with contextlib.suppress(CloudexecError):
                client.call(client.runs.forget_variables(name, stopped))


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _reason() -> str:
    return f"stopped by {user_name()} with `cloudexec stop`"
