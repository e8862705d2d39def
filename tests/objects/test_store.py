"""The client's store: each content once, and nothing of it left when nobody refers to it."""

from __future__ import annotations

import array
import contextlib
import gc
import os
import pickle
import resource
import shutil
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cloudexec import ConfigError, ObjectOptions, PayloadTooLargeError
from cloudexec._functions import FunctionTable
from cloudexec._objects import segments
from cloudexec._objects.options import Limits
from cloudexec._objects.segments import Arena, Segment
from cloudexec._objects.store import BLOB_BYTES, MAPPED_BYTES, Blob, BlobStore
from cloudexec._payload import dumps
from cloudexec._records import Composed, Payload

pytestmark = pytest.mark.timeout(60)
MIB = 1024 * 1024
WARM = segments._WARM_BYTES


def make(
    memory: int = 512 * MIB, cache: int = 0, directory: str | None = "", disk: int | None = None
) -> BlobStore:
    return BlobStore(Limits(memory, cache, directory, disk), shared=True)


@pytest.fixture
def store() -> BlobStore:
    return make()


def fds() -> set[tuple[str, int]]:
    """Return the open files of this process; others than these may be closed meanwhile."""
    found = set()
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # that of the listing itself
            found.add((name, os.stat(f"/proc/self/fd/{name}").st_ino))
    return found


def composed(payload: Payload) -> Composed:
    assert isinstance(payload, Composed)
    return payload


def _loaded(payload: Payload) -> Any:
    return payload.load() if isinstance(payload, Composed) else pickle.loads(payload)


def taken(fd: int) -> int:
    """Return the bytes of memory or disk that a file takes."""
    return os.fstat(fd).st_blocks * 512


# The same content is the same blob.


@pytest.mark.parametrize(
    "again",
    [lambda a: a, lambda a: a.copy(), lambda a: memoryview(a), lambda a: a.reshape(-1, 2)],
    ids=["the same object", "a copy", "a view of its memory", "another shape"],
)
def test_equal_content_is_one_blob(store: BlobStore, again: Callable[[Any], Any]) -> None:
    """What is handed in twice is kept once, whatever object it comes in."""
    data = np.arange(40_000)
    one = composed(dumps(data, store))
    other = composed(dumps(_holds_buffer(again(data)), store))
    assert [blob.id for blob in one.blobs] == [blob.id for blob in other.blobs]
    assert store.memory == data.nbytes


def _holds_buffer(value: Any) -> Any:
    return np.asarray(value)


@pytest.mark.parametrize("kind", [np.copy, lambda a: a.tobytes()], ids=["arrays", "bytes"])
def test_contents_that_hardly_differ_are_one_blob_each(
    store: BlobStore, kind: Callable[[Any], Any]
) -> None:
    """However many there are, in whatever order they come."""
    base = np.zeros(MIB, np.uint8)
    variants = []
    for at in (None, 3, 4, 70_000, 70_001, 500_001, 500_002, MIB - 300):
        variant = base.copy()
        if at is not None:
            variant[at] = 1
        variants.append(variant)
        both = variant.copy()
        both[700_001] = 1
        variants.append(both)
    first = [composed(dumps(kind(each), store)) for each in variants]
    numbers = [[blob.id for blob in each.blobs] for each in first]
    assert len({tuple(each) for each in numbers}) == len(variants)
    for _ in range(2):
        for each, number in reversed(list(zip(variants, numbers, strict=True))):
            again = composed(dumps(kind(each), store))
            assert [blob.id for blob in again.blobs] == number
            assert np.array_equal(np.frombuffer(again.blobs[-1].view(), np.uint8)[-MIB:], each)
    assert store.memory < (len(variants) + 1) * MIB


def test_bytes_are_kept_by_reference_until_they_come_again(store: BlobStore) -> None:
    """A bytes object never changes, so no copy is made of it for one reader."""
    data = os.urandom(3 * MIB)
    (blob,) = composed(dumps(data, store)).blobs[:1]
    assert blob.content is data
    again = composed(dumps(data, store)).blobs[0]
    assert again is blob
    assert blob.segment is not None
    assert blob.content is None
    assert bytes(blob.view()) == data
    assert store.memory == len(data)


