"""Functions as stages of a graph: calls that are written down first, and run together later.

Calling a stage makes a node, which runs nothing. A node knows those that it takes values from and
never those that take its own, and it is never changed: so a graph has no cycles by construction.
Running one submits each node once, with the futures of others as arguments; the rest is what the
executor does with futures anyway. Nothing here recurses along the graph, however deep it is.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import gc
import importlib
import shutil
import subprocess
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, wait
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, NoReturn, ParamSpec, TypeVar, overload

from cloudexec._config import TaskOptions
from cloudexec._errors import (
    BrokenBatchExecutor,
    CloudexecError,
    DependencyError,
    LaunchError,
    StageError,
)
from cloudexec._executor import BatchExecutor, OptionsView
from cloudexec._future import BatchFuture

if TYPE_CHECKING:
    from cloudexec._progress import StageBars

__all__ = ["Graph", "Node", "Stage", "run", "stage"]

P = ParamSpec("P")
T = TypeVar("T")

_NOTHING: dict[str, Any] = {}  # the keyword arguments of most calls
_ATOMS = frozenset({int, float, complex, bool, str, bytes, type(None)})


class Stage(Generic[P, T]):
    """A function whose calls are nodes of a graph; made by ``stage()``.

    Attributes:
        function: The function itself, to be called at once: ``load.function(path)``.
        name: What progress, drawings and errors call it.
    """

    function: Callable[P, T]
    name: str

    def __init__(self, function: Callable[P, T], name: str, options: dict[str, Any]) -> None:
        functools.update_wrapper(self, function)
        self.function = function
        self.name = name
        self._options = options  # what ``with_options()`` of an executor takes

    def __call__(self, *args: Any, **kwargs: Any) -> Node[T]:
        """Write a call down; run nothing.

        Args:
            *args: Values, and nodes in the place of values: also inside lists, tuples, sets, dicts
                and dataclasses. Values are pickled when the graph runs.
            **kwargs: The same.
        """
        found: dict[Node[Any], None] = {}
        taken = tuple([_template(value, found) for value in args])
        named = _NOTHING
        if kwargs:
            named = {name: _template(value, found) for name, value in kwargs.items()}
        return Node(self, taken, named, tuple(found))

    def __repr__(self) -> str:
        return f"<Stage {self.name}>"

    def _sent(self) -> Callable[P, T]:
        """Return what workers are sent: by name what they can import, although the stage is what
        they find under the function's name."""
        import cloudpickle

        fn = self.function
        module = getattr(fn, "__module__", None)
        name = getattr(fn, "__qualname__", None)
        by_value = cloudpickle.list_registry_pickle_by_value()
        if module is None or name is None or module == "__main__" or module in by_value:
            return fn
        try:
            found: Any = functools.reduce(getattr, name.split("."), sys.modules.get(module))
        except AttributeError:
            return fn
        return _ByName(fn, module, name) if found is self else fn


