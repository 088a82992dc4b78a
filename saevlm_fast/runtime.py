"""What long work needs of the process it runs in: a device, exact products, a way to stop."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import wraps
from typing import Any, Generic, ParamSpec, TypeVar

import torch

from saevlm_fast.errors import check_kind, require

P = ParamSpec("P")
T = TypeVar("T")
_EXACT = ("ieee", "none")  # what torch calls a precision at which float32 is float32: chosen, or by default
_AUTOCASTS = ("cpu", "cuda")


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


@dataclass(eq=False)
class _Need(Generic[T]):
    """What a thread needs; not while it needs another value within."""

    thread: int
    value: T
    is_held: bool = False


class ProcessWide(Generic[T]):
    """A setting of the whole process, which is at a value as long as some thread needs it there.

    Threads that need the same value share it: the last one puts back what the first one found. One that needs another
    value waits until nobody needs this one. Within itself a thread may need another one: it gives its own up, and
    waits for both.
    """

    def __init__(self, read: Callable[[], T], write: Callable[[T], None], put_back: Callable[[T], None] | None = None):
        self._read, self._write, self._changed = read, write, threading.Condition()
        self._put_back = put_back or write
        self._needs: list[_Need[T]] = []
        self._before: T | None = None
        _after_fork(self._of_this_thread_alone)

    @contextmanager
    def at(self, value: T) -> Iterator[None]:
        """With the setting at this value. Also a decorator."""
        need = _Need(threading.get_ident(), value)
        try:
            self._begin(need)
            yield
        finally:
            self._end(need)

    def _begin(self, need: _Need[T]) -> None:
        with self._changed:
            for outer in self._of(need.thread):
                outer.is_held = False
            self._changed.notify_all()
            self._hold(need)

    def _hold(self, need: _Need[T]) -> None:
        self._changed.wait_for(lambda: all(each.value == need.value for each in self._needs if each.is_held))
        if not self._needs:
            self._before = self._read()
        if need not in self._needs:
            self._needs.append(need)
        need.is_held = True
        self._write(need.value)

    def _end(self, need: _Need[T]) -> None:
        """Also of one that was interrupted before it was held."""
        with self._changed:
            if need in self._needs:
                self._needs.remove(need)
            need.is_held = False
            self._changed.notify_all()
            outer = self._of(need.thread)[-1:]
            if outer and need.thread == threading.get_ident():  # no other thread holds what is not its own
                self._hold(outer[0])
            elif not self._needs and self._before is not None:
                self._put_back(self._before)
                self._before = None

    def is_safe(self) -> bool:
        """Whether what this thread finds stays: no other one's need alone holds it there."""
        needs = self._needs
        return not needs or bool(self._of(threading.get_ident()))

    def _of(self, thread: int) -> list[_Need[T]]:
        """What a thread needs, the innermost last."""
        return [each for each in self._needs if each.thread == thread]

    def _of_this_thread_alone(self) -> None:
        """In a forked process, where the other threads are not."""
        self._changed, others = threading.Condition(), len(self._needs)
        self._needs = self._of(threading.get_ident())
        if others and not self._needs and self._before is not None:
            self._put_back(self._before)
            self._before = None


def _after_fork(call: Callable[[], None]) -> None:
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=call)


def _of_gpu() -> tuple[Any, ...]:
    return torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn  # type: ignore[attr-defined]


def _of_cpu() -> tuple[Any, ...]:
    return torch.backends.mkldnn.matmul, torch.backends.mkldnn.conv, torch.backends.mkldnn.rnn  # type: ignore[attr-defined]


def _precision_of(settings: Callable[[], tuple[Any, ...]]) -> ProcessWide[tuple[str, ...]]:
    def read() -> tuple[str, ...]:
        return tuple(setting.fp32_precision for setting in settings())

    def write(precisions: tuple[str, ...]) -> None:
        for setting, precision in zip(settings(), precisions):
            setting.fp32_precision = precision

    def put_back(precisions: tuple[str, ...]) -> None:
        """What followed torch.backends.mkldnn.fp32_precision goes on following it, as a CPU's do by themselves."""
        if settings is _of_cpu:
            write(("none",) * len(precisions))
        if read() != precisions:
            write(precisions)

    return ProcessWide(read, write, put_back)


_gpu_precision, _cpu_precision = _precision_of(_of_gpu), _precision_of(_of_cpu)
_dtype = ProcessWide(torch.get_default_dtype, torch.set_default_dtype)


