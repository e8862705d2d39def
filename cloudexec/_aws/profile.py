"""Profiles: files with the settings of an account and region that ``cloudexec up`` writes."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from cloudexec._aws.names import is_setup_name
from cloudexec._errors import ConfigError

__all__ = ["Profile", "profile_directory"]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """The settings that an executor needs to launch workers in an account. It holds no secret."""

    name: str
    region: str
    stack: str = ""
    """CloudFormation stack; empty if the user wrote the profile by hand."""
    queues: Mapping[str, str] = field(default_factory=dict)
    """ARN or name of each job queue that exists: ``"fargate"``, ``"fargate_spot"``, ``"ec2"``,
    ``"ec2_spot"`` and, for relays, ``"fargate_relay"``."""
    job_role: str = ""
    """ARN of the role of tasks."""
    execution_role: str = ""
    """ARN of the role with which AWS pulls the image and reads the key."""
    run_role: str = ""
    """ARN of the role of programs that ``cloudexec run`` starts."""
    key_secret: str = ""
    """ARN of the secret with the stack's key, which workers and executors read."""
    log_group: str = ""
    bucket: str = ""
    repository: str = ""
    """URI of the image repository."""
    images: Mapping[str, str] = field(default_factory=dict)
    """Image, pinned by digest, by Python version and platform: ``"3.11-linux/amd64"``."""
    security_group: str = ""
    """Security group of the workers. A machine in the VPC that joins it lets workers connect."""
    vpc: str = ""
    subnets: tuple[str, ...] = ()
    assign_public_ip: bool = True
    """Whether workers get a public address, which they need in public subnets."""
    advertise: str = ""
    """Host or ``host:port`` at which workers reach the client; empty: executors find it."""
    project: str = ""
    """Project, which becomes a tag of every job."""
    cluster: str = ""
    """ARN or name of the cluster of Amazon ECS in which ``Fargate`` runs workers; empty: the stack
    has none."""
    function_role: str = ""
    """ARN of the role of functions in which ``Lambda`` runs workers; empty: the stack has none."""
    instance_profile: str = ""
    """ARN of the profile that the instances of ``EC2`` have; empty: the stack has none."""
    instance_role: str = ""
    """ARN of its role, which pulls the image, reads the key and writes the log."""
    run_profile: str = ""
    """ARN of the profile of instances that ``cloudexec run --on ec2`` starts, whose role is
    ``run_role``; empty: the stack has none."""
    relay: str = ""
    """Default of a launcher's ``relay=``. It is ``"auto"`` if workers could not reach this machine
    when the profile was written."""

    @property
    def is_adopted(self) -> bool:
        """Whether another person deployed the stack, so that cloudexec never changes it."""
        return bool(self.stack) and self.stack != f"cloudexec-{self.name}"

    def image(self, python: str, platform: str) -> str:
        """Return the image for a Python version and platform, or an empty string."""
        return self.images.get(f"{python}-{platform}", "")

    def with_image(self, python: str, platform: str, uri: str) -> Profile:
        """Return a copy of the profile with an image added or replaced."""
        return replace(self, images={**self.images, f"{python}-{platform}": uri})

    @classmethod
    def path(cls, name: str) -> Path:
        """Return the file of a profile.

        Raises:
            ConfigError: If the name is not allowed.
        """
        if not _NAME.fullmatch(name):
            raise ConfigError(
                f"the name of a profile is letters, digits, '-', '_' and '.', not {name!r}"
            )
        return profile_directory() / f"{name}.json"

    @classmethod
    def load(cls, name: str) -> Profile:
        """Read a profile.

        Raises:
            ConfigError: If there is no such profile, or its file cannot be read.
        """
        path = cls.path(name)
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            others = ", ".join(cls.names()) or "none"
            text = f"there is no profile {name!r} ({path}); profiles here: {others}"
            if is_setup_name(name):
                text += f". `cloudexec up --name {name}` makes one"
            raise ConfigError(text) from None
        except (OSError, ValueError) as exc:
            raise ConfigError(f"the profile {path} cannot be read: {exc}") from exc
        return cls._of(data, path)

    @classmethod
    def _of(cls, data: Any, path: Path) -> Profile:
        known = {each.name for each in fields(cls)}
        if not isinstance(data, dict) or not {"name", "region"} <= data.keys():
            raise ConfigError(f"the file {path} is not a profile: it has no name and region")
        # A newer release may have written settings that this one does not know.
        values = {key: value for key, value in data.items() if key in known}
        for key, value in values.items():
            if not _fits(key, value):
                raise ConfigError(f"the profile {path} has {key}={value!r}, which cannot be")
        values["subnets"] = tuple(values.get("subnets", ()))
        return cls(**values)

    @classmethod
    def names(cls) -> list[str]:
        """Return the names of all profiles, sorted."""
        try:
            return sorted(path.stem for path in profile_directory().glob("*.json"))
        except OSError:
            return []

    def save(self) -> Path:
        """Write the profile in one step, readable by this user only.

        Raises:
            ConfigError: If it cannot be written.
        """
        path = self.path(self.name)
        draft = path.with_suffix(f".{os.getpid()}.tmp")
        text = json.dumps(asdict(self), indent=2, sort_keys=True) + "\n"
        with _writing(path):
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            with open(descriptor, "w", encoding="utf-8") as file:
                file.write(text)
            os.replace(draft, path)
        return path

    @classmethod
    def check_writable(cls, name: str) -> None:
        """Create the directory of profiles, so that an error is found before anything is set up.

        Raises:
            ConfigError: If no profile can be written there.
        """
        path = cls.path(name)
        with _writing(path):
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            if not os.access(path.parent, os.W_OK | os.X_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    def delete(self) -> None:
        """Delete the profile's file, if it exists."""
        self.path(self.name).unlink(missing_ok=True)


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        raise ConfigError(
            f"the profile {path} cannot be written: {exc.strerror}; CLOUDEXEC_CONFIG_DIR names "
            f"another directory"
        ) from exc


def _fits(key: str, value: Any) -> bool:
    """Return whether a value of the file has the type that the setting needs."""
    if key in ("queues", "images"):
        return isinstance(value, dict) and all(isinstance(each, str) for each in value.values())
    if key == "subnets":
        return isinstance(value, list) and all(isinstance(each, str) for each in value)
    return isinstance(value, bool if key == "assign_public_ip" else str)


def profile_directory() -> Path:
    """Return the directory of profiles: ``$CLOUDEXEC_CONFIG_DIR``, or ``cloudexec`` in the user's
    configuration directory."""
    own = os.environ.get("CLOUDEXEC_CONFIG_DIR")
    if own:
        return Path(own)
    base = os.environ.get("XDG_CONFIG_HOME") or os.path.join(os.path.expanduser("~"), ".config")
    return Path(base) / "cloudexec"


Profile.__module__ = "cloudexec.aws"
