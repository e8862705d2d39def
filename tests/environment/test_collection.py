"""Each package gets to the workers: copied as it is, fetched for their platform, or built here."""

from __future__ import annotations

import base64
import functools
import hashlib
import http.server
import importlib.util
import os
import re
import shutil
import socket
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from environment_helpers import (
    PYTHON,
    TAG,
    Client,
    library,
    make_client,
    make_project,
    make_wheel,
)

from cloudexec import ConfigError
from cloudexec._environment.cache import Cache
from cloudexec._environment.collection import Collection
from cloudexec._environment.components import Component, of_loose
from cloudexec._environment.elf import needed_libraries
from cloudexec._environment.fetching import Installer
from cloudexec._environment.packages import Packages
from cloudexec._environment.target import Target

X86, ARM = Target(PYTHON, "linux/amd64", 36), Target(PYTHON, "linux/arm64", 36)
HERE, ELSEWHERE = (X86, ARM) if os.uname().machine == "x86_64" else (ARM, X86)
SITE = f"lib/python{PYTHON}/site-packages"
Collecting = Callable[..., dict[str, Component]]


def native_wheels(
    folder: Path, name: str, version: str = "1.0", targets: tuple[Target, ...] = (X86, ARM)
) -> None:
    """Write wheels with a library, one for each platform."""
    for target in targets:
        file = f"{name}/_native.cpython-{PYTHON.replace('.', '')}-{target.machine}-linux-gnu.so"
        make_wheel(
            folder,
            name,
            version,
            {file: library(target.machine), f"{name}/__init__.py": f"VERSION = {version!r}\n"},
            tag=f"{TAG}-{TAG}-manylinux_2_28_{target.machine}",
        )


