"""Why no worker comes, as a launcher says it: once, while there is something to say it of."""

from __future__ import annotations

from typing import Any

import pytest

from cloudexec import BatchExecutor, LaunchError
from cloudexec.testing import ManualLauncher


class _Forgetful(ManualLauncher):
    """Knows a reason for the first worker that does not come, and nothing of those after it."""

    def explain(self) -> str:
        return "there is no room" if len(self.launches) == 1 else ""


def test_the_reason_is_said_though_the_last_launch_was_too_recent_to_have_one() -> None:
    """A busy launcher learns of each launch late: tasks fail with what it knew before."""
    options: dict[str, Any] = {"launcher": _Forgetful(), "launch_timeout": 0.2}
    with BatchExecutor(1, **options) as executor:
        with pytest.raises(LaunchError, match="there is no room") as caught:
            executor.submit(int).result(50)
    assert caught.value.reason == "there is no room"
