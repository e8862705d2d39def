"""A registry of images on this machine: the program that Debian packages."""

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
def serving(
    directory: Path,
    *,
    users: str = "",
    host: str = "127.0.0.1",
    certificate: tuple[Path, Path] | None = None,
) -> Iterator[str]:
    """Run a registry; yield its address.

    Args:
        directory: For its files. Several registries may have the same content.
        users: Lines of a file of users with hashes of their passwords; empty: everybody may write.
        host: Where it listens. One on all addresses is said to be on the loopback.
        certificate: Files of a certificate and its key, with which it listens on port 443.
    """
    program = shutil.which("docker-registry")
    if program is None:
        pytest.skip("no docker-registry here (Debian's package has it): nowhere to push to")
    port, tls = 443, ""
    if certificate is None:
        with socket.socket() as probe:
            probe.bind((host, 0))
            port = probe.getsockname()[1]
    else:
        tls = f", tls: {{certificate: {certificate[0]}, key: {certificate[1]}}}"
    config = (
        f"version: 0.1\n"
        f"storage: {{filesystem: {{rootdirectory: {directory}/data}}}}\n"
        f"http: {{addr: '{host}:{port}'{tls}}}\n"
    )
    if users:
        (directory / "users").write_text(users)
        config += f"auth: {{htpasswd: {{realm: tests, path: {directory}/users}}}}\n"
    file = directory / f"config-{port}.yml"
    file.write_text(config)
    with open(directory / "log", "ab") as log:
        process = subprocess.Popen([program, "serve", str(file)], stdout=log, stderr=log)
    reached = "127.0.0.1" if host == "0.0.0.0" else host
    try:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            try:
                socket.create_connection((reached, port), timeout=1).close()
                break
            except OSError:
                time.sleep(0.05)
        yield f"{reached}:{port}"
    finally:
        process.terminate()
        process.wait(20)
