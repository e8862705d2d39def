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
from cloudexec.testing._aws.records import JobRecord, Request, Setup

if TYPE_CHECKING:
    from cloudexec.testing._aws.session import Session

__all__ = ["FakeAWS"]

Mode = Literal["process", "container", "auto"]
_NEW_ACCOUNT = {"fargate": 6.0, "fargate_spot": 6.0}
"""vCPUs at once. AWS Batch API Reference, "ResourceRequirement"; of Spot, AWS names none there."""


class FakeAWS:
    """An AWS on this machine whose Batch jobs are real workers.

    moto answers the API; jobs run as subprocesses of this process (or, in container mode, as
    containers) with the environment, the limits, the states and the ends that AWS gives them.
    While it is entered, ``os.environ`` holds its address and credentials, so that every AWS client
    made in this process talks to it and none reaches the real AWS.

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

    moto's state belongs to the process, so one FakeAWS can be entered at a time. Leaving it kills
    what still runs and leaves no thread, socket, process, container or file.

    Args:
        mode: ``"process"``, ``"container"`` (an engine must answer at ``DOCKER_HOST``) or
            ``"auto"``: containers where an engine answers. With containers the API listens on all
            addresses of this machine, so that they reach it.
        region: Region that clients are told to use. Every Region works, one that AWS does not
            have is refused.
        python: Interpreter that stands for the worker image; ``None``: the one of this process.
        images: In process mode image name (or shell pattern) to the interpreter that stands for
            it; in container mode to the name of the image to run instead.
        step: Seconds from one job state to the next where nothing is waited for.
        grace: Seconds from SIGTERM to SIGKILL. AWS's are 30.
        speed: AWS's seconds per real second, for attempt timeouts and queue time limits, which
            AWS allows from 60 and 600 seconds on.
        calls_per_second: Batch calls before the next is refused as one too many.
        max_running: Attempts that run at a time at most, however much capacity the compute
            environments have: this machine has to run them.
        aws_in_jobs: Whether jobs get this AWS's address and credentials too, for tasks that call
            AWS themselves.
        job_environment: Variables that every job gets besides those that AWS sets.
        stack_seconds: How long CloudFormation takes to create or delete a stack.
        registry: Registry on this machine, ``host:port`` over plain HTTP, that stands for ECR: what
            is pushed there appears in ECR, and containers are run from there.
        boot: Seconds that an EC2 instance takes until it can run jobs. AWS's take minutes.
        launch_rate: How many tasks Fargate starts at once after a pause, and how many a second
            from then on, of each kind of capacity; ``None``: any number. AWS's are 100 and 20
            ("AWS Fargate throttling quotas", Amazon ECS Developer Guide).
        new_account: Whether the account has the quotas of a new one: 6 vCPUs at once on Fargate,
            and as many on Fargate Spot.
        zones: More zones of the region, by name: id and type (``"availability-zone"``,
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
        """Variables that an AWS client needs, and where jobs reach this machine."""
        self._wanted_mode: Mode = mode
        self.mode: Mode = mode
        """After entering, ``"process"`` or ``"container"``."""
        self._session: Session | None = None
        self._saved: dict[str, str | None] = {}
        self._directory: Path | None = None

    def __enter__(self) -> FakeAWS:
        """Start it and point this process's AWS clients at it.

        Raises:
            ConfigError: If containers are wanted and no engine answers, or there is no such region.
            ImportError: If ``cloudexec[testing]`` is not installed.
            RuntimeError: If another one is entered.
        """
        if not FakeAWS._entered.acquire(blocking=False):
            raise RuntimeError("a FakeAWS is entered already: moto's state belongs to the process")
        try:
            try:
                from cloudexec.testing._aws.session import Session, check_region
            except ImportError as exc:
                raise ImportError(
                    f"FakeAWS needs what `pip install 'cloudexec[testing]'` brings ({exc})"
                ) from exc
            check_region(self.region)
            # Thousands of images in every Region's back end would cost 0.2 seconds each.
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
        """Stop it and undo what entering it did."""
        self._leave()

    @property
    def endpoint_url(self) -> str:
        """Where the API answers."""
        return self._required_session().endpoint_url

    @property
    def requests(self) -> list[Request]:
        """Every API call so far."""
        return self._required_session().gateway.requests

    def clear_requests(self) -> None:
        """Forget the API calls so far."""
        self._required_session().gateway.clear_requests()

    def jobs(self) -> list[JobRecord]:
        """Every job so far, array children included, in the order of submission."""
        engine = self._required_session().engine
        with engine.lock:
            return [job.record() for job in engine.jobs.values()]

    def job(self, job_id: str) -> JobRecord:
        """One job.

        Raises:
            KeyError: If there is none with this id.
        """
        engine = self._required_session().engine
        with engine.lock:
            return engine.jobs[job_id].record()

    def set_up(
        self,
        name: str = "test",
        *,
        kinds: tuple[str, ...] | None = None,
        spot: bool = False,
        max_vcpus: int = 16,
        time_limits: tuple[tuple[str, int], ...] = (),
    ) -> Setup:
        """Make a job queue with all that it needs, without a stack.

        Args:
            name: Of the queue; the rest is named after it.
            kinds: Types of the compute environments in the queue's order; ``None``: Fargate.
            spot: Without ``kinds``, Fargate Spot.
            max_vcpus: Of each compute environment.
            time_limits: Reason and AWS seconds at the head of the queue, after which a job is
                cancelled.
        """
        kinds = kinds or (("FARGATE_SPOT",) if spot else ("FARGATE",))
        return self._required_session().set_up(name, kinds, max_vcpus, time_limits)

    def logs(self, job_id: str) -> list[str]:
        """Lines that a job has written, all its attempts one after another."""
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
        # The user's own profiles must not decide what a test does.
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
