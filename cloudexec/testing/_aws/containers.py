"""The runner that runs every attempt as a container of the local engine."""

from __future__ import annotations

import contextlib
import fnmatch
import os
import socket
import threading
import uuid
from collections.abc import Callable, Mapping
from typing import Any

import tenacity

from cloudexec._errors import ConfigError
from cloudexec.testing._aws.runners import Exit, Running, StartError, StartRequest

__all__ = ["ContainerRunner", "engine_answers", "remove_container"]

LABEL = "cloudexec.fake-aws"
_TIMEOUT = 15 * 24 * 3600
"""Seconds to wait for an answer of the engine: the longest time that a job may run."""
_LOOK = 10.0
"""Seconds between two looks whether a container still runs whose log has not ended."""


def engine_answers() -> bool:
    """Return whether a container engine answers at ``DOCKER_HOST`` or its usual socket."""
    try:
        import docker
    except ImportError:
        return False
    # A plain socket is tried first, because docker-py leaks its socket if no engine listens.
    kind, _, path = os.environ.get("DOCKER_HOST", "unix:///var/run/docker.sock").partition("://")
    if kind == "unix" and not _listens(path):
        return False
    try:
        client = docker.from_env(timeout=30)
    except Exception:
        return False
    try:
        return bool(client.ping())
    except Exception:
        return False
    finally:
        client.close()


def remove_container(container: Any) -> None:
    """Kill and remove a container, even if it ends meanwhile.

    Podman refuses to kill a container that is ending ("container state improper"), and Docker to
    remove one that is being removed. A moment later they do it, or the container is gone.

    Raises:
        docker.errors.APIError: If the engine refuses for ten seconds.
    """
    import docker.errors

    for attempt in tenacity.Retrying(
        retry=tenacity.retry_if_exception_type(docker.errors.APIError),
        wait=tenacity.wait_fixed(0.1),
        stop=tenacity.stop_after_delay(10.0),
        reraise=True,
    ):
        with attempt, contextlib.suppress(docker.errors.NotFound):
            container.remove(force=True)


class ContainerRunner:
    """Runs every attempt in a container with its own address and memory limit.

    It runs only images that the engine has, and those of ``registry``; no other image is pulled.

    Args:
        images: By image name or shell pattern: the name of the image to run instead.
        registry: The registry that stands for ECR, as ``host:port``, or ``None``.
    """

    def __init__(self, *, images: Mapping[str, str], registry: str | None) -> None:
        import docker

        self._images = dict(images)
        self._registry = registry
        self._id = uuid.uuid4().hex[:12]
        self._client: Any = docker.from_env(timeout=_TIMEOUT, max_pool_size=256)
        self._network, self.gateway = self._find_network()

    def start(self, request: StartRequest, output: Callable[[bytes], None]) -> Running:
        """Start one attempt."""
        import docker.errors

        image = self._image(request.image)
        try:
            container = self._create(image, request)
        except docker.errors.ImageNotFound as exc:
            raise StartError(
                "CannotPullContainerError: pull image manifest has been retried 1 time(s): failed "
                f"to resolve ref {request.image}: {request.image}: not found"
            ) from exc
        except docker.errors.APIError as exc:
            raise StartError(f"CannotCreateContainerError: {exc.explanation}") from exc
        try:
            container.start()
        except docker.errors.APIError as exc:
            with contextlib.suppress(Exception):
                remove_container(container)
            raise StartError(
                f"CannotStartContainerError: Error response from daemon: {exc.explanation}", 127
            ) from exc
        return _RunningContainer(container, output)

    def close(self) -> None:
        """Remove remaining containers, and close the connection to the engine."""
        with contextlib.suppress(Exception):
            left = self._client.containers.list(
                all=True, sparse=True, filters={"label": f"{LABEL}={self._id}"}
            )
            for container in left:
                with contextlib.suppress(Exception):
                    remove_container(container)
        self._client.close()

    def _create(self, image: str, request: StartRequest) -> Any:
        import docker.errors

        options: dict[str, Any] = {
            "command": list(request.command) or None,
            "environment": dict(request.environment),
            "name": f"fake-aws-{self._id}-{request.name}",
            "labels": {LABEL: self._id},
            "mem_limit": f"{request.memory_mib}m",
            "network": self._network,
            "user": request.user or None,
        }
        try:
            return self._client.containers.create(image, **options)
        except docker.errors.ImageNotFound:
            if self._registry is None or not image.startswith(f"{self._registry}/"):
                raise
        self._client.images.pull(image)
        return self._client.containers.create(image, **options)

    def _image(self, name: str) -> str:
        for pattern, image in self._images.items():
            if fnmatch.fnmatchcase(name, pattern):
                return image
        host, _, rest = name.partition("/")
        if self._registry is not None and ".dkr.ecr." in host:
            return f"{self._registry}/{rest}"
        return name

    def _find_network(self) -> tuple[str, str]:
        """Return the engine's default network, and this machine's address in it."""
        import docker.errors

        for name in ("bridge", "podman"):
            try:
                found = self._client.networks.get(name)
            except docker.errors.NotFound:
                continue
            for entry in found.attrs["IPAM"]["Config"] or ():
                if "Gateway" in entry and ":" not in entry["Gateway"]:
                    return name, str(entry["Gateway"])
        raise ConfigError("the container engine has no default network with a gateway")


class _RunningContainer:
    def __init__(self, container: Any, output: Callable[[bytes], None]) -> None:
        self._container = container
        self._output = output
        self._killed = False
        self._starved = False
        self._reader = threading.Thread(
            target=self._read, name=f"fake-aws-output-{container.short_id}", daemon=True
        )
        self._reader.start()

    @property
    def pid(self) -> int | None:
        return None

    @property
    def address(self) -> str:
        self._container.reload()
        networks = self._container.attrs["NetworkSettings"]["Networks"].values()
        return next((each["IPAddress"] for each in networks if each.get("IPAddress")), "")

    def wait(self) -> Exit:
        # A container's log ends when the container does. The engine is asked only then: Podman 4
        # looks for the end without any pause while a client waits for it, and takes half a
        # processor for that.
        while self._reader.is_alive():
            self._reader.join(timeout=_LOOK)
            if self._reader.is_alive() and not self._is_running():
                break
        code = int(self._container.wait()["StatusCode"])
        self._reader.join(timeout=10.0)
        with contextlib.suppress(Exception):
            self._container.reload()
            self._starved |= bool(self._container.attrs["State"].get("OOMKilled"))
        with contextlib.suppress(Exception):
            remove_container(self._container)
        # Podman does not report it on version 1 of cgroups: a SIGKILL that this class has not sent
        # came from the kernel.
        starved = self._starved or (code == 137 and not self._killed)
        return Exit(code=code, out_of_memory=starved and code == 137)

    def _is_running(self) -> bool:
        try:
            self._container.reload()
        except Exception:
            return False  # waiting for it will say why
        return str(self._container.status) in ("created", "running", "paused")

    def terminate(self) -> None:
        self._signal("SIGTERM")

    def kill(self) -> None:
        self._killed = True
        self._signal("SIGKILL")

    def out_of_memory(self) -> None:
        self._starved = True
        self._signal("SIGKILL")

    def _signal(self, name: str) -> None:
        # The container may have ended, or been removed, meanwhile.
        with contextlib.suppress(Exception):
            self._container.kill(signal=name)

    def _read(self) -> None:
        with contextlib.suppress(Exception):
            for data in self._container.logs(stream=True, follow=True):
                self._output(data)


def _listens(path: str) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(5.0)
        try:
            probe.connect(path)
        except OSError:
            return False
    return True
