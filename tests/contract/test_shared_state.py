"""Objects that several globals of a script share are shared in tasks, too."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

_PROGRAM = """
import numpy as np
from cloudexec import BatchExecutor

class Model:
    def __init__(self):
        self.weights, self.layers = np.zeros(2), [[1], [2]]

class Optimizer:
    def __init__(self, parameters):
        self.parameters = parameters

    def step(self):
        for each in self.parameters:
            each += 1

def counter():
    count, log = 0, []
    def add():
        nonlocal count
        count += 1
    def read():
        return count
    return add, read

def cached():
    cache = {}
    def decorate(function):
        def wrapper(x):
            cache.setdefault(x, function(x))
            return cache[x]
        return wrapper
    return decorate

model = Model()
optimizer, layers = Optimizer([model.weights]), model.layers
add, read = counter()
remember = cached()
table = {}
put = table.setdefault

@remember
def first(x):
    return "first"

@remember
def second(x):
    return "second"

class Job:
    created, model, cache = 0, None, {}

    def __init__(self):
        Job.created += 1

    def run(self):
        if Job.model is None:
            Job.model = ["loaded"]
        Job.model.append(1)
        self.cache[len(self.cache)] = 1
        return Job.created, len(Job.model), len(self.cache)

def train(x):
    optimizer.step()
    layers[0].append(x)
    add()
    put(x, x)
    return model.weights.tolist(), model.layers, read(), table, first(x), second(x)

if __name__ == "__main__":
    with BatchExecutor(1) as executor:
        print(executor.submit(train, 5).result())
        print(list(executor.map(train, [6])))
        model.layers[1] = "changed"
        print(executor.submit(train, 7).result()[1])
        print([executor.submit(Job().run).result() for _ in range(3)])
"""


def test_what_globals_share_is_shared_in_tasks(tmp_path: Path) -> None:
    """A model's parameters and its optimizer's, variables of closures, methods of a dictionary."""
    assert _run(tmp_path, _PROGRAM) == [
        "([1.0, 1.0], [[1, 5], [2]], 1, {5: 5}, 'first', 'first')",
        "[([2.0, 2.0], [[1, 5, 6], [2]], 2, {5: 5, 6: 6}, 'first', 'first')]",
        "[[1, 7], 'changed']",
        "[(1, 2, 1), (2, 3, 2), (3, 4, 3)]",
    ]


_BOUND = """
from functools import partial
import numpy as np
from cloudexec import BatchExecutor

kept = []

class Counter:
    count = 0

    def __call__(self, x):
        self.count += 1
        return self.count

    def step(self, x):
        return self(x)

def add(array, x):
    array += x
    return float(array[0])

def keep(array, x):
    kept.append(array)
    array[1] += x
    return [float(each[1]) for each in kept]

def where(array, x):
    return array.ctypes.data

def append(items, *, x, to):
    to.append(x)
    return len(to)

if __name__ == "__main__":
    large = np.zeros(200_000)
    mapped = np.zeros(1_000_000)
    with BatchExecutor(1) as executor:
        print(list(executor.map(Counter(), range(3))), list(executor.map(Counter().step, range(3))))
        print(list(executor.map(Counter().step, range(4), chunksize=2)))
        print(list(executor.map(partial(append, x=1, to=[]), range(3))))
        for array in np.zeros(3), large, mapped:
            print(list(executor.map(partial(add, array), [1, 1, 1])))
        print(list(executor.map(partial(keep, large), range(3))))
        print(len(set(executor.map(partial(where, mapped), range(5)))))
"""


def test_no_call_of_a_map_sees_what_another_one_has_changed_in_bound_objects(
    tmp_path: Path,
) -> None:
    """A process pool pickles the callable for each call, or for each chunk of calls."""
    assert _run(tmp_path, _BOUND)[:-1] == [
        "[1, 1, 1] [1, 1, 1]",
        "[1, 2, 1, 2]",
        "[1, 1, 1]",
        *3 * ["[1.0, 1.0, 1.0]"],
        "[[0.0], [0.0, 1.0], [0.0, 1.0, 2.0]]",
    ]


@pytest.mark.skipif(not os.path.exists("/proc/self/pagemap"), reason="looks at its own pages")
def test_memory_that_no_call_of_a_map_has_written_to_is_not_mapped_again(tmp_path: Path) -> None:
    assert _run(tmp_path, _BOUND)[-1] == "1"


def _run(tmp_path: Path, program: str) -> list[str]:
    (tmp_path / "program.py").write_text(program)
    done = subprocess.run(
        [sys.executable, "program.py"], cwd=tmp_path, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()
