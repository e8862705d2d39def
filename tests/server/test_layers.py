"""The parts of the client's side are given what they need, and depend in one direction."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import cloudexec

SERVER = Path(cloudexec.__file__).parent / "_server"
ABOVE = {"explaining"}
"""What is asked about an executor as a whole, by its user."""


def name_of(file: Path) -> str:
    return ".".join(file.relative_to(SERVER).with_suffix("").parts)


def imports() -> dict[str, set[str]]:
    """Return which modules of the package each of them imports, for typing too."""
    files = {name_of(file): file for file in SERVER.rglob("*.py") if file.stem != "__init__"}
    found: dict[str, set[str]] = {}
    for name, file in files.items():
        found[name] = {
            node.module.removeprefix("cloudexec._server.")
            for node in ast.walk(ast.parse(file.read_text()))
            if isinstance(node, ast.ImportFrom) and node.module is not None
        } & files.keys()
    return found


def test_no_part_knows_the_driver() -> None:
    knows = {name for name, imported in imports().items() if "driver" in imported}
    assert knows == ABOVE


def test_no_module_imports_itself_by_a_detour_typing_included() -> None:
    try:
        TopologicalSorter(imports()).prepare()
    except CycleError as exc:
        raise AssertionError(f"these import each other: {' -> '.join(exc.args[1])}") from exc
