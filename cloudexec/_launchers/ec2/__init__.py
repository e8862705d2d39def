"""The launcher for EC2 instances of their own: ``settings`` says what, ``platform`` does it."""

from cloudexec._launchers.ec2.settings import EC2

__all__ = ["EC2"]
