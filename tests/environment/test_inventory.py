"""What is installed here is listed as it is, and a change of any file is noticed."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from environment_helpers import Client, make_project, make_wheel

from cloudexec._environment.inventory import Inventory, take_inventory


def test_distributions_are_listed_with_versions_and_files(client: Client) -> None:
    """Without bytecode, and without what installers note for themselves."""
    make_wheel(
        client.wheels, "Some.Thing", "2.5", {"some_thing/__init__.py": "", "some_thing/a.txt": "1"}
    )
    client.install("Some.Thing")
    client.run("-c", "import some_thing")
    (found,) = client.inventory().distributions.values()
    assert (found.name, found.version, found.label) == ("some-thing", "2.5", "some-thing==2.5")
    names = {name.rpartition("/")[2] for name in found.files or ()}
    assert names == {"__init__.py", "a.txt", "METADATA", "WHEEL"}
    assert found.tags == {"py3-none-any"}


def test_editable_project_is_known_by_its_source(client: Client, tmp_path: Path) -> None:
    """The directory that its ``.pth`` file adds belongs to it, and is not listed again."""
    source = make_project(tmp_path / "mine", "mine", {"src/mine/__init__.py": ""})
    client.install("-e", str(source))
    found = client.inventory()
    assert found.distributions["mine"].source == source
    assert found.paths == ()


def test_directories_of_pth_files_and_loose_modules_are_listed(
    client: Client, tmp_path: Path
) -> None:
    """They belong to no distribution, and can be imported all the same."""
    (tmp_path / "shared").mkdir()
    (client.site / "ours.pth").write_text(
        f"# ours\nimport sys\n{tmp_path}/shared\n/nowhere/at/all\n"
    )
    (client.site / "dropped.py").write_text("")
    found = client.inventory()
    assert found.paths == (tmp_path / "shared",)
    assert found.loose == (client.site / "dropped.py",)


def test_origin_has_no_password(client: Client) -> None:
    """What was installed from a private address is known by the address alone."""
    make_wheel(client.wheels, "private")
    client.install("private")
    url = "https://user:secret@example.com/private-1.0-py3-none-any.whl"
    (info,) = client.site.glob("private-*.dist-info")
    (info / "direct_url.json").write_text(json.dumps({"url": url, "archive_info": {}}))
    found = client.inventory().distributions["private"]
    assert found.origin == "https://example.com/private-1.0-py3-none-any.whl"
    assert not any(name.endswith("direct_url.json") for name in found.files or ())


@pytest.mark.parametrize("what", ["module", "project", "path", "loose"])
def test_signature_differs_when_a_file_was_edited(
    client: Client, tmp_path: Path, what: str
) -> None:
    """And only then."""
    make_wheel(client.wheels, "thing")
    source = make_project(tmp_path / "mine", "mine", {"src/mine/__init__.py": "", ".git/index": ""})
    (tmp_path / "shared").mkdir()
    (client.site / "ours.pth").write_text(f"{tmp_path}/shared\n")
    client.install("thing", "-e", str(source))
    files = {
        "module": client.site / "thing.py",
        "project": source / "src" / "mine" / "new.py",
        "path": tmp_path / "shared" / "module.py",
        "loose": client.site / "dropped.py",
    }
    before = client.inventory().signature()
    (source / ".git" / "index").write_text("another commit")
    assert client.inventory().signature() == before
    files[what].write_text("EDITED = True\n")
    assert client.inventory().signature() != before


def test_what_an_interrupted_installation_left_is_not_listed(client: Client) -> None:
    """pip renames what it removes, and may not come to the end."""
    make_wheel(client.wheels, "thing")
    client.install("thing")
    (info,) = client.site.glob("thing-*.dist-info")
    os.rename(info, client.site / "~hing-1.0.dist-info")
    assert client.inventory().distributions == {}


def test_this_environment_is_listed() -> None:
    """What runs these tests, from ``sys.path``."""
    found: Inventory = take_inventory()
    assert {"cloudpickle", "grpcio", "pytest"} <= found.distributions.keys()
