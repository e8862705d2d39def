"""``Ref``: a handle to a value that is in the client's store or on a worker."""

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
    """A handle to a value that was put into an executor, or that stays on the worker that made it.

    ``BatchExecutor.put()`` returns one, and a task with ``with_options(keep=True)`` has one as its
    result. A call whose arguments contain a ``Ref``, however deep, receives the value instead. The
    same holds for arguments that are bound by ``functools.partial``, and for a method's object.
    In a function's closure or globals, or in an initializer's arguments, it stays a ``Ref``: call
    ``get()`` there. The value is freed when no ``Ref`` to it is left.
    """

    __slots__ = ("__weakref__", "_digest", "_keeper", "_payload", "_value")

    def __init__(self, payload: Payload, keeper: Keeper | None) -> None:
        self._payload = payload
        self._keeper = keeper
        self._digest: bytes | None = None  # a journal identifies the value by it
        # In a worker: a tuple of the pickle's parts, or a list that holds the unpickled value.
        self._value: Any = None

    def get(self, timeout: float | None = None) -> T:
        """Return the value. In the client, each call returns a new copy.

        Args:
            timeout: Seconds to wait for a worker to send the value; ``None`` for no limit.

        Raises:
            RefLostError: If the worker that kept it is gone, and it cannot be computed again.
            TimeoutError: If the value did not arrive in time.
            PayloadError: If the value cannot be unpickled here.
        """
        keeper = self._keeper
        if keeper is None:
            loaded: T = self._load()
            return loaded
        return keeper.value_of(self._payload, timeout)  # type: ignore[no-any-return]

    @property
    def _is_gone(self) -> bool:
        """Whether the value is lost, and cannot be computed again."""
        return self._keeper is not None and self._keeper.is_gone(self._payload)

    def _load(self) -> Any:
        if type(self._value) is tuple:
            self._value = [load_nested(*self._value)]
        return self._value[0]

    @property
    def size(self) -> int:
        """Size of the pickled value in bytes."""
        return len(self._payload)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The pickle contains the value, because the process that unpickles it has no executor.
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
    """Stands for a payload that is in another process; only its size is known here."""

    def __init__(self, size: int) -> None:
        self._size = size

    def __len__(self) -> int:
        return self._size


def _came(head: bytes, numbers: bytes | None, size: int, *buffers: Any) -> Ref[Any]:
    """Make a handle in a worker, of a value that arrived pickled."""
    ref: Ref[Any] = Ref(_Size(size), None)  # type: ignore[arg-type]
    ref._value = (head, numbers, buffers) if numbers is not None else [pickle.loads(head)]
    return ref


def _remade(value: Any, size: int = 0) -> Ref[Any]:
    """Make a handle of a value that has been unpickled already."""
    ref: Ref[Any] = Ref(_Size(size), None)  # type: ignore[arg-type]
    ref._value = [value]
    return ref


Ref.__module__ = "cloudexec"