@pytest.mark.parametrize("size", [20_000, 400_000], ids=["in a block", "in a file"])
def test_a_change_in_place_between_two_submissions_gives_new_content(
    store: BlobStore, size: int
) -> None:
    """An argument arrives as it was when it was handed in."""
    data = np.zeros(size)
    before = composed(dumps(data, store))
    data[size // 2 + 1] = 1.0  # where no sample is taken
    after = composed(dumps(data, store))
    assert before.blobs[0] is not after.blobs[0]
    assert before.load().sum() == 0.0
    assert after.load().sum() == 1.0


@pytest.mark.parametrize(
    "value",
    [
        os.urandom(300_000),
        bytearray(os.urandom(300_000)),
        np.asfortranarray(np.arange(60_000.0).reshape(200, 300)),
        np.arange(90_000)[::3],
        np.arange(60_000).astype("datetime64[s]"),
        np.array([{"a": 1}] * 10, dtype=object),
        np.zeros((0, 5)),
        np.zeros(0),
        b"",
        bytearray(),
        array.array("d", range(30_000)),
        [np.arange(20_000), np.arange(20_000), b"x" * 300_000, "y" * 300_000],
    ],
    ids=lambda value: type(value).__name__,
)
def test_whatever_is_handed_in_comes_back(store: BlobStore, value: Any) -> None:
    """Bytes, arrays of any layout, and what is empty."""
    back = _loaded(dumps(value, store))
    assert type(back) is type(value)
    for one, other in zip(back, value, strict=True):
        assert np.array_equal(one, other)
    if isinstance(value, np.ndarray):
        assert back.dtype == value.dtype
        if value.flags.f_contiguous or value.flags.c_contiguous:
            assert back.flags.f_contiguous == value.flags.f_contiguous
        assert back.flags.writeable


@pytest.mark.parametrize("size", [20_000, 400_000], ids=["in a block", "in a file"])
def test_a_readonly_array_arrives_writeable_and_alone(store: BlobStore, size: int) -> None:
    """As through a process pool; and who writes to it changes nothing for others."""
    data = np.arange(size)
    data.flags.writeable = False
    payload = composed(dumps(data, store))
    payload.shared = True
    one, other = payload.load(), payload.load()
    one[:] = 0
    assert other.sum() == data.sum()
    assert payload.load().sum() == data.sum()


@pytest.mark.parametrize("threshold", [BLOB_BYTES, MAPPED_BYTES])
@pytest.mark.parametrize("offset", [-1, 0, 1])
@pytest.mark.parametrize("kind", [bytes, bytearray, np.array])
def test_sizes_at_the_thresholds_come_back(
    store: BlobStore, threshold: int, offset: int, kind: Any
) -> None:
    """Where a piece becomes a blob, and a blob a file, nothing is lost."""
    raw = np.frombuffer(os.urandom(threshold + offset), dtype=np.uint8)
    value = raw.copy() if kind is np.array else kind(raw.tobytes())
    back = _loaded(dumps(value, store))
    assert bytes(back) == raw.tobytes()
    payload = dumps(raw.copy(), store)
    (buffer,) = [blob for blob in composed(payload).blobs if blob.size >= raw.nbytes]
    assert (buffer.size == raw.nbytes) == (raw.nbytes > BLOB_BYTES)  # else it is in the pickle
    assert buffer.mappable == (raw.nbytes >= MAPPED_BYTES)


# What nobody refers to is gone.


def test_everything_is_freed_when_nobody_refers_to_it() -> None:
    """No memory, no file, and whoever must know is told once of each."""
    store = make()
    ended: list[int] = []
    store.on_end = ended.append
    dumps(np.arange(10), store)
    before = fds()
    payloads = [
        dumps(value, store)
        for value in (np.arange(20_000), np.arange(400_000), b"a" * MIB, b"b" * (3 * MIB))
    ]
    payloads.append(dumps(b"b" * (3 * MIB), store))
    numbers = {blob.id for payload in payloads for blob in composed(payload).blobs}
    assert store.memory > 7 * MIB
    del payloads
    store.sweep()
    assert (store.memory, store.disk) == (0, 0)
    assert sorted(ended) == sorted(numbers)
    assert len(fds() - before) <= 1  # the file of small ones


def test_what_may_come_again_is_kept_up_to_a_limit() -> None:
    """The cache holds the latest content that fits, and gives way to what is in use."""
    store = make(memory=42 * MIB, cache=10 * MIB)
    for fill in range(20):
        dumps(np.full(3 * MIB, fill, np.uint8), store)
    store.sweep()
    assert store.memory == 9 * MIB
    one = composed(dumps(np.full(3 * MIB, 19, np.uint8), store)).blobs[0]
    assert one.id < 20 * 2
    kept = [dumps(np.full(3 * MIB, fill, np.uint8), store) for fill in range(100, 113)]
    assert store.memory == 42 * MIB
    assert store.disk == 0
    del kept, one
    store.forget_cached()
    assert store.memory == 0


# Where there is not enough memory.


def test_what_does_not_fit_in_memory_goes_to_disk(tmp_path: Path) -> None:
    """Past the limit blobs are files in the directory that was given, and read from there."""
    store = make(memory=8 * MIB, directory=str(tmp_path))
    arrays = [np.full(3 * MIB, fill, np.uint8) for fill in range(6)]
    small = [np.full(MIB, fill, np.uint8) for fill in range(50, 56)]
    payloads = [composed(dumps(each, store)) for each in (*arrays, *small)]
    assert store.memory <= 8 * MIB
    assert store.disk >= 15 * MIB
    for payload, each in zip(payloads, (*arrays, *small), strict=True):
        assert np.array_equal(payload.load(), each)
    assert composed(dumps(arrays[-1], store)).blobs == payloads[5].blobs
    del payloads, payload
    store.sweep()
    assert (store.memory, store.disk) == (0, 0)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("directory", "disk", "says"),
    [(None, None, "no directory to spill to"), ("", 4 * MIB, "of 4 MiB on disk are taken too")],
    ids=["no directory", "a limit"],
)
def test_what_fits_nowhere_is_refused(directory: str | None, disk: int | None, says: str) -> None:
    """The error names the size, what is taken, and what to do; and nothing is kept of it."""
    store = make(memory=8 * MIB, directory=directory, disk=disk)
    kept = [dumps(np.full(3 * MIB, fill, np.uint8), store) for fill in range(2)]
    gc.collect()
    before, open_before = (store.memory, store.disk), fds()
    with pytest.raises(PayloadTooLargeError) as caught:
        kept += [dumps(np.full(5 * MIB, fill, np.uint8), store) for fill in range(10, 13)]
    text = str(caught.value)
    assert says in text
    assert "5 MiB more" in text
    assert "8 MiB of memory" in text
    assert "buffersize" in text
    assert "ObjectOptions(memory=" in text
    assert caught.value.size_bytes == 5 * MIB
    assert caught.value.limit_bytes == 8 * MIB
    del kept[2:], caught
    gc.collect()
    store.sweep()
    assert (store.memory, store.disk) == before
    assert fds() <= open_before
    assert dumps(np.full(2 * MIB, 77, np.uint8), store)  # what fits, fits


