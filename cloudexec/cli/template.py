"""``cloudexec template``: print the CloudFormation template that ``cloudexec up`` deploys."""

from __future__ import annotations

import click

from cloudexec.cli._aws_options import ends_well

_HELP = """Print the CloudFormation template that `cloudexec up` deploys.

Use this to review the template, or to deploy it by hand. If the stack is named cloudexec-NAME,
`cloudexec up --name NAME` finds it, has nothing to change, and writes the profile.

\b
Example:
  cloudexec template > cloudexec.json
  aws cloudformation deploy --template-file cloudexec.json --stack-name cloudexec-default \\
      --capabilities CAPABILITY_IAM --parameter-overrides VpcId=vpc-1 SubnetIds=subnet-1,subnet-2
"""


@click.command(
    "template",
    help=_HELP,
    short_help="Print the template that `cloudexec up` deploys.",
    context_settings={"max_content_width": 100},
)
@ends_well
def template_command() -> int:
    """Print the template as JSON."""
    from cloudexec._aws.template import template_text

    click.echo(template_text(), nl=False)
    return 0
