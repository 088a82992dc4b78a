"""Triton kernels that find the candidates of a screened chunk and compute them in float32.

    L          the k-th largest lower bound of a row's groups, or of the batch's, or a threshold; at least 0
    pool       every latent whose upper bound reaches L, row by row: (row, latent)          list_kernel
    values     <x[row], W[latent]> + b[latent] of every entry                               pool_dots_kernel

0 is a bound too: a row with fewer than k positive lower bounds takes every latent whose upper bound is above 0.

A row claims its stretch of the pool with one atomic addition, so the order of stretches changes from run to run, and
nothing else does. What has to be done again in float32 does not depend on that order either: a row that is not finite
or has more than `most` candidates claims nothing and is listed in `failed`; if all claims together exceed the
capacity, the whole chunk is done again.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .topk_encode_screen_triton import LIMIT, ROUNDING, Screen, multiprocessors, slack_of


@dataclass(frozen=True)
class Pool:
    """Candidates of a chunk: of row r those from base_R[r] on, count_R[r] of them, latents ascending; -1: r failed.

    counters: int64 [2], entries claimed and rows failed; the latter are listed in failed_R.
    """

    row_M: Tensor
    latent_M: Tensor
    value_M: Tensor
    base_R: Tensor
    count_R: Tensor
    failed_R: Tensor
    counters: Tensor

    @staticmethod
    def empty(capacity: int, n_rows: int, counters: Tensor) -> "Pool":
        """counters: zeros."""
        integers = torch.empty(2 * capacity + 3 * n_rows, dtype=torch.int32, device=counters.device)
        row_M, latent_M, base_R, count_R, failed_R = integers.split([capacity, capacity, n_rows, n_rows, n_rows])
        value_M = torch.empty(capacity, dtype=torch.float32, device=counters.device)
        return Pool(row_M, latent_M, value_M, base_R, count_R, failed_R, counters)

    @property
    def capacity(self) -> int:
        return len(self.value_M)

    def entry_args(self) -> dict[str, Any]:
        """What selections read."""
        return {
            "value_ptr": self.value_M,
            "latent_ptr": self.latent_M,
            "base_ptr": self.base_R,
            "count_ptr": self.count_R,
            "counters_ptr": self.counters,
            "capacity": self.capacity,
        }


@triton.jit
def kth_largest(keys, k, BITS: tl.constexpr):
    """The k-th largest of a 1-D block of keys of so many bits; 0 if fewer than k are positive."""
    found = 0
    for step in range(BITS):
        trial = found | (1 << (BITS - 1 - step))
        found = tl.where(tl.sum((keys >= trial).to(tl.int32), axis=0) >= k, trial, found)
    return found


@triton.jit
def candidates_of(
    pre_ptr,
    groups_ptr,
    cut_ptr,
    row,
    first,
    n_chosen,
    scale,
    n_groups,
    d_sae,
    width_sae,
    GROUP: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """(candidate? int32 [G, GROUP], latent) of the next BLOCK_G chosen groups of a row."""
    o_g = first + tl.arange(0, BLOCK_G)
    m_g = o_g < n_chosen
    group = tl.load(groups_ptr + row * n_groups + o_g, mask=m_g, other=0)
    cut = tl.load(cut_ptr + row * n_groups + o_g, mask=m_g, other=0.0)
    latent = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    mask = m_g[:, None] & (latent < d_sae)
    v = tl.load(pre_ptr + row * width_sae + latent, mask=mask, other=0.0).to(tl.float32) * scale
    return (mask & (v + tl.abs(v) * ROUNDING >= cut[:, None])).to(tl.int32), latent


@triton.jit
def append(row, base, candidate, latent, pool_row_ptr, pool_latent_ptr):
    """Candidates into the pool from base on, latents ascending; returns how many."""
    per_group = tl.sum(candidate, axis=1)
    slot = base + (tl.cumsum(per_group, axis=0) - per_group)[:, None] + tl.cumsum(candidate, axis=1) - 1
    tl.store(pool_row_ptr + slot, tl.zeros_like(latent) + row.to(tl.int32), mask=candidate > 0)
    tl.store(pool_latent_ptr + slot, latent, mask=candidate > 0)
    return tl.sum(per_group, axis=0)


@triton.jit(do_not_specialize=["k", "most", "capacity"])
def list_kernel(
    pre_ptr,
    maxima_ptr,
    factors_ptr,
    norm_ptr,
    error_ptr,
    inverse_ptr,
    bound_ptr,
    groups_ptr,
    cut_ptr,
    pool_row_ptr,
    pool_latent_ptr,
    base_ptr,
    count_ptr,
    failed_ptr,
    counters_ptr,
    n_groups,
    d_sae,
    width_sae,
    k,
    most,
    capacity,
    BOUNDED: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """All latents of a row that may be kept, into the pool. BOUNDED: L is at bound_ptr (a key), else the row's own."""
    row = tl.program_id(0).to(tl.int64)
    o_a = tl.arange(0, BLOCK_A)
    m_a = o_a < n_groups
    v, slack = slack_of(maxima_ptr, factors_ptr, norm_ptr, error_ptr, inverse_ptr, row, o_a, m_a, n_groups)
    scale = 1.0 / tl.load(inverse_ptr + row)
    sound = (tl.abs(v) + slack < scale * LIMIT) | (m_a == 0)  # NaN compares false
    is_sound = tl.sum(sound.to(tl.int32), axis=0) == BLOCK_A
    if BOUNDED:
        L = tl.load(bound_ptr).to(tl.float32, bitcast=True)
    else:
        lower = v - tl.abs(v) * ROUNDING - slack
        keys = tl.where(m_a & (lower > 0), lower.to(tl.int32, bitcast=True) >> 11, 0)
        L = (kth_largest(keys, k, 20) << 11).to(tl.float32, bitcast=True)  # cut to 20 bits: lower, if anything
    cut = L - slack
    chosen = m_a & (v + tl.abs(v) * ROUNDING >= cut)
    n_chosen = tl.sum(chosen.to(tl.int32), axis=0)
    slot = tl.cumsum(chosen.to(tl.int32), axis=0) - 1
    tl.store(groups_ptr + row * n_groups + slot, o_a, mask=chosen)
    tl.store(cut_ptr + row * n_groups + slot, cut, mask=chosen)
    tl.debug_barrier()  # read by other threads than wrote it
    candidate, latent = candidates_of(
        pre_ptr, groups_ptr, cut_ptr, row, 0, n_chosen, scale, n_groups, d_sae, width_sae, GROUP, BLOCK_G
    )
    total = tl.sum(tl.sum(candidate, axis=1), axis=0)
    for first in range(BLOCK_G, n_chosen, BLOCK_G):
        more, _ = candidates_of(
            pre_ptr, groups_ptr, cut_ptr, row, first, n_chosen, scale, n_groups, d_sae, width_sae, GROUP, BLOCK_G
        )
        total += tl.sum(tl.sum(more, axis=1), axis=0)
    fits = is_sound & (total <= most)
    total = tl.where(fits, total, 0)
    claimed = tl.atomic_add(counters_ptr, total.to(tl.int64), sem="relaxed")
    room = claimed + total <= capacity
    base = tl.where(room, claimed, 0).to(tl.int32)
    tl.store(base_ptr + row, base)
    tl.store(count_ptr + row, tl.where(fits & room, total, -1))
    if fits & room:
        at = base + append(row, base, candidate, latent, pool_row_ptr, pool_latent_ptr)
        for first in range(BLOCK_G, n_chosen, BLOCK_G):
            more, which = candidates_of(
                pre_ptr, groups_ptr, cut_ptr, row, first, n_chosen, scale, n_groups, d_sae, width_sae, GROUP, BLOCK_G
            )
            at += append(row, at, more, which, pool_row_ptr, pool_latent_ptr)
    if fits == 0:
        place = tl.atomic_add(counters_ptr + 1, 1, sem="relaxed")
        tl.store(failed_ptr + place, row.to(tl.int32))


