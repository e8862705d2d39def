"""Nested sampling with ``pool=`` (dynesty): thousands of short maps."""

import dynesty
import numpy as np
from _pool import WORKERS, executor

CENTRE = np.array([0.3, -0.2, 0.5])


def log_likelihood(theta):
    return float(-0.5 * np.sum((theta - CENTRE) ** 2) / 0.05)


def prior(cube):
    return 4.0 * cube - 2.0


if __name__ == "__main__":
    with executor() as pool:
        sampler = dynesty.NestedSampler(
            log_likelihood,
            prior,
            3,
            nlive=120,
            pool=pool,
            queue_size=WORKERS,
            rstate=np.random.default_rng(1),
            sample="rwalk",
        )
        sampler.run_nested(dlogz=0.5, print_progress=False)
    print(f"{sampler.results.logz[-1]:.2f}")
