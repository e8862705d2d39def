"""Parses names of images in Amazon ECR, and checks names of repositories."""

from __future__ import annotations

import re
from dataclasses import dataclass

__all__ = ["EcrImage", "is_repository_name"]

_REPOSITORY = r"(?:[a-z0-9]+(?:[._-][a-z0-9]+)*/)*[a-z0-9]+(?:[._-][a-z0-9]+)*"
"""Amazon ECR API Reference, "CreateRepository"."""
_REPOSITORY_LARGEST = 256
_REPOSITORY_LEAST = 2
_IMAGE = re.compile(
    r"(?P<host>(?P<account>\d{12})\."
    r"(?:dkr\.ecr(?:-fips)?\.(?P<region>[a-z0-9-]+)\.(?:amazonaws\.(?:com(?:\.cn)?|eu)"
    r"|(?:c2s|sc2s|csp|cloud)\.[a-z.]+)"
    r"|dkr-ecr(?:-fips)?\.(?P<dual>[a-z0-9-]+)\.on\.(?:aws|amazonwebservices\.com\.cn)))/"
    r"(?P<repository>[^:@]+)(?::(?P<tag>[^@]+))?(?:@(?P<digest>sha256:[0-9a-f]{64}))?"
)
"""Registries have the usual hosts, and others for FIPS and IPv6. Amazon ECR User Guide, "Making
requests to Amazon ECR registries"; AWS General Reference, "Amazon ECR endpoints and quotas"."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EcrImage:
    """An image or a repository in Amazon ECR.

    Attributes:
        host: Host of the registry.
        account: Account of the registry.
        region: Region of the registry.
        repository: Name of the repository.
        tag: Empty if the name has no tag.
        digest: Empty if the name has no digest.
    """

    host: str
    account: str
    region: str
    repository: str
    tag: str = ""
    digest: str = ""

    @classmethod
    def parse(cls, uri: str) -> EcrImage | None:
        """Parse the name of an image or repository; ``None``: it is not in Amazon ECR."""
        found = _IMAGE.fullmatch(uri)
        if found is None:
            return None
        return cls(
            host=found["host"],
            account=found["account"],
            region=found["region"] or found["dual"],
            repository=found["repository"],
            tag=found["tag"] or "",
            digest=found["digest"] or "",
        )

    @property
    def name(self) -> str:
        """The name of the repository with its host."""
        return f"{self.host}/{self.repository}"


def is_repository_name(name: str) -> bool:
    """Return whether Amazon ECR accepts this name for a repository."""
    fits = _REPOSITORY_LEAST <= len(name) <= _REPOSITORY_LARGEST
    return fits and re.fullmatch(_REPOSITORY, name) is not None
