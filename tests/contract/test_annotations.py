"""Annotations of functions and classes, which Python 3.14 evaluates when they are read."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

_SCRIPT = '''
import functools
import random
import sys
import typing
from dataclasses import dataclass, fields

from cloudexec import BatchExecutor

if typing.TYPE_CHECKING:
    from nowhere import Thing

STATE = random.random()  # a process that imported the script would draw another number


class Known:
    number: int
    itself: "Known"


class Unknown:
    thing: Thing


class Pair(typing.NamedTuple):
    left: int
    right: float = 2.0


@dataclass(slots=SLOTS)
class Node:
    number: int
    next: Node | None = None


def length(node: Node) -> int:
    return 0 if node is None else 1 + length(node.next)


@functools.lru_cache
def cached(thing: Thing) -> float:
    return STATE


def texts(obj):
    """Return annotations as text on every version of Python."""
    if sys.version_info < (3, 14):
        return obj.__annotations__
    import annotationlib

    return annotationlib.get_annotations(obj, format=annotationlib.Format.STRING)


def work(thing: Thing, nodes: list[Node] = ()) -> tuple[Thing]:
    return [
        STATE,
        cached(1),
        sorted(map(length, nodes)),
        Node(1, Node(2)),
        texts(Unknown),
        texts(work),
        typing.get_type_hints(Known),
        typing.get_type_hints(Pair),
        typing.get_type_hints(Node),
        typing.get_type_hints(length),
        [str(getattr(each.type, "__forward_arg__", each.type)) for each in fields(Node)],
    ]


def local(thing: Thing) -> object:
    def inner(other: Thing, again: inner_type = None) -> object:
        return other, texts(inner)

    return inner


if __name__ == "__main__":
    here = work(0, [Node(3)]), local(1)(2)
    with BatchExecutor(2) as executor:
        for _ in range(2):
            calls = executor.submit(work, 0, [Node(3)]), executor.submit(local(1), 2)
            there = tuple(each.result() for each in calls)
            if str(there) != str(here):
                print(there, here, sep="\\n")
        print("same")
'''


@pytest.mark.parametrize("slots", [False, True])
@pytest.mark.parametrize(
    "text",
    [
        True,
        pytest.param(
            False,
            marks=pytest.mark.skipif(
                sys.version_info < (3, 14), reason="annotations are evaluated at once"
            ),
        ),
    ],
)
def test_a_task_finds_the_annotations_of_the_script(
    tmp_path: Path, *, text: bool, slots: bool
) -> None:
    """Names that exist for type checkers only, and a class that names itself, are sent with all."""
    script = tmp_path / "script.py"
    source = _SCRIPT.replace("SLOTS", str(slots))
    script.write_text(f"from __future__ import annotations\n{source}" if text else source)
    run = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=60, check=False
    )
    assert run.stderr == ""
    assert run.stdout == "same\n"
