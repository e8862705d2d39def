"""``cloudexec up``: set up the AWS resources that workers need."""

from __future__ import annotations

import sys

import click

_HELP = """Set up the AWS resources that workers need, and write a profile for executors.

The command creates one CloudFormation stack, cloudexec-NAME. It has queues and compute environments
of AWS Batch for Fargate and Fargate Spot (and EC2, if asked for), roles, security groups, a
bucket, an image repository, a log group, and a secret with the key by which workers prove who they
are. While no worker runs, only the secret costs something, less than a dollar a month, and the
images and objects that you store.

The same command again updates the stack; options that are not given stay as they are. After an
interruption, it continues. `cloudexec down` removes everything.
"""

_EPILOG = """\b
Exit codes:
  0    everything is set up
  1    you said no to its question
  2    the command line is wrong, or there is no VPC to use
  3    AWS refused, or the stack failed: the reason of the first failure is shown
  130  Ctrl-C interrupted the command; AWS continues with the stack
"""


@click.command(
    "up",
    help=_HELP,
    epilog=_EPILOG,
    short_help="Set up the AWS resources that workers need.",
    context_settings={"max_content_width": 100},
)
@click.option(
    "--name",
    default="default",
    show_default=True,
    metavar="NAME",
    help="Name of the profile: lower-case letters, digits and single hyphens.",
)
@click.option(
    "--region",
    metavar="REGION",
    help="AWS region; by default that of the profile, or else of the AWS SDK.",
)
@click.option(
    "--vpc",
    default="",
    metavar="ID",
    help="VPC of the workers; by default the account's default VPC.",
)
@click.option(
    "--subnet",
    "subnets",
    multiple=True,
    metavar="ID",
    help="Subnet for workers; by default all of the VPC. Can be repeated.",
)
@click.option(
    "--max-vcpus",
    type=click.IntRange(min=1),
    metavar="N",
    help="Largest number of vCPUs at once in each compute environment; 256 at first.",
)
@click.option("--ec2/--no-ec2", default=None, help="Whether there are queues for EC2 instances.")
@click.option(
    "--with",
    "launchers",
    metavar="LIST",
    help="Launchers that can use the stack, with commas between: batch, which always can, fargate, "
    "which needs a cluster of Amazon ECS in the stack, ec2, which needs a role of instances in it, "
    "and lambda, which needs a role of functions there; at first batch.",
)
@click.option(
    "--public-ip/--no-public-ip",
    default=None,
    help="Whether workers get public addresses, as they must in public subnets; at first yes.",
)
@click.option(
    "--log-days",
    type=click.IntRange(min=1),
    metavar="N",
    help="Number of days for which the workers' log is kept; 30 at first.",
)
@click.option(
    "--bucket-days",
    type=click.IntRange(min=1),
    metavar="N",
    help="Number of days after which objects in the bucket are deleted; 7 at first.",
)
@click.option(
    "--project", default="", metavar="NAME", help="Name that goes into a tag of every job."
)
@click.option(
    "--adopt",
    default="",
    metavar="STACK",
    help="Use a stack that another person deployed from `cloudexec template`. Nothing in it is "
    "changed; the command only writes the profile.",
)
@click.option(
    "--permissions-boundary",
    metavar="ARN",
    help="Permissions boundary of the stack's roles, if the account demands one; '' for none.",
)
@click.option(
    "--tag",
    "tags",
    multiple=True,
    metavar="KEY=VALUE",
    help="Tag of a new stack and of all its resources that can have tags. Can be repeated.",
)
@click.option("-y", "--yes", "is_sure", is_flag=True, help="Do not ask.")
def up_command(
    name: str,
    region: str | None,
    vpc: str,
    subnets: tuple[str, ...],
    max_vcpus: int | None,
    ec2: bool | None,
    launchers: str | None,
    public_ip: bool | None,
    log_days: int | None,
    bucket_days: int | None,
    project: str,
    adopt: str,
    permissions_boundary: str | None,
    tags: tuple[str, ...],
    is_sure: bool,
) -> int:
    """Deploy the stack, show each step, and say what comes next."""
    from cloudexec._aws.clients import AwsClients
    from cloudexec._aws.names import stack_name
    from cloudexec._aws.profile import Profile
    from cloudexec._aws.setup import SetupOptions, up
    from cloudexec._aws.setup import adopt as adopt_stack
    from cloudexec._aws.stack import find_stack
    from cloudexec._errors import ConfigError
    from cloudexec.cli._errors import INTERRUPTED, CommandError
    from cloudexec.cli._steps import Steps, run_or_explain

    try:
        options = SetupOptions(
            name=name,
            vpc=vpc,
            subnets=subnets,
            max_vcpus=max_vcpus,
            ec2=ec2,
            launchers=_names(launchers),
            public_ip=public_ip,
            log_retention_days=log_days,
            bucket_expire_days=bucket_days,
            project=project,
            permissions_boundary=permissions_boundary,
            tags=_pairs(tags),
        )
    except ConfigError as exc:
        raise CommandError(str(exc)) from exc

    async def work(steps: Steps) -> Profile:
        async with AwsClients(region or region_of(name)) as clients:
            if adopt:
                return await adopt_stack(clients, adopt, options, steps.show)
            return await up(clients, options, steps.show)

    async def question() -> str:
        stack_id = stack_name(name)
        async with AwsClients(region or region_of(name)) as clients:
            stack = await find_stack(clients, stack_id)
            identity = await clients.call("sts", "get_caller_identity")
            what = "Create the stack" if stack is None else "Update the stack"
            return f"{what} {stack_id} in account {identity['Account']}, {clients.region}?"

    if adopt and options != SetupOptions(name=name, project=project):
        raise CommandError(
            "--adopt changes nothing in the stack: give only --name and --project with it"
        )
    # The question is asked outside of the event loop, so that Ctrl-C interrupts it.
    if (
        not is_sure
        and not adopt
        and sys.stdin.isatty()
        and not click.confirm(run_or_explain(question()), default=True, err=True)
    ):
        click.echo("Nothing was changed.", err=True)
        return 1
    with Steps() as steps:
        try:
            profile = run_or_explain(work(steps))
        except KeyboardInterrupt:
            steps.say(
                "Interrupted. CloudFormation finishes what it has begun. Run the same command "
                "again to continue, or `cloudexec down` to remove everything."
            )
            return INTERRUPTED
        cluster = f", cluster {profile.cluster.rpartition('/')[2]}" if profile.cluster else ""
        instances = ", role of instances" if profile.instance_profile else ""
        functions = ", functions of AWS Lambda" if profile.function_role else ""
        what = f"queues {', '.join(profile.queues)}{cluster}{instances}{functions}"
        steps.say(f"Ready: profile {profile.name}, {what}.")
        option = "" if name == "default" else f" --profile {name}"
        steps.say(f"Next: `cloudexec doctor{option}`.")
    return 0


def _names(text: str | None) -> tuple[str, ...] | None:
    if text is None:
        return None
    return tuple(filter(None, (each.strip().lower() for each in text.split(","))))


def _pairs(tags: tuple[str, ...]) -> dict[str, str]:
    from cloudexec.cli._errors import CommandError

    pairs = dict(each.partition("=")[::2] for each in tags)
    if wrong := [each for each in tags if "=" not in each]:
        raise CommandError(f"--tag must be KEY=VALUE, not {wrong[0]!r}")
    return pairs


def region_of(name: str) -> str | None:
    """Return the region of a profile, if there is one."""
    from cloudexec._aws.profile import Profile
    from cloudexec._errors import ConfigError

    try:
        return Profile.load(name).region
    except ConfigError:
        return None
