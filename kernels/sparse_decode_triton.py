"""Triton kernels of sparse_decode and gather_dot; the maths and the torch lines they equal are in sparse_decode.py.

Fixed-k codes have an unrolled decoder of their own; CSR codes and Matryoshka prefixes share one that walks bags.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .segment_sum_triton import BLOCK_P, accumulator, add_weighted_rows, row_tiling

MAX_UNROLLED_K = 32  # beyond, fixed-k codes take the bag kernel: at 64 the unrolled loads hold all 255 registers
GATHER_DOT_WARPS = 4


@triton.jit
def fixed_k_decode_kernel(
    acts_ptr,
    latents_ptr,
    W_dec_ptr,
    b_dec_ptr,
    out_ptr,
    d_in,
    K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
):
    """out[b] = b_dec + sum over j < K of acts[b, j] * W_dec[latents[b, j]]. Unrolled: the row loads are in flight."""
    row = tl.program_id(0).to(tl.int64)
    o_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_d = o_d < d_in
    acc = tl.load(b_dec_ptr + o_d, mask=m_d, other=0.0).to(ACC)
    for j in tl.static_range(K):
        latent = tl.load(latents_ptr + row * K + j)
        act = tl.load(acts_ptr + row * K + j).to(ACC)
        acc += act * tl.load(W_dec_ptr + latent * d_in + o_d, mask=m_d, other=0.0).to(ACC)
    tl.store(out_ptr + row * d_in + o_d, acc.to(out_ptr.dtype.element_ty), mask=m_d)


@triton.jit
def bag_decode_kernel(
    acts_ptr,
    latents_ptr,
    bag_offsets_ptr,
    W_dec_ptr,
    b_dec_ptr,
    out_ptr,
    n_groups,
    d_in,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
):
    """out[b, g] = b_dec + sum over the entries of row b's bags 0..g: the row is walked once, every prefix stored."""
    row = tl.program_id(0).to(tl.int64)
    o_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_d = o_d < d_in
    acc = tl.load(b_dec_ptr + o_d, mask=m_d, other=0.0).to(ACC)
    for bag in range(row * n_groups, (row + 1) * n_groups):
        start = tl.load(bag_offsets_ptr + bag)
        end = tl.load(bag_offsets_ptr + bag + 1)
        acc = add_weighted_rows(acc, acts_ptr, latents_ptr, start, end, W_dec_ptr, d_in, o_d, m_d, BLOCK_P)
        tl.store(out_ptr + bag * d_in + o_d, acc.to(out_ptr.dtype.element_ty), mask=m_d)


@triton.jit
def gather_dot_kernel(
    g_ptr,
    rows_ptr,
    latents_ptr,
    W_ptr,
    out_ptr,
    n_entries,
    n_rows,
    d_in,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
):
    """out[p] = <g[rows[p]], W[latents[p]]>, 0 where rows[p] is n_rows (padding). A program owns BLOCK_P entries."""
    o_p = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    m_p = o_p < n_entries
    rows = tl.load(rows_ptr + o_p, mask=m_p, other=0)
    latents = tl.load(latents_ptr + o_p, mask=m_p, other=0)
    inside = m_p & (rows < n_rows)
    acc = tl.zeros([BLOCK_P, BLOCK_D], dtype=ACC)
    for start_d in range(0, d_in, BLOCK_D):
        o_d = start_d + tl.arange(0, BLOCK_D)
        mask = inside[:, None] & (o_d < d_in)[None, :]
        g = tl.load(g_ptr + rows[:, None] * d_in + o_d[None, :], mask=mask, other=0.0).to(ACC)
        W = tl.load(W_ptr + latents[:, None] * d_in + o_d[None, :], mask=mask, other=0.0).to(ACC)
        acc += g * W
    tl.store(out_ptr + o_p, tl.sum(acc, axis=1).to(out_ptr.dtype.element_ty), mask=m_p)


# --- launch wrappers -------------------------------------------------------------------------------------------------


def launch_sparse_decode(
    acts: Tensor, latents: Tensor, bag_offsets: Tensor | None, W_dec_SD: Tensor, b_dec_D: Tensor, n_groups: int
) -> Tensor:
    """Allocates out [B, G, D] and launches the fixed-k kernel (bag_offsets None, small k) or the bag kernel."""
    d_in = W_dec_SD.shape[1]
    if bag_offsets is None and latents.shape[1] > MAX_UNROLLED_K:
        bag_offsets = torch.arange(latents.shape[0] + 1, device=latents.device) * latents.shape[1]
    n_rows = latents.shape[0] if bag_offsets is None else (bag_offsets.numel() - 1) // n_groups
    out_BGD = torch.empty(n_rows, n_groups, d_in, dtype=W_dec_SD.dtype, device=W_dec_SD.device)
    if out_BGD.numel() == 0:
        return out_BGD
    acts, latents, b_dec_D = acts.contiguous(), latents.contiguous(), b_dec_D.contiguous()
    _, ACC = accumulator(W_dec_SD.dtype)
    block_d, num_warps = row_tiling(d_in)
    grid = (n_rows, triton.cdiv(d_in, block_d))
    if bag_offsets is None:
        fixed_k_decode_kernel[grid](
            acts,
            latents,
            W_dec_SD,
            b_dec_D,
            out_BGD,
            d_in,
            K=latents.shape[1],
            BLOCK_D=block_d,
            ACC=ACC,
            num_warps=num_warps,
        )
    else:
        bag_decode_kernel[grid](
            acts,
            latents,
            bag_offsets.contiguous(),
            W_dec_SD,
            b_dec_D,
            out_BGD,
            n_groups,
            d_in,
            BLOCK_P=BLOCK_P,
            BLOCK_D=block_d,
            ACC=ACC,
            num_warps=num_warps,
        )
    return out_BGD


def gather_dot_block_d(d_in: int) -> int:
    """BLOCK_P accumulators a column: half a row's tile at a time keeps the registers few."""
    return min(512, triton.next_power_of_2(d_in))


def launch_gather_dot(g_RD: Tensor, rows_M: Tensor, latents_M: Tensor, W_SD: Tensor) -> Tensor:
    """Allocates out_M in g's dtype; the reduction over D stays inside one program, in a fixed order."""
    n_entries, (n_rows, d_in) = rows_M.numel(), g_RD.shape
    out_M = torch.empty(n_entries, dtype=g_RD.dtype, device=g_RD.device)
    if n_entries == 0:
        return out_M
    _, ACC = accumulator(g_RD.dtype)
    block_d = gather_dot_block_d(d_in)
    gather_dot_kernel[(triton.cdiv(n_entries, BLOCK_P),)](
        g_RD,
        rows_M.contiguous(),
        latents_M.contiguous(),
        W_SD,
        out_M,
        n_entries,
        n_rows,
        d_in,
        BLOCK_P=BLOCK_P,
        BLOCK_D=block_d,
        ACC=ACC,
        num_warps=GATHER_DOT_WARPS,
    )
    return out_M
