"""Dense pair sums in float64 on a GPU: cuBLAS for the products, Triton for what is between them.

A chip for computing centres multiplies float64 at 50 TFLOP/s and more, above what float32 without tensor cores gives,
and its sums lose nothing, so a pair costs no more here than in float32.

`launch_prepare` makes the embeddings whose inner products and squared norms give a similarity.
`launch_column_sums` reads the activations once: their float64 copy, den, and the sums that judge the closed form, in
parts that `launch_closed_form` adds up. dense_score_triton.py does the same in launches of its own.
`launch_panel_num` is for any similarity: panels of images i against all j from the panel's first image on,

    S = <e_i, e_j>            a product
    S = similarity, 0 unless i < j    panel_similarity_kernel, in place
    W = S r_j                 a product
    num += sum_i r_i W_i      weigh_panel_kernel

so each pair is made once and no more of S is held than a panel. Embeddings arrive prepared, as for
pairwise_similarity_triton.py, whose _similarity_tile is the formula here too.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import cdiv
from .pairwise_similarity_triton import _similarity_tile

PREPARE_BLOCK_N = 4
PREPARE_BLOCK_E = 256
PANEL_IMAGES = 1280
PANEL_COLUMNS = 1 << 15
PANEL_BLOCK_I = 8
PANEL_BLOCK_J = 256
WEIGH_ROWS = 32
WEIGH_BLOCK_I = 8
WEIGH_BLOCK_K = 128
COLUMN_ROWS = 64
COLUMN_PARTS = 64
COLUMN_BLOCK_K = 128
COLUMN_WARPS = 2
COLUMN_UNROLL = 8
CLOSED_BLOCK_K = 8
CLOSED_BLOCK_E = 128
NUM_WARPS = 4


@triton.jit(do_not_specialize=["n_images"])
def prepare_kernel(
    emb_ptr,
    mean_ptr,
    out_ptr,
    sqnorm_ptr,
    n_images,
    d_emb,
    SIMILARITY: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """out = e / |e| (cosine; of a zero one NaN), e - mean (rbf) or e (dot), made in float64; sqnorm = |out|^2."""
    o_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < n_images
    norm = tl.full([BLOCK_N], 1.0, dtype=tl.float64)
    if SIMILARITY == "cosine":
        b_square = tl.zeros([BLOCK_N, BLOCK_E], dtype=tl.float64)
        for e in range(0, d_emb, BLOCK_E):
            o_e = e + tl.arange(0, BLOCK_E)
            mask = m_n[:, None] & (o_e < d_emb)[None, :]
            b_emb = tl.load(emb_ptr + o_n[:, None] * d_emb + o_e[None, :], mask=mask, other=0.0).to(tl.float64)
            b_square += b_emb * b_emb
        norm = tl.sqrt(tl.sum(b_square, axis=1))
    b_square = tl.zeros([BLOCK_N, BLOCK_E], dtype=tl.float64)
    for e in range(0, d_emb, BLOCK_E):
        o_e = e + tl.arange(0, BLOCK_E)
        m_e = o_e < d_emb
        offsets, mask = o_n[:, None] * d_emb + o_e[None, :], m_n[:, None] & m_e[None, :]
        b_out = tl.load(emb_ptr + offsets, mask=mask, other=0.0).to(tl.float64)
        if SIMILARITY == "cosine":
            b_out = b_out / norm[:, None]
        if SIMILARITY == "rbf":
            b_out = tl.where(mask, b_out - tl.load(mean_ptr + o_e, mask=m_e, other=0.0)[None, :], 0.0)
        b_out = b_out.to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + offsets, b_out, mask=mask)
        b_wide = tl.where(mask, b_out.to(tl.float64), 0.0)
        b_square += b_wide * b_wide
    tl.store(sqnorm_ptr + o_n, tl.sum(b_square, axis=1), mask=m_n)


@triton.jit
def column_sums(
    r_ptr,
    wide_ptr,
    sqnorm_ptr,
    parts_ptr,
    part,
    o_k,
    b_low,
    n_images,
    n_latents,
    rows,
    UNIT: tl.constexpr,
    SHIFTED: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_K: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """column_sums_kernel of one part (int64). UNIT: the vectors have length 1, but for those whose |e|^2 is 0."""
    b_total = tl.zeros([BLOCK_K], dtype=tl.float64)
    b_den = tl.zeros([BLOCK_K], dtype=tl.float64)
    b_self = tl.zeros([BLOCK_K], dtype=tl.float64)
    b_square = tl.zeros([BLOCK_K], dtype=tl.float64)
    b_norm = tl.zeros([BLOCK_K], dtype=tl.float64)
    end = tl.minimum((part + 1) * rows, n_images)
    for first in range(part * rows, end, UNROLL):
        for i in tl.static_range(UNROLL):
            row = first + i
            m_k = o_k < tl.where(row < end, n_latents, 0)
            b_r = tl.load(r_ptr + row * n_latents + o_k, mask=m_k, other=0.0).to(tl.float64)
            if SHIFTED:
                b_r = tl.where(m_k, b_r - b_low, 0.0)
            if WIDEN:
                tl.store(wide_ptr + row * n_latents + o_k, b_r, mask=m_k)
            sqnorm = tl.load(sqnorm_ptr + row, mask=row < end, other=0.0)
            norm = sqnorm
            if UNIT:
                sqnorm = tl.where(sqnorm > 0, 1.0, 0.0)
                norm = sqnorm
            else:
                norm = tl.sqrt(sqnorm)
            b_den += b_r * b_total
            b_total += b_r
            b_self += b_r * sqnorm
            b_square += b_r * b_r * sqnorm
            b_norm += b_r * norm
    pointers = parts_ptr + part * 5 * n_latents + o_k
    m_k = o_k < n_latents
    tl.store(pointers, b_total, mask=m_k)
    tl.store(pointers + n_latents, b_den, mask=m_k)
    tl.store(pointers + 2 * n_latents, b_self, mask=m_k)
    tl.store(pointers + 3 * n_latents, b_square, mask=m_k)
    tl.store(pointers + 4 * n_latents, b_norm, mask=m_k)


@triton.jit(do_not_specialize=["n_images", "rows"])
def column_sums_kernel(
    r_ptr,
    low_ptr,
    wide_ptr,
    sqnorm_ptr,
    parts_ptr,
    n_images,
    n_latents,
    rows,
    SHIFTED: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_K: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """parts[program] = sums over `rows` images of r, r_i r_j (i < j), r |e|^2, r^2 |e|^2 and r |e|; wide = r - low."""
    part = tl.program_id(0).to(tl.int64)
    o_k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    b_low = tl.zeros([BLOCK_K], dtype=tl.float64)
    if SHIFTED:
        b_low = tl.load(low_ptr + o_k, mask=o_k < n_latents, other=0.0)
    column_sums(
        r_ptr,
        wide_ptr,
        sqnorm_ptr,
        parts_ptr,
        part,
        o_k,
        b_low,
        n_images,
        n_latents,
        rows,
        False,
        SHIFTED,
        WIDEN,
        BLOCK_K,
        UNROLL,
    )


@triton.jit
def added_columns(parts_ptr, o_k, n_latents, n_parts, PARTS: tl.constexpr):
    """total, den, self, square and norm of the latents o_k (int64), from the parts of column_sums. No subtraction."""
    o_p = tl.arange(0, PARTS).to(tl.int64)
    mask = (o_p < n_parts)[:, None] & (o_k < n_latents)[None, :]
    pointers = parts_ptr + o_p[:, None] * (5 * n_latents) + o_k[None, :]
    b_total = tl.load(pointers, mask=mask, other=0.0)
    b_before = tl.load(pointers - 5 * n_latents, mask=mask & (o_p > 0)[:, None], other=0.0)
    b_den = tl.load(pointers + n_latents, mask=mask, other=0.0) + b_total * tl.cumsum(b_before, axis=0)
    total, den = tl.sum(b_total, axis=0), tl.sum(b_den, axis=0)
    own = tl.sum(tl.load(pointers + 2 * n_latents, mask=mask, other=0.0), axis=0)
    square = tl.sum(tl.load(pointers + 3 * n_latents, mask=mask, other=0.0), axis=0)
    norm = tl.sum(tl.load(pointers + 4 * n_latents, mask=mask, other=0.0), axis=0)
    return total, den, own, square, norm


@triton.jit
def is_dominated(square, norm):
    """Whether the closed form of num loses too many digits, as pairwise_similarity.well_conditioned has it."""
    conditioned = norm * norm - square > 2e-2 * norm * norm
    return (conditioned == 0) & (square > 0)


@triton.jit(do_not_specialize=["n_parts"])
def closed_form_kernel(
    parts_ptr,
    sums_ptr,
    total_ptr,
    den_ptr,
    self_ptr,
    num_ptr,
    dominated_ptr,
    n_latents,
    n_parts,
    d_emb,
    PARTS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """total, den, self and num of each latent, from the parts and sums = r^T e; dominated: is_dominated."""
    o_k = tl.program_id(0).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    m_k = o_k < n_latents
    total, den, own, square, norm = added_columns(parts_ptr, o_k, n_latents, n_parts, PARTS)
    b_all = tl.zeros([BLOCK_K, BLOCK_E], dtype=tl.float64)
    for e in range(0, d_emb, BLOCK_E):
        o_e = e + tl.arange(0, BLOCK_E)
        mask = m_k[:, None] & (o_e < d_emb)[None, :]
        b_sums = tl.load(sums_ptr + o_k[:, None] * d_emb + o_e[None, :], mask=mask, other=0.0)
        b_all += b_sums * b_sums
    tl.store(dominated_ptr + o_k, is_dominated(square, norm), mask=m_k)
    tl.store(total_ptr + o_k, total, mask=m_k)
    tl.store(den_ptr + o_k, den, mask=m_k)
    tl.store(self_ptr + o_k, own, mask=m_k)
    tl.store(num_ptr + o_k, (tl.sum(b_all, axis=1) - square) / 2, mask=m_k)


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


def launch_prepare(emb_NE: Tensor, similarity: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """pairwise_similarity.prepare_embeddings, in one pass over them; for rbf another makes their mean."""
    emb_NE = emb_NE.contiguous()
    n_images, d_emb = emb_NE.shape
    prepared_NE = torch.empty_like(emb_NE, dtype=dtype)
    sqnorm_N = torch.empty(n_images, dtype=dtype, device=emb_NE.device)
    mean_E = emb_NE.mean(0, dtype=torch.float64) if similarity == "rbf" and n_images > 0 else None
    if n_images > 0:
        prepare_kernel[(cdiv(n_images, PREPARE_BLOCK_N),)](
            emb_NE,
            mean_E,
            prepared_NE,
            sqnorm_N,
            n_images,
            d_emb,
            SIMILARITY=similarity,
            BLOCK_N=PREPARE_BLOCK_N,
            BLOCK_E=PREPARE_BLOCK_E,
            num_warps=NUM_WARPS,
        )
    return prepared_NE, sqnorm_N


def launch_column_sums(
    r_NK: Tensor,
    sqnorm_N: Tensor,
    low_K: Tensor | None = None,
    least_rows: int = COLUMN_ROWS,
    widen: bool = True,
) -> tuple[Tensor, Tensor]:
    """One pass over r: r - low in float64 (r itself without widen), and parts [P, 5, K] that closed_form_kernel adds.

    |e|^2 and low float64. Nothing but low is subtracted: den keeps its digits where one image dominates.
    """
    n_images, n_latents = r_NK.shape
    r_NK, sqnorm_N = r_NK.contiguous(), sqnorm_N.contiguous()
    widen = widen and (r_NK.dtype != torch.float64 or low_K is not None)
    wide_NK = torch.empty_like(r_NK, dtype=torch.float64) if widen else r_NK
    rows = max(least_rows, cdiv(n_images, COLUMN_PARTS))
    n_parts = cdiv(n_images, rows)
    parts = sqnorm_N.new_empty(n_parts, 5, n_latents)
    if r_NK.numel() > 0:
        column_sums_kernel[(n_parts, cdiv(n_latents, COLUMN_BLOCK_K))](
            r_NK,
            low_K,
            wide_NK,
            sqnorm_N,
            parts,
            n_images,
            n_latents,
            rows,
            SHIFTED=low_K is not None,
            WIDEN=widen,
            BLOCK_K=COLUMN_BLOCK_K,
            UNROLL=COLUMN_UNROLL,
            num_warps=COLUMN_WARPS,
        )
    return wide_NK, parts


def pair_weights(parts: Tensor) -> Tensor:
    """den [K] of the parts: their own pairs, and pairs of two parts."""
    total, den = parts[:, 0], parts[:, 1]
    upto, width = total, 1
    while width < len(parts):  # torch.cumsum is refused where algorithms must be deterministic
        upto, width = torch.cat([upto[:width], upto[width:] + upto[:-width]]), 2 * width
    return den.sum(0) + (total[1:] * upto[:-1]).sum(0)


def launch_inner_products(
    r_NK: Tensor, emb_NE: Tensor, sqnorm_N: Tensor, low_K: Tensor | None
) -> tuple[Tensor, Tensor, list[Tensor], Tensor]:
    """r - low [N, K], its product with the embeddings [K, E], and what launch_closed_form returns. Nothing waits."""
    wide_NK, parts = launch_column_sums(r_NK, sqnorm_N, low_K)
    sums_KE = wide_NK.T @ emb_NE
    return wide_NK, sums_KE, *launch_closed_form(parts, sums_KE)


def launch_closed_form(parts: Tensor, sums_KE: Tensor) -> tuple[list[Tensor], Tensor]:
    """total, den, self and num by the closed form, [K] each; and [K] whether one image dominates num."""
    n_latents, d_emb = sums_KE.shape
    out = [sums_KE.new_empty(n_latents) for _ in range(4)]
    dominated_K = torch.empty(n_latents, dtype=torch.bool, device=sums_KE.device)
    if n_latents > 0:
        closed_form_kernel[(cdiv(n_latents, CLOSED_BLOCK_K),)](
            parts,
            sums_KE.contiguous(),
            *out,
            dominated_K,
            n_latents,
            len(parts),
            d_emb,
            PARTS=COLUMN_PARTS,
            BLOCK_K=CLOSED_BLOCK_K,
            BLOCK_E=CLOSED_BLOCK_E,
            num_warps=NUM_WARPS,
        )
    return out, dominated_K


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
    parts = r_NK.new_zeros(cdiv(images, WEIGH_ROWS), n_latents)
    gamma_1 = torch.full((1,), gamma, dtype=torch.float64, device=r_NK.device)
    for i in range(0, n_images, images):
        emb_IE, sqnorm_I, r_IK = emb_NE[i : i + images], sqnorm_N[i : i + images], r_NK[i : i + images]
        panel_IK = weighted_IK[: len(r_IK)]
        for j in range(i, n_images, columns):
            emb_JE, sqnorm_J = emb_NE[j : j + columns], sqnorm_N[j : j + columns]
            s_IJ = buffer[: len(emb_IE) * len(emb_JE)].view(len(emb_IE), len(emb_JE))
            torch.mm(emb_IE, emb_JE.T, out=s_IJ)
            panel_similarity_kernel[(cdiv(len(emb_IE), PANEL_BLOCK_I), cdiv(len(emb_JE), PANEL_BLOCK_J))](
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
        weigh_panel_kernel[(cdiv(len(r_IK), WEIGH_ROWS), cdiv(n_latents, WEIGH_BLOCK_K))](
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
