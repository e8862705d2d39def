"""Reads the logs of a job's workers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from typing import Any

from cloudexec._aws.job_details import log_group_of, reason_of, required_time, streams_of
from cloudexec._aws.job_search import JobSearch
from cloudexec._aws.paced_calls import PacedCalls
from cloudexec._aws.records import ENDED, LogLine
from cloudexec._errors import AwsError

__all__ = ["JobLogs"]

_LOG_POLL = 1.0
_LOG_SETTLE = 2
"""Number of times that the log is read without new lines after the job's end: they come late."""
_MISSING_LOG = "ResourceNotFoundException"


class JobLogs:
    """Reads logs.

    Args:
        calls: Calls to AWS.
        search: Describes a job again while its log is followed.
        log_group: Log group of jobs that do not name one.
    """

    def __init__(self, calls: PacedCalls, search: JobSearch, log_group: str) -> None:
        self._calls = calls
        self._search = search
        self._log_group = log_group

    async def of(
        self, detail: Mapping[str, Any], *, follow: bool, tail: int | None
    ) -> AsyncIterator[LogLine]:
        """Yield the lines of a job without children, or of one child."""
        tokens: dict[str, str] = {}
        # If a job has several attempts, the tail is that of the last one so far.
        tails = {} if tail is None else {stream: tail for _, stream in streams_of(detail)[-1:]}
        first = 0 if tail is None else max(0, len(streams_of(detail)) - 1)
        has_read = False
        quiet = 0
        while True:
            # The state is taken before the log is read, so that the last lines are not missed.
            has_ended = detail["status"] in ENDED
            streams = streams_of(detail)
            has_news = False
            for attempt, stream in streams[first:]:
                lines = self._new_lines(detail, attempt, stream, tokens, tails.get(stream))
                try:
                    async for line in lines:
                        has_news = True
                        yield line
                    has_read = True
                except AwsError as exc:
                    if exc.code != _MISSING_LOG:
                        raise
                    # The description names the stream before it has any events.
            # A retry begins another stream. The one before it is read once more.
            first = max(first, len(streams) - 1)
            quiet = 0 if has_news or not has_ended else quiet + 1
            if (has_read and not follow) or quiet > _LOG_SETTLE:
                break
            if not follow:
                raise self.no_log(detail)
            await asyncio.sleep(_LOG_POLL)
            detail = (await self._search.describe([detail["jobId"]]) or [detail])[0]
        if not has_read:
            raise self.no_log(detail)

    async def _new_lines(
        self,
        detail: Mapping[str, Any],
        attempt: int,
        stream: str,
        tokens: dict[str, str],
        tail: int | None,
    ) -> AsyncIterator[LogLine]:
        """Yield the lines of a stream that have not been read yet."""
        group = log_group_of(detail, self._log_group)
        while True:
            token = tokens.get(stream)
            extra: dict[str, Any] = {"startFromHead": True}
            if token is not None:
                extra["nextToken"] = token
            elif tail is not None:
                extra = {"startFromHead": False, "limit": max(tail, 1)}
            page = await self._calls.call(
                "logs", "get_log_events", logGroupName=group, logStreamName=stream, **extra
            )
            tokens[stream] = page["nextForwardToken"]
            if not (token is None and tail == 0):
                for event in page["events"]:
                    yield LogLine(
                        time=required_time(event["timestamp"]),
                        message=event["message"],
                        job_id=detail["jobId"],
                        attempt=attempt,
                        stream=stream,
                    )
            # The API repeats the token at the end of the stream. Pages may be empty before that.
            if page["nextForwardToken"] == token:
                return

    def no_log(self, detail: Mapping[str, Any]) -> AwsError:
        """Return the error for a job without a log."""
        job, state = detail["jobId"], detail["status"]
        if state in ENDED:
            reason = reason_of(detail)
            text = f"job {job} has {state} without a log" + (
                f": {reason}"
                if reason
                else "; perhaps its lines have not arrived yet, or were deleted with their log "
                f"group {log_group_of(detail, self._log_group)}"
            )
        else:
            reason = reason_of(detail)
            text = (
                f"job {job} is {state} and has no log yet"
                + (f" ({reason})" if reason else "")
                + "; `cloudexec logs -f` waits for it"
            )
        return AwsError(text, code="NoLog", operation="logs:GetLogEvents")
