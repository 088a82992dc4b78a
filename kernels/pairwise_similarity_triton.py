"""Triton kernels of pairwise_similarity.py: similarities are made tile by tile in registers and never written.

Dense: one program per pair of image blocks (i-block <= j-block) makes its tile s [BLOCK_N, BLOCK_N] once, then walks
the latents: part_k = sum_i r_ik (s @ r_j)_ik. Parts go to a buffer of at most PARTS_BYTES, added to num in
float64 before the next group of tiles: no atomics, a fixed order, bounded memory. Its factors come as two float16
each, scaled by powers of two, so that three products on tensor cores are one of float32.

Gram: one program per block of BLOCK_N entries of one latent walks that latent's later blocks; a second kernel adds a
latent's blocks in order and makes den in float64. Embeddings arrive prepared (float32, normalised for cosine,
centred for rbf).
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import cdiv, check_similarity

DENSE_WARPS = 8
BAND = 8
HALVES_BLOCK = 8, 256
GRAM_BLOCK_N = 64
GRAM_BLOCK_E = 16
GRAM_WARPS = 4
NUM_STAGES = 2
PARTS_BYTES = 256 << 20
FINISH_BLOCK = 32


@triton.jit
def _similarity_tile(inner, sqnorm_i, sqnorm_j, gamma, SIMILARITY: tl.constexpr):
    """_rbf_tile of pairwise_similarity.py; cosine and dot are the inner product of prepared embeddings."""
    if SIMILARITY == "rbf":
        distance = sqnorm_i[:, None] + sqnorm_j[None, :] - 2.0 * inner
        return tl.exp(-gamma * tl.where(distance < 0.0, 0.0, distance))  # NaN stays; of tl.maximum it does not
    return inner


@triton.jit
def _inner_tile(
    emb_ptr, o_i, o_j, m_i, m_j, d_emb, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr, PRECISION: tl.constexpr
):
    """<e_i, e_j> of the images o_i and o_j (int64); masked rows are zero."""
    inner = tl.zeros([BLOCK_N, BLOCK_N], dtype=tl.float32)
    for e in range(0, d_emb, BLOCK_E):
        o_e = e + tl.arange(0, BLOCK_E)
        m_e = o_e < d_emb
        b_i = tl.load(emb_ptr + o_i[:, None] * d_emb + o_e[None, :], mask=m_i[:, None] & m_e[None, :], other=0.0)
        b_j = tl.load(emb_ptr + o_j[None, :] * d_emb + o_e[:, None], mask=m_j[None, :] & m_e[:, None], other=0.0)
        inner = tl.dot(b_i, b_j, inner, input_precision=PRECISION)
    return inner


@triton.jit
def _split_dot(a_high, a_low, b_high, b_low):
    """(a_high + a_low) @ (b_high + b_low) in float32, without low times low, into a sum of its own.

    Tensor cores truncate: a long sum of positive terms comes out low, by 1e-6 after 256. So sums end with their tile.
    """
    product = tl.dot(a_high, b_low)
    product = tl.dot(a_low, b_high, product)
    return tl.dot(a_high, b_high, product)


@triton.jit
def _scaled_halves(x):
    """x * scale as the sum of two float16, and scale: the power of two that brings the largest |x| to 2^8."""
    largest = tl.max(tl.abs(x))
    scale = tl.exp2(8.0 - tl.ceil(tl.log2(tl.where(largest > 1e-30, largest, 1.0))))
    x = x * scale
    high = x.to(tl.float16)
    return high, (x - high.to(tl.float32)).to(tl.float16), scale


@triton.jit(do_not_specialize=["n_rows"])
def halves_kernel(
    x_ptr,
    scale_ptr,
    high_ptr,
    low_ptr,
    n_rows,
    n_columns,
    BY_ROW: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """high + low = x * scale, scale of each row or of each column."""
    o_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m_n, m_c = o_n < n_rows, o_c < n_columns
    offsets, mask = o_n[:, None] * n_columns + o_c[None, :], m_n[:, None] & m_c[None, :]
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0)
    if BY_ROW:
        x = x.to(tl.float64) * tl.load(scale_ptr + o_n, mask=m_n, other=0.0)[:, None]
    else:
        x = x.to(tl.float64) * tl.load(scale_ptr + o_c, mask=m_c, other=0.0)[None, :]
    high = x.to(tl.float16)
    tl.store(high_ptr + offsets, high, mask=mask)
    tl.store(low_ptr + offsets, (x - high.to(tl.float64)).to(tl.float16), mask=mask)


@triton.jit(do_not_specialize=["n_images", "first_tile"])
def pairwise_num_kernel(
    r_high_ptr,
    r_low_ptr,
    emb_high_ptr,
    emb_low_ptr,
    unscale_ptr,
    sqnorm_ptr,
    tile_i_ptr,
    tile_j_ptr,
    parts_ptr,
    n_images,
    n_latents,
    d_emb,
    first_tile,
    gamma,
    SIMILARITY: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """parts[program, k] = sum over i < j in the tile of r_ik s_ij r_jk."""
    program = tl.program_id(0).to(tl.int64)
    o_i = tl.load(tile_i_ptr + first_tile + program) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_j = tl.load(tile_j_ptr + first_tile + program) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_i, m_j = o_i < n_images, o_j < n_images
    inner = tl.zeros([BLOCK_N, BLOCK_N], dtype=tl.float32)
    for e in range(0, d_emb, BLOCK_E):
        o_e = e + tl.arange(0, BLOCK_E)
        m_e = o_e < d_emb
        i_offsets, i_mask = o_i[:, None] * d_emb + o_e[None, :], m_i[:, None] & m_e[None, :]
        j_offsets, j_mask = o_j[None, :] * d_emb + o_e[:, None], m_j[None, :] & m_e[:, None]
        i_high = tl.load(emb_high_ptr + i_offsets, mask=i_mask, other=0.0)
        i_low = tl.load(emb_low_ptr + i_offsets, mask=i_mask, other=0.0)
        j_high = tl.load(emb_high_ptr + j_offsets, mask=j_mask, other=0.0)
        j_low = tl.load(emb_low_ptr + j_offsets, mask=j_mask, other=0.0)
        inner += _split_dot(i_high, i_low, j_high, j_low)
    inner *= tl.load(unscale_ptr + o_i, mask=m_i, other=0.0)[:, None]
    inner *= tl.load(unscale_ptr + o_j, mask=m_j, other=0.0)[None, :]
    sqnorm_i = tl.load(sqnorm_ptr + o_i, mask=m_i, other=0.0)
    sqnorm_j = tl.load(sqnorm_ptr + o_j, mask=m_j, other=0.0)
    s = _similarity_tile(inner, sqnorm_i, sqnorm_j, gamma, SIMILARITY)
    s_high, s_low, s_scale = _scaled_halves(tl.where(o_i[:, None] < o_j[None, :], s, 0.0))
    for k in range(0, n_latents, BLOCK_K):
        o_k = k + tl.arange(0, BLOCK_K)
        m_k = o_k < n_latents
        i_offsets, i_mask = o_i[:, None] * n_latents + o_k[None, :], m_i[:, None] & m_k[None, :]
        j_offsets, j_mask = o_j[:, None] * n_latents + o_k[None, :], m_j[:, None] & m_k[None, :]
        j_high = tl.load(r_high_ptr + j_offsets, mask=j_mask, other=0.0)
        j_low = tl.load(r_low_ptr + j_offsets, mask=j_mask, other=0.0)
        r_i = tl.load(r_high_ptr + i_offsets, mask=i_mask, other=0.0).to(tl.float32)
        r_i += tl.load(r_low_ptr + i_offsets, mask=i_mask, other=0.0).to(tl.float32)
        weighted = _split_dot(s_high, s_low, j_high, j_low)
        tl.store(parts_ptr + program * n_latents + o_k, tl.sum(r_i * weighted, axis=0) / s_scale, mask=m_k)


@triton.jit
def gram_kernel(
    acts_ptr,
    images_ptr,
    offsets_ptr,
    emb_ptr,
    sqnorm_ptr,
    block_latents_ptr,
    block_offsets_ptr,
    num_parts_ptr,
    n_latents,
    d_emb,
    gamma,
    SIMILARITY: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """num_parts[program] = sum over i in the program's block of a latent, j > i in that latent, of r_i s_ij r_j."""
    program = tl.program_id(0).to(tl.int64)
    latent = tl.load(block_latents_ptr + program)
    if latent < n_latents:
        end = tl.load(offsets_ptr + latent + 1)
        first = tl.load(offsets_ptr + latent) + (program - tl.load(block_offsets_ptr + latent)) * BLOCK_N
        o_i = first + tl.arange(0, BLOCK_N)
        m_i = o_i < end
        image_i = tl.load(images_ptr + o_i, mask=m_i, other=0).to(tl.int64)
        r_i = tl.load(acts_ptr + o_i, mask=m_i, other=0.0)
        sqnorm_i = tl.load(sqnorm_ptr + image_i, mask=m_i, other=0.0)
        num = tl.zeros([], dtype=tl.float64)
        for j in range(first, end, BLOCK_N):
            o_j = j + tl.arange(0, BLOCK_N)
            m_j = o_j < end
            image_j = tl.load(images_ptr + o_j, mask=m_j, other=0).to(tl.int64)
            r_j = tl.load(acts_ptr + o_j, mask=m_j, other=0.0)
            sqnorm_j = tl.load(sqnorm_ptr + image_j, mask=m_j, other=0.0)
            inner = _inner_tile(emb_ptr, image_i, image_j, m_i, m_j, d_emb, BLOCK_N, BLOCK_E, PRECISION)
            s = _similarity_tile(inner, sqnorm_i, sqnorm_j, gamma, SIMILARITY)
            later = o_i[:, None] < o_j[None, :]
            weighted = tl.sum(tl.where(later, s * r_j.to(tl.float32)[None, :], 0.0), axis=1)
            num += tl.sum(weighted.to(tl.float64) * r_i.to(tl.float64), axis=0)
        tl.store(num_parts_ptr + program, num)


