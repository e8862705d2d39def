"""Writes answers of Amazon EC2 as XML, by botocore's model of the service."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from datetime import datetime
from typing import Any
from xml.sax.saxutils import escape

from botocore.model import ListShape, Shape, StructureShape

from cloudexec.testing._aws.wire import Call, Response

__all__ = ["ec2_response"]

_NAMESPACE = "http://ec2.amazonaws.com/doc/2016-11-15/"


def ec2_response(call: Call, members: Mapping[str, Any]) -> Response:
    """Return the answer to a call.

    Args:
        call: The call.
        members: Those of the operation's output, as a client of botocore sees them.
    """
    shape = call.model.output_shape
    inner = "" if shape is None else _structure(shape, members)
    name = f"{call.operation}Response"
    body = f'<{name} xmlns="{_NAMESPACE}"><requestId>{uuid.uuid4()}</requestId>{inner}</{name}>'
    return Response(status=200, body=body.encode(), headers={"Content-Type": "text/xml"})


def _structure(shape: Any, members: Mapping[str, Any]) -> str:
    parts = []
    for name, value in members.items():
        inner = shape.members[name]
        if value is not None:
            tag = inner.serialization.get("name", name)
            parts.append(f"<{tag}>{_value(inner, value)}</{tag}>")
    return "".join(parts)


def _value(shape: Shape, value: Any) -> str:
    if isinstance(shape, StructureShape):
        return _structure(shape, value)
    if isinstance(shape, ListShape):
        return "".join(f"<item>{_value(shape.member, each)}</item>" for each in value)
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, datetime):
        return f"{value:%Y-%m-%dT%H:%M:%S}.000Z"
    return escape(str(value))
