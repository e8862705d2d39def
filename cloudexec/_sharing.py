"""Sends objects of ``multiprocessing`` that processes share to workers on this machine.

Locks, values, queues and pipe ends refer to open files of the process that made them. The children
of that process inherit the files, or get them when they start. Slots, the processes that run tasks,
are not children of the client. So the pickle of such an object has a random number in place of each
file, and the slot that unpickles it asks the client for the file of that number over the direct
channel (``_direct``). The client keeps the file open as long as the payload that refers to it
exists, as the program may close the original earlier.

All locks are made of semaphores. A semaphore has a name, or, where processes are forked by default,
is a page of memory without a name. Such a page is replaced in place by a page of a file.
"""

from __future__ import annotations

import functools
import mmap
import operator
import os
import secrets
import socket
import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from multiprocessing import context
from multiprocessing.reduction import ForkingPickler
from types import MethodType
from typing import Any

from cloudexec import _direct
from cloudexec._errors import PayloadError
from cloudexec._forked import templates

__all__ = [
    "NotSharedError",
    "SharedFile",
    "is_shared_kind",
    "reduce_shared",
    "ask",
    "send_file",
    "take_file",
    "where",
]


class SharedFile:
    """An open file of this process, which slots may request while this object exists."""

    __slots__ = ("__weakref__", "fd", "number")

    def __init__(self, fd: int) -> None:
        self.fd = os.dup(fd)
        self.number = secrets.randbits(64)
        _files[self.number] = self

    def __del__(self) -> None:
        os.close(self.fd)


_files: weakref.WeakValueDictionary[int, SharedFile] = weakref.WeakValueDictionary()
_kept: weakref.WeakKeyDictionary[Any, SharedFile] = weakref.WeakKeyDictionary()
"""Files that stay open as long as the object that they belong to exists."""

_MODULES = (
    "multiprocessing.managers",
    "multiprocessing.synchronize",
    "multiprocessing.queues",
    "multiprocessing.sharedctypes",
    "tqdm.std",
)
_reducers: dict[type, Callable[[Any], Any]] = ForkingPickler._extra_reducers  # type: ignore[attr-defined]
_NOT_FILES: tuple[type, ...] = (MethodType, type(list.append), type(int.__add__), functools.partial)
"""Kinds that have such a reducer, and are pickled as always."""


def is_shared_kind(kind: type) -> bool:
    """Return whether objects of a type refer to a resource that processes share."""
    return (
        kind.__module__ in _MODULES
        or getattr(kind.__base__, "__module__", "") in _MODULES
        or (kind in _reducers and kind not in _NOT_FILES)
    )


class NotSharedError(PayloadError):
    """An object cannot be shared; the position of the object is added to the message later."""

    def __init__(self, message: str, element: object) -> None:
        super().__init__(message)
        self.element = element


def reduce_shared(obj: Any, files: list[object] | None) -> Any:
    """Pickle an object that processes share.

    Args:
        obj: An object whose type ``is_shared_kind``.
        files: List to which the files are appended that must be kept open, and the proxies of
            managers, whose objects end with the last proxy; ``None`` if the process that unpickles
            the object has no access to files of this one.

    Raises:
        NotSharedError: If the object cannot be shared.
    """
    kind = type(obj)
    if kind.__module__ == "multiprocessing.managers" or hasattr(kind, "_callmethod"):
        if files is not None and hasattr(kind, "_callmethod"):
            files.append(obj)
        return NotImplemented
    if kind.__module__ == "tqdm.std":
        if kind.__name__ != "TqdmDefaultWriteLock":
            return NotImplemented
        # The other lock is for the threads of one process, so the worker makes its own.
        return _lock_of_tqdm, (kind, getattr(obj, "mp_lock", None))
    name = f"a multiprocessing {kind.__name__}"
    if kind.__module__ == "socket":
        name = "a socket"
    elif kind.__module__ not in _MODULES and kind.__name__ == "Connection":
        name = "a multiprocessing Connection (an end of a Pipe)"
    if files is None:
        raise NotSharedError(
            f"{name} cannot be sent here: it can be sent only from a program to workers on the "
            f"same machine, as an argument or in initargs; use an object of a "
            f"multiprocessing.Manager(), a file, or the results of calls",
            obj,
        )
    unnamed = getattr(obj, "_semlock", None)
    if unnamed is not None and unnamed.name is None:
        file = _kept.get(obj)
        if file is None:
            file = _kept[obj] = _file_of_semaphore(obj, name)
        files.append(file)
        return _semaphore, (kind, file.number, unnamed.kind, unnamed.maxvalue)
    if kind.__name__ == "Arena" and kind.__module__ == "multiprocessing.heap":
        file = _file_of(obj, obj.fd)
        files.append(file)
        return _arena, (file.number, obj.size)
    if kind.__module__ == "multiprocessing.queues":
        for end in (obj._reader, obj._writer):
            if not end.closed:
                _file_of(end, end.fileno())
    try:
        with _spawning(obj, files):
            return _reducers.get(kind, lambda obj: obj.__reduce_ex__(5))(obj)
    except OSError as exc:
        raise NotSharedError(f"{name} cannot be sent: {exc}", obj) from exc


