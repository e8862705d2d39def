"""A journal in a SQLite file, with a directory beside it for large results.

Results are appended to the table ``records``. The table ``keys``, which finds results by key, is
brought up to date only when the file is opened, because a run never looks up its own results. The
database is in WAL mode (write-ahead log): a commit is handed to the operating system at once, so a
killed process loses nothing; ``sync`` forces it to the disk a few times a second, for loss of
power. SQLite's checksums detect where the log ends if it was written in part. Each result carries a
digest of its own, and a result that does not match its digest is not used.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import sqlite3
import stat
import struct
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cloudexec._errors import ConfigError, JournalError, JournalVersionError
from cloudexec._journal.lock import Lock
from cloudexec._journal.ownership import check_folder, check_ours, claim, real_path
from cloudexec._journal.packing import check_of, pack, unpack
from cloudexec._journal.store import Found, Record
from cloudexec._log import Log
from cloudexec._records import Composed

__all__ = ["SqliteStore"]

_logger = Log()
APPLICATION = 0x43586A6C
"""The application id in the file's header, which marks a journal of cloudexec. (SQLite, "Database
File Format", 1.3.)"""
VERSION = 1
_MAGIC = b"SQLite format 3\0"
_INLINE = 1024 * 1024
"""Bytes: results larger than this have a file of their own."""
_PICKLE, _COMPOSED, _FILE = range(3)
_BUSY_SECONDS = 10.0
_PROGRAM = "program "
"""Prefix of the names under which the table ``state`` holds the manifests of programs."""
_CHECKPOINT_PAGES = 4000
_CHUNK = 1024 * 1024
_MOST_UNSYNCED = 64
_DAMAGE = (sqlite3.DatabaseError, ValueError, TypeError)
"""Errors that a damaged file causes. SQLite's error text can hold damaged bytes that do not decode,
which raises ValueError."""
_NO_DAMAGE = frozenset(
    {
        sqlite3.SQLITE_BUSY,
        sqlite3.SQLITE_LOCKED,
        sqlite3.SQLITE_READONLY,
        sqlite3.SQLITE_FULL,
        sqlite3.SQLITE_CANTOPEN,
        sqlite3.SQLITE_PERM,
        sqlite3.SQLITE_NOMEM,
        sqlite3.SQLITE_IOERR,
    }
)
_SCHEMA = """
CREATE TABLE functions (id INTEGER PRIMARY KEY, name TEXT NOT NULL, digest BLOB NOT NULL UNIQUE);
CREATE TABLE records (
    id INTEGER PRIMARY KEY, key BLOB NOT NULL, function INTEGER NOT NULL, seconds REAL NOT NULL,
    kind INTEGER NOT NULL, size INTEGER NOT NULL, digest BLOB NOT NULL, value BLOB);
CREATE TABLE keys (key BLOB PRIMARY KEY, record INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE state (name TEXT PRIMARY KEY, value BLOB NOT NULL);
CREATE TABLE marks (name TEXT PRIMARY KEY, value INTEGER NOT NULL);
INSERT INTO marks VALUES ('open', 0), ('indexed', 0), ('synced', 0);
"""
_FIND = """
SELECT seconds, kind, size, digest, value, records.key FROM keys
JOIN records ON records.id = keys.record WHERE keys.key = ?
"""
_INSERT = """
INSERT INTO records (key, function, seconds, kind, size, digest, value) VALUES (?, ?, ?, ?, ?, ?, ?)
"""


