"""``cloudexec policy``: print the IAM policy that a person needs who runs executors."""

from __future__ import annotations

import click

from cloudexec.cli._aws_options import ends_well

_HELP = """Print the IAM policy that people need who run executors, and no more than that.

With a profile, the policy names the resources of its stack. Without one, it has patterns for any
stack of cloudexec. People who run `cloudexec up` or `down` need more: they must be allowed to
create and delete what `cloudexec template` contains.
"""


@click.command(
    "policy",
    help=_HELP,
    short_help="Print the IAM policy of people who run executors.",
    context_settings={"max_content_width": 100},
)
@click.option("--profile", "name", metavar="NAME", help="Profile whose resources the policy names.")
@ends_well
def policy_command(name: str | None) -> int:
    """Print it as JSON."""
    import json

    from cloudexec._aws.policy import policy
    from cloudexec._aws.profile import Profile
    from cloudexec._errors import ConfigError
    from cloudexec.cli._errors import CommandError

    try:
        document = policy(Profile.load(name) if name else None)
    except ConfigError as exc:
        raise CommandError(str(exc)) from exc
    click.echo(json.dumps(document, indent=2))
    return 0
