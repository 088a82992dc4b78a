"""Whether ranks on GPUs take the step of one: `torchrun --nproc-per-node 2 -m bench.training.ranks_on_gpus`.

An argument after the module is the number of replicas (1). Every rank also takes the steps of the whole SAE on its own
GPU, and compares losses and its latents' weights. Before that: what the collectives of a step take.

Some latents are made weak, which never fire and so are dead after some steps: 256, of which all take part in the
auxiliary loss, and of Matryoshka 1,024, which are more than take part. The rows that make a latent dead are more than a
GPU's list of dead latents looks ahead (DeadBound), or it would hold all latents.
"""

import sys
import time

import torch

from saevlm_fast.config import SAEConfig, TrainConfig
from saevlm_fast.sae import SparseAutoencoder
from saevlm_fast.training.process_group import MeshPeers, joined, own_device
from saevlm_fast.training.sharded_step import ShardedStepper
from saevlm_fast.training.shards import Shard, cut, starting_sae
from saevlm_fast.training.step import Stepper

D_IN, D_SAE, K, ROWS, STEPS = 1024, 16384, 20, 4096, 30
DEAD_AFTER = 20 * ROWS
WEAK = {"topk": 64, "batch_topk": 64, "matryoshka": 16}  # every so many-th latent
REPEATS = 20  # of a collective
TOLERANCE = 1e-3  # of weights after some steps: near ties come out differently where products differ in the last bits


def weaken(sae: SparseAutoencoder, start: int, every: int) -> None:
    """Latents that are dead soon, of an SAE whose first is the start-th of all."""
    with torch.no_grad():
        sae.W_enc.T[-start % every :: every] *= 0.1


def compare(architecture: str, device: torch.device, peers: MeshPeers) -> float:
    """The largest difference between this rank's decoder rows and those of a whole SAE, after some steps."""
    whole = SAEConfig.sized(D_IN, d_sae=D_SAE, k=K, architecture=architecture)  # type: ignore[arg-type]
    config = TrainConfig(steps=1000, batch_size=ROWS, lr=1e-4, warmup_steps=0, dead_after=DEAD_AFTER)
    shard = Shard.of(whole, peers.ranks)
    rows = cut(ROWS, shard.n_replicas)[shard.replica]
    part, sae = starting_sae(shard, 0, device), SparseAutoencoder(whole, device=device)
    sae.reset_parameters(0)
    weaken(part, shard.start, WEAK[architecture])
    weaken(sae, 0, WEAK[architecture])
    parts, alone = ShardedStepper(part, config, shard, peers.ranks, ROWS), Stepper(sae, config)
    generator = torch.Generator().manual_seed(1)
    for step in range(STEPS):
        x_BD = torch.randn(ROWS, D_IN, generator=generator).to(device)
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        output = parts.step(x_BD[rows])
        torch.cuda.synchronize(device)
        seconds, expected = time.perf_counter() - start, alone.step(x_BD)
        losses = float(output.losses.overall), float(expected.losses.overall)
        if peers.rank == 0 and step % 5 == 4:
            both = f"loss {losses[0]:.6f} and {losses[1]:.6f}"
            dead = f"{int(output.n_dead)} dead, {parts.n_listed} listed"
            print(f"{architecture} step {step + 1}: {both}, {dead}, {seconds * 1e3:.2f} ms", flush=True)
    own = sae.W_dec.detach()[shard.start : shard.stop]
    return float((parts.sae.W_dec.detach() - own).abs().max())


def tell_times(device: torch.device, peers: MeshPeers) -> None:
    """What the host takes to issue a collective, and until the device is done with it."""
    rows_BD, counts = torch.ones(ROWS, D_IN, device=device), torch.ones(2048, dtype=torch.int32, device=device)
    share = rows_BD[: ROWS // peers.world]
    pieces = rows_BD[: len(share) * peers.world].view(peers.world, -1, D_IN)
    ways = {
        "gather of rows": lambda: peers.gather(share),
        "exchange of rows": lambda: peers.exchange(pieces),
        "gather of counts": lambda: peers.gather(counts),
        "sum of counts": lambda: peers.add_up(counts),
    }
    for name, way in ways.items():
        way()
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        for _ in range(REPEATS):
            way()
        issued = time.perf_counter() - start
        torch.cuda.synchronize(device)
        done = time.perf_counter() - start
        if peers.rank == 0:
            print(f"{name}: {1e3 * issued / REPEATS:.3f} ms, done {1e3 * done / REPEATS:.3f} ms", flush=True)


def main() -> None:
    device, n_replicas = torch.device(own_device("cuda")), int((sys.argv[1:] or ["1"])[0])
    with joined(device, 60, n_replicas) as peers:
        tell_times(device, peers)
        worst = {name: compare(name, device, peers) for name in ("topk", "batch_topk", "matryoshka")}
        (failed,) = peers.agree(any(value > TOLERANCE for value in worst.values()))
        if peers.rank == 0:
            print(", ".join(f"{name}: weights differ by {value:.2e} at most" for name, value in worst.items()))
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
