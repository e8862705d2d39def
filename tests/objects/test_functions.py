"""Which functions are pickled once, and which with each call because their state may change."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import cloudpickle
import pytest

from cloudexec._functions import Function, FunctionTable
from cloudexec._objects.options import Limits
from cloudexec._objects.store import BlobStore


@pytest.fixture
def table() -> FunctionTable:
    return FunctionTable(lambda _: None, BlobStore(Limits(2**20, 0, "", None), shared=True))


@pytest.fixture
def by_value() -> Iterator[types.ModuleType]:
    """A module that can be imported, and was registered to travel by value."""
    module = types.ModuleType("registered_by_value")
    exec(
        "LIMIT = 3\nITEMS = []\ndef helper(n):\n    return n + LIMIT\n"
        "def fn(n):\n    return helper(n)\ndef reads(n):\n    return ITEMS\n",
        module.__dict__,
    )
    module.__spec__ = types.SimpleNamespace(name=module.__name__)  # type: ignore[assignment]
    sys.modules[module.__name__] = module
    cloudpickle.register_pickle_by_value(module)
    yield module
    cloudpickle.unregister_pickle_by_value(module)
    del sys.modules[module.__name__]


def script(source: str) -> dict[str, Any]:
    """Run something as if it stood in a script."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(source, "<script>", "exec", dont_inherit=True), namespace)
    return namespace


def named(table: FunctionTable, fn: Callable[..., Any]) -> Function | None:
    """Return what two calls one after the other name, if it is one pickle for both."""
    one, _, _ = table.call(fn, (1,), {})
    two, _, _ = table.call(fn, (1,), {})
    return one if one is two and one is not None and one.pickle and not one.fresh else None


KEPT = {
    "calls another": "def helper(n):\n    return n\ndef fn(n):\n    return helper(n)",
    "calls itself": "def fn(n):\n    return n and fn(n - 1)",
    "call each other": "def other(n):\n    return n and fn(n)\ndef fn(n):\n    return other(n - 1)",
    "another in its closure": (
        "def make():\n    def helper(n):\n        return n\n    def fn(n):\n"
        "        return helper(n)\n    return fn\nfn = make()"
    ),
    "another as a default": "def helper(n):\n    return n\ndef fn(n, f=helper):\n    return f(n)",
    "keyword-only default": "def fn(n, *, scale=2.0):\n    return n * scale",
    "annotated": (
        "import typing, collections.abc as abc\n"
        "T = typing.TypeVar('T')\n"
        "def fn(n: list[int] | None, f: abc.Callable[[int], str], g: typing.Callable[..., T], "
        "t: typing.Annotated[int, 'm']) -> typing.Optional[dict[str, typing.Any]]:\n    return n"
    ),
    "constants": (
        "import datetime, decimal, fractions, logging, pathlib, re, uuid\nimport numpy as np\n"
        "from numpy import exp\n"
        "A = re.compile('a')\nB = decimal.Decimal(1)\nC = fractions.Fraction(1)\n"
        "D = pathlib.Path('x')\nE = datetime.date(2000, 1, 1)\nF = frozenset({1, 'a'})\n"
        "G = range(9)\nH = np.float64(1)\nI = logging.getLogger('a.b')\nJ = uuid.UUID(int=1)\n"
        "def fn(n):\n    return A, B, C, D, E, F, G, H, I, J, exp, n"
    ),
    "an attribute named like a global": "data = []\ndef fn(n):\n    return n.data",
    "sets attributes of what it is given": "def fn(n):\n    n.x = 1\n    return n",
}

