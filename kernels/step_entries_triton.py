"""Triton kernels that bring a step's entries into latent order, and sum whole chunks of those of heavy latents.

    offsets[s] = where latent s begins                                                   count_kernel, offset_kernel
    order = every entry to its latent's, then behind those that come before it there    scatter_kernel, rank_kernel
    acts, dacts, bags, rows = those of the codes, in that order                          step_totals_triton.py
    partial[side, c] = sum over chunk c of act * suffix[bag] (decoder) or dact * centred[row] (encoder)   chunk_kernel

Rows ascend within a latent, whatever the order in which atomics have handed out its places before. A latent of n
entries costs n^2 comparisons, and none has more entries than the batch has rows.

Entry positions are cut into chunks of CHUNK; a chunk inside one latent's segment is summed here, so that a latent that
fires on much of the batch does not leave one program walking thousands of rows. `latent_row` adds, for one latent, its
whole chunks' partial sums, its head and its tail: the gradient row, made where it is needed and never written. The
order of additions is the same every time. docs/kernels.md section 4
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .segment_sum_triton import CHUNK, accumulator
from .step_rows_triton import Rows, whole_row_block

BLOCK_M = 256  # entries of a program
BLOCK_S = 1024  # latents of a program of offset_kernel
BLOCK_P, BLOCK_Q = 16, 64  # places of a program of rank_kernel; entries of each one's latent at a time
CHUNK_STEP = 4  # entries of a chunk whose row loads are in flight together


@triton.jit(do_not_specialize=["n_counts"])
def zero_kernel(counts_ptr, n_counts, BLOCK_M: tl.constexpr):
    """Zeros, by a kernel: fills of memory do not run beside a long kernel."""
    o = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    tl.store(counts_ptr + o, tl.zeros([BLOCK_M], dtype=tl.int32), mask=o < n_counts)


@triton.jit
def entries_inside(row_offsets_ptr, n_rows, n_entries, o, CSR: tl.constexpr):
    """Which of the entries o are not padding."""
    m = o < n_entries
    if CSR:
        m = m & (o < tl.load(row_offsets_ptr + n_rows))
    return m


@triton.jit(do_not_specialize=["n_rows", "n_entries"])
def count_kernel(
    latents_ptr,
    row_offsets_ptr,
    counts_ptr,
    block_counts_ptr,
    n_rows,
    n_entries,
    CSR: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """How many entries every latent has, and every BLOCK_S latents."""
    o = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    m = entries_inside(row_offsets_ptr, n_rows, n_entries, o, CSR)
    latents = tl.load(latents_ptr + o, mask=m, other=0)
    tl.atomic_add(counts_ptr + latents, 1, mask=m, sem="relaxed")
    tl.atomic_add(block_counts_ptr + latents // BLOCK_S, 1, mask=m, sem="relaxed")


@triton.jit(do_not_specialize=["n_latents"])
def offset_kernel(counts_ptr, block_counts_ptr, offsets_ptr, n_latents, BLOCK_S: tl.constexpr):
    """Where latents begin; the counts become the same, as the places that scatter_kernel hands out."""
    block = tl.program_id(0)
    o = tl.arange(0, BLOCK_S)
    before = tl.zeros([BLOCK_S], dtype=tl.int32)
    for first in range(0, block, BLOCK_S):
        before += tl.load(block_counts_ptr + first + o, mask=first + o < block, other=0)
    latents = block * BLOCK_S + o
    counts = tl.load(counts_ptr + latents, mask=latents < n_latents, other=0)
    offsets = tl.sum(before, axis=0) + tl.cumsum(counts, axis=0) - counts
    tl.store(offsets_ptr + latents, offsets, mask=latents <= n_latents)
    tl.store(counts_ptr + latents, offsets, mask=latents < n_latents)


@triton.jit(do_not_specialize=["n_rows", "n_entries"])
def scatter_kernel(
    latents_ptr,
    row_offsets_ptr,
    places_ptr,
    scattered_ptr,
    n_rows,
    n_entries,
    CSR: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Every entry to its latent's, in any order."""
    o = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    m = entries_inside(row_offsets_ptr, n_rows, n_entries, o, CSR)
    latents = tl.load(latents_ptr + o, mask=m, other=0)
    places = tl.atomic_add(places_ptr + latents, 1, mask=m, sem="relaxed")
    tl.store(scattered_ptr + places, o, mask=m)


