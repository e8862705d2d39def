"""Imports in advance, in the zygote, what tasks will need: once for all slots, which share it.

Slots are forked afterwards, and two kinds of things do not take a fork well. Threads are missing in
the child, with whatever locks they held: a module that starts some when it is imported is left to
the slots, unless it ends them itself around a fork, as OpenBLAS does. And random generators go on
alike in every child: those that modules have made for all to use are seeded anew in each slot.
"""

from __future__ import annotations

import gc
import os
import random
import signal
import sys
import threading
import time
import warnings
from collections.abc import Sequence
from importlib import import_module
from typing import Any, NoReturn

from cloudexec import _nesting
from cloudexec._forked import count_threads, count_threads_after_fork

__all__ = ["can_import_again", "preload", "seed_generators"]

_TRIAL_SECONDS = 0.5
"""In which the user's modules must be importable: longer, and a fresh interpreter costs no more."""

_generators: list[Any] = []


def preload(names: Sequence[str], argv: Sequence[str]) -> str:
    """Import modules, as far as they can be; tasks that need the others learn why they cannot.

    Args:
        names: Of modules.
        argv: What modules are to find in ``sys.argv``.

    Returns:
        The first of them that has started threads which would not survive a fork: this process
        cannot be used. An empty string: it can.
    """
    sys.argv[:] = argv
    gc.disable()
    loading = _nesting.loading
    loading.watch("a worker", __name__)
    try:
        for name in names:
            # An executor that a module starts is refused here, as it is in a slot.
            loading.active = True
            try:
                import_module(name)
            except BaseException:
                pass
            finally:
                loading.active = False
                loading.ended()
            if _has_threads():
                return name
        _find_generators()
    finally:
        # What is here now is not looked at again: slots would get pages of their own for that.
        gc.freeze()
        gc.enable()
    return ""


def _has_threads() -> bool:
    """Whether there are threads that are still there when this process has been forked."""
    if threading.active_count() > 1:
        return True
    return count_threads() > 1 and count_threads_after_fork() > 1


def can_import_again(names: Sequence[str]) -> bool:
    """Whether modules can be imported here, in a copy of a process that has imported them.

    Some register themselves with a library that takes each name only once, or warns otherwise. So
    they are imported in a process that is forked for that.

    Args:
        names: Of the user's own modules.
    """
    if not names:
        return True
    pid = os.fork()
    if not pid:
        _try_to_import(names)
    ends = time.monotonic() + _TRIAL_SECONDS
    while time.monotonic() < ends:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return status == 0
        time.sleep(0.001)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return False


def _try_to_import(names: Sequence[str]) -> NoReturn:
    try:
        null = os.open(os.devnull, os.O_RDWR)
        for fd in (1, 2):
            os.dup2(null, fd)
        signal.set_wakeup_fd(-1)
        for category in (UserWarning, RuntimeWarning):
            warnings.simplefilter("error", category)
        loading = _nesting.loading
        loading.active = True
        for name in names:
            import_module(name)
        from cloudexec.worker.process import leave

        leave()
    finally:
        os._exit(1)


def _find_generators() -> None:
    kinds: set[type] = {random.Random}
    if "numpy.random" in sys.modules:
        numpy_random = sys.modules["numpy.random"]
        kinds |= {numpy_random.RandomState, numpy_random.Generator}
    found = {
        id(value): value
        for module in list(sys.modules.values())
        for value in list(getattr(module, "__dict__", {}).values())
        if type(value) in kinds
    }
    _generators[:] = found.values()


def seed_generators() -> None:
    """Give this process a sequence of its own from each generator that came with modules."""
    for generator in _generators:
        if hasattr(generator, "bit_generator"):
            state = type(generator.bit_generator)().state
            generator.bit_generator.state = state
        else:
            generator.seed()
