"""A run of several ranks between two of its steps: each has its latents, reads its share of the rows, sees all of them.

Shape suffixes: B rows of a batch, D d_in.
"""

from collections.abc import Generator
from contextlib import closing

import torch
from torch import Tensor

from saevlm_fast.config import SAEConfig, TrainConfig
from saevlm_fast.data.order import ShuffledRows
from saevlm_fast.data.rows import Activations
from saevlm_fast.errors import require
from saevlm_fast.sae import SparseAutoencoder
from saevlm_fast.training.process_group import MeshPeers
from saevlm_fast.training.sharded_step import ShardedStepper, choose, shared_by_rows
from saevlm_fast.training.shards import Shard, starting_sae
from saevlm_fast.training.state import TrainingState


class ShareOfRows(ShuffledRows):
    """Of every batch the rows that a rank reads: the next ceil(B / R) of them, so that the shares of all ranks, one
    after the other, are the batch in its order."""

    def __init__(self, activations: Activations, config: TrainConfig, rank: int, world: int):
        super().__init__(activations, config.batch_size, seed=config.seed)
        self.size = -(-min(config.batch_size, activations.n_rows) // world)
        self.first = rank * self.size

    def batch(self, step: int) -> Tensor:
        return super().batch(step)[self.first : self.first + self.size]


class ShardedState(TrainingState):
    """Everything that a rank's next step depends on. Methods that take in or give out more than the rank's own are
    called by all ranks at once.

    Attributes:
        peers: the ranks. shard: the latents of this one. share: the rows that it reads.
    """

    def __init__(
        self,
        activations: Activations,
        sae_config: SAEConfig,
        config: TrainConfig,
        device: torch.device,
        peers: MeshPeers,
    ):
        self.peers, self.shard = peers, Shard(sae_config, peers.rank, peers.world)
        self.latents = self.shard.start, self.shard.stop
        super().__init__(activations, sae_config, config, device, "host")
        self.order = self.share = ShareOfRows(activations, config, peers.rank, peers.world)

    def first_stepper(self) -> ShardedStepper:
        sae = starting_sae(self.shard, self.config.seed, self.device)
        return ShardedStepper(sae, self.config, self.shard, self.peers)

    @torch.no_grad()
    def initialise(self) -> None:
        """As of one process; every rank has computed it, and all take rank 0's."""
        super().initialise()
        b_dec = self.stepper.sae.b_dec
        b_dec.copy_(self.peers.gather(b_dec)[0])
        self.scale = self.peers.share(self.scale)

    def batches(self, start_step: int, n_steps: int, announce: bool = True) -> Generator[Tensor, None, None]:
        """Whole batches [B, d_in]: each rank reads its share, and all share what they have read."""
        n_rows = min(self.config.batch_size, self.activations.n_rows)
        with closing(super().batches(start_step, n_steps, announce)) as own:
            for own_BD in own:
                yield shared_by_rows(self.peers, own_BD, self.share.size, n_rows)

    def check_same_data(self) -> None:
        """ValueError: a rank reads other rows than rank 0, as far as 64 of them show it."""
        seen = self.peers.collect((self.activations.n_rows, self.activations.d, self.fingerprint()))
        for rank, (n_rows, width, digest) in enumerate(seen):
            same = (n_rows, width, digest) == seen[0]
            what = f"rank {rank} reads {n_rows:,} rows of width {width} that are not rank 0's {seen[0][0]:,}"
            require(same, f"activations: {what} ({self.activations.path}); every rank needs the same data")

    def smallest_kept(self, x_BD: Tensor) -> float:
        return float(choose(self.stepper.sae, self.shard, self.peers, x_BD).smallest)

    @torch.no_grad()
    def exported_part(self) -> SparseAutoencoder:
        """The rank's latents in raw units, with a threshold: what `evaluate_shared` takes."""
        part = super().export()
        part.threshold.copy_(part.threshold.clamp(min=0))
        return part

    @torch.no_grad()
    def export_whole(self) -> SparseAutoencoder | None:
        """On rank 0 the whole SAE, in raw units on the CPU, in memory of its size; None on the others."""
        part, names = self.stepper.sae, ["W_enc", "W_dec", "b_enc"]
        threshold = self.calibrated_threshold() if self.needs_calibration() else None
        if part.threshold.ndim == 1:
            names.append("threshold")
        sizes = [self.shard.of_rank(rank).size for rank in range(self.peers.world)]
        whole = SparseAutoencoder(self.sae_config, random=False) if self.peers.rank == 0 else None
        for name in names:
            own = self.stepper.parameters()[name]
            parts = self.peers.to_first(own, [(size, *own.shape[1:]) for size in sizes])
            if whole is not None and parts is not None:
                target = whole.W_enc.T if name == "W_enc" else getattr(whole, name)
                torch.cat(parts, out=target.detach())
        if whole is None:
            return None
        whole.b_dec.copy_(part.b_dec)
        if part.threshold.ndim == 0:
            whole.threshold.copy_(part.threshold if threshold is None else torch.tensor(threshold))
        return self.in_raw_units(whole)
