"""Whether ranks on GPUs take the step of one: `torchrun --nproc-per-node 2 -m bench.training.ranks_on_gpus`.

An argument after the module is the number of replicas (1). Every rank also takes the steps of the whole SAE on its own
GPU, and compares losses and its latents' weights. Nothing of it has run on a GPU where it was written.
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

D_IN, D_SAE, K, ROWS, STEPS = 1024, 16384, 20, 4096, 20
TOLERANCE = 1e-3  # of weights after some steps: near ties come out differently where products differ in the last bits


def compare(architecture: str, device: torch.device, peers: MeshPeers) -> float:
    """The largest difference between this rank's decoder rows and those of a whole SAE, after some steps."""
    whole = SAEConfig.sized(D_IN, d_sae=D_SAE, k=K, architecture=architecture)  # type: ignore[arg-type]
    config = TrainConfig(steps=1000, batch_size=ROWS, lr=1e-4, warmup_steps=0, dead_after=ROWS * 5)
    shard = Shard.of(whole, peers.ranks)
    rows = cut(ROWS, shard.n_replicas)[shard.replica]
    parts = ShardedStepper(starting_sae(shard, 0, device), config, shard, peers.ranks, ROWS)
    sae = SparseAutoencoder(whole, device=device)
    sae.reset_parameters(0)
    alone = Stepper(sae, config)
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
            print(f"{architecture} step {step + 1}: loss {losses[0]:.6f} and {losses[1]:.6f}, {seconds * 1e3:.2f} ms")
    own = sae.W_dec.detach()[shard.start : shard.stop]
    return float((parts.sae.W_dec.detach() - own).abs().max())


def main() -> None:
    device, n_replicas = torch.device(own_device("cuda")), int((sys.argv[1:] or ["1"])[0])
    with joined(device, 60, n_replicas) as peers:
        worst = {name: compare(name, device, peers) for name in ("topk", "batch_topk", "matryoshka")}
        (failed,) = peers.agree(any(value > TOLERANCE for value in worst.values()))
        if peers.rank == 0:
            print(", ".join(f"{name}: weights differ by {value:.2e} at most" for name, value in worst.items()))
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
