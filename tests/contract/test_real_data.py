"""What people do with it: models fitted over one array, and a graph from loading to merging."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from cloudexec import BatchExecutor, Local, run, stage

np = pytest.importorskip("numpy")
pytest.importorskip("sklearn", reason="the extra 'examples' is not installed")

CONFIGURATIONS = [(alpha, seed) for alpha in (0.01, 0.1, 1.0, 10.0, 100.0) for seed in range(100)]


def score(features: Any, target: Any, alpha: float, seed: int) -> float:
    from sklearn.linear_model import Ridge

    rng = np.random.default_rng(seed)
    chosen = rng.random(len(target)) < 0.7
    model = Ridge(alpha=alpha).fit(features[chosen], target[chosen])
    return float(model.score(features[~chosen], target[~chosen]))


def make_data() -> tuple[Any, Any]:
    rng = np.random.default_rng(7)
    features = rng.normal(size=(10_000, 20))
    return features, features @ rng.normal(size=20) + rng.normal(size=10_000)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("where", ["here", "over the wire"])
def test_500_configurations_over_one_array(where: str) -> None:
    """The array goes to each worker once, however it is passed, and the scores are right."""
    features, target = make_data()
    over_wire = where == "over the wire"
    options: dict[str, Any] = {"listen": "127.0.0.1:0"} if over_wire else {}
    with BatchExecutor(2, launcher=Local(slots_per_worker=1), **options) as executor:
        handle = executor.put(features)
        futures = [
            executor.submit(score, features if i % 2 else handle, target, *configuration)
            for i, configuration in enumerate(CONFIGURATIONS)
        ]
        scores = [future.result() for future in futures]
        sent = executor.stats().bytes_sent
    for i in (0, 123, 499):
        assert scores[i] == pytest.approx(score(features, target, *CONFIGURATIONS[i]))
    if over_wire:
        assert sent < 2 * (features.nbytes + target.nbytes) + 200 * len(CONFIGURATIONS) + 500_000


@stage
def load(path: str) -> Any:
    with open(path, newline="") as file:
        return np.array([[float(each) for each in row] for row in csv.reader(file)])


@stage
def split(rows: Any, count: int) -> list[Any]:
    return list(np.array_split(rows, count))


@stage
def pick(parts: list[Any], index: int) -> Any:
    return parts[index]


@stage(retries=1)
def fit(part: Any) -> Any:
    from sklearn.linear_model import LinearRegression

    return LinearRegression().fit(part[:, :-1], part[:, -1]).coef_


@stage
def merge(coefficients: Sequence[Any]) -> Any:
    return np.mean(coefficients, axis=0)


@pytest.mark.timeout(60)
def test_a_graph_that_loads_splits_fits_and_merges(tmp_path: Path) -> None:
    """Arrays pass from stage to stage."""
    rng = np.random.default_rng(3)
    features = rng.normal(size=(8000, 5))
    true = np.arange(1.0, 6.0)
    rows = np.column_stack([features, features @ true])
    path = tmp_path / "data.csv"
    np.savetxt(path, rows, delimiter=",")
    parts = split(load(str(path)), 8)
    merged = merge([fit(pick(parts, index)) for index in range(8)])
    with BatchExecutor(2) as executor:
        assert run(merged, executor) == pytest.approx(true, abs=1e-6)
