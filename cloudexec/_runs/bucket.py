"""What the bucket has of runs: read, written and deleted, by the client and on the machine."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cloudexec._aws.clients import AwsClients
from cloudexec._aws.names import RUNS_PREFIX
from cloudexec._errors import AwsError, ConfigError
from cloudexec._objects.s3 import Bucket
from cloudexec._runs.files import Archive
from cloudexec._runs.plan import RunPlan, RunResult

__all__ = ["OutputFile", "RunBucket", "file_digest", "list_names"]

_TAKEN = ("PreconditionFailed", "ConditionalRequestConflict")
_TRIES = 3
"""Times that outputs are fetched which change meanwhile."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputFile:
    """A file that a run has written, as the bucket has it."""

    path: str
    """Below the run's folder."""
    size: int
    sha256: str
    mtime_ns: int = 0


async def list_names(clients: AwsClients, bucket: str, limit: int | None = None) -> list[str]:
    """Return the names of runs that a bucket knows, the newest first.

    Raises:
        AwsError: If the bucket cannot be read.
    """
    found: list[tuple[Any, str]] = []
    async for each in clients.pages(
        "s3", "list_objects_v2", "Contents", Bucket=bucket, Prefix=RUNS_PREFIX
    ):
        name, _, file = str(each["Key"]).removeprefix(RUNS_PREFIX).partition("/")
        if file == "run.json":
            found.append((each["LastModified"], name))
    return [name for _, name in sorted(found, reverse=True)][:limit]


