"""Raw neurons' sums of the Monosemanticity Score on a GPU: what is checked, and what is added, in few launches.

Of a chunk of n images (activations a [n, K] of any sign and dtype, embeddings e [n, E], |e|^2 in float64):

    launch_range        low, high, how many at low, how many above 0, of this chunk and those before it; what is wrong
    launch_units        u = e / |e| (cosine) or e in float64, |u|^2, and sums of them in parts
    (pairwise_float64_triton.py: the sums of a - low, their products with u, the closed form)
    launch_lower        the sums so far become those of activations that are higher by a constant
    launch_add          += the sums of the chunk, and its pairs with the images before it
    launch_add_images   the same of a neuron that is 1 on every image

Nothing waits for the device and nothing is refused here: scoring/dense_on_gpu.py reads what is wrong, and only then
adds. Sums are float64, in a fixed order. The formulas stand in scoring/monosemanticity.py.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

PARTS = 64  # of a chunk at most; the kernels that put them together hold all at once
LEAST_ROWS = 64
RANGE_BLOCK_K = 256
RANGE_UNROLL = 8
MERGE_BLOCK_K = 32
MERGE_ROWS = 1024
UNIT_ROWS = 4
UNIT_BLOCK_E = 256
SUM_BLOCK_K = 8
SUM_BLOCK_E = 128
IMAGES_BLOCK_E = 64
NUM_WARPS = 4
IMAGES_WARPS = 8


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


@triton.jit(do_not_specialize=["n_parts", "n_images", "n_before"])
def merge_range_kernel(
    parts_ptr,
    sqnorm_ptr,
    low_ptr,
    high_ptr,
    active_ptr,
    at_low_ptr,
    new_reals_ptr,
    new_counts_ptr,
    faults_ptr,
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
    o_k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
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
    for n in range(tl.program_id(0) * ROWS, n_images, tl.num_programs(0) * ROWS):
        o_n = n + tl.arange(0, ROWS)
        b_square = tl.load(sqnorm_ptr + o_n, mask=o_n < n_images, other=1.0)
        b_least = tl.minimum(b_least, tl.where(o_n < n_images, b_square, float("inf")))
        b_unfit += tl.where(b_square < float("inf"), 0.0, 1.0)
    faults = faults_ptr + tl.program_id(0) * 3
    tl.store(faults, tl.min(b_least, axis=0))
    tl.store(faults + 1, tl.sum(b_unfit, axis=0))
    tl.store(faults + 2, tl.sum(tl.where(m_k, bad, 0.0), axis=0))


@triton.jit(do_not_specialize=["n_images", "rows"])
def units_kernel(
    emb_ptr,
    sqnorm_ptr,
    unit_ptr,
    square_ptr,
    sums_ptr,
    squares_ptr,
    n_images,
    d_emb,
    rows,
    COSINE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """unit = u [n, E] and square = |u|^2 [n]; sums[program] = sum of u, squares[program] = sum of |u|^2, of `rows`."""
    part = tl.program_id(0).to(tl.int64)
    o_e = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
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
        if tl.program_id(1) == 0:
            tl.store(square_ptr + o_n, square, mask=m_n)
        b_squares += square
    tl.store(sums_ptr + part * d_emb + o_e, tl.sum(b_sum, axis=0), mask=o_e < d_emb)
    if tl.program_id(1) == 0:
        tl.store(squares_ptr + part, tl.sum(b_squares, axis=0))


@triton.jit(do_not_specialize=["n_images"])
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
    n_images,
    n_neurons,
    d_emb,
    BLOCK_K: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """The sums of n_images become those of activations that are `drop` >= 0 higher."""
    o_k = tl.program_id(0).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    m_k = o_k < n_neurons
    drop = tl.load(drop_ptr + o_k, mask=m_k, other=0.0)
    if tl.max(drop, axis=0) > 0:
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
def add_kernel(
    sums_ptr,
    num_ptr,
    den_ptr,
    total_ptr,
    self_ptr,
    added_sums_ptr,
    added_ptr,
    n_neurons,
    d_emb,
    BLOCK_K: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """sums [K, E], num, den, total and self += the added sums, and those of total, den, self and num [4, K]."""
    o_k = tl.program_id(0).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    m_k = o_k < n_neurons
    b_cross = tl.zeros([BLOCK_K, BLOCK_E], dtype=tl.float64)
    for e in range(0, d_emb, BLOCK_E):
        o_e = e + tl.arange(0, BLOCK_E)
        mask = m_k[:, None] & (o_e < d_emb)[None, :]
        offsets = o_k[:, None] * d_emb + o_e[None, :]
        b_sums = tl.load(sums_ptr + offsets, mask=mask, other=0.0)
        b_added = tl.load(added_sums_ptr + offsets, mask=mask, other=0.0)
        b_cross += b_sums * b_added
        tl.store(sums_ptr + offsets, b_sums + b_added, mask=mask)
    added_total = tl.load(added_ptr + o_k, mask=m_k, other=0.0)
    added_den = tl.load(added_ptr + n_neurons + o_k, mask=m_k, other=0.0)
    added_self = tl.load(added_ptr + 2 * n_neurons + o_k, mask=m_k, other=0.0)
    added_num = tl.load(added_ptr + 3 * n_neurons + o_k, mask=m_k, other=0.0)
    total = tl.load(total_ptr + o_k, mask=m_k, other=0.0)
    den = tl.load(den_ptr + o_k, mask=m_k, other=0.0)
    own = tl.load(self_ptr + o_k, mask=m_k, other=0.0)
    num = tl.load(num_ptr + o_k, mask=m_k, other=0.0)
    tl.store(num_ptr + o_k, num + (added_num + tl.sum(b_cross, axis=1)), mask=m_k)
    tl.store(den_ptr + o_k, den + (added_den + added_total * total), mask=m_k)
    tl.store(total_ptr + o_k, total + added_total, mask=m_k)
    tl.store(self_ptr + o_k, own + added_self, mask=m_k)


@triton.jit(do_not_specialize=["n_parts", "n_images"])
def add_images_kernel(
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
    """One program: unit_sum, square_sum and pair_sum += those of n_images, from the parts of units_kernel."""
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


# --- launch wrappers -------------------------------------------------------------------------------------------------


class NewRange(NamedTuple):
    """Of all images so far: low, high and the fall of low, float64 [3, K]; above 0 and at low, int64 [2, K]."""

    reals_3K: Tensor
    counts_2K: Tensor


class Units(NamedTuple):
    """u [n, E] and |u|^2 [n] in float64, and sums of them over P parts of the images: [P, E] and [P]."""

    unit_nE: Tensor
    square_n: Tensor
    sums_PE: Tensor
    squares_P: Tensor


def _parts(n_images: int) -> tuple[int, int]:
    """Images of a part, and how many parts: at most PARTS."""
    rows = max(LEAST_ROWS, triton.cdiv(n_images, PARTS))
    return rows, triton.cdiv(n_images, rows)


def n_fault_rows(n_neurons: int) -> int:
    """Rows of launch_range's faults: its programs."""
    return max(1, triton.cdiv(n_neurons, MERGE_BLOCK_K))


