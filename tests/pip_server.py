"""Runs pip in copies of one process that has imported it.

The import takes most of the time of most runs. ``serve`` is that process; this file, run as a
program with the address of its socket and pip's arguments, is what takes the place of ``pip``.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_HEAD = struct.Struct("!I")


@contextmanager
def pip_served(folder: Path) -> Iterator[tuple[str, ...]]:
    """Start the process; yield the command that stands for pip."""
    address = folder / "pip.sock"
    with subprocess.Popen(
        [sys.executable, __file__, "--serve", str(address)],
        stdin=subprocess.PIPE,  # it ends with this
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": ""},
    ) as process:
        try:
            until = time.monotonic() + 60
            while not address.exists():
                assert process.poll() is None, f"the server of pip ended with {process.returncode}"
                assert time.monotonic() < until, "the server of pip does not start"
                time.sleep(0.01)
            yield (sys.executable, "-I", "-S", __file__, str(address))
        finally:
            process.kill()


def _ask(address: str, arguments: list[str]) -> int:
    """Have pip run with what this process has; return its exit code."""
    request = json.dumps([arguments, os.getcwd(), dict(os.environ)]).encode()
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(address)
        socket.send_fds(connection, [_HEAD.pack(len(request))], [0, 1, 2])
        connection.sendall(request)
        with connection.makefile("rb") as answer:
            return int(answer.read() or 1)


def _serve(address: str) -> None:
    """Answer until standard input ends."""
    import pip._internal.commands.install
    import pip._internal.commands.wheel
    import pip._internal.network.session
    import pip._internal.operations.install.wheel
    import pip._internal.resolution.resolvelib.resolver  # noqa: F401

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # no copy is waited for
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address + ".new")
        listener.listen(16)
        os.rename(address + ".new", address)
        while True:
            # The end of the tests closes standard input, however they end.
            if 0 in select.select([0, listener], [], [])[0]:
                return
            connection, _ = listener.accept()
            with connection:
                if os.fork() == 0:
                    listener.close()
                    _answer(connection)


def _answer(connection: socket.socket) -> None:
    code = 1
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        head, fds, _, _ = socket.recv_fds(connection, _HEAD.size, 3)
        with connection.makefile("rb") as stream:
            arguments, folder, environment = json.loads(stream.read(*_HEAD.unpack(head)))
        for number, fd in enumerate(fds):
            os.dup2(fd, number)
            os.close(fd)
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environment)
        sys.argv = ["pip", *arguments]
        sys.dont_write_bytecode = bool(environment.get("PYTHONDONTWRITEBYTECODE"))
        from pip._internal.cli.main import main

        try:
            code = main(arguments)
        except SystemExit as exc:
            code = int(exc.code or 0)
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        connection.sendall(str(code).encode())
        os._exit(code)


if __name__ == "__main__":
    if sys.argv[1] == "--serve":
        _serve(sys.argv[2])
    else:
        sys.exit(_ask(sys.argv[1], sys.argv[2:]))
