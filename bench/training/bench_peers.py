"""Training steps of other SAE libraries beside ours: `python -m bench.training.bench_peers --output FILE.json`.

Needs `pip install -e '.[peers]'`. A script, not a pytest bench, because every library gets a process of its own: its
imports, its settings and its memory are then its own. Each runs its own public training loop (its trainer's `fit` or
`update`), not a copy of it; the loop asks an iterator for batches, and the time from one batch to the next is a step.
The processes take turns for a few rounds: encoder GEMM, ours, the peer, in the next round the other way round. Ratios
are medians over rounds of turns taken side by side; ours to the GEMM over those beside every peer. A peer that is not
installed or fails is in the result with its reason. Tables and plots: bench/report.py.
"""

import argparse
import importlib
import multiprocessing
import os
import statistics
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from itertools import cycle
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bench.helpers import machine
from bench.helpers.arguments import new_directory, new_file, positive
from bench.helpers.machine import status_bytes
from bench.helpers.planted import planted_rows
from bench.training.peers import FLOOR, OURS, PEERS, Task
from saevlm_fast import __version__
from saevlm_fast.config import SELECTING
from saevlm_fast.files import write_json_atomic
from saevlm_fast.runtime import tf32_products

N_BATCHES = {"cpu": 4, "cuda": 64}  # by device: a GPU takes thousands of steps in a turn, and learns few by heart
DTYPES = ("float32", "tf32", "bfloat16")


@dataclass(frozen=True)
class Turn:
    """Steps that a worker has just made, and the memory it has needed for them beside imports and data."""

    seconds: list[float]
    peak_bytes: int


class TimedBatches:
    """Batches for ever. What passes between handing one out and being asked for the next is a step.

    A turn lasts until its seconds have passed, one step at least; then the worker reports and waits for its next turn.
    """

    def __init__(self, connection: Connection, batches: list[Tensor], memory: "Memory") -> None:
        self.connection, self.batches, self.memory = connection, cycle(batches), memory
        self.start, self.turn_seconds = None, None
        self.seconds: list[float] = []

    def __iter__(self) -> "TimedBatches":
        return self

    def __next__(self) -> Tensor:
        self.memory.synchronize()
        if self.start is not None:
            self.seconds.append(time.perf_counter() - self.start)
        if self.turn_seconds is None or sum(self.seconds) >= self.turn_seconds:
            self._next_turn()
        batch = next(self.batches)
        self.start = time.perf_counter()
        return batch

    def _next_turn(self) -> None:
        if self.seconds:
            self.connection.send(Turn(self.seconds, self.memory.peak()))
        try:
            self.turn_seconds = self.connection.recv()
        except EOFError:
            raise SystemExit from None  # the bench is done with this worker, whatever its loop would do next
        self.memory.restart()
        self.seconds = []


class Memory:
    """Peak memory of the process (Linux) or of the GPU since `restart`, above what there was when it was made."""

    def __init__(self, device: str) -> None:
        self.gpu = torch.device(device).type == "cuda"
        self.base = torch.cuda.memory_allocated() if self.gpu else status_bytes("VmRSS")

    def synchronize(self) -> None:
        if self.gpu:
            torch.cuda.synchronize()

    def restart(self) -> None:
        if self.gpu:
            torch.cuda.reset_peak_memory_stats()
        else:
            with suppress(OSError):  # a sandbox, where the peak is that since the process began
                Path("/proc/self/clear_refs").write_text("5")

    def peak(self) -> int:
        return (torch.cuda.max_memory_allocated() if self.gpu else status_bytes("VmHWM")) - self.base


def work(name: str, task: Task, connection: Connection) -> None:
    """A worker process: trains until the bench hangs up, or sends why it cannot."""
    if task.device == "cpu":
        os.environ["SPARSIFY_DISABLE_TRITON"] = "1"  # its kernels are for GPUs
    try:
        torch.set_num_threads(task.threads)
        importlib.import_module(PEERS[name].module)
        memory_of_data = torch.from_numpy(np.load(task.data)).to(task.device)
        batches = TimedBatches(connection, list(memory_of_data.split(task.rows)), Memory(task.device))
        device_type = torch.device(task.device).type
        low = task.dtype == "bfloat16" and name not in (OURS, FLOOR)
        with tf32_products(task.dtype == "tf32"), torch.autocast(device_type, torch.bfloat16, enabled=low):
            PEERS[name].loop(task, batches)
    except Exception as error:
        traceback.print_exc()
        connection.send(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:200])


