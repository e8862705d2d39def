"""A fake AWS that runs real workers."""

from __future__ import annotations

import os
import secrets
import shutil
import sys
import tempfile
import threading
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, ClassVar, Literal, get_args

from cloudexec._config import check_count, check_positive
from cloudexec._errors import ConfigError
from cloudexec.testing._aws.faults import Faults
from cloudexec.testing._aws.records import InstanceRecord, JobRecord, Request, Setup

if TYPE_CHECKING:
    from cloudexec.testing._aws.function_environments import Event
    from cloudexec.testing._aws.session import Session

__all__ = ["FakeAWS"]

Mode = Literal["process", "container", "auto"]
_NEW_ACCOUNT = {"fargate": 6.0, "fargate_spot": 6.0}
"""vCPUs at once in a new account. AWS Batch API Reference, "ResourceRequirement". AWS names no
number for Fargate Spot there."""


class FakeAWS:
    """An emulated AWS on this machine, whose Batch jobs are real workers.

    moto answers most API calls. Jobs run as subprocesses of this process (or, in container mode, as
    containers), with the environment, limits, states and ends that AWS gives them. Within its
    ``with`` block, ``os.environ`` holds its address and credentials, so that every AWS client that
    is made in this process uses it, and none reaches the real AWS.

    A test of your own sweep::

        from cloudexec import BatchExecutor
        from cloudexec.aws import Batch
        from cloudexec.testing import FakeAWS


        def test_the_sweep_survives_a_spot_reclaim():
            with FakeAWS() as aws:
                setup = aws.set_up(spot=True, max_vcpus=4)
                batch = Batch(
                    queue=setup.queue,
                    job_role=setup.job_role,
                    execution_role=setup.execution_role,
                    image="sweep:1",
                )
                with BatchExecutor(max_workers=4, launcher=batch) as executor:
                    futures = [executor.submit(pow, n, 2) for n in range(100)]
                    futures[0].result(timeout=60)
                    aws.faults.reclaim_fraction(0.5)
                    assert [f.result(timeout=60) for f in futures] == [n * n for n in range(100)]
                assert aws.jobs()[0].tags["cloudexec:executor"]

    As a pytest fixture it is called ``fake_aws``.

    moto's state belongs to the process, so only one FakeAWS can be entered at a time. Leaving it
    kills jobs that still run, and leaves no thread, socket, process, container or file.

    Args:
        mode: ``"process"``, ``"container"`` (an engine must answer at ``DOCKER_HOST``) or
            ``"auto"``, which uses containers if an engine answers. With containers, the API listens
            on all addresses of this machine, so that they reach it.
        region: The region that clients are told to use. Every region of AWS works.
        python: The interpreter that stands for the worker image; ``None`` for this process's.
        images: By image name or shell pattern: in process mode the interpreter that stands for the
            image, in container mode the name of the image to run instead. By name of a runtime of
            AWS Lambda, such as ``"python3.12"``: the interpreter that stands for it, instead of the
            one that ``python`` was made from.
        step: Seconds from one job state to the next if the job need not wait for anything.
        grace: Seconds from SIGTERM to SIGKILL. On AWS they are 30.
        speed: Seconds of AWS per real second, for attempt timeouts and queue time limits. AWS
            allows these only from 60 and 600 seconds on.
        calls_per_second: Batch calls per second; further calls are refused as too many.
        max_running: Largest number of attempts that run at a time, whatever the capacity of the
            compute environments, because this machine must run them.
        aws_in_jobs: Whether jobs of AWS Batch get the address of this AWS, too, and the credentials
            of their role, for tasks that call AWS themselves. A call that the role's inline
            policies do not allow is refused; a role without such policies may do everything.
        job_environment: Variables that every job gets in addition to those that AWS sets.
        stack_seconds: Seconds that CloudFormation takes to create or delete a stack.
        registry: A registry on this machine, ``host:port`` over plain HTTP, that stands for ECR.
            Images that are pushed there appear in ECR, and containers are run from there.
        boot: Seconds until an EC2 instance can run jobs. On AWS they are minutes.
        launch_rate: Number of tasks that Fargate starts at once after a pause, and number per
            second from then on, for each kind of capacity; ``None`` for no limit. On AWS they are
            100 and 20 ("AWS Fargate throttling quotas", Amazon ECS Developer Guide).
        new_account: Whether the account has the quotas of a new one: 6 vCPUs at once on Fargate,
            and 6 on Fargate Spot, and 10 invocations at once on AWS Lambda.
        zones: Further zones of the region, by name: id and type (``"availability-zone"``,
            ``"local-zone"`` or ``"wavelength-zone"``), in which subnets can be made.

    Raises:
        ConfigError: If a setting is out of its range.
    """

    _entered: ClassVar[threading.Lock] = threading.Lock()

    def __init__(
        self,
        *,
        mode: Mode = "process",
        region: str = "us-east-1",
        python: str | None = None,
        images: Mapping[str, str] | None = None,
        step: float = 0.02,
        grace: float = 30.0,
        speed: float = 1.0,
        calls_per_second: float = 50.0,
        max_running: int = 64,
        aws_in_jobs: bool = False,
        job_environment: Mapping[str, str] | None = None,
        stack_seconds: float = 0.2,
        registry: str | None = None,
        boot: float = 0.0,
        launch_rate: tuple[int, float] | None = None,
        new_account: bool = False,
        zones: Mapping[str, tuple[str, str]] | None = None,
    ) -> None:
        if mode not in get_args(Mode):
            raise ConfigError(f"mode must be one of {', '.join(get_args(Mode))}, not {mode!r}")
        for name, value in (
            ("step", step),
            ("grace", grace),
            ("stack_seconds", stack_seconds),
            ("boot", boot),
        ):
            check_positive(name, value, zero=True)
        if launch_rate is not None:
            check_count("launch_rate[0]", launch_rate[0], least=1)
            check_positive("launch_rate[1]", launch_rate[1])
        check_positive("speed", speed)
        check_positive("calls_per_second", calls_per_second)
        check_count("max_running", max_running, least=1)
        self.region = region
        self.faults = Faults(self._renewed, _NEW_ACCOUNT if new_account else None)
        self.new_account = new_account
        self.boot = boot
        self.launch_rate = launch_rate
        self.step = step
        self.grace = grace
        self.speed = speed
        self.calls_per_second = calls_per_second
        self.max_running = max_running
        self.stack_seconds = stack_seconds
        self.registry = registry
        self.zones = dict(zones or {})
        self.python = python or sys.executable
        self.images = dict(images or {})
        self.aws_in_jobs = aws_in_jobs
        self.job_environment = dict(job_environment or {})
        self.environment: dict[str, str] = {}
        """Variables that an AWS client needs, and the address at which jobs reach this machine."""
        self._wanted_mode: Mode = mode
        self.mode: Mode = mode
        """After entering, ``"process"`` or ``"container"``."""
        self._session: Session | None = None
        self._saved: dict[str, str | None] = {}
        self._directory: Path | None = None

    def __enter__(self) -> FakeAWS:
        """Start the emulation, and make this process's AWS clients use it.

        Raises:
            ConfigError: If containers are wanted and no engine answers, or there is no such region.
            ImportError: If ``cloudexec[testing]`` is not installed.
            RuntimeError: If another FakeAWS is entered.
        """
        if not FakeAWS._entered.acquire(blocking=False):
            raise RuntimeError("a FakeAWS is entered already: moto's state belongs to the process")
        try:
            try:
                from cloudexec.testing._aws.session import Session, check_region
            except ImportError as exc:
                raise ImportError(
                    f"FakeAWS needs the packages of `pip install 'cloudexec[testing]'` ({exc})"
                ) from exc
            check_region(self.region)
            # Without this, moto loads thousands of images in 0.2 seconds for each region.
            self._saved["MOTO_EC2_LOAD_DEFAULT_AMIS"] = os.environ.get("MOTO_EC2_LOAD_DEFAULT_AMIS")
            os.environ["MOTO_EC2_LOAD_DEFAULT_AMIS"] = "false"
            self._directory = Path(tempfile.mkdtemp(prefix="fake-aws-"))
            self.mode = self._wanted_mode
            self._session = Session(self, self._directory)
            self._set_environment()
        except BaseException:
            self._leave()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Stop the emulation, and restore ``os.environ``."""
        self._leave()

    @property
    def endpoint_url(self) -> str:
        """The URL at which the API answers."""
        return self._required_session().endpoint_url

    @property
    def requests(self) -> list[Request]:
        """All API calls so far."""
        return self._required_session().gateway.requests

    def clear_requests(self) -> None:
        """Forget the API calls so far."""
        self._required_session().gateway.clear_requests()

    def jobs(self) -> list[JobRecord]:
        """Return all jobs so far, with the children of arrays, in the order of submission."""
        engine = self._required_session().engine
        with engine.lock:
            return [job.record() for job in engine.jobs.values()]

    def job(self, job_id: str) -> JobRecord:
        """Return one job.

        Raises:
            KeyError: If there is no job with this id.
        """
        engine = self._required_session().engine
        with engine.lock:
            return engine.jobs[job_id].record()

    def invocations(self) -> list[Event]:
        """Return all deliveries of events to functions of AWS Lambda so far."""
        return self._required_session().functions.events()

    def instances(self) -> list[InstanceRecord]:
        """Return all EC2 instances so far that were asked for directly, in the order of start."""
        return self._required_session().instances.records()

    def set_up(
        self,
        name: str = "test",
        *,
        kinds: tuple[str, ...] | None = None,
        spot: bool = False,
        max_vcpus: int = 16,
        time_limits: tuple[tuple[str, int], ...] = (),
    ) -> Setup:
        """Make a job queue with all resources that it needs, without a stack.

        Args:
            name: The queue's name; the other resources are named after it.
            kinds: Types of the compute environments, in the queue's order; ``None`` for Fargate.
            spot: Whether to use Fargate Spot, if ``kinds`` is not given.
            max_vcpus: The limit of vCPUs of each compute environment.
            time_limits: Pairs of a reason and AWS seconds. A job that waits at the head of the
                queue for that reason is cancelled after that time.
        """
        kinds = kinds or (("FARGATE_SPOT",) if spot else ("FARGATE",))
        return self._required_session().set_up(name, kinds, max_vcpus, time_limits)

    def logs(self, job_id: str) -> list[str]:
        """Return the lines that a job has written, of all its attempts in order."""
        return self._required_session().job_lines(job_id)

    def _required_session(self) -> Session:
        if self._session is None:
            raise RuntimeError("the FakeAWS has not been entered")
        return self._session

    def _set_environment(self) -> None:
        session = self._required_session()
        self.environment = {
            "AWS_ENDPOINT_URL": session.endpoint_url,
            "AWS_ACCESS_KEY_ID": "AKIAFAKEFAKEFAKEFAKE",
            "AWS_SECRET_ACCESS_KEY": secrets.token_hex(20),
            "AWS_SESSION_TOKEN": self.faults.token,
            "AWS_DEFAULT_REGION": self.region,
            "AWS_REGION": self.region,
            "CLOUDEXEC_ADVERTISE": session.host_for_jobs,
        }
        for name in ("AWS_PROFILE", "AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
            self._saved[name] = os.environ.get(name)
        for name in self.environment:
            self._saved[name] = os.environ.get(name)
        os.environ.pop("AWS_PROFILE", None)
        # A user's own AWS profiles must not change the result of a test.
        os.environ["AWS_CONFIG_FILE"] = os.environ["AWS_SHARED_CREDENTIALS_FILE"] = os.devnull
        os.environ.update(self.environment)

    def _renewed(self, token: str) -> None:
        self.environment["AWS_SESSION_TOKEN"] = token
        os.environ["AWS_SESSION_TOKEN"] = token

    def _leave(self) -> None:
        mistakes: list[str] = []
        try:
            if self._session is not None:
                mistakes = self._session.own_mistakes()
                self._session.close()
                self._session = None
            if self._directory is not None:
                shutil.rmtree(self._directory, ignore_errors=True)
                self._directory = None
        finally:
            for name, value in self._saved.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value
            self._saved.clear()
            FakeAWS._entered.release()
        if mistakes:
            text = f"cloudexec made requests that AWS refuses: {'; '.join(mistakes)}"
            warnings.warn(text, stacklevel=3)