@contextmanager
def serving(handler: Callable[..., http.server.BaseHTTPRequestHandler]) -> Iterator[str]:
    """Serve HTTP on the loopback; yield the address."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def collect(client: Client, cache: Cache, installer: Installer) -> Collecting:
    """Returns the components of the environment by name; fetches with each installer in turn."""

    def run(
        target: Target, *, wheels: Path | None = client.wheels, **options: object
    ) -> dict[str, Component]:
        packages = Packages(wheelhouse=wheels, **options)  # type: ignore[arg-type]
        tool = Installer(installer.command, installer.is_uv, wheels)
        found = Collection(packages, client.inventory(), [], cache, functools.cache(lambda: tool))
        return {each.name: each for each in found.components(target)}

    return run


@pytest.fixture
def of_files(installer: Installer) -> Target:
    """The target that an installer takes files for: pip takes them for this machine alone."""
    return ELSEWHERE if installer.is_uv else HERE


def read(component: Component, path: str) -> bytes:
    """Return the content of a file of a component."""
    (entry,) = [each for each in component.entries if each.path == path]
    return entry.read()


def machines(component: Component) -> set[str]:
    """Return the processors that the libraries of a component are named after."""
    return {
        target.machine
        for target in (X86, ARM)
        for entry in component.entries
        if target.machine in entry.path
    }


@pytest.mark.parametrize("target", [X86, ARM])
def test_pure_package_is_copied_as_it_is(
    client: Client, collect: Collecting, target: Target
) -> None:
    """Without any index, whatever the platform, with what was changed in it by hand."""
    make_wheel(client.wheels, "pure")
    client.install("pure")
    (client.site / "pure.py").write_text("VERSION = 'changed'\n")
    shutil.rmtree(client.wheels)
    client.wheels.mkdir()
    found = collect(target)
    assert found.keys() == {"pure"}
    assert read(found["pure"], f"{SITE}/pure.py") == b"VERSION = 'changed'\n"


@pytest.mark.parametrize("target", [X86, ARM])
def test_native_package_is_for_the_platform_of_the_workers(
    client: Client, collect: Collecting, target: Target
) -> None:
    """In the version that is here, though there is a newer one, with its local label."""
    native_wheels(client.wheels, "fast", "2.1+cu121")
    client.install("fast")
    native_wheels(client.wheels, "fast", "3.0")
    found = collect(target)["fast"]
    assert found.version == "2.1+cu121"
    assert machines(found) == {target.machine}


def test_all_packages_without_a_wheel_are_named(client: Client, collect: Collecting) -> None:
    """With the platform, the reason, and what can be done."""
    native_wheels(client.wheels, "fast")
    native_wheels(client.wheels, "first", targets=(HERE,))
    native_wheels(client.wheels, "second", targets=(HERE,))
    client.install("fast", "first", "second")
    with pytest.raises(ConfigError) as caught:
        collect(ELSEWHERE)
    text = str(caught.value)
    assert "first==1.0" in text
    assert "second==1.0" in text
    assert "fast==1.0" not in text
    assert ELSEWHERE.platform in text
    assert HERE.machine in text
    for remedy in ("exclude=", "extra=", "image=", "CodeBuild"):
        assert remedy in text
    assert collect(ELSEWHERE, exclude=["first", "second"]).keys() == {"fast"}


def test_extra_replaces_the_version_that_is_here(client: Client, collect: Collecting) -> None:
    """Where it has no wheel, another one may have."""
    native_wheels(client.wheels, "fast", "1.0", targets=(HERE,))
    client.install("fast")
    native_wheels(client.wheels, "fast", "1.1", targets=(ELSEWHERE,))
    assert collect(ELSEWHERE, extra=["fast>1.0"])["fast"].version == "1.1"


def test_what_fetched_packages_require_comes_along(client: Client, collect: Collecting) -> None:
    """As torch, whose wheel for Linux requires more than the one for macOS; and extras."""
    target = ELSEWHERE
    make_wheel(client.wheels, "torch", tag=f"{TAG}-{TAG}-manylinux_2_28_{HERE.machine}")
    client.install("torch")
    make_wheel(
        client.wheels,
        "torch",
        requires=["cuda", "only-windows; sys_platform == 'win32'"],
        tag=f"{TAG}-{TAG}-manylinux_2_28_{target.machine}",
    )
    make_wheel(client.wheels, "cuda", requires=["driver"])
    make_wheel(client.wheels, "driver")
    make_wheel(client.wheels, "plotting", requires=["canvas; extra == 'more'"], extras=["more"])
    make_wheel(client.wheels, "canvas")
    found = collect(target, extra=["plotting[more]"])
    assert found.keys() == {"torch", "cuda", "driver", "plotting", "canvas"}


@pytest.mark.parametrize(
    ("asked", "wanted"),
    [
        ("dasky[complete]", {"dasky", "arrays", "frames"}),
        ("poet[all]", {"poet", "rhymes"}),
        ("poet[b]", {"poet", "rhymes"}),
        ("poet", {"poet"}),
    ],
)
def test_extras_of_what_is_fetched_come_along(
    client: Client, collect: Collecting, asked: str, wanted: set[str]
) -> None:
    """Also those that other extras of the same package name, and what any of several asks for."""
    requires = [
        "dasky[array,frame]; extra == 'complete'",
        "arrays; extra == 'array'",
        "frames; extra == 'frame'",
    ]
    make_wheel(client.wheels, "dasky", requires=requires, extras=["array", "frame", "complete"])
    requires = ["rhymes; extra == 'all' or extra == 'b'"]
    make_wheel(client.wheels, "poet", requires=requires, extras=["all", "b"])
    for name in ("arrays", "frames", "rhymes"):
        make_wheel(client.wheels, name)
    assert collect(X86, source="none", extra=[asked]).keys() == wanted


def test_extras_of_what_is_here_are_fetched_where_another_package_needs_them(
    client: Client, collect: Collecting
) -> None:
    """The package itself is copied, and all requirements of it count."""
    requires = ["loops; extra == 'fast'", "tables; extra == 'wide'"]
    make_wheel(client.wheels, "served", requires=requires, extras=["fast", "wide"])
    client.install("served")
    make_wheel(client.wheels, "app", requires=["served[fast]", "served[wide]>=1"])
    for name in ("loops", "tables"):
        make_wheel(client.wheels, name)
    found = collect(X86, extra=["app"])
    assert found.keys() == {"served", "app", "loops", "tables"}


@pytest.mark.parametrize("is_copied", [True, False])
def test_extras_of_what_is_here_are_followed_through_its_other_extras(
    client: Client, collect: Collecting, is_copied: bool
) -> None:
    """What only an extra requires was not selected here, so it is not missing on purpose."""
    requires = ["served[fast]; extra == 'all'", "loops; extra == 'fast'"]
    make_wheel(client.wheels, "served", requires=requires, extras=["fast", "all"])
    make_wheel(client.wheels, "loops")
    make_wheel(client.wheels, "app", requires=["served[all]"])
    client.install("served")
    extra = "app" if is_copied else "served[all]"
    assert collect(X86, extra=[extra]).keys() == {"served", "loops"} | ({"app"} & {extra})


def test_what_is_missing_here_is_wanted_where_a_file_names_the_packages(
    client: Client, collect: Collecting
) -> None:
    """Only ``packages="here"`` copies what was left out on purpose."""
    make_wheel(client.wheels, "partial", requires=["absent"])
    make_wheel(client.wheels, "absent")
    client.install("--no-deps", "partial")
    assert collect(X86, source="none", extra=["partial"]).keys() == {"partial", "absent"}
    assert collect(X86, extra=["partial"]).keys() == {"partial"}


def test_version_suits_all_that_require_the_package(client: Client, collect: Collecting) -> None:
    """Whoever comes first, and also if a newer one has been fetched before."""
    for version in ("1.0", "2.0"):
        make_wheel(client.wheels, "lib", version)
    make_wheel(client.wheels, "low", requires=["lib<2"])
    make_wheel(client.wheels, "deep", requires=["low"])
    make_wheel(client.wheels, "any", requires=["lib"])
    for extra in (["low", "any"], ["any", "low"], ["any", "deep"]):
        assert collect(X86, source="none", extra=extra)["lib"].version == "1.0"
    make_wheel(client.wheels, "high", requires=["lib>=2"])
    with pytest.raises(ConfigError) as caught:
        collect(X86, source="none", extra=["low", "high"])
    assert "high==1.0 requires lib>=2" in str(caught.value)
    assert "low==1.0 requires lib<2" in str(caught.value)


def test_what_a_replaced_version_required_is_left_out(client: Client, collect: Collecting) -> None:
    """Another package wants an older one, which requires less."""
    make_wheel(client.wheels, "lib", "1.0")
    make_wheel(client.wheels, "lib", "2.0", requires=["more"])
    make_wheel(client.wheels, "more", requires=["low"])
    make_wheel(client.wheels, "low", requires=["lib<2"])
    make_wheel(client.wheels, "any", requires=["lib", "deep"])
    make_wheel(client.wheels, "deep", requires=["deeper"])
    make_wheel(client.wheels, "deeper", requires=["lib<2"])
    found = collect(X86, source="none", extra=["any"])
    assert {(each.name, each.version) for each in found.values()} == {
        ("any", "1.0"),
        ("deep", "1.0"),
        ("deeper", "1.0"),
        ("lib", "1.0"),
    }


def test_package_that_does_not_suit_what_is_here_is_refused(
    client: Client, collect: Collecting
) -> None:
    """Both are named; another version of either helps. What is here unsuited stays as it is."""
    make_wheel(client.wheels, "lib", "1.0")
    make_wheel(client.wheels, "odd", requires=["lib>=2"])
    client.install("--no-deps", "lib", "odd")
    make_wheel(client.wheels, "lib", "2.0")
    make_wheel(client.wheels, "new", requires=["lib>=2"])
    assert collect(X86).keys() == {"lib", "odd"}
    with pytest.raises(
        ConfigError, match=r"new==1\.0 requires lib>=2, and lib==1\.0 is installed here.*extra="
    ):
        collect(X86, extra=["new"])
    assert collect(X86, extra=["new", "lib>=2"])["lib"].version == "2.0"
    assert collect(X86, source="none", extra=["new"])["lib"].version == "2.0"
    file = client.root / "requirements.txt"
    file.write_text("lib<2\n")
    with pytest.raises(ConfigError, match=r"new==1\.0 requires lib>=2, and lib==1\.0 is what was"):
        collect(X86, source=file, extra=["new"])


def test_packages_that_are_here_stay_together_when_they_are_fetched(
    client: Client, collect: Collecting
) -> None:
    """Their versions are those of here, whatever the metadata says."""
    native_wheels(client.wheels, "fast", "1.0")
    for target in (X86, ARM):
        tag = f"{TAG}-{TAG}-manylinux_2_28_{target.machine}"
        make_wheel(client.wheels, "model", requires=["fast>=2"], tag=tag)
    client.install("--no-deps", "fast", "model")
    native_wheels(client.wheels, "fast", "2.0")
    assert collect(ELSEWHERE)["fast"].version == "1.0"


def test_extra_that_is_missing_here_stays_missing(client: Client, collect: Collecting) -> None:
    """Whoever installs without dependencies has a reason, though a part has to be fetched."""
    make_wheel(client.wheels, "served", requires=["loops; extra == 'fast'"], extras=["fast"])
    make_wheel(client.wheels, "loops")
    for target in (X86, ARM):
        tag = f"{TAG}-{TAG}-manylinux_2_28_{target.machine}"
        make_wheel(client.wheels, "model", requires=["served[fast]"], tag=tag)
    client.install("--no-deps", "served", "model")
    assert collect(ELSEWHERE).keys() == {"served", "model"}
    assert collect(ELSEWHERE, extra=["served[fast]"]).keys() == {"served", "model", "loops"}


def test_marker_of_an_extra_counts(client: Client, collect: Collecting) -> None:
    """What it leaves out is not fetched, and nothing else is harmed."""
    make_wheel(client.wheels, "thing")
    extra = ["thing; sys_platform == 'linux'", "absent; sys_platform == 'win32'"]
    assert collect(X86, source="none", extra=extra).keys() == {"thing"}


def test_wheel_that_lies_about_its_platform_is_refused(client: Client, collect: Collecting) -> None:
    """It says that it is for every platform, and has a library for one."""
    make_wheel(client.wheels, "liar", files={"liar/_c.so": library(HERE.machine)})
    client.install("liar")
    assert collect(HERE).keys() == {"liar"}
    with pytest.raises(
        ConfigError, match=rf"liar==1\.0: its wheel is not what it says.*{HERE.machine}"
    ):
        collect(ELSEWHERE)


def test_libraries_that_are_data_are_for_any_platform(client: Client, collect: Collecting) -> None:
    """As debugpy has some for each system, whatever it is installed on."""
    files = {
        "tool/__init__.py": "",
        "tool/attach_linux.so": library(HERE.machine),
        "tool/_c.cp39-win_amd64.pyd": b"MZ PyInit__c",
    }
    make_wheel(client.wheels, "tool", files=files)
    client.install("tool")
    read(collect(ELSEWHERE)["tool"], f"{SITE}/tool/attach_linux.so")


def test_what_was_built_for_a_newer_system_is_not_copied(
    client: Client, collect: Collecting
) -> None:
    """A library that was compiled here may need more than workers have."""
    for name, glibc in (("old", 31), ("new", 39)):
        files = {f"{name}/_c.so": library(HERE.machine, glibc)}
        make_wheel(client.wheels, name, files=files, tag=f"{TAG}-{TAG}-linux_{HERE.machine}")
        client.install(name)
    shutil.rmtree(client.wheels)
    client.wheels.mkdir()
    with pytest.raises(
        ConfigError, match=r"new==1\.0.*it needs glibc 2\.39, and workers have 2\.36"
    ):
        collect(HERE)
    assert collect(HERE, exclude=["new"]).keys() == {"old"}


def test_conda_package_without_a_wheel_says_what_to_do(
    client: Client, collect: Collecting, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """conda's packages are made for conda's libraries; those of the index are taken instead."""
    (tmp_path / "conda" / "conda-meta").mkdir(parents=True)
    monkeypatch.setattr("sys.prefix", str(tmp_path / "conda"))
    native_wheels(client.wheels, "fast", targets=(HERE, ELSEWHERE))
    native_wheels(client.wheels, "geo", targets=(HERE,))
    client.install("fast", "geo")
    for name in ("fast", "geo"):
        (info,) = client.site.glob(f"{name}-*.dist-info")
        (info / "INSTALLER").write_text("conda\n")
        (info / "WHEEL").write_text(f"Wheel-Version: 1.0\nTag: {TAG}-{TAG}-conda_{HERE.machine}\n")
    (client.wheels / f"geo-1.0-{TAG}-{TAG}-manylinux_2_28_{HERE.machine}.whl").unlink()
    with pytest.raises(ConfigError) as caught:
        collect(HERE)
    assert "geo==1.0" in str(caught.value)
    assert "conda has installed it here" in str(caught.value)
    assert "In the conda environment conda, pip can install" in str(caught.value)
    assert machines(collect(HERE, exclude=["geo"])["fast"]) == {HERE.machine}


def test_conda_package_for_this_platform_is_fetched_too(
    client: Client, collect: Collecting, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """conda says `linux` like whoever compiles; what is Python alone is copied."""
    (tmp_path / "conda" / "conda-meta").mkdir(parents=True)
    monkeypatch.setattr("sys.prefix", str(tmp_path / "conda"))
    native_wheels(client.wheels, "fast")
    make_wheel(client.wheels, "pure")
    client.install("fast", "pure")
    for name, tag in (("fast", f"{TAG}-{TAG}-linux_{HERE.machine}"), ("pure", "py3-none-any")):
        (info,) = client.site.glob(f"{name}-*.dist-info")
        (info / "INSTALLER").write_text("conda\n")
        (info / "WHEEL").write_text(f"Wheel-Version: 1.0\nTag: {tag}\n")
    (client.site / "fast" / "__init__.py").write_text("VERSION = 'of conda'\n")
    (client.site / "pure.py").write_text("VERSION = 'of conda'\n")
    found = collect(HERE)
    assert read(found["fast"], f"{SITE}/fast/__init__.py") == b"VERSION = '1.0'\n"
    assert read(found["pure"], f"{SITE}/pure.py") == b"VERSION = 'of conda'\n"


def test_what_was_compiled_here_needs_libraries_that_the_image_has(
    client: Client, collect: Collecting
) -> None:
    """Or that are in it, or in another package; what a base of one's own has is not known."""
    tag = f"{TAG}-{TAG}-linux_{HERE.machine}"
    here, there = f"{TAG}-{TAG}-manylinux_2_28_{HERE.machine}", "libother.so.1"
    needs = ["libc.so.6", "libstdc++.so.6", "libown-1a2b.so.3", there]
    files = {
        "good/_c.so": library(HERE.machine, needs=needs),
        "good.libs/libown-1a2b.so.3": library(HERE.machine),
    }
    make_wheel(client.wheels, "good", files=files, tag=tag)
    files = {f"other/{there}": library(HERE.machine, needs=["libpromised.so.1"])}
    make_wheel(client.wheels, "other", files=files, tag=here)
    files = {"sql/_c.so": library(HERE.machine, needs=["libc.so.6", "libpq.so.5"])}
    make_wheel(client.wheels, "sql", files=files, tag=tag)
    client.install("good", "other", "sql")
    shutil.rmtree(client.wheels)
    client.wheels.mkdir()
    with pytest.raises(
        ConfigError, match=r"sql==1\.0: .*compiled here, and needs libpq\.so\.5, which"
    ) as caught:
        collect(HERE)
    assert "good==1.0" not in str(caught.value)
    assert collect(HERE, exclude=["sql"]).keys() == {"good", "other"}
    assert collect(HERE, base="own:latest").keys() == {"good", "other", "sql"}
    make_wheel(client.wheels, "sql", files={"sql/_c.so": library(HERE.machine)}, tag=here)
    assert read(collect(HERE)["sql"], f"{SITE}/sql/_c.so") == library(HERE.machine)


