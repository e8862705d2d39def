"""The launcher for AWS Lambda: ``settings`` says what, ``platform`` does it."""

from cloudexec._launchers.lambda_.settings import Lambda

__all__ = ["Lambda"]
