"""Runs workers inside a function of AWS Lambda, one after the other, each from a fresh process.

Lambda starts an image, which asks for an event, handles it, and asks for the next one. The event of
an invocation has the variables that a worker elsewhere has in its environment. A process of its own
becomes that worker, and this one waits for its end, kills all that is left of it, and answers.
After the answer, Lambda stops all processes until the next event comes, which may be never. So
nothing is kept from one event to the next: no connection, no thread, no process, no file.

References:
    AWS Lambda Developer Guide, "Using the Lambda runtime API for custom runtimes" and
    "Understanding the Lambda execution environment lifecycle".
"""

from __future__ import annotations

import http.client
import json
import os
import select
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from cloudexec.worker.platform import API_VARIABLE

__all__ = ["SESSION_LINE", "serve"]

SESSION_LINE = "cloudexec session "
"""What a line of the log begins with that says which worker an invocation is; JSON follows."""
_PATH = "/2018-06-01/runtime/invocation"
_LAST_SECONDS = 10.0
"""Seconds before Lambda kills the environment in which a worker hands its last tasks back."""
_LAST_SHARE = 0.1
"""At most of a session, if that is short."""
_GUARD = 0.5
"""Seconds before that at which a worker is killed that still runs, so that there is an answer."""
_SHARE_OF_GRACE = 0.1
_LONGEST_GRACE = 60.0
"""Tasks that run have a tenth of the session to finish at its end, and a minute at most."""
_POLL = 0.005


class _EventError(Exception):
    """The event is none of ours, or the worker did not get to its end."""


def serve(environ: Mapping[str, str], work: Callable[[], NoReturn]) -> NoReturn:
    """Handle events until Lambda kills this process.

    Args:
        environ: Has the address at which Lambda hands out events.
        work: Runs a worker that finds in its environment what it needs, and ends its process.
    """
    api = environ[API_VARIABLE]
    # What a worker imports before it has a connection is imported once, and not for each event.
    from cloudexec.worker import birth, slot  # noqa: F401
    from cloudexec.worker.zygote import adopt_orphans, kill_children

    # Processes that a worker leaves behind become children of this one.
    adopt_orphans()
    is_first = True
    while True:
        headers, body = _ask(api, "GET", f"{_PATH}/next")
        request = headers["lambda-runtime-aws-request-id"]
        # The first worker waited for all of this process's start, which is paid for.
        earlier = birth.seconds_since_start() if is_first else 0.0
        is_first = False
        folder = tempfile.mkdtemp(prefix="cloudexec-")
        try:
            deadline = int(headers["lambda-runtime-deadline-ms"]) / 1000
            answer = _handle(body, request, deadline, earlier, folder, work)
            where = "response"
        except _EventError as exc:
            answer = {"errorType": "cloudexec.WorkerFailed", "errorMessage": str(exc)}
            where = "error"
        finally:
            kill_children()
            shutil.rmtree(folder, ignore_errors=True)
        _ask(api, "POST", f"{_PATH}/{request}/{where}", json.dumps(answer).encode())


def _ask(
    api: str, method: str, path: str, body: bytes | None = None
) -> tuple[Mapping[str, str], bytes]:
    """Make a request to Lambda; there is no time limit, as the next event may come after days."""
    connection = http.client.HTTPConnection(api)
    try:
        connection.request(method, path, body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        data = answer.read()
        if answer.status >= 300:
            # Lambda starts another process then. It says so in the log.
            raise SystemExit(f"cloudexec worker: {method} {path}: {answer.status} {data[:500]!r}")
        return {name.lower(): value for name, value in answer.getheaders()}, data
    finally:
        connection.close()


def _handle(
    body: bytes,
    request: str,
    deadline: float,
    earlier: float,
    folder: str,
    work: Callable[[], NoReturn],
) -> dict[str, Any]:
    """Run the worker of one event.

    Args:
        body: The event.
        request: The id of the invocation.
        deadline: When Lambda kills the environment, Unix time.
        earlier: Seconds that this process took to start, if the event has waited for it.
        folder: A directory for the worker's files.
        work: See ``serve``.

    Raises:
        _EventError: If the event is none of ours, or the worker did not get to its end.
    """
    environment, event = _read(body)
    if time.time() > event.get("start_by", float("inf")):
        # Lambda may keep an event, or deliver it once more, when nobody waits for it any more.
        return {"outcome": "late"}
    session = {**event.get("session", {}), "request": request}
    print(SESSION_LINE + json.dumps(session), flush=True)
    left = deadline - time.time()
    left -= min(_LAST_SECONDS, _LAST_SHARE * left) + _GUARD
    grace = min(_LONGEST_GRACE, _SHARE_OF_GRACE * left)
    environment |= {
        "CLOUDEXEC_JOB_ID": f"lambda-{request}",
        "CLOUDEXEC_LIFETIME": str(max(1, int(left - grace))),
        "CLOUDEXEC_DRAIN_GRACE": f"{max(0.0, grace):.3f}",
        "CLOUDEXEC_SESSION": f"{max(1.0, left):.3f}",
        "TMPDIR": folder,
    }
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        _become_worker(environment, earlier, folder, work)
    code = _wait(pid, deadline - _GUARD)
    ended = {"request": request, "exit_code": str(128 - code if code < 0 else code)}
    print(SESSION_LINE + json.dumps(ended), flush=True)
    if code < 0:
        # As in a container: the number says which signal it was.
        raise _EventError(
            f"the worker was killed by {signal.Signals(-code).name}: the function may have run out "
            f"of memory"
        )
    return {"exit_code": code}


def _read(body: bytes) -> tuple[dict[str, str], Mapping[str, Any]]:
    """Return a worker's variables, and the whole event."""
    try:
        event = json.loads(body)
        environment = event["environment"]
        if not all(isinstance(part, str) for pair in environment.items() for part in pair):
            raise TypeError
        if not isinstance(event.get("session", {}), dict):
            raise TypeError
        float(event.get("start_by", 0.0))
    except (ValueError, TypeError, KeyError, AttributeError):
        raise _EventError(
            "this function runs workers of cloudexec: only cloudexec.Lambda(...) invokes it"
        ) from None
    return dict(environment), event


def _become_worker(
    environment: Mapping[str, str], earlier: float, folder: str, work: Callable[[], NoReturn]
) -> NoReturn:
    """Go on as a worker, in a process that was forked for it."""
    code = 1
    try:
        os.setsid()
        os.environ.pop(API_VARIABLE, None)
        os.environ.update(environment)
        # The image's home cannot be written to, as all of the image.
        os.environ["HOME"] = folder
        os.chdir(folder)
        tempfile.tempdir = None
        from cloudexec.worker import birth

        birth.set_earlier(earlier)
        work()
    except SystemExit as exc:
        code = exc.code if isinstance(exc.code, int) else 1
        if isinstance(exc.code, str):
            print(exc.code, file=sys.stderr)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _wait(pid: int, until: float) -> int:
    """Wait for a process, and kill it when its time is over; return its exit code."""
    try:
        fd = os.pidfd_open(pid)
    except (AttributeError, OSError):
        while time.time() < until:  # an old kernel
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                return os.waitstatus_to_exitcode(status)
            time.sleep(_POLL)
    else:
        try:
            # The monotonic clock does not matter here: the deadline is of the wall clock.
            select.select([fd], [], [], max(0.0, until - time.time()))
        finally:
            os.close(fd)
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
    os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
