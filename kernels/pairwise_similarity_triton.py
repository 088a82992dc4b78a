"""Triton kernels of pairwise_similarity.py: similarities are made tile by tile in registers and never written.

Dense: one program per pair of image blocks (i-block <= j-block) makes its tile s [BLOCK_N, BLOCK_N] once, then walks
the latents: part_k = sum_i r_ik (s @ r_j)_ik. Parts go to a buffer of at most PARTS_BYTES, added to num in
float64 before the next group of tiles: no atomics, a fixed order, bounded memory.

Gram: one program per block of BLOCK_N entries of one latent walks that latent's later blocks; a second kernel adds a
latent's blocks in order and makes den in float64. Embeddings arrive prepared (float32, normalised for cosine,
centred for rbf).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import check_similarity

BLOCK_N = 64
BLOCK_K = 32
BLOCK_E = 16
DENSE_WARPS = 8
GRAM_WARPS = 4
NUM_STAGES = 2
PARTS_BYTES = 256 << 20
FINISH_BLOCK = 32


@triton.jit
def _similarity_tile(inner, sqnorm_i, sqnorm_j, gamma, SIMILARITY: tl.constexpr):
    """_rbf_tile of pairwise_similarity.py; cosine and dot are the inner product of prepared embeddings."""
    if SIMILARITY == "rbf":
        return tl.exp(-gamma * tl.maximum(sqnorm_i[:, None] + sqnorm_j[None, :] - 2.0 * inner, 0.0))
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
def pairwise_num_kernel(
    r_ptr,
    emb_ptr,
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
    PRECISION: tl.constexpr,
):
    """parts[program, k] = sum over i < j in the tile of r_ik s_ij r_jk."""
    program = tl.program_id(0).to(tl.int64)
    o_i = tl.load(tile_i_ptr + first_tile + program) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_j = tl.load(tile_j_ptr + first_tile + program) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_i, m_j = o_i < n_images, o_j < n_images
    inner = _inner_tile(emb_ptr, o_i, o_j, m_i, m_j, d_emb, BLOCK_N, BLOCK_E, PRECISION)
    sqnorm_i = tl.load(sqnorm_ptr + o_i, mask=m_i, other=0.0)
    sqnorm_j = tl.load(sqnorm_ptr + o_j, mask=m_j, other=0.0)
    s = _similarity_tile(inner, sqnorm_i, sqnorm_j, gamma, SIMILARITY)
    s = tl.where(o_i[:, None] < o_j[None, :], s, 0.0)
    for k in range(0, n_latents, BLOCK_K):
        o_k = k + tl.arange(0, BLOCK_K)
        m_k = o_k < n_latents
        b_r_j = tl.load(r_ptr + o_j[:, None] * n_latents + o_k[None, :], mask=m_j[:, None] & m_k[None, :], other=0.0)
        weighted = tl.dot(s, b_r_j.to(tl.float32), input_precision=PRECISION)
        b_r_i = tl.load(r_ptr + o_i[:, None] * n_latents + o_k[None, :], mask=m_i[:, None] & m_k[None, :], other=0.0)
        tl.store(parts_ptr + program * n_latents + o_k, tl.sum(b_r_i.to(tl.float32) * weighted, axis=0), mask=m_k)


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


def launch_pairwise_num(
    r_NK: Tensor, emb_NE: Tensor, sqnorm_N: Tensor, similarity: str, gamma: float, parts_bytes: int = PARTS_BYTES
) -> Tensor:
    """num_K in float64 of dense activations; embeddings from pairwise_similarity.prepare_embeddings in float32."""
    _check_launch(emb_NE, sqnorm_N, similarity)
    n_images, n_latents = r_NK.shape
    num_K = r_NK.new_zeros(n_latents, dtype=torch.float64)
    if n_images == 0 or n_latents == 0:
        return num_K
    r_NK = r_NK.contiguous()
    n_blocks = triton.cdiv(n_images, BLOCK_N)
    tile_i, tile_j = torch.triu_indices(n_blocks, n_blocks, device=r_NK.device).contiguous()
    group = min(len(tile_i), max(1, parts_bytes // (4 * n_latents)))
    parts = r_NK.new_empty(group, n_latents, dtype=torch.float32)
    for first_tile in range(0, len(tile_i), group):
        n_tiles = min(group, len(tile_i) - first_tile)
        pairwise_num_kernel[(n_tiles,)](
            r_NK,
            emb_NE,
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
            BLOCK_N=BLOCK_N,
            BLOCK_K=BLOCK_K,
            BLOCK_E=BLOCK_E,
            PRECISION=dot_precision(),
            num_warps=DENSE_WARPS,
            num_stages=NUM_STAGES,
        )
        num_K += parts[:n_tiles].sum(0, dtype=torch.float64)
    return num_K


def launch_gram_sums(
    acts_M: Tensor,
    images_M: Tensor,
    offsets_S1: Tensor,
    emb_NE: Tensor,
    sqnorm_N: Tensor,
    similarity: str,
    gamma: float,
) -> tuple[Tensor, Tensor]:
    """num_S and den_S in float64 of sparse codes grouped by latent; embeddings prepared as for launch_pairwise_num."""
    _check_launch(emb_NE, sqnorm_N, similarity)
    n_latents, n_entries = len(offsets_S1) - 1, len(acts_M)
    num_S, den_S = (acts_M.new_empty(n_latents, dtype=torch.float64) for _ in range(2))
    if n_latents == 0:
        return num_S, den_S
    acts_M, images_M, offsets_S1 = acts_M.contiguous(), images_M.contiguous(), offsets_S1.contiguous()
    block_offsets_S1 = torch.nn.functional.pad(((offsets_S1.diff() + BLOCK_N - 1) // BLOCK_N).cumsum(0), (1, 0))
    # A latent of n entries has at most n / BLOCK_N + 1 blocks and at most n: as many as there can be.
    n_blocks = n_entries // BLOCK_N + min(n_latents, n_entries)
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
            BLOCK_N=BLOCK_N,
            BLOCK_E=BLOCK_E,
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