def _take(store: BlobStore, size: int) -> Any:
    if size > 2**40:
        return store.new(size)
    return dumps(np.frombuffer(os.urandom(size), np.uint8).copy(), store)


@pytest.mark.skipif(shutil.which("mount") is None, reason="mounts a small file system")
def test_a_full_disk_is_an_error_that_says_so(tmp_path: Path) -> None:
    """Not a crash; and the room that was taken meanwhile is given back."""
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(tmp_path)],
        capture_output=True,
        check=False,
    )
    if done.returncode:
        pytest.skip("needs to mount a small file system")
    try:
        store = make(memory=MIB, directory=str(tmp_path))
        kept = [dumps(np.full(3 * MIB, 1, np.uint8), store)]
        for size in (6 * MIB, MIB, 10 * 2**40):
            with pytest.raises(PayloadTooLargeError, match="No space left on device"):
                kept += [_take(store, size) for _ in range(8)]
            del kept[1:]
            gc.collect()
            store.sweep()
            assert store.disk == 3 * MIB
        assert len(dumps(np.full(4 * MIB, 1, np.uint8), store)) > 4 * MIB
        del kept, store
    finally:
        gc.collect()
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_limit_on_the_size_of_files_is_an_error_that_says_so(tmp_path: Path) -> None:
    """As with a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    store = make(memory=MIB, directory=str(tmp_path))
    resource.setrlimit(resource.RLIMIT_FSIZE, (4 * MIB, before[1]))
    try:
        with pytest.raises(PayloadTooLargeError, match="File too large"):
            dumps(np.zeros(5 * MIB, np.uint8), store)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert store.disk == 0
    assert len(dumps(np.zeros(5 * MIB, np.uint8), store)) > 5 * MIB


def test_room_for_an_absurd_size_is_refused_before_anything_is_taken(tmp_path: Path) -> None:
    """What a peer announces is not yet there."""
    store = make(directory=str(tmp_path))
    free = os.statvfs(tmp_path).f_bavail
    with pytest.raises(PayloadTooLargeError, match="No space left on device"):
        store.new(10 * 2**40)
    assert (store.memory, store.disk) == (0, 0)
    assert abs(os.statvfs(tmp_path).f_bavail - free) * 4096 < 512 * MIB


def test_more_blobs_than_files_share_one() -> None:
    """A process has so many file descriptors, and most are its user's."""
    script = """
import os, resource
resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100))
import numpy as np
from cloudexec._objects.options import Limits
from cloudexec._objects.store import BlobStore
from cloudexec._payload import dumps
store = BlobStore(Limits(2**30, 0), shared=True)
kept = [dumps(np.full(2 * 2**20, fill, np.uint8), store) for fill in range(100)]
assert len(os.listdir("/proc/self/fd")) < 50
assert [int(payload.load()[-1]) for payload in kept] == list(range(100))
fd = os.open("/dev/null", os.O_RDONLY)
taken = [store.take_over(2 * 2**20, fd=os.dup(kept[0].blobs[0].segment.fd)) for _ in range(60)]
assert len(os.listdir("/proc/self/fd")) < 50
assert taken[-1].view()[5] == 0
del kept, taken
store.sweep()
assert store.memory == 0, store.memory
print("done")
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=50
    )
    assert done.stdout == "done\n", done.stderr


# Blocks.


def test_memory_of_freed_blocks_goes_back_to_the_system() -> None:
    """A thousand arguments of 1 MiB that were pending at once leave no gibibyte behind."""
    store = make(memory=2**30)
    count = 256
    kept = [dumps(np.full(MIB, fill, np.uint8), store) for fill in range(count)]
    arena = store._arenas[True]
    fd = arena.segment.fd
    assert taken(fd) >= count * MIB
    last = kept.pop()  # one that stays, at the far end
    kept.clear()
    store.sweep()
    assert taken(fd) <= WARM + 2 * MIB
    assert int(composed(last).load()[-1]) == (count - 1) % 256
    again = [dumps(np.full(MIB, fill, np.uint8), store) for fill in range(100, 140)]
    assert taken(fd) <= WARM + 2 * MIB  # in memory that was there
    assert arena.size <= count * MIB
    assert [int(composed(each).load()[5]) for each in again] == list(range(100, 140))
    del again, last
    store.sweep()
    assert taken(fd) <= WARM


def test_blocks_on_disk_are_given_back_at_once(tmp_path: Path) -> None:
    """Disk space is not worth to be kept warm."""
    store = make(memory=1, directory=str(tmp_path))
    kept = [dumps(np.full(MIB, fill, np.uint8), store) for fill in range(20)]
    fd = store._arenas[False].segment.fd
    assert taken(fd) >= 20 * MIB
    del kept[1:]
    store.sweep()
    assert taken(fd) <= 3 * MIB
    assert int(composed(kept[0]).load()[5]) == 0


def test_blocks_do_not_overlap() -> None:
    """Whatever is taken and given back, in any order, each block has its content."""
    arena = Arena()
    held: dict[int, tuple[int, int]] = {}
    choose = np.random.default_rng(5)
    for step in range(3000):
        if held and choose.random() < 0.48:
            key = list(held)[choose.integers(len(held))]
            offset, size = held.pop(key)
            assert os.pread(arena.segment.fd, size, offset) == bytes([key % 251]) * size
            arena.free(offset, size)
        else:
            size = int(choose.integers(1, 400_000))
            offset = arena.allocate(size)
            arena.segment.write(bytes([step % 251]) * size, offset)
            held[step] = offset, size
    for key, (offset, size) in held.items():
        assert os.pread(arena.segment.fd, size, offset) == bytes([key % 251]) * size


def test_a_segment_on_disk_is_known_as_one(tmp_path: Path) -> None:
    """So that what a worker left on disk does not count as memory."""
    store = make()
    for directory, expected in ((None, (MAPPED_BYTES, 0)), (str(tmp_path), (0, MAPPED_BYTES))):
        segment = Segment(directory)
        segment.write(b"x" * MAPPED_BYTES)
        blob = store.take_over(MAPPED_BYTES, fd=os.dup(segment.fd))
        assert (store.memory, store.disk) == expected
        del blob
        store.sweep()
        assert (store.memory, store.disk) == (0, 0)


# Results that come.


@pytest.mark.parametrize("what", ["a file", "an object"])
def test_a_result_that_does_not_fit_in_memory_is_moved_to_disk(tmp_path: Path, what: str) -> None:
    """The client's memory stays bounded although workers have more."""
    store = make(memory=8 * MIB, directory=str(tmp_path))
    before = fds()
    blobs = []
    for fill in range(5):
        data = bytes([fill]) * (3 * MIB)
        if what == "a file":
            segment = Segment()
            segment.write(data)
            blob = store.take_over(len(data), fd=os.dup(segment.fd), spill=True)
        else:
            blob = store.take_over(len(data), content=bytearray(data), spill=True)
        blobs.append(blob)
    assert store.memory == 6 * MIB
    assert store.disk == 9 * MIB
    assert [bytes(blob.view()) == bytes([n]) * (3 * MIB) for n, blob in enumerate(blobs)] == [
        True
    ] * 5
    del blobs, blob
    segment = None  # type: ignore[assignment]
    store.sweep()
    assert (store.memory, store.disk) == (0, 0)
    assert fds() <= before


