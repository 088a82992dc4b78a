"""Triton kernels of streamed_cosine.py: the running form num += a_t <u_t, S>, S += a_t u_t, with S in registers.

u_t = scale_t e_t is made there too: embeddings are read as they came, in half the bytes of float64 or fewer.

The inner product is a sum over columns, so columns need not meet before the end: a program owns BLOCK_E of them and one
latent, carries S and the products a_t u_t S column by column, and reduces once. Any E runs with one configuration; the
column blocks' parts of num are added afterwards in a fixed order.

A latent with more than HEAVY entries in the chunk is split into pieces of HEAVY entries that start from S = 0; a second
kernel merges them into the state. Pieces number at most 2 M / HEAVY, so nothing has to be asked of the device.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import cdiv, check

BLOCK_E = 256
HEAVY = 256
UNROLL = 4
NUM_WARPS = 2


@triton.jit
def _run_entries(
    acts_ptr,
    images_ptr,
    emb_ptr,
    scale_ptr,
    begin,
    end,
    d_emb,
    o_e,
    b_sum,
    total,
    den,
    half,
    HALVED: tl.constexpr,
    BLOCK_E: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """Entries begin to end, one by one, onto the running (S, A, den); b_num is this run's num, column by column.

    HALVED: only those of images whose number is even (half 0) or odd (1).
    """
    b_num = tl.zeros([BLOCK_E], dtype=tl.float64)
    for t in range(begin, end, UNROLL):
        for i in tl.static_range(UNROLL):
            inside = t + i < end
            image = tl.load(images_ptr + t + i, mask=inside, other=0).to(tl.int64)
            if HALVED:
                inside = inside & ((image & 1) == half)
            act = tl.load(acts_ptr + t + i, mask=inside, other=0.0).to(tl.float64)
            width = tl.where(inside, d_emb, 0)
            weight = act * tl.load(scale_ptr + image, mask=inside, other=0.0)
            b_emb = tl.load(emb_ptr + image * d_emb + o_e, mask=o_e < width, other=0.0).to(tl.float64)
            b_term = weight * b_emb
            b_num += b_term * b_sum
            b_sum += b_term
            den += act * total
            total += act
    return b_sum, b_num, total, den


@triton.jit(do_not_specialize=["n_pieces", "half"])
def streamed_update_kernel(
    sums_ptr,
    den_ptr,
    total_ptr,
    num_parts_ptr,
    piece_sums_ptr,
    piece_den_ptr,
    piece_total_ptr,
    piece_num_parts_ptr,
    acts_ptr,
    images_ptr,
    offsets_ptr,
    emb_ptr,
    scale_ptr,
    piece_latents_ptr,
    piece_offsets_ptr,
    n_latents,
    n_pieces,
    d_emb,
    half,
    HEAVY: tl.constexpr,
    HALVED: tl.constexpr,
    BLOCK_E: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """Programs below n_latents fold a light latent into its state; the others reduce one piece of a heavy latent."""
    program = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1).to(tl.int64)
    o_e = block * BLOCK_E + tl.arange(0, BLOCK_E)
    m_e = o_e < d_emb
    # A and den do not depend on the columns: the first column block keeps them.
    keeps_scalars = block == 0
    if program < n_latents:
        begin, end = tl.load(offsets_ptr + program), tl.load(offsets_ptr + program + 1)
        if begin == end:
            tl.store(num_parts_ptr + block * n_latents + program, 0.0)
        elif end - begin <= HEAVY:
            b_sum = tl.load(sums_ptr + program * d_emb + o_e, mask=m_e, other=0.0)
            total = tl.load(total_ptr + program, mask=keeps_scalars, other=0.0)
            den = tl.load(den_ptr + program, mask=keeps_scalars, other=0.0)
            b_sum, b_num, total, den = _run_entries(
                acts_ptr,
                images_ptr,
                emb_ptr,
                scale_ptr,
                begin,
                end,
                d_emb,
                o_e,
                b_sum,
                total,
                den,
                half,
                HALVED,
                BLOCK_E,
                UNROLL,
            )
            tl.store(sums_ptr + program * d_emb + o_e, b_sum, mask=m_e)
            tl.store(num_parts_ptr + block * n_latents + program, tl.sum(b_num, axis=0))
            tl.store(total_ptr + program, total, mask=keeps_scalars)
            tl.store(den_ptr + program, den, mask=keeps_scalars)
    else:
        piece = program - n_latents
        latent = tl.load(piece_latents_ptr + piece)
        if latent < n_latents:
            begin = tl.load(offsets_ptr + latent) + (piece - tl.load(piece_offsets_ptr + latent)) * HEAVY
            end = tl.minimum(begin + HEAVY, tl.load(offsets_ptr + latent + 1))
            b_sum = tl.zeros([BLOCK_E], dtype=tl.float64)
            total, den = tl.zeros([], dtype=tl.float64), tl.zeros([], dtype=tl.float64)
            b_sum, b_num, total, den = _run_entries(
                acts_ptr,
                images_ptr,
                emb_ptr,
                scale_ptr,
                begin,
                end,
                d_emb,
                o_e,
                b_sum,
                total,
                den,
                half,
                HALVED,
                BLOCK_E,
                UNROLL,
            )
            tl.store(piece_sums_ptr + piece * d_emb + o_e, b_sum, mask=m_e)
            tl.store(piece_num_parts_ptr + block * n_pieces + piece, tl.sum(b_num, axis=0))
            tl.store(piece_total_ptr + piece, total, mask=keeps_scalars)
            tl.store(piece_den_ptr + piece, den, mask=keeps_scalars)


@triton.jit(do_not_specialize=["n_pieces"])
def merge_pieces_kernel(
    sums_ptr,
    den_ptr,
    total_ptr,
    num_parts_ptr,
    piece_sums_ptr,
    piece_den_ptr,
    piece_total_ptr,
    piece_num_parts_ptr,
    piece_latents_ptr,
    piece_offsets_ptr,
    n_latents,
    n_pieces,
    d_emb,
    BLOCK_E: tl.constexpr,
):
    """The program of a heavy latent's first piece merges them all into its state, in order; the others have nothing."""
    first = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1).to(tl.int64)
    latent = tl.load(piece_latents_ptr + first)
    last = first
    if (latent < n_latents) & (tl.load(piece_offsets_ptr + latent) == first):
        last = tl.load(piece_offsets_ptr + latent + 1)
    if first < last:
        o_e = block * BLOCK_E + tl.arange(0, BLOCK_E)
        m_e = o_e < d_emb
        keeps_scalars = block == 0
        b_sum = tl.load(sums_ptr + latent * d_emb + o_e, mask=m_e, other=0.0)
        total = tl.load(total_ptr + latent, mask=keeps_scalars, other=0.0)
        den = tl.load(den_ptr + latent, mask=keeps_scalars, other=0.0)
        b_num = tl.zeros([BLOCK_E], dtype=tl.float64)
        num = tl.zeros([], dtype=tl.float64)
        for piece in range(first, last):
            b_piece = tl.load(piece_sums_ptr + piece * d_emb + o_e, mask=m_e, other=0.0)
            piece_total = tl.load(piece_total_ptr + piece, mask=keeps_scalars, other=0.0)
            num += tl.load(piece_num_parts_ptr + block * n_pieces + piece)
            den += tl.load(piece_den_ptr + piece, mask=keeps_scalars, other=0.0) + piece_total * total
            b_num += b_piece * b_sum
            b_sum += b_piece
            total += piece_total
        tl.store(sums_ptr + latent * d_emb + o_e, b_sum, mask=m_e)
        tl.store(num_parts_ptr + block * n_latents + latent, num + tl.sum(b_num, axis=0))
        tl.store(total_ptr + latent, total, mask=keeps_scalars)
        tl.store(den_ptr + latent, den, mask=keeps_scalars)


