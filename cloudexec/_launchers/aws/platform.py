"""The base of platforms on AWS: finds image, key and address, and sets prices and tags."""

from __future__ import annotations

import asyncio
import contextlib
import os
from abc import abstractmethod
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any, Protocol, TypeVar

from cloudexec._aws import names
from cloudexec._aws.address import advertised_address
from cloudexec._aws.clients import AwsClients
from cloudexec._aws.key import stack_key
from cloudexec._aws.limits import WorkerSize
from cloudexec._aws.prices import PriceTable
from cloudexec._aws.profile import Profile
from cloudexec._aws.relays import AUTO, lacks_for_relay, relay_price
from cloudexec._aws.requests import DefinitionSpec, tag_value
from cloudexec._environment.packages import Packages
from cloudexec._errors import ConfigError
from cloudexec._launchers.aws.image import find_image
from cloudexec._launchers.base import Cost
from cloudexec._launchers.batch.inquiry import DEFAULT_LOG_GROUP, Inquiry
from cloudexec._launchers.batch.relay import RelayJob, RelayOrder
from cloudexec._launchers.platform import ExecutorInfo, Platform, Site
from cloudexec._log import tell
from cloudexec._pricing import WorkerPrice

__all__ = ["AwsPlatform", "DefinedPlatform", "Settings", "all_of", "connected"]

_CONCURRENT_CALLS = 8
_RELAY_LIFETIME = 24 * 3600.0
"""Seconds after which AWS ends a relay, unless workers may run longer."""
S = TypeVar("S", bound="Settings")


class Settings(Protocol):
    """The settings of a launcher that its platform uses; each launcher describes them."""

    arch: str
    assign_public_ip: bool | None
    compute: str
    ephemeral_gib: int | None
    execution_role: str | None
    image: str | None
    job_role: str | None
    max_runtime: float
    packages: Packages | None
    profile: str | None
    project: str
    region: str | None
    relay: str | bool | None
    sizes: tuple[WorkerSize, ...]
    spot: bool | str
    tags: dict[str, str]

    def size_of(self, size: int) -> WorkerSize:
        """Return the vCPUs, memory and GPUs of a worker of a size."""

    def price_of(
        self, prices: PriceTable, size: WorkerSize, *, spot: bool, public_ip: bool, region: str
    ) -> WorkerPrice:
        """Return the list price of a worker."""


@contextlib.asynccontextmanager
async def connected(
    settings: S,
    executor: ExecutorInfo,
    make: Callable[[S, ExecutorInfo, AwsClients, Profile, PriceTable], AwsPlatform],
    *,
    of: str,
) -> AsyncIterator[Site]:
    """Connect to AWS, check the settings, and find the address that workers dial.

    Args:
        settings: The launcher's settings.
        executor: The executor.
        make: Makes the platform.
        of: Name or ARN of the queue or cluster that the user has given; empty if none. An ARN
            names the region.

    Raises:
        ConfigError: If there is no such profile, or no address to dial, or if the ARN names
            another region.
        AwsError: If AWS refuses.
        LaunchError: If the stack's key cannot be used.
    """
    profile = Profile(name="", region=settings.region or "")
    if settings.profile is not None:
        profile = await asyncio.to_thread(Profile.load, settings.profile)
    there = names.region_of(of)
    async with AwsClients(settings.region or profile.region or there or None) as clients:
        if there not in ("", clients.region):
            kind = of.rpartition(":")[2].partition("/")[0].replace("job-", "")
            raise ConfigError(
                f"the {kind} {of} is in {there}, and not in {clients.region}: give "
                f"region={there!r}, or another {kind}"
            )
        prices = await asyncio.to_thread(PriceTable.load, clients.region)
        platform = make(settings, executor, clients, profile, prices)
        try:
            yield await platform.start()
        finally:
            await platform.close()


