"""What a journal knows callables and modules by."""

from __future__ import annotations

import functools
import importlib
import operator
import os
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cloudexec._journal.keys import bare, digest_of, name_of
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
