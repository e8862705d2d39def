"""What is remembered is right, complete, and goes when nobody uses it."""

from __future__ import annotations

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


def test_records_come_back(cache: Cache) -> None:
    """What is not one is none."""
    assert cache.read("kind", "key") is None
    cache.write("kind", "key", {"a": [1]})
    assert cache.read("kind", "key") == {"a": [1]}
    (cache.root / "kind" / "key.json").write_text("{")
    assert cache.read("kind", "key") is None


def test_directory_is_kept_if_all_went_well(cache: Cache) -> None:
    """And takes the place of the one before."""
    for content in ("first", "second"):
        with cache.fill("trees", "key") as folder:
            folder.mkdir()
            (folder / "file").write_text(content)
        found = cache.directory("trees", "key")
        assert found is not None
        assert (found / "file").read_text() == content

    def break_off() -> None:
        with cache.fill("trees", "other") as folder:
            folder.mkdir()
            raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        break_off()
    assert cache.directory("trees", "other") is None
    assert [path.name for path in (cache.root / "trees").iterdir()] == ["key"]


def test_what_nobody_uses_is_removed(cache: Cache) -> None:
    """After a month; what was left unfinished, after a day. What was read is used."""
    cache.write("kind", "old", 1)
    cache.write("kind", "read", 1)
    cache.write("kind", "new", 1)
    (cache.root / "trees" / ".unfinished").mkdir(parents=True)
    (cache.root / ".scratch-1").mkdir()
    for path, days in (
        ("kind/old.json", 31),
        ("kind/read.json", 31),
        ("kind/new.json", 2),
        ("trees/.unfinished", 2),
        (".scratch-1", 2),
    ):
        then = time.time() - days * DAY
        os.utime(cache.root / path, (then, then))
    cache.read("kind", "read")
    cache.tidy()
    assert cache.read("kind", "old") is None
    assert cache.read("kind", "read") == cache.read("kind", "new") == 1
    assert not (cache.root / "trees" / ".unfinished").exists()
    assert not (cache.root / ".scratch-1").exists()


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
