"""Wheels, environments and base images that are made by hand, without an index or an engine."""

from __future__ import annotations

import base64
import csv
import gzip
import hashlib
import io
import json
import struct
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cloudexec._aws.image_contents import worker_pins
from cloudexec._environment.base import CONFIG_TYPE, LAYER_TYPE, MANIFEST_TYPE
from cloudexec._environment.fetching import Installer
from cloudexec._environment.inventory import Inventory, take_inventory
from cloudexec._environment.registry import Repository

PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
TAG = f"cp{sys.version_info.major}{sys.version_info.minor}"
ELF_MACHINES = {"x86_64": 0x3E, "aarch64": 0xB7}


def library(machine: str, glibc: int = 17, needs: Iterable[str] = ()) -> bytes:
    """Return what tells an extension module, ``_c`` or ``_native``, of a processor, a glibc and the
    libraries that it needs."""
    names = b"\0" + b"".join(name.encode() + b"\0" for name in needs)
    where, dynamic = 64 + 2 * 56, b""
    for name in needs:
        dynamic += struct.pack("<QQ", 1, names.index(b"\0" + name.encode() + b"\0") + 1)
    # The names are loaded 4096 bytes behind their place in the file.
    dynamic += struct.pack("<QQQQ", 5, 4096 + where, 0, 0)
    ident = b"\x7fELF" + bytes([2, 1, 1]) + bytes(9)
    header = struct.pack(
        "<HHIQQQIHHHHHH", 3, ELF_MACHINES[machine], 1, 0, 64, 0, 0, 64, 56, 2, 0, 0, 0
    )
    size = len(names)
    load = struct.pack("<IIQQQQQQ", 1, 4, where, 4096 + where, 0, size, size, 8)
    at, size = where + len(names), len(dynamic)
    section = struct.pack("<IIQQQQQQ", 2, 4, at, 8192 + at, 0, size, size, 8)
    rest = b"\0PyInit__c\0PyInit__native\0GLIBC_2.%d\0" % glibc
    return ident + header + load + section + names + dynamic + rest


def make_wheel(
    folder: Path,
    name: str,
    version: str = "1.0",
    files: Mapping[str, bytes | str] | None = None,
    *,
    tag: str = "py3-none-any",
    requires: Iterable[str] = (),
    extras: Iterable[str] = (),
) -> Path:
    """Write a wheel, by default with one module, named after it, that says its version."""
    project = name.replace("-", "_")
    info = f"{project}-{version}.dist-info"
    content = dict(files or {f"{project}.py": f"VERSION = {version!r}\n"})
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
    lines += [f"Provides-Extra: {extra}" for extra in extras]
    lines += [f"Requires-Dist: {each}" for each in requires]
    content[f"{info}/METADATA"] = "\n".join(lines) + "\n"
    pure = "true" if tag.endswith("any") else "false"
    content[f"{info}/WHEEL"] = f"Wheel-Version: 1.0\nRoot-Is-Purelib: {pure}\nTag: {tag}\n"
    record = io.StringIO()
    writer = csv.writer(record)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{project}-{version}-{tag}.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for each, text in content.items():
            data = text if isinstance(text, bytes) else text.encode()
            digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
            writer.writerow([each, f"sha256={digest}", len(data)])
            archive.writestr(each, data)
        writer.writerow([f"{info}/RECORD", "", ""])
        archive.writestr(f"{info}/RECORD", record.getvalue())
    return path


def worker_wheels(folder: Path) -> None:
    """Write wheels that stand for what a worker needs, in the versions that are pinned."""
    *pins, init = (pin.split("==") for pin in worker_pins())
    for name, version in pins:
        make_wheel(folder, name, version)
    name, version = init
    for machine in ELF_MACHINES:
        script = f"{name.replace('-', '_')}-{version}.data/scripts/dumb-init"
        files = {script: library(machine)}
        make_wheel(folder, name, version, files, tag=f"py3-none-manylinux2014_{machine}")


