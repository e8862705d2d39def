"""The last check of ``cloudexec doctor``: a worker is started, connects, and runs a task."""

from __future__ import annotations

import random
import re
import statistics
import time
from typing import TYPE_CHECKING

from cloudexec._aws.doctor import Check, prevents_probe
from cloudexec._aws.profile import Profile
from cloudexec._errors import CloudexecError

if TYPE_CHECKING:
    from cloudexec import BatchExecutor

__all__ = ["probe"]

_LATE = "no worker dialed back within"
_ROUND_TRIPS = 7
_SPEED_MIB = 4
_SPEED_TIMEOUT = 120.0
_UNREACHED = re.compile(rf"reach this process|did not dial back yet|{_LATE} [\d.]+ s$")


def probe(
    name: str,
    checks: tuple[Check, ...],
    *,
    timeout: float,
    advertise: str = "",
    listen: str = "",
) -> Check:
    """Start one worker, let it run a task, and report how long each step took.

    The function blocks and is no coroutine, so that Ctrl-C ends the executor as usual.

    Args:
        name: Name of the profile.
        checks: The checks made before. If the probe cannot succeed after them, it is skipped.
        timeout: Seconds for the worker to dial back.
        advertise: Address that the worker dials; empty: it is found.
        listen: Address to listen on; empty: it is found.
    """
    if failed := prevents_probe(checks):
        found = f"cannot succeed before this is repaired: {', '.join(failed)}"
        return Check(name="probe worker", outcome="skipped", found=found)
    from cloudexec import BatchExecutor
    from cloudexec.aws import Batch

    launcher = Batch(profile=name)
    started = time.monotonic()
    try:
        # A worker that is late is not replaced within this time, as another one would be late, too.
        with BatchExecutor(
            1,
            launcher=launcher,
            launch_timeout=2 * timeout,
            advertise=advertise or None,
            listen=listen or None,
        ) as executor:
            # The task is a builtin, because the image need not have the packages of this command.
            future = executor.submit(max, 1, 2)
            try:
                # If there is a relay, it starts before the worker does.
                future.result(timeout * (2 if launcher.may_start_relay else 1))
            except TimeoutError:
                why = launcher.explain()
                executor.shutdown(cancel_futures=True)
                return _failed(name, "; ".join(filter(None, (f"{_LATE} {timeout:g} s", why))))
            seconds = time.monotonic() - started
            launches = executor.stats().launches
            speed = _speed(executor)
    except (CloudexecError, TimeoutError) as exc:
        return _failed(name, f"{type(exc).__name__}: {exc}")
    found = f"dialed back and ran a task in {seconds:.1f} s"
    if launches:
        times = {
            "request": launches[0].api,
            "place": launches[0].place,
            "image": launches[0].pull,
            "boot": launches[0].boot,
            "dial-in": launches[0].dial_in,
            "first task": launches[0].first_task,
        }
        known = {label: value for label, value in times.items() if value is not None}
        # Before the launch, an image, a job definition or a relay may have been made.
        known = {"preparation": max(0.0, seconds - sum(known.values())), **known}
        found += ": " + ", ".join(f"{label} {value:.1f} s" for label, value in known.items())
    found += f"; {speed}"
    return Check(name="probe worker", outcome="ok", found=found)


def _speed(executor: BatchExecutor) -> str:
    """Measure the speed of the connection to the worker."""
    times = []
    for _ in range(_ROUND_TRIPS):
        started = time.monotonic()
        executor.submit(max, 1, 2).result(_SPEED_TIMEOUT)
        times.append(time.monotonic() - started)
    data = random.randbytes(_SPEED_MIB << 20)  # random bytes, which nothing can compress
    started = time.monotonic()
    executor.submit(bytes, data).result(_SPEED_TIMEOUT)
    seconds = time.monotonic() - started
    return (
        f"then {1000 * statistics.median(times):.0f} ms for a task, and {seconds:.1f} s for "
        f"{_SPEED_MIB} MiB there and back"
    )


def _failed(name: str, found: str) -> Check:
    return Check(name="probe worker", outcome="failed", found=found, remedy=_remedy(name, found))


def _remedy(name: str, reason: str) -> str:
    if _UNREACHED.search(reason) and "the relay " in reason:
        return (
            "this machine and the workers must both be able to connect to the relay: "
            f"`cloudexec logs --profile {name}` shows the worker's messages"
        )
    if _UNREACHED.search(reason):
        group = Profile.load(name).security_group
        inside = f" ({group})" if group else ""
        return (
            f"workers must reach the address above: from within the VPC, put this machine into "
            f"the stack's security group{inside}; from elsewhere, forward a port and set "
            f"CLOUDEXEC_ADVERTISE=HOST:PORT (and CLOUDEXEC_LISTEN=0.0.0.0:PORT if the port here is "
            f"another one), or set CLOUDEXEC_RELAY=true, which starts a relay"
        )
    return "repair what the message names, then run this command again"
