"""What is installed here is listed as it is, and a change of any file is noticed."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from pathlib import Path

import pytest
from environment_helpers import Client, make_project, make_wheel

from cloudexec._environment.inventory import (
    Inventory,
    signature_of,
    source_files,
    take_inventory,
)
from cloudexec._versions import installed_versions


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


def test_metadata_may_have_bytes_that_are_no_text(client: Client) -> None:
    """Old tools wrote authors' names in the encoding of their machine."""
    make_wheel(client.wheels, "old", requires=["older"])
    make_wheel(client.wheels, "older")
    client.install("old")
    metadata = client.site / "old-1.0.dist-info" / "METADATA"
    metadata.write_bytes(metadata.read_bytes() + b"Author: J\xf6rg\n")
    (client.site / "eldest-3.egg-info").write_bytes(b"Name: eldest\nVersion: 3\nAuthor: J\xf6rg\n")
    found = client.inventory().distributions
    assert found["old"].requires == ["older"]
    assert found["eldest"].version == "3"


def test_of_two_versions_the_one_that_was_installed_last_counts(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their order is not that of their names. The worker says of itself by the same rule."""
    make_wheel(client.wheels, "twice", "10.0", {"twice.py": ""})
    client.install("twice")
    old = client.site / "twice-9.0.dist-info"
    shutil.copytree(client.site / "twice-10.0.dist-info", old)
    (old / "METADATA").write_text("Metadata-Version: 2.1\nName: twice\nVersion: 9.0\n")
    monkeypatch.setattr(sys, "path", [str(client.site)])
    now = time.time()
    os.utime(client.site / "twice-10.0.dist-info", (now, now))
    for seconds, version in ((-100, "10.0"), (100, "9.0"), (0, "9.0")):
        os.utime(old, (now + seconds, now + seconds))
        assert client.inventory().distributions["twice"].version == version
        assert installed_versions.__wrapped__()["twice"] == version


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


@pytest.mark.parametrize(
    "record",
    ['thing.py,,\n"thing-1.0.dist-info/METADATA', "thing.py,,\nthing\0.py,,\n", 'a"b",\n"c"d,,\n'],
)
def test_damaged_list_of_files_is_no_list(client: Client, record: str) -> None:
    """It may lack files, so the package is treated as one that has none, and fetched."""
    make_wheel(client.wheels, "thing")
    client.install("thing")
    (info,) = client.site.glob("thing-*.dist-info")
    (info / "RECORD").write_text(record)
    for text in (
        '{"url": "https://[half"}',
        '{"url": "file://[h", "dir_info": {"editable": true}}',
    ):
        (info / "direct_url.json").write_text(text)
        found = client.inventory().distributions["thing"]
        assert (found.files, found.origin, found.source) == (None, "", None)


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


def test_all_files_of_a_project_count(tmp_path: Path) -> None:
    """Packages that are called build or dist, and those behind links; not what is built there."""
    root, beside = tmp_path / "project", tmp_path / "beside"
    counted = ["pkg/__init__.py", "pkg/build/a.py", "pkg/dist/b.py", "dist/__init__.py", "old.pyc"]
    ignored = ["build/lib/pkg.py", "pkg/__pycache__/a.pyc", "pkg/c.pyc"]
    for name in [*counted, *ignored, "pkg/c.py"]:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("")
    beside.mkdir()
    (beside / "linked.py").write_text("")
    (root / "linked").symlink_to(beside)
    (root / "file.py").symlink_to(beside / "linked.py")
    (root / "nothing").symlink_to(tmp_path / "nowhere")
    (root / "pkg" / "around").symlink_to(root)
    (root / "pkg" / "self").symlink_to(root / "pkg" / "self")
    os.mkfifo(root / "pipe")
    os.close(os.open(os.fsencode(root) + b"/caf\xe9.txt", os.O_CREAT, 0o600))
    found = {os.fsencode(path.relative_to(root)) for path in source_files(root)}
    assert found == {
        *map(os.fsencode, counted),
        b"pkg/c.py",
        b"linked/linked.py",
        b"file.py",
        b"caf\xe9.txt",
    }
    for name in (*counted, "linked/linked.py"):
        before = signature_of(root)
        (root / name).write_text("EDITED = True")
        assert signature_of(root) != before, name


def test_bytecode_without_its_source_is_a_module(client: Client) -> None:
    """Some wheels have nothing else."""
    make_wheel(
        client.wheels,
        "closed",
        files={"closed/__init__.pyc": "", "closed/open.py": "", "closed/open.pyc": ""},
    )
    client.install("closed")
    (client.site / "alone.pyc").write_text("")
    found = client.inventory()
    names = {name for name in found.distributions["closed"].files or () if "dist-info" not in name}
    assert names == {"closed/__init__.pyc", "closed/open.py"}
    assert found.loose == (client.site / "alone.pyc",)


@pytest.mark.parametrize("end", ["", "/"])
def test_directories_of_pythonpath_are_looked_in(
    client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    """Where packages are installed in them, however they are written."""
    make_wheel(client.wheels, "thing")
    client.install("--target", str(tmp_path / "own"), "thing")
    monkeypatch.setenv("PYTHONPATH", f"{os.pathsep}{tmp_path}/own{end}")
    monkeypatch.syspath_prepend(f"{tmp_path}/own{end}")
    assert "thing" in take_inventory().distributions


def test_this_environment_is_listed() -> None:
    """What runs these tests, from ``sys.path``."""
    found: Inventory = take_inventory()
    assert {"cloudpickle", "grpcio", "pytest"} <= found.distributions.keys()
