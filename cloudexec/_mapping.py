"""``map()``: results in the order of the inputs, and several calls in one task."""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

from cloudexec._future import BatchFuture

if TYPE_CHECKING:
    from cloudexec._progress import ProgressBar

__all__ = ["Chunk", "chunks", "flatten", "results"]

T = TypeVar("T")


def results(
    futures: deque[BatchFuture[T]],
    calls: Iterator[tuple[Any, ...]],
    submit: Callable[[Iterable[tuple[Any, ...]]], list[BatchFuture[T]]],
    deadline: float | None,
    bar: ProgressBar | None,
) -> Iterator[T]:
    """Yield results in order; submit one more of ``calls`` for each result that is taken."""
    try:
        while futures:
            # Nothing here refers to a result once it has been handed out.
            result = [_take(futures.popleft(), deadline)]
            for call in calls:
                more = submit((call,))
                futures.extend(more)
                if bar is not None:
                    bar.watch(more)
                break
            yield result.pop()
    finally:
        for future in futures:
            future.cancel()
        if bar is not None:
            bar.close()


def _take(future: BatchFuture[T], deadline: float | None) -> T:
    try:
        return future.result(None if deadline is None else deadline - time.monotonic())
    except BaseException:
        future.cancel()  # it is nobody's any more
        raise
    finally:
        del future


class Chunk:
    """Calls a function for each of several inputs: one task of ``map(chunksize=...)``."""

    def __init__(self, fn: Callable[..., Any]) -> None:
        self._fn = fn

    @property
    def _called_for_each(self) -> Callable[..., Any]:
        """The function that is called for each input.

        The journal, error messages, the choice of modules to import and of when to unpickle it
        look at it, and not at the chunk.
        """
        return self._fn

    def __call__(self, chunk: list[tuple[Any, ...]]) -> list[Any]:
        return [self._fn(*args) for args in chunk]


def chunks(calls: Iterator[tuple[Any, ...]], size: int) -> Iterator[list[tuple[Any, ...]]]:
    """Yield lists of up to ``size`` calls."""
    while chunk := list(itertools.islice(calls, size)):
        yield chunk


def flatten(chunks: Iterator[list[T]]) -> Iterator[T]:
    """Yield the results of the chunks, one chunk after the other."""
    for chunk in chunks:
        chunk.reverse()
        while chunk:
            yield chunk.pop()
