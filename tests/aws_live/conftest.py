"""Tests against a real AWS account, which run only if ``CLOUDEXEC_LIVE_PROFILE`` names a profile.

    cloudexec up && cloudexec image push
    CLOUDEXEC_LIVE_PROFILE=default pytest tests/aws_live -s

They cost money. Each test prints beforehand how much it costs at most.
"""

from __future__ import annotations

import os

import pytest

PROFILE = os.environ.get("CLOUDEXEC_LIVE_PROFILE", "")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip all these tests if no profile is named."""
    if PROFILE:
        return
    why = pytest.mark.skip(reason="costs money: set CLOUDEXEC_LIVE_PROFILE to a profile")
    for item in items:
        if "aws_live" in item.path.parts:
            item.add_marker(why)


@pytest.fixture
def profile() -> str:
    """The profile to use."""
    return PROFILE


@pytest.fixture(autouse=True)
def price(request: pytest.FixtureRequest) -> None:
    """Print how much a test may cost, from its mark ``costs(usd)``."""
    mark = request.node.get_closest_marker("costs")
    if mark is not None:
        print(f"\n{request.node.name}: up to ${mark.args[0]:.2f}")
