"""Archives for functions of AWS Lambda without an image: what is in them, and what does not fit."""

from __future__ import annotations

import io
import stat
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from environment_helpers import PYTHON, Client, library, make_wheel, worker_wheels

from cloudexec import ConfigError
from cloudexec._environment import archive
from cloudexec._environment.archive import Archive, find_archive
from cloudexec._environment.cache import Cache
from cloudexec._environment.packages import Packages

OTHER = "3.13"
"""A version of which this process makes no bytecode, which would take seconds."""
SITE = f"lib/python{OTHER}/site-packages"
Finding = Callable[..., Archive]


@pytest.fixture
def find(client: Client, cache: Cache) -> Finding:
    """Finds the archive with the packages of the environment."""
    worker_wheels(client.wheels)

    def run(
        *,
        said: list[str] | None = None,
        python: str = OTHER,
        machine: str = "amd64",
        demanded: bool = True,
        cache: Cache = cache,
        **options: object,
    ) -> Archive:
        return find_archive(
            Packages(**{"wheelhouse": client.wheels, **options}),  # type: ignore[arg-type]
            python=python,
            platform=f"linux/{machine}",
            report=(said if said is not None else []).append,
            demanded=demanded,
            cache=cache,
            inventory=client.inventory(),
        )

    return run


def opened(found: Archive) -> zipfile.ZipFile:
    return zipfile.ZipFile(io.BytesIO(found.data()))


def test_archive_has_packages_cloudexec_and_what_starts_a_worker(
    client: Client, find: Finding, tmp_path: Path
) -> None:
    """Readable for everybody, and named relative to where Lambda unpacks it."""
    files = {
        "thing.py": "VERSION = '4.0'\n",
        "thing-4.0.data/scripts/thing": "#!python\nprint(1)\n",
    }
    make_wheel(client.wheels, "thing", "4.0", files)
    client.install("thing")
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared" / "helper.py").write_text("HELP = 1\n")
    (client.site / "ours.pth").write_text(f"{tmp_path}/shared\n")
    found = find()
    with opened(found) as made:
        names = made.namelist()
        assert len(set(names)) == len(names)
        modes = {each.filename: each.external_attr >> 16 for each in made.infolist()}
        assert {stat.S_IFMT(mode) for mode in modes.values()} == {stat.S_IFREG}
        assert all(mode & 0o444 == 0o444 for mode in modes.values())
        assert modes["cloudexec-function"] & 0o777 == modes["bin/thing"] & 0o777 == 0o755
        assert made.read("cloudexec-function").startswith(b"#!/bin/bash\n")
        assert made.read("bin/thing").startswith(b"#!/usr/bin/env python3\n")
        assert made.read(f"{SITE}/thing.py") == b"VERSION = '4.0'\n"
        assert {f"{SITE}/cloudexec/worker/__main__.py", f"{SITE}/cloudpickle.py"} <= set(names)
        (pth,) = (each for each in names if each.endswith(".pth"))
        assert made.read(pth).startswith(b"../../../paths/shared-")
        assert sum(each.file_size for each in made.infolist()) == found.unpacked
    assert (found.runtime, found.size) == ("python3.13", len(found.data()))


def test_same_environment_is_the_same_bytes_and_packed_once(
    client: Client, find: Finding, tmp_path: Path
) -> None:
    """Also on another machine, which knows nothing; another version of a package is another one."""
    make_wheel(client.wheels, "thing", "1.0")
    client.install("thing==1.0")
    said: list[str] = []
    first = find(said=said)
    again = find(said=said)
    assert len(said) == 1
    elsewhere = find(cache=Cache(tmp_path / "elsewhere"))
    assert first.content == again.content == elsewhere.content
    assert first.data() == again.data() == elsewhere.data()
    make_wheel(client.wheels, "thing", "2.0")
    client.install("thing==2.0")
    assert find().content != first.content


def test_bytes_of_a_changed_environment_are_refused(client: Client, find: Finding) -> None:
    """What is made must have the content that it is named by."""
    make_wheel(client.wheels, "thing")
    client.install("thing")
    found = find()
    found.forget()
    (client.site / "thing.py").write_text("VERSION = 'edited'\n")
    with pytest.raises(ConfigError, match="changed while they were prepared"):
        found.data()


def test_libraries_are_those_of_the_runtime(client: Client, find: Finding) -> None:
    """Of its processor, fetched where those that are installed here are for another one."""
    for machine in ("x86_64", "aarch64"):
        files = {"quick/_c.so": library(machine)}
        tag = f"py3-none-manylinux2014_{machine}"
        make_wheel(client.wheels, "quick", files=files, tag=tag)
    client.install("quick")
    for platform, number in (("amd64", b"\x3e\x00"), ("arm64", b"\xb7\x00")):
        with opened(find(machine=platform)) as made:
            assert made.read(f"{SITE}/quick/_c.so")[18:20] == number


def test_package_that_needs_a_newer_glibc_fits_a_newer_runtime_only(
    client: Client, find: Finding
) -> None:
    """The runtime of Python 3.11 has glibc 2.26, and those of later versions have 2.34. What does
    not fit is tried again only if it is demanded, as the installer takes a second for that."""
    files = {"new/_c.so": library("x86_64", 30)}
    make_wheel(client.wheels, "new", files=files, tag="py3-none-manylinux_2_31_x86_64")
    client.install("new")
    with opened(find(python="3.12")) as made:
        assert "lib/python3.12/site-packages/new/_c.so" in made.namelist()
    said: list[str] = []
    for demanded in (False, False, True):
        with pytest.raises(ConfigError, match=r"new==1\.0.*manylinux_2_31_x86_64"):
            find(python="3.11", demanded=demanded, said=said)
    assert len(said) == 2


def test_packages_that_are_too_large_are_named_with_their_sizes(
    client: Client, find: Finding, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archive, "MOST_UNPACKED", 10_000_000)
    make_wheel(client.wheels, "huge", files={"huge/table.bin": bytes(15_000_000)})
    client.install("huge")
    said = r"packages have [12]\d\.\d MB.* 10\.0 MB at most.*largest are huge 15\.0 MB, .*exclude="
    with pytest.raises(ConfigError, match=said):
        find()
    assert find(exclude=["huge"]).unpacked < 10_000_000


def test_bytecode_is_left_out_where_it_does_not_fit(
    client: Client, find: Finding, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Workers then compile what they import."""
    size = find(python=OTHER).unpacked
    monkeypatch.setattr(archive, "MOST_UNPACKED", size + 100_000)
    found = find(python=PYTHON)
    with opened(found) as made:
        assert not any(each.endswith(".pyc") for each in made.namelist())
    assert found.unpacked <= size + 100_000


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"python": "3.15"}, r"no runtime for Python 3\.15, only for 3\.11, 3\.12, 3\.13, 3\.14"),
        ({"base": "me/python:1"}, r"base='me/python:1' need an image"),
    ],
)
def test_what_needs_an_image_is_refused(find: Finding, settings: dict[str, str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        find(**settings)
