"""Demand and supply -> how many workers to launch."""

from __future__ import annotations

from cloudexec._config import ScalingPolicy

__all__ = ["sizes_to_launch"]


def sizes_to_launch(policy: ScalingPolicy, *, demand: int, active: int, total: int) -> list[int]:
    """Say which workers to launch, as slots each.

    Args:
        policy: The limits.
        demand: Tasks waiting or running.
        active: Slots that take tasks, those starting included.
        total: The same plus slots of workers that drain: together they stay within ``max_slots``.

    Returns:
        Slots of each worker to launch, ``policy.slots_per_worker`` or the rest up to the limit.
    """
    wanted = min(policy.max_slots, max(demand, policy.min_slots))
    room = policy.max_slots - total
    missing = wanted - active
    sizes = []
    while missing > 0 and room > 0:
        size = min(policy.slots_per_worker, room)
        sizes.append(size)
        missing -= size
        room -= size
    return sizes
