"""The codes of a step on a GPU, of any architecture and of micro-batches, as gpu_step takes them: those of one batch.

Nothing is asked of the device, but of relu and jumprelu how many candidates there are. Where that is a great part of
all, the step goes by matrix products (gpu_dense.py): its codes are not made here.

A step of micro-batches (accumulate.py) is the step of the whole batch, but for what is chosen within each: their codes
are joined, row after row, and what follows is done once. So it takes no more memory than it has entries and rows.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from saevlm_fast.config import CALIBRATED, PENALISED, TrainConfig
from saevlm_fast.kernels.grouping import joined_places, placed
from saevlm_fast.kernels.low_weights import LowWeights
from saevlm_fast.kernels.topk_encode import batch_topk_encode, threshold_encode, topk_encode
from saevlm_fast.kernels.topk_encode_cuda import (
    Candidates,
    Centred,
    batch_topk_encode_screened_cuda,
    candidates_above,
    topk_encode_screened_cuda,
)
from saevlm_fast.sae import SparseAutoencoder
from saevlm_fast.sparse_codes import SparseCodes, smallest_positive
from saevlm_fast.training.dead_latents import padded_size
from saevlm_fast.training.penalty import Entries, Penalty, joined_penalty, least_listed, penalised

SPARSE_SHARE = 1 / 32  # of a row's latents: with more candidates, products are faster


class GpuCodes(NamedTuple):
    """The rows x_BD, in the order of the codes; the codes; x - b_dec, if the encoder leaves it; the penalty; and of
    BatchTopK's micro-batches the mean of the smallest activations kept (0-d)."""

    x_BD: Tensor
    codes: SparseCodes
    centred: Centred | None
    penalty: Penalty | None = None
    smallest: Tensor | None = None


class Asked(NamedTuple):
    """The candidates of a penalised step's whole batch, with x - b_dec, and the places of its entries: 0, too many."""

    candidates: Candidates
    centred: Centred
    n_places: int = 0

    def answered(self) -> "Asked":
        """Once the host has asked. Of so many places there are few, so that few graphs are captured."""
        n, capacity = self.candidates.counted(), self.candidates.pool.capacity
        return self._replace(n_places=0 if n is None else padded_size(max(n, 1), capacity))


def asked_first(sae: SparseAutoencoder, config: TrainConfig, x_BD: Tensor, low: LowWeights) -> Asked:
    """What a step on this batch, which is one chunk, begins with."""
    n_rows, d_in = x_BD.shape
    centred = Centred.empty(n_rows, d_in, x_BD.device)
    return Asked(next(_candidates(sae, config, x_BD, low, centred)), centred)


def gpu_codes(
    sae: SparseAutoencoder,
    config: TrainConfig,
    sparsity: float | Tensor,
    x_BD: Tensor,
    low: LowWeights | None,
    asked: Asked | None = None,
) -> GpuCodes | None:
    """Of a batch.

    sparsity: the penalty's share in this step. low: the copy of W_enc that the encoder works with, if it does. asked:
    what was asked for it.

    None: too many latents of a relu or jumprelu SAE fire, or a row is not finite.
    """
    (n_rows, d_in), n = x_BD.shape, min(config.accumulate, len(x_BD))
    if asked is not None:
        if asked.n_places == 0:
            return None
        codes, penalty = penalised(sae, config, sparsity, asked.candidates.entries(asked.n_places), n_rows)
        return GpuCodes(x_BD, codes, asked.centred, penalty)
    sizes = [len(range(i, n_rows, n)) for i in range(n)]
    x_BD = x_BD if n == 1 else torch.cat([x_BD[i::n] for i in range(n)])
    centred = None if low is None else Centred.empty(n_rows, d_in, x_BD.device)
    parts: list[SparseCodes] = []
    penalties: list[Penalty] = []
    start = 0
    for size in sizes:
        rows = slice(start, start + size)
        start += size
        part = None if centred is None else Centred(centred.x_BD[rows], centred.norm_B[rows])
        if sae.config.architecture not in PENALISED:
            parts.append(chosen(sae, x_BD[rows], low, part))
            continue
        entries = _above(sae, config, x_BD[rows], low, part)
        if entries is None:
            return None
        own_codes, own_penalty = penalised(sae, config, sparsity, entries, size)
        parts.append(own_codes)
        penalties.append(own_penalty.times(size / n_rows))
    if n == 1:
        return GpuCodes(x_BD, parts[0], centred, penalties[0] if penalties else None)
    smallest = None
    if sae.config.architecture in CALIBRATED:
        smallest = torch.stack([smallest_positive(each.top_acts).float() for each in parts]).mean()
    joined, joined_penalty = _joined(parts, penalties)
    return GpuCodes(x_BD, joined, centred, joined_penalty, smallest)


