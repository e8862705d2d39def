"""Finds globals of a script that share an object with a state of its own.

A change through one of these globals is seen through the other: a list that two objects hold, the
parameters of a model that an optimizer holds, or a variable that two functions have from the
function that has made them. Copies of the two globals must share it as well.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from types import CellType, FunctionType
from typing import Any

from cloudexec._fingerprints import rebinds_cells

__all__ = ["shared_by"]

_STANDARD = {
    "_io": {"BytesIO", "StringIO"},
    "_queue": {"SimpleQueue"},
    "_random": {"Random"},
    "_thread": {"RLock", "_local", "lock"},
    "array": {"array"},
    "builtins": {"bytearray", "dict", "list", "set"},
    "collections": {
        *("ChainMap", "Counter", "OrderedDict", "UserDict", "UserList", "defaultdict", "deque"),
    },
    "random": {"Random"},
    "types": {"SimpleNamespace"},
}
"""Types of the standard library whose objects have a state, by module."""
_ALL_OF = ("queue", "threading")
"""Modules of the standard library whose objects all have one."""
_NUMPY = {"ndarray", "Generator", "RandomState", "matrix"}


def shared_by(picklers: Iterable[Any]) -> tuple[int, int] | None:
    """Return the positions of two picklers that have written the same object with a state.

    The picklers must exist until this returns, so that all objects that they have met exist, too.
    """
    met = [[obj for _, obj in pickler.memo.copy().values()] for pickler in picklers]
    assigned = {
        id(cell)
        for objects in met
        for obj in objects
        if type(obj) is FunctionType and obj.__closure__ and rebinds_cells(obj.__code__)
        for cell in obj.__closure__
    }
    owners: dict[int, int] = {}
    for position, objects in enumerate(met):
        for obj in objects:
            kind = type(obj)
            if id(obj) in assigned if kind is CellType else _has_state(kind):
                owner = owners.setdefault(id(obj), position)
                if owner != position:
                    return owner, position
    return None


def _has_state(kind: type) -> bool:
    if issubclass(kind, (type, tuple, str, bytes, int, float)):
        return False
    module = kind.__module__
    top = module.partition(".")[0]
    if top == "numpy":
        return kind.__name__ in _NUMPY
    if top in sys.stdlib_module_names and top != "__main__":
        return module in _ALL_OF or kind.__name__ in _STANDARD.get(module, ())
    return True
