"""Triton kernels that bring a step's entries into latent order, and sum whole chunks of those of heavy latents.

    keys, order = torch.sort(keys of the latents)    stable: rows ascend within a latent                 key_kernel
    offsets[s] = where latent s begins                                                                  offset_kernel
    acts, dacts, bags, rows = those of the codes, in that order                            step_totals_triton.py
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


@triton.jit
def placed_entries(codes, p, m, n_groups, PREFIXES: tl.constexpr, ACC: tl.constexpr):
    """(act, dact, bag, row) of the entries at places p in latent order."""
    order_ptr, acts_ptr, dacts_ptr, bags_ptr = codes
    entry = tl.load(order_ptr + p, mask=m, other=0)
    bags = tl.load(bags_ptr + entry, mask=m, other=0)
    rows = bags
    if PREFIXES:
        rows = bags // n_groups
    acts = tl.load(acts_ptr + entry, mask=m, other=0.0).to(ACC)
    return acts, tl.load(dacts_ptr + entry, mask=m, other=0.0).to(ACC), bags, rows


@triton.jit
def chunk_sum(
    codes,
    start,
    source_ptr,
    columns,
    n_groups,
    DECODER: tl.constexpr,
    PREFIXES: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
):
    """[BLOCK_D] of the sum over a chunk's entries of weight * source row, of one side."""
    d_in, o_d, m_d = columns
    acc = tl.zeros([BLOCK_D], dtype=ACC)
    for p in range(start, start + CHUNK, BLOCK_P):
        o_p = p + tl.arange(0, BLOCK_P)
        acts, dacts, bags, rows = placed_entries(codes, o_p, o_p >= 0, n_groups, PREFIXES, ACC)
        weights, ids = (acts, bags) if DECODER else (dacts, rows)
        at = source_ptr + ids.to(tl.int64)[:, None] * d_in + o_d[None, :]
        source = tl.load(at, mask=m_d[None, :], other=0.0, eviction_policy="evict_last").to(ACC)
        acc += tl.sum(weights[:, None] * source, axis=0)
    return acc


@triton.jit(do_not_specialize=["n_groups", "n_chunks", "shift"])
def chunk_kernel(
    order_ptr,
    acts_ptr,
    dacts_ptr,
    bags_ptr,
    keys_ptr,
    offsets_ptr,
    suffix_ptr,
    centred_ptr,
    partials_ptr,
    n_groups,
    n_chunks,
    shift,
    d_in,
    PREFIXES: tl.constexpr,
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
        codes, columns = (order_ptr, acts_ptr, dacts_ptr, bags_ptr), (d_in, o_d, m_d)
        acc = tl.zeros([BLOCK_D], dtype=ACC)
        if side == 0:
            acc += chunk_sum(codes, start, suffix_ptr, columns, n_groups, True, PREFIXES, CHUNK, BLOCK_P, BLOCK_D, ACC)
        else:
            acc += chunk_sum(
                codes, start, centred_ptr, columns, n_groups, False, PREFIXES, CHUNK, BLOCK_P, BLOCK_D, ACC
            )
        tl.store(partials_ptr + (side.to(tl.int64) * n_chunks + chunk) * d_in + o_d, acc, mask=m_d)


@triton.jit
def outside_entry(weights_ptr, ids_ptr, q, start, head, skipped, m):
    """(weight, id as int64) of the q-th of a latent's entries outside its whole chunks."""
    p = start + q + tl.where(q >= head, skipped, 0)
    return tl.load(weights_ptr + p, mask=m, other=0.0), tl.load(ids_ptr + p, mask=m, other=0).to(tl.int64)


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
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
):
    """[BLOCK_D] of the sum over the entries start:end: partial sums of the chunks wholly inside, then head and tail.

    The next entry is read while a row is on its way.
    """
    start, end = start.to(tl.int64), end.to(tl.int64)
    first, last = (start + CHUNK - 1) // CHUNK, end // CHUNK
    acc = tl.zeros([BLOCK_D], dtype=ACC)
    for chunk in range(first, last):
        acc += tl.load(partials_ptr + chunk * d_in + o_d, mask=m_d, other=0.0)
    skipped = tl.maximum(last - first, 0) * CHUNK
    head = tl.where(skipped > 0, first * CHUNK, end) - start
    n = end - start - skipped
    weight, i = outside_entry(weights_ptr, ids_ptr, 0, start, head, skipped, n > 0)
    for q in range(n):
        row = tl.load(source_ptr + i * d_in + o_d, mask=m_d, other=0.0, eviction_policy="evict_last")
        this = weight
        weight, i = outside_entry(weights_ptr, ids_ptr, q + 1, start, head, skipped, q + 1 < n)
        acc += this * row.to(ACC)
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


def register_limit(
    block_d: int, sums: torch.dtype, narrow: int | None = None, wide: int | None = None
) -> dict[str, int]:
    """maxnreg of a launch for float32 rows on an NVIDIA GPU, where ptxas would spill some to have fewer registers."""
    registers = narrow if block_d <= 2048 else wide
    if registers is None or sums != torch.float32 or torch.version.hip is not None:
        return {}
    return {"maxnreg": registers}


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


def new_entries(rows: Rows, order: Order) -> Entries:
    """Entries that launch_chunks and launch_totals are to write."""
    n_entries, d_in = len(order.order_M), rows.centred_BD.shape[1]
    new = lambda *shape: torch.empty(shape, dtype=rows.dacts_M.dtype, device=order.order_M.device)  # noqa: E731
    bags_M = torch.empty_like(rows.bags_M)
    return Entries(
        acts_M=new(n_entries),
        dacts_M=new(n_entries),
        bags_M=bags_M,
        rows_M=bags_M if len(rows.suffix_RD) == len(rows.centred_BD) else torch.empty_like(bags_M),
        offsets_S1=order.offsets_S1,
        suffix_RD=rows.suffix_RD,
        centred_BD=rows.centred_BD,
        partials=new(2, max(n_entries // CHUNK, 1), d_in),
    )


def launch_chunks(entries: Entries, acts: Tensor, rows: Rows, order: Order) -> None:
    """Writes entries.partials: the sums of heavy latents' chunks."""
    n_chunks, (n_rows, d_in) = len(order.order_M) // CHUNK, rows.centred_BD.shape
    if n_chunks > 0:
        n_groups = len(rows.suffix_RD) // n_rows
        block_d, num_warps = whole_row_block(d_in, elements_per_thread=8)
        chunk_kernel[(n_chunks, 2)](
            order.order_M,
            acts.contiguous(),
            rows.dacts_M,
            rows.bags_M,
            order.keys_M,
            order.offsets_S1,
            rows.suffix_RD,
            rows.centred_BD,
            entries.partials,
            n_groups,
            n_chunks,
            key_type(len(order.offsets_S1) - 1)[1],
            d_in,
            PREFIXES=n_groups > 1,
            CHUNK=CHUNK,
            BLOCK_P=CHUNK_STEP,
            BLOCK_D=block_d,
            ACC=accumulator(rows.dacts_M.dtype)[1],
            num_warps=num_warps,
        )
