"""Writes Python values as JSON; types that JSON does not have become the closest type it has."""

from __future__ import annotations

import base64
import dataclasses
import datetime
import decimal
import enum
import fractions
import json
import math
import os
import pathlib
import uuid
from collections.abc import Mapping, Set

from cloudexec._describing import is_interrupt, type_name

_DEEPEST = 100


def to_json(value: object) -> tuple[str, bool]:
    """Write a value as one line of JSON; never fails.

    NumPy scalars and arrays become numbers and lists; dataclasses and pydantic models objects;
    dates and times ISO 8601 text; durations seconds; paths, decimals and UUIDs text; sets lists;
    enum members their values; bytes base64 text; NaN and infinities null.

    Args:
        value: Anything.

    Returns:
        The JSON text, and whether any part of it is text from ``repr()``, because nothing better
        was known.
    """
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False), False
    except BaseException as exc:
        if is_interrupt(exc):
            raise
        # A value's own methods may raise any exception, which must not cost the row its record.
        plain, is_repr = to_plain(value)
        return json.dumps(plain, ensure_ascii=False, allow_nan=False), is_repr


def to_plain(value: object) -> tuple[object, bool]:
    """Turn a value into dicts, lists, text, numbers, booleans and None.

    Args:
        value: Anything.

    Returns:
        The plain value, and whether any part of it is text from ``repr()``.
    """
    writer = _Plain()
    return writer.convert(value, 0), writer.used_repr


class _Plain:
    def __init__(self) -> None:
        self.used_repr = False

    def convert(self, value: object, depth: int) -> object:
        if depth > _DEEPEST:  # a value that contains itself
            return self._repr(value)
        try:
            return self._convert(value, depth)
        except BaseException as exc:
            if is_interrupt(exc):
                raise
            return self._repr(value)

    def _convert(self, value: object, depth: int) -> object:
        match value:
            case enum.Enum():
                return self.convert(value.value, depth + 1)
            case None | bool():
                return value
            case str():
                return str(value)
            case int():
                return int(value)
            case float():
                return float(value) if math.isfinite(value) else None
            case Mapping():
                return {
                    self._key(key, depth): self.convert(item, depth + 1)
                    for key, item in value.items()
                }
            case list() | tuple():
                return [self.convert(item, depth + 1) for item in value]
            case Set():
                items = [self.convert(item, depth + 1) for item in value]
                return sorted(items, key=json.dumps)
            case datetime.datetime() | datetime.date() | datetime.time():
                return value.isoformat()
            case datetime.timedelta():
                return value.total_seconds()
            case decimal.Decimal() | fractions.Fraction() | uuid.UUID():
                return str(value)
            case pathlib.PurePath():
                return os.fspath(value)
            case bytes() | bytearray() | memoryview():
                return base64.b64encode(value).decode("ascii")
            case _:
                return self._convert_foreign(value, depth)

    def _convert_foreign(self, value: object, depth: int) -> object:
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return {
                field.name: self.convert(getattr(value, field.name), depth + 1)
                for field in dataclasses.fields(value)
            }
        # NumPy's scalars and arrays know tolist(), pydantic's models model_dump().
        for method in ("tolist", "model_dump"):
            convert = getattr(value, method, None)
            if callable(convert) and not isinstance(value, type):
                return self.convert(convert(), depth + 1)
        return self._repr(value)

    def _key(self, key: object, depth: int) -> str:
        if isinstance(key, str):
            return str(key)
        plain = self.convert(key, depth + 1)
        return plain if isinstance(plain, str) else json.dumps(plain)

    def _repr(self, value: object) -> str:
        self.used_repr = True
        try:
            return str.__str__(repr(value))
        except BaseException as exc:
            if is_interrupt(exc):
                raise
            return f"<{type_name(value)} whose repr() raised {type_name(exc)}>"
