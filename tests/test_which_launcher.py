"""The page that compares launchers: its numbers are those of the code."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import sys
from types import ModuleType

import pytest
from test_docs import DOCS, ROOT

from cloudexec._aws.function_requests import LONGEST_SESSION, MOST_MIB, VCPU_MIB
from cloudexec._aws.instance_requests import MOST_INSTANCES
from cloudexec._aws.limits import (
    ARRAY_LARGEST,
    ECS_MOST_VCPUS,
    FARGATE_MOST_VCPUS,
    fargate_memories,
    format_memory,
)
from cloudexec._aws.prices import LEAST_SECONDS, PriceTable
from cloudexec._aws.template import template
from cloudexec._launchers.base import LaunchTimes
from cloudexec._launchers.batch import platform as batch
from cloudexec._launchers.ec2 import asking as ec2_asking
from cloudexec._launchers.fargate.asking import CALLS_PER_SECOND
from cloudexec._launchers.lambda_.asking import STARTS_PER_SECOND

PAGE = DOCS / "how-to" / "which-launcher.md"
Table = dict[str, dict[str, str]]


def tables() -> list[Table]:
    """Return the cells of each table of the page, by row and column, without backquotes."""
    found: list[Table] = []
    heading: list[str] = []
    for line in PAGE.read_text().replace("`", "").splitlines():
        cells = [each.strip() for each in line.strip("|").split("|")]
        if not line.startswith("|"):
            heading = []
        elif not heading:
            heading = cells
            found.append({})
        elif not cells[0].startswith("---"):
            found[-1][cells[0]] = dict(zip(heading[1:], cells[1:], strict=True))
    return found


def imported(name: str, folder: str, patch: pytest.MonkeyPatch) -> ModuleType:
    patch.syspath_prepend(str(ROOT / folder))
    patch.delitem(sys.modules, name, raising=False)
    return importlib.import_module(name)


def largest(vcpus: float) -> str:
    return f"{vcpus:g} vCPUs with {format_memory(max(fargate_memories(vcpus)))}"


def of_instance(name: str) -> str:
    """Return the price of a vCPU on an instance type, as the page says it."""
    each = PriceTable.built_in().instances[name]
    share = f"${each.per_hour / each.vcpus:.4f} with {each.memory_gib / each.vcpus:g} GiB"
    return f"{share} ({name})"


def test_limits_and_prices_of_the_page_are_those_of_the_code(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    prices = PriceTable.built_in()
    on_lambda, on_lambda_arm = (
        prices.worker(vcpus=1, memory_mib=VCPU_MIB, arch=arch, compute="lambda")
        for arch in ("x86_64", "arm64")
    )
    spot = f"Spot costs about {prices.spot_factor * 100:.0f} % of it."
    slurm = imported("slurm_launcher", "docs/launchers", monkeypatch).SlurmPlatform
    kubernetes = imported("kubernetes_launcher", "docs/launchers", monkeypatch).KubernetesPlatform
    run = inspect.signature(importlib.import_module("cloudexec._runs.run").make_request)
    max_vcpus = template()["Parameters"]["MaxVcpus"]["Default"]
    in_a_job = f"{ARRAY_LARGEST:,} workers in a job"
    size, limits, price, least = (
        "the largest worker",
        "limits on workers",
        "price of one vCPU for an hour",
        "the least that is billed",
    )
    (table, _) = tables()
    expected = {
        ("Fargate(...)", size): [largest(ECS_MOST_VCPUS)],
        ("Fargate(...)", limits): [f"{CALLS_PER_SECOND} requests a second"],
        ("Fargate(...)", price): [
            f"${prices.vcpu_hour['x86_64']:.4f}, and ${prices.gb_hour['x86_64']:.4f} for each GiB",
            f"ARM ${prices.vcpu_hour['arm64']:.4f} and ${prices.gb_hour['arm64']:.4f}",
            spot,
        ],
        ("Fargate(...)", least): [f"{LEAST_SECONDS} s"],
        ("Lambda(...)", size): [
            f"{format_memory(MOST_MIB)} with {MOST_MIB / VCPU_MIB:.1f} vCPUs, for "
            f"{LONGEST_SESSION} s"
        ],
        ("Lambda(...)", limits): [f"{10 * STARTS_PER_SECOND:,} workers every ten seconds"],
        ("Lambda(...)", price): [
            f"${on_lambda.per_hour:.4f} with {VCPU_MIB} MiB",
            f"ARM ${on_lambda_arm.per_hour:.4f}",
        ],
        ("Lambda(...)", least): [
            f"{1000 * on_lambda.least_seconds:g} ms, and ${on_lambda.per_run:.7f}"
        ],
        ("Batch(...)", size): [largest(FARGATE_MOST_VCPUS)],
        ("Batch(...)", limits): [
            in_a_job,
            f"{batch._FARGATE_BURST} workers at once",
            f"and then {batch._FARGATE_PER_SECOND} a second",
            f"{max_vcpus} vCPUs",
        ],
        ("Batch(...)", least): [f"{LEAST_SECONDS} s"],
        ('Batch(compute="ec2")', limits): [in_a_job, f"{max_vcpus} vCPUs"],
        ('Batch(compute="ec2")', price): [
            *map(of_instance, ("c6i.large", "m7i.large", "c7g.large")),
            spot,
        ],
        ('Batch(compute="ec2")', least): [f"{LEAST_SECONDS} s"],
        ("EC2(...)", limits): [
            f"{MOST_INSTANCES} workers in a request",
            f"{ec2_asking.CALLS_PER_SECOND} requests a second",
            f"{ec2_asking._INSTANCES_BURST:,} instances at once",
            f"and then {ec2_asking._INSTANCES_PER_SECOND} a second",
        ],
        ("EC2(...)", least): [f"{LEAST_SECONDS} s"],
        ("Slurm example", limits): [f"{slurm.most_workers:,} workers"],
        ("Kubernetes example", limits): [f"{kubernetes.most_workers:,} workers"],
        ("Fallback([...])", "from the request to your code"): [
            f"{batch._FARGATE_SPOT_PATIENCE:g} s on Fargate and {batch._EC2_SPOT_PATIENCE:g} s"
        ],
        ("cloudexec run", size): [largest(FARGATE_MOST_VCPUS)],
        ("cloudexec run", limits): [f"for {run.parameters['max_hours'].default:g} h unless"],
        ("cloudexec run", least): [f"{LEAST_SECONDS} s"],
    }
    missing = {
        place: wanted
        for place, texts in expected.items()
        if (wanted := [text for text in texts if text not in table[place[0]][place[1]]])
    }
    assert not missing
    text = PAGE.read_text()
    assert f"list prices of us-east-1 of {prices.dated}" in text
    assert f"${prices.public_ipv4_hour:g} an hour more" in text


def test_the_starts_of_the_page_are_those_that_the_benchmark_measures(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    benchmark = imported("launchers", "benchmarks", monkeypatch)
    (_, table) = tables()
    assert list(table) == [*benchmark._LAUNCHERS, benchmark._RUN]
    columns = [each.replace("`", "") for each in benchmark._COLUMNS]
    assert all(list(row) == columns for row in table.values())
    assert set(columns[:-1]) < {each.name for each in dataclasses.fields(LaunchTimes)}
