"""Runs ``cloudexec map``: checks everything, runs the remaining rows, and reports the outcome."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from cloudexec._journal.program import Manifest, Program
from cloudexec.cli import _map_journal, _map_program
from cloudexec.cli._csv_output import CsvFormat
from cloudexec.cli._errors import CommandError, RunError
from cloudexec.cli._function import Target, load_function
from cloudexec.cli._inputs import open_source
from cloudexec.cli._jsonl_output import JsonLinesFormat
from cloudexec.cli._outcomes import launch_failure, to_record
from cloudexec.cli._output_file import OutputFile, ReaderGoneError, StreamOutput, is_stream
from cloudexec.cli._parameters import Parameters, read_parameters
from cloudexec.cli._recorder import Recorder
from cloudexec.cli._records import Format
from cloudexec.cli._report import Earlier, Report, ReportHandler
from cloudexec.cli._resume import (
    Ledger,
    drop_failed,
    empty_ledger,
    put_in_order,
    read_ledger,
    repair,
)
from cloudexec.cli._row_run import RowRun, SignalInterrupt
from cloudexec.cli._rows import Row, Source

_WINDOW = 2000
"""Number of rows that are submitted and not yet written. It is large enough to keep workers busy
with calls of a millisecond, and small enough that memory does not grow with the input."""

_OK = 0
_ROW_FAILED = 1
_SIGNALLED = 128  # the signal's number is added, as shells do
_SIGPIPE = 13  # not in the signal module on Windows


@dataclass(frozen=True, slots=True, kw_only=True)
class MapOptions:
    """The arguments and options of the command line."""

    function: str
    """The argument FUNCTION."""
    input: str
    """The argument INPUT."""
    output: Path | None
    """The file for the results; ``None`` for standard output."""
    workers: int | None
    """Number of calls at once; ``None`` for the executor's default."""
    is_ordered: bool
    """Whether records are written in the input's order."""
    timeout: float | None
    """Seconds that a call may run; ``None`` for no limit."""
    retries: int
    """How often a call is repeated after its worker was lost."""
    max_failures: int | None
    """Number of failed rows after which no more rows are started; ``None`` for no limit."""
    is_resuming: bool
    """Whether the rows of an existing output are kept even if other code made them."""
    is_overwriting: bool
    """Whether an existing output is deleted."""
    retries_failed: bool
    """Whether rows that failed in an earlier run are run again."""
    input_format: str | None
    """The input's format; ``None`` to choose it by the input's name."""
    output_format: str | None
    """The output's format; ``None`` to choose it by the output's name."""
    types: Mapping[str, str]
    """Type names of CSV columns."""
    delimiter: str | None
    """The character between CSV cells; ``None`` to choose it by the input's name."""
    ignore_extra: bool
    """Whether columns that the function does not take are recorded and not passed."""
    is_dry_run: bool
    """Whether to stop before anything is run."""
    is_quiet: bool
    """Whether to show errors only."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    options: MapOptions
    target: Target
    parameters: Parameters
    source: Source
    form: Format
    output: OutputFile | StreamOutput | None
    """``None`` in a dry run."""
    ledger: Ledger
    program: Program
    """The function's code, as it was when the run began."""
    changed: str
    """What has changed in the code since the output's rows were made; empty if nothing has."""

    @property
    def manifest(self) -> Manifest:
        return _map_program.this_program(self.program)

    def remaining(self) -> Iterator[Row]:
        return self.ledger.remaining(self.source, self.form.key)

    @property
    def left(self) -> int | None:
        total = self.source.total
        return None if total is None else total - len(self.ledger.keys)


def run_map(options: MapOptions) -> int:
    """Run the command.

    Args:
        options: The arguments and options of the command line.

    Returns:
        The exit code.

    Raises:
        CommandError: If the job cannot be run, or cannot be finished.
    """
    job = _prepare(options)
    if job.output is None:
        _describe(job)
        return _OK
    try:
        return _carry_out(job, job.output)
    finally:
        job.output.close()