class _ByName:
    """Stands for the function of a stage that workers can import."""

    def __init__(self, fn: Callable[..., Any], module: str, name: str) -> None:
        self.__code__ = getattr(fn, "__code__", None)  # what is known of its run time hangs on it
        self.__qualname__ = name
        self.__module__ = module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _function_of(self.__module__, self.__qualname__)(*args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return _function_of, (self.__module__, self.__qualname__)


def _function_of(module: str, name: str) -> Callable[..., Any]:
    found: Any = functools.reduce(getattr, name.split("."), importlib.import_module(module))
    return found.function  # type: ignore[no-any-return]


@overload
def stage(function: Callable[P, T], /) -> Stage[P, T]: ...
@overload
def stage(
    *, name: str | None = None, timeout: float | None = None, retries: int | None = None
) -> Callable[[Callable[P, T]], Stage[P, T]]: ...
def stage(
    function: Callable[..., Any] | None = None,
    /,
    *,
    name: str | None = None,
    timeout: float | None = None,
    retries: int | None = None,
) -> Any:
    """Turn a function into a stage: ``@stage``, or ``@stage(timeout=60)``.

    Args:
        function: The function.
        name: What progress, drawings and errors call it; by default the function's name.
        timeout: Seconds that a call may run; ``None``: what the executor says.
        retries: How often a call is run again after an attempt was lost; ``None``: what the
            executor says.

    Raises:
        ConfigError: If an option is out of its range.
        TypeError: If it is no function.
    """
    options: dict[str, Any] = {"timeout": timeout, "retries": retries}
    options = {option: value for option, value in options.items() if value is not None}
    replace(TaskOptions(), **options)  # checks them where they are written, not where they are used

    def make(function: Callable[..., Any]) -> Stage[..., Any]:
        if not callable(function):
            raise TypeError(f"a stage is made of a function, not of {type(function).__name__}")
        return Stage(function, name or str(getattr(function, "__name__", function)), options)

    return make if function is None else make(function)


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Node(Generic[T]):
    """One call of a stage, not run yet.

    Attributes:
        stage: The stage.
        dependencies: The nodes that it takes values from, each once.
    """

    stage: Stage[..., T]
    _args: tuple[Any, ...]
    _kwargs: dict[str, Any]
    dependencies: tuple[Node[Any], ...]

    def run(self, executor: BatchExecutor | OptionsView, *, progress: bool = False) -> T:
        """Run this node and all that it depends on, and return its value; see ``Graph.run()``."""
        value: T = Graph(self).run(executor, progress=progress)
        return value

    def __repr__(self) -> str:
        return f"<Node {self.stage.name}>"

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            f"{self!r} is a call that has not been run: pass it to a stage, as an argument or in "
            f"a list, tuple, set, dict or dataclass, or run it first"
        )


# Arguments with nodes in them are kept as templates: what holds nodes is copied when the node is
# made, so that whoever appends to a list later changes nothing, and can close no circle.


class _Template:
    """A container with nodes in it."""

    __slots__ = ("_items", "_make")

    def __init__(self, make: Callable[[list[Any]], Any], items: list[Any]) -> None:
        self._make = make
        self._items = items

    def fill(self, values: dict[Node[Any], Any]) -> Any:
        return self._make([_filled(item, values) for item in self._items])


def _filled(item: Any, values: dict[Node[Any], Any]) -> Any:
    kind = type(item)
    if kind is Node:
        return values[item]
    return item.fill(values) if kind is _Template else item


def _template(value: Any, found: dict[Node[Any], None], path: tuple[int, ...] = ()) -> Any:
    """Return a value ready to be filled; itself, if there are no nodes in it.

    Args:
        value: Any value.
        found: Takes the nodes.
        path: The containers around it.
    """
    kind = type(value)
    if kind in _ATOMS:
        return value
    if kind is Node:
        found[value] = None
        return value
    parts: Iterable[Any]
    make: Callable[[list[Any]], Any]
    if kind in (list, tuple, set, frozenset):
        parts, make = value, kind
    elif kind is dict:
        parts, make = (part for item in value.items() for part in item), _make_dict
    elif isinstance(value, tuple) and hasattr(kind, "_make"):
        parts, make = value, kind._make
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in dataclasses.fields(value) if hasattr(value, field.name)]
        parts = [getattr(value, name) for name in names]
        make = functools.partial(_make_dataclass, value, names)
    else:
        return value
    if id(value) in path:
        return value  # it holds itself: the pickler can cope with that
    around = (*path, id(value))
    items = [_template(part, found, around) for part in parts]
    if any(type(item) in (Node, _Template) for item in items):
        return _Template(make, items)
    return value


def _make_dict(items: list[Any]) -> dict[Any, Any]:
    return dict(zip(items[::2], items[1::2], strict=True))


def _make_dataclass(like: Any, names: list[str], values: list[Any]) -> Any:
    made = copy.copy(like)
    for name, value in zip(names, values, strict=True):
        object.__setattr__(made, name, value)
    return made


