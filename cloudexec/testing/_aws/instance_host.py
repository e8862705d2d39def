"""What the script of an emulated EC2 instance finds: metadata, and some commands of the system."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cloudexec.testing._aws.faults import Faults
from cloudexec.testing._aws.instances import Instance, Instances
from cloudexec.testing._aws.logs import LogWriter
from cloudexec.testing._aws.roles import RoleKeys
from cloudexec.testing._aws.runners import Runner, Running, StartError, StartRequest

__all__ = ["InstanceHost", "write_commands"]

_TOKEN = "fake-metadata-token"
_USUAL_STOP = 30.0
"""Seconds that ``FakeAWS.grace`` stands for."""
_CREDENTIALS_LAST = timedelta(hours=6)
_OPTIONS_WITH_VALUE = (
    "--name",
    "--memory",
    "--shm-size",
    "--ulimit",
    "--gpus",
    "--network",
    "--stop-timeout",
    "--log-driver",
    "--log-opt",
    "-e",
)
_COMMAND = """#!/bin/bash
input=
[ "$1" = login ] && input=$(cat)
{{ printf '%s\\0' {name} "$@"; printf '\\0%s\\0' "$input"; env -0; }} |
    curl -s --data-binary @- "$FAKE_MACHINE/command" | {{
        read -r code
        if [ "$code" = 0 ]; then cat; else cat >&2; fi
        exit "${{code:-125}}"
    }}
"""

_SYSTEMD_RUN = """#!/bin/bash
for word; do
    case $word in
        --on-active=*) exit 0 ;;
        --setenv=*) export "${word#--setenv=}"; shift ;;
        --*) shift ;;
        *) break ;;
    esac
done
"$@" </dev/null &
"""
"""It starts a program, and does not wait for its end. Timers are not emulated, but for those of
``shutdown``."""

Answer = tuple[int, bytes]


def write_commands(directory: Path) -> None:
    """Write the commands that stand for those of an instance's system."""
    directory.mkdir()
    commands = {name: _COMMAND.format(name=name) for name in ("docker", "shutdown", "systemctl")}
    for name, text in {**commands, "systemd-run": _SYSTEMD_RUN}.items():
        path = directory / name
        path.write_text(text)
        path.chmod(0o755)


