"""Connects an executor with the store of its journal: finds results, and records new ones.

Threads: ``identify`` and ``resume`` run in the thread that submits a call, under a lock for the
counts. ``add`` and ``give_back`` run on the event loop's thread. A thread of the journal's own
writes results in batches; the next batch gathers while one is written.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from cloudexec._describing import attribute_of, describe, is_a, is_interrupt, repr_of
from cloudexec._errors import CloudexecError, ConfigError
from cloudexec._functions import Function
from cloudexec._journal.changes import explained, latest
from cloudexec._journal.keys import (
    Unkeyed,
    arguments_digest,
    bare,
    blobs_of,
    digest_of,
    name_of,
)
from cloudexec._journal.opening import open_store
from cloudexec._journal.program import Program
from cloudexec._journal.store import Found, Record, Store
from cloudexec._log import Log
from cloudexec._payload import Unfinished
from cloudexec._records import Composed, Payload

if TYPE_CHECKING:
    from cloudexec._config import TaskOptions
    from cloudexec._future import BatchFuture
    from cloudexec._server.portal import Portal

__all__ = ["KEY_BYTES", "Call", "Identity", "Journal"]

_logger = Log()
_SYNC_SECONDS = 0.25
"""Seconds between two syncs: a loss of power loses at most the results of this time."""
_MOST_AT_ONCE = 4096
_REST_SECONDS = 5.0
"""Seconds for which nothing is written after a write has failed."""
KEY_BYTES = 20
"""Bytes of the key of a call."""
_NO_DIGEST = bytes(32)

Given = tuple[Any, Any, Any]
"""A task, its future and its result. The task is ``None`` if no call of this run waits for it."""


class Identity:
    """How a journal identifies a function.

    Attributes:
        name: The function's module and qualified name.
        version: Digest of the program and the name. It is recorded with each result.
        base: Digests of the program, the initializer and the function, as part of each call's key.
        program: Digest of the program.
        code: The function's code object when it was identified.
        whole: The function itself, if it is digested together with the arguments of each call,
            because the function and its arguments may share objects; otherwise ``None``.
    """

    __slots__ = ("base", "code", "name", "program", "version", "whole")

    def __init__(
        self,
        name: str,
        program: bytes = b"",
        base: bytes = b"",
        code: object = None,
        whole: object = None,
    ) -> None:
        self.name = name
        self.program = program
        self.base = base
        self.code = code
        self.whole = whole
        self.version = _version_of(program, name)


class Call:
    """How a journal identifies a call.

    Attributes:
        key: The key under which the call's result is recorded.
        identity: The identity of the called function.
        base: A number that all equal calls (same function, same arguments) have in common.
        number: Counts equal calls of one run, from 1.
        kept: Whether the result stays on a worker, so that it is not recorded.
    """

    __slots__ = ("base", "identity", "kept", "key", "number")

    def __init__(
        self, key: bytes, identity: Identity, base: int, number: int, *, kept: bool
    ) -> None:
        self.key = key
        self.identity = identity
        self.base = base
        self.number = number
        self.kept = kept


class _Orphan:
    """Stands for the future of a call that an earlier run submitted, and this run has not yet."""

    __slots__ = ("_journaled", "_run_time")

    def __init__(self, call: Call, seconds: float) -> None:
        self._journaled = call
        self._run_time = seconds


class Journal:
    """The journal of one executor.

    Args:
        store: Keeps the records.
        program: The code of the running program.
        portal: Runs callables on the event loop's thread.
        decode: Unpickles the result of a future when it is asked for.
        give: Called on the loop thread with results once they have been written.
    """

    def __init__(
        self,
        store: Store,
        program: Program,
        portal: Portal,
        decode: Callable[[BatchFuture[Any]], None],
        give: Callable[[list[Given]], None],
    ) -> None:
        self.store = store
        self.resumed = 0
        """Number of calls that were not run because the journal had their results."""
        self._program = program
        self._setup = _NO_DIGEST
        self._is_watching = True
        self._has_compared = False
        self._noted: set[bytes] = set()  # digests of programs that have been written to the store
        self._portal = portal
        self._decode = decode
        self._give = give
        self._lock = threading.Lock()
        self._counts: dict[int, int] = {}  # by ``Call.base``: how many equal calls were submitted
        self._returned: dict[int, list[int]] = {}  # numbers of equal calls that had no result
        self._identities: weakref.WeakKeyDictionary[Function, dict[bool, Identity]]
        self._identities = weakref.WeakKeyDictionary()
        self._said: set[str] = set()
        self._inbox: deque[Given] = deque()
        self._event = threading.Event()
        self._ending = threading.Event()
        self._woken = False
        self._closing = False
        self._then: Callable[[], None] | None = None
        self._rest_until = float("-inf")
        self._dropped = 0
        self._states: deque[Callable[[], None]] = deque()
        self._has_failed = False
        self._thread = threading.Thread(target=self._run, name="cloudexec-journal", daemon=True)
        self._thread.start()

    @classmethod
    def open(
        cls,
        where: str | os.PathLike[str],
        program: Program,
        portal: Portal,
        decode: Callable[[BatchFuture[Any]], None],
        give: Callable[[list[Given]], None],
    ) -> Journal:
        """Open a journal, or make an empty one; ``open_store`` lists the errors."""
        store = open_store(where, portal)
        _logger.info(
            "journal %s: %d result%s of earlier runs",
            store.name,
            store.earlier,
            "" if store.earlier == 1 else "s",
        )
        return cls(store, program, portal, decode, give)

    def set_up(self, initializer: object, *, is_watching: bool) -> None:
        """Set what the keys of all calls depend on, before the first call.

        Args:
            initializer: The initializer of the workers with its arguments; ``None`` without one.
            is_watching: Whether workers read the program's files from disk when they need them, so
                that edits matter. Otherwise the files have been sent already.
        """
        self._is_watching = is_watching
        if initializer is not None:
            try:
                self._setup = digest_of(initializer, self._program)
            except Exception as exc:
                self._setup = os.urandom(32)  # random, so that no other run finds these results
                self._cannot("the initializer", exc)
        if not is_watching:
            self._look_for_edits()

    # Calls come.

    def identify(
        self, fn: Callable[..., Any], function: Function | None, options: TaskOptions
    ) -> Identity | None:
        """Return the identity of a function; ``None`` if its calls cannot be recorded.

        Args:
            fn: The callable.
            function: The executor's record of the callable, if it has one. Identities are cached
                by it.
            options: If they have a ``key``, objects that are bound to the function do not count.
        """
        has_key = options.key is not None
        code = attribute_of(fn, "__code__")
        program = self._program.digest(attribute_of(fn, "__module__"))
        if function is not None:
            known = self._identities.get(function, _NOTHING).get(has_key)
            if known is not None and known.code is code and known.program == program:
                return known
        name, whole, digest = name_of(fn), None, _NO_DIGEST
        try:
            if has_key:
                digest = digest_of(bare(fn), self._program)
            elif function is None:
                whole = fn
            else:
                digest = digest_of(fn, self._program, blobs_of(function.pickle))
        except BaseException as exc:
            if is_interrupt(exc):
                raise
            self._cannot(name, exc)
            return None
        identity = Identity(name, program, program + self._setup + digest, code, whole)
        if function is not None:
            with self._lock:
                self._identities.setdefault(function, {})[has_key] = identity
        self._note_program(program)
        return identity

    def digest_of(self, value: object, payload: Payload) -> bytes | None:
        """Digest a value that is put into the executor; ``None`` if it cannot be digested.

        Args:
            value: The value.
            payload: The value as it was pickled to be sent.
        """
        try:
            return digest_of(value, self._program, blobs_of(payload))
        except BaseException as exc:
            if is_interrupt(exc):
                raise
            return None

    @staticmethod
    def key_of_chunks(key: Callable[..., object]) -> Callable[..., bytes]:
        """Return a function that makes the key of a chunk (several calls that run as one task).

        Args:
            key: Makes the key of one call.
        """

        def of_chunk(chunk: list[tuple[Any, ...]]) -> bytes:
            keys = [_own_key(key, args, {}) for args in chunk]
            return b"".join([b"%d:%b" % (len(each), each) for each in keys])

        return of_chunk

    def _note_program(self, program: bytes) -> None:
        """Write the program's manifest to the store; warn once if the program has changed."""
        with self._lock:
            if program in self._noted:
                return
            self._noted.add(program)
            first, self._has_compared = not self._has_compared, True
        manifest = self._program.manifest
        value = json.dumps({**manifest, "at": time.time()}).encode()
        self._states.append(functools.partial(self.store.put_program, program, value))
        self._event.set()
        counts = self.store.versions
        if not first or not counts:
            return
        if any(_version_of(program, name) in versions for name, versions in counts.items()):
            return
        among: dict[bytes, int] = {}
        for each in self.store.programs:
            for name, versions in counts.items():
                if count := versions.get(_version_of(each, name)):
                    among[each] = among.get(each, 0) + count
        _logger.warning(
            "journal %s: %s",
            self.store.name,
            explained(
                latest(self.store.programs, among),
                manifest,
                sum([sum(versions.values()) for versions in counts.values()]),
            ),
        )

    def _cannot(self, name: str, exc: BaseException) -> None:
        if is_a(exc, Unkeyed):
            _logger.debug("a call of %s is not in the journal: %s", name, exc)
        elif name not in self._said:
            self._said.add(name)
            _logger.warning(
                "journal %s: calls of %s are not in it, as they cannot be told apart (%s); "
                "with_options(key=...) can do that. Said once for each function",
                self.store.name,
                name,
                describe(exc),
            )

    def resume(
        self,
        future: BatchFuture[Any],
        identity: Identity,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        payload: Payload | Unfinished | None,
        options: TaskOptions,
    ) -> bool:
        """Look a call up, and finish its future if the journal has a result for it.

        Args:
            future: The future of a call that is about to be submitted.
            identity: The identity of the called function.
            args: The positional arguments.
            kwargs: The keyword arguments.
            payload: The pickle of the arguments, if they were pickled without the function.
            options: The call's options.

        Returns:
            Whether the future is done, so that the call need not run. It is also done, with an
            error, if the function given as ``key=`` failed.
        """
        found = hashlib.sha256(identity.base)
        if options.env or options.gpus:
            found.update(b"o" + _options_digest(options))
        if options.key is None:
            try:
                if identity.whole is None:
                    digest = arguments_digest(args, kwargs, self._program, payload)
                else:
                    call_of = (identity.whole, args, list(kwargs.items()))
                    digest = digest_of(call_of, self._program, blobs_of(payload))
                found.update(b"a" + digest)
            except BaseException as exc:
                if is_interrupt(exc):
                    raise
                self._cannot(identity.name, exc)
                return False
        else:
            try:
                found.update(b"k" + _own_key(options.key, args, kwargs))
            except BaseException as exc:
                if is_interrupt(exc):
                    raise
                future._owner = None
                future.set_exception(exc)
                return True
        digest = found.digest()
        base = int.from_bytes(digest[:8])
        with self._lock:
            returned = self._returned.get(base)
            if returned:
                number = min(returned)
                returned.remove(number)
                if not returned:
                    del self._returned[base]
            else:
                number = self._counts[base] = self._counts.get(base, 0) + 1
        key = digest if number == 1 else hashlib.sha256(b"%d" % number + digest).digest()
        call = Call(key[:KEY_BYTES], identity, base, number, kept=options.keep)
        future._journaled = call
        if not self.store.earlier or call.kept:
            return False
        record = self.store.find(call.key)
        if record is None:
            return False
        self._finish(future, record)
        return True

    def note_resumed(self, future: BatchFuture[Any]) -> None:
        """Count a call that was not run because the journal had its result."""
        with self._lock:
            self.resumed += 1
        future._resumed = True

    def _finish(self, future: BatchFuture[Any], record: Found) -> None:
        self.note_resumed(future)
        future._run_time = record.seconds
        future._owner = None
        future._on_end = None
        future._finish(record.payload, None, self._decode)
        future._invoke_callbacks()

    # Results come.

    def add(self, task: Any, future: BatchFuture[Any], result: Any) -> bool:
        """Take a result to be written.

        Returns:
            Whether ``give`` will hand the result to its future after it has been written. If not,
            the caller finishes the future now.
        """
        call: Call | None = future._journaled
        if call is None or call.kept or self._closing:
            return False
        if type(result) is not bytes and type(result) is not Composed:
            return False
        if type(result) is Composed:
            result.shared = True  # the user may change the result while it is being written
        self._inbox.append((task, future, result))
        if not self._woken:
            self._woken = True
            self._event.set()
        return self.store.holds_back

    def keep(self, key: bytes, version: bytes, name: str, seconds: float, result: Payload) -> None:
        """Take the result of a call that an earlier run submitted, and this run has not yet."""
        identity = Identity(name)
        identity.version = version
        call = Call(key, identity, 0, 0, kept=False)
        if type(result) is Composed:
            result.shared = True
        self._inbox.append((None, _Orphan(call, seconds), result))
        self._event.set()

    def put_state(self, name: str, value: bytes | None) -> None:
        """Have the journal's thread call ``Store.put_state`` with these arguments."""
        self._states.append(functools.partial(self.store.put_state, name, value))
        self._event.set()

    def give_back(self, future: BatchFuture[Any]) -> None:
        """Note that a call ended without a result: the next equal call gets its number and key."""
        call: Call | None = future._journaled
        if call is not None:
            with self._lock:
                self._returned.setdefault(call.base, []).append(call.number)

    def close(self, then: Callable[[], None]) -> None:
        """Begin to close: the thread writes the remaining results and closes the store.

        Args:
            then: Called on the journal's thread when that is done.
        """
        self._then = then
        self._closing = True
        self._event.set()
        self._ending.set()

    def join(self) -> None:
        """Wait until the journal's thread has ended, after ``close``."""
        if self._thread is not threading.current_thread():
            self._thread.join()

    # The journal's own thread.

    def _run(self) -> None:
        synced_at, dirty = time.monotonic(), False
        while True:
            while self._states:
                self._attempt(self._states.popleft())
            if not self._inbox:
                if self._closing and not self._states:
                    break
                pause = max(0.0, synced_at + _SYNC_SECONDS - time.monotonic()) if dirty else None
                self._event.wait(pause)
            self._event.clear()
            self._woken = False
            batch = [self._inbox.popleft() for _ in range(min(len(self._inbox), _MOST_AT_ONCE))]
            if batch:
                if not dirty:
                    synced_at = time.monotonic()
                dirty = self._keep(batch) or dirty
                if self.store.holds_back:
                    self._post(self._give, batch)
                if self.store.interval:
                    self._ending.wait(self.store.interval)
            del batch
            if dirty and time.monotonic() - synced_at >= _SYNC_SECONDS:
                self._attempt(self.store.sync)
                synced_at, dirty = time.monotonic(), False
        self._attempt(self.store.close)
        if self._dropped:
            _logger.warning(
                "journal %s: %d results of this run were not recorded; they will be computed again",
                self.store.name,
                self._dropped,
            )
        if self._then is not None:
            self._then()

    def _keep(self, batch: list[Given]) -> bool:
        """Write a batch of results, and say whether it was written.

        A failure is logged and counted only: the program still receives its results.
        """
        if self._is_watching:
            self._look_for_edits()
        if time.monotonic() < self._rest_until:
            self._dropped += len(batch)
            return False
        records = [
            Record(
                future._journaled.key,
                future._journaled.identity.version,
                future._journaled.identity.name,
                future._run_time or 0.0,
                result,
            )
            for _, future, result in batch
        ]
        if self._attempt(lambda: self.store.write(records)):
            return True
        self._dropped += len(batch)
        return False

    def _look_for_edits(self) -> None:
        """Stop recording if a file has changed: a worker may run other code than was digested."""
        edited = self._program.edited()
        if edited:
            self._is_watching = False
            self._rest_until = float("inf")
            _logger.warning(
                "journal %s: %s has changed while the program runs, and a worker may run either "
                "version of it: from now on results are not recorded",
                self.store.name,
                edited,
            )

    def _attempt(self, work: Callable[[], None]) -> bool:
        try:
            work()
        except Exception as exc:
            if not self._has_failed:
                self._has_failed = True
                said = exc if isinstance(exc, CloudexecError) else f"{type(exc).__name__}: {exc}"
                _logger.warning(
                    "%s; the program goes on, but results that are not in the journal will be run "
                    "again after a crash. It is tried again every %.0f s",
                    said,
                    _REST_SECONDS,
                )
            self._rest_until = max(self._rest_until, time.monotonic() + _REST_SECONDS)
            return False
        return True

    def _post(self, call: Callable[..., None], *args: Any) -> None:
        try:
            self._portal.post(call, *args)
        except RuntimeError:
            pass  # the loop has closed, so no future waits for these results