class Graph:
    """Nodes to be run together, and all that they depend on.

    Args:
        nodes: A node, or several in lists, tuples, dicts and the like.

    Attributes:
        nodes: All nodes, each behind those that it depends on.

    Raises:
        TypeError: If there is no node among them.
    """

    def __init__(self, nodes: Any) -> None:
        found: dict[Node[Any], None] = {}
        self._wanted = _template(nodes, found)
        if not found:
            raise TypeError(f"there is no node of a graph in {type(nodes).__name__} {nodes!r:.80}")
        self._targets = tuple(found)
        self.nodes = tuple(_in_order(self._targets))

    def __len__(self) -> int:
        return len(self.nodes)

    def __repr__(self) -> str:
        return f"<Graph of {len(self.nodes)} nodes>"

    def run(
        self,
        executor: BatchExecutor | OptionsView,
        *,
        progress: bool = False,
        return_exceptions: bool = False,
    ) -> Any:
        """Run every node once, as soon as what it depends on is there.

        Values that only other nodes need are not kept, nor unpickled in this process.

        Args:
            executor: Runs them.
            progress: Show a bar for each stage on standard error.
            return_exceptions: Run on when a node fails, and return the ``StageError`` in the place
                of each value that is missing. By default the first failure cancels the rest.

        Returns:
            What the graph was made of, with values in the place of nodes.

        Raises:
            StageError: If a call failed. It names the stage; what the call raised is its cause.
            concurrent.futures.CancelledError: If the executor was shut down meanwhile.
            BrokenBatchExecutor: If the executor is broken.
            LaunchError: If no worker could be started.
            TypeError: If the executor is not one of ours.
        """
        if not isinstance(executor, BatchExecutor | OptionsView):
            raise TypeError(
                f"a graph is run by a BatchExecutor, not by a {type(executor).__name__}, which "
                f"does not wait for futures among the arguments"
            )
        bars = None
        if progress:
            from cloudexec._progress import StageBars

            bars = StageBars(Counter(node.stage.name for node in self.nodes))
        started: list[weakref.ref[BatchFuture[Any]]] = []
        complete = False
        try:
            with _no_garbage_collection():
                futures = self._submit(executor, started, bars)
            if not return_exceptions:
                wait(futures.values(), return_when=FIRST_EXCEPTION)
                for node, future in futures.items():
                    if future.done():
                        _check(node, future)
            outcomes = {node: _outcome(node, future) for node, future in futures.items()}
            complete = True
            return _filled(self._wanted, outcomes)
        except BaseException:
            for reference in reversed(started):
                future_or_none = reference()
                if future_or_none is not None:
                    future_or_none.cancel()
            raise
        finally:
            if bars is not None:
                bars.close(complete=complete)

    def _submit(
        self,
        executor: BatchExecutor | OptionsView,
        started: list[weakref.ref[BatchFuture[Any]]],
        bars: StageBars | None,
    ) -> dict[Node[Any], BatchFuture[Any]]:
        """Submit every node; return the futures of those whose values were asked for.

        Args:
            executor: Where to.
            started: Takes all futures.
            bars: Counts them.
        """
        uses = Counter(dependency for node in self.nodes for dependency in node.dependencies)
        uses.update(self._targets)
        submits: dict[Stage[..., Any], Callable[..., BatchFuture[Any]]] = {}
        futures: dict[Node[Any], BatchFuture[Any]] = {}
        for node in self.nodes:
            stage = node.stage
            submit = submits.get(stage)
            if submit is None:
                # The function is pickled once, as map() does it.
                view = executor.with_options(**stage._options)
                submit = submits[stage] = view._prepare(stage._sent())
            args = tuple([_filled(value, futures) for value in node._args])
            kwargs = _NOTHING
            if node._kwargs:
                kwargs = {name: _filled(value, futures) for name, value in node._kwargs.items()}
            future = futures[node] = submit(args, kwargs, stage.name)
            started.append(weakref.ref(future))
            if bars is not None:
                bars.watch(stage.name, future)
            for dependency in node.dependencies:
                uses[dependency] -= 1
                if not uses[dependency]:
                    del futures[dependency]  # from now on its result is for those who wait for it
        return futures

    def to_dot(self, *, by_stage: bool = False) -> str:
        """Draw the graph in Graphviz's language.

        Args:
            by_stage: One box for each stage, with the number of its calls, not one for each call.
        """
        lines = ["digraph {", "  rankdir=LR;", "  node [shape=box, style=rounded];"]
        number: dict[object, int] = {}
        edges: Counter[tuple[int, int]] = Counter()
        calls: Counter[object] = Counter()
        for node in self.nodes:
            key: object = node.stage if by_stage else node
            at = number.setdefault(key, len(number) + 1)
            calls[key] += 1
            for dependency in node.dependencies:
                edges[number[dependency.stage if by_stage else dependency], at] += 1
        for key, at in number.items():
            of = key if isinstance(key, Stage) else key.stage  # type: ignore[attr-defined]
            label = f"{of.name} ({calls[key]})" if by_stage else of.name
            lines.append(f"  n{at} [label={_quoted(label)}];")
        lines += [f"  n{tail} -> n{head};" for tail, head in edges]
        return "\n".join([*lines, "}", ""])

    def to_svg(self, path: str | Path | None = None, *, by_stage: bool = False) -> str:
        """Draw the graph as SVG, with Graphviz's program ``dot``.

        Args:
            path: Where to write it, if anywhere.
            by_stage: See ``to_dot()``.

        Raises:
            CloudexecError: If ``dot`` is not installed, or fails.
        """
        program = shutil.which("dot")
        if program is None:
            raise CloudexecError(
                "drawing SVG needs Graphviz's program 'dot', which is not on the PATH: install "
                "Graphviz, or use to_dot()"
            )
        done = subprocess.run(
            [program, "-Tsvg"],
            input=self.to_dot(by_stage=by_stage),
            capture_output=True,
            encoding="utf-8",
            check=False,
        )
        if done.returncode:
            raise CloudexecError(f"'dot' failed: {done.stderr.strip()}")
        if path is not None:
            Path(path).write_text(done.stdout, encoding="utf-8")
        return done.stdout


