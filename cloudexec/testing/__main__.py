"""``python -m cloudexec.testing``: runs an emulated AWS until Ctrl-C.

It prints the variables with which commands and executors in another shell use it.
"""

from __future__ import annotations

import signal
import sys
from typing import Any

import click

from cloudexec._errors import CloudexecError
from cloudexec.testing import FakeAWS


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--mode",
    type=click.Choice(["process", "container", "auto"]),
    default="process",
    show_default=True,
    help="Whether jobs are processes, or containers of the engine at DOCKER_HOST.",
)
@click.option("--region", default="us-east-1", show_default=True, help="Region for clients.")
@click.option(
    "--capacity",
    type=click.IntRange(min=1),
    default=64,
    show_default=True,
    help="Most jobs that run at once.",
)
@click.option(
    "--registry",
    metavar="HOST:PORT",
    help="A registry on this machine, over plain HTTP, that stands for Amazon ECR.",
)
def main(mode: str, region: str, capacity: int, registry: str | None) -> None:
    """Run an emulated AWS with real workers, to try cloudexec without an AWS account."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        settings: dict[str, Any] = {"mode": mode, "region": region, "registry": registry}
        # Programs of `cloudexec run` talk to AWS themselves.
        with FakeAWS(max_running=capacity, aws_in_jobs=True, **settings) as aws:
            for name, value in aws.environment.items():
                click.echo(f"export {name}={value}")
            click.echo("Running; Ctrl-C ends it, and every job in it.", err=True)
            sys.stdout.flush()
            signal.pause()
    except KeyboardInterrupt:
        pass
    except CloudexecError as exc:
        raise click.ClickException(str(exc)) from exc


if __name__ == "__main__":
    main()