def test_libraries_are_those_of_the_packages_that_workers_get(
    client: Client, collect: Collecting
) -> None:
    """What a package that is left out, or has another version, brought here does not count."""
    tag, there = f"{TAG}-{TAG}-linux_{HERE.machine}", f"{TAG}-{TAG}-manylinux_2_28_{HERE.machine}"
    make_wheel(
        client.wheels, "other", "1.0", {"other/libother.so.1": library(HERE.machine)}, tag=tag
    )
    needs = {"good/_c.so": library(HERE.machine, needs=["libother.so.1"])}
    make_wheel(client.wheels, "good", files=needs, tag=tag)
    client.install("good", "other")
    (client.wheels / f"good-1.0-{tag}.whl").unlink()
    assert collect(HERE).keys() == {"good", "other"}
    make_wheel(
        client.wheels, "other", "2.0", {"other/libother.so.2": library(HERE.machine)}, tag=there
    )
    for options in ({"exclude": ["other"]}, {"extra": ["other>=2"]}):
        with pytest.raises(
            ConfigError, match=r"good==1\.0: .*needs libother\.so\.1, which no pack"
        ):
            collect(HERE, **options)
    make_wheel(client.wheels, "good", files={"good/_c.so": library(HERE.machine, 18)}, tag=there)
    found = collect(HERE, extra=["other>=2"])
    assert found.keys() == {"good", "other"}
    assert read(found["good"], f"{SITE}/good/_c.so") == library(HERE.machine, 18)


@pytest.mark.parametrize("is_fetched", [False, True])
def test_project_may_need_a_library_of_a_package_that_workers_get(
    client: Client, collect: Collecting, tmp_path: Path, is_fetched: bool
) -> None:
    """Also one that is added for them, and is not here."""
    files = {"src/mine/_c.so": library(HERE.machine, needs=["libother.so.1"])}
    client.install("-e", str(make_project(tmp_path / "mine", "mine", files)))
    tag = f"{TAG}-{TAG}-manylinux_2_28_{HERE.machine}"
    make_wheel(
        client.wheels, "other", files={"other/libother.so.1": library(HERE.machine)}, tag=tag
    )
    if not is_fetched:
        client.install("other")
    assert collect(HERE, extra=["other"] if is_fetched else []).keys() == {"mine", "other"}
    with pytest.raises(ConfigError, match=r"project mine in .*needs libother\.so\.1.*base="):
        collect(HERE, exclude=["other"])


