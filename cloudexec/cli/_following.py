"""Follows a run: shows the program's output, asks on Ctrl-C, and brings the run's files back."""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import IO, Any, TypeVar

import click

from cloudexec._aws.names import user_name
from cloudexec._aws.steps import counted
from cloudexec._errors import AwsError, CloudexecError, ConfigError
from cloudexec._runs.places import MachineState
from cloudexec._runs.protocol import EXIT_FILES_LOST
from cloudexec._runs.run import RunsClient, looks, patiently
from cloudexec.cli._errors import INTERRUPTED, CommandError, RunError
from cloudexec.cli._table import duration, usd

__all__ = ["Follower", "opened_log"]

_T = TypeVar("_T")
_WHY_AFTER = 60
"""Number of looks, about one per second, between two questions to AWS why a machine is missing."""


@contextlib.contextmanager
def opened_log(path: Path | None) -> Iterator[IO[str] | None]:
    """Open a file for the program's output; ``None``: no file is wanted.

    Raises:
        CommandError: If the file cannot be written.
    """
    if path is None:
        yield None
        return
    try:
        log = path.open("w", encoding="utf-8")
    except OSError as exc:
        raise CommandError(f"{path} cannot be written: {exc.strerror}") from exc
    try:
        yield log
    finally:
        with contextlib.suppress(OSError):  # errors were raised when each line was written
            log.close()


