"""What the launcher for Kubernetes uses of its API, emulated; pods are processes of this machine.

It stands for the API server, the controller of Jobs, the scheduler and one node.
"""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import os
import re
import signal
import ssl
import subprocess
import sys
import threading
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

INDEX = "batch.kubernetes.io/job-completion-index"
_PATH = re.compile(r"/(?:api/v1|apis/batch/v1)/namespaces/([^/]+)/(\w+)(?:/([^/]+))?(?:/(log))?")

_SELECTOR = re.compile(r"([\w./-]+)(?:=([^,]+)| in \(([^)]+)\))")


class EmulatedKubernetes:
    """A cluster of one node.

    Args:
        cpus: Processors of the node.
        replaces_deleted: Whether the controller makes another pod for an index whose pod was
            deleted, or counts the index as failed.
        account: A folder with ``token``, which requests must have, and with ``ca.crt`` and
            ``ca.key`` for TLS.
    """

    def __init__(
        self,
        *,
        cpus: float = 8.0,
        replaces_deleted: bool = False,
        account: Path | None = None,
    ) -> None:
        self.cpus = cpus
        self.replaces_deleted = replaces_deleted
        self.requests: list[tuple[str, str, Any]] = []
        self.faults: list[tuple[str, int, str]] = []
        """The next requests that fail, such as ``POST jobs``, with status and reason; status 0
        cuts the connection after the request was carried out."""
        self.quota: int | None = None
        self.bad_image = ""
        self._lock = threading.RLock()
        self._numbers = itertools.count(1)
        self._jobs: dict[str, dict[str, Any]] = {}
        self._pods: dict[str, Pod] = {}
        self._secrets: dict[str, dict[str, Any]] = {}
        self._closing = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self._token = ""
        if account is not None:
            self._token = (account / "token").read_text()
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(account / "ca.crt", account / "ca.key")
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        self._threads = [
            threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True),
            threading.Thread(target=self._control, daemon=True),
        ]

    @property
    def port(self) -> int:
        return int(self._server.server_address[1])

    @property
    def api(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> EmulatedKubernetes:
        for each in self._threads:
            each.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        self._server.shutdown()
        self._server.server_close()
        for each in self._threads:
            each.join()
        for pod in self._pods.values():
            pod.kill()

    def running(self) -> list[str]:
        """Return the names of pods that have a process."""
        with self._lock:
            return [name for name, pod in self._pods.items() if pod.is_running]

    def pods_of_all(self) -> list[dict[str, Any]]:
        with self._lock:
            return [pod.told() for pod in self._pods.values()]

    def evict(self) -> None:
        """Take the node away from all pods."""
        with self._lock:
            for pod in self._pods.values():
                if pod.is_running:
                    pod.disruption = True
                    pod.kill()

    # The controller, the scheduler and the node.

    def _control(self) -> None:
        while not self._closing.wait(0.05):
            with self._lock:
                for job in self._jobs.values():
                    self._make_pods(job)
                for pod in self._pods.values():
                    self._run(pod)

    def _pods_of(self, job: str) -> list[Pod]:
        return [pod for pod in self._pods.values() if pod.job == job]

    def _make_pods(self, job: dict[str, Any]) -> None:
        name, spec = job["metadata"]["name"], job["spec"]
        status = job["status"]
        mine = self._pods_of(name)
        failed = set(job["deleted"]) | {pod.index for pod in mine if pod.exit_code}
        done = {pod.index for pod in mine if pod.exit_code == 0}
        status["failedIndexes"] = ",".join(map(str, sorted(failed)))
        status["completedIndexes"] = ",".join(map(str, sorted(done)))
        if len(failed | done) == spec["completions"]:
            kind = "Failed" if failed else "Complete"
            status["conditions"] = [{"type": kind, "status": "True"}]
            return
        for index in range(spec["completions"]):
            if index in failed | done or any(pod.index == index for pod in mine):
                continue
            if self.quota is not None and len(self._pods) >= self.quota:
                return
            pod = Pod(name, index, spec["template"], next(self._numbers))
            self._pods[pod.name] = pod

    def _run(self, pod: Pod) -> None:
        used = sum(each.cpus for each in self._pods.values() if each.is_placed and not each.is_over)
        if not pod.is_placed and used + pod.cpus <= self.cpus and not pod.is_over:
            pod.is_placed = True
        secret = self._secrets.get(pod.job)
        if pod.is_placed and pod.process is None and not pod.is_over and secret is not None:
            if self.bad_image:
                pod.waiting = self.bad_image
            else:
                pod.start({k: base64.b64decode(v).decode() for k, v in secret["data"].items()})

    # The API.

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        cluster = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do(self) -> None:
                length = int(self.headers.get("Content-Length") or 0)
                body = json.loads(self.rfile.read(length)) if length else None
                if cluster._token and self.headers["Authorization"] != f"Bearer {cluster._token}":
                    self.send_error(401)
                    return
                fault = cluster.fault(self.command, self.path)
                status, answer = 500, {"reason": "InternalError", "message": "a fault"}
                if fault is None or not fault[1]:
                    with cluster._lock:
                        status, answer = cluster.answer(self.command, self.path, body)
                else:
                    status, answer = fault[1], {"reason": fault[2], "message": "a fault"}
                if fault is not None and not fault[1]:
                    self.close_connection = True
                    return
                is_text = isinstance(answer, str)
                data = (answer if isinstance(answer, str) else json.dumps(answer)).encode()
                self.send_response(status)
                self.send_header("Content-Type", "text/plain" if is_text else "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            do_GET = do_POST = do_PATCH = do_DELETE = do  # noqa: N815

            def log_message(self, *_: object) -> None:
                return

        return Handler

    def fault(self, method: str, path: str) -> tuple[str, int, str] | None:
        found = _PATH.match(path)
        with self._lock:
            if self.faults and found and self.faults[0][0] == f"{method} {found[2]}":
                return self.faults.pop(0)
        return None

    def secrets(self) -> list[dict[str, Any]]:
        with self._lock:
            return list(self._secrets.values())

    def answer(self, method: str, path: str, body: Any) -> tuple[int, Any]:
        parts = urllib.parse.urlsplit(path)
        query = dict(urllib.parse.parse_qsl(parts.query))
        found = _PATH.fullmatch(parts.path)
        assert found is not None, path
        _, kind, name, log = found.groups()
        self.requests.append((method, kind, body))
        missing = 404, {"reason": "NotFound", "message": f'{kind} "{name}" not found'}
        if kind == "events":
            full = self.quota is not None and len(self._pods) >= self.quota
            message = 'pods "x" is forbidden: exceeded quota: pods=1, used: pods=1, limited: pods=1'
            return 200, {"items": [{"message": message}] if full else []}
        if kind == "pods":
            if log:
                return 200, self._pods[name].log()
            if name:
                assert method == "DELETE"
                if name not in self._pods:
                    return missing
                self._delete(self._pods[name])
                return 200, {"status": "Success"}
            wanted = {
                label: (value or several).split(",")
                for label, value, several in _SELECTOR.findall(query["labelSelector"])
            }
            (job,) = wanted["batch.kubernetes.io/job-name"]
            pods = [
                pod
                for pod in self._pods_of(job)
                if INDEX not in wanted or str(pod.index) in wanted[INDEX]
            ]
            if method == "DELETE":
                for pod in pods:
                    self._delete(pod)
            return 200, {"items": [pod.told() for pod in pods]}
        store = self._jobs if kind == "jobs" else self._secrets
        if method == "POST":
            name = body["metadata"]["name"]
            if name in store:
                return 409, {
                    "reason": "AlreadyExists",
                    "message": f'{kind} "{name}" already exists',
                }
            store[name] = {**body, "status": {}, "deleted": []}
            store[name]["metadata"]["uid"] = f"uid-{next(self._numbers)}"
            return 201, store[name]
        if name not in store:
            return missing
        if method == "PATCH":
            store[name]["metadata"].update(body["metadata"])
            return 200, store[name]
        if method == "DELETE" and kind == "secrets":
            del store[name]
            return 200, {"status": "Success"}
        if method == "DELETE":
            del store[name]
            for pod in self._pods_of(name):
                pod.kill()
                del self._pods[pod.name]
            owned = self._secrets.get(name, {}).get("metadata", {}).get("ownerReferences")
            if owned:  # the garbage collector's work
                del self._secrets[name]
            return 200, {"status": "Success"}
        return 200, store[name]

    def _delete(self, pod: Pod) -> None:
        pod.kill()
        del self._pods[pod.name]
        job = self._jobs.get(pod.job)
        if job is not None and not self.replaces_deleted:
            job["deleted"].append(pod.index)


class Pod:
    """One pod."""

    def __init__(self, job: str, index: int, template: dict[str, Any], number: int) -> None:
        self.job, self.index, self.name = job, index, f"{job}-{index}-{number}"
        self.made_at = f"{number:09}"
        self.container = template["spec"]["containers"][0]
        self.cpus = float(self.container["resources"]["requests"]["cpu"])
        self.is_placed = False
        self.waiting = ""
        self.disruption = False
        self.process: subprocess.Popen[str] | None = None
        self.exit_code: int | None = None
        self._said: list[str] = []
        self._reader: threading.Thread | None = None

    def start(self, secret: dict[str, str]) -> None:
        fields = {f"metadata.annotations['{INDEX}']": str(self.index), "metadata.name": self.name}
        environment = {**os.environ, **secret}
        for each in self.container["env"]:
            source = each.get("valueFrom")
            path = source["fieldRef"]["fieldPath"] if source else ""
            environment[each["name"]] = fields[path] if path else each["value"]
        command = self.container["command"]
        self.process = subprocess.Popen(
            [sys.executable if command[0] == "python" else command[0], *command[1:]],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._wait, args=(self.process,), daemon=True)
        self._reader.start()

    def _wait(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        with process.stdout:
            self._said += process.stdout.readlines()
        code = process.wait()
        self.exit_code = code if code >= 0 else 128 - code

    @property
    def is_running(self) -> bool:
        return self.process is not None and self.exit_code is None

    @property
    def is_over(self) -> bool:
        return self.exit_code is not None

    def kill(self) -> None:
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            assert self._reader is not None
            self._reader.join()

    def log(self) -> str:
        return "".join(self._said[-20:])

    def told(self) -> dict[str, Any]:
        conditions: list[dict[str, str]] = []
        status: dict[str, Any] = {"phase": "Pending", "conditions": conditions}
        if self.is_placed:
            conditions.append({"type": "PodScheduled", "status": "True"})
            state: dict[str, Any] = {"waiting": {"reason": self.waiting or "ContainerCreating"}}
            if self.is_over:
                status["phase"] = "Failed" if self.exit_code else "Succeeded"
                state = {"terminated": {"exitCode": self.exit_code, "reason": "Error"}}
            elif self.process is not None:
                status["phase"], state = "Running", {"running": {}}
            status["containerStatuses"] = [{"name": "worker", "state": state}]
        else:
            message = "0/1 nodes are available: 1 Insufficient cpu."
            conditions.append(
                {
                    "type": "PodScheduled",
                    "status": "False",
                    "reason": "Unschedulable",
                    "message": message,
                }
            )
        if self.disruption:
            conditions.append({"type": "DisruptionTarget", "status": "True"})
        return {
            "metadata": {
                "name": self.name,
                "creationTimestamp": self.made_at,
                "annotations": {INDEX: str(self.index)},
                "labels": {"batch.kubernetes.io/job-name": self.job},
            },
            "status": status,
        }
