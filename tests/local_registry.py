"""A registry of images on the loopback: the program that Debian packages."""

from __future__ import annotations

import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

__all__ = ["PASSWORD", "PASSWORD_HASH", "serving"]

PASSWORD = "a password of twelve hours"
PASSWORD_HASH = "$2b$04$NsjTVJVqaZ0nU.wlZ9jJqOTmm8qqWXneLsqRgtrRVDurvwz7ChkEu"


@contextmanager
def serving(directory: Path, *, users: str = "") -> Iterator[str]:
    """Run a registry on the loopback; yield its address."""
    program = shutil.which("docker-registry")
    if program is None:
        pytest.skip("no docker-registry here (Debian's package has it): nowhere to push to")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    config = (
        f"version: 0.1\n"
        f"storage: {{filesystem: {{rootdirectory: {directory}/data}}}}\n"
        f"http: {{addr: '127.0.0.1:{port}'}}\n"
    )
    if users:
        (directory / "users").write_text(users)
        config += f"auth: {{htpasswd: {{realm: tests, path: {directory}/users}}}}\n"
    (directory / "config.yml").write_text(config)
    with open(directory / "log", "wb") as log:
        process = subprocess.Popen(
            [program, "serve", str(directory / "config.yml")], stdout=log, stderr=log
        )
    try:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                time.sleep(0.05)
        yield f"127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(20)
