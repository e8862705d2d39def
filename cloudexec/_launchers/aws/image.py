"""Finds the image for workers: the given one, or one that is made with the given packages."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cloudexec._aws.clients import AwsClients
from cloudexec._aws.definitions import pin_image
from cloudexec._aws.profile import Profile
from cloudexec._enrolment import python_version
from cloudexec._environment.packages import Packages
from cloudexec._errors import ConfigError

if TYPE_CHECKING:
    from cloudexec._environment.base import Report

__all__ = ["find_image"]


async def find_image(
    clients: AwsClients,
    profile: Profile,
    *,
    image: str | None,
    packages: Packages | None,
    arch: str,
    report: Report,
    launcher: str = "Batch",
) -> str:
    """Return the image for workers, pinned by its digest; push one if packages are given.

    Args:
        clients: Makes calls to AWS, in the profile's region.
        profile: The profile, which has an image or the name of a repository.
        image: The image, if the user names one.
        packages: Packages of the image to make. ``None`` for the profile's image, or, if it has
            none, the packages that are installed here.
        arch: ``"x86_64"`` or ``"arm64"``.
        report: Called with messages about the progress, in any thread.
        launcher: Name of the launcher whose ``image=`` is named in messages.

    Returns:
        The image's URI.

    Raises:
        AwsError: If AWS refuses.
        ConfigError: If there is no image and no repository, or if a package cannot be found.
        LaunchError: If the registry refuses, or cannot be reached.
    """
    platform = "linux/amd64" if arch == "x86_64" else "linux/arm64"
    python = python_version()
    if image is None and packages is None:
        image = profile.image(python, platform)
    if image:
        return await pin_image(clients, image)
    if not profile.repository:
        named = f"the profile {profile.name!r}" if profile.name else "a launch without a profile"
        raise ConfigError(
            f"there is no worker image for Python {python} on {platform}, and {named} has no "
            f"repository for a new one: give {launcher}(image=...), or a profile that "
            f"`cloudexec up` has written"
        )
    from cloudexec._environment.account import push_to_account

    pushed = await push_to_account(
        packages or Packages(), profile, clients, python=python, platform=platform, report=report
    )
    return pushed.uri
