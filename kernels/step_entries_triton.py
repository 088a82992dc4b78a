"""Triton kernels that bring a step's entries into latent order, and sum whole chunks of those of heavy latents.

    keys, order = torch.sort(keys of the latents)    stable: rows ascend within a latent                 key_kernel
    offsets[s] = where latent s begins                                                                  offset_kernel
    acts, dacts, bags, rows = those of the codes, in that order                                         ordered_kernel
    partial[side, c] = sum over chunk c of act * suffix[bag] (decoder) or dact * centred[row] (encoder)   chunk_kernel

Entry positions are cut into chunks of CHUNK; a chunk inside one latent's segment is summed here, so that a latent that
fires on much of the batch does not leave one program walking thousands of rows. `latent_row` adds, for one latent, its
head, its whole chunks' partial sums and its tail: the gradient row, made where it is needed and never written. No
atomics, and the same order of additions every time. docs/kernels.md section 4
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .segment_sum_triton import CHUNK, accumulator
from .step_rows_triton import Rows, whole_row_block

BLOCK_M = 1024  # entries of a program
BLOCK_S = 256  # latents of a program of offset_kernel
CHUNK_STEP = 4  # entries of a chunk whose row loads are in flight together


@triton.jit(do_not_specialize=["n_rows", "n_entries", "n_latents", "shift"])
def key_kernel(
    latents_ptr,
    row_offsets_ptr,
    keys_ptr,
    n_rows,
    n_entries,
    n_latents,
    shift,
    CSR: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """keys = latents - shift; of padding those of the last latent, whose own entries come before it."""
    o = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    m = o < n_entries
    latents = tl.load(latents_ptr + o, mask=m, other=0)
    if CSR:
        latents = tl.where(o < tl.load(row_offsets_ptr + n_rows), latents, n_latents - 1)
    tl.store(keys_ptr + o, (latents - shift).to(keys_ptr.dtype.element_ty), mask=m)


@triton.jit(do_not_specialize=["n_rows", "n_entries", "n_latents", "shift", "n_halvings"])
def offset_kernel(
    keys_ptr,
    row_offsets_ptr,
    offsets_ptr,
    n_rows,
    n_entries,
    n_latents,
    shift,
    n_halvings,
    CSR: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Where latents begin, by halving; behind the last latent's entries comes the padding."""
    latent = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    low = tl.zeros([BLOCK_S], dtype=tl.int32)
    high = low + n_entries
    for _ in range(n_halvings):
        middle = (low + high) // 2
        unsure = low < high
        below = unsure & (tl.load(keys_ptr + middle, mask=unsure, other=0).to(tl.int32) + shift < latent)
        low = tl.where(below, middle + 1, low)
        high = tl.where(unsure & (below == 0), middle, high)
    if CSR:
        low = tl.where(latent == n_latents, tl.load(row_offsets_ptr + n_rows).to(tl.int32), low)
    tl.store(offsets_ptr + latent, low, mask=latent <= n_latents)


