"""Reads the key of a stack, which its workers get from Secrets Manager."""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable
from typing import Any

from cloudexec._aws.profile import Profile
from cloudexec._errors import LaunchError

__all__ = ["stack_key"]

_KEY_BYTES = 32


async def stack_key(call: Callable[..., Awaitable[Any]], profile: Profile) -> bytes:
    """Read the key that workers and clients of a stack share.

    Args:
        call: Makes a request, as ``AwsClients.call`` does: service, operation and parameters.
        profile: Profile of the stack.

    Raises:
        LaunchError: If the secret does not hold a key.
        AwsError: If the secret cannot be read.
    """
    key = b""
    secret = await call("secretsmanager", "get_secret_value", SecretId=profile.key_secret)
    with contextlib.suppress(KeyError, ValueError):
        key = bytes.fromhex(secret["SecretString"])
    if len(key) != _KEY_BYTES:
        raise LaunchError(
            f"the stack's key cannot be used: {profile.key_secret} does not hold "
            f"{2 * _KEY_BYTES} hexadecimal digits; store such a value in it, or "
            f"`cloudexec down` and `cloudexec up` create it again"
        )
    return key
