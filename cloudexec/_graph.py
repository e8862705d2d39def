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
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_EXCEPTION, wait
from dataclasses import dataclass
from types import GeneratorType
from typing import TYPE_CHECKING, Any, Generic, NoReturn, ParamSpec, TypeVar, overload

from cloudexec._config import TaskOptions
from cloudexec._describing import attribute_of, cause_of, describe, is_a, repr_of, type_name
from cloudexec._errors import (
    BrokenBatchExecutor,
    ConfigError,
    DependencyError,
    LaunchError,
    StageError,
)
from cloudexec._executor import BatchExecutor, OptionsView, RetryOn
from cloudexec._future import BatchFuture
from cloudexec._graph_report import Call, StageReport, Tally, report
from cloudexec._objects.ref import Ref
from cloudexec._record_class import replace

if TYPE_CHECKING:
    from pathlib import Path

    from cloudexec._progress import StageBars

__all__ = ["Graph", "Node", "Stage", "run_nodes", "stage"]

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
        module = attribute_of(fn, "__module__")
        name = attribute_of(fn, "__qualname__")
        by_value = cloudpickle.list_registry_pickle_by_value()
        if type(module) is not str or type(name) is not str:
            return fn
        if module == "__main__" or module in by_value:
            return fn
        try:
            found: Any = functools.reduce(getattr, name.split("."), sys.modules.get(module))
        except AttributeError:
            return fn
        # This stage, or another one of the same function.
        stands = isinstance(found, Stage) and found.function is fn
        return _ByName(fn, module, name) if stands else fn