@triton.jit
def gram_finish_kernel(acts_ptr, offsets_ptr, num_parts_ptr, block_offsets_ptr, num_ptr, den_ptr, BLOCK: tl.constexpr):
    """One latent: num from its blocks' parts, in order; den += r_t A, A += r_t by blocks of entries."""
    latent = tl.program_id(0).to(tl.int64)
    last_part = tl.load(block_offsets_ptr + latent + 1)
    b_num = tl.zeros([BLOCK], dtype=tl.float64)
    for p in range(tl.load(block_offsets_ptr + latent), last_part, BLOCK):
        o_p = p + tl.arange(0, BLOCK)
        b_num += tl.load(num_parts_ptr + o_p, mask=o_p < last_part, other=0.0)
    tl.store(num_ptr + latent, tl.sum(b_num, axis=0))

    end = tl.load(offsets_ptr + latent + 1)
    later = tl.arange(0, BLOCK)[:, None] < tl.arange(0, BLOCK)[None, :]
    den = tl.zeros([], dtype=tl.float64)
    total = tl.zeros([], dtype=tl.float64)
    for t in range(tl.load(offsets_ptr + latent), end, BLOCK):
        o_t = t + tl.arange(0, BLOCK)
        b_r = tl.load(acts_ptr + o_t, mask=o_t < end, other=0.0).to(tl.float64)
        block_total = tl.sum(b_r, axis=0)
        den += tl.sum(b_r * tl.sum(tl.where(later, b_r[None, :], 0.0), axis=1), axis=0) + block_total * total
        total += block_total
    tl.store(den_ptr + latent, den)


