"""Rows from JSON Lines."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from cloudexec.cli._byte_source import Reopenable
from cloudexec.cli._errors import CommandError
from cloudexec.cli._jsonl_input import JsonLinesSource
from cloudexec.cli._parameters import read_parameters


def score(price: float, quantity: int = 1) -> None:
    """Stand for a user's function."""


def source(text: str, function: Callable[..., object] = score) -> JsonLinesSource:
    path = Path("rows.jsonl")
    path.write_text(text)
    parameters = read_parameters(function, function.__name__)
    return JsonLinesSource(Reopenable(str(path)), parameters, ignore_extra=False)


def test_objects_become_keyword_arguments(folder: Path) -> None:
    """Keys are names, and rows may leave out what has a default."""
    rows = source('\ufeff{"price": 1.5, "quantity": 2}\n\n{"price": 3}\n')
    assert [(row.number, rows.bind(row)) for row in rows.rows()] == [
        (1, ((), {"price": 1.5, "quantity": 2})),
        (2, ((), {"price": 3})),
    ]
    assert (rows.total, rows.columns) == (2, ("price", "quantity"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '{"price": 1}\n{"price": }\n',
            "rows.jsonl, row 2 (line 2): not JSON: Expecting value at column 11",
        ),
        (
            '{"price": 1}\n\n7\n',
            'rows.jsonl, row 2 (line 3): a row must be a JSON object such as {"x": 1}, '
            "not a number",
        ),
        (
            '[{"price": 1}]\n',
            "rows.jsonl is a JSON array; JSON Lines has one object on each line "
            "(jq -c '.[]' makes it from an array)",
        ),
        (
            '{"price": 1}\n{"prise": 1}\n',
            "rows.jsonl, row 2 (line 2) has no key 'price', which score(price, quantity=1) needs; "
            "did you mean 'prise'? (keys there: prise)",
        ),
        (
            '{"price": 1, "colour": 2}\n',
            "score(price, quantity=1) has no parameter for the key 'colour' of rows.jsonl, row 1 "
            "(line 1) (--ignore-extra leaves such keys out)",
        ),
    ],
)
def test_malformed_row_is_named(folder: Path, text: str, message: str) -> None:
    """What is wrong with a row is said with its place."""
    with pytest.raises(CommandError) as caught:
        source(text)
    assert caught.value.message == message
