"""``cloudexec image``: build, push and choose the image that workers in the cloud run."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cloudexec.cli._aws_options import ends_well, profile_option
from cloudexec.cli._errors import CommandError

if TYPE_CHECKING:
    from cloudexec._aws.image_contents import ImageSpec

_LOCAL_PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
_EPILOG = """\b
Examples:
  cloudexec image build --requirements requirements.txt
  cloudexec image push --packages here
  cloudexec image push --packages uv.lock --platform linux/arm64
  cloudexec image push --requirements requirements.txt --apt libgomp1
  cloudexec image build --base localhost/our-python:3.11 --wheelhouse wheels/
  cloudexec image use 123456789012.dkr.ecr.us-east-1.amazonaws.com/ours:latest
"""
_IMAGE_LARGEST = 255
"""Most characters of an image's name. AWS Batch API Reference, "ContainerProperties"."""


_platform_option = click.option(
    "--platform",
    type=click.Choice(["linux/amd64", "linux/arm64"]),
    default="linux/amd64",
    show_default=True,
    help="Platform of the workers, which may differ from this machine.",
)
_python_option = click.option(
    "--python",
    default=_LOCAL_PYTHON,
    show_default="the one that runs this command",
    metavar="X.Y",
    help="Minor version of Python; the scripts that use the image must have the same.",
)


def _image_options(function: Callable[..., Any]) -> Callable[..., Any]:
    for option in (
        click.option(
            "--apt",
            "packages",
            multiple=True,
            metavar="PKG",
            help="Debian package to add. Can be repeated.",
        ),
        click.option(
            "--wheelhouse",
            type=click.Path(exists=True, file_okay=False, path_type=Path),
            metavar="DIR",
            help="Install from the wheels in DIR only, without any package index.",
        ),
        click.option(
            "--builder",
            default="",
            metavar="IMAGE",
            help="Base image for this machine's platform, if --base is for another platform.",
        ),
        click.option(
            "--base",
            default="",
            metavar="IMAGE",
            help="Image to start from, with that Python and pip; by default python:X.Y-slim.",
        ),
        _platform_option,
        _python_option,
        click.option(
            "-r",
            "--requirements",
            type=click.Path(exists=True, dir_okay=False, path_type=Path),
            metavar="FILE",
            help="Requirements file of your functions, or a lock file in that format.",
        ),
    ):
        function = option(function)
    return function


def _building_options(function: Callable[..., Any]) -> Callable[..., Any]:
    for option in (
        click.option("-v", "--verbose", "is_verbose", is_flag=True, help="Show the build's log."),
        click.option("--refresh", is_flag=True, help="Look for a newer base image first."),
    ):
        function = option(function)
    return function


@click.group("image", short_help="Build and push the image that workers run.", epilog=_EPILOG)
def image_command() -> None:
    """Build and push the image that workers in the cloud run.

    The image has cloudexec, in the version that runs here, and the packages that your functions
    require. Its tag is a hash of everything that goes into it, so an image that exists is neither
    built nor pushed again. `image push` needs no container engine, except with --apt and
    --builder. For `image build`, Docker or Podman must run, at DOCKER_HOST or at its usual address.

    The build uses the variables PIP_INDEX_URL, PIP_EXTRA_INDEX_URL, PIP_TRUSTED_HOST, PIP_CERT and
    those of proxies as they are set here. The image does not contain them.
    """


@image_command.command("build", short_help="Build the image on this machine.", epilog=_EPILOG)
@_image_options
@_building_options
@ends_well
def build_command(refresh: bool, is_verbose: bool, **options: Any) -> None:
    """Build the image on this machine and print its name."""
    from cloudexec._aws.images import Engine, build, plan

    spec = _spec(**options)
    with Engine() as engine:
        with _status(f"preparing the base image {spec.base_image}"):
            planned = plan(spec, engine=engine, refresh=refresh)
        with _Display(planned.tag, is_verbose) as display:
            image = build(planned, engine=engine, report=display.build_line)
    verb = "built" if image.was_built else "already built"
    click.echo(f"{verb}, {image.size_bytes / 1e6:,.0f} MB unpacked", err=True)
    click.echo(image.name)


