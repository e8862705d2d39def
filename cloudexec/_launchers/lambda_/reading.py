"""What AWS Lambda says of an invocation that has ended, read."""

from __future__ import annotations

from cloudexec._aws.diagnosis import JobEnd, cause_of_end
from cloudexec._aws.function_log import Invocation
from cloudexec._aws.function_requests import function_size
from cloudexec._launchers.platform import Reason, WorkerEnd

__all__ = ["OVER", "end_of_invocation", "end_of_session"]

OVER = "its session on AWS Lambda is over, which is 15 minutes at most"
_LAST_SECONDS = 75.0
"""Seconds before the end of a session from which on a worker hands its tasks back."""
_SHARE = 0.8
_FOUND_NO_CLIENT = 4
_REMEDY = (
    "`cloudexec image push` makes one that does; one of your own needs the entry point `python -m "
    "cloudexec.worker`, and cloudexec in this version"
)


def end_of_invocation(
    invocation: Invocation, *, session: float, tail: str, image: str, archive: str, relay: str
) -> WorkerEnd:
    """Say how a worker ended, of whose invocation Lambda has reported the end.

    Args:
        invocation: The invocation.
        session: Seconds that it had at most.
        tail: The last lines of its log.
        image: Of the worker; empty: its function is made of an archive.
        archive: That archive, for messages.
        relay: Through which it was to reach the client; empty: none.
    """
    report = invocation.report
    assert report is not None
    ended = invocation.ended_ms / 1000
    began = ended - report.billed_ms / 1000
    if report.status == "timeout" or (
        invocation.exit_code == 143
        and report.billed_ms / 1000 >= max(session - _LAST_SECONDS, _SHARE * session)
    ):
        return end_of_session(began, ended)
    if report.out_of_memory:
        text = (
            f"AWS Lambda has ended its environment, which had used all of its memory, "
            f"{report.memory_mib} MiB"
        )
        reason = Reason(text, "give memory= a larger size, or several to climb")
        return WorkerEnd(reason=reason, out_of_memory=True, began_at=began, ended_at=ended)
    if report.status and not invocation.began_ms:
        made_of, remedy = f"the image {image}", _REMEDY
        if not image:
            made_of, remedy = archive, "package='image' makes an image instead"
        words = f"\n{tail.strip()}" if tail.strip() else ""
        reason = Reason(
            f"{made_of} does not start a worker: its invocation on AWS Lambda has failed{words}",
            remedy,
            fatal=True,
        )
        return WorkerEnd(reason=reason, began_at=began, ended_at=ended)
    end = JobEnd(
        status_reason="its invocation on AWS Lambda failed" if report.status else "",
        exit_code=invocation.exit_code,
        log_tail=tail,
        size=function_size(report.memory_mib),
        compute="lambda",
        image=image,
        relay=relay,
    )
    cause = cause_of_end(end)
    return WorkerEnd(
        reason=Reason(cause.text, cause.remedy, cause.fatal),
        killed=invocation.exit_code is None,
        began_at=began,
        ended_at=ended,
        details=end,
    )


def end_of_session(began_at: float | None = None, ended_at: float | None = None) -> WorkerEnd:
    """Say that a worker ended as its time was over."""
    return WorkerEnd(
        reason=Reason(OVER, "it is replaced"),
        reclaimed=True,
        began_at=began_at,
        ended_at=ended_at,
    )
