"""Adds to moto's networks a default VPC with a route to the internet, and zones of all kinds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cloudexec.testing._aws.backends import ACCOUNT

__all__ = ["Networks"]


class Networks:
    """Completes moto's networks, those of a region when it is first used.

    Args:
        region: The region that has further zones.
        zones: By name: the ids and types of these zones.
    """

    def __init__(self, region: str, zones: Mapping[str, tuple[str, str]]) -> None:
        self._region = region
        self._zones = dict(zones)
        self._ready: set[str] = set()

    def prepare(self, region: str) -> None:
        """Complete a region's networks."""
        if region in self._ready:
            return
        self._ready.add(region)
        from moto.ec2.models import ec2_backends

        backend: Any = ec2_backends[ACCOUNT][region]
        for vpc in list(backend.vpcs.values()):
            if vpc.is_default:
                # "Default VPC components", Amazon VPC User Guide.
                gateway = backend.create_internet_gateway()
                backend.attach_internet_gateway(gateway.id, vpc.id)
                table = next(
                    each
                    for each in backend.route_tables.values()
                    if each.vpc_id == vpc.id and each.main_association_id is not None
                )
                backend.create_route(table.id, "0.0.0.0/0", gateway_id=gateway.id)
        if region == self._region:
            self._add_zones()

    def _add_zones(self) -> None:
        # The zones are added after the back end was made, because it would give the default VPC a
        # subnet in each zone that it knows.
        from moto.ec2.models.availability_zones_and_regions import RegionsAndZonesBackend, Zone

        known = RegionsAndZonesBackend.zones.setdefault(self._region, [])
        for name, (zone_id, kind) in self._zones.items():
            known.append(Zone(name, self._region, zone_id, kind))

    def close(self) -> None:
        """Remove the zones, because moto's list is not reset with its state."""
        from moto.ec2.models.availability_zones_and_regions import RegionsAndZonesBackend

        known = RegionsAndZonesBackend.zones.get(self._region, [])
        known[:] = [zone for zone in known if zone.name not in self._zones]