def test_version_that_no_index_can_have_is_named(client: Client, collect: Collecting) -> None:
    """Old tools installed such versions; what fits is copied all the same."""
    for name in ("pure", "fast"):
        info = client.site / f"{name}-2013k_own.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 2013k_own\n")
        (client.site / name).mkdir()
        (client.site / name / "_c.so").write_bytes(library(HERE.machine) if name == "fast" else b"")
        (info / "RECORD").write_text(f"{name}/_c.so,,\n{info.name}/METADATA,,\n")
    (client.site / "pure" / "_c.so").rename(client.site / "pure" / "c.txt")
    (client.site / "pure-2013k_own.dist-info" / "RECORD").write_text("pure/c.txt,,\n")
    with pytest.raises(ConfigError, match=r"fast in the version '2013k_own' .*exclude="):
        collect(ELSEWHERE)
    assert collect(ELSEWHERE, exclude=["fast"]).keys() == {"pure"}
    make_wheel(client.wheels, "fast", "1.0")
    make_wheel(client.wheels, "app", requires=["fast"])
    for options in ({"extra": ["fast>=1"]}, {"extra": ["app"], "source": "none"}):
        assert collect(ELSEWHERE, **options)["fast"].version == "1.0"


def test_project_that_needs_a_library_of_this_machine_is_refused(
    client: Client, collect: Collecting, tmp_path: Path
) -> None:
    """Unless an image is named that may have it."""
    files = {"src/mine/_c.so": library(HERE.machine, needs=["libpq.so.5"])}
    client.install("-e", str(make_project(tmp_path / "mine", "mine", files)))
    with pytest.raises(ConfigError, match=r"project mine in .*needs libpq\.so\.5.*base="):
        collect(HERE)
    assert collect(HERE, base="own:latest").keys() == {"mine"}


@pytest.mark.skipif(sys.platform != "linux", reason="reads the libraries of Linux")
def test_libraries_that_a_real_one_needs_are_read() -> None:
    """Of an extension module of this Python, or of Python itself."""
    import _ctypes

    file = Path(getattr(_ctypes, "__file__", sys.executable))
    needed = needed_libraries(file.read_bytes())
    assert "libc.so.6" in needed
    assert all(name.startswith(("lib", "ld-")) and ".so" in name for name in needed)
    for size in (10, 100, 3000):
        assert needed_libraries(file.read_bytes()[:size]) == []


def test_package_without_a_list_of_files_is_fetched(client: Client, collect: Collecting) -> None:
    """As those of a Linux distribution."""
    make_wheel(client.wheels, "thing")
    client.install("thing")
    (client.site / "thing.py").write_text("VERSION = 'of the distribution'\n")
    (record,) = client.site.glob("thing-*.dist-info/RECORD")
    record.unlink()
    assert read(collect(X86)["thing"], f"{SITE}/thing.py") == b"VERSION = '1.0'\n"


def test_namespace_packages_share_their_directory(client: Client, collect: Collecting) -> None:
    """One that was copied, and one that was fetched."""
    make_wheel(client.wheels, "space-one", files={"space/one.py": "ONE = 1\n"})
    for target in (X86, ARM):
        make_wheel(
            client.wheels,
            "space-two",
            files={"space/two.py": "TWO = 2\n"},
            tag=f"py3-none-manylinux2014_{target.machine}",
        )
    client.install("space-one", "space-two")
    found = collect(ELSEWHERE)
    read(found["space-one"], f"{SITE}/space/one.py")
    read(found["space-two"], f"{SITE}/space/two.py")


@pytest.mark.parametrize("target", [HERE, ELSEWHERE])
def test_data_files_and_scripts_are_where_the_environment_has_them(
    client: Client, collect: Collecting, target: Target
) -> None:
    """Copied or fetched; a script starts with the workers' interpreter."""
    for each in (X86, ARM):
        files = {
            "tool/__init__.py": "def main(): ...\n",
            "tool/table.csv": "1,2\n",
            "tool-1.0.data/data/share/tool/settings.ini": "[tool]\n",
            "tool-1.0.data/scripts/tool-script": "#!python\nprint(1)\n",
            "tool-1.0.dist-info/entry_points.txt": "[console_scripts]\ntool = tool:main\n",
        }
        make_wheel(client.wheels, "tool", files=files, tag=f"py3-none-manylinux2014_{each.machine}")
    client.install("tool")
    found = collect(target)["tool"]
    assert read(found, f"{SITE}/tool/table.csv") == b"1,2\n"
    assert read(found, "share/tool/settings.ini") == b"[tool]\n"
    for script in ("bin/tool", "bin/tool-script"):
        assert read(found, script).startswith(b"#!/opt/worker/bin/python\n"), script


def test_editable_project_is_built(client: Client, collect: Collecting, tmp_path: Path) -> None:
    """What its wheel would have, with its data; built again when it was edited."""
    source = make_project(
        tmp_path / "mine", "mine", {"src/mine/__init__.py": "A = 1\n", "src/mine/data.bin": b"\0"}
    )
    client.install("-e", str(source))
    found = collect(ELSEWHERE)["mine"]
    assert found.is_own
    assert read(found, f"{SITE}/mine/data.bin") == b"\0"
    (source / "src" / "mine" / "__init__.py").write_text("A = 2\n")
    assert read(collect(ELSEWHERE)["mine"], f"{SITE}/mine/__init__.py") == b"A = 2\n"


def test_project_with_libraries_is_for_this_machine_only(
    client: Client, collect: Collecting, tmp_path: Path
) -> None:
    """They were compiled here."""
    files = {"src/mine/__init__.py": "", "src/mine/_c.so": library(HERE.machine)}
    client.install("-e", str(make_project(tmp_path / "mine", "mine", files)))
    read(collect(HERE)["mine"], f"{SITE}/mine/_c.so")
    with pytest.raises(ConfigError, match=rf"project mine in .*{HERE.machine}.*arch="):
        collect(ELSEWHERE)


def test_project_that_cannot_be_built_says_why(
    client: Client, collect: Collecting, tmp_path: Path
) -> None:
    """The end of what the tool says, and which project it is."""
    source = make_project(tmp_path / "mine", "mine", {"src/mine/__init__.py": ""})
    client.install("-e", str(source))
    (source / "tools" / "own_backend.py").write_text(
        "def build_wheel(*args, **kwargs):\n    raise SystemExit('the moon is not full')\n"
    )
    with pytest.raises(
        ConfigError, match=r"(?s)project .*mine cannot be built.*the moon is not full"
    ):
        collect(HERE)


def test_project_is_built_without_a_trace_in_its_source(
    installer: Installer, tmp_path: Path
) -> None:
    """setuptools builds beside the source, and takes from there what was deleted since."""
    found = importlib.util.find_spec("setuptools")
    if found is None or found.origin is None:
        pytest.skip("setuptools is not here")
    if not Path(found.origin).with_name("command").joinpath("bdist_wheel.py").exists():
        pytest.skip("this setuptools makes no wheels by itself: 70.1 is the first that does")
    source = make_project(
        tmp_path / "mine", "mine", {"src/mine/__init__.py": "", "src/mine/old.py": ""}
    )
    (source / "tools" / "own_backend.py").write_text(
        f"import sys\n"
        f"sys.path.append({str(Path(found.origin).parents[1])!r})\n"
        f"from setuptools.build_meta import build_wheel\n"
    )
    (source / "build" / "lib" / "mine").mkdir(parents=True)
    (source / "build" / "lib" / "mine" / "older.py").write_text("")
    before = sorted(source.rglob("*"))
    installer.build(source, tmp_path / "first")
    assert sorted(source.rglob("*")) == before
    (source / "src" / "mine" / "old.py").unlink()
    installer.build(source, tmp_path / "second")
    modules = [
        {path.name for path in (tmp_path / tree / "mine").glob("*.py")}
        for tree in ("first", "second")
    ]
    assert modules == [{"__init__.py", "old.py"}, {"__init__.py"}]


