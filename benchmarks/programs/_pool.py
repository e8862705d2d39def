"""Makes the executor for a program, which is named on the program's command line."""

from __future__ import annotations

import sys
from typing import Any

WORKERS = 2


def executor() -> Any:
    """Return the executor; a program imports this last, as it would import its class."""
    name = sys.argv[1]
    if name == "cloudexec":
        from cloudexec import BatchExecutor

        return BatchExecutor(WORKERS)
    if name == "loky":
        from loky import ProcessPoolExecutor as LokyExecutor

        return LokyExecutor(WORKERS)
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor

    return ProcessPoolExecutor(WORKERS, mp_context=multiprocessing.get_context(name))
