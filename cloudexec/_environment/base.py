"""The image below: copied once to the account's repository, with what every worker needs on top.

That is an environment for packages, an init, the workers' user, and the bytecode of the standard
library where the base comes without it, as the official images of Python do.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
import tarfile
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from cloudexec._environment.cache import Cache
from cloudexec._environment.components import of_distribution
from cloudexec._environment.fetching import Installer, NoWheelError
from cloudexec._environment.inventory import take_inventory
from cloudexec._environment.layers import (
    FORMAT,
    Layer,
    Node,
    bytecode_path,
    compile_sources,
    pack,
)
from cloudexec._environment.registry import Manifest, Repository, parse_reference
from cloudexec._environment.target import ENVIRONMENT_ROOT, Target
from cloudexec._errors import ConfigError

__all__ = ["CONFIG_TYPE", "LAYER_TYPE", "MANIFEST_TYPE", "Base", "default_base", "prepare_base"]

MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"
CONFIG_TYPE = "application/vnd.oci.image.config.v1+json"
LAYER_TYPE = "application/vnd.oci.image.layer.v1.tar+gzip"
_GZIPPED = (LAYER_TYPE, "application/vnd.docker.image.rootfs.diff.tar.gzip")
_INDEXES = (
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
)
_USER = 10001
_PASSWD = f"worker:x:{_USER}:{_USER}::/home/worker:/usr/sbin/nologin\n"
_GROUP = f"worker:x:{_USER}:\n"
_LABEL = "cloudexec.base"
_OLDEST_GLIBC = 28
"""Taken for granted where nothing says what the base has: RHEL 8 and all that is newer."""
_LIBC = re.compile(r"^Package: libc6\n(?:.+\n)*?Version: 2\.(\d+)", re.MULTILINE)
_LIBC_FILE = re.compile(r"(?:^|/)(?:libc|ld)-2\.(\d+)\.so$")
_NOT_COMPILED = re.compile(
    r"/(ensurepip|idlelib|lib2to3|pydoc_data|site-packages|dist-packages|tests?|tkinter|turtledemo)/"
)
"""Directories of the standard library whose bytecode no worker is likely to want."""
_WORKERS = 4
"""Layers that are copied at a time."""

Report = Callable[[str], None]
"""Told what is going on, in any thread."""


def default_base(python: str) -> str:
    """Return the official image of a Python version, where everybody may read it."""
    return f"public.ecr.aws/docker/library/python:{python}-slim"


@dataclass(frozen=True, slots=True)
class Base:
    """An image to put layers on, in the repository."""

    config: Mapping[str, Any]
    layers: tuple[Mapping[str, Any], ...]
    """As the manifest has them."""

    @property
    def target(self) -> Target:
        """What runs on it."""
        facts = json.loads(self.config["config"]["Labels"][_LABEL])
        return Target(facts["python"], facts["platform"], facts["glibc"])

    @property
    def digest(self) -> str:
        """What differs when the base does."""
        listed = json.dumps([self.config, self.layers], sort_keys=True)
        return hashlib.sha256(listed.encode()).hexdigest()

    def with_layers(self, layers: list[Layer], labels: Mapping[str, str]) -> Base:
        """Return the base with more on it."""
        config = dict(self.config)
        rootfs = config["rootfs"]
        config["rootfs"] = {
            **rootfs,
            "diff_ids": [*rootfs["diff_ids"], *(layer.diff_id for layer in layers)],
        }
        history = [{"created_by": f"cloudexec: {layer.title}"} for layer in layers]
        config["history"] = [*config.get("history", ()), *history]
        inner = config["config"]
        config["config"] = {**inner, "Labels": {**inner.get("Labels", {}), **labels}}
        more = [
            {"mediaType": LAYER_TYPE, "digest": layer.digest, "size": layer.size}
            for layer in layers
        ]
        return Base(config, (*self.layers, *more))

    def push(self, repository: Repository, tag: str) -> str:
        """Store configuration and manifest of an image whose layers are there; return its digest.

        Raises:
            LaunchError: If the registry refuses.
        """
        config = json.dumps(self.config, sort_keys=True).encode()
        digest = f"sha256:{hashlib.sha256(config).hexdigest()}"
        if not repository.has_blob(digest):
            repository.push_blob(digest, config)
        manifest = {
            "schemaVersion": 2,
            "mediaType": MANIFEST_TYPE,
            "config": {"mediaType": CONFIG_TYPE, "digest": digest, "size": len(config)},
            "layers": list(self.layers),
        }
        return repository.push_manifest(
            tag, json.dumps(manifest, sort_keys=True).encode(), MANIFEST_TYPE
        )


def prepare_base(
    name: str,
    python: str,
    platform: str,
    repository: Repository,
    *,
    cache: Cache,
    installer: Callable[[], Installer],
    init: str,
    report: Report,
    refresh: bool = False,
) -> Base:
    """Return a base that is in the repository; copy it there unless somebody has done so.

    Args:
        name: The image.
        python: Minor version that it must have.
        platform: Which of its images.
        repository: Where it goes.
        cache: For temporary files.
        installer: Gets the init.
        init: Requirement of the init.
        report: Told what is going on.
        refresh: Whether to copy what the name stands for now, also if there is a copy.

    Raises:
        ConfigError: If the image cannot be a base.
        LaunchError: If a registry refuses.
    """
    machine = platform.rpartition("/")[2]
    number = hashlib.sha256(f"{FORMAT} {name} {init}".encode()).hexdigest()[:12]
    tag = f"base-py{python}-{machine}-{number}"
    if not refresh and (there := repository.manifest(tag)) is not None:
        config = json.loads(repository.read_blob(there.data["config"]["digest"]))
        return Base(config, tuple(there.data["layers"]))
    report(f"copying the base image {name} for {platform}, once for this repository")
    reference = parse_reference(name)
    credentials = repository.credentials if reference.host == repository.host else None
    with (
        Repository(reference.host, reference.name, credentials) as source,
        cache.scratch() as folder,
    ):
        found = _manifest_for(source, reference.tag, platform, name)
        config = json.loads(source.read_blob(found.data["config"]["digest"]))
        _check_platform(config, platform, name)
        layers = list(found.data["layers"])
        with ThreadPoolExecutor(_WORKERS) as pool:
            paths = list(
                pool.map(lambda each: _copy(each, source, repository, folder, name), layers)
            )
        seen = _Contents(python)
        for path in paths:
            seen.read(path)
            path.unlink()
        interpreter = seen.interpreter(config, name)
        target = Target(python, platform, seen.glibc(name))
        system = _system_layer(seen, interpreter, target, folder, installer(), init)
        assert system.path is not None
        repository.push_blob(system.digest, system.path)
        plain = [{**each, "mediaType": LAYER_TYPE} for each in layers]
        facts = {"glibc": target.glibc, "name": name, "platform": platform, "python": python}
        base = Base(_configured(config), tuple(plain)).with_layers(
            [system], {_LABEL: json.dumps(facts)}
        )
        base.push(repository, tag)
    return base


def _manifest_for(source: Repository, tag: str, platform: str, name: str) -> Manifest:
    found = source.manifest(tag)
    if found is not None and found.media_type in _INDEXES:
        system, _, machine = platform.partition("/")
        fitting = [
            each
            for each in found.data.get("manifests", ())
            if (each.get("platform") or {}).get("os") == system
            and each["platform"].get("architecture") == machine
        ]
        if not fitting:
            raise ConfigError(f"the base image {name} is not made for {platform}: name another")
        found = source.manifest(fitting[0]["digest"])
    if found is None:
        raise ConfigError(f"there is no base image {name}")
    return found


def _check_platform(config: Mapping[str, Any], platform: str, name: str) -> None:
    found = f"{config.get('os')}/{config.get('architecture')}"
    if found != platform:
        raise ConfigError(f"the base image {name} is for {found}, and not for {platform}")


def _copy(
    layer: Mapping[str, Any], source: Repository, into: Repository, folder: Path, name: str
) -> Path:
    if layer.get("mediaType") not in _GZIPPED:
        raise ConfigError(
            f"the base image {name} has layers of the type {layer.get('mediaType')}, which cannot "
            f"be read here: name one whose layers are compressed by gzip"
        )
    digest = str(layer["digest"])
    path = folder / digest.replace(":", "-")
    source.save_blob(digest, path)
    if not into.has_blob(digest):
        into.push_blob(digest, path, source.name if source.host == into.host else "")
    return path


@dataclass(slots=True)
class _Contents:
    """What is to be known of a base's files, gathered layer by layer."""

    python: str
    texts: dict[str, str] = field(default_factory=dict)
    interpreters: set[str] = field(default_factory=set)
    libraries: list[int] = field(default_factory=list)
    has_musl: bool = False
    sources: dict[str, bytes] = field(default_factory=dict)
    compiled: set[str] = field(default_factory=set)

    def read(self, layer: Path) -> None:
        """Read a layer."""
        wanted = ("etc/passwd", "etc/group", "var/lib/dpkg/status", "var/lib/dpkg/status.d/libc6")
        library = re.compile(rf"(^|.*/)lib/python{re.escape(self.python)}/.*\.py(c?)$")
        with tarfile.open(layer, "r|gz") as archive:
            for member in archive:
                path = member.name.removeprefix("./").strip("/")
                if path.endswith(f"bin/python{self.python}"):
                    self.interpreters.add(f"/{path}")
                if found := _LIBC_FILE.search(path):
                    self.libraries.append(int(found[1]))
                self.has_musl = self.has_musl or "/ld-musl-" in f"/{path}"
                if not member.isfile():
                    continue
                if path in wanted:
                    self.texts[path] = _content(archive, member).decode(errors="replace")
                elif (match := library.match(path)) and not _NOT_COMPILED.search(path):
                    if match[2]:
                        self.compiled.add(path)
                    else:
                        self.sources[path] = _content(archive, member)

    def interpreter(self, config: Mapping[str, Any], name: str) -> PurePosixPath:
        """Return the path of the Python that ``PATH`` finds.

        Raises:
            ConfigError: If there is none of the version.
        """
        search = _environment(config).get("PATH", "/usr/local/bin:/usr/bin:/bin")
        for folder in search.split(":"):
            path = f"{folder.rstrip('/')}/python{self.python}"
            # As in Debian, where /bin is a link to /usr/bin.
            if path in self.interpreters or f"/usr{path}" in self.interpreters:
                return PurePosixPath(path)
        raise ConfigError(
            f"the base image {name} has no Python {self.python} in its PATH ({search}): functions "
            f"can only be sent to the version that sends them; name another base"
        )

    def glibc(self, name: str) -> int:
        """Return the minor version of glibc.

        Raises:
            ConfigError: If the base has another C library.
        """
        status = [text for path, text in self.texts.items() if "dpkg" in path]
        versions = [int(found[1]) for text in status if (found := _LIBC.search(text))]
        if versions or self.libraries:
            return max([*versions, *self.libraries])
        if self.has_musl:
            raise ConfigError(
                f"the base image {name} has musl as its C library, as Alpine has, for which most "
                f"packages have no wheels: name one with glibc, such as python:{self.python}-slim"
            )
        return _OLDEST_GLIBC


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = archive.extractfile(member)
    return file.read() if file is not None else b""


