"""Emulates that the tagging service of AWS lists deleted resources for hours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cloudexec.testing._aws.backends import ACCOUNT
from cloudexec.testing._aws.faults import Faults
from cloudexec.testing._aws.wire import Call

__all__ = ["Ghosts"]

_DELETING = ("Delete", "Terminate", "Cancel")


class Ghosts:
    """Remembers deleted resources, and lists them while the fault is on.

    Args:
        faults: Says whether deleted resources stay listed.
    """

    def __init__(self, faults: Faults) -> None:
        self._faults = faults
        self._seen: dict[str, dict[str, dict[str, str]]] = {}
        """By region and ARN: the tags."""

    def note(self, call: Call) -> None:
        """Remember all resources before a call that may delete some of them."""
        if call.operation.startswith(_DELETING) and self._faults.keeps_ghosts():
            self._look(call.region)

    def answer(self, call: Call) -> Mapping[str, Any] | None:
        """Answer GetResources with deleted resources; ``None`` leaves the call to moto."""
        if call.operation != "GetResources" or not self._faults.keeps_ghosts():
            return None
        self._look(call.region)
        wanted = call.parameters.get("TagFilters", [])
        return {
            "PaginationToken": "",
            "ResourceTagMappingList": [
                {
                    "ResourceARN": arn,
                    "Tags": [{"Key": key, "Value": value} for key, value in tags.items()],
                }
                for arn, tags in self._seen[call.region].items()
                if all(_fits(each, tags) for each in wanted)
            ],
        }

    def _look(self, region: str) -> None:
        from moto.resourcegroupstaggingapi.models import resourcegroupstaggingapi_backends

        backend: Any = resourcegroupstaggingapi_backends[ACCOUNT][region]
        _, found = backend.get_resources(resources_per_page=100_000, tags_per_page=1_000_000)
        seen = self._seen.setdefault(region, {})
        for each in found:
            # In older versions of moto, it is a mapping.
            arn = each["ResourceARN"] if isinstance(each, Mapping) else each.arn
            tags = each["Tags"] if isinstance(each, Mapping) else each.tags
            seen[arn] = _as_mapping(tags)


def _as_mapping(tags: Any) -> dict[str, str]:
    if isinstance(tags, Mapping):
        return dict(tags)
    return {each["Key"]: each["Value"] for each in tags}


def _fits(wanted: Mapping[str, Any], tags: Mapping[str, str]) -> bool:
    key, values = wanted["Key"], wanted.get("Values", [])
    return key in tags and (not values or tags[key] in values)
