"""An account that was set up, for tests of ``cloudexec run`` and its like."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from cloudexec._aws.clients import AwsClients
from cloudexec._aws.profile import Profile
from cloudexec._aws.setup import SetupOptions, up
from cloudexec.testing import FakeAWS

PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
IMAGE = f"registry.example/worker@sha256:{'0' * 64}"


async def _set_up(options: SetupOptions) -> Profile:
    async with AwsClients() as clients:
        return await up(clients, options, lambda event: None, interval=0.01)


@contextmanager
def account(
    profiles: Path, patch: pytest.MonkeyPatch, *, ec2: bool = False, **options: Any
) -> Iterator[FakeAWS]:
    """An AWS whose jobs are given the address and the credentials of their role."""
    patch.setenv("CLOUDEXEC_CONFIG_DIR", str(profiles))
    patch.delenv("CLOUDEXEC_PROFILE", raising=False)
    settings: dict[str, Any] = {"calls_per_second": 1000, "stack_seconds": 0.0, "grace": 5.0}
    with FakeAWS(aws_in_jobs=True, **(settings | options)) as aws:
        profile = asyncio.run(_set_up(SetupOptions(ec2=ec2)))
        profile.with_image(PYTHON, "linux/amd64", IMAGE).save()
        yield aws
