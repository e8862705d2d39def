"""The script that an EC2 instance runs when it starts: user data, with no secret in it.

It is the same for all instances of a request, so an instance says by its id which worker it is. It
pulls the image, runs it with the engine that the system has, and shuts the instance down after
that, which terminates it. Credentials are those of the instance's role. They reach ``curl`` through
a pipe, so that no list of processes shows them. A container can ask for them only where it shares
the network of the instance, as that of a run does, whose role it is meant to have.
"""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field

from cloudexec._aws.requests import check_environment
from cloudexec._errors import ConfigError

__all__ = [
    "USER_DATA_BYTES",
    "LastWords",
    "MachineScript",
    "boot_stream",
    "container_stream",
    "last_words",
    "machine_script",
]

USER_DATA_BYTES = 16 * 1024
"""Before it is encoded. Amazon EC2 User Guide, "Run commands when you launch an EC2 instance"."""
NOTICE_SECONDS = 5
"""Seconds between two looks for an interruption notice. Amazon EC2 User Guide, "Spot Instance
interruption notices"."""
_ENGINES_STOP = 10
_RESERVED_MIB = 256
"""Memory that the container leaves to the system and to the engine."""
_ECR = re.compile(r"(\d+\.dkr[.-]ecr(?:-fips)?\.([a-z0-9-]+)\.[a-z0-9.-]+)/")
_PREFIX = "instance"
_WORDS = re.compile(
    r"cloudexec: exit=(-?\d*) out-of-memory=(true|false) reclaimed=(true|false) said=(.*)", re.S
)


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineScript:
    """What a machine is to run."""

    image: str
    """Name of the image, best pinned by digest."""
    region: str
    dns_suffix: str = "amazonaws.com"
    """What names of AWS's hosts end in, which depends on the partition."""
    log_group: str = ""
    """Where the container and the script write; empty: nowhere."""
    key_secret: str = ""
    """ARN of the secret which the container gets as ``CLOUDEXEC_KEY``; empty: none."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Variables of the container. Those who may describe instances can read them."""
    own_variables: Mapping[str, str] = field(default_factory=dict)
    """By variable of the container: text in which ``{instance}`` stands for the instance's id."""
    lifetime: float
    """Seconds after which the machine turns itself off, whatever runs on it."""
    spot: bool = False
    """Whether AWS may take it back, of which it is told two minutes before."""
    gpus: bool = False
    is_reachable: bool = False
    """Whether the container has the network of the instance: others then reach ports that it opens
    at the instance's address, and it reaches the metadata service with the role's credentials."""
    stop_seconds: int = _ENGINES_STOP
    """Seconds from SIGTERM to SIGKILL, where the system shuts down while the container runs. That
    is the engine's default."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LastWords:
    """How a machine ended, as its script wrote it to the log."""

    exit_code: int | None
    """Of the container; ``None``: it did not run."""
    out_of_memory: bool
    reclaimed: bool
    """Whether AWS had said that it would take the machine back."""
    said: str
    """What the engine said, if it could not start the container."""


def boot_stream(instance: str) -> str:
    """Return the log stream that has the last words of an instance's script."""
    return f"{_PREFIX}/boot/{instance}"


def container_stream(instance: str) -> str:
    """Return the log stream of the container of an instance."""
    return f"{_PREFIX}/worker/{instance}"


def last_words(lines: str) -> LastWords | None:
    """Read the last words of a script; ``None``: it has written none."""
    found = _WORDS.search(lines)
    if found is None:
        return None
    return LastWords(
        exit_code=int(found[1]) if found[1] else None,
        out_of_memory=found[2] == "true",
        reclaimed=found[3] == "true",
        said=found[4].strip(),
    )