class SqliteStore:
    """Implements ``store.Store`` with a SQLite file.

    Args:
        path: The file. It is made if there is none.

    Raises:
        ConfigError: If no file can have this path.
        JournalLockedError: If another program uses the journal.
        JournalVersionError: If a newer version of cloudexec wrote it.
        JournalError: If the file is no journal, cannot be written, or may have been written by
            another user.
    """

    holds_back = True
    keeps_state = True
    interval = 0.0

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        try:
            self._path = path = real_path(path)
            is_folder, has_folder = path.is_dir(), path.parent.is_dir()
        except (OSError, RuntimeError) as exc:  # the path is too long, or its links form a circle
            why = exc.strerror if isinstance(exc, OSError) else str(exc)
            raise ConfigError(
                f"journal={self.name!r} cannot be a file's path ({why}): give another path"
            ) from exc
        self._blobs = path.with_name(f"{path.name}.blobs")
        self._writing = threading.Lock()
        self._reading = threading.Lock()
        self._functions: dict[bytes, int] = {}
        self._unsynced: list[int] = []  # descriptors of files that were written
        self._is_dirty = False
        self._is_damaged = False
        self.earlier = 0
        self.versions: dict[str, dict[bytes, int]] = {}
        self.programs: dict[bytes, bytes] = {}
        if is_folder:
            raise ConfigError(
                f"journal={self.name!r} is a directory: name a file in it, such as "
                f"{str(Path(self.name, 'results.journal'))!r}"
            )
        if not has_folder:
            raise ConfigError(
                f"journal={self.name!r} cannot be made, as there is no directory {path.parent}: "
                f"make it, or give another path"
            )
        with self._translated("opened"):
            check_folder(path.parent)
        self._lock = Lock(path)
        try:
            with self._translated("opened"):
                self._open()
        except BaseException:
            self._disconnect()
            self._lock.release()
            raise

    @contextmanager
    def _translated(self, what: str) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as exc:
            raise JournalError(f"the journal {self.name} cannot be {what}: {exc}") from exc
        except OSError as exc:
            where = f"{exc.filename}: " if exc.filename else ""
            raise JournalError(
                f"the journal {self.name} cannot be {what}: {where}{exc.strerror}"
            ) from exc

    # Opening.

    def _open(self) -> None:
        path = self._path
        for each, is_folder in ((path, False), (self._blobs, True)):
            if os.path.lexists(each):
                check_ours(each, os.lstat(each), is_folder=is_folder)
        if not path.exists() or not path.stat().st_size:
            _create(path)
        elif not os.access(path, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        self._lock.hold()
        is_whole = _check_header(path)
        # SQLite reads the files of these names as part of the database. They are made here first,
        # so that no other user can put one there.
        made: list[Path] = []
        try:
            for each in self._siblings():
                if claim(each):
                    made.append(each)
            self._open_database(is_whole=is_whole)
        except BaseException:
            self._disconnect()
            for each in made:
                each.unlink(missing_ok=True)
            raise
        for each in made:
            if each.name.endswith("-journal"):
                each.unlink(missing_ok=True)
        for leftover in self._blobs.glob("*.part"):
            leftover.unlink(missing_ok=True)

    def _siblings(self) -> list[Path]:
        return [Path(f"{self._path}{suffix}") for suffix in ("-journal", "-wal", "-shm")]

    def _open_database(self, *, is_whole: bool) -> None:
        try:
            if not is_whole:
                raise sqlite3.DatabaseError("its beginning is damaged")
            self._connect()
        except _DAMAGE as exc:
            if _is_no_damage(exc):
                raise
            self._disconnect()
            self._replace(exc)
            self._connect()

    def _connect(self) -> None:
        links = self._path.stat().st_nlink
        log = Path(f"{self._path}-wal")
        has_log = log.exists() and log.stat().st_size > 0
        self._db = _connection(self._path)
        was_open = self._mark("open")
        if was_open and links > 1 and not has_log:
            raise JournalError(
                f"the journal {self.name} has {links} names, and the program that had it was "
                f"killed: its last results are beside another of these names. Give that one, or "
                f"remove it and what lies beside it"
            )
        if was_open:
            # The program that used it was killed, or the machine stopped.
            found = [row[0] for row in self._db.execute("PRAGMA quick_check(1)")]
            if found != ["ok"]:
                raise sqlite3.DatabaseError(found[0])
        self._db.execute("BEGIN IMMEDIATE")
        self._db.execute("UPDATE marks SET value = 1 WHERE name = 'open'")
        self._db.execute(
            "INSERT OR REPLACE INTO keys SELECT key, id FROM records WHERE id > ? ORDER BY key, id",
            (self._mark("indexed"),),
        )
        self._db.execute(
            "UPDATE marks SET value = (SELECT coalesce(max(id), 0) FROM records) "
            "WHERE name = 'indexed'"
        )
        self._db.execute("COMMIT")
        # Write the mark 'open' from the log into the file: a program that opens the file by another
        # name (a hard link) has no log beside that name, and must see the mark.
        self._db.execute("PRAGMA wal_checkpoint(PASSIVE)")
        self._functions = {
            digest: number
            for number, digest in self._db.execute("SELECT id, digest FROM functions")
        }
        self.earlier = self._db.execute("SELECT count(*) FROM keys").fetchone()[0]
        self.versions = {}
        for name, digest, count in self._db.execute(
            "SELECT name, functions.digest, count(*) FROM records JOIN functions "
            "ON functions.id = records.function GROUP BY functions.id"
        ):
            self.versions.setdefault(name, {})[digest] = count
        self.programs = {
            bytes.fromhex(name.removeprefix(_PROGRAM)): value
            for name, value in self._db.execute(
                "SELECT name, value FROM state WHERE name GLOB ?", (f"{_PROGRAM}*",)
            )
            if isinstance(value, bytes)
        }
        self._reader = _connection(self._path)

    def _mark(self, name: str) -> int:
        row = self._db.execute("SELECT value FROM marks WHERE name = ?", (name,)).fetchone()
        return int(row[0])

    def _disconnect(self) -> None:
        for name in ("_reader", "_db"):
            connection = self.__dict__.pop(name, None)
            if connection is not None:
                connection.close()

    def _replace(self, why: Exception) -> None:
        """Replace a damaged file by a new one with all results that can still be read.

        The damaged file is kept under another name.
        """
        aside = self._path.with_name(f"{self._path.name}.damaged")
        with _private_folder(self._path) as folder:
            fresh = folder / "journal"
            _make(fresh)
            saved = _save(self._path, fresh)
            for suffix in ("", "-wal", "-shm"):
                old = Path(f"{self._path}{suffix}")
                Path(f"{aside}{suffix}").unlink(missing_ok=True)
                if old.exists():
                    os.replace(old, f"{aside}{suffix}")
            os.replace(fresh, self._path)
        self._lock.hold()
        for each in self._siblings():
            claim(each)
        _logger.warning(
            "the journal %s was damaged (%s): %d results could be recovered, all other calls run "
            "again; the file as it was is %s",
            self.name,
            why,
            saved,
            aside,
        )

    # Results.

    def find(self, key: bytes) -> Found | None:
        try:
            with self._reading:
                row = self._reader.execute(_FIND, (key,)).fetchone()
        except _DAMAGE as exc:
            self._damaged(str(exc))
            return None
        if row is None:
            return None
        seconds, kind, size, digest, value, stored = row
        try:
            if stored != key:
                raise JournalError("it is another's")
            if kind == _FILE:
                payload, found = self._open_file(key, size)
            else:
                if not isinstance(value, bytes) or len(value) != size:
                    raise JournalError("it has another size")
                found = check_of(key, [value])
                payload = value if kind == _PICKLE else unpack(size, _reader_of(value))
            if found != digest:
                raise JournalError("its digest does not match")
            return Found(float(seconds), payload)
        except (JournalError, OSError, TypeError, ValueError, struct.error) as exc:
            self._damaged(f"a result cannot be used: {exc}")
            return None

    def _damaged(self, why: str) -> None:
        level = logging.DEBUG if self._is_damaged else logging.WARNING
        self._is_damaged = True
        _logger.log(
            level,
            "the journal %s is damaged (%s): results that cannot be read are computed again. This "
            "is said once for each run",
            self.name,
            why,
        )

    def _open_file(self, key: bytes, size: int) -> tuple[Any, bytes]:
        path = self._file_of(key)
        # The whole file is read now, so that damage is found before the call counts as finished.
        with open(path, "rb", buffering=0) as file:
            if os.fstat(file.fileno()).st_size != size:
                raise JournalError("it has another size")
            found = hashlib.sha256(key)
            chunk = bytearray(_CHUNK)
            while count := file.readinto(chunk):
                found.update(memoryview(chunk)[:count])
        return unpack(size, _reader_of_file(path)), found.digest()[:8]

    def _file_of(self, key: bytes) -> Path:
        return self._blobs / key.hex()

    def write(self, records: Sequence[Record]) -> None:
        with self._writing, self._translated("written"):
            rows = list(map(self._row, records))
            self._is_dirty = True
            with self._transaction():
                for record in records:
                    if record.function not in self._functions:
                        self._add_function(record.function, record.name)
                self._db.executemany(
                    _INSERT,
                    [
                        (record.key, self._functions[record.function], record.seconds, *row)
                        for record, row in zip(records, rows, strict=True)
                    ],
                )
        if len(self._unsynced) > _MOST_UNSYNCED:
            self.sync()

    def _add_function(self, digest: bytes, name: str) -> None:
        done = self._db.execute(
            "INSERT INTO functions (name, digest) VALUES (?, ?)", (name, digest)
        )
        assert done.lastrowid is not None
        self._functions[digest] = done.lastrowid

    def _row(self, record: Record) -> tuple[int, int, bytes, bytes | None]:
        payload = record.payload
        if type(payload) is bytes:
            return _PICKLE, len(payload), check_of(record.key, (payload,)), payload
        assert isinstance(payload, Composed)
        pieces = pack(payload)
        size = sum([memoryview(piece).nbytes for piece in pieces])
        check = check_of(record.key, pieces)
        if size <= _INLINE:
            return _COMPOSED, size, check, b"".join(pieces)
        self._write_file(record.key, pieces)
        return _FILE, size, check, None

    def _write_file(self, key: bytes, pieces: list[Any]) -> None:
        self._blobs.mkdir(mode=0o700, exist_ok=True)
        check_ours(self._blobs, os.lstat(self._blobs), is_folder=True)
        path = self._file_of(key)
        part = path.with_name(f"{path.name}.part")
        fd = os.open(part, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            for piece in pieces:
                view = memoryview(piece)
                while view:
                    view = view[os.write(fd, view) :]
            os.replace(part, path)
        except BaseException:
            os.close(fd)
            part.unlink(missing_ok=True)
            raise
        self._unsynced.append(fd)

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        before = dict(self._functions)
        try:
            self._db.execute("BEGIN IMMEDIATE")
            yield
            self._db.execute("COMMIT")
        except BaseException:
            self._functions = before
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise

    def sync(self) -> None:
        with self._writing, self._translated("written"):
            if self._is_dirty:
                self._sync()

    def _sync(self) -> None:
        unsynced, self._unsynced = self._unsynced, []
        try:
            for fd in unsynced:
                os.fsync(fd)
        finally:
            for fd in unsynced:
                os.close(fd)
        if unsynced:
            _sync_directory(self._blobs)
        # Any commit in this mode forces the whole log to the disk.
        with self._durable():
            self._db.execute("UPDATE marks SET value = value + 1 WHERE name = 'synced'")
        self._is_dirty = False

    @contextmanager
    def _durable(self) -> Iterator[None]:
        self._db.execute("PRAGMA synchronous = FULL")
        try:
            yield
        finally:
            self._db.execute("PRAGMA synchronous = NORMAL")

    # State.

    def get_state(self, name: str) -> bytes | None:
        with self._writing, self._translated("read"):
            row = self._db.execute("SELECT value FROM state WHERE name = ?", (name,)).fetchone()
        if row is None:
            return None
        if not isinstance(row[0], bytes):
            self._damaged(f"what it has under {name!r} cannot be used")
            return None
        return row[0]

    def put_state(self, name: str, value: bytes | None) -> None:
        with self._writing, self._translated("written"), self._durable():
            if value is None:
                self._db.execute("DELETE FROM state WHERE name = ?", (name,))
            else:
                self._db.execute("INSERT OR REPLACE INTO state VALUES (?, ?)", (name, value))

    def put_program(self, digest: bytes, value: bytes) -> None:
        self.put_state(f"{_PROGRAM}{digest.hex()}", value)

    def close(self) -> None:
        try:
            with self._translated("closed"):
                if self._is_dirty:
                    self._sync()
                # A damaged file keeps its mark 'open', so that it is checked when opened again.
                if not self._is_damaged:
                    with self._durable():
                        self._db.execute("UPDATE marks SET value = 0 WHERE name = 'open'")
        finally:
            for fd in self._unsynced:
                os.close(fd)
            self._unsynced.clear()
            with self._reading:
                self._disconnect()
            self._lock.release()


def _is_no_damage(exc: Exception) -> bool:
    """Say whether an error has another cause than damage, such as a full disk or a busy file."""
    code: int = getattr(exc, "sqlite_errorcode", 0)
    return code & 0xFF in _NO_DAMAGE and code != sqlite3.SQLITE_IOERR_SHORT_READ


def _connection(path: Path) -> sqlite3.Connection:
    db = sqlite3.connect(path, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False)
    try:
        for setting in (
            "journal_mode = WAL",
            "synchronous = NORMAL",
            "fullfsync = ON",  # on macOS, a plain fsync does not force data to the disk
            f"wal_autocheckpoint = {_CHECKPOINT_PAGES}",
        ):
            db.execute(f"PRAGMA {setting}")
    except BaseException:
        db.close()
        raise
    return db


@contextmanager
def _private_folder(path: Path) -> Iterator[Path]:
    """Make a temporary directory beside a journal that no other user can write to."""
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        yield Path(folder)


def _create(path: Path) -> None:
    """Make an empty journal. It is built under another name, so that nobody sees it half made."""
    with _private_folder(path) as folder:
        _make(folder / "journal")
        os.replace(folder / "journal", path)
    _sync_directory(path.parent)


def _make(path: Path) -> None:
    claim(path)
    db = sqlite3.connect(path, isolation_level=None)
    try:
        db.execute(f"PRAGMA application_id = {APPLICATION}")
        db.execute(f"PRAGMA user_version = {VERSION}")
        db.executescript(f"BEGIN; {_SCHEMA} COMMIT;")
    finally:
        db.close()


def _check_header(path: Path) -> bool:
    """Check that a file is a journal, before anything is written to it.

    Returns:
        Whether its header is complete.

    Raises:
        JournalError: If the file is no journal.
        JournalVersionError: If a newer version of cloudexec wrote it.
    """
    with open(path, "rb") as file:
        header = file.read(100)
    if len(header) < 100 and header[: len(_MAGIC)] == _MAGIC[: len(header)]:
        return False
    (application,) = struct.unpack(">I", header[68:72]) if len(header) == 100 else (0,)
    if not header.startswith(_MAGIC) or application != APPLICATION:
        raise JournalError(
            f"{path} is not a journal of cloudexec: give another path, or remove the file"
        )
    (version,) = struct.unpack(">I", header[60:64])
    if version > VERSION:
        raise JournalVersionError(
            f"the journal {path} has version {version}, and this cloudexec knows versions up to "
            f"{VERSION}: use the newer cloudexec that wrote it, or begin another journal",
            version=version,
        )
    return True


def _save(damaged: Path, fresh: Path) -> int:
    """Copy what can be read of a damaged journal into a new one; return the number of results."""
    target = sqlite3.connect(fresh, isolation_level=None)
    source = sqlite3.connect(damaged, isolation_level=None)
    saved = 0
    try:
        target.execute("BEGIN")
        try:
            # Without this, SQLite refuses to read a file that is shorter than its header says.
            source.execute("PRAGMA writable_schema = ON")
            for row in _readable(source, "functions", "id, name, digest"):
                target.execute("INSERT OR IGNORE INTO functions VALUES (?, ?, ?)", row)
            columns = "id, key, function, seconds, kind, size, digest, value"
            for row in _readable(source, "records", columns):
                if _is_whole(row):
                    target.execute(_INSERT, row[1:])
                    saved += 1
            for row in source.execute("SELECT name, value FROM state"):
                target.execute("INSERT INTO state VALUES (?, ?)", row)
        except _DAMAGE:
            pass  # nothing more can be read
        target.execute("COMMIT")
    finally:
        source.close()
        target.close()
    return saved


def _is_whole(row: tuple[Any, ...]) -> bool:
    _, key, function, seconds, kind, size, digest, value = row
    if not (isinstance(key, bytes) and isinstance(function, int) and isinstance(seconds, float)):
        return False
    if kind == _FILE:
        return isinstance(size, int) and isinstance(digest, bytes) and value is None
    return isinstance(value, bytes) and len(value) == size and check_of(key, (value,)) == digest


def _readable(source: sqlite3.Connection, table: str, columns: str) -> Iterator[tuple[Any, ...]]:
    """Yield the rows of a table in order, and skip rows that cannot be read."""
    last, step = 0, 1
    while last < 1 << 62:
        try:
            for row in source.execute(
                f"SELECT {columns} FROM {table} WHERE id > ? ORDER BY id", (last,)
            ):
                if not last < row[0] < 1 << 62:
                    raise ValueError  # damaged pages can refer to each other in a circle
                last, step = row[0], 1
                yield row
            return
        except _DAMAGE:
            last += step
            step *= 2


def _reader_of(value: bytes) -> Callable[[int, memoryview], None]:
    view = memoryview(value)

    def read(offset: int, target: memoryview) -> None:
        target[:] = view[offset : offset + len(target)]

    return read


def _reader_of_file(path: Path) -> Callable[[int, memoryview], None]:
    def read(offset: int, target: memoryview) -> None:
        with open(path, "rb", buffering=0) as file:
            file.seek(offset)
            while target:
                count = file.readinto(target)
                if not count:
                    raise JournalError(f"{path} is shorter than it was")
                target = target[count:]

    return read


def _sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            os.fsync(fd)
    finally:
        os.close(fd)
