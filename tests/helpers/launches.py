"""What a GPU would be launched, counted where there is none: Triton kernels in the interpreter, and torch's operations.

One launch a Triton kernel and an operation of torch that makes or writes numbers, but for those that are known to be
several. torch.sort, stable, of 16-bit keys is ten (profiled on an H200, torch 2.11): a copy, four fills, and five
kernels. Operations that only make memory or views of it are none.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

SEVERAL = {"sort": 10}
NONE = {"empty", "empty_strided", "new_empty", "empty_like", "detach", "alias", "set_", "_unsafe_view", "lift_fresh"}


class _Operations(TorchDispatchMode):
    def __init__(self, counts: Counter[str]):
        super().__init__()
        self.counts, self.paused = counts, False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        result = func(*args, **(kwargs or {}))
        empty = isinstance(result, torch.Tensor) and result.numel() == 0
        if not self.paused and not func.is_view and name not in NONE and not empty:
            self.counts[name] += SEVERAL.get(name, 1)
        return result


@contextmanager
def counted_launches() -> Iterator[Counter[str]]:
    """Launches by kernel or operation, while open."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    counts: Counter[str] = Counter()
    run, operations = interpreter.GridExecutor.__call__, _Operations(counts)

    def counting(self, *args, **kwargs):
        counts[self.fn.__name__] += 1
        operations.paused = True  # the interpreter's own copies
        try:
            return run(self, *args, **kwargs)
        finally:
            operations.paused = False

    with pytest.MonkeyPatch.context() as patched, operations:
        patched.setattr(interpreter.GridExecutor, "__call__", counting)
        yield counts