@triton.jit(do_not_specialize=["n_entries", "n_groups"])
def ordered_kernel(
    acts_ptr,
    dacts_ptr,
    bags_ptr,
    order_ptr,
    ordered_acts_ptr,
    ordered_dacts_ptr,
    ordered_bags_ptr,
    ordered_rows_ptr,
    n_entries,
    n_groups,
    PREFIXES: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Entries in latent order: one dependent load less in every gather that follows."""
    o = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    m = o < n_entries
    entry = tl.load(order_ptr + o, mask=m, other=0)
    bags = tl.load(bags_ptr + entry, mask=m, other=0)
    acts = tl.load(acts_ptr + entry, mask=m, other=0.0)
    tl.store(ordered_acts_ptr + o, acts.to(ordered_acts_ptr.dtype.element_ty), mask=m)
    tl.store(ordered_dacts_ptr + o, tl.load(dacts_ptr + entry, mask=m, other=0.0), mask=m)
    tl.store(ordered_bags_ptr + o, bags, mask=m)
    if PREFIXES:
        tl.store(ordered_rows_ptr + o, bags // n_groups, mask=m)


@triton.jit
def add_rows(acc, weights_ptr, ids_ptr, start, end, source_ptr, d_in, o_d, m_d, BLOCK_P: tl.constexpr):
    """acc [BLOCK_D] + sum over p in start:end of weights[p] * source[ids[p]]."""
    for p in range(start, end, BLOCK_P):
        o_p = p + tl.arange(0, BLOCK_P)
        m_p = o_p < end
        ids = tl.load(ids_ptr + o_p, mask=m_p, other=0).to(tl.int64)
        weights = tl.load(weights_ptr + o_p, mask=m_p, other=0.0)
        mask = m_p[:, None] & m_d[None, :]
        at = source_ptr + ids[:, None] * d_in + o_d[None, :]
        rows = tl.load(at, mask=mask, other=0.0, eviction_policy="evict_last").to(acc.dtype)
        acc += tl.sum(weights[:, None] * rows, axis=0)
    return acc


@triton.jit(do_not_specialize=["n_chunks", "shift"])
def chunk_kernel(
    acts_ptr,
    dacts_ptr,
    bags_ptr,
    rows_ptr,
    keys_ptr,
    offsets_ptr,
    suffix_ptr,
    centred_ptr,
    partials_ptr,
    n_chunks,
    shift,
    d_in,
    CHUNK: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
):
    """partials[side, chunk], if the chunk lies inside one latent's segment; otherwise left unwritten."""
    chunk, side = tl.program_id(0), tl.program_id(1)
    start = chunk * CHUNK
    latent = tl.load(keys_ptr + start).to(tl.int32) + shift
    if tl.load(offsets_ptr + latent + 1) >= start + CHUNK:
        o_d = tl.arange(0, BLOCK_D)
        m_d = o_d < d_in
        acc = tl.zeros([BLOCK_D], dtype=ACC)
        if side == 0:
            acc = add_rows(acc, acts_ptr, bags_ptr, start, start + CHUNK, suffix_ptr, d_in, o_d, m_d, BLOCK_P)
        else:
            acc = add_rows(acc, dacts_ptr, rows_ptr, start, start + CHUNK, centred_ptr, d_in, o_d, m_d, BLOCK_P)
        tl.store(partials_ptr + (side.to(tl.int64) * n_chunks + chunk) * d_in + o_d, acc, mask=m_d)


@triton.jit
def latent_row(
    weights_ptr,
    ids_ptr,
    source_ptr,
    partials_ptr,
    start,
    end,
    d_in,
    o_d,
    m_d,
    CHUNK: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
):
    """[BLOCK_D] of the sum over the entries start:end: head, partial sums of the chunks wholly inside, tail."""
    start, end = start.to(tl.int64), end.to(tl.int64)
    first, last = (start + CHUNK - 1) // CHUNK, end // CHUNK
    split = first < last
    acc = tl.zeros([BLOCK_D], dtype=ACC)
    acc = add_rows(
        acc, weights_ptr, ids_ptr, start, tl.where(split, first * CHUNK, end), source_ptr, d_in, o_d, m_d, BLOCK_P
    )
    if split:
        for chunk in range(first, last):
            acc += tl.load(partials_ptr + chunk * d_in + o_d, mask=m_d, other=0.0)
        acc = add_rows(acc, weights_ptr, ids_ptr, last * CHUNK, end, source_ptr, d_in, o_d, m_d, BLOCK_P)
    return tl.where(m_d, acc, 0.0)  # an infinite weight makes NaN of the lanes behind the row


# --- launch wrappers -------------------------------------------------------------------------------------------------


class Entries(NamedTuple):
    """Entries in latent order, and all that gradient rows are made of.

    acts_M, dacts_M in the sums' dtype; bags_M (rows of suffix_RD) and rows_M (of centred_BD) int32; latent s owns
    offsets_S1[s]:offsets_S1[s + 1], int32; padding lies behind. partials [2, M // CHUNK, D].
    """

    acts_M: Tensor
    dacts_M: Tensor
    bags_M: Tensor
    rows_M: Tensor
    offsets_S1: Tensor
    suffix_RD: Tensor
    centred_BD: Tensor
    partials: Tensor


class Order(NamedTuple):
    """Flat entries by latent, rows ascending, padding last: sort keys and positions (int64); offsets as in Entries."""

    keys_M: Tensor
    order_M: Tensor
    offsets_S1: Tensor


def key_type(n_latents: int) -> tuple[torch.dtype, int]:
    """(dtype, shift) of sort keys latent - shift: 16 bits take half the passes of 32."""
    return (torch.int16, 1 << 15) if n_latents <= 1 << 16 else (torch.int32, 0)


def launch_order(latents: Tensor, row_offsets: Tensor | None, n_latents: int) -> Order:
    """The order of the entries of codes, which depends on their latents alone."""
    n_entries, csr = latents.numel(), row_offsets is not None
    n_rows = len(latents) if row_offsets is None else len(row_offsets) - 1
    dtype, shift = key_type(n_latents)
    keys_M = torch.empty(n_entries, dtype=dtype, device=latents.device)
    numbers = n_rows, n_entries, n_latents, shift
    offsets = latents if row_offsets is None else row_offsets
    key_kernel[(triton.cdiv(n_entries, BLOCK_M),)](
        latents.contiguous(), offsets, keys_M, *numbers, CSR=csr, BLOCK_M=BLOCK_M, num_warps=4
    )
    keys_M, order_M = torch.sort(keys_M, stable=True)
    offsets_S1 = torch.empty(n_latents + 1, dtype=torch.int32, device=latents.device)
    offset_kernel[(triton.cdiv(n_latents + 1, BLOCK_S),)](
        keys_M, offsets, offsets_S1, *numbers, n_entries.bit_length(), CSR=csr, BLOCK_S=BLOCK_S, num_warps=4
    )
    return Order(keys_M, order_M, offsets_S1)


def launch_ordered(acts: Tensor, rows: Rows, order: Order) -> Entries:
    """Entries by latent, whose partials are for launch_chunks to write."""
    n_entries, (n_rows, d_in) = acts.numel(), rows.centred_BD.shape
    n_groups = len(rows.suffix_RD) // n_rows
    sum_dtype, _ = accumulator(rows.dacts_M.dtype)
    new = lambda dtype, *shape: torch.empty(shape, dtype=dtype, device=acts.device)  # noqa: E731
    bags_M = new(torch.int32, n_entries)
    entries = Entries(
        acts_M=new(sum_dtype, n_entries),
        dacts_M=new(sum_dtype, n_entries),
        bags_M=bags_M,
        rows_M=new(torch.int32, n_entries) if n_groups > 1 else bags_M,
        offsets_S1=order.offsets_S1,
        suffix_RD=rows.suffix_RD,
        centred_BD=rows.centred_BD,
        partials=new(sum_dtype, 2, max(n_entries // CHUNK, 1), d_in),
    )
    ordered_kernel[(triton.cdiv(n_entries, BLOCK_M),)](
        acts.contiguous(),
        rows.dacts_M,
        rows.bags_M,
        order.order_M,
        *entries[:4],
        n_entries,
        n_groups,
        PREFIXES=n_groups > 1,
        BLOCK_M=BLOCK_M,
        num_warps=4,
    )
    return entries


def launch_chunks(entries: Entries, order: Order) -> None:
    """Writes entries.partials: the sums of heavy latents' chunks."""
    n_chunks, d_in = len(order.keys_M) // CHUNK, entries.centred_BD.shape[1]
    if n_chunks > 0:
        _, ACC = accumulator(entries.acts_M.dtype)
        block_d, num_warps = whole_row_block(d_in, elements_per_thread=8)
        chunk_kernel[(n_chunks, 2)](
            *entries[:4],
            order.keys_M,
            order.offsets_S1,
            entries.suffix_RD,
            entries.centred_BD,
            entries.partials,
            n_chunks,
            key_type(len(order.offsets_S1) - 1)[1],
            d_in,
            CHUNK=CHUNK,
            BLOCK_P=CHUNK_STEP,
            BLOCK_D=block_d,
            ACC=ACC,
            num_warps=num_warps,
        )


def launch_entries(acts: Tensor, rows: Rows, order: Order) -> Entries:
    """Both."""
    entries = launch_ordered(acts, rows, order)
    launch_chunks(entries, order)
    return entries
