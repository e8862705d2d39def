"""``python -m cloudexec._runs.inside``: on the machine, runs the program of a run to its end.

It fetches files, starts the program, and waits. What the program prints goes to this process's
output, and so into the log. Meanwhile the files that it writes go into the bucket, so that little
is lost with the machine. At the end it says how the program ended, in the bucket and by its own
exit code.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import tarfile
import tempfile
import time
import traceback
from asyncio.subprocess import DEVNULL, Process
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

from cloudexec._errors import CloudexecError
from cloudexec._runs.protocol import (
    ATTEMPT_VARIABLE,
    EXIT_FILES_LOST,
    EXIT_NOT_RUN,
    INTERRUPTED,
    REGION_VARIABLE,
    RUN_VARIABLE,
    START_VARIABLE,
    last_line,
)

try:
    from cloudexec._aws.clients import AwsClients
    from cloudexec._runs.bucket import RENEW_EVERY, RunBucket
    from cloudexec._runs.budget import Budget
    from cloudexec._runs.files import unpack
    from cloudexec._runs.outputs import Outputs
    from cloudexec._runs.plan import RunPlan, RunResult
    from cloudexec._runs.succession import Succession, succession_of
except ImportError as exc:
    print(
        f"cloudexec: the image has no {exc.name}, which a run needs. Give --packages here, or push "
        f"an image that has it with `cloudexec image push --packages here`",
        flush=True,
    )
    raise SystemExit(EXIT_NOT_RUN) from None

__all__ = ["main"]

_KEEP_FIRST = 2.0
_KEEP_EVERY = 30.0
"""Seconds between two looks at the files that the program writes, at first and in the long run."""
_GRACE = 15.0
"""Seconds that the program has after SIGTERM. AWS kills this process after 30, and what the program
has written is yet to be sent."""
_RESERVE = 30.0
"""Seconds before the place's time limit at which the program is ended, so that its files come
back."""
_PATIENCE = 120.0
"""Seconds for which the bucket may not be reached: nobody else knows how the program ended."""
_NAMED = 5
"""Files that a message names."""


def _say(text: str) -> None:
    print(f"cloudexec: {text}", flush=True)


def main() -> NoReturn:
    """Run what the environment names, and end this process with the program's exit code."""
    where = os.environ.pop(RUN_VARIABLE)
    region = os.environ.pop(REGION_VARIABLE)
    start_id = os.environ.pop(START_VARIABLE, "")
    try:
        code = asyncio.run(_run(where, region, start_id))
    except (CloudexecError, OSError, tarfile.TarError) as exc:
        _say(f"the program could not be run: {exc}")
        code = EXIT_NOT_RUN
    except Exception:  # a fault of ours must not look like one of the program
        traceback.print_exc()
        code = EXIT_NOT_RUN
    sys.stdout.flush()
    os._exit(code)


async def _run(where: str, region: str, start_id: str) -> int:
    bucket_name, _, prefix = where.removeprefix("s3://").partition("/")
    async with AwsClients(region) as clients:
        name = prefix.strip("/").rpartition("/")[2]
        bucket = RunBucket(clients, bucket_name, name, patience=_PATIENCE)
        plan = await bucket.plan()
        if why := await _is_too_many(bucket, plan, start_id):
            _say(f"{why}: this one does not run it")
            return EXIT_NOT_RUN
        budget = Budget(clients, plan, bucket)
        variables = {RUN_VARIABLE: where, REGION_VARIABLE: region, START_VARIABLE: start_id}
        succession = succession_of(bucket, plan, budget, variables, _attempt())
        if succession is not None:
            await succession.begin()
        result = await _earlier_result(bucket, plan, succession)
        if result is not None:
            await _settle(budget)
        else:
            result = await _run_here(bucket, plan, budget, succession)
        if result.is_final:
            with contextlib.suppress(CloudexecError):
                await bucket.forget_variables(plan.start_id)
            print(f"{last_line(plan.name)}, with exit code {result.exit_code}", flush=True)
        return result.exit_code


