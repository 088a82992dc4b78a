"""Triton kernels of the one choice of latents among the candidates of several ranks (training/choice.py says how).

    topk         which of a rank's offers are among the k largest of their row                        keep_kernel
    batch_topk   three counts of digits of the n-th largest offer, which ranks add up                 offer_digit_kernel
                 which offers are above it, and how many of every row equal it                        cut_kernel
                 how many that equal it come before those of a row, by the counts of all ranks        before_kernel
                 which offers are kept                                                                mask_kernel
    both         the kept entries one after the other, padding behind                                 compact_kernel

Counts are integers: no order of additions changes a result. Nothing is asked of the device. docs/kernels.md section 4
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024  # entries of a program
BITS, BINS = 11, 2048  # of a digit
SHIFTS = (22, 11, 0)  # of the digits of a key of 32 bits
COMPARED = 2048  # pairs of a row's offers at a time


# --- topk ------------------------------------------------------------------------------------------------------------


@triton.jit
def ranked(values):
    """NaN as infinity: above every number."""
    return tl.where(values != values, float("inf"), values)


@triton.jit(do_not_specialize=["n_rows", "n_ranks", "rank", "k", "n_own"])
def keep_kernel(offers_ptr, mask_ptr, n_rows, n_ranks, rank, k, n_own, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """A row of offers [R, B, k]: mask [B, n_own], of the first n_own places of this rank."""
    row = tl.program_id(0).to(tl.int64)
    o_n = tl.arange(0, BLOCK_N)
    at = (o_n // k).to(tl.int64) * n_rows * k + row * k + o_n % k
    values = ranked(tl.load(offers_ptr + at, mask=o_n < n_ranks * k, other=-2.0))
    for first in range(0, n_own, BLOCK_K):
        o_k = first + tl.arange(0, BLOCK_K)
        m_k = o_k < n_own
        own = ranked(tl.load(offers_ptr + (rank * n_rows + row) * k + o_k, mask=m_k, other=-2.0))
        equal = (values[None, :] == own[:, None]) & (o_n[None, :] < (rank * k + o_k)[:, None])
        before = (values[None, :] > own[:, None]) | equal
        kept = tl.sum(before.to(tl.int32), axis=1) < k
        tl.store(mask_ptr + row * n_own + o_k, kept.to(tl.int32), mask=m_k)


# --- batch_topk ------------------------------------------------------------------------------------------------------


@triton.jit
def keys_of(values):
    """int32 in the order of values; 0 of those that are not above 0."""
    values = ranked(values.to(tl.float32))
    return tl.where(values > 0, values.to(tl.int32, bitcast=True), 0)


@triton.jit
def next_digit(counts_ptr, prefix, left, n_kept, FIRST: tl.constexpr, BINS: tl.constexpr, BITS: tl.constexpr):
    """(prefix with one more digit, how many are left to keep among those that begin like it, how many are kept).

    counts [BINS]: of that digit, added up over ranks. left is of the digits before, n_kept of all of them.
    """
    o_bin = tl.arange(0, BINS)
    counts = tl.load(counts_ptr + o_bin)
    from_above = tl.cumsum(counts, axis=0, reverse=True)
    if FIRST:
        left = tl.minimum(tl.sum(counts, axis=0), left)
        n_kept = left
    digit = tl.maximum(tl.sum((from_above >= left).to(tl.int32), axis=0) - 1, 0)
    left -= tl.sum(tl.where(o_bin > digit, counts, 0), axis=0)
    return (prefix << BITS) | digit, left, n_kept


@triton.jit
def digits_before(counts_ptr, state_ptr, n_wanted, ROUND: tl.constexpr, BINS: tl.constexpr, BITS: tl.constexpr):
    """(prefix, left, kept) before a round, by the counts of the last one; state has them as they were before it."""
    prefix, left, n_kept = 0, n_wanted, n_wanted
    if ROUND > 1:
        prefix, left, n_kept = tl.load(state_ptr), tl.load(state_ptr + 1), tl.load(state_ptr + 2)
    if ROUND > 0:
        prefix, left, n_kept = next_digit(counts_ptr, prefix, left, n_kept, ROUND == 1, BINS, BITS)
    return prefix, left, n_kept


@triton.jit
def store_state(state_ptr, prefix, left, n_kept):
    """What every program has found, by the first."""
    if tl.program_id(0) == 0:
        tl.store(state_ptr, prefix)
        tl.store(state_ptr + 1, left)
        tl.store(state_ptr + 2, n_kept)


@triton.jit(do_not_specialize=["n_wanted", "n_entries"])
def offer_digit_kernel(
    acts_ptr,
    before_ptr,
    state_ptr,
    counts_ptr,
    after_ptr,
    n_wanted,
    n_entries,
    SHIFT: tl.constexpr,
    ROUND: tl.constexpr,
    BITS: tl.constexpr,
    BINS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """counts += how often each digit at SHIFT occurs among keys that begin like the one that is looked for.

    before: counts of the round before, of all ranks. state and after: of the round before, and of this one.
    """
    prefix, left, n_kept = digits_before(before_ptr, state_ptr, n_wanted, ROUND, BINS, BITS)
    store_state(after_ptr, prefix, left, n_kept)
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    keys = keys_of(tl.load(acts_ptr + o, mask=o < n_entries, other=0.0))
    matches = keys > 0
    if ROUND > 0:
        matches = matches & ((keys >> (SHIFT + BITS)) == prefix)
    counts = tl.histogram((keys >> SHIFT) & (BINS - 1), BINS, mask=matches)
    tl.atomic_add(counts_ptr + tl.arange(0, BINS), counts, mask=counts > 0, sem="relaxed")


@triton.jit
def row_of(o, m, row_offsets_ptr, n_rows, n_halvings):
    """The row of entries o, by halving; those that m leaves out have one that means nothing."""
    low = tl.zeros_like(o)
    high = low + n_rows - 1
    for _ in range(n_halvings):
        middle = (low + high) // 2
        unsure = m & (low < high)
        below = unsure & (tl.load(row_offsets_ptr + middle + 1, mask=unsure, other=0) <= o)
        low = tl.where(below, middle + 1, low)
        high = tl.where(unsure & (below == 0), middle, high)
    return low


@triton.jit(do_not_specialize=["n_wanted", "n_entries", "n_rows", "n_halvings"])
def cut_kernel(
    acts_ptr,
    row_offsets_ptr,
    before_ptr,
    state_ptr,
    mask_ptr,
    equals_ptr,
    after_ptr,
    smallest_ptr,
    n_wanted,
    n_entries,
    n_rows,
    n_halvings,
    BITS: tl.constexpr,
    BINS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """mask: 1 of offers above the cut, 2 of those that equal it, else 0. equals [B]: how many of these a row has."""
    key, left, n_kept = digits_before(before_ptr, state_ptr, n_wanted, 3, BINS, BITS)
    store_state(after_ptr, key, left, n_kept)
    if tl.program_id(0) == 0:
        tl.store(smallest_ptr, tl.where(n_kept > 0, key, 0).to(tl.float32, bitcast=True))
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m = o < n_entries
    keys = keys_of(tl.load(acts_ptr + o, mask=m, other=0.0))
    equal = (keys == key) & (keys > 0)
    tl.store(mask_ptr + o, tl.where(equal, 2, ((keys > key) & (keys > 0)).to(tl.int32)), mask=m)
    row = row_of(o, equal, row_offsets_ptr, n_rows, n_halvings)
    tl.atomic_add(equals_ptr + row, equal.to(tl.int32), mask=equal, sem="relaxed")


@triton.jit(do_not_specialize=["n_ranks", "rank", "n_rows"])
def before_kernel(equals_ptr, before_ptr, n_ranks, rank, n_rows, BLOCK: tl.constexpr):
    """One program: of every row [B] how many of equals [R, B] come before this rank's; rows, then ranks."""
    carried = 0
    for p in range(0, n_rows, BLOCK):
        o = p + tl.arange(0, BLOCK)
        m = o < n_rows
        of_row, earlier = tl.zeros([BLOCK], dtype=tl.int32), tl.zeros([BLOCK], dtype=tl.int32)
        for other in range(n_ranks):
            equals = tl.load(equals_ptr + other * n_rows + o, mask=m, other=0)
            of_row += equals
            earlier += tl.where(other < rank, equals, 0)
        above = tl.cumsum(of_row, axis=0) - of_row
        tl.store(before_ptr + o, carried + above + earlier, mask=m)
        carried += tl.sum(of_row, axis=0)


