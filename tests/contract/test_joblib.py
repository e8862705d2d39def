"""joblib, and scikit-learn with it, on an executor."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import joblib
import numpy as np
import pytest

import cloudexec.joblib
from cloudexec import BatchExecutor


@pytest.fixture(scope="module", autouse=True)
def backend() -> Iterator[None]:
    with BatchExecutor(2) as executor:
        with joblib.parallel_config(backend="cloudexec", n_jobs=2, executor=executor):
            yield


def test_scikit_learn_runs_on_it() -> None:
    """With the results that it has without."""
    # Here, as workers import this file for the tests below.
    from sklearn.datasets import make_classification
    from sklearn.ensemble import RandomForestClassifier
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV, cross_val_score

    x, y = make_classification(200, 8, random_state=0)
    forest = RandomForestClassifier(4, random_state=0, max_depth=3)
    search = GridSearchCV(LogisticRegression(), {"C": [0.1, 1.0]}, n_jobs=2, cv=3)

    def results() -> list[float]:
        scores = cross_val_score(LogisticRegression(), x, y, cv=3)
        trees = forest.fit(x, y).estimators_
        grid = search.fit(x, y).cv_results_["mean_test_score"]
        return [*scores, *(tree.score(x, y) for tree in trees), *grid]

    here = results()
    with joblib.parallel_config(backend="sequential"):
        assert here == pytest.approx(results())


def _process(_: Any = None) -> tuple[int, int]:
    return os.getppid(), os.getpid()


def _sum(array: Any, n: int) -> float:
    array[0] = 0.0  # a copy of this task's own
    return float(array.sum()) + n


def test_an_array_crosses_once(backend: None) -> None:
    array = np.ones(1_000_000)
    with BatchExecutor(2) as executor:
        with joblib.parallel_config(backend="cloudexec", executor=executor):
            results = joblib.Parallel()(joblib.delayed(_sum)(array, n) for n in range(20))
        assert results == [999_999.0 + n for n in range(20)]
        assert executor.stats().bytes_sent < 2 * array.nbytes
    assert array[0] == 1.0


def _nested(n: int) -> tuple[int, list[tuple[int, int]]]:
    return os.getpid(), joblib.Parallel(n_jobs=2)(joblib.delayed(_process)(i) for i in range(4))


def test_calls_inside_of_calls_run_in_their_task() -> None:
    for pid, inner in joblib.Parallel()(joblib.delayed(_nested)(n) for n in range(2)):
        assert pid != os.getpid()
        assert {each for _, each in inner} == {pid}


def _fail(n: int) -> int:
    if n == 3:
        raise ValueError("n is 3")
    return n


def test_errors_are_raised_and_the_next_call_goes_on() -> None:
    with pytest.raises(ValueError, match="n is 3"):
        joblib.Parallel()(joblib.delayed(_fail)(n) for n in range(10))
    assert joblib.Parallel()(joblib.delayed(_fail)(n) for n in range(3)) == [0, 1, 2]
    found = joblib.Parallel(return_as="generator")(joblib.delayed(abs)(-n) for n in range(5))
    assert list(found) == list(range(5))


def _threads() -> str | None:
    return os.environ.get("OMP_NUM_THREADS")


def test_an_executor_is_kept_for_calls_with_the_same_settings() -> None:
    """And ends when one with others is made; settings are for the executor."""
    with joblib.parallel_config(
        backend="cloudexec", n_jobs=2, idle_timeout=None, inner_max_num_threads=3
    ):
        first = joblib.Parallel()(joblib.delayed(_process)() for _ in range(4))
        again = joblib.Parallel()(joblib.delayed(_process)() for _ in range(4))
        assert {zygote for zygote, _ in first} == {zygote for zygote, _ in again}
        assert joblib.Parallel()(joblib.delayed(_threads)() for _ in range(2)) == ["3", "3"]
        (kept,) = cloudexec.joblib._executors.values()
    with joblib.parallel_config(backend="cloudexec", n_jobs=3, retries=0):
        assert joblib.effective_n_jobs(-1) == len(os.sched_getaffinity(0))
        joblib.Parallel()(joblib.delayed(_process)() for _ in range(4))
    (other,) = cloudexec.joblib._executors.values()
    assert other is not kept
    assert kept.executor._submitter.is_shut
    other.executor.shutdown()
