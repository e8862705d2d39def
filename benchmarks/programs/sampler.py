"""An ensemble sampler with ``pool=`` (emcee): two short maps per step."""

import emcee
import numpy as np
from _pool import executor

RNG = np.random.default_rng(5)
X = np.sort(RNG.uniform(0, 10, 400))
Y = 0.7 * X + 2.0 + RNG.normal(0, 0.5, 400)


def log_probability(theta):
    slope, offset, log_noise = theta
    variance = np.exp(2 * log_noise)
    for _ in range(20):
        value = -0.5 * np.sum((Y - slope * X - offset) ** 2 / variance + np.log(variance))
    return value if -5 < log_noise < 5 else -np.inf


if __name__ == "__main__":
    np.random.seed(3)
    start = np.array([0.5, 1.0, 0.0]) + 1e-3 * np.random.randn(32, 3)
    with executor() as pool:
        sampler = emcee.EnsembleSampler(32, 3, log_probability, pool=pool)
        sampler.run_mcmc(start, 150)
    print(np.round(sampler.get_chain(flat=True, discard=75).mean(axis=0), 3))
