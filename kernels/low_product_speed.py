"""Whether a bfloat16 product is so much faster than a float32 one here that screening with it pays: measured once.

Which processors have units for bfloat16 (AMX, AVX-512 BF16, ARM's BFMMLA, ...) and which of them this torch uses, where
a hypervisor shows them at all, is more than a list of flags can know. So a product of either kind is timed, the first
time that an encode is large enough for it to matter: a tenth of a second, half of one where bfloat16 is emulated. On
one thread and by its own CPU time: with more, other work on a busy host decides who wins (measured).

The answer changes speed and not codes: they are the exact float32 top k either way. But the two ways add in different
orders, so activations differ in their last bits. That a resumed run is bit for bit the one it continues therefore needs
the same answer again: a process keeps to its first one, and it is kept for this machine (its processor and torch) in
the cache directory. SAEVLM_FAST_SCREENING=1 or 0 says yes or no without a measurement.
"""

import hashlib
import json
import math
import os
import platform
import time
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch

from saevlm_fast.files import cache_directory, write_json_atomic
from saevlm_fast.runtime import float32_on_cpu, one_thread

from .common import check

VARIABLE = "SAEVLM_FAST_SCREENING"
NEEDED = 1.5  # times as fast: bounds, candidates and rounding W take what is won below about 1.2
NEEDED_BY_AMX = 1.1  # there the units are known to be good: a measurement that finds little is rather wrong
_SHAPE = 256, 1024, 1024  # rows, d_in, latents
_ROUNDS = 7
_CPUINFO = Path("/proc/cpuinfo")
_TELLING = ("model name", "flags", "CPU implementer", "CPU part", "Features")  # the first three of x86, the rest of ARM
_decided: dict[str, float] = {}  # by machine: what this process goes by


def low_products_pay() -> bool:
    """Whether encoders screen with bfloat16 products on this CPU.

    ValueError: SAEVLM_FAST_SCREENING is set to something else than 0 or 1.
    """
    word = os.environ.get(VARIABLE, "")
    check(word in ("", "0", "1"), f"{VARIABLE}: {word!r} is neither 0 nor 1")
    if word or not torch.backends.mkldnn.is_available():
        return word == "1"
    return _ratio() >= (NEEDED_BY_AMX if torch.cpu._is_amx_tile_supported() else NEEDED)


def _ratio() -> float:
    """Float32's time over bfloat16's: this process's first answer, else the cache's, else measured."""
    machine = _machine()
    if machine not in _decided:
        ratio = _read(machine)
        if ratio is None:
            measured = _measure()
            ratio = _read(machine)  # another process may have been first
            if ratio is None:
                ratio = measured
                _write(machine, ratio)
        _decided.setdefault(machine, ratio)  # or another thread: no lock, which a fork could copy while it is held
    return _decided[machine]


def _measure() -> float:
    """The two products take turns, and the least time of either counts: a host that is busy disturbs both."""
    with one_thread(True), float32_on_cpu(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, a page long, that an ARM processor has no units for bfloat16
        calls = _product(torch.float32), _product(torch.bfloat16)
        for call in calls:
            _seconds(call)  # the first ones compile
        float32, bfloat16 = math.inf, math.inf
        for n in range(_ROUNDS):
            float32, bfloat16 = (min(least, _seconds(call)) for least, call in zip((float32, bfloat16), calls))
            if n >= 2 and bfloat16 > 2 * float32:
                break  # emulated: that is slow, and clear after three rounds
    return float32 / bfloat16


def _product(dtype: torch.dtype) -> Callable[[], object]:
    n_rows, d_in, d_sae = _SHAPE
    x_BD, W_SD = torch.ones(n_rows, d_in, dtype=dtype), torch.ones(d_sae, d_in, dtype=dtype)
    b_S, out_BS = torch.ones(d_sae, dtype=dtype), torch.empty(n_rows, d_sae, dtype=dtype)
    return lambda: torch.addmm(b_S, x_BD, W_SD.t(), out=out_BS)


def _seconds(call: Callable[[], object]) -> float:
    start = time.thread_time()
    call()
    return time.thread_time() - start


# --- kept for this machine -------------------------------------------------------------------------------------------


def _machine() -> str:
    """A digest of all that the times depend on."""
    what = _processor(), torch.__version__, torch.backends.cpu.get_cpu_capability()
    return hashlib.sha256("\n".join(what).encode()).hexdigest()[:24]


@cache
def _processor() -> str:
    """Model and features of the first processor; a name alone is shared by machines whose hypervisor hides some."""
    try:
        lines = _CPUINFO.read_text(encoding="utf-8", errors="replace").split("\n\n")[0].splitlines()
    except OSError:
        lines = []
    return "\n".join(line for line in lines if line.startswith(_TELLING)) or platform.processor() or platform.machine()


def _read(machine: str) -> float | None:
    """The ratio that the cache holds of this machine; None where there is none, or nothing that makes sense."""
    try:
        ratio = json.loads(_file(machine).read_text(encoding="utf-8"))["float32_over_bfloat16"]
        return float(ratio) if 0 < ratio < math.inf else None
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None


def _write(machine: str, ratio: float) -> None:
    """Where the cache cannot be written, the answer is this process's alone."""
    try:
        file = _file(machine)
        file.parent.mkdir(exist_ok=True)
        about = {"processor": _processor().split("\n")[0].replace("\t", ""), "torch": torch.__version__}
        write_json_atomic(file, about | {"float32_over_bfloat16": ratio})
    except (OSError, ValueError):
        pass


def _file(machine: str) -> Path:
    """ValueError: there is no cache directory."""
    return cache_directory() / "products" / f"{machine}.json"
