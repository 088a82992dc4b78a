"""Triton kernels that list the dead latents of a step: ascending, in a list of fixed length, the host not asked."""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


@triton.jit(do_not_specialize=["dead_after"])
def count_kernel(idle_ptr, counts_ptr, dead_after, d_sae, BLOCK: tl.constexpr):
    """counts [programs]: latents of a block that have been idle for so many rows."""
    o_s = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    dead = tl.load(idle_ptr + o_s, mask=o_s < d_sae, other=-1) >= dead_after
    tl.store(counts_ptr + tl.program_id(0), tl.sum((dead & (o_s < d_sae)).to(tl.int32), axis=0))


@triton.jit(do_not_specialize=["dead_after", "n_listed"])
def place_kernel(
    idle_ptr,
    counts_ptr,
    latents_ptr,
    slots_ptr,
    number_ptr,
    dead_after,
    d_sae,
    n_listed,
    BLOCK: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    """latents [n_listed], its end d_sae; slots [d_sae]: a latent's place there, or -1; and how many are dead."""
    pid = tl.program_id(0)
    o_p = tl.arange(0, PROGRAMS)
    counts = tl.load(counts_ptr + o_p, mask=o_p < tl.num_programs(0), other=0)
    number = tl.sum(counts, axis=0)
    o_s = pid * BLOCK + tl.arange(0, BLOCK)
    dead = (tl.load(idle_ptr + o_s, mask=o_s < d_sae, other=-1) >= dead_after) & (o_s < d_sae)
    places = tl.sum(tl.where(o_p < pid, counts, 0), axis=0) + tl.cumsum(dead.to(tl.int32), axis=0) - 1
    tl.store(latents_ptr + places, o_s.to(tl.int64), mask=dead & (places < n_listed))
    tl.store(slots_ptr + o_s, tl.where(dead & (places < n_listed), places, -1), mask=o_s < d_sae)
    for first in range(number + pid * BLOCK, n_listed, tl.num_programs(0) * BLOCK):
        o_a = first + tl.arange(0, BLOCK)
        tl.store(latents_ptr + o_a, tl.zeros([BLOCK], tl.int64) + d_sae, mask=o_a < n_listed)
    tl.store(number_ptr, number.to(tl.int64), mask=pid == 0)


def launch_dead_list(idle_S: Tensor, dead_after: int, n_listed: int) -> tuple[Tensor, Tensor, Tensor]:
    """(latents [n_listed] int64, padded with d_sae; how many are dead, 0-d; slots [d_sae] int32 in the list, or -1).

    n_listed: at least as many as are dead.
    """
    d_sae, device = len(idle_S), idle_S.device
    n_programs = triton.cdiv(d_sae, BLOCK)
    counts_P = torch.empty(n_programs, dtype=torch.int32, device=device)
    latents_A = torch.empty(n_listed, dtype=torch.int64, device=device)
    slots_S = torch.empty(d_sae, dtype=torch.int32, device=device)
    number = torch.empty((), dtype=torch.int64, device=device)
    count_kernel[(n_programs,)](idle_S, counts_P, dead_after, d_sae, BLOCK=BLOCK)
    place_kernel[(n_programs,)](
        idle_S,
        counts_P,
        latents_A,
        slots_S,
        number,
        dead_after,
        d_sae,
        n_listed,
        BLOCK=BLOCK,
        PROGRAMS=triton.next_power_of_2(n_programs),
    )
    return latents_A, number, slots_S
