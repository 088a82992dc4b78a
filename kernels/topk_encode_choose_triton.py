"""Triton kernels that choose among the candidates of a screened chunk: top k of a row, or what exceeds a key.

    a row      : its k largest positive candidates; zeros fill it                            topk_of_pool_kernel
    the batch  : the n-th largest key by four digits                                         digit_kernel, key_kernel
    both       : entries above the key, and the first so many equal to it, in CSR order      count, offsets, write

Filling: of a row with n < k kept entries the lowest k - n free latents get zeros. A kept entry of latent s with r kept
before it has s - r free latents below it, so its place is r + min(k - n, s - r); and the place of a filled latent is
that latent, since every latent below it is either kept or filled. So places 0..k hold zeros at latents 0..k first.

Batch kernels read float32 pre-activations z [R, S] instead of the pool if the chunk had to be done again.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .topk_encode_list_triton import Pool
from .topk_encode_screen_triton import ROUNDING, Screen, multiprocessors, slack_of

RANKED = 64  # candidates that one block compares with one another
KEY_BITS = (23, 15, 7, 0)  # lowest bit of the digits of a 31-bit key, 8 bits each but the last
NAN_KEY = tl.constexpr(0x7FC00000)


@triton.jit
def value_keys(z):
    """int32 that orders values as they compete: NaN largest, what is not positive 0."""
    return tl.where(z != z, NAN_KEY, tl.where(z > 0, z.to(tl.int32, bitcast=True), 0))


@triton.jit
def digit_where(counts, wanted):
    """(digit where 256 counts, added from above, reach wanted; how many are still to be taken at it).

    0 if they never do: everything above it is taken.
    """
    o_bin = tl.arange(0, 256)
    from_above = tl.cumsum(counts, axis=0, reverse=True)
    digit = tl.maximum(tl.sum((from_above >= wanted).to(tl.int32), axis=0) - 1, 0)
    return digit, wanted - tl.sum(tl.where(o_bin > digit, counts, 0), axis=0)


@triton.jit
def redo_batch(counters_ptr, capacity):
    """Whether the pool overflowed or a row failed, and so the chunk has been done again in float32."""
    return (tl.load(counters_ptr) > capacity) | (tl.load(counters_ptr + 1) > 0)


# --- top k of every row ----------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["capacity", "k"])
def topk_of_pool_kernel(
    value_ptr,
    latent_ptr,
    base_ptr,
    count_ptr,
    counters_ptr,
    acts_ptr,
    latents_ptr,
    capacity,
    k,
    RANKED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """acts, latents [R, k]. RANKED: up to 64 candidates are ranked by comparisons; else bit by bit over the stretch."""
    row = tl.program_id(0).to(tl.int64)
    base, n = tl.load(base_ptr + row), tl.load(count_ptr + row)
    p_z, p_s = value_ptr + base, latent_ptr + base
    p_acts, p_latents = acts_ptr + row * k, latents_ptr + row * k
    if (n >= 0) & (tl.load(counters_ptr) <= capacity):
        o_c = tl.arange(0, 64)
        o_b = tl.arange(0, BLOCK)
        if RANKED & (n <= 64):
            z = tl.load(p_z + o_c, mask=o_c < n, other=-1.0)
            s = tl.load(p_s + o_c, mask=o_c < n, other=0)
            before = (z[None, :] > z[:, None]) | ((z[None, :] == z[:, None]) & (o_c[None, :] < o_c[:, None]))
            kept = (z > 0) & (tl.sum(before.to(tl.int32), axis=1) < k)
            n_kept = tl.sum(kept.to(tl.int32), axis=0)
            if n_kept < k:
                for place in range(0, k, 64):
                    tl.store(p_acts + place + o_c, tl.zeros([64], tl.float32), mask=place + o_c < k)
                    tl.store(p_latents + place + o_c, (place + o_c).to(tl.int64), mask=place + o_c < k)
                tl.debug_barrier()  # kept entries overwrite
            rank = tl.cumsum(kept.to(tl.int32), axis=0) - 1
            slot = rank + tl.minimum(k - n_kept, s - rank)
            tl.store(p_acts + slot, z, mask=kept)
            tl.store(p_latents + slot, s.to(tl.int64), mask=kept)
        else:
            keys_0 = value_keys(tl.load(p_z + o_b, mask=o_b < n, other=0.0))  # nearly always all: kept in registers
            threshold = 0
            for step in range(31):
                trial = threshold | (1 << (30 - step))
                n_above = tl.sum((keys_0 >= trial).to(tl.int32), axis=0)
                for p in range(BLOCK, n, BLOCK):
                    z_b = tl.load(p_z + p + o_b, mask=p + o_b < n, other=0.0)
                    n_above += tl.sum((value_keys(z_b) >= trial).to(tl.int32), axis=0)
                threshold = tl.where(n_above >= k, trial, threshold)
            above = tl.sum((keys_0 > threshold).to(tl.int32), axis=0)
            for p in range(BLOCK, n, BLOCK):
                z_b = tl.load(p_z + p + o_b, mask=p + o_b < n, other=0.0)
                above += tl.sum((value_keys(z_b) > threshold).to(tl.int32), axis=0)
            wanted = tl.where(threshold > 0, k - above, 0)
            n_filled = k - above - wanted
            if n_filled > 0:
                for place in range(0, k, BLOCK):
                    tl.store(p_acts + place + o_b, tl.zeros([BLOCK], tl.float32), mask=place + o_b < k)
                    tl.store(p_latents + place + o_b, (place + o_b).to(tl.int64), mask=place + o_b < k)
                tl.debug_barrier()
            equal_before, written = 0, 0
            for p in range(0, n, BLOCK):
                m_b = p + o_b < n
                z_b = tl.load(p_z + p + o_b, mask=m_b, other=0.0)
                s_b = tl.load(p_s + p + o_b, mask=m_b, other=0)
                keys = value_keys(z_b)
                equal = ((keys == threshold) & (keys > 0)).to(tl.int32)
                keep = (keys > threshold) | ((equal > 0) & (equal_before + tl.cumsum(equal, axis=0) <= wanted))
                rank_b = written + tl.cumsum(keep.to(tl.int32), axis=0) - 1
                slot_b = rank_b + tl.minimum(n_filled, s_b - rank_b)
                tl.store(p_acts + slot_b, z_b, mask=keep)
                tl.store(p_latents + slot_b, s_b.to(tl.int64), mask=keep)
                equal_before += tl.sum(equal, axis=0)
                written += tl.sum(keep.to(tl.int32), axis=0)


def launch_topk_of_pool(pool: Pool, acts_RK: Tensor, latents_RK: Tensor) -> None:
    """Writes the codes of all rows that did not fail."""
    n_rows, k = acts_RK.shape
    small = k <= RANKED and torch.version.hip is None  # AMD's compiler spills masks there
    block = 256 if small else max(256, triton.next_power_of_2(k + k // 4))
    topk_of_pool_kernel[(n_rows,)](
        **{name: value for name, value in pool.entry_args().items() if name != "capacity"},
        acts_ptr=acts_RK,
        latents_ptr=latents_RK,
        capacity=pool.capacity,
        k=k,
        RANKED=small,
        BLOCK=block,
        num_warps=block // 256,
    )


# --- the batch's bound -----------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["n", "n_rows"])
def bound_digit_kernel(
    maxima_ptr,
    factors_ptr,
    norm_ptr,
    error_ptr,
    inverse_ptr,
    histogram_ptr,
    n,
    n_rows,
    n_groups,
    SECOND: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """Histogram of the highest 8 bits of the groups' lower bounds, or of the next 8 of those at the n-th largest."""
    o_g = tl.arange(0, BLOCK_G)
    digit = 0
    if SECOND:
        digit, _ = digit_where(tl.load(histogram_ptr + tl.arange(0, 256)), n)
    counts = tl.zeros([256], dtype=tl.int32)
    for r in range(ROWS):
        row = tl.program_id(0).to(tl.int64) * ROWS + r
        m_g = (o_g < n_groups) & (row < n_rows)
        row = tl.minimum(row, n_rows - 1)
        v, slack = slack_of(maxima_ptr, factors_ptr, norm_ptr, error_ptr, inverse_ptr, row, o_g, m_g, n_groups)
        lower = v - tl.abs(v) * ROUNDING - slack
        keys = tl.where(m_g & (lower > 0), lower.to(tl.int32, bitcast=True), 0)
        if SECOND:
            counts += tl.histogram((keys >> 15) & 255, 256, mask=(keys > 0) & ((keys >> 23) == digit))
        else:
            counts += tl.histogram(keys >> 23, 256, mask=keys > 0)
    p_histogram = histogram_ptr + (256 if SECOND else 0) + tl.arange(0, 256)
    tl.atomic_add(p_histogram, counts, mask=counts > 0, sem="relaxed")


