"""Shows the steps of set-up and teardown as lines that people can read, on standard error."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any, TypeVar

from cloudexec._errors import CloudexecError, ConfigError
from cloudexec.cli._errors import CommandError, RunError

if TYPE_CHECKING:
    from rich.status import Status

    from cloudexec._aws.steps import Event

__all__ = ["Steps", "run_or_explain"]


_Result = TypeVar("_Result")


def run_or_explain(work: Coroutine[Any, Any, _Result]) -> _Result:
    """Run a coroutine, and turn its exceptions into errors of the command line.

    Raises:
        CommandError: If the settings are wrong: exit code 2.
        RunError: If AWS refuses a request, or cannot be reached: exit code 3.
    """
    try:
        return asyncio.run(work)
    except ConfigError as exc:
        raise CommandError(str(exc)) from exc
    except CloudexecError as exc:
        raise RunError(str(exc)) from exc


class Steps:
    """Prints a line for each finished step, and on a terminal a spinner for the present one."""

    def __init__(self) -> None:
        from rich.console import Console

        self._console = Console(stderr=True, highlight=False)
        self._status: Status | None = None

    def __enter__(self) -> Steps:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._rest()

    def say(self, line: str, style: str = "") -> None:
        """Show a line."""
        self._console.print(line, markup=False, soft_wrap=True, style=style or None)

    def show(self, event: Event) -> None:
        """Show an event of set-up or teardown."""
        from cloudexec._aws.steps import Noted, ResourceChanged, StepFinished, StepStarted

        match event:
            case StepStarted():
                self._start(event.title)
            case StepFinished():
                self._rest()
                found = f": {event.found}" if event.found else ""
                took = f" ({_duration(event.seconds)})" if event.seconds >= 1 else ""
                self.say(f"{event.title}{found}{took}")
            case ResourceChanged():
                self._show_resource(event.resource, event.kind, event.status, event.reason)
            case Noted():
                self.say(f"note: {event.text}", style="yellow")

    def _start(self, title: str) -> None:
        self._rest()
        if self._console.is_terminal:
            from rich.markup import escape

            self._status = self._console.status(escape(f"{title} ..."))
            self._status.start()
        elif " the stack " in title:
            # The stack takes minutes, in which the user would see nothing otherwise.
            self.say(f"{title} ...")

    def _rest(self) -> None:
        if self._status is not None:
            self._status.stop()
            self._status = None

    def _show_resource(self, resource: str, kind: str, status: str, reason: str) -> None:
        is_failure = status.endswith("_FAILED")
        if status.endswith("_IN_PROGRESS") and not is_failure:
            if self._status is not None:
                from rich.markup import escape

                self._status.update(escape(f"{resource} {status} ..."))
            return
        why = f": {reason}" if reason and is_failure else ""
        kind = kind.removeprefix("AWS::")
        self.say(f"  {resource} ({kind}) {status}{why}", style="red" if is_failure else "dim")


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02} s"
