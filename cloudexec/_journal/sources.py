"""The code of one module as it lies on the disk, and what it imports.

Nothing is run for it. Two sources are the same code if their syntax trees are the same: comments
and layout do not count, docstrings do, as code can read them.
"""

from __future__ import annotations

import ast
import dis
import hashlib
import importlib.machinery
import importlib.util
import marshal
import os
import re
import struct
import textwrap
import time
import warnings
from collections.abc import Iterable, Iterator
from types import CodeType
from typing import Any, NamedTuple

__all__ = [
    "COARSE",
    "Source",
    "code_digest",
    "imports_in",
    "source_of",
    "stamp_of",
    "text_source",
]

_CONTENT = 2
"""Version of marshal's format that says what values are, and not which of them are one object."""
COARSE = 100_000_000
"""Nanoseconds in which a file can change twice and look as if it had changed once."""
_IMPORTERS = frozenset(
    {
        *("import_module", "__import__", "run_module", "find_spec"),
        *("locate", "resolve_name", "import_string", "loadTestsFromName"),
    }
)
_MODULE_NAME = re.compile(r"(\.*[^\W\d]\w*(?:\.[^\W\d]\w*)*)(\.|:.*)?")
"""Also the beginning of one, ``plugins.``, and one with a name in it, ``module:name``."""
_BYTES_READ = 1024 * 1024
_STALE_SECONDS = 2.0
"""Compiled code that was written so long after its source was changed is that source's."""


class Source:
    """The code of one module.

    Attributes:
        digest: Of what it does, as far as that can be told from it.
        imports: Names of modules that it imports or may import; ``name.*``: all that a package has.
        names: What its strings name, if they are names of modules. They are imports if any source
            of the program imports by name.
        is_importing: Whether it imports by name.
        path: The file it is in; empty: in none.
        text: The source itself, if there is any.
    """

    __slots__ = (
        "_codes",
        "_read_at",
        "_stamp",
        "digest",
        "imports",
        "is_importing",
        "names",
        "path",
        "text",
    )

    def __init__(
        self, digest: bytes, imports: Iterable[str] = (), path: str = "", text: Any = None
    ) -> None:
        self.digest = digest
        self.imports = frozenset(imports)
        self.names: frozenset[str] = frozenset()
        self.is_importing = False
        self.path = path
        self.text = text
        self._codes: dict[bytes, int] | None = None
        self._stamp: tuple[int, ...] = ()
        self._read_at = 0

    def place_of(self, digest: bytes) -> int | None:
        """Return which of the codes in it has a digest, counted from its beginning.

        That is the same however the source is laid out, which bytecode is not.
        """
        if self._codes is None:
            self._codes = {}
            try:
                whole = compile(self.text, "<source>", "exec", dont_inherit=True)
            except (SyntaxError, ValueError, TypeError, RecursionError):
                return None
            for place, code in enumerate(_codes_in(whole)):
                self._codes.setdefault(code_digest(code), place)
        return self._codes.get(digest)

    def is_settled(self) -> bool:
        """Say whether the file is surely what was read, by its time and size alone."""
        if not self.path:
            return True
        # Whatever changes a file sets the time of its last change, the second, too.
        return self._stamp == stamp_of(self.path) and self._stamp[1] < self._read_at - COARSE


class _Known(NamedTuple):
    package: str
    source: Source


_known: dict[str, _Known] = {}
"""By path; for as long as the files are what they were."""


def source_of(
    path: str, package: str, loader: Any = None, name: str = "", *, is_package: bool = False
) -> Source:
    """Read a module.

    Args:
        path: Its file.
        package: What its relative imports begin at.
        loader: How it is imported, where it is no file of its own.
        name: What the loader knows it by.
        is_package: Whether there can be modules below it.
    """
    known = _known.get(path)
    if known is not None and known.package == package and known.source.is_settled():
        return known.source
    stamp, read_at = stamp_of(path), time.time_ns()
    try:
        source = _read(path, package, loader, name, is_package=is_package)
    except Exception:  # what is there cannot be read, or is no module
        source = Source(b"", path=path)
    if known is not None and known.package == package and known.source.digest == source.digest:
        source = known.source  # with what is known of it; its layout may be another
    source._stamp, source._read_at = stamp, read_at
    _known[path] = _Known(package, source)
    return source


