"""Checks requests against botocore's model of the service, including bounds and patterns.

A client of botocore checks types, required members and lower bounds before it sends a request. This
module checks the other rules that AWS publishes in the model on the received request: upper bounds
of numbers, lengths and counts, patterns, and the values of enumerations.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from typing import Any
from xml.etree import ElementTree

from botocore.model import ListShape, MapShape, Shape, StringShape, StructureShape
from botocore.validate import ParamValidator

from cloudexec.testing._aws.wire import Call, scalar

__all__ = ["problems"]

_UNICODE_CLASSES = {r"\p{L}\p{Z}\p{N}_": r"\w\s", r"\w-_": r"\w\-_"}
"""Classes of characters in Java's regular expressions, and their equivalents in Python."""

_NUMBERS = ("integer", "long", "float", "double")


def problems(call: Call, body: bytes) -> list[str]:
    """Return the rules of the service model that a call breaks; empty if it is well formed.

    Args:
        call: The call. The contents of a body in XML are added to its parameters.
        body: The request's body.
    """
    found = [f"Unknown parameter: {name}" for name in call.unknown]
    shape = call.model.input_shape
    if shape is None:
        return found
    if call.model.service_model.metadata["protocol"] == "rest-xml":
        try:
            _read_xml_body(call, body)
        except ValueError as exc:
            return [*found, str(exc)]
    report = ParamValidator().validate(call.parameters, shape)
    if report.has_errors():
        found.append(report.generate_report())
    found.extend(_bounds(shape, call.parameters, ""))
    return found


def _read_xml_body(call: Call, body: bytes) -> None:
    shape = call.model.input_shape
    name = shape.serialization.get("payload") if shape is not None else None
    member = shape.members.get(name) if isinstance(shape, StructureShape) and name else None
    if not isinstance(member, StructureShape) or not body.strip():
        return
    try:
        root = ElementTree.fromstring(body)
    except ElementTree.ParseError as exc:
        raise ValueError(f"the body is no XML: {exc}") from exc
    call.parameters[str(name)] = _from_xml(member, root)


def _from_xml(shape: Shape, element: ElementTree.Element) -> Any:
    if not isinstance(shape, StructureShape):
        return scalar(shape, element.text or "")
    names = {
        str(inner.serialization.get("name", member)): (member, inner)
        for member, inner in shape.members.items()
    }
    found: dict[str, Any] = {}
    for child in element:
        tag = child.tag.rpartition("}")[2]
        if tag not in names:
            raise ValueError(f"{element.tag.rpartition('}')[2]} has no element {tag}")
        member, inner = names[tag]
        if not isinstance(inner, ListShape):
            found[member] = _from_xml(inner, child)
        elif inner.serialization.get("flattened"):
            found.setdefault(member, []).append(_from_xml(inner.member, child))
        else:
            found[member] = [_from_xml(inner.member, each) for each in child]
    return found


def _bounds(shape: Shape, value: Any, path: str) -> Iterator[str]:
    """Yield the bounds that a value breaks. Wrong types have been found before."""
    where = path.lstrip(".") or "the request"
    if isinstance(shape, StructureShape) and isinstance(value, dict):
        for name, inner in value.items():
            if name in shape.members:
                yield from _bounds(shape.members[name], inner, f"{path}.{name}")
    elif isinstance(shape, ListShape) and isinstance(value, list):
        yield from _range(shape, len(value), f"Number of members of {where}")
        for index, inner in enumerate(value):
            yield from _bounds(shape.member, inner, f"{path}[{index}]")
    elif isinstance(shape, MapShape) and isinstance(value, dict):
        yield from _range(shape, len(value), f"Number of members of {where}")
        for name, inner in value.items():
            yield from _bounds(shape.key, name, f"{path}.{name} (key)")
            yield from _bounds(shape.value, inner, f"{path}.{name}")
    elif isinstance(shape, StringShape) and isinstance(value, str):
        yield from _range(shape, len(value), f"Length of {where}")
        if shape.enum and value not in shape.enum:
            yield f"Value {value!r} at {where} is none of {', '.join(shape.enum)}"
        pattern = shape.metadata.get("pattern")
        if pattern and not _compiled(pattern).fullmatch(value):
            yield f"Value {value!r} at {where} does not fit the pattern {pattern}"
    elif shape.type_name in _NUMBERS and isinstance(value, int | float):
        yield from _range(shape, value, f"Value of {where}")


def _range(shape: Shape, number: float, what: str) -> Iterator[str]:
    least, most = shape.metadata.get("min"), shape.metadata.get("max")
    if least is not None and number < least:
        yield f"{what} is {number}; at least {least} is needed"
    if most is not None and number > most:
        yield f"{what} is {number}; {most} is the most"


@functools.cache
def _compiled(pattern: str) -> re.Pattern[str]:
    for java, python in _UNICODE_CLASSES.items():
        pattern = pattern.replace(java, python)
    # ASCII as in Java, unless a pattern asks for letters of every script.
    flags = 0 if r"\w\s" in pattern else re.ASCII
    return re.compile(pattern, flags)
