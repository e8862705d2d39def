"""Receives every request: identifies, checks and records it, and has it answered.

This package answers calls to Batch, CloudFormation, prices and quotas; moto answers all others.
"""

from __future__ import annotations

import io
import json
import socket
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from typing import Any
from urllib.parse import unquote

from cloudexec._aws.clients import known_regions
from cloudexec.testing._aws.faults import Faults
from cloudexec.testing._aws.judge import problems
from cloudexec.testing._aws.limits import ClientError
from cloudexec.testing._aws.object_requests import (
    path_style,
    query_credential,
    query_token,
    refusal,
)
from cloudexec.testing._aws.permissions import Permissions
from cloudexec.testing._aws.records import Request
from cloudexec.testing._aws.token_bucket import TokenBucket
from cloudexec.testing._aws.wire import (
    Call,
    Response,
    UnknownCallError,
    error_response,
    json_response,
    read_call,
)

__all__ = ["Gateway"]

StartResponse = Callable[..., Any]
Application = Callable[[dict[str, Any], StartResponse], Iterable[bytes]]
Handler = Callable[[Call, int], Mapping[str, Any] | Response | None]
"""Answers a call, given the length of its body; ``None`` leaves the call to moto."""

_THROTTLED = {
    "batch": ("TooManyRequestsException", "Too Many Requests", 429),
    "lambda": ("TooManyRequestsException", "Rate Exceeded.", 429),
    "ec2": ("RequestLimitExceeded", "Request limit exceeded.", 503),
    "s3": ("SlowDown", "Please reduce your request rate.", 503),
    "cloudformation": ("Throttling", "Rate exceeded", 400),
    "iam": ("Throttling", "Rate exceeded", 400),
}
_DENIED = {"ec2": "UnauthorizedOperation"}
_INVALID = {"batch": "ClientException", "ec2": "InvalidParameterValue", "s3": "InvalidRequest"}
"""Error codes for requests that the service's model does not allow. Other services have one code
for each protocol. "Common Errors" of each API reference."""
_EXPIRED = {"ec2": "RequestExpired", "s3": "ExpiredToken", "cloudformation": "ExpiredToken"}