# --- launch wrappers -------------------------------------------------------------------------------------------------


def dot_precision() -> str:
    """float32 products to about 2^-21: three TF32 products on NVIDIA; AMD has no such mode, float32 itself there."""
    return "ieee" if torch.version.hip else "tf32x3"


class DenseTiles(NamedTuple):
    """Block sizes and pipeline stages of pairwise_num_kernel."""

    n: int
    k: int
    e: int
    stages: int


def dense_tiles() -> DenseTiles:
    """What fits in the shared memory of the current device: 160 KiB on Hopper, 64 elsewhere; of no device, a few."""
    if not torch.cuda.is_available():  # Triton's interpreter
        return DenseTiles(32, 16, 16, 2)
    hopper = not torch.version.hip and torch.cuda.get_device_capability()[0] == 9
    return DenseTiles(128, 128, 64, 2) if hopper else DenseTiles(64, 32, 32, 2)


def halves(x_NC: Tensor, by_row: bool) -> tuple[Tensor, Tensor, Tensor]:
    """x of any floating dtype as (high + low) / scale, two float16, and scale, float64 [N] or [C], powers of two.

    The largest of a row, or of a column, becomes 2^7 to 2^8; high + low is good to 2^-22 of x, or 2^-33 of the largest.
    """
    x_NC = x_NC.contiguous()
    low, high = torch.aminmax(x_NC, dim=int(by_row))
    largest = torch.maximum(-low, high).to(torch.float64)
    exponent = torch.where(largest > 0, 8 - torch.frexp(largest).exponent, 0)
    scale = torch.ldexp(torch.ones_like(largest), exponent)
    halves = torch.empty((2, *x_NC.shape), dtype=torch.float16, device=x_NC.device)
    grid = cdiv(len(x_NC), HALVES_BLOCK[0]), cdiv(x_NC.shape[1], HALVES_BLOCK[1])
    halves_kernel[grid](
        x_NC,
        scale,
        halves[0],
        halves[1],
        *x_NC.shape,
        BY_ROW=by_row,
        BLOCK_N=HALVES_BLOCK[0],
        BLOCK=HALVES_BLOCK[1],
        num_warps=GRAM_WARPS,
    )
    return halves[0], halves[1], scale


