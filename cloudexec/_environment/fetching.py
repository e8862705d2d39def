"""Wheels for another platform, and wheels of projects: got by uv where it is there, else by pip."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from packaging.utils import canonicalize_name

from cloudexec._environment.local_requirements import (
    is_dynamic,
    is_for_pip_only,
    lines_of,
    local_of,
    masked,
    project_name,
    project_table,
    refuse_local,
)
from cloudexec._environment.target import Target
from cloudexec._errors import ConfigError

__all__ = ["Installer", "NoWheelError", "find_installer", "names_of"]

_LINES = 6
_LOG_LINES = 25
_TRIES = 8
"""Requirements that are tried one by one at a time, to name all that cannot be had."""
_LONGEST = 3600.0
_OLDEST_UV = "0.5.23"
"""The first one that has --no-default-groups. uv's changelog, 0.5.23."""


class NoWheelError(Exception):
    """Some requirements cannot be had for the platform.

    Args:
        reasons: What the installer says, by requirement. Passwords in requirements are masked.
    """

    def __init__(self, reasons: dict[str, str]) -> None:
        self.reasons = {masked(requirement): said for requirement, said in reasons.items()}
        super().__init__(", ".join(self.reasons))


@dataclass(frozen=True, slots=True)
class Installer:
    """Installs packages for a target into a directory."""

    command: tuple[str, ...]
    is_uv: bool
    wheelhouse: Path | None = None
    """Where all wheels are, instead of any index."""

    def fetch(self, requirements: Sequence[str], target: Target, into: Path) -> None:
        """Install wheels into a new directory, without what they require.

        Raises:
            NoWheelError: If some cannot be had; all of them are named.
        """
        done = self._install(requirements, target, into)
        if done.returncode == 0:
            return
        shutil.rmtree(into, ignore_errors=True)
        if len(requirements) == 1:
            raise NoWheelError({requirements[0]: _said(done)})

        def try_one(requirement: str) -> str:
            with tempfile.TemporaryDirectory(prefix="cloudexec-wheels-") as name:
                alone = self._install([requirement], target, Path(name, "one"))
            return _said(alone) if alone.returncode else ""

        with ThreadPoolExecutor(_TRIES) as pool:
            reasons = dict(zip(requirements, pool.map(try_one, requirements), strict=True))
        failed = {requirement: reason for requirement, reason in reasons.items() if reason}
        # Where each one can be had, and all together cannot.
        raise NoWheelError(failed or dict.fromkeys(requirements, _said(done)))

    def _install(
        self, requirements: Sequence[str], target: Target, into: Path
    ) -> subprocess.CompletedProcess[str]:
        # In a file, as addresses may have a password in them, which a list of processes would show.
        with _requirements_file(requirements) as file:
            return self._run(
                *self._verb(target, into), "--no-deps", "-r", str(file), *self._sources()
            )

    def fetch_file(
        self, file: Path, target: Target, into: Path, exclude: Set[str] = frozenset()
    ) -> None:
        """Install what a requirements file, ``pyproject.toml`` or ``uv.lock`` names, and what that
        requires.

        Args:
            file: Names what is wanted.
            target: Where it is to run.
            into: A new directory.
            exclude: Names of projects that are not built, if the file names their directories.

        Raises:
            ConfigError: If that cannot be had, or pip cannot do it here.
        """
        if not self.is_uv and not target.is_like_this_machine:
            raise ConfigError(
                f"packages={str(file)!r} needs uv for workers on {target}: pip would choose what "
                f"is required on this machine, which is another platform or has another Python; "
                f"`pip install uv`"
            )
        with contextlib.ExitStack() as stack:
            given = file
            if file.name == "uv.lock":
                given = stack.enter_context(_requirements_file(self._export(file)))
            elif file.suffix == ".toml":
                _check_project(file, target)
                refuse_local(file)
                if is_dynamic(file):
                    given = stack.enter_context(_requirements_file(["./"]))
                    exclude = frozenset()  # Its wheel alone says what it requires.
                elif not self.is_uv:
                    given = stack.enter_context(
                        _requirements_file(project_table(file).get("dependencies", ()))
                    )
            if given.suffix == ".txt":
                given = stack.enter_context(self._with_wheels(given, file, exclude))
            done = self._run(
                *self._verb(target, into), "-r", str(given), *self._sources(), folder=file.parent
            )
        if done.returncode:
            raise ConfigError(
                f"what {file} requires cannot be installed for {target}: {_said(done)}"
            )

    @contextlib.contextmanager
    def _with_wheels(self, given: Path, file: Path, exclude: Set[str]) -> Iterator[Path]:
        """Build the projects on this machine that a requirements file names, and name their wheels
        instead: an editable one would be a path that workers do not have."""
        lines = lines_of(given)
        named = [local_of(line, file.parent) for line in lines]
        has_project = any(each is not None and not each.path.is_file() for each in named)
        if not has_project and not is_for_pip_only(given):
            yield given
            return
        with tempfile.TemporaryDirectory(prefix="cloudexec-wheels-") as name:
            for number, each in enumerate(named):
                if each is None or each.path.is_file():
                    continue
                if not each.path.is_dir():
                    raise ConfigError(f"{file} names the project {each.path}, which is not there")
                if project_name(each.path) in exclude:
                    lines[number] = ""
                    continue
                wheel = self._wheel(each.path, Path(name, str(number)))
                project = wheel.name.partition("-")[0]
                lines[number] = f"{project}{each.extras} @ {wheel.as_uri()}{each.marker}"
            with _requirements_file(lines) as changed:
                yield changed

    def _export(self, lock: Path) -> Iterator[str]:
        if not self.is_uv:
            raise ConfigError(f"{lock} is read by uv, which is not here: `pip install uv`")
        done = self._run(
            "export",
            "--frozen",
            "--no-default-groups",
            "--no-emit-project",
            "--format",
            "requirements-txt",
            "--no-header",
            "--directory",
            str(lock.parent.absolute()),
        )
        if done.returncode and "--no-default-groups" in done.stderr:
            version = self._run("--version").stdout.strip() or "this uv"
            raise ConfigError(
                f"{version} ({self.command[0]}) is too old to read {lock}: version {_OLDEST_UV} or "
                f"later is needed; `pip install --upgrade uv`"
            )
        if done.returncode:
            raise ConfigError(f"uv cannot read {lock}: {_said(done)}")
        yield from done.stdout.splitlines()

    def build(self, source: Path, into: Path) -> None:
        """Build the wheel of a project and install it, without what it requires, into a directory.

        Raises:
            ConfigError: If it cannot be built.
        """
        with tempfile.TemporaryDirectory(prefix="cloudexec-wheel-") as name:
            wheel = self._wheel(source, Path(name))
            done = self._run(*self._plain_verb(into), "--no-deps", "--no-index", str(wheel))
            if done.returncode:
                raise ConfigError(f"{wheel.name} cannot be installed: {_said(done)}")

    def _wheel(self, source: Path, folder: Path) -> Path:
        verb: tuple[str, ...]
        if self.is_uv:
            verb = ("build", "--wheel", "--python", sys.executable, "--out-dir", str(folder))
        else:
            verb = ("wheel", "--no-deps", "-q", "--disable-pip-version-check", "-w", str(folder))
        done = self._run(*verb, str(source), *self._sources())
        wheels = list(folder.glob("*.whl"))
        if done.returncode or len(wheels) != 1:
            raise ConfigError(f"the wheel of the project {source} cannot be built:\n{_log(done)}")
        return wheels[0]

    def _verb(self, target: Target, into: Path) -> list[str]:
        options = [*self._plain_verb(into), "--only-binary", ":all:"]
        options += ["--python-version", target.python]
        if self.is_uv:
            return [*options, "--python-platform", target.uv_platform()]
        options += ["--implementation", "cp"]
        # The last is what projects with libraries are built for on such a machine, as for uv.
        for name in (*target.wheel_platforms, f"linux_{target.machine}"):
            options += ["--platform", name]
        return options

    def _plain_verb(self, into: Path) -> list[str]:
        if self.is_uv:
            options = ["pip", "install", "-q", "--python", sys.executable, "--link-mode", "copy"]
            return [*options, "--no-python-downloads", "--target", str(into)]
        options = ["install", "-q", "--no-compile", "--disable-pip-version-check", "--no-input"]
        return [*options, "--root-user-action=ignore", "--target", str(into)]

    def _sources(self) -> list[str]:
        if self.wheelhouse is None:
            return []
        options = ["--no-index", "--find-links", str(self.wheelhouse.absolute())]
        # uv would take what it has kept, though another wheel has taken that name since.
        return [*options, "--refresh"] if self.is_uv else options

    def _run(self, *arguments: str, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
        environment = {
            name: value
            for name, value in os.environ.items()
            # They would install elsewhere, compile, or want what a target cannot have.
            if name not in ("PIP_TARGET", "PIP_PREFIX", "PIP_USER", "UV_COMPILE_BYTECODE")
        }
        environment["PYTHONDONTWRITEBYTECODE"] = "1"
        with _building_elsewhere() as settings:
            # A user's own such file says where else.
            environment.setdefault("DIST_EXTRA_CONFIG", str(settings))
            try:
                return subprocess.run(
                    [*self.command, *arguments],
                    capture_output=True,
                    text=True,
                    stdin=subprocess.DEVNULL,
                    timeout=_LONGEST,
                    check=False,
                    env=environment,
                    cwd=folder,
                )
            except (OSError, subprocess.TimeoutExpired) as exc:
                raise ConfigError(f"{self.command[0]} cannot be run: {exc}") from exc


def find_installer(wheelhouse: Path | None = None) -> Installer:
    """Return uv if it is there, else pip.

    Raises:
        ConfigError: If there is neither.
    """
    # That of this environment comes first.
    beside = Path(sys.executable).with_name("uv")
    for uv in (str(beside) if beside.is_file() else None, shutil.which("uv")):
        if uv is not None and _runs(uv):
            return Installer((uv,), True, wheelhouse)
    if importlib.util.find_spec("pip") is not None:
        return Installer((sys.executable, "-m", "pip"), False, wheelhouse)
    raise ConfigError(
        "neither uv nor pip is here, and packages have to be got for the workers' platform: "
        "install uv, or `python -m ensurepip`"
    )


def _runs(program: str) -> bool:
    """Whether a program runs: a version manager may have one by that name that does not."""
    try:
        done = subprocess.run(
            [program, "--version"], capture_output=True, stdin=subprocess.DEVNULL, timeout=30
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0


def names_of(requirements: Iterable[str]) -> list[str]:
    """Return the names in requirements.

    Raises:
        ConfigError: If one is not a requirement.
    """
    from packaging.requirements import InvalidRequirement, Requirement

    names: list[str] = []
    for text in requirements:
        try:
            names.append(canonicalize_name(Requirement(text).name))
        except InvalidRequirement as exc:
            # Not raised from the other one, which has the text with its password.
            raise ConfigError(
                f"{masked(text)!r} is not a requirement such as 'numpy>=2': {masked(str(exc))}"
            ) from None
    return names


def _check_project(file: Path, target: Target) -> None:
    """Refuse a ``pyproject.toml`` that no worker on a target can have.

    Raises:
        ConfigError: If a dependency is no requirement, or the project needs another Python.
    """
    from packaging.specifiers import InvalidSpecifier, SpecifierSet

    project = project_table(file)
    try:
        names_of(project.get("dependencies", ()))
    except ConfigError as exc:
        raise ConfigError(f"{file}: {exc}") from None
    text = str(project.get("requires-python", ""))
    try:
        wanted = SpecifierSet(text)
    except InvalidSpecifier as exc:
        raise ConfigError(f"{file}: requires-python={text!r} names no versions: {exc}") from None
    # Which patch version workers have is not known here.
    if not any(wanted.contains(f"{target.python}.{patch}") for patch in (0, 99)):
        raise ConfigError(
            f"{file} requires Python {text}, and workers have Python {target.python}, as this "
            f"program does: run it with such a Python"
        )


@contextlib.contextmanager
def _requirements_file(lines: Iterable[str]) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="cloudexec-requirements-") as name:
        file = Path(name, "requirements.txt")
        file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        yield file


@contextlib.contextmanager
def _building_elsewhere() -> Iterator[Path]:
    """Yield a file of settings by which setuptools builds in a directory that is removed.

    Beside the source, it would leave files there, and put into wheels what was deleted since.
    """
    with tempfile.TemporaryDirectory(prefix="cloudexec-build-") as name:
        file = Path(name, "settings.cfg")
        file.write_text(
            f"[build]\nbuild_base = {name}/build\n[egg_info]\negg_base = {name}\n",
            encoding="utf-8",
        )
        yield file


def _said(done: subprocess.CompletedProcess[str]) -> str:
    """Return the end of what an installer said, without passwords."""
    return " ".join(_lines(done)[-_LINES:]) or f"it ended with code {done.returncode}"


def _log(done: subprocess.CompletedProcess[str]) -> str:
    return "\n".join(f"  {line}" for line in _lines(done)[-_LOG_LINES:])


def _lines(done: subprocess.CompletedProcess[str]) -> list[str]:
    text = masked(done.stderr or done.stdout)
    return [line.strip() for line in text.splitlines() if line.strip()]
