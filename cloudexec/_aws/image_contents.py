"""Collects the contents of a worker's image as plain data, named by its hash."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import importlib.metadata
import io
import json
import re
import shutil
import sys
import tempfile
import tomllib
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from cloudexec._errors import ConfigError

__all__ = [
    "PLATFORMS",
    "WORKER_REQUIREMENTS",
    "Contents",
    "ImageSpec",
    "collect",
    "default_base",
    "own_folder",
    "own_version",
    "own_wheel",
    "worker_pins",
]

PLATFORMS = ("linux/amd64", "linux/arm64")
WORKER_REQUIREMENTS = ("cloudpickle", "grpcio", "protobuf", "tenacity", "urllib3")
"""All packages that a worker imports besides cloudexec. The image gets the versions that the client
has of these and of their dependencies, so that payloads and messages fit."""

INIT_REQUIREMENT = "dumb-init==1.2.5.post1"
"""The image's init, a static program for both platforms. It comes as a wheel, so the base image
needs no package manager, and an image for another platform needs no emulation to install it."""

_PYTHON = re.compile(r"3\.\d{1,2}")
_PACKAGE = re.compile(r"[a-z0-9][a-z0-9+.:-]*(=[A-Za-z0-9.+:~-]+)?")
_PROJECT = re.compile(r"\s*([A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?)")
_PIP_OPTIONS = (
    "--extra-index-url",
    "--find-links",
    "--index-url",
    "--no-binary",
    "--no-index",
    "--only-binary",
    "--pre",
    "--prefer-binary",
    "--require-hashes",
    "--trusted-host",
    "-f",
    "-i",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageSpec:
    """Options of an image.

    Raises:
        ConfigError: If a field is out of its range.
    """

    python: str = f"{sys.version_info.major}.{sys.version_info.minor}"
    """Minor version. Functions run only on the minor version that has pickled them."""
    platform: str = "linux/amd64"
    """One of ``PLATFORMS``."""
    base: str = ""
    """Image with this Python, pip and glibc; empty: the official one."""
    builder: str = ""
    """The same base for the engine's own platform, if ``base`` is for one platform only."""
    requirements: Path | None = None
    """The user's requirements file, or a lock file in its format."""
    wheelhouse: Path | None = None
    """Directory of wheels, which are installed instead of those of an index."""
    packages: tuple[str, ...] = ()
    """Debian packages."""

    def __post_init__(self) -> None:
        if not _PYTHON.fullmatch(self.python):
            raise ConfigError(f"python is a minor version such as 3.11, not {self.python!r}")
        if self.platform not in PLATFORMS:
            raise ConfigError(f"platform is one of {', '.join(PLATFORMS)}, not {self.platform!r}")
        for package in self.packages:
            if not _PACKAGE.fullmatch(package):
                raise ConfigError(f"{package!r} is not the name of a Debian package")
        if self.requirements is not None and not self.requirements.is_file():
            raise ConfigError(f"there is no requirements file {self.requirements}")
        if self.wheelhouse is not None and not self.wheelhouse.is_dir():
            raise ConfigError(f"the wheelhouse {self.wheelhouse} is not a directory")

    @property
    def base_image(self) -> str:
        """The base image in use."""
        return self.base or default_base(self.python)


def default_base(python: str) -> str:
    """Return the official image of a Python version."""
    return f"docker.io/library/python:{python}-slim"


@dataclass(frozen=True, slots=True, kw_only=True)
class Contents:
    """A build context as data: all contents of an image except its base."""

    spec: ImageSpec
    version: str
    """Version of cloudexec."""
    files: Mapping[str, bytes | Path] = field(repr=False)
    """Content, or the file that holds it, by path in the context."""

    def content_hash(self, base_id: str) -> str:
        """Return 16 hex digits that differ if the image differs, on the base with this id."""
        spec = self.spec
        whole = hashlib.sha256()
        whole.update(
            json.dumps(
                [
                    spec.python,
                    spec.platform,
                    spec.base_image,
                    spec.builder,
                    base_id,
                    sorted(spec.packages),
                ]
            ).encode()
        )
        for name in sorted(self.files):
            whole.update(f"\n{name} {_digest(self.files[name])}".encode())
        return whole.hexdigest()[:16]

    @contextlib.contextmanager
    def directory(self) -> Iterator[Path]:
        """Yield a temporary directory that holds all files."""
        with tempfile.TemporaryDirectory(prefix="cloudexec-image-") as name:
            root = Path(name)
            # The Dockerfile always copies this directory, even if there is no wheelhouse.
            (root / "wheelhouse").mkdir()
            for path, content in self.files.items():
                target = root / path
                target.parent.mkdir(parents=True, exist_ok=True)
                if isinstance(content, Path):
                    shutil.copyfile(content, target)
                else:
                    target.write_bytes(content)
            yield root


