"""``cloudexec policy``: print the IAM policy that a person needs who runs executors."""

from __future__ import annotations

import click

from cloudexec.cli._aws_options import ends_well

_HELP = """Print the minimal IAM policy for people who run executors.

With a profile, the policy names the resources of its stack. Without one, it has patterns for any
stack of cloudexec, and needs to know the account's partition: `aws-cn` for accounts in China,
`aws-us-gov` for accounts in GovCloud, and `aws` for all others. In another partition than the
account's, a policy allows nothing.

People who run `cloudexec up` or `down` need more: they must be allowed to create and delete what
`cloudexec template` contains.
"""


@click.command(
    "policy",
    help=_HELP,
    short_help="Print the IAM policy of people who run executors.",
    context_settings={"max_content_width": 100},
)
@click.option("--profile", "name", metavar="NAME", help="Profile whose resources the policy names.")
@click.option(
    "--partition",
    metavar="NAME",
    help="Partition of the account, if no profile is given: aws, aws-cn, aws-us-gov.",
)
@ends_well
def policy_command(name: str | None, partition: str | None) -> int:
    """Print the policy as JSON."""
    import json
    import re
    import sys

    from cloudexec._aws.policy import LARGEST_MANAGED_POLICY, policy
    from cloudexec._aws.profile import Profile
    from cloudexec._errors import ConfigError
    from cloudexec.cli._errors import CommandError

    if name is None and partition is None and sys.stdin.isatty():
        partition = click.prompt("Partition of the account", default="aws", err=True)
    if name is None and partition is None:
        raise CommandError(
            "without --profile, say --partition aws, or aws-cn for an account in China, or "
            "aws-us-gov for one in GovCloud: a policy for another partition allows nothing"
        )
    if partition is not None and not re.fullmatch(r"aws(-[a-z]+)*", partition):
        raise CommandError(f"a partition is aws, aws-cn, aws-us-gov or the like, not {partition!r}")
    try:
        document = policy(Profile.load(name) if name else None, partition or "")
    except ConfigError as exc:
        raise CommandError(str(exc)) from exc
    click.echo(json.dumps(document, indent=2))
    if (length := len(json.dumps(document, separators=(",", ":")))) > LARGEST_MANAGED_POLICY:
        click.echo(
            f"This policy has {length:,} characters without spaces, and IAM takes managed policies "
            f"of {LARGEST_MANAGED_POLICY:,}. Make it an inline policy of a role, which may have "
            f"10,240, or divide its statements among two managed policies.",
            err=True,
        )
    return 0
