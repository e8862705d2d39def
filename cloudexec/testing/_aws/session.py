"""Starts and ends all parts of a FakeAWS: the server, the engine and moto's state."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, Protocol

from moto.core.base_backend import BackendDict
from moto.core.model_instances import reset_model_data
from moto.moto_server.werkzeug_app import (
    DomainDispatcherApplication,
    MotoRequestHandler,
    create_backend_app,
)
from werkzeug.serving import make_server

from cloudexec._aws.clients import known_regions
from cloudexec._errors import ConfigError
from cloudexec.testing._aws.backends import ACCOUNT, ecs_backend, logs_backend
from cloudexec.testing._aws.batch_jobs import BatchJobs
from cloudexec.testing._aws.batch_resources import BatchResources
from cloudexec.testing._aws.cloudformation import CloudFormation
from cloudexec.testing._aws.containers import ContainerRunner, engine_answers
from cloudexec.testing._aws.ec2 import Ec2
from cloudexec.testing._aws.ecs import Ecs
from cloudexec.testing._aws.engine import Engine
from cloudexec.testing._aws.faults import Faults
from cloudexec.testing._aws.function_archives import Archives
from cloudexec.testing._aws.function_environments import Host, isolates
from cloudexec.testing._aws.functions import Functions
from cloudexec.testing._aws.gateway import Gateway
from cloudexec.testing._aws.ghosts import Ghosts
from cloudexec.testing._aws.instance_host import InstanceHost, write_commands
from cloudexec.testing._aws.instances import Instances
from cloudexec.testing._aws.logs import LogWriter
from cloudexec.testing._aws.networks import Networks
from cloudexec.testing._aws.prices import products, quota_response
from cloudexec.testing._aws.records import Setup
from cloudexec.testing._aws.registry import RegistryMirror
from cloudexec.testing._aws.resources import MotoPlatform
from cloudexec.testing._aws.roles import RoleKeys
from cloudexec.testing._aws.runners import ProcessRunner, Runner
from cloudexec.testing._aws.stack_resources import StackResources
from cloudexec.testing._aws.stacks import StackWork
from cloudexec.testing._aws.tasks import Tasks
from cloudexec.testing._aws.timers import Timing
from cloudexec.testing._aws.wire import Call, Response

__all__ = ["Session", "check_region"]

_CREDENTIALS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
_TRUSTED = {"instance": "ec2", "function": "lambda"}
"""By role that ``set_up`` makes: the service that has it, if it is not Amazon ECS."""


def _pull_times(pull: tuple[float, float] | None) -> dict[str, str]:
    """Return the begin and the end of the image's pull, in the metadata endpoint's form."""
    if pull is None:
        return {}
    names = ("PullStartedAt", "PullStoppedAt")
    return {
        name: f"{datetime.fromtimestamp(at, UTC):%Y-%m-%dT%H:%M:%S.%f}000Z"
        for name, at in zip(names, pull, strict=True)
    }


def check_region(name: str) -> None:
    """Refuse a region that AWS does not have.

    Raises:
        ConfigError: If there is no such region; the message names it.
    """
    if name not in known_regions():
        raise ConfigError(f"there is no AWS region {name!r} for FakeAWS to emulate")


class _Handler(MotoRequestHandler):
    """moto's request handler, without a line on stderr for each request."""

    def log(self, type: str, message: str, *args: object) -> None:  # noqa: A002
        """Log nothing."""


class Settings(Protocol):
    """The settings of a FakeAWS; see ``fake.FakeAWS``."""

    region: str
    faults: Faults
    boot: float
    launch_rate: tuple[int, float] | None
    new_account: bool
    step: float
    grace: float
    speed: float
    calls_per_second: float
    max_running: int
    stack_seconds: float
    registry: str | None
    zones: dict[str, tuple[str, str]]
    python: str
    images: dict[str, str]
    aws_in_jobs: bool
    job_environment: dict[str, str]
    environment: dict[str, str]
    mode: Literal["process", "container", "auto"]