def _prepare(options: MapOptions) -> _Job:
    path = options.output
    is_file = path is not None and not is_stream(path)
    _check_options(options, is_file=is_file)
    target = load_function(options.function)
    program, changed = Program(), ""
    parameters = read_parameters(target.function, target.name)
    source = open_source(
        options.input,
        parameters,
        input_format=options.input_format,
        types=options.types,
        delimiter=options.delimiter,
        ignore_extra=options.ignore_extra,
        output=path,
    )
    folder = Path.cwd() if path is None or not is_file else path.absolute().parent
    identity = target.identity(folder)
    form: Format
    if (options.output_format or _output_format(path)) == "csv":
        form = CsvFormat(identity, source.columns, can_widen=is_file)
    else:
        form = JsonLinesFormat(identity)
    output: OutputFile | StreamOutput | None = None
    if path is None or not is_file:
        if not options.is_dry_run:
            output = _open_stream(path)
        ledger = empty_ledger("standard output" if path is None else str(path))
    else:
        if not options.is_dry_run:
            output = OutputFile(path)
        ledger = _read_existing(path, form, identity, options)
        if ledger.keys:
            changed = _map_program.change(path, _map_program.this_program(program))
        if changed and not (options.is_resuming or options.retries_failed):
            rows = _rows(len(ledger.keys))
            raise CommandError(
                f"{path} has {rows} that other code made: {changed} since then. Add --resume to "
                f"keep {_them(len(ledger.keys))}, or --overwrite to run all rows again"
            )
        if options.retries_failed:
            ledger = ledger.without_failed()
        ledger.check(source, form.key)
    return _Job(
        options=options,
        target=target,
        parameters=parameters,
        source=source,
        form=form,
        output=output,
        ledger=ledger,
        program=program,
        changed=changed,
    )


def _check_options(options: MapOptions, *, is_file: bool) -> None:
    path = options.output
    for option, is_given in (
        ("--resume", options.is_resuming),
        ("--overwrite", options.is_overwriting),
        ("--retry-failed", options.retries_failed),
    ):
        if is_given and not is_file:
            raise CommandError(f"{option} is for a file of results: name it with --output")
    if options.is_overwriting and options.is_resuming:
        raise CommandError("--overwrite starts again and --resume continues: give one of them")
    if options.is_overwriting and options.retries_failed:
        raise CommandError("--overwrite leaves no failed rows for --retry-failed: give one of them")
    if path is None or not is_file:
        return
    if path.is_dir():
        raise CommandError(f"--output {path} is a folder: name a file in it")
    if os.path.exists(options.input) and path.exists() and os.path.samefile(options.input, path):
        raise CommandError(f"INPUT and --output are the same file, {path}")


def _output_format(path: Path | None) -> str:
    return "csv" if path is not None and path.suffix.lower() == ".csv" else "jsonl"


def _open_stream(path: Path | None) -> StreamOutput:
    try:
        return StreamOutput(None if path is None else str(path))
    except OSError as exc:
        raise CommandError(f"{path} cannot be written: {exc.strerror}") from exc


def _read_existing(path: Path, form: Format, identity: str, options: MapOptions) -> Ledger:
    if options.is_overwriting or not path.exists():
        return empty_ledger(str(path))
    try:
        with path.open("rb") as lines:
            return read_ledger(str(path), lines, form, identity)
    except OSError as exc:
        raise CommandError(f"{path} cannot be read: {exc.strerror}") from exc


