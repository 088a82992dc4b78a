"""Triton kernel of latent_gradient: the gradient row of every active latent, and its squared norm.

    rows[slot of s], |rows|^2   = project(segment sum of s)      gradient_row_kernel

The torch lines it equals are in latent_gradient.py and reference.py. A program owns a whole row, so that its inner
product with the decoder row and its norm stay in registers.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .segment_sum_triton import BLOCK_P, CHUNK, accumulator, launch_whole_chunks, segment_total

MAX_WIDTH = 8192  # of a row that one program holds without spilling


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


# --- launch wrappers -------------------------------------------------------------------------------------------------


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
        weights_M,
        ids_M,
        offsets_S1,
        source_RD,
        partials,
        slots_S,
        source_RD if unit_rows_SD is None else unit_rows_SD,
        rows_CD,
        squared_norms_S,
        d_in,
        PROJECT=unit_rows_SD is not None,
        CHUNK=CHUNK,
        BLOCK_P=BLOCK_P,
        BLOCK_D=block_d,
        ACC=ACC,
        num_warps=num_warps,
    )
    return rows_CD, slots_S, squared_norms_S