def tiles_in_bands(n_blocks: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Pairs of blocks i <= j, so that programs that run together share blocks of either side in the L2 cache."""
    tile_i, tile_j = torch.triu_indices(n_blocks, n_blocks, device=device)
    order = ((tile_i // BAND * n_blocks + tile_j) * BAND + tile_i % BAND).argsort()
    return tile_i[order], tile_j[order]


def launch_pairwise_num(
    r_NK: Tensor,
    emb_NE: Tensor,
    sqnorm_N: Tensor,
    similarity: str,
    gamma: float,
    tiles: DenseTiles | None = None,
    parts_bytes: int = PARTS_BYTES,
) -> Tensor:
    """num_K in float64 of dense activations and of float64 prepared embeddings, as accurate as float32.

    For latents that no image dominates: activations below 2^-11 of a latent's largest lose bits.
    """
    check_similarity(similarity)
    n_images, n_latents = r_NK.shape
    num_K = r_NK.new_zeros(n_latents, dtype=torch.float64)
    if n_images == 0 or n_latents == 0:
        return num_K
    tiles = tiles or dense_tiles()
    r_high, r_low, r_scale_K = halves(r_NK, by_row=False)
    emb_high, emb_low, emb_scale_N = halves(emb_NE, by_row=True)
    unscale_N, sqnorm_N = emb_scale_N.reciprocal().float(), sqnorm_N.float()
    tile_i, tile_j = tiles_in_bands(cdiv(n_images, tiles.n), r_NK.device)
    group = min(len(tile_i), max(1, parts_bytes // (4 * n_latents)))
    parts = r_NK.new_empty(group, n_latents, dtype=torch.float32)
    for first_tile in range(0, len(tile_i), group):
        n_tiles = min(group, len(tile_i) - first_tile)
        pairwise_num_kernel[(n_tiles,)](
            r_high,
            r_low,
            emb_high,
            emb_low,
            unscale_N,
            sqnorm_N,
            tile_i,
            tile_j,
            parts,
            n_images,
            n_latents,
            emb_NE.shape[1],
            first_tile,
            gamma,
            SIMILARITY=similarity,
            BLOCK_N=tiles.n,
            BLOCK_K=tiles.k,
            BLOCK_E=tiles.e,
            num_warps=DENSE_WARPS,
            num_stages=tiles.stages,
        )
        num_K += parts[:n_tiles].sum(0, dtype=torch.float64)
    return num_K / r_scale_K.square()


def launch_gram_sums(
    acts_M: Tensor,
    images_M: Tensor,
    offsets_S1: Tensor,
    emb_NE: Tensor,
    sqnorm_N: Tensor,
    similarity: str,
    gamma: float,
) -> tuple[Tensor, Tensor]:
    """num_S and den_S in float64 of sparse codes grouped by latent; embeddings prepared in float32."""
    _check_launch(emb_NE, sqnorm_N, similarity)
    n_latents, n_entries = len(offsets_S1) - 1, len(acts_M)
    num_S, den_S = (acts_M.new_empty(n_latents, dtype=torch.float64) for _ in range(2))
    if n_latents == 0:
        return num_S, den_S
    acts_M, images_M, offsets_S1 = acts_M.contiguous(), images_M.contiguous(), offsets_S1.contiguous()
    block_offsets_S1 = torch.nn.functional.pad(
        ((offsets_S1.diff() + GRAM_BLOCK_N - 1) // GRAM_BLOCK_N).cumsum(0), (1, 0)
    )
    # A latent of n entries has at most n / GRAM_BLOCK_N + 1 blocks and at most n: as many as there can be.
    n_blocks = n_entries // GRAM_BLOCK_N + min(n_latents, n_entries)
    blocks = torch.arange(n_blocks, device=offsets_S1.device)
    block_latents = torch.searchsorted(block_offsets_S1[1:], blocks, right=True)
    num_parts = num_S.new_empty(n_blocks)
    if n_blocks > 0:
        gram_kernel[(n_blocks,)](
            acts_M,
            images_M,
            offsets_S1,
            emb_NE,
            sqnorm_N,
            block_latents,
            block_offsets_S1,
            num_parts,
            n_latents,
            emb_NE.shape[1],
            gamma,
            SIMILARITY=similarity,
            BLOCK_N=GRAM_BLOCK_N,
            BLOCK_E=GRAM_BLOCK_E,
            PRECISION=dot_precision(),
            num_warps=GRAM_WARPS,
            num_stages=NUM_STAGES,
        )
    gram_finish_kernel[(n_latents,)](
        acts_M, offsets_S1, num_parts, block_offsets_S1, num_S, den_S, BLOCK=FINISH_BLOCK, num_warps=GRAM_WARPS
    )
    return num_S, den_S


def _check_launch(emb_NE: Tensor, sqnorm_N: Tensor, similarity: str) -> None:
    if emb_NE.dtype != torch.float32 or not emb_NE.is_contiguous() or sqnorm_N.dtype != torch.float32:
        raise ValueError(f"emb_NE, sqnorm_N: {emb_NE.dtype} and {sqnorm_N.dtype} are not contiguous float32")
    check_similarity(similarity)
