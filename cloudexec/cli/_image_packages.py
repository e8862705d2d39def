"""Pushes images of packages without a container engine, for ``cloudexec image push``."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from cloudexec.cli._errors import CommandError

if TYPE_CHECKING:
    from cloudexec._aws.image_contents import ImageSpec
    from cloudexec._aws.images import Engine
    from cloudexec._aws.profile import Profile

__all__ = ["engine_or_none", "push_layers"]


def engine_or_none(spec: ImageSpec) -> Engine | None:
    """Return the container engine; ``None``: none answers, and this image needs none.

    Raises:
        ConfigError: If no engine answers, and this image needs one.
    """
    from cloudexec._aws.images import Engine
    from cloudexec._errors import ConfigError

    try:
        return Engine()
    except ConfigError:
        if spec.packages or spec.builder:
            raise
    click.echo("no container engine answers here, but none is needed", err=True)
    return None


def push_layers(
    spec: ImageSpec,
    source: str | None,
    exclude: Sequence[str],
    extra: Sequence[str],
    profile: Profile,
    *,
    refresh: bool,
) -> None:
    """Make an image of layers, push it, save its name in the profile, and print it.

    Args:
        spec: Base, Python, platform and files.
        source: As for ``Packages``; ``None``: the requirements of ``spec``, or none.
        exclude: As for ``Packages``.
        extra: As for ``Packages``.
        profile: Names the repository, and gets the image.
        refresh: Whether to look for a newer base.

    Raises:
        CommandError: If the options do not fit together.
        CloudexecError: If the image cannot be made or pushed.
    """
    from cloudexec._aws.clients import AwsClients
    from cloudexec._environment.account import push_to_account
    from cloudexec._environment.assembly import Pushed
    from cloudexec._environment.packages import Packages

    if source is not None and spec.requirements is not None:
        raise CommandError("give either --packages or --requirements")
    if spec.packages or spec.builder:
        option = "--apt" if spec.packages else "--builder"
        raise CommandError(
            f"{option} needs a container engine: give it without --packages, --exclude and --extra"
        )
    usual = spec.requirements or ("here" if exclude or extra else "none")
    packages = Packages(
        source=usual if source is None else source,
        exclude=exclude,
        extra=extra,
        base=spec.base,
        wheelhouse=spec.wheelhouse,
    )

    async def push() -> Pushed:
        async with AwsClients(profile.region) as clients:
            return await push_to_account(
                packages,
                profile,
                clients,
                python=spec.python,
                platform=spec.platform,
                report=lambda line: click.echo(line, err=True),
                refresh=refresh,
            )

    pushed = asyncio.run(push())
    profile.with_image(spec.python, spec.platform, pushed.uri).save()
    verb = "pushed" if pushed.was_pushed else "already pushed"
    click.echo(f"{verb} as {pushed.tag}; the profile {profile.name} uses it from now on", err=True)
    click.echo(pushed.uri)
