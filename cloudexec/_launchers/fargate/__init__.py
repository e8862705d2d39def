"""The launcher for AWS Fargate without AWS Batch: ``settings`` says what, ``platform`` does it."""

from cloudexec._launchers.fargate.settings import Fargate

__all__ = ["Fargate"]
