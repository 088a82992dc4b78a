"""Dense pair sums in float64 on a GPU: cuBLAS for the products, Triton for what is between them.

A chip for computing centres multiplies float64 at 50 TFLOP/s and more, above what float32 without tensor cores gives,
and its sums lose nothing, so a pair costs no more here than in float32.

`launch_column_sums` reads the activations once: their float64 copy, den, and the sums that judge the closed form.
`launch_panel_num` is for any similarity: panels of images i against all j from the panel's first image on,

    S = <e_i, e_j>            a product
    S = similarity, 0 unless i < j    panel_similarity_kernel, in place
    W = S r_j                 a product
    num += sum_i r_i W_i      weigh_panel_kernel

so each pair is made once and no more of S is held than a panel. Embeddings arrive prepared, as for
pairwise_similarity_triton.py, whose _similarity_tile is the formula here too.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .pairwise_similarity_triton import _similarity_tile

PANEL_IMAGES = 2048
PANEL_COLUMNS = 1 << 15
PANEL_BLOCK_I = 8
PANEL_BLOCK_J = 256
WEIGH_ROWS = 128
WEIGH_BLOCK_I = 8
WEIGH_BLOCK_K = 128
COLUMN_ROWS = 128
COLUMN_BLOCK_K = 256
COLUMN_UNROLL = 8
NUM_WARPS = 4


@triton.jit(do_not_specialize=["n_images", "n_parts"])
def column_sums_kernel(
    r_ptr,
    wide_ptr,
    sqnorm_ptr,
    parts_ptr,
    n_images,
    n_latents,
    n_parts,
    WIDEN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """parts[:, program] = sums over ROWS images of r, r_i r_j (i < j), r^2 |e|^2 and r |e|; wide = r in float64."""
    part = tl.program_id(0).to(tl.int64)
    o_k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    b_total = tl.zeros([BLOCK_K], dtype=tl.float64)
    b_den = tl.zeros([BLOCK_K], dtype=tl.float64)
    b_square = tl.zeros([BLOCK_K], dtype=tl.float64)
    b_norm = tl.zeros([BLOCK_K], dtype=tl.float64)
    for first in range(0, ROWS, UNROLL):
        for i in tl.static_range(UNROLL):
            row = part * ROWS + first + i
            m_k = o_k < tl.where(row < n_images, n_latents, 0)
            b_r = tl.load(r_ptr + row * n_latents + o_k, mask=m_k, other=0.0).to(tl.float64)
            if WIDEN:
                tl.store(wide_ptr + row * n_latents + o_k, b_r, mask=m_k)
            sqnorm = tl.load(sqnorm_ptr + row, mask=row < n_images, other=0.0)
            b_den += b_r * b_total
            b_total += b_r
            b_square += b_r * b_r * sqnorm
            b_norm += b_r * tl.sqrt(sqnorm)
    o_part = part * n_latents + o_k
    stride = n_parts.to(tl.int64) * n_latents
    m_k = o_k < n_latents
    tl.store(parts_ptr + o_part, b_total, mask=m_k)
    tl.store(parts_ptr + stride + o_part, b_den, mask=m_k)
    tl.store(parts_ptr + 2 * stride + o_part, b_square, mask=m_k)
    tl.store(parts_ptr + 3 * stride + o_part, b_norm, mask=m_k)


@triton.jit(do_not_specialize=["n_i", "n_j", "first_j"])
def panel_similarity_kernel(
    s_ptr,
    sqnorm_i_ptr,
    sqnorm_j_ptr,
    gamma_ptr,
    n_i,
    n_j,
    first_j,
    SIMILARITY: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    """In place: the similarity of the inner products s [n_i, n_j]; 0 unless i < first_j + j."""
    o_i = tl.program_id(0) * BLOCK_I + tl.arange(0, BLOCK_I)
    o_j = tl.program_id(1) * BLOCK_J + tl.arange(0, BLOCK_J)
    m_i, m_j = o_i < n_i, o_j < n_j
    pointers = s_ptr + o_i.to(tl.int64)[:, None] * n_j + o_j[None, :]
    inner = tl.load(pointers, mask=m_i[:, None] & m_j[None, :], other=0.0)
    sqnorm_i = tl.load(sqnorm_i_ptr + o_i, mask=m_i, other=0.0)
    sqnorm_j = tl.load(sqnorm_j_ptr + o_j, mask=m_j, other=0.0)
    s = _similarity_tile(inner, sqnorm_i, sqnorm_j, tl.load(gamma_ptr), SIMILARITY)
    s = tl.where(o_i[:, None] < first_j + o_j[None, :], s, 0.0)
    tl.store(pointers, s, mask=m_i[:, None] & m_j[None, :])


@triton.jit(do_not_specialize=["n_i"])
def weigh_panel_kernel(
    weighted_ptr, r_ptr, parts_ptr, n_i, n_latents, ROWS: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_K: tl.constexpr
):
    """parts[program] += sum over ROWS images of the panel of r * weighted."""
    part = tl.program_id(0).to(tl.int64)
    o_k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    m_k = o_k < n_latents
    b_num = tl.zeros([BLOCK_I, BLOCK_K], dtype=tl.float64)
    for i in range(0, ROWS, BLOCK_I):
        o_i = part * ROWS + i + tl.arange(0, BLOCK_I)
        mask = (o_i < n_i)[:, None] & m_k[None, :]
        offsets = o_i[:, None] * n_latents + o_k[None, :]
        b_weighted = tl.load(weighted_ptr + offsets, mask=mask, other=0.0)
        b_num += b_weighted * tl.load(r_ptr + offsets, mask=mask, other=0.0)
    pointers = parts_ptr + part * n_latents + o_k
    tl.store(pointers, tl.load(pointers, mask=m_k, other=0.0) + tl.sum(b_num, axis=0), mask=m_k)


# --- launch wrappers -------------------------------------------------------------------------------------------------


class ColumnSums(NamedTuple):
    """Of activations r [N, K], float64: the copy wide_NK, and over images sums of r, of r_i r_j (i < j), of r^2 |e|^2
    and of r |e|."""

    wide_NK: Tensor
    total_K: Tensor
    den_K: Tensor
    square_K: Tensor
    norm_K: Tensor


def launch_column_sums(r_NK: Tensor, sqnorm_N: Tensor, rows: int = COLUMN_ROWS) -> ColumnSums:
    """One pass over r; |e|^2 in float64. Nothing is subtracted: den keeps its digits where one image dominates."""
    n_images, n_latents = r_NK.shape
    r_NK, sqnorm_N = r_NK.contiguous(), sqnorm_N.contiguous()
    widen = r_NK.dtype != torch.float64
    wide_NK = torch.empty_like(r_NK, dtype=torch.float64) if widen else r_NK
    n_parts = triton.cdiv(n_images, rows)
    parts = wide_NK.new_zeros(4, max(n_parts, 1), n_latents)
    if r_NK.numel() > 0:
        column_sums_kernel[(n_parts, triton.cdiv(n_latents, COLUMN_BLOCK_K))](
            r_NK,
            wide_NK,
            sqnorm_N,
            parts,
            n_images,
            n_latents,
            n_parts,
            WIDEN=widen,
            ROWS=rows,
            BLOCK_K=COLUMN_BLOCK_K,
            UNROLL=COLUMN_UNROLL,
            num_warps=NUM_WARPS,
        )
    total_K, den_K, square_K, norm_K = parts.sum(1)
    den_K += (parts[0, 1:] * parts[0, :-1].cumsum(0)).sum(0)  # pairs of two parts
    return ColumnSums(wide_NK, total_K, den_K, square_K, norm_K)


def launch_panel_num(
    r_NK: Tensor,
    emb_NE: Tensor,
    sqnorm_N: Tensor,
    similarity: str,
    gamma: float,
    images: int = PANEL_IMAGES,
    columns: int = PANEL_COLUMNS,
) -> Tensor:
    """num_K of float64 activations and prepared float64 embeddings. Memory: images * (columns + K) numbers."""
    n_images, n_latents = r_NK.shape
    if n_images == 0 or n_latents == 0:
        return r_NK.new_zeros(n_latents)
    images, columns = min(images, n_images), min(columns, n_images)
    buffer = r_NK.new_empty(images * columns)
    weighted_IK = r_NK.new_empty(images, n_latents)
    parts = r_NK.new_zeros(triton.cdiv(images, WEIGH_ROWS), n_latents)
    gamma_1 = torch.full((1,), gamma, dtype=torch.float64, device=r_NK.device)
    for i in range(0, n_images, images):
        emb_IE, sqnorm_I, r_IK = emb_NE[i : i + images], sqnorm_N[i : i + images], r_NK[i : i + images]
        panel_IK = weighted_IK[: len(r_IK)]
        for j in range(i, n_images, columns):
            emb_JE, sqnorm_J = emb_NE[j : j + columns], sqnorm_N[j : j + columns]
            s_IJ = buffer[: len(emb_IE) * len(emb_JE)].view(len(emb_IE), len(emb_JE))
            torch.mm(emb_IE, emb_JE.T, out=s_IJ)
            panel_similarity_kernel[(triton.cdiv(len(emb_IE), PANEL_BLOCK_I), triton.cdiv(len(emb_JE), PANEL_BLOCK_J))](
                s_IJ,
                sqnorm_I,
                sqnorm_J,
                gamma_1,
                *s_IJ.shape,
                j - i,
                SIMILARITY=similarity,
                BLOCK_I=PANEL_BLOCK_I,
                BLOCK_J=PANEL_BLOCK_J,
                num_warps=NUM_WARPS,
            )
            torch.addmm(panel_IK, s_IJ, r_NK[j : j + columns], beta=float(j > i), out=panel_IK)
        weigh_panel_kernel[(triton.cdiv(len(r_IK), WEIGH_ROWS), triton.cdiv(n_latents, WEIGH_BLOCK_K))](
            panel_IK,
            r_IK,
            parts,
            len(r_IK),
            n_latents,
            ROWS=WEIGH_ROWS,
            BLOCK_I=WEIGH_BLOCK_I,
            BLOCK_K=WEIGH_BLOCK_K,
            num_warps=NUM_WARPS,
        )
    return parts.sum(0)
