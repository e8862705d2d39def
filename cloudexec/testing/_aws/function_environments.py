"""Environments of AWS Lambda: a process that asks for events over HTTP, and is stopped in between.

Where this process may, an environment has the files that it has on AWS: the system can be read, and
``/tmp`` alone can be written to; there is no ``/dev/shm``; an archive is in ``/var/task``.
"Understanding the Lambda execution environment lifecycle", AWS Lambda Developer Guide.
"""

from __future__ import annotations

import functools
import http.server
import json
import math
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from cloudexec.testing._aws.function_archives import ROOT, Unpacked
from cloudexec.testing._aws.runners import Exit, Runner, Running, StartRequest

__all__ = ["Environment", "Event", "Host", "isolates"]

_BASE = "/2018-06-01/runtime/invocation"
_FILES = 1024
""""Lambda quotas", AWS Lambda Developer Guide."""
_ISOLATION = """
mkdir dev &&
for each in null zero full random urandom; do
    touch dev/$each && mount --bind /dev/$each dev/$each || exit 1
done &&
ln -s /proc/self/fd dev/fd && mount --rbind dev /dev && mkdir tmp && chmod 1777 tmp &&
{ [ -z "$TASK" ] || {
    mount -t tmpfs tmpfs /var && mkdir /var/task /var/runtime &&
    mount --bind "$TASK" /var/task && mount -o remount,bind,ro /var/task &&
    mount --bind "$RUNTIME" /var/runtime && mount -o remount,bind,ro /var/runtime
}; } &&
mount --bind tmp /tmp && mount -o remount,bind,ro / && ulimit -n "$FILES" && cd / && exec "$@"
"""


@functools.cache
def isolates() -> bool:
    """Whether environments have the files that they have on AWS: whether this process may."""
    if os.geteuid() != 0 or not sys.platform.startswith("linux"):
        return False
    code = Path(__file__).resolve()
    places = (code, sys.prefix, sys.base_prefix)
    if any(str(each).startswith(("/tmp/", "/var/")) for each in places):
        return False  # they would not be there
    try:
        done = subprocess.run(
            ["unshare", "--mount", "mount", "--bind", "/", "/"], capture_output=True, check=False
        )
    except OSError:
        return False
    return done.returncode == 0


@dataclass(slots=True, eq=False)
class Event:
    """One delivery of an event.

    Attributes:
        request_id: Of the invocation.
        function: The function's name.
        payload: The event itself.
        sent_at: When it was sent, Unix time.
        status: ``"queued"``, ``"running"``, ``"succeeded"``, ``"failed"``, ``"timed out"`` or
            ``"dropped"``.
        left_running: Processes that ran on when it had been answered.
    """

    request_id: str
    function: str
    payload: bytes
    sent_at: float
    status: str = "queued"
    reason: str = ""
    started_at: float | None = None
    ended_at: float | None = None
    billed_ms: int = 0
    environment: str = ""
    pid: int | None = None
    left_running: int = 0
    answer: Any = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """What environments need of the rest of the emulation.

    Attributes:
        runner: Starts their processes.
        processes: Starts those of functions without an image, which are processes of this machine.
        address: At which they reach this process.
        listen: At which this process listens for them.
        isolated: Whether they get the files that they have on AWS.
    """

    runner: Runner
    processes: Runner
    address: str
    listen: str
    isolated: bool