@triton.jit(do_not_specialize=["capacity"])
def pool_dots_kernel(
    pool_row_ptr,
    pool_latent_ptr,
    counters_ptr,
    x_ptr,
    W_ptr,
    b_enc_ptr,
    value_ptr,
    capacity,
    d_in,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """value = <x[row], W[latent]> + b[latent] of every entry, float32 FMA: what decides and is returned.

    A program owns a contiguous stretch, a few rows' candidates: x then comes from L1. A pool that overflowed is left.
    """
    claimed = tl.load(counters_ptr)
    n = tl.where(claimed <= capacity, claimed, 0).to(tl.int32)
    share = tl.cdiv(tl.cdiv(n, tl.num_programs(0)), BLOCK_P) * BLOCK_P
    end = tl.minimum((tl.program_id(0) + 1) * share, n)
    for p in range(tl.program_id(0) * share, end, BLOCK_P):
        o_p = p + tl.arange(0, BLOCK_P)
        m_p = o_p < end
        row = tl.load(pool_row_ptr + o_p, mask=m_p, other=0).to(tl.int64)
        latent = tl.load(pool_latent_ptr + o_p, mask=m_p, other=0).to(tl.int64)
        acc = tl.zeros([BLOCK_P], dtype=tl.float32)
        for d in range(0, d_in, BLOCK_D):
            o_d = d + tl.arange(0, BLOCK_D)
            mask = m_p[:, None] & (o_d < d_in)[None, :]
            w = tl.load(
                W_ptr + latent[:, None] * d_in + o_d[None, :], mask=mask, other=0.0, eviction_policy="evict_first"
            )
            x = tl.load(x_ptr + row[:, None] * d_in + o_d[None, :], mask=mask, other=0.0)
            acc += tl.sum(w * x, axis=1)
        tl.store(value_ptr + o_p, acc + tl.load(b_enc_ptr + latent, mask=m_p, other=0.0), mask=m_p)


# --- launch wrappers -------------------------------------------------------------------------------------------------


def list_config(n_groups: int, group: int, few: bool) -> dict[str, Any]:
    """Blocks and warps. few: few candidates a row are expected, where one warp is quicker for up to 512 groups.

    Measured on an H200: k 20, 96 groups 26 us instead of 42; with many candidates up to 40 % slower. 1024 groups: two
    warps 55 us, one 60, four 62.
    """
    block = triton.next_power_of_2(n_groups)
    if few and block <= 1024:
        return {"BLOCK_A": block, "BLOCK_G": 512 // group, "num_warps": 1 if block <= 512 else 2}
    return {"BLOCK_A": block, "BLOCK_G": 1024 // group, "num_warps": min(max(block // 256, 4), 16)}


def launch_list(screen: Screen, pool: Pool, k: int, most: int, bound: Tensor | None = None) -> None:
    """Writes the pool's rows and latents. bound: int32 [1], the key of L; else every row finds its own."""
    n_rows, n_groups = screen.maxima_RG.shape
    groups_RG = torch.empty(n_rows, n_groups, dtype=torch.int32, device=screen.maxima_RG.device)
    cut_RG = torch.empty_like(groups_RG, dtype=torch.float32)
    list_kernel[(n_rows,)](
        screen.pre_RP,
        **screen.bound_args(),
        bound_ptr=pool.failed_R if bound is None else bound,
        groups_ptr=groups_RG,
        cut_ptr=cut_RG,
        pool_row_ptr=pool.row_M,
        pool_latent_ptr=pool.latent_M,
        base_ptr=pool.base_R,
        count_ptr=pool.count_R,
        failed_ptr=pool.failed_R,
        counters_ptr=pool.counters,
        n_groups=n_groups,
        d_sae=screen.d_sae,
        width_sae=screen.pre_RP.shape[1],
        k=k,
        most=most,
        capacity=pool.capacity,
        BOUNDED=bound is not None,
        GROUP=screen.group,
        **list_config(n_groups, screen.group, few=bound is None and k <= 64),
    )


def launch_dots(screen: Screen, pool: Pool, W_SD: Tensor, b_enc_S: Tensor) -> None:
    """Writes the pool's values."""
    d_in = W_SD.shape[1]
    pool_dots_kernel[(32 * multiprocessors(W_SD.device),)](
        pool.row_M,
        pool.latent_M,
        pool.counters,
        screen.x_RD,
        W_SD,
        b_enc_S,
        pool.value_M,
        pool.capacity,
        d_in,
        BLOCK_P=1,
        BLOCK_D=min(1024, triton.next_power_of_2(d_in)),
        num_warps=1,
    )
