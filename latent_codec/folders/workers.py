"""Run work in threads, and in processes what keeps Python's interpreter busy."""

import contextlib
import multiprocessing
import multiprocessing.context
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from typing import TypeVar

from latent_codec.errors import FatalError

T = TypeVar("T")
R = TypeVar("R")


class Threads(contextlib.AbstractContextManager["Threads"]):
    """Hold worker threads that end with a context, not with a generator, which may end in any thread at any time."""

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self._pool = ThreadPoolExecutor(workers)

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def map(
        self, work: Callable[[T], R], items: Iterable[T], ahead: int | None = None
    ) -> Iterator[tuple[T, "Future[R]"]]:
        """Yield (item, finished future) in order; at most `ahead` items are begun, by default twice the threads.

        What `items` raises, an interruption too, is raised after all that was begun before has been yielded.
        """
        waiting: deque[tuple[T, Future[R]]] = deque()
        iterator, raised = iter(items), None  # by which the iterator ended
        while True:
            try:
                while raised is None and len(waiting) < (ahead or 2 * self.workers):
                    item = next(iterator)
                    waiting.append((item, self._pool.submit(work, item)))
            except BaseException as error:
                raised = error
            if not waiting:
                break
            item, future = waiting.popleft()
            future.exception()  # wait; the caller asks for the result
            yield item, future
        if raised is not None and not isinstance(raised, StopIteration):
            raise raised


class Processes(contextlib.AbstractContextManager["Processes"]):
    """Hold worker processes that end with a context or this process; 0 workers leave work to the calling thread."""

    def __init__(self, workers: int) -> None:
        self._pool = ProcessPoolExecutor(workers, _context(), initializer=_end_with_parent) if workers else None

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def call(self, work: Callable[..., R], *args: object) -> R:
        """Return or raise what `work(*args)` does in a process, found by name; raise `FatalError` if it is killed."""
        if self._pool is None:
            return work(*args)
        try:
            return self._pool.submit(work, *args).result()
        except BrokenProcessPool as error:
            raise FatalError(
                "a process that decodes images was killed, perhaps because memory ran out; give fewer --workers: the "
                "same command goes on from here"
            ) from error


def _context() -> multiprocessing.context.BaseContext:
    # A fork of this process would wait for ever for what its threads hold, so workers start from a fresh process.
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["latent_codec.images.read"])
    return context


def _end_with_parent() -> None:
    # A worker ignores Ctrl-C, which its parent sees to, and ends when its parent is killed.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
