"""Where the time of a whole training run goes: `python -m bench.training.whole_run --output FILE.json`.

Trains by `saevlm_fast.training.run.train` from a memory-mapped matrix file (made in --directory, removed at the end)
and says how much of the time is the step, and how much waiting for data, logs, checkpoints, start and evaluation.
--page-cache BYTES stands for a store larger than memory: the file is dropped from the page cache before training and
whenever that much of it has been read since. Reading alone is then timed too.
Memory that is not page cache is noted along the way. GOMP_SPINCOUNT=1000 in the environment is what `saevlm-fast` sets.
Latents that die cost a step its auxiliary loss, and how many do is the data's doing: their number is noted too, and
--distinct-rows decides after how many rows the data repeat themselves. With --dead-after out of reach nothing is dead.
On a GPU the step's time is the device's own, from the start of each to its end: where steps are launched kernel by
kernel that is also what the launches take.
"""

import argparse
import ctypes
import mmap
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from bench.helpers import machine
from bench.helpers.arguments import directory, new_file, not_negative, positive
from bench.helpers.clocks import Spans, clocks
from bench.helpers.machine import status_bytes
from bench.helpers.planted import planted_rows
from saevlm_fast.config import SAEConfig, TrainConfig
from saevlm_fast.data.order import ShuffledRows, batches
from saevlm_fast.data.rows import Activations, open_activations
from saevlm_fast.errors import Interrupted
from saevlm_fast.files import write_json_atomic
from saevlm_fast.training import checkpoints as checkpoints_module
from saevlm_fast.training import run as train_module
from saevlm_fast.training import state as state_module
from saevlm_fast.training.capture import CapturedSteps

# What a run does, by the function that does it; waiting for batches is what is left of the loop.
PARTS = {
    "set-up": (state_module.TrainingState, "__init__"),
    "start": (checkpoints_module.RunDirectory, "begin"),
    "loop": (train_module, "take_steps"),
    "step": (CapturedSteps, "step"),
    "log": (checkpoints_module.RunDirectory, "log"),
    "metrics": (train_module, "batch_metrics"),
    "checkpoint": (checkpoints_module.RunDirectory, "checkpoint"),
    "export": (state_module.TrainingState, "export"),
    "save": (checkpoints_module.RunDirectory, "save"),
    "evaluation": (train_module, "evaluate_rows"),
}


@contextmanager
def clocks_there(device: str) -> Iterator[Spans]:
    """helpers.clocks of PARTS; steps on a GPU are timed there, and added at the end."""
    parts, events = dict(PARTS), list[tuple[torch.cuda.Event, torch.cuda.Event]]()
    with ExitStack() as stack:
        if device == "cuda":
            owner, attribute = parts.pop("step")
            stack.enter_context(mock.patch.object(owner, attribute, _timed_there(getattr(owner, attribute), events)))
        spans = stack.enter_context(clocks(parts))
        yield spans
        for begin, end in events:
            end.synchronize()
            spans.append(("step", 0.0, begin.elapsed_time(end) / 1000))


def _timed_there(function: Callable, events: list[tuple[torch.cuda.Event, torch.cuda.Event]]) -> Callable:
    def call(*args: object, **kwargs: object) -> object:
        events.append((torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)))
        events[-1][0].record()
        output = function(*args, **kwargs)
        events[-1][1].record()
        return output

    return call


@contextmanager
def pauses() -> Iterator[list[tuple[float, float]]]:
    """(start, end) of the times in which this process was stopped (SIGSTOP by whoever shares the machine)."""
    found: list[tuple[float, float]] = []
    over = threading.Event()

    def watch() -> None:
        last = time.perf_counter()
        while not over.wait(0.02):
            now = time.perf_counter()
            if now - last > 1:
                found.append((last, now))
            last = now

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield found
    finally:
        over.set()
        watcher.join()


def seconds_without(paused: list[tuple[float, float]], start: float, end: float) -> float:
    """end - start, less the pauses in between."""
    return end - start - sum(max(0.0, min(end, stop) - max(start, begin)) for begin, stop in paused)


def write_rows(path: Path, options: argparse.Namespace) -> None:
    """A .npy of planted concepts, of which the first --distinct-rows come again and again."""
    n_rows, n_distinct = options.n_rows, min(options.distinct_rows or options.n_rows, options.n_rows)
    rows_ND = np.lib.format.open_memmap(path, "w+", np.dtype(options.rows_dtype), (n_rows, options.d_in))
    concepts = options.concepts, options.concepts_per_row
    rows_ND[:n_distinct] = planted_rows(n_distinct, options.d_in, options.device, 0, *concepts).cpu().numpy()
    for start in range(n_distinct, n_rows, n_distinct):
        rows_ND[start : start + n_distinct] = rows_ND[: min(n_distinct, n_rows - start)]
    rows_ND.flush()


@contextmanager
def remembered_steps() -> Iterator[list[CapturedSteps]]:
    """What takes the steps of runs that begin meanwhile."""
    made: list[CapturedSteps] = []

    def make(*args: Any) -> CapturedSteps:
        made.append(CapturedSteps(*args))
        return made[-1]

    with mock.patch.object(train_module, "CapturedSteps", make):
        yield made