@triton.jit(do_not_specialize=["n"])
def key_kernel(histogram_ptr, found_ptr, n, DIGITS: tl.constexpr):
    """found = (the n-th largest key, its first DIGITS digits; how many equal to it are taken, 0 if the key is 0)."""
    key, wanted = 0, n
    o_bin = tl.arange(0, 256)
    for i in tl.static_range(DIGITS):
        digit, wanted = digit_where(tl.load(histogram_ptr + 256 * i + o_bin), wanted)
        key |= digit << (23 - 8 * i if i < 3 else 0)
    tl.store(found_ptr, key)
    tl.store(found_ptr + 1, tl.where(key > 0, wanted, 0))


def launch_batch_bound(screen: Screen, n: int, histogram_2: Tensor, found_2: Tensor) -> None:
    """Writes into found a key of which at least n candidates of the chunk are at or above, or 0. histogram: zeros."""
    n_rows, n_groups = screen.maxima_RG.shape
    block = triton.next_power_of_2(n_groups)
    rows = min(max(4096 // block, 1), 16)
    for second in (False, True):
        bound_digit_kernel[(triton.cdiv(n_rows, rows),)](
            **screen.bound_args(),
            histogram_ptr=histogram_2,
            n=n,
            n_rows=n_rows,
            n_groups=n_groups,
            SECOND=second,
            ROWS=rows,
            BLOCK_G=block,
            num_warps=min(max(block // 256, 4), 16),
        )
    key_kernel[(1,)](histogram_2, found_2, n, DIGITS=2)


# --- the n largest of a batch, or all above a threshold --------------------------------------------------------------


@triton.jit
def add_digits(values_ptr, n_values, prefix, counts, FIRST: tl.constexpr, SHIFT: tl.constexpr, BLOCK: tl.constexpr):
    """counts of the digit at SHIFT of all keys whose higher digits are the prefix's."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    for p in range(start, n_values, tl.num_programs(0) * BLOCK):
        o = p + tl.arange(0, BLOCK)
        keys = value_keys(tl.load(values_ptr + o, mask=o < n_values, other=0.0))
        match = keys > 0
        if FIRST == 0:
            match = match & (
                (keys >> (SHIFT + (8 if SHIFT > 0 else 7))) == (prefix >> (SHIFT + (8 if SHIFT > 0 else 7)))
            )
        counts += tl.histogram((keys >> SHIFT) & (255 if SHIFT > 0 else 127), 256, mask=match)
    return counts


@triton.jit(do_not_specialize=["capacity", "n", "n_z"])
def digit_kernel(
    value_ptr,
    z_ptr,
    counters_ptr,
    histogram_ptr,
    capacity,
    n,
    n_z,
    PASS: tl.constexpr,
    SHIFT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Histogram of the PASS-th digit of the candidates' keys (of all keys where the chunk was done again)."""
    prefix, wanted = 0, n
    for i in tl.static_range(PASS):
        digit, wanted = digit_where(tl.load(histogram_ptr + 256 * i + tl.arange(0, 256)), wanted)
        prefix |= digit << (23 - 8 * i)
    counts = tl.zeros([256], dtype=tl.int32)
    if redo_batch(counters_ptr, capacity):
        counts = add_digits(z_ptr, n_z, prefix, counts, PASS == 0, SHIFT, BLOCK)
    else:
        counts = add_digits(value_ptr, tl.load(counters_ptr), prefix, counts, PASS == 0, SHIFT, BLOCK)
    tl.atomic_add(histogram_ptr + 256 * PASS + tl.arange(0, 256), counts, mask=counts > 0, sem="relaxed")


@triton.jit
def count_of(values_ptr, n_values, key, BLOCK: tl.constexpr):
    """(above, equal): values of a row above the key and equal to it."""
    above, equal = 0, 0
    for p in range(0, n_values, BLOCK):
        o = p + tl.arange(0, BLOCK)
        keys = value_keys(tl.load(values_ptr + o, mask=o < n_values, other=0.0))
        above += tl.sum((keys > key).to(tl.int32), axis=0)
        equal += tl.sum(((keys == key) & (keys > 0)).to(tl.int32), axis=0)
    return above, equal


@triton.jit(do_not_specialize=["capacity"])
def count_kernel(
    value_ptr,
    latent_ptr,
    base_ptr,
    count_ptr,
    counters_ptr,
    capacity,
    z_ptr,
    d_sae,
    found_ptr,
    above_ptr,
    equal_ptr,
    BLOCK: tl.constexpr,
):
    """above, equal [R]."""
    row = tl.program_id(0).to(tl.int64)
    key = tl.load(found_ptr)
    if redo_batch(counters_ptr, capacity):
        above, equal = count_of(z_ptr + row * d_sae, d_sae, key, BLOCK)
    else:
        above, equal = count_of(value_ptr + tl.load(base_ptr + row), tl.load(count_ptr + row), key, BLOCK)
    tl.store(above_ptr + row, above)
    tl.store(equal_ptr + row, equal)


@triton.jit(do_not_specialize=["n_rows"])
def offsets_kernel(
    above_ptr,
    equal_ptr,
    found_ptr,
    row_offsets_ptr,
    n_rows,
    BLOCK_B: tl.constexpr,
):
    """row_offsets [R + 1] of what is kept; equal becomes the number of equal ones before its row."""
    wanted = tl.load(found_ptr + 1)
    kept_before = tl.zeros([], dtype=tl.int64)
    equal_before = tl.zeros([], dtype=tl.int32)
    tl.store(row_offsets_ptr, kept_before)
    for first in range(0, n_rows, BLOCK_B):
        o_b = first + tl.arange(0, BLOCK_B)
        m_b = o_b < n_rows
        above = tl.load(above_ptr + o_b, mask=m_b, other=0)
        equal = tl.load(equal_ptr + o_b, mask=m_b, other=0)
        before = equal_before + tl.cumsum(equal, axis=0) - equal
        kept = (above + tl.minimum(tl.maximum(wanted - before, 0), equal)).to(tl.int64)
        tl.store(equal_ptr + o_b, before, mask=m_b)
        tl.store(row_offsets_ptr + 1 + o_b, kept_before + tl.cumsum(kept, axis=0), mask=m_b)
        kept_before += tl.sum(kept, axis=0)
        equal_before += tl.sum(equal, axis=0)


@triton.jit
def write_kept(
    values_ptr,
    latent_ptr,
    n_values,
    key,
    wanted,
    slot,
    before,
    acts_ptr,
    latents_ptr,
    POOL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A row's kept values and latents from slot on. POOL: latents are listed, else a value's place is its latent."""
    for p in range(0, n_values, BLOCK):
        o = p + tl.arange(0, BLOCK)
        mask = o < n_values
        z = tl.load(values_ptr + o, mask=mask, other=0.0)
        keys = value_keys(z)
        equal = ((keys == key) & (keys > 0)).to(tl.int32)
        kept = (keys > key) | ((equal > 0) & (before + tl.cumsum(equal, axis=0) <= wanted))
        place = slot + tl.cumsum(kept.to(tl.int32), axis=0) - 1
        latent = o
        if POOL:
            latent = tl.load(latent_ptr + o, mask=mask, other=0)
        tl.store(acts_ptr + place, z, mask=kept)
        tl.store(latents_ptr + place, latent.to(tl.int64), mask=kept)
        before += tl.sum(equal, axis=0)
        slot += tl.sum(kept.to(tl.int32), axis=0)


@triton.jit(do_not_specialize=["capacity"])
def write_kernel(
    value_ptr,
    latent_ptr,
    base_ptr,
    count_ptr,
    counters_ptr,
    capacity,
    z_ptr,
    d_sae,
    found_ptr,
    row_offsets_ptr,
    equal_before_ptr,
    acts_ptr,
    latents_ptr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    key, wanted = tl.load(found_ptr), tl.load(found_ptr + 1)
    slot, before = tl.load(row_offsets_ptr + row), tl.load(equal_before_ptr + row)
    if redo_batch(counters_ptr, capacity):
        write_kept(
            z_ptr + row * d_sae, latent_ptr, d_sae, key, wanted, slot, before, acts_ptr, latents_ptr, False, BLOCK
        )
    else:
        base, n = tl.load(base_ptr + row), tl.load(count_ptr + row)
        write_kept(
            value_ptr + base, latent_ptr + base, n, key, wanted, slot, before, acts_ptr, latents_ptr, True, BLOCK
        )


def launch_nth_key(screen: Screen, pool: Pool, n: int, histogram_4: Tensor, found_2: Tensor) -> None:
    """Writes into found the n-th largest key of the chunk (0: fewer are positive) and how many equal ones are kept."""
    for i, shift in enumerate(KEY_BITS):
        digit_kernel[(multiprocessors(found_2.device),)](
            pool.value_M,
            screen.z_RS,
            pool.counters,
            histogram_4,
            pool.capacity,
            n,
            screen.z_RS.numel(),
            PASS=i,
            SHIFT=shift,
            BLOCK=1024,
        )
    key_kernel[(1,)](histogram_4, found_2, n, DIGITS=4)


def _row_args(screen: Screen, pool: Pool, found_2: Tensor) -> dict[str, Any]:
    block = {"BLOCK": 64, "num_warps": 1}
    return pool.entry_args() | {"z_ptr": screen.z_RS, "d_sae": screen.d_sae, "found_ptr": found_2} | block


def launch_row_offsets(screen: Screen, pool: Pool, found_2: Tensor) -> tuple[Tensor, Tensor]:
    """(row_offsets int64 [R + 1] of what is kept, int32 [R] number of entries equal to the key before a row)."""
    n_rows = len(screen.x_RD)
    above_R, equal_R = torch.empty(2, n_rows, dtype=torch.int32, device=found_2.device)
    row_offsets = torch.empty(n_rows + 1, dtype=torch.int64, device=found_2.device)
    count_kernel[(n_rows,)](**_row_args(screen, pool, found_2), above_ptr=above_R, equal_ptr=equal_R)
    offsets_kernel[(1,)](above_R, equal_R, found_2, row_offsets, n_rows, BLOCK_B=2048, num_warps=16)
    return row_offsets, equal_R


def launch_write(
    screen: Screen,
    pool: Pool,
    found_2: Tensor,
    row_offsets: Tensor,
    equal_before_R: Tensor,
    acts_M: Tensor,
    latents_M: Tensor,
) -> None:
    """Writes what is kept; entries behind the last are left as they are."""
    write_kernel[(len(screen.x_RD),)](
        **_row_args(screen, pool, found_2),
        row_offsets_ptr=row_offsets,
        equal_before_ptr=equal_before_R,
        acts_ptr=acts_M,
        latents_ptr=latents_M,
    )
