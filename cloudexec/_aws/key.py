"""The key of a stack, which its workers have from Secrets Manager."""

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
        call: Makes a request: service, operation and parameters, as ``AwsClients.call`` does.
        profile: The stack's.

    Raises:
        LaunchError: If what the secret holds is no key.
        AwsError: If it cannot be read.
    """
    key = b""
    secret = await call("secretsmanager", "get_secret_value", SecretId=profile.key_secret)
    with contextlib.suppress(KeyError, ValueError):
        key = bytes.fromhex(secret["SecretString"])
    if len(key) != _KEY_BYTES:
        raise LaunchError(
            f"the stack's key cannot be used: {profile.key_secret} does not hold "
            f"{2 * _KEY_BYTES} hexadecimal digits; put such a value into it, or "
            f"`cloudexec down` and `cloudexec up` make it anew"
        )
    return key
