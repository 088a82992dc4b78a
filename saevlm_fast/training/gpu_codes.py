"""The codes of a step on a GPU, of any architecture and of micro-batches, as gpu_step takes them: those of one batch.

Nothing is asked of the device, but of relu and jumprelu how many candidates there are. Where that is a great part of
all, the step goes by matrix products (any_device.py): its codes are not made here.

A step of micro-batches (accumulate.py) is the step of the whole batch, but for what is chosen within each: their codes
are joined, row after row, and what follows is done once. So it takes no more memory than it has entries and rows.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from saevlm_fast.config import CALIBRATED, PENALISED, TrainConfig
from saevlm_fast.kernels.grouping import joined_places, placed
from saevlm_fast.kernels.low_weights import LowWeights
from saevlm_fast.kernels.topk_encode import batch_topk_encode, threshold_encode, topk_encode
from saevlm_fast.kernels.topk_encode_cuda import (
    Centred,
    batch_topk_encode_screened_cuda,
    list_above_cuda,
    topk_encode_screened_cuda,
)
from saevlm_fast.sae import SparseAutoencoder
from saevlm_fast.sparse_codes import SparseCodes, smallest_positive
from saevlm_fast.training.penalty import Band, Entries, Penalty, least_listed, penalised

SPARSE_SHARE = 1 / 32  # of a row's latents: with more candidates, products are faster


class GpuCodes(NamedTuple):
    """The rows x_BD, in the order of the codes; the codes; x - b_dec, if the encoder leaves it; the penalty; and of
    BatchTopK's micro-batches the mean of the smallest activations kept (0-d)."""

    x_BD: Tensor
    codes: SparseCodes
    centred: Centred | None
    penalty: Penalty | None = None
    smallest: Tensor | None = None


def gpu_codes(
    sae: SparseAutoencoder, config: TrainConfig, step: int, x_BD: Tensor, low: LowWeights | None
) -> GpuCodes | None:
    """Of a batch in 0-based step `step`. low: the copy of W_enc that the encoder works with, if it does.

    None: too many latents of a relu or jumprelu SAE fire, or a row is not finite.
    """
    (n_rows, d_in), n = x_BD.shape, min(config.accumulate, len(x_BD))
    pieces = [x_BD[i::n] for i in range(n)]
    x_BD = x_BD if n == 1 else torch.cat(pieces)
    centred = None if low is None else Centred.empty(n_rows, d_in, x_BD.device)
    codes: list[SparseCodes] = []
    penalties: list[Penalty] = []
    for piece_BD in x_BD.split([len(piece) for piece in pieces]):
        start = sum(each.n_rows for each in codes)
        rows = slice(start, start + len(piece_BD))
        part = None if centred is None else Centred(centred.x_BD[rows], centred.norm_B[rows])
        if sae.config.architecture not in PENALISED:
            codes.append(_chosen(sae, piece_BD, low, part))
            continue
        entries = _above(sae, config, piece_BD, low, part)
        if entries is None:
            return None
        code, penalty = penalised(sae, config, step, entries, len(piece_BD))
        codes.append(code)
        penalties.append(penalty.times(len(piece_BD) / n_rows))
    if n == 1:
        return GpuCodes(x_BD, codes[0], centred, penalties[0] if penalties else None)
    smallest = None
    if sae.config.architecture in CALIBRATED:
        smallest = torch.stack([smallest_positive(each.top_acts).float() for each in codes]).mean()
    joined, penalty = _joined(codes, penalties)
    return GpuCodes(x_BD, joined, centred, penalty, smallest)


def _chosen(sae: SparseAutoencoder, x_BD: Tensor, low: LowWeights | None, centred: Centred | None) -> SparseCodes:
    """By k."""
    topk = sae.config.architecture == "topk"
    inputs = x_BD, sae.W_enc.detach(), sae.b_enc.detach(), sae.b_dec.detach(), sae.config.known_k
    if low is None:
        codes = (*topk_encode(*inputs), None) if topk else batch_topk_encode(*inputs)
    elif topk:
        codes = *topk_encode_screened_cuda(*inputs, low=low, centred=centred), None
    else:
        codes = batch_topk_encode_screened_cuda(*inputs, low=low, centred=centred)
    return SparseCodes.from_flat(*codes, sae.config.d_sae)


def _above(
    sae: SparseAutoencoder, config: TrainConfig, x_BD: Tensor, low: LowWeights | None, centred: Centred | None
) -> Entries | None:
    """By a threshold. None: too many, or not finite."""
    most = max(int(SPARSE_SHARE * sae.config.d_sae), 1)  # a row
    inputs = x_BD, sae.W_enc.detach(), sae.b_enc.detach(), sae.b_dec.detach(), least_listed(sae, config)
    if low is not None and centred is not None:
        return list_above_cuda(*inputs, most, low, centred)
    acts_M, latents_M, row_offsets = threshold_encode(*inputs)
    if len(acts_M) == 0:  # kernels take no nothing: padding
        acts_M, latents_M = acts_M.new_zeros(1), latents_M.new_zeros(1)
    return (acts_M, latents_M, row_offsets) if len(acts_M) <= most * len(x_BD) else None


def _joined(codes: list[SparseCodes], penalties: list[Penalty]) -> tuple[SparseCodes, Penalty | None]:
    d_sae = codes[0].d_sae
    acts, latents = (torch.cat([each[i] for each in codes]) for i in (0, 1))
    offsets = [each.row_offsets for each in codes if each.row_offsets is not None]
    if not offsets:
        return SparseCodes.from_flat(acts, latents, None, d_sae), None
    sizes = [len(each.top_acts) for each in codes]
    places_M, row_offsets = joined_places(sizes, offsets)
    joined = SparseCodes.from_flat(placed(acts, places_M), placed(latents, places_M), row_offsets, d_sae)
    if not penalties:
        return joined, None
    loss, bands = torch.stack([each.loss for each in penalties]).sum(), [each.band for each in penalties if each.band]
    if not bands:
        return joined, Penalty(loss, penalties[0].of_act, None)
    pre_M = placed(torch.cat([band.pre_M for band in bands]), places_M)
    of_step_M = placed(torch.cat([band.of_step.expand(size) for band, size in zip(bands, sizes)]), places_M)
    return joined, Penalty(loss, 0.0, Band(pre_M, bands[0].threshold_S, bands[0].bandwidth, of_step_M))
