"""Triton kernel of a training step's rows: decoder, losses and what they pass back, from one gather of W_dec's rows.

For row b with entries (act a, latent s), Matryoshka group j of an entry, and prefixes g of G (one otherwise):

    x_hat_g  = b_dec + sum of a * W_dec[s] over the entries of groups up to g         squared[b] = sum_g |x_hat_g - x|^2
    suffix_g = 2 / (B G) * sum over h >= g of (x_hat_h - x)                           the gradient of mse for group g
    dact     = <suffix_j, W_dec[s]> where a > 0, else 0

A program owns a row. It begins with all entries and takes the groups off from the last on, so that an entry is met
twice: by the sum of its row, and by the suffix of its group. The rows of W_dec of the first BLOCK_K entries stay in
registers in between; those of the others are read again. The program also writes every entry's bag, b * G + j. Ragged
rows go in two launches: the few long ones of a BatchTopK batch would set the registers, and so the pace, of all.
docs/kernels.md section 4
"""

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import check
from .segment_sum_triton import accumulator

HELD_ENTRIES = 32  # of a row of fixed k, whose rows of W_dec stay in registers
HELD_SHORT = 16  # of ragged rows, those of at most so many entries: two programs a processor
HELD_LONG, STEP_LONG = 8, 4  # of the others, and how many more at a time
REGISTERS = 128  # of a thread of eight warps, for two programs a processor
MAX_WIDTH = 8192  # of a row that one program holds without spilling


@triton.jit
def group_size(first_latents, latents_ptr, group_ends_ptr, start, end, g, BLOCK: tl.constexpr):
    """How many entries of a row belong to the first g Matryoshka groups, int32: the first so many.

    first_latents [BLOCK]: of the row's first entries; those behind its end are above every latent.
    """
    bound = tl.load(group_ends_ptr + g - 1, mask=g > 0, other=0)
    size = tl.sum((first_latents < bound).to(tl.int32), axis=0)
    for p in range(start + BLOCK, end, BLOCK):
        o = p + tl.arange(0, BLOCK)
        latents = tl.load(latents_ptr + o, mask=o < end, other=0)
        size += tl.sum(((o < end) & (latents < bound)).to(tl.int32), axis=0)
    return size


@triton.jit
def load_rows(acts_ptr, latents, W_ptr, o, m, columns, ACC: tl.constexpr):
    """(act, row of W [P, D]) of the entries o, whose latents are known."""
    d_in, o_d, m_d = columns
    acts = tl.load(acts_ptr + o, mask=m, other=0.0).to(ACC)
    at = W_ptr + latents[:, None] * d_in + o_d[None, :]
    return acts, tl.load(at, mask=m[:, None] & m_d[None, :], other=0.0).to(ACC)


@triton.jit
def load_entries(codes, o, m, columns, ACC: tl.constexpr):
    """The same, of entries whose latents are not."""
    acts_ptr, latents_ptr, W_ptr = codes
    return load_rows(acts_ptr, tl.load(latents_ptr + o, mask=m, other=0), W_ptr, o, m, columns, ACC)


@triton.jit
def store_entries(kept, o, m, acts, dacts, bags):
    """What is kept of the entries o."""
    dacts_ptr, bags_ptr = kept
    tl.store(dacts_ptr + o, tl.where(acts > 0, dacts, 0.0), mask=m)
    tl.store(bags_ptr + o, bags, mask=m)


@triton.jit
def load_ahead(latents, codes, o, end, columns, STEP_K: tl.constexpr, ACC: tl.constexpr):
    """(acts and rows of W of the entries o, whose latents are known; the latents STEP_K entries on)."""
    acts_ptr, latents_ptr, W_ptr = codes
    following = tl.load(latents_ptr + o + STEP_K, mask=o + STEP_K < end, other=0)
    acts, w = load_rows(acts_ptr, latents, W_ptr, o, o < end, columns, ACC)
    return acts, w, following


@triton.jit
def add_others(x_hat, codes, first, end, columns, STEP_K: tl.constexpr, ACC: tl.constexpr):
    """(x_hat with the entries from `first` on, which are not held; the smallest positive activations among them)."""
    _, latents_ptr, _ = codes
    o_l = tl.arange(0, STEP_K)
    smallest = tl.full([STEP_K], float("inf"), ACC)
    latents = tl.load(latents_ptr + first + o_l, mask=first + o_l < end, other=0)
    for p in range(first, end, STEP_K):
        acts, w, latents = load_ahead(latents, codes, p + o_l, end, columns, STEP_K, ACC)
        x_hat += tl.sum(acts[:, None] * w, axis=0)
        smallest = tl.minimum(smallest, tl.where(acts > 0, acts, float("inf")))
    return x_hat, smallest