def test_limits_hold_for_results_that_come_on_disk_too(tmp_path: Path) -> None:
    """A worker that has no memory left leaves them there; here they are moved, or refused."""

    def on_disk() -> int:
        segment = Segment(str(tmp_path))
        segment.write(bytes(3 * MIB))
        return os.dup(segment.fd)

    for limits in ({"disk": MIB}, {"directory": None}):
        store = make(memory=4 * MIB, **limits)  # type: ignore[arg-type]
        blob = store.take_over(3 * MIB, fd=on_disk(), spill=True)
        assert (store.memory, store.disk) == (3 * MIB, 0)
        before = fds()
        with pytest.raises(PayloadTooLargeError):
            store.take_over(3 * MIB, fd=on_disk(), spill=True)
        gc.collect()
        assert fds() <= before
        assert blob.view() == bytes(3 * MIB)


def test_a_result_that_fits_nowhere_is_refused() -> None:
    """And its file is closed."""
    store = make(memory=4 * MIB, directory=None)
    segment = Segment()
    segment.write(b"x" * (5 * MIB))
    before = fds()
    with pytest.raises(PayloadTooLargeError, match="no directory to spill to"):
        store.take_over(5 * MIB, fd=os.dup(segment.fd), spill=True)
    gc.collect()
    assert fds() <= before


