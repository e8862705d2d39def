"""Builds and pushes images with this machine's container engine, Docker or Podman."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from cloudexec._aws.image_contents import PLATFORMS, Contents
from cloudexec._errors import ConfigError, LaunchError

__all__ = ["Engine", "PushReport", "Report", "ignore_line", "ignore_push"]

_PIP_VARIABLES = ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_TRUSTED_HOST")
_CERTIFICATES = ("PIP_CERT", "REQUESTS_CA_BUNDLE", "SSL_CERT_FILE")
_PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy")
_LOG_LINES = 25
_STAGE = "cloudexec.stage=builder"
"""Label of the unnamed images that a build leaves. See the Dockerfile."""
_ENGINE_TIMEOUT = 1800
"""Seconds to wait for data from the engine. Writing or sending a large layer takes minutes."""

Report = Callable[[str], None]
"""Called with one line of a log at a time, in any thread."""


PushReport = Callable[[Mapping[str, Any]], None]
"""Called with each event of a push as the Docker API sends it, in any thread."""


def ignore_line(line: str) -> None:
    pass


def ignore_push(event: Mapping[str, Any]) -> None:
    pass


class Engine:
    """Docker or Podman on this machine, through the Docker API.

    Args:
        client: A client of docker-py; ``None``: connect to ``DOCKER_HOST``, or where engines
            usually listen.

    Raises:
        ConfigError: If docker-py is not installed, or no engine answers.
    """

    def __init__(self, client: Any = None) -> None:
        self._client = _connect() if client is None else client

    @property
    def client(self) -> Any:
        """The client of docker-py, for uses other than images."""
        return self._client

    def close(self) -> None:
        """Close the connection."""
        self._client.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def platform(self) -> str:
        """Return the platform that the engine itself runs on."""
        with self._translated("say what it is", deque()):
            architecture = str(self._client.version().get("Arch", "amd64"))
        names = {"x86_64": "amd64", "aarch64": "arm64"}
        return f"linux/{names.get(architecture, architecture)}"

    def base_id(self, name: str, platform: str, *, pull: bool = True) -> str:
        """Return an id that distinguishes this base image from others of the same name.

        Args:
            name: Name of the image.
            platform: The platform that is needed.
            pull: Whether to pull the image if the engine does not have it.

        Returns:
            The image's id, or an empty string if the engine does not have it for the platform and
            did not pull it.

        Raises:
            LaunchError: If the image cannot be pulled.
        """
        found = self.find(name)
        if (found is None or _platform_of(found) != platform) and pull:
            self.pull(name, platform)
            found = self.find(name)
        if found is None or (_platform_of(found) != platform and not pull):
            return ""
        return str(found["Id"])

    def build(
        self,
        name: str,
        contents: Contents,
        *,
        labels: Mapping[str, str],
        report: Report = ignore_line,
    ) -> str:
        """Build an image.

        Args:
            name: Name of the image, with its tag.
            contents: The build context.
            labels: Labels of the image.
            report: Called with each line of the build's log.

        Returns:
            The image's id.

        Raises:
            LaunchError: If the build fails; ``reason`` has the last lines of its log.
        """
        spec = contents.spec
        own = self.platform()
        arguments = {
            "BASE": spec.base_image,
            "BUILDER": spec.builder or spec.base_image,
            "BUILDER_PLATFORM": own if own in PLATFORMS else spec.platform,
            "PLATFORM": spec.platform,
            "PYTHON": spec.python,
            "PACKAGES": " ".join(sorted(spec.packages)),
            **{key: os.environ[key] for key in (*_PIP_VARIABLES, *_PROXIES) if key in os.environ},
        }
        error = ""
        tail: deque[str] = deque(maxlen=_LOG_LINES)
        with contents.directory() as directory, self._translated("build the image", tail):
            (directory / "about.json").write_text(
                json.dumps(dict(labels), indent=2, sort_keys=True)
            )
            # Behind a proxy that inspects TLS, pip needs the proxy's certificate inside the build,
            # too. It is not part of the contents, as it does not change the image.
            if certificates := _certificates():
                shutil.copyfile(certificates, directory / "requirements" / "certificates.pem")
            for event in self._client.api.build(
                path=str(directory),
                tag=name,
                buildargs=arguments,
                labels=dict(labels),
                platform=spec.platform,
                target="worker-with-packages" if spec.packages else "worker",
                rm=True,
                forcerm=True,
                decode=True,
            ):
                for line in str(event.get("stream", "")).splitlines():
                    if line.strip():
                        tail.append(line.rstrip())
                        report(line.rstrip())
                error = str(event.get("error", "")) or error
            if error:
                raise _failure("the image could not be built", error, tail)
            self._remove_old_stages()
        found = self.find(name)
        if found is None:
            raise LaunchError(
                f"the engine built no image {name}: {_last(tail)}", reason="\n".join(tail)
            )
        return str(found["Id"])

    def _remove_old_stages(self) -> None:
        """Remove unnamed images of earlier builds. The newest stays, to speed up the next build."""
        import docker.errors

        stages = self._client.api.images(filters={"dangling": True, "label": _STAGE})
        for each in sorted(stages, key=lambda each: int(each["Created"]))[:-1]:
            with contextlib.suppress(docker.errors.APIError):  # another build may use it
                self._client.api.remove_image(each["Id"])

    def push(
        self,
        image: str,
        repository: str,
        tag: str,
        credentials: Mapping[str, str] | None,
        report: PushReport = ignore_push,
    ) -> str:
        """Push an image.

        Args:
            image: Its name or id on this machine.
            repository: Repository to push to, without a tag.
            tag: Tag of the image in the repository.
            credentials: User name and password, as docker-py takes them.
            report: Called with each event of the push.

        Returns:
            The digest, or an empty string where the engine does not say.

        Raises:
            LaunchError: If the push fails.
        """
        digest = error = ""
        tail: deque[str] = deque(maxlen=_LOG_LINES)
        with self._translated(f"push to {repository}", tail):
            if not self._client.api.tag(image, repository, tag, force=True):
                raise LaunchError(f"the engine refused to tag {image} as {repository}:{tag}")
            for event in self._client.api.push(
                repository, tag=tag, auth_config=credentials, stream=True, decode=True
            ):
                if status := event.get("status"):
                    tail.append(str(status))
                error = str(event.get("error", "")) or error
                digest = (event.get("aux") or {}).get("Digest", digest)
                report(event)
            if error:
                raise _failure(f"the image could not be pushed to {repository}", error, tail)
        return str(digest)

    def find(self, name: str) -> dict[str, Any] | None:
        """Return the engine's description of an image; ``None`` if it has none of this name.

        Raises:
            LaunchError: If the engine does not answer as expected.
        """
        import docker.errors

        with self._translated(f"look for the image {name}", deque()):
            try:
                found: dict[str, Any] = self._client.api.inspect_image(name)
            except docker.errors.NotFound:
                return None
        return found

    def pull(self, name: str, platform: str) -> None:
        """Pull an image from its registry, even if the engine has an older one.

        Raises:
            LaunchError: If that fails.
        """
        error = ""
        tail: deque[str] = deque(maxlen=_LOG_LINES)
        with self._translated(f"pull the base image {name}", tail):
            for event in self._client.api.pull(name, platform=platform, stream=True, decode=True):
                error = str(event.get("error", "")) or error
            if error:
                raise _failure(
                    f"the base image {name} could not be pulled for {platform} (choose another "
                    f"with --base; public.ecr.aws/docker/library/python has the official images "
                    f"too)",
                    error,
                    tail,
                )

    @contextlib.contextmanager
    def _translated(self, what: str, tail: deque[str]) -> Iterator[None]:
        import docker.errors
        import requests.exceptions

        try:
            yield
        except docker.errors.DockerException as exc:
            raise LaunchError(
                f"the container engine could not {what}: {getattr(exc, 'explanation', '') or exc}",
                reason="\n".join(tail),
            ) from exc
        except (requests.exceptions.RequestException, OSError) as exc:
            raise LaunchError(
                f"the connection to the container engine broke while it was to {what}: {exc}",
                reason="\n".join(tail),
            ) from exc


def _certificates() -> Path | None:
    for name in _CERTIFICATES:
        path = Path(os.environ.get(name) or "/nowhere")
        if path.is_file():
            return path
    return None


def _connect() -> Any:
    try:
        import docker
        import docker.errors
    except ImportError as exc:
        raise ConfigError(
            "images are built with the package docker: pip install 'cloudexec[image]'"
        ) from exc
    given = os.environ.get("DOCKER_HOST", "")
    tried = [given] if given else [f"unix://{path}" for path in _usual_sockets()]
    reason = ""
    for address in tried:
        client = None
        try:
            # If docker-py fails to connect to a socket, it leaves the socket open.
            _try_socket(address)
            # from_env also reads DOCKER_TLS_VERIFY and DOCKER_CERT_PATH.
            client = docker.from_env(
                environment={**os.environ, "DOCKER_HOST": address}, timeout=_ENGINE_TIMEOUT
            )
            client.ping()
            return client
        except (docker.errors.DockerException, OSError) as exc:
            if given or not isinstance(exc, FileNotFoundError):
                reason = f" ({exc})"
            if client is not None:
                client.close()
    raise ConfigError(
        f"no container engine answers at {', '.join(tried)}{reason}; start Docker, or Podman with "
        f"`podman system service --time=0 unix:///tmp/podman.sock` and "
        f"DOCKER_HOST=unix:///tmp/podman.sock"
    )


def _try_socket(address: str) -> None:
    path = address.removeprefix("unix://")
    if path != address:
        with socket.socket(socket.AF_UNIX) as probe:
            probe.connect(path)


def _usual_sockets() -> list[str]:
    home, runtime = Path.home(), os.environ.get("XDG_RUNTIME_DIR", "")
    personal = [f"{runtime}/docker.sock", f"{runtime}/podman/podman.sock"] if runtime else []
    return [
        "/var/run/docker.sock",
        *personal,
        str(home / ".docker/run/docker.sock"),
        str(home / ".colima/default/docker.sock"),
        "/run/podman/podman.sock",
    ]


def _platform_of(found: Mapping[str, Any]) -> str:
    return f"{found.get('Os', 'linux')}/{found.get('Architecture', '')}"


def _failure(what: str, error: str, tail: deque[str]) -> LaunchError:
    error = error.strip()
    # If cloudexec's own build step failed, its reason says more than the engine's sentence.
    ours = [line.removeprefix("cloudexec: ") for line in tail if line.startswith("cloudexec: ")]
    shown = [f"  {line}" for line in tail if not line.startswith(("-->", "["))]
    message = f"{what}: {ours[-1] if ours else error}"
    if shown:
        message += "; the last lines of the engine's log:\n" + "\n".join(shown)
    tail.append(error)
    return LaunchError(message, reason="\n".join(tail))


def _last(tail: deque[str]) -> str:
    return tail[-1] if tail else "it said nothing"