def _digest(content: bytes | Path) -> str:
    if isinstance(content, bytes):
        return hashlib.sha256(content).hexdigest()
    with open(content, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def collect(spec: ImageSpec) -> Contents:
    """Collect the contents of an image.

    Raises:
        ConfigError: If the requirements cannot be used in an image, or cloudexec itself is
            incomplete.
    """
    package = own_folder()
    version = own_version()
    name, wheel = _own_wheel(package, version)
    files: dict[str, bytes | Path] = {
        **_recipe(package),
        "requirements/worker.txt": "".join(f"{pin}\n" for pin in worker_pins()).encode(),
        f"cloudexec/{name}": wheel,
    }
    if spec.requirements is not None:
        for path, content in _Requirements(spec.requirements).files().items():
            files[f"requirements/{path}"] = content
    if spec.wheelhouse is not None:
        wheels = [
            path
            for path in sorted(spec.wheelhouse.iterdir())
            if path.name.endswith((".whl", ".tar.gz", ".zip"))
        ]
        if not wheels:
            raise ConfigError(f"the wheelhouse {spec.wheelhouse} has no wheel in it")
        files["requirements/no-index"] = b""
        files.update({f"wheelhouse/{path.name}": path for path in wheels})
    return Contents(spec=spec, version=version, files=files)


def own_folder() -> Path:
    """Return the directory of the cloudexec that runs here."""
    return Path(__file__).parent.parent


def own_version() -> str:
    """Return the version of the cloudexec that runs here."""
    return _own_version(own_folder())


def own_wheel() -> bytes:
    """Return a wheel of the code that runs here. The same code gives the same bytes."""
    return _own_wheel(own_folder(), own_version())[1]


def worker_pins() -> list[str]:
    """Return a worker's requirements in pip's format, with the versions installed here."""
    pins: dict[str, str] = {}
    wanted = list(WORKER_REQUIREMENTS)
    while wanted:
        name = _canonical(wanted.pop())
        if name in pins:
            continue
        try:
            distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            if name in WORKER_REQUIREMENTS:
                raise ConfigError(
                    f"{name} is not installed as a package here, so its version for the image is "
                    f"not known: install cloudexec with pip"
                ) from None
            continue  # it is required under a condition that does not hold here
        pins[name] = f"{name}=={distribution.version}"
        for requirement in distribution.requires or ():
            if "extra ==" not in requirement and (match := _PROJECT.match(requirement)):
                wanted.append(match[1])
    return [*(pins[name] for name in sorted(pins)), INIT_REQUIREMENT]


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _recipe(package: Path) -> dict[str, bytes | Path]:
    # An installed package contains the directory images/ of the source tree.
    for folder in (package / "_aws" / "_image", package.parent / "images"):
        if (folder / "Dockerfile").is_file():
            return {name: (folder / name).read_bytes() for name in ("Dockerfile", "assemble.py")}
    raise ConfigError("cloudexec was installed without the image's Dockerfile: install it again")


def _own_version(package: Path) -> str:
    project = package.parent / "pyproject.toml"
    if project.is_file():
        about = tomllib.loads(project.read_text(encoding="utf-8")).get("project", {})
        if about.get("name") == "cloudexec":
            return str(about["version"])
    return importlib.metadata.version("cloudexec")


def _own_wheel(package: Path, version: str) -> tuple[str, bytes]:
    """Make a wheel of the code that runs here, and return its name and content.

    It is made from the installed files, so any way of installing cloudexec will do. The same code
    gives the same bytes. The wheel has no requirements, as the image needs none of the client's.
    """
    info = f"cloudexec-{version}.dist-info"
    files = {
        path.relative_to(package.parent).as_posix(): path.read_bytes()
        for path in sorted(package.rglob("*"))
        if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".pyc"
    }
    files[f"{info}/METADATA"] = (
        f"Metadata-Version: 2.1\nName: cloudexec\nVersion: {version}\n"
    ).encode()
    files[f"{info}/WHEEL"] = (
        b"Wheel-Version: 1.0\nGenerator: cloudexec\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    )
    record = ""
    for name, content in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
        record += f"{name},sha256={digest},{len(content)}\n"
    files[f"{info}/RECORD"] = f"{record}{info}/RECORD,,\n".encode()
    buffer = io.BytesIO()
    # The entries have no compression and a fixed time, so the bytes depend on the code alone.
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as wheel:
        for name, content in files.items():
            entry = zipfile.ZipInfo(name)
            entry.external_attr = 0o644 << 16
            wheel.writestr(entry, content)
    return f"cloudexec-{version}-py3-none-any.whl", buffer.getvalue()


class _Requirements:
    """A user's requirements file and the files that it names, checked for the build context."""

    def __init__(self, path: Path) -> None:
        self._requirements: list[str] = []
        self._constraints: list[str] = []
        self._seen: set[Path] = set()
        self._read(path, self._requirements)

    def files(self) -> dict[str, bytes]:
        """Return the files for the build context."""
        found = {"user.txt": "".join(self._requirements).encode()}
        if self._constraints:
            found["constraints.txt"] = "".join(self._constraints).encode()
        if any("--hash=" in line for line in self._requirements):
            found["hashed"] = b""
        return found

    def _read(self, path: Path, into: list[str]) -> None:
        if path.suffix in (".toml", ".lock") or path.name == "Pipfile":
            raise ConfigError(
                f"{path} is not in the format of requirements files; write one from it, such as "
                f"with `uv export --format requirements-txt` or `poetry export`"
            )
        if path.resolve() in self._seen:
            return
        self._seen.add(path.resolve())
        try:
            text = path.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as exc:
            raise ConfigError(f"the requirements file {path} cannot be read: {exc}") from exc
        for number, line in _logical_lines(text):
            self._add(line, path, f"{path}:{number}", into)

    def _add(self, line: str, path: Path, where: str, into: list[str]) -> None:
        option = value = ""
        if line.startswith("-"):
            option, value = [*re.split(r"[\s=]+", line, maxsplit=1), ""][:2]
        if option in ("-r", "--requirement"):
            self._read(path.parent / value, into)
        elif option in ("-c", "--constraint"):
            self._read(path.parent / value, self._constraints)
        elif option in ("-e", "--editable"):
            raise _local(where, line)
        elif option in ("-f", "--find-links") and "://" not in value:
            raise ConfigError(
                f"{where}: {line!r} names a directory of this machine, which the image does not "
                f"have: give it as --wheelhouse"
            )
        elif option:
            if option not in _PIP_OPTIONS:
                raise ConfigError(f"{where}: the option {option} has no place in an image")
            into.append(f"{line}\n")
        elif line[0] in "./~" or "@ file:" in line or line.startswith("file:"):
            raise _local(where, line)
        elif (match := _PROJECT.match(line)) and _canonical(match[1]) == "cloudexec":
            pass  # the image gets the code that runs here
        else:
            into.append(f"{line}\n")


def _logical_lines(text: str) -> Iterator[tuple[int, str]]:
    """Yield logical lines with their numbers. Continuations are joined, comments are left out."""
    joined, first = "", 0
    for number, line in enumerate(text.splitlines(), 1):
        first = first if joined else number
        if line.lstrip().startswith("#"):
            continue
        if line.endswith("\\"):
            joined += line[:-1].strip() + " "
            continue
        joined += line.strip()
        whole = re.sub(r"(^|\s)#.*$", "", joined).strip()
        joined = ""
        if whole:
            yield first, whole
    if joined.strip():
        yield first, joined.strip()


def _local(where: str, line: str) -> ConfigError:
    return ConfigError(
        f"{where}: {line!r} is on this machine, not in the image: make a wheel of it (`pip wheel`) "
        f"and give its directory as --wheelhouse"
    )