async def _run_here(
    bucket: RunBucket, plan: RunPlan, budget: Budget, succession: Succession | None
) -> RunResult:
    """Run the program once, and say in the bucket how it ended."""
    began = time.time()
    try:
        result = await _Machine(bucket, plan, budget, succession).run()
    except Exception as exc:
        # Whatever it was, the client is to learn of it.
        if not isinstance(exc, (CloudexecError, OSError, tarfile.TarError)):
            traceback.print_exc()
        result = RunResult(exit_code=EXIT_NOT_RUN, reason=f"it could not be run: {exc}")
        _say(result.reason)
    result = replace(
        result,
        start_id=plan.start_id,
        started_at=began,
        ended_at=time.time(),
        attempt=_attempt(),
    )
    await _put_result(bucket, result)
    if workers_usd := await _settle(budget):
        result = replace(result, workers_usd=workers_usd)
        await _put_result(bucket, result)
    if succession is not None and not result.is_final:
        result = await succession.after(result)
        if result.is_final:
            _say(result.reason)
            await _put_result(bucket, result)
    return result


async def _is_too_many(bucket: RunBucket, plan: RunPlan, start_id: str) -> str:
    """Say why another job runs the program; empty: this one does."""
    if plan.start_id != start_id:
        return "the run was started again since this job was submitted"
    job_id = os.environ.get("AWS_BATCH_JOB_ID", "")
    if job_id and (other := await bucket.claim(start_id, job_id)) != job_id:
        return f"the job {other} runs the program"
    return ""


async def _earlier_result(
    bucket: RunBucket, plan: RunPlan, succession: Succession | None
) -> RunResult | None:
    """Return how the program ended, if it did so in an earlier attempt, or the run was stopped.

    AWS may take a machine back just after that, and starts another attempt then.
    """
    result = await bucket.result(plan.start_id)
    if succession is not None and (reason := await succession.stopped()):
        _say(f"the run was {reason}, and the program is not run")
        result = RunResult(
            exit_code=EXIT_NOT_RUN, reason=reason, start_id=plan.start_id, was_stopped=True
        )
        await _put_result(bucket, result)
        return result
    if result is None or not result.is_final:
        return None
    if result.was_stopped:
        _say(f"the run was {result.reason}, and the program is not run")
        return result
    if result.exit_code == EXIT_NOT_RUN:
        return None
    _say(f"the program has ended in attempt {result.attempt}, and is not run again")
    return result


async def _settle(budget: Budget) -> float:
    """End workers that the program has left behind; say what workers have cost."""
    try:
        return await budget.settle()
    except Exception:  # how the program has ended, or will, does not change
        traceback.print_exc()
        return 0.0


async def _put_result(bucket: RunBucket, result: RunResult) -> None:
    """Write how the program ended; it has done so, even if that cannot be written."""
    try:
        await bucket.put_result(result)
    except CloudexecError as exc:
        _say(f"how the program ended could not be written into the bucket: {exc}")


def _attempt() -> int:
    found = os.environ.get("AWS_BATCH_JOB_ATTEMPT") or os.environ.get(ATTEMPT_VARIABLE)
    return int(found or 1)


