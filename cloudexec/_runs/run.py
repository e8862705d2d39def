"""``run_script`` and ``Run``: runs for programs that block."""

from __future__ import annotations

import contextlib
import math
import os
import time
import weakref
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from cloudexec._aws.clients import AwsClients
from cloudexec._aws.limits import parse_memory
from cloudexec._aws.loop_thread import LoopThread
from cloudexec._aws.profile import Profile
from cloudexec._config import check_count, check_positive
from cloudexec._environment.packages import Packages
from cloudexec._errors import AwsError, ConfigError
from cloudexec._log import Log
from cloudexec._runs.found import Found, Look, Position
from cloudexec._runs.info import RunInfo
from cloudexec._runs.places import MachineRequest
from cloudexec._runs.runs import AsyncRuns, RunRequest

__all__ = ["Run", "RunsClient", "make_request", "profile_name", "run_script"]

_logger = Log()
_T = TypeVar("_T")
_POLL = 1.0
"""Seconds between two looks at a run that is followed."""
_OUTAGE = 600.0
"""Seconds for which AWS may not answer while a run is followed, which goes on meanwhile."""


def profile_name(given: str | None) -> str:
    """Return the profile that is meant: given, in ``CLOUDEXEC_PROFILE``, or ``"default"``."""
    named = os.environ.get("CLOUDEXEC_PROFILE", "")
    return given or (named if named not in ("", "local") else "default")


class RunsClient:
    """Calls ``AsyncRuns`` on an event loop in a thread of its own.

    Args:
        profile: Name of the profile; ``None``: as ``profile_name`` says.

    Raises:
        ConfigError: If there is no such profile, or it lacks what runs need.
    """

    def __init__(self, profile: str | None = None) -> None:
        found = Profile.load(profile_name(profile))
        self.profile = found
        self._thread = LoopThread("cloudexec-runs")
        self._finalizer = weakref.finalize(self, self._thread.close)
        try:
            self.runs: AsyncRuns = self._thread.run(self._open(found))
        except BaseException:
            self.close()
            raise

    async def _open(self, profile: Profile) -> AsyncRuns:
        clients = AwsClients(profile.region)
        self._thread.on_close(clients.close)
        return AsyncRuns(clients, profile)

    def call(self, work: Coroutine[Any, Any, _T]) -> _T:
        """Run a coroutine to its end."""
        return self._thread.run(work)

    def close(self) -> None:
        """Close connections and end the thread. May be called again."""
        self._finalizer()

    def __enter__(self) -> RunsClient:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def make_request(
    target: str | os.PathLike[str] = "",
    args: Sequence[str] = (),
    *,
    module: bool = False,
    cpus: float = 1,
    memory: str | int | None = None,
    gpus: int = 0,
    disk_gib: int | None = None,
    arch: str = "x86_64",
    spot: bool = False,
    on: str = "batch",
    name: str | None = None,
    resume: bool = False,
    files: Sequence[str | os.PathLike[str]] = (),
    outputs: Sequence[str | os.PathLike[str]] = (),
    env: Mapping[str, str] | None = None,
    image: str | None = None,
    packages: str | Path | Packages | None = None,
    max_hours: float = 24,
    max_cost: float | None = None,
    project: str = "",
) -> RunRequest:
    """Return what is to be run, checked; the arguments are those of ``cloudexec.run``.

    Raises:
        ConfigError: If one of them is out of its range.
    """
    target = os.fspath(target)
    args = _texts("args", args)
    for key, value in (env or {}).items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise ConfigError(
                f"env must have names and values that are strings, not {key!r}: {value!r}"
            )
    if image == "":
        raise ConfigError("image must be the name of an image, not ''")
    check_positive("cpus", cpus)
    check_positive("max_hours", max_hours)
    check_count("gpus", gpus, least=0)
    if disk_gib is not None:
        check_count("disk_gib", disk_gib, least=1)
    if arch not in ("x86_64", "arm64"):
        raise ConfigError(f"arch must be 'x86_64' or 'arm64', not {arch!r}")
    kind = "module" if module else "notebook" if target.endswith(".ipynb") else "script"
    if not target:
        kind = "command"
        if module or not args or not args[0].strip():
            raise ConfigError("say what is to be run: a script, a module, a notebook or a command")
    if kind == "notebook" and args:
        raise ConfigError(f"a notebook takes no arguments, and {target} was given {args[0]!r}")
    given = {"CLOUDEXEC_PROFILE", "CLOUDEXEC_LAUNCHER"} & os.environ.keys()
    # With these, an executor in it starts its workers where it would here.
    variables = {each: os.environ[each] for each in given} | dict(env or {})
    if packages is not None and not isinstance(packages, Packages):
        packages = Packages(source=packages)
    _check_notebook(kind, image, packages)
    return RunRequest(
        kind=kind,
        target=target,
        args=args,
        machine=MachineRequest(
            cpus=cpus,
            memory_mib=None if memory is None else parse_memory(memory),
            gpus=gpus,
            disk_gib=disk_gib,
            arch=arch,
            spot=spot,
        ),
        on=on,
        name=name,
        resumes=resume,
        files=_texts("files", files),
        outputs=_texts("outputs", outputs),
        variables=variables,
        image=image,
        packages=packages,
        max_seconds=max_hours * 3600,
        max_cost_usd=max_cost,
        project=project,
    )


