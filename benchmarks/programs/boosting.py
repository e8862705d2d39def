"""Sweep over the depth and learning rate of a boosted forest (scikit-learn)."""

import itertools

from _pool import executor
from sklearn.datasets import make_classification
from sklearn.ensemble import GradientBoostingClassifier
from sklearn.model_selection import cross_val_score


def score(depth, rate):
    x, y = make_classification(600, 20, random_state=0)
    model = GradientBoostingClassifier(max_depth=depth, learning_rate=rate, random_state=0)
    return float(cross_val_score(model, x, y, cv=3).mean())


if __name__ == "__main__":
    grid = list(itertools.product((1, 2, 3, 4), (0.02, 0.05, 0.1, 0.2, 0.4)))
    with executor() as pool:
        scores = list(pool.map(score, *zip(*grid, strict=True)))
    print(f"{max(scores):.4f}")
