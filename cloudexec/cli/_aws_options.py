"""What the commands that look into an account share: where to look, and how they end."""

from __future__ import annotations

import functools
import json
import os
import re
import sys
from collections.abc import Callable
from typing import Any, ParamSpec

import click
from click.core import ParameterSource

from cloudexec.cli._errors import CommandError, RunError

_P = ParamSpec("_P")

PROFILE_VARIABLE = "CLOUDEXEC_PROFILE"
_READER_GONE = 141
"""What a shell says of a command that SIGPIPE ended."""
_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*([smhd]?)")
_SECONDS_PER = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def profile_option(
    purpose: str, *, name: str = "profile", default: str | None = None
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Return what adds ``--profile``.

    Args:
        purpose: What a profile is for in this command.
        name: Of the command's parameter.
        default: Profile if none is named.
    """

    def resolve(
        context: click.Context, parameter: click.Parameter, value: str | None
    ) -> str | None:
        from_environment = (
            context.get_parameter_source(str(parameter.name)) is ParameterSource.ENVIRONMENT
        )
        # There, "local" is what sends scripts to this machine: it names no profile.
        return default if from_environment and value in ("", "local") else value

    return click.option(
        "--profile",
        name,
        metavar="NAME",
        envvar=PROFILE_VARIABLE,
        default=default,
        callback=resolve,
        help=f"{purpose}  [env: {PROFILE_VARIABLE}]"
        + (f"  [default: {default}]" if default is not None else ""),
    )


def aws_options_for(profile: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Return what adds ``--profile``, ``--region`` and ``--json``.

    Args:
        profile: What a profile is for in this command.
    """
    options = (
        click.option("--json", "as_json", is_flag=True, help="Write JSON, for programs."),
        click.option(
            "--region",
            metavar="REGION",
            help="AWS region; by default that of the profile, or else of the AWS SDK.",
        ),
        profile_option(profile),
    )

    def add(function: Callable[..., Any]) -> Callable[..., Any]:
        for option in options:
            function = option(function)
        return function

    return add


aws_options = aws_options_for(
    "Look only at the queues of this profile; by default at all queues of the region."
)


def ends_well(function: Callable[_P, int | None]) -> Callable[_P, int]:
    """Turn our errors into a line on standard error, and a reader that left into an exit code."""

    @functools.wraps(function)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> int:
        from cloudexec._errors import CloudexecError, ConfigError

        try:
            code = function(*args, **kwargs)
            sys.stdout.flush()
        except ConfigError as exc:
            raise CommandError(str(exc)) from exc
        except CloudexecError as exc:
            raise RunError(str(exc)) from exc
        except BrokenPipeError:
            # Python flushes standard output once more when it exits, and would complain.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return _READER_GONE
        return code or 0

    return run


def confirmed(question: str) -> bool:
    """Ask on standard error; an answer may come from a pipe.

    Raises:
        CommandError: If nobody is there to answer.
    """
    try:
        return click.confirm(question, err=True)
    except click.Abort as exc:
        if sys.stdin.isatty() or not isinstance(exc.__context__, EOFError):
            raise
        click.echo(err=True)
        raise CommandError("nobody is there to confirm this: say --yes") from None


def echo_json(value: Any) -> None:
    """Print a value as indented JSON."""
    click.echo(json.dumps(value, indent=2))


def parse_duration(
    context: click.Context, parameter: click.Parameter, value: str | None
) -> float | None:
    """Read ``90``, ``90s``, ``30m``, ``2h`` or ``1d`` as seconds."""
    if value is None:
        return None
    found = _DURATION.fullmatch(value.strip())
    if found is None:
        raise CommandError(f"{parameter.opts[0]} must be like 90s, 30m, 2h or 1d, not {value!r}")
    return float(found[1]) * _SECONDS_PER[found[2]]