# --- launch wrappers -------------------------------------------------------------------------------------------------


def piece_table(offsets_S1: Tensor, n_entries: int, heavy: int) -> tuple[Tensor, Tensor]:
    """Pieces of at most `heavy` entries of the latents with more than that: each one's latent, each latent's first.

    The table holds 2 M / heavy pieces, the most there can be; those that do not exist belong to latent S.
    """
    lengths_S = offsets_S1.diff()
    pieces_S = torch.where(lengths_S > heavy, (lengths_S + heavy - 1) // heavy, 0)
    piece_offsets_S1 = torch.nn.functional.pad(pieces_S.cumsum(0), (1, 0))
    pieces = torch.arange(2 * n_entries // heavy, device=offsets_S1.device)
    return torch.searchsorted(piece_offsets_S1[1:], pieces, right=True), piece_offsets_S1


def launch_streamed_update(
    sums_SE: Tensor,
    num_S: Tensor,
    den_S: Tensor,
    total_S: Tensor,
    acts_M: Tensor,
    images_M: Tensor,
    offsets_S1: Tensor,
    emb_NE: Tensor,
    scale_N: Tensor,
    half: int = -1,
    heavy: int = HEAVY,
    block_e: int = BLOCK_E,
) -> None:
    """Folds a chunk into the float64 state, in place; shapes and half as in streamed_cosine.streamed_cosine_update."""
    n_latents, d_emb = sums_SE.shape
    fits = all(t.is_contiguous() and t.dtype == torch.float64 for t in (sums_SE, num_S, den_S, total_S))
    check(fits, "state: sums_SE, num_S, den_S and total_S must be contiguous float64")
    if n_latents == 0:
        return
    acts_M, images_M, offsets_S1 = acts_M.contiguous(), images_M.contiguous(), offsets_S1.contiguous()
    emb_NE, scale_N = emb_NE.contiguous(), scale_N.contiguous()
    piece_latents, piece_offsets_S1 = piece_table(offsets_S1, len(acts_M), heavy)
    n_pieces, n_blocks = len(piece_latents), max(1, cdiv(d_emb, block_e))
    num_parts = sums_SE.new_empty(n_blocks, n_latents)
    piece_sums, piece_num_parts = sums_SE.new_empty(n_pieces, d_emb), sums_SE.new_empty(n_blocks, n_pieces)
    piece_den, piece_total = sums_SE.new_empty(n_pieces), sums_SE.new_empty(n_pieces)
    state = sums_SE, den_S, total_S, num_parts
    pieces = piece_sums, piece_den, piece_total, piece_num_parts
    codes = acts_M, images_M, offsets_S1, emb_NE, scale_N, piece_latents, piece_offsets_S1
    sizes = n_latents, n_pieces, d_emb
    streamed_update_kernel[(n_latents + n_pieces, n_blocks)](
        *state,
        *pieces,
        *codes,
        *sizes,
        half,
        HEAVY=heavy,
        HALVED=half >= 0,
        BLOCK_E=block_e,
        UNROLL=UNROLL,
        num_warps=NUM_WARPS,
    )
    if n_pieces > 0:
        merge_pieces_kernel[(n_pieces, n_blocks)](
            *state, *pieces, piece_latents, piece_offsets_S1, *sizes, BLOCK_E=block_e, num_warps=NUM_WARPS
        )
    num_S += num_parts.sum(0)
