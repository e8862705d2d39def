"""From a laptop behind NAT, without an engine: what docs/how-to/from-a-laptop.md shows."""

from __future__ import annotations

import contextlib
import doctest
import gzip
import os
import pty
import re
import secrets
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import termios
import time
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import pytest
from environment_helpers import make_wheel
from home_network import Home, needs_namespaces, run
from local_registry import serving
from package_index import Certificates, Index, make_certificates, serving_indexes

from cloudexec._aws.image_contents import INIT_REQUIREMENT
from cloudexec._aws.images import Engine
from cloudexec._aws.template import TEMPLATE_VERSION
from cloudexec.testing import FakeAWS

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "how-to" / "from-a-laptop.md"
PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
WORKERS = int(os.environ.get("CLOUDEXEC_TEST_WORKERS", "3"))
TASKS = int(os.environ.get("CLOUDEXEC_TEST_TASKS", "300"))
IS_WHOLE = (WORKERS, TASKS) == (40, 10_000)
"""Whether everything is as on the page. That takes minutes on a machine with two processors.
Otherwise, uv installs the packages, which takes a tenth of the time that pip takes, and what is
called pandas is ``SMALL_PANDAS``: to install, pack, send and import the real one takes as long as
all the rest."""
PATIENCE = 900.0
SCRIPT = "python sweep.py"
LOGIN = "anna:correct-horse"
SMALL_PANDAS = """
import numpy as np


class Series:
    def __init__(self, values):
        self.iloc = np.asarray(values)

    def cumsum(self):
        return Series(self.iloc.cumsum())

    def to_numpy(self):
        return self.iloc


class DataFrame:
    def __init__(self, rows, statistics=("count", "mean", "max")):
        self._rows, self._statistics = list(rows), statistics
        self.loc = self

    def describe(self):
        return self

    def __getitem__(self, statistics):
        return DataFrame(self._rows, statistics)

    def round(self, digits):
        return self

    def __str__(self):
        columns = {name: [row[name] for row in self._rows] for name in self._rows[0]}
        functions = {"count": len, "mean": np.mean, "max": max}
        lines = [" ".join(columns)]
        for name in self._statistics:
            found = (f"{functions[name](each):.1f}" for each in columns.values())
            lines.append(f"{name} " + " ".join(found))
        return "\\n".join(lines)
"""
"""What the script of the page uses of pandas."""
BASE_NAME, PUBLIC, PRIVATE = "public.ecr.aws", "pypi.org", "packages.acme.example"
"""Names that the laptop finds in its file of hosts, in place of a name server."""

pytestmark = [
    pytest.mark.timeout(3 * PATIENCE),
    needs_namespaces,
    pytest.mark.skipif(shutil.which("gcc") is None, reason="gcc is not installed"),
    pytest.mark.skipif(
        any(map(os.path.exists, ("/var/run/docker.sock", "/run/podman/podman.sock"))),
        reason="the laptop, which shares this machine's files, would have an engine",
    ),
]


@dataclass(frozen=True)
class Block:
    """A block of the page: a file's content, or commands with what they print."""

    mark: str
    name: str
    text: str

    @property
    def commands(self) -> list[tuple[str, str]]:
        """The commands, each with its output."""
        parts = re.split(r"^\$ (.*)\n", self.text, flags=re.MULTILINE)[1:]
        return list(zip(parts[::2], parts[1::2], strict=True))


def blocks() -> list[Block]:
    """Return what the page has the reader do, at the size of this run."""
    text = PAGE.read_text().replace("max_workers=40", f"max_workers={WORKERS}")
    text = text.replace("range(10_000)", f"range({TASKS})")
    if not IS_WHOLE:
        text = text.replace("$ python3 -m venv", "$ uv venv -q --python python3")
        text = text.replace("$ pip install", "$ uv pip install")
    found = re.findall(
        r"^<!-- (file|laptop)(?:: (\S+))? -->\n```\w*\n(.*?)^```$", text, re.MULTILINE | re.DOTALL
    )
    return [Block(*each) for each in found]


