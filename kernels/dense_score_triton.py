"""Raw neurons' sums of the Monosemanticity Score on a GPU: what is checked, and what is added, in few launches.

Of a chunk of n images (activations a [n, K] of any sign and dtype, embeddings e [n, E], |e|^2 in float64):

    launch_range      low, high, how many at low, how many above 0, in parts; |e|^2
    launch_prepared   these of the chunk and all images before it, and what is wrong; of a block of the chunk's images
                      u = e / |e| (cosine) or e, a - low, both in float64, and sums of them in parts
    (a product:       (a - low)^T u)
    launch_lower      the sums so far become those of activations that are higher by a constant
    launch_add        += the sums of the block by the closed form, and its pairs with the images before it; the same of
                      a neuron that is 1 on every image. Of the first images it makes the sums, and if asked, the
                      scores of these images

Nothing waits for the device: if something is wrong, the last two leave the sums as they are, and
scoring/dense_on_gpu.py reads afterwards what it was. Sums are float64, in a fixed order. The formulas stand in
scoring/monosemanticity.py.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .common import cdiv
from .dense_prepared_triton import BLOCK_PARTS, Block
from .dense_range_triton import NewRange, n_fault_rows
from .pairwise_float64_triton import added_columns, is_dominated
from .score_result_triton import score_and_status

SUM_BLOCK_K = 8
SUM_BLOCK_E = 128
FAULTS = 64
NUM_WARPS = 4


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
    n_before,
    d_emb,
    PARTS: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """unit_sum, square_sum and pair_sum of n_before images += those of n_images, from the parts of _units."""
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
        before = tl.load(unit_sum_ptr + o_e, mask=m_e & (n_before > 0), other=0.0)
        b_own += chunk * chunk
        b_cross += chunk * before
        tl.store(unit_sum_ptr + o_e, before + chunk, mask=m_e)
    within = tl.where(n_images > 1, (tl.sum(b_own, axis=0) - squares) / 2, 0.0)
    pairs_before = tl.load(pair_sum_ptr, mask=n_before > 0, other=0.0)
    squares_before = tl.load(square_sum_ptr, mask=n_before > 0, other=0.0)
    tl.store(pair_sum_ptr, pairs_before + within + tl.sum(b_cross, axis=0))
    tl.store(square_sum_ptr, squares_before + squares)


@triton.jit
def _tell_scores(
    scores_ptr,
    statuses_ptr,
    reals_ptr,
    counts_ptr,
    o_k,
    m_k,
    num,
    den,
    n_scored,
    n_neurons,
    DEFINED: tl.constexpr,
    DEAD: tl.constexpr,
    CONSTANT: tl.constexpr,
    SINGLE: tl.constexpr,
):
    """scores [3, K] = score, high and, as bits, how many images are above 0; statuses [K]: of a range of n_scored."""
    low = tl.load(reals_ptr + o_k, mask=m_k, other=0.0)
    high = tl.load(reals_ptr + n_neurons + o_k, mask=m_k, other=0.0)
    active = tl.load(counts_ptr + o_k, mask=m_k, other=0)
    above = n_scored - tl.load(counts_ptr + n_neurons + o_k, mask=m_k, other=0)
    ms, status = score_and_status(num, den, low, high, above, DEFINED, DEAD, CONSTANT, SINGLE)
    tl.store(scores_ptr + o_k, ms, mask=m_k)
    tl.store(scores_ptr + n_neurons + o_k, high, mask=m_k)
    tl.store(scores_ptr + 2 * n_neurons + o_k, active.to(tl.float64, bitcast=True), mask=m_k)
    tl.store(statuses_ptr + o_k, status, mask=m_k)


@triton.jit(do_not_specialize=["n_parts", "n_images", "n_before", "n_scored", "n_faults"])
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
    reals_ptr,
    counts_ptr,
    told_ptr,
    flags_ptr,
    n_parts,
    n_images,
    n_before,
    n_scored,
    n_faults,
    n_neurons,
    d_emb,
    DEFINED: tl.constexpr,
    DEAD: tl.constexpr,
    CONSTANT: tl.constexpr,
    SINGLE: tl.constexpr,
    COSINE: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_E: tl.constexpr,
    FAULTS: tl.constexpr,
):
    """The first program adds the images, the others their neurons' sums: [K, E], num, den, total and self [K].

    To sums of n_before images: of none, nothing is read, and added_sums is sums itself. num without the pairs within
    the block of the neurons that are dominated, which flags [.., K] tells. If something is wrong, nothing is added.
    told: what is wrong, [n_faults, 3]; 1 if nothing is, else 0; if n_scored, _tell_scores of the range of all images.
    """
    program = tl.program_id(0)
    sound = _sound(told_ptr, n_faults, COSINE, FAULTS)
    tl.store(told_ptr + 3 * n_faults, sound.to(tl.float64), mask=program == 0)
    if (program == 0) & sound:
        _add_images(
            unit_sums_ptr,
            squares_ptr,
            unit_sum_ptr,
            pair_sum_ptr,
            square_sum_ptr,
            n_parts,
            n_images,
            n_before,
            d_emb,
            PARTS,
            BLOCK_E // 2,
        )
    if program > 0:
        o_k = (program - 1).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
        m_k = o_k < n_neurons
        m_before = m_k & (n_before > 0)
        added_total, added_den, added_self, square, norm = added_columns(
            column_parts_ptr, o_k, n_neurons, n_parts, PARTS
        )
        b_own = tl.zeros([BLOCK_K, BLOCK_E], dtype=tl.float64)
        b_cross = tl.zeros([BLOCK_K, BLOCK_E], dtype=tl.float64)
        for e in range(0, d_emb, BLOCK_E):
            o_e = e + tl.arange(0, BLOCK_E)
            mask = m_k[:, None] & (o_e < d_emb)[None, :]
            mask_before = m_before[:, None] & (o_e < d_emb)[None, :]
            offsets = o_k[:, None] * d_emb + o_e[None, :]
            b_sums = tl.load(sums_ptr + offsets, mask=mask_before, other=0.0)
            b_added = tl.load(added_sums_ptr + offsets, mask=mask, other=0.0)
            b_own += b_added * b_added
            b_cross += b_sums * b_added
            tl.store(sums_ptr + offsets, b_sums + b_added, mask=mask_before & sound)
        dominated = is_dominated(square, norm)
        within = tl.where(dominated, 0.0, (tl.sum(b_own, axis=1) - square) / 2)
        total = tl.load(total_ptr + o_k, mask=m_before, other=0.0)
        den = tl.load(den_ptr + o_k, mask=m_before, other=0.0) + (added_den + added_total * total)
        own = tl.load(self_ptr + o_k, mask=m_before, other=0.0)
        num = tl.load(num_ptr + o_k, mask=m_before, other=0.0) + (within + tl.sum(b_cross, axis=1))
        tl.store(flags_ptr + o_k, dominated.to(tl.int8), mask=m_k)
        tl.store(num_ptr + o_k, num, mask=m_k & sound)
        tl.store(den_ptr + o_k, den, mask=m_k & sound)
        tl.store(total_ptr + o_k, total + added_total, mask=m_k & sound)
        tl.store(self_ptr + o_k, own + added_self, mask=m_k & sound)
        _tell_scores(
            told_ptr + 3 * n_faults + 1,
            flags_ptr + n_neurons,
            reals_ptr,
            counts_ptr,
            o_k,
            m_k & (n_scored > 0),
            num,
            den,
            n_scored,
            n_neurons,
            DEFINED,
            DEAD,
            CONSTANT,
            SINGLE,
        )


# --- launch wrappers -------------------------------------------------------------------------------------------------


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


def launch_lower(sums: Sums, drop_K: Tensor, n_images: int, told: Tensor | None, cosine: bool) -> None:
    """In place of the sums of n_images, unless launch_prepared's faults, with which told begins, tell of something."""
    n_neurons, d_emb = sums.sums_KE.shape
    if n_neurons > 0:
        lower_kernel[(cdiv(n_neurons, SUM_BLOCK_K),)](
            *sums[:5],
            drop_K,
            *sums[5:],
            drop_K if told is None else told,
            n_images,
            0 if told is None else n_fault_rows(n_neurons),
            n_neurons,
            d_emb,
            COSINE=cosine,
            BLOCK_K=SUM_BLOCK_K,
            BLOCK_E=SUM_BLOCK_E,
            FAULTS=FAULTS,
            num_warps=NUM_WARPS,
        )


