"""An engine that leaves no image names of the tests behind."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from cloudexec._aws.images import Engine

PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
BASE = os.environ.get("CLOUDEXEC_TEST_BASE", f"localhost/python-base:{PYTHON}")
"""The image that those of tests are made from."""


class TidyEngine(Engine):
    """Removes the image names of these tests at the end; layers stay, so that a next run is fast.

    Runs that share an engine make images of the same names, as these are hashes of their content.
    So the last one that uses the engine removes what all of them have made: a name that is removed
    while another run builds from it, or runs it, is an error of the engine (status 409 or 500), and
    one of that other run.

    Args:
        folder: Has the list of what was made, which those have in common that share it.
    """

    def __init__(self, folder: Path | None = None) -> None:
        super().__init__()
        of_engine = hashlib.sha256(os.environ.get("DOCKER_HOST", "").encode()).hexdigest()[:16]
        path = (folder or Path(tempfile.gettempdir())) / f"cloudexec-test-images-{of_engine}"
        self._made = open(path, "a+", encoding="utf-8")  # noqa: SIM115 close() closes it
        fcntl.flock(self._made, fcntl.LOCK_SH)

    def note(self, name: str) -> None:
        """Have a name removed at the end."""
        self._made.write(f"{name}\n")
        self._made.flush()

    def build(self, name: str, *args: Any, **options: Any) -> str:
        self.note(name)
        return super().build(name, *args, **options)

    def push(self, image: str, repository: str, tag: str, *args: Any) -> str:
        self.note(f"{repository}:{tag}")
        return super().push(image, repository, tag, *args)

    def close(self) -> None:
        try:
            with self._made:
                # Without the own lock first, two that end at the same time would see each other.
                fcntl.flock(self._made, fcntl.LOCK_UN)
                with contextlib.suppress(BlockingIOError):
                    fcntl.flock(self._made, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    self._remove()
                    self._made.truncate(0)
        finally:
            super().close()

    def _remove(self) -> None:
        self._made.seek(0)
        names = set(self._made.read().splitlines())
        # Names that the command made are removed, too: their tags have the same hashes.
        tags = {name.rpartition(":")[2] for name in names}
        for image in self.client.images.list():
            for name in image.tags:
                if name in names or name.rpartition(":")[2] in tags:
                    self.client.images.remove(name, force=True)
