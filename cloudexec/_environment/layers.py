"""Layers of an image, packed so that the same content makes the same bytes everywhere."""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import io
import marshal
import os
import re
import subprocess
import sys
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, cast

from cloudexec._environment.cache import Cache
from cloudexec._environment.components import LOOSE, Component
from cloudexec._environment.target import ENVIRONMENT_ROOT, Target

__all__ = [
    "FORMAT",
    "Group",
    "Layer",
    "Node",
    "build_layers",
    "bytecode_of",
    "bytecode_path",
    "compile_sources",
    "content_key",
    "group",
    "members",
    "pack",
]

FORMAT = 2
"""Raised when the same components make other layers."""
_LARGE = 8 * 2**20
"""Bytes from which a package has a layer of its own."""
_MOST_LARGE = 48
"""Layers of large packages: an image has at most 127 in all."""
_SMALL_LAYERS = 8
"""Layers that small packages share: if one changes, an eighth of them is sent again."""
_LEVEL = 5
"""6 takes half as long again, for 1 % less."""
_NOT_COMPILED = re.compile(r"/tests?/")
"""Directories whose bytecode no worker is likely to want: with it, pandas takes twice as long."""
_COMPILER = """
import importlib.util, marshal, sys
found = []
for path, source in marshal.load(sys.stdin.buffer).items():
    try:
        code = compile(source, path, "exec", dont_inherit=True)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        found.append(b"")
        continue
    head = importlib.util.MAGIC_NUMBER + (1).to_bytes(4, "little")
    found.append(head + importlib.util.source_hash(source) + marshal.dumps(code))
marshal.dump(found, sys.stdout.buffer)
"""
"""Reads sources by path, and writes their bytecode in the same order; empty: does not compile. The
head says that it is never compared with its source. PEP 552, "Deterministic pycs"."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """A layer as a manifest and a configuration have it."""

    title: str
    digest: str
    """Of the compressed bytes."""
    size: int
    diff_id: str
    """Digest of the bytes before compression."""
    path: Path | None = None
    """The compressed bytes; ``None``: not on this machine any more."""


@dataclass(frozen=True, slots=True)
class Node:
    """A file, directory or link of a layer."""

    content: bytes | Path | None = None
    """Bytes, or the file that has them, which may be large."""
    mode: int = 0o644
    link: str = ""
    owner: int = 0


@dataclass(frozen=True, slots=True)
class Group:
    """Components that share a layer."""

    title: str
    components: tuple[Component, ...]


def group(components: Iterable[Component]) -> list[Group]:
    """Divide components into layers: what changes together, or never, lies together.

    A file that two components have is the first one's, as their names are sorted; what belongs to
    no distribution comes last.
    """
    taken: set[str] = set()
    kept = []
    for each in sorted(components, key=lambda one: (one.name == LOOSE, one.name)):
        entries = tuple(entry for entry in each.entries if entry.path not in taken)
        taken.update(entry.path for entry in entries)
        kept.append(each if len(entries) == len(each.entries) else replace(each, entries=entries))
    sizes = {each.name: each.size for each in kept if not each.is_own}
    large = {name for name, size in sizes.items() if size >= _LARGE}
    if len(large) > _MOST_LARGE:
        large = set(sorted(large, key=lambda name: (-sizes[name], name))[:_MOST_LARGE])
    groups = [Group(each.name, (each,)) for each in kept if each.name in large]
    for number in range(_SMALL_LAYERS):
        small = [
            each
            for each in kept
            if not each.is_own and each.name not in large and _bucket(each.name) == number
        ]
        if small:
            groups.append(Group(f"small packages {number + 1}", tuple(small)))
    # Last: what changes most often.
    groups += [
        Group(each.name, (each,)) for each in kept if each.is_own and each.name == "cloudexec"
    ]
    groups += [
        Group(each.name, (each,)) for each in kept if each.is_own and each.name != "cloudexec"
    ]
    return groups


def _bucket(name: str) -> int:
    return hashlib.sha256(name.encode()).digest()[0] % _SMALL_LAYERS


def build_layers(
    groups: Sequence[Group], target: Target, cache: Cache, folder: Path, *, all_bytes: bool = False
) -> list[Layer]:
    """Return the layers of groups, and pack those whose digests are not known yet.

    Args:
        groups: From ``group``.
        target: Where they are to be.
        cache: Knows the digests of what was packed before.
        folder: Where packed layers go.
        all_bytes: Whether to pack all of them.
    """
    compiler = importlib.util.MAGIC_NUMBER.hex() if target.is_own_python else "none"
    keys = []
    for each in groups:
        whole = hashlib.sha256(f"{FORMAT} {target.python} {compiler}\n".encode())
        for component in each.components:
            whole.update(content_key(component, cache).encode())
        keys.append(whole.hexdigest())
    known = [None if all_bytes else cache.read("layers", key) for key in keys]
    missing = [number for number, found in enumerate(known) if found is None]
    packed = _pack_groups([groups[number] for number in missing], target, folder)
    for number, layer in zip(missing, packed, strict=True):
        record = {"digest": layer.digest, "size": layer.size, "diff_id": layer.diff_id}
        cache.write("layers", keys[number], record)
    made = dict(zip(missing, packed, strict=True))
    return [
        made[number] if found is None else Layer(title=groups[number].title, **found)
        for number, found in enumerate(known)
    ]


def content_key(component: Component, cache: Cache) -> str:
    """Return what differs whenever a file of a component differs; files are read once."""
    signature = component.signature()
    key = cache.read("contents", signature)
    if not isinstance(key, str):
        key = component.content_key()
        cache.write("contents", signature, key)
    return key


def _pack_groups(groups: Sequence[Group], target: Target, folder: Path) -> list[Layer]:
    if not groups:
        return []
    bytecode = bytecode_of(groups, target, f"/{ENVIRONMENT_ROOT}")

    def pack_one(numbered: tuple[int, Group]) -> Layer:
        number, each = numbered
        placed = ((f"{ENVIRONMENT_ROOT}/{path}", node) for path, node in members(each, bytecode))
        with open(folder / f"layer-{number}", "wb") as file:
            return pack(each.title, placed, file)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(pack_one, enumerate(groups)))


def bytecode_of(groups: Sequence[Group], target: Target, shown_below: str) -> dict[str, bytes]:
    """Return the bytecode of groups by its path, where this process can make it for a target.

    Args:
        groups: From ``group``.
        target: Where they are to be.
        shown_below: As for ``compile_sources``.
    """
    if not target.is_own_python:
        return {}
    sources = {
        entry.path: entry.source if isinstance(entry.source, Path) else entry.read()
        for each in groups
        for component in each.components
        for entry in component.entries
        if entry.path.endswith(".py")
        and not entry.is_script
        and not _NOT_COMPILED.search(entry.path)
    }
    return compile_sources(sources, shown_below)


def members(each: Group, bytecode: Mapping[str, bytes]) -> Iterable[tuple[str, Node]]:
    """Yield the files of a group with their places in the environment, sorted."""
    entries = {entry.path: entry for one in each.components for entry in one.entries}
    compiled = {
        path: content
        for source in entries
        if (path := bytecode_path(source)) in bytecode
        for content in [bytecode[path]]
    }
    for path in sorted([*entries, *(compiled.keys() - entries.keys())]):
        if path in entries:
            entry = entries[path]
            executable = entry.is_executable or entry.is_script
            is_file = isinstance(entry.source, Path) and not entry.is_script
            content = entry.source if is_file else entry.read()
            yield path, Node(content, 0o755 if executable else 0o644)
        else:
            yield path, Node(compiled[path])


def bytecode_path(source: str) -> str:
    """Return where the bytecode of a source file is."""
    folder, _, name = source.rpartition("/")
    stem = name.removesuffix(".py")
    return f"{folder}/__pycache__/{stem}.{sys.implementation.cache_tag}.pyc"


def compile_sources(sources: Mapping[str, Path | bytes], shown_below: str) -> dict[str, bytes]:
    """Return the bytecode of sources, by its path; what does not compile is somebody's test data.

    It is never compared with its source, so it is right whatever time a layer's files have.

    Args:
        sources: By path.
        shown_below: The directory of those paths where they are run, as tracebacks show it.
    """
    sizes = {
        path: len(source) if isinstance(source, bytes) else source.stat().st_size
        for path, source in sources.items()
    }
    # The largest first, and each to the process that has least to do.
    shares: list[list[str]] = [[] for _ in range(os.cpu_count() or 1)]
    loads = [0] * len(shares)
    for path in sorted(sizes, key=lambda each: (-sizes[each], each)):
        number = loads.index(min(loads))
        shares[number].append(path)
        loads[number] += sizes[path]

    def compile_share(paths: Sequence[str]) -> dict[str, bytes]:
        texts = {
            f"{shown_below.rstrip('/')}/{path}": source
            if isinstance(source, bytes)
            else source.read_bytes()
            for path in paths
            for source in [sources[path]]
        }
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-W", "ignore", "-c", _COMPILER],
            input=marshal.dumps(texts),
            check=False,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        # A compiler that has crashed costs time at each worker's start, and nothing else.
        compiled = marshal.loads(done.stdout) if done.returncode == 0 else [b""] * len(paths)
        return {
            bytecode_path(path): content
            for path, content in zip(paths, compiled, strict=True)
            if content
        }

    found: dict[str, bytes] = {}
    with ThreadPoolExecutor(len(shares)) as pool:
        for each in pool.map(compile_share, filter(None, shares)):
            found.update(each)
    return found


def pack(title: str, members: Iterable[tuple[str, Node]], file: IO[bytes]) -> Layer:
    """Write a layer, with times and owners that are always the same.

    Args:
        title: For people.
        members: Path and content, sorted by path; directories above them need not be among them.
        file: Written to; has a name.
    """
    outer = _Hashing(file)
    # Without a name and a time: the bytes depend on the content alone.
    with gzip.GzipFile("", "wb", _LEVEL, cast("IO[bytes]", outer), mtime=0) as compressed:
        inner = _Hashing(compressed)
        stream = cast("IO[bytes]", inner)
        with tarfile.open(fileobj=stream, mode="w|", format=tarfile.PAX_FORMAT) as archive:
            folders: set[str] = set()
            for path, node in members:
                for above in _above(path):
                    if above not in folders:
                        folders.add(above)
                        archive.addfile(_info(above, Node(mode=0o755)))
                if node.content is None and not node.link:
                    folders.add(path)
                if isinstance(node.content, Path):
                    with open(node.content, "rb") as source:
                        archive.addfile(_info(path, node), source)
                else:
                    archive.addfile(_info(path, node), io.BytesIO(node.content or b""))
    return Layer(
        title=title,
        digest=outer.digest,
        size=outer.size,
        diff_id=inner.digest,
        path=Path(file.name),
    )


def _above(path: str) -> list[str]:
    parts = path.split("/")[:-1]
    return ["/".join(parts[: end + 1]) for end in range(len(parts))]


def _info(path: str, node: Node) -> tarfile.TarInfo:
    info = tarfile.TarInfo(path)
    info.mode = node.mode
    info.uid = info.gid = node.owner
    if node.link:
        info.type, info.linkname, info.mode = tarfile.SYMTYPE, node.link, 0o777
    elif node.content is None:
        info.type = tarfile.DIRTYPE
    elif isinstance(node.content, Path):
        info.size = node.content.stat().st_size
    else:
        info.size = len(node.content)
    return info


class _Hashing:
    """Passes bytes on, and counts and hashes them."""

    def __init__(self, file: IO[bytes] | gzip.GzipFile) -> None:
        self._file = file
        self._hash = hashlib.sha256()
        self.size = 0

    def write(self, data: bytes) -> int:
        """Write bytes."""
        self._file.write(data)
        self._hash.update(data)
        self.size += len(data)
        return len(data)

    def flush(self) -> None:
        """Write what is held back."""
        self._file.flush()

    @property
    def digest(self) -> str:
        """The SHA-256 of all bytes, as registries have it."""
        return f"sha256:{self._hash.hexdigest()}"
