"""Errors that end a command with one line on standard error and an exit code."""

from __future__ import annotations

import click

__all__ = ["INTERRUPTED", "CommandError", "RunError"]

INTERRUPTED = 130
"""Exit code of a command that Ctrl-C has interrupted."""


class CommandError(click.ClickException):
    """The command line, the function, the input or the output is wrong: the exit code is 2."""

    exit_code = 2


class RunError(CommandError):
    """AWS refused, or cannot be reached, or a run cannot go on: the exit code is 3."""

    exit_code = 3
