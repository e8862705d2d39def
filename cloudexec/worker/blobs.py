"""The worker's blobs (large pieces of data): fetched once, shared by its slots, dropped if needed.

On the client's own machine a blob is a file that the slots open, and only its place is remembered
here. On other machines a blob is fetched when the first task needs it, into a file of the
supervisor that the slots open in the same way. The parts of large results are kept here, too, until
the client has taken them or does not need them any more.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable, Sequence
from typing import Any

from cloudexec._errors import PayloadError, PayloadTooLargeError
from cloudexec._objects.options import Limits, memory_of_machine
from cloudexec._objects.places import Place, pack_places
from cloudexec._objects.store import Blob, BlobStore

__all__ = ["BlobCache", "Known", "room"]


class Known:
    """A blob that the client has announced, or that was made here."""

    __slots__ = (
        "blob",
        "bucket",
        "claimed",
        "loading",
        "own",
        "place",
        "size",
        "used",
        "waiting",
    )

    def __init__(self, number: int, size: int, place: Place | None) -> None:
        self.size = size
        self.place = place
        self.blob: Blob | None = None
        self.loading: asyncio.Task[None] | None = None
        self.waiting: list[Callable[[BaseException | None], None]] = []
        self.used = 0
        self.own = False  # whether it was made here, so that it cannot be fetched again
        self.claimed = True  # for an own blob: whether the client has what it needs of it
        self.bucket = False  # whether it may be in the bucket


class BlobCache:
    """All blobs of one worker. Used on its event loop only.

    Args:
        load: Fetches a blob's content into the given empty blob.
        limits: The number of bytes that may be held.
        in_use: Returns the blobs that waiting and running tasks need.
        direct: Whether slots can fetch blobs that are in no file from the client themselves.
    """

    def __init__(
        self,
        load: Callable[[int, Known, Blob], Coroutine[Any, Any, None]],
        limits: Limits,
        in_use: Callable[[], set[int]],
        *,
        direct: bool,
    ) -> None:
        self._load = load
        self._in_use = in_use
        self._direct = direct
        self._known: dict[int, Known] = {}
        self._clock = 0
        self.store = BlobStore(limits, shared=True, option="worker_memory")
        self._unclaimed = 0
        self.all_claimed = asyncio.Event()
        """Set while no blob is kept here only that may still be needed."""
        self.all_claimed.set()

    def introduce(
        self, number: int, size: int, place: Place | None, *, bucket: bool = False
    ) -> None:
        """Note a blob that the client has announced.

        Args:
            number: The blob's number.
            size: Its size in bytes.
            place: Its place on this machine; ``None`` if it must be fetched.
            bucket: Whether it may be in the bucket.
        """
        known = self._known.get(number)
        if known is None:
            known = self._known[number] = Known(number, size, place)
        elif known.blob is None:
            known.place = place
        known.bucket = bucket

    def take(self, number: int, content: bytes) -> None:
        """Store the content of a blob that was announced together with its content, if it fits."""
        known = self._known[number]
        if known.place is not None or known.loading is not None:
            return
        try:
            blob = self._room_for(known.size)
            blob.write(content, 0)
        except (PayloadError, OSError):
            return  # the blob is fetched when a task needs it, which reports the error
        known.blob, known.place = blob, _place_of(number, blob)

    def keep(self, number: int, fd: int, place: Place) -> Blob:
        """Hold a part of a result until the client forgets it.

        Args:
            number: The blob's number.
            fd: The file that it is in. The file is taken over if nothing else is in it.
            place: The place in the file.

        Raises:
            PayloadTooLargeError: If there is no room for it.
            OSError: If it cannot be read or written.
        """
        if place.mappable and self.store.has_files():
            blob = self.store.take_over(place.size, fd=fd)
        else:
            blob = self.store.new(place.size)
            assert blob.segment is not None
            blob.segment.copy_from(fd, place.offset, place.size, blob.offset)
        known = self._known[number] = Known(number, blob.size, _place_of(number, blob))
        known.blob = blob
        known.own = True
        known.claimed = False
        self._unclaimed += 1
        self.all_claimed.clear()
        return blob

    def claimed(self, numbers: Iterable[int]) -> None:
        """Note that the client has what it needs of these blobs; they stay until forgotten."""
        for number in numbers:
            known = self._known.get(number)
            if known is not None and not known.claimed:
                known.claimed = True
                self._unclaimed -= 1
        if not self._unclaimed:
            self.all_claimed.set()

    @property
    def is_full(self) -> bool:
        """Whether more bytes are held in memory than the limit allows."""
        return not self.store.has_room(0)

    def place(self, number: int) -> Place:
        """Return the place of a blob that is held here."""
        place = self._known[number].place
        assert place is not None
        return place

    def kept(self, number: int) -> Blob | None:
        """Return the content of a blob if it is held here, or ``None``."""
        known = self._known.get(number)
        return None if known is None else known.blob

    def forget(self, numbers: Iterable[int]) -> None:
        """Drop blobs that no later message will refer to."""
        numbers = list(numbers)
        self.claimed(numbers)
        for number in numbers:
            known = self._known.pop(number, None)
            if known is not None and known.loading is not None:
                known.loading.cancel()
            del known  # deletes the blob, so that ``sweep`` frees its bytes
        self.store.sweep()

    def all_but(self, numbers: set[int]) -> list[int]:
        """Return the numbers of all blobs except these."""
        return [number for number in self._known if number not in numbers]

    def missing(self, numbers: Iterable[int]) -> list[int]:
        """Return those of these blobs that slots cannot read yet."""
        return [n for n in numbers if (k := self._known.get(n)) is None or k.place is None]

    def when_ready(
        self, numbers: Iterable[int], then: Callable[[BaseException | None], None]
    ) -> None:
        """Fetch blobs that are missing; call ``then`` when all are here, or with an error."""
        missing = self.missing(numbers)
        left = len(missing)
        if not left:
            then(None)
            return

        def one(error: BaseException | None) -> None:
            nonlocal left
            if left <= 0:
                return
            left = 0 if error is not None else left - 1
            if not left:
                then(error)

        for number in missing:
            known = self._known.get(number)
            if known is None:
                one(PayloadError(f"blob {number} was never announced: a bug of cloudexec's"))
                continue
            known.waiting.append(one)
            if known.loading is None:
                known.loading = asyncio.get_running_loop().create_task(self._bring(number, known))

    async def ready(self, numbers: Sequence[int]) -> None:
        """Wait until slots can read these blobs.

        Raises:
            Exception: If one cannot be fetched.
        """
        done = asyncio.get_running_loop().create_future()

        def ready(error: BaseException | None) -> None:
            if done.done():
                return
            if error is None:
                done.set_result(None)
            else:
                done.set_exception(error)

        self.when_ready(numbers, ready)
        await done

    async def _bring(self, number: int, known: Known) -> None:
        error: BaseException | None = None
        try:
            if self._direct:
                known.place = Place(number, known.size, "", 0, mappable=False)
            else:
                blob = self._room_for(known.size)
                await self._load(number, known, blob)
                known.blob, known.place = blob, _place_of(number, blob)
        except OSError as exc:
            error = PayloadTooLargeError(
                f"the worker has no room for {known.size} bytes of an argument ({exc.strerror}); "
                f"give it more memory or disk",
                size_bytes=known.size,
            )
            error.__cause__ = exc
        except Exception as exc:
            error = exc
        finally:
            known.loading = None
        waiting, known.waiting = known.waiting, []
        for then in waiting:
            then(error)

    def _room_for(self, size: int) -> Blob:
        """Make an empty blob, and drop unneeded ones for it, those unused longest first."""
        over = self.store.memory + size - self.store.limits.memory
        if over > 0:
            in_use = self._in_use()
            idle = [
                (known.used, number)
                for number, known in self._known.items()
                if known.blob is not None and number not in in_use and not known.own
            ]
            for _, number in sorted(idle):
                known = self._known[number]
                over -= known.size
                known.blob = known.place = None
                if over <= 0:
                    break
        return self.store.new(size)

    def places(self, numbers: Iterable[int]) -> bytes:
        """Return the places of blobs as bytes for a slot; none of them may be missing."""
        self._clock += 1
        found = []
        for number in numbers:
            known = self._known[number]
            known.used = self._clock
            assert known.place is not None
            found.append(known.place)
        return pack_places(found)

    def close(self) -> None:
        """Stop fetching."""
        for known in self._known.values():
            if known.loading is not None:
                known.loading.cancel()
        self._known.clear()
        self.store.close()


def _place_of(number: int, blob: Blob) -> Place:
    assert blob.segment is not None
    return Place(number, blob.size, blob.segment.path, blob.offset, mappable=blob.mappable)


def room(memory_mib: int, wanted: int) -> Limits:
    """Return the limits of a worker's blobs; blobs beyond the limit of memory go to disk.

    Args:
        memory_mib: The container's memory in MiB; 0 for the machine's memory.
        wanted: The limit of memory in bytes that the client has set; 0 for a quarter of the memory.
    """
    total = memory_mib * 2**20 or memory_of_machine()
    return Limits(memory=wanted or total // 4, cache=0)