def _describe(job: _Job) -> None:
    """Print on standard output what would be run, for ``--dry-run``."""
    from rich.console import Console

    options, ledger = job.options, job.ledger
    console = Console(highlight=False, markup=False, soft_wrap=True)
    console.print(f"function  {job.target.module}:{job.target.name}, {job.parameters.title}")
    console.print(f"input     {job.source.name}: {job.source.describe()}")
    workers = "one per processor" if options.workers is None else str(options.workers)
    console.print(f"workers   {workers}")
    done = f", which has {len(ledger.keys)} of them" if ledger.keys else ""
    console.print(f"output    {ledger.output}{done}")
    if job.left is not None:
        console.print(f"to run    {_rows(job.left)}")
    first = next(job.remaining(), None) if job.source.total is not None else None
    if first is not None:
        args, kwargs = job.source.bind(first)
        shown = [repr(value) for value in args]
        shown += [f"{name}={value!r}" for name, value in kwargs.items()]
        console.print(f"first     row {first.number}: {job.target.name}({', '.join(shown)})")


def _carry_out(job: _Job, output: OutputFile | StreamOutput) -> int:
    options, ledger = job.options, job.ledger
    if isinstance(output, OutputFile):
        _make_ready(job, output)
    report = Report(
        label=job.target.name,
        output=output.name,
        total=job.source.total,
        earlier=Earlier(rows=len(ledger.keys), failed=len(ledger.failed)),
        is_quiet=options.is_quiet,
        # If the results are shown on the same screen, they serve as progress.
        shows_progress=isinstance(output, OutputFile) or not sys.stdout.isatty(),
    )
    recorder = Recorder(
        output, job.form, has_rows=ledger.good_size > 0, highest=max(ledger.keys, default=0)
    )
    if ledger.keys and job.left != 0:
        total = "" if job.source.total is None else f" of {_rows(job.source.total)}"
        report.say(f"Resuming: {len(ledger.keys):,}{total} are in {output.name} already.")
    if job.changed:
        report.say(f"{job.changed} since {output.name} was begun: its rows are of both versions.")
    failure: CommandError | None = None
    if job.left != 0:
        try:
            _run(job, report, recorder)
        except KeyboardInterrupt as exc:
            report.stop()
            return _interrupted(job, report, exc)
        except CommandError as exc:
            failure = exc
        report.stop()
    if isinstance(output, OutputFile) and report.written and (edited := job.program.edited()):
        report.say(
            f"{edited} has changed while the rows ran: those in {output.name} may be of either "
            f"version."
        )
    if failure is None:
        recorder.finish()
    if (
        isinstance(output, OutputFile)
        and options.is_ordered
        and not (ledger.is_in_order and recorder.is_in_order)
    ):
        put_in_order(output, job.form)
    _conclude(job, report, output)
    if failure is not None:
        raise failure
    return _ROW_FAILED if report.failed or ledger.failed else _OK


def _make_ready(job: _Job, output: OutputFile) -> None:
    if job.options.is_overwriting:
        output.truncate(0)
    if not job.ledger.keys or job.changed:
        try:
            _map_program.note(output.path, job.manifest)
        except OSError as exc:
            raise CommandError(
                f"{exc.filename} cannot be written: {exc.strerror}; it notes which code makes the "
                f"rows"
            ) from exc
    if job.options.is_overwriting:
        return
    repair(output, job.ledger)
    if job.options.retries_failed:
        drop_failed(output, job.form)


def _run(job: _Job, report: Report, recorder: Recorder) -> None:
    """Run the remaining rows, and record their outcomes.

    Raises:
        KeyboardInterrupt: On a signal, or when the program that reads standard output has ended.
        CommandError: If the run could not be finished.
    """
    from cloudexec import BatchExecutor, CloudexecError
    from cloudexec._launchers.registry import default_launcher

    options, launcher = job.options, default_launcher()
    journal: Path | None = None
    if isinstance(job.output, OutputFile) and launcher.needs_network():
        journal = _map_journal.beside(job.output.path)
        if options.is_overwriting:
            _map_journal.remove(journal)
    try:
        with (
            _worker_output(report),
            BatchExecutor(
                options.workers,
                retries=options.retries,
                task_timeout=options.timeout,
                output="logging",
                launcher=launcher,
                journal=journal,
            ) as executor,
        ):
            run = RowRun(
                executor,
                job.target.function,
                job.remaining(),
                job.source.bind,
                window=max(_WINDOW, 8 * (options.workers or 1)),
                is_ordered=options.is_ordered,
                is_journaled=journal is not None,
            )
            with _signals_to(run):
                report.start()
                try:
                    _record_outcomes(run, report, recorder, options.max_failures)
                except ReaderGoneError:
                    raise SignalInterrupt(_SIGPIPE) from None
                except Exception:
                    run.stop()
                    raise
    except CloudexecError as exc:
        raise RunError(f"the run cannot go on: {exc}") from exc
    if journal is not None and (job.left is None or report.written == job.left):
        _map_journal.remove(journal)


