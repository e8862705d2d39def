"""The parts of a worker own their state, and depend on each other in one direction."""

from __future__ import annotations

import ast
from pathlib import Path

import cloudexec.worker

WORKER = Path(cloudexec.worker.__path__[0])
FILES = [file for file in WORKER.glob("*.py") if file.stem != "__init__"]


def imports() -> dict[str, set[str]]:
    """Return which modules of the package each of them imports, late or for typing too."""
    names = {file.stem for file in FILES}
    found: dict[str, set[str]] = {}
    for file in FILES:
        imported = found[file.stem] = set()
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                imported |= {node.module, *(f"{node.module}.{each.name}" for each in node.names)}
        found[file.stem] = {
            name.removeprefix("cloudexec.worker.").partition(".")[0]
            for name in imported
            if name.startswith("cloudexec.worker.")
        } & names
    return found


def test_no_part_of_the_pool_knows_what_is_above_it() -> None:
    """Each knows those before it, and of those behind it only what it is given to call."""
    order = [
        "tasks",
        "slot_model",
        "child",
        "reporting",
        "functions",
        "waiting",
        "slots",
        "large_results",
        "footprint",
        "answers",
        "dispatch",
        "taking_back",
        "supervisor",
    ]
    found = imports()
    assert found["supervisor"] >= {"slots", "dispatch", "answers", "taking_back"}
    for place, name in enumerate(order):
        assert not found[name] & set(order[place:]), name


def test_what_is_concluded_about_a_slot_needs_no_file_and_no_clock() -> None:
    text = (WORKER / "slot_model.py").read_text()
    imported = {
        getattr(node, "module", None) or node.names[0].name
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Import | ast.ImportFrom)
    }
    assert imported == {"__future__", "sys", "enum", "cloudexec.worker.tasks"}


def test_only_one_method_writes_the_state_of_a_slot() -> None:
    """So that the table is kept to. ``preload`` writes those of generators of random numbers."""
    writers = {
        (file.name, function.name)
        for file in FILES
        if file.stem != "preload"
        for function in ast.walk(ast.parse(file.read_text()))
        if isinstance(function, ast.FunctionDef)
        for node in ast.walk(function)
        if isinstance(node, ast.Attribute)
        and node.attr == "state"
        and isinstance(node.ctx, ast.Store)
    }
    assert writers == {("slot_model.py", "__init__"), ("slot_model.py", "enter")}