@triton.jit
def pass_to_others(suffix, codes, kept, bag, first, end, columns, STEP_K: tl.constexpr, ACC: tl.constexpr):
    """Stores dacts and bags of the entries from `first` on, which are not held."""
    _, latents_ptr, _ = codes
    o_l = tl.arange(0, STEP_K)
    latents = tl.load(latents_ptr + first + o_l, mask=first + o_l < end, other=0)
    for p in range(first, end, STEP_K):
        o = p + o_l
        acts, w, latents = load_ahead(latents, codes, o, end, columns, STEP_K, ACC)
        store_entries(kept, o, o < end, acts, tl.sum(w * suffix[None, :], axis=1), bag + o_l * 0)


@triton.jit
def take_others_off(e, suffix, codes, kept, bag, first, end, columns, STEP_K: tl.constexpr, ACC: tl.constexpr):
    """e without the entries of a Matryoshka group from `first` on, which are not held; stores their dacts and bags."""
    o_l = tl.arange(0, STEP_K)
    for p in range(first, end, STEP_K):
        o = p + o_l
        acts, w = load_entries(codes, o, o < end, columns, ACC)
        e -= tl.sum(acts[:, None] * w, axis=0)
        store_entries(kept, o, o < end, acts, tl.sum(w * suffix[None, :], axis=1), bag + o_l * 0)
    return e


@triton.jit
def take_held_off(e, acts, w, suffix, bags_ptr, bag, start, low, high, BLOCK_K: tl.constexpr):
    """The same of held entries low:high: (e, w with their rows times suffix); stores their bags."""
    o_k = tl.arange(0, BLOCK_K)
    inside = (o_k >= low) & (o_k < high)
    tl.store(bags_ptr + start + o_k, bag + o_k * 0, mask=inside)
    e -= tl.sum(tl.where(inside, acts, 0.0)[:, None] * w, axis=0)
    return e, tl.where(inside[:, None], w * suffix[None, :], w)  # a row is not needed again as it was


@triton.jit
def pass_back_prefixes(
    e,
    held,
    scale,
    codes,
    kept,
    outputs,
    group_ends_ptr,
    row,
    columns,
    LONG: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STEP_K: tl.constexpr,
    ACC: tl.constexpr,
):
    """Sum over the prefixes of the squared residual; stores suffixes, their norms, and the entries' dacts and bags.

    e: the last prefix's residual. held: acts and rows of W of the entries that are. row: its first bag, where its
    entries begin and end, number of groups.
    """
    acts, w = held
    suffix_ptr, norms_ptr = outputs
    bag, start, end, n_groups = row
    _, latents_ptr, _ = codes
    d_in, o_d, m_d = columns
    dacts_ptr, bags_ptr = kept
    squared, suffix = tl.zeros_like(e), tl.zeros_like(e)
    high = (end - start).to(tl.int32)
    o_k = tl.arange(0, BLOCK_K)
    o_f = start + tl.arange(0, 32)
    first_latents = tl.load(latents_ptr + o_f, mask=o_f < end, other=1 << 31)
    for i in range(n_groups):
        g = n_groups - 1 - i
        squared += e * e
        suffix += scale * e
        tl.store(suffix_ptr + (bag + g) * d_in + o_d, suffix, mask=m_d)
        tl.store(norms_ptr + bag + g, tl.sqrt(tl.sum(suffix * suffix, axis=0)))
        low = group_size(first_latents, latents_ptr, group_ends_ptr, start, end, g, 32)
        this = (bag + g).to(tl.int32)
        if LONG:
            first = start + tl.maximum(low, BLOCK_K)
            e = take_others_off(e, suffix, codes, kept, this, first, start + high, columns, STEP_K, ACC)
        if LONG:
            if low < tl.minimum(high, BLOCK_K):  # else none of the group is held
                e, w = take_held_off(e, acts, w, suffix, bags_ptr, this, start, low, high, BLOCK_K)
        else:
            e, w = take_held_off(e, acts, w, suffix, bags_ptr, this, start, low, high, BLOCK_K)
        e = tl.where(m_d, e, 0.0)
        high = low
    tl.store(dacts_ptr + start + o_k, tl.where(acts > 0, tl.sum(w, axis=1), 0.0), mask=start + o_k < end)
    return tl.sum(squared, axis=0)


