"""The types of CSV columns."""

from __future__ import annotations

import pytest

from cloudexec.cli._column_types import PARSERS, ColumnGuess


def guess(cells: list[str]) -> str | None:
    column = ColumnGuess()
    for cell in cells:
        column.see(cell)
    return column.kind


@pytest.mark.parametrize(
    ("cells", "kind"),
    [
        (["1", "-2", "0"], "int"),
        (["123456789012345678901234567890"], "int"),
        (["1", "2.5"], "float"),
        (["2.5", "1"], "float"),
        (["1e3", ".5", "3."], "float"),
        (["true", "False", "TRUE"], "bool"),
        (["1", "", "3"], "int"),
        (["", ""], None),
        (["1", "x"], "str"),
        (["x", "1"], "str"),
        (["true", "1"], "str"),
        (["1", "true"], "str"),
        (["yes", "no"], "str"),
        (["01234", "56789"], "str"),
        (["56789", "01234"], "str"),
        (["+4930123"], "str"),
        (["1_000"], "str"),
        (["e5"], "str"),
        (["-"], "str"),
        (["1.2.3"], "str"),
        (["2026-01-31"], "str"),
        (["nan", "1"], "float"),
        (["1", "inf"], "float"),
        (["nan"], "str"),
        (["nan", "Anna"], "str"),
        (["nan", "true"], "str"),
    ],
)
def test_column_has_the_narrowest_type_that_holds_all_cells(
    cells: list[str], kind: str | None
) -> None:
    """All cells decide together, whatever their order."""
    assert guess(cells) == kind


@pytest.mark.parametrize("cell", ["1", "1.5", "-0.25", "1e-7", "3.", " 4 ", "true", "007", "e5"])
def test_guessed_type_parses_the_cell(cell: str) -> None:
    """What is guessed from a cell can also read it."""
    kind = guess([cell])
    assert kind is not None
    PARSERS[kind](cell)


def test_forced_bool_reads_numbers_and_words() -> None:
    """A column that is said to be bool may hold 1 and 0, or yes and no."""
    assert [PARSERS["bool"](cell) for cell in ("1", "0", "Yes", "no", "true")] == [
        True,
        False,
        True,
        False,
        True,
    ]
    with pytest.raises(ValueError, match="maybe"):
        PARSERS["bool"]("maybe")
