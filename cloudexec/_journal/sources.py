"""Digests the code of one module on disk, and finds the modules that it imports.

No code is run for this. Two sources count as the same code if their syntax trees are equal:
comments and layout do not count. Docstrings do count, because a program can read them.
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
"""Version of marshal's format. Later versions write an object that occurs again as a reference, so
that equal values can have different bytes."""
COARSE = 100_000_000
"""Nanoseconds: an upper bound of the resolution of file times. Two changes within this time may
leave the same time."""
_IMPORTERS = frozenset(
    {
        *("import_module", "__import__", "run_module", "find_spec"),
        *("locate", "resolve_name", "import_string", "loadTestsFromName"),
    }
)
_MODULE_NAME = re.compile(r"(\.*[^\W\d]\w*(?:\.[^\W\d]\w*)*)(\.|:.*)?")
"""A module's name; also a prefix of names (``plugins.``) and a module with a name in it
(``module:name``)."""
_BYTES_READ = 1024 * 1024
_STALE_SECONDS = 2.0
"""Seconds: compiled code that was written at least this long after the source's last change was
compiled from that source."""


class Source:
    """The code of one module.

    Attributes:
        digest: Digest of the code.
        imports: Names of modules that it imports or may import. ``name.*`` stands for all modules
            of a package.
        names: Strings in it that may be names of modules. They count as imports if any source of
            the program imports a module whose name is a string.
        is_importing: Whether this source imports a module whose name is a string.
        path: The file of the source; empty if there is no file.
        text: The source's text; ``None`` for compiled code.
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
        """Return the position of the code object that has this digest; ``None`` if none has it.

        Code objects are counted from the source's beginning. Unlike bytecode, this position does
        not change when comments or layout do.
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
        """Say whether the file's times and size prove that its content is what was read."""
        if not self.path:
            return True
        # The second item is the file's ctime, which every change of the content sets.
        return self._stamp == stamp_of(self.path) and self._stamp[1] < self._read_at - COARSE


class _Known(NamedTuple):
    package: str
    source: Source


_known: dict[str, _Known] = {}
"""Sources that were read, by path. They are used again while their files do not change."""


def source_of(
    path: str, package: str, loader: Any = None, name: str = "", *, is_package: bool = False
) -> Source:
    """Read the source of a module. A file that cannot be read counts as an empty source.

    Args:
        path: The module's file.
        package: The package that its relative imports refer to.
        loader: Loads the module if it is compiled or lies in an archive.
        name: The module's name for the loader.
        is_package: Whether the module is a package.
    """
    known = _known.get(path)
    if known is not None and known.package == package and known.source.is_settled():
        return known.source
    stamp, read_at = stamp_of(path), time.time_ns()
    try:
        source = _read(path, package, loader, name, is_package=is_package)
    except Exception:  # the file cannot be read, or is no module
        source = Source(b"", path=path)
    if known is not None and known.package == package and known.source.digest == source.digest:
        source = known.source  # keep the positions of its code objects; only its layout can differ
    source._stamp, source._read_at = stamp, read_at
    _known[path] = _Known(package, source)
    return source


def text_source(text: Any, package: str, path: str = "", *, is_package: bool = False) -> Source:
    """Return the source of a text. A text that is no valid Python is digested byte by byte."""
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
    # The module lies in an archive, or its loader gets it from elsewhere.
    return text_source(loader.get_source(name), package, path, is_package=is_package)


def _stale_code(path: str, text: Any) -> CodeType | None:
    """Return compiled code in ``__pycache__`` that Python would wrongly use for this source.

    Python compares the source's size and its modification time in seconds. It does not notice an
    edit that keeps the size and falls into the second in which the file was last compiled.
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
    """Return times, size and number of a file or folder, which change whenever it changes."""
    while True:
        try:
            found = os.stat(path)
        except NotADirectoryError:  # the path leads into an archive: use the archive itself
            path = os.path.dirname(path)
        except OSError:
            return (0, 0, 0, 0)
        else:
            return found.st_mtime_ns, found.st_ctime_ns, found.st_size, found.st_ino


# Syntax trees.


def _read_tree(
    tree: ast.AST, package: str, *, is_package: bool
) -> tuple[bytes, set[str], set[str], bool]:
    """Digest a syntax tree, and find what it imports.

    The digest covers each node's kind and each list's length, so that two different trees never
    give the same bytes. The function does not recurse, because a tree can be deeper than Python's
    limit of recursion.

    Returns:
        The digest, the modules that it may import, the modules that its strings may name, and
        whether it imports a module whose name is a string.
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
        if "import" in text:  # the string may be code for exec() or eval()
            inner, is_importing, inner_names = _imports_of_text(text, package)
            imports |= inner
            names |= inner_names
            importing = importing or is_importing
    if importing:
        # Most of these strings name no module; those are dropped when no such module is found.
        imports |= names
        if is_package:
            imports.add(f"{package}.*")  # some packages import their submodules when needed
    return _joined(pieces), imports, names, importing


def _named_by(text: str, package: str) -> set[str]:
    """Return the modules that a string may name."""
    found = _MODULE_NAME.fullmatch(text)
    name = _absolute(found[1], package) if found is not None else ""
    if found is None or not name:
        return set()
    return {name, f"{name}.*"} if found[2] == "." else {name}


def _imports_of_text(text: str, package: str) -> tuple[set[str], bool, set[str]]:
    """Read a string that may be code.

    Returns:
        The modules that it imports, whether it imports a module whose name is a string, and the
        modules that its strings may name.
    """
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
    """Resolve a relative name (``..name``) against a package; empty if it leads above the top."""
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
    """Digest a code object and the code objects in it, without their line numbers."""
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
    """Return the modules that a code object, or a code object in it, may import."""
    imports: set[str] = set()
    for each in _codes_in(code):
        # The two values that were loaded last. Before IMPORT_NAME these are the level of a relative
        # import and the names that are imported from the module.
        recent: list[Any] = [0, None]
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
