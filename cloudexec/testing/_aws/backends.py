"""Where moto keeps the state of its one account."""

from __future__ import annotations

from typing import Any

__all__ = ["ACCOUNT", "batch_backend", "ecs_backend", "logs_backend"]

ACCOUNT = "123456789012"
"""moto's account."""


def batch_backend(region: str) -> Any:
    """moto's Batch of a Region."""
    from moto.batch.models import batch_backends

    return batch_backends[ACCOUNT][region]


def ecs_backend(region: str) -> Any:
    """moto's ECS of a Region."""
    from moto.ecs.models import ecs_backends

    return ecs_backends[ACCOUNT][region]


def logs_backend(region: str) -> Any:
    """moto's CloudWatch Logs of a Region."""
    from moto.logs.models import logs_backends

    return logs_backends[ACCOUNT][region]
