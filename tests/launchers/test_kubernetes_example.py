"""The launcher for Kubernetes of the documentation, on an emulated API that runs real workers."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from kubernetes_emulation import EmulatedKubernetes
from launcher_helpers import eventually
from process_farm import ProcessFarm

from cloudexec import BatchExecutor, ConfigError, Fallback, LaunchError
from cloudexec.launchers import Inspection, JobRequest, Target, WorkerCapacity
from cloudexec.testing import check_launcher

EXAMPLES = Path(__file__).parents[2] / "docs" / "launchers"


@pytest.fixture(autouse=True)
def examples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))


@pytest.fixture
def cluster() -> Iterator[EmulatedKubernetes]:
    with EmulatedKubernetes() as emulated:
        yield emulated
        eventually(lambda: not emulated.running())


def jobs(cluster: EmulatedKubernetes, **settings: Any) -> Any:
    from kubernetes_launcher import KubernetesJobs

    here = {"host": "127.0.0.1", "listen": "127.0.0.1:0", "api": cluster.api}
    return KubernetesJobs(**{"image": "example.com/worker:1", **here, **settings})


@pytest.mark.parametrize("replaces_deleted", [False, True])
def test_the_launcher_does_what_executors_expect(replaces_deleted: bool) -> None:
    """Whatever becomes of an index whose pod is deleted."""
    with EmulatedKubernetes(replaces_deleted=replaces_deleted) as cluster:
        if replaces_deleted:
            with BatchExecutor(2, launcher=jobs(cluster), idle_timeout=0.3) as executor:
                assert list(executor.map(abs, [-1, -2])) == [1, 2]
                executor.submit(time.sleep, 2).result(60)
        else:
            assert len(check_launcher(jobs(cluster), timeout=60)) == 6
        eventually(lambda: not cluster.running())


@pytest.mark.parametrize("version", ["1.29", "1.33", "1.37"])
def test_requests_are_those_of_the_published_schemas(version: str) -> None:
    """Without a field that there is none of."""
    validate = pytest.importorskip("kubernetes_validate").validate
    from kubernetes_launcher import KubernetesJobs, job_of, secret_of

    request = JobRequest(
        name="cloudexec-0123456789abcdef-1",
        workers=3,
        capacity=WorkerCapacity(cpus=0.5, memory=3 << 30, gpus=1),
        environment={"CLOUDEXEC_TARGET": "10.0.0.1:5000"},
        secrets={"CLOUDEXEC_KEY": "the key"},
    )
    settings = KubernetesJobs(image="example.com/worker:1", pod={"nodeSelector": {"disk": "fast"}})
    job = job_of(settings, request)
    validate(job, version, strict=True)
    validate(secret_of(request), version, strict=True)
    assert "the key" not in str(job)
    job["spec"]["completion"] = 3
    with pytest.raises(Exception, match="completion"):
        validate(job, version, strict=True)


def test_workers_that_are_asked_for_together_are_one_job(cluster: EmulatedKubernetes) -> None:
    with BatchExecutor(3, launcher=jobs(cluster), min_workers=3) as executor:
        eventually(lambda: executor.stats().workers.slots == 3)
        assert len([each for each in cluster.requests if each[:2] == ("POST", "jobs")]) == 1
        assert sorted(cluster.running()) == sorted(
            each.job_id for each in executor.stats().launches
        )


def test_a_worker_that_its_node_evicts_is_replaced(cluster: EmulatedKubernetes) -> None:
    """It counts as taken back, and its task as not at fault."""
    with BatchExecutor(1, launcher=jobs(cluster), retries=1) as executor:
        future = executor.submit(time.sleep, 1.5)
        eventually(future.running)
        cluster.evict()
        future.result(60)
        assert "took back" in str(executor.explain(future)) or executor.stats().workers.reclaimed


@pytest.mark.parametrize("request_", ["POST secrets", "POST jobs", "PATCH secrets"])
@pytest.mark.parametrize("lost", ["the answer", "the request"])
def test_a_request_without_an_answer_starts_workers_once(
    cluster: EmulatedKubernetes, lost: str, request_: str
) -> None:
    """And the secret with their key goes with them."""
    status = 429 if request_ == "PATCH secrets" else 503
    cluster.faults = [(request_, 0 if lost == "the answer" else status, "ServiceUnavailable")]
    with BatchExecutor(1, launcher=jobs(cluster)) as executor:
        assert executor.submit(abs, -1).result(60) == 1
        assert len(cluster.pods_of_all()) == 1
        assert not cluster.faults
        (secret,) = cluster.secrets()
        eventually(lambda: secret["metadata"].get("ownerReferences"))


def test_a_node_without_room_says_so_and_others_do_the_rest(cluster: EmulatedKubernetes) -> None:
    fallback = Fallback([jobs(cluster, cpus=4), ProcessFarm()])
    with BatchExecutor(3, launcher=fallback, min_workers=3) as executor:
        eventually(lambda: executor.stats().workers.slots == 3)
        there, here = executor.stats().launchers
        assert (there.active, here.active) == (2, 1)
        assert "Unschedulable: 0/1 nodes are available: 1 Insufficient cpu." in there.why


def test_a_quota_is_named(cluster: EmulatedKubernetes) -> None:
    cluster.quota = 0
    launcher = jobs(cluster)
    with BatchExecutor(1, launcher=launcher) as executor:
        future = executor.submit(abs, -1)
        eventually(lambda: "exceeded quota: pods=1" in launcher.explain())
        cluster.quota = None
        assert future.result(60) == 1


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("forbidden", r"Kubernetes refused \(POST /apis/batch.*/jobs\): Forbidden: a fault"),
        ("bound", r"Kubernetes refused \(PATCH /api/v1/.*/secrets/.*\): Forbidden: a fault"),
        ("image", "InvalidImageName"),
        ("command", r"exit code 7"),
        ("python", r"(?s)exit code 1.*encodings"),
    ],
)
def test_what_cannot_work_is_told_in_the_words_of_kubernetes(
    cluster: EmulatedKubernetes, fault: str, words: str
) -> None:
    settings: dict[str, Any] = {}
    if fault == "forbidden":
        cluster.faults = [("POST jobs", 403, "Forbidden")] * 3
    elif fault == "bound":
        cluster.faults = [("PATCH secrets", 403, "Forbidden")]
    elif fault == "image":
        cluster.bad_image = "InvalidImageName"
    elif fault == "command":
        settings["command"] = ("sh", "-c", "exit 7")
    else:
        settings["environment"] = {"PYTHONHOME": "/nowhere"}
    with BatchExecutor(1, launcher=jobs(cluster, **settings)) as executor:
        with pytest.raises(LaunchError, match=words):
            executor.submit(abs, -1).result(90)
    if fault in ("forbidden", "bound"):
        assert not cluster.secrets()
        assert not cluster.pods_of_all()


def test_many_workers_are_ended_by_one_request(cluster: EmulatedKubernetes) -> None:
    from kubernetes_launcher import KubernetesPlatform

    targets = [Target(job_id="a-job", workers=range(300))]
    asyncio.run(KubernetesPlatform(jobs(cluster)).terminate(targets, "no reason"))
    assert [(method, kind) for method, kind, _ in cluster.requests] == [("DELETE", "pods")]


@pytest.mark.parametrize("replaces_deleted", [False, True])
def test_a_worker_that_is_ended_before_it_has_a_pod_never_runs(replaces_deleted: bool) -> None:
    """The controller makes it later, and where a pod was deleted perhaps another one."""
    from kubernetes_launcher import KubernetesPlatform

    async def run(cluster: EmulatedKubernetes) -> None:
        platform = KubernetesPlatform(jobs(cluster))
        cluster.quota = 0
        request = JobRequest(
            name="cloudexec-0123456789abcdef-1",
            workers=2,
            environment={"CLOUDEXEC_TARGET": "127.0.0.1:1", "CLOUDEXEC_LAUNCH": "1"},
            secrets={"CLOUDEXEC_KEY": "00" * 32},
        )
        await platform.submit(request)
        await platform.terminate([Target(job_id=request.name, workers=[0])], "no reason")
        cluster.quota = None
        look = Inspection(job_id=request.name, workers=2, wanted=range(2))
        deadline = time.monotonic() + 20.0
        deleted = 0
        while deleted < 1 + replaces_deleted:
            assert time.monotonic() < deadline
            await platform.describe([look])
            deleted = sum(method == "DELETE" for method, _, _ in cluster.requests) - 1
            await asyncio.sleep(0.02)
        names = [pod["metadata"]["name"] for pod in cluster.pods_of_all()]
        assert any(name.startswith(f"{request.name}-1-") for name in names)
        await platform.terminate([Target(job_id=request.name)], "no reason")

    with EmulatedKubernetes(replaces_deleted=replaces_deleted) as cluster:
        asyncio.run(run(cluster))
        assert not cluster.running()


def test_in_a_pod_the_token_and_the_certificate_of_the_cluster_are_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import kubernetes_launcher

    (tmp_path / "token").write_text("abc")
    (tmp_path / "namespace").write_text("team-a")
    subprocess.run(
        "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 "
        "-subj /CN=kubernetes -addext subjectAltName=IP:127.0.0.1 -keyout ca.key -out ca.crt",
        shell=True,
        cwd=tmp_path,
        check=True,
        capture_output=True,
    )
    monkeypatch.setattr(kubernetes_launcher, "ACCOUNT", tmp_path)
    with EmulatedKubernetes(account=tmp_path) as cluster:
        monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
        monkeypatch.setenv("KUBERNETES_SERVICE_PORT", str(cluster.port))
        with BatchExecutor(1, launcher=jobs(cluster, api="")) as executor:
            assert executor.submit(abs, -1).result(60) == 1
        eventually(lambda: not cluster.running())
        (tmp_path / "token").write_text("another")
        with BatchExecutor(1, launcher=jobs(cluster, api="")) as executor:
            with pytest.raises(LaunchError, match=r"Kubernetes refused .*401"):
                executor.submit(abs, -1).result(60)


def test_outside_of_a_cluster_the_error_says_what_to_do(cluster: EmulatedKubernetes) -> None:
    with pytest.raises(ConfigError, match="run `kubectl proxy`"):
        BatchExecutor(1, launcher=jobs(cluster, api="")).submit(abs, -1)


TAKEN_OVER = """
    import os
    import sys
    import time
    from cloudexec import BatchExecutor
    from kubernetes_launcher import KubernetesJobs

    def slowly(n):
        with open(f"begun-{n}", "a") as file:
            file.write("x")
        while not os.path.exists("go"):
            time.sleep(0.01)
        return n + 1

    if __name__ == "__main__":
        launcher = KubernetesJobs(
            image="x", host="127.0.0.1", listen="127.0.0.1:0", api=os.environ["API"]
        )
        with BatchExecutor(2, launcher=launcher, journal="journal", orphan_timeout=60) as executor:
            futures = [executor.submit(slowly, n) for n in (1, 2)]
            print([future.result(60) for future in futures], executor.stats().workers.launched)
            print(executor.stats().workers.taken_over, executor.stats().tasks.taken_over)
"""


def test_workers_outlive_a_program_that_was_killed(
    cluster: EmulatedKubernetes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And do their tasks for the one that is run again."""
    monkeypatch.chdir(tmp_path)  # where pods run, too
    (tmp_path / "script.py").write_text(textwrap.dedent(TAKEN_OVER))
    command = [sys.executable, "script.py"]
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLES), "API": cluster.api}
    first = subprocess.Popen(command, cwd=tmp_path, env=environment)
    try:
        eventually(lambda: all((tmp_path / f"begun-{n}").exists() for n in (1, 2)))
    finally:
        first.send_signal(signal.SIGKILL)
        first.wait()
    (tmp_path / "go").touch()
    second = subprocess.run(
        command, capture_output=True, text=True, timeout=90, env=environment, check=False
    )
    assert second.returncode == 0, second.stderr
    assert second.stdout.splitlines() == ["[2, 3] 0", "2 2"]
    assert [(tmp_path / f"begun-{n}").read_text() for n in (1, 2)] == ["x", "x"]
