"""Calls AWS through its SDK: creates clients at first use, retries, and translates errors."""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import os
import urllib.parse
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any

import botocore.configprovider
import botocore.exceptions
import botocore.httpsession
import botocore.loaders
import botocore.parsers
import botocore.regions
from aiobotocore.config import AioConfig
from aiobotocore.session import get_session

from cloudexec._aws.refusals import (
    EXPIRED,
    NO_CREDENTIALS,
    THROTTLES,
    remedy_of_credentials,
    remedy_of_refusal,
)
from cloudexec._errors import AwsError, ConfigError

__all__ = ["AwsClients", "Recorder", "is_region", "known_regions"]

Recorder = Callable[[str, str, Mapping[str, Any]], None]
"""Called with the service, the operation as the API names it, and the parameters of each call."""

_SETTINGS: Mapping[str, Mapping[str, Any]] = {
    # botocore still signs URLs with version 2 in some regions. Only version 4 covers headers and
    # encrypted buckets. cloudexec passes its own checksums, so the SDK need not compute any.
    "s3": {
        "signature_version": "s3v4",
        "request_checksum_calculation": "when_required",
        "response_checksum_validation": "when_required",
    }
}
_SECRET = frozenset(
    {
        ("secretsmanager", "GetSecretValue"),
        # Without a stack, the key of a launch is in the environment of its jobs.
        ("batch", "SubmitJob"),
        ("batch", "DescribeJobs"),
        ("ecs", "RunTask"),
        ("ecs", "DescribeTasks"),
        ("ecs", "StopTask"),
        # Its event has the key of a worker.
        ("lambda", "Invoke"),
    }
)
"""Calls whose requests or answers hold a worker's key, which the SDK's debug log would show."""
_SDK_LOGGERS = ("botocore.auth", "botocore.endpoint", "botocore.hooks", "botocore.parsers")
_CONNECT_TIMEOUT = 10.0
_READ_TIMEOUT = 60.0
_MAX_CONNECTIONS = 25
_LARGE_BODY = 2**19
"""Bytes of a body that is sent in pieces."""
_ATTEMPTS = 6
"""Most tries of one call after throttling, connection errors and 5xx. botocore backs off."""
_SERVER = ("InternalFailure", "InternalServerError", "ServiceUnavailable", "ServerException")


_discreet: ContextVar[bool] = ContextVar("_discreet", default=False)


def _may_be_logged(record: logging.LogRecord) -> bool:
    return record.levelno > logging.DEBUG or not _discreet.get()


@contextlib.contextmanager
def _discretion(service: str, name: str) -> Iterator[None]:
    """Keep a call that holds a secret out of the SDK's debug log."""
    if (service, name) not in _SECRET:
        yield
        return
    for logger in _SDK_LOGGERS:
        logging.getLogger(logger).addFilter(_may_be_logged)  # it is only added the first time
    before = _discreet.set(True)
    try:
        yield
    finally:
        _discreet.reset(before)