class Follower:
    """Follows one run to its end.

    Args:
        client: Makes the calls to AWS.
        name: Name of the run.
        report: Called with each line about the run itself.
        log: Gets a copy of the program's output.
        folder: Folder for the run's files; ``None``: they stay in the bucket.
    """

    def __init__(
        self,
        client: RunsClient,
        name: str,
        report: Callable[[str], None],
        *,
        log: IO[str] | None = None,
        folder: Path | None = Path(),
    ) -> None:
        self._client = client
        self._name = name
        self._report = report
        self._log = log
        self._folder = folder
        self._interrupted = False
        # A signal handler may put into such a queue. Into an event it may not: it waits for ever
        # for the event's lock if it interrupts the code that holds it.
        self._wake: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._phase = ""
        self._attempts = 0
        self._looks = 0

    def follow(self) -> int:
        """Show the program's output until it ends, and return the command's exit code.

        Raises:
            AwsError: If AWS refuses, or cannot be reached.
            RunError: If the machine was lost before it could report the program's exit code.
        """
        log = self._log
        with self._saying_that_it_goes_on(), self._asking_on_interrupt():
            for look in looks(self._client, self._name, self._pause, self._say_that_it_waits):
                self._tell(look.machine)
                for line in look.lines:
                    click.echo(line)
                    if log is not None:
                        _write(log, line)
                sys.stdout.flush()
                if self._interrupted and (code := self._ask()) is not None:
                    return code
        return self._finish()

    @contextlib.contextmanager
    def _saying_that_it_goes_on(self) -> Iterator[None]:
        """Tell the user that the run goes on, if an error ends this command before the run."""
        try:
            yield
        except BaseException as exc:
            # After a ConfigError, there is no such run.
            if self._phase != "ended" and not isinstance(exc, ConfigError):
                with contextlib.suppress(OSError):  # writing to standard error may have failed
                    self._say_how_to_go_on("The run goes on.")
            raise

    def _say_that_it_waits(self, exc: AwsError) -> None:
        self._report(f"{self._name}: {exc}; trying again")

    def _patiently(self, ask: Callable[[], Coroutine[Any, Any, _T]]) -> _T:
        """Make a call after the run's end, and repeat it if it fails. Ctrl-C interrupts at once."""
        return patiently(self._client, ask, time.sleep, self._say_that_it_waits)

    def _pause(self, seconds: float) -> None:
        if not self._interrupted:
            with contextlib.suppress(queue.Empty):
                self._wake.get(timeout=seconds)
        if self._interrupted and not self._phase:
            raise KeyboardInterrupt  # the run has no machine yet, so there is nothing to ask

    # Ctrl-C.

    @contextlib.contextmanager
    def _asking_on_interrupt(self) -> Iterator[None]:
        """Note Ctrl-C instead of interrupting a request. A second Ctrl-C interrupts it."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def note(number: int, frame: FrameType | None) -> None:
            if self._interrupted:
                raise KeyboardInterrupt
            self._interrupted = True
            self._wake.put(None)

        before = signal.signal(signal.SIGINT, note)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def _ask(self) -> int | None:
        """Ask the user what to do with the run; return the exit code, or ``None`` to go on."""
        if sys.stdin is None or sys.stdin.closed or not sys.stdin.isatty():
            # In a script, nobody can answer. The run is stopped, so that it costs no more money.
            return self._stop()
        click.echo(err=True)
        question = "Stop the run (s), leave it running (l), or go on watching it (Enter)?"
        answer = click.prompt(question, default="", show_default=False, err=True)
        self._interrupted = False
        match answer.strip().lower()[:1]:
            case "s":
                return self._stop()
            case "l":
                self._say_how_to_go_on("The run goes on.")
                return INTERRUPTED
            case _:
                click.echo("Going on.", err=True)
                return None

    def _stop(self) -> int:
        reason = f"stopped by {user_name()} with Ctrl-C"
        self._client.call(self._client.runs.stop(self._name, reason))
        self._say_how_to_go_on("The run was told to stop.", has_ended=True)
        return INTERRUPTED

    def _say_how_to_go_on(self, text: str, *, has_ended: bool = False) -> None:
        name = self._name
        ways = f"`cloudexec fetch {name}` brings its files"
        if not has_ended:
            ways = f"`cloudexec attach {name}` shows it again, `cloudexec stop {name}` ends it"
        click.echo(f"{text} {ways}.", err=True)

    # Reports on the machine.

    def _tell(self, machine: MachineState) -> None:
        """Report changes of the machine's state."""
        name = self._name
        if machine.attempts > self._attempts and machine.phase != "ended":
            self._report(f"{name}: attempt {machine.attempts} was lost; it is started again")
        if machine.phase != self._phase and machine.phase != "ended":
            words = {
                "waiting": "waits for a machine",
                "starting": "has a machine, which loads the image",
                "running": "runs",
            }
            self._report(f"{name}: {words[machine.phase]}")
            self._looks = 0
        self._looks += 1
        if machine.phase == "waiting" and self._looks % _WHY_AFTER == 0:
            with contextlib.suppress(AwsError):  # the question is repeated later
                found = self._client.call(self._client.runs.find(name))
                if why := self._client.call(self._client.runs.why(found)):
                    self._report(f"{name}: still waits: {why}")
        self._phase, self._attempts = machine.phase, machine.attempts

    # The end.

    def _finish(self) -> int:
        runs = self._client.runs
        found = self._patiently(lambda: runs.find(self._name))
        unsettled = self._client.call(self._client.runs.settle(found))
        info = found.info()
        failure = self._fetch(info.outputs)
        ended = "" if info.exit_code is None else f" with exit code {info.exit_code}"
        workers = f", and {usd(info.workers_usd, is_estimate=True)} for workers"
        self._report(
            f"{self._name}: {info.state}{ended} after {duration(info.run_seconds)}, "
            f"{usd(info.machine_usd, is_estimate=info.is_estimate)} by list price"
            f"{workers if info.workers_usd else ''}"
        )
        why = info.reason
        if info.exit_code != 0:
            why = self._patiently(lambda: runs.why(found))
        if unsettled:
            click.echo(f"{self._name}: {unsettled}", err=True)
        if failure:
            # The user must learn this even with --quiet, and whatever the exit code is.
            click.echo(f"{self._name}: {failure}", err=True)
        if info.exit_code is None:
            raise RunError(f"the run {self._name} has no exit code: {why}")
        if why:
            self._report(f"{self._name}: {why}")
        return EXIT_FILES_LOST if failure and info.exit_code == 0 else info.exit_code

    def _fetch(self, outputs: Sequence[str]) -> str:
        """Bring the files back, and return the reason if that failed."""
        if self._folder is None or not outputs:
            return ""
        where = Path(os.path.abspath(self._folder))
        try:
            files = self._patiently(lambda: self._client.runs.fetch(self._name, where))
        except (CloudexecError, OSError) as exc:
            return (
                f"its files did not come back: {exc}. `cloudexec fetch {self._name} --to DIR` "
                f"brings them into another folder"
            )
        size = sum(each.size for each in files)
        self._report(
            f"{counted(len(files), 'file')}, {size / 1e6:,.1f} MB, in {', '.join(outputs)}"
        )
        return ""


def _write(log: IO[str], line: str) -> None:
    try:
        print(line, file=log, flush=True)
    except OSError as exc:
        raise RunError(f"{log.name} cannot be written: {exc.strerror}") from exc
