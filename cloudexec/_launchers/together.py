"""Starts the launchers of a ``Fallback`` together, and joins their networks into one."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from cloudexec._errors import CloudexecError, LaunchError
from cloudexec._launchers.base import Launcher, Network
from cloudexec._launchers.choice import Candidate, causes_of
from cloudexec._log import Log
from cloudexec._record_class import replace

__all__ = ["join", "leave_out", "start_all"]

_logger = Log()

_Start = Callable[[Launcher], Coroutine[Any, Any, Network]]


async def start_all(candidates: Sequence[Candidate], start: _Start, patience: float) -> None:
    """Start all launchers at the same time; ``join`` leaves out those whose start fails.

    Args:
        candidates: The launchers.
        start: Starts one launcher.
        patience: Seconds from now in which launchers may start. If none is ready by then, all have
            until the first one is ready.
    """
    starting = {asyncio.ensure_future(_start(each, start)): each for each in candidates}
    pending, until = set(starting), time.monotonic() + patience
    try:
        while pending:
            is_one_ready = any(each.usable for each in candidates)
            left = max(0.0, until - time.monotonic()) if is_one_ready else None
            done, pending = await asyncio.wait(
                pending, timeout=left, return_when=asyncio.FIRST_COMPLETED
            )
            if not done:
                return
    finally:
        for task in pending:
            task.cancel()
        await asyncio.gather(*pending, return_exceptions=True)
        for task in pending:
            if not starting[task].usable:
                starting[task].why = f"it was not ready within {patience:g} s"


async def _start(candidate: Candidate, start: _Start) -> None:
    try:
        candidate.network = await start(candidate.launcher)
        candidate.usable = True
    except Exception as exc:  # third-party launchers may raise any exception
        if not isinstance(exc, CloudexecError):
            _logger.exception("internal error while %s was started", candidate.name)
        candidate.why = str(exc) or type(exc).__name__


def leave_out(candidate: Candidate, why: str) -> None:
    """Request no more workers from a launcher, and log a warning with the reason."""
    candidate.usable = False
    candidate.why, candidate.fatal = why, True
    _logger.warning("%s cannot be used, and is left out: %s", candidate.name, why)


def join(candidates: Sequence[Candidate], wanted: str) -> tuple[Network, list[Candidate]]:
    """Find an address to listen on to which the workers of all launchers can connect.

    Args:
        candidates: The launchers after ``start_all``; those that cannot be used are left out.
        wanted: ``host:port`` on which the user wants the executor to listen; empty if not given.

    Returns:
        The network, and the launchers to which its ``others`` belong, in the same order.

    Raises:
        LaunchError: If no launcher can be used.
    """
    if not any(each.usable for each in candidates):
        raise LaunchError(f"no launcher can be used: {causes_of(candidates)}")
    needs_network = any(each.launcher.needs_network() for each in candidates)
    hosts, port, ways = dict[str, None](), "0", []
    for each in candidates:
        if each.network is None:
            leave_out(each, each.why)
            continue
        network = each.network
        if needs_network and not each.launcher.needs_network():
            network = _on_this_machine(wanted)
        host, _, own = network.listen.rpartition(":")
        if own not in ("", "0", port) and port != "0":
            why = f"it needs port {own}, but the executor already listens on port {port}"
            leave_out(each, f"{why}: give listen=, which holds for all launchers")
            continue
        port = own if own not in ("", "0") else port
        hosts[host] = None
        # The executor may listen on all addresses in the end, which is no address to dial.
        each.network = replace(network, advertise=network.advertise or host)
        ways.append(each)
    if not needs_network:
        return Network(), ways
    host = next(iter(hosts))
    if len(hosts) > 1:
        host = "[::]" if any("[" in each for each in hosts) else "0.0.0.0"
    others = tuple([each.network for each in ways if each.network is not None])
    return Network(f"{host}:{port}", others=others), ways


def _on_this_machine(listen: str) -> Network:
    """Return the network for workers on this machine, while other workers are elsewhere."""
    listen = listen or "127.0.0.1:0"
    host = listen.rpartition(":")[0]
    loopback = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]"}
    return Network(listen, loopback.get(host, host))
