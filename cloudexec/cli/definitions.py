"""``cloudexec definitions``: the job definitions that executors registered."""

from __future__ import annotations

import asyncio
import re
import sys
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import click

from cloudexec.cli._aws_options import aws_options_for, confirmed, echo_json, ends_well
from cloudexec.cli._errors import CommandError, RunError

if TYPE_CHECKING:
    from cloudexec._aws.clients import AwsClients

_T = TypeVar("_T")
_Definition = Mapping[str, Any]
_NAME = re.compile(r"(?P<name>[A-Za-z0-9][A-Za-z0-9_-]{0,127})(?::(?P<revision>\d+))?")


_options = aws_options_for("Look into the region of this profile.")


@click.group("definitions", short_help="List, describe, register and remove job definitions.")
def definitions_command() -> None:
    """Look after the job definitions that executors registered.

    An executor registers one definition for each combination of image, size, roles and network, and
    uses it again; its name is a hash of its content. Definitions cost nothing. A definition that
    was removed is registered again when it is needed.
    """


@definitions_command.command("list", short_help="List job definitions.")
@click.option(
    "--all", "is_all", is_flag=True, help="List also removed definitions that AWS still has."
)
@_options
@ends_well
def list_command(is_all: bool, profile: str | None, region: str | None, as_json: bool) -> None:
    """List job definitions, by name and revision."""
    found = _run(profile, region, lambda clients: _definitions(clients, is_all=is_all))
    if as_json:
        echo_json([_summary(each) for each in found])
        return
    if not found:
        click.echo("No job definitions of cloudexec's.")
        return
    from cloudexec.cli._table import Column, memory, show

    show(
        (
            Column(title="DEFINITION"),
            Column(title="STATUS" if is_all else "", leaves=4),
            Column(title="SIZE"),
            Column(title="ARCH", leaves=2),
            Column(title="COMPUTE", leaves=1),
            Column(title="STACK", leaves=3),
            Column(title="IMAGE", least=30, yields=True),
        ),
        [
            (
                each["definition"],
                each["status"].lower() if is_all else "",
                f"{each['vcpus']:g} vCPU {memory(each['memory_mib'])}",
                each["arch"],
                each["compute"],
                each["stack"],
                each["image"],
            )
            for each in map(_summary, found)
        ],
    )


@definitions_command.command("describe", short_help="Print a definition as JSON.")
@click.argument("definition", metavar="NAME[:REVISION]")
@_options
@ends_well
def describe_command(
    definition: str, profile: str | None, region: str | None, as_json: bool
) -> None:
    """Print a definition as JSON, as AWS describes it; by default its latest revision."""
    name, revision = _parsed(definition)

    async def find(clients: AwsClients) -> list[_Definition]:
        return await _definitions(clients, name=name, is_all=True)

    found = [
        each
        for each in _run(profile, region, find)
        if revision is None or each["revision"] == revision
    ]
    if not found:
        raise CommandError(f"there is no job definition {definition} of cloudexec's")
    active = [each for each in found if each.get("status") == "ACTIVE"]
    echo_json(dict((active or found)[-1]))