def machine_script(wanted: MachineScript) -> str:
    """Return the script, as text.

    Raises:
        ConfigError: If AWS would refuse it: it is too long, or a variable cannot be one.

    References:
        Amazon EC2 User Guide, "Use the Instance Metadata Service to access instance metadata" and
        "Spot Instance interruption notices"; Amazon ECR User Guide, "Private registry
        authentication"; for the order in which services start, aws/amazon-ecs-agent#1707.
    """
    check_environment(wanted.environment)
    minutes = math.ceil(wanted.lifetime / 60)
    ecr = _ECR.match(wanted.image)
    options = ["--name worker", "--init", "--shm-size 1g", "--ulimit nofile=65535:65535"]
    if wanted.gpus:
        options.append("--gpus all")
    if wanted.is_reachable:
        options.append("--network host")
    if wanted.stop_seconds != _ENGINES_STOP:
        options.append(f"--stop-timeout {wanted.stop_seconds}")
    if wanted.log_group:
        logs = {
            "awslogs-region": wanted.region,
            "awslogs-group": wanted.log_group,
            "awslogs-stream": container_stream("$instance"),
        }
        options.append("--log-driver awslogs")
        options += [f'--log-opt {name}="{value}"' for name, value in logs.items()]
    if wanted.key_secret:
        options.append("-e CLOUDEXEC_KEY")
    options += [
        f'-e {name}="{text.format(instance="$instance")}"'
        for name, text in wanted.own_variables.items()
    ]
    options += [
        f"-e {shlex.quote(f'{name}={value}')}" for name, value in wanted.environment.items()
    ]
    parts = [
        "#!/bin/bash",
        # Before anything that may fail or hang.
        f'[ -n "${_DETACHED}" ] || shutdown -P +{minutes} || '
        f"systemd-run --on-active={minutes}m systemctl poweroff --force",
        _DETACH,
        "umask 077",
        "export HOME=${HOME:-/root}",
        f"region={shlex.quote(wanted.region)}",
        f"suffix={shlex.quote(wanted.dns_suffix)}",
        f"image={shlex.quote(wanted.image)}",
        f"group={shlex.quote(wanted.log_group)}",
        _FUNCTIONS,
    ]
    if ecr is not None:
        parts.append(_LOGIN.format(registry=ecr[1], region=ecr[2]))
    parts.append(_PULL)
    if wanted.key_secret:
        parts.append(_KEY.format(secret=wanted.key_secret))
    parts.append(_RUN.format(options=" \\\n    ".join(options), reserved=_RESERVED_MIB))
    if wanted.spot:
        parts.append(_NOTICE.format(seconds=NOTICE_SECONDS))
    parts.append(_WAIT)
    script = "\n".join(parts)
    size = len(script.encode())
    if size > USER_DATA_BYTES:
        environment = wanted.environment or {"": ""}
        largest = max(environment, key=lambda name: len(environment[name]))
        raise ConfigError(
            f"the script of an instance has {size} bytes with the variables of its worker; Amazon "
            f"EC2 takes {USER_DATA_BYTES}. The longest value is {largest!r}: send it as an "
            f"argument or through initializer= instead"
        )
    return script


_DETACHED = "CLOUDEXEC_DETACHED"
# The engine starts when cloud-init has ended, and cloud-init waits for this script, so the script
# goes on as a unit of its own. The agent of Amazon ECS belongs to no cluster here.
_DETACH = rf"""
if [ -z "${_DETACHED}" ]; then
    systemctl stop --no-block ecs
    exec systemd-run --no-block --setenv={_DETACHED}=1 \
        --property=StandardOutput=journal+console --property=StandardError=journal+console \
        /bin/bash "$0"
fi
"""

