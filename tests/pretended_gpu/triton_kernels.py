"""Triton's kernels on the pretended device: its interpreter runs them, and every load and store is looked at."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from pretended_gpu.work import Access, Device, as_host, extent
from torch import Tensor
from triton.runtime import interpreter
from triton.tools.tensor_descriptor import TensorDescriptor

# The builder's methods, the places of their pointers and masks, and whether they read and write.
TOUCHING = {
    "create_masked_load": (0, 1, (False,)),
    "create_masked_store": (0, 2, (True,)),
    "create_atomic_rmw": (1, 3, (False, True)),
    "create_atomic_cas": (0, None, (False, True)),
}


class OutOfBoundsError(AssertionError):
    """A kernel touches what belongs to none of its arguments."""


class Touched:
    """What one launch has read and written: from the first byte to the last of every argument."""

    def __init__(self, arguments: list[Tensor]) -> None:
        self.spans = sorted({extent(t) for t in arguments if t.numel()})
        self.begins = np.array([begin for begin, _ in self.spans], dtype=np.uint64)
        self.found: dict[tuple[int, bool], tuple[int, int]] = {}

    def add(self, pointers: np.ndarray, mask: Any, size: int, kinds: tuple[bool, ...]) -> None:
        if mask is not None:
            pointers = pointers[np.broadcast_to(np.asarray(mask).astype(bool), pointers.shape)]
        if not pointers.size:
            return
        low, high = int(pointers.min()), int(pointers.max()) + size
        last = int(np.searchsorted(self.begins, np.uint64(low), side="right"))
        place = next((i for i in reversed(range(last)) if high <= self.spans[i][1]), None)
        if place is None:
            spans = ", ".join(f"{begin:#x} to {end:#x}" for begin, end in self.spans)
            raise OutOfBoundsError(f"{low:#x} to {high:#x} is in none of {spans}")
        for writes in kinds:
            before = self.found.get((place, writes), (low, high))
            self.found[place, writes] = min(low, before[0]), max(high, before[1])

    def accesses(self) -> list[Access]:
        return [Access(*span, writes) for (_, writes), span in self.found.items()]


def interpret_on(device: Device) -> None:
    """From now on in this process."""
    run, running = interpreter.GridExecutor.__call__, []

    def call(self: Any, *args: Any, **kwargs: Any) -> None:
        arguments = list(tensors_of((*args, *kwargs.values())))
        name = self.fn.__name__
        if not any(t.is_cuda for t in arguments):
            run(self, *args, **kwargs)
            return
        for t in arguments:  # Triton launches on the current device
            there = t.is_pinned() or (t.is_cuda and t.device.index == torch.cuda.current_device())
            here = f"cuda:{torch.cuda.current_device()}"
            assert there, f"{name}: a tensor {list(t.shape)} is on {t.device}, and the launch is on {here}"
        host = [on_host(value) for value in args], {key: on_host(value) for key, value in kwargs.items()}

        def once() -> list[Access]:
            running.append(Touched(arguments))
            try:
                run(self, *host[0], **host[1])
            finally:
                touched = running.pop()
            return touched.accesses()

        device.launch_kernel(name, arguments, once)

    interpreter.GridExecutor.__call__ = call
    for name, where in TOUCHING.items():
        setattr(interpreter.InterpreterBuilder, name, noting(running, name, *where))


def noting(running: list[Touched], name: str, pointer: int, mask: int | None, kinds: tuple[bool, ...]) -> Any:
    method = getattr(interpreter.InterpreterBuilder, name)

    def noted(self: Any, *args: Any, **kwargs: Any) -> Any:
        if running:
            handle = args[pointer]
            size = np.dtype(interpreter._get_np_dtype(handle.get_element_ty())).itemsize
            running[-1].add(np.asarray(handle.data), None if mask is None else args[mask].data, size, kinds)
        return method(self, *args, **kwargs)

    return noted


def tensors_of(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, TensorDescriptor):
        yield value.base
    elif isinstance(value, tuple):
        for each in value:
            yield from tensors_of(each)


def on_host(value: Any) -> Any:
    if isinstance(value, Tensor):
        return as_host(value.detach())
    if isinstance(value, TensorDescriptor):
        return replace(value, base=as_host(value.base))
    return tuple(map(on_host, value)) if type(value) is tuple else value
