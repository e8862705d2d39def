"""A journal is one program's and one user's: nobody else reads, writes, links or replaces it."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from cloudexec import BatchExecutor, JournalError, JournalLockedError
from cloudexec._journal.sqlite import SqliteStore
from cloudexec._journal.store import Record

Program = Callable[..., "subprocess.Popen[str]"]
Open = Callable[..., BatchExecutor]

STRANGER = 12345
RECORD = Record(b"k" * 20, b"v" * 32, "module:name", 1.0, b"result")

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="gives files to another user")


def filled(path: Path) -> Path:
    store = SqliteStore(path)
    store.write([RECORD])
    store.close()
    return path


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_lock_does_not_follow_a_link_to_a_file_of_ours(executor: Open, tmp_path: Path) -> None:
    """What the link leads to is left as it is, whether it is there or not."""
    precious = tmp_path / "precious"
    precious.write_text("notes")
    for target in (precious, tmp_path / "nowhere"):
        (tmp_path / "journal.lock").symlink_to(target)
        with pytest.raises(JournalError, match=r"journal\.lock is a symbolic link"):
            executor()
        (tmp_path / "journal.lock").unlink()
    assert names(tmp_path) == ["precious"]
    assert precious.read_text() == "notes"


def test_lock_does_not_empty_a_file_that_is_no_lock(executor: Open, tmp_path: Path) -> None:
    """Neither one that happens to have the name, nor one that has another name, too."""
    lock = tmp_path / "journal.lock"
    lock.write_text("notes")
    lock.chmod(0o600)
    with pytest.raises(JournalError, match="no lock of a journal"):
        executor()
    assert lock.read_text() == "notes"
    lock.write_text("")
    os.link(lock, tmp_path / "other")
    with pytest.raises(JournalError, match="no lock of a journal"):
        executor()
    lock.unlink()
    lock.mkdir()
    with pytest.raises(JournalError):
        executor()
    lock.rmdir()
    lock.write_text('{"pid": 1, "host": "here"}')  # of a program that was killed
    lock.chmod(0o600)
    with executor() as each:
        assert each.submit(abs, -1).result() == 1


def test_lock_holds_for_every_name_of_a_journal(
    executor: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Links of both kinds, links to links, relative paths and other ways to a folder."""
    with executor() as each:
        assert each.submit(abs, -1).result() == 1
        os.link(tmp_path / "journal", tmp_path / "hard")
        (tmp_path / "soft").symlink_to("journal")
        (tmp_path / "softer").symlink_to(tmp_path / "soft")
        (tmp_path / "folder").symlink_to(tmp_path)
        (tmp_path / "folder2").mkdir()
        (tmp_path / "folder2" / "up").symlink_to("../hard")
        for name in ("soft", "softer", "hard", "folder/journal", "folder/hard", "folder2/up"):
            with pytest.raises(JournalLockedError, match="in use by") as caught:
                executor(name)
            assert caught.value.pid == os.getpid(), name
        monkeypatch.chdir(tmp_path)
        with pytest.raises(JournalLockedError):
            executor(journal="./folder2/../journal")
        assert each.submit(abs, -2).result() == 2  # its own locks are as they were
    for name in ("softer", "hard"):
        with executor(name) as again:
            assert again.submit(abs, -1).done()


def test_lock_holds_between_programs_by_whatever_name(program: Program, tmp_path: Path) -> None:
    """The process that has it is named, and after its death it is nobody's."""
    script = tmp_path / "holder.py"
    script.write_text(
        "import sys, time\n"
        "from pathlib import Path\n"
        "from cloudexec._journal.sqlite import SqliteStore\n"
        "store = SqliteStore(Path(sys.argv[1]))\n"
        "print('mine', flush=True)\n"
        "time.sleep(60)\n"
    )
    filled(tmp_path / "journal")
    os.link(tmp_path / "journal", tmp_path / "hard")
    holder = program(script, tmp_path / "hard")
    assert holder.stdout is not None
    assert holder.stdout.readline() == "mine\n"
    with pytest.raises(JournalLockedError) as caught:
        SqliteStore(tmp_path / "journal")
    assert caught.value.pid == holder.pid
    holder.kill()
    holder.wait()
    # What it wrote last is beside the name that it had.
    with pytest.raises(JournalError, match="has 2 names"):
        SqliteStore(tmp_path / "journal")
    for name in ("hard", "journal"):
        store = SqliteStore(tmp_path / name)
        assert store.find(RECORD.key) is not None
        store.close()