def test_path_of_a_pth_file_is_taken_along(
    client: Client, collect: Collecting, tmp_path: Path
) -> None:
    """And is on the path there, too; what lies around in it is not."""
    (tmp_path / "shared" / ".venv").mkdir(parents=True)
    (tmp_path / "shared" / "helper.py").write_text("HELP = 1\n")
    (tmp_path / "shared" / ".venv" / "secret.py").write_text("")
    (client.site / "ours.pth").write_text(f"{tmp_path}/shared\n")
    (found,) = collect(X86).values()
    (pth,) = [entry for entry in found.entries if entry.path.endswith(".pth")]
    inside = os.path.normpath(f"{SITE}/{pth.read().decode().strip()}")
    assert {entry.path for entry in found.entries} == {pth.path, f"{inside}/helper.py"}


def test_loose_modules_are_taken_along(client: Client, collect: Collecting) -> None:
    """They can be imported here."""
    (client.site / "dropped").mkdir()
    (client.site / "dropped" / "__init__.py").write_text("")
    (found,) = collect(X86).values()
    assert {entry.path for entry in found.entries} == {f"{SITE}/dropped/__init__.py"}


def old_package(client: Client, name: str, list_of_files: str) -> None:
    """Install a package as old tools do: without a RECORD."""
    info = client.site / f"{name}-1.0-py{PYTHON}.egg-info"
    info.mkdir(parents=True)
    (info / "PKG-INFO").write_text(f"Metadata-Version: 1.0\nName: {name}\nVersion: 1.0\n")
    (client.site / f"{name}.py").write_text("VERSION = 'old'\n")
    (client.site / name).mkdir()
    (client.site / name / "gone.py").write_text("")
    (info / list_of_files).write_text(
        f"{name}\n" if list_of_files == "top_level.txt" else f"../{name}.py\n../{name}/gone.py\n"
    )


@pytest.mark.parametrize("list_of_files", ["top_level.txt", "installed-files.txt"])
def test_files_of_old_packages_are_not_taken_as_nobodys(
    client: Client, collect: Collecting, list_of_files: str
) -> None:
    """They would stay where the package is excluded, and lie over another version of it."""
    old_package(client, "oldp", list_of_files)
    old_package(client, "zold", list_of_files)
    make_wheel(client.wheels, "zold", "2.0")
    found = collect(X86, exclude=["oldp"], extra=["zold>=2"])
    assert found.keys() == {"zold"}
    assert read(found["zold"], f"{SITE}/zold.py") == b"VERSION = '2.0'\n"
    assert not any(entry.path.endswith("gone.py") for entry in found["zold"].entries)


def test_loose_module_for_another_processor_is_named_and_can_be_left_out(
    client: Client, collect: Collecting
) -> None:
    """The error says how."""
    (client.site / "_native.so").write_bytes(library(HERE.machine))
    (client.site / "dropped.py").write_text("")
    with pytest.raises(
        ConfigError, match=rf"_native\.so, which.*{HERE.machine}.*exclude=\['_native'\]"
    ):
        collect(ELSEWHERE)
    (found,) = collect(ELSEWHERE, exclude=["_native"]).values()
    assert {entry.path for entry in found.entries} == {f"{SITE}/dropped.py"}


def test_files_of_directories_may_be_programs_and_have_any_name(
    client: Client, collect: Collecting, tmp_path: Path
) -> None:
    """What can be executed here can be there; names need not be UTF-8."""
    for folder in (tmp_path / "shared", client.site / "dropped"):
        folder.mkdir()
        for name, mode in ((b"tool", 0o755), (b"caf\xe9", 0o644)):
            path = os.fsencode(folder) + b"/" + name
            os.close(os.open(path, os.O_CREAT))
            os.chmod(path, mode)
    (client.site / "ours.pth").write_text(f"{tmp_path}/shared\n")
    for each in collect(X86).values():
        programs = {os.fsencode(entry.path)[-5:]: entry.is_executable for entry in each.entries}
        assert programs[b"/tool"]
        assert not programs[b"/caf\xe9"]
        assert each.signature() != each.content_key()


def test_requirements_file_is_taken_as_it_is(
    client: Client, collect: Collecting, tmp_path: Path, of_files: Target
) -> None:
    """With hashes, and what it requires; nothing of what is installed here."""
    wheel = make_wheel(client.wheels, "pinned", "1.5")
    make_wheel(client.wheels, "other")
    client.install("other")
    file = tmp_path / "requirements.txt"
    good = hashlib.sha256(wheel.read_bytes()).hexdigest()
    file.write_text(f"pinned==1.5 --hash=sha256:{good}\n")
    assert collect(of_files, source=file).keys() == {"pinned"}
    file.write_text(f"pinned==1.5 --hash=sha256:{'0' * 64}\n")
    with pytest.raises(ConfigError, match=r"(?si)requirements\.txt.*hash"):
        collect(of_files, source=file)


def test_requirements_file_may_include_addresses(
    client: Client, collect: Collecting, tmp_path: Path, of_files: Target
) -> None:
    """As the constraints that Airflow has on the web."""
    make_wheel(client.wheels, "pinned", "1.5")
    make_wheel(client.wheels, "pinned", "1.6")
    (tmp_path / "web").mkdir()
    (tmp_path / "web" / "constraints.txt").write_text("pinned<1.6\n")

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args: object) -> None: ...

    handler = functools.partial(Handler, directory=str(tmp_path / "web"))
    file = tmp_path / "requirements.txt"
    with serving(handler) as address:
        file.write_text(f"pinned\n-c {address}/constraints.txt\n")
        assert collect(of_files, source=file)["pinned"].version == "1.5"


def test_project_file_brings_the_project_and_what_it_requires(
    client: Client, collect: Collecting, tmp_path: Path, of_files: Target
) -> None:
    """``pyproject.toml``, where it says how the project is built."""
    native_wheels(client.wheels, "fast")
    source = make_project(tmp_path / "mine", "mine", {"src/mine/__init__.py": ""})
    file = source / "pyproject.toml"
    file.write_text(file.read_text().replace("dependencies = []", "dependencies = ['fast']"))
    found = collect(of_files, source=file)
    assert found.keys() == {"mine", "fast"}
    assert machines(found["fast"]) == {of_files.machine}


@pytest.mark.parametrize(
    "about",
    [
        "[project]\nname = 'mine'\nversion = '0.1'\ndynamic = ['dependencies']\n",
        "[tool.poetry]\nname = 'mine'\nversion = '0.1'\n",
    ],
)
def test_project_file_that_does_not_say_what_it_requires(
    client: Client, collect: Collecting, tmp_path: Path, of_files: Target, about: str
) -> None:
    """Its wheel does, which is built."""
    make_wheel(client.wheels, "thing")
    source = make_project(tmp_path / "mine", "mine", {"src/mine/__init__.py": ""})
    backend = source / "tools" / "own_backend.py"
    text = backend.read_text().replace('{version}\\n"', '{version}\\nRequires-Dist: thing\\n"')
    text = text.replace('["project"]', "").replace(
        "about =", "about = {'name': 'mine', 'version': '0.1'} #"
    )
    backend.write_text(text)
    file = source / "pyproject.toml"
    file.write_text(f"{about}[build-system]{file.read_text().partition('[build-system]')[2]}")
    assert collect(of_files, source=file).keys() == {"mine", "thing"}
    make_wheel(client.wheels, "more")
    backend.write_text(text.replace("Requires-Dist: thing", "Requires-Dist: more"))
    assert collect(of_files, source=file).keys() == {"mine", "more"}
    file.write_text(about)
    with pytest.raises(ConfigError, match=r"pyproject\.toml does not say what .* requires"):
        collect(of_files, source=file)


