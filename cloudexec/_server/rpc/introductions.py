"""The functions and blobs that one worker was told of, each of them once."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence

from cloudexec._functions import Function
from cloudexec._objects.link import Link
from cloudexec._objects.store import Blob
from cloudexec._proto import tasks_pb2 as pb
from cloudexec._records import Composed
from cloudexec._server.service import Service
from cloudexec._wire.channel import PUSHED_BYTES

__all__ = ["MOST_PUSHED", "Introductions"]

MOST_PUSHED = 2 * 1024 * 1024
"""Bytes of blobs that are sent along in one message."""


class Introductions:
    """The functions and blobs that a worker knows.

    Args:
        service: The executor, as its workers' calls see it.
        worker: The worker's id.
        link: Knows whether the connection is slow.
        wake: Called when the worker is to be told what it must forget.
    """

    def __init__(self, service: Service, worker: str, link: Link, wake: Callable[[], None]) -> None:
        self.functions: set[int] = set()
        self.forgotten_functions: list[int] = []  # what it is still to hear of
        self.forgotten_blobs: list[int] = []
        self.room = MOST_PUSHED  # for blobs that go along, in the message that is composed
        self._service = service
        self._worker = worker
        self._link = link
        self._wake = wake
        self._known_blobs: set[int] = set()
        self._blobs: weakref.WeakValueDictionary[int, Blob] = weakref.WeakValueDictionary()
        self._moved: set[int] = set()  # known blobs that are somewhere else now

    def forget_functions(self, numbers: Sequence[int]) -> None:
        known = [number for number in numbers if number in self.functions]
        if known:
            self.functions.difference_update(known)
            self.forgotten_functions.extend(known)
            self._wake()

    def forget_blobs(self, numbers: Sequence[int]) -> None:
        known = self._known_blobs.intersection(numbers)
        if known:
            self._known_blobs -= known
            self._moved -= known
            self.forgotten_blobs.extend(known)
            self._wake()

    def moved(self, number: int) -> None:
        """Take note that a blob is not at the place that its worker was told."""
        if number in self._known_blobs:
            self._moved.add(number)

    def introduce(self, message: pb.ServerMessage, function: Function) -> int:
        """Tell the worker of a function, after all that it needs, and return the bytes of that."""
        self.functions.add(function.number)
        self._service.sessions.note_told(self._worker, function.number)
        size = sum(
            [
                self.introduce(message, need)
                for need in function.needs
                if need.number not in self.functions
            ]
        )
        pickled = function.pickle
        if type(pickled) is Composed:
            size += sum([self.introduce_blob(blob, message) for blob in pickled.blobs])
        _describe_function(message.functions.add(), function)
        return size + len(message.functions[-1].pickle)

    def introduce_first(self, welcome: pb.Welcome, function: Function) -> None:
        """Tell the worker of what its initializer needs."""
        self.functions.add(function.number)
        self._service.sessions.note_told(self._worker, function.number)
        for need in function.needs:
            if need.number not in self.functions:
                self.introduce_first(welcome, need)
        pickled = function.pickle
        if type(pickled) is Composed:
            welcome.function_blobs.extend(map(self.describe, pickled.blobs))
        _describe_function(welcome.functions.add(), function)

    def _know_blob(self, number: int) -> None:
        if number not in self._known_blobs:
            self._known_blobs.add(number)
            self._service.sessions.note_told(self._worker, -number)

    def introduce_blob(self, blob: Blob, message: pb.ServerMessage) -> int:
        """Tell the worker of a blob that it does not know yet, and return the bytes of that."""
        if blob.id in self._known_blobs and blob.id not in self._moved:
            return 8
        described = self.describe(blob)
        message.blobs.append(described)
        return 64 + len(described.content)

    def describe(self, blob: Blob) -> pb.Blob:
        """Return the message about a blob; the worker may ask for the blob from now on."""
        self._know_blob(blob.id)
        self._moved.discard(blob.id)
        self._blobs[blob.id] = blob
        blob.workers.add(self._worker)
        described = pb.Blob(id=blob.id, size=blob.size)
        place = blob.place
        if place is not None and blob.origin != self._worker:
            described.path, described.offset = place.path, place.offset
            described.mappable = place.mappable
        elif self._service.direct_path and blob.segment is not None:
            described.path = blob.segment.path
            described.offset = blob.offset
            described.mappable = blob.mappable
        else:
            transfers = self._service.transfers
            described.bucket = transfers is not None and (blob.stored or transfers.takes(blob.size))
            goes_along = blob.size <= min(PUSHED_BYTES, self.room) and not self._link.is_slow
            if goes_along and blob.origin is None and not described.bucket:
                described.content = bytes(blob.view())
                self.room -= blob.size
                self._service.bytes_sent += blob.size
        return described

    def keep(self, blob: Blob) -> None:
        """Take note of a blob that the worker itself has announced."""
        self._know_blob(blob.id)
        self._blobs[blob.id] = blob

    def blob(self, number: int) -> Blob | None:
        """Return a blob that the worker may ask for."""
        return self._blobs.get(number)

    def blobs(self) -> list[Blob]:
        """Return the blobs that the worker was told of or has announced itself."""
        return list(self._blobs.values())

    def kept_blobs(self) -> list[Blob]:
        """Return the blobs that this worker alone has."""
        return [blob for blob in self._blobs.values() if blob.origin == self._worker]


def _describe_function(described: pb.Function, function: Function) -> None:
    pickled = function.pickle
    if isinstance(pickled, Composed):
        described.blobs.extend([blob.id for blob in pickled.blobs])
        pickled = pickled.head
    described.number = function.number
    described.pickle = pickled
    described.sha256 = function.sha256
    described.fresh = function.fresh
    described.needs.extend([need.number for need in function.needs])
    described.globals.extend(function.globals)
    described.module = function.module