@triton.jit
def pass_back(
    e, held, scale, codes, kept, outputs, row, columns, LONG: tl.constexpr, STEP_K: tl.constexpr, ACC: tl.constexpr
):
    """The same of a row without Matryoshka groups: its number, where its entries and those that are not held begin."""
    acts, w = held
    suffix_ptr, norms_ptr = outputs
    row, o, others, end = row
    d_in, o_d, m_d = columns
    suffix = scale * e
    bag = row.to(tl.int32)
    store_entries(kept, o, o < end, acts, tl.sum(w * suffix[None, :], axis=1), bag + tl.zeros_like(o).to(tl.int32))
    if LONG:
        pass_to_others(suffix, codes, kept, bag, others, end, columns, STEP_K, ACC)
    tl.store(suffix_ptr + row * d_in + o_d, suffix, mask=m_d)
    squared = tl.sum(e * e, axis=0)
    tl.store(norms_ptr + row, scale * tl.sqrt(squared))
    return squared


@triton.jit
def store_centred(centred_ptr, x_norms_ptr, row, x, b, columns):
    """A row without b_dec, and its norm."""
    d_in, o_d, m_d = columns
    c = tl.where(m_d, x - b, 0.0)
    tl.store(centred_ptr + row * d_in + o_d, c, mask=m_d)
    tl.store(x_norms_ptr + row, tl.sqrt(tl.sum(c * c, axis=0)))


@triton.jit(do_not_specialize=["n_rows", "n_groups", "shortest", "longest"])
def row_kernel(
    x_ptr,
    acts_ptr,
    latents_ptr,
    row_offsets_ptr,
    group_ends_ptr,
    W_ptr,
    b_ptr,
    x_hat_ptr,
    suffix_ptr,
    norms_ptr,
    centred_ptr,
    x_norms_ptr,
    dacts_ptr,
    bags_ptr,
    squared_ptr,
    smallest_ptr,
    n_rows,
    n_groups,
    shortest,
    longest,
    d_in,
    K: tl.constexpr,
    PREFIXES: tl.constexpr,
    CENTRE: tl.constexpr,
    LONG: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STEP_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
):
    """One row of K entries; or (K 0) of a ragged number, nothing if that is not within shortest to longest.

    LONG: there may be more than the BLOCK_K that are held.
    """
    row = tl.program_id(0).to(tl.int64)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < d_in
    if K == 0:
        start, end = tl.load(row_offsets_ptr + row), tl.load(row_offsets_ptr + row + 1)
        if (end - start < shortest) | (end - start > longest):
            return
    else:
        start, end = row * K, row * K + K
    x = tl.load(x_ptr + row * d_in + o_d, mask=m_d, other=0.0).to(ACC)
    b = tl.load(b_ptr + o_d, mask=m_d, other=0.0).to(ACC)
    scale = (tl.full([], 2.0, ACC) / n_rows) / n_groups
    bag = row * n_groups

    codes, kept, columns = (acts_ptr, latents_ptr, W_ptr), (dacts_ptr, bags_ptr), (d_in, o_d, m_d)
    o_k = tl.arange(0, BLOCK_K)
    m = start + o_k < end
    others = start + BLOCK_K
    acts, w = load_entries(codes, start + o_k, m, columns, ACC)
    x_hat = b + tl.sum(acts[:, None] * w, axis=0)
    smallest = tl.full([STEP_K], float("inf"), ACC)
    if LONG:
        x_hat, smallest = add_others(x_hat, codes, others, end, columns, STEP_K, ACC)
    tl.store(x_hat_ptr + row * d_in + o_d, x_hat.to(x_hat_ptr.dtype.element_ty), mask=m_d)
    e = tl.where(m_d, x_hat - x, 0.0)
    outputs = suffix_ptr, norms_ptr
    if PREFIXES:
        this = bag, start, end, n_groups
        squared = pass_back_prefixes(
            e, (acts, w), scale, codes, kept, outputs, group_ends_ptr, this, columns, LONG, BLOCK_K, STEP_K, ACC
        )
    else:
        alone = row, start + o_k, others, end
        squared = pass_back(e, (acts, w), scale, codes, kept, outputs, alone, columns, LONG, STEP_K, ACC)
    tl.store(squared_ptr + row, squared)
    if K == 0:
        held = tl.min(tl.where(acts > 0, acts, float("inf")), axis=0)
        tl.store(smallest_ptr + row, tl.minimum(held, tl.min(smallest, axis=0)))
    if CENTRE:
        store_centred(centred_ptr, x_norms_ptr, row, x, b, columns)


# --- launch wrapper --------------------------------------------------------------------------------------------------