@image_command.command(
    "push", short_help="Build the image if need be, and push it.", epilog=_EPILOG
)
@click.option(
    "--packages",
    "source",
    metavar="here|none|FILE",
    help="Make the image without a container engine: with the packages that are installed here, "
    "only the worker's own, or those of a requirements file, pyproject.toml or uv.lock.",
)
@click.option(
    "--exclude", multiple=True, metavar="NAME", help="Package to leave out. Can be repeated."
)
@click.option(
    "--extra",
    multiple=True,
    metavar="REQUIREMENT",
    help="Package to add, or to install in another version. Can be repeated.",
)
@_image_options
@_building_options
@profile_option("Profile that names the repository, and then uses the image.", default="default")
@ends_well
def push_command(
    source: str | None,
    exclude: tuple[str, ...],
    extra: tuple[str, ...],
    refresh: bool,
    is_verbose: bool,
    profile: str,
    **options: Any,
) -> None:
    """Build the image if need be, push it to the profile's repository, and print its name.

    From then on, executors with this profile and this Python version use it. With --packages, or
    if no container engine answers, the image is made of layers that are packed and sent here.
    """
    import asyncio

    from cloudexec._aws.clients import AwsClients
    from cloudexec._aws.images import Engine, Planned, PushedImage, plan, push_to_profile
    from cloudexec._aws.profile import Profile
    from cloudexec.cli._image_packages import engine_or_none, push_layers

    spec = _spec(**options)
    noted = Profile.load(profile)
    by_layers = source is not None or bool(exclude or extra)
    engine = None if by_layers else engine_or_none(spec)
    if engine is None:
        push_layers(spec, source, exclude, extra, noted, refresh=refresh)
        return

    async def push(planned: Planned, engine: Engine) -> PushedImage:
        async with AwsClients(noted.region) as clients:
            with _Display(planned.tag, is_verbose) as display:
                return await push_to_profile(
                    planned,
                    noted,
                    clients,
                    engine=engine,
                    report=display.build_line,
                    report_push=display.push_event,
                )

    with engine:
        with _status(f"preparing the base image {spec.base_image}"):
            planned = plan(spec, engine=engine, refresh=refresh)
        pushed = asyncio.run(push(planned, engine))
    verb = "pushed" if pushed.was_pushed else "already pushed"
    click.echo(f"{verb} as {pushed.tag}; the profile {profile} uses it from now on", err=True)
    click.echo(pushed.uri)


@image_command.command("use", short_help="Use an image that was pushed elsewhere.")
@click.argument("image", metavar="IMAGE")
@_python_option
@_platform_option
@profile_option("Profile that then uses the image.", default="default")
@ends_well
def use_command(image: str, python: str, platform: str, profile: str) -> None:
    """Save in the profile an image that another person has built and pushed, and print its name.

    From then on, executors with this profile and this Python version use it. It must be made like
    the images of `cloudexec image build`. In Amazon ECR, a tag is replaced by its digest.
    """
    import asyncio

    from cloudexec._aws.clients import AwsClients
    from cloudexec._aws.definitions import pin_image
    from cloudexec._aws.profile import Profile

    spec = _spec(python=python, platform=platform)
    noted = Profile.load(profile)
    if not 1 <= len(image) <= _IMAGE_LARGEST or any(letter.isspace() for letter in image):
        raise CommandError(
            f"an image's name has 1 to {_IMAGE_LARGEST} characters without blanks, not {image!r}"
        )

    async def pin() -> str:
        async with AwsClients(noted.region) as clients:
            return await pin_image(clients, image)

    pinned = asyncio.run(pin())
    noted.with_image(spec.python, spec.platform, pinned).save()
    which = f"Python {spec.python} on {spec.platform}"
    click.echo(f"the profile {profile} uses it from now on for {which}", err=True)
    click.echo(pinned)