# Threads.


def test_room_made_in_one_thread_takes_nothing_from_another(store: BlobStore) -> None:
    """Blocks are parts of one file: to lengthen it never cuts off what somebody else wrote."""
    wrong: list[int] = []

    def run(number: int) -> None:
        for _ in range(400):
            blob = store.new(100_000)
            assert blob.segment is not None
            content = bytes([number]) * blob.size
            blob.segment.write(content, blob.offset)
            if os.pread(blob.segment.fd, blob.size, blob.offset) != content:
                wrong.append(number)
            held.append(blob)

    for _ in range(5):
        held: list[Blob] = []
        threads = [threading.Thread(target=run, args=(n,)) for n in range(1, 5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for blob in held:
            assert blob.view()[0], "it was written, and is gone"
    assert not wrong


def test_many_threads_hand_in_the_same() -> None:
    """They get one blob, and each its own content."""
    store = make(memory=2**30)
    common = np.arange(500_000)
    found: list[set[int]] = []
    errors: list[BaseException] = []
    gate = threading.Barrier(8)

    def run(thread: int) -> None:
        try:
            gate.wait()
            mine = set()
            kept = []
            for step in range(20):
                payload = composed(dumps(common.copy(), store))
                mine.add(payload.blobs[0].id)
                own = composed(dumps(np.full(300_000 + step, thread, np.int8), store))
                assert own.load()[-1] == thread
                assert payload.load()[-1] == 499_999
                kept += [payload, own]
            found.append(mine)
            held.append(kept)
        except BaseException as exc:
            errors.append(exc)

    held: list[Any] = []
    threads = [threading.Thread(target=run, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert len(set.union(*found)) == 1
    held.clear()
    store.sweep()
    assert store.memory == 0


def test_others_do_not_wait_while_much_is_copied() -> None:
    """The loop takes in results and frees blobs while a user hands in gigabytes."""
    store = make()
    reached, go_on = threading.Event(), threading.Event()

    class Slow(Segment):
        def write(self, data: bytes | memoryview, offset: int = 0) -> None:
            reached.set()
            go_on.wait(20)
            super().write(data, offset)

    arena = store._arenas[True] = Arena()
    arena.segment = Slow()
    thread = threading.Thread(target=dumps, args=(np.zeros(MIB, np.uint8), store))
    thread.start()
    assert reached.wait(20)
    other = threading.Thread(target=lambda: (store.sweep(), store.forget_cached()))
    other.start()
    other.join(10)
    assert not other.is_alive()
    go_on.set()
    thread.join()


def test_the_end_of_blobs_in_the_middle_of_it_all_does_no_harm() -> None:
    """The garbage collector may end a blob while its store is at work, in the same thread."""
    store = make(memory=2**30, cache=16 * MIB)
    ended: list[int] = []
    store.on_end = ended.append
    thresholds = gc.get_threshold()
    gc.set_threshold(1)
    try:
        for step in range(300):
            cycle: list[Any] = [dumps(np.full(9_000 + step, step), store)]
            cycle.append(cycle)
            del cycle
    finally:
        gc.set_threshold(*thresholds)
    gc.collect()
    store.forget_cached()
    assert store.memory == 0
    assert len(ended) == len(set(ended)) >= 300


# Options.


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"memory": 0}, "memory"),
        ({"memory": "lots"}, "memory"),
        ({"cache": -1}, "cache"),
        ({"spill_directory": "/nowhere/at/all"}, "/nowhere/at/all"),
        ({"spill_directory": 5}, "spill_directory"),
        ({"spill_directory": None}, "spill_directory"),
        ({"bucket": True}, "bucket"),
        ({"bucket": 5}, "bucket"),
        ({"compression": "no"}, "compression"),
        ({"bucket_threshold": "x"}, "bucket_threshold"),
    ],
)
def test_settings_out_of_range_are_refused_by_name(options: dict[str, Any], says: str) -> None:
    """The message names the setting and the value."""
    with pytest.raises(ConfigError, match=says):
        ObjectOptions(**options)


