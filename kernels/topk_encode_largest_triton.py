"""Triton kernels that choose the n largest candidates of a screened chunk, or all above a threshold, in CSR order.

    L          two digits of the n-th largest lower bound of a group           bound_digit_kernel, twice
    key        the n-th largest key of a candidate, by four digits             digit_kernel, four times
    counts     of every row, entries above the key and equal to it             count_kernel
    codes      those above, and the first so many of those equal to it         write_kernel

A digit is known when all programs have added to its histogram. The one that comes last by a counter finds it, so that
no launch of one program stands in between. Counts are integers: no order of additions changes a result. What is read
is the pool, or float32 pre-activations z [R, S] if the chunk had to be done again.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .topk_encode_choose_triton import digit_where, value_keys
from .topk_encode_list_triton import Pool
from .topk_encode_screen_triton import ROUNDING, Screen, multiprocessors, slack_of

BOUND_SHIFTS = (23, 15)  # lowest bits of the digits of a bound, 8 bits each
BOUND_KEYS = 4096  # of a program
KEY_SHIFTS = (23, 15, 7, 0)  # of a 31-bit key; the last has 7
COUNTERS = 256 + 4  # int32 of a digit, zeros: its histogram, how many programs are done with it, and 3 that align
N_INTEGERS = (len(BOUND_SHIFTS) + len(KEY_SHIFTS)) * COUNTERS + 8
ROWS, BLOCK, NUM_WARPS = 8, 64, 2  # rows of a program of count and write_kernel, entries of each at a time
PARTS = 256  # programs whose counts write_kernel adds at a time


@triton.jit
def redo_batch(counters_ptr, capacity):
    """Whether the pool overflowed or a row failed, and so the chunk has been done again in float32."""
    return (tl.load(counters_ptr) > capacity) | (tl.load(counters_ptr + 1) > 0)


# --- digits ----------------------------------------------------------------------------------------------------------


@triton.jit
def add_digit(counts, histogram_ptr, found_ptr, prefix, wanted, SHIFT: tl.constexpr, LAST: tl.constexpr):
    """Adds a program's counts [256] of a digit; the last to come writes found = (key so far, wanted among its equals).

    LAST: no digit follows, and of a key of 0 none is wanted.
    """
    o_bin = tl.arange(0, 256)
    tl.atomic_add(histogram_ptr + o_bin, counts, mask=counts > 0, sem="relaxed")
    tl.debug_barrier()  # the whole program's additions come before its tick
    if tl.atomic_add(histogram_ptr + 256, 1, sem="acq_rel") == tl.num_programs(0) - 1:
        digit, wanted = digit_where(tl.load(histogram_ptr + o_bin, volatile=True), wanted)
        key = prefix | (digit << SHIFT)
        if LAST:
            wanted = tl.where(key > 0, wanted, 0)
        tl.store(found_ptr, key)
        tl.store(found_ptr + 1, wanted)


@triton.jit
def found_before(found_ptr, n, FIRST: tl.constexpr):
    """(key so far, how many are still wanted among those that begin like it)."""
    prefix, wanted = 0, n
    if FIRST == 0:
        prefix, wanted = tl.load(found_ptr), tl.load(found_ptr + 1)
    return prefix, wanted


@triton.jit
def histogram_of(keys, prefix, SHIFT: tl.constexpr, BITS: tl.constexpr, FIRST: tl.constexpr):
    """How often each digit of BITS bits at SHIFT occurs among positive keys that begin like the prefix."""
    match = keys > 0
    if FIRST == 0:
        match = match & ((keys >> (SHIFT + BITS)) == (prefix >> (SHIFT + BITS)))
    return tl.histogram((keys >> SHIFT) & ((1 << BITS) - 1), 256, mask=match)


@triton.jit(do_not_specialize=["n", "n_rows"])
def bound_digit_kernel(
    maxima_ptr,
    factors_ptr,
    norm_ptr,
    error_ptr,
    inverse_ptr,
    histogram_ptr,
    found_ptr,
    n,
    n_rows,
    n_groups,
    SHIFT: tl.constexpr,
    FIRST: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """The digit at SHIFT of the n-th largest of the groups' lower bounds."""
    prefix, wanted = found_before(found_ptr, n, FIRST)
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    o_g = tl.arange(0, BLOCK_G)[None, :]
    m_g, inside = o_g < n_groups, row < n_rows
    row = tl.minimum(row, n_rows - 1)
    v, slack = slack_of(maxima_ptr, factors_ptr, norm_ptr, error_ptr, inverse_ptr, row, o_g, m_g, n_groups)
    lower = v - tl.abs(v) * ROUNDING - slack
    keys = tl.where(m_g & inside & (lower > 0), lower.to(tl.int32, bitcast=True), 0)
    counts = histogram_of(tl.reshape(keys, [ROWS * BLOCK_G]), prefix, SHIFT, 8, FIRST)
    add_digit(counts, histogram_ptr, found_ptr, prefix, wanted, SHIFT, False)


