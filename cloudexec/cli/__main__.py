"""``python -m cloudexec.cli`` is the command ``cloudexec``."""

from cloudexec.cli import program

program()
