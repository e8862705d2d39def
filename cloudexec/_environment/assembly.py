"""The whole way from packages to an image in a repository, once for each content."""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from cloudexec._aws import image_contents
from cloudexec._environment.base import Base, Report, default_base, prepare_base
from cloudexec._environment.cache import Cache
from cloudexec._environment.collection import Collection
from cloudexec._environment.components import Component, of_wheel
from cloudexec._environment.fetching import find_installer
from cloudexec._environment.inventory import Inventory, signature_of, take_inventory
from cloudexec._environment.layers import FORMAT, Group, Layer, build_layers, group
from cloudexec._environment.packages import Packages
from cloudexec._environment.registry import Repository
from cloudexec._environment.target import Target
from cloudexec._errors import ConfigError

__all__ = ["Pushed", "push_packages"]

_UPLOADS = 4
"""Layers that are sent at a time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pushed:
    """An image that a repository has."""

    uri: str
    """Pinned by digest: ``repository@sha256:...``."""
    tag: str
    sent_layers: int
    """Layers that were sent just now; 0: all were there."""
    was_pushed: bool
    """Whether the image was not there before."""


def push_packages(
    packages: Packages,
    repository: Repository,
    *,
    python: str,
    platform: str,
    report: Report,
    refresh: bool = False,
    cache: Cache | None = None,
    inventory: Inventory | None = None,
) -> Pushed:
    """Push an image with packages to a repository, unless it has one of the same content.

    Args:
        packages: What workers are to have.
        repository: Where the image goes.
        python: Minor version of the workers' Python.
        platform: Of the workers: ``"linux/amd64"`` or ``"linux/arm64"``.
        report: Told what is going on, in any thread.
        refresh: Whether to look for a newer base, and for newer versions of what is not pinned.
        cache: What is known from before.
        inventory: What is installed; by default in the environment of this process.

    Returns:
        The image.

    Raises:
        ConfigError: If a package cannot be had for the platform, or the base cannot be one.
        LaunchError: If a registry refuses, or cannot be reached.
    """
    cache = cache or Cache()
    installer = functools.cache(lambda: find_installer(packages.wheels))
    base_name = packages.base or default_base(python)
    version, pins = image_contents.own_version(), image_contents.worker_pins()
    # The last one is the init, which the base has.
    inventory = inventory or take_inventory()
    collection = Collection(packages, inventory, pins[:-1], cache, installer, is_fresh=refresh)
    key = hashlib.sha256(
        repr(
            (
                FORMAT,
                python,
                platform,
                base_name,
                str(repository),
                version,
                pins,
                signature_of(image_contents.own_folder()),
                collection.signature(),
            )
        ).encode()
    ).hexdigest()
    known = None if refresh else cache.read("images", key)
    if known is not None and repository.manifest(known["digest"]) is not None:
        return Pushed(
            uri=f"{repository}@{known['digest']}",
            tag=known["tag"],
            sent_layers=0,
            was_pushed=False,
        )
    base = prepare_base(
        base_name,
        python,
        platform,
        repository,
        cache=cache,
        installer=installer,
        init=pins[-1],
        report=report,
        refresh=refresh,
    )
    target = base.target
    report(f"preparing {packages.describe()} for {target}")
    components = [
        *collection.components(target),
        of_wheel("cloudexec", version, image_contents.own_wheel(), target),
    ]
    pushed = _push(base, components, version, repository, cache, report)
    cache.write("images", key, {"digest": pushed.uri.partition("@")[2], "tag": pushed.tag})
    cache.tidy()
    return pushed


def _push(
    base: Base,
    components: list[Component],
    version: str,
    repository: Repository,
    cache: Cache,
    report: Report,
) -> Pushed:
    target = base.target
    groups = group(components)
    with cache.scratch() as folder:
        layers = build_layers(groups, target, cache, _made(folder / "new"))
        tag = _tag(base, layers, version)
        found = repository.manifest(tag)
        if found is not None:
            uri = f"{repository}@{found.digest}"
            return Pushed(uri=uri, tag=tag, sent_layers=0, was_pushed=False)
        missing = _missing(layers, repository)
        absent = [number for number in missing if layers[number].path is None]
        if absent:
            # Packed once before, and not kept.
            layers = _packed_again(groups, layers, absent, target, cache, folder)
            missing = _missing(layers, repository)
            tag = _tag(base, layers, version)
        sent = [layers[number] for number in missing]
        if sent:
            total = sum(layer.size for layer in sent)
            several = "layer" if len(sent) == 1 else "layers"
            report(f"sending {len(sent)} {several}, {total / 1e6:,.1f} MB, to {repository}")
        with ThreadPoolExecutor(_UPLOADS) as pool:
            list(pool.map(lambda layer: _send(layer, repository), sent))
        labels = {
            "cloudexec.version": version,
            "cloudexec.python": target.python,
            "cloudexec.platform": target.platform,
            "cloudexec.content": tag.rpartition("-")[2],
        }
        digest = base.with_layers(layers, labels).push(repository, tag)
    return Pushed(
        uri=f"{repository}@{digest}",
        tag=tag,
        sent_layers=len(sent),
        was_pushed=True,
    )


def _tag(base: Base, layers: Sequence[Layer], version: str) -> str:
    """Return a name that people can read, and that differs when the image does."""
    listed = json.dumps([base.digest, [layer.digest for layer in layers]])
    content = hashlib.sha256(listed.encode()).hexdigest()[:16]
    release = re.sub(r"[^A-Za-z0-9_.-]", "-", version)
    machine = base.target.platform.rpartition("/")[2]
    return f"{release}-py{base.target.python}-{machine}-{content}"


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def _missing(layers: Sequence[Layer], repository: Repository) -> list[int]:
    with ThreadPoolExecutor(_UPLOADS) as pool:
        there = list(pool.map(lambda layer: repository.has_blob(layer.digest), layers))
    return [number for number, is_there in enumerate(there) if not is_there]


def _packed_again(
    groups: Sequence[Group],
    layers: Sequence[Layer],
    absent: Sequence[int],
    target: Target,
    cache: Cache,
    folder: Path,
) -> list[Layer]:
    again = build_layers(
        [groups[number] for number in absent],
        target,
        cache,
        _made(folder / "again"),
        all_bytes=True,
    )
    replaced: Mapping[int, Layer] = dict(zip(absent, again, strict=True))
    return [replaced.get(number, layer) for number, layer in enumerate(layers)]


def _send(layer: Layer, repository: Repository) -> None:
    if layer.path is None:
        raise ConfigError(f"the layer {layer.title} was changed while it was prepared: start again")
    repository.push_blob(layer.digest, layer.path)
