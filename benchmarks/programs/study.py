"""A study that asks, runs two trials at a time, and tells (optuna)."""

from concurrent.futures import FIRST_COMPLETED, wait

import optuna
from _pool import WORKERS, executor
from sklearn.datasets import load_wine
from sklearn.model_selection import cross_val_score
from sklearn.svm import SVC


def objective(c, gamma):
    x, y = load_wine(return_X_y=True)
    return float(cross_val_score(SVC(C=c, gamma=gamma), x, y, cv=5).mean())


if __name__ == "__main__":
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        direction="maximize", sampler=optuna.samplers.TPESampler(seed=1, constant_liar=True)
    )
    running = {}
    with executor() as pool:
        for _ in range(60):
            trial = study.ask()
            c = trial.suggest_float("c", 1e-3, 1e3, log=True)
            gamma = trial.suggest_float("gamma", 1e-6, 1.0, log=True)
            running[pool.submit(objective, c, gamma)] = trial
            while len(running) >= WORKERS:
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    study.tell(running.pop(future), future.result())
        for future, trial in running.items():
            study.tell(trial, future.result())
    print(len(study.trials), study.best_value > 0.6)
