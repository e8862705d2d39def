"""Enrolment: each side proves that it knows the shared key before the other unpickles a byte.

Worker and server each send a nonce (random bytes that are used once). Each answers with an
HMAC-SHA256 under the shared key over its role, both nonces, the executor's id and the worker's
identity. The key itself is never sent, and a recorded proof is useless with other nonces.
"""

from __future__ import annotations

import hashlib
import hmac
import platform
import secrets

import cloudpickle

__all__ = [
    "WIRE_VERSION",
    "make_nonce",
    "proof",
    "proves",
    "python_version",
    "session_key",
    "session_name",
    "versions_mismatch",
]

WIRE_VERSION = 1
"""Version of the messages; increased when older peers would misunderstand a change."""
NONCE_BYTES = 32


def make_nonce() -> bytes:
    """Return fresh random bytes."""
    return secrets.token_bytes(NONCE_BYTES)


def python_version() -> str:
    """Return Python's major and minor version, as code objects in payloads depend on these."""
    major, minor, _ = platform.python_version_tuple()
    return f"{major}.{minor}"


def proof(
    key: bytes, role: str, executor_id: str, identity: str, worker_nonce: bytes, server_nonce: bytes
) -> bytes:
    """Compute one side's proof.

    Args:
        key: The shared key.
        role: ``"server"`` or ``"worker"``, so that neither side can send back the other's proof.
        executor_id: The executor.
        identity: The worker.
        worker_nonce: The worker's random bytes.
        server_nonce: The server's random bytes.
    """
    mac = hmac.new(key, digestmod=hashlib.sha256)
    for part in (
        role.encode(),
        executor_id.encode(),
        identity.encode(),
        worker_nonce,
        server_nonce,
    ):
        mac.update(len(part).to_bytes(4, "little"))
        mac.update(part)
    return mac.digest()


def session_name(token: bytes) -> bytes:
    """Return a name for a session that does not reveal its token."""
    return hashlib.sha256(b"cloudexec session\0" + token).digest()


def session_key(key: bytes, token: bytes) -> bytes:
    """Return the key that both sides prove to know when a worker resumes its session."""
    return hmac.digest(key, b"cloudexec session\0" + token, "sha256")


def proves(mac: bytes, expected: bytes) -> bool:
    """Compare two proofs in constant time."""
    return hmac.compare_digest(mac, expected)


def versions_mismatch(*, wire: int, python: str, pickle: str) -> str | None:
    """Return why a worker with these versions cannot work for this client, or ``None``."""
    if wire != WIRE_VERSION:
        return (
            f"the worker speaks wire version {wire}, the client {WIRE_VERSION}: "
            f"install the same cloudexec release on both sides"
        )
    if python != python_version():
        return (
            f"the worker runs Python {python}, the client Python {python_version()}: functions "
            f"cannot travel between them; use a worker image for Python {python_version()}"
        )
    if pickle.split(".")[0] != cloudpickle.__version__.split(".")[0]:
        return (
            f"the worker has cloudpickle {pickle}, the client {cloudpickle.__version__}: "
            f"install the same major version on both sides"
        )
    return None