class Rows(NamedTuple):
    """What row_kernel leaves, in the sums' dtype but for x_hat (x's).

    x_hat_BD of the last prefix; suffix_RD [B * G, D] and the norms of its rows; x - b_dec and the norms of its rows; of
    every flat entry of the codes its dact and bag (int32); of every row the sum of the squared residuals, and of ragged
    codes the smallest positive activation (infinity if there is none). Padding has undefined dacts and bags.
    """

    x_hat_BD: Tensor
    suffix_RD: Tensor
    norms_R: Tensor
    centred_BD: Tensor
    x_norms_B: Tensor
    dacts_M: Tensor
    bags_M: Tensor
    squared_B: Tensor
    smallest_B: Tensor


def whole_row_block(d_in: int, elements_per_thread: int) -> tuple[int, int]:
    """(BLOCK_D, num_warps) of a kernel whose program owns a row."""
    check(d_in <= MAX_WIDTH, f"d_in: {d_in} is above {MAX_WIDTH}, the widest row of a training step on a GPU")
    block_d = triton.next_power_of_2(d_in)
    return block_d, max(1, min(16, block_d // (32 * elements_per_thread)))


def row_tile(d_in: int, held: int, step: int = 0) -> dict[str, int | bool]:
    """Constants of row_kernel: entries held, and of longer rows (step 0: there are none) so many more at a time."""
    block_d, _ = whole_row_block(d_in, 4)
    wide = block_d > 2048  # one program a processor, of as many warps as can be
    block_k = min(triton.next_power_of_2(held), (1 << (14 if wide else 15)) // block_d)
    tile = {
        "LONG": step > 0 or held > block_k,
        "BLOCK_K": block_k,
        "STEP_K": min(step or 1, (1 << (13 if wide else 14)) // block_d),
        "BLOCK_D": block_d,
        "num_warps": 16 if wide else 8 if block_k * block_d >= 1 << 13 else 4,
    }
    if not tile["LONG"] and tile["num_warps"] == 8 and block_k * block_d <= 1 << 14:
        tile["maxnreg"] = REGISTERS  # Matryoshka groups would take 154 at 16 x 1024: one program, and idle warps
    return tile


def launch_rows(
    x_BD: Tensor,
    acts: Tensor,
    latents: Tensor,
    row_offsets: Tensor | None,
    group_ends_G: Tensor,
    W_dec_SD: Tensor,
    b_dec_D: Tensor,
    centred: tuple[Tensor, Tensor] | None = None,
    beside: AbstractContextManager[object] | None = None,
) -> Rows:
    """Codes as in reference.py: [B, K] without row_offsets, or [M] with.

    centred: (x - b_dec, its norms) if at hand. beside: a context, entered to launch what may run at the same time as
    the rest.
    """
    (n_rows, d_in), n_groups, n_entries = x_BD.shape, len(group_ends_G), latents.numel()
    sum_dtype, ACC = accumulator(W_dec_SD.dtype)
    new = lambda *shape: torch.empty(shape, dtype=sum_dtype, device=x_BD.device)  # noqa: E731
    rows = Rows(
        x_hat_BD=torch.empty_like(x_BD),
        suffix_RD=new(n_rows * n_groups, d_in),
        norms_R=new(n_rows * n_groups),
        centred_BD=new(n_rows, d_in) if centred is None else centred[0],
        x_norms_B=new(n_rows) if centred is None else centred[1],
        dacts_M=new(n_entries),
        bags_M=torch.empty(n_entries, dtype=torch.int32, device=x_BD.device),
        squared_B=new(n_rows),
        smallest_B=new(n_rows),
    )
    k = latents.shape[1] if row_offsets is None else 0
    launches = [(k, k, k, 0) if k <= HELD_ENTRIES else (k, k, HELD_LONG, STEP_LONG)]
    if k == 0:
        launches = [(HELD_SHORT + 1, n_entries, HELD_LONG, STEP_LONG), (0, HELD_SHORT, HELD_SHORT, 0)]
    codes = acts.contiguous(), latents.contiguous(), latents if row_offsets is None else row_offsets
    contexts: tuple[AbstractContextManager[object], ...] = nullcontext(), beside or nullcontext()
    for (shortest, longest, *sizes), context in zip(launches, contexts):
        tile = row_tile(d_in, *sizes)
        if torch.version.hip is not None or sum_dtype != torch.float32:  # AMD counts registers otherwise
            tile.pop("maxnreg", None)
        numbers = n_rows, n_groups, shortest, longest, d_in
        kind = {"K": k, "PREFIXES": n_groups > 1, "CENTRE": centred is None, "ACC": ACC}
        with context:
            row_kernel[(n_rows,)](
                x_BD.contiguous(), *codes, group_ends_G, W_dec_SD, b_dec_D, *rows, *numbers, **kind, **tile
            )
    return rows
