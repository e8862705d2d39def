"""Price an option over many short blocks with ``map`` (numpy)."""

import numpy as np
from _pool import executor


def block(seed):
    rng = np.random.default_rng(seed)
    steps = rng.normal(0.0, 0.2 / np.sqrt(50), (400, 50))
    path = 100 * np.exp(np.cumsum(steps - 0.0004, axis=1))
    return float(np.maximum(path.mean(axis=1) - 100, 0).mean())


if __name__ == "__main__":
    with executor() as pool:
        print(round(float(np.mean(list(pool.map(block, range(4000))))), 3))
