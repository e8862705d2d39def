"""What is remembered is right, complete, and goes when nobody uses it."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cloudexec import ConfigError
from cloudexec._environment.cache import Cache
from cloudexec._environment.fetching import find_installer

DAY = 86400.0
KEYS = {name: hashlib.sha256(name.encode()).hexdigest() for name in ("old", "read", "new")}


def test_records_come_back(cache: Cache) -> None:
    """What is not one is none."""
    assert cache.read("images", "key") is None
    cache.write("images", "key", {"a": [1]})
    assert cache.read("images", "key") == {"a": [1]}
    (cache.root / "images" / "key.json").write_text("{")
    assert cache.read("images", "key") is None


def test_directory_is_kept_if_all_went_well(cache: Cache) -> None:
    """One that somebody else has made meanwhile stays, unless it is to be replaced."""
    for content, replace, kept in (
        ("first", False, "first"),
        ("second", False, "first"),
        ("third", True, "third"),
    ):
        with cache.fill("wheels", "key", replace=replace) as folder:
            folder.mkdir()
            (folder / "file").write_text(content)
        found = cache.directory("wheels", "key")
        assert found is not None
        assert (found / "file").read_text() == kept

    def break_off() -> None:
        with cache.fill("wheels", "other") as folder:
            folder.mkdir()
            raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        break_off()
    assert cache.directory("wheels", "other") is None
    assert [path.name for path in (cache.root / "wheels").iterdir()] == ["key"]


def test_what_nobody_uses_is_removed(cache: Cache) -> None:
    """After a month; what was left unfinished, after a day. What was read is used."""
    old, read, new = KEYS.values()
    for key in KEYS.values():
        cache.write("images", key, 1)
    (cache.root / "wheels" / ".new-1").mkdir(parents=True)
    (cache.root / ".scratch-1").mkdir()
    for path, days in (
        (f"images/{old}.json", 31),
        (f"images/{read}.json", 31),
        (f"images/{new}.json", 2),
        ("wheels/.new-1", 2),
        (".scratch-1", 2),
    ):
        then = time.time() - days * DAY
        os.utime(cache.root / path, (then, then))
    cache.read("images", read)
    cache.tidy()
    assert cache.read("images", old) is None
    assert cache.read("images", read) == cache.read("images", new) == 1
    assert not (cache.root / "wheels" / ".new-1").exists()
    assert not (cache.root / ".scratch-1").exists()


def test_other_files_of_the_directory_are_never_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The variable may name any directory, such as the user's own; and a project may be in it."""
    monkeypatch.setenv("CLOUDEXEC_CACHE_DIR", str(tmp_path))
    old = time.time() - 100 * DAY
    files = [
        tmp_path / folder / name
        for folder in ("", "cloudexec")
        for name in (
            "projects/thesis/chapter.tex",
            "docs/letter.txt",
            ".ssh/id",
            "images/photo.jpg",
            "wheels/.git/config",
        )
    ]
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("mine")
        os.utime(file, (old, old))
        os.utime(file.parent, (old, old))
    cache = Cache()
    cache.write("layers", KEYS["new"], 1)
    cache.tidy()
    assert [file for file in files if not file.exists()] == []
    assert (tmp_path / "cloudexec" / "layers" / f"{KEYS['new']}.json").exists()


def test_directory_that_cannot_be_used_names_the_variable(tmp_path: Path) -> None:
    """With the directory and the reason."""
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="CLOUDEXEC_CACHE_DIR"):
        Cache(tmp_path / "file" / "cache")


def test_program_that_does_not_run_is_not_taken_for_uv(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As what a version manager puts into the path for versions that have no uv."""
    pytest.importorskip("pip", reason="this environment has no pip")
    shim = tmp_path / "bin" / "uv"
    shim.parent.mkdir()
    shim.write_text("#!/bin/sh\nexit 127\n")
    shim.chmod(0o755)
    monkeypatch.setenv("PATH", str(shim.parent))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    assert subprocess.run([str(shim)], check=False).returncode == 127
    assert not find_installer().is_uv
