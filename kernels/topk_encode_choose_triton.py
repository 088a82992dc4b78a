"""Triton kernel that chooses the top k of every row among its candidates: the largest that are positive, then zeros.

Filling: of a row with n < k kept entries the lowest k - n free latents get zeros. A kept entry of latent s with r kept
before it has s - r free latents below it, so its place is r + min(k - n, s - r); and the place of a filled latent is
that latent, since every latent below it is either kept or filled. So places 0..k hold zeros at latents 0..k first.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .topk_encode_list_triton import Pool

RANKED = 64  # candidates that one block compares with one another
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
