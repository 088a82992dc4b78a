"""What the ranks of a replica find out together of its rows: the one choice of latents, and the residuals.

Shape suffixes: B rows of a replica, N rows of anything, G groups, D d_in, K places for candidates of a row, M entries.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from saevlm_fast.kernels.grouping import entry_rows
from saevlm_fast.kernels.segment_sum import segment_sum
from saevlm_fast.kernels.sparse_decode import group_bag_offsets
from saevlm_fast.kernels.topk_encode import batch_topk_encode, topk_encode
from saevlm_fast.peers import Peers, Ranks, in_order
from saevlm_fast.sae import SparseAutoencoder
from saevlm_fast.sparse_codes import SparseCodes
from saevlm_fast.training.choice import keep_of_batch, keep_of_rows
from saevlm_fast.training.shards import Shard


class Chosen(NamedTuple):
    """The rank's part of the one choice: its codes in CSR form, and the smallest activation that any rank keeps (None
    of topk, which has no threshold)."""

    codes: SparseCodes
    smallest: Tensor | None


def choose(sae: SparseAutoencoder, shard: Shard, ranks: Ranks, x_BD: Tensor, n_kept: int | None = None) -> Chosen:
    """What training keeps of a batch, of topk, batch_topk and matryoshka.

    Args:
        sae: the rank's part. shard: which latents that are.
        ranks: all of them.
        x_BD: the replica's rows of the batch [B, d_in].
        n_kept: k times the rows of the whole batch; k times these if None.
    """
    n_rows = len(x_BD)
    weights = x_BD, sae.W_enc.detach(), sae.b_enc.detach(), sae.b_dec.detach()
    if shard.whole.architecture == "topk":
        k, own_k = shard.whole.known_k, shard.config.known_k
        acts_BK, latents_BK = topk_encode(*weights, own_k)
        kept_BK = keep_of_rows(acts_BK, k, ranks.latents)
        codes = SparseCodes.from_flat(acts_BK, latents_BK, None, shard.size).rows()
        return Chosen(kept_entries(codes, kept_BK.flatten(), x_BD.is_cuda), None)
    n_kept = n_rows * shard.whole.known_k if n_kept is None else n_kept
    acts_M, latents_M, row_offsets = batch_topk_encode(*weights, min(-(-n_kept // n_rows), shard.size))
    kept = keep_of_batch(acts_M, entry_rows(latents_M, row_offsets), n_rows, n_kept, ranks)
    codes = SparseCodes.from_flat(acts_M, latents_M, row_offsets, shard.size)
    return Chosen(kept_entries(codes, kept.mask, x_BD.is_cuda), kept.smallest)


def kept_entries(codes: SparseCodes, mask_M: Tensor, fixed: bool) -> SparseCodes:
    """The entries of a mask. fixed: in as many places as before, with padding behind: a GPU is not asked how many."""
    acts_M, latents_M, row_offsets = codes.csr()
    before_M1 = pad(mask_M.cumsum(0), (1, 0))
    offsets = before_M1[row_offsets]
    if not fixed:
        return SparseCodes.from_flat(acts_M[mask_M], latents_M[mask_M], offsets, codes.d_sae)
    n_places = len(acts_M)
    places_M = torch.where(mask_M, before_M1[:-1], n_places)  # one more, for what is not kept
    acts_M = acts_M.new_zeros(n_places + 1).scatter_(0, places_M, torch.where(mask_M, acts_M, 0))[:-1]
    latents_M = latents_M.new_zeros(n_places + 1).scatter_(0, places_M, torch.where(mask_M, latents_M, 0))[:-1]
    return SparseCodes.from_flat(acts_M, latents_M, offsets, codes.d_sae)


def bag_offsets_of(shard: Shard, codes: SparseCodes) -> Tensor:
    """Bag b * G + g is the run of row b's entries in Matryoshka group g of the whole SAE: [B * G + 1]."""
    _, latents_M, row_offsets = codes.csr()
    if len(shard.whole.group_ends) == 1:
        return row_offsets
    return group_bag_offsets(latents_M, row_offsets, shard.group_ends, shard.size)


def summed_over_ranks(peers: Peers, parts_ND: Tensor) -> tuple[Tensor, int]:
    """The ranks' parts of N rows [N, ...] added up, of a share of these rows: rank r has the r-th.

    Returns:
        The sums of this rank's share, and the rows of a share: ceil(N / R). The last shares may be shorter.
    """
    share = -(-len(parts_ND) // peers.world)
    padded = pad(parts_ND.flatten(1), (0, 0, 0, share * peers.world - len(parts_ND)))
    received = peers.exchange(padded.view(peers.world, share, *parts_ND.shape[1:]))
    first = min(peers.rank * share, len(parts_ND))
    return in_order(received)[: min(share, len(parts_ND) - first)], share


def shared_by_rows(peers: Peers, own_ND: Tensor, share: int, n_rows: int) -> Tensor:
    """The rows of all ranks' shares [n_rows, ...]."""
    padded = pad(own_ND.flatten(1), (0, 0, 0, share - len(own_ND)))
    return peers.gather(padded).flatten(0, 1)[:n_rows].view(n_rows, *own_ND.shape[1:])


def gathered(peers: Peers, own_ND: Tensor, counts: list[int]) -> Tensor:
    """The rows that all have, one after the other; counts: how many each has."""
    missing = max(counts) - len(own_ND)
    padded_ND = own_ND if missing == 0 else torch.cat([own_ND, own_ND.new_zeros(missing, own_ND.shape[1])])
    parts = peers.gather(padded_ND)
    if min(counts) == max(counts):
        return parts.flatten(0, 1)
    return torch.cat([part[:count] for part, count in zip(parts, counts)])


class Residuals(NamedTuple):
    """Of a batch: the gradient of mse that the entries of every group receive [B, G, D]; of this rank's share of the
    rows its sum over rows in the first group [D], and the squared error of all prefixes (0-d)."""

    suffix_BGD: Tensor
    of_b_dec_D: Tensor
    squared: Tensor


def shared_residuals(
    sae: SparseAutoencoder, peers: Peers, x_BD: Tensor, codes: SparseCodes, bags: Tensor, n_batch_rows: int
) -> Residuals:
    """gradients.py's _prefix_residuals: the same sums, whose terms a replica's ranks have between them.

    n_batch_rows: of all replicas.
    """
    n_rows, d_in = x_BD.shape
    n_groups = (len(bags) - 1) // n_rows
    acts_M, latents_M, _ = codes.csr()
    parts_RD = segment_sum(acts_M, latents_M, bags, sae.W_dec.detach())
    own_BGD, share = summed_over_ranks(peers, parts_RD.view(n_rows, n_groups, d_in))
    own_BGD[:, 0] += sae.b_dec.detach()
    for g in range(1, n_groups):
        own_BGD[:, g] += own_BGD[:, g - 1]
    first = peers.rank * share
    own_BGD -= x_BD[first : first + share, None]
    squared = torch.linalg.vector_norm(own_BGD, dim=2).square_().sum()
    own_BGD *= 2 / (n_batch_rows * n_groups)
    for g in reversed(range(n_groups - 1)):
        own_BGD[:, g] += own_BGD[:, g + 1]
    return Residuals(shared_by_rows(peers, own_BGD, share, n_rows), own_BGD[:, 0].sum(0), squared)