class Gateway:
    """A WSGI application in front of moto's.

    Args:
        moto: moto's application.
        handlers: By service: the handler that answers instead of moto.
        before: Called with each call before it is carried out.
        faults: The faults that a test has requested.
        calls_per_second: Number of Batch calls that are accepted per second, and at once after a
            pause.
        metadata: Answers ``/v4/<task id>...``.
        machine: Answers ``/machine/<instance id>/...``: method, path, headers and body.
        secret: Returns the secret of an access key if it is known, to check signed URLs.
        role: Returns the permissions of the role whose key is in an authorization header;
            ``None`` if the key is not a role's.
    """

    def __init__(
        self,
        moto: Application,
        *,
        handlers: Mapping[str, Handler],
        before: Callable[[Call], None],
        faults: Faults,
        calls_per_second: float,
        metadata: Callable[[str], Mapping[str, Any] | None],
        machine: Callable[[str, str, Mapping[str, str], bytes], tuple[int, bytes]],
        secret: Callable[[str], str | None] = lambda key: None,
        role: Callable[[str], Permissions | None] = lambda authorization: None,
    ) -> None:
        self._moto = moto
        self._handlers = handlers
        self._before = before
        self._faults = faults
        self._metadata = metadata
        self._machine = machine
        self._secret = secret
        self._role = role
        self._bucket = TokenBucket(calls_per_second)
        self._lock = threading.Lock()
        # moto's back ends use no locks, so a server with many threads would lose updates.
        self.moto_lock = threading.RLock()
        self._requests: list[Request] = []
        self._in_flight = 0
        self._idle = threading.Condition(self._lock)
        self.own_mistakes: list[str] = []
        """Requests of cloudexec itself that the models do not allow; never cleared."""

    @property
    def requests(self) -> list[Request]:
        """All requests so far, in the order of their answers."""
        with self._lock:
            return list(self._requests)

    def clear_requests(self) -> None:
        """Forget the requests so far."""
        with self._lock:
            self._requests.clear()

    def wait_idle(self, timeout: float) -> None:
        """Wait until no request is being answered."""
        with self._lock:
            self._idle.wait_for(lambda: self._in_flight == 0, timeout)

    def __call__(self, environ: dict[str, Any], start_response: StartResponse) -> Iterable[bytes]:
        """Answer one request."""
        with self._lock:
            self._in_flight += 1
        try:
            return self._answer(environ, start_response)
        finally:
            with self._lock:
                self._in_flight -= 1
                self._idle.notify_all()

    def _answer(self, environ: dict[str, Any], start_response: StartResponse) -> Iterable[bytes]:
        if self._faults.is_unreachable():
            return _drop(environ, start_response)
        body = _body(environ)
        path = environ.get("RAW_URI") or environ.get("REQUEST_URI") or environ["PATH_INFO"]
        path = path.split("?", 1)[0]
        if path.startswith("/v4/"):
            return self._task_metadata(path, start_response)
        if path.startswith("/moto-api"):
            return self._moto(environ, start_response)
        headers = {
            name[5:].replace("_", "-").lower(): str(value)
            for name, value in environ.items()
            if name.startswith("HTTP_")
        }
        if path.startswith("/machine/"):
            status, said = self._machine(environ["REQUEST_METHOD"], path, headers, body)
            start_response(f"{status} Answered", [("Content-Type", "text/plain")])
            return [said]
        if "content-type" not in headers and environ.get("CONTENT_TYPE"):
            headers["content-type"] = environ["CONTENT_TYPE"]
        query = environ.get("QUERY_STRING", "")
        sent = path
        if query_credential(query):
            headers.setdefault("authorization", query_credential(query))
        if "/s3/aws4_request" in headers.get("authorization", ""):
            path = path_style(headers.get("host", ""), path)
            _use_path_style(environ, path, query)
        try:
            call = read_call(
                method=environ["REQUEST_METHOD"],
                path=path,
                query=query,
                headers=headers,
                body=body,
            )
        except (UnknownCallError, ValueError) as exc:
            self._record("unknown", f"{environ['REQUEST_METHOD']} {path}", {}, 404, "Unknown")
            text = f"FakeAWS: {exc}".encode()
            start_response("404 Not Found", [("Content-Type", "text/plain")])
            return [text]
        self._faults.wait_before(call.operation)
        found = problems(call, body)
        if found and "cloudexec" in headers.get("user-agent", ""):
            with self._lock:
                self.own_mistakes += [f"{call.service}:{call.operation}: {each}" for each in found]
        response = self._refusal(call, headers, query, found)
        if response is None and call.service == "s3":
            reason = refusal(
                method=environ["REQUEST_METHOD"],
                path=sent,
                query=query,
                headers=headers,
                body=body,
                secret=self._secret,
            )
            response = error_response(call, *reason) if reason is not None else None
        if response is None:
            response = self._carry_out(call, environ, body)
        lost = response.status < 300 and self._faults.spoils(call.operation, "lost")
        self._record(
            call.service,
            call.operation,
            call.parameters,
            0 if lost else response.status,
            response.error,
            _message(response) if response.error else None,
            tuple(found),
        )
        if lost:
            return _drop(environ, start_response)
        # A body after the answer to a HEAD request would be read as the next answer.
        answer = response.body if environ["REQUEST_METHOD"] != "HEAD" else b""
        if response.status < 300 and answer and self._faults.spoils(call.operation, "changed"):
            answer = bytes([answer[0] ^ 1]) + answer[1:]
        start_response(
            f"{response.status} {'OK' if response.status < 300 else 'Refused'}",
            # The server adds this header itself, and strict clients do not accept it twice.
            [header for header in response.headers.items() if header[0].lower() != "server"],
        )
        if response.status < 300 and answer and self._faults.spoils(call.operation, "cut"):
            return _cut(environ, answer)
        return [answer]

    def _refusal(
        self, call: Call, headers: Mapping[str, str], query: str, found: list[str]
    ) -> Response | None:
        token = headers.get("x-amz-security-token", "") or query_token(query)
        if call.region not in known_regions():
            text = (
                f"FakeAWS: there is no AWS region {call.region!r}; in the real AWS, its host would "
                f"not be found"
            )
            return error_response(call, "UnknownRegion", text, 400)
        if self._faults.has_expired(token):
            code = _EXPIRED.get(call.service, "ExpiredTokenException")
            message = "The security token included in the request is expired"
            return error_response(call, code, message, 400 if call.service == "s3" else 403)
        if self._faults.denies(call.service, call.operation):
            denied = "AccessDeniedException" if _is_json(call) else "AccessDenied"
            code = _DENIED.get(call.service, denied)
            message = (
                "User: arn:aws:iam::123456789012:user/tester is not authorized to perform: "
                f"{call.service}:{call.operation} because no identity-based policy allows the "
                f"{call.service}:{call.operation} action"
            )
            return error_response(call, code, message, 403)
        role = self._role(headers.get("authorization", ""))
        lacking = self._faults.missing_permission(call) if role is None else role.refusal(call)
        if not found and lacking is not None:
            denied = "AccessDeniedException" if _is_json(call) else "AccessDenied"
            return error_response(call, _DENIED.get(call.service, denied), lacking, 403)
        over = call.service == "batch" and not self._bucket.take()
        if over or self._faults.throttled(call.service, call.operation):
            throttled = ("ThrottlingException", "Rate exceeded", 400)
            return error_response(call, *_THROTTLED.get(call.service, throttled))
        if found:
            code = "ValidationException" if _is_json(call) else "ValidationError"
            return error_response(call, _INVALID.get(call.service, code), "; ".join(found), 400)
        return None

    def _carry_out(self, call: Call, environ: dict[str, Any], body: bytes) -> Response:
        handler = self._handlers.get(call.service)
        try:
            with self.moto_lock:
                self._before(call)
                payload = handler(call, len(body)) if handler is not None else None
            if payload is None:
                return self._from_moto(call, environ)
        except ClientError as exc:
            return error_response(call, exc.code, str(exc), exc.status, exc.members)
        except Exception as exc:  # even after a bug, answer the client and record the request
            traceback.print_exc()
            return error_response(call, "InternalFailure", f"FakeAWS failed: {exc!r}", 500)
        if isinstance(payload, Response):
            return payload
        return json_response(payload)

    def _from_moto(self, call: Call, environ: dict[str, Any]) -> Response:
        head: list[Any] = []

        def start_response(status: str, headers: list[tuple[str, str]], *_: Any) -> None:
            head[:] = [status, headers]

        result = self._moto(environ, start_response)
        try:
            body = b"".join(result)
        finally:
            close = getattr(result, "close", None)
            if close is not None:
                close()
        status = int(head[0].split()[0])
        return Response(
            status=status,
            body=body,
            headers=dict(head[1]),
            error=_error_code(dict(head[1]), body) if status >= 400 else None,
        )

    def _task_metadata(self, path: str, start_response: StartResponse) -> Iterable[bytes]:
        found = self._metadata(path.split("/")[2])
        if found is None:
            start_response("404 Not Found", [("Content-Type", "text/plain")])
            return [b"no such task"]
        shown = found if path.rstrip("/").endswith("/task") else found["Containers"][0]
        start_response("200 OK", [("Content-Type", "application/json")])
        return [json.dumps(shown).encode()]

    def _record(
        self,
        service: str,
        operation: str,
        parameters: dict[str, Any],
        status: int,
        error: str | None,
        message: str | None = None,
        found: tuple[str, ...] = (),
    ) -> None:
        request = Request(
            service=service,
            operation=operation,
            parameters=parameters,
            status=status,
            error=error,
            message=message,
            at=time.time(),
            problems=found,
        )
        with self._lock:
            self._requests.append(request)