_NOTHING: dict[bool, Identity] = {}


def _version_of(program: bytes, name: str) -> bytes:
    """Return the digest of a program and a function's name, which is recorded with each result.

    A later run of a changed program finds by it which results it does not use any more.
    """
    return hashlib.sha256(program + name.encode("utf-8", "surrogatepass")).digest()


def _options_digest(options: TaskOptions) -> bytes:
    """Digest the options that a task can observe: its environment variables and its GPUs."""
    seen = [sorted((options.env or {}).items()), options.gpus]
    return hashlib.sha256(repr(seen).encode("utf-8", "surrogatepass")).digest()


def _own_key(
    key: str | Callable[..., object], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> bytes:
    """Return the key that the caller chose, as bytes that begin with its type.

    Raises:
        ConfigError: If the caller's function returns neither a string, an integer nor bytes.
        Exception: Whatever the caller's function raises.
    """
    value = key if isinstance(key, str) else key(*args, **kwargs)
    if isinstance(value, str):
        return b"s" + value.encode("utf-8", "surrogatepass")
    if isinstance(value, bytes):
        return b"b" + value
    if isinstance(value, int) and not isinstance(value, bool):
        return b"i%d" % value
    raise ConfigError(
        f"the function given as key= returned {repr_of(value)}; it must return a str, an int or "
        f"bytes"
    )
