"""The callables that tasks name, and which of them each slot knows."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import TYPE_CHECKING

from cloudexec import _plain_json
from cloudexec._record_class import record
from cloudexec.worker.blobs import BlobCache
from cloudexec.worker.child import Child
from cloudexec.worker.frames import FUNCTION, HEADER, Kind

if TYPE_CHECKING:
    from cloudexec._proto import tasks_pb2 as pb

__all__ = ["Function", "Functions"]


@record(frozen=False)
class Function:
    """A callable's pickle; if it is large, the pickle's head and the blobs that it refers to.

    It may also be a definition that callables need: a global of the script, or a module.

    Attributes:
        needs: Numbers of the definitions that must be loaded before.
        globals: Names that this definition binds in the script; empty for a callable.
        module: The module's name, if this definition is a module.
        all_blobs: The blobs of this and of all that it needs.
    """

    pickle: bytes
    fresh: bool
    blobs: tuple[int, ...] = ()
    needs: tuple[int, ...] = ()
    globals: tuple[str, ...] = ()
    module: str = ""
    all_blobs: tuple[int, ...] = ()


class Functions:
    """The callables that tasks may name.

    Args:
        blobs: The blobs that callables refer to.
    """

    def __init__(self, blobs: BlobCache) -> None:
        self._blobs = blobs
        self.known: dict[int, Function] = {}
        """By number; only this class writes it."""

    def add(self, functions: Iterable[pb.Function]) -> None:
        """Add callables; each must come after the definitions that it needs."""
        known = self.known
        for each in functions:
            needs, blobs = tuple(each.needs), tuple(each.blobs)
            below = [known[need].all_blobs for need in needs if need in known]
            known[each.number] = Function(
                each.pickle,
                each.fresh,
                blobs,
                needs,
                tuple(each.globals),
                each.module,
                tuple(dict.fromkeys(itertools.chain(blobs, *below))),
            )

    def forget(self, numbers: list[int], slots: Iterable[Child]) -> None:
        """Drop callables that no task will name again, also in the slots that know them."""
        slots = list(slots)
        for number in numbers:
            self.known.pop(number, None)
            for slot in slots:
                if number in slot.functions and not slot.is_over:
                    slot.functions.discard(number)
                    slot.write(HEADER.pack(Kind.FORGET, 0, number))

    def send(self, slot: Child, number: int) -> None:
        """Send a callable and the definitions that it needs to a slot that does not know them."""
        function = self.known[number]
        slot.functions.add(number)
        for need in function.needs:
            if need not in slot.functions and need in self.known:
                self.send(slot, need)
        pickle = function.pickle
        if function.blobs:
            pickle = self._blobs.places(function.blobs) + pickle
        about = b""
        if function.needs or function.globals:
            about = _plain_json.encode([function.needs, function.globals, function.module])
        flags = FUNCTION.pack(function.fresh, bool(function.blobs), len(about))
        header = HEADER.pack(Kind.FUNCTION, len(flags) + len(about) + len(pickle), number)
        slot.write(b"".join((header, flags, about, pickle)))

    def all_but_needed(self, number: int) -> list[int]:
        """Return the numbers of all callables except this one and those that it needs."""
        kept = {number}
        for each in sorted(self.known, reverse=True):  # a callable comes before those it needs
            if each in kept:
                kept.update(self.known[each].needs)
        return [each for each in self.known if each not in kept]
