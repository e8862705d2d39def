"""``__main__`` in a process that runs tasks: a mirror of the client's script.

It begins empty, or in a copy of the client as the script was when that was copied. Definitions of
the script that tasks need are bound in it as the client sends them. They stay, with all changes
that tasks make, until the client sends another one of the same name.
"""

from __future__ import annotations

import functools
import pickle
import sys
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any

from cloudexec import _main, _module_state, _payload
from cloudexec._errors import PayloadError

__all__ = ["Definition", "MainModule", "ResultPickler"]


_ABSENT = object()
_OF_A_RUN = ("__cached__", "__file__")
"""Attributes of the script's module that are not those of a new module."""


class _Main(ModuleType):
    """The module. Modules that the script imports, and no task names, are imported when used."""

    __slots__ = ()  # so that a module of the usual class can become one of this

    def __getattr__(self, name: str) -> Any:
        bind = _late.pop(name, None)
        if bind is None:
            raise AttributeError(f"module '__main__' has no attribute {name!r}")
        bind()
        return self.__dict__[name]


_late: dict[str, Callable[[], None]] = {}
"""What binds names to modules that are imported when they are used."""


class Definition:
    """A value that the script has under some names, as the client has sent it.

    Args:
        number: The client's number of this definition.
        names: The names that it binds.
        module: The module that it is or comes from; empty if it is the script's own.
        load: Unpickles it with an unpickler of the given class.
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
    """Looks up what a definition refers to in the module."""

    def persistent_load(self, name: Any) -> Any:
        if isinstance(name, tuple):  # an object that a module of the user's own has
            return _module_state.take(name, b"")
        return _main.namespace()[name]


class MainModule:
    """The mirror of the script in this process; there is only one.

    Attributes:
        generation: Counts the definitions that were bound.
        bound: The values that the client has sent, by name.
        is_near: Whether this is the client's machine.
    """

    def __init__(self, attributes: dict[str, Any]) -> None:
        self._before = sys.modules["__main__"]  # kept alive, as its functions may still run
        former = vars(self._before).get("__former__")
        if former is None:
            self.module = _Main("__main__")
            self._inherited: dict[str, Any] = {}
        else:
            former.__class__ = _Main
            self.module = former
            for name in _OF_A_RUN:
                vars(former).pop(name, None)
            vars(former).update(vars(ModuleType("__main__")))
            # Kept alive, as a finalizer would remove what belongs to the client.
            self._inherited = _main.former.space = dict(vars(former))
        vars(self.module).update(attributes)
        self.module.__dict__.setdefault("__builtins__", __builtins__)
        self.generation = 0
        self.is_near = False
        self.bound: dict[str, Any] = {}
        self._numbers: dict[str, int] = {}  # by name: the number of the definition that is bound
        self._tried: set[int] = set()
        sys.modules["__main__"] = sys.modules["__mp_main__"] = self.module

    def bind_all(self, number: int, definitions: Iterable[Definition]) -> None:
        """Bind definitions that may be needed, once, and leave out those that cannot be loaded.

        Args:
            number: The client's number of these definitions together.
            definitions: The definitions, each after those that it refers to.
        """
        if number in self._tried:
            return
        self._tried.add(number)
        for each in definitions:
            if each.module and each.module not in sys.modules:
                _late[each.names[0]] = functools.partial(self.bind, each)
                continue
            try:
                self.bind(each, is_needed=False)
            except Exception:
                continue  # a task that needs the definition fails with the reason

    def bind(self, definition: Definition, *, is_needed: bool = True) -> None:
        """Bind a definition to its names, unless it is bound already.

        Args:
            definition: The definition.
            is_needed: Whether to run the script once more for what cannot be unpickled.

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
            if name not in numbers and space.get(name, _ABSENT) is not self._inherited.get(
                name, _ABSENT
            ):
                # An initializer or a task has bound the name before the client sent it: keep that.
                numbers[name] = number
                continue
            if values is None:
                try:
                    values = definition.load()
                except (PayloadError, ConnectionError):
                    raise
                except Exception:
                    values = self._of_script(names) if is_needed and self.is_near else None
                    if values is None:
                        raise
            numbers[name] = number
            _late.pop(name, None)
            if name in values:
                self.bound[name] = space[name] = values[name]
        self.generation += 1

    def _of_script(self, names: list[str]) -> dict[str, Any] | None:
        """Return globals as the script makes them here, or ``None``.

        Some objects can be pickled and not unpickled. A process pool never pickles a global.
        """
        if all(name in self._inherited for name in names):
            return {name: self._inherited[name] for name in names}
        way, _ = _main.way_to_script()
        if way is None:
            return None
        kinds = dict.fromkeys(names, "object that cannot be unpickled")
        try:
            return _main.Again(*way, kinds).take()
        except Exception:
            return None


class ResultPickler(_payload.Pickler):
    """Pickles values of the client's script by name, and values that tasks put there by value."""

    main: MainModule

    def refers(self, name: str) -> bool:
        bound = self.main.bound
        return name in bound and bound[name] is vars(self.main.module).get(name)
