"""What functions without an image are made of: archives that are checked, unpacked and run.

A wrapper script in the archive is run as Lambda does it: with the path of the runtime's interpreter
and the arguments with which that usually starts. "Modifying the runtime environment", AWS Lambda
Developer Guide.
"""

from __future__ import annotations

import base64
import hashlib
import io
import subprocess
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from cloudexec.testing._aws.backends import ACCOUNT
from cloudexec.testing._aws.limits import ClientError

__all__ = ["ROOT", "Archives", "Unpacked"]

ROOT = "/var/task"
"""Where the files of a function are: ``LAMBDA_TASK_ROOT`` in "Using Lambda environment variables",
AWS Lambda Developer Guide."""
_DIRECT = 52_428_800
_UNZIPPED = 262_144_000
""""Lambda quotas", AWS Lambda Developer Guide, in the numbers of the messages below, which people
have published."""
_RUNTIME_MODULE = (
    "raise ImportError('this is the urllib3 of the runtime, and not of the function')\n"
)
""""The runtimes of Python bring the AWS SDK, and what that needs. "Working with .zip file archives
for Python Lambda functions", AWS Lambda Developer Guide."""


@dataclass(frozen=True, slots=True)
class Unpacked:
    """An archive whose files are here."""

    folder: Path
    size: int
    """Bytes of the archive."""
    sha256: str
    """Of the archive, base64."""
    wrapper: str
    """The program that Lambda starts."""
    interpreter: str
    """Stands for that of the runtime."""
    packages: Path
    """Has what the runtime brings."""

    def command(self, root: str) -> tuple[str, ...]:
        """Return what is run, where the files are found in ``root``."""
        wrapper = self.wrapper
        if wrapper.startswith(f"{ROOT}/"):
            wrapper = root + wrapper.removeprefix(ROOT)
        return (wrapper, self.interpreter, "/var/runtime/bootstrap.py")


class Archives:
    """Takes the archives of functions.

    Args:
        folder: Where they are unpacked.
        python: An interpreter; that of its installation stands for the runtime of its version.
        images: By name of a runtime: the interpreter that stands for it.
    """

    def __init__(self, folder: Path, *, python: str, images: Mapping[str, str]) -> None:
        self._folder = folder
        self._python = python
        self._images = images
        self._own: tuple[str, str] | None = None

    def unpack(self, region: str, given: Mapping[str, Any]) -> Unpacked:
        """Return the archive of a CreateFunction request.

        Raises:
            ClientError: If AWS would refuse it, or it cannot be run here.
        """
        if not given.get("Runtime") or not given.get("Handler"):
            _refuse(
                "Runtime and Handler are mandatory parameters for functions created with "
                "deployment packages."
            )
        variables = (given.get("Environment") or {}).get("Variables") or {}
        wrapper = variables.get("AWS_LAMBDA_EXEC_WRAPPER", "")
        if not wrapper:
            _refuse("FakeAWS runs functions without an image by a wrapper script only")
        interpreter = self._interpreter(given["Runtime"])
        data = _data(region, given.get("Code") or {})
        digest = hashlib.sha256(data)
        into = self._folder / digest.hexdigest()
        if not into.exists():
            _extract(data, into)
        packages = self._folder / "runtime"
        packages.mkdir(exist_ok=True)
        (packages / "urllib3.py").write_text(_RUNTIME_MODULE)
        sha256 = base64.b64encode(digest.digest()).decode()
        return Unpacked(into, len(data), sha256, wrapper, interpreter, packages)

    def _interpreter(self, runtime: str) -> str:
        if runtime in self._images:
            return self._images[runtime]
        if self._own is None:
            # Not that of a virtual environment: what is installed there is not in the runtime.
            code = "import sys; print('python%d.%d' % sys.version_info[:2], sys._base_executable)"
            done = subprocess.run(
                [self._python, "-I", "-c", code], capture_output=True, text=True, check=True
            )
            name, _, path = done.stdout.strip().partition(" ")
            self._own = name, path
        if self._own[0] != runtime:
            _refuse(
                f"FakeAWS has no interpreter for {runtime}: give images={{{runtime!r}: its path}}"
            )
        return self._own[1]


def _data(region: str, code: Mapping[str, Any]) -> bytes:
    if "ZipFile" in code:
        data = base64.b64decode(code["ZipFile"])
        if len(data) > _DIRECT:
            _refuse(f"Zipped size must be smaller than {_DIRECT} bytes")
        return data
    from moto.s3.exceptions import MissingBucket
    from moto.s3.models import s3_backends

    said = "Error occurred while GetObject. S3 Error Code: "
    try:
        backend = s3_backends[ACCOUNT]["aws"]
        bucket = backend.get_bucket(code.get("S3Bucket", ""))
        found = backend.get_object(bucket.name, code.get("S3Key", ""))
    except MissingBucket:
        found = None
    else:
        if bucket.region_name != region:
            # "An Amazon S3 bucket in the same AWS Region as your function." "FunctionCode", AWS
            # Lambda API Reference.
            _refuse(f"{said}PermanentRedirect. S3 Error Message: The bucket is in this region: ...")
    if found is None:
        _refuse(f"{said}NoSuchKey. S3 Error Message: The specified key does not exist.")
    return bytes(found.value)


def _extract(data: bytes, into: Path) -> None:
    try:
        archive = zipfile.ZipFile(io.BytesIO(data))
    except zipfile.BadZipFile:
        _refuse("Could not unzip uploaded file. Please check your file, then try to upload again.")
    with archive:
        if sum(each.file_size for each in archive.infolist()) > _UNZIPPED:
            _refuse(f"Unzipped size must be smaller than {_UNZIPPED} bytes")
        for each in archive.infolist():
            # "Lambda uses POSIX file permissions." "Working with .zip file archives for Python
            # Lambda functions", AWS Lambda Developer Guide.
            Path(archive.extract(each, into)).chmod(each.external_attr >> 16 & 0o777)


def _refuse(text: str) -> NoReturn:
    raise ClientError(text, "InvalidParameterValueException")