def _environment(config: Mapping[str, Any]) -> dict[str, str]:
    listed = (config.get("config") or {}).get("Env") or ()
    return dict(str(each).partition("=")[::2] for each in listed)


def _configured(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration that starts a worker, as images/Dockerfile has it."""
    variables = _environment(config)
    variables["PATH"] = (
        f"/{ENVIRONMENT_ROOT}/bin:{variables.get('PATH', '/usr/local/bin:/usr/bin:/bin')}"
    )
    variables["HOME"] = "/home/worker"
    inner = {
        key: value
        for key, value in (config.get("config") or {}).items()
        if key not in ("Cmd", "Healthcheck", "OnBuild")
    }
    inner.update(
        Env=[f"{key}={value}" for key, value in variables.items()],
        User=f"{_USER}:{_USER}",
        WorkingDir="/home/worker",
        Entrypoint=[
            f"/{ENVIRONMENT_ROOT}/bin/dumb-init",
            "--single-child",
            "--",
            f"/{ENVIRONMENT_ROOT}/bin/python",
            "-m",
            "cloudexec.worker",
        ],
        Labels=dict(inner.get("Labels") or {}),
    )
    return {**config, "config": inner}


def _system_layer(
    seen: _Contents,
    interpreter: PurePosixPath,
    target: Target,
    folder: Path,
    installer: Installer,
    init: str,
) -> Layer:
    root = ENVIRONMENT_ROOT
    members: dict[str, Node] = {
        "home/worker": Node(mode=0o755, owner=_USER),
        f"{root}/pyvenv.cfg": Node(
            f"home = {interpreter.parent}\ninclude-system-site-packages = false\n"
            f"version = {target.python}\n".encode()
        ),
        f"{root}/bin/python": Node(link=str(interpreter)),
        f"{root}/bin/python3": Node(link="python"),
        f"{root}/bin/python{target.python}": Node(link="python"),
    }
    for path, line in (("etc/passwd", _PASSWD), ("etc/group", _GROUP)):
        text = seen.texts.get(path, "root:x:0:0:root:/root:/bin/sh\n" if "passwd" in path else "")
        if not re.search(rf"^[^:]*:[^:]*:{_USER}:", text, re.MULTILINE):
            text = f"{text.rstrip()}\n{line}".lstrip()
        members[path] = Node(text.encode())
    members.update(_init_of(installer, init, target, folder))
    if target.python == f"{sys.version_info.major}.{sys.version_info.minor}":
        fresh: dict[str, Path | bytes] = {
            path: content
            for path, content in seen.sources.items()
            if bytecode_path(path) not in seen.compiled
        }
        for path, content in compile_sources(fresh, "/").items():
            members[path] = Node(content)
    with open(folder / "system-layer", "wb") as file:
        return pack("environment, init and user", sorted(members.items()), file)


def _init_of(installer: Installer, init: str, target: Target, folder: Path) -> dict[str, Node]:
    into = folder / "init"
    try:
        installer.fetch([init], target, into)
    except NoWheelError as exc:
        raise ConfigError(f"{init}, the workers' init, cannot be had for {target}: {exc}") from exc
    found = {}
    for each in take_inventory([str(into)]).distributions.values():
        for entry in of_distribution(each, target).entries:
            if entry.path == "bin/dumb-init":
                found[f"{ENVIRONMENT_ROOT}/{entry.path}"] = Node(entry.read(), 0o755)
    if not found:
        raise ConfigError(f"{init} has no program dumb-init in it")
    return found
