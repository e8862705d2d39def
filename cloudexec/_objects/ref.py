"""Handles to values that are somewhere else."""

from __future__ import annotations

import pickle
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from cloudexec._records import load_nested

if TYPE_CHECKING:
    from cloudexec._records import Payload

__all__ = ["Ref"]

T = TypeVar("T")


class Keeper(Protocol):
    """What knows, in the client, where values are; see ``_server.keeper``."""

    def value_of(self, payload: Payload, timeout: float | None) -> Any:
        """Return a value, once it is here."""

    def is_gone(self, payload: Payload) -> bool:
        """Whether a value is lost, and cannot be made again."""

    def parts_of(self, payload: Payload) -> tuple[bytes, bytes | None, list[Any]]:
        """Return a value's head, what it calls its buffers, and these."""


class Ref(Generic[T]):
    """A handle to a value that was put into an executor, or is kept where a task made it.

    Made by ``BatchExecutor.put()``, and as the result of tasks with ``with_options(keep=True)``.
    Anywhere among the arguments of a call, however deep, the call receives its value in its place;
    also where they are bound to what is called, by ``functools.partial`` or as a method's object.
    In the closure or a global of a function, or in an initializer's arguments, it stays a ``Ref``:
    call ``get()`` there. When nobody refers to it any more, what it stands for is freed.
    """

    __slots__ = ("__weakref__", "_digest", "_keeper", "_payload", "_value")

    def __init__(self, payload: Payload, keeper: Keeper | None) -> None:
        self._payload = payload
        self._keeper = keeper
        self._digest: bytes | None = None  # what a journal knows the value by
        self._value: Any = None  # in a worker: as it came

    def get(self, timeout: float | None = None) -> T:
        """Return the value; in the client a copy of one's own each time.

        Args:
            timeout: Seconds to wait for a worker to hand it over; ``None``: no limit.

        Raises:
            RefLostError: If the worker that kept it is gone, and it cannot be made again.
            TimeoutError: If it did not come in time.
            PayloadError: If it cannot be unpickled here.
        """
        keeper = self._keeper
        if keeper is None:
            loaded: T = self._load()
            return loaded
        return keeper.value_of(self._payload, timeout)  # type: ignore[no-any-return]

    @property
    def _is_gone(self) -> bool:
        """Whether what it stands for is lost, and cannot be made again."""
        return self._keeper is not None and self._keeper.is_gone(self._payload)

    def _load(self) -> Any:
        if type(self._value) is tuple:
            self._value = [load_nested(*self._value)]
        return self._value[0]

    @property
    def size(self) -> int:
        """Bytes that the value has when it is pickled."""
        return len(self._payload)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # With its value: whoever unpickles it need not know this executor.
        keeper = self._keeper
        if keeper is None:
            return _remade, (self._load(), self.size)
        head, numbers, views = keeper.parts_of(self._payload)
        hand_over: Any = pickle.PickleBuffer if protocol >= 5 else bytes
        return _came, (head, numbers, self.size, *map(hand_over, views))

    def __copy__(self) -> Ref[T]:
        return self

    def __deepcopy__(self, memo: Any) -> Ref[T]:
        return self

    def __repr__(self) -> str:
        return f"<Ref of {self.size} bytes>"


class _Size:
    """Stands for a payload that is elsewhere."""

    def __init__(self, size: int) -> None:
        self._size = size

    def __len__(self) -> int:
        return self._size


def _came(head: bytes, numbers: bytes | None, size: int, *buffers: Any) -> Ref[Any]:
    """Make a handle in a worker."""
    ref: Ref[Any] = Ref(_Size(size), None)  # type: ignore[arg-type]
    ref._value = (head, numbers, buffers) if numbers is not None else [pickle.loads(head)]
    return ref


def _remade(value: Any, size: int = 0) -> Ref[Any]:
    """Make a handle of a value that was loaded already."""
    ref: Ref[Any] = Ref(_Size(size), None)  # type: ignore[arg-type]
    ref._value = [value]
    return ref


Ref.__module__ = "cloudexec"