@triton.jit(do_not_specialize=["n_entries", "n_rows", "n_halvings"])
def mask_kernel(
    flags_ptr,
    row_offsets_ptr,
    before_ptr,
    state_ptr,
    mask_ptr,
    n_entries,
    n_rows,
    n_halvings,
    BLOCK: tl.constexpr,
):
    """cut_kernel's mask with those that equal the cut decided: the first so many of all ranks."""
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    flags = tl.load(flags_ptr + o, mask=o < n_entries, other=0)
    equal = flags == 2
    row = row_of(o, equal, row_offsets_ptr, n_rows, n_halvings)
    start = tl.load(row_offsets_ptr + row, mask=equal, other=0).to(tl.int32)
    place = tl.load(before_ptr + row, mask=equal, other=0)
    for i in range(tl.max(tl.where(equal, o - start, 0), axis=0)):
        earlier = equal & (start + i < o)
        place += (tl.load(flags_ptr + start + i, mask=earlier, other=0) == 2).to(tl.int32)
    kept = (flags == 1) | (equal & (place < tl.load(state_ptr + 1)))
    tl.store(mask_ptr + o, kept.to(tl.int32), mask=o < n_entries)


# --- both ------------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["n_entries", "n_rows", "n_blocks", "width"])
def compact_kernel(
    acts_ptr,
    latents_ptr,
    row_offsets_ptr,
    upto_ptr,
    kept_acts_ptr,
    kept_latents_ptr,
    kept_offsets_ptr,
    n_entries,
    n_rows,
    n_blocks,
    width,
    CSR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Kept entries first, in their order; upto: how many are kept up to an entry. Rows of width entries, or ragged."""
    program = tl.program_id(0)
    if program < n_blocks:
        o = program * BLOCK + tl.arange(0, BLOCK)
        m = o < n_entries
        upto = tl.load(upto_ptr + o, mask=m, other=0)
        before = tl.load(upto_ptr + o - 1, mask=m & (o > 0), other=0)
        total = tl.load(upto_ptr + n_entries - 1)
        kept = upto > before
        place = tl.where(kept, before, total + o - upto)
        acts, latents = tl.load(acts_ptr + o, mask=m, other=0.0), tl.load(latents_ptr + o, mask=m, other=0)
        tl.store(kept_acts_ptr + place, tl.where(kept, acts, 0.0), mask=m)
        tl.store(kept_latents_ptr + place, tl.where(kept, latents, 0), mask=m)
    else:
        o_b = (program - n_blocks) * BLOCK + tl.arange(0, BLOCK)
        m_b = o_b <= n_rows
        if CSR:
            end = tl.load(row_offsets_ptr + o_b, mask=m_b, other=0)
        else:
            end = (o_b * width).to(tl.int64)
        kept_before = tl.load(upto_ptr + end - 1, mask=m_b & (end > 0), other=0)
        tl.store(kept_offsets_ptr + o_b, kept_before.to(tl.int64), mask=m_b)


# --- launch wrappers -------------------------------------------------------------------------------------------------

Codes = tuple[Tensor, Tensor, Tensor]  # acts and latents [M], row_offsets [B + 1]


def launch_keep(offers_RBK: Tensor, rank: int, n_own: int) -> Tensor:
    """int32 [B, n_own]: 1 of those of the rank's own first n_own places that are among the k largest of their row."""
    n_ranks, n_rows, k = offers_RBK.shape
    mask = torch.empty(n_rows, n_own, dtype=torch.int32, device=offers_RBK.device)
    block_n = triton.next_power_of_2(n_ranks * k)
    keep_kernel[(n_rows,)](
        offers_RBK,
        mask,
        n_rows,
        n_ranks,
        rank,
        k,
        n_own,
        BLOCK_N=block_n,
        BLOCK_K=min(32, COMPARED // block_n),
        num_warps=2 if block_n < 64 else 4,
    )
    return mask


class Told(NamedTuple):
    """What ranks tell each other of a batch: the sum of whole numbers, and every rank's numbers."""

    add_up: Callable[[Tensor], Tensor]
    gather: Callable[[Tensor], Tensor]
    rank: int


def launch_keep_of_batch(acts_M: Tensor, row_offsets: Tensor, n_wanted: int, told: Told) -> tuple[Tensor, Tensor]:
    """(int32 [M]: 1 of those of the rank's own offers that are among the n_wanted largest of all ranks; the smallest
    activation above 0 that any rank keeps, float32 [1], 0 if there is none). Offers ragged by row, zeros behind."""
    n_entries, n_rows, device = len(acts_M), len(row_offsets) - 1, acts_M.device
    zeros = torch.zeros(len(SHIFTS) * BINS + n_rows, dtype=torch.int32, device=device)
    states = torch.empty(len(SHIFTS) + 1, 4, dtype=torch.int32, device=device)
    mask, flags = torch.empty(2, n_entries, dtype=torch.int32, device=device)
    smallest, grid = torch.empty(1, dtype=torch.float32, device=device), (triton.cdiv(n_entries, BLOCK),)
    constants = {"BITS": BITS, "BINS": BINS, "BLOCK": BLOCK, "num_warps": 4}
    counts = zeros[:BINS]
    for number, shift in enumerate(SHIFTS):
        own = zeros[number * BINS : (number + 1) * BINS]
        given = acts_M, counts, states[max(number - 1, 0)], own, states[number]
        offer_digit_kernel[grid](*given, n_wanted, n_entries, SHIFT=shift, ROUND=number, **constants)
        counts = told.add_up(own)
    equals_B, halvings = zeros[len(SHIFTS) * BINS :], n_rows.bit_length()
    found = mask, equals_B, states[-1], smallest
    cut_kernel[grid](
        acts_M, row_offsets, counts, states[-2], flags, *found[1:], n_wanted, n_entries, n_rows, halvings, **constants
    )
    before_B = torch.empty_like(equals_B)
    of_ranks_RB = told.gather(equals_B)
    before_kernel[(1,)](of_ranks_RB, before_B, len(of_ranks_RB), told.rank, n_rows, BLOCK=BLOCK, num_warps=4)
    mask_kernel[grid](
        flags, row_offsets, before_B, states[-1], mask, n_entries, n_rows, halvings, BLOCK=BLOCK, num_warps=4
    )
    return mask, smallest


def launch_compact(acts: Tensor, latents: Tensor, row_offsets: Tensor | None, mask: Tensor) -> Codes:
    """The kept entries of codes [B, K], or ragged [M], in as many places as before; 0 at latent 0 behind them."""
    n_entries = latents.numel()
    n_rows = len(latents) if row_offsets is None else len(row_offsets) - 1
    upto = torch.cumsum(mask.view(-1), 0, dtype=torch.int32)
    kept = torch.empty_like(acts.view(-1)), torch.empty_like(latents.view(-1))
    offsets = torch.empty(n_rows + 1, dtype=torch.int64, device=acts.device)
    n_blocks = triton.cdiv(n_entries, BLOCK)
    compact_kernel[(n_blocks + triton.cdiv(n_rows + 1, BLOCK),)](
        acts,
        latents,
        latents if row_offsets is None else row_offsets,
        upto,
        *kept,
        offsets,
        n_entries,
        n_rows,
        n_blocks,
        0 if row_offsets is not None else latents.shape[1],
        CSR=row_offsets is not None,
        BLOCK=BLOCK,
        num_warps=4,
    )
    return (*kept, offsets)
