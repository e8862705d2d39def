"""Differential evolution with ``workers=`` (scipy): a short map per generation."""

import numpy as np
from _pool import executor
from scipy.integrate import solve_ivp
from scipy.optimize import differential_evolution

TIMES = np.linspace(0, 10, 60)


def oscillate(stiffness, damping):
    def change(t, state):
        return [state[1], -stiffness * state[0] - damping * state[1]]

    return solve_ivp(change, (0, 10), [1.0, 0.0], t_eval=TIMES).y[0]


SEEN = oscillate(3.0, 0.4)


def misfit(parameters):
    return float(((oscillate(*parameters) - SEEN) ** 2).sum())


if __name__ == "__main__":
    with executor() as pool:
        best = differential_evolution(
            misfit,
            [(0.5, 8.0), (0.0, 2.0)],
            workers=pool.map,
            updating="deferred",
            seed=1,
            maxiter=25,
            popsize=12,
            polish=False,
        )
    print(f"{best.x[0]:.3f} {best.x[1]:.3f}")
