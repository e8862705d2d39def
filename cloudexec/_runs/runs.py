"""The client's side of runs: they are started, looked at, followed, stopped and cleared away."""

from __future__ import annotations

import asyncio
import contextlib
import math
import re
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cloudexec._aws.clients import AwsClients
from cloudexec._aws.limits import LEAST_ATTEMPT_SECONDS
from cloudexec._aws.names import user_name
from cloudexec._aws.profile import Profile
from cloudexec._aws.steps import counted
from cloudexec._enrolment import python_version
from cloudexec._environment.packages import Packages
from cloudexec._errors import AwsError, ConfigError
from cloudexec._launchers.aws.image import find_image
from cloudexec._runs.bucket import OutputFile, RunBucket, list_names
from cloudexec._runs.files import collect, packed
from cloudexec._runs.found import KILLED, Found, Look, Position, with_end
from cloudexec._runs.known import Known, KnownEnd
from cloudexec._runs.places import (
    Machine,
    MachineRequest,
    MachineState,
    Place,
    StillRunning,
    has_place,
    place_named,
)
from cloudexec._runs.plan import (
    RunPlan,
    RunResult,
    check_name,
    check_output_folders,
    check_outputs,
    new_name,
    new_start_id,
)
from cloudexec._runs.protocol import EXIT_NOT_RUN, last_line
from cloudexec._runs.start import Start

__all__ = ["AsyncRuns", "RunRequest"]

Report = Callable[[str], None]
_DAY = 86400.0
_LONGEST = 14 * _DAY
"""Fargate promises no more. AWS Batch User Guide, "Job timeouts"."""
_PULL_SECONDS = 60.0
"""What the download of an image may take, which is paid for and not counted by a time limit."""
_UNLISTED = 300.0
"""Seconds for which the list of a place may lack the next attempt of a run."""
_PAGES = 20
"""Pages of a log that are read at a time, so that what is there is shown soon."""
_MISSING_LOG = "ResourceNotFoundException"
_PROFILE = "CLOUDEXEC_PROFILE"
_LAUNCHER = "CLOUDEXEC_LAUNCHER"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRequest:
    """What a user wants to be run."""

    kind: str
    """One of ``plan.KINDS``."""
    target: str = ""
    args: tuple[str, ...] = ()
    machine: MachineRequest = field(default_factory=MachineRequest)
    on: str = "batch"
    name: str | None = None
    """``None``: one is made."""
    resumes: bool = False
    """Whether a run of that name that has ended goes on, with its journal and its files."""
    files: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    variables: Mapping[str, str] = field(default_factory=dict)
    image: str | None = None
    packages: Packages | None = None
    max_seconds: float = _DAY
    max_cost_usd: float | None = None
    project: str = ""

    def __post_init__(self) -> None:
        if not LEAST_ATTEMPT_SECONDS <= self.max_seconds <= _LONGEST:
            raise ConfigError(
                f"max_hours must be {LEAST_ATTEMPT_SECONDS / 3600:.4f} to {_LONGEST / 3600:g}, "
                f"not {self.max_seconds / 3600:g}: AWS Batch takes time limits from 1 minute, and "
                f"Fargate promises no more than 14 days"
            )
        if self.max_cost_usd is not None and not 0 < self.max_cost_usd < math.inf:
            raise ConfigError(f"max_cost must be more than 0 USD, not {self.max_cost_usd!r}")
        if self.resumes and not self.name:
            raise ConfigError("resume needs the name of the run that is to go on")
        if self.image is not None and self.packages is not None:
            raise ConfigError(
                "give either image or packages: from packages, an image of its own is made"
            )
        for name, value in self.variables.items():
            if not name or "=" in name or "\0" in name + value:
                raise ConfigError(f"{name!r} cannot be an environment variable")


