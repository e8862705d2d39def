"""EC2 instances that run: each executes its user data with ``bash``, as cloud-init does.

Nothing of the system is emulated but what such a script uses: the metadata service, and the
commands ``docker``, ``shutdown``, ``systemctl`` and ``systemd-run``. What ``docker`` is told to run
is run by the runner that runs jobs of AWS Batch: as a process, or as a container.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from cloudexec.testing._aws.ec2_faults import Ec2Faults
from cloudexec.testing._aws.instance_types import InstanceType
from cloudexec.testing._aws.records import InstanceRecord
from cloudexec.testing._aws.runners import Running
from cloudexec.testing._aws.timers import Timers, Timing

__all__ = ["ENDED", "Instance", "Instances", "Order"]

ENDED = ("shutting-down", "terminated")
_LOOK = 0.01
_REASONS = {
    "itself": (
        "Client.InstanceInitiatedShutdown",
        "Client.InstanceInitiatedShutdown: Instance initiated shutdown",
    ),
    "user": (
        "Client.UserInitiatedShutdown",
        "Client.UserInitiatedShutdown: User initiated shutdown",
    ),
    "spot": (
        "Server.SpotInstanceTermination",
        "Server.SpotInstanceTermination: Instance no-longer satisfies Spot request",
    ),
    "capacity": (
        "Server.InsufficientInstanceCapacity",
        "Server.InsufficientInstanceCapacity: Insufficient capacity to satisfy instance request",
    ),
    "fault": ("Server.InternalError", "Server.InternalError: Internal error on launch"),
}
"""Codes and messages of StateReason. Amazon EC2 API Reference, "StateReason"."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What an instance is to be."""

    region: str
    kind: InstanceType
    subnet: str
    zone: str
    spot: bool
    tags: Mapping[str, str]
    script: str
    role: str
    """ARN of the role of its instance profile."""
    template: str
    public_ip: bool
    hop_limit: int
    """How many networks an answer with a token of the metadata service may cross."""


@dataclass(slots=True, eq=False)
class Instance:
    """One instance. The lock of ``Instances`` protects all fields."""

    id: str
    order: Order
    launched_at: float
    state: str = "pending"
    reason: str = ""
    """A key of ``_REASONS``; empty while it has not ended."""
    ended_at: float | None = None
    notice_until: float | None = None
    """When its machine is taken back, since the epoch; ``None``: nobody has said so."""
    process: subprocess.Popen[bytes] | None = None
    container: Running | None = None
    container_ended: threading.Event = field(default_factory=threading.Event)
    exit_code: int | None = None
    out_of_memory: bool = False
    pulled: set[str] = field(default_factory=set)
    environment: dict[str, str] = field(default_factory=dict)
    """Of the container, without its key."""
    stop_factor: float = 1.0
    """How much longer its container has than usual, when the system shuts down."""
    console: bytes = b""
    is_forgotten: bool = False
    """Whether DescribeInstances does not know it any more."""

    @property
    def ended(self) -> bool:
        """Whether it costs nothing any more."""
        return self.state in ENDED

    @property
    def address(self) -> str:
        """Its private address: of the machine that all of them share."""
        if not sys.platform.startswith("linux"):
            return "127.0.0.1"
        number = bytes.fromhex(self.id[2:8])
        return f"127.{number[0] | 128}.{number[1]}.{1 + number[2] % 254}"

    @property
    def state_reason(self) -> tuple[str, str]:
        """Code and message of its end; empty while it has not ended."""
        return _REASONS.get(self.reason, ("", ""))

    @property
    def transition(self) -> str:
        """What DescribeInstances has as ``StateTransitionReason``."""
        if self.ended_at is None:
            return ""
        at = f"({datetime.fromtimestamp(self.ended_at, UTC):%Y-%m-%d %H:%M:%S} GMT)"
        return f"Service initiated {at}" if self.reason == "spot" else f"User initiated {at}"


