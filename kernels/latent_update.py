"""Per-latent optimiser step: clip, Adam and unit norm in one pass over a weight matrix, row by row.

Equals, for W [S, D] whose row s belongs to latent s, with g and clip from latent_gradient.py,

    Adam(W, clip * g);  W /= W.norm(dim=1, keepdim=True)                             # unit norm: decoder only
    W into the cone of its first rows                                                # a soft-frozen decoder only

Adam moves every latent, so all of W is read and written: 24 bytes a parameter, the floor of a training step beside the
encoder's GEMM. The CPU, whose path this is, makes a latent's gradient on the way (latent_update_numba.py); without
Numba it goes by blocks of rows that stay in cache. A GPU's path is latent_update_triton.py. docs/kernels.md section 4,
docs/recipe.md section 2
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .common import Cone, check
from .cpu_loops import bounds_by_work, compiles, in_parts
from .latent_gradient import EntryGradient, RowGradient, block_rows, row_blocks
from .segment_sum import check_ids, unchecked_segment_sum_into

_STREAMS = 6  # reads and writes of a latent's rows, beside one read an entry

# --- public functions ------------------------------------------------------------------------------------------------


class AdamSettings(NamedTuple):
    """lr and the constants of Adam (Kingma and Ba 2015); `step` is 1-based for the bias correction."""

    lr: float
    betas: tuple[float, float]
    eps: float
    step: int

    def constants(self, dtype: torch.dtype) -> Tensor:
        """What the compiled loop takes: lr, rates of the moments and eps as Adam uses them, and eps of unit rows."""
        (beta1, beta2), (lr, root) = self.betas, self.schedule_values()
        numbers = [lr, 1 - beta1, beta2, 1 - beta2, 1 / root, self.eps, torch.finfo(dtype).eps]
        return torch.tensor(numbers, dtype=dtype)

    def schedule_values(self) -> tuple[float, float]:
        """(lr / bias correction of the mean, square root of that of the squares)."""
        return self.lr / (1 - self.betas[0] ** self.step), math.sqrt(1 - self.betas[1] ** self.step)


def latent_update_(
    W_SD: Tensor,
    exp_avg_SD: Tensor,
    exp_avg_sq_SD: Tensor,
    gradient: EntryGradient,
    extra: list[RowGradient],
    clip: Tensor,
    adam: AdamSettings,
    unit_norm: bool,
    cone: Cone | None = None,
) -> None:
    """Clip, Adam and (for the decoder) unit row norm over all S latents, in place.

    Args:
        W_SD: contiguous weights.
        exp_avg_SD: Adam's mean of the gradient, contiguous.
        exp_avg_sq_SD: that of its squares.
        gradient: from `entry_gradient`.
        extra: of `dense_gradient_rows` (the auxiliary loss), added to it.
        clip: 0-d factor from `clip_coefficient`.
        adam: settings of this step.
        unit_norm: renormalise the rows of W afterwards.
        cone: that they are then held in.
    """
    if compiles(W_SD, exp_avg_SD, exp_avg_sq_SD, gradient.weights_M, gradient.source_RD):
        _update_rows_(W_SD, exp_avg_SD, exp_avg_sq_SD, gradient, extra, clip, adam, unit_norm)
        if cone is not None:
            for start, stop in row_blocks(len(W_SD), W_SD):
                cone.hold_(W_SD[start:stop], start)
        return
    eps = torch.finfo(W_SD.dtype).eps
    blocks = row_blocks(len(W_SD), W_SD)
    g_buffer = block_rows.get(W_SD[: blocks[0][1]].numel(), W_SD.dtype).view(-1, W_SD.shape[1])
    weights_M = gradient.weights_M * clip  # of entries and not of rows: nothing is read for it
    parallel_S = None if gradient.parallel_S is None else gradient.parallel_S * clip
    step = _step_of(adam, W_SD)
    check_ids(gradient.ids_M, len(gradient.source_RD))
    for start, stop in blocks:
        w_SD, g_SD = W_SD[start:stop], g_buffer[: stop - start]
        if parallel_S is not None:
            torch.mul(w_SD, -parallel_S[start:stop, None], out=g_SD)
        offsets = gradient.offsets_S1[start : stop + 1]
        entries = weights_M, gradient.ids_M, offsets, gradient.source_RD
        unchecked_segment_sum_into(g_SD, *entries, added=parallel_S is not None)
        for rows in extra:
            _add_rows_(g_SD, rows, clip, start, stop)
        _fused_adam_(w_SD, exp_avg_SD[start:stop], exp_avg_sq_SD[start:stop], g_SD, adam, step)
        if unit_norm:
            # Not vecdot, which writes the products out: 3 times the time (measured).
            w_SD.mul_((torch.linalg.vector_norm(w_SD, dim=1, keepdim=True) + eps).reciprocal_())
        if cone is not None:
            cone.hold_(w_SD, start)


def _update_rows_(
    W_SD: Tensor,
    exp_avg_SD: Tensor,
    exp_avg_sq_SD: Tensor,
    gradient: EntryGradient,
    extra: list[RowGradient],
    clip: Tensor,
    adam: AdamSettings,
    unit_norm: bool,
) -> None:
    """All of it but the cone, in one compiled pass."""
    from .latent_update_numba import update_rows

    offsets_S1 = gradient.offsets_S1
    _check_fit(W_SD, exp_avg_SD, exp_avg_sq_SD, gradient, extra)
    check_ids(gradient.ids_M, len(gradient.source_RD))
    none = W_SD.new_empty(0)
    arguments = (
        *(W_SD, exp_avg_SD, exp_avg_sq_SD, gradient.weights_M, gradient.ids_M, offsets_S1, gradient.source_RD),
        *_in_latent_order(extra, W_SD),
        none if gradient.parallel_S is None else gradient.parallel_S,
        clip.to(W_SD.dtype).view(1),
        adam.constants(W_SD.dtype),
        unit_norm,
    )
    in_parts(update_rows, bounds_by_work(offsets_S1, _STREAMS), *arguments)
    torch.autograd.graph.increment_version([W_SD, exp_avg_SD, exp_avg_sq_SD])  # as torch's own operations do


def _check_fit(
    W_SD: Tensor, exp_avg_SD: Tensor, exp_avg_sq_SD: Tensor, gradient: EntryGradient, extra: list[RowGradient]
) -> None:
    """A loop would read and write beside what does not fit."""
    n_latents, width = W_SD.shape
    check(exp_avg_SD.shape == exp_avg_sq_SD.shape == W_SD.shape, f"moments: not of shape {tuple(W_SD.shape)}")
    offsets_S1, n_entries = gradient.offsets_S1, len(gradient.ids_M)
    ascend = bool((offsets_S1.diff() >= 0).all()) and int(offsets_S1[0]) >= 0 and int(offsets_S1[-1]) <= n_entries
    check(ascend and len(offsets_S1) == n_latents + 1, f"offsets: not {n_latents + 1} that ascend to {n_entries}")
    check(len(gradient.weights_M) == n_entries, f"weights: {len(gradient.weights_M)} for {n_entries} entries")
    parallel_S = gradient.parallel_S
    check(parallel_S is None or len(parallel_S) == n_latents, f"parallel: not of {n_latents} latents")
    widths = {gradient.source_RD.shape[1], *(rows.rows_AD.shape[1] for rows in extra)}
    check(widths == {width}, f"rows: {sorted(widths)} columns, the weights have {width}")


def _in_latent_order(extra: list[RowGradient], W_SD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows to be added as entries: their places in the third, by latent, and [S + 1] where those of a latent begin."""
    if not extra:
        return torch.empty(0, dtype=torch.int64), torch.zeros(len(W_SD) + 1, dtype=torch.int64), W_SD.new_empty(0, 0)
    latents_A, places_A = torch.cat([rows.latents_A for rows in extra]).sort(stable=True)
    offsets_S1 = torch.searchsorted(latents_A, torch.arange(len(W_SD) + 1))
    return places_A, offsets_S1, torch.cat([rows.rows_AD for rows in extra])


