"""The parts of launchers depend on each other in one direction, and none knows AWS but its own."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import cloudexec

PACKAGE = Path(cloudexec.__file__).parent
LAUNCHERS = PACKAGE / "_launchers"


def name_of(file: Path) -> str:
    return ".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts)


def imports() -> dict[str, set[str]]:
    """Return which modules of the package each of them imports, lazily and for typing too."""
    files = {name_of(file): file for file in LAUNCHERS.rglob("*.py") if file.stem != "__init__"}
    return {
        name: {
            node.module
            for node in ast.walk(ast.parse(file.read_text()))
            if isinstance(node, ast.ImportFrom) and node.module in files
        }
        for name, file in files.items()
    }


def test_no_module_imports_itself_by_a_detour_typing_included() -> None:
    found = imports()
    assert found["cloudexec._launchers.fleet"]
    try:
        TopologicalSorter(found).prepare()
    except CycleError as exc:
        raise AssertionError(f"these import each other: {' -> '.join(exc.args[1])}") from exc


def test_the_fleet_knows_no_platform() -> None:
    """Whatever it needs of one, a launcher of another package can give it."""
    platforms = tuple(
        f"cloudexec._launchers.{each}." for each in ("aws", "batch", "ec2", "fargate", "lambda_")
    )
    knowing = [
        name
        for name, imported in imports().items()
        if any(each.startswith(platforms) for each in imported)
    ]
    assert knowing
    assert all(name.startswith(platforms) for name in knowing)


def test_a_launcher_is_written_with_public_names_alone() -> None:
    """The one of these tests imports nothing else of ours."""
    tree = ast.parse(Path(__file__).with_name("process_farm.py").read_text())
    modules = {n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert {each for each in modules if each.startswith("cloudexec")} == {"cloudexec.launchers"}
