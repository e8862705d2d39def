"""Reads requests, and writes answers, with botocore's service models."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qsl, unquote

from botocore.loaders import Loader
from botocore.model import (
    ListShape,
    MapShape,
    OperationModel,
    ServiceModel,
    Shape,
    StructureShape,
)

__all__ = [
    "Call",
    "Response",
    "UnknownCallError",
    "error_response",
    "json_response",
    "read_call",
    "scalar",
]

SIGNING_NAMES = {
    "monitoring": "cloudwatch",
    "servicequotas": "service-quotas",
    "tagging": "resourcegroupstaggingapi",
}
"""By signing name: the name of botocore's model, if it differs."""

_CREDENTIAL = re.compile(r"Credential=([^/]+)/\d{8}/([^/]+)/([^/]+)/aws4_request")


class UnknownCallError(Exception):
    """The request fits no operation of any service model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One request, identified."""

    service: str
    """The name of botocore's service model."""
    operation: str
    parameters: dict[str, Any]
    """The parameters as a client would pass them, without request bodies of S3."""
    region: str
    access_key: str
    model: OperationModel
    unknown: tuple[str, ...] = ()
    """Query parameters that the operation does not have."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Response:
    """One answer, before it is written."""

    status: int
    body: bytes
    headers: dict[str, str] = field(default_factory=dict)
    error: str | None = None
    """AWS's error code, if the answer is a refusal."""


@functools.cache
def service_model(name: str) -> ServiceModel:
    """Return botocore's model of one service."""
    return ServiceModel(Loader().load_service_model(name, "service-2"), name)


def read_call(
    *, method: str, path: str, query: str, headers: Mapping[str, str], body: bytes
) -> Call:
    """Identify the operation of a request, and read its parameters.

    Args:
        method: The HTTP method.
        path: The path as it was sent, still percent-encoded.
        query: The query string without the question mark.
        headers: The headers, with names in lower case.
        body: The whole body.

    Raises:
        UnknownCallError: If no operation fits.
    """
    found = _CREDENTIAL.search(headers.get("authorization", ""))
    access_key, region, signing = found.groups() if found else ("", "us-east-1", "s3")
    name = SIGNING_NAMES.get(signing, signing)
    try:
        model = service_model(name)
    except Exception as exc:
        raise UnknownCallError(f"no service signs as {signing!r}") from exc
    protocol = model.metadata["protocol"]
    call: dict[str, Any] = {"service": name, "region": region, "access_key": access_key}
    if protocol == "json":
        operation = _operation(model, headers.get("x-amz-target", "").rpartition(".")[2])
        parameters = json.loads(body) if body.strip() else {}
        return Call(operation=operation.name, parameters=parameters, model=operation, **call)
    if protocol in ("query", "ec2"):
        pairs = dict(parse_qsl(body.decode() or query, keep_blank_values=True))
        operation = _operation(model, pairs.pop("Action", ""))
        pairs.pop("Version", None)
        reader = _QueryReader(pairs, ec2=protocol == "ec2")
        parameters = reader.read(operation.input_shape)
        return Call(
            operation=operation.name,
            parameters=parameters,
            model=operation,
            unknown=tuple(sorted(set(pairs) - reader.used)),
            **call,
        )
    pairs = dict(parse_qsl(query, keep_blank_values=True))
    operation, labels = _route(name, method, path, pairs, headers)
    parameters = {}
    shape = operation.input_shape
    for member, member_shape in shape.members.items() if shape else ():
        location = member_shape.serialization.get("location")
        wire_name = member_shape.serialization.get("name", member)
        if location == "uri":
            parameters[member] = labels.get(wire_name, "")
        elif location == "querystring" and wire_name in pairs:
            value = pairs[wire_name]
            if member_shape.type_name == "list":
                several = [v for k, v in parse_qsl(query) if k == wire_name]
                parameters[member] = several
            else:
                parameters[member] = scalar(member_shape, value)
        elif location == "header" and wire_name.lower() in headers:
            parameters[member] = scalar(member_shape, headers[wire_name.lower()])
    payload = str(shape.serialization.get("payload", "")) if shape is not None else ""
    if protocol == "rest-json" and payload and shape.members[payload].type_name == "blob":
        parameters[payload] = body
    elif protocol == "rest-json" and body.strip():
        parameters.update(json.loads(body))
    return Call(operation=operation.name, parameters=parameters, model=operation, **call)