def test_lock_file_of_uv_is_taken_as_it_is(
    client: Client, cache: Cache, uv: Installer, tmp_path: Path
) -> None:
    """In the versions that it has, not in newer ones, and without groups for development."""
    native_wheels(client.wheels, "fast", "1.0")
    source = make_project(tmp_path / "mine", "mine", {"src/mine/__init__.py": ""})
    file = source / "pyproject.toml"
    text = file.read_text().replace("dependencies = []", "dependencies = ['fast']")
    make_wheel(client.wheels, "linter")
    make_wheel(client.wheels, "writer")
    file.write_text(
        f"{text}\n[tool.uv]\nno-index = true\nfind-links = ['{client.wheels}']\n"
        f"default-groups = ['dev', 'docs']\n"
        f"[dependency-groups]\ndev = ['linter']\ndocs = ['writer']\n"
    )
    uv._run("lock", "--directory", str(source))
    native_wheels(client.wheels, "fast", "2.0")
    packages = Packages(source=source / "uv.lock", wheelhouse=client.wheels)
    tool = Installer(uv.command, True, client.wheels)
    found = Collection(packages, client.inventory(), [], cache, lambda: tool).components(ELSEWHERE)
    assert {(each.name, each.version) for each in found} == {("mine", "0.1"), ("fast", "1.0")}


@pytest.mark.parametrize("other", [ELSEWHERE, Target("3.99", HERE.platform, 36)])
@pytest.mark.parametrize("name", ["requirements.txt", "pyproject.toml"])
def test_pip_takes_files_for_this_machine_alone(
    client: Client, cache: Cache, pip: Installer, tmp_path: Path, name: str, other: Target
) -> None:
    """It decides by the markers of this machine what is required, and cannot be told others."""
    make_wheel(client.wheels, "thing")
    (tmp_path / "requirements.txt").write_text("thing\n")
    about = "[project]\nname = 'mine'\nversion = '1'\ndependencies = ['thing']\n"
    (tmp_path / "pyproject.toml").write_text(about)
    packages = Packages(source=tmp_path / name, wheelhouse=client.wheels)
    tool = Installer(pip.command, False, client.wheels)
    made = Collection(packages, client.inventory(), [], cache, lambda: tool)
    with pytest.raises(ConfigError, match=f"{name}.* needs uv for workers on {other}.*install uv"):
        made.components(other)
    assert [each.name for each in made.components(HERE)] == ["thing"]


def test_uv_that_is_too_old_for_lock_files_is_named(
    client: Client, cache: Cache, tmp_path: Path
) -> None:
    """With the version that is needed: the lock file is not to blame."""
    program = tmp_path / "uv"
    said = "error: unexpected argument '--no-default-groups' found"
    program.write_text(
        f'#!/bin/sh\ntest "$1" = --version && echo "uv 0.5.22" && exit\necho "{said}" >&2\nexit 2\n'
    )
    program.chmod(0o755)
    (tmp_path / "uv.lock").write_text("version = 1\n")
    packages = Packages(source=tmp_path / "uv.lock", wheelhouse=client.wheels)
    tool = Installer((str(program),), True)
    made = Collection(packages, client.inventory(), [], cache, lambda: tool)
    with pytest.raises(
        ConfigError, match=r"uv 0\.5\.22 .*too old .*version 0\.5\.23 or later.*upgrade uv"
    ):
        made.components(HERE)


def test_project_that_alone_knows_what_it_requires_is_built_once(
    client: Client, collect: Collecting, tmp_path: Path, of_files: Target
) -> None:
    """What it requires is there also where the project itself is left out."""
    make_wheel(client.wheels, "thing")
    source = make_project(tmp_path / "mine", "mine", {"src/mine/__init__.py": ""})
    backend, built = source / "tools" / "own_backend.py", tmp_path / "built"
    text = backend.read_text().replace('{version}\\n"', '{version}\\nRequires-Dist: thing\\n"')
    note = f"    with open({str(built)!r}, 'a') as log:\n        log.write('built\\n')\n"
    backend.write_text(text.replace("    about =", f"{note}    about ="))
    file = source / "pyproject.toml"
    file.write_text(file.read_text().replace("dependencies = []", "dynamic = ['dependencies']"))
    found = collect(of_files, source=file)
    assert found.keys() == {"mine", "thing"}
    assert found["mine"].is_own
    assert built.read_text() == "built\n"
    assert collect(of_files, source=file, exclude=["mine"]).keys() == {"thing"}


@pytest.mark.parametrize("is_editable", [True, False])
def test_project_that_is_left_out_is_not_built(
    client: Client, collect: Collecting, tmp_path: Path, of_files: Target, is_editable: bool
) -> None:
    """It may be one that cannot be built here; what else a file names is there."""
    make_wheel(client.wheels, "thing")
    source = make_project(tmp_path / "mine", "mine", {"src/mine/__init__.py": ""})
    (source / "tools" / "own_backend.py").write_text("raise SystemExit('the moon is not full')\n")
    file = source / "pyproject.toml"
    file.write_text(file.read_text().replace("dependencies = []", "dependencies = ['thing']"))
    if is_editable:
        file = source / "requirements.txt"
        file.write_text("-e .\nthing\n")
    assert collect(of_files, source=file, exclude=["Mine"]).keys() == {"thing"}
    with pytest.raises(ConfigError, match="the moon is not full"):
        collect(of_files, source=file)


@pytest.mark.parametrize(
    "line",
    [
        "-e ./libs/member[more]",
        "./libs/member[more] ; os_name != 'nt'",
        "-e./libs/member[more]; os_name != 'nt'",
    ],
)
def test_projects_that_a_requirements_file_names_are_built(
    client: Client, collect: Collecting, tmp_path: Path, of_files: Target, line: str
) -> None:
    """With what they require, from an included file, and again when they were edited."""
    native_wheels(client.wheels, "fast")
    for name in ("loops", "tables"):
        make_wheel(client.wheels, name)
    member = make_project(
        tmp_path / "libs" / "member", "member", {"src/member/__init__.py": "A = 1\n"}
    )
    needs = "Requires-Dist: fast\\nProvides-Extra: more\\nRequires-Dist: loops; extra == 'more'\\n"
    backend = member / "tools" / "own_backend.py"
    backend.write_text(backend.read_text().replace('{version}\\n"', f'{{version}}\\n{needs}"'))
    file = tmp_path / "requirements.txt"
    file.write_text("# all\n-rmore/parts.txt\ntables  # as well\n")
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "parts.txt").write_text(f"{line}\n-c limits.txt\n")
    (tmp_path / "more" / "limits.txt").write_text("fast<2\n")
    native_wheels(client.wheels, "fast", "2.0")
    found = collect(of_files, source=file)
    assert found.keys() == {"member", "fast", "loops", "tables"}
    assert found["fast"].version == "1.0"
    assert found["member"].is_own
    assert read(found["member"], f"{SITE}/member/__init__.py") == b"A = 1\n"
    assert not any(entry.path.endswith(".pth") for entry in found["member"].entries)
    (member / "src" / "member" / "__init__.py").write_text("A = 22\n")
    changed = collect(of_files, source=file)["member"]
    assert read(changed, f"{SITE}/member/__init__.py") == b"A = 22\n"


