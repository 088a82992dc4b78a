"""Raw neurons' sums of the Monosemanticity Score on a GPU: what is checked, and what is added, in few launches.

Of a chunk of n images (activations a [n, K] of any sign and dtype, embeddings e [n, E], |e|^2 in float64):

    launch_range      low, high, how many at low, how many above 0, in parts
    launch_prepared   these of the chunk and all images before it, and what is wrong; of a block of the chunk's images
                      u = e / |e| (cosine) or e, a - low, both in float64, and sums of them in parts
    (a product:       (a - low)^T u)
    launch_lower      the sums so far become those of activations that are higher by a constant
    launch_add        += the sums of the block by the closed form, and its pairs with the images before it; the same of
                      a neuron that is 1 on every image

Nothing waits for the device: if something is wrong, the last two leave the sums as they are, and
scoring/dense_on_gpu.py reads afterwards what it was. Sums are float64, in a fixed order. The formulas stand in
scoring/monosemanticity.py.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .pairwise_float64_triton import added_columns, column_sums, is_dominated

PARTS = 64  # of a chunk at most; the kernels that put them together hold all at once
LEAST_ROWS = 64
RANGE_BLOCK_K = 256
RANGE_UNROLL = 8
MERGE_BLOCK_K = 32
MERGE_ROWS = 1024
UNIT_ROWS = 8
SUM_BLOCK_K = 8
SUM_BLOCK_E = 128
FAULTS = 64
NUM_WARPS = 4


@triton.jit(do_not_specialize=["n_images", "rows"])
def range_kernel(acts_ptr, parts_ptr, n_images, n_neurons, rows, BLOCK_K: tl.constexpr, UNROLL: tl.constexpr):
    """parts[program] = least, greatest, how many are the least, how many > 0, how many not finite, of `rows` images."""
    part = tl.program_id(0).to(tl.int64)
    o_k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
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


@triton.jit
def _merge_range(
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

    low_before = tl.load(low_ptr + o_k, mask=m_k, other=0.0)
    high_before = tl.load(high_ptr + o_k, mask=m_k, other=0.0)
    active_before = tl.load(active_ptr + o_k, mask=m_k, other=0)
    at_low_before = tl.load(at_low_ptr + o_k, mask=m_k, other=0)
    low_before = tl.where(n_before > 0, low_before, low)
    high = tl.where(n_before > 0, tl.maximum(high, high_before), high)
    at_low_before = tl.where(n_before > 0, at_low_before, 0)
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
def _low_of(parts_ptr, low_ptr, o_k, m_k, n_parts, n_before, n_neurons, BLOCK_K: tl.constexpr, UNROLL: tl.constexpr):
    """The least of the neurons o_k in all images so far, as _merge_range has it."""
    b_low = tl.load(low_ptr + o_k, mask=m_k & (n_before > 0), other=float("inf"))
    for first in range(0, n_parts, UNROLL):
        for i in tl.static_range(UNROLL):
            part = first + i
            inside = m_k & (part < n_parts)
            b_part = tl.load(parts_ptr + part * (5 * n_neurons) + o_k, mask=inside, other=float("inf"))
            b_low = tl.minimum(b_low, b_part)
    return b_low


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
            square *= scale * scale
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
        _merge_range(
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
        b_low = _low_of(
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


@triton.jit
def _sound(faults_ptr, n_faults, COSINE: tl.constexpr, FAULTS: tl.constexpr):
    """Whether nothing is wrong; a zero embedding is, under cosine."""
    b_wrong = tl.zeros([FAULTS], dtype=tl.int32)
    for first in range(0, n_faults, FAULTS):
        o_f = first + tl.arange(0, FAULTS)
        m_f = o_f < n_faults
        if COSINE:
            b_wrong += (tl.load(faults_ptr + 3 * o_f, mask=m_f, other=1.0) == 0).to(tl.int32)
        b_wrong += (tl.load(faults_ptr + 3 * o_f + 1, mask=m_f, other=0.0) > 0).to(tl.int32)
        b_wrong += (tl.load(faults_ptr + 3 * o_f + 2, mask=m_f, other=0.0) > 0).to(tl.int32)
    return tl.sum(b_wrong, axis=0) == 0


@triton.jit(do_not_specialize=["n_images", "n_faults"])
def lower_kernel(
    sums_ptr,
    num_ptr,
    den_ptr,
    total_ptr,
    self_ptr,
    drop_ptr,
    unit_sum_ptr,
    pair_sum_ptr,
    square_sum_ptr,
    faults_ptr,
    n_images,
    n_faults,
    n_neurons,
    d_emb,
    COSINE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_E: tl.constexpr,
    FAULTS: tl.constexpr,
):
    """The sums of n_images become those of activations that are `drop` >= 0 higher, unless something is wrong."""
    o_k = tl.program_id(0).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    m_k = o_k < n_neurons
    drop = tl.load(drop_ptr + o_k, mask=m_k, other=0.0)
    if (tl.max(drop, axis=0) > 0) & _sound(faults_ptr, n_faults, COSINE, FAULTS):
        b_cross = tl.zeros([BLOCK_K, BLOCK_E], dtype=tl.float64)
        for e in range(0, d_emb, BLOCK_E):
            o_e = e + tl.arange(0, BLOCK_E)
            mask = m_k[:, None] & (o_e < d_emb)[None, :]
            unit_sum = tl.load(unit_sum_ptr + o_e, mask=o_e < d_emb, other=0.0)
            pointers = sums_ptr + o_k[:, None] * d_emb + o_e[None, :]
            b_sums = tl.load(pointers, mask=mask, other=0.0)
            b_cross += b_sums * unit_sum[None, :]
            tl.store(pointers, b_sums + drop[:, None] * unit_sum[None, :], mask=mask)
        total = tl.load(total_ptr + o_k, mask=m_k, other=0.0)
        own = tl.load(self_ptr + o_k, mask=m_k, other=0.0)
        num = tl.load(num_ptr + o_k, mask=m_k, other=0.0)
        den = tl.load(den_ptr + o_k, mask=m_k, other=0.0)
        n = n_images.to(tl.float64)
        num += drop * (tl.sum(b_cross, axis=1) - own) + drop * drop * tl.load(pair_sum_ptr)
        den += drop * (n - 1) * total + drop * drop * (n * (n - 1) / 2)
        tl.store(num_ptr + o_k, num, mask=m_k)
        tl.store(den_ptr + o_k, den, mask=m_k)
        tl.store(total_ptr + o_k, total + drop * n, mask=m_k)
        tl.store(self_ptr + o_k, own + drop * tl.load(square_sum_ptr), mask=m_k)


@triton.jit
def _add_images(
    sums_ptr,
    squares_ptr,
    unit_sum_ptr,
    pair_sum_ptr,
    square_sum_ptr,
    n_parts,
    n_images,
    d_emb,
    PARTS: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """unit_sum, square_sum and pair_sum += those of n_images, from the parts of _units."""
    o_p = tl.arange(0, PARTS)
    m_p = o_p < n_parts
    squares = tl.sum(tl.load(squares_ptr + o_p, mask=m_p, other=0.0), axis=0)
    b_own = tl.zeros([BLOCK_E], dtype=tl.float64)
    b_cross = tl.zeros([BLOCK_E], dtype=tl.float64)
    for e in range(0, d_emb, BLOCK_E):
        o_e = e + tl.arange(0, BLOCK_E)
        m_e = o_e < d_emb
        pointers = sums_ptr + o_p.to(tl.int64)[:, None] * d_emb + o_e[None, :]
        chunk = tl.sum(tl.load(pointers, mask=m_p[:, None] & m_e[None, :], other=0.0), axis=0)
        before = tl.load(unit_sum_ptr + o_e, mask=m_e, other=0.0)
        b_own += chunk * chunk
        b_cross += chunk * before
        tl.store(unit_sum_ptr + o_e, before + chunk, mask=m_e)
    within = tl.where(n_images > 1, (tl.sum(b_own, axis=0) - squares) / 2, 0.0)
    tl.store(pair_sum_ptr, tl.load(pair_sum_ptr) + within + tl.sum(b_cross, axis=0))
    tl.store(square_sum_ptr, tl.load(square_sum_ptr) + squares)


@triton.jit(do_not_specialize=["n_parts", "n_images", "n_faults"])
def add_kernel(
    sums_ptr,
    num_ptr,
    den_ptr,
    total_ptr,
    self_ptr,
    unit_sum_ptr,
    pair_sum_ptr,
    square_sum_ptr,
    added_sums_ptr,
    column_parts_ptr,
    unit_sums_ptr,
    squares_ptr,
    faults_ptr,
    dominated_ptr,
    n_parts,
    n_images,
    n_faults,
    n_neurons,
    d_emb,
    COSINE: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_E: tl.constexpr,
    FAULTS: tl.constexpr,
):
    """The first program adds the images, the others their neurons' sums: [K, E], num, den, total and self [K].

    num without the pairs within the block of the neurons that are dominated, which is told. If something is wrong,
    nothing is added.
    """
    program = tl.program_id(0)
    sound = _sound(faults_ptr, n_faults, COSINE, FAULTS)
    if (program == 0) & sound:
        _add_images(
            unit_sums_ptr,
            squares_ptr,
            unit_sum_ptr,
            pair_sum_ptr,
            square_sum_ptr,
            n_parts,
            n_images,
            d_emb,
            PARTS,
            BLOCK_E // 2,
        )
    if program > 0:
        o_k = (program - 1).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
        m_k = o_k < n_neurons
        added_total, added_den, added_self, square, norm = added_columns(
            column_parts_ptr, o_k, n_neurons, n_parts, PARTS
        )
        b_own = tl.zeros([BLOCK_K, BLOCK_E], dtype=tl.float64)
        b_cross = tl.zeros([BLOCK_K, BLOCK_E], dtype=tl.float64)
        for e in range(0, d_emb, BLOCK_E):
            o_e = e + tl.arange(0, BLOCK_E)
            mask = m_k[:, None] & (o_e < d_emb)[None, :]
            offsets = o_k[:, None] * d_emb + o_e[None, :]
            b_sums = tl.load(sums_ptr + offsets, mask=mask, other=0.0)
            b_added = tl.load(added_sums_ptr + offsets, mask=mask, other=0.0)
            b_own += b_added * b_added
            b_cross += b_sums * b_added
            tl.store(sums_ptr + offsets, b_sums + b_added, mask=mask & sound)
        dominated = is_dominated(square, norm)
        within = tl.where(dominated, 0.0, (tl.sum(b_own, axis=1) - square) / 2)
        total = tl.load(total_ptr + o_k, mask=m_k, other=0.0)
        den = tl.load(den_ptr + o_k, mask=m_k, other=0.0)
        own = tl.load(self_ptr + o_k, mask=m_k, other=0.0)
        num = tl.load(num_ptr + o_k, mask=m_k, other=0.0)
        tl.store(dominated_ptr + o_k, dominated, mask=m_k)
        tl.store(num_ptr + o_k, num + (within + tl.sum(b_cross, axis=1)), mask=m_k & sound)
        tl.store(den_ptr + o_k, den + (added_den + added_total * total), mask=m_k & sound)
        tl.store(total_ptr + o_k, total + added_total, mask=m_k & sound)
        tl.store(self_ptr + o_k, own + added_self, mask=m_k & sound)


# --- launch wrappers -------------------------------------------------------------------------------------------------


class Chunk(NamedTuple):
    """Activations [n, K] and |e|^2 [n] of a chunk, and its range in parts."""

    acts_nK: Tensor
    sqnorm_n: Tensor
    range_parts: Tensor


class NewRange(NamedTuple):
    """Of all images so far: low, high and the fall of low, float64 [3, K]; above 0 and at low, int64 [2, K]."""

    reals_3K: Tensor
    counts_2K: Tensor


class Block(NamedTuple):
    """Of b images of a chunk: a - low [b, K] and u [b, E], float64, and sums over P parts of the images."""

    wide_bK: Tensor
    unit_bE: Tensor
    column_parts: Tensor
    unit_sums_PE: Tensor
    squares_P: Tensor


def _parts(n_images: int) -> tuple[int, int]:
    """Images of a part, and how many parts: at most PARTS."""
    rows = max(LEAST_ROWS, triton.cdiv(n_images, PARTS))
    return rows, triton.cdiv(n_images, rows)


def n_fault_rows(n_neurons: int) -> int:
    """Rows of launch_prepared's faults: the programs that merge ranges."""
    return max(1, triton.cdiv(n_neurons, MERGE_BLOCK_K))