@dataclass(slots=True, eq=False)
class Environment:
    """One environment of a function.

    Attributes:
        name: Its id.
        image: What runs in it; empty: that is an archive.
        archive: The archive.
        memory_mib: What it may use.
        timeout: Seconds that an event may take.
        variables: Of its process.
        write: Takes what it prints, and what Lambda writes to the log.
        idle: Called when it has answered an event, and can take another one.
        gone: Called when it has ended.
        broken: Whether its process ends before it asks for an event.
    """

    name: str
    image: str
    memory_mib: int
    timeout: float
    variables: Mapping[str, str]
    write: Callable[[bytes], None]
    idle: Callable[[Environment], None]
    gone: Callable[[Environment], None]
    archive: Unpacked | None = None
    broken: bool = False
    event: Event | None = None
    is_closed: bool = False
    _events: queue.SimpleQueue[Event | None] = field(default_factory=queue.SimpleQueue)
    _lock: threading.RLock = field(default_factory=threading.RLock)
    _running: Running | None = None
    _server: http.server.ThreadingHTTPServer | None = None
    _threads: list[threading.Thread] = field(default_factory=list)
    _is_frozen: bool = False
    _began: float = 0.0
    _init_ms: float | None = 0.0
    _starved: bool = False
    _timed_out: bool = False

    def start(self, host: Host, event: Event) -> None:
        """Start its process, and give it its first event."""
        self._give(event)
        self._began = time.monotonic()
        handler = type("Handler", (_Handler,), {"environment": self})
        self._server = http.server.ThreadingHTTPServer((host.listen, 0), handler)
        self._server.daemon_threads = True
        port = self._server.server_port
        request = StartRequest(
            name=f"lambda-{self.name}",
            image=self.image,
            command=self._command(host),
            environment={
                **self.variables,
                **self._of_archive(host),
                "FILES": str(_FILES),
                "AWS_LAMBDA_RUNTIME_API": f"{host.address}:{port}",
            },
            vcpus=self.memory_mib / 1769,
            memory_mib=self.memory_mib,
        )
        runner = host.runner if self.archive is None else host.processes
        self._threads = [
            threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True),
            threading.Thread(target=self._run, args=(runner, request), daemon=True),
        ]
        for number, thread in enumerate(self._threads):
            thread.name = f"fake-aws-lambda-{self.name}-{number}"
            thread.start()

    def _command(self, host: Host) -> tuple[str, ...]:
        worker: tuple[str, ...] = (
            "python3",
            "-c",
            "raise SystemExit('ImportError: no module named x')",
        )
        if self.archive is not None and not self.broken:
            worker = self.archive.command(self._task_root(host))
        elif not self.broken:
            worker = ("python3", "-m", "cloudexec.worker")
            if not host.isolated:
                return ()
        if not host.isolated:
            return worker
        unshare = ("unshare", "--mount", "--propagation", "private", "sh", "-c", _ISOLATION, "sh")
        kept = ("env", "-u", "FILES", "-u", "TASK", "-u", "RUNTIME", "HOME=/tmp", "TMPDIR=/tmp")
        return (*unshare, *kept, *worker)

    def _task_root(self, host: Host) -> str:
        """Return where the files of an archive are for its process."""
        assert self.archive is not None
        return ROOT if host.isolated else str(self.archive.folder)

    def _of_archive(self, host: Host) -> dict[str, str]:
        """Return the variables that a managed runtime has, and an image has not.

        "Using Lambda environment variables", AWS Lambda Developer Guide.
        """
        if self.archive is None:
            return {}
        found = {
            "LAMBDA_TASK_ROOT": self._task_root(host),
            "PATH": "/usr/local/bin:/usr/bin:/bin:/opt/bin",
            "PYTHONPATH": "/var/runtime" if host.isolated else str(self.archive.packages),
        }
        if host.isolated:
            found |= {"TASK": str(self.archive.folder), "RUNTIME": str(self.archive.packages)}
        return found

    def take(self, event: Event) -> None:
        """Give it another event."""
        self._init_ms = None
        # In this order: it is not stopped any more when it has an event.
        self._give(event)
        self._thaw()

    def _give(self, event: Event) -> None:
        with self._lock:
            self.event = event
            event.status, event.started_at = "running", time.time()
            event.environment = self.name
            event.pid = self._running.pid if self._running is not None else None
        self._say(f"START RequestId: {event.request_id} Version: $LATEST")
        self._events.put(event)

    def _run(self, runner: Runner, request: StartRequest) -> None:
        try:
            running = runner.start(request, self.write)
            with self._lock:
                self._running = running
                if self.event is not None:
                    self.event.pid = running.pid
                if self.is_closed:
                    running.kill()
            ended = running.wait()
        except Exception as exc:  # it must show in the invocation, not vanish in a thread
            self.write(f"FakeAWS failed: {exc!r}\n".encode())
            ended = Exit(code=1, out_of_memory=False)
        self._ended(ended)

    def next_event(self) -> Event | None:
        """Wait for an event; ``None``: there comes no other."""
        with self._lock:
            if self._init_ms == 0.0:
                self._init_ms = 1000 * (time.monotonic() - self._began)
            is_idle = self.event is None and not self.is_closed
        if is_idle:
            self._freeze()
            self.idle(self)
        return self._events.get()

    def answered(self, request_id: str, body: bytes, *, failed: bool) -> bool:
        """Take the answer to an event; return whether it is the one that was asked for."""
        with self._lock:
            event = self.event
            if event is None or event.request_id != request_id:
                return False
            event.answer = json.loads(body or b"null")
            event.left_running = self._others()
            if failed:
                self._say(f"{event.answer}")
            self._close(event, "failed" if failed else "succeeded", "error" if failed else "")
        return True

    def expire(self, event: Event) -> None:
        """End an event that takes too long, and the environment with it."""
        with self._lock:
            if self.event is event and not self.is_closed:
                self._timed_out = True
                self._kill()

    def starve(self) -> None:
        """End it for want of memory."""
        with self._lock:
            self._starved = True
            self._kill()

    def close(self) -> None:
        """End it."""
        with self._lock:
            self.is_closed = True
            self._kill()
        self._events.put(None)

    def join(self) -> None:
        """Wait until nothing is left of it."""
        for thread in self._threads[::-1]:
            if thread is not threading.current_thread():
                thread.join()

    def _kill(self) -> None:
        if self._running is not None:
            self._thaw()
            self._running.kill()

    def _ended(self, ended: Exit) -> None:
        with self._lock:
            was_closed, self.is_closed = self.is_closed, True
            event = self.event
            if event is not None:
                request = event.request_id
                if self._timed_out:
                    text = f"{request} Task timed out after {self.timeout:.2f} seconds"
                    self._say(text)
                    self._close(event, "timed out", "timeout")
                else:
                    starved = self._starved or ended.out_of_memory
                    how = "signal: killed" if starved else f"exit status {ended.code}"
                    self._say(f"RequestId: {request} Error: Runtime exited with error: {how}")
                    self._say("Runtime.ExitError")
                    self._close(event, "failed", "error", starved=starved)
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
        self._events.put(None)
        if not was_closed:
            self.gone(self)

    def _close(self, event: Event, status: str, said: str, *, starved: bool = False) -> None:
        """Write down how an event ended. "Viewing CloudWatch logs", AWS Lambda Developer Guide."""
        self.event = None
        event.status, event.reason, event.ended_at = status, said, time.time()
        assert event.started_at is not None
        duration = 1000 * (event.ended_at - event.started_at)
        init, self._init_ms = self._init_ms or 0.0, None
        # The start of an image has always been billed, and is a part of this duration here.
        event.billed_ms = math.ceil(duration)
        used = self.memory_mib if starved else min(128, self.memory_mib)
        self._say(f"END RequestId: {event.request_id}")
        report = (
            f"REPORT RequestId: {event.request_id}\tDuration: {duration - init:.2f} ms\t"
            f"Billed Duration: {event.billed_ms} ms\tMemory Size: {self.memory_mib} MB\t"
            f"Max Memory Used: {used} MB\t"
        )
        report += f"Init Duration: {init:.2f} ms\t" if init else ""
        report += f"Status: {said}" if said else ""
        self._say(report + ("\tError Type: Runtime.ExitError" if said == "error" else ""))

    def _say(self, line: str) -> None:
        self.write(line.encode() + b"\n")

    def _others(self) -> int:
        """Count the processes besides the one that asks for events."""
        pid = self._running.pid if self._running is not None else None
        if pid is None:
            return 0
        try:
            return sum(
                each.status() != psutil.STATUS_ZOMBIE
                for each in psutil.Process(pid).children(recursive=True)
            )
        except psutil.Error:
            return 0

    def _freeze(self) -> None:
        with self._lock:
            if self.event is None and not self._is_frozen:
                self._is_frozen = self._signal(signal.SIGSTOP)

    def _thaw(self) -> None:
        with self._lock:
            if self._is_frozen:
                self._signal(signal.SIGCONT)
                self._is_frozen = False

    def _signal(self, number: signal.Signals) -> bool:
        pid = self._running.pid if self._running is not None else None
        if pid is None:
            return False
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            return False
        return True


class _Handler(http.server.BaseHTTPRequestHandler):
    """Answers an environment. "Using the Lambda runtime API", AWS Lambda Developer Guide."""

    environment: Environment
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        """Hand out an event."""
        if self.path != f"{_BASE}/next":
            self._answer(404, b"{}")
            return
        event = self.environment.next_event()
        if event is None:
            self.close_connection = True
            return
        deadline = (event.started_at or time.time()) + self.environment.timeout
        headers = {
            "Lambda-Runtime-Aws-Request-Id": event.request_id,
            "Lambda-Runtime-Deadline-Ms": str(int(1000 * deadline)),
            "Lambda-Runtime-Invoked-Function-Arn": event.function,
        }
        self._answer(200, event.payload, headers)

    def do_POST(self) -> None:
        """Take an answer."""
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        request_id, _, kind = self.path.removeprefix(f"{_BASE}/").partition("/")
        known = kind in ("response", "error") and self.environment.answered(
            request_id, body, failed=kind == "error"
        )
        self._answer(202 if known else 400, b'{"status":"OK"}')

    def _answer(self, status: int, body: bytes, headers: Mapping[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        try:
            self.wfile.write(body)
        except OSError:
            pass  # the process has been killed meanwhile

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Log nothing."""
