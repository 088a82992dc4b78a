"""Triton kernels of latent_update: the gradient row of every active latent, then one pass of Adam over all latents.

    rows[slot of s], |rows|^2   = project(segment sum of s)      gradient_row_kernel, active latents only
    W[s], m[s], v[s]            = Adam(clip * rows[slot of s])   update_row_kernel, every latent, one read and one write
    W[s]                       /= |W[s]| + eps                   in the same program, while the row is in registers

The torch lines they equal are in latent_update.py and reference.py. A program owns a whole row, so that its inner
product with the decoder row and its norm stay in registers. What changes from step to step (the clip factor, the
learning rate with its bias correction) is read from the device: a captured CUDA graph can be replayed.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .segment_sum_triton import BLOCK_P, CHUNK, accumulator, launch_whole_chunks, segment_total

MAX_WIDTH = 8192  # of a row that one program holds without spilling
BLOCK_V = 1024  # elements of a vector that one program updates


@triton.jit
def gradient_row_kernel(
    weights_ptr,
    ids_ptr,
    offsets_ptr,
    source_ptr,
    partials_ptr,
    slots_ptr,
    unit_rows_ptr,
    rows_ptr,
    squared_norms_ptr,
    d_in,
    PROJECT: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
):
    """rows[slot] = the segment's sum, with PROJECT less its component along the latent's unit row; and its norm^2."""
    latent = tl.program_id(0).to(tl.int64)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < d_in
    slot = tl.load(slots_ptr + latent).to(tl.int64)
    if slot >= 0:
        start = tl.load(offsets_ptr + latent)
        end = tl.load(offsets_ptr + latent + 1)
        g = segment_total(
            weights_ptr, ids_ptr, source_ptr, partials_ptr, start, end, d_in, o_d, m_d, CHUNK, BLOCK_P, BLOCK_D, ACC
        )
        g = tl.where(m_d, g, 0.0)  # an infinite weight makes NaN of the lanes behind the row
        if PROJECT:
            w = tl.load(unit_rows_ptr + latent * d_in + o_d, mask=m_d, other=0.0).to(ACC)
            g -= tl.sum(g * w, axis=0) * w
        tl.store(rows_ptr + slot * d_in + o_d, g.to(rows_ptr.dtype.element_ty), mask=m_d)
        tl.store(squared_norms_ptr + latent, tl.sum(g * g, axis=0).to(squared_norms_ptr.dtype.element_ty))
    else:
        tl.store(squared_norms_ptr + latent, 0.0)


@triton.jit
def adam(p, exp_avg, exp_avg_sq, g, schedule_ptr, BETA1: tl.constexpr, BETA2: tl.constexpr, EPS: tl.constexpr):
    """(p, exp_avg, exp_avg_sq) after one step; schedule is (lr / bias correction 1, sqrt(bias correction 2))."""
    step_size = tl.load(schedule_ptr).to(p.dtype)
    bias2_sqrt = tl.load(schedule_ptr + 1).to(p.dtype)
    exp_avg = BETA1 * exp_avg + (1 - BETA1) * g
    exp_avg_sq = BETA2 * exp_avg_sq + (1 - BETA2) * g * g
    p -= step_size * exp_avg / (tl.sqrt(exp_avg_sq) / bias2_sqrt + EPS)
    return p, exp_avg, exp_avg_sq


@triton.jit
def update_row_kernel(
    W_ptr,
    exp_avg_ptr,
    exp_avg_sq_ptr,
    rows_ptr,
    slots_ptr,
    aux_rows_ptr,
    aux_slots_ptr,
    clip_ptr,
    schedule_ptr,
    copy_ptr,
    d_in,
    BETA1: tl.constexpr,
    BETA2: tl.constexpr,
    EPS: tl.constexpr,
    NORM_EPS: tl.constexpr,
    UNIT_NORM: tl.constexpr,
    HAS_AUX: tl.constexpr,
    HAS_COPY: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
):
    """One latent's row of W, exp_avg and exp_avg_sq in place; a latent without a slot has gradient zero."""
    latent = tl.program_id(0).to(tl.int64)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < d_in
    o_row = latent * d_in + o_d
    slot = tl.load(slots_ptr + latent).to(tl.int64)
    g = tl.load(rows_ptr + slot * d_in + o_d, mask=o_d < tl.where(slot >= 0, d_in, 0), other=0.0).to(ACC)
    if HAS_AUX:
        aux_slot = tl.load(aux_slots_ptr + latent).to(tl.int64)
        m_aux = o_d < tl.where(aux_slot >= 0, d_in, 0)
        g += tl.load(aux_rows_ptr + aux_slot * d_in + o_d, mask=m_aux, other=0.0).to(ACC)
    g *= tl.load(clip_ptr).to(ACC)  # a clip of NaN reaches every latent, as in the dense step
    w = tl.load(W_ptr + o_row, mask=m_d, other=0.0).to(ACC)
    exp_avg = tl.load(exp_avg_ptr + o_row, mask=m_d, other=0.0).to(ACC)
    exp_avg_sq = tl.load(exp_avg_sq_ptr + o_row, mask=m_d, other=0.0).to(ACC)
    w, exp_avg, exp_avg_sq = adam(w, exp_avg, exp_avg_sq, g, schedule_ptr, BETA1, BETA2, EPS)
    if UNIT_NORM:
        w = tl.where(m_d, w, 0.0)  # a NaN step size makes NaN of the lanes behind the row too
        w *= 1.0 / (tl.sqrt(tl.sum(w * w, axis=0)) + NORM_EPS)
    tl.store(W_ptr + o_row, w.to(W_ptr.dtype.element_ty), mask=m_d)
    tl.store(exp_avg_ptr + o_row, exp_avg.to(exp_avg_ptr.dtype.element_ty), mask=m_d)
    tl.store(exp_avg_sq_ptr + o_row, exp_avg_sq.to(exp_avg_sq_ptr.dtype.element_ty), mask=m_d)
    if HAS_COPY:
        tl.store(copy_ptr + o_row, w.to(tl.float32).to(copy_ptr.dtype.element_ty), mask=m_d)


