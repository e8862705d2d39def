"""Hyper-parameters of a classifier for handwritten digits, one fit a call.

The data are the 1,797 images of 8 x 8 pixels that scikit-learn ships.
"""

from __future__ import annotations

import functools
from typing import Any

__all__ = ["fit"]


@functools.cache
def _digits() -> tuple[Any, Any]:
    """Load the data once per process, however many fits it does."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    return images / 16.0, labels


def fit(c: float, gamma: float, kernel: str = "rbf") -> dict[str, float]:
    """Fit a support vector machine and score it by five-fold cross-validation.

    Args:
        c: Inverse of the regularisation strength, greater than 0.
        gamma: Width of the kernel, greater than 0.
        kernel: ``"rbf"``, ``"poly"``, ``"sigmoid"`` or ``"linear"``.

    Returns:
        Mean accuracy (0 to 1) and its standard deviation over the folds.
    """
    from sklearn.model_selection import cross_val_score
    from sklearn.svm import SVC

    images, labels = _digits()
    scores = cross_val_score(SVC(C=c, gamma=gamma, kernel=kernel), images, labels, cv=5)
    return {"accuracy": round(float(scores.mean()), 5), "std": round(float(scores.std()), 5)}