@triton.jit(do_not_specialize=["n_entries", "n_latents"])
def rank_kernel(
    latents_ptr,
    offsets_ptr,
    scattered_ptr,
    order_ptr,
    of_places_ptr,
    n_entries,
    n_latents,
    BLOCK_P: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):
    """Every entry behind those of its latent that come before it in the codes; padding stays where it is."""
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    m = p < tl.load(offsets_ptr + n_latents)
    entry = tl.load(scattered_ptr + p, mask=m, other=0)
    latent = tl.load(latents_ptr + entry, mask=m, other=0)
    start = tl.load(offsets_ptr + latent, mask=m, other=0)
    end = tl.load(offsets_ptr + latent + 1, mask=m, other=0)
    rank = tl.zeros([BLOCK_P], dtype=tl.int32)
    o_q = tl.arange(0, BLOCK_Q)
    for q in range(0, tl.max(end - start, axis=0), BLOCK_Q):
        at = start[:, None] + q + o_q[None, :]
        m_q = at < end[:, None]
        others = tl.load(scattered_ptr + at, mask=m_q, other=0)
        rank += tl.sum((m_q & (others < entry[:, None])).to(tl.int32), axis=1)
    inside = p < n_entries
    tl.store(order_ptr + tl.where(m, start + rank, p), tl.where(m, entry, p).to(tl.int64), mask=inside)
    tl.store(of_places_ptr + p, tl.where(m, latent.to(tl.int32), n_latents), mask=inside)


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


@triton.jit(do_not_specialize=["n_groups", "n_chunks", "n_latents"])
def chunk_kernel(
    order_ptr,
    acts_ptr,
    dacts_ptr,
    bags_ptr,
    of_places_ptr,
    offsets_ptr,
    suffix_ptr,
    centred_ptr,
    partials_ptr,
    n_groups,
    n_chunks,
    n_latents,
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
    latent = tl.load(of_places_ptr + start)  # n_latents: padding
    if tl.load(offsets_ptr + latent + 1, mask=latent < n_latents, other=0) >= start + CHUNK:
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
    """Flat entries by latent, rows ascending, padding last: of every place its latent (int32, of padding n_latents) and
    the entry there (int64); offsets as in Entries."""

    of_places_M: Tensor
    order_M: Tensor
    offsets_S1: Tensor


def launch_order(latents: Tensor, row_offsets: Tensor | None, n_latents: int) -> Order:
    """The order of the entries of codes, which depends on their latents alone.

    Kernels only, of few programs: on a stream of high priority they run beside a long kernel.
    """
    n_entries, csr = latents.numel(), row_offsets is not None
    n_rows = len(latents) if row_offsets is None else len(row_offsets) - 1
    new = lambda n, dtype=torch.int32: torch.empty(n, dtype=dtype, device=latents.device)  # noqa: E731
    n_blocks, programs = triton.cdiv(n_latents + 1, BLOCK_S), triton.cdiv(n_entries, BLOCK_M)
    counts, scattered_M = new(n_blocks * (BLOCK_S + 1)), new(n_entries)
    counts_S, counts_of_blocks = counts[: n_blocks * BLOCK_S], counts[n_blocks * BLOCK_S :]
    order = Order(new(n_entries), new(n_entries, torch.int64), new(n_latents + 1))
    codes = latents.contiguous(), latents if row_offsets is None else row_offsets
    zero_kernel[(triton.cdiv(len(counts), BLOCK_M),)](counts, len(counts), BLOCK_M=BLOCK_M, num_warps=4)
    count_kernel[(programs,)](
        *codes, counts_S, counts_of_blocks, n_rows, n_entries, CSR=csr, BLOCK_M=BLOCK_M, BLOCK_S=BLOCK_S, num_warps=4
    )
    offset_kernel[(n_blocks,)](counts_S, counts_of_blocks, order.offsets_S1, n_latents, BLOCK_S=BLOCK_S, num_warps=4)
    scatter_kernel[(programs,)](*codes, counts_S, scattered_M, n_rows, n_entries, CSR=csr, BLOCK_M=BLOCK_M, num_warps=4)
    rank_kernel[(triton.cdiv(n_entries, BLOCK_P),)](
        codes[0],
        order.offsets_S1,
        scattered_M,
        order.order_M,
        order.of_places_M,
        n_entries,
        n_latents,
        BLOCK_P=BLOCK_P,
        BLOCK_Q=BLOCK_Q,
        num_warps=4,
    )
    return order


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
            order.of_places_M,
            order.offsets_S1,
            rows.suffix_RD,
            rows.centred_BD,
            entries.partials,
            n_groups,
            n_chunks,
            len(order.offsets_S1) - 1,
            d_in,
            PREFIXES=n_groups > 1,
            CHUNK=CHUNK,
            BLOCK_P=CHUNK_STEP,
            BLOCK_D=block_d,
            ACC=accumulator(rows.dacts_M.dtype)[1],
            num_warps=num_warps,
        )
