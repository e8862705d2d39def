"""``cloudexec relay``: connect workers with clients that accept no connections from outside."""

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
    help="Address on which the relay listens for clients and workers; port 0 means any free port.",
)
@click.option(
    "--idle",
    type=click.FloatRange(min=1.0),
    default=600.0,
    show_default=True,
    metavar="SECONDS",
    help="End after so many seconds in which no client and no worker was connected.",
)
@profile_option("Profile of the stack whose clients and workers are joined.", default="default")
@ends_well
def relay_command(listen: str, idle: float, profile: str) -> int:
    """Run a relay on this machine, which both your machine and the workers must be able to reach.

    The relay joins the connections of workers with those of their clients, and passes bytes on. It
    cannot read them, because TLS protects them between worker and client. It reads the stack's key
    from Secrets Manager, to check who belongs to the stack, and ends when nobody uses it any more.

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
