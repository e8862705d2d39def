"""Rows from CSV."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path

import pytest

from cloudexec.cli._byte_source import Reopenable
from cloudexec.cli._csv_input import CsvSource
from cloudexec.cli._errors import CommandError
from cloudexec.cli._parameters import read_parameters


def anything(**values: object) -> None:
    """Accept every column."""


def read(
    path: Path | str,
    function: Callable[..., object] = anything,
    *,
    types: dict[str, str] | None = None,
    delimiter: str = ",",
    ignore_extra: bool = False,
) -> list[dict[str, object]]:
    parameters = read_parameters(function, function.__name__)
    source = CsvSource(
        Reopenable(str(path)),
        parameters,
        types=types or {},
        delimiter=delimiter,
        ignore_extra=ignore_extra,
    )
    calls = [source.bind(row) for row in source.rows()]
    assert len(calls) == source.total
    return [kwargs for _, kwargs in calls]


@pytest.fixture
def rows(folder: Path) -> Callable[[str], Path]:
    """Write a file of rows."""

    def write(text: str) -> Path:
        path = Path("rows.csv")
        path.write_bytes(text.encode())
        return path

    return write


def refusal(path: Path, function: Callable[..., object] = anything) -> str:
    with pytest.raises(CommandError) as caught:
        read(path, function)
    return caught.value.message


def test_columns_become_keyword_arguments(rows: Callable[[str], Path]) -> None:
    """Each row is a dict of values of its columns' types."""
    path = rows('a,b,c\n1,x,true\n2,"y,\nz",false\n')
    assert read(path) == [{"a": 1, "b": "x", "c": True}, {"a": 2, "b": "y,\nz", "c": False}]


def test_bom_crlf_blank_lines_and_spaced_names_are_read_through(
    rows: Callable[[str], Path],
) -> None:
    """A file as a spreadsheet saves it gives the same rows."""
    assert read(rows("\ufeffa, b\r\n1,2\r\n\r\n3,4\r\n\r\n")) == [
        {"a": 1, "b": 2},
        {"a": 3, "b": 4},
    ]


def test_compressed_file_is_read(folder: Path) -> None:
    """A .gz file is read as what it holds."""
    Path("rows.csv.gz").write_bytes(gzip.compress(b"a\n1\n"))
    assert read("rows.csv.gz") == [{"a": 1}]


def test_empty_cell_leaves_the_argument_to_its_default(rows: Callable[[str], Path]) -> None:
    """Where a parameter has a default, an empty cell is no argument."""

    def call(a: object, b: object = 5) -> None: ...

    assert read(rows("a,b\n1,\n,2\n"), call) == [{"a": 1}, {"a": None, "b": 2}]


def test_empty_cell_in_a_text_column_is_an_empty_text(rows: Callable[[str], Path]) -> None:
    """Without a default, text stays text."""
    assert read(rows("a,b\nx,1\n,1\n")) == [{"a": "x", "b": 1}, {"a": "", "b": 1}]


def test_annotation_decides_the_type(rows: Callable[[str], Path]) -> None:
    """A parameter's annotation wins over what the cells look like."""

    def call(a: str, b: float | None, c: list[int], d: Path) -> None: ...

    path = rows('a,b,c,d\n1,2,"[3, 4]",x.png\n')
    assert read(path, call) == [{"a": "1", "b": 2.0, "c": [3, 4], "d": Path("x.png")}]


def test_type_option_wins_over_the_annotation(rows: Callable[[str], Path]) -> None:
    """What the user says decides."""

    def call(a: int) -> None: ...

    assert read(rows("a\n1\n"), call, types={"a": "str"}) == [{"a": "1"}]


def test_extra_columns_are_recorded_and_not_passed(rows: Callable[[str], Path]) -> None:
    """With ignore_extra, a column without a parameter stays out of the call."""

    def call(a: int) -> None: ...

    path = rows("id,a\nx,1\n")
    assert read(path, call, ignore_extra=True) == [{"a": 1}]


def test_positional_only_parameter_is_passed_by_position(rows: Callable[[str], Path]) -> None:
    """A column can name a positional-only parameter, as builtins have them."""

    def call(a: int, b: int = 2, /, c: int = 3) -> None: ...

    source = CsvSource(
        Reopenable(str(rows("c,b,a\n9,8,7\n"))),
        read_parameters(call, "call"),
        types={},
        delimiter=",",
        ignore_extra=False,
    )
    assert [source.bind(row) for row in source.rows()] == [((7, 8), {"c": 9})]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "rows.csv is empty: its first line must name the columns"),
        ("a,a\n", "rows.csv has the column 'a' twice"),
        ("a,,b\n", "rows.csv: column 2 has no name"),
        (
            "a;b\n1;2\n",
            "rows.csv seems to have ';' between its columns, not ',': say --delimiter ';'",
        ),
        (
            "a,b\n" + "1,2\n" * 6 + "1,2,3\n",
            "rows.csv, row 7 (line 8): 3 cells, but the header has 2 columns",
        ),
        (
            'a,b\n"1\n1",2\n\n1\n',
            "rows.csv, row 2 (line 5): 1 cell, but the header has 2 columns",
        ),
        ('a,b\n1,2\n1,"2\n3,4\n', "rows.csv, row 2 (line 3): a quote is opened and never closed"),
    ],
)
def test_malformed_file_is_named_with_row_and_line(
    rows: Callable[[str], Path], text: str, message: str
) -> None:
    """What is wrong with the file is said with its place."""
    assert refusal(rows(text)) == message


def test_text_that_is_not_utf_8_is_named(folder: Path) -> None:
    """A byte of another encoding is reported with its row."""
    Path("rows.csv").write_bytes(b"a\nx\ncaf\xe9\n")
    assert refusal(Path("rows.csv")) == "rows.csv, row 2 (line 3): not UTF-8 text (byte 0xe9)"


def test_cell_that_is_not_of_the_annotated_type_is_named(rows: Callable[[str], Path]) -> None:
    """The message has row, column and cell."""

    def call(a: int) -> None: ...

    assert refusal(rows("a\n1\nx1\n"), call) == (
        "rows.csv, row 2 (line 3), column 'a': 'x1' is not of type int"
    )


def test_missing_column_is_named_with_a_guess(rows: Callable[[str], Path]) -> None:
    """A column that the function needs and the file lacks is named, and what it might be there."""

    def call(price: int, quantity: int = 1) -> None: ...

    assert refusal(rows("Price,quantity\n1,2\n"), call) == (
        "rows.csv has no column 'price', which call(price, quantity=1) needs; "
        "did you mean 'Price'? (columns there: Price, quantity)"
    )


def test_column_without_a_parameter_is_named_with_a_guess(rows: Callable[[str], Path]) -> None:
    """A column that the function does not take is named, with the way out."""

    def call(price: int, quantity: int = 1) -> None: ...

    assert refusal(rows("price,quanttity\n1,2\n"), call) == (
        "call(price, quantity=1) has no parameter for the column 'quanttity' of rows.csv; "
        "did you mean 'quantity'? (--ignore-extra leaves such columns out)"
    )