@dataclass
class Client:
    """A virtual environment, with wheels to install from."""

    root: Path
    wheels: Path
    installer: Installer

    @property
    def site(self) -> Path:
        """Where its packages are."""
        return self.root / "lib" / f"python{PYTHON}" / "site-packages"

    def install(self, *arguments: str) -> None:
        """Install with the installer, as a user does."""
        python = str(self.root / "bin" / "python")
        command = [*self.installer.command]
        if self.installer.is_uv:
            # Tests edit what is installed, which is not to be what uv keeps.
            command += ["pip", "install", "-q", "--link-mode", "copy", "--python", python]
        else:
            command += ["--python", python, "install", "-q", "--disable-pip-version-check"]
            command += ["--root-user-action=ignore"]
        command += ["--no-index", "--find-links", str(self.wheels), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
        assert done.returncode == 0, done.stderr

    def run(self, *arguments: str) -> str:
        """Run its Python; return what it prints."""
        done = subprocess.run(
            [str(self.root / "bin" / "python"), *arguments],
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def inventory(self) -> Inventory:
        """List what is installed in it."""
        return take_inventory([str(self.site)])


def make_client(root: Path, wheels: Path, installer: Installer) -> Client:
    """Make a virtual environment with nothing in it."""
    client = Client(root, wheels, installer)
    client.site.mkdir(parents=True)
    (root / "bin").mkdir()
    interpreter = Path(sys.executable).resolve()
    (root / "bin" / "python").symlink_to(interpreter)
    (root / "pyvenv.cfg").write_text(f"home = {interpreter.parent}\n")
    wheels.mkdir(exist_ok=True)
    return client


def make_project(folder: Path, name: str, files: Mapping[str, str | bytes]) -> Path:
    """Write a project that builds itself, with no other tool: its package, and what it requires."""
    folder.mkdir(parents=True)
    (folder / "pyproject.toml").write_text(
        f"[project]\nname = {name!r}\nversion = '0.1'\ndependencies = []\n"
        f"[build-system]\nrequires = []\nbuild-backend = 'own_backend'\nbackend-path = ['tools']\n"
    )
    (folder / "tools").mkdir()
    (folder / "tools" / "own_backend.py").write_text(BACKEND)
    for each, text in files.items():
        path = folder / each
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder


BACKEND = """
import base64, hashlib, os, pathlib, sysconfig, tomllib, zipfile

def _write(directory, editable):
    about = tomllib.loads(pathlib.Path("pyproject.toml").read_text())["project"]
    name, version = about["name"].replace("-", "_"), about["version"]
    files = {}
    if editable:
        files[f"_{name}.pth"] = os.path.abspath("src").encode()
    else:
        for path in sorted(pathlib.Path("src").rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                files[path.relative_to("src").as_posix()] = path.read_bytes()
    native = any(each.endswith(".so") for each in files)
    platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    tag = f"py3-none-{platform if native else 'any'}"
    info = f"{name}-{version}.dist-info"
    files[f"{info}/METADATA"] = (
        f"Metadata-Version: 2.1\\nName: {about['name']}\\nVersion: {version}\\n".encode()
    )
    files[f"{info}/WHEEL"] = f"Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: {tag}\\n".encode()
    rows = "".join(f"{each},,\\n" for each in [*files, f"{info}/RECORD"])
    files[f"{info}/RECORD"] = rows.encode()
    wheel = f"{name}-{version}-{tag}.whl"
    with zipfile.ZipFile(os.path.join(directory, wheel), "w") as archive:
        for each, content in files.items():
            archive.writestr(each, content)
    return wheel

def build_wheel(directory, config_settings=None, metadata_directory=None):
    return _write(directory, False)

def build_editable(directory, config_settings=None, metadata_directory=None):
    return _write(directory, True)
"""


def make_base(
    repository: Repository,
    tag: str,
    machine: str,
    *,
    python: str = PYTHON,
    files: Mapping[str, bytes] | None = None,
) -> None:
    """Push an image that has the looks of an official one of Python, and nothing that runs."""
    status = b"Package: base-files\nVersion: 12\n\nPackage: libc6\nVersion: 2.36-9+deb12u9\n"
    content = {
        "etc/passwd": b"root:x:0:0:root:/root:/bin/bash\n",
        "etc/group": b"root:x:0:\n",
        f"usr/local/bin/python{python}": b"",
        f"usr/local/lib/python{python}/lonely.py": b"ANSWER = 42\n",
        f"usr/local/lib/python{python}/test/unwanted.py": b"",
        "var/lib/dpkg/status": status,
        **(files or {}),
    }
    plain = io.BytesIO()
    with tarfile.open(fileobj=plain, mode="w") as archive:
        for path, data in content.items():
            info = tarfile.TarInfo(path)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    layer = gzip.compress(plain.getvalue(), mtime=0)
    config: dict[str, Any] = {
        "os": "linux",
        "architecture": machine,
        "config": {
            "Env": ["PATH=/usr/local/bin:/usr/bin:/bin", "LANG=C.UTF-8"],
            "Cmd": ["python3"],
        },
        "rootfs": {"type": "layers", "diff_ids": [digest_of(plain.getvalue())]},
    }
    push_image(repository, tag, config, [layer])


def push_image(
    repository: Repository, tag: str, config: Mapping[str, Any], layers: Iterable[bytes]
) -> str:
    """Push configuration, layers and manifest."""
    listed = []
    for layer in layers:
        repository.push_blob(digest_of(layer), layer)
        listed.append({"mediaType": LAYER_TYPE, "digest": digest_of(layer), "size": len(layer)})
    data = json.dumps(config).encode()
    repository.push_blob(digest_of(data), data)
    manifest = {
        "schemaVersion": 2,
        "mediaType": MANIFEST_TYPE,
        "config": {"mediaType": CONFIG_TYPE, "digest": digest_of(data), "size": len(data)},
        "layers": listed,
    }
    return repository.push_manifest(tag, json.dumps(manifest).encode(), MANIFEST_TYPE)


def digest_of(content: bytes) -> str:
    """Return the digest of bytes as registries have it."""
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def contents(repository: Repository, reference: str) -> dict[str, bytes]:
    """Return all files of an image, links as what they point to, as an engine would unpack it."""
    manifest = repository.manifest(reference)
    assert manifest is not None
    found: dict[str, bytes] = {}
    for layer in manifest.data["layers"]:
        with tarfile.open(fileobj=io.BytesIO(repository.read_blob(layer["digest"]))) as archive:
            for member in archive:
                if member.isfile():
                    file = archive.extractfile(member)
                    assert file is not None
                    found[member.name] = file.read()
                elif member.issym():
                    found[member.name] = member.linkname.encode()
    return found


def configuration(repository: Repository, reference: str) -> dict[str, Any]:
    """Return the configuration of an image."""
    manifest = repository.manifest(reference)
    assert manifest is not None
    found: dict[str, Any] = json.loads(repository.read_blob(manifest.data["config"]["digest"]))
    return found
