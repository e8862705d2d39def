"""Files that match a glob."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from cloudexec.cli._errors import CommandError
from cloudexec.cli._files_input import FilesSource
from cloudexec.cli._parameters import read_parameters


def as_text(path: str) -> None:
    """Take a path as text."""


def as_path(path: Path) -> None:
    """Take a path as an object."""


def with_size(path: str, size: int) -> None:
    """Need more than a path."""


def calls(pattern: str, function: Callable[..., object] = as_text) -> list[object]:
    source = FilesSource(pattern, read_parameters(function, function.__name__), output=None)
    return [source.bind(row)[0][0] for row in source.rows()]


@pytest.fixture
def tree(folder: Path) -> None:
    """Two files at different depths, and a folder whose name matches too."""
    (folder / "in" / "deep").mkdir(parents=True)
    (folder / "in" / "b.png").touch()
    (folder / "in" / "deep" / "a.png").touch()
    (folder / "in" / "folder.png").mkdir()


@pytest.mark.usefixtures("tree")
def test_each_file_is_passed_as_its_path_in_order() -> None:
    """Folders are no files, and ** reaches below."""
    assert calls("in/**/*.png") == ["in/b.png", "in/deep/a.png"]


@pytest.mark.usefixtures("tree")
def test_path_annotation_gets_a_path() -> None:
    """A parameter that is annotated pathlib.Path gets one."""
    assert calls("in/*.png", as_path) == [Path("in/b.png")]


@pytest.mark.usefixtures("tree")
@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("in/*.jpg", "no file matches 'in/*.jpg'"),
        ("in/f*", "no file matches 'in/f*' (only folders do)"),
    ],
)
def test_glob_without_a_file_is_an_error(pattern: str, message: str) -> None:
    """No match is no empty job."""
    with pytest.raises(CommandError) as caught:
        calls(pattern)
    assert caught.value.message == message


@pytest.mark.usefixtures("tree")
def test_function_that_needs_more_than_a_path_is_refused() -> None:
    """The parameter that is missing is named."""
    with pytest.raises(CommandError) as caught:
        calls("in/*.png", with_size)
    assert caught.value.message == (
        "with_size(path, size) cannot be called with a file's path alone: "
        "missing a required argument: 'size'"
    )
