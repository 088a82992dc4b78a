"""The CPU encoders where bfloat16 products run on matrix units (AMX): such a product screens, float32 decides. Exact.

A bfloat16 product costs a quarter of the float32 one there, and says of every pre-activation z within which bounds it
lies. With x~, w~ the rounded factors of one product, v its value and |.| of vectors their norms (Cauchy-Schwarz),

    |z - v| <= slack + r |v|,    slack = |x - x~| |w~| + |x| |w - w~| + 2 gamma |x| |w| + r |b|

where gamma = d_in 2^-24 covers the sums in float32 of either product, and r is two roundings to bfloat16 (2^-8 each),
for a library may round before it adds the bias. Then as in topk_encode_cpu: the k-th largest lower bound of a group's
maximum is a bound L below the k-th largest z, and only latents whose upper bound reaches L can be among the top k.
These, about twice k, are computed in float32, one dot product each, and the top k is chosen among them. So the codes
are exactly the top k of those float32 values over all latents.

Rows for which that does not work are left to the float32 product: with fewer than k pre-activations certainly above
zero, with values that are not finite, or (TopK) with candidates in nearly every group. So is a whole chunk with so
many candidates that nothing is gained, and a whole BatchTopK or threshold batch if one of its rows is.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .common import GROUP, Workspace
from .grouping import group_by_latent_cpu
from .low_weights import CPU_DTYPE as LOW
from .low_weights import TINY, LowWeights
from .sparse_decode import gather_dot_op
from .topk_encode_cpu import (
    BUFFER_BYTES,
    PANEL,
    batch_topk_encode_cpu,
    keys,
    kth_largest,
    largest,
    nonzero,
    offsets_of_rows,
    threshold_encode_cpu,
    topk_encode_cpu,
    topk_of_entries,
    workspace,
)

UNIT_ROUNDOFF = 2.0**-8  # of LOW
ROUNDING = 2.01 * UNIT_ROUNDOFF  # of an output: a library may round before it adds the bias, and again
MIN_ROWS = 64  # below, reading W takes longer than multiplying with it
MAX_SHARE = 1 / 64  # of the latents as candidates: a float32 dot costs 35 times its share of a product (measured)
MAX_GROUPS = 3 / 4  # of the groups with candidates, in a row of TopK: more say that its bound is vague
_TINY = TINY[LOW]
_panel, _error, _centred = Workspace(), Workspace(), Workspace()


class Chunk(NamedTuple):
    """Low pre-activations of some rows [R, P]; the maximum of every group and its slack, [R, P / 64].

    pre and maxima are held as the integers of bfloat16's bits: they order what is positive, and a maximum of integers
    takes a quarter of the time (measured). If nothing in a group is positive, "maximum" is one of its values.
    """

    start: int
    x_RD: Tensor
    pre_RP: Tensor
    maxima_RG: Tensor
    slack_RG: Tensor

    def lower_RG(self) -> Tensor:
        """Lower bounds of the group's largest z."""
        maxima_RG = self.maxima_RG.view(LOW).float()
        return maxima_RG - maxima_RG.abs() * ROUNDING - self.slack_RG

    def sound_R(self) -> Tensor:
        """Rows whose bounds hold: with a slack this small, |x| |w| is too small for any sum to overflow or be NaN."""
        return (self.slack_RG < 1e30).all(1)


def screens(x_BD: Tensor, W_enc_DS: Tensor, k: int = 1) -> bool:
    """Whether the low product is the faster way here: float32, matrix units, W_enc in [d_sae, d_in] order in memory."""
    # torch.cpu.get_capabilities() would be the public way, but torch 2.11 lacks it.
    fast = torch.cpu._is_amx_tile_supported() and torch.backends.mkldnn.is_available()
    float32 = x_BD.dtype == W_enc_DS.dtype == torch.float32 and W_enc_DS.t().is_contiguous()
    large = len(x_BD) >= MIN_ROWS and W_enc_DS.shape[1] >= 4 * k * GROUP
    return fast and x_BD.device.type == "cpu" and float32 and large


