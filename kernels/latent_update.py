"""Per-latent optimiser step: gradient rows, projection, global norm, clip, Adam and unit norm, row by row.

Equals, for a weight matrix W [S, D] whose row s belongs to latent s, with w_hat = W (decoder rows are unit),

    g = segment sums of the sparse codes' gradient                                   # kernels/segment_sum.py
    g -= (g * w_hat).sum(1, keepdim=True) * w_hat                                    # decoder only
    g *= min(1, clip_norm / (global_norm + 1e-6))                                    # over all parameters
    Adam(W, g);  W /= W.norm(dim=1, keepdim=True)                                    # unit norm: decoder only

in two passes. The first takes the norm of the gradient, the second walks all of W, because Adam moves every latent: 24
bytes a parameter, the floor of a training step beside the encoder's GEMM. The CPU goes by blocks of rows that stay in
cache, and makes a block's gradient in either pass: a sparse product, cheaper than writing it to memory and reading it
again, and no [S, D] gradient is ever held. It leaves the first out where a bound of the norm shows that nothing is
clipped. On a GPU the first pass keeps the rows of active latents, a program owns a row, and the ops `latent_gradient`
and `latent_update` launch them (latent_update_triton.py). What changes from step to step is read from the device there,
and nothing is asked of it: the update can be captured in a CUDA graph.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .common import Workspace, check
from .segment_sum import segment_sum_cpu, segment_sum_into
from .topk_encode_screened import LowWeights

_BLOCK_BYTES = 4 << 20  # of one block of rows on the CPU
_BOUND_SLACK = 1 + 1e-4  # more than the rounding of a norm, which taking off a long parallel part would blow up
_block_rows = Workspace()  # fresh memory for every block would be 12,000 page faults a step (d_in 1024, d_sae 6144)


class RowGradient(NamedTuple):
    """Compact gradient of a [S, D] matrix: rows_AD belong to the ascending, distinct latents_A.

    On a GPU, where asking how many latents are active would stall the device, slots_S may stand for latents_A: the row
    of every latent, int32, -1 for none. Rows that no slot names are undefined.
    """

    latents_A: Tensor | None
    rows_AD: Tensor
    squared_norm: Tensor
    slots_S: Tensor | None = None


class EntryGradient(NamedTuple):
    """The same as the entries whose segment sums are its rows, on a CPU: segment s belongs to latent s.

    From row s the parallel_S[s]-fold of W's own row is still to be taken off (None: nothing), which the norms take into
    account.
    """

    weights_M: Tensor
    ids_M: Tensor
    offsets_S1: Tensor
    source_RD: Tensor
    parallel_S: Tensor | None

    @property
    def squared_norm(self) -> Tensor:
        """Of the whole gradient (0-d). Makes the rows of all latents of several entries, block by block."""
        norms_S, counts_S = self._norm_bounds(), self.offsets_S1.diff()
        (several_S,) = (counts_S > 1).nonzero(as_tuple=True)
        norms_S[several_S] = _norms(*_some_segments(several_S, self.weights_M, self.ids_M, counts_S), self.source_RD)
        return self._squared(norms_S)

    def squared_norm_bound(self) -> Tensor:
        """At least the squared norm, by the triangle inequality (unit rows given); no row is made for it."""
        return self._squared(self._norm_bounds() * _BOUND_SLACK)

    def _norm_bounds(self) -> Tensor:
        """Of every segment sum; exact where it has one entry."""
        norms_M = torch.linalg.vector_norm(self.source_RD, dim=1)[self.ids_M] * self.weights_M.abs()
        return _segment_totals(norms_M, self.offsets_S1)

    def _squared(self, norms_S: Tensor) -> Tensor:
        if self.parallel_S is None:
            return norms_S.square().sum()
        return (norms_S.square() - self.parallel_S.square()).clamp_(min=0).sum()  # Pythagoras: rows are unit


class AdamSettings(NamedTuple):
    """lr and the constants of Adam (Kingma and Ba 2015); `step` is 1-based for the bias correction.

    schedule is for a GPU, which reads it instead of lr and step: float64 [2], filled with `schedule_values`.
    """

    lr: float
    betas: tuple[float, float]
    eps: float
    step: int
    schedule: Tensor | None = None

    def schedule_values(self) -> tuple[float, float]:
        """(lr / bias correction of the mean, square root of that of the squares)."""
        return self.lr / (1 - self.betas[0] ** self.step), math.sqrt(1 - self.betas[1] ** self.step)


def entry_gradient(
    weights_M: Tensor, ids_M: Tensor, offsets_S1: Tensor, source_RD: Tensor, unit_rows_SD: Tensor | None = None,
    dots_M: Tensor | None = None,
) -> RowGradient | EntryGradient:  # fmt: skip
    """The gradient of every latent: segment sums of entries, projected if the decoder is given.

    Args:
        weights_M, ids_M, offsets_S1, source_RD: as segment_sum; segment s belongs to latent s.
        unit_rows_SD: W_dec with unit rows: remove the component of every gradient row along its own row. The rows are
            renormalised after every step, so that component could only be undone (recipe.md section 2).
        dots_M: with unit_rows, <source[ids], W_dec[latent]> of every entry: on a CPU the component is their weighted
            sum, and W_dec is not read.
    """
    if source_RD.is_cuda:
        rows_CD, slots_S, squared_norms_S = latent_gradient_op(weights_M, ids_M, offsets_S1, source_RD, unit_rows_SD)
        return RowGradient(None, rows_CD, squared_norms_S.sum(), slots_S)
    end = int(offsets_S1[-1])  # padding lies behind
    weights_M, ids_M = weights_M[:end], ids_M[:end]
    parallel_S = None
    if unit_rows_SD is not None:
        assert dots_M is not None, "a CPU projects by the dot products of the entries"
        parallel_S = _segment_totals(weights_M * dots_M[:end], offsets_S1)
    return EntryGradient(weights_M, ids_M, offsets_S1, source_RD, parallel_S)


def _segment_totals(values_M: Tensor, offsets_S1: Tensor) -> Tensor:
    ids_M, one = torch.zeros(len(values_M), dtype=torch.int64), values_M.new_ones(1, 1)
    return segment_sum_cpu(values_M, ids_M, offsets_S1, one).squeeze(1)


def _some_segments(
    segments_A: Tensor, weights_M: Tensor, ids_M: Tensor, counts_S: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Weights, ids and offsets of these segments alone."""
    counts_A = counts_S[segments_A]
    taken_S = torch.zeros_like(counts_S, dtype=torch.bool).index_fill_(0, segments_A, True)
    taken_M = taken_S.repeat_interleave(counts_S)
    return weights_M[taken_M], ids_M[taken_M], torch.nn.functional.pad(counts_A.cumsum(0), (1, 0))


