"""How long does each launcher take from a call to its result, and which part takes how long?

AWS and Kubernetes are emulated, so that a place is found and an image is there at once. Slurm is a
real cluster of one node on this machine, if its programs are installed. What is measured is what
cloudexec, the worker and Slurm take, and how often AWS is asked. On AWS itself, finding a place and
downloading the image take most of the time.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import _calls
import _fresh
import _report

_ROOT = Path(__file__).resolve().parent.parent
_LAUNCHERS = (
    "Local",
    "Fargate",
    "Lambda",
    "Batch",
    "Batch on EC2",
    "EC2",
    "Fallback",
    "Fallback that goes on",
    "Slurm",
    "Kubernetes",
)
"""``Fallback that goes on`` has a first launcher that has no capacity."""
_ECR_IMAGE = f"123456789012.dkr.ecr.us-east-1.amazonaws.com/worker@sha256:{'0' * 64}"
"""AWS Lambda takes no image from elsewhere."""
_RUN = "cloudexec run"
_PARTS = {
    "api": "the request",
    "place": "finding a place",
    "boot": "starting the process, up to its first connection",
    "dial_in": "connecting",
    "first_task": "the first task",
    "first": "all of it, with the start of the executor",
}
_RUN_PARTS = {
    "api": "packing and sending the script, and the request",
    "boot": "finding a place and starting the process, up to the script's first line",
    "first_task": "until that line is shown here",
    "first": "all of it, up to that line",
}
_COLUMNS = {
    **{f"`{name}`": name for name in _PARTS if name != "first"},
    "until the first result": "first",
}


def _on_aws(kind: str, aws: Any, **settings: Any) -> Any:
    from cloudexec import EC2, Batch, Fallback, Fargate, Lambda

    if kind == "EC2":
        from launcher_helpers import write_profile

        write_profile(aws)
        return EC2(vcpus=1, image="worker:1", profile="instances")
    if kind == "Fallback":
        return Fallback({"first": _on_aws("Fargate", aws), "then": _on_aws("Batch", aws)})
    if kind == "Fallback that goes on":
        aws.faults.no_capacity("FARGATE_SPOT")
        return Fallback(
            {"first": _on_aws("Fargate", aws, spot=True), "then": _on_aws("Batch", aws)}
        )
    made = aws.set_up(
        f"bench-{kind.lower().replace(' ', '-')}",
        kinds=("EC2",) if kind == "Batch on EC2" else None,
        max_vcpus=64,
    )
    given = {
        "job_role": made.job_role,
        "execution_role": made.execution_role,
        "region": aws.region,
        "image": "worker:1",
        **settings,
    }
    if kind == "Lambda":
        return Lambda(role=made.function_role, region=aws.region, image=_ECR_IMAGE)
    if kind == "Fargate":
        return Fargate(
            cluster=made.cluster,
            subnets=made.subnets,
            security_groups=[made.security_group],
            **given,
        )
    return Batch(queue=made.queue, compute="ec2" if kind == "Batch on EC2" else "fargate", **given)


@contextlib.contextmanager
def _launcher(kind: str) -> Iterator[tuple[Any, Any]]:
    """Yield a launcher, and the emulated AWS if there is one."""
    sys.path += [str(_ROOT / "docs" / "launchers"), str(_ROOT / "tests" / "launchers")]
    if kind == "Local":
        from cloudexec import Local

        yield Local(), None
    elif kind == "Slurm":
        from slurm_cluster import SlurmCluster
        from slurm_launcher import Slurm

        with tempfile.TemporaryDirectory() as folder:
            cluster = SlurmCluster(Path(folder))
            os.environ["SLURM_CONF"] = str(cluster.conf)
            try:
                cluster.start()
                yield Slurm(host="127.0.0.1", memory_mib=100), None
            finally:
                cluster.stop()
    elif kind == "Kubernetes":
        from kubernetes_emulation import EmulatedKubernetes
        from kubernetes_launcher import KubernetesJobs

        with EmulatedKubernetes() as emulated:
            here = {"host": "127.0.0.1", "listen": "127.0.0.1:0", "api": emulated.api}
            yield KubernetesJobs(image="worker:1", **here), None
    else:
        from cloudexec.testing import FakeAWS

        with (
            tempfile.TemporaryDirectory() as folder,
            FakeAWS(grace=2.0, max_running=256) as aws,
        ):
            os.environ["CLOUDEXEC_CONFIG_DIR"] = folder
            yield _on_aws(kind, aws), aws


def measure(contender: str, workers: int) -> _fresh.Figures:
    if contender == _RUN:
        return _measure_run()
    from cloudexec import BatchExecutor

    with _launcher(contender) as (launcher, aws):
        begin = time.perf_counter()
        with BatchExecutor(workers, launcher=launcher, min_workers=workers) as executor:
            executor.submit(_calls.noop).result()
            first = time.perf_counter() - begin
            while executor.stats().workers.slots < workers:
                time.sleep(0.01)
            every = time.perf_counter() - begin
            launches = executor.stats().launches
        services = ("batch", "ecs", "ec2", "lambda")
        calls = sum(each.service in services for each in aws.requests) if aws else 0
    told = next((each for each in launches if each.total is not None), None)
    figures = {part: float(getattr(told, part, None) or 0.0) for part in _PARTS}
    return {**figures, "first": first, "all": every, "calls": calls}


def _measure_run() -> _fresh.Figures:
    import pytest

    sys.path.append(str(_ROOT / "tests"))
    from run_helpers import account

    import cloudexec

    with (
        tempfile.TemporaryDirectory() as folder,
        pytest.MonkeyPatch.context() as patch,
        account(Path(folder, "profiles"), patch),
    ):
        patch.chdir(folder)
        Path("script.py").write_text("import time\nprint(time.time(), flush=True)\n")
        begin = time.time()
        run = cloudexec.run("script.py")
        accepted = time.time()
        lines = run.lines()
        began = float(next(lines))
        shown = time.time()
        run.wait()
    return {
        "api": accepted - begin,
        "boot": began - accepted,
        "first_task": shown - began,
        "first": shown - begin,
    }


def _why_not(kind: str) -> str:
    """Say why a launcher cannot be measured here; empty: it can."""
    if kind != "Slurm":
        return ""
    sys.path.append(str(_ROOT / "tests" / "launchers"))
    from slurm_cluster import why_not

    return str(why_not())


def main(options: argparse.Namespace, report: _report.Report) -> None:
    table = ["| | " + " | ".join(_COLUMNS) + " |", "| --- |" + " ---: |" * len(_COLUMNS)]
    for kind in (*_LAUNCHERS, _RUN):
        if why := _why_not(kind):
            report.missing("one start", kind, why)
            continue
        found = [_fresh.measure(kind, workers=1) for _ in range(options.rounds)]
        parts = _RUN_PARTS if kind == _RUN else _PARTS
        medians = {name: _report.median(found, name) for name in parts}
        for name, what in parts.items():
            report.number(f"{kind}: {what}", medians[name], "s")
        cells = (f"{medians[each]:.2f}" if each in medians else "" for each in _COLUMNS.values())
        table.append(f"| {kind} | " + " | ".join(cells) + " |")
    if options.markdown:
        print("\n".join(["", *table, ""]))
    workers = 4 if options.quick else 20
    figures = {
        kind: [_fresh.measure(kind, workers=workers) for _ in range(options.rounds)]
        for kind in ("Batch", "Fargate")
    }
    for name, what, unit in (
        ("first", "first result", "s"),
        ("all", "every worker is there", "s"),
        ("calls", "calls of AWS Batch and Amazon ECS", ""),
    ):
        report.number(
            f"{what}, {workers} workers, Fargate",
            _report.median(figures["Fargate"], name),
            unit,
            peer="Batch",
            theirs=_report.median(figures["Batch"], name),
        )


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--markdown", action="store_true", help="also print the table of starts, in seconds"
    )


if __name__ == "__main__":
    _report.run(__doc__, main, measure, add_options=_add_options)