NOT_KEPT = {
    "a list": "ITEMS = []\ndef fn(n):\n    return ITEMS",
    "a list of another's": "L = []\ndef helper():\n    return L\ndef fn(n):\n    return helper()",
    "a list in a frozen set's tuple": (
        "class Hashable(list):\n    __hash__ = object.__hash__\n"
        "F = frozenset({(Hashable(),)})\ndef fn(n):\n    return F"
    ),
    "a class": "class Config:\n    rate = 1\ndef fn(n):\n    return Config.rate",
    "an annotation": "class Config:\n    rate = 1\ndef fn(n: list[Config]):\n    return n",
    "attributes": "def fn(n):\n    return n\nfn.rate = 1",
    "attributes of another": "def f(n):\n    return n\nf.rate = 1\ndef fn(n):\n    return f(n)",
    "sets its own attributes": "def fn(n):\n    f = fn\n    f.x = n\n    return f.x",
    "sets its own by name": "def fn(n):\n    setattr(fn, 'x', n)",
    "another that rebinds a global": (
        "c = 0\ndef helper():\n    global c\n    c += 1\ndef fn(n):\n    return helper()"
    ),
    "rebinds a global by its name": "c = 0\ndef fn(n):\n    globals()['c'] = n",
    "a method of an object": "import random\nf = random.random\ndef fn(n):\n    return f()",
    "called like something immutable": (
        "class Decimal(list):\n    pass\nDecimal.__module__ = 'decimal'\nD = Decimal()\n"
        "def fn(n):\n    return D"
    ),
}


@pytest.mark.parametrize("what", KEPT)
def test_a_function_whose_whole_state_is_immutable_is_pickled_once(
    table: FunctionTable, what: str
) -> None:
    """And the functions that it names, defined in the same script, with it."""
    assert named(table, script(KEPT[what])["fn"]) is not None


def test_an_object_that_has_the_name_of_a_function_takes_its_state_along(
    table: FunctionTable, by_value: types.ModuleType
) -> None:
    """As one that decorates a function of a module: a pickle of it is not its name alone."""
    cloudpickle.unregister_pickle_by_value(by_value)
    try:
        exec(
            "import functools\nclass Counted:\n    def __init__(self, fn):\n"
            "        functools.update_wrapper(self, fn)\n    def __call__(self, n):\n"
            "        return n\n@Counted\ndef counted(n):\n    return n\n",
            by_value.__dict__,
        )
        namespace = script("def fn(n):\n    return counted(n)")
        namespace["counted"] = by_value.counted
        assert named(table, namespace["fn"]) is None
    finally:
        cloudpickle.register_pickle_by_value(by_value)


@pytest.mark.parametrize("what", NOT_KEPT)
def test_a_function_whose_state_may_change_is_pickled_with_each_call(
    table: FunctionTable, what: str
) -> None:
    """Nobody could see that it has changed."""
    assert named(table, script(NOT_KEPT[what])["fn"]) is None


def test_a_module_by_value_is_looked_at_in_the_same_way(
    table: FunctionTable, by_value: types.ModuleType
) -> None:
    """Its functions are not pickled with each call, unless they read what may change."""
    assert named(table, by_value.fn) is not None
    assert named(table, by_value.reads) is None
    namespace = script("def fn(n):\n    return helper(n)\ndef all(n):\n    return module.fn(n)")
    namespace.update(helper=by_value.helper, module=by_value)
    assert named(table, namespace["fn"]) is not None
    assert named(table, namespace["all"]) is None


@pytest.mark.parametrize(
    "change",
    [
        "helper.__code__ = (lambda n: -n).__code__",
        "helper.__defaults__ = (5,)",
        "helper.__kwdefaults__['k'] = 5",
        "helper.__kwdefaults__ = None",
        "helper.__annotations__['n'] = 'str'",
        "helper.__annotations__['o'] = True",
        "helper.__doc__ = 'another'",
        "helper.__name__ = 'another'",
        "helper.__qualname__ = 'another'",
        "helper.rate = 2",
        "LIMIT = 4",
        "del LIMIT",
        "len = 4",
        "deeper = helper",
        "def deeper(n):\n    return n + LIMIT",
        "deeper.__closure__[0].cell_contents = 2",
        "helper = fn",
    ],
)
def test_a_change_of_what_it_calls_is_seen(table: FunctionTable, change: str) -> None:
    """Whatever changes, and however deep: the next call takes another pickle."""
    namespace = script(
        "LIMIT = 3\n"
        "def make():\n    c = 1\n    def deeper(n):\n        return n + LIMIT + c\n"
        "    return deeper\n"
        "deeper = make()\n"
        "def helper(n=1, *, k=2):\n    return deeper(n) + len([])\n"
        "def fn(n):\n    return helper(n)"
    )
    before = named(table, namespace["fn"])
    assert before is not None
    exec(change, namespace)
    after, _, _ = table.call(namespace["fn"], (1,), {})
    assert after is not before
