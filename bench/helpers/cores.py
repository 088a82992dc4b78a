"""How far two cores are from each other: the time a byte takes from one to the other.

A host moves the cores of a virtual machine; those that share a last cache are several times as near as others, and what
one writes for the other costs accordingly.
"""

import os
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numba import njit, types
from numba.extending import intrinsic

NEAR, FAR = 60e-9, 100e-9  # below, and above: seconds that were 26e-9 and 170e-9 on the machines met
_WARM_UP, _ROUNDS = 100, 1400


@intrinsic
def _load(typing_context: Any, array: Any) -> Any:
    def code(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        data = context.make_array(array)(context, builder, values[0]).data
        return builder.load_atomic(data, "acquire", 8)

    return types.int64(array), code


@intrinsic
def _store(typing_context: Any, array: Any, value: Any) -> Any:
    def code(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        data = context.make_array(array)(context, builder, values[0]).data
        builder.store_atomic(values[1], data, "release", 8)
        return context.get_dummy_value()

    return types.none(array, types.int64), code


@njit(nogil=True)
def _play(ball_1: Any, first: int, rounds: int) -> None:
    """Waits for every second number, from `first` on, and answers with the next; a negative one is the end."""
    for number in range(first, first + 2 * rounds, 2):
        found = _load(ball_1)
        while found != number:
            if found < 0:
                return
            found = _load(ball_1)
        _store(ball_1, number + 1)


def seconds_between_cores() -> float:
    """Of one way between the first two cores that this process may use, over 1,400 there and back. Linux.

    RuntimeError: fewer than two cores. OSError: they may not be chosen.
    """
    allowed = os.sched_getaffinity(0)
    if len(allowed) < 2:
        raise RuntimeError("two cores are needed")
    here, there = sorted(allowed)[:2]
    ball_1 = np.zeros(16, dtype=np.int64)  # more than a cache line
    _play(ball_1, 0, 0)  # compiled
    with ThreadPoolExecutor(1) as other:
        try:
            other.submit(os.sched_setaffinity, 0, {there}).result()  # of that thread; raised before anybody plays
            os.sched_setaffinity(0, {here})
            other.submit(_play, ball_1, 1, _WARM_UP + _ROUNDS)
            _play(ball_1, 0, _WARM_UP)
            start = time.perf_counter()
            _play(ball_1, 2 * _WARM_UP, _ROUNDS)
            return (time.perf_counter() - start) / (2 * _ROUNDS)
        finally:
            ball_1[0] = -1  # nobody waits for one who was interrupted
            os.sched_setaffinity(0, allowed)


def where(seconds: float) -> str:
    """near, far, or between them: another machine, or a core that was moved meanwhile."""
    return "near" if seconds < NEAR else "far" if seconds > FAR else "between"