@triton.jit
def counted_digits(
    values_ptr, n_values, prefix, SHIFT: tl.constexpr, BITS: tl.constexpr, FIRST: tl.constexpr, BLOCK: tl.constexpr
):
    """A program's share of histogram_of all values' keys."""
    counts = tl.zeros([256], dtype=tl.int32)
    start = tl.program_id(0).to(tl.int64) * BLOCK
    for p in range(start, n_values, tl.num_programs(0) * BLOCK):
        o = p + tl.arange(0, BLOCK)
        keys = value_keys(tl.load(values_ptr + o, mask=o < n_values, other=0.0))
        counts += histogram_of(keys, prefix, SHIFT, BITS, FIRST)
    return counts


@triton.jit(do_not_specialize=["capacity", "n", "n_z"])
def digit_kernel(
    value_ptr,
    z_ptr,
    counters_ptr,
    histogram_ptr,
    found_ptr,
    capacity,
    n,
    n_z,
    SHIFT: tl.constexpr,
    BITS: tl.constexpr,
    FIRST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The digit at SHIFT of the n-th largest key of the candidates (of all latents where the chunk was done again)."""
    prefix, wanted = found_before(found_ptr, n, FIRST)
    if redo_batch(counters_ptr, capacity):
        counts = counted_digits(z_ptr, n_z, prefix, SHIFT, BITS, FIRST, BLOCK)
    else:
        counts = counted_digits(value_ptr, tl.load(counters_ptr), prefix, SHIFT, BITS, FIRST, BLOCK)
    add_digit(counts, histogram_ptr, found_ptr, prefix, wanted, SHIFT, SHIFT == 0)


# --- rows ------------------------------------------------------------------------------------------------------------


@triton.jit
def rows_of(base_ptr, count_ptr, n_rows, d_sae, redo, ROWS: tl.constexpr):
    """(rows, whether they exist, where their values begin, how many) of a program; redo: of z, else of the pool."""
    o_r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    m_r = o_r < n_rows
    base, count = tl.load(base_ptr + o_r, mask=m_r, other=0), tl.load(count_ptr + o_r, mask=m_r, other=0)
    starts = tl.where(redo, o_r.to(tl.int64) * d_sae, base.to(tl.int64))
    return o_r, m_r, starts, tl.where(m_r, tl.where(redo, d_sae, count), 0)


@triton.jit
def load_keys(values_ptr, starts, sizes, first, BLOCK: tl.constexpr):
    """(values, keys [ROWS, BLOCK], places) of the next BLOCK entries of every row; keys of 0 behind its end."""
    o = first + tl.arange(0, BLOCK)[None, :]
    z = tl.load(values_ptr + starts[:, None] + o, mask=o < sizes[:, None], other=0.0)
    return z, value_keys(z), o


@triton.jit
def counts_of(values_ptr, starts, sizes, key, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """(above, equal) int32 [ROWS]: entries above the key and equal to it."""
    above, equal = tl.zeros([ROWS], dtype=tl.int32), tl.zeros([ROWS], dtype=tl.int32)
    for first in range(0, tl.max(sizes, axis=0), BLOCK):
        _, keys, _ = load_keys(values_ptr, starts, sizes, first, BLOCK)
        above += tl.sum((keys > key).to(tl.int32), axis=1)
        equal += tl.sum(((keys == key) & (keys > 0)).to(tl.int32), axis=1)
    return above, equal


@triton.jit(do_not_specialize=["capacity", "n_rows"])
def count_kernel(
    value_ptr,
    latent_ptr,
    base_ptr,
    count_ptr,
    counters_ptr,
    capacity,
    z_ptr,
    found_ptr,
    above_ptr,
    equal_ptr,
    parts_ptr,
    n_rows,
    d_sae,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """above, equal [R]; parts [2, programs]: their sums over a program's rows."""
    key, redo = tl.load(found_ptr), redo_batch(counters_ptr, capacity)
    o_r, m_r, starts, sizes = rows_of(base_ptr, count_ptr, n_rows, d_sae, redo, ROWS)
    if redo:
        above, equal = counts_of(z_ptr, starts, sizes, key, ROWS, BLOCK)
    else:
        above, equal = counts_of(value_ptr, starts, sizes, key, ROWS, BLOCK)
    tl.store(above_ptr + o_r, above, mask=m_r)
    tl.store(equal_ptr + o_r, equal, mask=m_r)
    tl.store(parts_ptr + tl.program_id(0), tl.sum(above, axis=0))
    tl.store(parts_ptr + tl.num_programs(0) + tl.program_id(0), tl.sum(equal, axis=0))


@triton.jit
def summed_parts(parts_ptr, PARTS: tl.constexpr):
    """(sum before this program, sum of all), int64, of a number of every program."""
    before, total = tl.zeros([PARTS], dtype=tl.int64), tl.zeros([PARTS], dtype=tl.int64)
    for first in range(0, tl.num_programs(0), PARTS):
        o_p = first + tl.arange(0, PARTS)
        part = tl.load(parts_ptr + o_p, mask=o_p < tl.num_programs(0), other=0).to(tl.int64)
        before += tl.where(o_p < tl.program_id(0), part, 0)
        total += part
    return tl.sum(before, axis=0), tl.sum(total, axis=0)


@triton.jit
def write_kept(
    values_ptr,
    latent_ptr,
    starts,
    sizes,
    key,
    left,
    slots,
    acts_ptr,
    latents_ptr,
    POOL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Rows' kept values and latents from their slots on. left [ROWS]: how many equal to the key are still taken.

    POOL: latents are listed, else a value's place is its latent.
    """
    for first in range(0, tl.max(sizes, axis=0), BLOCK):
        z, keys, o = load_keys(values_ptr, starts, sizes, first, BLOCK)
        equal = ((keys == key) & (keys > 0)).to(tl.int32)
        kept = (keys > key) | ((equal > 0) & (tl.cumsum(equal, axis=1) <= left[:, None]))
        places = slots[:, None] + tl.cumsum(kept.to(tl.int32), axis=1) - 1
        tl.store(acts_ptr + places, z, mask=kept)
        if POOL:
            latents = tl.load(latent_ptr + starts[:, None] + o, mask=kept, other=0)
            tl.store(latents_ptr + places, latents.to(tl.int64), mask=kept)
        else:
            tl.store(latents_ptr + places, o.to(tl.int64) + tl.zeros_like(places), mask=kept)
        left -= tl.sum(equal, axis=1)
        slots += tl.sum(kept.to(tl.int32), axis=1)


@triton.jit(do_not_specialize=["capacity", "n_rows", "n_places"])
def write_kernel(
    value_ptr,
    latent_ptr,
    base_ptr,
    count_ptr,
    counters_ptr,
    capacity,
    z_ptr,
    found_ptr,
    above_ptr,
    equal_ptr,
    parts_ptr,
    row_offsets_ptr,
    acts_ptr,
    latents_ptr,
    n_rows,
    n_places,
    d_sae,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
):
    """row_offsets [R + 1], acts and latents [n_places] of what is kept; zeros behind the last."""
    key, wanted, redo = tl.load(found_ptr), tl.load(found_ptr + 1).to(tl.int64), redo_batch(counters_ptr, capacity)
    o_r, m_r, starts, sizes = rows_of(base_ptr, count_ptr, n_rows, d_sae, redo, ROWS)
    above = tl.load(above_ptr + o_r, mask=m_r, other=0).to(tl.int64)
    equal = tl.load(equal_ptr + o_r, mask=m_r, other=0).to(tl.int64)
    above_before, all_above = summed_parts(parts_ptr, PARTS)
    equal_before, all_equal = summed_parts(parts_ptr + tl.num_programs(0), PARTS)
    before = equal_before + tl.cumsum(equal, axis=0) - equal
    slots = above_before + tl.cumsum(above, axis=0) - above + tl.minimum(before, wanted)
    left = tl.maximum(wanted - before, 0).to(tl.int32)
    n_kept = all_above + tl.minimum(all_equal, wanted)
    tl.store(row_offsets_ptr + o_r, slots, mask=m_r)
    tl.store(row_offsets_ptr + n_rows, n_kept, mask=tl.program_id(0) == 0)
    if redo:
        write_kept(z_ptr, latent_ptr, starts, sizes, key, left, slots, acts_ptr, latents_ptr, False, BLOCK)
    else:
        write_kept(value_ptr, latent_ptr, starts, sizes, key, left, slots, acts_ptr, latents_ptr, True, BLOCK)
    for first in range(n_kept + tl.program_id(0) * PARTS, n_places, tl.num_programs(0) * PARTS):
        o = first + tl.arange(0, PARTS)
        tl.store(acts_ptr + o, tl.zeros([PARTS], dtype=tl.float32), mask=o < n_places)
        tl.store(latents_ptr + o, tl.zeros([PARTS], dtype=tl.int64), mask=o < n_places)


# --- launch wrappers -------------------------------------------------------------------------------------------------


def split_integers(integers: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """N_INTEGERS zeros as: counters of L's digits, counters of the key's, found of L, and of the key."""
    bound, key = len(BOUND_SHIFTS) * COUNTERS, len(KEY_SHIFTS) * COUNTERS
    return tuple(integers.split([bound, key, 4, 4]))


def launch_batch_bound(screen: Screen, n: int, counters: Tensor, found: Tensor) -> None:
    """Writes into found a key of which at least n candidates of the chunk are at or above, or 0. counters: zeros."""
    n_rows, n_groups = screen.maxima_RG.shape
    block = triton.next_power_of_2(n_groups)
    rows = max(BOUND_KEYS // block, 1)
    for shift, histogram in zip(BOUND_SHIFTS, counters.split(COUNTERS)):
        bound_digit_kernel[(triton.cdiv(n_rows, rows),)](
            **screen.bound_args(),
            histogram_ptr=histogram,
            found_ptr=found,
            n=n,
            n_rows=n_rows,
            n_groups=n_groups,
            SHIFT=shift,
            FIRST=shift == BOUND_SHIFTS[0],
            ROWS=rows,
            BLOCK_G=block,
            num_warps=min(max(rows * block // 512, 4), 16),
        )


def launch_nth_key(screen: Screen, pool: Pool, n: int, counters: Tensor, found: Tensor) -> None:
    """Writes into found the n-th largest key of the chunk (0: fewer are positive) and how many equal ones are kept."""
    for shift, histogram in zip(KEY_SHIFTS, counters.split(COUNTERS)):
        digit_kernel[(multiprocessors(found.device),)](
            pool.value_M,
            screen.z_RS,
            pool.counters,
            histogram,
            found,
            pool.capacity,
            n,
            screen.z_RS.numel(),
            SHIFT=shift,
            BITS=8 if shift > 0 else 7,
            FIRST=shift == KEY_SHIFTS[0],
            BLOCK=1024,
        )


class Counts(NamedTuple):
    """Entries of every row above the key and equal to it, int32 [R]; their sums by program of write_kernel [2, P]."""

    above_R: Tensor
    equal_R: Tensor
    parts_2P: Tensor


def _rows_args(screen: Screen, pool: Pool, found: Tensor, counts: Counts) -> dict[str, Any]:
    arrays = {"above_ptr": counts.above_R, "equal_ptr": counts.equal_R, "parts_ptr": counts.parts_2P}
    sizes = {"n_rows": len(screen.x_RD), "d_sae": screen.d_sae, "ROWS": ROWS, "BLOCK": BLOCK, "num_warps": NUM_WARPS}
    return pool.entry_args() | {"z_ptr": screen.z_RS, "found_ptr": found} | arrays | sizes


def launch_counts(screen: Screen, pool: Pool, found: Tensor) -> Counts:
    """How many entries every row has above found's key and equal to it."""
    n_rows, device = len(screen.x_RD), found.device
    n_programs = triton.cdiv(n_rows, ROWS)
    integers = torch.empty(2 * (n_rows + n_programs), dtype=torch.int32, device=device)
    above_R, equal_R, parts = integers.split([n_rows, n_rows, 2 * n_programs])
    counts = Counts(above_R, equal_R, parts.view(2, n_programs))
    count_kernel[(n_programs,)](**_rows_args(screen, pool, found, counts))
    return counts


def launch_write(
    screen: Screen, pool: Pool, found: Tensor, counts: Counts, acts_M: Tensor, latents_M: Tensor
) -> Tensor:
    """Writes what is kept, in CSR order, and zeros behind it; returns row_offsets int64 [R + 1]."""
    row_offsets = torch.empty(len(screen.x_RD) + 1, dtype=torch.int64, device=found.device)
    write_kernel[(counts.parts_2P.shape[1],)](
        **_rows_args(screen, pool, found, counts),
        row_offsets_ptr=row_offsets,
        acts_ptr=acts_M,
        latents_ptr=latents_M,
        n_places=len(acts_M),
        PARTS=PARTS,
    )
    return row_offsets