def _norms(weights_M: Tensor, ids_M: Tensor, offsets_A1: Tensor, source_RD: Tensor) -> Tensor:
    norms_A = source_RD.new_empty(len(offsets_A1) - 1)
    blocks = _blocks(len(norms_A), source_RD)
    buffer = _block_rows.get(blocks[0][1] * source_RD.shape[1], source_RD.dtype).view(-1, source_RD.shape[1])
    for start, stop in blocks:
        rows_AD = buffer[: stop - start]
        segment_sum_into(rows_AD, weights_M, ids_M, offsets_A1[start : stop + 1], source_RD)
        torch.linalg.vector_norm(rows_AD, dim=1, out=norms_A[start:stop])
    return norms_A


def dense_gradient_rows(latents_A: Tensor, rows_AD: Tensor, unit_rows_SD: Tensor | None = None) -> RowGradient:
    """The same for rows that are already there (the auxiliary loss); projected in place.

    On a GPU, latents_A may end in padding: latents of S with zero rows.
    """
    if unit_rows_SD is not None:
        _remove_parallel_(rows_AD, unit_rows_SD[latents_A.clamp(max=len(unit_rows_SD) - 1)])
    return RowGradient(latents_A, rows_AD, torch.linalg.vector_norm(rows_AD).square())


def _remove_parallel_(g_AD: Tensor, w_AD: Tensor) -> None:
    g_AD.addcmul_(w_AD, torch.linalg.vecdot(g_AD, w_AD)[:, None], value=-1)


def clip_coefficient(
    gradients: Sequence[RowGradient | EntryGradient], vectors: Sequence[Tensor], clip_norm: float
) -> Tensor:
    """min(1, clip_norm / (global norm + 1e-6)) of all of them, 0-d on the gradients' device (no host sync on a GPU).

    On a CPU the norm is taken only where a bound of it does not show that the factor is 1 (docs/decisions.md).
    """
    squares = [vector.square().sum() for vector in vectors]
    bounds = [g.squared_norm_bound() if isinstance(g, EntryGradient) else g.squared_norm for g in gradients]
    if not bounds[0].is_cuda and torch.stack(bounds + squares).sum().sqrt() < 0.999 * clip_norm - 1e-6:
        return torch.ones_like(bounds[0])
    squares += [gradient.squared_norm for gradient in gradients]
    return (clip_norm / (torch.stack(squares).sum().sqrt() + 1e-6)).clamp(max=1.0)


