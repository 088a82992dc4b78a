"""A block of raw neurons' images on a GPU, as the products of the score take it, and its ranges, in one launch.

Programs share three tasks: they put the parts of the chunk's range together (dense_range_triton.py); they make a - low
in float64 and sums of it; or u = e / |e| (cosine) or e in float64 and sums of them. dense_score_triton.py adds these.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import cdiv
from .dense_range_triton import (
    MERGE_BLOCK_K,
    MERGE_ROWS,
    PARTS,
    RANGE_BLOCK_K,
    RANGE_UNROLL,
    RANGE_WARPS,
    Chunk,
    NewRange,
    least_of,
    merge_range,
    n_fault_rows,
    parts_of,
)
from .pairwise_float64_triton import column_sums

UNIT_ROWS = 4
BLOCK_PARTS = 64  # of a block at most, as PARTS of a chunk
BLOCK_LEAST_ROWS = 64


@triton.jit
def _units(
    emb_ptr,
    sqnorm_ptr,
    unit_ptr,
    sums_ptr,
    squares_ptr,
    part,
    block,
    n_images,
    d_emb,
    rows,
    COSINE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """unit = u [n, E]; sums[part] = sum of u, squares[part] = sum of |u|^2, of `rows` images, in a block of columns."""
    o_e = block * BLOCK_E + tl.arange(0, BLOCK_E)
    b_sum = tl.zeros([BLOCK_N, BLOCK_E], dtype=tl.float64)
    b_squares = tl.zeros([BLOCK_N], dtype=tl.float64)
    end = tl.minimum((part + 1) * rows, n_images)
    for n in range(part * rows, end, BLOCK_N):
        o_n = n + tl.arange(0, BLOCK_N)
        m_n = o_n < end
        mask = m_n[:, None] & (o_e < d_emb)[None, :]
        offsets = o_n[:, None] * d_emb + o_e[None, :]
        b_unit = tl.load(emb_ptr + offsets, mask=mask, other=0.0).to(tl.float64)
        square = tl.load(sqnorm_ptr + o_n, mask=m_n, other=0.0)
        if COSINE:
            scale = 1.0 / tl.sqrt(tl.where(square > 0, square, 1.0))
            b_unit *= scale[:, None]
            square = tl.where(square > 0, 1.0, 0.0)
        tl.store(unit_ptr + offsets, b_unit, mask=mask)
        b_sum += b_unit
        b_squares += square
    tl.store(sums_ptr + part * d_emb + o_e, tl.sum(b_sum, axis=0), mask=o_e < d_emb)
    if block == 0:
        tl.store(squares_ptr + part, tl.sum(b_squares, axis=0))


@triton.jit(
    do_not_specialize=["n_range_parts", "n_images", "n_before", "n_merging", "n_block", "n_parts", "rows"],
)
def prepared_kernel(
    range_parts_ptr,
    all_sqnorm_ptr,
    low_ptr,
    high_ptr,
    active_ptr,
    at_low_ptr,
    new_reals_ptr,
    new_counts_ptr,
    faults_ptr,
    acts_ptr,
    emb_ptr,
    sqnorm_ptr,
    wide_ptr,
    column_parts_ptr,
    unit_ptr,
    unit_sums_ptr,
    squares_ptr,
    n_range_parts,
    n_images,
    n_before,
    n_merging,
    n_block,
    n_parts,
    rows,
    n_neurons,
    d_emb,
    COSINE: tl.constexpr,
    PARTS: tl.constexpr,
    MERGE_BLOCK_K: tl.constexpr,
    MERGE_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    UNROLL: tl.constexpr,
    UNIT_ROWS: tl.constexpr,
):
    """The first n_merging programs merge ranges; then those of column sums, part by part; then those of units."""
    program = tl.program_id(0)
    task = program - n_merging
    n_columns = n_parts * tl.cdiv(n_neurons, BLOCK)
    if task < 0:
        merge_range(
            range_parts_ptr,
            all_sqnorm_ptr,
            low_ptr,
            high_ptr,
            active_ptr,
            at_low_ptr,
            new_reals_ptr,
            new_counts_ptr,
            faults_ptr,
            program,
            n_merging,
            n_range_parts,
            n_images,
            n_before,
            n_neurons,
            PARTS,
            MERGE_BLOCK_K,
            MERGE_ROWS,
        )
    elif task < n_columns:
        part = (task % n_parts).to(tl.int64)
        o_k = task // n_parts * BLOCK + tl.arange(0, BLOCK)
        b_low = least_of(
            range_parts_ptr, low_ptr, o_k, o_k < n_neurons, n_range_parts, n_before, n_neurons, BLOCK, UNROLL
        )
        column_sums(
            acts_ptr,
            wide_ptr,
            sqnorm_ptr,
            column_parts_ptr,
            part,
            o_k,
            b_low,
            n_block,
            n_neurons,
            rows,
            COSINE,
            True,
            True,
            BLOCK,
            UNROLL,
        )
    else:
        task -= n_columns
        part = (task % n_parts).to(tl.int64)
        _units(
            emb_ptr,
            sqnorm_ptr,
            unit_ptr,
            unit_sums_ptr,
            squares_ptr,
            part,
            task // n_parts,
            n_block,
            d_emb,
            rows,
            COSINE,
            UNIT_ROWS,
            BLOCK,
        )


# --- launch wrapper --------------------------------------------------------------------------------------------------


class Block(NamedTuple):
    """Of b images of a chunk: a - low [b, K] and u [b, E], float64, and sums over P parts of the images."""

    wide_bK: Tensor
    unit_bE: Tensor
    column_parts: Tensor
    unit_sums_PE: Tensor
    squares_P: Tensor


def launch_prepared(
    chunk: Chunk,
    before: tuple[Tensor, Tensor, Tensor, Tensor] | None,
    n_before: int,
    faults: Tensor,
    rows: slice | None,
    cosine: bool,
    merging: bool,
) -> tuple[NewRange, Block]:
    """The range of n_before images and of the chunk, and faults, if merging; and a block of the chunk.

    before: low, high, above 0 and at low of the images before, unless there are none. faults: float64, of which the
    first 3 R are written, rows of three that are to be put together: least |e|^2, |e|^2 not finite, activations not
    finite. rows: of the block; None: of no images. A zero embedding stays zero.
    """
    (n_images, n_neurons), d_emb = chunk.acts_nK.shape, chunk.emb_nE.shape[1]
    acts_bK, emb_bE, sqnorm_b = chunk.acts_nK, chunk.emb_nE, chunk.sqnorm_n
    if rows != slice(0, n_images, 1):
        rows = slice(0, 0) if rows is None else rows
        acts_bK, emb_bE, sqnorm_b = (t[rows].contiguous() for t in (acts_bK, emb_bE, sqnorm_b))
    n_block = len(sqnorm_b)
    rows_of_part, n_parts = parts_of(n_block, BLOCK_PARTS, BLOCK_LEAST_ROWS)
    new = chunk.sqnorm_n.new_empty
    found = NewRange(new(3, n_neurons), torch.empty(2, n_neurons, dtype=torch.int64, device=sqnorm_b.device))
    block = Block(
        new(n_block, n_neurons), new(n_block, d_emb), new(n_parts, 5, n_neurons), new(n_parts, d_emb), new(n_parts)
    )
    none = found.reals_3K, found.reals_3K, found.counts_2K, found.counts_2K  # not read
    n_merging = n_fault_rows(n_neurons) if merging else 0
    blocks = cdiv(n_neurons, RANGE_BLOCK_K) + max(1, cdiv(d_emb, RANGE_BLOCK_K))
    prepared_kernel[(n_merging + n_parts * blocks,)](
        chunk.range_parts,
        chunk.sqnorm_n,
        *(none if before is None else before),
        *found,
        faults,
        acts_bK,
        emb_bE,
        sqnorm_b,
        block.wide_bK,
        block.column_parts,
        block.unit_bE,
        block.unit_sums_PE,
        block.squares_P,
        len(chunk.range_parts),
        n_images,
        n_before,
        n_merging,
        n_block,
        n_parts,
        rows_of_part,
        n_neurons,
        d_emb,
        COSINE=cosine,
        PARTS=PARTS,
        MERGE_BLOCK_K=MERGE_BLOCK_K,
        MERGE_ROWS=MERGE_ROWS,
        BLOCK=RANGE_BLOCK_K,
        UNROLL=RANGE_UNROLL,
        UNIT_ROWS=UNIT_ROWS,
        num_warps=RANGE_WARPS,
    )
    return found, block