class _ByName:
    """Stands for the function of a stage that workers can import."""

    def __init__(self, fn: Callable[..., Any], module: str, name: str) -> None:
        self.__code__ = attribute_of(fn, "__code__")  # what is known of its run time hangs on it
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
    *,
    name: str | None = None,
    timeout: float | None = None,
    retries: int | None = None,
    retry_on: RetryOn = None,
    cpus: float | None = None,
    memory: int | str | None = None,
    gpus: int | None = None,
    priority: int | None = None,
    env: Mapping[str, str] | None = None,
    keep: bool | None = None,
    on_loss: str | None = None,
) -> Callable[[Callable[P, T]], Stage[P, T]]: ...
def stage(
    function: Callable[..., Any] | None = None,
    /,
    *,
    name: str | None = None,
    timeout: float | None = None,
    retries: int | None = None,
    retry_on: RetryOn = None,
    cpus: float | None = None,
    memory: int | str | None = None,
    gpus: int | None = None,
    priority: int | None = None,
    env: Mapping[str, str] | None = None,
    keep: bool | None = None,
    on_loss: str | None = None,
) -> Any:
    """Turn a function into a stage: ``@stage``, or ``@stage(cpus=2, memory="4GiB")``.

    The options are those of ``BatchExecutor.with_options()``, for the calls of this stage; those
    that are ``None`` are as the executor has them.

    Args:
        function: The function.
        name: What progress, drawings and errors call it; by default the function's name.
        timeout: Seconds that a call may run.
        retries: How often a call is run again after an attempt was lost.
        retry_on: What a call may raise and is then run again.
        cpus: Processors that each call needs.
        memory: Memory that each call needs, and may take.
        gpus: GPUs that each call needs.
        priority: Calls with a higher one are sent first.
        env: Environment variables that a call has.
        keep: Whether results stay on the worker that made them. Calls that take them run there if
            they can; where one is asked of ``run()``, that returns a ``Ref``.
        on_loss: What to do when a kept result is lost: ``"recompute"`` it, or ``"raise"``.

    Raises:
        ConfigError: If an option is out of its range. Whether an executor has workers with that
            much turns out when the graph is run, before any of it is.
        TypeError: If it is no function.
    """
    given = {option: value for option, value in locals().items() if value is not None}
    options = {option: given[option] for option in given.keys() - {"function", "name"}}
    try:
        # Checked where they are written, not where they are used.
        replace(TaskOptions(), **options, name=name)
    except ConfigError as exc:
        raise ConfigError(f"stage {name!r}: {exc}" if name else str(exc)) from None

    def make(function: Callable[..., Any]) -> Stage[..., Any]:
        if not callable(function):
            raise TypeError(f"a stage is made of a function, not of {type(function).__name__}")
        return Stage(function, name or _usual_name(function), options)

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
# made, so that appending to a list later changes nothing, and can close no circle.


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
        if _ATOMS.issuperset(map(type, value)):
            return value  # looked through much faster than one by one
        parts, make = value, kind
    elif kind is dict:
        if _ATOMS.issuperset(map(type, value)) and _ATOMS.issuperset(map(type, value.values())):
            return value
        parts, make = (part for item in value.items() for part in item), _make_dict
    elif isinstance(value, tuple) and hasattr(kind, "_make"):
        parts, make = value, kind._make
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in dataclasses.fields(value) if hasattr(value, field.name)]
        parts = [getattr(value, name) for name in names]
        make = functools.partial(_make_dataclass, value, names)
    elif kind is GeneratorType:
        raise TypeError("a generator with nodes in it cannot be looked through: make it a list")
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
        report: Of each stage, what became of its calls in the last run.

    Raises:
        TypeError: If there is no node among them, and they are not an empty container.
    """

    def __init__(self, nodes: Any) -> None:
        found: dict[Node[Any], None] = {}
        self._wanted = _template(nodes, found)
        if not found and not (type(nodes) in (list, tuple, set, frozenset, dict) and not nodes):
            raise TypeError(f"there is no node of a graph in {type_name(nodes)} {repr_of(nodes)}")
        self._targets = tuple(found)
        self.nodes = tuple(_in_order(self._targets, {}))
        self.report: tuple[StageReport, ...] = ()
        self._kept: dict[Node[Any], BatchFuture[Any]] = {}  # of a run that did not end well

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

        Values that only other nodes need are not unpickled in this process, and are dropped once
        these are done. Where workers are elsewhere, large ones of them stay on the worker that made
        them, and are made again should it be lost; those of a stage with ``keep=False`` come here.

        If a call fails, or Ctrl-C is pressed, what the rest needs is kept: run the graph again, and
        only what is missing is run. After a run that succeeded nothing is kept.

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
            ConfigError: If the executor has no workers with what a stage needs.
            TypeError: If the executor is not one of ours.
        """
        if not isinstance(executor, BatchExecutor | OptionsView):
            raise TypeError(
                f"a graph is run by a BatchExecutor, not by a {type(executor).__name__}, which "
                f"does not wait for futures among the arguments"
            )
        kept = {node: future for node, future in self._kept.items() if _is_usable(future)}
        missing = list(_in_order(self._targets, kept))
        stages = dict.fromkeys([node.stage for node in self.nodes])
        views = {stage: _view(executor, stage) for stage in stages}
        tallies = {stage: Tally(view._options.cpus or 1.0) for stage, view in views.items()}
        if kept:
            for node in {*self.nodes} - {*missing}:
                tallies[node.stage].resumed += 1
        base = executor._executor
        spent_before = base.cost().accrued_usd
        bars = None
        if progress:
            from cloudexec._progress import StageBars

            resumed: Counter[str] = Counter()
            for stage, tally in tallies.items():
                resumed[stage.name] += tally.resumed
            bars = StageBars(Counter(node.stage.name for node in self.nodes), resumed)
        started: list[tuple[Node[Any], weakref.ref[BatchFuture[Any]]]] = []
        aside: list[BatchFuture[Any]] = []
        complete = False
        try:
            with _no_garbage_collection():
                futures = self._submit(missing, views, kept, tallies, aside, started, bars)
            if not return_exceptions:
                wait(futures.values(), return_when=FIRST_EXCEPTION)
                for node, future in futures.items():
                    if future.done():
                        _check(node, future)
            outcomes = {node: _outcome(node, future) for node, future in futures.items()}
            complete = not any(is_a(each, StageError) for each in outcomes.values())
            result = _filled(self._wanted, outcomes)
            if not complete:
                self._keep(kept, started)
            return result
        except BaseException:
            alive = self._keep(kept, started)
            for each in reversed(alive):
                each.cancel()
            raise
        finally:
            if complete:
                self._kept = {}
            self.report = report(
                ((stage.name, tally) for stage, tally in tallies.items()),
                base.cost().accrued_usd - spent_before,
            )
            if bars is not None:
                bars.close(self.report, complete=complete)

    def _keep(
        self,
        kept: dict[Node[Any], BatchFuture[Any]],
        started: list[tuple[Node[Any], weakref.ref[BatchFuture[Any]]]],
    ) -> list[BatchFuture[Any]]:
        """Keep what has not been dropped, for another run; return the futures of this one."""
        found = {node: future for node, reference in started if (future := reference()) is not None}
        self._kept = {**kept, **found}
        return list(found.values())

    def _submit(
        self,
        nodes: list[Node[Any]],
        views: dict[Stage[..., Any], OptionsView],
        kept: dict[Node[Any], BatchFuture[Any]],
        tallies: dict[Stage[..., Any], Tally],
        aside: list[BatchFuture[Any]],
        started: list[tuple[Node[Any], weakref.ref[BatchFuture[Any]]]],
        bars: StageBars | None,
    ) -> dict[Node[Any], BatchFuture[Any]]:
        """Submit nodes; return the futures of those whose values were asked for.

        Args:
            nodes: Those that are missing, each behind those that it depends on.
            views: The executor, for each of their stages.
            kept: Futures of others, from an earlier run.
            tallies: Count the calls of each stage.
            aside: Takes the inputs of calls that fail.
            started: Takes all futures.
            bars: Counts them.
        """
        uses = Counter(dependency for node in nodes for dependency in node.dependencies)
        uses.update(self._targets)
        submits: dict[tuple[Stage[..., Any], bool], Callable[..., BatchFuture[Any]]] = {}
        targets = frozenset(self._targets)
        futures: dict[Node[Any], BatchFuture[Any]] = {
            node: future for node, future in kept.items() if uses[node]
        }
        for node in nodes:
            stage = node.stage
            is_inner = node not in targets
            submit = submits.get((stage, is_inner))
            if submit is None:
                view = views[stage]
                if is_inner and view._submitter.is_far and "keep" not in stage._options:
                    view = view.with_options(keep=True)
                # The function is pickled once, as map() does it.
                submit = submits[stage, is_inner] = view._submitter.prepare(
                    stage._sent(), view._options, view._requirements
                )
            args = tuple([_filled(value, futures) for value in node._args])
            kwargs = _NOTHING
            if node._kwargs:
                kwargs = {name: _filled(value, futures) for name, value in node._kwargs.items()}
            on_end: Callable[[BatchFuture[Any], bool], None] = tallies[stage]
            if node.dependencies:
                inputs = tuple([futures[dependency] for dependency in node.dependencies])
                on_end = Call(on_end, inputs, aside)
            future = futures[node] = submit(args, kwargs, stage.name, on_end)
            if future._resumed:
                tallies[stage].resumed += 1
                future._has_result = True
            started.append((node, weakref.ref(future)))
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
        from cloudexec._graph_drawing import dot

        return dot(self.nodes, by_stage=by_stage)

    def to_svg(self, path: str | Path | None = None, *, by_stage: bool = False) -> str:
        """Draw the graph as SVG, with Graphviz's program ``dot``.

        Args:
            path: Where to write it, if anywhere.
            by_stage: See ``to_dot()``.

        Raises:
            CloudexecError: If ``dot`` is not installed, or fails.
        """
        from cloudexec._graph_drawing import svg

        return svg(self.to_dot(by_stage=by_stage), path)


