"""Reading ahead of a consumer, in background threads."""

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

Job = TypeVar("Job")
Loaded = TypeVar("Loaded")


def prefetch(
    load: Callable[[Job], Loaded], jobs: Iterable[Job], n_threads: int | None = None, ahead: int | None = None
) -> Generator[Loaded, None, None]:
    """load(job) for every job, in order, at least two ahead of the consumer, in background threads.

    n_threads: by default a quarter of torch's, at most 4, for jobs that compute. ahead: jobs begun, or waiting for a
    thread, before the consumer has asked for their results; by default one more than threads.

    An exception in load is raised where its result would have come. Closing the generator, or any exception while it
    waits (Ctrl-C), cancels what has not begun and waits for what has.
    """
    n_threads = n_threads or max(1, min(4, torch.get_num_threads() // 4))
    ahead = n_threads + 1 if ahead is None else ahead
    pool = loader_threads(n_threads)
    pending: deque[Future[Loaded]] = deque()
    try:
        for job in jobs:
            pending.append(pool.submit(load, job))
            if len(pending) > ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _use_one_core() -> None:
    torch.set_num_threads(1)
    torch.get_num_threads()  # fixes it for this thread: torch adopts the process's number at a thread's first question


def loader_threads(n_threads: int) -> ThreadPoolExecutor:
    """Threads in which torch uses one core each: with a team of its own per thread a loader slows the consumer."""
    consumer_threads = torch.get_num_threads()
    started = threading.Barrier(n_threads + 1)
    pool = ThreadPoolExecutor(n_threads, "activations", initializer=_use_one_core)
    for _ in range(n_threads):
        pool.submit(started.wait)
    started.wait()
    torch.set_num_threads(consumer_threads)  # set_num_threads also decides for threads that start later: restore that
    return pool
