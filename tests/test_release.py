"""What is installed along with the package, and no more: others' code runs with users' rights."""

from __future__ import annotations

import re
import tomllib
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

_ROOT = Path(__file__).parent.parent

ALLOWED = {
    # Ours, and what each of them brings along.
    "aiobotocore": {"aiohttp", "aioitertools", "botocore", "jmespath", "multidict",
                    "python-dateutil", "typing-extensions", "wrapt"},
    "aiohttp": {"aiohappyeyeballs", "aiosignal", "attrs", "frozenlist", "multidict", "propcache",
                "typing-extensions", "yarl"},
    "aioitertools": {"typing-extensions"},
    "aiosignal": {"frozenlist", "typing-extensions"},
    "botocore": {"jmespath", "python-dateutil", "urllib3"},
    "packaging": set(),
    "cffi": {"pycparser"},
    "click": set(),
    "cloudpickle": set(),
    "cryptography": {"cffi", "typing-extensions"},
    "grpcio": {"typing-extensions"},
    "markdown-it-py": {"mdurl"},
    "multidict": {"typing-extensions"},
    "protobuf": set(),
    "python-dateutil": {"six"},
    "rich": {"markdown-it-py", "pygments"},
    "tenacity": set(),
    "yarl": {"idna", "multidict", "propcache"},
}  # fmt: skip
"""Who may need whom. A new name here is code that users come to trust: look at it first."""


def _declared() -> list[Requirement]:
    project = tomllib.loads((_ROOT / "pyproject.toml").read_text())["project"]
    return [Requirement(each) for each in project["dependencies"]]


def _needs(name: str) -> set[str]:
    """Return what an installed package needs here, without its extras."""
    found = [Requirement(each) for each in requires(name) or ()]
    return {
        canonicalize_name(each.name)
        for each in found
        if each.marker is None or each.marker.evaluate({"extra": ""})
    }


def test_nothing_unexpected_is_installed_along() -> None:
    """Every package that comes with an installation without extras is one that we know of."""
    pending = {canonicalize_name(each.name) for each in _declared()}
    known = {*ALLOWED, *(name for names in ALLOWED.values() for name in names)}
    seen: set[str] = set()
    unexpected = set()
    while pending:
        name = pending.pop()
        seen.add(name)
        try:
            needs = _needs(name)
        except PackageNotFoundError:
            pytest.fail(f"{name} is not installed, though it is needed")
        unexpected |= {f"{name} -> {each}" for each in needs - ALLOWED.get(name, set())}
        pending |= needs - seen
    assert not unexpected
    assert seen <= known


def test_each_dependency_has_a_lower_bound_that_is_tested() -> None:
    """In the form in which ``.ci/run`` reads them, to install just these."""
    # What has a marker raises such a bound for some versions of Python.
    declared = [each for each in _declared() if each.marker is None]
    for each in declared:
        assert re.fullmatch(r"[a-z0-9]+", each.name), each
        lower = [spec.version for spec in each.specifier if spec.operator == ">="]
        assert len(lower) == 1, f"{each}: no lower bound, or several"
    text = (_ROOT / "pyproject.toml").read_text()
    listed = text.split("dependencies = [")[1].split("]")[0]
    read = re.findall(r'^    "([a-z0-9]*)>=([0-9.]*)[",]', listed, re.MULTILINE)
    assert len(read) == len(declared)