def chosen(sae: SparseAutoencoder, x_BD: Tensor, low: LowWeights | None, centred: Centred | None) -> SparseCodes:
    """By k: the codes of a batch, or of a piece of one. low, centred: both or none, as screened encoders take them."""
    topk, d_sae = sae.config.architecture == "topk", sae.config.d_sae
    inputs = x_BD, sae.W_enc.detach(), sae.b_enc.detach(), sae.b_dec.detach(), sae.config.known_k
    if topk:
        screened = low is not None
        codes = topk_encode_screened_cuda(*inputs, low=low, centred=centred) if screened else topk_encode(*inputs)
        return SparseCodes.from_flat(*codes, None, d_sae)
    if low is None:
        return SparseCodes.from_flat(*batch_topk_encode(*inputs), d_sae)
    return SparseCodes.from_flat(*batch_topk_encode_screened_cuda(*inputs, low=low, centred=centred), d_sae)


def _candidates(
    sae: SparseAutoencoder, config: TrainConfig, x_BD: Tensor, low: LowWeights, centred: Centred
) -> Iterator[Candidates]:
    weights = sae.W_enc.detach(), sae.b_enc.detach(), sae.b_dec.detach()
    return candidates_above(x_BD, *weights, least_listed(sae, config), _most(sae), low, centred)


def _most(sae: SparseAutoencoder) -> int:
    """Candidates of a row, on average."""
    return max(int(SPARSE_SHARE * sae.config.d_sae), 1)


def _above(
    sae: SparseAutoencoder, config: TrainConfig, x_BD: Tensor, low: LowWeights | None, centred: Centred | None
) -> Entries | None:
    """By a threshold. None: too many, or not finite."""
    if low is None or centred is None:
        inputs = x_BD, sae.W_enc.detach(), sae.b_enc.detach(), sae.b_dec.detach()
        acts_M, latents_M, row_offsets = threshold_encode(*inputs, least_listed(sae, config))
        if len(acts_M) == 0:  # kernels take no nothing: padding
            acts_M, latents_M = acts_M.new_zeros(1), latents_M.new_zeros(1)
        return (acts_M, latents_M, row_offsets) if len(acts_M) <= _most(sae) * len(x_BD) else None
    chunks: list[Entries] = []
    for candidates in _candidates(sae, config, x_BD, low, centred):
        n = candidates.counted()
        if n is None:
            return None
        chunks.append(candidates.entries(max(n, 1)))
    return chunks[0] if len(chunks) == 1 else _joined_entries(chunks)[1]


def _joined_entries(parts: Sequence[Entries]) -> tuple[Tensor, Entries]:
    """(where every entry goes, the entries), padding last."""
    acts, latents, offsets = ([part[i] for part in parts] for i in range(3))
    places_M, row_offsets = joined_places([len(acts_M) for acts_M in acts], offsets)
    return places_M, (placed(torch.cat(acts), places_M), placed(torch.cat(latents), places_M), row_offsets)


def _joined(codes: list[SparseCodes], penalties: list[Penalty]) -> tuple[SparseCodes, Penalty | None]:
    d_sae = codes[0].d_sae
    if codes[0].row_offsets is None:
        acts_BK, latents_BK = (torch.cat(parts) for parts in zip(*(each.flat()[:2] for each in codes)))
        return SparseCodes.from_flat(acts_BK, latents_BK, None, d_sae), None
    places_M, entries = _joined_entries([each.csr() for each in codes])
    joined = SparseCodes.from_flat(*entries, d_sae)
    if not penalties:
        return joined, None
    return joined, joined_penalty(penalties, lambda parts: placed(torch.cat(parts), places_M))
