"""Triton kernels of latent_update: one pass of Adam over all latents, and over the biases.

    W[s], m[s], v[s]            = Adam(clip * rows[slot of s])   update_row_kernel, every latent, one read and one write
    W[s]                       /= |W[s]| + eps                   in the same program, while the row is in registers

The torch lines they equal are in latent_update.py and reference.py. What changes from step to step (the clip factor,
the learning rate with its bias correction) is read from the device: a captured CUDA graph can be replayed.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .latent_gradient_triton import whole_row_block
from .segment_sum_triton import accumulator

BLOCK_V = 1024  # elements of a vector that one program updates


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


# --- launch wrappers -------------------------------------------------------------------------------------------------


def launch_latent_update(
    W_SD: Tensor,
    exp_avg_SD: Tensor,
    exp_avg_sq_SD: Tensor,
    rows_CD: Tensor,
    slots_S: Tensor,
    aux_rows_AD: Tensor | None,
    aux_slots_S: Tensor | None,
    clip: Tensor,
    schedule: Tensor,
    betas: tuple[float, float],
    eps: float,
    unit_norm: bool,
    copy_SD: Tensor | None,
) -> None:
    """Updates W, exp_avg and exp_avg_sq in place and writes the copy, if there is one."""
    d_sae, d_in = W_SD.shape
    _, ACC = accumulator(W_SD.dtype)
    block_d, num_warps = whole_row_block(d_in, elements_per_thread=4)
    update_row_kernel[(d_sae,)](
        W_SD,
        exp_avg_SD,
        exp_avg_sq_SD,
        rows_CD,
        slots_S,
        rows_CD if aux_rows_AD is None else aux_rows_AD,
        slots_S if aux_slots_S is None else aux_slots_S,
        clip,
        schedule,
        W_SD if copy_SD is None else copy_SD,
        d_in,
        BETA1=betas[0],
        BETA2=betas[1],
        EPS=eps,
        NORM_EPS=torch.finfo(W_SD.dtype).eps,
        UNIT_NORM=unit_norm,
        HAS_AUX=aux_rows_AD is not None,
        HAS_COPY=copy_SD is not None,
        BLOCK_D=block_d,
        ACC=ACC,
        num_warps=num_warps,
    )


def launch_vector_update(
    p_N: Tensor,
    exp_avg_N: Tensor,
    exp_avg_sq_N: Tensor,
    gradient_N: Tensor,
    clip: Tensor,
    schedule: Tensor,
    betas: tuple[float, float],
    eps: float,
) -> None:
    """Updates p, exp_avg and exp_avg_sq in place."""
    _, ACC = accumulator(p_N.dtype)
    update_vector_kernel[(triton.cdiv(p_N.numel(), BLOCK_V),)](
        p_N,
        exp_avg_N,
        exp_avg_sq_N,
        gradient_N.contiguous(),
        clip,
        schedule,
        p_N.numel(),
        BETA1=betas[0],
        BETA2=betas[1],
        EPS=eps,
        BLOCK_V=BLOCK_V,
        ACC=ACC,
        num_warps=4,
    )