def first_sums(added_sums_KE: Tensor) -> Sums:
    """What launch_add makes of the first block, from its product."""
    (n_neurons, d_emb), new = added_sums_KE.shape, added_sums_KE.new_empty
    of_neurons = new(n_neurons), new(n_neurons), new(n_neurons), new(n_neurons)
    return Sums(added_sums_KE, *of_neurons, new(d_emb), new(()), new(()))


def launch_add(
    sums: Sums,
    n_before: int,
    block: Block,
    added_sums_KE: Tensor,
    found: NewRange,
    told: Tensor,
    flags: Tensor,
    statuses: dict[str, int],
    n_scored: int,
    cosine: bool,
) -> None:
    """In place of the sums of n_before images (of none: first_sums), unless something is wrong.

    num without the block's own pairs of dominated neurons, which flags [K] tells, 1 or 0. told: float64, begins with
    launch_prepared's faults; behind these comes 1 if there are none, else 0. If n_scored, which is all images whose
    range was found: then score, high and, as bits, how many images are above 0, [3, K], and behind the flags the
    statuses [K], int8.
    """
    n_neurons, d_emb = sums.sums_KE.shape
    add_kernel[(1 + cdiv(n_neurons, SUM_BLOCK_K),)](
        *sums,
        added_sums_KE,
        block.column_parts,
        block.unit_sums_PE,
        block.squares_P,
        *found,
        told,
        flags,
        len(block.squares_P),
        len(block.unit_bE),
        n_before,
        n_scored,
        n_fault_rows(n_neurons),
        n_neurons,
        d_emb,
        **statuses,
        COSINE=cosine,
        PARTS=BLOCK_PARTS,
        BLOCK_K=SUM_BLOCK_K,
        BLOCK_E=SUM_BLOCK_E,
        FAULTS=FAULTS,
        num_warps=NUM_WARPS,
    )