def where(element: object, fn: object, elements: Mapping[str, object]) -> str:
    """Return the position of an object that cannot be shared, such as ``"argument 0 of "``.

    Args:
        element: The object.
        fn: The callable, which may have the object as a global.
        elements: The arguments, by the names that messages use.
    """
    for name, value in elements.items():
        if value is element:
            return f"{name} of "
        items: Iterable[tuple[object, object]] = ()
        if isinstance(value, list | tuple):
            items = enumerate(value)
        elif isinstance(value, dict):
            items = value.items()
        for key, item in items:
            if item is element and type(key) in (int, str):
                return f"{name}, item {key!r} of "
    for key, value in list(getattr(fn, "__globals__", {}).items()):
        if value is element:
            return f"global {key} of "
    return ""


def _file_of(obj: Any, fd: int) -> SharedFile:
    file = _kept.get(obj)
    if file is None:
        file = _kept[obj] = SharedFile(fd)
    return file


class _Spawning:
    """Takes the place of a starting process, to which ``multiprocessing`` would pass files."""

    def __init__(self, obj: object, files: list[object]) -> None:
        self._obj = obj
        self._files = files

    def duplicate_for_child(self, fd: int) -> int:
        return fd

    def DupFd(self, fd: int) -> _Descriptor:
        file = _kept.get(self._obj) or SharedFile(fd)
        self._files.append(file)
        return _Descriptor(file.number)


@contextmanager
def _spawning(obj: object, files: list[object]) -> Iterator[None]:
    before = context.get_spawning_popen()
    context.set_spawning_popen(_Spawning(obj, files))  # type: ignore[arg-type]
    try:
        yield
    finally:
        context.set_spawning_popen(before)


# Semaphores without a name.

_PAGE = mmap.PAGESIZE
_MAYMOVE, _FIXED = 1, 2
_FAILED = 2**64 - 1
_WAITING_AT = 4
"""Offset in a semaphore of the number of waiting threads; see ``new_sem`` in glibc."""


def _file_of_semaphore(lock: Any, name: str) -> SharedFile:
    number = _taken.get(lock)
    if number is None:
        try:
            return _move_semaphore(lock._semlock.handle, name)
        except PayloadError as exc:
            raise NotSharedError(exc.message, lock) from None
    fd = take_file(number)  # it came from this process's own client
    try:
        return SharedFile(fd)
    finally:
        os.close(fd)


def _move_semaphore(address: int, name: str) -> SharedFile:
    """Move a semaphore of this process into a file, by replacing its page of memory in place.

    No Python code runs between the copy and the replacement. A thread that waits for the semaphore
    at that moment, or another process that has it, would keep the old page. Such a semaphore is
    refused.

    Raises:
        PayloadError: If the semaphore is in use elsewhere, or this system has other semaphores.
    """
    import ctypes

    remedy = (
        "make it before it is shared with anything else, or with "
        "multiprocessing.get_context('spawn')"
    )
    if not (sys.platform.startswith("linux") and sys.byteorder == "little" and _is_glibc()):
        raise PayloadError(f"{name} cannot be sent on this system; {remedy}")
    base = address - address % _PAGE
    sharer = _other_owner(base)
    if sharer:
        raise PayloadError(f"{name} cannot be sent, as process {sharer} has it already; {remedy}")
    libc = ctypes.PyDLL(None)  # calls through PyDLL keep the GIL
    for function in (libc.memmove, libc.mmap, libc.mremap, libc.munmap):
        function.restype = ctypes.c_void_p
    here, page = ctypes.c_void_p(base), ctypes.c_size_t(_PAGE)
    fd = os.memfd_create("cloudexec-semaphore", os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, _PAGE)
        access = mmap.PROT_READ | mmap.PROT_WRITE
        new = libc.mmap(None, page, access, mmap.MAP_SHARED, fd, ctypes.c_size_t(0))
        # A second mapping of the old page, to read the page after the replacement.
        old = libc.mremap(here, ctypes.c_size_t(0), page, _MAYMOVE)
        if _FAILED in (new, old):
            raise PayloadError(f"{name} cannot be sent, as there is no memory; {remedy}")
        there = ctypes.c_void_p(new)
        exchange = (
            functools.partial(libc.memmove, there, here, page),
            functools.partial(libc.mremap, there, page, page, _MAYMOVE | _FIXED, here),
        )
        list(map(operator.call, exchange))
        if ctypes.c_uint32.from_address(old + address - base + _WAITING_AT).value:
            libc.mremap(ctypes.c_void_p(old), page, page, _MAYMOVE | _FIXED, here)
            raise PayloadError(f"{name} cannot be sent while it is waited for; {remedy}")
        libc.munmap(ctypes.c_void_p(old), page)
        return SharedFile(fd)
    finally:
        os.close(fd)