class RunBucket:
    """What a bucket has of one run.

    Args:
        clients: Calls to AWS.
        bucket: The bucket's name.
        name: The run's.
    """

    def __init__(self, clients: AwsClients, bucket: str, name: str) -> None:
        self.prefix = f"{RUNS_PREFIX}{name}/"
        self.where = f"s3://{bucket}/{self.prefix}"
        self._clients = clients
        self._name = bucket
        self._run = name
        self._objects = Bucket(clients, bucket, self.prefix)

    # Small objects.

    async def _put(self, name: str, body: bytes, *, is_new: bool = False) -> bool:
        """Write an object; say whether it was written: ``is_new`` leaves one that is there."""
        condition: dict[str, Any] = {"IfNoneMatch": "*"} if is_new else {}
        try:
            await self._clients.call(
                "s3",
                "put_object",
                Bucket=self._name,
                Key=self.prefix + name,
                Body=body,
                ServerSideEncryption="AES256",
                **condition,
            )
        except AwsError as exc:
            if is_new and exc.code in _TAKEN:
                # The answer to a first request that came through may have been lost.
                return await self._get(name) == body
            raise
        return True

    async def _get(self, name: str) -> bytes | None:
        try:
            answer = await self._clients.call(
                "s3", "get_object", Bucket=self._name, Key=self.prefix + name
            )
        except AwsError as exc:
            if exc.code == "NoSuchKey":
                return None
            raise
        async with answer["Body"] as body:
            return bytes(await body.read())

    async def create(self, plan: RunPlan) -> bool:
        """Write what is to be run; say whether the name was free."""
        return await self._put("run.json", plan.to_json(), is_new=True)

    async def replace(self, plan: RunPlan) -> None:
        """Write what is to be run instead; the journal and the files that came back stay."""
        await self._objects.delete(["result.json", "started.json", "variables.json"])
        await self._put("run.json", plan.to_json())

    async def plan(self) -> RunPlan:
        """Return what is to be run.

        Raises:
            ConfigError: If there is no such run.
        """
        data = await self._get("run.json")
        if data is None:
            raise ConfigError(
                f"there is no run {self._run!r} in the bucket {self._name}: `cloudexec runs` lists "
                f"them. The bucket deletes what is older than its lifecycle rule says"
            )
        return RunPlan.from_json(data)

    async def put_result(self, result: RunResult) -> None:
        """Write how the program ended."""
        await self._put("result.json", result.to_json())

    async def result(self) -> RunResult | None:
        """Return how the program ended; ``None``: the machine has not said so."""
        data = await self._get("result.json")
        return None if data is None else RunResult.from_json(data)

    async def put_variables(self, variables: Mapping[str, str]) -> None:
        """Write variables of the program's environment: they are nowhere else."""
        await self._put("variables.json", json.dumps(dict(variables)).encode())

    async def variables(self) -> dict[str, str]:
        """Return variables of the program's environment."""
        data = await self._get("variables.json")
        return {} if data is None else dict(json.loads(data))

    async def forget_variables(self) -> None:
        """Delete them, as nobody needs them any more."""
        await self._objects.delete(["variables.json"])

    async def first_start(self) -> float:
        """Return when the first attempt began, in Unix time: now, if this is the first one."""
        mine = json.dumps({"at": time.time()}).encode()
        if not await self._put("started.json", mine, is_new=True):
            mine = await self._get("started.json") or mine
        return float(json.loads(mine)["at"])

    # Files.

    async def send(self, archive: Archive) -> None:
        """Upload the files of a run."""
        await self.upload("files.tar.gz", archive.path, archive.size, archive.sha256)

    async def receive(self, plan: RunPlan, target: Path) -> None:
        """Download the files of a run, as an archive."""
        digest = bytes.fromhex(plan.files_sha256)
        await self._download("files.tar.gz", target, plan.files_bytes, digest)

    async def upload(self, name: str, path: Path, size: int, sha256: bytes) -> None:
        """Upload a file.

        Args:
            name: Of the object, below the run's prefix.
            path: The file.
            size: Bytes of it.
            sha256: Its digest.
        """
        with _opened(path, os.O_RDONLY) as file:

            def source(offset: int, length: int) -> bytes:
                return os.pread(file, length, offset)

            await self._objects.upload(name, source, size, sha256)

    async def _download(self, name: str, target: Path, size: int, sha256: bytes) -> None:
        with _opened(target, os.O_RDWR | os.O_CREAT | os.O_TRUNC) as file:

            def sink(offset: int, data: bytes) -> None:
                os.pwrite(file, data, offset)

            def source(offset: int, length: int) -> bytes:
                return os.pread(file, length, offset)

            await self._objects.download(name, sink, source, size, sha256)

    # Outputs.

    async def put_outputs(self, files: Sequence[OutputFile]) -> None:
        """Write which files have come back so far."""
        await self._put("outputs.json", json.dumps([asdict(each) for each in files]).encode())

    async def outputs(self) -> list[OutputFile]:
        """Return which files have come back so far."""
        data = await self._get("outputs.json")
        return [] if data is None else [OutputFile(**each) for each in json.loads(data)]

    async def fetch(self, folder: Path) -> list[OutputFile]:
        """Bring files that the run has written so far into a folder, at the same places below it.

        A file that is there with the same content is left as it is. Others are replaced in one
        step each.

        Args:
            folder: For instance the current one.

        Returns:
            All files, those that were there included.

        Raises:
            AwsError: If the bucket cannot be read.
            ConfigError: If a file cannot be written.
        """
        for is_last in (False,) * (_TRIES - 1) + (True,):
            files = await self.outputs()
            try:
                for each in files:
                    await self._fetch_one(folder, each)
            except AwsError as exc:
                # The program goes on and has written the file anew since it was listed.
                if is_last or exc.code not in ("BadDigest", "InvalidRange", "NoSuchKey"):
                    raise
                await asyncio.sleep(1.0)
            else:
                return files
        raise AssertionError

    async def _fetch_one(self, folder: Path, output: OutputFile) -> None:
        target = folder / output.path
        if ".." in Path(output.path).parts or not target.is_relative_to(folder):
            raise ConfigError(f"the run {self._run} has an output at {output.path!r}: not fetched")
        draft = target.with_name(f".{target.name}.{os.getpid()}.part")
        try:
            if target.is_file() and target.stat().st_size == output.size:
                digest = await asyncio.to_thread(file_digest, target)
                if digest.hex() == output.sha256:
                    return
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                await self._download(
                    f"outputs/{output.path}", draft, output.size, bytes.fromhex(output.sha256)
                )
                if output.mtime_ns:
                    os.utime(draft, ns=(output.mtime_ns, output.mtime_ns))
                os.replace(draft, target)
            finally:
                draft.unlink(missing_ok=True)
        except OSError as exc:
            raise ConfigError(
                f"{target} cannot be written: {exc.strerror or exc}; --to names another folder"
            ) from exc

    # The end.

    async def delete(self) -> int:
        """Delete all that the bucket has of the run; say how many objects that were."""
        names = [
            str(each["Key"]).removeprefix(self.prefix)
            async for each in self._clients.pages(
                "s3", "list_objects_v2", "Contents", Bucket=self._name, Prefix=self.prefix
            )
        ]
        # What is to be run goes last: as long as it is there, the rest is found.
        names.sort(key=lambda name: name == "run.json")
        await self._objects.delete([name for name in names if name != "run.json"])
        await self._objects.delete([name for name in names if name == "run.json"])
        return len(names)


@contextlib.contextmanager
def _opened(path: Path, flags: int) -> Iterator[int]:
    descriptor = os.open(path, flags, 0o666)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def file_digest(path: Path) -> bytes:
    """Return the SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").digest()
