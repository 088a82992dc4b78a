"""A training step of several ranks: its time, the bytes it tells and the memory it takes, by the number of ranks.

    python -m bench.training.bench_sharded --output FILE.json --plot FILE.png

Each number of ranks is a torchrun of gloo processes on this machine (one is the plain Stepper in one process). On two
cores that shows bytes, memory and that it works: cores are shared, so its times say nothing of speed elsewhere. CPU
seconds of a rank say how much of the work it has. Memory is what a process has after its steps beyond what it had with
torch and the data alone. Bytes are counted where the collectives are called, as received from other ranks.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.helpers import machine
from bench.helpers.arguments import new_file, positive
from saevlm_fast.config import SAEConfig, TrainConfig
from saevlm_fast.files import write_json_atomic
from saevlm_fast.peers import Peers, Ranks
from saevlm_fast.sae import SparseAutoencoder
from saevlm_fast.training.process_group import MeshPeers, joined
from saevlm_fast.training.sharded_step import ShardedStepper
from saevlm_fast.training.shards import Shard, cut, starting_sae
from saevlm_fast.training.step import Stepper

WARM_UP = 2
ARCHITECTURES = ("topk", "batch_topk", "matryoshka")


class CountingPeers:
    """Peers that count what a rank receives from the others."""

    def __init__(self, peers: Peers, received: dict[str, float]):
        self.peers, self.rank, self.world = peers, peers.rank, peers.world
        self.received = received

    def _note(self, kind: str, x: Tensor, share: float) -> None:
        self.received[kind] += x.numel() * x.element_size() * (self.world - 1) * share

    def gather(self, x: Tensor) -> Tensor:
        self._note("gather", x, 1)
        return self.peers.gather(x)

    def exchange(self, x: Tensor) -> Tensor:
        self._note("exchange", x, 1 / self.world)
        return self.peers.exchange(x)

    def add_up(self, x: Tensor) -> Tensor:
        self._note("add_up", x, 2 / self.world)
        return self.peers.add_up(x)

    def share(self, value: Any = None) -> Any:
        return self.peers.share(value)

    def collect(self, value: Any) -> list[Any]:
        return self.peers.collect(value)

    def agree(self, *flags: bool) -> list[bool]:
        return self.peers.agree(*flags)


def resident() -> int:
    """Bytes of memory that this process has now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def sae_config(arguments: argparse.Namespace, architecture: str, d_sae: int) -> SAEConfig:
    return SAEConfig.sized(arguments.d_in, d_sae=d_sae, k=arguments.k, architecture=architecture)  # type: ignore[arg-type]


def counting(ranks: Ranks) -> tuple[Ranks, dict[str, float]]:
    """The same ranks, and what is received from any of them."""
    received = {"gather": 0.0, "exchange": 0.0, "add_up": 0.0}
    return Ranks(*(CountingPeers(peers, received) for peers in ranks)), received


