"""Bootstrap the median over one large array that each task takes (numpy)."""

from functools import partial

import numpy as np
from _pool import executor


def resample(data, seed):
    rng = np.random.default_rng(seed)
    return float(np.median(data[rng.integers(0, len(data), 20_000)]))


if __name__ == "__main__":
    data = np.random.default_rng(0).lognormal(size=4_000_000)
    with executor() as pool:
        medians = list(pool.map(partial(resample, data), range(100)))
    print(round(float(np.std(medians)), 4))