def launch_range(acts_nK: Tensor, sqnorm_n: Tensor) -> Chunk:
    """Of n >= 1 images."""
    acts_nK = acts_nK.contiguous()
    n_images, n_neurons = acts_nK.shape
    rows, n_parts = _parts(n_images)
    parts = sqnorm_n.new_empty(n_parts, 5, n_neurons)
    if n_neurons > 0:
        range_kernel[(n_parts, triton.cdiv(n_neurons, RANGE_BLOCK_K))](
            acts_nK,
            parts,
            n_images,
            n_neurons,
            rows,
            BLOCK_K=RANGE_BLOCK_K,
            UNROLL=RANGE_UNROLL,
            num_warps=NUM_WARPS,
        )
    return Chunk(acts_nK, sqnorm_n, parts)


def launch_prepared(
    chunk: Chunk,
    before: tuple[Tensor, Tensor, Tensor, Tensor],
    n_before: int,
    faults: Tensor | None,
    rows: slice | None,
    emb_nE: Tensor,
    cosine: bool,
) -> tuple[NewRange, Block]:
    """The range of n_before images and of the chunk, where faults [R, 3] are to be written; and a block of the chunk.

    before: low, high, above 0 and at low of the images before. Faults: columns least |e|^2, |e|^2 not finite,
    activations not finite, in rows that are to be put together. rows: of the block; None: of no images. A zero
    embedding stays zero.
    """
    (n_images, n_neurons), d_emb = chunk.acts_nK.shape, emb_nE.shape[1]
    rows = slice(0, 0) if rows is None else rows
    acts_bK, emb_bE, sqnorm_b = (t[rows].contiguous() for t in (chunk.acts_nK, emb_nE, chunk.sqnorm_n))
    rows_of_part, n_parts = _parts(len(acts_bK))
    new = sqnorm_b.new_empty
    found = NewRange(new(3, n_neurons), torch.empty(2, n_neurons, dtype=torch.int64, device=emb_nE.device))
    block = Block(new(acts_bK.shape), new(emb_bE.shape), new(n_parts, 5, n_neurons), new(n_parts, d_emb), new(n_parts))
    n_merging = 0 if faults is None else len(faults)
    blocks = triton.cdiv(n_neurons, RANGE_BLOCK_K) + max(1, triton.cdiv(d_emb, RANGE_BLOCK_K))
    prepared_kernel[(n_merging + n_parts * blocks,)](
        chunk.range_parts,
        chunk.sqnorm_n,
        *before,
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
        len(acts_bK),
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
        num_warps=NUM_WARPS,
    )
    return found, block


