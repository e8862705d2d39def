"""What a run is: program, machine, files and limits, as the bucket has it."""

from __future__ import annotations

import json
import re
import secrets
import time
from collections.abc import Container, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path, PurePosixPath
from typing import Any

from cloudexec._aws.profile import Profile
from cloudexec._errors import ConfigError

__all__ = [
    "KINDS",
    "RunPlan",
    "RunResult",
    "check_name",
    "check_output_folders",
    "check_outputs",
    "known",
    "new_name",
    "new_start_id",
]

KINDS = ("script", "module", "notebook", "command")
_NAME = re.compile(r"(?=.{1,40}$)[a-z][a-z0-9]*(-[a-z0-9]+)*")
_TAKEN = re.compile(r"worker-\d+")
"""What errors call workers: `cloudexec logs` takes both."""
_SUFFIX = "bcdfghjkmnpqrstvwxz"
"""Letters that make no words, and are not taken for digits."""
_STEM_LONGEST = 24


@dataclass(frozen=True, slots=True, kw_only=True)
class RunPlan:
    """What is to be run, and on what."""

    name: str
    kind: str
    """One of ``KINDS``."""
    target: str
    """Path of the script or notebook below the run's folder, name of the module, or nothing."""
    args: tuple[str, ...] = ()
    """Arguments; the whole command where there is no target."""
    python_path: tuple[str, ...] = ()
    """Folders below the run's in which modules are found."""
    outputs: tuple[str, ...] = ()
    """Folders below the run's whose files come back, or files that do."""
    output_folders: tuple[str, ...] = ()
    """Those outputs that are made as folders before the program starts."""
    files_bytes: int = 0
    """Size of the archive of files that were sent; 0: there is none."""
    files_sha256: str = ""
    variables: tuple[str, ...] = ()
    """Names of variables whose values the bucket has."""
    on: str = "batch"
    """Name of the place that has the machine."""
    vcpus: float = 1.0
    memory_mib: int = 2048
    gpus: int = 0
    disk_gib: int | None = None
    """``None``: what the place gives without being asked."""
    arch: str = "x86_64"
    compute: str = "fargate"
    spot: bool = False
    image: str = ""
    max_seconds: int = 86400
    """After which the machine's place ends it, counted for each attempt."""
    max_cost_usd: float | None = None
    """Of the machine and of all workers that executors in it start."""
    per_hour_usd: float = 0.0
    """List price of the machine."""
    user: str = ""
    project: str = ""
    created_at: float = field(default_factory=time.time)
    """Unix time."""
    role: str = ""
    """ARN of the program's role, for a machine that starts the next attempt itself."""
    start_id: str = ""
    """Of this start: another one of the same name, such as with ``--resume``, has another one."""
    region: str = ""
    profile: Mapping[str, Any] = field(default_factory=dict)
    """What an executor in it knows of the account, as a profile has it."""

    @property
    def title(self) -> str:
        """The command, for people."""
        words = {"module": ["-m", self.target], "command": ["--"]}.get(self.kind, [self.target])
        return " ".join([*words, *self.args])

    def profile_inside(self) -> Profile | None:
        """Return what an executor in it knows of the account; ``None``: nothing."""
        if not self.profile:
            return None
        subnets = tuple(self.profile.get("subnets", ()))
        return Profile(**{**known(Profile, self.profile), "subnets": subnets})

    def to_json(self) -> bytes:
        """Return what the bucket keeps."""
        return json.dumps(asdict(self), indent=1).encode()

    @classmethod
    def from_json(cls, data: bytes) -> RunPlan:
        """Read what the bucket has.

        Raises:
            ConfigError: If that is no plan that this version understands.
        """
        values = _values(cls, data, "run.json")
        try:
            for name in ("args", "python_path", "outputs", "output_folders", "variables"):
                # A number among them must not hide all runs from whoever lists them.
                values[name] = tuple(map(str, values.get(name, ())))
            plan = cls(**values)
        except TypeError as exc:
            raise ConfigError(f"the bucket's run.json of a run cannot be read: {exc}") from exc
        if plan.kind not in KINDS:
            raise ConfigError(
                f"the run {plan.name} was started by a newer cloudexec (it is a {plan.kind!r}): "
                f"upgrade this one"
            )
        return plan