class AwsClients:
    """Makes calls to AWS in one region, on one event loop. Use it in ``async with``.

    Credentials come from the places where all AWS SDKs look: environment variables, configuration
    files and roles. ``AWS_ENDPOINT_URL`` sets another endpoint for all services, and
    ``AWS_ENDPOINT_URL_BATCH`` and the like set one for a single service.

    Args:
        region: Such as ``"eu-central-1"``; ``None``: the SDK's default.
        recorder: Called before each call.

    Raises:
        ConfigError: If no region is given or configured, or the AWS configuration is unusable.
    """

    def __init__(self, region: str | None = None, *, recorder: Recorder | None = None) -> None:
        self._session = _new_session()
        self._recorder = recorder
        # Unlike the other AWS SDKs, the one for Python does not read AWS_REGION. AWS SDKs and Tools
        # Reference Guide, "AWS Region".
        found = region or os.environ.get("AWS_REGION")
        found = found or self._session.get_config_variable("region")
        if not found:
            raise ConfigError(
                "no AWS region: give one (region=, in the shell --region), set AWS_REGION or "
                "AWS_DEFAULT_REGION, or run `aws configure`"
            )
        if not is_region(found):
            raise ConfigError(
                f"there is no AWS region {found!r}; they are called like us-east-1 or eu-central-1"
            )
        self.region: str = found
        self._clients: dict[tuple[str, str, bool], Any] = {}
        self._stack = contextlib.AsyncExitStack()

    async def __aenter__(self) -> AwsClients:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close every connection."""
        self._clients.clear()
        await self._stack.aclose()

    @contextlib.contextmanager
    def _reviewing(self, client: Any) -> Iterator[None]:
        """Read the credentials again after an error that says that they have expired.

        The next try then has new ones. If AWS cannot be reached in a region that the SDK does not
        know, the error says so, as its name may be misspelt.
        """
        try:
            yield
        except AwsError as exc:
            if exc.expired and client in self._clients.values():
                self.renew()
            if exc.code == "Unreachable" and not self.endpoint_of(_service_of(client)):
                region = client.meta.region_name
                if region not in known_regions():
                    raise AwsError(
                        f"{exc.message}; this AWS SDK knows no region {region!r}",
                        code=exc.code,
                        operation=exc.operation,
                        transient=True,
                    ) from exc
            raise

    def renew(self) -> None:
        """Read the credentials again. The SDK reads environment variables and files only once.

        Clients in use stay open until ``close``. New clients have the new credentials.
        """
        self._session = _new_session()
        self._clients.clear()

    async def credentials_expire_at(self) -> float | None:
        """Return when the credentials in use expire, in Unix time.

        The result is ``None`` if they never expire, or if the time is not known, as for those in
        environment variables or a file.
        """
        with translated("sts", "Credentials"):
            credentials = await self._session.get_credentials()
        # botocore has no public name for the expiry, and no other way to learn it.
        expiry = getattr(credentials, "_expiry_time", None)
        return float(expiry.timestamp()) if expiry is not None else None

    @property
    def endpoint(self) -> str:
        """Endpoint of AWS Batch if it is not AWS itself, or an empty string."""
        return self.endpoint_of("batch")

    def endpoint_of(self, service: str) -> str:
        """Return the configured endpoint of a service, or an empty string for AWS itself.

        It is set by ``AWS_ENDPOINT_URL_BATCH`` and the like, ``AWS_ENDPOINT_URL``, or a
        configuration file. AWS SDKs and Tools Reference Guide, "Service-specific endpoints".
        """
        if self._session.get_config_variable("ignore_configured_endpoint_urls"):
            return ""
        provider = botocore.configprovider.ConfiguredEndpointProvider(
            full_config=self._session.full_config,
            scoped_config=self._session.get_scoped_config(),
            client_name=service,
        )
        return str(provider.provide() or "")

    def authorities(self) -> str:
        """Return the file of trusted certificates; empty for the certificates of the system."""
        named = self._session.get_config_variable("ca_bundle")
        named = named or os.environ.get("REQUESTS_CA_BUNDLE")
        if not named and "SSL_CERT_FILE" not in os.environ:
            named = botocore.httpsession.get_cert_path(True)
        return str(named or "")

    async def client(self, service: str, *, region: str = "", once: bool = False) -> Any:
        """Return an SDK client, created at first use, for uses that ``call`` and ``pages`` lack.

        Args:
            service: As botocore names it.
            region: Another region than the usual one.
            once: Whether each request is tried only once, because it must not happen twice.
        """
        key = (service, region or self.region, once)
        client: Any = self._clients.get(key)
        if client is None:
            config = AioConfig(
                connect_timeout=_CONNECT_TIMEOUT,
                read_timeout=_READ_TIMEOUT,
                max_pool_connections=_MAX_CONNECTIONS,
                retries={"total_max_attempts": 1 if once else _ATTEMPTS, "mode": "standard"},
                user_agent_extra="cloudexec",
                **_SETTINGS.get(service, {}),
            )
            with translated(service, "CreateClient"):
                client = await self._stack.enter_async_context(
                    self._session.create_client(
                        service, region_name=key[1], config=config, verify=self._verify(service)
                    )
                )
            client.meta.events.register("before-send", _as_stream)
            self._clients[key] = client
        return client

    def _verify(self, service: str) -> bool | None:
        """Return whether to verify certificates; ``None``: as is configured.

        Where calls go without TLS, as to an emulated AWS, no certificate comes, and there is no
        need to read those that are trusted: that takes each client 25 ms of processor time.
        """
        is_plain = self.endpoint_of(service).startswith("http://")
        return False if is_plain and not urllib.request.getproxies() else None

    async def call(
        self,
        service: str,
        operation: str,
        /,
        *,
        region: str = "",
        once: bool = False,
        **parameters: Any,
    ) -> Any:
        """Make one call.

        Args:
            service: As botocore names it, such as ``"batch"``.
            operation: As botocore's methods are named, such as ``"submit_job"``.
            region: Another region than the usual one.
            once: Whether the call is tried only once, because it must not happen twice.
            parameters: As the API names them.

        Returns:
            The response's members, without ``ResponseMetadata``.

        Raises:
            AwsError: If AWS refuses, or cannot be reached.
        """
        client = await self.client(service, region=region, once=once)
        name: str = client.meta.method_to_api_mapping[operation]
        with self.observed(service, name, parameters, client):
            response = await getattr(client, operation)(**parameters)
        response.pop("ResponseMetadata", None)
        return response

    @contextlib.contextmanager
    def observed(
        self, service: str, name: str, parameters: Mapping[str, Any], client: Any
    ) -> Iterator[None]:
        """Record a call that is made in this block, and translate its errors; see ``call``.

        Args:
            service: As for ``call``.
            name: Of the operation, as the API names it.
            parameters: As for ``call``.
            client: That makes the call.
        """
        if self._recorder is not None:
            self._recorder(service, name, parameters)
        translating = translated(service, name, region=client.meta.region_name)
        with self._reviewing(client), translating, _discretion(service, name):
            yield

    async def pages(
        self, service: str, operation: str, key: str, /, **parameters: Any
    ) -> AsyncIterator[Any]:
        """Yield the items of a paginated call, page after page.

        Args:
            service: As for ``call``.
            operation: As for ``call``.
            key: Member of the response that lists the items.
            parameters: As for ``call``.

        Raises:
            AwsError: If AWS refuses, or cannot be reached.
        """
        client = await self.client(service)
        name: str = client.meta.method_to_api_mapping[operation]
        if self._recorder is not None:
            self._recorder(service, name, parameters)
        pages = aiter(client.get_paginator(operation).paginate(**parameters))
        while True:
            translating = translated(service, name, region=client.meta.region_name)
            with self._reviewing(client), translating:
                page = await anext(pages, None)
            if page is None:
                return
            for item in page.get(key, ()):
                yield item


def _as_stream(request: Any, **_: Any) -> None:
    """Have a large body sent in pieces: aiohttp warns of one that it is given in one piece."""
    if isinstance(request.body, bytes) and len(request.body) > _LARGE_BODY:
        request.body = io.BytesIO(request.body)


def _service_of(client: Any) -> str:
    return str(client.meta.service_model.service_name)


@functools.lru_cache(maxsize=4)
def _loader(data_path: str | None) -> Any:
    """Return a loader that caches endpoints and service models, which saves 0.3 s per session."""
    return botocore.loaders.create_loader(data_path)


@functools.lru_cache(maxsize=1)
def _resolver() -> Any:
    return botocore.regions.EndpointResolver(_loader(None).load_data("endpoints"))


def is_region(name: str) -> bool:
    """Return whether a region may have this name. AWS adds regions that this SDK does not know."""
    try:
        _resolver().get_partition_for_region(name)
    except botocore.exceptions.UnknownRegionError:
        return False
    return True


@functools.lru_cache(maxsize=1)
def known_regions() -> frozenset[str]:
    """Return the regions of all partitions that this AWS SDK knows."""
    resolver = _resolver()
    return frozenset(
        region
        for partition in resolver.get_available_partitions()
        for service in ("batch", "ec2")
        for region in resolver.get_available_endpoints(service, partition)
    )


def _new_session() -> Any:
    session = get_session()
    try:
        data_path = session.get_config_variable("data_path")
    except botocore.exceptions.BotoCoreError as exc:
        raise ConfigError(
            f"the AWS configuration cannot be used: {exc}; see AWS_PROFILE and ~/.aws/config"
        ) from exc
    session.register_component("data_loader", _loader(data_path))
    return session


@contextlib.contextmanager
def translated(service: str, operation: str, *, region: str = "") -> Iterator[None]:
    """Turn errors of botocore into ``AwsError``.

    Args:
        service: As botocore names it.
        operation: As the API names it.
        region: Region of the call, if it is known.
    """
    what = f"{service}:{operation}"
    try:
        yield
    except botocore.exceptions.ClientError as exc:
        details = exc.response.get("Error", {})
        metadata: Mapping[str, Any] = exc.response.get("ResponseMetadata", {})
        code = str(details.get("Code", "?"))
        status = metadata.get("HTTPStatusCode", 0)
        message = f"{what} failed: {code}: {details.get('Message') or '(AWS gave no message)'}"
        remedy = remedy_of_refusal(
            code, str(details.get("Message", "")), what, region=region, metadata=metadata
        )
        raise AwsError(
            message + (f"; {remedy}" if remedy else ""),
            code=code,
            operation=what,
            transient=code in THROTTLES or code in _SERVER or status >= 500 or status == 429,
            expired=code in EXPIRED,
        ) from exc
    except NO_CREDENTIALS as exc:
        raise AwsError(
            f"{what}: no usable AWS credentials ({exc}); {remedy_of_credentials(exc)}",
            code="NoCredentials",
            operation=what,
            expired=True,
        ) from exc
    except botocore.exceptions.ParamValidationError as exc:
        text = " ".join(str(exc).split())
        raise AwsError(f"{what}: {text}", code="ParamValidation", operation=what) from exc
    except (botocore.exceptions.HTTPClientError, botocore.exceptions.ConnectionError) as exc:
        raise AwsError(
            f"{what}: AWS cannot be reached: {exc}; {_way_to_aws()}",
            code="Unreachable",
            operation=what,
            transient=True,
        ) from exc
    except botocore.parsers.ResponseParserError as exc:
        raise AwsError(
            f"{what}: the answer is not from AWS, but perhaps from a proxy on the way: {exc}",
            code="Unreadable",
            operation=what,
            transient=True,
        ) from exc
    except botocore.exceptions.BotoCoreError as exc:
        raise AwsError(f"{what}: {exc}", code=type(exc).__name__, operation=what) from exc


def _way_to_aws() -> str:
    """Say what to check if AWS cannot be reached."""
    proxies = urllib.request.getproxies()
    over = proxies.get("https", "")
    try:
        is_read = urllib.parse.urlsplit(over if "://" in over else f"http://{over}").port != 0
    except ValueError:
        is_read = False
    if not is_read:
        return (
            "HTTPS_PROXY cannot be read: it must be like http://user:password@host:port, with a "
            "port of 1 to 65535"
        )
    if over.startswith("socks"):
        return (
            "HTTPS_PROXY names a SOCKS proxy, but the AWS SDK takes HTTP proxies only: run an "
            "HTTP proxy that forwards to the SOCKS proxy, and name it in HTTPS_PROXY"
        )
    if not over and "all" in proxies:
        return "the AWS SDK does not use ALL_PROXY: name an HTTP proxy in HTTPS_PROXY"
    return "check the network, proxies and the region"
