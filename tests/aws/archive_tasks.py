"""What the tests of archives run on workers, apart from them, as it then needs nothing else."""

from __future__ import annotations

import subprocess
import sys


def surroundings() -> dict[str, str]:
    """Say from where a task and a process that it starts import."""
    import grpc
    import urllib3

    code = "import urllib3; print(urllib3.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=30
    )
    return {
        "grpc": grpc.__file__,
        "grpc compiled": grpc.__cached__,
        "urllib3": urllib3.__file__,
        "subprocess": done.stdout.strip(),
    }
