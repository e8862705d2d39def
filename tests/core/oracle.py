"""The core's oracle: one digest of all decisions of the core in many simulated histories.

A change that only moves code must not change any decision. ``python -m tests.core.oracle`` runs the
histories of ``simulation``. For each event it hashes the event and its time, the facts and the
commands that answer it, and the next deadline. It prints a digest for each seed and a digest of all
these. Run it before and after a change, and compare the digests.

The digests depend only on the seeds and the decisions. They do not depend on the order of sets, on
addresses, on the clock, or on the names of fields and states.
"""

from __future__ import annotations

import argparse
import enum
import hashlib
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from simulation import Simulation

from cloudexec._core.commands import Command
from cloudexec._core.events import Event
from cloudexec._core.tasks import Task

__all__ = ["digest_of", "digest_of_all"]


def digest_of(seed: int) -> str:
    """Run one history, and return the digest of all decisions in it."""
    digest = hashlib.sha256()
    world = Simulation(seed)
    decide, facts = world.machine.handle, world.machine._decisions.facts

    def note(event: Event, now: float) -> list[Command]:
        said = " ".join(_spell(event))
        answer = decide(event, now)
        told = world.machine.take_facts()
        lines = [f"{now!r} {said}", *(" ".join(_spell(each)) for each in [*told, *answer])]
        lines.append(f"until {world.machine.next_deadline()!r}")
        digest.update("\n".join(lines).encode())
        facts.extend(told)
        return answer

    world.machine.handle = note  # type: ignore[method-assign]
    world.run()
    digest.update(repr(sorted(world.machine.counts.items())).encode())
    return digest.hexdigest()


def digest_of_all(digests: Iterable[str]) -> str:
    """Return one digest for several."""
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()


def _spell(value: Any) -> Iterator[str]:
    """Yield the parts of a value in a fixed order and form.

    Raises:
        TypeError: For a type that is not known to be the same in each process.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        yield repr(value)
    elif isinstance(value, Task):
        yield f"{value.number}/{value.lease}/{value.worker}/{value.lost}/{value.retries}"
    elif isinstance(value, enum.Enum):
        yield str(value.value)
    elif isinstance(value, (list, tuple)):
        yield "["
        for each in value:
            yield from _spell(each)
        yield "]"
    elif type(value).__module__.startswith("cloudexec._core."):
        yield type(value).__name__
        for name in value.__slots__:
            yield from _spell(getattr(value, name))
    else:
        raise TypeError(f"no digest of a {type(value).__name__}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.core.oracle", description=__doc__)
    parser.add_argument("--seeds", type=int, default=40, help="how many histories to play")
    parser.add_argument("--first", type=int, default=0, help="the seed of the first one")
    options = parser.parse_args()
    digests = []
    for seed in range(options.first, options.first + options.seeds):
        digests.append(digest_of(seed))
        print(f"seed {seed}  {digests[-1]}", flush=True)
    print(f"all  {digest_of_all(digests)}")


if __name__ == "__main__":
    main()
