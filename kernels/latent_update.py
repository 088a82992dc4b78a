"""Per-latent optimiser step: projection of the decoder gradient, gradient norm, clip, Adam and unit norm, row by row.

Equals, for a weight matrix W [S, D] whose row s belongs to latent s,

    g -= (g * w_hat).sum(1, keepdim=True) * w_hat          # decoder only: w_hat = W / |W|
    g *= min(1, clip_norm / (global_norm + 1e-6))          # over all parameters
    Adam(W, g);  W /= W.norm(dim=1, keepdim=True)          # decoder only

in two passes. The gradient arrives compactly (rows of active latents only), and the second pass walks W in blocks small
enough that a block's gradient, moments and weights stay in cache between Adam and the renormalisation: Adam over all
latents reads and writes 24 bytes a parameter and is the floor of a training step beside the encoder's GEMM.
"""

from typing import NamedTuple

import torch
from torch import Tensor

_BLOCK_BYTES = 2 << 20  # of one row block on the CPU: weights, two moments and gradient of it fit in L2/L3


class RowGradient(NamedTuple):
    """Compact gradient of a [S, D] matrix: rows_AD belong to the ascending, distinct latents_A; None means all S."""

    latents_A: Tensor | None
    rows_AD: Tensor


class AdamSettings(NamedTuple):
    """lr and the constants of Adam (Kingma and Ba 2015); `step` is 1-based for the bias correction."""

    lr: float
    betas: tuple[float, float]
    eps: float
    step: int


def remove_parallel_(gradient: RowGradient, W_SD: Tensor) -> None:
    """Remove from every gradient row its component along the latent's own (unit-normalised) row of W, in place.

    The decoder's rows are renormalised after every step, so this component could only be undone. recipe.md section 2.
    """
    eps = torch.finfo(W_SD.dtype).eps
    for start, stop in _blocks(gradient.rows_AD):
        g_AD = gradient.rows_AD[start:stop]
        if gradient.latents_A is None:
            w_AD = W_SD[start:stop]
        else:
            w_AD = W_SD.index_select(0, gradient.latents_A[start:stop])
        w_AD = w_AD / (w_AD.norm(dim=1, keepdim=True) + eps)
        g_AD.addcmul_(w_AD, (g_AD * w_AD).sum(1, keepdim=True), value=-1)


def clip_coefficient(gradients: list[Tensor], clip_norm: float) -> Tensor:
    """min(1, clip_norm / (global norm + 1e-6)) as a 0-d tensor on the gradients' device (no host sync)."""
    squares = [torch.linalg.vector_norm(g).square() for g in gradients if g.numel()]
    return (clip_norm / (torch.stack(squares).sum().sqrt() + 1e-6)).clamp(max=1.0)


def latent_update_(
    W_SD: Tensor, exp_avg_SD: Tensor, exp_avg_sq_SD: Tensor, gradients: list[RowGradient], clip: Tensor,
    adam: AdamSettings, unit_norm: bool,
) -> None:  # fmt: skip
    """Clip, Adam and (for the decoder) unit row norm over all S latents, in place.

    Args:
        W_SD, exp_avg_SD, exp_avg_sq_SD: contiguous weights and Adam moments.
        gradients: compact gradients that add up to the gradient of W.
        clip: 0-d factor from `clip_coefficient`.
        adam: settings of this step.
        unit_norm: renormalise the rows of W afterwards.
    """
    eps = torch.finfo(W_SD.dtype).eps
    for start, stop in _blocks(W_SD):
        g_SD = torch.zeros_like(W_SD[start:stop])
        for gradient in gradients:
            _add_rows_(g_SD, gradient, start, stop)
        adam_(W_SD[start:stop], exp_avg_SD[start:stop], exp_avg_sq_SD[start:stop], g_SD.mul_(clip), adam)
        if unit_norm:
            W_SD[start:stop].div_(W_SD[start:stop].norm(dim=1, keepdim=True) + eps)


def adam_(p: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, gradient: Tensor, adam: AdamSettings) -> None:
    """One fused Adam step on one tensor, in place: torch.optim.Adam(fused=True) without its bookkeeping."""
    step = torch.tensor(float(adam.step), device=p.device)
    torch._fused_adam_(
        [p], [gradient], [exp_avg], [exp_avg_sq], [], [step], lr=adam.lr, beta1=adam.betas[0], beta2=adam.betas[1],
        weight_decay=0.0, eps=adam.eps, amsgrad=False, maximize=False,
    )  # fmt: skip


def _add_rows_(g_SD: Tensor, gradient: RowGradient, start: int, stop: int) -> None:
    if gradient.latents_A is None:
        g_SD += gradient.rows_AD[start:stop]
    elif g_SD.is_cuda:  # one block: everything
        g_SD.index_add_(0, gradient.latents_A, gradient.rows_AD)
    else:
        bounds = torch.tensor([start, stop], device=gradient.latents_A.device)
        low, high = torch.searchsorted(gradient.latents_A, bounds).tolist()
        g_SD.index_add_(0, gradient.latents_A[low:high] - start, gradient.rows_AD[low:high])


def _blocks(rows: Tensor) -> list[tuple[int, int]]:
    """Row ranges: one on a GPU, cache-sized ones on the CPU."""
    n_rows = rows.shape[0]
    size = n_rows if rows.is_cuda else max(1, _BLOCK_BYTES // max(1, rows.shape[1] * rows.element_size()))
    return [(start, min(start + size, n_rows)) for start in range(0, n_rows, max(size, 1))]
