"""What an operation holds at once, counted by the tensors that torch and Triton's wrappers make, on any device."""

import weakref
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class HeldMemory(TorchDispatchMode):
    """While open: `peak` is the most bytes that new tensors had together; not those that were there before."""

    def __init__(self, *before: Tensor):
        super().__init__()
        self.peak = self._now = 0
        self._before = {each.untyped_storage()._cdata for each in before}
        self._held: dict[int, list[int]] = {}  # of a storage: tensors that have it, bytes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for each in tree_leaves(result):
            if isinstance(each, Tensor):
                self._met(each)
        return result

    def _met(self, t: Tensor) -> None:
        storage = t.untyped_storage()
        key = storage._cdata
        if key in self._before:
            return
        if key not in self._held:
            self._held[key] = [0, storage.nbytes()]
            self._now += storage.nbytes()
            self.peak = max(self.peak, self._now)
        self._held[key][0] += 1
        weakref.finalize(t, self._gone, key)

    def _gone(self, key: int) -> None:
        self._held[key][0] -= 1
        if self._held[key][0] == 0:
            self._now -= self._held.pop(key)[1]