def text_source(text: Any, package: str, path: str = "", *, is_package: bool = False) -> Source:
    """Return the code that a text is; one that is no Python counts by its content."""
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        data = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
        return Source(hashlib.sha256(b"text" + data).digest(), path=path)
    digest, imports, names, is_importing = _read_tree(tree, package, is_package=is_package)
    source = Source(digest, imports, path, text)
    source.names, source.is_importing = frozenset(names), is_importing
    return source


def _read(path: str, package: str, loader: Any, name: str, *, is_package: bool) -> Source:
    if path.endswith(tuple(importlib.machinery.EXTENSION_SUFFIXES)):
        return Source(_file_digest(path), path=path)
    if path.endswith(".pyc"):
        code = loader.get_code(name)
        return Source(
            hashlib.sha256(b"code" + code_digest(code)).digest(),
            imports_in(code, package),
            path,
        )
    if os.path.isfile(path):
        with open(path, "rb") as file:
            source = text_source(file.read(), package, path, is_package=is_package)
        stale = _stale_code(path, source.text)
        if stale is not None:
            source.digest = hashlib.sha256(b"stale" + code_digest(stale)).digest()
            source.imports |= imports_in(stale, package)
        return source
    # In an archive, or wherever else its loader has it from.
    return text_source(loader.get_source(name), package, path, is_package=is_package)


def _stale_code(path: str, text: Any) -> CodeType | None:
    """Return what Python has of an earlier content of a file and takes for this one.

    It goes by size and by time in seconds: an edit within the second of an import is not seen.
    """
    try:
        cached = importlib.util.cache_from_source(path)
        with open(cached, "rb") as file:
            data = file.read()
        found = os.stat(path)
        is_late = os.stat(cached).st_mtime < found.st_mtime + _STALE_SECONDS
    except (OSError, NotImplementedError):
        return None
    flags, seconds, size = struct.unpack("<III", data[4:16].ljust(12, b"\0"))
    as_now = int(found.st_mtime) & 0xFFFFFFFF, found.st_size & 0xFFFFFFFF
    if not is_late or flags or (seconds, size) != as_now or text is None:
        return None
    if data[:4] != importlib.util.MAGIC_NUMBER:
        return None
    code: CodeType = marshal.loads(data[16:])
    fresh = compile(text, path, "exec", dont_inherit=True)
    return None if code_digest(code) == code_digest(fresh) else code


def _file_digest(path: str) -> bytes:
    found = hashlib.sha256(b"file")
    with open(path, "rb") as file:
        while data := file.read(_BYTES_READ):
            found.update(data)
    return found.digest()


def stamp_of(path: str) -> tuple[int, ...]:
    """Return what changes whenever a file, or what is in a folder, does."""
    while True:
        try:
            found = os.stat(path)
        except NotADirectoryError:  # in an archive: that changes with it
            path = os.path.dirname(path)
        except OSError:
            return (0, 0, 0, 0)
        else:
            return found.st_mtime_ns, found.st_ctime_ns, found.st_size, found.st_ino


# Syntax trees.


def _read_tree(
    tree: ast.AST, package: str, *, is_package: bool
) -> tuple[bytes, set[str], set[str], bool]:
    """Return a digest of a tree, what it may import, what its strings name, if it imports by name.

    The number of a node's fields follows from its kind, that of a list is said: what is digested
    can be read in one way only. Without recursion, as trees are as deep as people write them.
    """
    pieces: list[bytes] = []
    imports: set[str] = set()
    strings: set[str] = set()
    importing = False
    stack: list[Any] = [tree]
    while stack:
        item = stack.pop()
        if isinstance(item, ast.AST):
            kind = type(item)
            pieces.append(kind.__name__.encode())
            stack.extend([getattr(item, field, None) for field in reversed(item._fields)])
            if kind is ast.Import:
                imports.update([alias.name for alias in item.names])  # type: ignore[attr-defined]
            elif kind is ast.ImportFrom:
                imports |= _imported_from(item, package)  # type: ignore[arg-type]
            elif kind is ast.Constant and type(item.value) is str:  # type: ignore[attr-defined]
                strings.add(item.value)  # type: ignore[attr-defined]
        elif type(item) is list:
            pieces.append(b"[%d" % len(item))
            stack.extend(reversed(item))
        else:
            pieces.append(marshal.dumps(item, _CONTENT))
            if type(item) is str:
                importing = importing or item in _IMPORTERS
    names: set[str] = set()
    for text in strings:
        names |= _named_by(text, package)
        if "import" in text:  # it may be code for exec() or eval()
            inner, is_importing, inner_names = _imports_of_text(text, package)
            imports |= inner
            names |= inner_names
            importing = importing or is_importing
    if importing:
        # Which of them name modules is not known, but what is none is not found.
        imports |= names
        if is_package:
            imports.add(f"{package}.*")  # as packages do that import their parts when needed
    return _joined(pieces), imports, names, importing


