"""What workers need is found by requirements and markers as they are on their platform."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from environment_helpers import PYTHON, Client, make_wheel

from cloudexec._environment.fetching import Installer
from cloudexec._environment.inventory import take_inventory
from cloudexec._environment.selection import Selection, select
from cloudexec._environment.target import Target

Selecting = Callable[..., Selection]
TARGET = Target(PYTHON, "linux/arm64", 36)
HERE = f"sys_platform == '{sys.platform}' and platform_machine != 'aarch64'"
THERE = "platform_machine == 'aarch64'"


@pytest.fixture
def selected(client: Client) -> Selecting:
    """Installs wheels with these requirements, and selects from them."""

    def run(requires: dict[str, list[str]], *installed: str, **options: object) -> Selection:
        for name, needs in requires.items():
            make_wheel(client.wheels, name, requires=needs, extras=("more",))
        client.install(*installed)
        return select(client.inventory(), TARGET, **options)  # type: ignore[arg-type]

    return run


def test_what_only_this_platform_requires_is_left_out(selected: Selecting) -> None:
    """As appnope, which is for macOS alone."""
    found = selected({"shell": [f"nope; {HERE}"], "nope": []}, "shell")
    assert found.here == ["shell"]


def test_what_only_the_workers_require_is_wanted(selected: Selecting) -> None:
    """As the CUDA libraries of torch, which are for Linux alone."""
    found = selected({"torch": [f"cuda>=12; {THERE}"]}, "torch")
    assert found.wanted == {"cuda": "cuda>=12"}


def test_what_pip_was_asked_for_is_kept_whoever_requires_it(
    client: Client, pip: Installer, selected: Selecting
) -> None:
    """Somebody wants it for itself. uv does not say what it was asked for."""
    client.installer = pip
    found = selected({"shell": [f"nope; {HERE}"], "nope": []}, "shell", "nope")
    assert found.here == ["nope", "shell"]


def test_requirements_of_extras_count_where_the_extra_was_asked_for(selected: Selecting) -> None:
    """Also under a marker."""
    requires = {
        "outer": ["inner[more]"],
        "inner": [f"extra-thing; extra == 'more' and {THERE}", "never; extra == 'other'"],
    }
    found = selected(requires, "outer")
    assert found.here == ["inner", "outer"]
    assert found.wanted == {"extra-thing": "extra-thing"}


def test_all_that_is_required_of_a_missing_package_is_wanted(selected: Selecting) -> None:
    """Versions and extras, whoever requires them, and for any of several extras."""
    requires = {
        "outer": ["inner[more]", f"cuda[fast]<13; {THERE}"],
        "inner": [f"cuda[math]>=12; (extra == 'other' or extra == 'more') and {THERE}"],
    }
    assert selected(requires, "outer").wanted == {"cuda": "cuda[fast,math]<13,>=12"}


def test_two_that_require_each_other_are_kept(selected: Selecting) -> None:
    """Nobody is at the beginning of a circle."""
    found = selected({"one": ["two"], "two": ["one"]}, "one", "two")
    assert found.here == ["one", "two"]


def test_excluded_packages_and_what_only_they_require_are_left_out(selected: Selecting) -> None:
    """Whoever else requires them."""
    requires = {"app": ["heavy"], "heavy": ["heavier"], "heavier": []}
    assert selected(requires, "app", exclude=["Heavy"]).here == ["app"]


def test_what_is_missing_here_is_not_wanted(client: Client, selected: Selecting) -> None:
    """Who installs without dependencies has a reason."""
    make_wheel(client.wheels, "partial", requires=["absent"])
    client.install("--no-deps", "partial")
    found = select(client.inventory(), TARGET)
    assert (found.here, found.wanted) == (["partial"], {})


def test_what_a_worker_needs_is_kept_or_wanted(selected: Selecting) -> None:
    """Also if it is excluded, or not installed."""
    found = selected(
        {"present": []},
        "present",
        exclude=["present", "absent"],
        required={"present": "present==1.0", "absent": "absent==3"},
    )
    assert (found.here, found.wanted) == (["present"], {"absent": "absent==3"})


def test_packages_of_the_system_are_taken_where_another_requires_them(
    client: Client, tmp_path: Path
) -> None:
    """Debian's Python has dozens of its own, which no index has."""
    place = tmp_path / "usr" / "lib" / "python3" / "dist-packages"
    for name in ("python-apt", "six"):
        info = place / f"{name}-1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    make_wheel(client.wheels, "app", requires=["six"])
    client.install("--no-deps", "app")
    inventory = take_inventory([str(client.site), str(place)])
    assert inventory.distributions.keys() == {"app", "six", "python-apt"}
    assert select(inventory, TARGET).here == ["app", "six"]


def test_tools_that_install_are_left_out(selected: Selecting) -> None:
    """A worker installs nothing."""
    assert selected({"wheel": [], "thing": []}, "wheel", "thing").here == ["thing"]
