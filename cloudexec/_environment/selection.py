"""Which distributions a worker needs: by requirements and markers as they are on its platform."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from packaging.utils import canonicalize_name

from cloudexec._environment.inventory import Inventory
from cloudexec._environment.target import Target

__all__ = ["Need", "Selection", "merged", "needs_of", "select"]

_TOOLS = frozenset({"pip", "uv", "wheel"})
"""They install, and a worker installs nothing."""
_EXTRA = re.compile(r"""extra\s*==\s*["']([^"']+)["']""")


@dataclass(slots=True)
class Selection:
    """What the workers are to have."""

    here: list[str] = field(default_factory=list)
    """Names of what is installed here."""
    wanted: dict[str, str] = field(default_factory=dict)
    """Requirements of what is not installed here, and required there, by name."""


class Need(NamedTuple):
    """One requirement of a distribution."""

    name: str
    extras: tuple[str, ...]
    """Of what is required."""
    when: frozenset[str]
    """Extras of the distribution that each require it; the empty string: it always does."""
    text: str


def select(
    inventory: Inventory,
    target: Target,
    *,
    exclude: Iterable[str] = (),
    required: Mapping[str, str] | None = None,
) -> Selection:
    """Find out what workers need of what is installed, and beyond it.

    Args:
        inventory: What is installed.
        target: What the workers run on.
        exclude: Names that are left out, even if other packages require them.
        required: Requirements of what is needed, also if excluded, by name.
    """
    required = required or {}
    installed = inventory.distributions
    requires = {name: each.requires for name, each in installed.items()}
    here = _here()
    needs_here = {name: _needs(each, here) for name, each in requires.items()}
    needs_there = {name: _needs(each, target.markers()) for name, each in requires.items()}
    unwanted: set[str] = {canonicalize_name(name) for name in exclude}
    unwanted -= required.keys()
    needed = {
        need.name
        for name, needs in needs_here.items()
        for need in needs
        if "" in need.when and need.name != name
    }
    roots = {
        name
        for name, each in installed.items()
        if each.is_requested or each.source is not None or name not in needed
    }
    ignored = _TOOLS | {name for name, each in installed.items() if each.is_of_system}
    roots = roots - ignored | (required.keys() & installed.keys())
    reached, _ = _reach(roots, needs_here, set())
    # Such as two that require each other, or what only an extra requires that nobody asked for.
    roots |= installed.keys() - reached - ignored
    _, missing_here = _reach(roots, needs_here, set())
    kept, missing = _reach(roots, needs_there, unwanted)
    return Selection(
        here=sorted(kept),
        # What is missing here, too, is missing on purpose.
        wanted={
            **{
                name: text
                for name, text in sorted(missing.items())
                if name not in missing_here and name not in unwanted
            },
            **{name: text for name, text in required.items() if name not in installed},
        },
    )


def _reach(
    roots: Iterable[str], needs: Mapping[str, list[Need]], unwanted: set[str]
) -> tuple[set[str], dict[str, str]]:
    """Return the names that the roots require, and by name the requirements that nothing meets."""
    reached: set[str] = set()
    missing: dict[str, list[str]] = {}
    pending = [(name, "") for name in roots]
    seen: set[tuple[str, str]] = set()
    while pending:
        name, extra = pending.pop()
        if name in unwanted or (name, extra) in seen:
            continue
        seen.add((name, extra))
        reached.add(name)
        for need in needs[name]:
            if need.when.isdisjoint(("", extra)):
                continue
            if need.name not in needs:
                missing.setdefault(need.name, []).append(need.text)
                continue
            pending += [(need.name, each) for each in ("", *need.extras)]
    return reached, {name: merged(texts) for name, texts in missing.items()}


def _needs(requires: Iterable[str], environment: Mapping[str, str]) -> list[Need]:
    from packaging.requirements import InvalidRequirement, Requirement

    found = []
    for text in requires:
        try:
            requirement = Requirement(text)
        except InvalidRequirement:
            continue  # an old package, which was installed all the same
        when = frozenset({""})
        if requirement.marker is not None:
            extras = ["", *_EXTRA.findall(str(requirement.marker))]
            when = frozenset(
                canonicalize_name(extra)
                for extra in extras
                if requirement.marker.evaluate({**environment, "extra": extra})
            )
            if not when:
                continue
        found.append(
            Need(
                canonicalize_name(requirement.name),
                tuple(canonicalize_name(extra) for extra in sorted(requirement.extras)),
                when,
                str(requirement).partition(";")[0].strip(),
            )
        )
    return found


def needs_of(requires: Iterable[str], target: Target | None) -> list[Need]:
    """Return what a distribution requires.

    Args:
        requires: From its metadata.
        target: Where; ``None``: here.
    """
    return _needs(requires, _here() if target is None else target.markers())


def merged(texts: Iterable[str]) -> str:
    """Return one requirement, without a marker, for all that several of one name ask for."""
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet

    first, *rest = [Requirement(text) for text in dict.fromkeys(texts)]
    for each in rest:
        first.extras |= each.extras
        first.specifier &= each.specifier
        first.url = first.url or each.url
    if first.url:
        first.specifier = SpecifierSet()  # It cannot have both.
    first.marker = None
    return str(first)


def _here() -> dict[str, str]:
    from packaging.markers import default_environment

    return {key: str(value) for key, value in default_environment().items()}
