"""How long does each launcher on AWS take from a call to its result, and which part takes how long?

AWS is emulated, so that a place is found and an image is there at once: what is measured is what
cloudexec and the worker take, and how often AWS is asked. On AWS itself, finding a place and
downloading the image take most of the time.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import _calls
import _fresh
import _report

_LAUNCHERS = ("Batch", "Fargate")
_PARTS = {
    "api": "the request to AWS",
    "place": "finding a place",
    "boot": "starting the process, up to its first connection",
    "dial_in": "connecting",
    "first_task": "the first task",
}


def _launcher(kind: str, aws: Any) -> Any:
    from cloudexec import Batch, Fargate

    made = aws.set_up("bench")
    given = {
        "job_role": made.job_role,
        "execution_role": made.execution_role,
        "region": aws.region,
        "image": "worker:1",
    }
    if kind == "Batch":
        return Batch(queue=made.queue, **given)
    return Fargate(
        cluster=made.cluster,
        subnets=made.subnets,
        security_groups=[made.security_group],
        **given,
    )


def measure(contender: str, workers: int) -> _fresh.Figures:
    from cloudexec import BatchExecutor
    from cloudexec.testing import FakeAWS

    with FakeAWS(grace=2.0, max_running=256) as aws:
        launcher = _launcher(contender, aws)
        begin = time.perf_counter()
        with BatchExecutor(workers, launcher=launcher, min_workers=workers) as executor:
            executor.submit(_calls.noop).result()
            first = time.perf_counter() - begin
            while executor.stats().workers.slots < workers:
                time.sleep(0.01)
            every = time.perf_counter() - begin
            launches = executor.stats().launches
        calls = sum(each.service in ("batch", "ecs") for each in aws.requests)
    told = next(each for each in launches if each.total is not None)
    figures = {part: float(getattr(told, part) or 0.0) for part in _PARTS}
    return {**figures, "total": told.total or 0.0, "first": first, "all": every, "calls": calls}


def main(options: argparse.Namespace, report: _report.Report) -> None:
    for workers in (1, 4 if options.quick else 20):
        of = f"{workers} worker{'s' * (workers != 1)}"
        figures = {
            kind: [_fresh.measure(kind, workers=workers) for _ in range(options.rounds)]
            for kind in _LAUNCHERS
        }
        rows = {"first": f"first result, {of}"}
        if workers == 1:
            rows |= {part: f"of that: {what}" for part, what in _PARTS.items()}
        else:
            rows["all"] = f"every worker is there, {of}"
        for name, what in rows.items():
            report.number(
                what,
                _report.median(figures["Fargate"], name),
                "s",
                peer="Batch",
                theirs=_report.median(figures["Batch"], name),
            )
        report.number(
            f"calls of AWS Batch and Amazon ECS, {of}",
            _report.median(figures["Fargate"], "calls"),
            "",
            peer="Batch",
            theirs=_report.median(figures["Batch"], "calls"),
        )


if __name__ == "__main__":
    _report.run(__doc__, main, measure)