@triton.jit
def update_vector_kernel(
    p_ptr,
    exp_avg_ptr,
    exp_avg_sq_ptr,
    gradient_ptr,
    clip_ptr,
    schedule_ptr,
    n,
    BETA1: tl.constexpr,
    BETA2: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK_V: tl.constexpr,
    ACC: tl.constexpr,
):
    """One block of a bias vector: clip and Adam in place."""
    o_v = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    m_v = o_v < n
    g = tl.load(gradient_ptr + o_v, mask=m_v, other=0.0).to(ACC) * tl.load(clip_ptr).to(ACC)
    p = tl.load(p_ptr + o_v, mask=m_v, other=0.0).to(ACC)
    exp_avg = tl.load(exp_avg_ptr + o_v, mask=m_v, other=0.0).to(ACC)
    exp_avg_sq = tl.load(exp_avg_sq_ptr + o_v, mask=m_v, other=0.0).to(ACC)
    p, exp_avg, exp_avg_sq = adam(p, exp_avg, exp_avg_sq, g, schedule_ptr, BETA1, BETA2, EPS)
    tl.store(p_ptr + o_v, p.to(p_ptr.dtype.element_ty), mask=m_v)
    tl.store(exp_avg_ptr + o_v, exp_avg.to(exp_avg_ptr.dtype.element_ty), mask=m_v)
    tl.store(exp_avg_sq_ptr + o_v, exp_avg_sq.to(exp_avg_sq_ptr.dtype.element_ty), mask=m_v)


# --- launch wrappers ------------------------------------------------------------------------------------------------