def step_counts(steps: CapturedSteps) -> dict[str, int]:
    """What a GPU's steps are like: length of the list of dead latents, graphs made and eager steps so far."""
    return {"listed": steps.stepper.n_listed, "graphs": steps.n_captured, "eager": steps.n_eager}


@contextmanager
def small_page_cache(path: Path, limit: int | None) -> Iterator[None]:
    """A page cache that holds no more than `limit` bytes of one file: full, it is emptied. None: no limit.

    Emptied before a batch is read: the pages that the other loader threads have mapped at that moment are read again.
    """
    if limit is None:
        yield
        return
    drop_from_page_cache(path)
    read_before, read_rows = bytes_read(), Activations.rows

    def rows(self: Activations, *args: Any, **kwargs: Any) -> torch.Tensor:
        nonlocal read_before
        if bytes_read() - read_before > limit:
            drop_from_page_cache(path)
            read_before = bytes_read()
        return read_rows(self, *args, **kwargs)

    with mock.patch.object(Activations, "rows", rows):
        yield


def drop_from_page_cache(path: Path) -> None:
    """Forget the file's pages, those that this process has mapped included (a mapped page is not dropped otherwise)."""
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith(str(path)):
            begin, end = (int(address, 16) for address in line.split()[0].split("-"))
            madvise(begin, end - begin, mmap.MADV_DONTNEED)
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def rows_read_per_second(activations: Activations, order: ShuffledRows, n_steps: int) -> float:
    """Of reading alone: batches as training gets them, nothing done with them."""
    start = time.perf_counter()
    with closing(batches(activations, order, 0, n_steps)) as stream:
        n_rows = sum(len(rows_B) for rows_B, _ in stream)
    return n_rows / (time.perf_counter() - start)


