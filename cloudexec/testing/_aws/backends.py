"""Finds moto's back ends, which hold the state of its one account."""

from __future__ import annotations

from typing import Any

__all__ = ["ACCOUNT", "batch_backend", "ecs_backend", "logs_backend"]

ACCOUNT = "123456789012"
"""moto's account."""


def batch_backend(region: str) -> Any:
    """Return moto's Batch back end of a region."""
    from moto.batch.models import batch_backends

    return batch_backends[ACCOUNT][region]


def ecs_backend(region: str) -> Any:
    """Return moto's ECS back end of a region."""
    from moto.ecs.models import ecs_backends

    return ecs_backends[ACCOUNT][region]


def logs_backend(region: str) -> Any:
    """Return moto's CloudWatch Logs back end of a region."""
    from moto.logs.models import logs_backends

    return logs_backends[ACCOUNT][region]
