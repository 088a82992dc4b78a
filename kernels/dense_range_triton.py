"""The range of raw neurons on a GPU, in parts, which dense_prepared_triton.py puts together in a launch of its own.

Of every neuron the least and the greatest activation, how many images lie at the least and how many above 0; and of the
chunk how much is not finite, and the least |e|^2, of which the same launch makes those that are not there yet.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import cdiv
from .scaled_rows_triton import squared_norms_of

PARTS = 128  # of a chunk at most; the kernels that put them together hold all at once
LEAST_ROWS = 32
RANGE_BLOCK_K = 128
RANGE_UNROLL = 8
MERGE_BLOCK_K = 8
MERGE_ROWS = 256
RANGE_WARPS = 2
NORM_ROWS = 4
NORM_BLOCK_E = 128


@triton.jit
def _range_part(acts_ptr, parts_ptr, part, o_k, n_images, n_neurons, rows, BLOCK_K: tl.constexpr, UNROLL: tl.constexpr):
    """parts[part] = least, greatest, how many are the least, how many > 0, how many not finite, of `rows` images."""
    b_low = tl.full([BLOCK_K], float("inf"), dtype=tl.float64)
    b_high = tl.full([BLOCK_K], float("-inf"), dtype=tl.float64)
    b_at_low = tl.zeros([BLOCK_K], dtype=tl.int32)
    b_active = tl.zeros([BLOCK_K], dtype=tl.int32)
    b_bad = tl.zeros([BLOCK_K], dtype=tl.int32)
    end = tl.minimum((part + 1) * rows, n_images)
    for first in range(part * rows, end, UNROLL):
        for i in tl.static_range(UNROLL):
            row = first + i
            m_k = o_k < tl.where(row < end, n_neurons, 0)
            b_act = tl.load(acts_ptr + row * n_neurons + o_k, mask=m_k, other=0.0).to(tl.float64)
            b_at_low = tl.where(m_k & (b_act < b_low), 0, b_at_low)
            b_low = tl.where(m_k & (b_act < b_low), b_act, b_low)
            b_high = tl.where(m_k & (b_act > b_high), b_act, b_high)
            b_at_low += (m_k & (b_act == b_low)).to(tl.int32)
            b_active += (b_act > 0).to(tl.int32)
            b_bad += ((tl.abs(b_act) < float("inf")) == 0).to(tl.int32)  # NaN too
    pointers = parts_ptr + part * 5 * n_neurons + o_k
    m_k = o_k < n_neurons
    tl.store(pointers, b_low, mask=m_k)
    tl.store(pointers + n_neurons, b_high, mask=m_k)
    tl.store(pointers + 2 * n_neurons, b_at_low.to(tl.float64), mask=m_k)
    tl.store(pointers + 3 * n_neurons, b_active.to(tl.float64), mask=m_k)
    tl.store(pointers + 4 * n_neurons, b_bad.to(tl.float64), mask=m_k)


@triton.jit(do_not_specialize=["n_images", "n_parts", "rows"])
def range_kernel(
    acts_ptr,
    parts_ptr,
    emb_ptr,
    sqnorm_ptr,
    n_images,
    n_parts,
    rows,
    n_neurons,
    d_emb,
    BLOCK_K: tl.constexpr,
    UNROLL: tl.constexpr,
    NORM_ROWS: tl.constexpr,
    NORM_BLOCK_E: tl.constexpr,
):
    """The first programs are those of ranges, part by part; then those of |e|^2, if any are launched."""
    program = tl.program_id(0)
    n_ranges = n_parts * tl.cdiv(n_neurons, BLOCK_K)
    if program < n_ranges:
        part = (program % n_parts).to(tl.int64)
        o_k = program // n_parts * BLOCK_K + tl.arange(0, BLOCK_K)
        _range_part(acts_ptr, parts_ptr, part, o_k, n_images, n_neurons, rows, BLOCK_K, UNROLL)
    else:
        group = (program - n_ranges).to(tl.int64)
        squared_norms_of(emb_ptr, sqnorm_ptr, group, n_images, d_emb, NORM_ROWS, NORM_BLOCK_E)


@triton.jit
def merge_range(
    parts_ptr,
    sqnorm_ptr,
    low_ptr,
    high_ptr,
    active_ptr,
    at_low_ptr,
    new_reals_ptr,
    new_counts_ptr,
    faults_ptr,
    program,
    programs,
    n_parts,
    n_images,
    n_before,
    n_neurons,
    PARTS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ROWS: tl.constexpr,
):
    """new_reals = low, high and by how much low fell; new_counts = above 0, at low: of n_before images and these.

    faults[program] = of its share of the images the least |e|^2 and how many are not finite; how many of its
    activations are not.
    """
    o_p = tl.arange(0, PARTS)
    o_k = program * BLOCK_K + tl.arange(0, BLOCK_K)
    m_k = o_k < n_neurons
    mask = (o_p < n_parts)[:, None] & m_k[None, :]
    pointers = parts_ptr + o_p.to(tl.int64)[:, None] * (5 * n_neurons) + o_k[None, :]
    b_low = tl.load(pointers, mask=mask, other=float("inf"))
    low = tl.where(m_k, tl.min(b_low, axis=0), 0.0)
    high = tl.max(tl.load(pointers + n_neurons, mask=mask, other=float("-inf")), axis=0)
    b_at_low = tl.load(pointers + 2 * n_neurons, mask=mask, other=0.0)
    at_low = tl.sum(tl.where(b_low == low[None, :], b_at_low, 0.0), axis=0).to(tl.int64)
    active = tl.sum(tl.load(pointers + 3 * n_neurons, mask=mask, other=0.0), axis=0).to(tl.int64)
    bad = tl.sum(tl.load(pointers + 4 * n_neurons, mask=mask, other=0.0), axis=0)

    m_before = m_k & (n_before > 0)
    low_before = tl.load(low_ptr + o_k, mask=m_before, other=0.0)
    high_before = tl.load(high_ptr + o_k, mask=m_before, other=float("-inf"))
    active_before = tl.load(active_ptr + o_k, mask=m_before, other=0)
    at_low_before = tl.load(at_low_ptr + o_k, mask=m_before, other=0)
    low_before = tl.where(n_before > 0, low_before, low)
    high = tl.maximum(high, high_before)
    new_low = tl.minimum(low, low_before)
    at_low = tl.where(low <= low_before, at_low, 0) + tl.where(low_before <= low, at_low_before, 0)
    tl.store(new_reals_ptr + o_k, new_low, mask=m_k)
    tl.store(new_reals_ptr + n_neurons + o_k, high, mask=m_k)
    tl.store(new_reals_ptr + 2 * n_neurons + o_k, low_before - new_low, mask=m_k)
    tl.store(new_counts_ptr + o_k, active_before + active, mask=m_k)
    tl.store(new_counts_ptr + n_neurons + o_k, at_low, mask=m_k)

    b_least = tl.full([ROWS], float("inf"), dtype=tl.float64)
    b_unfit = tl.zeros([ROWS], dtype=tl.float64)
    for n in range(program * ROWS, n_images, programs * ROWS):
        o_n = n + tl.arange(0, ROWS)
        b_square = tl.load(sqnorm_ptr + o_n, mask=o_n < n_images, other=1.0)
        b_least = tl.minimum(b_least, tl.where(o_n < n_images, b_square, float("inf")))
        b_unfit += tl.where(b_square < float("inf"), 0.0, 1.0)
    faults = faults_ptr + program * 3
    tl.store(faults, tl.min(b_least, axis=0))
    tl.store(faults + 1, tl.sum(b_unfit, axis=0))
    tl.store(faults + 2, tl.sum(tl.where(m_k, bad, 0.0), axis=0))


@triton.jit
def least_of(parts_ptr, low_ptr, o_k, m_k, n_parts, n_before, n_neurons, BLOCK_K: tl.constexpr, UNROLL: tl.constexpr):
    """The least of the neurons o_k in all images so far, as merge_range has it."""
    b_low = tl.load(low_ptr + o_k, mask=m_k & (n_before > 0), other=float("inf"))
    for first in range(0, n_parts, UNROLL):
        for i in tl.static_range(UNROLL):
            part = first + i
            inside = m_k & (part < n_parts)
            b_part = tl.load(parts_ptr + part * (5 * n_neurons) + o_k, mask=inside, other=float("inf"))
            b_low = tl.minimum(b_low, b_part)
    return b_low


# --- launch wrapper --------------------------------------------------------------------------------------------------


class Chunk(NamedTuple):
    """Activations [n, K], embeddings [n, E] and |e|^2 [n] of a chunk, and its range in parts."""

    acts_nK: Tensor
    emb_nE: Tensor
    sqnorm_n: Tensor
    range_parts: Tensor


class NewRange(NamedTuple):
    """Of all images so far: low, high and the fall of low, float64 [3, K]; above 0 and at low, int64 [2, K]."""

    reals_3K: Tensor
    counts_2K: Tensor


def parts_of(n_images: int, most: int, least_rows: int) -> tuple[int, int]:
    """Images of a part, at least so many, and how many parts, at most so many."""
    rows = max(least_rows, cdiv(n_images, most))
    return rows, cdiv(n_images, rows)


def n_fault_rows(n_neurons: int) -> int:
    """Rows of launch_prepared's faults: the programs that merge ranges."""
    return max(1, cdiv(n_neurons, MERGE_BLOCK_K))