class Sums(NamedTuple):
    """What is added to, float64: sums [K, E], num, den, total and self [K]; of the images unit_sum [E] and two more."""

    sums_KE: Tensor
    num_K: Tensor
    den_K: Tensor
    total_K: Tensor
    self_K: Tensor
    unit_sum_E: Tensor
    pair_sum: Tensor
    square_sum: Tensor


def launch_lower(sums: Sums, drop_K: Tensor, n_images: int, faults: Tensor, cosine: bool) -> None:
    """In place of the sums of n_images, unless something is wrong; faults may have no rows."""
    n_neurons, d_emb = sums.sums_KE.shape
    if n_neurons > 0:
        lower_kernel[(triton.cdiv(n_neurons, SUM_BLOCK_K),)](
            *sums[:5],
            drop_K,
            *sums[5:],
            faults,
            n_images,
            len(faults),
            n_neurons,
            d_emb,
            COSINE=cosine,
            BLOCK_K=SUM_BLOCK_K,
            BLOCK_E=SUM_BLOCK_E,
            FAULTS=FAULTS,
            num_warps=NUM_WARPS,
        )


def launch_add(
    sums: Sums, block: Block, added_sums_KE: Tensor, faults: Tensor, dominated_K: Tensor, cosine: bool
) -> None:
    """In place of the sums, unless something is wrong; num without the block's own pairs of dominated neurons."""
    n_neurons, d_emb = sums.sums_KE.shape
    add_kernel[(1 + triton.cdiv(n_neurons, SUM_BLOCK_K),)](
        *sums,
        added_sums_KE.contiguous(),
        block.column_parts,
        block.unit_sums_PE,
        block.squares_P,
        faults,
        dominated_K,
        len(block.squares_P),
        len(block.unit_bE),
        len(faults),
        n_neurons,
        d_emb,
        COSINE=cosine,
        PARTS=PARTS,
        BLOCK_K=SUM_BLOCK_K,
        BLOCK_E=SUM_BLOCK_E,
        FAULTS=FAULTS,
        num_warps=NUM_WARPS,
    )
