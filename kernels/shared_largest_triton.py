"""Triton kernels that keep the k largest values of every row where the row is spread over ranks (training/choice.py).

    counts   of every row's digits, of values that begin like the k-th largest; ranks add them up    row_digit_kernel
    equals   how many of the rank's own values equal the k-th largest; ranks tell each other         row_equals_kernel
    keep     zeros where a value is not kept, the later of those that equal the k-th                 row_keep_kernel

What is not above 0 is never kept. Counts are integers: no order of additions changes a result.
docs/kernels.md section 4
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .shared_choice_triton import Told, keys_of

BITS, BINS = 4, 16  # of a digit
SHIFTS = tuple(range(28, -1, -BITS))  # of the digits of a key of 32 bits
BLOCK = 256  # values of a row at a time
BLOCK_B = 64  # rows of a program that looks at counts alone


@triton.jit
def next_digits(counts, prefix, left, FIRST: tl.constexpr, BITS: tl.constexpr, BINS: tl.constexpr):
    """(prefix [R] with one more digit, that digit, how many are left among the values that begin so). counts [R, BINS]:
    of that digit, of all ranks. FIRST: it is a row's first, and fewer than are wanted may be left."""
    o_bin = tl.arange(0, BINS)
    from_above = tl.cumsum(counts, axis=1, reverse=True)
    if FIRST:
        left = tl.minimum(tl.sum(counts, axis=1), left)
    digit = tl.maximum(tl.sum((from_above >= left[:, None]).to(tl.int32), axis=1) - 1, 0)
    left -= tl.sum(tl.where(o_bin[None, :] > digit[:, None], counts, 0), axis=1)
    return (prefix << BITS) | digit, digit, left


@triton.jit(do_not_specialize=["n_values", "k"])
def row_digit_kernel(
    values_ptr,
    before_ptr,
    state_ptr,
    counts_ptr,
    after_ptr,
    n_values,
    k,
    SHIFT: tl.constexpr,
    ROUND: tl.constexpr,
    BITS: tl.constexpr,
    BINS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A row of values [B, n_values]: counts [B, BINS]. before: of the round before, of all ranks.

    state and after [B, 2]: (prefix, left) before that round, and before this one.
    """
    row = tl.program_id(0).to(tl.int64)
    o_bin, one = tl.arange(0, BINS), tl.zeros([1], dtype=tl.int32)
    prefix, left = one, one + k
    if ROUND > 1:
        prefix, left = one + tl.load(state_ptr + 2 * row), one + tl.load(state_ptr + 2 * row + 1)
    if ROUND > 0:
        counts = tl.load(before_ptr + row * BINS + o_bin[None, :])
        prefix, _, left = next_digits(counts, prefix, left, ROUND == 1, BITS, BINS)
    prefix, left = tl.sum(prefix, axis=0), tl.sum(left, axis=0)
    tl.store(after_ptr + 2 * row, prefix)
    tl.store(after_ptr + 2 * row + 1, left)
    own = tl.zeros([BINS], dtype=tl.int32)
    for p in range(0, n_values, BLOCK):
        o = p + tl.arange(0, BLOCK)
        keys = keys_of(tl.load(values_ptr + row * n_values + o, mask=o < n_values, other=0.0))
        matches = keys > 0
        if ROUND > 0:
            matches = matches & ((keys >> (SHIFT + BITS)) == prefix)
        digits = tl.where(matches, (keys >> SHIFT) & (BINS - 1), BINS)
        own += tl.sum((digits[:, None] == o_bin[None, :]).to(tl.int32), axis=0)
    tl.store(counts_ptr + row * BINS + o_bin, own)


@triton.jit(do_not_specialize=["n_rows"])
def row_equals_kernel(
    before_ptr,
    own_ptr,
    state_ptr,
    cut_ptr,
    equals_ptr,
    n_rows,
    BITS: tl.constexpr,
    BINS: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    """cut [B, 2]: key of the k-th largest, how many that equal it are kept. equals [B]: own values that equal it.

    before, own: the last round's counts, of all ranks and of this one.
    """
    row = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    m = row < n_rows
    o_bin = tl.arange(0, BINS)
    at = row[:, None] * BINS + o_bin[None, :]
    counts = tl.load(before_ptr + at, mask=m[:, None], other=0)
    prefix = tl.load(state_ptr + 2 * row, mask=m, other=0)
    left = tl.load(state_ptr + 2 * row + 1, mask=m, other=0)
    key, digit, left = next_digits(counts, prefix, left, False, BITS, BINS)
    tl.store(cut_ptr + 2 * row, key, mask=m)
    tl.store(cut_ptr + 2 * row + 1, left, mask=m)
    own = tl.load(own_ptr + at, mask=m[:, None], other=0)
    tl.store(equals_ptr + row, tl.sum(tl.where(o_bin[None, :] == digit[:, None], own, 0), axis=1), mask=m)


@triton.jit(do_not_specialize=["n_rows", "rank", "n_values"])
def row_keep_kernel(values_ptr, cut_ptr, equals_ptr, n_rows, rank, n_values, BLOCK: tl.constexpr):
    """A row in place. equals [R, B]: of all ranks, of which the lower ones come first."""
    row = tl.program_id(0).to(tl.int64)
    key, left = tl.load(cut_ptr + 2 * row), tl.load(cut_ptr + 2 * row + 1)
    place = tl.zeros([], dtype=tl.int32)
    for other in range(rank):
        place += tl.load(equals_ptr + other * n_rows + row)
    for p in range(0, n_values, BLOCK):
        o = p + tl.arange(0, BLOCK)
        values = tl.load(values_ptr + row * n_values + o, mask=o < n_values, other=0.0)
        keys = keys_of(values)
        equal = ((keys == key) & (keys > 0)).to(tl.int32)
        kept = (keys > key) | ((equal > 0) & (place + tl.cumsum(equal, axis=0) <= left))
        tl.store(values_ptr + row * n_values + o, tl.where(kept, values, 0.0), mask=o < n_values)
        place += tl.sum(equal, axis=0)


# --- launch wrapper --------------------------------------------------------------------------------------------------


def launch_keep_largest_(values_BC: Tensor, k: int, told: Told) -> None:
    """Zeros all but the k largest of every row of all ranks' values, in place; ties go to the lower rank, then place.

    values_BC: contiguous. Ranks may have different C.
    """
    (n_rows, n_values), device = values_BC.shape, values_BC.device
    counts = torch.empty(len(SHIFTS), n_rows, BINS, dtype=torch.int32, device=device)
    states = torch.empty(len(SHIFTS) + 1, n_rows, 2, dtype=torch.int32, device=device)
    summed, grid, digit = counts[0], (n_rows,), {"BITS": BITS, "BINS": BINS}
    for number, (shift, own) in enumerate(zip(SHIFTS, counts)):
        given = values_BC, summed, states[max(number - 1, 0)], own, states[number], n_values, k
        row_digit_kernel[grid](*given, SHIFT=shift, ROUND=number, **digit, BLOCK=BLOCK, num_warps=4)
        summed = told.add_up(own)
    equals_B, cut = torch.empty(n_rows, dtype=torch.int32, device=device), states[-1]
    programs = (triton.cdiv(n_rows, BLOCK_B),)
    row_equals_kernel[programs](
        summed, counts[-1], states[-2], cut, equals_B, n_rows, **digit, BLOCK_B=BLOCK_B, num_warps=4
    )
    of_ranks = told.gather(equals_B)
    row_keep_kernel[grid](values_BC, cut, of_ranks, n_rows, told.rank, n_values, BLOCK=BLOCK, num_warps=4)
