"""``cloudexec relay``: join workers with clients that nothing can dial."""

from __future__ import annotations

import asyncio

import click

from cloudexec.cli._aws_options import ends_well, profile_option


@click.command("relay", short_help="Join workers with clients that are behind NAT.")
@click.option(
    "--listen",
    default="0.0.0.0:443",
    show_default=True,
    metavar="HOST:PORT",
    help="Where clients and workers reach the relay; port 0: any free one.",
)
@click.option(
    "--idle",
    type=click.FloatRange(min=1.0),
    default=600.0,
    show_default=True,
    metavar="SECONDS",
    help="End when nobody has been connected for so long.",
)
@profile_option("Profile of the stack whose clients and workers are joined.", default="default")
@ends_well
def relay_command(listen: str, idle: float, profile: str) -> int:
    """Run a relay on this machine, which both your machine and the workers can reach.

    It joins the connections of workers with those of their clients and passes bytes on, which it
    cannot read: TLS goes from worker to client. It reads the stack's key from Secrets Manager, to
    check who belongs to the stack, and ends when nobody needs it any more.

    A script uses it with Batch(relay="HOST:PORT"), or with CLOUDEXEC_RELAY=HOST:PORT.
    """
    from cloudexec._relay.program import run_relay

    return run_relay(listen, asyncio.run(_key(profile)), idle)


async def _key(name: str) -> bytes:
    from cloudexec._aws.clients import AwsClients
    from cloudexec._aws.key import stack_key
    from cloudexec._aws.profile import Profile

    profile = Profile.load(name)
    async with AwsClients(profile.region) as clients:
        return await stack_key(clients.call, profile)
