"""What long work needs of the process it runs in: a device, exact products, a way to stop."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Generic, TypeVar, cast

import torch

from saevlm_fast.errors import check_kind, require

T = TypeVar("T")


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


class ProcessWide(Generic[T]):
    """A setting of the whole process, which is at a value as long as some thread needs it there.

    Threads that need the same value share it: the last one puts back what the first one found. One that needs another
    value waits until nobody needs this one; within itself a thread may change it.

    of_threads: every thread has the setting for itself, as far as torch allows, and none has to wait.
    """

    def __init__(self, read: Callable[[], T], write: Callable[[T], None], of_threads: bool = False):
        self._read, self._write, self._of_threads = read, write, of_threads
        self._changed = threading.Condition()
        self._needed: dict[int, list[T]] = {}  # by thread, the innermost last
        self._before: T | None = None
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._of_this_thread_alone)

    @contextmanager
    def at(self, value: T) -> Iterator[None]:
        """With the setting at this value. Also a decorator."""
        self._begin(threading.get_ident(), value)
        try:
            yield
        finally:
            self._end(threading.get_ident())

    def _begin(self, thread: int, value: T) -> None:
        with self._changed:
            self._changed.wait_for(lambda: thread in self._needed or self._is_free_for(value))
            if not self._needed:
                self._before = self._read()
            self._needed.setdefault(thread, []).append(value)
            self._write(value)

    def _is_free_for(self, value: T) -> bool:
        return self._of_threads or all(values[-1] == value for values in self._needed.values())

    def _end(self, thread: int) -> None:
        with self._changed:
            values = self._needed[thread]
            values.pop()
            if values:
                self._write(values[-1])
            else:
                del self._needed[thread]
                if self._of_threads or not self._needed:
                    self._write(cast(T, self._before))
            self._changed.notify_all()

    def _of_this_thread_alone(self) -> None:
        """In a forked process, where the other threads are not."""
        self._changed, needed, mine = threading.Condition(), self._needed, threading.get_ident()
        self._needed = {thread: values for thread, values in needed.items() if thread == mine}
        if needed and not self._needed:
            self._write(cast(T, self._before))


def _products() -> tuple[Any, Any]:
    return torch.backends.cuda.matmul, torch.backends.cudnn.conv  # type: ignore[attr-defined]


def _write_precisions(precisions: tuple[str, ...]) -> None:
    for setting, precision in zip(_products(), precisions):
        setting.fp32_precision = precision


_precisions = ProcessWide(lambda: tuple(setting.fp32_precision for setting in _products()), _write_precisions)
_threads = ProcessWide(torch.get_num_threads, torch.set_num_threads, of_threads=True)
_dtype = ProcessWide(torch.get_default_dtype, torch.set_default_dtype)


@contextmanager
def tf32_products(wanted: bool) -> Iterator[None]:
    """float32 matrix products on a GPU in TF32 (10-bit mantissa, much faster), or exactly, whatever was set before.

    Convolutions too, of which a tower's patch embedding is one; torch's default for them is TF32. A model that is run
    outside of this is not a float32 model there. Also a decorator. A thread that wants the other one waits.
    """
    with _precisions.at(("tf32",) * 2 if wanted else ("ieee",) * 2):
        yield


@contextmanager
def one_thread(wanted: bool) -> Iterator[None]:
    """torch's CPU operations on one thread, or as before: threads that wait for each other cost a small step more
    than they bring as soon as a core has other work (docs/decisions.md)."""
    with _threads.at(1) if wanted else nullcontext():
        yield


@contextmanager
def own_defaults() -> Iterator[None]:
    """With torch's defaults as this package takes them for granted: float32, on the CPU. Also a decorator.

    People set others for language models, by torch.set_default_dtype and torch.set_default_device.
    """
    with _dtype.at(torch.float32), torch.device("cpu") if torch.get_default_device().type != "cpu" else nullcontext():
        yield


_loading = threading.RLock()


@contextmanager
def loading() -> Iterator[None]:
    """One thread at a time: transformers' modules are imported by parts, and two threads find halves of them. Also a
    decorator."""
    with _loading:
        yield


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
