"""Graphs in Graphviz's language, and as the SVG that its program makes of that."""

from __future__ import annotations

import shutil
import subprocess
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from cloudexec._errors import CloudexecError

__all__ = ["dot", "svg"]


def dot(nodes: Iterable[Any], *, by_stage: bool) -> str:
    """Draw nodes, each behind those that it depends on; see ``Graph.to_dot()``."""
    lines = ["digraph {", "  rankdir=LR;", "  node [shape=box, style=rounded];"]
    number: dict[Any, int] = {}
    edges: Counter[tuple[int, int]] = Counter()
    calls: Counter[Any] = Counter()
    for node in nodes:
        key = node.stage if by_stage else node
        at = number.setdefault(key, len(number) + 1)
        calls[key] += 1
        for dependency in node.dependencies:
            edges[number[dependency.stage if by_stage else dependency], at] += 1
    for key, at in number.items():
        label = f"{key.name} ({calls[key]})" if by_stage else key.stage.name
        lines.append(f"  n{at} [label={_quoted(label)}];")
    lines += [f"  n{tail} -> n{head};" for tail, head in edges]
    return "\n".join([*lines, "}", ""])


def svg(text: str, path: str | Path | None) -> str:
    """Draw what ``dot()`` returned; see ``Graph.to_svg()``."""
    program = shutil.which("dot")
    if program is None:
        raise CloudexecError(
            "drawing SVG needs Graphviz's program 'dot', which is not on the PATH: install "
            "Graphviz, or use to_dot()"
        )
    done = subprocess.run(
        [program, "-Tsvg"],
        input=text,
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    if done.returncode:
        raise CloudexecError(f"'dot' failed: {done.stderr.strip()}")
    if path is not None:
        Path(path).write_text(done.stdout, encoding="utf-8")
    return done.stdout


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'