def test_file_that_may_not_be_read_is_named() -> None:
    """Before anything is packed. Root may read everything, so somebody else asks."""
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        os.chmod(name, 0o755)
        module = Path(name, "secret.py")
        module.touch(mode=0)
        user = os.geteuid()
        if user == 0:
            os.seteuid(65534)
        try:
            with pytest.raises(ConfigError, match=rf"{module} is to be .* \(exclude=\)"):
                of_loose([module], HERE)
        finally:
            os.seteuid(user)


def test_included_file_that_is_not_there_is_named(collect: Collecting, tmp_path: Path) -> None:
    """As the user knows it, though a copy of the requirements file is what the installer reads."""
    make_project(tmp_path / "member", "member", {"src/member/__init__.py": ""})
    file = tmp_path / "requirements.txt"
    file.write_text("-e ./member\n-r gone.txt\n")
    with pytest.raises(ConfigError, match=re.escape(str(tmp_path / "gone.txt"))):
        collect(HERE, source=file)


def test_project_with_libraries_that_a_requirements_file_names(
    collect: Collecting, tmp_path: Path
) -> None:
    """It is for workers of this machine's kind, and needs what the image has."""
    member = make_project(
        tmp_path / "member", "member", {"src/member/_c.so": library(HERE.machine)}
    )
    file = tmp_path / "requirements.txt"
    file.write_text("-e ./member\n")
    read(collect(HERE, source=file)["member"], f"{SITE}/member/_c.so")
    with pytest.raises(ConfigError, match=rf"requirements\.txt.*({HERE.machine}|needs uv)"):
        collect(ELSEWHERE, source=file)
    (member / "src/member/_c.so").write_bytes(library(HERE.machine, needs=["libpq.so.5"]))
    with pytest.raises(ConfigError, match=r"member==0\.1, which .* needs libpq\.so\.5.*base="):
        collect(HERE, source=file)


def test_wheel_that_a_requirements_file_names_is_taken_when_it_is_another(
    client: Client, collect: Collecting, tmp_path: Path
) -> None:
    """Under the same name."""
    file = tmp_path / "requirements.txt"
    file.write_text("./own/thing-1.0-py3-none-any.whl\n")
    for content in ("A = 1\n", "A = 22\n"):
        make_wheel(tmp_path / "own", "thing", files={"thing.py": content})
        assert read(collect(X86, source=file)["thing"], f"{SITE}/thing.py") == content.encode()


@pytest.mark.parametrize("changed", ["parts.txt", "limits.txt", "more.txt"])
def test_change_of_an_included_file_is_noticed(
    client: Client, cache: Cache, tmp_path: Path, changed: str
) -> None:
    """Of requirements or constraints, also in a file that these include."""
    for name, text in {
        "requirements.txt": "-rparts.txt\n--constraint=limits.txt\n-c gone.txt\n",
        "parts.txt": "thing\n",
        "limits.txt": "-cmore.txt\n",
        "more.txt": "thing<2\n",
    }.items():
        (tmp_path / name).write_text(text)
    packages = Packages(source=tmp_path / "requirements.txt")
    inventory = client.inventory()
    made = Collection(packages, inventory, [], cache, pytest.fail)
    before = made.signature()
    assert made.signature() == before
    with open(tmp_path / changed, "a") as file:
        file.write("other\n")
    assert made.signature() != before


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("-e git+https://me:hunter2@host.example/a.git#egg=a", "not on this machine.*leave out -e"),
        ("-e ./gone", "names the project .*gone, which is not there"),
    ],
)
def test_editable_project_that_is_not_here_is_refused(
    collect: Collecting, tmp_path: Path, line: str, said: str
) -> None:
    """By name, without a password."""
    file = tmp_path / "requirements.txt"
    file.write_text(f"{line}\n")
    with pytest.raises(ConfigError, match=said) as caught:
        collect(X86, source=file)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("dependency", "source"),
    [
        ("member", "member = { workspace = true }"),
        ("Mem_ber[x]>=0", "mem-ber = [{ path = '../member', marker = 'os_name != \"nt\"' }]"),
        ("member @ file:///nowhere/member", ""),
    ],
)
def test_project_file_with_projects_of_this_machine_is_refused(
    collect: Collecting, tmp_path: Path, dependency: str, source: str
) -> None:
    """No index has what is meant; a lock file says where it is."""
    file = tmp_path / "pyproject.toml"
    file.write_text(
        f"[project]\nname = 'app'\nversion = '1'\ndependencies = [{dependency!r}]\n"
        f"[tool.uv.sources]\n{source}\n"
    )
    with pytest.raises(ConfigError, match=r"mem-?ber, which .* is on this machine.*uv\.lock"):
        collect(X86, source=file)


def test_projects_of_a_lock_file_are_built(
    client: Client, cache: Cache, uv: Installer, tmp_path: Path
) -> None:
    """Members of a workspace, and editable ones elsewhere; again when they were edited."""
    source = make_project(tmp_path / "mine", "mine", {"src/mine/__init__.py": ""})
    file = source / "pyproject.toml"
    text = file.read_text().replace("dependencies = []", "dependencies = ['member', 'other']")
    file.write_text(
        f"{text}\n[tool.uv.sources]\nmember = {{ workspace = true }}\n"
        f"other = {{ path = '../other', editable = true }}\n"
        f"[tool.uv.workspace]\nmembers = ['libs/*']\n"
    )
    for folder in (source / "libs" / "member", tmp_path / "other"):
        make_project(folder, folder.name, {f"src/{folder.name}/__init__.py": "A = 1\n"})
    uv._run("lock", "--offline", "--directory", str(source))
    packages = Packages(source=source / "uv.lock", wheelhouse=client.wheels)
    tool = Installer(uv.command, True, client.wheels)

    def collected() -> tuple[str, dict[str, Component]]:
        found = Collection(packages, client.inventory(), [], cache, lambda: tool)
        return found.signature(), {each.name: each for each in found.components(ELSEWHERE)}

    before, found = collected()
    assert found.keys() == {"mine", "member", "other"}
    for name, folder in (("member", source / "libs" / "member"), ("other", tmp_path / "other")):
        assert read(found[name], f"{SITE}/{name}/__init__.py") == b"A = 1\n"
        (folder / "src" / name / "__init__.py").write_text("A = 22\n")
        after, changed = collected()
        assert after != before
        assert read(changed[name], f"{SITE}/{name}/__init__.py") == b"A = 22\n"
        before = after


@pytest.mark.parametrize("is_file", [False, True])
def test_wheels_are_those_of_the_wheelhouse_that_is_named(
    client: Client, collect: Collecting, cache: Cache, tmp_path: Path, is_file: bool
) -> None:
    """Though another one had the same version, or this one had another wheel before."""
    file = tmp_path / "requirements.txt"
    file.write_text("thing\n")
    options = {"source": file} if is_file else {"source": "none", "extra": ["thing"]}
    seen = set()
    for number, folder in enumerate(["one", "two", "two"]):
        content = f"A = {'1' * (number + 1)}\n"
        make_wheel(tmp_path / folder, "thing", files={"thing.py": content})
        found = collect(X86, wheels=tmp_path / folder, **options)["thing"]
        assert read(found, f"{SITE}/thing.py") == content.encode()
        packages = Packages(wheelhouse=tmp_path / folder, **options)  # type: ignore[arg-type]
        inventory = client.inventory()
        seen.add(Collection(packages, inventory, [], cache, pytest.fail).signature())
    assert len(seen) == 3


