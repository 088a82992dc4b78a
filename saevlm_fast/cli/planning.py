"""What --dry-run needs: whether an output can be written, what there is of memory and disk, how long a step takes."""

import gc
import os
import shutil
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saevlm_fast.errors import require
from saevlm_fast.training.memory import free_memory, training_memory

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    import torch

    from saevlm_fast.config import SAEConfig, TrainConfig

_TIMED_STEPS = 2
_CHEAP_STEP = 1e13  # multiplications of a step, above which it is not timed on a CPU
_ARITHMETIC = "by arithmetic, not measured"


def check_writable(output: Path) -> None:
    """ValueError unless `output` could be written: the nearest directory above it that is there must allow it."""
    there = _nearest(output)
    require(there.is_dir() or there == output.absolute(), f"output: {output} cannot be written, {there} is a file")
    require(os.access(there, os.W_OK), f"output: {output} cannot be written, {there} does not allow it")


def disk_figures(output: Path, needed: int, kept: tuple[Path, int] | None = None) -> dict[str, Any]:
    """What it takes on disk and what is free; with a warning if that is less. kept: a store that is written as well."""
    there = _nearest(output)
    figures: dict[str, Any] = {"output": str(output)}
    free, lacking = shutil.disk_usage(there).free, False
    if kept is not None:
        place = _nearest(kept[0])
        if place.stat().st_dev == there.stat().st_dev:
            needed += kept[1]
        else:
            lacking = kept[1] > shutil.disk_usage(place).free
    figures |= {"disk_bytes": needed, "free_disk_bytes": free}
    figures |= {} if kept is None else {"of_the_kept_store_bytes": kept[1]}
    return figures | ({"disk_warning": "not enough is free"} if needed > free or lacking else {})


def _nearest(path: Path) -> Path:
    """It, or the nearest directory above it that is there."""
    return next(each for each in (path.absolute(), *path.absolute().parents) if each.exists())


def replaced_figures(output: Path, force: bool) -> dict[str, Any]:
    """What --force replaces, if something is there: it takes space beside the new."""
    there = force and output.is_dir() and any(output.iterdir())
    return {"replaces": f"{output}, which stays until the new is whole"} if there else {}


def memory_figures(
    device: "torch.device", needed: int, free: int | None = None, *, without: str | None = None
) -> dict[str, Any]:
    """What it takes in memory, which is arithmetic, and what is free; with a warning if that is less.

    free: before any of what is needed was loaded, where some is by now; it would count twice.
    without: what comes on top and is not counted.
    """
    free = free_memory(device) if free is None else free
    figures: dict[str, Any] = {"device": str(device), "memory_bytes": needed, "free_memory_bytes": free}
    if free is None:
        figures.pop("free_memory_bytes")
    figures |= {} if without is None else {"memory_leaves_out": without}
    return figures | ({"memory_warning": "not enough is free"} if free is not None and needed > free else {})


@contextmanager
def peak_memory(device: "torch.device") -> "Iterator[Callable[[], int]]":
    """A call that says, after the work inside, by how many bytes the device's memory has risen for it at most.

    0 where the system does not say (of a CPU only Linux does); less than it was where the old peak cannot be forgotten.
    """
    import torch

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield lambda: torch.cuda.max_memory_allocated(device) - before
        return
    gc.collect()  # garbage that is given back inside would hide what the work takes
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak starts anew
    before = max(_status_bytes("VmRSS"), _status_bytes("VmHWM"))  # the old peak, where a sandbox keeps it
    yield lambda: max(0, _status_bytes("VmHWM") - before)


def _status_bytes(name: str) -> int:
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:")), 0)


def time_figures(sae: "SAEConfig", config: "TrainConfig", n_rows: int, device: "torch.device") -> dict[str, Any]:
    """How long a run takes, from a few steps on random rows, if one is cheap."""
    batch_size = min(config.batch_size, n_rows)
    multiplications = 6.0 * batch_size * sae.d_in * sae.d_sae
    free = free_memory(device)
    if free is not None and training_memory(sae, batch_size, config.accumulate, config.control) > free:
        return {"time": "not estimated: it does not fit into memory"}
    if device.type == "cpu" and multiplications > _CHEAP_STEP:
        return {"time": f"{multiplications * config.n_steps:.2g} multiplications ({_ARITHMETIC})"}
    seconds = _seconds_a_step(sae, config, batch_size, device)
    return {"a_step_seconds": seconds, "all_steps_seconds": seconds * config.n_steps}


def time_of_all(saes: "Iterable[tuple[SAEConfig, TrainConfig, int]]", device: "torch.device") -> dict[str, Any]:
    """time_figures of several, with their rows: their steps are taken one after another."""
    times = [time_figures(*each, device) for each in saes]
    unknown = [each for each in times if "time" in each]
    return unknown[0] if unknown else {name: sum(each[name] for each in times) for name in times[0]}


def _seconds_a_step(sae_config: "SAEConfig", config: "TrainConfig", batch_size: int, device: "torch.device") -> float:
    import torch

    from saevlm_fast.sae import SparseAutoencoder
    from saevlm_fast.training.capture import CapturedSteps
    from saevlm_fast.training.step import Stepper

    sae = SparseAutoencoder(sae_config, device=device, random=False)
    sae.reset_parameters(config.seed)
    stepper = CapturedSteps(Stepper(sae, config))
    x_BD = torch.randn(batch_size, sae_config.d_in, device=device)
    for _ in range(1 if device.type == "cpu" else 3):  # compiles, allocates; a GPU's third captures
        stepper.step(x_BD)

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    wait()
    start = time.perf_counter()
    for _ in range(_TIMED_STEPS):
        stepper.step(x_BD)
    wait()
    return (time.perf_counter() - start) / _TIMED_STEPS


class Enough(Exception):
    """Raised in a callback of work that is only timed."""


class Stopwatch:
    """A callback that times the second batch of a loop, and then stops it: what comes first is set-up."""

    def __init__(self) -> None:
        self.first: tuple[float, int] | None = None
        self.seconds_each: float | None = None

    def __call__(self, done: int) -> None:
        now = time.perf_counter()
        if self.first is not None:
            self.seconds_each = (now - self.first[0]) / max(done - self.first[1], 1)
            raise Enough
        self.first = now, done
