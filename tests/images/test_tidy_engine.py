"""The engine that tests of images share leaves nothing behind, and nobody without an image."""

from __future__ import annotations

import secrets
from pathlib import Path

from tidy_engine import BASE, TidyEngine

from cloudexec._aws.images import Engine


def test_what_runs_have_made_is_removed_by_the_last_one(engine: Engine, tmp_path: Path) -> None:
    """They share names, so the first one that ends may not remove what another one uses."""
    repository, tag = "localhost/cloudexec-tidy", secrets.token_hex(8)
    name = f"{repository}:{tag}"
    first, second = TidyEngine(tmp_path), TidyEngine(tmp_path)
    try:
        engine.client.images.get(BASE).tag(repository, tag)
        first.note(name)
        first.close()
        assert engine.find(name) is not None
    finally:
        second.close()
    assert engine.find(name) is None
    assert engine.find(BASE) is not None
