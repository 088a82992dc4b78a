"""What long work needs of the process it runs in: a device, exact products, a way to stop."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from saevlm_fast.errors import check_kind, require


def resolve_device(name: str | torch.device) -> torch.device:
    """`auto` is a CUDA (or ROCm) device if there is one, else the CPU.

    Raises:
        ValueError: a device that torch does not know or that is not here.
    """
    check_kind("device", name, (str, torch.device), "a device; use auto, cpu, cuda or cuda:N")
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device: {name!r} is not a device; use auto, cpu, cuda or cuda:N") from None
    require(device.type in ("cpu", "cuda"), f"device: {name!r} is not supported; use auto, cpu, cuda or cuda:N")
    if device.type == "cuda":
        require(torch.cuda.is_available(), f"device: {name!r} asked for, but torch sees no GPU")
        n_devices = torch.cuda.device_count()
        require((device.index or 0) < n_devices, f"device: {name!r} asked for, but there are {n_devices} GPUs")
    return device


@contextmanager
def tf32_products(wanted: bool) -> Iterator[None]:
    """float32 matrix products on a GPU in TF32 (10-bit mantissa, much faster), or exactly, whatever was set before.

    Convolutions too, of which a tower's patch embedding is one; torch's default for them is TF32. A model that is run
    outside of this is not a float32 model there. Also a decorator.
    """
    settings = torch.backends.cuda.matmul, torch.backends.cudnn.conv  # type: ignore[attr-defined]
    before = [setting.fp32_precision for setting in settings]
    for setting in settings:
        setting.fp32_precision = "tf32" if wanted else "ieee"
    try:
        yield
    finally:
        for setting, precision in zip(settings, before):
            setting.fp32_precision = precision


@contextmanager
def one_thread(wanted: bool) -> Iterator[None]:
    """torch's CPU operations on one thread, or as before: threads that wait for each other cost a small step more
    than they bring as soon as a core has other work (docs/decisions.md)."""
    before = torch.get_num_threads()
    torch.set_num_threads(1 if wanted else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def interruptible(patient: bool = False) -> Iterator[threading.Event]:
    """An event that SIGINT or SIGTERM sets, so that a step is never cut in half. A second signal acts as usual.

    patient: it changes nothing; torchrun sends its processes a Ctrl-C that they have had already.
    """
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    old = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def ask_to_stop(number: int, frame: Any) -> None:
        event.set()
        if not patient:
            signal.signal(number, old[signal.Signals(number)])

    for number in old:
        signal.signal(number, ask_to_stop)
    try:
        yield event
    finally:
        for number, handler in old.items():
            if signal.getsignal(number) is not signal.SIG_IGN:  # what was ignored inside is to be
                signal.signal(number, handler)