def is_as_shown(shown: str, said: str) -> bool:
    """Whether a command has said what the page shows, but for numbers and names made by AWS."""

    def plain(text: str) -> str:
        # What is left out may be nothing.
        text = re.sub(r"\n *\.\.\.\n", "...\n", text)
        # How long a step took is said from one second on.
        text = re.sub(r" \((\d+ min )?\d+ s\)$", "", text, flags=re.MULTILINE)
        text = re.sub(r"-[A-Z0-9]{12}\b|-bucket-[a-z0-9]{12}\b", "-N", text)
        return re.sub(r"[^\s,;]*\d[^\s,;]*", "N", text)

    options = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    return doctest.OutputChecker().check_output(plain(shown), plain(said), options)


class Shell:
    """A shell on the laptop, into which commands are typed, and whose output is a terminal."""

    def __init__(self, home: Home, folder: Path, environment: dict[str, str]) -> None:
        self._terminal, theirs = pty.openpty()
        # As wide as any line, and without carriage returns.
        termios.tcsetwinsize(theirs, (50, 1000))
        settings = termios.tcgetattr(theirs)
        settings[1] &= ~termios.OPOST
        termios.tcsetattr(theirs, termios.TCSANOW, settings)
        self._process = subprocess.Popen(
            ["ip", "netns", "exec", home.laptop, "bash", "--noprofile", "--norc"],
            stdin=subprocess.PIPE,
            stdout=theirs,
            stderr=theirs,
            cwd=folder,
            env=environment,
            start_new_session=True,
        )
        os.close(theirs)
        self._end = b""
        self._is_busy = False

    @property
    def pid(self) -> int:
        return self._process.pid

    def run(self, command: str) -> str:
        """Type a command, and return what it prints; it must succeed."""
        self.begin(command)
        return self.finish()

    def begin(self, command: str) -> None:
        """Type a command."""
        assert self._process.stdin is not None
        self._end = secrets.token_hex(8).encode()
        self._is_busy = True
        words = f"{{ {command}\n}} </dev/null\necho {self._end.decode()} $?\n"
        self._process.stdin.write(words.encode())
        self._process.stdin.flush()

    def finish(self) -> str:
        """Return what the command has printed; it must have succeeded."""
        output = b""
        deadline = time.monotonic() + PATIENCE
        while not (found := re.search(self._end + rb" (\d+)\n", output)):
            left = deadline - time.monotonic()
            assert left > 0, output.decode()
            assert self._process.poll() is None, output.decode()
            if select.select([self._terminal], [], [], left)[0]:
                output += os.read(self._terminal, 65536)
        self._is_busy = False
        said = output[: found.start()].decode()
        assert found[1] == b"0", said
        return said

    def close(self) -> None:
        """End the shell, and a command that it still runs."""
        assert self._process.stdin is not None
        if self._process.stdin.closed:
            return
        try:
            if self._is_busy:
                os.killpg(self.pid, signal.SIGKILL)
            self._process.stdin.close()
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(self.pid, signal.SIGKILL)
            self._process.wait()
        finally:
            os.close(self._terminal)


@pytest.fixture
def folder() -> Iterator[Path]:
    """A directory with a short path, as there will be sockets in it.

    It is in memory where that will do: to write and delete thousands of files takes a disk half as
    long as everything else that is done.
    """
    place = "/tmp"
    if os.path.isdir("/dev/shm"):
        found = os.statvfs("/dev/shm")
        if found.f_bavail * found.f_frsize > 4 << 30 and not found.f_flag & os.ST_NOEXEC:
            place = "/dev/shm"
    with tempfile.TemporaryDirectory(prefix="ce-laptop-", dir=place) as name:
        yield Path(name)


@pytest.fixture
def home() -> Iterator[Home]:
    with contextlib.closing(Home()) as made:
        yield made


