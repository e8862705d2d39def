"""The launcher for AWS Batch: ``settings`` says what workers to run, ``platform`` talks to AWS."""

from cloudexec._launchers.batch.settings import Batch

__all__ = ["Batch"]
