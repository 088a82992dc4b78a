"""Which latents of an SAE a rank holds, and what such a part of it starts with.

Part l of L holds latents l * d_sae // L to (l + 1) * d_sae // L - 1: shares differ by one latent at most. It is an SAE
of its own, whose config has the local sizes; what the whole is stands beside it. Of D replicas, which each have all L
parts for their rows of a batch, number d moves a slice of the latents of its part on, cut in the same way, and keeps
their moments; the others' weights it is told.

Shape suffixes: S d_sae, or the latents of one part, D d_in.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from itertools import pairwise

import torch
from torch import Tensor

from saevlm_fast.config import SAEConfig, TrainConfig
from saevlm_fast.errors import require
from saevlm_fast.peers import Ranks
from saevlm_fast.sae import SparseAutoencoder

_BLOCK_NUMBERS = 1 << 22  # random numbers drawn at a time, 32 MiB of them
# Settings of a recipe that a sharded step takes into account. Another one has to be looked at before it is added here.
_KNOWN = (
    frozenset(("steps", "batch_size", "lr", "warmup_steps", "auxk_alpha", "dead_after", "betas", "eps", "clip_norm"))
    | {"threshold_start", "threshold_beta", "norm_batches", "seed", "l1", "target_l0", "bandwidth", "sparsity_warmup"}
    | {"accumulate", "center", "control", "control_cosine", "mono_weight"}
)
_DRAWN_TOGETHER = 16  # numbers that torch's generator makes at once, of which a block holds a multiple


@dataclass(frozen=True)
class Shard:
    """The latents of one rank, start .. stop - 1 of those of `whole`; its number among the parts of an SAE, and among
    the replicas."""

    whole: SAEConfig
    rank: int
    world: int
    replica: int = 0
    n_replicas: int = 1

    @classmethod
    def of(cls, whole: SAEConfig, ranks: Ranks) -> "Shard":
        """This rank's."""
        return cls(whole, ranks.latents.rank, ranks.latents.world, ranks.rows.rank, ranks.rows.world)

    @property
    def start(self) -> int:
        return cut(self.whole.d_sae, self.world)[self.rank].start

    @property
    def stop(self) -> int:
        return cut(self.whole.d_sae, self.world)[self.rank].stop

    @property
    def size(self) -> int:
        return self.stop - self.start

    @property
    def config(self) -> SAEConfig:
        """Of the rank's part: its d_sae, one group of latents, k at most all of them."""
        k = None if self.whole.k is None else min(self.whole.k, self.size)
        return replace(self.whole, d_sae=self.size, k=k, group_sizes=(self.size,))

    @property
    def group_ends(self) -> list[int]:
        """Where each Matryoshka prefix ends among the rank's own latents: 0 or all of them for those cut elsewhere."""
        return [min(max(end - self.start, 0), self.size) for end in self.whole.group_ends]

    @property
    def slices(self) -> list[slice]:
        """Which of the part's latents each replica moves on."""
        return cut(self.size, self.n_replicas)

    @property
    def own(self) -> slice:
        """Which of them this rank moves on."""
        return self.slices[self.replica]

    @property
    def owned(self) -> tuple[int, int]:
        """The same, as latents of the whole: start and stop. Every latent is some rank's."""
        return self.start + self.own.start, self.start + self.own.stop

    def of_everyone(self) -> list["Shard"]:
        """Those of all ranks, in their order."""
        places = [(replica, rank) for replica in range(self.n_replicas) for rank in range(self.world)]
        return [replace(self, rank=rank, replica=replica) for replica, rank in places]


def cut(n: int, n_pieces: int) -> list[slice]:
    """n things, one after the other, in pieces that differ by one at most."""
    ends = [piece * n // n_pieces for piece in range(n_pieces + 1)]
    return [slice(*each) for each in pairwise(ends)]


def check_shardable(sae: SAEConfig, config: TrainConfig, ranks: Ranks) -> None:
    """ValueError: an SAE, or a recipe, that several ranks do not train."""
    world = ranks.everyone.world
    for field in fields(config):
        value = getattr(config, field.name)
        known = field.name in _KNOWN or value == field.default
        require(known, f"{field.name}: {value} is for one process, and torchrun started {world}")
    require(world <= sae.d_sae, f"d_sae: {sae.d_sae} latents for {world} ranks, of which each holds one at least")
    config.check_fits(sae)


@torch.no_grad()
def starting_sae(shard: Shard, seed: int, device: torch.device) -> SparseAutoencoder:
    """The shard's part of the SAE that reset_parameters(seed) makes, whatever the number of ranks.

    All numbers are drawn on every rank, 32 MiB at a time, and only the shard's are kept.
    """
    sae = SparseAutoencoder(shard.config, device=device, random=False)
    for place, own_SD in own_first_rows(shard, seed, shard.start, shard.stop):
        sae.W_dec[place].copy_(own_SD)
        sae.W_enc.T[place].copy_(own_SD)
    return sae


def own_first_rows(shard: Shard, seed: int, start: int, stop: int) -> Iterator[tuple[slice, Tensor]]:
    """The unit rows, float64, that latents start .. stop - 1 of the whole SAE begin with, piece by piece; and where
    each piece lies among these."""
    for first, rows_SD in _random_rows(shard.whole, seed):
        low, high = max(first, start), min(first + len(rows_SD), stop)
        if low < high:
            own_SD = rows_SD[low - first : high - first]
            yield slice(low - start, high - start), own_SD / own_SD.norm(dim=1, keepdim=True)


def _random_rows(whole: SAEConfig, seed: int) -> Iterator[tuple[int, Tensor]]:
    """(first latent, rows in float64) of torch.randn(d_sae, d_in), block by block."""
    generator, d_in = torch.Generator().manual_seed(seed), whole.d_in
    block = max(_DRAWN_TOGETHER, _BLOCK_NUMBERS // d_in // _DRAWN_TOGETHER * _DRAWN_TOGETHER)
    first = 0
    while first < whole.d_sae:
        left = whole.d_sae - first
        n_rows = left if left < 2 * block else block  # the end is drawn with a whole block: never less than 16 numbers
        yield first, torch.randn(n_rows, d_in, generator=generator, dtype=torch.float64)
        first += n_rows
