"""Estimate pi, one ``submit`` per block, taken as they complete (no library)."""

import random
from concurrent.futures import as_completed

from _pool import executor


def inside(seed):
    draw = random.Random(seed).random
    return sum(draw() ** 2 + draw() ** 2 < 1.0 for _ in range(100_000))


if __name__ == "__main__":
    with executor() as pool:
        futures = [pool.submit(inside, seed) for seed in range(80)]
        hits = sum(future.result() for future in as_completed(futures))
    print(round(4 * hits / 8_000_000, 4))