def _body(environ: dict[str, Any]) -> bytes:
    stream = environ["wsgi.input"]
    if environ.get("wsgi.input_terminated"):
        body: bytes = stream.read()
        environ.pop("HTTP_TRANSFER_ENCODING", None)
        environ["wsgi.input_terminated"] = False
    else:
        body = stream.read(int(environ.get("CONTENT_LENGTH") or 0))
    environ["CONTENT_LENGTH"] = str(len(body))
    environ["wsgi.input"] = io.BytesIO(body)
    return body


def _drop(environ: dict[str, Any], start_response: StartResponse) -> Iterable[bytes]:
    """Close the connection without an answer."""
    try:
        environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
    except OSError:
        pass
    start_response("503 Gone", [])
    return []


def _cut(environ: dict[str, Any], answer: bytes) -> Iterable[bytes]:
    """Close the connection in the middle of an answer."""
    yield answer[: len(answer) // 2]
    try:
        environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
    except OSError:
        pass


def _use_path_style(environ: dict[str, Any], path: str, query: str) -> None:
    """Rewrite a request for moto, so that the bucket is in its path and not in the host's name."""
    environ["HTTP_HOST"] = f"127.0.0.1:{environ['SERVER_PORT']}"
    environ["PATH_INFO"] = unquote(path)
    environ["RAW_URI"] = environ["REQUEST_URI"] = f"{path}?{query}" if query else path


def _is_json(call: Call) -> bool:
    return "json" in str(call.model.service_model.metadata["protocol"])


def _error_code(headers: Mapping[str, str], body: bytes) -> str:
    kind = headers.get("x-amzn-errortype") or headers.get("x-amzn-ErrorType")
    text = body.decode("utf-8", "replace")
    if kind is None and "<Code>" in text:
        kind = text.partition("<Code>")[2].partition("</Code>")[0]
    if kind is None:
        try:
            kind = str(json.loads(text).get("__type", "Unknown"))
        except ValueError:
            kind = "Unknown"
    return kind.rpartition("#")[2]


def _message(response: Response) -> str:
    text = response.body.decode("utf-8", "replace")
    if "<Message>" in text:
        return text.partition("<Message>")[2].partition("</Message>")[0]
    try:
        found = json.loads(text)
        return str(found.get("message") or found.get("Message") or "")
    except ValueError:
        return text
