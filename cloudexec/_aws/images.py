"""The worker's image: built once and pushed once per content.

The content is collected first, as plain data, and its hash is part of the image's name. If an image
of that name exists, it is neither built nor pushed again, whoever built it.
"""

from __future__ import annotations

import asyncio
import base64
import re
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from cloudexec._aws.ecr import EcrImage, is_repository_name
from cloudexec._aws.image_contents import Contents, ImageSpec, collect
from cloudexec._aws.image_engine import Engine, PushReport, Report, ignore_line, ignore_push
from cloudexec._errors import AwsError, ConfigError, LaunchError

if TYPE_CHECKING:
    from cloudexec._aws.clients import AwsClients
    from cloudexec._aws.profile import Profile

__all__ = [
    "LABELS",
    "EcrRepository",
    "Engine",
    "ImageSpec",
    "LocalImage",
    "Planned",
    "PushedImage",
    "Repository",
    "build",
    "in_thread",
    "plan",
    "push",
    "push_to_profile",
]

T = TypeVar("T")

LOCAL_NAME = "localhost/cloudexec-worker"
"""Repository name of images that were built, but not pushed."""

LABELS = ("cloudexec.version", "cloudexec.python", "cloudexec.platform", "cloudexec.content")
"""Labels of each image: versions, as text; the platform; the hash at the end of the tag."""

_DIGEST_ATTEMPTS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """The description of an image, which may not be built yet."""

    contents: Contents
    base_id: str
    """Id of the base image at present. A tag such as ``3.11-slim`` may get another image later."""

    @property
    def content_hash(self) -> str:
        """16 hex digits that differ if the image differs."""
        return self.contents.content_hash(self.base_id)

    @property
    def tag(self) -> str:
        """The image's tag, readable for people and unique for its content."""
        spec = self.contents.spec
        machine = spec.platform.rpartition("/")[2]
        version = re.sub(r"[^A-Za-z0-9_.-]", "-", self.contents.version)
        return f"{version}-py{spec.python}-{machine}-{self.content_hash}"

    @property
    def name(self) -> str:
        """The image's name on this machine, with its tag."""
        return f"{LOCAL_NAME}:{self.tag}"


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalImage:
    """An image of the local engine."""

    name: str
    """Name with the tag."""
    image_id: str
    size_bytes: int
    was_built: bool
    """Whether this call has built it; otherwise it existed before."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PushedImage:
    """An image in a repository."""

    uri: str
    """URI with the digest: ``repository@sha256:...``."""
    tag: str
    was_pushed: bool
    """Whether this call has pushed it; otherwise it existed before."""


class Repository(Protocol):
    """A repository to which images are pushed."""

    async def digest(self, tag: str) -> str | None:
        """Return the digest of the image with this tag, or ``None`` if there is none."""

    async def login(self) -> tuple[str, Mapping[str, str] | None]:
        """Return the repository's name without a tag, and user name and password if needed."""


class EcrRepository:
    """A repository in the account's registry (Amazon ECR).

    Args:
        clients: Calls to AWS.
        uri: ``<account>.dkr.ecr.<region>.amazonaws.com/<name>``.

    Raises:
        ConfigError: If ``uri`` is not of that form.
    """

    def __init__(self, clients: AwsClients, uri: str) -> None:
        self._clients = clients
        found = EcrImage.parse(uri)
        if found is None or found.tag or found.digest:
            raise ConfigError(
                f"{uri!r} is not a repository of Amazon ECR; expected "
                f"<account>.dkr.ecr.<region>.amazonaws.com/<name>"
            )
        if not is_repository_name(found.repository):
            raise ConfigError(
                f"Amazon ECR has no repository {found.repository!r}: names have lower-case "
                f"letters and digits, and single characters . _ - / between them"
            )
        self._name, self._account, self._region = found.repository, found.account, found.region

    async def digest(self, tag: str) -> str | None:
        """Return the digest of the image with this tag, or ``None`` if there is none."""
        try:
            found = await self._clients.call(
                "ecr",
                "describe_images",
                region=self._region,
                registryId=self._account,
                repositoryName=self._name,
                imageIds=[{"imageTag": tag}],
            )
        except AwsError as exc:
            if exc.code == "ImageNotFoundException":
                return None
            if exc.code == "RepositoryNotFoundException":
                raise ConfigError(
                    f"there is no repository {self._name} in {self._region}: `cloudexec up` makes "
                    f"one"
                ) from exc
            raise
        return str(found["imageDetails"][0]["imageDigest"])

    async def login(self) -> tuple[str, Mapping[str, str] | None]:
        """Return the repository's name, and a password that is valid for 12 hours."""
        found = await self._clients.call("ecr", "get_authorization_token", region=self._region)
        data = found["authorizationData"][0]
        user, _, password = base64.b64decode(data["authorizationToken"]).decode().partition(":")
        # In AWS, this is the registry's own host. In the emulation, it is the emulated registry.
        host = str(data["proxyEndpoint"]).partition("://")[2].rstrip("/")
        return f"{host}/{self._name}", {"username": user, "password": password}


