"""Loops for the CPU that Numba compiles: one pass over memory where torch's operations take several.

They are what Triton's kernels are on a GPU. A loop goes over a range of rows, [start, stop), and rows do not depend on
each other: `in_parts` gives every thread a range, and the bits do not depend on how many there are. Modules of such
loops end in _numba.py and are imported by those who ask `compiles` first: Numba takes 0.2 s to import, and is not
everywhere (docs/decisions.md).
"""

import ctypes
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from importlib.util import find_spec
from itertools import pairwise
from typing import Any, TypeVar

import torch
from torch import Tensor

Function = TypeVar("Function", bound=Callable[..., Any])


def compiled(function: Function) -> Function:
    """Numba's compiler, for a loop or a part of one.

    Sums may be taken in another order and multiply-adds fused; NaN and infinity stay what they are, and no division is
    made by an estimate. The compiled code is kept on disk, where there is a place to write: to compile takes about a
    second a loop.
    """
    from numba import njit

    compiler: Any = partial(
        njit, nogil=True, fastmath={"reassoc", "contract", "nsz"}, error_model="numpy", boundscheck=False
    )
    try:
        return compiler(cache=True)(function)
    except RuntimeError:  # "no locator available": neither beside this file nor in the user's cache
        return compiler()(function)


def compiles(*tensors: Tensor) -> bool:
    """Whether loops can be compiled here, for these tensors: on a CPU, contiguous, float32 or float64, all the same."""
    dtype = tensors[0].dtype
    known = dtype in (torch.float32, torch.float64)
    return (
        known
        and numba_is_here()
        and all(t.device.type == "cpu" and t.dtype == dtype and t.is_contiguous() for t in tensors)
    )


@cache
def numba_is_here() -> bool:
    """Whether it is installed."""
    return find_spec("numba") is not None


def in_parts(loop: Callable[..., None], bounds: Sequence[int], *arguments: Any) -> None:
    """loop(*arguments, start, stop) of every range between two bounds, each on its own thread, the first on this one.

    Tensors are handed on as NumPy arrays. What a range raises is raised when all have ended.
    """
    arrays = [a.detach().numpy() if isinstance(a, Tensor) else a for a in arguments]
    ranges = list(pairwise(bounds))
    left, failed = set(range(len(ranges))), list[BaseException]()

    def work(thread: int) -> None:
        for part in (thread, *range(len(ranges))):  # its own first: what it wrote in the last step is in its cache
            try:
                left.remove(part)
            except KeyError:  # taken
                continue
            try:
                loop(*arrays, *ranges[part])
            except BaseException as error:
                failed.append(error)

    _on_threads(len(ranges), work)
    if failed:
        raise failed[0]


def _on_threads(n: int, work: Callable[[int], None]) -> None:
    """work(i) on every thread i of a team of n, which may be fewer."""
    openmp = _openmp()
    if n == 1:
        work(0)
    elif openmp is None:
        others = [_threads(os.getpid()).submit(work, thread) for thread in range(1, n)]
        work(0)
        for other in others:
            other.result()
    else:
        of_team = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(lambda _: work(openmp.omp_get_thread_num()))
        openmp.GOMP_parallel(of_team, None, n, 0)


@cache
def _openmp() -> ctypes.CDLL | None:
    """The OpenMP that torch has loaded, where it is GNU's or compatible: its threads are the ones to work on.

    They wait for their next work by spinning, which keeps others from their cores: with threads of our own, a step of
    50 ms took 59 where GOMP_SPINCOUNT was not set (measured).
    """
    if os.name != "posix":
        return None
    loaded = ctypes.CDLL(None)
    return loaded if all(hasattr(loaded, name) for name in ("GOMP_parallel", "omp_get_thread_num")) else None


@cache
def _threads(process: int) -> ThreadPoolExecutor:
    """Elsewhere. Of this process: a forked one has none of its parent's threads."""
    return ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="cpu-loop")


def even_bounds(n_rows: int) -> list[int]:
    """Ranges of about equally many rows, one a thread of torch's."""
    n = max(1, min(torch.get_num_threads(), n_rows))
    return [n_rows * part // n for part in range(n + 1)]


def bounds_by_work(offsets_S1: Tensor, work_of_a_row: int) -> list[int]:
    """Ranges of segments of about equal work, one a thread of torch's: an entry is 1, and a segment some by itself."""
    n_rows = len(offsets_S1) - 1
    work_S1 = offsets_S1 + work_of_a_row * torch.arange(n_rows + 1)
    shares = torch.linspace(0, 1, max(1, min(torch.get_num_threads(), n_rows)) + 1, dtype=torch.float64)
    ends = torch.searchsorted(work_S1, (work_S1[0] + shares * (work_S1[-1] - work_S1[0])).long())
    return [0, *ends[1:-1].tolist(), n_rows]
