"""What the tests of launchers run on workers.

Apart from the tests, so that workers import nothing else: pytest and boto3 take them half a second.
"""

from __future__ import annotations

import os
import time
from pathlib import Path


def square(number: int) -> int:
    return number * number


def slow_square(number: int, seconds: float = 0.05) -> int:
    time.sleep(seconds)
    return number * number


def fill(mib: int, seconds: float = 0.5) -> int:
    """Use memory; return how much, in MiB."""
    block = bytearray(mib * 2**20)
    for at in range(0, len(block), 4096):
        block[at] = 1
    time.sleep(seconds)
    return len(block) // 2**20


def take_memory(mib: int, seconds: float = 5.0) -> int:
    """Use memory; return how much, in bytes."""
    return fill(mib, seconds) * 2**20


def wait_for_file_or_die(_: str) -> str:
    """Block in the first attempt of a worker's job, return in the second."""
    if os.environ["AWS_BATCH_JOB_ATTEMPT"] == "1":
        time.sleep(60)
    return "second"


def run_once(path: Path, seconds: float) -> int:
    """Leave a mark for each time that this runs; return which worker it is."""
    with path.open("a") as file:
        file.write("x")
    time.sleep(seconds)
    return os.getppid()


def job_id_of_worker(_: int) -> str:
    return os.environ["AWS_BATCH_JOB_ID"]


def queue_of_worker(_: int = 0) -> str:
    return os.environ["AWS_BATCH_JQ_NAME"]


def slow_queue_of_worker(seconds: float) -> str:
    time.sleep(seconds)
    return queue_of_worker()


def wait_on_spot() -> str:
    queue = queue_of_worker()
    if queue.startswith("spot"):
        time.sleep(60)
    return queue


def size_of_worker() -> str:
    return os.environ.get("CUDA_VISIBLE_DEVICES", "none")