@overload
def run(nodes: Node[T], executor: BatchExecutor | OptionsView, *, progress: bool = False) -> T: ...
@overload
def run(
    nodes: Any,
    executor: BatchExecutor | OptionsView,
    *,
    progress: bool = False,
    return_exceptions: bool = False,
) -> Any: ...
def run(
    nodes: Any,
    executor: BatchExecutor | OptionsView,
    *,
    progress: bool = False,
    return_exceptions: bool = False,
) -> Any:
    """Run a node, or several in lists, tuples, dicts and the like; see ``Graph.run()``.

    Returns:
        The same, with values in the place of nodes.
    """
    graph = Graph(nodes)
    return graph.run(executor, progress=progress, return_exceptions=return_exceptions)


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Keep Python from looking for cycles while a graph is submitted: a second or a few.

    It makes a dozen objects for each node, and no cycles. Looking through all of them again and
    again was a third of what a task of a graph of 100,000 cost, and what made it cost more than one
    of 10,000.
    """
    paused = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if paused:
            gc.enable()


def _in_order(targets: Iterable[Node[Any]]) -> Iterator[Node[Any]]:
    """Yield nodes and all that they depend on, each once, behind its dependencies."""
    seen: set[Node[Any]] = set()
    for target in targets:
        if target in seen:
            continue
        seen.add(target)
        open_nodes = [(target, iter(target.dependencies))]
        while open_nodes:
            node, rest = open_nodes[-1]
            for dependency in rest:
                if dependency not in seen:
                    seen.add(dependency)
                    open_nodes.append((dependency, iter(dependency.dependencies)))
                    break
            else:
                open_nodes.pop()
                yield node


def _check(node: Node[Any], future: BatchFuture[Any]) -> None:
    """Raise what a future that is done failed with, in the words of the graph."""
    error = future.exception()
    if error is None:
        return
    name = node.stage.name
    if isinstance(error, DependencyError) and error.__cause__ is not None:
        name, error = error.stage or name, error.__cause__
    if isinstance(error, BrokenBatchExecutor | LaunchError):
        raise error  # no stage's fault
    what = f"{type(error).__name__}: {error}".partition("\n")[0]
    raise StageError(f"stage {name!r} failed: {what}", stage=name) from error


def _outcome(node: Node[Any], future: BatchFuture[Any]) -> Any:
    """Return a value, or the error in its place."""
    try:
        _check(node, future)
    except StageError as error:
        return error
    return future.result()


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'


for _class in (Graph, Node, Stage, run, stage):
    _class.__module__ = "cloudexec"
