"""Objects that several globals of a script share are shared in tasks, too."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

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
"""


def test_what_globals_share_is_shared_in_tasks(tmp_path: Path) -> None:
    """A model's parameters and its optimizer's, variables of closures, methods of a dictionary."""
    (tmp_path / "program.py").write_text(_PROGRAM)
    done = subprocess.run(
        [sys.executable, "program.py"], cwd=tmp_path, capture_output=True, text=True, timeout=100
    )
    assert done.stdout.splitlines() == [
        "([1.0, 1.0], [[1, 5], [2]], 1, {5: 5}, 'first', 'first')",
        "[([2.0, 2.0], [[1, 5, 6], [2]], 2, {5: 5, 6: 6}, 'first', 'first')]",
        "[[1, 7], 'changed']",
    ], done.stderr[-3000:]