class Session:
    """Starts all parts of a FakeAWS; :meth:`close` ends them.

    Args:
        owner: The FakeAWS with its settings.
        directory: An empty directory for the jobs' files.
    """

    def __init__(self, owner: Settings, directory: Path) -> None:
        self._owner = owner
        self._closers: list[Any] = []
        self.host_for_jobs = "127.0.0.1"
        try:
            self._start(directory)
        except BaseException:
            self.close()
            raise

    def _start(self, directory: Path) -> None:
        owner = self._owner
        reset_moto()
        self._closers.append(reset_moto)
        runner = self._runner(directory)
        self._closers.append(runner.close)
        logs = LogWriter(logs_backend)
        self._closers.append(logs.close)
        # The socket is bound first, because jobs need its address.
        self._server = make_server(
            self._listen_host(),
            0,
            lambda environ, start: self.gateway(environ, start),
            threaded=True,
            request_handler=_Handler,
        )
        self._closers.append(self._server.server_close)
        port = self._server.server_port
        self.endpoint_url = f"http://127.0.0.1:{port}"
        roles = RoleKeys()
        platform = MotoPlatform(
            owner.faults,
            metadata_url=f"http://{self.host_for_jobs}:{port}",
            job_environment=self._job_environment(port),
            role_keys=roles if owner.aws_in_jobs else None,
        )
        timing = Timing(
            step=owner.step,
            grace=owner.grace,
            speed=owner.speed,
            boot=owner.boot,
            launch_rate=owner.launch_rate,
        )
        self.engine = Engine(
            platform=platform,
            runner=runner,
            logs=logs,
            faults=owner.faults,
            timing=timing,
            max_running=owner.max_running,
        )
        owner.faults.attach(self.engine)
        self._closers.append(self.engine.close)
        self.resources = BatchResources(self.engine, owner.faults)
        self._jobs = BatchJobs(self.engine, owner.faults)
        self._tasks = Tasks(self.engine, are_processes=owner.mode == "process")
        self._ecs = Ecs(self.engine, owner.faults, self._tasks)
        of_functions = directory / "functions"
        of_functions.mkdir()
        processes = runner
        if owner.mode == "container":
            processes = ProcessRunner(of_functions, python=owner.python, images={})
            self._closers.append(processes.close)
        self.functions = Functions(
            Host(
                runner=runner,
                processes=processes,
                address=self.host_for_jobs,
                listen=self._listen_host(),
                isolated=owner.mode == "process" and isolates(),
            ),
            Archives(of_functions, python=owner.python, images=owner.images),
            logs,
            owner.faults,
            credentials=platform.credentials,
            is_new=owner.new_account,
            registry=owner.registry,
            speed=owner.speed,
        )
        self._closers.append(self.functions.close)
        commands = directory / "commands"
        write_commands(commands)
        self.instances = Instances(
            directory,
            commands=commands,
            address=f"{self.endpoint_url}/machine",
            endpoint=self.endpoint_url,
            faults=owner.faults.ec2,
            timing=timing,
        )
        owner.faults.ec2.attach(self.instances)
        host = InstanceHost(
            self.instances,
            runner=runner,
            logs=logs,
            faults=owner.faults,
            roles=roles,
            # Their credentials come from the metadata service, if from anywhere.
            job_environment={
                name: value
                for name, value in self._job_environment(port).items()
                if name not in _CREDENTIALS or name in owner.job_environment
            },
            address=f"http://{self.host_for_jobs}:{port}/machine",
        )
        self._machines = Ec2(self.instances, owner.faults, max_running=owner.max_running)
        networks = Networks(owner.region, owner.zones)
        self._closers.append(networks.close)
        ghosts = Ghosts(owner.faults)
        mirror = RegistryMirror(owner.registry) if owner.registry else None
        self.gateway = Gateway(
            DomainDispatcherApplication(create_backend_app),
            handlers={
                "ecr": lambda call, _: mirror.answer(call) if mirror else None,
                "batch": self._batch,
                "ec2": lambda call, _: self._ec2(call, networks),
                "ecs": lambda call, _: self._ecs.answer(call),
                "lambda": lambda call, _: self.functions.answer(call),
                "resourcegroupstaggingapi": lambda call, _: ghosts.answer(call),
                "pricing": lambda call, _: products(call.operation, call.parameters),
                "service-quotas": lambda call, _: quota_response(
                    call.operation, call.parameters, owner.faults
                ),
                "cloudformation": lambda call, _: self._stacks.answer(call),
            },
            before=ghosts.note,
            faults=owner.faults,
            calls_per_second=owner.calls_per_second,
            metadata=self._metadata,
            machine=host.answer,
            secret=lambda key: (
                owner.environment.get("AWS_SECRET_ACCESS_KEY")
                if key == owner.environment.get("AWS_ACCESS_KEY_ID")
                else None
            ),
            role=roles.permissions_of,
        )
        self._stacks = CloudFormation(
            StackWork(
                StackResources(self.resources, self.engine),
                owner.faults,
                self.gateway.moto_lock,
                owner.stack_seconds,
            )
        )
        self._closers.append(self._stacks.close)
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.05,), name="fake-aws-server", daemon=True
        )
        self._thread.start()
        self._closers.append(self._stop_server)
        # First of all, as calls wait for the ends of their containers.
        self._closers.append(self.instances.close)

    def own_mistakes(self) -> list[str]:
        """Return the rules of service models that requests of cloudexec itself have broken."""
        return list(self.gateway.own_mistakes) if hasattr(self, "gateway") else []

    def close(self) -> None:
        """End all parts, in reverse order."""
        while self._closers:
            self._closers.pop()()

    def _stop_server(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self.gateway.wait_idle(5.0)

    def _runner(self, directory: Path) -> Runner:
        owner = self._owner
        if owner.mode == "container" or (owner.mode == "auto" and engine_answers()):
            try:
                import docker  # noqa: F401
            except ImportError:
                raise ConfigError(
                    "mode='container' needs docker-py: pip install 'cloudexec[image,testing]'"
                ) from None
            if not engine_answers():
                raise ConfigError(
                    "mode='container', but no container engine answers: start one, or set "
                    "DOCKER_HOST to where it listens"
                )
            containers = ContainerRunner(images=owner.images, registry=owner.registry)
            owner.mode = "container"
            self.host_for_jobs = containers.gateway
            return containers
        owner.mode = "process"
        return ProcessRunner(directory, python=owner.python, images=owner.images)

    def _listen_host(self) -> str:
        # Containers need all addresses: the bridge may not exist before the first container.
        return "127.0.0.1" if self._owner.mode == "process" else "0.0.0.0"

    def _job_environment(self, port: int) -> dict[str, str]:
        owner = self._owner
        found = {}
        if owner.aws_in_jobs:
            found = {
                "AWS_ENDPOINT_URL": f"http://{self.host_for_jobs}:{port}",
                "AWS_ACCESS_KEY_ID": "AKIAFAKEFAKEFAKEJOBS",
                "AWS_SECRET_ACCESS_KEY": "fake",
                "AWS_DEFAULT_REGION": owner.region,
                "AWS_REGION": owner.region,
            }
        return {**found, **owner.job_environment}

    def _batch(self, call: Call, length: int) -> Mapping[str, Any] | None:
        if call.operation == "SubmitJob":
            return self._jobs.submit(call.region, call.parameters, length)
        arn = call.parameters.get("resourceArn", "")
        if call.operation == "ListTagsForResource" and ":job/" in arn:
            return self._jobs.tags(arn)
        handler = self._jobs.handlers.get(call.operation)
        handler = handler or self.resources.handlers.get(call.operation)
        return None if handler is None else handler(call.region, call.parameters)

    def _ec2(self, call: Call, networks: Networks) -> Response | None:
        networks.prepare(call.region)
        return self._tasks.interfaces(call) or self._machines.answer(call)

    def _metadata(self, task_id: str) -> Mapping[str, Any] | None:
        with self.engine.lock:
            for job in self.engine.jobs.values():
                if job.task_id == task_id and job.status in ("STARTING", "RUNNING"):
                    if job.spec.cluster:
                        return self._ecs.metadata(task_id)
                    return {
                        "Cluster": f"AWSBatch-{job.environment_name}",
                        "TaskARN": job.task_arn,
                        "Family": job.spec.definition_name,
                        "Revision": str(job.spec.revision),
                        "DesiredStatus": "RUNNING",
                        "KnownStatus": "RUNNING",
                        **_pull_times(job.pull),
                        "Limits": {"CPU": job.spec.vcpus, "Memory": job.spec.memory_mib},
                        "AvailabilityZone": f"{job.spec.region}a",
                        "LaunchType": "FARGATE" if job.spec.fargate else "EC2",
                        "Containers": [
                            {
                                "DockerId": task_id,
                                "Name": "default",
                                "Image": job.spec.image,
                                "ContainerARN": f"{job.task_arn}/default",
                                "Networks": self._tasks.networks(job),
                                "Limits": {"CPU": job.spec.vcpus, "Memory": job.spec.memory_mib},
                            }
                        ],
                    }
        return None

    def job_lines(self, job_id: str) -> list[str]:
        """Return the lines that a job has written."""
        with self.engine.lock:
            job = self.engine.jobs[job_id]
            streams = [attempt.log_stream for attempt in job.attempts]
            if not job.ended:
                streams.append(job.log_stream)
            spec = job.spec
        group = logs_backend(spec.region).groups.get(spec.log_group)
        if group is None:
            return []
        return [
            event.message
            for stream in streams
            if stream is not None and stream in group.streams
            for event in list(group.streams[stream].events)
        ]

    def set_up(
        self,
        name: str,
        kinds: tuple[str, ...],
        max_vcpus: int,
        time_limits: tuple[tuple[str, int], ...],
    ) -> Setup:
        """See ``FakeAWS.set_up``."""
        from moto.ec2.models import ec2_backends
        from moto.iam.models import iam_backends

        region = self._owner.region
        ec2: Any = ec2_backends[ACCOUNT][region]
        vpc = next(vpc for vpc in ec2.vpcs.values() if vpc.is_default)
        subnets = tuple(
            subnet.id
            for zone in ec2.subnets.values()
            for subnet in zone.values()
            if subnet.vpc_id == vpc.id
        )
        group = ec2.get_security_group_from_name("default", vpc.id).id
        iam = iam_backends[ACCOUNT]["aws"]
        roles = {role.name: role.arn for role in iam.roles.values()}
        for role in ("job", "execution", "instance", "function"):
            role_name = f"{name}-{role}"
            if role_name not in roles:
                trust = _trust(_TRUSTED.get(role, "ecs-tasks"))
                roles[role_name] = iam.create_role(role_name, trust, "/", None, "", [], None).arn
        environments = []
        for number, kind in enumerate(kinds, 1):
            resources: dict[str, Any] = {
                "type": kind,
                "maxvCpus": max_vcpus,
                "subnets": list(subnets),
                "securityGroupIds": [group],
            }
            if not kind.startswith("FARGATE"):
                profile = f"{name}-{kind.lower()}"
                iam.create_instance_profile(profile, "/", [], None)
                resources["instanceRole"] = profile
                resources["instanceTypes"] = ["optimal", "g4dn"]
                resources["allocationStrategy"] = (
                    "SPOT_PRICE_CAPACITY_OPTIMIZED" if kind == "SPOT" else "BEST_FIT_PROGRESSIVE"
                )
            environments.append(
                self.resources.create_environment(
                    region,
                    {
                        "computeEnvironmentName": f"{name}-{number}",
                        "type": "MANAGED",
                        "computeResources": resources,
                    },
                )["computeEnvironmentArn"]
            )
        queue = self.resources.create_queue(
            region,
            {
                "jobQueueName": name,
                "priority": 1,
                "computeEnvironmentOrder": [
                    {"order": number, "computeEnvironment": arn}
                    for number, arn in enumerate(environments, 1)
                ],
                "jobStateTimeLimitActions": [
                    {
                        "reason": reason,
                        "state": "RUNNABLE",
                        "maxTimeSeconds": seconds,
                        "action": "CANCEL",
                    }
                    for reason, seconds in time_limits
                ],
            },
        )
        cluster = ecs_backend(region).create_cluster(
            name, capacity_providers=["FARGATE", "FARGATE_SPOT"]
        )
        return Setup(
            queue=queue["jobQueueArn"],
            cluster=cluster.arn,
            compute_environments=tuple(environments),
            job_role=roles[f"{name}-job"],
            execution_role=roles[f"{name}-execution"],
            function_role=roles[f"{name}-function"],
            subnets=subnets,
            security_group=group,
        )


def _trust(service: str) -> str:
    statement = {
        "Effect": "Allow",
        "Principal": {"Service": f"{service}.amazonaws.com"},
        "Action": "sts:AssumeRole",
    }
    return json.dumps({"Version": "2012-10-17", "Statement": [statement]})


def reset_moto() -> None:
    """Reset all of moto's back ends that are loaded."""
    BackendDict.reset()
    reset_model_data()