def run_nodes(
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


def _in_order(
    targets: Iterable[Node[Any]], kept: Mapping[Node[Any], object]
) -> Iterator[Node[Any]]:
    """Yield nodes and all that they depend on, each once, behind its dependencies.

    Args:
        targets: The nodes.
        kept: Nodes that are left out, with what only they depend on.
    """
    seen: set[Node[Any]] = set()
    for target in targets:
        if target in seen or target in kept:
            continue
        seen.add(target)
        open_nodes = [(target, iter(target.dependencies))]
        while open_nodes:
            node, rest = open_nodes[-1]
            for dependency in rest:
                if dependency not in seen and dependency not in kept:
                    seen.add(dependency)
                    open_nodes.append((dependency, iter(dependency.dependencies)))
                    break
            else:
                open_nodes.pop()
                yield node


def _is_usable(future: BatchFuture[Any]) -> bool:
    """Say whether a future has a result, or may yet have one; without unpickling it."""
    if not future.done():
        return future._owner is not None
    if not future._has_result or future.cancelled() or future._exception is not None:
        return False
    result = future._result
    return not (type(result) is Ref and result._is_gone)


def _view(executor: BatchExecutor | OptionsView, stage: Stage[..., Any]) -> OptionsView:
    try:
        return executor.with_options(**stage._options)
    except ConfigError as exc:
        raise ConfigError(f"stage {stage.name!r}: {exc}") from exc


def _check(node: Node[Any], future: BatchFuture[Any]) -> None:
    """Raise what a future that is done failed with, in the words of the graph."""
    error = future.exception()
    if error is None:
        return
    name = node.stage.name
    cause = cause_of(error)
    if type(error) is DependencyError and cause is not None:
        name, error = error.stage or name, cause
    if is_a(error, (BrokenBatchExecutor, LaunchError)):
        raise error  # no stage's fault
    what = describe(error).partition("\n")[0]
    raise StageError(f"stage {name!r} failed: {what}", stage=name) from error


def _usual_name(function: object) -> str:
    name = attribute_of(function, "__name__")
    return name if type(name) is str else repr_of(function)


def _outcome(node: Node[Any], future: BatchFuture[Any]) -> Any:
    """Return a value, or the error in its place."""
    try:
        _check(node, future)
    except StageError as error:
        return error
    return future.result()


for _class in (Graph, Node, Stage, stage):
    _class.__module__ = "cloudexec"
