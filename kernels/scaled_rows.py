"""Vectors u_i = scale_i e_i in float64 of embeddings e [N, E] in any floating dtype, and sums of them.

    scaled_rows:    u [N, E]      scaled_sum:  sum_i u_i [E]      squared_norms:  |e_i|^2 [N]

in plain torch `e.double() * scale[:, None]`, its sum over rows, `e.double().square().sum(1)`. On a GPU the sums read e
as it is, once; on a CPU a few rows at a time are converted, so that the copy stays in cache. Nothing is checked.
"""

import torch
from torch import Tensor

_CPU_ROWS = 256


def scaled_rows(emb_NE: Tensor, scale_N: Tensor | None) -> Tensor:
    """scale * emb, [N, E] float64; emb itself if it is that already."""
    if scale_N is None:
        return emb_NE.to(torch.float64)
    unit_NE = torch.empty(emb_NE.shape, dtype=torch.float64, device=emb_NE.device)
    rows = max(1, len(emb_NE)) if emb_NE.is_cuda else _CPU_ROWS
    for unit_nE, emb_nE, scale_n in zip(unit_NE.split(rows), emb_NE.split(rows), scale_N.split(rows)):
        torch.mul(emb_nE, scale_n[:, None], out=unit_nE)
    return unit_NE


def scaled_sum(emb_NE: Tensor, scale_N: Tensor) -> Tensor:
    """Sum of scale * emb over the rows, [E] float64; scale float64."""
    if emb_NE.is_cuda:
        from .scaled_rows_triton import launch_scaled_sum

        with torch.cuda.device_of(emb_NE):  # Triton launches on the current device
            return launch_scaled_sum(emb_NE, scale_N)
    sum_E = scale_N.new_zeros(emb_NE.shape[1])
    for emb_nE, scale_n in zip(emb_NE.split(_CPU_ROWS), scale_N.split(_CPU_ROWS)):
        sum_E += scale_n @ emb_nE.to(torch.float64)
    return sum_E


def squared_norms(emb_NE: Tensor) -> Tensor:
    """Squared norm of every row, [N] float64."""
    if emb_NE.is_cuda:
        from .scaled_rows_triton import launch_squared_norms

        with torch.cuda.device_of(emb_NE):
            return launch_squared_norms(emb_NE)
    return torch.cat([emb_nE.to(torch.float64).square().sum(1) for emb_nE in emb_NE.split(_CPU_ROWS)])