def _record_outcomes(
    run: RowRun, report: Report, recorder: Recorder, max_failures: int | None
) -> None:
    reason: str | None = None
    for outcome in run.outcomes():
        why = launch_failure(outcome)
        if why is not None:
            if reason is None:
                reason = why
                run.stop()
            continue
        record = to_record(outcome)
        recorder.write(record)
        report.add(record)
        if report.failed == max_failures and record.error is not None:
            report.say(f"Stopping: {_rows(report.failed)} failed.")
            run.stop()
    if reason is not None:
        raise RunError(f"no worker could run anything: {reason}")


@contextlib.contextmanager
def _worker_output(report: Report) -> Iterator[None]:
    """Show the output of workers in the report, as standard output may carry the results."""
    logger = logging.getLogger("cloudexec")
    handler = ReportHandler(report)
    before = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.level, logger.propagate = before


@contextlib.contextmanager
def _signals_to(run: RowRun) -> Iterator[None]:
    """Let SIGINT and SIGTERM end the run between two rows; a second signal acts as usual."""
    before = {
        number: signal.getsignal(number)
        for number in (signal.SIGINT, signal.SIGTERM)
        if signal.getsignal(number) is not signal.SIG_IGN  # shells' background jobs ignore it
    }

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def interrupt(number: int, frame: FrameType | None) -> None:
        restore()
        run.interrupt(number)

    for number in before:
        signal.signal(number, interrupt)
    try:
        yield
    finally:
        restore()


def _interrupted(job: _Job, report: Report, exc: KeyboardInterrupt) -> int:
    number = exc.number if isinstance(exc, SignalInterrupt) else signal.SIGINT
    if number != _SIGPIPE:
        written = len(job.ledger.keys) + report.written
        if isinstance(job.output, OutputFile):
            total = "" if job.source.total is None else f" of {_rows(job.source.total)}"
            how = (
                "Run the command without --overwrite to go on."
                if job.options.is_overwriting
                else "Run the same command again to go on."
            )
            message = f"Interrupted: {written:,}{total} are in {job.output.name}. {how}"
        else:
            message = (
                f"Interrupted after {_rows(written)}. With --output, "
                "a run can go on where it was interrupted."
            )
        print(message, file=sys.stderr)
    return _SIGNALLED + number


def _conclude(job: _Job, report: Report, output: OutputFile | StreamOutput) -> None:
    total, failed = job.source.total, report.failed + len(job.ledger.failed)
    if total == 0:
        report.say(f"{job.source.name} has no rows.")
        return
    if job.left == 0:
        report.say(f"All {_rows(total or 0)} are in {output.name} already.")
    else:
        report.summarise()
    if isinstance(output, OutputFile):
        not_run = 0 if job.left is None else job.left - report.written
        if job.left != 0:
            report.say(f"Results are in {output.name}.")
        if not_run:
            report.say(f"{_rows(not_run)} not run: the same command goes on with {_them(not_run)}.")
        if failed:
            report.say(f"{_rows(failed)} failed: to run {_them(failed)} again, add --retry-failed.")


def _them(number: int) -> str:
    return "it" if number == 1 else "them"


def _rows(number: int) -> str:
    return "1 row" if number == 1 else f"{number:,} rows"