def _texts(name: str, given: Sequence[str | os.PathLike[str]]) -> tuple[str, ...]:
    """Return a list of words or paths: what is no string would be in the bucket's record."""
    if isinstance(given, str | bytes | os.PathLike):
        raise ConfigError(
            f"{name} must be a list of strings, not {given!r}: write [{os.fspath(given)!r}]"
        )
    found = []
    for each in given:
        text = os.fspath(each) if isinstance(each, os.PathLike) else each
        if not isinstance(text, str):
            raise ConfigError(f"{name} must be a list of strings, and {each!r} is none")
        found.append(text)
    return tuple(found)


def _check_notebook(kind: str, image: str | None, packages: Packages | None) -> None:
    """Say what a notebook needs, where the machine is to have what is installed here."""
    if kind != "notebook" or image is not None:
        return
    if packages is not None and packages.source != "here":
        return
    from importlib.util import find_spec

    missing = [each for each in ("nbclient", "nbformat", "ipykernel") if find_spec(each) is None]
    if missing:
        raise ConfigError(
            f"a notebook needs {', '.join(missing)}, which the environment here does not have: "
            f"`pip install {' '.join(missing)}`, or name packages or an image that have it"
        )


class Run:
    """A run: a program on one machine in AWS. ``cloudexec.run`` starts one, ``Run.find`` finds one.

    The run goes on whatever becomes of this object and of this program.

    Attributes:
        name: Its name, by which it is found from any machine with the same profile.
    """

    def __init__(self, name: str, client: RunsClient) -> None:
        self.name = name
        self._client = client

    @classmethod
    def find(cls, name: str, *, profile: str | None = None) -> Run:
        """Return a run that was started from here or elsewhere.

        Args:
            name: Its name.
            profile: Name of the profile; by default what ``CLOUDEXEC_PROFILE`` says, or
                ``"default"``.

        Raises:
            ConfigError: If there is no such run or profile.
            AwsError: If AWS refuses, or cannot be reached.
        """
        client = RunsClient(profile)
        try:
            client.call(client.runs.bucket(name).plan())
        except BaseException:
            client.close()
            raise
        return cls(name, client)

    def info(self) -> RunInfo:
        """Say how it is, and what it has cost.

        Raises:
            AwsError: If AWS refuses, or cannot be reached.
        """
        return self._find().info()

    def _find(self) -> Found:
        return self._client.call(self._client.runs.find(self.name))

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end.

        Args:
            timeout: Seconds; ``None``: as long as it takes.

        Returns:
            The program's exit code; 128 + the signal's number if a signal ended it. 122 if the
            program succeeded and a file that it has written is not in the bucket, and 125 if the
            machine could not start it.

        Raises:
            TimeoutError: If it has not ended in time.
            AwsError: If AWS refuses, or cannot be reached for ten minutes; or the machine was lost,
                and with it the exit code (``code`` ``"NoExitCode"``).
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        state = "not known"

        def pause(seconds: float) -> None:
            left = math.inf if deadline is None else deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError(f"the run {self.name} is {state} after {timeout:g} s")
            time.sleep(min(seconds, left))

        client, runs = self._client, self._client.runs
        found = patiently(client, partial(runs.find, self.name), pause)
        while (state := found.state) in ("preparing", "waiting", "starting", "running"):
            pause(_POLL)
            found = patiently(client, partial(runs.again, found), pause)
        if failure := client.call(runs.settle(found)):
            _logger.warning("the run %s has ended: %s", self.name, failure)
        code = found.exit_code
        if code is None:
            why = patiently(client, partial(runs.why, found), pause)
            raise AwsError(
                f"the run {self.name} has no exit code: {why}",
                code="NoExitCode",
                operation="batch:DescribeJobs",
            )
        return code

    def lines(self) -> Iterator[str]:
        """Yield the lines that it prints, from the first on, until it ends.

        Raises:
            AwsError: If AWS refuses, or cannot be reached for ten minutes.
        """
        for look in looks(self._client, self.name, time.sleep):
            yield from look.lines

    def stop(self) -> None:
        """End it, with the workers of executors in it.

        SIGKILL follows SIGTERM after 30 seconds, on Fargate without AWS Batch after 120, and on an
        instance of its own after 60.

        Raises:
            AwsError: If AWS refuses, or cannot be reached.
        """
        self._client.call(
            self._client.runs.stop(self.name, "stopped through cloudexec: Run.stop()")
        )

    def fetch(self, folder: str | os.PathLike[str] = ".") -> list[Path]:
        """Bring the files that it has written so far into its outputs.

        Args:
            folder: Below which they go, to the same places as in the run.

        Returns:
            Their paths.

        Raises:
            AwsError: If AWS refuses, or cannot be reached.
            ConfigError: If a file cannot be written.
        """
        where = Path(os.path.abspath(folder))
        found = self._client.call(self._client.runs.fetch(self.name, where))
        return [where / each.path for each in found]

    def delete(self) -> None:
        """Delete what the bucket has of it. It must have ended.

        Raises:
            AwsError: If AWS refuses, or cannot be reached.
            ConfigError: If it has not ended.
        """
        self._client.call(self._client.runs.delete(self.name))

    def __repr__(self) -> str:
        return f"Run({self.name!r}, profile={self._client.profile.name!r})"


