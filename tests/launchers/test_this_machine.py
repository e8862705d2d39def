"""What this machine has for tasks, read from files as Linux has them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cloudexec._launchers.this_machine import this_machine

GIB = 2**30


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with 64 processors and 64 GiB."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)), raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    write(tmp_path, "proc/meminfo", f"MemTotal: {64 * 2**20} kB\nMemFree: 1 kB\n")
    return tmp_path


def write(root: Path, path: str, text: str) -> None:
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text(text)


def test_a_machine_without_limits(root: Path) -> None:
    found = this_machine(str(root))
    assert (found.cpus, found.memory, found.gpus) == (64, 64 * GIB, 0)


def test_the_limits_of_a_control_group(root: Path) -> None:
    """Version 2, where the least of the group's and those above counts."""
    write(root, "proc/self/cgroup", "0::/jobs/mine\n")
    write(root, "sys/fs/cgroup/jobs/cpu.max", "150000 100000\n")
    write(root, "sys/fs/cgroup/jobs/mine/cpu.max", "max 100000\n")
    write(root, "sys/fs/cgroup/jobs/memory.max", "max\n")
    write(root, "sys/fs/cgroup/jobs/mine/memory.max", f"{3 * GIB}\n")
    found = this_machine(str(root))
    assert (found.cpus, found.memory) == (1.5, 3 * GIB)


def test_a_container_sees_its_group_at_the_top(root: Path) -> None:
    write(root, "proc/self/cgroup", "0::/docker/not-there\n")
    write(root, "sys/fs/cgroup/cpu.max", "400000 100000\n")
    write(root, "sys/fs/cgroup/memory.max", f"{GIB}\n")
    found = this_machine(str(root))
    assert (found.cpus, found.memory) == (4, GIB)


def test_control_groups_of_version_1(root: Path) -> None:
    """No limit is a number that no machine has there."""
    write(root, "proc/self/cgroup", "4:memory:/mine\n3:cpu:/mine\n")
    write(root, "sys/fs/cgroup/cpu/mine/cpu.cfs_quota_us", "50000\n")
    write(root, "sys/fs/cgroup/cpu/mine/cpu.cfs_period_us", "100000\n")
    write(root, "sys/fs/cgroup/memory/mine/memory.limit_in_bytes", f"{2 * GIB}\n")
    write(root, "sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n")
    found = this_machine(str(root))
    assert (found.cpus, found.memory) == (0.5, 2 * GIB)
    write(root, "sys/fs/cgroup/cpu/mine/cpu.cfs_quota_us", "-1\n")
    assert this_machine(str(root)).cpus == 64


@pytest.mark.parametrize(
    ("visible", "ids"),
    [
        (None, ("0", "1", "2")),
        ("2,0", ("2", "0")),
        ("GPU-abc", ("GPU-abc",)),
        ("", ()),
        ("1,-1,0", ("1",)),
    ],
)
def test_gpus_are_those_that_this_process_may_use(
    root: Path, monkeypatch: pytest.MonkeyPatch, visible: str | None, ids: tuple[str, ...]
) -> None:
    for name in ("nvidia0", "nvidia1", "nvidia2", "nvidiactl", "nvidia-uvm"):
        write(root, f"dev/{name}", "")
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    found = this_machine(str(root))
    assert (found.gpus, found.gpu_ids) == (len(ids), ids)
