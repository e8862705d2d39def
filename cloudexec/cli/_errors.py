"""Errors that end a command with one line on standard error and an exit code."""

from __future__ import annotations

import click


class CommandError(click.ClickException):
    """What the user gave cannot be run: the message names it, the exit code is 2."""

    exit_code = 2


class RunError(CommandError):
    """AWS refused, or cannot be reached, or a run cannot go on: the exit code is 3."""

    exit_code = 3
