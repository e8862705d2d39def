"""Decides what functions are made of: a .zip archive where the packages fit, otherwise an image."""

from __future__ import annotations

from cloudexec._aws.function_code import MOST_DIRECT
from cloudexec._aws.images import in_thread
from cloudexec._aws.profile import Profile
from cloudexec._enrolment import python_version
from cloudexec._environment.archive import RUNTIMES, Archive, find_archive
from cloudexec._environment.packages import Packages
from cloudexec._errors import ConfigError
from cloudexec._log import tell

__all__ = ["bucket_for", "choose_archive"]


async def choose_archive(
    profile: Profile,
    *,
    package: str,
    image: str | None,
    packages: Packages | None,
    arch: str,
    region: str,
) -> Archive | None:
    """Return the archive that functions are made of; ``None``: they are made of an image.

    Args:
        profile: The profile, which may have an image, and a bucket.
        package: ``"auto"``, ``"zip"`` or ``"image"``, as users say it.
        image: The image, if the user names one.
        packages: The packages, if the user names them.
        arch: ``"x86_64"`` or ``"arm64"``.
        region: Where the functions are.

    Raises:
        ConfigError: If an archive is demanded, and the packages do not fit into one.
    """
    platform = "linux/amd64" if arch == "x86_64" else "linux/arm64"
    python = python_version()
    is_demanded = package == "zip"
    if package == "image" or image is not None:
        return None
    if packages is None and not is_demanded and profile.image(python, platform):
        return None
    wanted = packages or Packages()
    try:
        found = await in_thread(
            lambda: find_archive(
                wanted, python=python, platform=platform, report=tell, demanded=is_demanded
            )
        )
        if found.size > MOST_DIRECT and not bucket_for(profile, region):
            raise ConfigError(
                f"{found} is too large to be sent with a request, which takes "
                f"{MOST_DIRECT / 1e6:,.1f} MB, and there is no bucket in {region} that it could "
                f"be sent to: give a profile that `cloudexec up` has written for this region"
            )
    except ConfigError as exc:
        if is_demanded:
            raise ConfigError(
                f"{exc}\nThis is for functions without an image"
                + (f", whose glibc is 2.{RUNTIMES[python]}" if python in RUNTIMES else "")
                + ": package='image' makes an image instead"
            ) from exc
        tell(f"workers on AWS Lambda need an image: {_in_short(exc)}")
        return None
    return found


def _in_short(exc: ConfigError) -> str:
    """Return the message of an error, of packages only their names and not all reasons."""
    first, *rest = str(exc).splitlines()
    named = [line.strip().partition(": ")[0] for line in rest if line.startswith("  ")]
    return " ".join([first, ", ".join(named)]).strip()


def bucket_for(profile: Profile, region: str) -> str:
    """Return the bucket of a profile for functions of a region; empty: there is none.

    It must be in the same region. AWS Lambda API Reference, "FunctionCode", ``S3Bucket``.
    """
    return profile.bucket if profile.region in ("", region) else ""
