"""What is measured of an SAE whose latents are spread over ranks: evaluate.py's, on every rank.

Shape suffixes: B rows of a chunk, D d_in, S the rank's latents, M its entries.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from saevlm_fast.kernels.sparse_decode import sparse_decode
from saevlm_fast.kernels.topk_encode import threshold_encode
from saevlm_fast.peers import Ranks, in_order
from saevlm_fast.sae import SparseAutoencoder
from saevlm_fast.sparse_codes import SparseCodes
from saevlm_fast.training.evaluate import Metrics, metrics_of_sums, row_sums
from saevlm_fast.training.evaluated import EvaluatedRows
from saevlm_fast.training.sharded_rows import choose, shared_by_rows, summed_over_ranks
from saevlm_fast.training.shards import Shard, cut


class SharedRowSums:
    """RowSums of such an SAE. All ranks call its methods at once, those of a replica with the same rows.

    Args:
        part: the rank's latents in raw units, with the threshold.
        shard: which they are.
        ranks: all of them.
    """

    def __init__(self, part: SparseAutoencoder, shard: Shard, ranks: Ranks):
        self.part, self.shard, self.ranks = part, shard, ranks
        device = part.b_dec.device
        self.sums_4D = torch.zeros(4, shard.whole.d_in, dtype=torch.float64, device=device)
        self.fired_S = torch.zeros(shard.size, dtype=torch.int64, device=device)
        self.n_fired = torch.zeros(1, dtype=torch.int64, device=device)
        self.n_rows = 0  # of all replicas

    def add(self, x_BD: Tensor) -> None:
        """Rows in raw units that all ranks have, of which each replica measures its own."""
        rows, latents = self.ranks.rows, self.ranks.latents
        self.n_rows += len(x_BD)
        x_BD = x_BD[cut(len(x_BD), rows.world)[rows.rank]]
        share = -(-len(x_BD) // latents.world)
        if share:
            x_BD = x_BD.to(self.part.b_dec.device, self.part.b_dec.dtype)
            self.add_of_replica(x_BD, x_BD[latents.rank * share :][:share])

    @torch.no_grad()
    def add_of_replica(self, x_BD: Tensor, own_BD: Tensor) -> None:
        """Those of the replica, at least one; own_BD: of these, one after the other, the r-th of its ranks' shares of
        ceil(B / L)."""
        part, peers = self.part, self.ranks.latents
        codes = _inference_codes(part, self.shard, self.ranks.one_replica(), x_BD)
        partial_BD = sparse_decode(*codes.flat(), part.W_dec, torch.zeros_like(part.b_dec))
        x_hat_BD = summed_over_ranks(peers, partial_BD)[0] + part.b_dec
        self.sums_4D += row_sums(own_BD, x_hat_BD, part.b_dec)
        fires_M = (codes.top_acts > 0).flatten().long()
        self.fired_S.index_add_(0, codes.top_indices.flatten(), fires_M)
        self.n_fired += fires_M.sum()

    @torch.no_grad()
    def metrics(self) -> Metrics:
        """What `evaluate` says of all rows so far; sums are made rank after rank."""
        ranks = self.ranks
        n_dead = int(ranks.latents.add_up((ranks.rows.add_up(self.fired_S) == 0).sum()))
        sums_4D, n_fired = in_order(ranks.everyone.gather(self.sums_4D)), int(ranks.everyone.add_up(self.n_fired))
        return metrics_of_sums(sums_4D, n_fired, n_dead / self.shard.whole.d_sae, self.n_rows)


@torch.no_grad()
def evaluate_shared(
    part: SparseAutoencoder,
    shard: Shard,
    ranks: Ranks,
    evaluated: EvaluatedRows,
    on_rows: Callable[[int, int], None] = lambda done, total: None,
    batch_rows: int = 4096,
) -> Metrics:
    """`evaluate` of such an SAE: the same measures, on every rank.

    Args:
        part, shard, ranks: as of SharedRowSums.
        evaluated: rows, of which each rank reads its share, and measures it.
        on_rows: called with those so far, by this rank's replica's share, and with all.
        batch_rows: rows of a replica at a time.
    """
    n_rows, peers, sums = evaluated.n_rows, ranks.latents, SharedRowSums(part, shard, ranks)
    mine = cut(n_rows, ranks.rows.world)[ranks.rows.rank]
    for start in range(mine.start, mine.stop, batch_rows):
        n = min(batch_rows, mine.stop - start)
        share = -(-n // peers.world)
        first = min(peers.rank * share, n)
        own_BD = evaluated.rows(torch.arange(start + first, start + min(first + share, n)))
        own_BD = own_BD.to(part.b_dec.device, part.b_dec.dtype)
        sums.add_of_replica(shared_by_rows(peers, own_BD, share, n), own_BD)
        on_rows(min((start + n - mine.start) * ranks.rows.world, n_rows), n_rows)
    sums.n_rows = n_rows
    return sums.metrics()


def _inference_codes(part: SparseAutoencoder, shard: Shard, ranks: Ranks, x_BD: Tensor) -> SparseCodes:
    """The rank's part of the codes at inference: above the threshold, or of the one choice of topk."""
    if shard.whole.architecture == "topk":
        return choose(part, shard, ranks, x_BD).codes
    weights = x_BD, part.W_enc.detach(), part.b_enc.detach(), part.b_dec.detach()
    threshold = part.threshold if part.threshold.ndim == 1 else float(part.threshold)
    return SparseCodes.from_flat(*threshold_encode(*weights, threshold), shard.size)