@contextmanager
def tf32_products(wanted: bool) -> Iterator[None]:
    """float32 matrix products on a GPU in TF32 (10-bit mantissa, much faster), or exactly, whatever was set before.

    Convolutions too, of which a tower's patch embedding is one; torch's default for them is TF32. A model that is run
    outside of this is not a float32 model there. Also a decorator. A thread that wants the other one waits; where there
    is no GPU, none is set there. On a CPU they are exact either way.
    """
    with float32_on_cpu(), _gpu_precision.at(("tf32" if wanted else "ieee",) * 3) if _has_gpu() else nullcontext():
        yield


@contextmanager
def float32_on_cpu() -> Iterator[None]:
    """float32 matrix products and convolutions on a CPU exactly. Also a decorator.

    torch.set_float32_matmul_precision("medium"), which people set for a language model on a GPU, makes bfloat16
    products of them on a CPU that has units for it.
    """
    with _cpu_precision.at(("ieee",) * 3):
        yield


@contextmanager
def without_autocast() -> Iterator[None]:
    """Tensors keep their dtypes, within a torch.autocast too. Also a decorator."""
    with ExitStack() as stack:
        for device in _AUTOCASTS:
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


def _has_gpu() -> bool:
    return torch.cuda.is_available()


class _Numbers(threading.local):
    """What each thread within one_thread puts back, the innermost last."""

    def __init__(self) -> None:
        self.before: list[int] = []


_numbers = _Numbers()
_number_of_all: list[int] = []  # what threads within one_thread found before any of them was


@contextmanager
def one_thread(wanted: bool) -> Iterator[None]:
    """torch's CPU operations on one thread, or as before: threads that wait for each other cost a small step more
    than they bring as soon as a core has other work (docs/decisions.md)."""
    if not wanted:
        yield
        return
    found = torch.get_num_threads()
    # A thread that begins while another one is within finds that one's number; within itself it found its own.
    before = next(iter(_number_of_all), found) if found == 1 and not _numbers.before else found
    _numbers.before.append(before)
    _number_of_all.append(before)
    torch.set_num_threads(1)
    try:
        yield
    finally:
        _numbers.before.pop()
        _number_of_all.remove(before)
        torch.set_num_threads(before)


_after_fork(lambda: _number_of_all.__setitem__(slice(None), _numbers.before))


@contextmanager
def own_defaults() -> Iterator[None]:
    """With torch's defaults as this package takes them for granted: float32, on the CPU, no autocast, and products of
    float32 on the CPU that are float32's. Also a decorator.

    People set others for language models, by torch.set_default_dtype, torch.set_default_device, torch.autocast and
    torch.set_float32_matmul_precision. torch.inference_mode is left too, as what it makes is of no use outside of it;
    that turns gradients on, so torch.no_grad belongs inside.
    """
    with torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext(), _own_numbers():
        yield


@contextmanager
def exact_defaults() -> Iterator[None]:
    """own_defaults, with exact products of float32 on a GPU too: for whatever measures. Also a decorator."""
    with tf32_products(False), own_defaults():
        yield


@contextmanager
def _own_numbers() -> Iterator[None]:
    with ExitStack() as stack:
        stack.enter_context(_dtype.at(torch.float32))
        stack.enter_context(float32_on_cpu())
        stack.enter_context(without_autocast())
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        yield


def exactly(function: Callable[P, T]) -> Callable[P, T]:
    """The function with numbers as in own_defaults, for what is called every step: it looks first whether they are so.

    Dynamo, which traces no such settings, traces the function as it is.
    """

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        if torch.compiler.is_dynamo_compiling() or _are_own():
            return function(*args, **kwargs)
        with _own_numbers():
            return function(*args, **kwargs)

    return call


def _are_own() -> bool:
    """In 2 to 3 us, where the contexts take 30, get_default_device() 3 and the public name of a precision 1."""
    return (
        _dtype.is_safe()
        and _cpu_precision.is_safe()
        and torch.get_default_dtype() is torch.float32
        and torch.empty(0).is_cpu
        and not any(torch.is_autocast_enabled(device) for device in _AUTOCASTS)
        and all(torch._C._get_fp32_precision_getter("mkldnn", kind) in _EXACT for kind in ("matmul", "conv"))
    )


_loading = threading.RLock()


def _renew_loading() -> None:
    """In a forked process, where a thread that holds it may not be."""
    global _loading
    _loading = threading.RLock()


_after_fork(_renew_loading)


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