_FUNCTIONS = r"""
meta=${AWS_EC2_METADATA_SERVICE_ENDPOINT:-http://169.254.169.254}
# A path below /latest, with a token of IMDSv2.
imds() {
    local token
    token=$(curl -sf -m 5 -X PUT -H 'X-aws-ec2-metadata-token-ttl-seconds: 60' \
        "$meta/latest/api/token") || return
    curl -sf -m 5 -K <(printf 'header = "X-aws-ec2-metadata-token: %s"\n' "$token") \
        "$meta/latest/$1"
}
field() { sed -n "s/.*\"$1\" *: *\"\([^\"]*\)\".*/\1/p" | head -n 1; }
# What curl is to know of the role, which comes a moment after the instance.
role() {
    local name found try
    for try in 1 2 3 4 5 6 7 8; do
        name=$(imds meta-data/iam/security-credentials/) &&
            found=$(imds "meta-data/iam/security-credentials/$name") && break
        sleep "$try"
    done
    printf 'user = "%s:%s"\n' "$(field AccessKeyId <<<"$found")" \
        "$(field SecretAccessKey <<<"$found")"
    printf 'header = "x-amz-security-token: %s"\n' "$(field Token <<<"$found")"
}
# Service, host, region, operation, parameters as JSON.
call() {
    curl -sS -m 20 --retry 3 --aws-sigv4 "aws:amz:$3:$1" -K <(role) \
        -H 'content-type: application/x-amz-json-1.1' -H "x-amz-target: $4" --data-binary "$5" \
        "${AWS_ENDPOINT_URL:-https://$2.$3.$suffix}/"
}
code= starved=false taken=/tmp/cloudexec-reclaimed-$$
# Says how it went, where the program that asked for this machine reads it, and turns it off.
finish() {
    trap - EXIT
    local said event reclaimed=false
    local stream="\"logGroupName\":\"$group\",\"logStreamName\":\"instance/boot/$instance\""
    [ -e "$taken" ] && reclaimed=true
    rm -f "$taken"
    said=$(printf '%s' "$1" | tr -cd '[:print:]' | tr '"\\' "''" | cut -c1-1500)
    said="cloudexec: exit=$code out-of-memory=$starved reclaimed=$reclaimed said=$said"
    echo "$said"
    if [ -n "$group" ]; then
        call logs logs "$region" Logs_20140328.CreateLogStream "{$stream}" >/dev/null
        event="{\"timestamp\":$(date +%s)000,\"message\":\"$said\"}"
        call logs logs "$region" Logs_20140328.PutLogEvents "{$stream,\"logEvents\":[$event]}" \
            >/dev/null
    fi
    shutdown -h now
    exit 0
}
trap 'finish "the script of the instance ended too soon"' EXIT
for try in 1 2 3 4 5 6 7 8; do
    instance=$(imds meta-data/instance-id) && break
    sleep "$try"
done
systemctl start docker
"""

_LOGIN = r"""
call ecr api.ecr {region} AmazonEC2ContainerRegistry_V20150921.GetAuthorizationToken '{{}}' |
    field authorizationToken | base64 -d | cut -d: -f2 |
    docker login --username AWS --password-stdin {registry}
"""

_PULL = r"""
for try in 1 2 3 4; do
    said=$(docker pull -q "$image" 2>&1) && said= && break
    case $said in
        *denied* | *'not found'* | *unauthorized* | *'no matching manifest'*) break ;;
    esac
    sleep "$try"
done
[ -z "$said" ] || finish "CannotPullContainerError: $said"
"""

_KEY = r"""
said=$(call secretsmanager secretsmanager "$region" secretsmanager.GetSecretValue \
    '{{"SecretId":"{secret}"}}')
key=$(field SecretString <<<"$said")
why="$(field message <<<"$said")$(field Message <<<"$said")"
[ -n "$key" ] || finish "ResourceInitializationError: unable to pull secrets: $why"
said=
"""

_RUN = r"""
memory=$(($(sed -n 's/^MemTotal: *\([0-9]*\) kB/\1/p' /proc/meminfo) / 1024 - {reserved}))
said=$(CLOUDEXEC_KEY=$key docker run -d --memory "${{memory}}m" {options} \
    "$image" 2>&1) || finish "CannotStartContainerError: $said"
key=
"""

_NOTICE = r"""
while sleep {seconds}; do
    if imds meta-data/spot/instance-action >/dev/null; then
        : >"$taken"
        docker kill --signal TERM worker
        break
    fi
done >/dev/null 2>&1 &
"""

_WAIT = r"""
code=$(docker wait worker)
starved=$(docker inspect --format '{{.State.OOMKilled}}' worker)
finish ''
"""
