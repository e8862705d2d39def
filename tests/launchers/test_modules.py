"""The user's own modules reach workers on other machines."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import zipfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest

from cloudexec import Batch, PayloadTooLargeError
from cloudexec._modules import local_modules, pack_modules

SCRIPT = """
import helper
from mine.deep import inner
from cloudexec import Batch, BatchExecutor, PayloadError

def lazily(_):
    import mine.later
    return mine.later.VALUE, open(mine.later.__file__.replace("later.py", "data.txt")).read()

if __name__ == "__main__":
    for modules in (True, ["mine"]):
        batch = Batch(queue=QUEUE, job_role=JOB, execution_role=EXECUTION, image="x",
                      region=REGION, modules=modules)
        with BatchExecutor(1, launcher=batch, output="off") as executor:
            try:
                print(executor.submit(helper.double, 21).result())
            except PayloadError as exc:
                print("No module named 'helper'" in str(exc))
            print(executor.submit(inner.Thing(3).value).result())
            print(*executor.submit(lazily, 0).result())
            back = executor.submit(inner.Thing, 5).result()
            print(type(back) is inner.Thing)
"""


def test_neighbours_of_a_script_are_importable_there(
    aws: Any, launcher: Callable[..., Batch], tmp_path: Path
) -> None:
    """Modules and packages beside it, what they import later, and small files in them."""
    batch = launcher()
    (tmp_path / "helper.py").write_text("def double(n):\n    return 2 * n\n")
    deep = tmp_path / "mine" / "deep"
    deep.mkdir(parents=True)
    (tmp_path / "mine" / "__init__.py").write_text("")
    (tmp_path / "mine" / "later.py").write_text("VALUE = 7\n")
    (tmp_path / "mine" / "data.txt").write_text("data")
    (deep / "__init__.py").write_text("")
    (deep / "inner.py").write_text(
        "class Thing:\n    def __init__(self, n):\n        self.n = n\n"
        "    def value(self):\n        return self.n\n"
    )
    names = {
        "QUEUE": batch.queue,
        "JOB": batch.job_role,
        "EXECUTION": batch.execution_role,
        "REGION": batch.region,
    }
    settings = "\n".join(f"{name} = {value!r}" for name, value in names.items())
    (tmp_path / "script.py").write_text(settings + textwrap.dedent(SCRIPT))
    root = Path(__file__).parent.parent.parent
    done = subprocess.run(
        [sys.executable, "script.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stdout.split() == ["42", "3", "7", "data", "True", "True", "3", "7", "data", "True"]


def test_what_is_installed_is_not_sent() -> None:
    """The image has it."""
    names = {name.partition("/")[0].removesuffix(".py") for name in local_modules()}
    assert not names & {"numpy", "grpc", "json", "pytest", "cloudexec", "__main__"}
    assert Path(__file__).stem in names


def test_the_same_files_make_the_same_archive(tmp_path: Path) -> None:
    """Times do not count."""
    path = tmp_path / "a.py"
    path.write_text("A = 1\n")
    first = pack_modules({"a.py": str(path)})
    os.utime(path, (0, 0))
    assert pack_modules({"a.py": str(path)}) == first
    path.write_text("A = 2\n")
    assert pack_modules({"a.py": str(path)}) != first
    path.write_text("A = 1\n")
    assert pack_modules({"a.py": str(path)}) == first
    with zipfile.ZipFile(BytesIO(first)) as archive:
        assert archive.read("a.py") == b"A = 1\n"


def test_too_much_is_refused_with_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error names the file at which the limit was reached."""
    monkeypatch.setattr("cloudexec._modules.MODULES_LIMIT_BYTES", 10)
    path = tmp_path / "a.py"
    path.write_text("A = 1\n" * 10)
    with pytest.raises(PayloadTooLargeError, match=r"a\.py.*modules=False") as caught:
        pack_modules({"a.py": str(path)})
    assert caught.value.limit_bytes == 10