def requirements() -> list[str]:
    """What is to be had from the public index."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    pinned = re.findall(r"\b(?:numpy|pandas)==[\d.]+", PAGE.read_text())
    assert len(pinned) == 2
    if not IS_WHOLE:
        pinned = [each for each in pinned if each.startswith("numpy")]
    own = [*project["project"]["dependencies"], *project["build-system"]["requires"]]
    return [*own, *pinned, "setuptools>=70.1", INIT_REQUIREMENT]


@pytest.fixture
def certificates(folder: Path) -> Certificates:
    return make_certificates(folder, [BASE_NAME, PUBLIC, PRIVATE])


@pytest.fixture
def internet(home: Home, folder: Path, certificates: Certificates, engine: Engine) -> Iterator[str]:
    """Indexes and a registry of images; yield the address of the registry that stands for ECR."""
    pip = pytest.importorskip("pip", reason="this environment has no pip")
    assert pip
    download = [sys.executable, "-m", "pip", "download", "-q", "-d", str(folder / "public")]
    subprocess.run([*download, *requirements()], check=True, timeout=300)
    drift = "def drift(seed: int) -> float:\n    return 0.001 * (seed % 7)\n"
    make_wheel(folder / "private", "acme-rates", "2.1", {"acme_rates.py": drift})
    if not IS_WHOLE:
        make_wheel(folder / "public", "pandas", "2.3.3", {"pandas.py": SMALL_PANDAS})
    (folder / "base").mkdir()
    (folder / "ecr").mkdir()
    with serving(folder / "base") as address:
        base = f"{address}/docker/library/python"
        engine.push(f"localhost/python-base:{PYTHON}", base, f"{PYTHON}-slim", None)
    run("ip", "address", "add", f"{home.second}/24", "dev", home.cable)
    indexes = {PUBLIC: Index(folder / "public"), PRIVATE: Index(folder / "private", LOGIN)}
    pair = certificates.server, certificates.key
    with (
        serving_indexes(home.internet, certificates, indexes),
        serving(folder / "base", host=home.second, certificate=pair),
        serving(folder / "ecr", host="0.0.0.0") as ecr,
    ):
        yield ecr


@pytest.fixture
def aws(internet: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeAWS]:
    with FakeAWS(mode="container", registry=internet, max_running=WORKERS + 2, grace=5.0) as fake:
        yield fake


@pytest.fixture
def laptop(
    home: Home,
    aws: FakeAWS,
    internet: str,
    folder: Path,
    certificates: Certificates,
    engine: Engine,
) -> Iterator[Callable[[], Shell]]:
    """A function that opens a shell on a laptop with the files of the page, and nothing else."""
    port = internet.rpartition(":")[2]
    # The engine has this machine pass on what goes to its containers.
    run("ip", "-n", home.router, "route", "add", subnet_of(engine), "via", home.internet)
    # The registry that stands for ECR has a loopback address, as all of its clients want.
    home.within(home.laptop, "sysctl", "-qw", "net.ipv4.conf.all.route_localnet=1")
    nat = "iptables", "-w", "-t", "nat", "-A"
    loopback = "-d", "127.0.0.1", "-p", "tcp", "--dport", port
    home.within(
        home.laptop, *nat, "OUTPUT", *loopback, "-j", "DNAT", "--to", f"{home.internet}:{port}"
    )
    home.within(home.laptop, *nat, "POSTROUTING", "-o", "eth0", "-j", "MASQUERADE")
    with contextlib.ExitStack() as left:
        yield _laptop(home, aws, folder, certificates, left)


def _laptop(
    home: Home,
    aws: FakeAWS,
    folder: Path,
    certificates: Certificates,
    left: contextlib.ExitStack,
) -> Callable[[], Shell]:
    """Lay the files of the laptop; ``left`` removes what is not in the folder."""
    settings = Path("/etc/netns", home.laptop)
    left.callback(shutil.rmtree, settings, ignore_errors=True)
    settings.mkdir(parents=True)
    (settings / "hosts").write_text(
        f"127.0.0.1 localhost\n{home.internet} {PUBLIC} {PRIVATE}\n{home.second} {BASE_NAME}\n"
    )
    (settings / "resolv.conf").write_text("")
    if Path("/etc/pip.conf").exists():  # settings of this machine, which the laptop has not
        (settings / "pip.conf").write_text("")
    user = folder / "home"
    for each in ("bin", "tmp"):
        (user / each).mkdir(parents=True)
    interpreter = Path(sys.base_prefix, "bin", f"python{PYTHON}")
    (user / "bin" / "python3").symlink_to(interpreter)
    if not IS_WHOLE:
        (user / "bin" / "uv").symlink_to(Path(sys.executable).parent / "uv")
    for block in blocks():
        if block.mark == "file":
            file = Path(user, block.name.removeprefix("~/"))
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(block.text)
    clone = user / "cloudexec"
    clone.mkdir()
    for name in ("cloudexec", "images"):
        shutil.copytree(
            ROOT / name, clone / name, ignore=shutil.ignore_patterns("__pycache__", "_image")
        )
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, clone / name)
    address = aws.endpoint_url.replace("127.0.0.1", home.internet)
    environment = {
        **{name: value for name, value in aws.environment.items() if name[:4] == "AWS_"},
        "AWS_ENDPOINT_URL": address,
        "HOME": str(user),
        "LANG": "C.UTF-8",
        "PATH": f"{user}/bin:/usr/bin:/bin",
        "PIP_CERT": str(certificates.authority),
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        "SSL_CERT_FILE": str(certificates.authority),
        "TERM": "dumb",
        "TMPDIR": str(user / "tmp"),
        "UV_EXTRA_INDEX_URL": f"https://{LOGIN}@{PRIVATE}/simple/",
        "XDG_CONFIG_DIRS": str(user / "none"),
    }

    def open_shell() -> Shell:
        shell = Shell(home, user, environment)
        left.callback(shell.close)
        return shell

    return open_shell


def subnet_of(engine: Engine) -> str:
    """Return the addresses of containers."""
    for network in engine.client.networks.list():
        if network.name in ("podman", "bridge"):
            return str(network.attrs["IPAM"]["Config"][0]["Subnet"])
    raise LookupError("the engine has no default network")


def refuses_connections(home: Home) -> None:
    """See that nothing outside reaches a server on the laptop."""
    server = subprocess.Popen(
        ["ip", "netns", "exec", home.laptop, sys.executable, "-m", "http.server", "8080"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        for address in (home.outside, home.inner):
            with pytest.raises(OSError, match=r"refused|unreachable|No route"):
                socket.create_connection((address, 8080), 3)
    finally:
        server.kill()
        server.wait()


def eventually(holds: Callable[[], Any]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < deadline, holds
        time.sleep(0.1)


def in_account() -> dict[str, list[str]]:
    """Return by kind what there is in the account."""
    listed = {
        "stacks": ("cloudformation", "describe_stacks", "Stacks", "StackName"),
        "queues": ("batch", "describe_job_queues", "jobQueues", "jobQueueName"),
        "environments": (
            "batch",
            "describe_compute_environments",
            "computeEnvironments",
            "computeEnvironmentName",
        ),
        "buckets": ("s3", "list_buckets", "Buckets", "Name"),
        "repositories": ("ecr", "describe_repositories", "repositories", "repositoryName"),
        "secrets": ("secretsmanager", "list_secrets", "SecretList", "Name"),
        "logs": ("logs", "describe_log_groups", "logGroups", "logGroupName"),
        "roles": ("iam", "list_roles", "Roles", "RoleName"),
        "groups": ("ec2", "describe_security_groups", "SecurityGroups", "GroupName"),
    }
    found = {
        kind: [each[name] for each in getattr(boto3.client(service), operation)()[key]]
        for kind, (service, operation, key, name) in listed.items()
    }
    active = boto3.client("batch").describe_job_definitions(status="ACTIVE")["jobDefinitions"]
    found["definitions"] = [each["jobDefinitionName"] for each in active]
    return {
        kind: kept
        for kind, names in found.items()
        if (kept := [n for n in names if n != "default"])
    }


def password_in(registry: Path) -> list[str]:
    """Return the blobs of a registry that have the password of the private index in them."""
    found, blobs = [], 0
    for path in registry.rglob("blobs/sha256/*/*/data"):
        content = path.read_bytes()
        if content[:2] == b"\x1f\x8b":
            content = gzip.decompress(content)
        blobs += 1
        if LOGIN.partition(":")[2].encode() in content:
            found.append(path.parent.name)
    assert blobs > 5
    return found


def test_from_the_installation_to_the_receipt_and_back_to_an_empty_account(
    home: Home,
    aws: FakeAWS,
    laptop: Callable[[], Shell],
    engine: Engine,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Each command of the page does what the page shows, and leaves nothing in the end."""
    empty = in_account()
    refuses_connections(home)
    shell, user = laptop(), folder / "home"
    assert shell.run("echo ${DOCKER_HOST-no engine}") == "no engine\n"
    transcript, said_by = "", {}

    def note(command: str, shown: str, said: str) -> None:
        nonlocal transcript
        said = said.replace(str(user), "/home/anna")
        said_by[command] = said
        transcript += f"$ {command}\n{said}"
        with capsys.disabled():
            if IS_WHOLE:
                print(f"$ {command}\n{said}", end="", flush=True)
        assert is_as_shown(shown, said), f"$ {command}\n{said}\nand not\n{shown}"

    steps = [block for block in blocks() if block.mark == "laptop"]
    for block, following in zip(steps, [*steps[1:], None], strict=True):
        if block.name == "meanwhile":
            continue
        for command, shown in block.commands:
            # What the command before has told to end is shown until it has.
            eventually(lambda: not running(aws))
            shell.begin(command)
            is_watched = following is not None and following.name == "meanwhile"
            if is_watched and IS_WHOLE and command == block.commands[-1][0]:
                eventually(lambda: workers(aws, "RUNNING") == WORKERS)
                other = laptop()
                other.run(". .venv/bin/activate")
                for also, expected in following.commands:
                    note(also, expected, other.run(also))
                other.close()
            note(command, shown, shell.finish())
    # Numbers are not compared, and this one changes with each release that changes the template.
    assert f"template version {TEMPLATE_VERSION}\n" in said_by["cloudexec doctor"]
    assert f"template version {TEMPLATE_VERSION}\n" in PAGE.read_text()
    here, there = (said_by[each] for each in (SCRIPT, f"CLOUDEXEC_PROFILE=default {SCRIPT}"))
    assert here.splitlines() == there.splitlines()[-len(here.splitlines()) :]
    assert f"{TASKS} tasks on {WORKERS} workers in" in there
    assert workers(aws) == WORKERS + 1  # and that of `cloudexec doctor`
    assert LOGIN.partition(":")[2] not in transcript
    assert not password_in(folder / "ecr")
    # Nothing is left: in the account, on its machines, on the laptop.
    assert in_account() == empty
    assert not running(aws)
    ids = {job.job_id.replace(":", "-") for job in aws.jobs()}
    names = [each.name for each in engine.client.containers.list(all=True, sparse=True)]
    assert not [name for name in names if any(each in name for each in ids)]
    pids = subprocess.run(
        ["ip", "netns", "pids", home.laptop], capture_output=True, text=True, check=True
    ).stdout.split()
    assert pids == [str(shell.pid)]
    left = [path.name for path in (user / "tmp").iterdir()]
    assert not [name for name in left if not re.fullmatch(r"uv-.*\.lock", name)]  # uv's own
    assert not list((user / ".config" / "cloudexec").iterdir())


def running(aws: FakeAWS) -> list[str]:
    """Return the jobs that have not ended."""
    return [job.job_id for job in aws.jobs() if job.status not in ("SUCCEEDED", "FAILED")]


def workers(aws: FakeAWS, *statuses: str) -> int:
    """Return how many jobs of workers there are, not counting the parents of arrays."""
    return sum(
        job.size is None
        and not job.queue.endswith("-relay")
        and (not statuses or job.status in statuses)
        for job in aws.jobs()
    )