def _is_glibc() -> bool:
    import ctypes

    try:
        return bool(os.confstr("CS_GNU_LIBC_VERSION")) and ctypes.sizeof(ctypes.c_void_p) == 8
    except (ValueError, OSError):
        return False


def _other_owner(address: int) -> int:
    """Return the id of a related process that shares a page of memory with this one, or 0."""
    own = f"{address:x}-"
    shared = ""
    with open("/proc/self/maps") as file:
        for line in file:
            if line.startswith(own):
                shared = " ".join(line.split()[3:5])
    parents: dict[int, int] = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat") as file:
                    parents[int(name)] = int(file.read().rpartition(")")[2].split()[1])
            except (OSError, ValueError, IndexError):
                continue
    family = _ancestors(os.getpid(), parents)
    me = os.getpid()
    family |= {pid for pid in parents if me in _ancestors(pid, parents)}
    for pid in family - {me}:
        if templates & {pid, *_ancestors(pid, parents)}:
            continue
        try:
            with open(f"/proc/{pid}/maps") as file:
                if any(" ".join(line.split()[3:5]) == shared for line in file if "/sem." in line):
                    return pid
        except OSError:
            continue
    return 0


def _ancestors(pid: int, parents: dict[int, int]) -> set[int]:
    found = set[int]()
    while (pid := parents.get(pid, 0)) > 1 and pid not in found:
        found.add(pid)
    return found


# The slot's side.

_client: tuple[str, bytes] | None = None
TRACKER = 0
"""Number with which a slot asks for the pipe to the client's resource tracker."""
_pages: dict[int, mmap.mmap] = {}  # never unmapped, as a lock in a page may still be in use
_here: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
_taken: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
_asking = threading.Lock()


class _Descriptor:
    """Takes the place of a file in a pickle; it has the interface of ``multiprocessing``."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __reduce__(self) -> Any:
        return _Descriptor, (self.number,)

    def detach(self) -> int:
        return take_file(self.number)


def ask(path: str, token: bytes) -> None:
    """Set, in a slot, the socket and token with which files are requested from the client.

    From now on the client's resource tracker accounts for named shared memory. A resource tracker
    of the slot would delete that memory when the slot ends.
    """
    global _client
    _client = (path, token)
    tracker = _tracker()

    def asking_first(usual: Callable[..., Any]) -> Callable[..., Any]:
        def ensure(*args: Any) -> Any:
            with _asking:
                if tracker._fd is None:
                    try:
                        tracker._fd = take_file(TRACKER)
                    except (OSError, PayloadError):
                        pass  # the client is ending
            return usual(*args)

        return ensure

    for name in ("ensure_running", "_ensure_running_and_write"):  # depends on Python's version
        if hasattr(tracker, name):
            setattr(tracker, name, asking_first(getattr(tracker, name)))


def _tracker() -> Any:
    from multiprocessing import resource_tracker

    return resource_tracker._resource_tracker


def send_file(connection: socket.socket, number: int) -> None:
    """Send, in the client, the file that a slot requests with ``take_file()``.

    Raises:
        OSError: If the slot has closed the connection.
    """
    file = _files.get(number)
    if file is not None:
        socket.send_fds(connection, [_direct.ACCEPTED], [file.fd])
    elif number == TRACKER:
        socket.send_fds(connection, [_direct.ACCEPTED], [_tracker().getfd()])


def take_file(number: int) -> int:
    """Get a file of the client in this process; the caller must close it.

    Raises:
        PayloadError: If the client has closed the file.
        OSError: If the client cannot be reached.
    """
    if _client is None:
        raise PayloadError("an object that belongs to the client's machine cannot be used here")
    with _direct.connect(*_client, _direct.FILE, number) as connection:
        fds = socket.recv_fds(connection, 1, 1)[1]
    for fd in fds:
        os.set_inheritable(fd, False)
        return fd
    raise PayloadError("the client has closed a file that was sent to this task")


def _semaphore(kind: Any, number: int, recursive: int, most: int) -> Any:
    import _multiprocessing  # type: ignore[import-not-found]
    import ctypes

    found = _here.get(number)
    if found is not None:
        return found
    page = _pages.get(number)
    if page is None:
        fd = take_file(number)
        try:
            page = _pages[number] = mmap.mmap(fd, _PAGE)
        finally:
            os.close(fd)
    lock: Any = kind.__new__(kind)
    address = ctypes.addressof(ctypes.c_char.from_buffer(page))
    lock._semlock = _multiprocessing.SemLock._rebuild(address, recursive, most, None)
    lock._is_fork_ctx = False
    lock._make_methods()
    _here[number] = lock
    _taken[lock] = number
    return lock


def _lock_of_tqdm(kind: Any, lock: Any) -> Any:
    kind.mp_lock = lock
    return kind()


def _arena(number: int, size: int) -> Any:
    from multiprocessing import heap, util

    found = _here.get(number)
    if found is None:
        fd = take_file(number)
        found = _here[number] = heap.Arena(size, fd)
        util.Finalize(found, os.close, (fd,))
    return found