def launch_range(acts_nK: Tensor, emb_nE: Tensor, sqnorm_n: Tensor | None = None) -> Chunk:
    """Of n >= 1 images. sqnorm_n: |e|^2 of the embeddings, if somebody has them."""
    acts_nK, emb_nE = acts_nK.contiguous(), emb_nE.contiguous()
    (n_images, n_neurons), d_emb = acts_nK.shape, emb_nE.shape[1]
    rows, n_parts = parts_of(n_images, PARTS, LEAST_ROWS)
    n_norms = cdiv(n_images, NORM_ROWS) if sqnorm_n is None else 0
    parts = torch.empty(n_parts, 5, n_neurons, dtype=torch.float64, device=acts_nK.device)
    sqnorm_n = parts.new_empty(n_images) if sqnorm_n is None else sqnorm_n
    programs = n_parts * cdiv(n_neurons, RANGE_BLOCK_K) + n_norms
    if programs > 0:
        range_kernel[(programs,)](
            acts_nK,
            parts,
            emb_nE,
            sqnorm_n,
            n_images,
            n_parts,
            rows,
            n_neurons,
            d_emb,
            BLOCK_K=RANGE_BLOCK_K,
            UNROLL=RANGE_UNROLL,
            NORM_ROWS=NORM_ROWS,
            NORM_BLOCK_E=NORM_BLOCK_E,
            num_warps=RANGE_WARPS,
        )
    return Chunk(acts_nK, emb_nE, sqnorm_n, parts)
