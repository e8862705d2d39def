"""``run()``: a graph on the workers of an executor, or a program on one machine in AWS."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeVar, overload

if TYPE_CHECKING:
    from cloudexec._executor import BatchExecutor, OptionsView
    from cloudexec._graph import Node
    from cloudexec._runs.run import Run

__all__ = ["run"]

T = TypeVar("T")


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
@overload
def run(
    target: str | os.PathLike[str] = "",
    args: Sequence[str] = (),
    *,
    profile: str | None = None,
    **options: Any,
) -> Run: ...
def run(*given: Any, **options: Any) -> Any:
    """Run a program on one machine in AWS, or a graph on the workers of an executor.

    ``run("train.py", ["--steps", "100"], cpus=4)`` starts a program, as ``cloudexec run --detach``
    does. The machine has the packages that are installed here, or the profile's image. The script's
    own modules are sent along. The call returns when the machine has been asked for.

    ``run(nodes, executor)`` runs a node, or several in lists, tuples, dicts and the like, and takes
    ``progress`` and ``return_exceptions``: see ``Graph.run()``.

    Args:
        target: Path of a script or notebook, or with ``module=True`` the name of a module; empty:
            ``args`` is a command. Or nodes.
        args: Arguments of the program. Or the executor.
        options: What ``cloudexec run`` takes: ``profile`` (by default what ``CLOUDEXEC_PROFILE``
            says, or ``"default"``), ``module``, ``cpus``, ``memory``, ``gpus``,
            ``disk_gib``, ``arch``, ``spot``, ``on``, ``name``, ``resume``, ``files``, ``outputs``,
            ``env``, ``image``, ``packages``, ``max_hours``, ``max_cost`` (USD) and ``project``.

    Returns:
        The run of the program, which goes on by itself. Or the same as ``nodes``, with values in
        the place of nodes.

    Raises:
        ConfigError: If the program cannot be run as it is wanted.
        AwsError: If AWS refuses, or cannot be reached.
        LaunchError: If the image cannot be made.
        StageError: If a call of a graph failed.
    """
    target = given[0] if given else options.get("target", "")
    has_executor = "executor" in options or any(hasattr(each, "submit") for each in given[1:])
    if isinstance(target, str | os.PathLike) and not has_executor and "nodes" not in options:
        from cloudexec._runs.run import run_script

        return run_script(*given, **options)
    if len(given) < 2 and not has_executor:
        raise TypeError(f"run() takes the path of a program, or nodes and an executor: {target!r}")
    from cloudexec._graph import run_nodes

    return run_nodes(*given, **options)


run.__module__ = "cloudexec"