def bytes_read() -> int:
    """That this process has caused to be read from the disk."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes:"))


def run(options: argparse.Namespace, directory: Path) -> dict:
    path = directory / "activations.npy"
    # The start reads norm_batches batches whatever the number of steps: in a short run fewer, as of a long one.
    config = TrainConfig(
        steps=options.steps,
        batch_size=options.batch_size,
        norm_batches=max(1, options.steps // 100),
        dead_after=options.dead_after,
    )
    sae_config = SAEConfig.sized(options.d_in, d_sae=options.d_sae, k=options.k, architecture=options.architecture)
    where = {"device": options.device, "data_on": options.data_on, "capture": options.capture}
    run_options = train_module.RunOptions(directory / "run", checkpoint_every=options.checkpoint_every, **where)
    write_rows(path, options)
    activations = open_activations(path)
    held_out = None if options.evaluate_all else _first_rows(path, directory)
    first = _warm_up(activations, sae_config, config, where, directory)
    order = partial(ShuffledRows, exact_bytes=options.exact_bytes)
    with small_page_cache(path, options.page_cache):
        reading = rows_read_per_second(activations, order(activations, config.batch_size), min(options.steps, 100))
    memory, counts = dict[int, int](), dict[int, dict[str, int]]()
    note_every = max(1, options.steps // 20)

    def on_step(step: int) -> None:
        if step % note_every == 0:
            memory[step] = status_bytes("RssAnon")
            counts[step] = step_counts(taken[-1])

    with (
        small_page_cache(path, options.page_cache),
        mock.patch.object(state_module, "ShuffledRows", order),
        remembered_steps() as taken,
        clocks_there(options.device) as spans,
        pauses() as paused,
    ):
        read_before, start = bytes_read(), time.perf_counter()
        logged: dict[int, dict[str, float]] = {}
        train_module.train(
            activations,
            sae_config,
            config,
            run_options,
            validation=held_out,
            on_step=on_step,
            on_log=logged.__setitem__,
        )
        end = time.perf_counter()
        time.sleep(0.1)  # for the watcher of pauses
    seconds, calls = dict.fromkeys(PARTS, 0.0), dict.fromkeys(PARTS, 0)
    for name, *span in spans:
        seconds[name] += seconds_without(paused, *span)
        calls[name] += 1
    total = seconds_without(paused, start, end)
    seconds["data"] = seconds["loop"] - seconds["step"] - seconds["log"] - seconds["metrics"] - seconds["checkpoint"]
    n_rows = options.steps * options.batch_size
    return {
        "settings": {key: str(value) for key, value in vars(options).items()},
        **machine.describe(options.device),
        "seconds_of_a_first_run": first,
        "norm_batches": config.norm_batches,
        "GOMP_SPINCOUNT": os.environ.get("GOMP_SPINCOUNT"),
        "seconds": {"total": total, **seconds},
        "seconds_paused": end - start - total,
        "step_share_of_loop": seconds["step"] / seconds["loop"],
        "step_share_of_run": seconds["step"] / total,
        "steps_per_second": options.steps / seconds["loop"],
        "eager_share": logged[options.steps].get("details/eager_share", 1.0),
        "dead_latents": {step: logged[step]["sparsity/dead_features"] for step in _spread(list(logged))},
        "explained_variance": logged[options.steps]["metrics/explained_variance"],
        "steps_at_step": counts,
        "file_bytes": path.stat().st_size,
        "bytes_of_the_rows": n_rows * activations.row_bytes,
        "bytes_read_from_disk": bytes_read() - read_before,
        "rows_per_second": {"reading_alone": reading, "steps_alone": n_rows / seconds["step"]},
        "calls": calls,
        "anonymous_bytes_at_step": memory,
    }


def _spread(steps: list[int], most: int = 20) -> list[int]:
    """The last of them, and others at even distances before."""
    return steps[:: -max(1, len(steps) // most)][::-1]


def _warm_up(
    activations: Activations, sae_config: SAEConfig, config: TrainConfig, where: dict, directory: Path
) -> float:
    """What torch imports and compiles in its first steps is the price of a process, not of a run. Its seconds."""
    small = TrainConfig(steps=8, batch_size=64 if where["device"] == "cpu" else config.batch_size, norm_batches=2)
    options = train_module.RunOptions(directory / "warm-up", **where)
    start = time.perf_counter()
    train_module.train(activations, sae_config, small, options, validation=_first_rows(activations.path, directory))
    return time.perf_counter() - start


def _first_rows(path: Path, directory: Path):
    """A validation set of 8192 rows, as a run that has one; of half the rows where there are few."""
    rows_ND = np.load(path, mmap_mode="r")
    np.save(directory / "validation.npy", rows_ND[: min(8192, len(rows_ND) // 2)])
    return open_activations(directory / "validation.npy")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=new_file, required=True)
    parser.add_argument("--directory", type=directory, help="where the matrix file and the run go for the time being")
    parser.add_argument("--n-rows", type=positive, default=100_000, help="of the matrix file")
    parser.add_argument("--distinct-rows", type=positive, help="of these, the first ones; all by default")
    parser.add_argument("--concepts", type=positive, help="that rows are made of; twice their width by default")
    parser.add_argument("--concepts-per-row", type=float, default=8.0, help="mean number")
    parser.add_argument("--d-in", type=positive, default=256)
    parser.add_argument("--d-sae", type=positive, default=4096)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--data-on", choices=["auto", "device", "host"], default="auto")
    parser.add_argument("--eager", dest="capture", action="store_false", help="no CUDA graph")
    parser.add_argument("--rows-dtype", choices=["float16", "float32"], default="float32", help="of the matrix file")
    parser.add_argument("--k", type=positive, default=20)
    parser.add_argument("--architecture", choices=["topk", "batch_topk", "matryoshka"], default="batch_topk")
    parser.add_argument("--batch-size", type=positive, default=1024)
    parser.add_argument("--steps", type=positive, default=300)
    parser.add_argument("--dead-after", type=positive, default=TrainConfig().dead_after, help="rows without firing")
    parser.add_argument("--checkpoint-every", type=positive, help="steps; by default train decides")
    parser.add_argument("--page-cache", type=positive, help="bytes of the file that it may hold")
    parser.add_argument(
        "--exact-bytes", type=not_negative, default=8 << 30, help="a larger file is shuffled in windows"
    )
    parser.add_argument("--evaluate-all", action="store_true", help="evaluate as train does, not on 8192 held-out rows")
    return parser


def main() -> None:
    parser = make_parser()
    options = parser.parse_args()
    try:
        with tempfile.TemporaryDirectory(dir=options.directory) as folder:
            measured = run(options, Path(folder))
    except Interrupted:
        parser.exit(130, "interrupted: nothing is kept of a run that did not end\n")
    except (ValueError, OSError) as error:
        parser.error(str(error))
    write_json_atomic(options.output, measured)
    show(measured)


def show(measured: dict[str, Any]) -> None:
    for name, value in measured["seconds"].items():
        share = 100 * value / measured["seconds"]["total"]
        print(f"{name:12s} {value:9.2f} s {share:6.1f} % {measured['calls'].get(name, ''):>6}")
    dead = {step: f"{n_dead:.0f}" for step, n_dead in measured["dead_latents"].items()}
    print(f"dead latents: {dead}, explained variance {measured['explained_variance']:.4f}")
    if measured["settings"]["device"] == "cuda":
        print("steps:", measured["steps_at_step"])
    print(f"step: {measured['step_share_of_loop']:.3f} of the loop, {measured['step_share_of_run']:.3f} of the run")
    print(f"read from the disk: {measured['bytes_read_from_disk'] / 1e9:.2f} GB of {measured['file_bytes'] / 1e9:.2f}")
    print("rows/s:", {name: round(value) for name, value in measured["rows_per_second"].items()})
    print("anonymous MB:", {step: n_bytes >> 20 for step, n_bytes in measured["anonymous_bytes_at_step"].items()})
    print(f"{measured['steps_per_second']:.1f} steps/s, {measured['eager_share']:.1%} of them eager; ", end="")
    print(f"a first short run took {measured['seconds_of_a_first_run']:.1f} s")


if __name__ == "__main__":
    main()
