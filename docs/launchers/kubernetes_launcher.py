"""A launcher for Kubernetes: workers are the pods of Jobs, with an index each.

Copy this file beside your program, and change what your cluster has differently::

    from cloudexec import BatchExecutor
    from kubernetes_launcher import KubernetesJobs

    launcher = KubernetesJobs(image="registry.example.com/worker:1", cpus=2)
    with BatchExecutor(100, launcher=launcher) as executor:
        results = list(executor.map(simulate, range(10_000)))

The program runs in a pod whose service account may create, get, patch and delete jobs and secrets,
list and delete pods (``deletecollection``), and read events and logs of pods. Elsewhere, ``kubectl
proxy`` lets it use your own rights, with ``api="http://127.0.0.1:8001"``; pods must then be able to
connect to ``host``. The image has cloudexec, and the same minor version of Python as the program.
Kubernetes is 1.29 or later, which lets the other pods of a Job go on when one has failed
(``backoffLimitPerIndex``).
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import http.client
import json
import math
import os
import socket
import ssl
import urllib.parse
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cloudexec import ConfigError
from cloudexec.launchers import (
    ExecutorInfo,
    Inspection,
    JobRequest,
    JobStatus,
    Phase,
    Platform,
    PlatformError,
    PlatformLauncher,
    Reason,
    Site,
    Submitted,
    Target,
    WaitingJob,
    WorkerCapacity,
    WorkerEnd,
    WorkerStatus,
)

MIB = 1 << 20
ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
"""Where a pod has the token of its service account."""
INDEX = "batch.kubernetes.io/job-completion-index"
HOPELESS = ("InvalidImageName", "ErrImageNeverPull")
TAKEN_BACK = ("Evicted", "Preempting", "NodeLost", "NodeShutdown", "Terminated")


@dataclass(frozen=True, kw_only=True)
class KubernetesJobs(PlatformLauncher):
    """Runs workers as Jobs of Kubernetes.

    Args:
        image: The image of the workers.
        command: What starts a worker in the image.
        namespace: The namespace; empty for that of this pod, or else ``default``.
        cpus: Processors of each worker.
        memory_mib: Memory of each worker, in MiB.
        gpus: GPUs of each worker.
        hours: Hours after which Kubernetes ends a job.
        slots: Tasks that each worker runs at once.
        host: The name or address by which pods reach this program; empty for that of this pod.
        listen: ``host:port`` where the program listens.
        api: The address of the API; empty for that of the cluster that this pod is in.
        pod: More of the specification of pods, such as ``{"nodeSelector": {"disk": "fast"}}``.
    """

    image: str
    command: tuple[str, ...] = ("python", "-m", "cloudexec.worker")
    namespace: str = ""
    cpus: float = 1.0
    memory_mib: int = 2048
    gpus: int = 0
    hours: float = 24.0
    slots: int = 1
    host: str = ""
    listen: str = "0.0.0.0:0"
    api: str = ""
    pod: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)

    @contextlib.asynccontextmanager
    async def connect(self, executor: ExecutorInfo) -> AsyncIterator[Site]:
        if not self.api and not (ACCOUNT / "token").exists():
            raise ConfigError(
                "this program is in no pod with a service account: run `kubectl proxy`, and give "
                'api="http://127.0.0.1:8001"'
            )
        host = self.host or socket.gethostbyname(socket.gethostname())
        yield Site(platform=KubernetesPlatform(self), listen=self.listen, advertise=host)

    def capacities(self) -> Sequence[WorkerCapacity]:
        memory = self.memory_mib * MIB
        return [WorkerCapacity(cpus=self.cpus, memory=memory, gpus=self.gpus)]

    def capacity_for(self, cpus: float, memory: int, gpus: int) -> WorkerCapacity:
        """A pod has what it asks for, if some node has it."""
        mib = max(math.ceil(memory / MIB), self.memory_mib)
        return WorkerCapacity(cpus=max(cpus, self.cpus), memory=mib * MIB, gpus=gpus)


class KubernetesPlatform(Platform):
    name = "Kubernetes"
    most_workers = 10_000

    def __init__(self, settings: KubernetesJobs) -> None:
        self._settings = settings
        namespace = settings.namespace or _read(ACCOUNT / "namespace") or "default"
        self._jobs = f"/apis/batch/v1/namespaces/{namespace}/jobs"
        self._core = f"/api/v1/namespaces/{namespace}"
        self.stop_hint = f"`kubectl -n {namespace} delete jobs -l app=cloudexec` ends all workers"
        self._doomed: dict[str, set[int]] = {}  # indexes that are to have no pod, by job

    async def submit(self, request: JobRequest) -> Submitted:
        job = None
        await self._make("secrets", secret_of(request))
        try:
            job = await self._make("jobs", job_of(self._settings, request))
            await self._bind(job)
        except PlatformError as exc:
            if job is not None and exc.may_pass:
                # The executor then calls find(), which binds the secret.
                raise PlatformError(str(exc), transient=True, uncertain=True) from exc
            if not exc.uncertain:
                if job is not None:
                    await self._delete_job(request.name)
                await self._delete(f"{self._core}/secrets/{request.name}")
            raise
        return Submitted(job_id=request.name)

    async def _make(self, kind: str, body: Mapping[str, Any]) -> Any:
        """Make an object, or get it if it is there: an earlier answer may have got lost."""
        place = self._jobs if kind == "jobs" else f"{self._core}/{kind}"
        try:
            return await self._call("POST", place, body)
        except PlatformError as exc:
            if "AlreadyExists" not in str(exc):
                raise
            return await self._call("GET", f"{place}/{body['metadata']['name']}")

    async def _bind(self, job: Mapping[str, Any]) -> None:
        """Have Kubernetes delete the secret of a job with the job."""
        name, uid = job["metadata"]["name"], job["metadata"]["uid"]
        owner = {"apiVersion": "batch/v1", "kind": "Job", "name": name, "uid": uid}
        patch = {"metadata": {"ownerReferences": [owner]}}
        await self._call("PATCH", f"{self._core}/secrets/{name}", patch)

    async def describe(self, inspections: Sequence[Inspection]) -> Mapping[str, JobStatus]:
        found = await asyncio.gather(*map(self._describe, inspections))
        return {status[0]: status[1] for status in found if status is not None}

    async def _describe(self, inspection: Inspection) -> tuple[str, JobStatus] | None:
        job = await self._get(f"{self._jobs}/{inspection.job_id}")
        if job is None:
            return None
        selector = urllib.parse.quote(f"batch.kubernetes.io/job-name={inspection.job_id}")
        listed = await self._call("GET", f"{self._core}/pods?labelSelector={selector}")
        told = job.get("status", {})
        is_over = any(
            each["type"] in ("Complete", "Failed") and each["status"] == "True"
            for each in told.get("conditions", ())
        )
        over = _indexes(told.get("failedIndexes", "")) | _indexes(told.get("completedIndexes", ""))
        workers = {
            index: WorkerStatus(phase=Phase.ENDED if is_over or index in over else Phase.ACCEPTED)
            for index in range(inspection.workers)
        }
        # A pod that is deleted may have a successor with the same index: the newest one counts.
        for pod in sorted(listed["items"], key=lambda each: each["metadata"]["creationTimestamp"]):
            index = int(pod["metadata"]["annotations"][INDEX])
            workers[index] = await self._worker(pod, index, inspection)
            # It was made after its worker was to end, perhaps in the place of a deleted one.
            is_late = index in self._doomed.get(inspection.job_id, ())
            is_ending = "deletionTimestamp" in pod["metadata"]
            if is_late and not is_ending and workers[index].phase is not Phase.ENDED:
                await self._delete(f"{self._core}/pods/{pod['metadata']['name']}")
        reasons = [each.reason for each in workers.values() if each.reason]
        if not listed["items"] and not is_over:
            reasons = await self._why_no_pods(inspection.job_id)
        return inspection.job_id, JobStatus(workers=workers, reason=reasons[0] if reasons else "")

    async def _worker(
        self, pod: Mapping[str, Any], index: int, inspection: Inspection
    ) -> WorkerStatus:
        told = pod.get("status", {})
        phase = told.get("phase", "Pending")
        container: Mapping[str, Any] = next(iter(told.get("containerStatuses", ())), {})
        if phase in ("Succeeded", "Failed"):
            words = ""
            if inspection.asks_why(index, 1, over=True):
                words = await self._last_lines(pod["metadata"]["name"])
            return WorkerStatus(phase=Phase.ENDED, ends=[_end_of(told, container, words)])
        conditions = {each["type"]: each for each in told.get("conditions", ())}
        placed = conditions.get("PodScheduled", {})
        if phase == "Running":
            return WorkerStatus(phase=Phase.RUNNING)
        if placed.get("status") == "True":
            state = container.get("state", {}).get("waiting", {})
            said = [state.get("reason", ""), state.get("message", "")]
            reason = ": ".join(filter(None, said)) if said[0] != "ContainerCreating" else ""
            return WorkerStatus(phase=Phase.STARTING, reason=reason)
        said = [placed.get("reason", ""), placed.get("message", "")]
        return WorkerStatus(phase=Phase.WAITING, reason=": ".join(filter(None, said)))

    async def _last_lines(self, pod: str) -> str:
        with contextlib.suppress(PlatformError):  # an aid, not a need
            return str(await self._call("GET", f"{self._core}/pods/{pod}/log?tailLines=20")).strip()
        return ""

    async def _why_no_pods(self, name: str) -> list[str]:
        """Return why the controller cannot make pods, such as a quota."""
        selector = urllib.parse.quote(f"involvedObject.name={name},reason=FailedCreate")
        with contextlib.suppress(PlatformError):
            events = await self._call("GET", f"{self._core}/events?fieldSelector={selector}")
            return [f"FailedCreate: {each['message']}" for each in events["items"][-1:]]
        return []

    async def find(self, name: str, *, spot: bool) -> Submitted | None:
        job = await self._get(f"{self._jobs}/{name}")
        if job is None:
            return None
        with contextlib.suppress(_NotFoundError):
            await self._bind(job)
        return Submitted(job_id=name)

    async def terminate(self, targets: Sequence[Target], reason: str) -> None:
        for target in targets:
            if target.workers is None:
                await self._delete_job(target.job_id)
                self._doomed.pop(target.job_id, None)
                continue
            self._doomed.setdefault(target.job_id, set()).update(target.workers)
            job = f"batch.kubernetes.io/job-name={target.job_id}"
            indexes = [str(index) for index in target.workers]
            for at in range(0, len(indexes), 500):  # an address has no room for more
                some = ",".join(indexes[at : at + 500])
                selector = urllib.parse.quote(f"{job},{INDEX} in ({some})")
                await self._delete(f"{self._core}/pods?labelSelector={selector}")

    async def explain(
        self, waiting: Sequence[WaitingJob], ends: Sequence[WorkerEnd]
    ) -> Reason | None:
        if ends:
            return ends[-1].reason
        reason = next((each.reason for each in waiting if each.reason), "")
        if not reason:
            return None
        return Reason(
            f"Kubernetes does not start workers: {reason}",
            f"`kubectl describe job {waiting[0].job_id}` says more",
            fatal=reason.startswith(HOPELESS),
            no_room=reason.startswith("Unschedulable") or "exceeded quota" in reason,
        )

    # The API.

    async def _get(self, path: str) -> Any:
        try:
            return await self._call("GET", path)
        except _NotFoundError:
            return None

    async def _delete(self, path: str) -> None:
        with contextlib.suppress(_NotFoundError):
            await self._call("DELETE", path)

    async def _delete_job(self, name: str) -> None:
        await self._delete(f"{self._jobs}/{name}?propagationPolicy=Background")

    async def _call(self, method: str, path: str, body: object = None) -> Any:
        return await asyncio.to_thread(self._call_now, method, path, body)

    def _call_now(self, method: str, path: str, body: object) -> Any:
        kind_of = {"PATCH": "application/merge-patch+json"}
        headers = {
            "Accept": "application/json",
            "Content-Type": kind_of.get(method, "application/json"),
        }
        if not self._settings.api:
            # Read each time, as Kubernetes renews it.
            headers["Authorization"] = f"Bearer {_read(ACCOUNT / 'token')}"
        data = None if body is None else json.dumps(body)
        connection = self._connection()
        try:
            connection.request(method, path, data, headers)
            answer = connection.getresponse()
            text = answer.read().decode()
        except (OSError, http.client.HTTPException) as exc:
            # A submission may have arrived nevertheless.
            raise PlatformError(
                f"the API of Kubernetes does not answer: {exc or type(exc).__name__}",
                transient=True,
                uncertain=True,
            ) from exc
        finally:
            connection.close()
        if answer.status < 400:
            is_text = not answer.headers.get("Content-Type", "").startswith("application/json")
            return text if is_text else json.loads(text)
        said = f"{answer.status} {answer.reason}: {text[:500]}"
        with contextlib.suppress(ValueError, KeyError, TypeError):
            status = json.loads(text)
            said = f"{status['reason']}: {status['message']}"
        kind = _NotFoundError if answer.status == 404 else PlatformError
        raise kind(
            f"Kubernetes refused ({method} {path.partition('?')[0]}): {said}",
            transient=answer.status == 429 or answer.status >= 500,
            uncertain=answer.status >= 500,
        )

    def _connection(self) -> http.client.HTTPConnection:
        if self._settings.api:
            parts = urllib.parse.urlsplit(self._settings.api)
            if parts.scheme == "https":
                return http.client.HTTPSConnection(parts.hostname or "", parts.port, timeout=30)
            return http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=30)
        context = ssl.create_default_context(cafile=str(ACCOUNT / "ca.crt"))
        # Kubernetes sets these variables in each pod.
        host = os.environ.get("KUBERNETES_SERVICE_HOST", "kubernetes.default.svc")
        port = int(os.environ.get("KUBERNETES_SERVICE_PORT", "443"))
        return http.client.HTTPSConnection(host, port, timeout=30, context=context)


class _NotFoundError(PlatformError):
    """There is no such object."""


def job_of(settings: KubernetesJobs, request: JobRequest) -> dict[str, Any]:
    """Return the Job with the workers of a request."""
    has = request.capacity or settings.capacities()[0]
    limits = {"memory": f"{has.memory // MIB}Mi"}
    if has.gpus:
        limits["nvidia.com/gpu"] = str(has.gpus)
    variables: list[dict[str, Any]] = [
        {"name": name, "value": value} for name, value in request.environment.items()
    ]
    for name, path in (
        ("CLOUDEXEC_INDEX", f"metadata.annotations['{INDEX}']"),
        ("CLOUDEXEC_JOB_ID", "metadata.name"),
    ):
        variables.append({"name": name, "valueFrom": {"fieldRef": {"fieldPath": path}}})
    container = {
        "name": "worker",
        "image": settings.image,
        "command": list(settings.command),
        "env": variables,
        "envFrom": [{"secretRef": {"name": request.name}}],
        "resources": {"requests": {**limits, "cpu": f"{has.cpus:g}"}, "limits": limits},
    }
    pod = {
        "restartPolicy": "Never",
        "automountServiceAccountToken": False,
        "terminationGracePeriodSeconds": 30,
        "containers": [container],
        **settings.pod,
    }
    labels = {"app": "cloudexec"}
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": request.name, "labels": labels},
        "spec": {
            "completionMode": "Indexed",
            "completions": request.workers,
            "parallelism": request.workers,
            # The executor asks for another worker, and the others go on.
            "backoffLimitPerIndex": 0,
            "maxFailedIndexes": request.workers,
            "activeDeadlineSeconds": math.ceil(settings.hours * 3600),
            "ttlSecondsAfterFinished": 600,
            "template": {"metadata": {"labels": labels}, "spec": pod},
        },
    }


def secret_of(request: JobRequest) -> dict[str, Any]:
    """Return the Secret with what nobody else must see."""
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": request.name, "labels": {"app": "cloudexec"}},
        "data": {
            name: base64.b64encode(value.encode()).decode()
            for name, value in request.secrets.items()
        },
    }


def _end_of(told: Mapping[str, Any], container: Mapping[str, Any], words: str) -> WorkerEnd:
    ended = container.get("state", {}).get("terminated", {})
    code = ended.get("exitCode")
    why = told.get("reason") or ended.get("reason") or ""
    disrupted = any(
        each["type"] == "DisruptionTarget" and each["status"] == "True"
        for each in told.get("conditions", ())
    )
    text = f"exit code {code}" if code is not None else "it ended"
    if why not in ("", "Error", "Completed"):
        text += f" ({why}{': ' * bool(told.get('message'))}{told.get('message', '')})"
    return WorkerEnd(
        # With exit code 3, worker and executor do not fit together.
        reason=Reason(f"{text}\n{words}".strip(), fatal=code == 3),
        killed=code in (137, 143),
        reclaimed=disrupted or why in TAKEN_BACK,
        out_of_memory=ended.get("reason") == "OOMKilled",
    )


def _indexes(text: str) -> set[int]:
    """Return the indexes that Kubernetes writes as ``1,3-5,7``."""
    found: set[int] = set()
    for part in filter(None, text.split(",")):
        first, _, last = part.partition("-")
        found.update(range(int(first), int(last or first) + 1))
    return found


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
