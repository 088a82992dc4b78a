"""Per-latent optimiser step: clip, Adam and unit norm in one pass over a weight matrix, row by row.

Equals, for W [S, D] whose row s belongs to latent s, with g and clip from latent_gradient.py,

    Adam(W, clip * g);  W /= W.norm(dim=1, keepdim=True)                             # unit norm: decoder only

Adam moves every latent, so all of W is read and written: 24 bytes a parameter, the floor of a training step beside the
encoder's GEMM. The CPU goes by blocks of rows that stay in cache, a block's gradient made on the way. On a GPU a
program owns a row (latent_update_triton.py). What changes from step to step is read from the device there, and nothing
is asked of it: the update can be captured in a CUDA graph. docs/kernels.md section 4, docs/recipe.md section 2
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .common import check, custom_op
from .latent_gradient import EntryGradient, RowGradient, block_rows, row_blocks
from .segment_sum import segment_sum_into
from .topk_encode_screened import LowWeights

# --- public functions ------------------------------------------------------------------------------------------------


class AdamSettings(NamedTuple):
    """lr and the constants of Adam (Kingma and Ba 2015); `step` is 1-based for the bias correction.

    schedule is for a GPU, which reads it instead of lr and step: float64 [2], filled with `schedule_values`.
    """

    lr: float
    betas: tuple[float, float]
    eps: float
    step: int
    schedule: Tensor | None = None

    def device_schedule(self) -> Tensor:
        """schedule, which must be there."""
        assert self.schedule is not None, "a GPU reads lr and step from the schedule"
        return self.schedule

    def schedule_values(self) -> tuple[float, float]:
        """(lr / bias correction of the mean, square root of that of the squares)."""
        return self.lr / (1 - self.betas[0] ** self.step), math.sqrt(1 - self.betas[1] ** self.step)


def latent_update_(
    W_SD: Tensor,
    exp_avg_SD: Tensor,
    exp_avg_sq_SD: Tensor,
    gradient: RowGradient | EntryGradient,
    extra: list[RowGradient],
    clip: Tensor,
    adam: AdamSettings,
    unit_norm: bool,
    low: Tensor | LowWeights | None = None,
) -> None:
    """Clip, Adam and (for the decoder) unit row norm over all S latents, in place.

    Args:
        W_SD: contiguous weights.
        exp_avg_SD: Adam's mean of the gradient, contiguous.
        exp_avg_sq_SD: that of its squares.
        gradient: from `entry_gradient`.
        extra: at most one of `dense_gradient_rows` (the auxiliary loss), which is added to it.
        clip: 0-d factor from `clip_coefficient`.
        adam: settings of this step.
        unit_norm: renormalise the rows of W afterwards.
        low: the new W as the encoder's product takes it is written here in the same pass: [S, D] of that product's
            dtype, or, on a CPU whose encoder screens, with the bounds of that rounding.

    ValueError, on a GPU: weights or moments that are not contiguous, more than one of `extra`, d_in above 8192.
    """
    if isinstance(gradient, RowGradient):
        for name, tensor in (("W", W_SD), ("exp_avg", exp_avg_SD), ("exp_avg_sq", exp_avg_sq_SD)):
            check(tensor.is_contiguous(), f"{name}: strides {tensor.stride()}, must be contiguous")
        (aux,) = extra or (None,)
        rows = gradient.rows_AD, gradient.slots(len(W_SD))
        aux_rows: tuple[Tensor | None, Tensor | None] = (None, None)
        if aux is not None:
            aux_rows = aux.rows_AD, aux.slots(len(W_SD))
        state, schedule, betas = (W_SD, exp_avg_SD, exp_avg_sq_SD), adam.device_schedule(), list(adam.betas)
        low_SD = low if isinstance(low, Tensor) else None
        latent_update_op(*state, *rows, *aux_rows, clip, schedule, betas, adam.eps, unit_norm, low_SD)
        if isinstance(low, LowWeights):
            low.write_(0, W_SD)
    else:
        _update_blocks_(W_SD, exp_avg_SD, exp_avg_sq_SD, gradient, extra, clip, adam, unit_norm, low)


def write_low_(low: Tensor | LowWeights, start: int, w_CD: Tensor) -> None:
    """Rows of W from `start` on, rounded into `low`, which latent_update_ takes."""
    if isinstance(low, LowWeights):
        low.write_(start, w_CD)
    else:
        low[start : start + len(w_CD)] = w_CD


def adam_(p: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, gradient: Tensor, clip: Tensor, adam: AdamSettings) -> None:
    """One Adam step with the gradient times clip, in place (on a CPU the gradient too)."""
    if p.is_cuda:
        vector_update_op(p, exp_avg, exp_avg_sq, gradient, clip, adam.device_schedule(), list(adam.betas), adam.eps)
    else:
        _fused_adam_(p, exp_avg, exp_avg_sq, gradient.mul_(clip), adam)


# --- custom ops: CUDA ------------------------------------------------------------------------------------------------


@custom_op("latent_update", mutates_args=("W_SD", "exp_avg_SD", "exp_avg_sq_SD", "copy_SD"))
def latent_update_op(
    W_SD: Tensor,
    exp_avg_SD: Tensor,
    exp_avg_sq_SD: Tensor,
    rows_CD: Tensor,
    slots_S: Tensor,
    aux_rows_AD: Tensor | None,
    aux_slots_S: Tensor | None,
    clip: Tensor,
    schedule: Tensor,
    betas: list[float],
    eps: float,
    unit_norm: bool,
    copy_SD: Tensor | None,
) -> None:
    """Adam on clip * (rows[slots] + aux_rows[aux_slots]), slot -1 being a zero row; then unit norm and the copy."""
    from .latent_update_triton import launch_latent_update

    with torch.cuda.device_of(W_SD):
        launch_latent_update(
            W_SD,
            exp_avg_SD,
            exp_avg_sq_SD,
            rows_CD,
            slots_S,
            aux_rows_AD,
            aux_slots_S,
            clip,
            schedule,
            (betas[0], betas[1]),
            eps,
            unit_norm,
            copy_SD,
        )


@custom_op("vector_update", mutates_args=("p_N", "exp_avg_N", "exp_avg_sq_N"))
def vector_update_op(
    p_N: Tensor,
    exp_avg_N: Tensor,
    exp_avg_sq_N: Tensor,
    gradient_N: Tensor,
    clip: Tensor,
    schedule: Tensor,
    betas: list[float],
    eps: float,
) -> None:
    """Adam on clip * gradient, element by element: the biases."""
    from .latent_update_triton import launch_vector_update

    with torch.cuda.device_of(p_N):
        launch_vector_update(p_N, exp_avg_N, exp_avg_sq_N, gradient_N, clip, schedule, (betas[0], betas[1]), eps)


# --- CPU -------------------------------------------------------------------------------------------------------------


@latent_update_op.register_kernel("cpu")
def latent_update_cpu(
    W_SD: Tensor,
    exp_avg_SD: Tensor,
    exp_avg_sq_SD: Tensor,
    rows_CD: Tensor,
    slots_S: Tensor,
    aux_rows_AD: Tensor | None,
    aux_slots_S: Tensor | None,
    clip: Tensor,
    schedule: Tensor,
    betas: list[float],
    eps: float,
    unit_norm: bool,
    copy_SD: Tensor | None,
) -> None:
    g_SD = torch.zeros_like(W_SD)
    for rows, slots in ((rows_CD, slots_S), (aux_rows_AD, aux_slots_S)):
        if rows is not None and slots is not None:
            latents = torch.nonzero(slots >= 0).squeeze(1)
            g_SD[latents] += rows[slots[latents].long()]
    vector_update_cpu(W_SD, exp_avg_SD, exp_avg_sq_SD, g_SD, clip, schedule, betas, eps)
    if unit_norm:
        W_SD.mul_((torch.linalg.vecdot(W_SD, W_SD).sqrt_() + torch.finfo(W_SD.dtype).eps).reciprocal_()[:, None])
    if copy_SD is not None:
        copy_SD.copy_(W_SD)


@vector_update_op.register_kernel("cpu")
def vector_update_cpu(
    p_N: Tensor,
    exp_avg_N: Tensor,
    exp_avg_sq_N: Tensor,
    gradient_N: Tensor,
    clip: Tensor,
    schedule: Tensor,
    betas: list[float],
    eps: float,
) -> None:
    g_N = gradient_N * clip
    exp_avg_N.mul_(betas[0]).add_(g_N, alpha=1 - betas[0])
    exp_avg_sq_N.mul_(betas[1]).addcmul_(g_N, g_N, value=1 - betas[1])
    step_size, bias2_sqrt = schedule.to(p_N.dtype)
    p_N.sub_(step_size * exp_avg_N / (exp_avg_sq_N.sqrt() / bias2_sqrt + eps))


def _update_blocks_(
    W_SD: Tensor,
    exp_avg_SD: Tensor,
    exp_avg_sq_SD: Tensor,
    gradient: EntryGradient,
    extra: list[RowGradient],
    clip: Tensor,
    adam: AdamSettings,
    unit_norm: bool,
    low: Tensor | LowWeights | None,
) -> None:
    """latent_update_ by blocks of rows that stay in cache; a block's gradient is made on the way."""
    eps = torch.finfo(W_SD.dtype).eps
    blocks = row_blocks(len(W_SD), W_SD)
    g_buffer = block_rows.get(W_SD[: blocks[0][1]].numel(), W_SD.dtype).view(-1, W_SD.shape[1])
    weights_M = gradient.weights_M * clip  # of entries and not of rows: nothing is read for it
    parallel_S = None if gradient.parallel_S is None else gradient.parallel_S * clip
    for start, stop in blocks:
        w_SD, g_SD = W_SD[start:stop], g_buffer[: stop - start]
        if parallel_S is not None:
            torch.mul(w_SD, -parallel_S[start:stop, None], out=g_SD)
        offsets = gradient.offsets_S1[start : stop + 1]
        segment_sum_into(g_SD, weights_M, gradient.ids_M, offsets, gradient.source_RD, added=parallel_S is not None)
        for rows in extra:
            _add_rows_(g_SD, rows, clip, start, stop)
        _fused_adam_(w_SD, exp_avg_SD[start:stop], exp_avg_sq_SD[start:stop], g_SD, adam)
        if unit_norm:
            # Not vecdot, which writes the products out: 3 times the time (measured).
            w_SD.mul_((torch.linalg.vector_norm(w_SD, dim=1, keepdim=True) + eps).reciprocal_())
        if low is not None:
            write_low_(low, start, w_SD)


def _fused_adam_(p: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, gradient: Tensor, adam: AdamSettings) -> None:
    """torch.optim.Adam(fused=True)."""
    step = torch.full((), float(adam.step))
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
    assert latents_A is not None
    low, high = torch.searchsorted(latents_A, torch.tensor([start, stop])).tolist()
    g_SD.index_add_(0, latents_A[low:high] - start, gradient.rows_AD[low:high] * clip)