def test_sizes_may_be_words() -> None:
    """As everywhere else."""
    limits = ObjectOptions(memory="1GiB", disk="2GiB", cache="10MiB").limits()
    assert limits == Limits(2**30, 10 * MIB, "", 2**31)
    assert ObjectOptions(spill_directory=False).limits().directory is None


# Ends, while somebody else looks for the same.

_TURNS = 5000
_OFTEN = 1e-6
"""Seconds after which threads take turns, here."""


def side_by_side(work: Callable[[int], None], threads: int = 4) -> None:
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, range(threads)))


def test_a_blob_that_is_found_has_not_ended(
    store: BlobStore, restless: Callable[[float], None]
) -> None:
    """Its room would be another's, and its number be unknown where it is asked for."""
    restless(_OFTEN)
    ended: set[int] = set()
    store.on_end = ended.add
    content = os.urandom(1000)
    found: Counter[bool] = Counter()

    def work(_: int) -> None:
        for _ in range(_TURNS):
            blob = store.intern(content)
            assert bytes(blob.view()) == content
            found[blob.id in ended] += 1
            del blob

    side_by_side(work)
    assert found == {False: 4 * _TURNS}
    store.sweep()
    assert store.memory == 0


def test_a_blob_that_many_threads_want_shared_is_moved_once(
    restless: Callable[[float], None],
) -> None:
    """A second copy would never be given back, and who reads meanwhile would read beside it."""
    restless(_OFTEN)
    store = make(cache=MIB)
    content = os.urandom(1000)
    together = threading.Barrier(4)

    def work(_: int) -> None:
        for _ in range(500):
            together.wait(20)
            blob = store.intern(content)
            assert bytes(blob.view()) == content
            store.share(blob)
            del blob
            if together.wait(20) == 0:
                store.forget_cached()

    side_by_side(work)
    store.forget_cached()
    assert store.memory == 0
    assert not any(arena.used for arena in store._arenas.values())


def test_a_function_that_is_found_has_not_ended(
    store: BlobStore, restless: Callable[[float], None]
) -> None:
    """Workers would be told to forget it after its tasks had been sent to them."""
    restless(_OFTEN)
    ended: set[int] = set()
    functions = FunctionTable(ended.add, store)
    found: Counter[bool] = Counter()
    part = bytes(BLOB_BYTES + 1)

    def large() -> bytes:
        return part

    def work(_: int) -> None:
        for _ in range(_TURNS):
            function, _, _ = functions.call(large, (), {})
            assert function is not None
            for _ in range(3):
                pass  # it is used
            found[function.number in ended] += 1
            del function

    side_by_side(work)
    assert found == {False: 4 * _TURNS}
