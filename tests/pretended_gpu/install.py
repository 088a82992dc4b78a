"""The pretended GPU in a process: `cudart.c` is loaded already, and nothing has imported Triton."""

import atexit
import os
import sys
from collections.abc import Callable
from functools import wraps
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import torch
from pretended_gpu.collectives import replace_collectives
from pretended_gpu.torch_kernels import replace_kernels
from pretended_gpu.work import Device, current_stream, key_of

from quick_interpreter import quicken_interpreter

device = Device()
_kept: list[torch.library.Library] = []


def install() -> None:
    quicken_interpreter()
    from pretended_gpu.triton_kernels import interpret_on

    torch.cuda.init()
    torch.backends.cudnn.enabled = False  # its operations have no kernel of the CPU
    for kind in ("flash", "mem_efficient", "cudnn"):
        getattr(torch.backends.cuda, f"enable_{kind}_sdp")(False)
    _kept.append(replace_kernels(device))
    interpret_on(device)
    order_streams()
    keep_graphs()
    replace_collectives(device)
    atexit.register(tell_of_faults)


def tell_of_faults() -> None:
    """A process that took one for something else does not end well. pytest's plugin has told of its own."""
    if device.faults:
        print(f"pretended GPU: {device.faults[0]}", file=sys.stderr, flush=True)
        os._exit(70)


def order_streams() -> None:
    """Who waits for whom, told to the device."""

    def of(stream: Any) -> int:
        return current_stream() if stream is None else key_of(stream)

    event, stream = torch.cuda.Event, torch.cuda.Stream
    after(event, "record", lambda self, stream=None: device.record(self.cuda_event, of(stream)))
    after(event, "wait", lambda self, stream=None: device.stream_waits(self.cuda_event, of(stream)))
    after(event, "synchronize", lambda self: device.host_waits(self.cuda_event))
    after(event, "query", lambda self: device.is_over(self.cuda_event))
    after(stream, "synchronize", lambda self: device.host_waits_for_stream(key_of(self)))
    after(stream, "query", lambda self: device.stream_is_over(key_of(self)))
    after(torch.cuda, "synchronize", lambda device_=None: device.host_waits_for_all(number_of(device_)))
    after(torch.cuda, "empty_cache", lambda: device.host_waits_for_all())  # cudaFree waits


def number_of(named: Any) -> int:
    """Of the current device, if none is named."""
    return torch.cuda._utils._get_device_index(named, optional=True)


def keep_graphs() -> None:
    graph = torch.cuda.CUDAGraph
    after(graph, "capture_begin", lambda self, *_, **__: setattr(self, "pretended", device.begin_capture()))
    after(graph, "capture_end", lambda self: device.end_capture(self.pretended))
    after(graph, "replay", lambda self: device.replay(self.pretended))


def after(owner: Any, name: str, then: Callable[..., Any]) -> None:
    """Calls it with the same arguments behind a function of torch; what it answers, if anything, is the answer."""
    function = getattr(owner, name)

    @wraps(function)
    def both(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        answer = then(*args, **kwargs)
        return result if answer is None else answer

    setattr(owner, name, both)
