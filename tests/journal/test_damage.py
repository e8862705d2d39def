"""Journals that are damaged, full, locked, foreign or too new: nothing wrong ever comes of it."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import sqlite3
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from journal_tasks import calls, large, square

from cloudexec import (
    BatchExecutor,
    ConfigError,
    JournalError,
    JournalLockedError,
    JournalVersionError,
)
from cloudexec._journal.sqlite import SqliteStore
from cloudexec._journal.store import Record

Program = Callable[..., "subprocess.Popen[str]"]
Open = Callable[..., BatchExecutor]


@contextmanager
def opened(path: Path) -> Iterator[SqliteStore]:
    store = SqliteStore(path)
    try:
        yield store
    finally:
        store.close()


def record(number: int) -> Record:
    """A result that is recognised by its number; every eighth is too large for a page."""
    size = 20_000 if number % 8 == 0 else 10
    payload = random.Random(number).randbytes(size)
    return Record(b"%020d" % number, b"version" * 4, "module:name", number / 8, payload)


def filled(path: Path, count: int) -> None:
    with opened(path) as store:
        for start in range(0, count, 20):
            store.write([record(n) for n in range(start, min(start + 20, count))])
        store.put_state("key", b"secret")


def found(path: Path, count: int) -> set[int]:
    """Open a journal, and return which results are there: those that are, are right."""
    with opened(path) as store:
        there = set()
        for number in range(count):
            result = store.find(record(number).key)
            if result is not None:
                assert (result.payload, result.seconds) == (record(number).payload, number / 8)
                there.add(number)
        return there


# In memory, where there is such a place: what is asked here is not how fast a disk is.
FAST = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


@pytest.fixture(scope="module")
def whole() -> Iterator[Path]:
    """A journal of 200 results that was closed, and one that was not."""
    directory = Path(tempfile.mkdtemp(dir=FAST))
    filled(directory / "closed", 200)
    store = SqliteStore(directory / "journal")
    for start in range(0, 200, 20):
        store.write([record(n) for n in range(start, start + 20)])
    for suffix in ("", "-wal"):
        shutil.copy(f"{directory / 'journal'}{suffix}", f"{directory / 'killed'}{suffix}")
    store.close()
    yield directory
    shutil.rmtree(directory)


def test_what_was_written_is_there_also_without_being_closed(whole: Path, tmp_path: Path) -> None:
    """A copy of the files of a journal in use is what a killed process leaves."""
    for suffix in ("", "-wal"):
        shutil.copy(f"{whole / 'killed'}{suffix}", tmp_path / f"journal{suffix}")
    assert found(tmp_path / "journal", 200) == set(range(200))


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(cut=st.integers(0, 10**9), name=st.sampled_from(["closed", "killed", "killed-wal"]))
def test_cut_anywhere_it_opens_and_has_nothing_wrong(whole: Path, cut: int, name: str) -> None:
    """Whatever is left of the file, or of its log, gives right results, or none; then all is as
    ever."""
    with tempfile.TemporaryDirectory(dir=FAST) as directory:
        path = Path(directory, "journal")
        kind = name.partition("-")[0]
        for suffix in ("", "-wal"):
            if os.path.exists(f"{whole / kind}{suffix}"):
                shutil.copy(f"{whole / kind}{suffix}", f"{path}{suffix}")
        victim = Path(f"{path}{name[len(kind) :]}")
        os.truncate(victim, cut % (victim.stat().st_size + 1))
        found(path, 200)
        with opened(path) as store:
            store.write([record(n) for n in range(200)])
        assert found(path, 200) == set(range(200))


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    at=st.integers(100, 10**9),
    garbage=st.binary(min_size=1, max_size=5000),
    name=st.sampled_from(["closed", "killed", "killed-wal"]),
)
def test_garbled_anywhere_it_has_nothing_wrong(
    whole: Path, at: int, garbage: bytes, name: str
) -> None:
    """What was overwritten is not taken for a result."""
    with tempfile.TemporaryDirectory(dir=FAST) as directory:
        path = Path(directory, "journal")
        kind = name.partition("-")[0]
        for suffix in ("", "-wal"):
            if os.path.exists(f"{whole / kind}{suffix}"):
                shutil.copy(f"{whole / kind}{suffix}", f"{path}{suffix}")
        with open(f"{path}{name[len(kind) :]}", "r+b") as file:
            file.seek(100 + at % (file.seek(0, 2) - 100))
            file.write(garbage)
        found(path, 200)


def test_most_of_a_journal_that_was_cut_is_saved(
    whole: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What stood before the cut is kept, the damaged file is put aside, and it is said."""
    path = tmp_path / "journal"
    shutil.copy(whole / "closed", path)
    os.truncate(path, path.stat().st_size * 9 // 10)
    left = found(path, 200)
    assert len(left) > 120
    (message,) = caplog.messages
    assert f"{len(left)} results could be recovered" in message
    assert (tmp_path / "journal.damaged").exists()


def test_state_is_kept_by_name(tmp_path: Path) -> None:
    """Bytes under names, beside the results."""
    filled(tmp_path / "journal", 1)
    with opened(tmp_path / "journal") as store:
        assert store.keeps_state
        assert store.get_state("key") == b"secret"
        store.put_state("key", b"other")
        store.put_state("more", b"")
        assert (store.get_state("key"), store.get_state("more")) == (b"other", b"")
        store.put_state("key", None)
        assert store.get_state("key") is None


def test_state_that_is_no_bytes_is_none(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A number is not taken for a size, and no journal stays shut; the next value is good."""
    for value in (1 << 60, "text", 0.5):
        filled(tmp_path / "journal", 1)
        with sqlite3.connect(tmp_path / "journal") as db:
            db.execute("UPDATE state SET value = ?", (value,))
        db.close()
        with opened(tmp_path / "journal") as store:
            assert store.get_state("key") is None
            store.put_state("key", b"whole")
            assert store.get_state("key") == b"whole"
    assert [text for text in caplog.messages if "has under 'key' cannot be used" in text]


def test_damaged_results_are_run_again(
    executor: Open, ran: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One in the file and one beside it; the others are still there."""
    with executor() as first:
        list(first.map(square, [ran] * 3, range(3)))
        before = first.submit(large, ran, 2_000_000).result()
    (beside,) = (tmp_path / "journal.blobs").iterdir()
    with open(beside, "r+b") as file:
        file.seek(1_000_000)
        file.write(b"?")
    with sqlite3.connect(tmp_path / "journal") as db:
        db.execute("UPDATE records SET value = x'4b02' WHERE id = 2")
    db.close()
    for resumed in (2, 4):
        with executor() as each:
            assert list(each.map(square, [ran] * 3, range(3))) == [0, 1, 4]
            after = each.submit(large, ran, 2_000_000).result()
            assert each.stats().tasks.resumed == resumed
    assert (before == after, len(after)) == (False, 2_000_000)
    assert sum(calls(ran).values()) == 6
    assert len([text for text in caplog.messages if "is damaged" in text]) == 1


def test_second_program_is_told_who_has_the_journal(
    executor: Open, program: Program, tmp_path: Path
) -> None:
    """Its process and machine; and it is free as soon as that process has been killed."""
    script = tmp_path / "holder.py"
    script.write_text(
        "import sys, time\n"
        "from cloudexec import BatchExecutor\n"
        "if __name__ == '__main__':\n"
        "    with BatchExecutor(1, journal=sys.argv[1]):\n"
        "        print('mine', flush=True)\n"
        "        time.sleep(60)\n"
    )
    holder = program(script, tmp_path / "journal")
    assert holder.stdout is not None
    assert holder.stdout.readline() == "mine\n"
    with pytest.raises(JournalLockedError, match=f"in use by process {holder.pid} on ") as caught:
        executor()
    assert (caught.value.pid, caught.value.host) == (holder.pid, os.uname().nodename)
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with executor() as mine:
        assert mine.submit(abs, -1).result() == 1
        with pytest.raises(JournalLockedError):
            executor()
    assert not (tmp_path / "journal.lock").exists()


def test_forked_child_does_not_hold_the_lock(executor: Open, tmp_path: Path) -> None:
    """What a program leaves behind is no reason for the next one not to start."""
    mine = executor()
    child = os.fork()
    if not child:
        signal.pause()
        os._exit(0)
    try:
        mine.shutdown()
        with executor():
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_newer_and_foreign_files_are_refused_and_left_as_they_are(
    executor: Open, tmp_path: Path
) -> None:
    """Each with an error of its own that says what to do."""
    filled(tmp_path / "newer", 1)
    with sqlite3.connect(tmp_path / "newer") as db:
        db.execute("PRAGMA user_version = 7")
    db.close()
    with sqlite3.connect(tmp_path / "other") as db:
        db.execute("CREATE TABLE mine (x)")
    db.close()
    (tmp_path / "text").write_text("notes\n" * 50)
    (tmp_path / "folder").mkdir()
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    with pytest.raises(JournalVersionError, match="has version 7") as caught:
        executor("newer")
    assert caught.value.version == 7
    for name, why in (
        ("other", "is not a journal of cloudexec"),
        ("text", "is not a journal of cloudexec"),
    ):
        with pytest.raises(JournalError, match=why):
            executor(name)
    after = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    assert after == before


def test_journal_where_nobody_may_write_is_an_error(executor: Open) -> None:
    """It is said when the executor is made, not when the first result is there."""
    with pytest.raises(JournalError, match="cannot be used"):
        executor("/proc/journal")
    with pytest.raises(TypeError, match=r"journal must be a str or os\.PathLike"):
        executor(journal=3)


def test_value_that_cannot_name_a_journal_is_an_error_that_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Value, cause and remedy; nothing is made."""
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    Path("file").touch()
    before = sorted(tmp_path.rglob("*"))
    forms = "give a file's path, or 's3://bucket/prefix'"
    for journal, why in (
        ("", f"journal='' is empty: {forms}"),
        (" ", f"journal=' ' is empty: {forms}"),
        ("a\0b", f"has a null character in it: {forms}"),
        (".", "journal='.' is a directory: name a file in it, such as 'results.journal'"),
        (Path("folder"), "journal='folder' is a directory: name a file in it, such as 'folder/"),
        ("nowhere/x", f"as there is no directory {tmp_path / 'nowhere'}: make it, or give another"),
        ("file/x", f"as there is no directory {tmp_path / 'file'}: make it, or give another"),
        ("x" * 300, "(File name too long): give another path"),
        ("~nobody-of-that-name/x", f"names a home that is not known: {forms}"),
        ("s3://", f"journal='s3://' names no bucket: {forms}"),
        ("s3:///prefix", f"names no bucket: {forms}"),
        ("s3://bucket", f"names no prefix: {forms}"),
        ("s3://bucket/", f"names no prefix: {forms}"),
        ("S3://bucket/prefix", f"begins with 'S3://': {forms}"),
        ("https://host/path", f"begins with 'https://': {forms}"),
    ):
        with pytest.raises(ConfigError, match=re.escape(why)):
            BatchExecutor(1, journal=journal)
    assert sorted(tmp_path.rglob("*")) == before


FULL = """
import logging, resource, sys
from cloudexec import BatchExecutor
from journal_tasks import large

if __name__ == "__main__":
    logging.basicConfig()
    with BatchExecutor(1, journal=sys.argv[1], output="off") as executor:
        first = executor.submit(large, sys.argv[2], 1600)
        if first.done():
            print(len(executor.submit(large, sys.argv[2], 16_944).result()))
            sys.exit()
        print(len(first.result()))
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
        sizes = [len(f.result()) for f in [executor.submit(large, sys.argv[2], 16000 + 16 * n)
                                           for n in range(60)]]
        print(sum(sizes) == sum(16000 + 16 * n for n in range(60)), executor.stats().tasks)
"""


@pytest.mark.timeout(60)
def test_full_disk_costs_no_results(program: Program, tmp_path: Path, ran: str) -> None:
    """The program goes on, it is said once, and what was recorded before is good."""
    script = tmp_path / "full.py"
    script.write_text(FULL)
    process = program(script, tmp_path / "journal", ran)
    out, err = process.communicate(timeout=40)
    assert process.returncode == 0, err
    assert out.startswith("1600\nTrue"), err
    assert err.count("results that are not in the journal will be run again") == 1
    out, err = program(script, tmp_path / "journal", ran).communicate(timeout=40)
    assert out == "16944\n", err


@pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("mount") is None, reason="mounts a file system"
)
def test_full_file_system_that_is_emptied_is_used_again(
    executor: Open, ran: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Large results that have no room are given all the same."""
    place = tmp_path / "small"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", place], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("may not mount a file system here")
    try:
        with executor("small/journal") as each:
            results = [each.submit(large, ran, 1_500_000 + 16 * n) for n in range(4)]
            assert [len(result.result()) for result in results] == [
                1_500_000 + 16 * n for n in range(4)
            ]
        assert any("No space left on device" in text for text in caplog.messages)
        with executor("small/journal") as again:
            assert again.submit(large, ran, 1_500_000).done()
            assert not again.submit(large, ran, 1_500_048).done()
    finally:
        subprocess.run(["umount", place], check=True)
