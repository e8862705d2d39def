"""How long does a worker in a container take until its first task, and which steps take the time?

The start of a worker costs money on each machine, and delays the first result. The time begins with
the container's first process, so it includes neither the placement of the container nor the
download of its image, and it ends when the task begins. The executor listens on the address at
which containers reach this machine. The times of imports are those of an interpreter in the same
image that does nothing else.

The benchmark needs a container engine and the worker's image, whose name `cloudexec image build`
prints. With --pull the image is removed, and pulled from the registry in its name, in each
round.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from typing import Any

import _fresh
import _report
import cloudpickle
from _peers import OURS

from cloudexec import BatchExecutor
from cloudexec.testing import ManualLauncher
from cloudexec.testing._aws.containers import remove_container

_IMPORTS = ("cloudexec", "asyncio", "grpc", "cloudexec._proto.tasks_pb2", "cloudpickle")
_WORKER = "cloudexec.worker.running"
_BUDGET_S = 1.0

cloudpickle.register_pickle_by_value(sys.modules[__name__])


def moments() -> dict[str, float]:
    """Return, in a task, when its processes and the task itself began, in seconds since boot."""
    import os
    import time

    now = time.clock_gettime(time.CLOCK_BOOTTIME)

    def began(pid: int | str) -> tuple[int, float]:
        with open(f"/proc/{pid}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
        return int(fields[1]), int(fields[19]) / os.sysconf("SC_CLK_TCK")

    zygote, slot_began = began(os.getpid())
    supervisor, zygote_began = began(zygote)
    _, supervisor_began = began(supervisor)
    return {
        "init": began(1)[1],
        "supervisor": supervisor_began,
        "zygote": zygote_began,
        "slot": slot_began,
        "task": now,
    }


def measure(contender: str, image: str, pull: bool) -> _fresh.Figures:
    import docker
    import docker.errors

    client: Any = docker.from_env()
    pulled = 0.0
    if pull:
        with contextlib.suppress(docker.errors.NotFound):
            client.images.remove(image, force=True)
        before = time.monotonic()
        client.images.pull(image)
        pulled = time.monotonic() - before
    network = next(each for each in client.networks.list() if each.name in ("podman", "bridge"))
    address = network.attrs["IPAM"]["Config"][0]["Gateway"]
    launcher = ManualLauncher(needs_network=True)
    executor = BatchExecutor(
        max_workers=1, launcher=launcher, listen="0.0.0.0:0", advertise=address
    )
    container = None
    try:
        first = executor.submit(moments)
        (launch,) = launcher.wait(1, timeout=30)
        container = client.containers.create(
            image,
            environment={
                "CLOUDEXEC_TARGET": launch.contact.target,
                "CLOUDEXEC_EXECUTOR_ID": launch.contact.executor_id,
                "CLOUDEXEC_LAUNCH": launch.launch_id,
                "CLOUDEXEC_KEY": launch.contact.key.hex(),
                "CLOUDEXEC_SLOTS": str(launch.slots),
                "CLOUDEXEC_CERTIFICATE_SHA256": launch.contact.certificate_sha256,
            },
        )
        asked = time.clock_gettime(time.CLOCK_BOOTTIME)
        container.start()
        at = first.result(60)
        done = time.clock_gettime(time.CLOCK_BOOTTIME)
    finally:
        executor.shutdown(wait=False, cancel_futures=True)
        launcher.end_all()
        if container is not None:
            remove_container(container)
        executor.shutdown()
        client.close()
    return {
        "pull": pulled,
        "engine": at["init"] - asked,
        "interpreter": at["zygote"] - at["init"],
        "dialing": at["slot"] - at["zygote"],
        "slot": at["task"] - at["slot"],
        "first task": at["task"] - at["init"],
        "result": done - at["task"],
    }


def _imports(image: str) -> dict[str, float]:
    """Return the milliseconds of imports in the image, including their own imports."""
    import docker

    client: Any = docker.from_env()
    best: dict[str, float] = {}
    for _ in range(3):
        container = client.containers.run(
            image,
            entrypoint=["/opt/worker/bin/python", "-X", "importtime", "-c", f"import {_WORKER}"],
            detach=True,
        )
        try:
            container.wait(timeout=60)
            text = container.logs().decode()
        finally:
            remove_container(container)
        for line in text.splitlines():
            parts = line.removeprefix("import time:").split("|")
            if len(parts) == 3 and parts[1].strip().isdigit():
                name, cost = parts[2].strip(), int(parts[1]) / 1000
                if name in (*_IMPORTS, _WORKER):
                    best[name] = min(cost, best.get(name, cost))
    client.close()
    return best


def main(options: argparse.Namespace, report: _report.Report) -> None:
    what = "container's first process to first task"
    figures = [
        _fresh.measure(OURS, image=options.image, pull=options.pull)
        for _ in range(options.rounds + 1)
    ]
    # The first measurement is dropped, as it had to read the image from the disk.
    figures = figures[1:]
    report.number(what, _report.median(figures, "first task"), "s", at_most=_BUDGET_S)
    for name, row in (
        ("interpreter", "of that: init, interpreter, first imports"),
        ("dialing", "of that: imports of gRPC, dialing in, enrolment"),
        ("slot", "of that: the slot's process to the task"),
        ("engine", "before that: engine asked to first process"),
        *([("pull", "before that: the image is pulled and unpacked")] if options.pull else []),
        ("result", "after that: the task to its result"),
    ):
        report.number(row, _report.median(figures, name), "s")
    imports = _imports(options.image)
    report.number(f"import {_WORKER}", imports.pop(_WORKER), "ms")
    for name, cost in imports.items():
        report.number(f"of that: {name}", cost, "ms")


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--image", required=True, help="the worker's image")
    parser.add_argument("--pull", action="store_true", help="pull it in each round")


if __name__ == "__main__":
    _report.run(__doc__, main, measure, add_options=_add_options)
