"""Any value as JSON."""

from __future__ import annotations

import datetime
import decimal
import enum
import json
import math
import uuid
from collections import namedtuple
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from cloudexec.cli._json_values import to_json


class Colour(enum.Enum):
    """A plain enumeration."""

    RED = "red"


@dataclass
class Box:
    """A value with fields."""

    size: object
    label: str = "box"


class Opaque:
    """Nothing is known about it."""

    def __repr__(self) -> str:
        return "<Opaque>"


class Hostile:
    """Raises whatever is asked of it."""

    def __init__(self, kind: type[BaseException]) -> None:
        self.kind = kind

    def __repr__(self) -> str:
        raise self.kind("no")

    def tolist(self) -> object:
        raise self.kind("no")


Pair = namedtuple("Pair", "left right")


@pytest.mark.parametrize(
    ("value", "plain"),
    [
        (None, None),
        ({"a": [1, 2.5, "ü", True]}, {"a": [1, 2.5, "ü", True]}),
        ((1, 2), [1, 2]),
        (Pair(1, {3}), [1, [3]]),
        ({3, 1, 2}, [1, 2, 3]),
        (math.nan, None),
        ([1.5, math.inf], [1.5, None]),
        (np.float32(0.5), 0.5),
        (np.int64(7), 7),
        (np.bool_(True), True),
        (np.array([[1.0, math.nan]]), [[1.0, None]]),
        (np.datetime64("2026-01-31T12:00"), "2026-01-31T12:00:00"),
        (Box(Box(Path("a/b"))), {"size": {"size": "a/b", "label": "box"}, "label": "box"}),
        (datetime.datetime(2026, 1, 31, 12), "2026-01-31T12:00:00"),
        (datetime.date(2026, 1, 31), "2026-01-31"),
        (datetime.timedelta(minutes=1.5), 90.0),
        (decimal.Decimal("1.10"), "1.10"),
        (uuid.UUID(int=1), "00000000-0000-0000-0000-000000000001"),
        (Colour.RED, "red"),
        (b"\x00\xff", "AP8="),
        (
            {1: "a", None: "b", (1, 2): "c", Colour.RED: "d"},
            {"1": "a", "null": "b", "[1, 2]": "c", "red": "d"},
        ),
    ],
)
def test_value_becomes_what_a_reader_expects(value: object, plain: object) -> None:
    """JSON's closest form is written, without a mark."""
    text, is_repr = to_json(value)
    assert json.loads(text) == plain
    assert not is_repr


def test_unknown_value_becomes_its_repr_with_a_mark() -> None:
    """Only the part that JSON cannot hold is replaced."""
    text, is_repr = to_json({"model": Opaque(), "score": 0.5})
    assert json.loads(text) == {"model": "<Opaque>", "score": 0.5}
    assert is_repr


@pytest.mark.parametrize("kind", [RuntimeError, SystemExit, GeneratorExit])
def test_value_that_raises_when_looked_at_does_not_lose_its_row(kind: type[BaseException]) -> None:
    """Even a repr() that raises gives text."""
    text, is_repr = to_json([Hostile(kind)])
    assert json.loads(text) == [f"<Hostile whose repr() raised {kind.__name__}>"]
    assert is_repr


def test_value_that_contains_itself_is_written() -> None:
    """A cycle ends in a repr()."""
    endless: list[object] = []
    endless.append(endless)
    text, is_repr = to_json(endless)
    assert json.loads(text)
    assert is_repr