@needs_root
@pytest.mark.parametrize("suffix", ["", "-wal", "-shm", "-journal", ".lock", ".blobs"])
def test_journal_of_another_user_is_refused(tmp_path: Path, suffix: str) -> None:
    """The file, and what is read or written beside it: before anything of it is."""
    path = filled(tmp_path / "journal")
    victim = Path(f"{path}{suffix}")
    if suffix == ".blobs":
        victim.mkdir(mode=0o700)
    elif suffix:
        victim.touch(0o600)
    os.chown(victim, STRANGER, STRANGER)
    before = names(tmp_path)
    with pytest.raises(JournalError) as caught:
        SqliteStore(path)
    mode = "0700" if suffix == ".blobs" else "0600"
    said = str(caught.value)
    for each in (f"{victim} belongs to user {STRANGER}", f"(mode {mode})", "chown 0 "):
        assert each in said
    assert names(tmp_path) == before
    os.chown(victim, 0, 0)
    SqliteStore(path).close()


@pytest.mark.parametrize("suffix", ["", "-wal", "-shm", "-journal", ".lock", ".blobs"])
@pytest.mark.parametrize("right", [0o020, 0o002])
def test_journal_that_others_may_write_is_refused(tmp_path: Path, suffix: str, right: int) -> None:
    """The message says which file, whose it is, its mode, and what to do; done, it opens."""
    path = filled(tmp_path / "journal")
    victim = Path(f"{path}{suffix}")
    if suffix == ".blobs":
        victim.mkdir()
    else:
        victim.touch()
    right |= 0o700 if suffix == ".blobs" else 0o600
    victim.chmod(right)
    with pytest.raises(JournalError) as caught:
        SqliteStore(path)
    said = str(caught.value)
    remedy = f"chmod {700 if suffix == '.blobs' else 600} {victim}"
    owner = f"user {os.geteuid()} (mode {right:04o})"
    assert remedy in said
    assert owner in said
    subprocess.run(remedy.split(), check=True)
    store = SqliteStore(path)
    assert store.find(RECORD.key) is not None
    store.close()


@pytest.mark.parametrize("suffix", ["-wal", "-shm", "-journal", ".blobs"])
def test_links_beside_a_journal_are_not_followed(tmp_path: Path, suffix: str) -> None:
    """In a folder where others can make files, they could have us write to one of ours."""
    path = filled(tmp_path / "journal")
    (tmp_path / "elsewhere").mkdir()
    precious = tmp_path / "elsewhere" / "precious"
    precious.write_text("notes")
    target = precious.parent if suffix == ".blobs" else precious
    Path(f"{path}{suffix}").symlink_to(target)
    with pytest.raises(JournalError, match="is a symbolic link"):
        SqliteStore(path)
    assert precious.read_text() == "notes"
    assert names(precious.parent) == ["precious"]


@needs_root
def test_link_of_another_user_is_not_followed(tmp_path: Path) -> None:
    """It would have us make a file where that user wants it."""
    folder = tmp_path / "shared"
    folder.mkdir()
    folder.chmod(0o1777)
    link = folder / "journal"
    link.symlink_to(tmp_path / "target")
    os.chown(link, STRANGER, STRANGER, follow_symlinks=False)
    with pytest.raises(JournalError, match=f"link of user {STRANGER}"):
        SqliteStore(link)
    assert not (tmp_path / "target").exists()
    filled(tmp_path / "target")
    with pytest.raises(JournalError, match=f"link of user {STRANGER}"):
        SqliteStore(link)


def test_folder_in_which_everybody_replaces_files_is_refused(tmp_path: Path) -> None:
    """Unless its sticky bit is set, as that of ``/tmp`` is."""
    folder = tmp_path / "shared"
    folder.mkdir()
    folder.chmod(0o777)
    with pytest.raises(JournalError, match=r"everybody may replace files in .* \(owner: user "):
        SqliteStore(folder / "journal")
    assert names(folder) == []
    folder.chmod(0o1777)
    filled(folder / "journal")
    assert names(folder) == ["journal"]


def test_files_that_are_made_are_private(tmp_path: Path) -> None:
    """Whatever the umask is, from the first moment to the last."""
    umask = os.umask(0)
    try:
        store = SqliteStore(tmp_path / "journal")
        store.write([RECORD])
        modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
        assert modes == dict.fromkeys(
            ("journal", "journal-wal", "journal-shm", "journal.lock"), 0o600
        )
        # A damaged one is put aside, and what can be saved of it is private, too.
        store.close()
        os.truncate(tmp_path / "journal", 5000)
        SqliteStore(tmp_path / "journal").close()
        shutil.rmtree(tmp_path / "journal.blobs", ignore_errors=True)
        modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
        assert set(modes.values()) == {0o600}
        assert names(tmp_path) == ["journal", "journal.damaged"]
    finally:
        os.umask(umask)
