"""Finds an installed copy of CPython's own executor tests and makes it importable here.

No test is copied into this repository. The interpreter's own ``test`` package is used if it has
these tests. Otherwise the tests of another installed Python of the same minor version, or of the
nearest older one, run with this interpreter's own ``test.support``. An older suite needs no
function that a newer Python lacks.
"""

from __future__ import annotations

import ast
import atexit
import importlib
import os
import re
import shutil
import sys
import sysconfig
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import cloudexec

__all__ = ["HOW_TO_GET_IT", "Suite", "assert_python_ok", "find_suites", "load"]

HOW_TO_GET_IT = (
    "CPython's test.test_concurrent_futures is not installed: on Debian or Ubuntu it comes with "
    "the package libpython3-testsuite (or libpython3.X-testsuite); builds from source, "
    "pyenv's and python.org's have it; CLOUDEXEC_CPYTHON_LIB may name a CPython Lib directory"
)
_NAME = "test_concurrent_futures"
_PARTS = (
    "executor",
    "test_as_completed",
    "test_deadlock",
    "test_init",
    "test_process_pool",
    "test_shutdown",
    "test_wait",
    "util",
)
"""Modules of the package that replaced the single test module in 3.12, without those on threads."""


@dataclass(frozen=True)
class Suite:
    """One installed copy of the tests.

    Attributes:
        version: Major and minor version of its Python.
        path: The module's file, or the package's directory.
    """

    version: tuple[int, int]
    path: Path

    def cases(self) -> set[str]:
        """Return the names ``Class.test_method`` of its tests, read from the source."""
        files = self.path.glob("*.py") if self.path.is_dir() else [self.path]
        return {
            f"{found.name}.{method.name}"
            for file in files
            for found in ast.parse(file.read_text(encoding="utf-8")).body
            if isinstance(found, ast.ClassDef)
            for method in found.body
            if isinstance(method, ast.FunctionDef) and method.name.startswith("test")
        }


def find_suites() -> list[Suite]:
    """Return the copies on this machine, in the order of preference.

    The first is the running interpreter's own copy. Then follow those of its minor version, then
    older ones from the newest on, and then newer ones, of which only the names are used.
    """
    here = sys.version_info[:2]
    own = Path(sysconfig.get_path("stdlib"))
    libs = [own]
    if given := os.environ.get("CLOUDEXEC_CPYTHON_LIB"):
        libs.insert(0, Path(given))
    # Other Pythons of pyenv, uv or hatch, which are next to this one, and those of the system.
    libs += sorted(Path(sys.base_prefix).parent.glob("*/lib/python3.*"))
    libs += sorted(Path("/usr/lib").glob("python3.*")) + sorted(Path("/usr/local/lib").glob("py*"))
    suites: dict[Path, Suite] = {}
    for lib in libs:
        for path in (lib / "test" / _NAME, lib / "test" / f"{_NAME}.py"):
            if path.exists() and path not in suites:
                suites[path] = Suite(_version_of(lib) or here, path)
    at = {suite: number for number, suite in enumerate(suites.values())}

    def distance(suite: Suite) -> tuple[bool, bool, int, int]:
        older = suite.version <= here
        return (
            suite.version != here,
            not older,
            here[1] - suite.version[1] if older else suite.version[1],
            at[suite],
        )

    # Before 3.11 executors had no max_tasks_per_child, so older tests do not cover it.
    return sorted((s for s in suites.values() if s.version >= (3, 11)), key=distance)


def _version_of(lib: Path) -> tuple[int, int] | None:
    match = re.fullmatch(r"python(\d+)\.(\d+)t?", lib.name)
    return None if match is None else (int(match[1]), int(match[2]))


def load() -> tuple[list[ModuleType], list[str]]:
    """Import the suite.

    Returns:
        Its modules, and the entries of ``sys.path`` that another process needs to import it. Both
        are empty if no suite for this version is installed.
    """
    shim: list[str] = []
    if not _importable():
        suites = [s for s in find_suites() if s.version <= sys.version_info[:2]]
        if not suites:
            return [], []
        shim = [_shim(suites[0].path)]
    sys.path[:0] = shim
    try:
        _forget_test_package(shim)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a suite may be older than the interpreter
            top = importlib.import_module(f"test.{_NAME}")
            if not hasattr(top, "__path__"):
                return [top], shim
            return [importlib.import_module(f"{top.__name__}.{part}") for part in _PARTS], shim
    finally:
        del sys.path[: len(shim)]


def assert_python_ok(path: list[str], option: str, script: str, **env: str) -> Any:
    """Run a script in which ``concurrent.futures`` has a ``BatchExecutor``.

    It is here as a module of the suite has it as a global while tests run: workers import what the
    module of such a function imports.
    """
    from test.support import script_helper

    assert option == "-c"
    prelude = (
        f"import sys; sys.path[:0] = {[*path, str(Path(cloudexec.__file__).parents[1])]!r}\n"
        "import cloudexec, concurrent.futures\n"
        "concurrent.futures.BatchExecutor = cloudexec.BatchExecutor\n"
    )
    return script_helper.assert_python_ok(option, prelude + script, **env)


def _importable() -> bool:
    """Return whether the tests can be imported without further steps, as in a worker."""
    try:
        importlib.import_module(f"test.{_NAME}")
    except ImportError:
        return False
    return True


def _forget_test_package(shim: list[str]) -> None:
    if shim:
        for name in [name for name in sys.modules if name.partition(".")[0] == "test"]:
            del sys.modules[name]


def _shim(path: Path) -> str:
    """Make a directory with a package ``test`` that has the interpreter's modules and the suite."""
    directory = tempfile.mkdtemp(prefix="cpython-suite-")
    # Only this process removes the directory, and not the children that tests fork.
    atexit.register(_remove, directory, os.getpid())
    package = Path(directory, "test")
    package.mkdir()
    own = Path(sysconfig.get_path("stdlib"), "test")
    package.joinpath("__init__.py").write_text(f"__path__.append({str(own)!r})\n")
    package.joinpath(path.name).symlink_to(path)
    return directory


def _remove(directory: str, owner: int) -> None:
    if os.getpid() == owner:
        shutil.rmtree(directory, ignore_errors=True)