class _Machine:
    """Runs the program once.

    Args:
        bucket: What the bucket has of the run.
        plan: What is to be run.
        budget: What the run has cost.
        succession: Ends this process in time; ``None``: AWS does so.
    """

    def __init__(
        self,
        bucket: RunBucket,
        plan: RunPlan,
        budget: Budget,
        succession: Succession | None = None,
    ) -> None:
        self._bucket = bucket
        self._plan = plan
        self._budget = budget
        self._succession = succession
        self._was_told = asyncio.Event()
        self._has_ended = asyncio.Event()
        self._was_interrupted = False
        """Whether it was told to stop before the program had ended."""
        self._reason = ""
        self._archive: Path | None = None
        self._renewed_at = time.monotonic()
        self._failures: set[str] = set()

    async def run(self) -> RunResult:
        """Run the program to its end, and bring its files back."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._was_told.set)
        if _attempt() > 1:
            await _settle(self._budget)  # an earlier attempt may have left workers
        plan = self._plan
        first = await self._bucket.first_start(plan.start_id)
        left = first + plan.max_seconds - time.time()
        if left <= 0 and _attempt() > 1:
            reason = f"its time limit of {plan.max_seconds} s was over before attempt {_attempt()}"
            _say(reason)
            return RunResult(exit_code=EXIT_NOT_RUN, reason=reason)
        if self._succession is not None:
            self._succession.end_after(left)
        # So that the files come back; a limit of a minute or so leaves less for that.
        limit = max(left - _RESERVE, left / 2)
        with tempfile.TemporaryDirectory(
            prefix="cloudexec-run-", ignore_cleanup_errors=True
        ) as name:
            work = await self._prepare(Path(name))
            outputs = Outputs(self._bucket, work, plan.outputs, plan.output_folders)
            await outputs.prepare(_say)
            variables = await self._bucket.variables(plan.start_id)
            process = await self._start(work, Path(name), variables)
            keeping = asyncio.ensure_future(self._keep_now_and_then(outputs))
            try:
                code = await self._watch(process, limit)
            finally:
                self._has_ended.set()
            await keeping  # what it is sending need not be sent again
            if links := await asyncio.to_thread(outputs.links):
                named = ", ".join(map(ascii, links[:_NAMED]))
                more = len(links) - _NAMED
                _say(
                    "symbolic links to folders, and to what is not there, do not come back: "
                    + (f"{named} and {more:,} more" if more > 0 else named)
                )
            if lost := await self._keep(outputs):
                _say(f"files that the program has written did not come back: {lost}")
                self._reason = self._reason or f"files did not come back: {lost}"
                code = code or EXIT_FILES_LOST
            return RunResult(
                exit_code=code, reason=self._reason, is_final=not self._was_interrupted
            )

    async def _prepare(self, folder: Path) -> Path:
        """Unpack the files of the run; return its folder."""
        work = folder / "work"
        work.mkdir()
        if self._plan.files_bytes:
            archive = folder / "files.tar.gz"
            await self._bucket.receive(self._plan, archive)
            await asyncio.to_thread(unpack, archive, work)
            if self._plan.max_seconds > RENEW_EVERY:
                self._archive = archive
            else:
                archive.unlink()
        return work

    async def _start(self, work: Path, folder: Path, variables: Mapping[str, str]) -> Process:
        plan = self._plan
        environment = {**os.environ, **self._environment(work, folder), **variables}
        try:
            return await asyncio.create_subprocess_exec(
                *_command(plan),
                cwd=work,
                env=environment,
                stdin=DEVNULL,
                start_new_session=True,
            )
        except OSError as exc:
            raise OSError(f"{plan.title}: {exc.strerror or exc}") from exc

    def _environment(self, work: Path, folder: Path) -> dict[str, str]:
        plan = self._plan
        found = {
            "PYTHONUNBUFFERED": "1",
            "PYTHONIOENCODING": "utf-8",
            "AWS_DEFAULT_REGION": plan.region,
            "AWS_REGION": plan.region,
            "CLOUDEXEC_RUN": plan.name,
            "CLOUDEXEC_RUN_ATTEMPT": str(_attempt()),
            "CLOUDEXEC_RUN_JOURNAL": f"{self._bucket.where}journal",
        }
        path = [str(work / each) for each in plan.python_path]
        if given := os.environ.get("PYTHONPATH"):
            path.append(given)
        if path:
            found["PYTHONPATH"] = os.pathsep.join(path)
        if (profile := plan.profile_inside()) is not None:
            found["CLOUDEXEC_CONFIG_DIR"] = str(folder / "profiles")
            os.environ["CLOUDEXEC_CONFIG_DIR"] = found["CLOUDEXEC_CONFIG_DIR"]
            for name in dict.fromkeys((profile.name, "default")):
                replace(profile, name=name).save()
        return found

    async def _watch(self, process: Process, limit: float) -> int:
        """Wait for the program's end; end it when told to, or when time or money are used up."""
        ending = asyncio.ensure_future(process.wait())
        told = asyncio.ensure_future(self._was_told.wait())
        over = asyncio.ensure_future(self._budget.reached())
        try:
            await asyncio.wait(
                (ending, told, over),
                timeout=max(0.0, limit),
                return_when=asyncio.FIRST_COMPLETED,
            )
            if not ending.done() and process.returncode is None:
                if told.done():
                    self._was_interrupted = True
                    self._reason = "it was told to stop, by a person or as its machine was needed"
                elif over.done():
                    self._reason = over.result()
                else:
                    self._reason = (
                        f"it was ended as its time limit of {self._plan.max_seconds} s was nearly "
                        f"over: --max-hours or --max-cost allow more"
                    )
                _say(self._reason)
                await self._end(process, ending)
        finally:
            told.cancel()
            over.cancel()
            # Processes that the program has left behind end with it, as with its container.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            code = await ending  # also when cancelled, so that nothing of it is left open
        if self._was_interrupted:
            return INTERRUPTED  # whatever it made of it: another attempt may have to follow
        if code == -signal.SIGKILL and not self._reason:
            self._reason = "it was killed by SIGKILL, most likely since memory ran out"
        if code == 0 and self._reason:
            return INTERRUPTED
        return 128 - code if code < 0 else code

    async def _end(self, process: Process, ending: asyncio.Future[int]) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(asyncio.shield(ending), _GRACE)

    async def _keep_now_and_then(self, outputs: Outputs) -> None:
        """Send files that have changed until the program has ended; it goes on meanwhile."""
        pause = _KEEP_FIRST
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._has_ended.wait(), pause)
            if self._has_ended.is_set():
                return
            pause = min(2 * pause, _KEEP_EVERY)
            try:
                failures = await outputs.keep()
            except Exception as exc:
                failures = [str(exc) or repr(exc)]
            self._say_once("a file that the program has written is not in the bucket yet", failures)
            if time.monotonic() - self._renewed_at > RENEW_EVERY:
                await self._renew()

    async def _renew(self) -> None:
        """Write anew what a further attempt needs."""
        try:
            await self._bucket.renew(self._plan, self._archive)
        except Exception as exc:
            text = "what another attempt needs could not be written anew, which is tried again"
            self._say_once(text, [str(exc) or repr(exc)])
        else:
            self._renewed_at = time.monotonic()

    def _say_once(self, text: str, failures: Iterable[str]) -> None:
        for each in sorted({f"{text}: {why}" for why in failures} - self._failures):
            self._failures.add(each)
            _say(each)

    async def _keep(self, outputs: Outputs) -> str:
        """Send files of a program that has ended; say what did not come back, and why."""
        try:
            failures = await outputs.keep(is_last=True)
        except Exception as exc:
            return str(exc) or repr(exc)
        more = len(failures) - _NAMED
        return "; ".join(failures[:_NAMED]) + (f"; and {more:,} more" if more > 0 else "")


def _command(plan: RunPlan) -> list[str]:
    """Return the command of a program."""
    match plan.kind:
        case "script":
            return [sys.executable, plan.target, *plan.args]
        case "module":
            return [sys.executable, "-m", plan.target, *plan.args]
        case "notebook":
            return [sys.executable, "-m", "cloudexec._runs.notebook", plan.target, *plan.args]
        case _:
            # A single word is a line for the shell, as with ssh.
            return list(plan.args) if len(plan.args) > 1 else ["/bin/sh", "-c", plan.args[0]]


if __name__ == "__main__":
    main()