class InstanceHost:
    """Answers instances.

    Args:
        instances: All of them.
        runner: Runs their containers.
        logs: Where the containers write.
        faults: What goes wrong with images and starts.
        roles: Makes the credentials of their roles.
        job_environment: Variables that containers get besides those they are given.
        address: The URL below which containers find the metadata service of their instance.
    """

    def __init__(
        self,
        instances: Instances,
        *,
        runner: Runner,
        logs: LogWriter,
        faults: Faults,
        roles: RoleKeys,
        job_environment: Mapping[str, str],
        address: str,
    ) -> None:
        self._instances = instances
        self._runner = runner
        self._logs = logs
        self._faults = faults
        self._roles = roles
        self._job_environment = dict(job_environment)
        self._address = address

    def answer(self, method: str, path: str, headers: Mapping[str, str], body: bytes) -> Answer:
        """Answer a request to ``/machine/<instance>/...``: HTTP status and body."""
        name, _, rest = path.removeprefix("/machine/").partition("/")
        instance = self._instances.all.get(name)
        if instance is None:
            return 404, b"no such instance"
        if rest == "command":
            code, said = self._command(instance, body)
            return 200, f"{code}\n{said}\n".encode()
        if rest == "latest/api/token":
            lifetime = headers.get("x-aws-ec2-metadata-token-ttl-seconds", "")
            if method != "PUT" or not lifetime.isdigit():
                return 400, b""
            return 200, _TOKEN.encode()
        if headers.get("x-aws-ec2-metadata-token") != _TOKEN:
            return 401, b""
        found = self._metadata(instance, rest.removeprefix("latest/"))
        return (404, b"") if found is None else (200, found.encode())

    def _metadata(self, instance: Instance, path: str) -> str | None:
        """Return what the metadata service says. Amazon EC2 User Guide, "Instance metadata"."""
        order = instance.order
        role = order.role.rpartition("/")[2]
        match path:
            case "meta-data/instance-id":
                return instance.id
            case "meta-data/instance-type":
                return order.kind.name
            case "meta-data/placement/availability-zone":
                return order.zone
            case "user-data":
                return order.script
            case "meta-data/iam/security-credentials/" if role:
                return role
            case "meta-data/spot/instance-action" if instance.notice_until is not None:
                at = datetime.fromtimestamp(instance.notice_until, UTC)
                return json.dumps({"action": "terminate", "time": f"{at:%Y-%m-%dT%H:%M:%SZ}"})
            case _ if role and path == f"meta-data/iam/security-credentials/{role}":
                now = datetime.now(UTC)
                found = {
                    "Code": "Success",
                    "LastUpdated": f"{now:%Y-%m-%dT%H:%M:%SZ}",
                    "Type": "AWS-HMAC",
                    "AccessKeyId": self._roles.key_of(order.role),
                    "SecretAccessKey": "fake/secret+of/a/role",
                    "Token": self._faults.token,
                    "Expiration": f"{now + _CREDENTIALS_LAST:%Y-%m-%dT%H:%M:%SZ}",
                }
                return json.dumps(found, indent=2)
            case _:
                return None

    # Commands.

    def _command(self, instance: Instance, body: bytes) -> tuple[int, str]:
        words, _, rest = body.decode().partition("\0\0")
        name, *arguments = words.split("\0")
        given, _, variables = rest.partition("\0")
        if name == "shutdown":
            return self._shutdown(instance, arguments)
        if name == "systemctl" and arguments == ["start", "docker"]:
            self._instances.wait_for_engine(instance)
        if name != "docker" or not arguments:
            return 0, ""
        if not self._instances.has_engine(instance):
            return 1, "Cannot connect to the Docker daemon at unix:///var/run/docker.sock."
        environment = dict(
            each.partition("=")[::2] for each in variables.split("\0") if "=" in each
        )
        commands: Mapping[str, Callable[[], tuple[int, str]]] = {
            "login": lambda: (0, "Login Succeeded") if given else (1, "password is empty"),
            "pull": lambda: self._pull(instance, arguments[-1]),
            "run": lambda: self._run(instance, arguments[1:], environment),
            "kill": lambda: self._kill(instance),
            "wait": lambda: self._wait(instance),
            "inspect": lambda: (0, str(instance.out_of_memory).lower()),
        }
        command = commands.get(arguments[0])
        return command() if command is not None else (1, f"unknown command {arguments[0]}")

    def _shutdown(self, instance: Instance, arguments: list[str]) -> tuple[int, str]:
        when = arguments[-1] if arguments else ""
        if when.startswith("+"):
            self._instances.after(instance, 60.0 * int(when))
        else:
            self._instances.shut_down(instance, "itself")
        return 0, ""

    def _pull(self, instance: Instance, image: str) -> tuple[int, str]:
        if why := self._faults.pull_error(image):
            return 1, f"Error response from daemon: failed to resolve reference {image}: {why}"
        instance.pulled.add(image)
        return 0, image

    def _run(
        self, instance: Instance, arguments: list[str], variables: Mapping[str, str]
    ) -> tuple[int, str]:
        options: dict[str, list[str]] = {}
        while arguments and arguments[0].startswith("-"):
            option = arguments.pop(0)
            if option in _OPTIONS_WITH_VALUE:
                options.setdefault(option, []).append(arguments.pop(0))
        image, *command = arguments
        if image not in instance.pulled:
            return 125, f"docker: Error response from daemon: no such image: {image}"
        if error := self._faults.start_error():
            return 125, f"docker: Error response from daemon: {error}"
        environment = {
            name: value if is_given else variables.get(name, "")
            for each in options.get("-e", ())
            for name, is_given, value in [each.partition("=")]
        }
        logs = dict(each.partition("=")[::2] for each in options.get("--log-opt", ()))
        try:
            output: Callable[[bytes], None] = lambda _: None  # noqa: E731
            if options.get("--log-driver") == ["awslogs"]:
                output = self._logs.open(
                    logs["awslogs-region"],
                    logs["awslogs-group"],
                    logs["awslogs-stream"],
                    create=False,
                )
            request = StartRequest(
                name=f"{instance.id}-worker",
                image=image,
                command=tuple(command),
                environment={
                    **self._job_environment,
                    **self._metadata_of(instance, options),
                    **environment,
                },
                vcpus=instance.order.kind.vcpus,
                memory_mib=instance.order.kind.memory_mib,
            )
            running = self._runner.start(request, output)
        except StartError as exc:
            return 125, f"docker: Error response from daemon: {exc}"
        with self._instances.lock:
            instance.container = running
            if stop := options.get("--stop-timeout"):
                instance.stop_factor = float(stop[-1]) / _USUAL_STOP
            instance.environment = {
                name: value for name, value in environment.items() if name != "CLOUDEXEC_KEY"
            }
            if instance.ended:
                running.kill()
        self._instances.spawn(self._await, instance, running, logs)
        return 0, instance.id

    def _metadata_of(
        self, instance: Instance, options: Mapping[str, list[str]]
    ) -> Mapping[str, str]:
        """Return the variables by which a container finds the metadata service, if it reaches it.

        The network of a container is one hop more. Amazon EC2 User Guide, "Configure the Instance
        Metadata Service options", on the hop limit.
        """
        hops = 1 if "host" in options.get("--network", ()) else 2
        if instance.order.hop_limit < hops:
            return {"AWS_EC2_METADATA_DISABLED": "true"}
        return {"AWS_EC2_METADATA_SERVICE_ENDPOINT": f"{self._address}/{instance.id}"}

    def _await(self, instance: Instance, running: Running, logs: Mapping[str, str]) -> None:
        """Wait for the end of a container."""
        how = running.wait()
        if logs:
            self._logs.finish(logs["awslogs-region"], logs["awslogs-group"], logs["awslogs-stream"])
        with self._instances.lock:
            instance.exit_code, instance.out_of_memory = how.code, how.out_of_memory
            instance.container = None
        instance.container_ended.set()

    def _kill(self, instance: Instance) -> tuple[int, str]:
        with self._instances.lock:
            if instance.container is None:
                return 1, "Error response from daemon: No such container: worker"
            instance.container.terminate()
        return 0, "worker"

    @staticmethod
    def _wait(instance: Instance) -> tuple[int, str]:
        instance.container_ended.wait()
        return 0, str(instance.exit_code if instance.exit_code is not None else 137)
