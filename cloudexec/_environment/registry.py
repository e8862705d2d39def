"""A registry of images over its HTTP API: blobs and manifests, without a container engine.

References: Open Container Initiative, "Distribution Specification" 1.1; the CNCF Distribution
documentation, "Token Authentication Specification".
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import io
import json
import os
import random
import re
import ssl
import threading
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeVar
from urllib.parse import unquote, urlencode, urljoin, urlsplit

import urllib3

from cloudexec._environment.docker_login import Login, find_login
from cloudexec._errors import CloudexecError, ConfigError, LaunchError

if TYPE_CHECKING:
    from urllib3.response import BaseHTTPResponse

__all__ = ["Manifest", "Reference", "Repository", "parse_reference"]

_T = TypeVar("_T")

MANIFEST_TYPES = (
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
    "application/vnd.docker.distribution.manifest.v2+json",
)
_ATTEMPTS = 5
_PASSING = (429, 500, 502, 503, 504)
_TOO_LARGE = 413
_LOST = (404, _TOO_LARGE, 416, *_PASSING)
"""What says that an upload is to be begun again."""
_CHUNK = 2**20
_PART = 10 * 2**20
"""Bytes of a part, where a registry does not take a layer as a whole. Those of Amazon ECR have 5 to
20 MiB. Amazon ECR API Reference, "UploadLayerPart"."""
_MANIFEST_LARGEST = 4 * 2**20
"""OCI Distribution Specification, "Pushing Manifests"."""
_TIMEOUT = urllib3.Timeout(connect=10.0, read=120.0)
_SENDING = urllib3.Timeout(connect=60.0, read=120.0)
"""The same, while a file is sent: urllib3 takes the first one for each part that it sends."""
_LONGEST_PAUSE = 60.0
"""Seconds that a registry may want one to wait for."""
_RETRIES = urllib3.Retry(
    5, connect=0, read=0, redirect=5, status=0, other=0, respect_retry_after_header=False
)
"""Redirects alone are followed at once."""
_CHALLENGE = re.compile(r'(\w+)="([^"]*)"')
_LOOPBACK = re.compile(r"(localhost|127\.\d+\.\d+\.\d+|\[::1\])(:\d+)?")


@dataclass(frozen=True, slots=True)
class Reference:
    """The name of an image."""

    host: str
    name: str
    tag: str
    """A tag, or a digest."""

    def __str__(self) -> str:
        return f"{self.host}/{self.name}{'@' if ':' in self.tag else ':'}{self.tag}"


def parse_reference(text: str) -> Reference:
    """Read the name of an image as engines do: without a host, it is on Docker Hub.

    Raises:
        ConfigError: If it cannot be the name of an image.
    """
    rest, _, digest = text.partition("@")
    host, slash, name = rest.partition("/")
    if not slash or not ("." in host or ":" in host or host == "localhost"):
        host, name = "docker.io", rest if slash else f"library/{rest}"
    name, _, tag = name.partition(":")
    if (
        not re.fullmatch(r"[a-z0-9]+([._/-]+[a-z0-9]+)*", name)
        or not re.fullmatch(r"[\w.-]{0,128}", tag)
        or not re.fullmatch(r"(sha256:[0-9a-f]{64})?", digest)
    ):
        raise ConfigError(f"{text!r} is not the name of an image")
    return Reference(host, name, digest or tag or "latest")


@dataclass(frozen=True, slots=True)
class Manifest:
    """A manifest or an index, as it is in a repository."""

    digest: str
    media_type: str
    data: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class _Call:
    """What is asked of a registry, however often."""

    method: str
    url: str
    what: str
    """What it is for, for messages."""
    headers: Mapping[str, str]
    body: bytes | IO[bytes] | None = None
    once: bool = False
    """Whether it is not tried again, though the error may pass."""

    @property
    def writes(self) -> bool:
        """Whether more than the right to read is needed."""
        return self.method not in ("GET", "HEAD")


class Repository:
    """One repository of a registry. Its methods may be called in several threads at once.

    Where the registry refuses to be read without a login, and a credential helper that has one
    fails, its methods raise ``ConfigError`` instead of ``LaunchError``.

    Args:
        host: Of the registry; one on the loopback is spoken to without TLS.
        name: Of the repository.
        credentials: User name and password; ``None``: those that Docker's configuration has, or a
            credential helper that it names, once the registry wants a login.
    """

    def __init__(self, host: str, name: str, credentials: Mapping[str, str] | None = None) -> None:
        self.host = host
        self.name = name
        self._server = "registry-1.docker.io" if host == "docker.io" else host
        scheme = "http" if _LOOPBACK.fullmatch(self._server) else "https"
        self._base = f"{scheme}://{self._server}"
        self._login = Login(credentials) if credentials else None
        """``None``: nobody has looked for one yet."""
        self._authorization = self._basic() if credentials else ""
        self._closed = threading.Event()
        self._signing_in = threading.Lock()
        self._in_parts = False
        self._pool = _pool(self._base)

    def __str__(self) -> str:
        return f"{self.host}/{self.name}"

    def __enter__(self) -> Repository:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    @property
    def credentials(self) -> Mapping[str, str] | None:
        """User name and password; ``None``: there are none. A credential helper may be asked."""
        if self._login is None:
            self._login = find_login(self.host)
        return self._login.credentials

    def close(self) -> None:
        """Begin no further request, and send and save nothing more, in other threads as well."""
        self._closed.set()
        self._pool.clear()

    # Reading.

    def manifest(self, reference: str) -> Manifest | None:
        """Return a manifest by tag or digest; ``None``: there is none.

        Raises:
            LaunchError: If the registry refuses, or cannot be reached.
        """
        headers = {"Accept": ", ".join(MANIFEST_TYPES)}
        path = f"/v2/{self.name}/manifests/{reference}"
        what = f"look for {reference}"

        def read() -> tuple[bytes, str] | None:
            with self._request("GET", path, what, headers, passes=(404,)) as answer:
                if answer.status == 404:
                    return None
                return self._manifest_of(answer, what), answer.headers.get("Content-Type", "")

        found = self._whole(what, read)
        if found is None:
            return None
        content, header = found
        data = _json(content, f"{self}: the manifest {reference}")
        digest = f"sha256:{hashlib.sha256(content).hexdigest()}"
        return Manifest(digest, str(data.get("mediaType") or header), data)

    def _manifest_of(self, answer: BaseHTTPResponse, what: str) -> bytes:
        content = b""
        # To the end, which is where urllib3 1.26 sees that an answer was cut short.
        for chunk in answer.stream(_CHUNK):
            content += chunk
            if len(content) > _MANIFEST_LARGEST:
                raise LaunchError(
                    f"the registry {self.host} was to {what} in {self.name}, and its answer is "
                    f"longer than a manifest may be (4 MiB)"
                )
        return content

    def has_blob(self, digest: str) -> bool:
        """Whether a blob is there.

        Raises:
            LaunchError: If the registry refuses, or cannot be reached.
        """
        path = f"/v2/{self.name}/blobs/{digest}"
        with self._request("HEAD", path, "look for a layer", passes=(404,)) as answer:
            return answer.status != 404

    def read_blob(self, digest: str) -> bytes:
        """Return a small blob, such as a configuration.

        Raises:
            LaunchError: If it is not there, or is not what it is called.
        """

        def read() -> bytes:
            with self._request("GET", f"/v2/{self.name}/blobs/{digest}", "read a blob") as answer:
                return answer.read()

        content = self._whole("read a blob", read)
        if digest != f"sha256:{hashlib.sha256(content).hexdigest()}":
            raise LaunchError(f"{self} gave other bytes than {digest}: try again")
        return content

    def save_blob(self, digest: str, path: Path) -> None:
        """Write a blob to a file.

        Raises:
            LaunchError: If it is not there, or is not what it is called.
        """
        what = f"read the layer {digest[:19]}"

        def save() -> str:
            whole = hashlib.sha256()
            with self._request("GET", f"/v2/{self.name}/blobs/{digest}", what) as answer:
                with open(path, "wb") as file:
                    for chunk in answer.stream(_CHUNK):
                        self._check_open(what)
                        whole.update(chunk)
                        file.write(chunk)
            return f"sha256:{whole.hexdigest()}"

        if digest != self._whole(what, save):
            raise LaunchError(f"{self} gave other bytes than {digest}: try again")

    # Writing.

    def push_blob(self, digest: str, content: bytes | Path, mount_from: str = "") -> None:
        """Upload a blob.

        It is sent as a whole, and in parts once the registry has said that this is too large.

        Args:
            digest: Of the content.
            content: Bytes, or the file that has them.
            mount_from: A repository of the same registry that has it, from which the registry may
                take it.

        Raises:
            LaunchError: If the registry refuses, or cannot be reached.
        """
        for attempt in range(1, _ATTEMPTS + 1):
            location, least = self._begin_upload(digest, mount_from)
            if not location:
                return
            in_parts = self._in_parts
            try:
                if in_parts:
                    location = self._push_parts(location, max(least, _PART), content)
                    self._finish_upload(location, digest, b"")
                else:
                    self._finish_upload(location, digest, content)
                return
            except _UploadLostError as exc:
                if exc.is_too_large and not in_parts and attempt < _ATTEMPTS:
                    self._in_parts = True
                    continue
                pause = max(_pause(attempt), exc.pause)
                if attempt == _ATTEMPTS or pause > _LONGEST_PAUSE:
                    raise LaunchError(str(exc)) from exc
                self._closed.wait(pause)

    def _begin_upload(self, digest: str, mount_from: str) -> tuple[str, int]:
        """Return where a blob goes, and the least bytes of a part; nowhere: it is there."""
        query = f"?{urlencode({'mount': digest, 'from': mount_from})}" if mount_from else ""
        path = f"/v2/{self.name}/blobs/uploads/{query}"
        headers = {"Content-Length": "0"}
        with self._request("POST", path, "begin to push a layer", headers) as answer:
            if answer.status == 201:
                return "", 0
            location = answer.headers.get("Location", "")
            least = answer.headers.get("OCI-Chunk-Min-Length", "")
        if not location:
            raise LaunchError(f"{self}: the registry does not say where a layer goes")
        return urljoin(f"{self._base}{path}", location), int(least) if least.isdecimal() else 0

    def _push_parts(self, location: str, part: int, content: bytes | Path) -> str:
        """Send a blob in parts, one after the other; return where its end is to be told."""
        with contextlib.ExitStack() as stack:
            file: IO[bytes] = (
                io.BytesIO(content)
                if isinstance(content, bytes)
                else stack.enter_context(open(content, "rb"))
            )
            sent = 0
            while data := file.read(part):
                headers = {"Content-Range": f"{sent}-{sent + len(data) - 1}"}
                answer = self._send(location, "PATCH", headers, data)
                location = urljoin(location, answer.headers.get("Location", ""))
                sent += len(data)
        return location

    def _finish_upload(self, location: str, digest: str, content: bytes | Path) -> None:
        joint = "&" if urlsplit(location).query else "?"
        url = f"{location}{joint}{urlencode({'digest': digest})}"
        if isinstance(content, bytes):
            self._send(url, "PUT", {}, content)
            return
        with _Sent(content, lambda: self._check_open("push a layer")) as file:
            headers = {"Content-Length": str(content.stat().st_size)}
            self._send(url, "PUT", headers, file)

    def _send(
        self, url: str, method: str, headers: Mapping[str, str], body: bytes | IO[bytes]
    ) -> BaseHTTPResponse:
        headers = {"Content-Type": "application/octet-stream", **headers}
        if isinstance(body, bytes):
            headers["Content-Length"] = str(len(body))
        # What was sent in part is begun again, at a new place.
        with self._request(
            method, url, "push a layer", headers, body=body, once=True, passes=_LOST
        ) as answer:
            if answer.status not in (200, 201, 202, 204):
                refusal = str(self._refusal(answer, "push a layer", writes=True))
                is_too_large = answer.status == _TOO_LARGE
                raise _UploadLostError(refusal, _wanted_pause(answer), is_too_large=is_too_large)
        return answer

    def push_manifest(self, reference: str, content: bytes, media_type: str) -> str:
        """Store a manifest under a tag, and return its digest.

        Raises:
            LaunchError: If the registry refuses, or cannot be reached.
        """
        digest = f"sha256:{hashlib.sha256(content).hexdigest()}"
        headers = {"Content-Type": media_type}
        path = f"/v2/{self.name}/manifests/{reference}"
        with self._request(
            "PUT", path, f"push {reference}", headers, body=content, passes=(400, 409)
        ) as answer:
            refusal = self._refusal(answer, f"push {reference}", writes=True)
        if answer.status >= 400:
            # Where tags must not change, the one that has this very image is refused as well.
            there = self.manifest(reference)
            if there is None or there.digest != digest:
                raise refusal
        return digest

    # Requests.

    @contextlib.contextmanager
    def _request(
        self,
        method: str,
        path: str,
        what: str,
        headers: Mapping[str, str] | None = None,
        *,
        body: bytes | IO[bytes] | None = None,
        once: bool = False,
        passes: tuple[int, ...] = (),
    ) -> Iterator[BaseHTTPResponse]:
        """Make a request and yield the answer, with its body not read yet.

        Args:
            method: Of HTTP.
            path: Path, or whole address.
            what: What it is for, for messages.
            headers: Besides that of authorization.
            body: What is sent.
            once: Whether it is not tried again, though the error may pass.
            passes: Statuses of errors that the caller understands.
        """
        url = path if "://" in path else f"{self._base}{path}"
        call = _Call(method, url, what, headers or {}, body, once)
        answer = self._signed_in(call)
        try:
            if answer.status >= 400 and answer.status not in passes:
                raise self._refusal(answer, what, writes=call.writes)
            yield answer
        except BaseException:
            answer.close()  # what is not read yet may be long
            raise
        finally:
            answer.drain_conn()
            answer.release_conn()

    def _signed_in(self, call: _Call) -> BaseHTTPResponse:
        is_own = urlsplit(call.url).netloc == self._server

        def attempt() -> BaseHTTPResponse:
            own = {"Authorization": sent} if sent else {}
            return self._attempt(replace(call, headers={**call.headers, **own}))

        sent = self._authorization if is_own else ""
        answer = attempt()
        if answer.status == 401:
            challenge = answer.headers.get("WWW-Authenticate", "")
            try:
                is_new = is_own and self._sign_in(challenge, sent, writes=call.writes)
            except BaseException:
                answer.close()
                raise
            if is_new:
                answer.drain_conn()
                answer.release_conn()
                sent = self._authorization
                return attempt()
        return answer

    def _attempt(self, call: _Call) -> BaseHTTPResponse:
        attempts = 1 if call.once else _ATTEMPTS
        for attempt in range(1, attempts + 1):
            self._check_open(call.what)
            if call.body is not None and not isinstance(call.body, bytes):
                call.body.seek(0)
            try:
                answer = self._pool.request(
                    call.method,
                    call.url,
                    body=call.body,
                    headers=call.headers,
                    preload_content=False,
                    # urllib3 1.26 would take an answer that was cut short for the whole.
                    enforce_content_length=True,
                    retries=_RETRIES,
                    timeout=_TIMEOUT if call.body is None else _SENDING,
                )
            except urllib3.exceptions.HTTPError as exc:
                if attempt < attempts:
                    self._closed.wait(_pause(attempt))
                    continue
                said = f"the registry {self.host} cannot be reached to {call.what}: {_reason(exc)}"
                raise (_UploadLostError(said) if call.once else LaunchError(said)) from exc
            if answer.status not in _PASSING or attempt == attempts:
                break
            pause = max(_pause(attempt), _wanted_pause(answer))
            if pause > _LONGEST_PAUSE:
                break
            answer.drain_conn()
            answer.release_conn()
            self._closed.wait(pause)
        return answer

    def _whole(self, what: str, read: Callable[[], _T]) -> _T:
        """Read an answer, from the first byte again if the connection breaks."""
        for attempt in range(1, _ATTEMPTS):
            try:
                return read()
            except urllib3.exceptions.HTTPError:
                self._closed.wait(_pause(attempt))
        try:
            return read()
        except urllib3.exceptions.HTTPError as exc:
            raise LaunchError(
                f"the connection to the registry {self.host} broke while it was to {what}: {exc}"
            ) from exc

    def _check_open(self, what: str) -> None:
        if self._closed.is_set():
            raise LaunchError(f"{self} is not to be used any more: stopped while it was to {what}")

    def _basic(self) -> str:
        credentials = self.credentials
        if not credentials:
            return ""
        pair = f"{credentials['username']}:{credentials['password']}"
        return f"Basic {base64.b64encode(pair.encode()).decode()}"

    def _sign_in(self, challenge: str, sent: str, *, writes: bool) -> bool:
        """Sign in as the registry wants; say whether there is something new to try with.

        Args:
            challenge: What it has answered to a request.
            sent: The authorization of that request.
            writes: Whether more than the right to read is needed.
        """
        with self._signing_in:
            basic = self._basic()
            if not challenge.lower().startswith("bearer "):
                self._authorization = basic
                return bool(basic) and basic != sent
            return self._get_token(challenge, basic, writes=writes)

    def _get_token(self, challenge: str, basic: str, *, writes: bool) -> bool:
        """Get a token; say whether there is one. The caller holds the lock."""
        values = dict(_CHALLENGE.findall(challenge))
        realm = values.pop("realm", "")
        if not realm:
            return False
        values.setdefault("scope", f"repository:{self.name}:{'pull,push' if writes else 'pull'}")
        query = urlencode({key: values[key] for key in ("service", "scope") if key in values})
        url = f"{realm}?{query}"
        headers = {"Authorization": basic} if basic else {}
        server = urlsplit(realm).netloc
        call = _Call("GET", url, f"sign in at {server}", headers)

        def read() -> tuple[int, bytes]:
            answer = self._attempt(call)
            try:
                return answer.status, answer.read()
            finally:
                answer.release_conn()

        status, content = self._whole(call.what, read)
        if status in _PASSING:
            raise LaunchError(
                f"the registry {self.host} has its tokens from {server}, which gives none at "
                f"present ({status}): it limits requests, or has an error of its own. Wait, "
                f"and start again"
            )
        if status != 200:
            return False
        data = _json(content, f"{self.host}: the token")
        self._authorization = f"Bearer {data.get('token') or data.get('access_token')}"
        return True

    def _refusal(self, answer: BaseHTTPResponse, what: str, *, writes: bool) -> CloudexecError:
        reason = f"{answer.status} {answer.reason}"
        unknown = (ValueError, LookupError, TypeError, AttributeError)
        with contextlib.suppress(*unknown, urllib3.exceptions.HTTPError):
            first = json.loads(answer.read(_CHUNK))["errors"][0]
            reason += f", {first['code']}: {first.get('message', '')}"
        refused = f"the registry {self.host} refused to {what} in {self.name}: {reason}"
        problem = self._login.problem if self._login is not None else ""
        if problem and answer.status in (401, 403, 429):
            return ConfigError(f"{refused}. {problem}")
        hint = ""
        if answer.status in (401, 403):
            hint = (
                ". Check the permissions of your AWS identity (`cloudexec policy` lists them)"
                if ".ecr." in self.host
                else ". Sign in with `docker login`, or name another image"
            )
        elif answer.status == 404:
            hint = ". There is no such repository or image"
            if problem:
                hint += f", or it is shown only to who is signed in: {problem}"
        elif answer.status == 429 and writes:
            hint = ". It limits how much is sent to it: wait, and start again"
        elif answer.status == 429:
            hint = ". It limits how much may be read: wait, or name a base in another registry"
        elif answer.status in _PASSING:
            hint = ". It has an error of its own: wait, and start again"
        return LaunchError(f"{refused}{hint}")


class _Sent(io.FileIO):
    """A file that is sent, until a check raises an error."""

    def __init__(self, path: Path, check: Callable[[], None]) -> None:
        super().__init__(path)
        self._check = check

    def read(self, size: int | None = -1) -> bytes:
        """Read bytes, as long as nobody wants to stop."""
        self._check()
        content: bytes = super().read(-1 if size is None else size)
        return content


class _UploadLostError(Exception):
    """An upload broke, and can be begun again.

    Args:
        said: What is said where it is given up.
        pause: Seconds that the registry wants one to wait for.
        is_too_large: Whether the registry takes no request of that size.
    """

    def __init__(self, said: str, pause: float = 0.0, *, is_too_large: bool = False) -> None:
        super().__init__(said)
        self.pause = pause
        self.is_too_large = is_too_large


def _reason(exc: Exception) -> str:
    reason = getattr(exc, "reason", None)
    return str(reason or exc)


def _pause(attempt: int) -> float:
    return random.uniform(0.5, 1.0) * 2.0 ** (attempt - 1)


def _wanted_pause(answer: BaseHTTPResponse) -> float:
    """Return the seconds that a registry wants one to wait for."""
    try:
        return float(_RETRIES.get_retry_after(answer) or 0)
    except urllib3.exceptions.HTTPError:
        return 0.0


def _json(content: bytes, what: str) -> dict[str, Any]:
    try:
        data = json.loads(content)
    except ValueError as exc:
        raise LaunchError(f"{what} cannot be read: {exc}") from exc
    if not isinstance(data, dict):
        raise LaunchError(f"{what} cannot be read: it is no object")
    return data


def _pool(base: str) -> urllib3.PoolManager:
    context = ssl.create_default_context()
    for name in ("AWS_CA_BUNDLE", "REQUESTS_CA_BUNDLE"):
        if os.path.isfile(path := os.environ.get(name, "")):
            context.load_verify_locations(path)
    parts = urlsplit(base)
    proxy = urllib.request.getproxies().get(parts.scheme, "")
    if proxy and parts.scheme == "https" and not urllib.request.proxy_bypass(parts.hostname or ""):
        login = unquote(urllib3.util.parse_url(proxy).auth or "")
        headers = urllib3.make_headers(proxy_basic_auth=login) if login else {}
        return urllib3.ProxyManager(proxy, ssl_context=context, maxsize=8, proxy_headers=headers)
    return urllib3.PoolManager(ssl_context=context, maxsize=8)