def json_response(payload: Mapping[str, Any], status: int = 200) -> Response:
    """Return an answer of a JSON service."""
    return Response(
        status=status,
        body=json.dumps(payload).encode(),
        headers={"Content-Type": "application/json"},
    )


def error_response(
    call: Call, code: str, message: str, status: int, members: Mapping[str, Any] | None = None
) -> Response:
    """Return a refusal in the form of the call's protocol.

    Args:
        call: The call.
        code: AWS's code of the error.
        message: AWS's words.
        status: The HTTP status.
        members: Further members of the error's shape, of a JSON service.
    """
    protocol = call.model.service_model.metadata["protocol"]
    if protocol in ("json", "rest-json"):
        said = {"__type": code, "message": message, "Message": message, **(members or {})}
        body = json.dumps(said).encode()
        headers = {"Content-Type": "application/json", "x-amzn-ErrorType": code}
    else:
        text = message.replace("&", "&amp;").replace("<", "&lt;")
        kind = "Sender" if status < 500 else "Receiver"
        inner = f"<Code>{code}</Code><Message>{text}</Message>"
        if protocol == "ec2":
            xml = f"<Response><Errors><Error>{inner}</Error></Errors></Response>"
        elif protocol == "rest-xml":
            xml = f"<Error>{inner}</Error>"
        else:
            xml = f"<ErrorResponse><Error><Type>{kind}</Type>{inner}</Error></ErrorResponse>"
        body = xml.encode()
        headers = {"Content-Type": "text/xml"}
    return Response(status=status, body=body, headers=headers, error=code)


def _operation(model: ServiceModel, name: str) -> OperationModel:
    if name not in model.operation_names:
        raise UnknownCallError(f"{model.service_name} has no operation {name!r}")
    return model.operation_model(name)


def scalar(shape: Shape, text: str) -> Any:
    """Convert a text to the type of a shape; return the text itself if that is not possible."""
    try:
        if shape.type_name in ("integer", "long"):
            return int(text)
        if shape.type_name in ("float", "double"):
            return float(text)
    except ValueError:
        return text
    if shape.type_name == "boolean":
        return {"true": True, "false": False}.get(text.lower(), text)
    return text


