"""The launcher for AWS Batch: ``settings`` has its settings, and ``platform`` calls AWS."""

from cloudexec._launchers.batch.settings import Batch

__all__ = ["Batch"]
