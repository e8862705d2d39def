"""What a journal knows callables and modules by."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import operator
import os
import random
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cloudexec import _payload
from cloudexec._journal.keys import arguments_digest, bare, digest_of, name_of
from cloudexec._journal.program import Program
from cloudexec._journal.sources import code_digest


class Base:
    @classmethod
    def made(cls) -> str:
        return cls.__name__

    def own(self) -> None: ...


class Derived(Base): ...


@functools.lru_cache
def train(n: int) -> int:
    return n


@functools.lru_cache
def evaluate(n: int) -> int:
    return n


@pytest.fixture
def plugins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield tmp_path
    for name in [name for name in sys.modules if name.startswith("plug_")]:
        del sys.modules[name]


def test_callables_of_every_kind_are_told_apart_with_a_key_of_the_callers_own() -> None:
    """By what they are; the state of an object that a method is bound to does not count."""
    program = Program()
    for one, other in (
        (train, evaluate),
        (str.upper, str.lower),
        ((3).__add__, (3).__mul__),
        (operator.methodcaller("upper"), operator.methodcaller("lower")),
        (operator.itemgetter(1), operator.itemgetter(2)),
        (Base.made, Derived.made),
        (Base().own, Derived().own),
        (dict.fromkeys, {}.get),
        (functools.partial(train, 1), functools.partial(evaluate, 1)),
    ):
        assert digest_of(bare(one), program) != digest_of(bare(other), program), one
    changed = Base()
    changed.n = 1  # type: ignore[attr-defined]
    assert digest_of(bare(changed.own), program) == digest_of(bare(Base().own), program)


def test_ufuncs_are_told_apart() -> None:
    numpy = pytest.importorskip("numpy")
    program = Program()
    assert digest_of(bare(numpy.sin), program) != digest_of(bare(numpy.cos), program)


@pytest.mark.parametrize("error", [RuntimeError, SystemExit])
def test_callable_whose_attributes_raise_has_a_name(error: type[BaseException]) -> None:
    class Proxy:
        def __call__(self) -> None: ...

        def __getattr__(self, name: str) -> Any:
            raise error(name)

    assert name_of(Proxy()).endswith("Proxy")
    assert type(bare(Proxy())) is Proxy


def test_name_of_a_code_counts() -> None:
    code = train.__wrapped__.__code__
    assert code_digest(code) != code_digest(code.replace(co_name="other"))


def test_module_that_comes_when_another_has_gone_counts(plugins: Path) -> None:
    """As many modules are loaded as before."""
    # Not written out: what this file itself imports is known without being loaded.
    first, second = (f"plug_{os.getpid()}_{letter}" for letter in "ab")
    (plugins / f"{first}.py").write_text("n = 1\n")
    (plugins / f"{second}.py").write_text("n = 1\n")
    importlib.import_module(first)
    program = Program()
    before = program.digest()
    assert program.digest() == before
    del sys.modules[first]
    importlib.import_module(second)
    assert program.digest() != before
    assert {first, second} <= set(program.manifest["modules"])


@pytest.mark.parametrize("way", ["deleted", "replaced"])
def test_module_that_is_imported_again_after_an_edit_counts(plugins: Path, way: str) -> None:
    """And nothing is recorded any more, as workers may have loaded either version."""
    path = plugins / "plug_a.py"
    path.write_text("n = 1\n")
    old = importlib.import_module("plug_a")
    program = Program()
    before = program.digest("plug_a")
    assert program.edited() == ""
    path.write_text("n = 22\n")
    if way == "deleted":
        del sys.modules["plug_a"]
        importlib.import_module("plug_a")
        assert program.digest() != before
    else:
        new = types.ModuleType("plug_a")
        new.__file__ = old.__file__
        sys.modules["plug_a"] = new
        assert program.digest("plug_a") != before
    assert program.edited() == "plug_a.py"


class Pair:
    def __init__(self, one: object, other: object) -> None:
        self.one = one
        self.other = other


class Reduced(Pair):
    def __reduce__(self) -> Any:
        return Reduced, (self.one, self.other)


@dataclasses.dataclass
class Holder:
    one: Any
    other: Any


class Node:
    def __init__(self, name: object) -> None:
        self.name = name
        self.neighbours: set[Node] = set()


SHAPES: dict[str, Callable[[Any], Any]] = {
    "tuples": lambda x: (x, x),
    "lists": lambda x: [x, x],
    "dicts": lambda x: {"a": x, "b": x},
    "objects": lambda x: Pair(x, x),
    "objects by __reduce__": lambda x: Reduced(x, x),
    "dataclasses": lambda x: Holder(x, x),
    "frozensets": lambda x: frozenset({x}),
    "frozensets of frozensets": lambda x: frozenset({frozenset({x, 1}), frozenset({x, 2})}),
    "frozensets of tuples": lambda x: frozenset({(x, 1), (x, 2)}),
    "sets of objects": lambda x: {Pair(x, x), Pair(x, 1)},
    "sets of objects in tuples": lambda x: ({Pair(x, 1)}, {Pair(x, 2)}),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_arguments_that_share_what_they_hold_are_looked_at_once(shape: str) -> None:
    """Sixty levels have 2**60 ways to the innermost value."""

    def made(innermost: object) -> object:
        x: Any = (innermost,)
        for _ in range(60):
            x = SHAPES[shape](x)
        return x

    program = Program()
    digests = [arguments_digest((made(n),), {}, program, None) for n in (1, 1, 2)]
    assert digests[0] == digests[1] != digests[2]
    assert not _payload._is_plain((made(1),))


def test_large_values_that_come_often_are_read_once() -> None:
    """Here each of them comes a thousand times."""
    program = Program()
    for large in (
        "x" * 3_000_000,
        b"x" * 3_000_000,
        tuple(range(100_000)),
        frozenset(range(100_000)),
        ("x" * 3_000_000,),
        (*range(100_000), []),
        frozenset({(n,) for n in range(10_000)}),
    ):
        many: list[Any] = [large] * 1000
        assert digest_of(many, program) != digest_of([*many, large], program)


def test_large_text_has_one_name_whichever_object_it_is() -> None:
    program = Program()
    one, other = ["".join(["x"] * 100_000) for _ in range(2)]
    assert one is not other
    assert digest_of([one, [one]], program) == digest_of([one, [other]], program)
    assert digest_of([one, []], program) != digest_of([one.encode(), []], program)


def test_graph_whose_nodes_are_in_each_others_sets_has_a_name() -> None:
    """Sets lie in another order each time; one edge more is another graph."""

    def graph(count: int, more: int, is_named: bool) -> Node:
        picked = random.Random(1)
        edges = [(picked.randrange(count), picked.randrange(count)) for _ in range(3 * count)]
        edges.append((3, more))
        nodes = {n: Node(n if is_named else "") for n in random.sample(range(count), count)}
        for one, other in random.sample(edges, len(edges)):
            nodes[one].neighbours.add(nodes[other])
            nodes[other].neighbours.add(nodes[one])
        return nodes[0]

    program = Program()
    for is_named in (True, False):
        digests = [digest_of(graph(60, more, is_named), program) for more in (8, 8, 8, 9)]
        assert len(set(digests[:3])) == 1
        assert digests[3] != digests[0]


def test_set_of_a_class_of_ones_own_is_the_same_in_whatever_order() -> None:
    class Own(set[Any]):
        pass

    program = Program()
    names = [f"name {n}" for n in range(8)]
    one, other = Own(names), Own(dict.fromkeys(reversed(names)))
    one.add(("a",))
    other.add(("a",))
    order = [Own(dict.fromkeys(random.sample(names, 8), 0) | {("a",): 0}) for _ in range(20)]
    assert {digest_of([each], program) for each in (one, other, *order)} == {
        digest_of([one], program)
    }
    assert digest_of([one], program) != digest_of([set(one)], program)
    assert digest_of([one], program) != digest_of([Own(names)], program)


def test_namespace_of_a_function_is_an_argument_like_any_other() -> None:
    """What the function does not read of it counts."""
    program = Program()

    def digest(unread: int) -> bytes:
        namespace: dict[str, Any] = {"read": 1, "unread": unread}
        fn = types.FunctionType(compile("read", "<text>", "eval"), namespace)
        return digest_of((fn, namespace), program)

    assert digest(1) == digest(1) != digest(2)
