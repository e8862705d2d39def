"""Finds out on which platform this worker runs, by a table of the platforms' environment variables.

A launcher for another platform needs a row here only if it cannot set variables for each worker
separately. A launcher that can sets ``CLOUDEXEC_INDEX`` and, if they are known,
``CLOUDEXEC_JOB_ID`` and ``CLOUDEXEC_ATTEMPT``. These count more than the platform's variables,
which may describe the client, if it runs on such a platform and has started this worker.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

__all__ = ["API_VARIABLE", "OWN_VARIABLES", "Place", "Platform", "ask_metadata", "find_place"]

OWN_VARIABLES = ("CLOUDEXEC_INDEX", "CLOUDEXEC_JOB_ID", "CLOUDEXEC_ATTEMPT")
"""Variables that a launcher sets for each worker. Processes that tasks start do not get them."""
API_VARIABLE = "AWS_LAMBDA_RUNTIME_API"
"""In a function of AWS Lambda, the address at which events are handed out; see ``function``."""
_METADATA_TIMEOUT = 1.0


class Platform(NamedTuple):
    """One row of the table: names of variables, which are empty if the platform has no such one.

    Attributes:
        name: The platform's name.
        sign: The variable that only workers on this platform have.
        launch_index: The worker's number among those that were launched together, from 0.
        job_id: The platform's name for the worker.
        attempt: Which run of this worker it is.
        first_attempt: The number that the platform gives to the first run.
        metadata: The address that answers questions about the worker over HTTP.
        stop: The command that ends all workers of ``{executor}``.
    """

    name: str
    sign: str
    launch_index: str = ""
    job_id: str = ""
    attempt: str = ""
    first_attempt: int = 1
    metadata: str = ""
    stop: str = ""


PLATFORMS = (
    # The first row that fits counts: a job of AWS Batch is a task of Amazon ECS, too.
    Platform(
        name="AWS Batch",
        sign="AWS_BATCH_JOB_ID",
        launch_index="AWS_BATCH_JOB_ARRAY_INDEX",
        job_id="AWS_BATCH_JOB_ID",
        attempt="AWS_BATCH_JOB_ATTEMPT",
        metadata="ECS_CONTAINER_METADATA_URI_V4",
        stop="cloudexec stop --executor {executor}",
    ),
    Platform(
        name="Amazon ECS",
        sign="ECS_CONTAINER_METADATA_URI_V4",
        metadata="ECS_CONTAINER_METADATA_URI_V4",
    ),
    # Each invocation of the function is another worker: see ``function``.
    Platform(name="AWS Lambda", sign="AWS_LAMBDA_FUNCTION_NAME"),
)
THIS_MACHINE = Platform(name="this machine", sign="")


class Place(NamedTuple):
    """Where a worker is, and what it is called there.

    Attributes:
        platform: The name of the platform.
        launch_index: The worker's number among those that were launched together, from 0.
        job_id: The platform's name for the worker; empty if it has none.
        attempt: Which run of this worker it is, from 1.
        metadata: The address that answers questions about the worker over HTTP; empty: there is
            none.
        stop: The command that ends all workers of ``{executor}``; empty: there is none.
    """

    platform: str
    launch_index: int = 0
    job_id: str = ""
    attempt: int = 1
    metadata: str = ""
    stop: str = ""


def find_place(environ: Mapping[str, str]) -> Place:
    """Read where a worker is from its environment.

    Raises:
        ValueError: If a variable that must be a whole number is not; the message names it.
    """
    row = next((each for each in PLATFORMS if each.sign in environ), THIS_MACHINE)
    index = _number(environ, "CLOUDEXEC_INDEX", 0)
    attempt = _number(environ, "CLOUDEXEC_ATTEMPT", 1)
    stop = row.stop if index is None else ""
    if index is None:
        index = _number(environ, row.launch_index, 0) or 0
    if attempt is None:
        found = _number(environ, row.attempt, row.first_attempt)
        attempt = 1 if found is None else found - row.first_attempt + 1
    return Place(
        platform=row.name,
        launch_index=index,
        job_id=environ.get("CLOUDEXEC_JOB_ID") or environ.get(row.job_id, ""),
        attempt=attempt,
        metadata=environ.get(row.metadata, ""),
        stop=stop,
    )


def _number(environ: Mapping[str, str], name: str, least: int) -> int | None:
    text = environ.get(name, "") if name else ""
    if not text:
        return None
    if not text.isdecimal() or int(text) < least:
        raise ValueError(f"{name} must be a whole number, {least} or more, not {text!r}")
    return int(text)


def ask_metadata(place: Place) -> Mapping[str, Any]:
    """Ask the platform about this worker; return nothing if it does not answer.

    References:
        Amazon ECS Developer Guide, "Task metadata endpoint version 4".
    """
    from urllib.parse import urlsplit  # most platforms have no such address

    where = urlsplit(place.metadata)
    if where.scheme != "http" or not where.hostname:
        return {}
    import http.client

    connection = http.client.HTTPConnection(
        where.hostname, where.port or 80, timeout=_METADATA_TIMEOUT
    )
    try:
        connection.request("GET", f"{where.path}/task")
        answer = json.loads(connection.getresponse().read())
    except (OSError, http.client.HTTPException, ValueError):
        return {}
    finally:
        connection.close()
    return answer if isinstance(answer, dict) else {}