class AsyncRuns:
    """The runs of a profile.

    Args:
        clients: Calls to AWS, in the profile's region.
        profile: Names bucket, roles and queues.

    Raises:
        ConfigError: If the profile lacks what runs need.
    """

    def __init__(self, clients: AwsClients, profile: Profile) -> None:
        if lacking := _lacks(profile):
            raise ConfigError(lacking)
        self._clients = clients
        self._profile = profile
        self._places: dict[str, Place] = {}

    def bucket(self, name: str) -> RunBucket:
        """Return what the bucket has of a run."""
        return RunBucket(self._clients, self._profile.bucket, check_name(name))

    def _place(self, name: str) -> Place:
        # A place keeps what it has learned, such as prices.
        if name not in self._places:
            self._places[name] = place_named(name, self._clients, self._profile)
        return self._places[name]

    # The start.

    async def start(self, request: RunRequest, report: Report) -> RunPlan:
        """Send files and start a machine.

        If this is cancelled, what has been started is ended, and nothing stays.

        Args:
            request: What is wanted.
            report: Told what is done, in any thread.

        Returns:
            What runs now, with its name.

        Raises:
            ConfigError: If it cannot be run as it is wanted.
            AwsError: If AWS refuses, or cannot be reached.
            LaunchError: If the image cannot be made.
        """
        place = self._place(request.on)
        machine = place.choose(request.machine)
        outputs = check_outputs(request.outputs)
        target = request.target
        if request.kind == "module":
            target = target.removesuffix(".__main__").rpartition(".")[2]
        title = target or (request.args or ("run",))[0].split()[0]
        name = new_name(title) if request.name is None else check_name(request.name)
        seconds = _limit(request, machine.price.per_hour)
        files = await asyncio.to_thread(collect, request.kind, request.target, request.files)
        folders = check_output_folders(request.outputs, files.files)
        if request.resumes and not outputs:
            outputs, folders = await self._earlier_outputs(name)
        _report_plan(report, name, request, seconds, machine)
        image = await find_image(
            self._clients,
            self._profile,
            image=request.image,
            packages=request.packages,
            arch=request.machine.arch,
            report=report,
        )
        profile_inside = _profile_inside(self._profile, image, request.machine.arch)
        values = dict(request.variables)
        if values.get(_PROFILE, "") not in ("", "local"):
            values[_PROFILE] = profile_inside.name  # there is no other one on the machine
            if place.launcher:
                values.setdefault(_LAUNCHER, place.launcher)
        plan = RunPlan(
            name=name,
            kind=request.kind,
            target=files.target or request.target,
            args=request.args,
            python_path=tuple(files.python_path),
            outputs=outputs,
            output_folders=folders,
            variables=tuple(sorted(values)),
            on=request.on,
            vcpus=machine.size.vcpus,
            memory_mib=machine.size.memory_mib,
            gpus=machine.size.gpus,
            disk_gib=machine.disk_gib,
            arch=request.machine.arch,
            compute=machine.compute,
            spot=request.machine.spot,
            image=image,
            max_seconds=seconds,
            max_cost_usd=request.max_cost_usd,
            per_hour_usd=machine.price.per_hour,
            user=user_name(),
            project=request.project or self._profile.project,
            role=self._profile.run_role,
            start_id=new_start_id(),
            region=self._clients.region,
            profile=asdict(profile_inside),
        )
        bucket = self.bucket(name)
        with packed(files) as archive:
            if archive is not None:
                plan = replace(plan, files_bytes=archive.size, files_sha256=archive.sha256.hex())
                left = f"; {files.ignored} left out by rules" if files.ignored else ""
                if files.links:
                    links = ", ".join(files.links[:5]) + (", ..." if files.links[5:] else "")
                    left += f"; left out as links to folders: {links} (--files names them)"
                count = counted(len(files.files), "file")
                report(f"sending {count}, {archive.size / 1e6:,.1f} MB{left}")
            start = Start(bucket, place, plan)
            try:
                if not await start.create(resumes=request.resumes):
                    await self._replace(bucket, plan, request)
                if archive is not None:
                    await bucket.send(archive)
                if values:
                    await bucket.put_variables(plan.start_id, values)
                await start.machine()
            except BaseException as exc:
                failure = exc
                try:
                    await asyncio.shield(start.undo(exc))
                except StillRunning as still:
                    failure = still
                except AwsError:
                    pass  # the bucket's lifecycle rule deletes it later
                if isinstance(failure, StillRunning):
                    report(f"run {name}: {failure}; `cloudexec stop {name}` ends it")
                elif isinstance(exc, asyncio.CancelledError):
                    report(f"run {name}: its start was interrupted, and no machine is left running")
                raise
        return plan

    async def _replace(self, bucket: RunBucket, plan: RunPlan, request: RunRequest) -> None:
        """Let a run that has ended go on as another one of its name.

        Raises:
            ConfigError: If that is not wanted, or it has not ended.
        """
        name = plan.name
        if not request.resumes:
            raise ConfigError(
                f"there is a run {name!r} already: give another name, --resume to go on with its "
                f"journal and its files, or `cloudexec fetch {name} --delete` to remove what the "
                f"bucket has of it"
            )
        state = (await self.find(name)).state
        if state == "preparing":
            raise ConfigError(
                f"the run {name} is preparing: a client sends its files, or has died while it did "
                f"so. If it has died, `cloudexec fetch {name} --delete` removes what the bucket "
                f"has of the run"
            )
        if state in ("waiting", "starting", "running"):
            raise ConfigError(
                f"the run {name} is {state}: `cloudexec attach {name}` shows it, and `cloudexec "
                f"stop {name}` ends it"
            )
        await bucket.replace(plan)

    # Looking.

    async def find(self, name: str) -> Found:
        """Return a run.

        Raises:
            ConfigError: If there is none of that name.
        """
        bucket = self.bucket(name)
        plan = await bucket.plan()
        result, known = await asyncio.gather(
            bucket.result(plan.start_id), bucket.known(plan.start_id)
        )
        machines = await self._place(plan.on).find([plan], {name: with_end(known, plan, result)})
        found = self._found(plan, machines.get(name), result, known)
        await self._note_ends([found])
        return found

    def _found(
        self, plan: RunPlan, machine: MachineState | None, result: RunResult | None, known: Known
    ) -> Found:
        """Return a run; between two attempts that are jobs of their own, it waits for the next."""
        is_final = result is not None and result.is_final
        if machine is not None and machine.was_reclaimed and not is_final:
            ended_at = machine.stopped_at or machine.created_at
            age = (datetime.now(UTC) - ended_at).total_seconds()
            is_own_job = machine.phase == "ended" and not self._place(plan.on).tries_again
            # The next attempt may not be listed yet.
            if is_own_job and age < _UNLISTED:
                machine = replace(machine, phase="waiting")
        return Found(plan, machine, result, known)

    async def _note_ends(self, runs: Sequence[Found]) -> None:
        """Do what runs that have ended could not do themselves."""
        await self._forget_variables_of_ended(runs)
        for each in runs:
            await self._remember(each)

    async def _remember(self, found: Found) -> None:
        """Write how a machine ended that has not said so, if its place forgets that soon."""
        machine, result = found.machine, found.result
        if machine is None or machine.phase != "ended" or machine.is_remembered:
            return
        if (result is not None and result.is_final) or found.known.end is not None:
            return
        if self._place(found.plan.on).remembers >= _DAY:
            return
        end = KnownEnd(
            created_at=machine.created_at,
            started_at=machine.started_at,
            stopped_at=machine.stopped_at,
            exit_code=machine.exit_code,
            reason=machine.reason,
            was_stopped=machine.was_stopped,
        )
        known = replace(machine.known.begun_by(machine.job_id), end=end)
        with contextlib.suppress(AwsError):  # the next look tries again
            await self.bucket(found.plan.name).put_known(found.plan.start_id, known)

    async def _forget_variables_of_ended(self, runs: Sequence[Found]) -> None:
        """Delete variables of runs that have ended and could not do so themselves."""
        for each in runs:
            machine, result = each.machine, each.result
            if not each.plan.variables or machine is None or machine.phase != "ended":
                continue
            if result is not None and result.is_final:
                continue  # the machine has done so
            with contextlib.suppress(AwsError):  # the next look tries again
                await self.bucket(each.plan.name).forget_variables(each.plan.start_id)

    async def again(self, found: Found) -> Found:
        """Return a run as it is now, with as few requests as possible while it has not ended."""
        if found.machine is not None:
            machine = await self._place(found.plan.on).look(found.plan, found.machine)
            if machine.phase != "ended":
                return replace(found, machine=machine)
        return await self.find(found.plan.name)

    async def _earlier_outputs(self, name: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Return the outputs of an earlier run, and which are folders: its files are there."""
        try:
            earlier = await self.bucket(name).plan()
        except ConfigError:
            return (), ()  # there is none
        return earlier.outputs, earlier.output_folders

    async def all(self, limit: int | None = None) -> list[Found]:
        """Return all runs that the bucket knows, the newest first."""
        names = await list_names(self._clients, self._profile.bucket, limit)

        known: dict[str, Known] = {}

        async def read(name: str) -> tuple[RunPlan, RunResult | None] | None:
            bucket = RunBucket(self._clients, self._profile.bucket, name)
            try:
                plan = await bucket.plan()
                known[name] = await bucket.known(plan.start_id)
                return plan, await bucket.result(plan.start_id)
            except ConfigError:
                return None  # it has been deleted meanwhile, or is of a newer release

        read_ = [each for each in await asyncio.gather(*map(read, names)) if each is not None]
        machines: dict[str, MachineState] = {}
        # A newer release may have started runs in other places.
        for on in {plan.on for plan, _ in read_ if has_place(plan.on)}:
            there = [(plan, result) for plan, result in read_ if plan.on == on]
            known_there = {
                plan.name: with_end(known[plan.name], plan, result) for plan, result in there
            }
            machines |= await self._place(on).find([plan for plan, _ in there], known_there)
        found = [
            self._found(plan, machines.get(plan.name), result, known[plan.name])
            for plan, result in read_
        ]
        # A run that goes on is written anew now and then, and is listed as if it were new.
        found.sort(key=lambda each: each.plan.created_at, reverse=True)
        await self._note_ends([each for each in found if has_place(each.plan.on)])
        return found

    async def why(self, found: Found) -> str:
        """Say why a run waits, or how it ended, in words for people.

        That is nothing where the program ended by itself.
        """
        if found.result is not None and found.result.is_final:
            return found.result.reason
        if found.machine is None:
            title = self._place(found.plan.on).title
            return f"{title} does not know its machine (any more), and the machine has not said how"
        if found.machine.was_stopped and not self._place(found.plan.on).tries_again:
            # Not every place takes a reason. Whoever stops a run writes it into the bucket.
            reason = await self.bucket(found.plan.name).stop_reason(found.plan.start_id)
            if reason:
                return f"it was {reason}"
        return await self._place(found.plan.on).why(found.plan, found.machine)

    async def look(self, found: Found, position: Position) -> Look:
        """Look at a run that is followed: at its machine, and at what it has printed since.

        Args:
            found: The run.
            position: Of the last look.
        """
        machine = found.machine
        assert machine is not None
        # First the machine: what it printed before it ended is then read.
        place = self._place(found.plan.on)
        machine = await place.look(found.plan, machine)
        if machine.was_reclaimed and machine.phase == "ended" and not place.tries_again:
            machine = (await self.find(found.plan.name)).machine or machine  # of the next attempt
        lines: list[str] = []
        tokens = dict(position.tokens)
        streams = machine.streams[position.first :]
        last = re.compile(rf"{re.escape(last_line(found.plan.name))}, with exit code \d+")
        has_last = position.has_last_line
        for _, stream in streams:
            for line in await self._new_lines(machine.log_group, stream, tokens):
                # The program may not have ended its own last line.
                if (match := last.search(line)) is not None and match.end() == len(line):
                    has_last = True
                    lines += filter(None, [line[: match.start()]])
                else:
                    lines.append(line)
        ended = machine.phase == "ended"
        has_result = position.has_result
        if ended and not has_last and not has_result and machine.exit_code in KILLED:
            result = await self.bucket(found.plan.name).result(found.plan.start_id)
            has_result = result is not None and result.is_final
        return Look(
            machine,
            lines,
            Position(
                tokens=tokens,
                # A further attempt has another stream; the one before it is read once more.
                first=max(position.first, len(machine.streams) - 2),
                quiet=0 if lines or not ended else position.quiet + 1,
                has_last_line=has_last,
                has_result=has_result,
            ),
        )

    async def _new_lines(self, group: str, stream: str, tokens: dict[str, str]) -> list[str]:
        lines: list[str] = []
        for _ in range(_PAGES):
            token = tokens.get(stream)
            extra: dict[str, Any] = {} if token is None else {"nextToken": token}
            try:
                page = await self._clients.call(
                    "logs",
                    "get_log_events",
                    logGroupName=group,
                    logStreamName=stream,
                    startFromHead=True,
                    **extra,
                )
            except AwsError as exc:
                if exc.code == _MISSING_LOG:
                    return lines  # the name is known before anything is in the stream
                raise
            tokens[stream] = page["nextForwardToken"]
            lines += [event["message"].rstrip("\n") for event in page["events"]]
            # The API repeats the token at the end of the stream. Pages may be empty before that.
            if page["nextForwardToken"] == token:
                break
        return lines

    async def streams(self, name: str) -> tuple[str, Sequence[tuple[int, str]]]:
        """Return the log group of a run, and number and log stream of each of its attempts.

        There are none where AWS Batch has them as attempts of one job.
        """
        plan = await self.bucket(name).plan()
        if not has_place(plan.on) or self._place(plan.on).tries_again:
            return "", ()
        machine = (await self.find(name)).machine
        return ("", ()) if machine is None else (machine.log_group, machine.streams)

    # The end.

    async def stop(self, name: str, reason: str) -> int:
        """End a run, with the workers of executors in it; say how many jobs were ended."""
        found = await self.find(name)
        bucket, start_id = self.bucket(name), found.plan.start_id
        if found.state in ("preparing", "not started"):
            # Its client and its machine look for this after they have written which job it is,
            # and the job is looked for here after this: one of them ends it.
            result = RunResult(
                exit_code=EXIT_NOT_RUN, reason=reason, start_id=start_id, was_stopped=True
            )
            await bucket.put_result(result, is_new=True)
        place = self._place(found.plan.on)
        if not place.tries_again:
            # A machine that starts the next attempt just now looks for this.
            await bucket.put_stop(start_id, reason)
        known = await bucket.known(start_id)
        count = await place.stop(name, reason, known.job_id)
        if found.plan.variables:
            # No other attempt follows that would need them.
            await bucket.forget_variables(start_id)
        return count

    async def note_stop(self, name: str, stopped: Container[str], reason: str) -> None:
        """Write that a run is to have no other attempt, if its machine is about to be stopped.

        Args:
            name: Of the run.
            stopped: Ids of the jobs that are stopped. Another stack may have a run of that name.
            reason: Why.
        """
        bucket = self.bucket(name)
        plan = await bucket.plan()
        known = await bucket.known(plan.start_id)
        if known.job_id in stopped:
            await bucket.put_stop(plan.start_id, reason)

    async def settle(self, found: Found) -> str:
        """End workers of executors in a run whose machine has died before it could do so.

        Returns:
            Why they could not be ended; empty: they were, or there are none.
        """
        if found.machine is not None and found.machine.phase == "ended" and found.machine.workers:
            name = found.plan.name
            reason = f"cloudexec: the run {name} has ended, and it is not needed any more"
            try:
                await self._place(found.plan.on).stop(name, reason, workers_only=True)
            except AwsError as exc:
                return (
                    f"workers of executors in it could not be ended: {exc.message}. `cloudexec "
                    f"stop {name}` ends them"
                )
        return ""

    async def forget_variables(self, name: str, stopped: Container[str]) -> None:
        """Delete variables of a run if its machine was told to stop: no other attempt follows.

        Args:
            name: Of the run.
            stopped: Ids of the jobs that were told to. Another stack may have a run of that name.
        """
        found = await self.find(name)
        if found.machine is not None and found.machine.job_id in stopped:
            await self.bucket(name).forget_variables(found.plan.start_id)

    async def fetch(
        self, name: str, folder: Path, report: Report | None = None
    ) -> list[OutputFile]:
        """Bring the files that a run has written so far into a folder: see ``RunBucket.fetch``."""
        bucket = self.bucket(name)
        return await bucket.fetch(folder, (await bucket.plan()).outputs, report)

    async def why_no_files(self, name: str) -> str:
        """Say why a run has no files that could be fetched."""
        outputs = (await self.bucket(name).plan()).outputs
        if not outputs:
            return (
                f"the run {name} has no files: it was started without --outputs, which names the "
                f"folders whose files come back"
            )
        return f"the run {name} has not written any files into {', '.join(outputs)} (yet)"

    async def delete(self, name: str) -> int:
        """Delete what the bucket has of a run.

        Raises:
            ConfigError: If it has not ended.
        """
        found = await self.find(name)
        if found.machine is not None and found.machine.phase != "ended":
            raise ConfigError(
                f"the run {name} is {found.state}: `cloudexec stop {name}` ends it, and then what "
                f"the bucket has of it can be deleted"
            )
        return await self.bucket(name).delete()


def _lacks(profile: Profile) -> str:
    """Say what a profile lacks for runs, and what to do; empty: nothing."""
    remedy = f"`cloudexec up --name {profile.name}` adds it"
    if profile.is_adopted:
        remedy = (
            f"whoever deployed the stack {profile.stack} can bring it up to date with `cloudexec "
            f"template`, and then `cloudexec up --adopt {profile.stack} --name {profile.name}` "
            f"writes the profile anew"
        )
    if not profile.bucket:
        return (
            f"the profile {profile.name!r} has no bucket, through which files and results of runs "
            f"go: {remedy}"
        )
    if not profile.run_role:
        return f"the profile {profile.name!r} has no role for runs: {remedy}"
    return ""


def _limit(request: RunRequest, per_hour: float) -> int:
    """Return after how many seconds a machine is ended, by time and by money.

    Raises:
        ConfigError: If the money is not enough for the least there is.
    """
    seconds = request.max_seconds
    if request.max_cost_usd is not None and per_hour > 0:
        affordable = request.max_cost_usd / per_hour * 3600 - _PULL_SECONDS
        if affordable < LEAST_ATTEMPT_SECONDS:
            least = per_hour * (LEAST_ATTEMPT_SECONDS + _PULL_SECONDS) / 3600
            raise ConfigError(
                f"max_cost=${request.max_cost_usd:g} is not enough for this machine, which costs "
                f"${per_hour:.4f} an hour and is paid for from the download of its image on: give "
                f"${least:.4f} or more"
            )
        seconds = min(seconds, affordable)
    return int(seconds)


def _report_plan(
    report: Report, name: str, request: RunRequest, seconds: int, machine: Machine
) -> None:
    hours, per_hour = seconds / 3600, machine.price.per_hour
    limit = f"{hours:.3g} h" if hours >= 1 else f"{seconds // 60} min"
    spot = " on Spot" if request.machine.spot else ""
    disk = f", {machine.disk_gib} GiB of disk" if machine.disk_gib else ""
    report(
        f"run {name}: {machine.size}{disk}{spot}, about ${per_hour:.3f} an hour; it ends after "
        f"{limit} at the latest, which would cost ${(hours + _PULL_SECONDS / 3600) * per_hour:.2f}"
    )


def _profile_inside(profile: Profile, image: str, arch: str) -> Profile:
    """Return what an executor in the run is to know: the machine is in the network of workers."""
    platform = "linux/amd64" if arch == "x86_64" else "linux/arm64"
    inside = replace(profile, advertise="", relay="", run_role="", images={})
    return inside.with_image(python_version(), platform, image)