class Failed(Exception):
    """A worker could not do its work; the message says why."""


class Worker:
    """The process of one peer, waiting for its turns."""

    def __init__(self, name: str, task: Task, log: Path) -> None:
        self.name, self.device, self.peak_bytes = name, task.device, 0
        try:
            self.version = __version__ if name == OURS else version(PEERS[name].distribution)
        except PackageNotFoundError as error:
            raise Failed(f"not installed: {error}") from None
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_quiet_work, args=(name, task, theirs, log), daemon=True)
        self.process.start()
        theirs.close()

    def turn(self, seconds: float) -> float:
        """Mean seconds of a step, over a turn of about so many seconds."""
        try:
            self.connection.send(seconds)
            turn = self.connection.recv()
        except (EOFError, ConnectionError):
            self.process.join()
            raise Failed(f"its process ended with exit code {self.process.exitcode}") from None
        if isinstance(turn, str):
            raise Failed(turn)
        self.peak_bytes = max(self.peak_bytes, turn.peak_bytes)
        return statistics.fmean(turn.seconds)

    def warm_up(self) -> None:
        """The first steps allocate and compile; on a GPU ours is then recorded in a graph."""
        for _ in range(5 if self.device == "cuda" else 2):
            self.turn(0.0)

    def stop(self) -> None:
        self.connection.close()
        self.process.join(60)
        self.process.terminate()


def _quiet_work(name: str, task: Task, connection: Connection, log: Path) -> None:
    """`work` with what the libraries print in a file, and without the terminal: some of them ask it things."""
    os.setsid()
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    work(name, task, connection)


def peers_of(names: list[str], task: Task, logs: Path) -> Iterator[tuple[str, Worker | Failed]]:
    """Workers of those that have the architecture, warm. A GPU holds all at once: there they start side by side, since
    starting takes longer than the rounds."""

    def start(name: str) -> Worker | Failed:
        try:
            return Worker(name, task, logs / f"{name}.log")
        except Failed as failure:
            return failure

    def warm(worker: Worker | Failed) -> Worker | Failed:
        try:
            if isinstance(worker, Worker):
                worker.warm_up()
            return worker
        except Failed as failure:
            return failure

    at_once = list if task.device == "cuda" else iter
    started = at_once((name, start(name)) for name in names if task.architecture in PEERS[name].architectures)
    yield from at_once((name, warm(worker)) for name, worker in started)


def compare(names: list[str], task: Task, rounds: int, turn_seconds: float, logs: Path) -> Iterator[dict]:
    """A result for every peer, in the form of pytest-benchmark's JSON; ours and the floor last."""
    workers = {name: Worker(name, task, logs / f"{name}.log") for name in (FLOOR, OURS)}
    for worker in workers.values():
        worker.warm_up()
    pairs: list[tuple[float, float]] = []  # of the floor and ours, in every round
    for name, peer in peers_of(names, task, logs):
        try:
            if isinstance(peer, Failed):
                raise peer
            turns, ticks = [], machine.cpu_ticks()
            for n in range(rounds):
                turn = {worker: worker.turn(turn_seconds) for worker in [*workers.values(), peer][:: (1, -1)[n % 2]]}
                turns.append([turn[worker] for worker in (*workers.values(), peer)])
            stolen = machine.stolen_share(ticks)
            peer.stop()
        except Failed as failure:
            yield result(name, task, failed=str(failure))
            continue
        floor, ours, theirs = zip(*turns)
        pairs += zip(floor, ours)
        ratios = {"this_over_ours": median_ratio(theirs, ours), "this_over_encoder_gemm": median_ratio(theirs, floor)}
        about = {"peak_bytes": peer.peak_bytes, "version": peer.version, "stolen_share": stolen}
        yield result(name, task, seconds=theirs, **about, **ratios)
    while len(pairs) < rounds:
        pairs.append((workers[FLOOR].turn(turn_seconds), workers[OURS].turn(turn_seconds)))
    floor, ours = zip(*pairs)
    peak_bytes = {name: worker.peak_bytes for name, worker in workers.items()}
    yield result(
        OURS, task, seconds=ours, peak_bytes=peak_bytes[OURS], version=__version__, this_over_ours=1.0,
        this_over_encoder_gemm=median_ratio(ours, floor),
    )  # fmt: skip
    yield result(
        FLOOR, task, seconds=floor, peak_bytes=peak_bytes[FLOOR], version=torch.__version__, this_over_encoder_gemm=1.0,
        this_over_ours=median_ratio(floor, ours),
    )  # fmt: skip
    for worker in workers.values():
        worker.stop()


