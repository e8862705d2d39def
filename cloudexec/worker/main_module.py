"""``__main__`` in a process that runs tasks: a mirror of the client's script.

It begins empty. What tasks need of the script is bound in it as the client sends it, and stays with
all that tasks make of it, until the client sends another definition of the same name.
"""

from __future__ import annotations

import functools
import pickle
import sys
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any

from cloudexec import _main, _payload

__all__ = ["Definition", "MainModule", "ResultPickler"]


class _Main(ModuleType):
    """The module. What the script imports, and no task names, is imported late."""

    __slots__ = ("_late",)
    _late: dict[str, Callable[[], None]]

    def __getattr__(self, name: str) -> Any:
        bind = self._late.pop(name, None)
        if bind is None:
            raise AttributeError(f"module '__main__' has no attribute {name!r}")
        bind()
        return self.__dict__[name]


class Definition:
    """What the script has under some names, as the client has sent it.

    Args:
        number: The client's, of this definition.
        names: What it binds.
        module: The module that this is, or comes from, if it is not the script's own.
        load: Unpickles it with an unpickler of this class.
    """

    __slots__ = ("_load", "module", "names", "number")

    def __init__(
        self,
        number: int,
        names: list[str],
        module: str,
        load: Callable[[type[pickle.Unpickler]], dict[str, Any]],
    ) -> None:
        self.number = number
        self.names = names
        self.module = module
        self._load = load

    def load(self) -> dict[str, Any]:
        return self._load(_Unpickler)


class _Unpickler(pickle.Unpickler):
    """Takes what a definition refers to from the module."""

    def persistent_load(self, name: Any) -> Any:
        return _main.namespace()[name]


class MainModule:
    """The mirror of the script in this process; there is one.

    Attributes:
        generation: Counts what was bound.
        bound: What the client has sent, by name.
    """

    def __init__(self, attributes: dict[str, Any]) -> None:
        self.module = _Main("__main__")
        self.module._late = {}
        vars(self.module).update(attributes)
        self.module.__dict__.setdefault("__builtins__", __builtins__)
        self.generation = 0
        self.bound: dict[str, Any] = {}
        self._numbers: dict[str, int] = {}  # of the definitions that are bound, by name
        self._tried: set[int] = set()
        self._before = sys.modules["__main__"]  # its functions may still run
        sys.modules["__main__"] = sys.modules["__mp_main__"] = self.module

    def bind_all(self, number: int, definitions: Iterable[Definition]) -> None:
        """Bind, once, what may be needed: what cannot be had is left out.

        Args:
            number: Of them together.
            definitions: Each behind those that it refers to.
        """
        if number in self._tried:
            return
        self._tried.add(number)
        for each in definitions:
            if each.module and each.module not in sys.modules:
                self.module._late[each.names[0]] = functools.partial(self.bind, each)
                continue
            try:
                self.bind(each)
            except Exception:
                continue  # a task that needs it fails, with the reason

    def bind(self, definition: Definition) -> None:
        """Bind a definition to its names, unless it is what is bound to them.

        Raises:
            BaseException: Whatever unpickling raises.
        """
        names, numbers = definition.names, self._numbers
        number = definition.number
        if all(numbers.get(name) == number for name in names):
            return
        space = vars(self.module)
        values: dict[str, Any] | None = None
        for name in names:
            if name not in numbers and name in space:
                # An initializer, or a task, has bound it before the client has sent it.
                numbers[name] = number
                continue
            if values is None:
                values = definition.load()
            numbers[name] = number
            self.module._late.pop(name, None)
            if name in values:
                self.bound[name] = space[name] = values[name]
        self.generation += 1


class ResultPickler(_payload.Pickler):
    """Names what the client has in its script; what tasks have put there travels by value."""

    main: MainModule

    def refers(self, name: str) -> bool:
        bound = self.main.bound
        return name in bound and bound[name] is vars(self.main.module).get(name)
