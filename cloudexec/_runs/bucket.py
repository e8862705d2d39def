"""What the bucket has of runs: read, written and deleted, by the client and on the machine."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from cloudexec._aws.clients import AwsClients
from cloudexec._aws.names import RUNS_PREFIX
from cloudexec._errors import AwsError, ConfigError
from cloudexec._launchers.ending import insist
from cloudexec._objects.s3 import Bucket
from cloudexec._runs.files import Archive
from cloudexec._runs.known import Known
from cloudexec._runs.plan import RunPlan, RunResult, known
from cloudexec._runs.renewal import copy_onto_itself

__all__ = ["RENEW_EVERY", "OutputFile", "RunBucket", "file_digest", "list_names"]

RENEW_EVERY = 12 * 3600.0
"""Seconds after which objects that a run needs are written anew while it goes on: the bucket's
lifecycle rule counts whole days, at least one, from when an object was written."""
_TAKEN = ("PreconditionFailed", "ConditionalRequestConflict")
_OF_ALL_STARTS = ("outputs.json", "outputs/", "journal/")
"""What a start with ``--resume`` goes on with."""
_GONE = ("NoSuchKey", "InvalidRange", "BadDigest")
_TRIES = 3
"""Times that outputs are fetched which change meanwhile."""
_AT_ONCE = 8
"""Files that are fetched at a time."""
_NAMED = 5
"""Files that a message names."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputFile:
    """A file that a run has written, as the bucket has it."""

    path: str
    """Below the run's folder."""
    size: int
    sha256: str
    mtime_ns: int = 0
    mode: int = 0
    """Permissions; 0: they are not known."""
    sent_at: float = 0.0
    """Unix time."""

    @property
    def object_name(self) -> str:
        """Name of the object, below the run's prefix.

        Other content has another name: a list that was written before still fits what it names.
        """
        return f"outputs/{self.sha256[:16]}/{self.path}"


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
        patience: Seconds for which small objects are tried again that cannot be read or written
            now; large ones have a patience of their own.
    """

    def __init__(
        self, clients: AwsClients, bucket: str, name: str, *, patience: float = 0.0
    ) -> None:
        self.prefix = f"{RUNS_PREFIX}{name}/"
        self.where = f"s3://{bucket}/{self.prefix}"
        self._clients = clients
        self._name = bucket
        self._run = name
        self._patience = patience
        self._objects = Bucket(clients, bucket, self.prefix)

    # Small objects.

    async def _call(self, operation: str, name: str, **parameters: Any) -> Any:
        return await insist(
            partial(
                self._clients.call,
                "s3",
                operation,
                Bucket=self._name,
                Key=self.prefix + name,
                **parameters,
            ),
            self._patience,
        )

    async def _put(self, name: str, body: bytes, *, is_new: bool = False) -> bool:
        """Write an object; say whether it was written: ``is_new`` leaves one that is there."""
        condition: dict[str, Any] = {"IfNoneMatch": "*"} if is_new else {}
        try:
            await self._call(
                "put_object", name, Body=body, ServerSideEncryption="AES256", **condition
            )
        except AwsError as exc:
            if is_new and exc.code in _TAKEN:
                # The answer to a first request that came through may have been lost.
                return await self._get(name) == body
            raise
        return True

    async def _get(self, name: str) -> bytes | None:
        try:
            answer = await self._call("get_object", name)
        except AwsError as exc:
            if exc.code == "NoSuchKey":
                return None
            raise
        async with answer["Body"] as body:
            return bytes(await body.read())

    async def create(self, plan: RunPlan, *, resumes: bool = False) -> bool:
        """Write what is to be run; say whether the name was free.

        The bucket's lifecycle rule deletes one object after another, so of an earlier run of that
        name something may be left, such as when it began. That is deleted.

        Args:
            plan: What is to be run.
            resumes: Whether the journal and the files of such a run stay.
        """
        if not await self._put("run.json", plan.to_json(), is_new=True):
            return False
        await self._forget_earlier(_OF_ALL_STARTS if resumes else ())
        return True

    async def replace(self, plan: RunPlan) -> None:
        """Write what is to be run instead; the journal and the files that came back stay."""
        await self._put("run.json", plan.to_json())
        await self._forget_earlier(_OF_ALL_STARTS)

    async def _forget_earlier(self, kept: tuple[str, ...]) -> None:
        """Delete what earlier starts have left, but for objects with some beginnings."""
        names = await self._names()
        await self._objects.delete(
            [each for each in names if each != "run.json" and not each.startswith(kept)]
        )

    async def _names(self) -> list[str]:
        """Return the names of all objects of the run."""
        return [
            str(each["Key"]).removeprefix(self.prefix)
            async for each in self._clients.pages(
                "s3", "list_objects_v2", "Contents", Bucket=self._name, Prefix=self.prefix
            )
        ]

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

    async def put_result(self, result: RunResult, *, is_new: bool = False) -> None:
        """Write how the program ended; with ``is_new`` only if nothing is written yet."""
        await self._put("result.json", result.to_json(), is_new=is_new)

    async def result(self, start_id: str) -> RunResult | None:
        """Return how the program of a start ended; ``None``: the machine has not said so."""
        data = await self._get("result.json")
        result = None if data is None else RunResult.from_json(data)
        return result if result is not None and result.start_id == start_id else None

    async def put_variables(self, start_id: str, variables: Mapping[str, str]) -> None:
        """Write variables of the program's environment: they are nowhere else."""
        await self._put(f"variables-{start_id}.json", json.dumps(dict(variables)).encode())

    async def variables(self, start_id: str) -> dict[str, str]:
        """Return variables of the program's environment."""
        data = await self._get(f"variables-{start_id}.json")
        return {} if data is None else dict(json.loads(data))

    async def forget_variables(self, start_id: str) -> None:
        """Delete them, as nobody needs them any more."""
        await self._objects.delete([f"variables-{start_id}.json"])

    async def claim(self, start_id: str, job_id: str) -> str:
        """Write which job runs the program of a start, unless one is written; return that one."""
        mine = Known(job_id=job_id).to_json()
        if not await self._put(f"job-{start_id}.json", mine, is_new=True):
            return (await self.known(start_id)).job_id or job_id
        return job_id

    async def known(self, start_id: str) -> Known:
        """Return what is written of the jobs of a start."""
        return Known.from_json(await self._get(f"job-{start_id}.json"))

    async def put_known(self, start_id: str, known: Known) -> None:
        """Write what is known of the jobs of a start: only its machine does so while it runs."""
        await self._put(f"job-{start_id}.json", known.to_json())

    async def put_stop(self, start_id: str, reason: str) -> None:
        """Write that no further attempt is to run the program of a start."""
        await self._put(f"stop-{start_id}.json", json.dumps({"reason": reason}).encode())

    async def stop_reason(self, start_id: str) -> str:
        """Return why no further attempt is to run the program of a start; empty: one may."""
        data = await self._get(f"stop-{start_id}.json")
        return "" if data is None else str(json.loads(data)["reason"])

    async def first_start(self, start_id: str) -> float:
        """Return when the first attempt began, in Unix time: now, if this is the first one."""
        name = f"started-{start_id}.json"
        mine = json.dumps({"at": time.time()}).encode()
        if not await self._put(name, mine, is_new=True):
            mine = await self._get(name) or mine
        return float(json.loads(mine)["at"])

    async def renew(
        self, plan: RunPlan, archive: Path | None, *, older_than: float = RENEW_EVERY / 2
    ) -> None:
        """Write anew what a further attempt needs, so that the lifecycle rule does not delete it.

        Args:
            plan: What is run.
            archive: The files that were sent with it; ``None``: there are none.
            older_than: Seconds; objects of the journal that are younger stay as they are.
        """
        await self._put("run.json", plan.to_json())
        for kind in ("job", "started", "variables"):
            name = f"{kind}-{plan.start_id}.json"
            if (data := await self._get(name)) is not None:
                await self._put(name, data)
        if archive is not None:
            digest = bytes.fromhex(plan.files_sha256)
            await self.upload("files.tar.gz", archive, plan.files_bytes, digest)
        turns = asyncio.Semaphore(_AT_ONCE)

        async def copy(key: str, size: int) -> None:
            async with turns:
                await copy_onto_itself(self._clients, self._name, key, size)

        newest = time.time() - older_than
        journal = f"{self.prefix}journal/"
        old = [
            (str(each["Key"]), int(each["Size"]))
            async for each in self._clients.pages(
                "s3", "list_objects_v2", "Contents", Bucket=self._name, Prefix=journal
            )
            # The lease of the journal is written by the program all the time.
            if each["LastModified"].timestamp() < newest and each["Key"] != f"{journal}lease"
        ]
        copies = (copy(key, size) for key, size in old)
        for result in await asyncio.gather(*copies, return_exceptions=True):
            if isinstance(result, BaseException):
                raise result

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
        return (
            []
            if data is None
            else [OutputFile(**known(OutputFile, each)) for each in json.loads(data)]
        )

    async def send_output(self, output: OutputFile, path: Path) -> None:
        """Upload a file that the program has written; ``put_outputs`` lists it."""
        await self.upload(output.object_name, path, output.size, bytes.fromhex(output.sha256))

    async def forget_outputs(self, outputs: Iterable[OutputFile]) -> None:
        """Delete files that are not listed any more."""
        await self._objects.delete(each.object_name for each in outputs)

    async def fetch(
        self, folder: Path, wanted: Sequence[str], report: Callable[[str], None] | None = None
    ) -> list[OutputFile]:
        """Bring files that the run has written so far into a folder, at the same places below it.

        A file that is there with the same content is left as it is. Others are replaced in one
        step each. What cannot be fetched does not keep back the others.

        Args:
            folder: For instance the current one.
            wanted: The run's outputs: nothing else is written.
            report: Told about files that the bucket does not have, or that are not the run's
                outputs. Without it, an error names them after all others have been fetched.

        Returns:
            All files that are there now, also those that were there before.

        Raises:
            AwsError: If the bucket cannot be read, or files that it lists are not in it.
            ConfigError: If files cannot be written, or are not among the run's outputs. All others
                have been fetched then.
        """
        found: dict[str, OutputFile] = {}
        turns = asyncio.Semaphore(_AT_ONCE)
        for is_last in (False,) * (_TRIES - 1) + (True,):
            missing: dict[str, AwsError] = {}
            unwritable: dict[str, OSError] = {}
            listed = await self.outputs()

            async def bring(
                each: OutputFile,
                missing: dict[str, AwsError] = missing,
                unwritable: dict[str, OSError] = unwritable,
            ) -> None:
                async with turns:
                    try:
                        await self._fetch_one(folder, each)
                        found[each.path] = each
                    except OSError as exc:
                        unwritable[each.path] = exc
                    except AwsError as exc:
                        if exc.code not in _GONE:
                            raise
                        missing[each.path] = exc

            good = [each for each in listed if _is_below(each.path, wanted)]
            for result in await asyncio.gather(*map(bring, good), return_exceptions=True):
                if isinstance(result, BaseException):
                    raise result
            if is_last or not missing:
                break
            # The program goes on, and may have written the file anew since it was listed.
            await asyncio.sleep(1.0)
        if unwritable:
            names = sorted(unwritable)
            cause = unwritable[names[0]]
            raise ConfigError(
                f"{_listed(names)} cannot be written below {folder}: {cause.strerror or cause}. "
                f"All other files were fetched; --to names another folder"
            ) from cause
        refused = [each.path for each in listed if not _is_below(each.path, wanted)]
        self._complain(missing, refused, wanted, report)
        return sorted(found.values(), key=lambda each: each.path)

    def _complain(
        self,
        missing: Mapping[str, AwsError],
        refused: Sequence[str],
        wanted: Sequence[str],
        report: Callable[[str], None] | None,
    ) -> None:
        """Name files that were not fetched."""
        if missing:
            text = (
                f"the bucket does not have {_listed(sorted(missing))} of the run {self._run} as it "
                f"was written (any more). Its lifecycle rule deletes what is older than `cloudexec "
                f"up --bucket-days` says. All other files were fetched"
            )
            if report is None:
                error = next(iter(missing.values()))
                raise AwsError(text, code=error.code, operation="s3:GetObject") from error
            report(text)
        if refused:
            text = (
                f"the run {self._run} lists {_listed(refused)}, which "
                f"{'is' if len(refused) == 1 else 'are'} not below its outputs "
                f"({', '.join(wanted) or 'it has none'}): not fetched"
            )
            if report is None:
                raise ConfigError(text)
            report(text)

    async def _fetch_one(self, folder: Path, output: OutputFile) -> None:
        target = folder / output.path
        # The file's own name may be as long as names can be, so it is no part of the draft's.
        key = hashlib.sha256(os.fsencode(target.name)).hexdigest()[:16]
        draft = target.with_name(f".cloudexec-{key}.{os.getpid()}.part")
        # The next attempt of the run has to read and replace it.
        mode = (output.mode | 0o600) & 0o777 if output.mode else None
        if target.is_file() and target.stat().st_size == output.size:
            digest = await asyncio.to_thread(file_digest, target)
            if digest.hex() == output.sha256:
                if mode is not None:
                    target.chmod(mode)
                return
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            await self._download(
                output.object_name, draft, output.size, bytes.fromhex(output.sha256)
            )
            if output.mtime_ns:
                os.utime(draft, ns=(output.mtime_ns, output.mtime_ns))
            if mode is not None:
                draft.chmod(mode)
            os.replace(draft, target)
        finally:
            with contextlib.suppress(OSError):  # why it is not there is said already
                draft.unlink(missing_ok=True)

    # The end.

    async def delete(self) -> int:
        """Delete all that the bucket has of the run; say how many objects that were."""
        names = await self._names()
        # What is to be run goes last: as long as it is there, the rest is found.
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


def _is_below(path: str, wanted: Sequence[str]) -> bool:
    """Whether a path is one of some outputs, or below it."""
    pure = PurePosixPath(path)
    if pure.is_absolute() or ".." in pure.parts:
        return False
    return any(pure.is_relative_to(each) for each in wanted)


def _listed(paths: Sequence[str]) -> str:
    more = len(paths) - _NAMED
    return ", ".join(map(repr, paths[:_NAMED])) + (f" and {more:,} more" if more > 0 else "")


def file_digest(path: Path) -> bytes:
    """Return the SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").digest()
