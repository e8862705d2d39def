"""Packages into the image repository of an account."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cloudexec._aws.images import EcrRepository, in_thread
from cloudexec._environment.assembly import Pushed, push_packages
from cloudexec._environment.base import Report
from cloudexec._environment.packages import Packages
from cloudexec._environment.registry import Repository
from cloudexec._errors import ConfigError

if TYPE_CHECKING:
    from cloudexec._aws.clients import AwsClients
    from cloudexec._aws.profile import Profile

__all__ = ["push_to_account"]


async def push_to_account(
    packages: Packages,
    profile: Profile,
    clients: AwsClients,
    *,
    python: str,
    platform: str,
    report: Report,
    refresh: bool = False,
) -> Pushed:
    """Push an image with packages to the profile's repository, unless it is there.

    Args:
        packages: What workers are to have.
        profile: Names the repository.
        clients: Calls to AWS, in the profile's region.
        python: Minor version of the workers' Python.
        platform: Of the workers: ``"linux/amd64"`` or ``"linux/arm64"``.
        report: Told what is going on, in another thread.
        refresh: Whether to look for a newer base.

    Returns:
        The image.

    Raises:
        AwsError: If AWS refuses.
        ConfigError: If the profile has no repository, or a package cannot be had.
        LaunchError: If the registry refuses, or cannot be reached.
    """
    if not profile.repository:
        raise ConfigError(
            f"the profile {profile.name!r} names no image repository, where "
            f"{packages.describe()} could go: `cloudexec up` makes one"
        )
    address, credentials = await EcrRepository(clients, profile.repository).login()
    host, _, name = address.partition("/")
    with Repository(host, name, credentials) as repository:
        # Where this is cancelled, the repository is closed, which ends the thread.
        return await in_thread(
            lambda: push_packages(
                packages,
                repository,
                python=python,
                platform=platform,
                report=report,
                refresh=refresh,
            )
        )
