"""TopK and BatchTopK encoding whose product runs in bfloat16 and whose choice is made in float32.

    candidates = the c largest of relu(low(x - b_dec) @ low(W_enc) + low(b_enc)), c = k + max(8, k / 2)   topk_encode
    acts       = relu((x - b_dec) @ W_enc[:, candidates] + b_enc[candidates])                             gather_dot
    codes      = the k largest acts

(BatchTopK: B * c and B * k of the whole batch.) bfloat16 keeps 8 bits, so it reorders near ties; here it only proposes.

Guaranteed: acts are float32 values, and the codes are exactly the float32 top k of the candidates, ties to the lower
latent. Not guaranteed: that every member of the float32 top k of all latents is a candidate. One is missed only if
c - k or more others, each smaller in float32, are proposed before it, so all of them lie within two errors of the low
product of it. No bound on that error is checked. An activation that is positive in float32 and not in the low product
is no candidate of BatchTopK, where zeros never compete. Zero activations that fill a row may be at other latents.
"""

import torch
from torch import Tensor

from .common import MAX_K, check
from .grouping import entry_rows
from .sparse_decode import gather_dot
from .topk_encode import batch_topk_encode, topk_encode


def n_candidates(k: int, d_sae: int) -> int:
    """How many candidates are rescored per row: k + max(8, k / 2), within d_sae and what a GPU selects (128)."""
    return min(k + max(8, k // 2), d_sae, max(k, MAX_K))


def topk_encode_rescored(
    x_BD: Tensor, W_enc_DS: Tensor, b_enc_S: Tensor, b_dec_D: Tensor, W_low_DS: Tensor, k: int
) -> tuple[Tensor, Tensor]:
    """(acts [B, K], latents [B, K] int64) as topk_encode. No gradients. No host synchronisation on a GPU.

    W_low_DS: W_enc in the dtype of the product. W_enc_DS in [d_sae, d_in] order in memory. ValueError: shapes, k.
    """
    _check_low(W_enc_DS, W_low_DS)
    centred_BD = x_BD - b_dec_D
    low = _low_inputs(centred_BD, W_low_DS, b_enc_S)
    _, latents_BC = topk_encode(*low, n_candidates(k, W_enc_DS.shape[1]))
    acts_BC = (gather_dot(centred_BD, latents_BC, None, W_enc_DS.T) + b_enc_S[latents_BC]).relu_()
    # Stable: ties stay in the order of the latents. NaN comes first.
    chosen_BK = acts_BC.sort(dim=1, descending=True, stable=True).indices[:, :k].sort(dim=1).values
    return acts_BC.gather(1, chosen_BK), latents_BC.gather(1, chosen_BK)


def batch_topk_encode_rescored(
    x_BD: Tensor, W_enc_DS: Tensor, b_enc_S: Tensor, b_dec_D: Tensor, W_low_DS: Tensor, k: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(acts [M], latents [M] int64, row_offsets [B + 1] int64), M = B * k, as batch_topk_encode; else as above."""
    _check_low(W_enc_DS, W_low_DS)
    n_rows = len(x_BD)
    centred_BD = x_BD - b_dec_D
    low = _low_inputs(centred_BD, W_low_DS, b_enc_S)
    _, latents_C, offsets = batch_topk_encode(*low, n_candidates(k, W_enc_DS.shape[1]))
    rows_C = entry_rows(latents_C, offsets)
    acts_C = (gather_dot(centred_BD, latents_C, offsets, W_enc_DS.T) + b_enc_S[latents_C]).relu_()
    acts_C.masked_fill_(rows_C == n_rows, 0)  # padding
    chosen_M = acts_C.sort(descending=True, stable=True).indices[: n_rows * k]
    # Zeros never compete: they go behind every row, as padding.
    chosen_M = torch.where(acts_C[chosen_M] == 0, len(acts_C), chosen_M).sort().values
    inside_M, chosen_M = chosen_M < len(acts_C), chosen_M.clamp(max=max(len(acts_C) - 1, 0))
    acts_M, latents_M = torch.where(inside_M, acts_C[chosen_M], 0), torch.where(inside_M, latents_C[chosen_M], 0)
    rows_M = torch.where(inside_M, rows_C[chosen_M], n_rows)
    return acts_M, latents_M, torch.searchsorted(rows_M, torch.arange(n_rows + 1, device=rows_M.device))


def _check_low(W_enc_DS: Tensor, W_low_DS: Tensor) -> None:
    expected, shape = tuple(W_enc_DS.shape), tuple(W_low_DS.shape)
    check(shape == expected, f"W_low: shape {shape}, must be W_enc's {expected}")


def _low_inputs(centred_BD: Tensor, W_low_DS: Tensor, b_enc_S: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, W_enc, b_enc, b_dec of the low product: x is rounded once, after centring."""
    low = W_low_DS.dtype
    return centred_BD.to(low), W_low_DS, b_enc_S.to(low), W_low_DS.new_zeros(len(W_low_DS))