def whole_row_block(d_in: int, elements_per_thread: int) -> tuple[int, int]:
    """(BLOCK_D, num_warps) of a kernel whose program owns a row."""
    if d_in > MAX_WIDTH:
        raise ValueError(f"d_in: {d_in} is above {MAX_WIDTH}, the widest row that the training step updates on a GPU")
    block_d = triton.next_power_of_2(d_in)
    return block_d, max(1, min(16, block_d // (32 * elements_per_thread)))


def launch_latent_gradient(
    weights_M: Tensor, ids_M: Tensor, offsets_S1: Tensor, source_RD: Tensor, unit_rows_SD: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Allocates (rows [min(S, M), D], slots_S, squared_norms_S) and fills the rows of active latents."""
    d_sae, d_in = offsets_S1.numel() - 1, source_RD.shape[1]
    weights_M, ids_M, offsets_S1 = weights_M.contiguous(), ids_M.contiguous(), offsets_S1.contiguous()
    source_RD = source_RD.contiguous()
    sum_dtype, ACC = accumulator(source_RD.dtype)
    active_S = offsets_S1[1:] > offsets_S1[:-1]
    slots_S = torch.where(active_S, active_S.cumsum(0) - 1, -1).to(torch.int32)
    rows_CD = torch.empty(min(d_sae, weights_M.numel()), d_in, dtype=source_RD.dtype, device=source_RD.device)
    squared_norms_S = torch.empty(d_sae, dtype=sum_dtype, device=source_RD.device)
    partials = launch_whole_chunks(weights_M, ids_M, offsets_S1, source_RD)
    block_d, num_warps = whole_row_block(d_in, elements_per_thread=8)
    gradient_row_kernel[(d_sae,)](
        weights_M, ids_M, offsets_S1, source_RD, partials, slots_S,
        source_RD if unit_rows_SD is None else unit_rows_SD, rows_CD, squared_norms_S, d_in,
        PROJECT=unit_rows_SD is not None, CHUNK=CHUNK, BLOCK_P=BLOCK_P, BLOCK_D=block_d, ACC=ACC, num_warps=num_warps,
    )  # fmt: skip
    return rows_CD, slots_S, squared_norms_S


def launch_latent_update(
    W_SD: Tensor, exp_avg_SD: Tensor, exp_avg_sq_SD: Tensor, rows_CD: Tensor, slots_S: Tensor,
    aux_rows_AD: Tensor | None, aux_slots_S: Tensor | None, clip: Tensor, schedule: Tensor,
    betas: tuple[float, float], eps: float, unit_norm: bool, copy_SD: Tensor | None,
) -> None:  # fmt: skip
    """Updates W, exp_avg and exp_avg_sq in place and writes the copy, if there is one."""
    d_sae, d_in = W_SD.shape
    _, ACC = accumulator(W_SD.dtype)
    block_d, num_warps = whole_row_block(d_in, elements_per_thread=4)
    update_row_kernel[(d_sae,)](
        W_SD, exp_avg_SD, exp_avg_sq_SD, rows_CD, slots_S,
        rows_CD if aux_rows_AD is None else aux_rows_AD, slots_S if aux_slots_S is None else aux_slots_S,
        clip, schedule, W_SD if copy_SD is None else copy_SD, d_in,
        BETA1=betas[0], BETA2=betas[1], EPS=eps, NORM_EPS=torch.finfo(W_SD.dtype).eps, UNIT_NORM=unit_norm,
        HAS_AUX=aux_rows_AD is not None, HAS_COPY=copy_SD is not None, BLOCK_D=block_d, ACC=ACC, num_warps=num_warps,
    )  # fmt: skip


def launch_vector_update(
    p_N: Tensor, exp_avg_N: Tensor, exp_avg_sq_N: Tensor, gradient_N: Tensor, clip: Tensor, schedule: Tensor,
    betas: tuple[float, float], eps: float,
) -> None:  # fmt: skip
    """Updates p, exp_avg and exp_avg_sq in place."""
    _, ACC = accumulator(p_N.dtype)
    update_vector_kernel[(triton.cdiv(p_N.numel(), BLOCK_V),)](
        p_N, exp_avg_N, exp_avg_sq_N, gradient_N.contiguous(), clip, schedule, p_N.numel(),
        BETA1=betas[0], BETA2=betas[1], EPS=eps, BLOCK_V=BLOCK_V, ACC=ACC, num_warps=4,
    )  # fmt: skip