@pytest.fixture
def private_index(client: Client) -> Iterator[str]:
    """An index of the wheels that wants a password: its address, with that."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            wanted = "Basic " + base64.b64encode(b"user:hunter2").decode()
            if self.headers.get("Authorization") != wanted:
                self.send_response(401)
                self.send_header("WWW-Authenticate", "Basic realm=packages")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            if self.path.endswith(".whl"):
                self.path = f"/{self.path.rpartition('/')[2]}"
                super().do_GET()
                return
            name = self.path.strip("/").rpartition("/")[2]
            links = "".join(
                f'<a href="/files/{each.name}">{each.name}</a>'
                for each in sorted(client.wheels.glob(f"{name}-*.whl"))
            ).encode()
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.send_header("Content-Length", str(len(links)))
            self.end_headers()
            self.wfile.write(links)

        def log_message(self, *args: object) -> None: ...

    handler = functools.partial(Handler, directory=str(client.wheels))
    with serving(handler) as address:
        yield f"{address.replace('://', '://user:hunter2@')}/simple"


def test_a_misspelled_name_to_leave_out_is_noticed(
    client: Client, collect: Collecting, caplog: pytest.LogCaptureFixture
) -> None:
    """And no name of what is here, of a single module, or of what something else requires."""
    elsewhere = "only-there>=2; sys_platform == 'win32'"
    make_wheel(client.wheels, "pure", requires=["needed", elsewhere])
    make_wheel(client.wheels, "other", requires=["pure", "never-here"])
    client.install("pure", "--no-deps")
    (client.site / "alone.py").write_text("")
    found = collect(HERE, exclude=["Pure", "alone"])
    assert not found
    found = collect(HERE, exclude=["never_here", "Only_There"], extra=["other"])
    assert found.keys() >= {"other", "pure"}
    assert not caplog.records
    collect(HERE, exclude=["puer", "pandas"])
    told = [each.getMessage() for each in caplog.records]
    assert told == [
        "exclude names 'puer', but no such package is installed here or required; did you mean "
        "'pure'?",
        "exclude names 'pandas', but no such package is installed here or required",
    ]


def test_private_index_is_used_and_its_password_stays_here(
    client: Client, collect: Collecting, private_index: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In no file of any component, and in no message."""
    for name in ("UV_DEFAULT_INDEX", "PIP_INDEX_URL"):
        monkeypatch.setenv(name, private_index)
    native_wheels(client.wheels, "fast")
    native_wheels(client.wheels, "rare", targets=(HERE,))
    client.install("fast", "rare")
    found = collect(ELSEWHERE, wheels=None, exclude=["rare"])
    assert machines(found["fast"]) == {ELSEWHERE.machine}
    assert not any(b"hunter2" in entry.read() for each in found.values() for entry in each.entries)
    with pytest.raises(ConfigError, match=r"rare==1\.0") as caught:
        collect(ELSEWHERE, wheels=None)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("project", "said"),
    [
        ("dependencies = ['six=>2']", r"pyproject\.toml: 'six=>2' is not a requirement such as"),
        ("requires-python = '>=3.99'", r"requires Python >=3\.99, and workers have Python 3"),
        ("requires-python = 'new'", r"requires-python='new' names no versions"),
        ("dependencies = 'numpy'", r"dependencies must be a list of strings, not 'numpy'"),
        ("dependencies = [3]", r"dependencies must be a list of strings, not \[3\]"),
    ],
)
def test_a_project_that_no_worker_can_have_is_refused(
    collect: Collecting, tmp_path: Path, project: str, said: str
) -> None:
    file = tmp_path / "pyproject.toml"
    file.write_text(f"[project]\nname = 'x'\nversion = '1'\n{project}\n")
    if "dependencies" not in project:
        file.write_text(f"{file.read_text()}dependencies = []\n")
    with pytest.raises(ConfigError, match=said):
        collect(HERE, source=file)


def test_options_with_their_values_behind_them_are_read(
    client: Client, collect: Collecting, tmp_path: Path, of_files: Target
) -> None:
    """As pip reads them, whichever installer is here, also in an included file."""
    for version in ("1.0", "2.0"):
        make_wheel(client.wheels, "thing", version)
    file = tmp_path / "requirements.txt"
    file.write_text("-r parts.txt\n")
    (tmp_path / "parts.txt").write_text("\ufeff-rmore.txt\n-climits.txt\n", encoding="utf-8")
    (tmp_path / "more.txt").write_text("thing\n")
    (tmp_path / "limits.txt").write_text("thing<2\n")
    assert collect(of_files, source=file)["thing"].version == "1.0"


@pytest.mark.parametrize(
    "line", ["x @ {}/x-1-py3-none-any.whl?token=hunter2", "-f {}/x?sig=hunter2&key=hunter2\nx"]
)
def test_query_of_an_address_is_in_no_message(
    collect: Collecting, tmp_path: Path, of_files: Target, line: str
) -> None:
    """Addresses that somebody has signed have the signature there."""
    file = tmp_path / "requirements.txt"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        file.write_text(line.format(f"http://127.0.0.1:{probe.getsockname()[1]}"))
        with pytest.raises(ConfigError) as caught:
            collect(of_files, source=file)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("password", ["hunter2", "hun@ter2"])
@pytest.mark.parametrize("form", ["gone @ {}/gone-1.0-py3-none-any.whl", "{} is none"])
def test_password_in_a_requirement_is_in_no_message(
    collect: Collecting, password: str, form: str
) -> None:
    """Neither in the error, nor in one that it was raised from, as a traceback shows both."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://user:{password}@127.0.0.1:{probe.getsockname()[1]}"
        with pytest.raises(ConfigError, match=r"(gone @ )?http://\*\*\*\*@127") as caught:
            collect(HERE, extra=[form.format(url)])
    shown = "".join(traceback.format_exception(caught.value))
    assert "ter2" not in shown


def test_address_that_does_not_suit_is_named_without_its_password(
    client: Client, collect: Collecting, private_index: str
) -> None:
    """It has one version only, and another package wants a newer one."""
    wheel = make_wheel(client.wheels, "lib", "1.0")
    make_wheel(client.wheels, "lib", "2.0")
    make_wheel(client.wheels, "new", requires=["lib>=2"])
    address = f"{private_index.removesuffix('/simple')}/files/{wheel.name}"
    with pytest.raises(
        ConfigError, match=r"lib @ http://\*.* is asked for and new==1\.0 req"
    ) as caught:
        collect(X86, source="none", extra=[f"lib @ {address}", "new"])
    assert "lib==1.0 is what was chosen" in str(caught.value)
    assert "hunter2" not in str(caught.value)


def test_same_files_are_components_of_the_same_content_wherever_they_are(
    client: Client, collect: Collecting, installer: Installer, tmp_path: Path
) -> None:
    """Installed by each tool, at another time, in another directory."""
    make_wheel(
        client.wheels,
        "tool",
        files={
            "tool/__init__.py": "def main(): ...\n",
            "tool-1.0.dist-info/entry_points.txt": "[console_scripts]\ntool = tool:main\n",
        },
    )
    client.install("tool")
    first = collect(X86)["tool"]
    other = make_client(tmp_path / "a" / "longer" / "name", client.wheels, installer)
    other.install("tool")
    client.root = other.root
    second = collect(X86)["tool"]
    assert first.signature() != second.signature()
    names = [{entry.path for entry in each.entries} for each in (first, second)]
    assert names[0] == names[1]
