"""Triton kernels of scaled_rows.py: sums in float64 over the columns or the rows of embeddings of any dtype."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import cdiv

BLOCK_N = 4
BLOCK_E = 256
SUM_ROWS = 256
NUM_WARPS = 4


@triton.jit
def squared_norms_of(emb_ptr, sqnorm_ptr, part, n_rows, d_emb, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr):
    """sqnorm = |e|^2 of BLOCK_N rows, those of the part (int64)."""
    o_n = part * BLOCK_N + tl.arange(0, BLOCK_N)
    b_square = tl.zeros([BLOCK_N, BLOCK_E], dtype=tl.float64)
    for e in range(0, d_emb, BLOCK_E):
        o_e = e + tl.arange(0, BLOCK_E)
        mask = (o_n < n_rows)[:, None] & (o_e < d_emb)[None, :]
        b_emb = tl.load(emb_ptr + o_n[:, None] * d_emb + o_e[None, :], mask=mask, other=0.0).to(tl.float64)
        b_square += b_emb * b_emb
    tl.store(sqnorm_ptr + o_n, tl.sum(b_square, axis=1), mask=o_n < n_rows)


@triton.jit(do_not_specialize=["n_rows"])
def squared_norms_kernel(emb_ptr, sqnorm_ptr, n_rows, d_emb, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr):
    squared_norms_of(emb_ptr, sqnorm_ptr, tl.program_id(0).to(tl.int64), n_rows, d_emb, BLOCK_N, BLOCK_E)


@triton.jit(do_not_specialize=["n_rows"])
def scaled_sum_kernel(
    emb_ptr, scale_ptr, parts_ptr, n_rows, d_emb, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr
):
    """parts[program] = sum of scale * emb over ROWS rows."""
    part = tl.program_id(0).to(tl.int64)
    o_e = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    b_sum = tl.zeros([BLOCK_N, BLOCK_E], dtype=tl.float64)
    for n in range(0, ROWS, BLOCK_N):
        o_n = part * ROWS + n + tl.arange(0, BLOCK_N)
        mask = (o_n < n_rows)[:, None] & (o_e < d_emb)[None, :]
        scale = tl.load(scale_ptr + o_n, mask=o_n < n_rows, other=0.0)
        b_emb = tl.load(emb_ptr + o_n[:, None] * d_emb + o_e[None, :], mask=mask, other=0.0).to(tl.float64)
        b_sum += scale[:, None] * b_emb
    tl.store(parts_ptr + part * d_emb + o_e, tl.sum(b_sum, axis=0), mask=o_e < d_emb)


# --- launch wrappers -------------------------------------------------------------------------------------------------


def launch_squared_norms(emb_NE: Tensor) -> Tensor:
    emb_NE = emb_NE.contiguous()
    n_rows, d_emb = emb_NE.shape
    sqnorm_N = torch.empty(n_rows, dtype=torch.float64, device=emb_NE.device)
    if n_rows > 0:
        squared_norms_kernel[(cdiv(n_rows, BLOCK_N),)](
            emb_NE, sqnorm_N, n_rows, d_emb, BLOCK_N=BLOCK_N, BLOCK_E=BLOCK_E, num_warps=NUM_WARPS
        )
    return sqnorm_N


def launch_scaled_sum(emb_NE: Tensor, scale_N: Tensor) -> Tensor:
    emb_NE, scale_N = emb_NE.contiguous(), scale_N.contiguous()
    n_rows, d_emb = emb_NE.shape
    n_parts = cdiv(n_rows, SUM_ROWS)
    parts = scale_N.new_empty(n_parts, d_emb)
    if parts.numel() > 0:
        scaled_sum_kernel[(n_parts, cdiv(d_emb, BLOCK_E))](
            emb_NE,
            scale_N,
            parts,
            n_rows,
            d_emb,
            ROWS=SUM_ROWS,
            BLOCK_N=BLOCK_N,
            BLOCK_E=BLOCK_E,
            num_warps=NUM_WARPS,
        )
    return parts.sum(0)