def latent_update_(
    W_SD: Tensor, exp_avg_SD: Tensor, exp_avg_sq_SD: Tensor, gradient: RowGradient | EntryGradient,
    extra: list[RowGradient], clip: Tensor, adam: AdamSettings, unit_norm: bool, copy_SD: Tensor | None = None,
    low: LowWeights | None = None,
) -> None:  # fmt: skip
    """Clip, Adam and (for the decoder) unit row norm over all S latents, in place.

    Args:
        W_SD, exp_avg_SD, exp_avg_sq_SD: contiguous weights and Adam moments.
        gradient: from `entry_gradient`.
        extra: at most one of `dense_gradient_rows` (the auxiliary loss), which is added to it.
        clip: 0-d factor from `clip_coefficient`.
        adam: settings of this step.
        unit_norm: renormalise the rows of W afterwards.
        copy_SD: the new W, in the dtype of the encoder's product, is written here in the same pass.
        low: on a CPU whose encoder screens, the same with its bounds.
    """
    if isinstance(gradient, RowGradient):
        for name, tensor in (("W", W_SD), ("exp_avg", exp_avg_SD), ("exp_avg_sq", exp_avg_sq_SD)):
            check(tensor.is_contiguous(), f"{name}: strides {tensor.stride()}, must be contiguous")
        rows_CD, slots_S, *aux = _slotted([gradient, *extra], len(W_SD))
        latent_update_op(
            W_SD, exp_avg_SD, exp_avg_sq_SD, rows_CD, slots_S, *(aux or (None, None)), clip, adam.schedule,
            list(adam.betas), adam.eps, unit_norm, copy_SD,
        )  # fmt: skip
        return
    eps = torch.finfo(W_SD.dtype).eps
    blocks = _blocks(len(W_SD), W_SD)
    g_buffer = _block_rows.get(W_SD[: blocks[0][1]].numel(), W_SD.dtype).view(-1, W_SD.shape[1])
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
        if copy_SD is not None:
            copy_SD[start:stop] = w_SD
        if low is not None:
            low.write_(start, w_SD)


def adam_(p: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, gradient: Tensor, clip: Tensor, adam: AdamSettings) -> None:
    """One Adam step with the gradient times clip, in place (on a CPU the gradient too)."""
    if p.is_cuda:
        vector_update_op(p, exp_avg, exp_avg_sq, gradient, clip, adam.schedule, list(adam.betas), adam.eps)
    else:
        _fused_adam_(p, exp_avg, exp_avg_sq, gradient.mul_(clip), adam)


def _fused_adam_(p: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, gradient: Tensor, adam: AdamSettings) -> None:
    """torch.optim.Adam(fused=True)."""
    step = torch.full((), float(adam.step))
    torch._fused_adam_(
        [p], [gradient], [exp_avg], [exp_avg_sq], [], [step],
        lr=adam.lr, beta1=adam.betas[0], beta2=adam.betas[1], weight_decay=0.0, eps=adam.eps,
        amsgrad=False, maximize=False,
    )  # fmt: skip


def _add_rows_(g_SD: Tensor, gradient: RowGradient, clip: Tensor, start: int, stop: int) -> None:
    latents_A = gradient.latents_A
    assert latents_A is not None
    low, high = torch.searchsorted(latents_A, torch.tensor([start, stop])).tolist()
    g_SD.index_add_(0, latents_A[low:high] - start, gradient.rows_AD[low:high] * clip)