@definitions_command.command("register", short_help="Register a definition and print its ARN.")
@click.option(
    "--image",
    metavar="IMAGE",
    help="Image of the workers; by default the profile's. In Amazon ECR, its digest is used.",
)
@click.option("--vcpus", type=float, default=1.0, show_default=True, metavar="N")
@click.option("--memory", default="2GiB", show_default=True, metavar="SIZE")
@click.option("--arch", type=click.Choice(["x86_64", "arm64"]), default="x86_64", show_default=True)
@click.option(
    "--compute", type=click.Choice(["fargate", "ec2"]), default="fargate", show_default=True
)
@click.option("--job-role", metavar="ARN", help="Role of the tasks; by default the profile's.")
@click.option(
    "--execution-role",
    metavar="ARN",
    help="Role that pulls the image and reads the key; by default the profile's.",
)
@click.option("--log-group", metavar="NAME", help="Log group; by default the profile's.")
@click.option(
    "--ephemeral",
    "ephemeral_gib",
    type=click.IntRange(21, 200),
    metavar="GIB",
    help="Disk of a Fargate worker; 20 by default.",
)
@click.option(
    "--public-ip/--no-public-ip",
    "public_ip",
    default=None,
    help="Whether workers get a public address; by default the profile decides, or else they do.",
)
@aws_options_for("Take its region, and what is not given, from this profile.")
@ends_well
def register_command(
    image: str | None,
    vcpus: float,
    memory: str,
    arch: str,
    compute: str,
    job_role: str | None,
    execution_role: str | None,
    log_group: str | None,
    ephemeral_gib: int | None,
    public_ip: bool | None,
    profile: str | None,
    region: str | None,
    as_json: bool,
) -> None:
    """Register a definition and print its ARN, for `Batch(definition=...)` and other tools.

    A definition with the same content is not registered again. Executors do not need this command:
    they register the definitions that they need.
    """
    from cloudexec._aws.definitions import ensure_definition, pin_image
    from cloudexec._aws.limits import fargate_size, instance_size
    from cloudexec._aws.profile import Profile
    from cloudexec._aws.requests import DefinitionSpec, definition_request

    known = Profile.load(profile) if profile is not None else Profile(name="", region=region or "")
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    platform = "linux/amd64" if arch == "x86_64" else "linux/arm64"
    named = image or known.image(python, platform)
    if not named:
        raise CommandError(
            f"say which image: --image IMAGE, or a profile that has one for Python {python} on "
            f"{platform} (`cloudexec image push` puts it there)"
        )
    if compute == "ec2" and ephemeral_gib is not None:
        raise CommandError("--ephemeral is for --compute fargate: instances have their own disks")
    size = (fargate_size if compute == "fargate" else instance_size)(vcpus, memory)

    async def register(clients: AwsClients) -> str:
        return await ensure_definition(
            clients,
            definition_request(
                DefinitionSpec(
                    image=await pin_image(clients, named),
                    compute=compute,
                    arch=arch,
                    execution_role=execution_role or known.execution_role,
                    job_role=job_role or known.job_role,
                    key_secret=known.key_secret,
                    log_group=log_group or known.log_group,
                    region=clients.region,
                    assign_public_ip=known.assign_public_ip if public_ip is None else public_ip,
                    ephemeral_gib=ephemeral_gib,
                    stack=known.stack,
                    size=size,
                )
            ),
        )

    arn = _run(profile, region, register)
    if as_json:
        echo_json({"arn": arn, "definition": arn.rpartition("/")[2]})
    else:
        click.echo(arn)


@definitions_command.command(
    "deregister",
    short_help="Remove definitions.",
    epilog="""\b
Exit codes:
  0    all definitions were removed, or there were none
  1    you said no
  2    the command line is wrong, or nobody can answer the question
  3    AWS refused to remove some, or cannot be reached
  130  Ctrl-C interrupted the command
""",
)
@click.argument("definitions", metavar="[NAME[:REVISION]]...", nargs=-1)
@click.option("--all", "is_all", is_flag=True, help="Remove all definitions of cloudexec.")
@click.option("-y", "--yes", "is_sure", is_flag=True, help="Do not ask.")
@_options
@ends_well
def deregister_command(
    definitions: tuple[str, ...],
    is_all: bool,
    is_sure: bool,
    profile: str | None,
    region: str | None,
    as_json: bool,
) -> int:
    """Remove definitions: all revisions of a NAME, or only the given one.

    Jobs that run continue, and jobs that wait for capacity still start.
    """
    if is_all == bool(definitions):
        raise CommandError("say which definitions to remove, or --all")
    wanted = [_parsed(each) for each in definitions]
    active = _run(profile, region, lambda clients: _definitions(clients))
    chosen = [
        each
        for each in active
        if is_all
        or any(
            each["jobDefinitionName"] == name and revision in (None, each["revision"])
            for name, revision in wanted
        )
    ]
    for text, (name, revision) in zip(definitions, wanted, strict=True):
        if not any(
            each["jobDefinitionName"] == name and revision in (None, each["revision"])
            for each in chosen
        ):
            raise CommandError(f"there is no job definition {text} of cloudexec's")
    if chosen and not is_sure:
        for each in chosen:
            click.echo(_label(each), err=True)
        noun = "definition" if len(chosen) == 1 else "definitions"
        if not confirmed(f"Remove {len(chosen)} job {noun}?"):
            click.echo("Nothing was removed.", err=True)
            return 1
    removed, refused = _run(profile, region, lambda clients: _deregister(clients, chosen))
    if as_json:
        echo_json({"deregistered": removed})
    elif not chosen:
        click.echo("No job definitions of cloudexec's.")
    else:
        for label in removed:
            click.echo(f"deregistered {label}")
    for line in refused:
        click.echo(f"Error: {line}", err=True)
    return RunError.exit_code if refused else 0


