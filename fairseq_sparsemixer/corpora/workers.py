"""A function over many lines, on several cores, in order and in little memory."""

import contextlib
import itertools
import multiprocessing
import os
import signal
import threading
from collections import deque
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Callable, Deque, Iterable, Iterator, List, Optional, Tuple, TypeVar

from tqdm import tqdm

from fairseq_sparsemixer.errors import UserError

Item = TypeVar("Item")
Result = TypeVar("Result")

CHUNK = 2000
"""Items that one call of the function gets: some tenths of a second of tokenisation."""
# Fewer lines are done before another process has started.
_LINES_PER_WORKER = 100_000


def useful_workers(lines: int, workers: Optional[int] = None) -> int:
    """How many processes pay for that many lines: at most ``workers`` (default: the cores)."""
    return min(workers or os.cpu_count() or 1, 1 + lines // _LINES_PER_WORKER)


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

    Raises:
        UserError: a worker process was killed.
    """
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
    pending: Deque[Tuple[int, Future[Result]]] = deque()
    with _pool(workers) as pool:
        for chunk in chunks:
            with _interruptions_blocked():  # in the workers that this starts, for good
                pending.append((len(chunk), pool.submit(function, chunk)))
            # Two for each worker keep all busy.
            if len(pending) > 2 * workers:
                size, future = pending.popleft()
                yield size, future.result()
        while pending:
            size, future = pending.popleft()
            yield size, future.result()


@contextlib.contextmanager
def _pool(workers: int) -> Iterator[ProcessPoolExecutor]:
    """Worker processes, which end with the block, at once where it is left by an exception."""
    # A fresh interpreter for each worker: forking a process that has threads can hang.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_end_with_parent)
    try:
        yield pool
    except BaseException as error:
        for process in list((pool._processes or {}).values()):
            process.terminate()
        if isinstance(error, BrokenProcessPool):
            raise UserError(
                "a worker process was ended, perhaps for want of memory: give fewer --workers and "
                "run the command again"
            ) from error
        raise
    finally:
        pool.shutdown()


@contextlib.contextmanager
def _interruptions_blocked() -> Iterator[None]:
    """Ctrl-C reaches every process of the terminal; this one ends the workers."""
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)


def _end_with_parent() -> None:
    """Start a thread that ends this worker when the process that started it is gone."""
    parent = multiprocessing.parent_process()

    def watch() -> None:
        if parent is not None:
            parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