def _ignore(exc: AwsError) -> None:
    """Take no notice of a failure that may pass."""


def patiently(
    client: RunsClient,
    ask: Callable[[], Coroutine[Any, Any, _T]],
    pause: Callable[[float], object],
    notice: Callable[[AwsError], object] = _ignore,
) -> _T:
    """Ask AWS something, and wait out a failure that may pass for some minutes.

    Args:
        client: Calls AWS.
        ask: Asks it.
        pause: Called with seconds between two tries.
        notice: Told of the first failure.

    Raises:
        AwsError: If AWS refuses, or cannot be reached for minutes.
    """
    failing_since: float | None = None
    while True:
        try:
            return client.call(ask())
        except AwsError as exc:
            if not exc.transient:
                raise
            if failing_since is None:
                failing_since = time.monotonic()
                notice(exc)
            elif time.monotonic() - failing_since > _OUTAGE:
                raise
        pause(_POLL)


def looks(
    client: RunsClient,
    name: str,
    pause: Callable[[float], object],
    notice: Callable[[AwsError], object] = _ignore,
) -> Iterator[Look]:
    """Look at a run again and again, until it has ended and all that it printed is read.

    A failure that may pass is waited out for some minutes.

    Args:
        client: Calls AWS.
        name: Of the run.
        pause: Called with seconds between two looks.
        notice: Told of the first of several failures that may pass.

    Raises:
        AwsError: If AWS refuses, or cannot be reached for minutes.
    """
    position = Position()
    runs = client.runs
    found = patiently(client, partial(runs.find, name), pause, notice)
    while found.machine is None:
        if found.state not in ("preparing", "waiting"):
            return
        pause(_POLL)
        found = patiently(client, partial(runs.find, name), pause, notice)
    while True:
        look = patiently(client, partial(runs.look, found, position), pause, notice)
        position = look.position
        found = Found(found.plan, look.machine, found.result)
        yield look
        if position.is_over(look.machine):
            return
        pause(_POLL)


def run_script(
    target: str | os.PathLike[str] = "",
    args: Sequence[str] = (),
    *,
    profile: str | None = None,
    **options: Any,
) -> Run:
    """Start a program on one machine in AWS: what ``cloudexec.run`` does with a path.

    Args:
        target: As for ``cloudexec.run``.
        args: Arguments of the program.
        profile: Name of the profile; by default what ``CLOUDEXEC_PROFILE`` says, or ``"default"``.
        options: As for ``cloudexec.run``.

    Returns:
        The run, which goes on by itself.

    Raises:
        ConfigError: If it cannot be run as it is wanted.
        AwsError: If AWS refuses, or cannot be reached.
        LaunchError: If the image cannot be made.
    """
    request = make_request(target, args, **options)
    client = RunsClient(profile)
    try:
        plan = client.call(client.runs.start(request, _silent))
    except BaseException:
        with contextlib.suppress(Exception):
            client.close()
        raise
    return Run(plan.name, client)


def _silent(line: str) -> None:
    pass


Run.__module__ = run_script.__module__ = "cloudexec"