async def _deregister(
    clients: AwsClients, definitions: Iterable[_Definition]
) -> tuple[list[str], list[str]]:
    """Remove definitions; return the names of those that are removed, and errors."""
    from cloudexec._aws.definitions import deregister
    from cloudexec._errors import AwsError

    removed: list[str] = []
    refused: list[str] = []
    for each in definitions:
        try:
            await deregister(clients, each["jobDefinitionArn"])
        except AwsError as exc:
            refused.append(f"{_label(each)}: {exc}")
        else:
            removed.append(_label(each))
    return removed, refused


async def _definitions(
    clients: AwsClients, *, name: str = "", is_all: bool = False
) -> list[_Definition]:
    """Return the job definitions of cloudexec, sorted by name and revision."""
    from cloudexec._aws.names import DEFINITION_PREFIX

    parameters: dict[str, Any] = {} if is_all else {"status": "ACTIVE"}
    if name:
        parameters["jobDefinitionName"] = name
    found = [
        each
        async for each in clients.pages(
            "batch", "describe_job_definitions", "jobDefinitions", **parameters
        )
    ]
    return sorted(
        (each for each in found if each["jobDefinitionName"].startswith(DEFINITION_PREFIX)),
        key=lambda each: (each["jobDefinitionName"], each["revision"]),
    )


def _run(
    profile: str | None, region: str | None, work: Callable[[AwsClients], Awaitable[_T]]
) -> _T:
    """Run ``work`` with AWS clients of the given region, or else of the profile's."""
    from cloudexec._aws.clients import AwsClients
    from cloudexec._aws.profile import Profile

    async def run() -> _T:
        where = region or (Profile.load(profile).region if profile is not None else None)
        async with AwsClients(where) as clients:
            return await work(clients)

    return asyncio.run(run())


def _parsed(text: str) -> tuple[str, int | None]:
    """Return the name and the revision that the user wrote, also from an ARN."""
    found = _NAME.fullmatch(text.rpartition("/")[2])
    if found is None:
        raise CommandError(f"a job definition is NAME or NAME:REVISION, not {text!r}")
    return found["name"], None if found["revision"] is None else int(found["revision"])


def _label(definition: _Definition) -> str:
    return f"{definition['jobDefinitionName']}:{definition['revision']}"


def _summary(definition: _Definition) -> dict[str, Any]:
    from cloudexec._aws.names import TAG_STACK

    container = definition.get("containerProperties", {})
    asked = {each["type"]: each["value"] for each in container.get("resourceRequirements", ())}
    is_arm = container.get("runtimePlatform", {}).get("cpuArchitecture") == "ARM64"
    return {
        "definition": _label(definition),
        "arn": definition["jobDefinitionArn"],
        "status": definition.get("status", ""),
        "image": container.get("image", ""),
        "vcpus": float(asked.get("VCPU") or container.get("vcpus") or 0),
        "memory_mib": int(asked.get("MEMORY") or container.get("memory") or 0),
        "arch": "arm64" if is_arm else "x86_64",
        "compute": "fargate" if "FARGATE" in definition.get("platformCapabilities", ()) else "ec2",
        "stack": definition.get("tags", {}).get(TAG_STACK, ""),
    }
