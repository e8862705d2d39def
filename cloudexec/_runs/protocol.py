"""What the client and the program on the machine agree on."""

from __future__ import annotations

__all__ = [
    "ATTEMPT_VARIABLE",
    "EXIT_FILES_LOST",
    "EXIT_NOT_RUN",
    "INTERRUPTED",
    "MACHINE_VARIABLE",
    "REGION_VARIABLE",
    "RUN_VARIABLE",
    "START_VARIABLE",
    "TIME_IS_UP",
    "last_line",
]

RUN_VARIABLE = "CLOUDEXEC_RUN_AT"
"""Where the run is: ``s3://bucket/prefix/``. An image's entry point then starts no worker."""
REGION_VARIABLE = "CLOUDEXEC_RUN_REGION"
START_VARIABLE = "CLOUDEXEC_RUN_START"
"""Id of the start for which the job was submitted."""
ATTEMPT_VARIABLE = "CLOUDEXEC_RUN_IS_ATTEMPT"
"""Number of the attempt, where the place of the run has no variable of its own for it."""
MACHINE_VARIABLE = "CLOUDEXEC_RUN_MACHINE"
"""Id of the machine's job, where the place of the run has no other way to tell it."""
TIME_IS_UP = 142
"""Exit code of a machine that has ended itself by SIGALRM, as its time limit was over."""
INTERRUPTED = 143
"""Exit code of an attempt that was told to stop."""
EXIT_NOT_RUN = 125
"""Exit code if the program could not be started, as of ``docker run``."""

EXIT_FILES_LOST = 122
"""Exit code if the program succeeded, and a file that it has written did not come back."""


def last_line(name: str) -> str:
    """Return what the last line of a run's log begins with."""
    return f"cloudexec: the run {name} has ended"