def topk_encode_screened(
    x_BD: Tensor,
    W_enc_DS: Tensor,
    b_enc_S: Tensor,
    b_dec_D: Tensor,
    k: int,
    buffer_bytes: int | None = None,
    low: LowWeights | None = None,
) -> tuple[Tensor, Tensor]:
    """topk_encode. low: those of W_enc, if they are at hand."""
    acts_BK, latents_BK = x_BD.new_empty(len(x_BD), k), torch.empty(len(x_BD), k, dtype=torch.int64)
    decided_B = torch.zeros(len(x_BD), dtype=torch.bool)
    for chunk in _chunks(x_BD, W_enc_DS, b_enc_S, b_dec_D, buffer_bytes, low):
        bound_R = kth_largest(keys(chunk.lower_RG()), k).view(torch.float32).squeeze(1)
        values, positions, sure_R = _candidates(chunk, bound_R, W_enc_DS, b_enc_S, MAX_GROUPS)
        if not sure_R.any():
            continue
        width, decided = chunk.pre_RP.shape[1], nonzero(sure_R) + chunk.start
        kept = topk_of_entries(values, positions // width, len(sure_R), k)
        acts_BK[decided] = values[kept].view(-1, k)
        latents_BK[decided] = (positions[kept] % width).view(-1, k)
        decided_B[decided] = True
    rest = nonzero(~decided_B)
    if len(rest):
        acts_BK[rest], latents_BK[rest] = topk_encode_cpu(x_BD[rest], W_enc_DS, b_enc_S, b_dec_D, k, buffer_bytes)
    return acts_BK, latents_BK


def batch_topk_encode_screened(
    x_BD: Tensor,
    W_enc_DS: Tensor,
    b_enc_S: Tensor,
    b_dec_D: Tensor,
    k: int,
    buffer_bytes: int | None = None,
    low: LowWeights | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """batch_topk_encode. low: those of W_enc, if they are at hand.

    The first of several chunks has a bound from its own groups alone, so it proposes B * k entries at least; a batch of
    so many chunks that these are too many is left to float32.
    """
    capacity = len(x_BD) * k
    if 4 * capacity > _chunk_rows(x_BD, W_enc_DS, buffer_bytes) * W_enc_DS.shape[1] * MAX_SHARE:
        return batch_topk_encode_cpu(x_BD, W_enc_DS, b_enc_S, b_dec_D, k, buffer_bytes)
    acts, positions = x_BD.new_empty(0), torch.empty(0, dtype=torch.int64)
    for chunk in _chunks(x_BD, W_enc_DS, b_enc_S, b_dec_D, buffer_bytes, low):
        bound = acts.amin() if len(acts) == capacity else x_BD.new_zeros(())
        if chunk.maxima_RG.numel() >= capacity:
            key = kth_largest(keys(chunk.lower_RG()).view(1, -1), capacity)
            bound = torch.maximum(bound, key.view(torch.float32).squeeze())
        values, new_positions, sure_R = _candidates(chunk, bound.expand(len(chunk.x_RD)), W_enc_DS, b_enc_S)
        if not sure_R.all():
            return batch_topk_encode_cpu(x_BD, W_enc_DS, b_enc_S, b_dec_D, k, buffer_bytes)
        acts = torch.cat([acts, values])
        positions = torch.cat([positions, new_positions + chunk.start * chunk.pre_RP.shape[1]])
        kept = largest(keys(acts), capacity)
        acts, positions = acts[kept], positions[kept]
    width = chunk.pre_RP.shape[1]
    return acts, positions % width, offsets_of_rows(positions // width, len(x_BD))


def threshold_encode_screened(
    x_BD: Tensor, W_enc_DS: Tensor, b_enc_S: Tensor, b_dec_D: Tensor, threshold: float, buffer_bytes: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    acts, latents, rows = [], [], []
    for chunk in _chunks(x_BD, W_enc_DS, b_enc_S, b_dec_D, buffer_bytes):
        bound_R = torch.tensor(threshold, dtype=torch.float64).to(torch.float32).expand(len(chunk.x_RD))
        values, positions, sure_R = _candidates(chunk, bound_R, W_enc_DS, b_enc_S)
        if not sure_R.all():
            return threshold_encode_cpu(x_BD, W_enc_DS, b_enc_S, b_dec_D, threshold, buffer_bytes)
        above = values > threshold
        values, positions = values[above], positions[above]
        acts.append(values)
        latents.append(positions % chunk.pre_RP.shape[1])
        rows.append(positions // chunk.pre_RP.shape[1] + chunk.start)
    return torch.cat(acts), torch.cat(latents), offsets_of_rows(torch.cat(rows), len(x_BD))


# --- the low product and its bounds ----------------------------------------------------------------------------------


def _chunks(
    x_BD: Tensor,
    W_enc_DS: Tensor,
    b_enc_S: Tensor,
    b_dec_D: Tensor,
    buffer_bytes: int | None,
    low: LowWeights | None = None,
) -> Iterator[Chunk]:
    """Chunks of rows, in memory that the next chunk overwrites; columns from d_sae on are the lowest integer."""
    n_rows, d_sae = len(x_BD), W_enc_DS.shape[1]
    width = -(-d_sae // GROUP) * GROUP
    chunk_rows = _chunk_rows(x_BD, W_enc_DS, buffer_bytes)
    for start in range(0, n_rows, chunk_rows):
        x_RD = x_BD[start : start + chunk_rows]
        x_RD = torch.sub(x_RD, b_dec_D, out=_centred.get(x_RD.numel(), x_RD.dtype).view(x_RD.shape))
        low_RD = x_RD.to(LOW)
        pre_RP = workspace.get(len(x_RD) * width, LOW).view(len(x_RD), width)
        pre_bits_RP = pre_RP.view(torch.int16)
        pre_bits_RP[:, d_sae:] = torch.iinfo(torch.int16).min
        maxima_RG = torch.empty(len(x_RD), width // GROUP, dtype=torch.int16)
        factors_3G = []
        for o in range(0, d_sae, PANEL):
            end = min(o + PANEL, d_sae)
            panel = _low_panel(W_enc_DS.t()[o:end]) if low is None else low.rows(o, end)
            torch.addmm(b_enc_S[o:end].to(LOW), low_RD, panel.W_SD.t(), out=pre_RP[:, o:end])
            groups = pre_bits_RP[:, o : o + PANEL].unflatten(1, (-1, GROUP))
            torch.amax(groups, dim=2, out=maxima_RG[:, o // GROUP : (o + PANEL) // GROUP])
            factors_3G.append(_slack_factors(panel, b_enc_S[o:end]))
        norm_R1 = torch.linalg.vector_norm(x_RD, dim=1, keepdim=True) + _TINY
        error_RD = torch.sub(x_RD, low_RD, out=_error.get(x_RD.numel(), x_RD.dtype).view(x_RD.shape))
        error_R1 = torch.linalg.vector_norm(error_RD, dim=1, keepdim=True) + _TINY
        by_error_G, by_norm_G, constant_G = torch.cat(factors_3G, dim=1)
        slack_RG = error_R1 * by_error_G + norm_R1 * by_norm_G + constant_G  # not `@`, which autocast would round
        slack_RG *= 1.001  # the roundings of the bounds themselves
        yield Chunk(start, x_RD, pre_bits_RP, maxima_RG, slack_RG)


def _chunk_rows(x_BD: Tensor, W_enc_DS: Tensor, buffer_bytes: int | None) -> int:
    """Rows of a chunk, about equal in all of them: what is kept of a row is its pre-activations, or itself."""
    n_bytes = len(x_BD) * max(W_enc_DS.shape[1] * LOW.itemsize, x_BD.shape[1] * x_BD.element_size())
    n_chunks = -(-n_bytes // (buffer_bytes or BUFFER_BYTES))
    return max(1, -(-len(x_BD) // max(1, n_chunks)))


def _slack_factors(panel: LowWeights, b_enc_S: Tensor) -> Tensor:
    """What a group adds to the slack [3, S / 64], rounded up to whole groups: factors of |x - x~|, |x| and 1."""
    gamma = panel.W_SD.shape[1] * 2.0**-24
    bias_S = b_enc_S.abs() * ROUNDING + _TINY
    factors_3S = torch.stack([panel.norm_S + panel.error_S, panel.error_S + 2 * gamma * panel.norm_S, bias_S])
    return torch.nn.functional.pad(factors_3S, (0, -len(b_enc_S) % GROUP)).unflatten(1, (-1, GROUP)).amax(2)


def _low_panel(W_PD: Tensor) -> LowWeights:
    """Rows rounded into memory that the next panel overwrites."""
    panel = LowWeights(_panel.get(W_PD.numel(), LOW).view(W_PD.shape), *W_PD.new_empty(2, len(W_PD)))
    panel.write_(0, W_PD)
    return panel


def _candidates(
    chunk: Chunk, bound_R: Tensor, W_enc_DS: Tensor, b_enc_S: Tensor, max_groups: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """(float32 values, flat positions) of all that may reach its row's bound, in order; and the rows this is true of.

    The others, with a bound of 0, without sound ones, or with candidates in more of the groups, have none here.
    """
    width = chunk.pre_RP.shape[1]
    reach_RG = bound_R[:, None] - chunk.slack_RG
    # v + ROUNDING v + slack >= bound, solved for v; one rounding more for bringing that down to bfloat16.
    cutoff_RG = (reach_RG * (1 - ROUNDING - UNIT_ROUNDOFF)).to(LOW).view(torch.int16)
    cutoff_RG = torch.where(reach_RG > 0, cutoff_RG, torch.iinfo(torch.int16).min)  # all of a hopelessly vague group
    reaches_RG = chunk.maxima_RG >= cutoff_RG
    sure_R = (bound_R > 0) & chunk.sound_R() & (reaches_RG.sum(1) <= max_groups * reaches_RG.shape[1])
    groups_U = nonzero(reaches_RG & sure_R[:, None])
    values_UG = chunk.pre_RP.view(-1, GROUP).index_select(0, groups_U)
    cutoff_U1 = cutoff_RG.view(-1, 1)[groups_U]
    found_M = torch.from_numpy(np.flatnonzero(values_UG.numpy() >= cutoff_U1.numpy()))
    positions_M = groups_U[found_M // GROUP] * GROUP + found_M % GROUP
    positions_M = positions_M[positions_M % width < len(b_enc_S)]
    if len(positions_M) > chunk.pre_RP.numel() * MAX_SHARE:
        return chunk.x_RD.new_empty(0), positions_M[:0], torch.zeros_like(sure_R)
    return _exact(chunk.x_RD, positions_M // width, positions_M % width, W_enc_DS, b_enc_S), positions_M, sure_R


def _exact(x_RD: Tensor, rows_M: Tensor, latents_M: Tensor, W_enc_DS: Tensor, b_enc_S: Tensor) -> Tensor:
    """Pre-activations of these entries in float32, made latent by latent: W is read once (40 % less time, measured)."""
    order_M, _ = group_by_latent_cpu(latents_M, None, len(b_enc_S))
    values_M = torch.empty(len(latents_M), dtype=x_RD.dtype)
    values_M[order_M] = gather_dot_op(x_RD, rows_M[order_M], latents_M[order_M], W_enc_DS.t())
    return values_M.add_(b_enc_S[latents_M])