def _named_by(text: str, package: str) -> set[str]:
    """Return the modules that a string may name."""
    found = _MODULE_NAME.fullmatch(text)
    name = _absolute(found[1], package) if found is not None else ""
    if found is None or not name:
        return set()
    return {name, f"{name}.*"} if found[2] == "." else {name}


def _imports_of_text(text: str, package: str) -> tuple[set[str], bool, set[str]]:
    """Return what a string imports that may be code, if it does by name, and what that names."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(textwrap.dedent(text))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return set(), False, set()
    _, imports, names, is_importing = _read_tree(tree, package, is_package=False)
    return imports, is_importing, names


def _imported_from(node: ast.ImportFrom, package: str) -> set[str]:
    base = _absolute("." * node.level + (node.module or ""), package)
    if not base:
        return set()
    return {base, *[f"{base}.{alias.name}" for alias in node.names]}


def _absolute(name: str, package: str) -> str:
    """Return the name of a module that may be said as from a package; empty: there is none."""
    level = len(name) - len(name.lstrip("."))
    if not level:
        return name
    parts = package.split(".") if package else []
    if len(parts) < level:
        return ""
    below = [name[level:]] if name[level:] else []
    return ".".join(parts[: len(parts) - level + 1] + below)


def _joined(pieces: list[bytes]) -> bytes:
    found = hashlib.sha256()
    found.update(b"".join([b"%d:%b" % (len(piece), piece) for piece in pieces]))
    return found.digest()


# Compiled code.


def _codes_in(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if type(constant) is CodeType:
            yield from _codes_in(constant)


def code_digest(code: CodeType) -> bytes:
    """Digest a code by what it does; where its lines are is no part of it."""
    pieces = [
        code.co_name.encode("utf-8", "surrogatepass"),
        code.co_qualname.encode("utf-8", "surrogatepass"),
        code.co_code,
        code.co_exceptiontable,
        repr(
            (
                code.co_argcount,
                code.co_posonlyargcount,
                code.co_kwonlyargcount,
                code.co_flags,
                code.co_names,
                code.co_varnames,
                code.co_freevars,
                code.co_cellvars,
            )
        ).encode("utf-8", "surrogatepass"),
    ]
    for constant in code.co_consts:
        if type(constant) is CodeType:
            pieces.append(b"code" + code_digest(constant))
        elif type(constant) is slice:  # Python 3.14
            pieces.append(
                b"slice" + marshal.dumps((constant.start, constant.stop, constant.step), _CONTENT)
            )
        else:
            pieces.append(b"value" + marshal.dumps(constant, _CONTENT))
    return _joined(pieces)


def imports_in(code: CodeType, package: str) -> set[str]:
    """Return what a code may import, and the codes in it."""
    imports: set[str] = set()
    for each in _codes_in(code):
        recent: list[Any] = [0, None]  # what was loaded last: a level, and the names in a module
        base = ""
        for instruction in dis.get_instructions(each):
            if instruction.opname == "IMPORT_NAME":
                level = recent[0] if type(recent[0]) is int else 0
                base = _absolute("." * level + instruction.argval, package)
                imports.add(base)
                names = recent[1] if type(recent[1]) is tuple else ()
                imports.update([f"{base}.{name}" for name in names])
            elif instruction.opname.startswith("LOAD_"):
                recent = [recent[1], instruction.argval]
        if not _IMPORTERS.isdisjoint((*each.co_names, *each.co_varnames, *each.co_freevars)):
            for text in each.co_consts:
                if type(text) is str:
                    imports |= _named_by(text, package)
        for text in each.co_consts:
            if type(text) is str and "import" in text:
                imports |= _imports_of_text(text, package)[0]
    imports.discard("")
    return imports
