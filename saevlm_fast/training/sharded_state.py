"""A run of several ranks between two of its steps: each has its latents, reads its share of the rows, and sees those of
its replica, which are all if there is one.

Shape suffixes: B rows of a batch, D d_in.
"""

from collections.abc import Generator
from contextlib import closing

import torch
from torch import Tensor

from saevlm_fast.config import DataOn, SAEConfig, TrainConfig
from saevlm_fast.data.order import ShuffledRows
from saevlm_fast.data.passes import Pass
from saevlm_fast.data.rows import Activations
from saevlm_fast.errors import require
from saevlm_fast.peers import shared_chunks, summed
from saevlm_fast.sae import SparseAutoencoder
from saevlm_fast.training.control import shuffled
from saevlm_fast.training.memory import rows_go_to_device
from saevlm_fast.training.process_group import MeshPeers
from saevlm_fast.training.scale import Scale
from saevlm_fast.training.sharded_held import SharedResidentRows
from saevlm_fast.training.sharded_rows import choose, gathered
from saevlm_fast.training.sharded_step import ShardedStepper
from saevlm_fast.training.shards import Shard, cut, starting_sae
from saevlm_fast.training.state import TrainingState

_ROWS_AT_A_TIME = 4096


class ShareOfRows(ShuffledRows):
    """Of every batch the rows that a rank reads, so that the shares of all ranks, one after the other, are the batch in
    its order: a replica's are neighbours.

    Attributes:
        counts: rows of each rank's share. first, size: where this one's begins in a batch, and its rows.
    """

    def __init__(self, activations: Activations, config: TrainConfig, shard: Shard):
        super().__init__(activations, config.batch_size, seed=config.seed)
        replicas = cut(min(config.batch_size, activations.n_rows), shard.n_replicas)
        counts_of = [[rank.stop - rank.start for rank in cut(rows.stop - rows.start, shard.world)] for rows in replicas]
        self.counts = [count for counts in counts_of for count in counts]
        place = shard.replica * shard.world + shard.rank
        self.first, self.size = sum(self.counts[:place]), self.counts[place]

    def batch(self, step: int) -> Tensor:
        return super().batch(step)[self.first : self.first + self.size]

    def whole_batch(self, step: int) -> Tensor:
        """ShuffledRows.batch, of all ranks."""
        return super().batch(step)

    def blocks_begun(self, step: int, anew: bool = False) -> list[tuple[int, int]]:
        """Those that the share lies in, about: rows of a batch ascend, and so do blocks."""
        return self._nearby(super().blocks_begun(step, anew))

    def blocks_after(self, step: int) -> list[tuple[int, int]]:
        """The same."""
        return self._nearby(super().blocks_after(step))

    def _nearby(self, blocks: list[tuple[int, int]]) -> list[tuple[int, int]]:
        total = sum(self.counts)
        first, stop = self.first * len(blocks) // total, -(-(self.first + self.size) * len(blocks) // total)
        return blocks[max(first - 1, 0) : stop + 1]


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
        embeddings: Activations | None = None,
        data_on: DataOn = "host",
        others: int = 0,
    ):
        n_rows = min(config.batch_size, activations.n_rows)
        n_replicas, pieces = peers.ranks.rows.world, min(config.accumulate, n_rows)
        require(
            n_replicas == 1 or n_rows // n_replicas >= pieces,
            f"data_parallel: {n_replicas} replicas of {n_rows} rows in {pieces} micro-batches, of which each needs one",
        )
        self.peers, self.shard = peers, Shard.of(sae_config, peers.ranks)
        self.latents = self.shard.owned
        self.share = ShareOfRows(activations, config, self.shard)
        super().__init__(activations, sae_config, config, device, data_on, embeddings, others)
        self.order = self.share
        self._held: SharedResidentRows | None = None

    def _goes_to_device(self, data_on: DataOn, others: int) -> bool:
        """The rank's share of the rows, if that is asked for."""
        if data_on != "device":
            return False
        given = self.activations, self.shard.config, self.config, self.device, data_on, others
        return rows_go_to_device(*given, n_ranks=self.peers.world)

    def first_stepper(self) -> ShardedStepper:
        sae = starting_sae(self.shard, self.config.seed, self.device)
        return ShardedStepper(sae, self.config, self.shard, self.peers.ranks, sum(self.share.counts))

    @torch.no_grad()
    def initialise(self) -> None:
        """As of one process; every rank has computed it, and all take rank 0's."""
        super().initialise()
        b_dec = self.stepper.sae.b_dec
        b_dec.copy_(self.peers.gather(b_dec)[0])
        factor, mean_D = self.peers.share(self.scale.norm_factor), self.scale.mean_D
        self.scale = Scale(factor, None if mean_D is None else self.peers.gather(mean_D)[0])

    def mean(self) -> Tensor:
        """Of all rows, of which each rank sums its own."""
        n_rows, total_D = self.activations.n_rows, torch.zeros(self.activations.d, dtype=torch.float64)
        reading = Pass(f"mean of {self.activations.path}", -(-n_rows // self.peers.world), "rows")
        own = shared_chunks(self.peers, self.activations.chunks, n_rows, _ROWS_AT_A_TIME)
        for x_BD in reading.each(x_BD for _, x_BD in own):
            total_D += x_BD.double().sum(0)
        return (summed(self.peers, total_D.to(self.device)) / n_rows).float()

    def batches(self, start_step: int, n_steps: int, announce: bool = True) -> Generator[Tensor, None, None]:
        """The replica's rows of every batch [B, d_in]: each rank reads its share, and all share what they have read."""
        if self.config.control == "shuffled":  # of the whole batch
            first = self.shard.replica * self.shard.world
            start = sum(self.share.counts[:first])
            rows = slice(start, start + sum(self._counts_of_replica))
            with closing(self.whole_batches(start_step, n_steps, announce)) as whole:
                for x_BD in whole:
                    yield x_BD[rows]
            return
        if self.on_device:
            yield from self._held_batches(start_step, n_steps, whole=False)
            return
        with closing(self._stored_batches(start_step, n_steps, announce)) as own:
            for own_BD in own:
                yield gathered(self.peers.ranks.latents, own_BD, self._counts_of_replica)

    @property
    def _counts_of_replica(self) -> list[int]:
        first = self.shard.replica * self.shard.world
        return self.share.counts[first : first + self.shard.world]

    def _held_batches(self, start_step: int, n_steps: int, whole: bool) -> Generator[Tensor, None, None]:
        """Of rows that the ranks hold on their devices: the replica's, or all of a batch."""
        if self._held is None:
            self._held = SharedResidentRows(self.activations, self.device, self.peers.ranks)
        for step in range(start_step, start_step + n_steps):
            yield self._held.batch(self.share.whole_batch(step), whole)

    def whole_batches(self, start_step: int, n_steps: int, announce: bool = True) -> Generator[Tensor, None, None]:
        """All rows of every batch, on all ranks."""
        with closing(self._unshuffled(start_step, n_steps, announce)) as stream:
            for step, x_BD in enumerate(stream, start_step):
                yield shuffled(x_BD, self.config.seed, step) if self.config.control == "shuffled" else x_BD

    def _unshuffled(self, start_step: int, n_steps: int, announce: bool) -> Generator[Tensor, None, None]:
        if self.on_device:
            yield from self._held_batches(start_step, n_steps, whole=True)
            return
        with closing(self._stored_batches(start_step, n_steps, announce)) as own:
            for own_BD in own:
                yield gathered(self.peers, own_BD, self.share.counts)

    def embedding_batches(self, start_step: int, n_steps: int) -> Generator[Tensor | None, None, None]:
        """Those of all rows of a batch, which MonoLoss needs whatever the replica."""
        with closing(super().embedding_batches(start_step, n_steps)) as own:
            for own_BE in own:
                yield None if own_BE is None else gathered(self.peers, own_BE, self.share.counts)

    def loaded(self) -> None:
        """Once all ranks have loaded their own: replicas tell each other."""
        assert isinstance(self.stepper, ShardedStepper)
        self.stepper.spread()
        self.stepper.spread_counters()

    def check_same_data(self) -> None:
        """ValueError: a rank reads other rows than rank 0, as far as 64 of them show it."""
        seen = self.peers.collect((self.activations.n_rows, self.activations.d, self.fingerprint()))
        for rank, (n_rows, width, digest) in enumerate(seen):
            same = (n_rows, width, digest) == seen[0]
            what = f"rank {rank} reads {n_rows:,} rows of width {width} that are not rank 0's {seen[0][0]:,}"
            require(same, f"activations: {what} ({self.activations.path}); every rank needs the same data")

    def smallest_kept(self, x_BD: Tensor) -> float:
        """x_BD: the same on all ranks, so each replica chooses for itself."""
        sae, ranks = self.sae_config, self.peers.ranks.one_replica()
        l0 = self.config.wanted_l0 if sae.k is None else sae.k
        smallest = choose(self.stepper.sae, self.shard, ranks, x_BD, round(l0 * len(x_BD))).smallest
        assert smallest is not None  # a topk SAE needs no threshold
        return float(smallest)

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
        owned = [each.owned for each in self.shard.of_everyone()]
        whole = SparseAutoencoder(self.sae_config, random=False) if self.peers.rank == 0 else None
        for name in names:
            own = self.stepper.parameters()[name]
            parts = self.peers.to_first(own, [(stop - start, *own.shape[1:]) for start, stop in owned])
            if whole is not None and parts is not None:
                target = whole.W_enc.T if name == "W_enc" else getattr(whole, name)
                for (start, stop), values in zip(owned, parts):
                    target.detach()[start:stop].copy_(values)
        if whole is None:
            return None
        whole.b_dec.copy_(part.b_dec)
        if threshold is not None:
            whole.threshold.fill_(threshold)
        elif part.threshold.ndim == 0:
            whole.threshold.copy_(part.threshold)
        return self.in_raw_units(whole)