def measure(arguments: argparse.Namespace, peers: MeshPeers | None) -> dict[str, Any]:
    """Of this process's part: seconds of a step (median), bytes received in one, memory."""
    whole = sae_config(arguments, arguments.architecture, arguments.d_sae)
    config = TrainConfig(steps=1000, batch_size=arguments.rows)
    x_BD = torch.randn(arguments.rows, arguments.d_in, generator=torch.Generator().manual_seed(0))
    before = resident()
    received: dict[str, float] = {}
    if peers is None:
        sae = SparseAutoencoder(whole, random=False)
        sae.load_state_dict(starting_sae(Shard(whole, 0, 1), 0, torch.device("cpu")).state_dict())
        stepper = Stepper(sae, config)
    else:
        ranks, received = counting(peers.ranks)
        shard = Shard.of(whole, ranks)
        x_BD = x_BD[cut(len(x_BD), shard.n_replicas)[shard.replica]].clone()
        stepper = ShardedStepper(starting_sae(shard, 0, torch.device("cpu")), config, shard, ranks, arguments.rows)
    for _ in range(WARM_UP):
        stepper.step(x_BD)
    before_steps = sum(received.values())
    seconds, cpu = [], time.process_time()
    for _ in range(arguments.steps):
        start = time.perf_counter()
        output = stepper.step(x_BD)
        seconds.append(time.perf_counter() - start)
    cpu = time.process_time() - cpu
    state = [*stepper.sae.parameters(), *(t for pair in stepper.moments.values() for t in pair), stepper.idle_S]
    return {
        "seconds": sorted(seconds)[len(seconds) // 2],
        "cpu_seconds": cpu / arguments.steps,
        "received_bytes": (sum(received.values()) - before_steps) / arguments.steps,
        "state_bytes": sum(t.numel() * t.element_size() for t in state),
        "memory_bytes": resident() - before,
        "loss": float(output.losses.overall),
    }


def formula(arguments: argparse.Namespace, architecture: str, d_sae: int, world: int, replicas: int) -> float:
    """Bytes that a rank receives in a step, by docs/how-to/many-gpus.md."""
    D, parts = arguments.d_in, world // replicas
    B = -(-arguments.rows // replicas)
    n_groups = len(sae_config(arguments, architecture, d_sae).group_ends)
    told = (parts - 1) * 4 * B * arguments.k if architecture == "topk" else 6 * (world - 1) / world * 2048 * 4
    told += (parts - 1) * 2 * -(-B // parts) * n_groups * D * 4 + (world - 1) * (D + 2) * 4
    return told + 2 * (replicas - 1) / replicas * d_sae / parts * (2 * D + 2) * 4


def run_world(
    arguments: argparse.Namespace, architecture: str, d_sae: int, world: int, replicas: int
) -> dict[str, Any]:
    """Every rank's measurement, of processes of their own."""
    with tempfile.TemporaryDirectory() as folder:
        words = ["--worker", folder, "--architecture", architecture, "--d-sae", d_sae, "--d-in", arguments.d_in]
        words += ["--k", arguments.k, "--rows", arguments.rows, "--steps", arguments.steps, "--replicas", replicas]
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
        start = [sys.executable, *(torchrun if world > 1 else []), "-m", "bench.training.bench_sharded"]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        subprocess.run([*start, *map(str, words)], check=True, env=environment)
        found = [json.loads(path.read_text()) for path in sorted(Path(folder).glob("*.json"))]
    return {
        "architecture": architecture,
        "d_sae": d_sae,
        "ranks": world,
        "replicas": replicas,
        "seconds": max(each["seconds"] for each in found),
        "cpu_seconds": max(each["cpu_seconds"] for each in found),
        "received_bytes": max(each["received_bytes"] for each in found),
        "received_bytes_by_formula": formula(arguments, architecture, d_sae, world, replicas),
        "state_bytes": max(each["state_bytes"] for each in found),
        "memory_bytes": max(each["memory_bytes"] for each in found),
        "loss": found[0]["loss"],
    }


def plot(runs: list[dict[str, Any]], path: Path) -> None:
    """Time, memory and bytes against the number of ranks."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(11, 3.4), layout="constrained")
    panels = (
        ("cpu_seconds", 1, "CPU seconds of a rank in a step"),
        ("memory_bytes", 1 / 2**20, "memory of a rank, MiB"),
        ("received_bytes", 1 / 2**20, "received by a rank in a step, MiB"),
    )
    for (name, unit, title), axis in zip(panels, axes):
        for key in sorted({(run["architecture"], run["d_sae"]) for run in runs}):
            of_key = sorted(
                (run["ranks"], run[name] * unit)
                for run in runs
                if (run["architecture"], run["d_sae"]) == key and run["replicas"] == 1
            )
            axis.plot(*zip(*of_key), marker="o", label=f"{key[0]}, {key[1]:,}")
        axis.set(title=title, xlabel="ranks (gloo)", xticks=sorted({run["ranks"] for run in runs}))
        axis.set_ylim(bottom=0)
    axes[0].legend(fontsize=7)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=new_file)
    parser.add_argument("--plot", type=new_file)
    parser.add_argument("--ranks", type=positive, nargs="+", default=[1, 2, 3, 4])
    parser.add_argument("--replicas", type=positive, nargs="+", default=[1], help="of ranks that they divide")
    parser.add_argument("--sizes", type=positive, nargs="+", default=[16384, 65536], help="d_sae")
    parser.add_argument("--architectures", choices=ARCHITECTURES, nargs="+", default=list(ARCHITECTURES))
    parser.add_argument("--d-in", type=positive, default=256)
    parser.add_argument("--k", type=positive, default=20)
    parser.add_argument("--rows", type=positive, default=512)
    parser.add_argument("--steps", type=positive, default=5)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--architecture", choices=ARCHITECTURES, default="topk", help=argparse.SUPPRESS)
    parser.add_argument("--d-sae", type=positive, default=16384, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker is not None:
        if "RANK" not in os.environ:
            write_json_atomic(arguments.worker / "0.json", measure(arguments, None))
            return
        with joined(torch.device("cpu"), 300, arguments.replicas[0]) as peers:
            write_json_atomic(arguments.worker / f"{peers.rank}.json", measure(arguments, peers))
        return
    if arguments.output is None:
        parser.error("--output is needed")
    runs = []
    for architecture in arguments.architectures:
        for d_sae in arguments.sizes:
            for world in arguments.ranks:
                for replicas in (n for n in arguments.replicas if world % n == 0):
                    runs.append(run_world(arguments, architecture, d_sae, world, replicas))
                    print(runs[-1], flush=True)
    what = {name: getattr(arguments, name) for name in ("d_in", "k", "rows", "steps")}
    write_json_atomic(arguments.output, {"what": what, "machine": machine.describe("cpu"), "runs": runs})
    if arguments.plot is not None:
        plot(runs, arguments.plot)


if __name__ == "__main__":
    main()
