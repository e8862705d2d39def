"""Words the message that says why recorded results are not used: the program has changed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from cloudexec._journal.program import Manifest

__all__ = ["differences", "explained", "latest"]

_NAMED = 3
"""Number of files that a message names; it only counts the others."""


def latest(programs: Mapping[bytes, bytes], among: Mapping[bytes, int]) -> Manifest | None:
    """Return the manifest of the program that recorded results last, or ``None``.

    Args:
        programs: The manifests of all known programs, as JSON, by digest.
        among: The digests of the programs that have results.
    """
    found: Manifest | None = None
    for digest in among:
        try:
            manifest: Any = json.loads(programs[digest])
            manifest["modules"], manifest["distributions"], manifest["python"]
            if found is None or manifest["at"] > found["at"]:
                found = manifest
        except (KeyError, ValueError, TypeError):
            continue
    return found


def explained(old: Manifest | None, new: Manifest, count: int) -> str:
    """Return a sentence that says what has changed and how many results are therefore not used.

    Args:
        old: The program that recorded the results; ``None`` if it is not in the journal, because an
            older cloudexec wrote it.
        new: The program that runs now.
        count: Number of results that are not used.
    """
    results = f"{count} result{'' if count == 1 else 's'}"
    cost = "it is run again" if count == 1 else "these are run again"
    if old is None:
        return f"another version of cloudexec recorded {results}; {cost}"
    was = "was" if count == 1 else "were"
    return f"{differences(old, new)} since {results} {was} recorded; {cost}"


def differences(old: Manifest, new: Manifest) -> str:
    """Return a list, in words, of the differences between two programs."""
    reasons: list[str] = []
    if old["python"] != new["python"]:
        reasons.append(f"Python was {old['python']} and is {new['python']}")
    before, now = old["modules"], new["modules"]
    shared = before.keys() & now.keys()
    script = before.get("__main__", [""])[0], now.get("__main__", [""])[0]
    if script[0] != script[1] and all(script):
        shared -= {"__main__"}
        reasons.append(f"the script was {script[0]} and is {script[1]}")
    changed = [now[name][0] for name in sorted(shared) if before[name][1] != now[name][1]]
    reasons += _all_of(changed, "has changed", "have changed")
    reasons += _all_of(_only_in(now, before), "is new", "are new")
    reasons += _all_of(_only_in(before, now), "is no longer used", "are no longer used")
    before, now = old["distributions"], new["distributions"]
    reasons += [
        _changed(name, before.get(name), now.get(name))
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
    ][: 2 * _NAMED]
    return ", ".join(reasons) or "the rule by which calls are known has changed"


def _changed(name: str, before: str | None, now: str | None) -> str:
    if before is None:
        return f"{name} {now} is new"
    return (
        f"{name} {before} is no longer used" if now is None else f"{name} was {before} and is {now}"
    )


def _only_in(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    return [one[name][0] for name in sorted(one.keys() - other.keys())]


def _all_of(names: Sequence[str], does: str, do: str) -> list[str]:
    if not names:
        return []
    if len(names) == 1:
        return [f"{names[0]} {does}"]
    said = list(names[:_NAMED])
    if len(names) > _NAMED:
        said.append(f"{len(names) - _NAMED} more")
    return [f"{', '.join(said[:-1])} and {said[-1]} {do}"]
