"""A cluster of Slurm on this machine: its own munged, slurmctld and slurmd in one folder."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

PROGRAMS = ("mungekey", "munged", "slurmctld", "slurmd", "sbatch", "squeue", "scancel", "sinfo")
_PATIENCE = 60.0


def why_not() -> str:
    """Say why there can be no cluster here; empty: there can."""
    if os.name != "posix" or os.geteuid() != 0:
        return "Slurm's daemons are started as root"
    missing = [each for each in PROGRAMS if shutil.which(each) is None]
    return f"not installed (slurm-wlm, munge): {', '.join(missing)}" if missing else ""


class SlurmCluster:
    """One node with eight processors, as far as Slurm knows.

    Args:
        folder: An empty folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.conf = folder / "slurm.conf"
        self._daemons: list[subprocess.Popen[bytes]] = []
        for name in ("state", "spool"):
            (folder / name).mkdir()
        host, ports = socket.gethostname(), [_free_port() for _ in range(2)]
        self.conf.write_text(
            f"""
            ClusterName=test
            SlurmctldHost={host}(127.0.0.1)
            SlurmctldPort={ports[0]}
            SlurmdPort={ports[1]}
            SlurmUser=root
            SlurmdUser=root
            AuthType=auth/munge
            AuthInfo=socket={folder}/munge.socket
            StateSaveLocation={folder}/state
            SlurmdSpoolDir={folder}/spool
            SlurmctldPidFile={folder}/slurmctld.pid
            SlurmdPidFile={folder}/slurmd.pid
            SlurmctldLogFile={folder}/slurmctld.log
            SlurmdLogFile={folder}/slurmd.log
            ProctrackType=proctrack/pgid
            TaskPlugin=task/none
            MpiDefault=none
            ReturnToService=2
            SelectType=select/cons_tres
            SelectTypeParameters=CR_CPU_Memory
            SlurmdParameters=config_overrides
            SchedulerParameters=batch_sched_delay=0,sched_min_interval=0
            KillWait=2
            NodeName=node1 NodeHostname={host} NodeAddr=127.0.0.1 CPUs=8 RealMemory=64000
            PartitionName=main Nodes=node1 Default=YES MaxTime=INFINITE State=UP
            """
        )

    def start(self) -> None:
        """Start the daemons, and wait until there is an idle node."""
        subprocess.run(["mungekey", "--create", f"--keyfile={self.folder}/munge.key"], check=True)
        files = {
            "--key-file": "munge.key",
            "--socket": "munge.socket",
            "--pid-file": "munged.pid",
            "--log-file": "munged.log",
            "--seed-file": "munged.seed",
        }
        options = [f"{option}={self.folder / name}" for option, name in files.items()]
        self._daemon("munged", "--foreground", "--force", *options)
        _wait(lambda: (self.folder / "munge.socket").exists(), "munged has not started")
        self._daemon("slurmctld", "-D", "-f", str(self.conf))
        self._daemon("slurmd", "-D", "-N", "node1", "-f", str(self.conf))
        _wait(lambda: "idle" in self.run("sinfo", "-h", "-o", "%T"), "there is no idle node")

    def _daemon(self, *command: str) -> None:
        with (self.folder / f"{command[0]}.out").open("wb") as out:
            self._daemons.append(
                subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=out,
                    start_new_session=True,
                    # By this, all processes of the cluster are known.
                    env={**os.environ, "SLURM_CONF": str(self.conf)},
                )
            )

    def run(self, *command: str) -> str:
        """Run a command of Slurm; return what it prints, whether it worked or not."""
        environment = {**os.environ, "SLURM_CONF": str(self.conf)}
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=60, check=False
        )
        return done.stdout

    def unfinished(self) -> list[str]:
        """Return the tasks of jobs that have not ended."""
        return self.run("squeue", "--noheader", "--array", "--format=%i %T").splitlines()

    def stop(self) -> None:
        """End all jobs and all daemons."""
        self.run("scancel", "--user=root")
        with contextlib.suppress(AssertionError):
            _wait(lambda: not self.unfinished(), "jobs have not ended")
        for daemon in reversed(self._daemons):
            daemon.terminate()
        for daemon in self._daemons:
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def processes(self) -> Sequence[int]:
        """Return the processes of the cluster and of its jobs."""
        mark = f"SLURM_CONF={self.conf}".encode()
        found = []
        for path in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):
                if mark in path.read_bytes().split(b"\0") and int(path.parent.name) != os.getpid():
                    found.append(int(path.parent.name))
        return found


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait(condition: Callable[[], object], otherwise: str) -> None:
    deadline = time.monotonic() + _PATIENCE
    while not condition():
        assert time.monotonic() < deadline, otherwise
        time.sleep(0.05)