class Instances:
    """Starts, runs and ends instances.

    Args:
        directory: An empty directory for their files.
        commands: A directory with the commands that stand for those of the system.
        address: The URL below which each of them finds what belongs to it.
        endpoint: The URL of the API.
        faults: What goes wrong.
        timing: How long things take.
    """

    def __init__(
        self,
        directory: Path,
        *,
        commands: Path,
        address: str,
        endpoint: str,
        faults: Ec2Faults,
        timing: Timing,
    ) -> None:
        self._directory = directory
        self._commands = commands
        self._address = address
        self._endpoint = endpoint
        self._faults = faults
        self._timing = timing
        self._timers = Timers()
        self.lock = self._timers.lock
        self.all: dict[str, Instance] = {}
        self._threads: set[threading.Thread] = set()

    def launch(self, order: Order, delay: float, *, fails: bool = False) -> Instance:
        """Start an instance.

        Args:
            order: What it is to be.
            delay: Seconds until it runs, in addition to the usual ones.
            fails: Whether it ends while it is pending, for want of capacity.
        """
        instance = Instance(f"i-{uuid.uuid4().hex[:17]}", order, time.time())
        with self.lock:
            self.all[instance.id] = instance
            boot = self._timing.step + self._timing.boot + delay
            self._timers.later(
                boot, lambda: self._end(instance, "capacity") if fails else self._boot(instance)
            )
        return instance

    def running_vcpus(self, *, spot: bool) -> float:
        """Return the vCPUs of instances that have not ended."""
        with self.lock:
            return sum(
                each.order.kind.vcpus
                for each in self.all.values()
                if not each.ended and each.order.spot == spot
            )

    def alive(self) -> list[Instance]:
        """Return the instances that have not ended."""
        with self.lock:
            return [each for each in self.all.values() if not each.ended]

    def terminate(self, instances: Iterable[Instance], *, at_once: bool) -> None:
        """End instances as TerminateInstances does.

        Args:
            instances: Which.
            at_once: Whether their systems get no time to shut down.
        """
        with self.lock:
            for each in instances:
                if not each.ended:
                    self.shut_down(each, "user", grace=0.0 if at_once else None)

    def shut_down(self, instance: Instance, reason: str, grace: float | None = None) -> None:
        """End an instance: what runs in its container is told, and killed after a moment.

        Args:
            instance: Which.
            reason: A key of ``_REASONS``.
            grace: Seconds for what runs in its container; ``None``: the usual ones.
        """
        with self.lock:
            if instance.ended:
                return
            instance.state, instance.reason = "shutting-down", reason
            grace = self._timing.grace * instance.stop_factor if grace is None else grace
            if instance.container is not None and grace > 0:
                instance.container.terminate()
                self._timers.later(grace, lambda: self._end(instance, reason))
                self.spawn(self._end_after_container, instance, reason)
            else:
                self._end(instance, reason)

    def _end_after_container(self, instance: Instance, reason: str) -> None:
        instance.container_ended.wait()
        with self.lock:
            self._end(instance, reason)

    def spawn(self, work: Callable[..., None], instance: Instance, *arguments: object) -> None:
        """Do something for an instance in a thread, for whose end ``close`` waits."""

        def run() -> None:
            try:
                work(instance, *arguments)
            finally:
                with self.lock:
                    self._threads.discard(threading.current_thread())

        thread = threading.Thread(target=run, name=f"fake-aws-{instance.id}", daemon=True)
        with self.lock:
            self._threads.add(thread)
        thread.start()

    def after(self, instance: Instance, seconds: float) -> None:
        """Let an instance shut down in so many of AWS's seconds."""
        self._timers.later(seconds / self._timing.speed, lambda: self.shut_down(instance, "itself"))

    def reclaim(self, instance: str, notice: float) -> None:
        """See ``Ec2Faults.reclaim``."""
        with self.lock:
            found = self.all[instance]
            if found.state != "running" or not found.order.spot:
                raise ValueError(f"{instance} is not a Spot instance that runs")
            found.notice_until = time.time() + notice
            self._timers.later(notice, lambda: self.shut_down(found, "spot", grace=0.0))

    def vanish(self, instance: str) -> None:
        """See ``Ec2Faults.vanish``."""
        with self.lock:
            self.shut_down(self.all[instance], "fault", grace=0.0)

    def out_of_memory(self, instance: str) -> None:
        """See ``Ec2Faults.out_of_memory``."""
        with self.lock:
            container = self.all[instance].container
            if container is None:
                raise ValueError(f"{instance} has no container that runs")
            container.out_of_memory()

    def forget_ended(self) -> list[str]:
        """See ``Faults.forget_ended``."""
        with self.lock:
            ended = [each for each in self.all.values() if each.ended and not each.is_forgotten]
            for each in ended:
                each.is_forgotten = True
            return [each.id for each in ended]

    def records(self) -> list[InstanceRecord]:
        """Return the state of all instances, in the order of their start."""
        with self.lock:
            return [_record(each) for each in self.all.values()]

    def close(self) -> None:
        """End all instances, and every thread."""
        with self.lock:
            self._timers.stop()
            for each in self.all.values():
                if each.state != "terminated":
                    self._end(each, each.reason or "fault")
            threads = list(self._threads)
        for thread in threads:
            thread.join()
        self._timers.join()

    def has_engine(self, instance: Instance) -> bool:
        """Say whether the container engine of an instance has started.

        It starts when cloud-init has ended, and so not before the script in the user data has: see
        aws/amazon-ecs-agent#1707. For systems without that order, there is a fault.
        """
        process = instance.process
        return self._faults.engine_starts_first or process is None or process.poll() is not None

    def wait_for_engine(self, instance: Instance) -> None:
        """Wait until the container engine of an instance has started, or the instance has ended."""
        while not self.has_engine(instance) and not instance.ended:
            time.sleep(_LOOK)

    # One instance.

    def _boot(self, instance: Instance) -> None:
        if instance.ended:
            return
        instance.state = "running"
        if self._faults.scripts_hang or not instance.order.script:
            return
        home = self._directory / instance.id
        home.mkdir()
        script = home / "user-data"
        script.write_text(instance.order.script)
        environment = {
            "PATH": os.pathsep.join([str(self._commands), "/usr/local/bin", "/usr/bin", "/bin"]),
            "HOME": str(home),
            "TMPDIR": str(home),
            "LANG": "C.UTF-8",
            "AWS_EC2_METADATA_SERVICE_ENDPOINT": f"{self._address}/{instance.id}",
            "AWS_ENDPOINT_URL": self._endpoint,
            "FAKE_MACHINE": f"{self._address}/{instance.id}",
        }
        instance.process = subprocess.Popen(
            ["bash", str(script)],
            cwd=home,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self.spawn(self._run, instance)

    def _run(self, instance: Instance) -> None:
        """Read what a script writes, until its end."""
        process = instance.process
        assert process is not None
        stream = process.stdout
        assert stream is not None
        with stream:
            while data := os.read(stream.fileno(), 65536):
                instance.console += data
        process.wait()
        shutil.rmtree(self._directory / instance.id, ignore_errors=True)

    def _end(self, instance: Instance, reason: str) -> None:
        """Let nothing of an instance be left."""
        if instance.state == "terminated":
            return
        instance.state, instance.reason = "terminated", instance.reason or reason
        instance.ended_at = time.time()
        if instance.container is not None:
            instance.container.kill()
        if instance.process is not None:
            try:
                os.killpg(instance.process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass


def _record(instance: Instance) -> InstanceRecord:
    order = instance.order
    return InstanceRecord(
        instance_id=instance.id,
        type=order.kind.name,
        spot=order.spot,
        subnet=order.subnet,
        state=instance.state,
        state_reason=instance.state_reason[0],
        tags=dict(order.tags),
        user_data=order.script,
        environment=dict(instance.environment),
        exit_code=instance.exit_code,
        pid=instance.container.pid if instance.container is not None else None,
        launched_at=instance.launched_at,
        ended_at=instance.ended_at,
        console=instance.console.decode(errors="replace"),
    )
