"""What several ranks have summed over their images, put together, rank after rank: the sums of one process.

Every rank has images that are neighbours (source.py), rank 0 the first. Sums merge as chunks do (streamed_cosine.py):
each rank's are first lowered to the one minimum of all. Ranks are added in their order, on every rank the same bits;
from one process they differ by the rounding of float64. Sums S x E go around in blocks, of which each rank adds up a
part: a rank receives 2 (R - 1) / R of them, and holds a block beside its own.

Shape suffixes: R ranks, S latents, e latents of a block that one rank adds up, E embedding, M entries, N images.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from saevlm_fast.kernels.streamed_cosine import StreamedState
from saevlm_fast.peers import Peers, laid_end_to_end, share_of, summed
from saevlm_fast.scoring.sums import ActivationRange, Embeddings, HalvedSums, KeptPairs, ShiftedSums
from saevlm_fast.sparse_codes import SparseCodes

_BLOCK_ELEMENTS = 1 << 22  # float64 numbers of sums that go around at a time


def merge_ranks(seen: ActivationRange, pairs: ShiftedSums | HalvedSums | KeptPairs, sparse: bool, peers: Peers) -> int:
    """Range and sums become those of all ranks; returns the number of all images. sparse: of codes.

    All images are in the sums; no more may follow.
    """
    pairs.lower(merge_range(seen, peers))
    if isinstance(pairs, KeptPairs):
        _merge_kept(pairs, seen.low_S, sparse, peers)
    else:
        for each in pairs.halves if isinstance(pairs, HalvedSums) else (pairs,):
            _merge_shifted(each, peers)
    return seen.n_images


def merge_range(seen: ActivationRange, peers: Peers) -> Tensor:
    """The range becomes that of all ranks; returns by how much every minimum fell (0 of a rank without images)."""
    n_images, low_S = seen.n_images, seen.low_S
    none = float("inf") if n_images == 0 else 0.0
    mine_4S = torch.stack([low_S + none, seen.high_S - none, seen.n_active_S.double(), seen.n_low_S.double()])
    low_RS, high_RS, n_active_RS, n_low_RS = peers.gather(mine_4S).unbind(1)
    seen.low_S, seen.high_S = low_RS.amin(0), high_RS.amax(0)
    seen.n_active_S = n_active_RS.sum(0).long()  # whole numbers: exact
    seen.n_low_S = torch.where(low_RS == seen.low_S, n_low_RS, 0.0).sum(0).long()
    seen.n_images = sum(peers.collect(n_images))
    return low_S - seen.low_S if n_images else torch.zeros_like(low_S)


def merge_vectors(sums_SE: Tensor, peers: Peers) -> Tensor:
    """sums_SE becomes the sum of all ranks'; returns the products of each rank's with the ranks' before it, [S]."""
    n_latents, d_emb = sums_SE.shape
    each = max(1, min(_BLOCK_ELEMENTS // max(peers.world * d_emb, 1), -(-n_latents // peers.world)))
    crossed_S = sums_SE.new_zeros(n_latents)
    for block_SE, cross_S in zip(*(t.split(each * peers.world) for t in (sums_SE, crossed_S))):
        sent_SE = pad(block_SE, (0, 0, 0, each * peers.world - len(block_SE)))
        parts_ReE = peers.exchange(sent_SE.view(peers.world, each, d_emb))
        total_eE, cross_e = parts_ReE[0].clone(), sums_SE.new_zeros(each)
        for part_eE in parts_ReE[1:]:
            cross_e += torch.linalg.vecdot(total_eE, part_eE)
            total_eE += part_eE
        found_SE = peers.gather(torch.cat([total_eE, cross_e[:, None]], dim=1)).flatten(0, 1)[: len(block_SE)]
        block_SE.copy_(found_SE[:, :d_emb])
        cross_S.copy_(found_SE[:, d_emb])
    return crossed_S


def merge_states(state: StreamedState, peers: Peers) -> None:
    """The state becomes that of all ranks."""
    parts_R3S = peers.gather(torch.stack(state[1:]))
    num_S, den_S, total_S = parts_R3S[0].clone()
    for num_s, den_s, total_s in parts_R3S[1:]:
        num_S += num_s
        den_S += den_s + total_S * total_s
        total_S += total_s
    num_S += merge_vectors(state.sums_SE, peers)
    for mine_S, whole_S in zip(state[1:], (num_S, den_S, total_S)):
        mine_S.copy_(whole_S)


def _merge_shifted(sums: ShiftedSums, peers: Peers) -> None:
    merge_states(sums.state, peers)
    sums.self_S = summed(peers, sums.self_S)
    scalars = sums.pair_sum.new_tensor([sums.n_images]), sums.pair_sum[None], sums.square_sum[None]
    parts = peers.gather(torch.cat([*scalars, sums.unit_sum_E]))
    first, *others = parts[:, 3:].clone()
    sums.pair_sum, sums.square_sum = parts[:, 1].sum(), parts[:, 2].sum()
    for unit_sum_E in others:
        sums.pair_sum += first @ unit_sum_E
        first += unit_sum_E
    sums.unit_sum_E, sums.n_images = first, int(parts[:, 0].sum())


def _merge_kept(kept: KeptPairs, low_S: Tensor, sparse: bool, peers: Peers) -> None:
    """Every rank is told all codes and embeddings, and evaluates all pairs of a share of the latents."""
    emb_nE = Embeddings.join(kept.images).emb_nE if kept.images else low_S.new_zeros(0, 1)
    if sparse:
        kept.codes = [all_codes(SparseCodes.join(kept.codes, kept.n_latents).to(kept.device), peers)]
    else:
        kept.dense = [laid_end_to_end(peers, torch.cat(kept.dense) if kept.dense else low_S.new_zeros(0, len(low_S)))]
    emb_NE = laid_end_to_end(peers, emb_nE)
    kept.images = [Embeddings(emb_NE, emb_NE[:, 0])]  # norms are not asked for
    own = kept.pair_sums_of(low_S, share_of(peers, kept.n_latents))
    num_S, den_S = laid_end_to_end(peers, torch.stack(own, dim=1)).T.contiguous()
    kept.found, kept.codes, kept.dense, kept.images = (num_S, den_S), [], [], []


def all_codes(codes: SparseCodes, peers: Peers) -> SparseCodes:
    """The codes of all ranks' images, in order."""
    acts_M, latents_M, offsets_N1 = codes.compact().csr()
    acts_M, latents_M, lengths_N = (laid_end_to_end(peers, each) for each in (acts_M, latents_M, offsets_N1.diff()))
    return SparseCodes.from_flat(acts_M, latents_M, pad(lengths_N.cumsum(0), (1, 0)), codes.d_sae)
