"""The launcher for AWS Fargate without AWS Batch: its ``settings``, and its ``platform``."""

from cloudexec._launchers.fargate.settings import Fargate

__all__ = ["Fargate"]