def launch_range(
    acts_nK: Tensor, sqnorm_n: Tensor, before: tuple[Tensor, Tensor, Tensor, Tensor], n_before: int, faults: Tensor
) -> NewRange:
    """The range of n_before images and of these n >= 1; faults [R, 3] are written. before: low, high, above 0, at low.

    Faults: columns least |e|^2, |e|^2 not finite, activations not finite, in rows that are to be put together.
    """
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
    new = NewRange(
        sqnorm_n.new_empty(3, n_neurons), torch.empty(2, n_neurons, dtype=torch.int64, device=acts_nK.device)
    )
    merge_range_kernel[(len(faults),)](
        parts,
        sqnorm_n,
        *before,
        *new,
        faults,
        n_parts,
        n_images,
        n_before,
        n_neurons,
        PARTS=PARTS,
        BLOCK_K=MERGE_BLOCK_K,
        ROWS=MERGE_ROWS,
        num_warps=NUM_WARPS,
    )
    return new


def launch_units(emb_nE: Tensor, sqnorm_n: Tensor, cosine: bool) -> Units:
    """Of n >= 1 images; a zero embedding stays zero."""
    emb_nE, sqnorm_n = emb_nE.contiguous(), sqnorm_n.contiguous()
    n_images, d_emb = emb_nE.shape
    rows, n_parts = _parts(n_images)
    made = Units(
        torch.empty_like(emb_nE, dtype=torch.float64),
        torch.empty_like(sqnorm_n),
        sqnorm_n.new_empty(n_parts, d_emb),
        sqnorm_n.new_empty(n_parts),
    )
    units_kernel[(n_parts, max(1, triton.cdiv(d_emb, UNIT_BLOCK_E)))](
        emb_nE,
        sqnorm_n,
        *made,
        n_images,
        d_emb,
        rows,
        COSINE=cosine,
        BLOCK_N=UNIT_ROWS,
        BLOCK_E=UNIT_BLOCK_E,
        num_warps=NUM_WARPS,
    )
    return made


def launch_lower(
    sums: tuple[Tensor, ...], drop_K: Tensor, unit_sum_E: Tensor, pair_sum: Tensor, square_sum: Tensor, n_images: int
) -> None:
    """In place of sums [K, E], num, den, total and self [K] of n_images, whose own sums the others are."""
    n_neurons, d_emb = sums[0].shape
    if n_neurons > 0:
        lower_kernel[(triton.cdiv(n_neurons, SUM_BLOCK_K),)](
            *sums,
            drop_K,
            unit_sum_E,
            pair_sum,
            square_sum,
            n_images,
            n_neurons,
            d_emb,
            BLOCK_K=SUM_BLOCK_K,
            BLOCK_E=SUM_BLOCK_E,
            num_warps=NUM_WARPS,
        )


def launch_add(sums: tuple[Tensor, ...], added_sums_KE: Tensor, added_4K: Tensor) -> None:
    """In place of sums [K, E], num, den, total and self [K]; added: total, den, self and num."""
    n_neurons, d_emb = sums[0].shape
    if n_neurons > 0:
        add_kernel[(triton.cdiv(n_neurons, SUM_BLOCK_K),)](
            *sums,
            added_sums_KE,
            added_4K,
            n_neurons,
            d_emb,
            BLOCK_K=SUM_BLOCK_K,
            BLOCK_E=SUM_BLOCK_E,
            num_warps=NUM_WARPS,
        )


def launch_add_images(units: Units, unit_sum_E: Tensor, pair_sum: Tensor, square_sum: Tensor) -> None:
    """In place of the sums of the images so far."""
    add_images_kernel[(1,)](
        units.sums_PE,
        units.squares_P,
        unit_sum_E,
        pair_sum,
        square_sum,
        len(units.squares_P),
        len(units.square_n),
        len(unit_sum_E),
        PARTS=PARTS,
        BLOCK_E=IMAGES_BLOCK_E,
        num_warps=IMAGES_WARPS,
    )
