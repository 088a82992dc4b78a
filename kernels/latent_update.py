"""Per-latent optimiser step: gradient rows, projection, global norm, clip, Adam and unit norm, row by row.

Equals, for a weight matrix W [S, D] whose row s belongs to latent s, with w_hat = W (decoder rows are unit),

    g = segment sums of the sparse codes' gradient                                   # kernels/segment_sum.py
    g -= (g * w_hat).sum(1, keepdim=True) * w_hat                                    # decoder only
    g *= min(1, clip_norm / (global_norm + 1e-6))                                    # over all parameters
    Adam(W, g);  W /= W.norm(dim=1, keepdim=True)                                    # unit norm: decoder only

in two passes over blocks of rows: small enough to stay in cache on the CPU, one block on a GPU. The first makes the
gradient (on the CPU of active latents only), projects it and takes its norm while it is hot; the second walks all of W,
because Adam moves every latent: 24 bytes a parameter, the floor of a training step beside the encoder's GEMM.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from saevlm_fast.kernels.segment_sum import segment_sum

_BLOCK_BYTES = 2 << 20  # of one block of rows on the CPU


class RowGradient(NamedTuple):
    """Compact gradient of a [S, D] matrix: rows_AD belong to the ascending, distinct latents_A; None means all S."""

    latents_A: Tensor | None
    rows_AD: Tensor
    squared_norm: Tensor


class AdamSettings(NamedTuple):
    """lr and the constants of Adam (Kingma and Ba 2015); `step` is 1-based for the bias correction."""

    lr: float
    betas: tuple[float, float]
    eps: float
    step: int


def gradient_rows(
    weights_M: Tensor, ids_M: Tensor, offsets_A1: Tensor, source_RD: Tensor, latents_A: Tensor | None,
    unit_rows_SD: Tensor | None = None, out_AD: Tensor | None = None,
) -> RowGradient:  # fmt: skip
    """Gradient rows of latents: segment sums, projected if the decoder is given, with their squared norm.

    Args:
        weights_M, ids_M, offsets_A1, source_RD: as segment_sum; segment a belongs to latents_A[a] (None: to latent a).
        unit_rows_SD: W_dec with unit rows: remove the component of every gradient row along its own row. The rows are
            renormalised after every step, so that component could only be undone (recipe.md section 2).
        out_AD: where the rows go; fresh memory otherwise (whose first touch costs ten times the write).
    """
    if source_RD.is_cuda:  # one block, which is the result itself
        rows_AD = segment_sum(weights_M, ids_M, offsets_A1, source_RD)
        return dense_gradient_rows(latents_A, rows_AD, unit_rows_SD)
    n_rows, width = len(offsets_A1) - 1, source_RD.shape[1]
    out_AD = source_RD.new_empty(n_rows, width) if out_AD is None else out_AD
    squared_norm = source_RD.new_zeros(())
    for start, stop in _blocks(out_AD):
        g_AD = segment_sum(weights_M, ids_M, offsets_A1[start : stop + 1], source_RD)
        if unit_rows_SD is not None:
            w_AD = unit_rows_SD[start:stop] if latents_A is None else unit_rows_SD[latents_A[start:stop]]
            _remove_parallel_(g_AD, w_AD)
        squared_norm += torch.dot(g_AD.view(-1), g_AD.view(-1))
        out_AD[start:stop] = g_AD
    return RowGradient(latents_A, out_AD, squared_norm)


def dense_gradient_rows(latents_A: Tensor | None, rows_AD: Tensor, unit_rows_SD: Tensor | None = None) -> RowGradient:
    """The same for rows that are already there (the auxiliary loss); projected in place."""
    if unit_rows_SD is not None:
        _remove_parallel_(rows_AD, unit_rows_SD if latents_A is None else unit_rows_SD[latents_A])
    return RowGradient(latents_A, rows_AD, torch.linalg.vector_norm(rows_AD).square())


def _remove_parallel_(g_AD: Tensor, w_AD: Tensor) -> None:
    g_AD.addcmul_(w_AD, torch.linalg.vecdot(g_AD, w_AD)[:, None], value=-1)


def clip_coefficient(squared_norms: list[Tensor], clip_norm: float) -> Tensor:
    """min(1, clip_norm / (global norm + 1e-6)) as a 0-d tensor on the gradients' device (no host sync)."""
    return (clip_norm / (torch.stack(squared_norms).sum().sqrt() + 1e-6)).clamp(max=1.0)


def latent_update_(
    W_SD: Tensor, exp_avg_SD: Tensor, exp_avg_sq_SD: Tensor, gradients: list[RowGradient], clip: Tensor,
    adam: AdamSettings, unit_norm: bool,
) -> None:  # fmt: skip
    """Clip, Adam and (for the decoder) unit row norm over all S latents, in place.

    Args:
        W_SD, exp_avg_SD, exp_avg_sq_SD: contiguous weights and Adam moments.
        gradients: gradients that add up to the gradient of W; one with all S rows comes first and is overwritten.
        clip: 0-d factor from `clip_coefficient`.
        adam: settings of this step.
        unit_norm: renormalise the rows of W afterwards.
    """
    eps = torch.finfo(W_SD.dtype).eps
    ready = gradients[0].latents_A is None  # a row for every latent: no block is put together, it is used up in place
    blocks = _blocks(W_SD)
    g_buffer = gradients[0].rows_AD if ready else torch.empty_like(W_SD[: blocks[0][1]])
    for start, stop in blocks:
        g_SD = g_buffer[start:stop] if ready else g_buffer[: stop - start].zero_()
        for gradient in gradients[1:] if ready else gradients:
            _add_rows_(g_SD, gradient, start, stop)
        w_SD = W_SD[start:stop]
        adam_(w_SD, exp_avg_SD[start:stop], exp_avg_sq_SD[start:stop], g_SD, clip, adam)
        if unit_norm:
            w_SD.mul_((torch.linalg.vecdot(w_SD, w_SD).sqrt_() + eps).reciprocal_()[:, None])


def adam_(p: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, gradient: Tensor, clip: Tensor, adam: AdamSettings) -> None:
    """One fused Adam step with the gradient times clip, in place (the gradient too): torch.optim.Adam(fused=True)."""
    step = torch.full((), float(adam.step), device=p.device)  # torch.tensor would wait for a GPU
    torch._fused_adam_(
        [p], [gradient.mul_(clip)], [exp_avg], [exp_avg_sq], [], [step],
        lr=adam.lr, beta1=adam.betas[0], beta2=adam.betas[1], weight_decay=0.0, eps=adam.eps,
        amsgrad=False, maximize=False,
    )  # fmt: skip


def _add_rows_(g_SD: Tensor, gradient: RowGradient, start: int, stop: int) -> None:
    latents_A, rows_AD, _ = gradient
    assert latents_A is not None
    low, high = 0, len(latents_A)
    if not g_SD.is_cuda:  # on a GPU there is one block, and asking would stall the device
        low, high = torch.searchsorted(latents_A, torch.tensor([start, stop])).tolist()
    g_SD.index_add_(0, latents_A[low:high] - start, rows_AD[low:high])


def _blocks(rows: Tensor) -> list[tuple[int, int]]:
    """Row ranges: one on a GPU, cache-sized ones on the CPU."""
    n_rows = rows.shape[0]
    size = n_rows if rows.is_cuda else _BLOCK_BYTES // max(1, rows.shape[1] * rows.element_size())
    size = max(1, size)
    return [(start, min(start + size, n_rows)) for start in range(0, max(n_rows, 1), size)]
