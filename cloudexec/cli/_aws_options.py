"""Options, errors and exit codes that the commands for an AWS account have in common."""

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
"""The exit code that a shell gives a command that SIGPIPE ended: 128 plus the signal's number."""
_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*([smhd]?)")
_SECONDS_PER = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def profile_option(
    purpose: str, *, name: str = "profile", default: str | None = None
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Return a decorator that adds ``--profile`` to a command.

    Args:
        purpose: The option's help text: what the command uses the profile for.
        name: The name of the command's parameter.
        default: The profile if the user names none.
    """

    def resolve(
        context: click.Context, parameter: click.Parameter, value: str | None
    ) -> str | None:
        from_environment = (
            context.get_parameter_source(str(parameter.name)) is ParameterSource.ENVIRONMENT
        )
        # The value "local" in the variable makes scripts run on this machine. It is no profile.
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
    """Return a decorator that adds ``--profile``, ``--region`` and ``--json`` to a command.

    Args:
        profile: The help text of ``--profile``.
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
    """Wrap a command, so that an error of cloudexec becomes one line on standard error.

    If the program that reads standard output has ended, the exit code is 141, without a message.
    """

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
            # Python flushes standard output again when it exits, which would print an error.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return _READER_GONE
        return code or 0

    return run


def confirmed(question: str) -> bool:
    """Ask a question on standard error, and read the answer from standard input.

    Raises:
        CommandError: If standard input ends without an answer, and is no terminal.
    """
    try:
        return click.confirm(question, err=True)
    except click.Abort as exc:
        if sys.stdin.isatty() or not isinstance(exc.__context__, EOFError):
            raise
        click.echo(err=True)
        raise CommandError(
            "this needs a confirmation, and standard input is empty: add --yes"
        ) from None


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