@image_command.command(
    "show", short_help="Show which image would be built, and which is in use.", epilog=_EPILOG
)
@_image_options
@profile_option("Profile whose images to show.", default="default")
@ends_well
def show_command(profile: str, **options: Any) -> None:
    """Show which image would be built, whether it exists here, and which one the profile uses."""
    from cloudexec._aws.image_contents import worker_pins
    from cloudexec._aws.images import Engine, plan
    from cloudexec._aws.profile import Profile
    from cloudexec._errors import CloudexecError

    spec = _spec(**options)
    click.echo(f"base      {spec.base_image} ({spec.platform})")
    click.echo(f"worker    {', '.join(worker_pins())}")
    try:
        with Engine() as engine:
            planned = plan(spec, engine=engine, pull=False)
            found = engine.find(planned.name)
        click.echo(f"tag       {planned.tag}")
        click.echo(f"here      {'yes' if found else 'no'}")
    except CloudexecError as exc:
        click.echo(f"tag       not known: {exc}")
    if profile not in Profile.names():
        click.echo(f"profile   there is no profile {profile}; `cloudexec up` creates one")
        return
    images = Profile.load(profile).images
    click.echo(f"profile   {profile}{'' if images else ': no image yet'}")
    for which, uri in sorted(images.items()):
        click.echo(f"          {which}  {uri}")


def _spec(**options: Any) -> ImageSpec:
    from cloudexec._aws.image_contents import ImageSpec

    return ImageSpec(**options)


def _status(text: str) -> AbstractContextManager[Any]:
    from rich.console import Console

    console = Console(stderr=True)
    return console.status(text) if console.is_terminal else nullcontext()


class _Display:
    """Shows on standard error how building and pushing proceed, with progress bars on a terminal.

    Args:
        tag: The image's tag.
        is_verbose: Whether to show the whole log of the build.
    """

    def __init__(self, tag: str, is_verbose: bool = False) -> None:
        from rich.console import Console

        self._tag = tag
        self._is_verbose = is_verbose
        self._console = Console(stderr=True)
        self._status: Any = None
        self._progress: Any = None
        self._layers: dict[str, Any] = {}
        self._said: set[str] = set()

    def __enter__(self) -> _Display:
        return self

    def __exit__(self, *exc_info: object) -> None:
        for each in (self._status, self._progress):
            if each is not None:
                each.stop()

    def build_line(self, line: str) -> None:
        """Show a line of the build's log."""
        from rich.markup import escape

        if self._is_verbose:
            click.echo(line, err=True)
        elif not self._console.is_terminal:
            self._say("building")
        else:
            if self._status is None:
                self._status = self._console.status("")
                self._status.start()
            self._status.update(f"building {self._tag} [dim]{escape(line[:60])}[/dim]")

    def push_event(self, event: Mapping[str, Any]) -> None:
        """Show the progress of one layer."""
        if not self._console.is_terminal:
            self._say("pushing")
            return
        if self._progress is None:
            self._start_pushing()
        layer = str(event.get("id") or "")
        if not layer:
            return
        if layer not in self._layers:
            self._layers[layer] = self._progress.add_task(layer[:12], total=None)
        task = self._layers[layer]
        detail = event.get("progressDetail") or {}
        if detail.get("total"):
            self._progress.update(task, completed=detail.get("current"), total=detail["total"])
        elif event.get("status") in ("Pushed", "Layer already exists", "Push complete"):
            # Docker reports no sizes for layers that the repository has already.
            self._progress.update(task, completed=1, total=1)

    def _start_pushing(self) -> None:
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

        if self._status is not None:
            self._status.stop()
            self._status = None
        self._progress = Progress(
            TextColumn("pushing {task.description}"),
            BarColumn(),
            DownloadColumn(),
            console=self._console,
            transient=True,
        )
        self._progress.start()

    def _say(self, what: str) -> None:
        if what not in self._said:
            self._said.add(what)
            click.echo(f"{what} {self._tag}", err=True)
