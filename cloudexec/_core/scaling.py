"""Demand and supply -> how many workers to launch."""

from __future__ import annotations

__all__ = ["sizes_to_launch"]


def sizes_to_launch(missing: int, room: int, slots_per_worker: int) -> list[int]:
    """Say which workers to launch, as slots each.

    Args:
        missing: Slots that tasks would have use for, beyond those there are or that start.
        room: Slots that may be added: all together, those that drain included, stay within
            ``max_slots``.
        slots_per_worker: Of one worker.

    Returns:
        Slots of each worker to launch, ``slots_per_worker`` or the rest up to the limit.
    """
    sizes = []
    while missing > 0 and room > 0:
        size = min(slots_per_worker, room)
        sizes.append(size)
        missing -= size
        room -= size
    return sizes
