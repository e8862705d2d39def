"""An emulated account for tests of what launchers need there; other files have one of their own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from cloudexec.testing import FakeAWS


@pytest.fixture
def aws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeAWS]:
    """An empty account, and no profiles."""
    monkeypatch.setenv("CLOUDEXEC_CONFIG_DIR", str(tmp_path / "profiles"))
    monkeypatch.delenv("CLOUDEXEC_PROFILE", raising=False)
    with FakeAWS(grace=2.0, stack_seconds=0.0, calls_per_second=1000) as fake:
        yield fake