class _QueryReader:
    """Reads nested parameters from the flat names of the query protocols."""

    def __init__(self, pairs: Mapping[str, str], *, ec2: bool) -> None:
        self._pairs = pairs
        self._ec2 = ec2
        self.used: set[str] = set()

    def read(self, shape: Shape | None) -> dict[str, Any]:
        value = self._value(shape, "") if shape is not None else None
        return value if isinstance(value, dict) else {}

    def _value(self, shape: Shape, prefix: str) -> Any:
        if isinstance(shape, StructureShape):
            return self._structure(shape, prefix)
        if isinstance(shape, ListShape):
            return self._list(shape, prefix)
        if isinstance(shape, MapShape):
            return self._map(shape, prefix)
        if prefix not in self._pairs:
            return None
        self.used.add(prefix)
        return scalar(shape, self._pairs[prefix])

    def _name(self, shape: Shape, default: str) -> str:
        if self._ec2:
            if "queryName" in shape.serialization:
                return str(shape.serialization["queryName"])
            name = str(shape.serialization.get("name", default))
            return name[:1].upper() + name[1:]
        return str(shape.serialization.get("name", default))

    def _structure(self, shape: StructureShape, prefix: str) -> dict[str, Any] | None:
        if prefix and not any(key.startswith(prefix + ".") for key in self._pairs):
            return None
        found = {}
        for member, inner in shape.members.items():
            name = self._name(inner, member)
            value = self._value(inner, f"{prefix}.{name}" if prefix else name)
            if value is not None:
                found[member] = value
        return found

    def _list(self, shape: ListShape, prefix: str) -> list[Any] | None:
        if self._pairs.get(prefix) == "":
            self.used.add(prefix)
            return []
        if self._ec2:
            base = prefix
        elif shape.serialization.get("flattened"):
            name = shape.member.serialization.get("name")
            base = ".".join([*prefix.split(".")[:-1], name]) if name else prefix
        else:
            base = f"{prefix}.{shape.member.serialization.get('name', 'member')}"
        found: list[Any] = []
        while True:
            value = self._value(shape.member, f"{base}.{len(found) + 1}")
            if value is None:
                return found or None
            found.append(value)

    def _map(self, shape: MapShape, prefix: str) -> dict[str, Any] | None:
        base = prefix if shape.serialization.get("flattened") else f"{prefix}.entry"
        key_name = shape.key.serialization.get("name", "key")
        value_name = shape.value.serialization.get("name", "value")
        found: dict[str, Any] = {}
        while True:
            number = len(found) + 1
            key = self._value(shape.key, f"{base}.{number}.{key_name}")
            if key is None:
                return found or None
            found[key] = self._value(shape.value, f"{base}.{number}.{value_name}")


@functools.cache
def _routes(service: str) -> list[tuple[str, re.Pattern[str], dict[str, str], OperationModel]]:
    """Return the URL rules of a REST service, the most specific first."""
    rules = []
    model = service_model(service)
    for name in model.operation_names:
        operation = model.operation_model(name)
        uri, _, fixed = operation.http["requestUri"].partition("?")
        pattern = "".join(
            (
                f"(?P<{part[1:-1].rstrip('+')}>.+)"
                if part.endswith("+}") or last
                else f"(?P<{part[1:-1]}>[^/]+)"
            )
            if part.startswith("{")
            else re.escape(part)
            for part, last in _parts(uri, service)
        )
        rules.append(
            (
                operation.http["method"],
                re.compile(pattern.rstrip("/") + "/?"),
                dict(parse_qsl(fixed, keep_blank_values=True)),
                operation,
            )
        )
    return sorted(rules, key=lambda rule: -_weight(rule[2], rule[3]))


def _parts(uri: str, service: str) -> list[tuple[str, bool]]:
    parts = [part for part in re.split(r"(\{[^}]+\})", uri) if part]
    # The last label may be an ARN with slashes, but names of buckets and functions have none.
    has_slashes = service not in ("s3", "lambda")
    return [(part, has_slashes and index == len(parts) - 1) for index, part in enumerate(parts)]


def _weight(fixed: Mapping[str, str], operation: OperationModel) -> int:
    return 10 * (len(fixed) + len(_required(operation))) - 5 * bool(operation.deprecated)


def _required(operation: OperationModel) -> list[tuple[str, str]]:
    shape = operation.input_shape
    if shape is None:
        return []
    return [
        (location, str(member.serialization.get("name", name)))
        for name, member in shape.members.items()
        if name in shape.required_members
        and (location := member.serialization.get("location")) in ("querystring", "header")
    ]


def _route(
    service: str,
    method: str,
    path: str,
    pairs: Mapping[str, str],
    headers: Mapping[str, str],
) -> tuple[OperationModel, dict[str, str]]:
    for verb, pattern, fixed, operation in _routes(service):
        if verb != method or not fixed.items() <= pairs.items():
            continue
        match = pattern.fullmatch(path)
        if match is None:
            continue
        if all(
            name in pairs if location == "querystring" else name.lower() in headers
            for location, name in _required(operation)
        ):
            return operation, {key: unquote(value) for key, value in match.groupdict().items()}
    raise UnknownCallError(f"{service} has no operation for {method} {path}")
