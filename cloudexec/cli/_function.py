"""The function that a command line names, imported so that workers can import it too."""

from __future__ import annotations

import contextlib
import difflib
import importlib
import importlib.util
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from cloudexec import _nesting
from cloudexec._describing import describe, is_a, is_interrupt, text_of, traceback_of
from cloudexec._errors import NestingError
from cloudexec.cli._errors import CommandError

_FORMS = "write package.module:name or path/to/file.py:name"


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A function and where it came from."""

    function: Callable[..., object]
    """The callable itself."""
    name: str
    """Its name within its module, e.g. ``score`` or ``Model.score``."""
    module: str
    """The module's dotted name, or the file's path as the user wrote it."""
    path: Path | None
    """The file's absolute path when the user named a file."""

    def identity(self, folder: Path) -> str:
        """Name the function in a way that does not depend on the current folder.

        Args:
            folder: The folder that a file's path is given from: the output's, so that a project
                that moves as a whole still recognises its results.

        Returns:
            ``module:name`` or ``path/to/file.py:name``.
        """
        if self.path is None:
            return f"{self.module}:{self.name}"
        try:
            return f"{Path(os.path.relpath(self.path, folder)).as_posix()}:{self.name}"
        except ValueError:  # Windows: another drive has no relative path
            return f"{self.path.as_posix()}:{self.name}"


def load_function(spec: str) -> Target:
    """Import the function that ``spec`` names.

    What the module prints while it is imported goes to standard error, because standard output
    may carry results.

    Args:
        spec: ``package.module:name`` or ``path/to/file.py:name``; the name may be dotted.

    Returns:
        The function and its origin.

    Raises:
        CommandError: If the module, the file or the name does not exist, the import fails, or
            the name is not a plain callable that can be sent to a worker.
    """
    place, colon, name = spec.rpartition(":")
    if not colon or not place or not name:
        raise CommandError(f"FUNCTION {spec!r} names no function: {_FORMS}")
    is_file = place.endswith(".py") or "/" in place or os.sep in place
    _nesting.loading.watch("cloudexec map", __name__)
    _nesting.loading.active = True
    try:
        with contextlib.redirect_stdout(sys.stderr):
            module = _import_file(place, name) if is_file else _import_module(place)
    finally:
        _nesting.loading.active = False
        _nesting.loading.ended()
    function = _find(module, place, name)
    target = Target(
        function=function,
        name=name,
        module=place,
        path=Path(place).absolute() if is_file else None,
    )
    _check_kind(target)
    _check_pickles(target)
    return target


def _import_module(name: str) -> ModuleType:
    if os.getcwd() not in sys.path:
        # A console script does not get the current folder, as `python -m` does.
        sys.path.insert(0, os.getcwd())
    try:
        with _reported(name, None):
            return importlib.import_module(name)
    except ModuleNotFoundError as exc:
        if exc.name is not None and (name == exc.name or name.startswith(f"{exc.name}.")):
            raise CommandError(
                f"there is no module {exc.name!r} in the current folder or among the installed "
                f"packages; {_FORMS}"
            ) from None
        raise CommandError(f"importing {name} failed: {exc}") from exc


def _import_file(place: str, name: str) -> ModuleType:
    path = Path(place).absolute()
    if path.suffix != ".py":
        beside = path.with_name(f"{path.name}.py")
        hint = f"; did you mean {place}.py:{name}?" if beside.exists() else f": {_FORMS}"
        raise CommandError(f"{place} is not a Python file{hint}")
    if not path.exists():
        raise CommandError(f"there is no file {place}")
    sys.path.insert(0, str(path.parent))
    try:
        with _reported(place, path):
            if _is_importable_by_name(path):
                return importlib.import_module(path.stem)
            return _import_by_value(path)
    except ModuleNotFoundError as exc:
        raise CommandError(f"importing {place} failed: {exc}") from exc


def _is_importable_by_name(path: Path) -> bool:
    """Whether ``import stem`` means this very file, here and in a worker."""
    stem = path.stem
    if "." in stem or stem in sys.stdlib_module_names or stem in sys.modules:
        return False
    spec = importlib.util.find_spec(stem)
    return spec is not None and spec.origin is not None and os.path.samefile(spec.origin, path)


def _import_by_value(path: Path) -> ModuleType:
    """Import a file whose name is also that of another module; its functions are sent as code."""
    import cloudpickle

    name = f"cloudexec_file_{path.stem.replace('.', '_')}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise CommandError(f"{path} cannot be imported")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    cloudpickle.register_pickle_by_value(module)
    return module


@contextlib.contextmanager
def _reported(place: str, path: Path | None) -> Iterator[None]:
    """Turn an exception of an import into one line; a missing module is left to the caller."""
    try:
        yield
    except (CommandError, ModuleNotFoundError):
        raise
    except (Exception, SystemExit) as exc:
        message = f"importing {place} failed: {describe(exc)}"
        if "relative import" in text_of(exc) and path is not None:
            raise CommandError(
                f"{message}; it belongs to a package, so write "
                f"{path.parent.name}.{path.stem}:NAME from the folder above"
            ) from exc
        frame = traceback.extract_tb(traceback_of(exc))[-1]
        if not is_a(exc, (SyntaxError, NestingError)):  # the messages of these name the place
            message += f" ({frame.filename}, line {frame.lineno})"
        raise CommandError(message) from exc


def _find(module: ModuleType, place: str, name: str) -> Callable[..., object]:
    found: object = module
    for part in name.split("."):
        known = [key for key in dir(found) if not key.startswith("_")]
        try:
            found = getattr(found, part)
        except AttributeError:
            raise CommandError(f"{place} has no function {name!r}{_guess(part, known)}") from None
    if not callable(found):
        raise CommandError(f"{place}:{name} is not a function but {_kind(found)}")
    return found


def _kind(found: object) -> str:
    noun = "module" if isinstance(found, ModuleType) else type(found).__name__
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def _guess(part: str, known: list[str]) -> str:
    close = difflib.get_close_matches(part, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _check_kind(target: Target) -> None:
    label = f"{target.module}:{target.name}"
    if inspect.iscoroutinefunction(target.function):
        raise CommandError(
            f"{label} is an async function: wrap it in a plain one that calls asyncio.run()"
        )
    if inspect.isgeneratorfunction(target.function) or inspect.isasyncgenfunction(target.function):
        raise CommandError(
            f"{label} is a generator, whose items stay in the worker: return a list instead"
        )


def _check_pickles(target: Target) -> None:
    import cloudpickle

    try:
        cloudpickle.dumps(target.function)
    except BaseException as exc:
        if is_interrupt(exc):
            raise
        from cloudexec._unsendable import explain_call

        why = explain_call(target.function, (), {}, exc) or describe(exc)
        raise CommandError(
            f"{target.module}:{target.name} cannot be sent to a worker: {why}"
        ) from exc