@dataclass(frozen=True, slots=True, kw_only=True)
class RunResult:
    """How the program ended, as the machine has written it."""

    exit_code: int
    """As shells have it: 128 + the signal's number if a signal ended it."""
    attempt: int = 1
    started_at: float = 0.0
    """Unix time, of this attempt."""
    ended_at: float = 0.0
    reason: str = ""
    """Why, unless the program ended by itself."""
    is_final: bool = True
    """Whether no other attempt follows: one that was told to stop may be made again."""
    start_id: str = ""
    """As of the plan: of another start, it says nothing of this one."""
    was_stopped: bool = False
    """Whether somebody stopped the run before it had a machine: none runs the program then."""
    workers_usd: float = 0.0
    """What workers cost that executors in it have started."""

    def to_json(self) -> bytes:
        """Return what the bucket keeps."""
        return json.dumps(asdict(self)).encode()

    @classmethod
    def from_json(cls, data: bytes) -> RunResult:
        """Read what the bucket has.

        Raises:
            ConfigError: If that is no result.
        """
        return cls(**_values(cls, data, "result.json"))


def known(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return those values that a record has: a newer release may have written more."""
    names = {each.name for each in fields(cls)}
    return {key: value for key, value in values.items() if key in names}


def _values(cls: type, data: bytes, name: str) -> dict[str, Any]:
    try:
        return known(cls, json.loads(data))
    except (ValueError, AttributeError) as exc:
        raise ConfigError(f"the bucket's {name} of a run cannot be read: {exc}") from exc


def new_name(title: str) -> str:
    """Return a name that no other run has, and that says what is run.

    Args:
        title: Of what is run, such as a script's path.
    """
    words = re.findall("[a-z0-9]+", PurePosixPath(title.replace("\\", "/")).stem.lower())
    stem = "-".join(words)[:_STEM_LONGEST].strip("-")
    if not stem[:1].isalpha():
        stem = f"run-{stem}".strip("-")
    return f"{stem}-{''.join(secrets.choice(_SUFFIX) for _ in range(5))}"


def new_start_id() -> str:
    """Return an id that no other start of a run has."""
    return secrets.token_hex(6)


def check_name(name: str) -> str:
    """Return a name that a run may have.

    Raises:
        ConfigError: If it may not.
    """
    if not _NAME.fullmatch(name) or _TAKEN.fullmatch(name):
        raise ConfigError(
            f"the name of a run is 1 to 40 lower-case letters and digits, beginning with a letter, "
            f"with single hyphens between them, and not like a worker's (worker-1): not {name!r}"
        )
    return name


def check_output_folders(
    given: Sequence[str], sent: Container[str], base: Path | None = None
) -> tuple[str, ...]:
    """Return which outputs are made as folders before the program starts.

    Others are files, or left to the program: those whose name has a suffix, such as
    ``results.csv``, unless a folder of that name is here or the name ends with a slash.

    Args:
        given: Outputs, as the user has named them.
        sent: Paths of files that are sent.
        base: The folder that the run's folder stands for; by default the current one.

    Raises:
        ConfigError: If a folder would be made where a file is.
    """
    found = []
    for each in given:
        path = PurePosixPath(each)
        here = (base or Path()) / path
        if here.is_dir() or each.endswith("/") or not path.suffix:
            if str(path) in sent:
                continue  # the program finds the file there
            if here.is_file():
                raise ConfigError(
                    f"{each!r} has no suffix, so that a folder of that name would be made for the "
                    f"program, and it is a file here: name the folder that it is in, or another one"
                )
            found.append(str(path))
    return tuple(dict.fromkeys(found))


def check_outputs(outputs: Sequence[str]) -> tuple[str, ...]:
    """Return folders whose files come back, and files that do, in one form.

    Raises:
        ConfigError: If one of them is not below the folder in which the program runs.
    """
    found = []
    for each in outputs:
        path = PurePosixPath(each)
        if not each or path.is_absolute() or ".." in path.parts:
            raise ConfigError(
                f"outputs are folders or files below the current folder, such as results, not "
                f"{each!r}: the program runs in a folder of its own, and its files come back to "
                f"the same place below the current one"
            )
        found.append(str(path))
    return tuple(dict.fromkeys(found))