def plan(spec: ImageSpec, *, engine: Engine, pull: bool = True, refresh: bool = False) -> Planned:
    """Determine an image's contents and name without building it.

    Args:
        spec: Options of the image.
        engine: Looks up or pulls the base image, whose id is part of the hash.
        pull: Whether the engine may pull the base if it does not have it.
        refresh: Whether the engine looks for a newer base.

    Returns:
        The image's contents and name.

    Raises:
        ConfigError: If the requirements cannot be used in an image.
        LaunchError: If the base cannot be pulled, or is missing and ``pull`` is false.
    """
    contents = collect(spec)
    if refresh:
        engine.pull(spec.base_image, spec.platform)
    base_id = engine.base_id(spec.base_image, spec.platform, pull=pull)
    if not base_id:
        raise LaunchError(
            f"the base image {spec.base_image} is not here for {spec.platform}; "
            f"`cloudexec image build` pulls it"
        )
    return Planned(contents=contents, base_id=base_id)


def build(planned: Planned, *, engine: Engine, report: Report = ignore_line) -> LocalImage:
    """Build an image, unless the engine has one with the same content.

    Args:
        planned: The image.
        engine: Builds it.
        report: Called with each line of the build's log.

    Returns:
        The image.

    Raises:
        LaunchError: If the build fails.
    """
    spec, content_hash = planned.contents.spec, planned.content_hash
    found = engine.find(planned.name)
    was_built = found is None or _labels(found).get("cloudexec.content") != content_hash
    if was_built:
        values = (planned.contents.version, spec.python, spec.platform, content_hash)
        labels = dict(zip(LABELS, values, strict=True))
        engine.build(planned.name, planned.contents, labels=labels, report=report)
        found = engine.find(planned.name)
    if found is None:
        raise LaunchError(f"the engine has no image {planned.name} although it built it")
    return LocalImage(
        name=planned.name,
        image_id=str(found["Id"]),
        size_bytes=int(found.get("Size", 0)),
        was_built=was_built,
    )


def _labels(found: Mapping[str, Any]) -> Mapping[str, str]:
    return (found.get("Config") or {}).get("Labels") or {}


async def push(
    planned: Planned,
    repository: Repository,
    *,
    engine: Engine,
    report: Report = ignore_line,
    report_push: PushReport = ignore_push,
) -> PushedImage:
    """Push an image, unless the repository has one with the same content. Build it if needed.

    Args:
        planned: The image.
        repository: Repository to push to.
        engine: Builds and pushes the image.
        report: Called with each line of a build's log, in another thread.
        report_push: Called with each event of the push, in another thread.

    Returns:
        The image in the repository.

    Raises:
        AwsError: If AWS refuses.
        ConfigError: If there is no such repository.
        LaunchError: If the build or the push fails.
    """
    name, credentials = await repository.login()
    digest = await repository.digest(planned.tag)
    if digest is not None:
        return PushedImage(uri=f"{name}@{digest}", tag=planned.tag, was_pushed=False)
    image = await in_thread(lambda: build(planned, engine=engine, report=report))
    digest = await in_thread(
        lambda: engine.push(image.name, name, planned.tag, credentials, report_push)
    )
    for attempt in range(_DIGEST_ATTEMPTS):
        if digest:
            return PushedImage(uri=f"{name}@{digest}", tag=planned.tag, was_pushed=True)
        # This engine does not report the digest. The registry does, perhaps after some seconds.
        await asyncio.sleep(attempt)
        digest = await repository.digest(planned.tag)
    raise LaunchError(
        f"{name}:{planned.tag} was pushed, but neither the engine nor the registry says under "
        f"which digest; push again"
    )


async def in_thread(work: Callable[[], T]) -> T:
    """Make a call in a thread, and do not wait for the thread if Ctrl-C comes first.

    The process then ends, the engine loses its connection, and stops the work.
    """
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as exc:
            future.set_exception(exc)

    threading.Thread(target=run, name="cloudexec-image", daemon=True).start()
    return await asyncio.wrap_future(future)


async def push_to_profile(
    planned: Planned,
    profile: Profile,
    clients: AwsClients,
    *,
    engine: Engine,
    report: Report = ignore_line,
    report_push: PushReport = ignore_push,
) -> PushedImage:
    """Push an image to the profile's repository, and save its digest in the profile.

    Args:
        planned: The image; it is built if needed.
        profile: Names the repository; it is saved.
        clients: Calls to AWS, in the profile's region.
        engine: Builds and pushes.
        report: As for ``push``.
        report_push: As for ``push``.

    Returns:
        The image in the repository.

    Raises:
        AwsError: If AWS refuses.
        ConfigError: If the profile has no repository, or it is gone.
        LaunchError: If the build or the push fails.
    """
    if not profile.repository:
        raise ConfigError(
            f"the profile {profile.name!r} names no image repository: `cloudexec up` makes one"
        )
    repository = EcrRepository(clients, profile.repository)
    pushed = await push(planned, repository, engine=engine, report=report, report_push=report_push)
    spec = planned.contents.spec
    # The profile gets AWS's name of the repository, and not that of an emulated registry.
    pushed = replace(pushed, uri=f"{profile.repository}@{pushed.uri.rpartition('@')[2]}")
    profile.with_image(spec.python, spec.platform, pushed.uri).save()
    return pushed