def median_ratio(numerators: list[float], denominators: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(numerators, denominators))


def result(name: str, task: Task, seconds: tuple[float, ...] = (), **info: object) -> dict:
    """One line of the JSON: pytest-benchmark's keys, so that report.py reads both."""
    operation, case = f"{task.architecture} training step", f"d_sae {task.d_sae}"
    stats = {"median": statistics.median(seconds), "rounds": len(seconds), "data": seconds} if seconds else None
    dtype = "float32" if name == OURS else task.dtype
    info |= {
        "operation": operation, "case": case, "impl": name, "dtype": dtype, "duties": PEERS[name].duties,
        "shape": {"B": task.rows, "d_in": task.d_in, "d_sae": task.d_sae, "k": task.k},
    }  # fmt: skip
    return {
        "name": f"{operation}[{case}-{name}]",
        "stats": stats,
        "extra_info": info | machine.describe(task.device) | {"threads": task.threads},
    }


def save_batches(path: Path, rows: int, d_in: int, device: str) -> None:
    """Batches of planted concepts less their mean, divided by the norm factor: float32 [N_BATCHES * rows, d_in].

    The mean is 99 % of their energy at d_in 1024. With it, and without a b_dec that starts there (one peer has none),
    our SAE shrinks to the same k latents for all rows within ten steps, and nothing sparse about the work is real.
    """
    x_ND = planted_rows(N_BATCHES[device] * rows, d_in, device)
    x_ND -= x_ND.mean(0)
    np.save(path, (x_ND / x_ND.square().sum(1).mean().sqrt()).cpu().numpy())


def parse_arguments() -> argparse.Namespace:
    peers = [name for name in PEERS if name not in (OURS, FLOOR)]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=new_file, required=True, help="JSON file, rewritten after every result")
    parser.add_argument("--architectures", nargs="+", choices=SELECTING, default=list(SELECTING))
    parser.add_argument("--peers", nargs="*", choices=peers, default=peers)
    parser.add_argument("--d-in", type=positive, default=256)
    parser.add_argument(
        "--d-sae", type=positive, default=2048, help="the real sizes: 6144, 16384 and 65536 at --d-in 1024"
    )
    parser.add_argument("--rows", type=positive, default=256, help="of a batch")
    parser.add_argument("--k", type=positive, default=20)
    parser.add_argument("--rounds", type=positive, default=5)
    parser.add_argument("--turn-seconds", type=float, default=0.5, help="of a turn; one step at least")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default="float32",
        help="of the peers (bfloat16: autocast), not of ours",
    )
    parser.add_argument("--threads", type=positive, default=torch.get_num_threads())
    parser.add_argument("--logs", type=new_directory, help="keep there what the libraries print")
    options = parser.parse_args()
    if options.k > options.d_sae:
        parser.error(f"--k: {options.k} is not at most d_sae = {options.d_sae}")
    if not 0 <= options.turn_seconds < float("inf"):
        parser.error(f"--turn-seconds: {options.turn_seconds} is not a number from 0 up")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device: cuda, but torch sees no GPU here")
    return options


def main() -> None:
    options = parse_arguments()
    results = []
    with tempfile.TemporaryDirectory() as directory:
        data, logs = Path(directory) / "batches.npy", options.logs or Path(directory)
        logs.mkdir(parents=True, exist_ok=True)
        save_batches(data, options.rows, options.d_in, options.device)
        for architecture in options.architectures:
            task = Task(
                architecture, options.d_in, options.d_sae, options.rows, options.k, options.device, options.dtype,
                options.threads, data,
            )  # fmt: skip
            for one in compare(options.peers, task, options.rounds, options.turn_seconds, logs):
                results.append(one)
                write_json_atomic(options.output, {"benchmarks": results})
                print(progress(one), flush=True)
    beside = [f"{one['name']} {one['extra_info'].get('this_over_ours', float('nan')):.2f}" for one in results]
    print("times ours: " + ", ".join(beside))


def progress(one: dict) -> str:
    info = one["extra_info"]
    if "failed" in info:
        return f"{one['name']}: {info['failed']}"
    return (
        f"{one['name']}: {1e3 * one['stats']['median']:,.1f} ms, {info['this_over_ours']:.2f} of ours, "
        f"{info['this_over_encoder_gemm']:.2f} of the encoder GEMM, {info['peak_bytes'] / 2**30:.2f} GiB"
    )


if __name__ == "__main__":
    main()