def _blocks(n_rows: int, like_RD: Tensor) -> list[tuple[int, int]]:
    """Ranges of rows like these that stay in cache."""
    size = max(1, _BLOCK_BYTES // max(1, like_RD.shape[1] * like_RD.element_size()))
    return [(start, min(start + size, n_rows)) for start in range(0, max(n_rows, 1), size)]


def _slotted(gradients: list[RowGradient], n_latents: int) -> list[Tensor]:
    """rows and slots of every gradient, in one list."""
    slotted: list[Tensor] = []
    for latents_A, rows_AD, _, slots_S in gradients:
        slotted += [rows_AD, latent_slots(latents_A, n_latents) if slots_S is None else slots_S]
    return slotted


def latent_slots(latents_A: Tensor | None, n_latents: int) -> Tensor:
    """int32 [n_latents]: the position of every latent in latents_A, -1 if it is not there."""
    assert latents_A is not None, "on a GPU, rows come with slots or latents"
    positions_A = torch.arange(len(latents_A), dtype=torch.int32, device=latents_A.device)
    slots_S1 = torch.full((n_latents + 1,), -1, dtype=torch.int32, device=latents_A.device)  # the last is for padding
    return slots_S1.scatter_(0, latents_A, positions_A)[:n_latents]


# --- custom ops: the row kernels of a GPU ----------------------------------------------------------------------------


@torch.library.custom_op("saevlm_fast::latent_gradient", mutates_args=(), device_types="cuda")
def latent_gradient_op(
    weights_M: Tensor, ids_M: Tensor, offsets_S1: Tensor, source_RD: Tensor, unit_rows_SD: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(rows [min(S, M), D], slots int32 [S], squared norms [S]): see RowGradient. Segment s belongs to latent s."""
    from .latent_update_triton import launch_latent_gradient

    with torch.cuda.device_of(source_RD):  # Triton launches on the current device
        return launch_latent_gradient(weights_M, ids_M, offsets_S1, source_RD, unit_rows_SD)


@latent_gradient_op.register_kernel("cpu")
def latent_gradient_cpu(
    weights_M: Tensor, ids_M: Tensor, offsets_S1: Tensor, source_RD: Tensor, unit_rows_SD: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    g_SD = segment_sum_cpu(weights_M, ids_M, offsets_S1, source_RD)
    if unit_rows_SD is not None:
        _remove_parallel_(g_SD, unit_rows_SD)
    active_A = torch.nonzero(offsets_S1.diff()).squeeze(1)
    rows_CD = g_SD.new_zeros(min(len(g_SD), len(weights_M)), g_SD.shape[1])
    rows_CD[: len(active_A)] = g_SD[active_A]
    return rows_CD, latent_slots(active_A, len(g_SD)), torch.linalg.vecdot(g_SD, g_SD)


@latent_gradient_op.register_fake
def latent_gradient_fake(
    weights_M: Tensor, ids_M: Tensor, offsets_S1: Tensor, source_RD: Tensor, unit_rows_SD: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    d_sae = offsets_S1.shape[0] - 1
    rows_CD = source_RD.new_empty(min(d_sae, weights_M.shape[0]), source_RD.shape[1])
    return rows_CD, offsets_S1.new_empty(d_sae, dtype=torch.int32), source_RD.new_empty(d_sae)


@torch.library.custom_op(
    "saevlm_fast::latent_update", mutates_args=("W_SD", "exp_avg_SD", "exp_avg_sq_SD", "copy_SD"), device_types="cuda"
)
def latent_update_op(
    W_SD: Tensor, exp_avg_SD: Tensor, exp_avg_sq_SD: Tensor, rows_CD: Tensor, slots_S: Tensor,
    aux_rows_AD: Tensor | None, aux_slots_S: Tensor | None, clip: Tensor, schedule: Tensor, betas: list[float],
    eps: float, unit_norm: bool, copy_SD: Tensor | None,
) -> None:  # fmt: skip
    """Adam on clip * (rows[slots] + aux_rows[aux_slots]), slot -1 being a zero row; then unit norm and the copy."""
    from .latent_update_triton import launch_latent_update

    with torch.cuda.device_of(W_SD):
        launch_latent_update(
            W_SD, exp_avg_SD, exp_avg_sq_SD, rows_CD, slots_S, aux_rows_AD, aux_slots_S, clip, schedule,
            (betas[0], betas[1]), eps, unit_norm, copy_SD,
        )  # fmt: skip


@latent_update_op.register_kernel("cpu")
def latent_update_cpu(
    W_SD: Tensor, exp_avg_SD: Tensor, exp_avg_sq_SD: Tensor, rows_CD: Tensor, slots_S: Tensor,
    aux_rows_AD: Tensor | None, aux_slots_S: Tensor | None, clip: Tensor, schedule: Tensor, betas: list[float],
    eps: float, unit_norm: bool, copy_SD: Tensor | None,
) -> None:  # fmt: skip
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


@torch.library.custom_op(
    "saevlm_fast::vector_update", mutates_args=("p_N", "exp_avg_N", "exp_avg_sq_N"), device_types="cuda"
)
def vector_update_op(
    p_N: Tensor, exp_avg_N: Tensor, exp_avg_sq_N: Tensor, gradient_N: Tensor, clip: Tensor, schedule: Tensor,
    betas: list[float], eps: float,
) -> None:  # fmt: skip
    """Adam on clip * gradient, element by element: the biases."""
    from .latent_update_triton import launch_vector_update

    with torch.cuda.device_of(p_N):
        launch_vector_update(
            p_N, exp_avg_N, exp_avg_sq_N, gradient_N, clip, schedule, (betas[0], betas[1]), eps
        )  # fmt: skip


@vector_update_op.register_kernel("cpu")
def vector_update_cpu(
    p_N: Tensor, exp_avg_N: Tensor, exp_avg_sq_N: Tensor, gradient_N: Tensor, clip: Tensor, schedule: Tensor,
    betas: list[float], eps: float,
) -> None:  # fmt: skip
    g_N = gradient_N * clip
    exp_avg_N.mul_(betas[0]).add_(g_N, alpha=1 - betas[0])
    exp_avg_sq_N.mul_(betas[1]).addcmul_(g_N, g_N, value=1 - betas[1])
    step_size, bias2_sqrt = schedule.to(p_N.dtype)
    p_N.sub_(step_size * exp_avg_N / (exp_avg_sq_N.sqrt() / bias2_sqrt + eps))