class AwsPlatform(Platform):
    """A platform on AWS, for one executor.

    Args:
        settings: The launcher's settings.
        executor: The executor.
        clients: Makes calls to AWS.
        profile: The profile, which names the stack's resources for workers.
        prices: Prices in the clients' region.
    """

    def __init__(
        self,
        settings: Settings,
        executor: ExecutorInfo,
        clients: AwsClients,
        profile: Profile,
        prices: PriceTable,
    ) -> None:
        self.stop_hint = f"`cloudexec stop --executor {executor.id}` tries again"
        self._settings = settings
        self._executor = executor
        self._clients = clients
        self._profile = profile
        self._prices = prices
        self._image = ""
        self._keyed_by_stack = bool(profile.key_secret)
        self._inquiry = Inquiry(self._call, settings.compute)
        self._inquiry.log_group = profile.log_group or DEFAULT_LOG_GROUP
        self._gate = asyncio.Semaphore(_CONCURRENT_CALLS)
        self._relay: RelayJob | None = None

    # The start.

    @abstractmethod
    async def _check(self) -> None:
        """Check the settings, and find or make the image."""

    async def start(self) -> Site:
        """Check the settings, read the key, and find the address that workers dial."""
        settings, executor = self._settings, self._executor
        await self._check()
        key = await stack_key(self._call, self._profile) if self._keyed_by_stack else b""
        relay = self._profile.relay if settings.relay is None else settings.relay
        if isinstance(relay, str) and relay not in ("", AUTO):
            return self._behind_relay(relay, key)
        if relay is True:
            return await self._with_relay(key, "as relay=True says")
        try:
            found = await advertised_address(
                self._profile, advertise=executor.advertise, endpoint=self._clients.endpoint
            )
        except ConfigError as exc:
            if relay != AUTO:
                raise
            return await self._with_relay(key, str(exc).partition(". ")[0])
        self._inquiry.advertised = f"{found.address} ({found.how})"
        return Site(
            platform=self,
            listen=f"{found.listen}:{found.port}",
            advertise=found.address,
            key=key,
            bucket=self._profile.bucket,
            region=self._profile.region,
        )

    async def close(self) -> None:
        """End the relay, if there is one."""
        if self._relay is not None:
            await self._relay.close()

    def overhead(self) -> Cost:
        """Return the cost of the relay, if there is one."""
        return Cost() if self._relay is None else self._relay.cost()

    async def _with_relay(self, key: bytes, why: str) -> Site:
        """Start a relay, and wait for its address.

        Args:
            key: The stack's key.
            why: The reason why a relay is needed, for messages.
        """
        settings, profile = self._settings, self._profile
        self._check_key(key, "True")
        if lacking := lacks_for_relay(profile):
            raise ConfigError(f"{why}; and no relay can be started: {lacking}")
        # The relay must outlive the last worker, which may start long after the first one.
        lifetime = max(settings.max_runtime, _RELAY_LIFETIME)
        order = RelayOrder(
            executor_id=self._executor.id,
            queue=profile.queues[names.RELAY_QUEUE],
            definition=replace(await self._definition_spec(), key_secret=profile.key_secret),
            tags=self._tags(lifetime),
            bucket=profile.bucket,
            patience=self._executor.launch_timeout,
            lifetime=lifetime,
            price=relay_price(self._prices, settings.arch, self._clients.region),
            why=why,
        )
        self._relay = relay = RelayJob(self._clients, order, self._inquiry)
        await relay.start()
        return replace(self._behind_relay(relay.address, key), moving=relay)

    def _behind_relay(self, relay: str, key: bytes) -> Site:
        if not relay.startswith("ssh://"):
            self._check_key(key, repr(relay))
        self._inquiry.relay = relay
        return Site(
            platform=self,
            listen="127.0.0.1:0",
            advertise=self._executor.advertise,
            key=key,
            bucket=self._profile.bucket,
            region=self._profile.region,
            relay=relay,
        )

    @staticmethod
    def _check_key(key: bytes, relay: str) -> None:
        if not key:
            raise ConfigError(
                f"relay={relay} needs the key of a stack, by which the relay recognises workers: "
                f"give profile=, and no definition= without that key; or use "
                f"relay='ssh://user@host'"
            )

    async def _call(self, service: str, operation: str, **parameters: Any) -> Any:
        async with self._gate:
            return await self._clients.call(service, operation, **parameters)

    @property
    def _public_ip(self) -> bool:
        given = self._settings.assign_public_ip
        return self._profile.assign_public_ip if given is None else given

    def price(self, size: int, spot: bool) -> WorkerPrice:
        """Return the list price of a worker."""
        return self._settings.price_of(
            self._prices,
            self._settings.size_of(size),
            spot=spot,
            public_ip=self._public_ip,
            region=self._clients.region,
        )

    async def _definition_spec(self) -> DefinitionSpec:
        settings, profile = self._settings, self._profile
        return DefinitionSpec(
            image=self._image or await self._find_image(),
            compute=settings.compute,
            arch=settings.arch,
            execution_role=settings.execution_role or profile.execution_role,
            job_role=settings.job_role or profile.job_role,
            key_secret=profile.key_secret,
            log_group=profile.log_group,
            region=self._clients.region,
            assign_public_ip=self._public_ip,
            ephemeral_gib=settings.ephemeral_gib,
            stack=profile.stack,
            size=settings.sizes[0],
        )

    async def _find_image(self) -> str:
        """Return the image of the workers, pinned by its digest; push one if packages are given.

        This happens before the first launch, as making an image may take minutes, and as a package
        that cannot be found for the workers' platform must be reported before workers cost money.
        """
        settings = self._settings
        return await find_image(
            self._clients,
            self._profile,
            image=settings.image,
            packages=settings.packages,
            arch=settings.arch,
            report=tell,
            launcher=type(settings).__name__,
        )

    def _tags(self, lifetime: float) -> dict[str, str]:
        settings = self._settings
        longest = self._executor.launch_timeout + lifetime
        expires = datetime.now(UTC) + timedelta(seconds=longest)
        tags = {
            **settings.tags,
            names.TAG_EXECUTOR: self._executor.id,
            names.TAG_USER: tag_value(names.user_name()),
            names.TAG_EXPIRES: expires.strftime("%Y-%m-%dT%H:%M:%SZ"),
        }
        project = settings.project or self._profile.project
        if project:
            tags[names.TAG_PROJECT] = tag_value(project)
        if self._profile.stack:
            tags[names.TAG_STACK] = self._profile.stack
        if run := os.environ.get("CLOUDEXEC_RUN", ""):
            # With this tag, `cloudexec run` stops the workers with the run, and sums their costs.
            tags[names.TAG_RUN] = tag_value(run)
        return tags


class DefinedPlatform(AwsPlatform):
    """A platform on AWS whose workers are all started from one definition; see ``AwsPlatform``."""

    def __init__(
        self,
        settings: Settings,
        executor: ExecutorInfo,
        clients: AwsClients,
        profile: Profile,
        prices: PriceTable,
    ) -> None:
        super().__init__(settings, executor, clients, profile, prices)
        self._definition = ""
        self._defining = asyncio.Lock()

    async def _define(self, gone: str = "") -> str:
        """Return the definition from which workers are started; find or register it first.

        Args:
            gone: A definition that was removed, in place of which another one is registered.
        """
        async with self._defining:
            if self._definition == gone:
                self._definition = await self._ensure(await self._definition_spec())
            return self._definition

    @abstractmethod
    async def _ensure(self, spec: DefinitionSpec) -> str:
        """Find a definition with this content, or register it; return its name or ARN."""


async def all_of(calls: Iterable[Coroutine[Any, Any, None]]) -> None:
    """Make calls at the same time, wait for all of them, and then raise the first error."""
    for result in await asyncio.gather(*calls, return_exceptions=True):
        if isinstance(result, BaseException):
            raise result