def adam_(p: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, gradient: Tensor, clip: Tensor, adam: AdamSettings) -> None:
    """One Adam step with the gradient times clip, in place; so is the gradient."""
    _fused_adam_(p, exp_avg, exp_avg_sq, gradient.mul_(clip), adam, _step_of(adam, p))


def _step_of(adam: AdamSettings, p: Tensor) -> Tensor:
    return torch.full((), float(adam.step), device=p.device)


def _fused_adam_(
    p: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, gradient: Tensor, adam: AdamSettings, step: Tensor
) -> None:
    """torch.optim.Adam(fused=True)."""
    torch._fused_adam_(  # pyright: ignore[reportPrivateImportUsage]
        [p],
        [gradient],
        [exp_avg],
        [exp_avg_sq],
        [],
        [step],
        lr=adam.lr,
        beta1=adam.betas[0],
        beta2=adam.betas[1],
        weight_decay=0.0,
        eps=adam.eps,
        amsgrad=False,
        maximize=False,
    )


def _add_rows_(g_SD: Tensor, gradient: RowGradient, clip: Tensor, start: int, stop: int) -> None:
    latents_A = gradient.latents_A
    low, high = torch.searchsorted(latents_A, torch.tensor([start, stop])).tolist()
    g_SD.index_add_(0, latents_A[low:high] - start, gradient.rows_AD[low:high] * clip)
