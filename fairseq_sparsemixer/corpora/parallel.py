"""A function over many lines, on several cores, in order and in little memory."""

import itertools
import multiprocessing
import signal
from collections import deque
from concurrent.futures import Future, ProcessPoolExecutor
from typing import Callable, Deque, Iterable, Iterator, List, Optional, Tuple, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

CHUNK = 2000
"""Items that one call of the function gets: some tenths of a second of tokenisation."""


def map_chunks(
    function: Callable[[List[Item]], Result],
    items: Iterable[Item],
    workers: int,
    *,
    total: Optional[int] = None,
    name: str = "",
) -> Iterator[Result]:
    """Yield ``function(chunk)`` for consecutive chunks of ``items``, in their order.

    Args:
        function: takes a list of at most :data:`CHUNK` items; can be pickled.
        items: read only as fast as results are taken, so that they need not fit into memory.
        workers: processes; 1 works in this one.
        total: number of items, for the progress bar (shown on a terminal).
        name: what the bar is called.
    """
    from tqdm import tqdm

    with tqdm(total=total, desc=name, unit=" lines", leave=False, disable=None) as bar:
        for size, result in _results(function, _chunks(items), workers):
            yield result
            bar.update(size)


def _chunks(items: Iterable[Item]) -> Iterator[List[Item]]:
    iterator = iter(items)
    while chunk := list(itertools.islice(iterator, CHUNK)):
        yield chunk


def _results(
    function: Callable[[List[Item]], Result], chunks: Iterator[List[Item]], workers: int
) -> Iterator[Tuple[int, Result]]:
    """Yield the size of each chunk with its result."""
    if workers == 1:
        yield from ((len(chunk), function(chunk)) for chunk in chunks)
        return
    # A fresh interpreter for each worker: forking a process that has threads can hang.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_ignore_interrupt) as pool:
        pending: Deque[Tuple[int, Future[Result]]] = deque()
        try:
            for chunk in chunks:
                pending.append((len(chunk), pool.submit(function, chunk)))
                # Two for each worker keep all busy.
                if len(pending) > 2 * workers:
                    size, future = pending.popleft()
                    yield size, future.result()
            while pending:
                size, future = pending.popleft()
                yield size, future.result()
        finally:
            for _, future in pending:
                future.cancel()


def _ignore_interrupt() -> None:
    # Ctrl-C reaches every process of the terminal: the parent ends the workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
