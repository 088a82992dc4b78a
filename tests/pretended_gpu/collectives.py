"""NCCL's collectives between processes that each have a pretended GPU: gloo carries what lies in the host's memory.

As with NCCL the host waits for none of them, and they are in order with what their device's current stream does.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
import torch.distributed as dist
from pretended_gpu.work import Access, Device, as_host, extent
from torch import Tensor

# Of each: the places of the tensors that it writes, and of those that it reads.
COLLECTIVES = {
    "all_reduce": ((0,), (0,)),
    "all_gather_single": ((0,), (1,)),
    "all_gather_into_tensor": ((0,), (1,)),
    "all_to_all_single": ((0,), (1,)),
}


def replace_collectives(device: Device) -> None:
    """From now on in this process; before anything takes one by its name."""
    begin = dist.init_process_group

    @wraps(begin)
    def begun(backend: str, *args: Any, **kwargs: Any) -> Any:
        return begin("gloo" if backend == "cpu:gloo,cuda:nccl" else backend, *args, **kwargs)

    dist.init_process_group = begun
    for name, (written, read) in COLLECTIVES.items():
        if hasattr(dist, name):
            setattr(dist, name, on_host(device, name, getattr(dist, name), written, read))


def on_host(
    device: Device, name: str, collective: Callable[..., Any], written: tuple[int, ...], read: tuple[int, ...]
) -> Callable[..., Any]:
    @wraps(collective)
    def called(*args: Any, **kwargs: Any) -> Any:
        tensors: list[Tensor] = [args[place] for place in {*written, *read}]
        if not any(t.is_cuda for t in tensors):
            return collective(*args, **kwargs)
        here = torch.cuda.current_device()
        assert all(t.is_cuda and t.device.index == here for t in tensors), f"{name}: not on this rank's cuda:{here}"
        assert not kwargs.get("async_op"), f"{name}: what waits for it is not pretended"
        device.must_not_capture(name)  # NCCL can be captured; a rank's step is not

        accesses = [Access(*extent(args[place]), True) for place in written if args[place].numel()]
        accesses += [Access(*extent(args[place]), False) for place in read if args[place].numel()]
        host = [as_host(arg) if isinstance(arg, Tensor) else arg for arg in args]
        return device.launch(name, accesses, lambda: collective(*host, **kwargs), [])

    return called
