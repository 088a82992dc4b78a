"""Loops for the CPU that Numba compiles: one pass over memory where torch's operations take several.

They are what Triton's kernels are on a GPU. A loop goes over a range of rows, [start, stop), and rows do not depend on
each other: `in_parts` gives every thread a range, and the bits do not depend on how many there are. Modules of such
loops end in _numba.py and are imported by those who ask `compiles` first: Numba takes 0.2 s to import, and is not
everywhere (docs/decisions.md).
"""

import ctypes
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from functools import cache, partial
from itertools import pairwise
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from saevlm_fast.errors import doubt

Function = TypeVar("Function", bound=Callable[..., Any])
_OPENMP = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")
_PROCESS = os.getpid()
_listeners: list[Callable[[], None]] = []


def compiled(function: Function) -> Function:
    """Numba's compiler, for a loop or a part of one. No loop may raise, but for want of memory.

    Sums may be taken in another order and multiply-adds fused; NaN and infinity stay what they are, and no division is
    made by an estimate. The compiled code is kept on disk where that is possible: to compile takes about a second a
    loop. It is compiled anew when its own file changes, but not when this one does: delete kernels/__pycache__/*.nb?.
    """
    from numba import njit

    compiler: Any = partial(
        njit, nogil=True, fastmath={"reassoc", "contract", "nsz"}, error_model="numpy", boundscheck=False
    )
    try:
        dispatcher = compiler(cache=True)(function)
    except RuntimeError:  # "no locator available": neither beside this file nor in the user's cache
        dispatcher = compiler()(function)
    _watch(dispatcher._cache)
    return dispatcher


@contextmanager
def when_compiling(tell: Callable[[], None]) -> Iterator[None]:
    """While open: tell is called before every loop that is compiled, which takes about a second."""
    _listeners.append(tell)
    try:
        yield
    finally:
        _listeners.remove(tell)


def _watch(cache: Any) -> None:
    """Numba's cache of a loop, which then costs nobody a run: what fails there is a loop to compile. Its index goes,
    for it may name what is damaged or older. What is not found there is told to `when_compiling`."""
    load, save = cache.load_overload, cache.save_overload

    def forget(error: Exception) -> None:
        doubt(f"Numba's cache of a loop fails, so it is compiled anew: {error!r}", UserWarning)
        with suppress(OSError):
            os.unlink(cache._cache_file._index_path)

    def load_or_miss(*given: Any) -> Any:
        found = None
        try:
            found = load(*given)
        except Exception as error:  # whatever unpickling half a file makes of it
            forget(error)
        if found is None:
            for tell in tuple(_listeners):
                tell()
        return found

    def save_if_possible(*given: Any) -> None:
        try:
            save(*given)
        except Exception as error:
            forget(error)

    cache.load_overload, cache.save_overload = load_or_miss, save_if_possible


def compiles(*tensors: Tensor) -> bool:
    """Whether there are loops for these tensors: on a CPU, contiguous, float32 or float64, all the same; with Numba."""
    dtype = tensors[0].dtype
    fit = all(t.device.type == "cpu" and t.dtype == dtype and t.is_contiguous() for t in tensors)
    return fit and dtype in (torch.float32, torch.float64) and numba_is_here()


@cache
def numba_is_here() -> bool:
    """Whether it is installed, can be imported, and may compile (NUMBA_DISABLE_JIT)."""
    try:
        from numba.core import config
    except (ImportError, OSError, SystemError, AttributeError) as error:
        if getattr(error, "name", None) not in ("numba", "numba.core"):  # it is there, but not for this NumPy or system
            doubt(f"numba cannot be imported, so a CPU works by torch's operations: {error}", UserWarning)
        return False
    disabled: bool = vars(config)["DISABLE_JIT"]
    return not disabled


def in_parts(loop: Callable[..., None], bounds: Sequence[int], *arguments: Any) -> None:
    """loop(*arguments, start, stop) of every range between two bounds, each on its own thread, the first on this one.

    loop: `compiled`. Tensors are handed on as NumPy arrays; nothing of them is checked. MemoryError.
    """
    arrays = tuple(a.detach().numpy() if isinstance(a, Tensor) else a for a in arguments)
    first, *others = pairwise(bounds)
    openmp = _openmp(os.getpid())
    if not others:
        loop(*arrays, *first)
    elif openmp is None:
        waiting = list[Future[None]]()
        try:
            waiting += (_threads(os.getpid()).submit(loop, *arrays, *part) for part in others)
            loop(*arrays, *first)
        finally:
            wait(waiting)
        for each in waiting:
            each.result()
    else:
        from .team_numba import on_team

        failed = np.zeros(1, dtype=np.int64)
        on_team(loop, openmp, np.array(bounds), failed, arrays)
        if failed[0]:
            raise MemoryError("a compiled loop found no memory")


@cache
def _openmp(process: int) -> tuple[int, ...] | None:
    """Addresses in the OpenMP that torch has loaded, where it is GNU's or compatible: its threads are the ones to use.

    They wait for their next work by spinning, which keeps others from their cores: with threads of our own, a step of
    50 ms took 59 where GOMP_SPINCOUNT was not set (measured). A forked process has none of its parent's threads, and
    would wait for them.
    """
    if os.name != "posix" or process != _PROCESS:
        return None
    for library in _loaded():
        if all(hasattr(library, name) for name in _OPENMP):
            return tuple(ctypes.cast(getattr(library, name), ctypes.c_void_p).value or 0 for name in _OPENMP)
    return None


def _loaded() -> Iterator[ctypes.CDLL]:
    """What has the symbols of all libraries that share theirs, and GNU's OpenMP, which torch for ARM does not share."""
    yield ctypes.CDLL(None)
    with suppress(OSError, AttributeError):  # it is not loaded; the system cannot ask whether it is
        yield ctypes.CDLL("libgomp.so.1", mode=os.RTLD_NOLOAD)


@cache
def _threads(process: int) -> ThreadPoolExecutor:
    """Elsewhere, a process' own."""
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
