"""Makes credentials of jobs' roles, and finds what the roles' policies allow."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from typing import Any

from cloudexec.testing._aws.backends import ACCOUNT
from cloudexec.testing._aws.permissions import Permissions

__all__ = ["RoleKeys"]

_CREDENTIAL = re.compile(r"Credential=([A-Z0-9]+)/")


class RoleKeys:
    """Access keys, each of which belongs to a role.

    A role without an inline policy, which many tests use, may do everything.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._roles: dict[str, str] = {}

    def key_of(self, role: str) -> str:
        """Return the access key of the role with this ARN."""
        key = f"ASIA{hashlib.sha256(role.encode()).hexdigest()[:16].upper()}"
        with self._lock:
            self._roles[key] = role
        return key

    def permissions_of(self, authorization: str) -> Permissions | None:
        """Return the permissions of the role whose key has signed a request.

        Args:
            authorization: The request's header.

        Returns:
            ``None`` if the key is not a role's, or if the role may do everything.
        """
        found = _CREDENTIAL.search(authorization)
        with self._lock:
            role = self._roles.get(found[1]) if found is not None else None
        statements = _statements(role) if role else []
        if not statements:
            return None
        return Permissions(
            policy={"Statement": statements},
            passed_to="ecs-tasks.amazonaws.com",
            submit_names_jobs=True,
        )


def _statements(arn: str) -> list[dict[str, Any]]:
    """Return the statements of a role's inline policies."""
    from moto.iam.models import iam_backends

    roles = iam_backends[ACCOUNT]["aws"].roles.values()
    documents: list[Any] = [
        document for role in roles if role.arn == arn for document in role.policies.values()
    ]
    parsed = [json.loads(each) if isinstance(each, str) else each for each in documents]
    return [statement for each in parsed for statement in each["Statement"]]
