"""The decorator for classes of named values."""

from __future__ import annotations

import copy
import pickle

import pytest

from cloudexec._record_class import names_of, record, replace


@record
class Point:
    """Two numbers."""

    x: int
    y: int = 0

    @property
    def total(self) -> int:
        return self.x + self.y


@record(kw_only=True)
class Options:
    """Settings that are checked."""

    size: int
    name: str = "none"

    def __post_init__(self) -> None:
        if self.size < 0:
            raise ValueError(f"size must not be negative, not {self.size}")


@record
class Empty:
    """No values at all."""


@record
class Secret:
    """A class with a repr of its own."""

    key: str

    def __repr__(self) -> str:
        return "Secret()"


def test_values_are_given_by_position_and_by_name() -> None:
    point = Point(1, y=2)
    assert (point.x, point.y, point.total) == (1, 2, 3)
    assert Point(1).y == 0
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'x'"):
        Point()  # type: ignore[call-arg]
    match point:
        case Point(x, y):
            assert (x, y) == (1, 2)


def test_values_that_are_given_by_name_only() -> None:
    assert Options(size=3).name == "none"
    with pytest.raises(TypeError, match="positional"):
        Options(3)  # type: ignore[misc]
    with pytest.raises(TypeError, match="wrong"):
        Options(size=3, wrong=1)  # type: ignore[call-arg]


def test_values_are_checked_also_when_they_are_replaced() -> None:
    assert replace(Options(size=3), name="x") == Options(size=3, name="x")
    for make in (lambda: Options(size=-1), lambda: replace(Options(size=3), size=-1)):
        with pytest.raises(ValueError, match="not -1"):
            make()


def test_equal_values_are_equal_and_have_one_hash() -> None:
    assert Point(1, 2) == Point(1, 2) != Point(1, 3)
    assert len({Point(1, 2), Point(1, 2), Point(2, 2)}) == 2
    assert Point(1) != (1, 0)
    assert Empty() == Empty()


def test_a_record_says_what_it_is() -> None:
    assert repr(Point(1)) == "Point(x=1, y=0)"
    assert repr(Empty()) == "Empty()"
    assert repr(Secret("hidden")) == "Secret()"
    assert names_of(Point(1)) == ("x", "y")
    assert Point.__doc__ == "Two numbers."


def test_a_record_has_no_other_attributes() -> None:
    with pytest.raises(AttributeError):
        Point(1).z = 2  # type: ignore[attr-defined]


@pytest.mark.parametrize("value", [Point(1, 2), Options(size=1), Empty(), Secret("a")])
def test_copies_are_equal(value: object) -> None:
    assert pickle.loads(pickle.dumps(value)) == value
    assert copy.copy(value) == value
    assert copy.deepcopy(value) == value
