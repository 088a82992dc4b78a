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

from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import check
from .segment_sum_triton import accumulator

HELD_VALUES = 64  # a thread holds so many values of W_dec if entries may be left over: 16 entries at 1024 columns
MOST_VALUES = 128  # and so many if none are
STEP_K, STAGES = 4, 3  # entries left over: so many at a time, and how many times are under way
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
def load_acts(acts_ptr, o, end, ACC: tl.constexpr):
    """Activations of the entries o, 0 behind the end of their row."""
    return tl.load(acts_ptr + o, mask=o < end, other=0.0).to(ACC)


@triton.jit
def load_rows(codes, o, end, columns, ACC: tl.constexpr):
    """The rows of W [P, D] of the entries o."""
    _, latents_ptr, W_ptr = codes
    d_in, o_d, m_d = columns
    latents = tl.load(latents_ptr + o, mask=o < end, other=0)
    at = W_ptr + latents[:, None] * d_in + o_d[None, :]
    return tl.load(at, mask=(o < end)[:, None] & m_d[None, :], other=0.0).to(ACC)


@triton.jit
def load_held(codes, start, end, columns, TILES: tl.constexpr, ACC: tl.constexpr):
    """The rows of W of a row's first entries, tile by tile."""
    held = ()
    for t in tl.static_range(len(TILES)):
        held = held + (load_rows(codes, start + tl.arange(0, TILES[t]), end, columns, ACC),)
        start += TILES[t]
    return held


@triton.jit
def smaller(smallest, acts):
    """The smaller of it and the positive activations."""
    return tl.minimum(smallest, tl.min(tl.where(acts > 0, acts, float("inf")), axis=0))


@triton.jit
def add_held(x_hat, held, acts_ptr, start, end, TILES: tl.constexpr, ACC: tl.constexpr):
    """(x_hat with the entries held, the smallest positive activation among them)."""
    smallest = tl.full([], float("inf"), ACC)
    for t in tl.static_range(len(TILES)):
        acts = load_acts(acts_ptr, start + tl.arange(0, TILES[t]), end, ACC)
        x_hat += tl.sum(acts[:, None] * held[t], axis=0)
        smallest = smaller(smallest, acts)
        start += TILES[t]
    return x_hat, smallest


@triton.jit
def add_others(
    x_hat, smallest, codes, first, end, columns, STEP_K: tl.constexpr, STAGES: tl.constexpr, ACC: tl.constexpr
):
    """The same of the entries from `first` on, which are not held."""
    acts_ptr, _, _ = codes
    for p in tl.range(first, end, STEP_K, num_stages=STAGES):
        o = p + tl.arange(0, STEP_K)
        acts = load_acts(acts_ptr, o, end, ACC)
        x_hat += tl.sum(acts[:, None] * load_rows(codes, o, end, columns, ACC), axis=0)
        smallest = smaller(smallest, acts)
    return x_hat, smallest


@triton.jit
def store_entries(kept, acts_ptr, o, end, dacts, bag, ACC: tl.constexpr):
    """What is kept of the entries o."""
    dacts_ptr, bags_ptr = kept
    fired = load_acts(acts_ptr, o, end, ACC) > 0
    tl.store(dacts_ptr + o, tl.where(fired, dacts, 0.0), mask=o < end)
    tl.store(bags_ptr + o, bag + tl.zeros_like(o).to(tl.int32), mask=o < end)


@triton.jit
def pass_to_others(
    suffix, codes, kept, bag, first, end, columns, STEP_K: tl.constexpr, STAGES: tl.constexpr, ACC: tl.constexpr
):
    """Stores dacts and bags of the entries from `first` on, which are not held."""
    acts_ptr, _, _ = codes
    for p in tl.range(first, end, STEP_K, num_stages=STAGES):
        o = p + tl.arange(0, STEP_K)
        dacts = tl.sum(load_rows(codes, o, end, columns, ACC) * suffix[None, :], axis=1)
        store_entries(kept, acts_ptr, o, end, dacts, bag, ACC)


@triton.jit
def take_others_off(
    e, suffix, codes, kept, bag, first, end, columns, STEP_K: tl.constexpr, STAGES: tl.constexpr, ACC: tl.constexpr
):
    """The same of those of a Matryoshka group; returns e without them."""
    acts_ptr, _, _ = codes
    for p in tl.range(first, end, STEP_K, num_stages=STAGES):
        o = p + tl.arange(0, STEP_K)
        w = load_rows(codes, o, end, columns, ACC)
        e -= tl.sum(load_acts(acts_ptr, o, end, ACC)[:, None] * w, axis=0)
        store_entries(kept, acts_ptr, o, end, tl.sum(w * suffix[None, :], axis=1), bag, ACC)
    return e


@triton.jit
def take_held_off(e, held, suffix, codes, kept, bag, start, low, high, TILES: tl.constexpr, ACC: tl.constexpr):
    """The same of the held entries low:high. A tile is gone through for every group that has entries in it."""
    acts_ptr, _, _ = codes
    dacts_ptr, bags_ptr = kept
    first = 0
    for t in tl.static_range(len(TILES)):
        if (low < first + TILES[t]) & (high > first):
            o_k = first + tl.arange(0, TILES[t])
            inside = (o_k >= low) & (o_k < high)
            acts = tl.load(acts_ptr + start + o_k, mask=inside, other=0.0).to(ACC)
            e -= tl.sum(acts[:, None] * held[t], axis=0)
            dacts = tl.sum(held[t] * suffix[None, :], axis=1)
            tl.store(dacts_ptr + start + o_k, tl.where(acts > 0, dacts, 0.0), mask=inside)
            tl.store(bags_ptr + start + o_k, bag + tl.zeros_like(o_k), mask=inside)
        first += TILES[t]
    return e


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
    TILES: tl.constexpr,
    HELD: tl.constexpr,
    STEP_K: tl.constexpr,
    STAGES: tl.constexpr,
    ACC: tl.constexpr,
):
    """Sum over the prefixes of the squared residual; stores suffixes, their norms, and the entries' dacts and bags.

    e: the last prefix's residual. held: the rows of W of the entries that are. row: its first bag, where its entries
    begin and end, number of groups.
    """
    suffix_ptr, norms_ptr = outputs
    bag, start, end, n_groups = row
    _, latents_ptr, _ = codes
    d_in, o_d, m_d = columns
    squared, suffix = tl.zeros_like(e), tl.zeros_like(e)
    high = (end - start).to(tl.int32)
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
        if STEP_K > 0:
            first = start + tl.maximum(low, HELD)
            e = take_others_off(e, suffix, codes, kept, this, first, start + high, columns, STEP_K, STAGES, ACC)
        e = take_held_off(e, held, suffix, codes, kept, this, start, low, high, TILES, ACC)
        e = tl.where(m_d, e, 0.0)
        high = low
    return tl.sum(squared, axis=0)


@triton.jit
def pass_back(
    e,
    held,
    scale,
    codes,
    kept,
    outputs,
    row,
    columns,
    TILES: tl.constexpr,
    STEP_K: tl.constexpr,
    STAGES: tl.constexpr,
    ACC: tl.constexpr,
):
    """The same of a row without Matryoshka groups: its number, where its entries begin and end."""
    acts_ptr, _, _ = codes
    suffix_ptr, norms_ptr = outputs
    row, first, end = row
    d_in, o_d, m_d = columns
    suffix = scale * e
    bag = row.to(tl.int32)
    for t in tl.static_range(len(TILES)):
        dacts = tl.sum(held[t] * suffix[None, :], axis=1)
        store_entries(kept, acts_ptr, first + tl.arange(0, TILES[t]), end, dacts, bag, ACC)
        first += TILES[t]
    if STEP_K > 0:
        pass_to_others(suffix, codes, kept, bag, first, end, columns, STEP_K, STAGES, ACC)
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


@triton.jit(do_not_specialize=["n_rows", "n_groups"])
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
    d_in,
    K: tl.constexpr,
    PREFIXES: tl.constexpr,
    CENTRE: tl.constexpr,
    TILES: tl.constexpr,
    HELD: tl.constexpr,
    STEP_K: tl.constexpr,
    STAGES: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
):
    """One row of K entries; or (K 0) of a ragged number, in a grid of two programs a row: long ones come first.

    TILES: of so many entries each, HELD in all, the rows of W are held. STEP_K: so many of the others at a time, 0 if
    there are none.
    """
    row = tl.program_id(0).to(tl.int64)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < d_in
    if K == 0:
        row = row % n_rows
        start, end = tl.load(row_offsets_ptr + row), tl.load(row_offsets_ptr + row + 1)
        if (end - start > HELD) != (tl.program_id(0) < n_rows):
            return
    else:
        start, end = row * K, row * K + K
    x = tl.load(x_ptr + row * d_in + o_d, mask=m_d, other=0.0).to(ACC)
    b = tl.load(b_ptr + o_d, mask=m_d, other=0.0).to(ACC)
    scale = (tl.full([], 2.0, ACC) / n_rows) / n_groups
    bag = row * n_groups

    codes, kept, columns = (acts_ptr, latents_ptr, W_ptr), (dacts_ptr, bags_ptr), (d_in, o_d, m_d)
    held = load_held(codes, start, end, columns, TILES, ACC)
    x_hat, smallest = add_held(b, held, acts_ptr, start, end, TILES, ACC)
    if STEP_K > 0:
        x_hat, smallest = add_others(x_hat, smallest, codes, start + HELD, end, columns, STEP_K, STAGES, ACC)
    tl.store(x_hat_ptr + row * d_in + o_d, x_hat.to(x_hat_ptr.dtype.element_ty), mask=m_d)
    e = tl.where(m_d, x_hat - x, 0.0)
    outputs = suffix_ptr, norms_ptr
    if PREFIXES:
        this = bag, start, end, n_groups
        squared = pass_back_prefixes(
            e, held, scale, codes, kept, outputs, group_ends_ptr, this, columns, TILES, HELD, STEP_K, STAGES, ACC
        )
    else:
        this = row, start, end
        squared = pass_back(e, held, scale, codes, kept, outputs, this, columns, TILES, STEP_K, STAGES, ACC)
    tl.store(squared_ptr + row, squared)
    if K == 0:
        tl.store(smallest_ptr + row, smallest)
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


def row_tile(d_in: int, k: int, prefixes: bool, element_size: int = 4) -> dict[str, object]:
    """Constants of row_kernel for rows of k entries, or (k 0) ragged ones."""
    block_d, num_warps = whole_row_block(d_in, 4)
    per_entry = max(block_d * element_size // (4 * 32 * num_warps), 1)  # registers of a thread
    most = MOST_VALUES // per_entry
    held = k if 0 < k <= most else HELD_VALUES // per_entry
    tiles = tiles_of(held, 4 if prefixes else 16)
    registers = {"maxnreg": REGISTERS} if sum(tiles) * per_entry <= MOST_VALUES * 3 // 4 else {}
    return {
        "TILES": tiles,
        "HELD": sum(tiles),
        "STEP_K": 0 if held == k else min(STEP_K, sum(tiles)),
        "STAGES": STAGES if torch.version.hip is None else 1,
        "BLOCK_D": block_d,
        "num_warps": num_warps,
        **registers,
    }


def tiles_of(held: int, largest: int) -> tuple[int, ...]:
    """Powers of two up to `largest` that hold so many entries, rounded up to 4."""
    tiles = []
    while held > 0:
        tiles.append(max(min(largest, 1 << (held.bit_length() - 1)), 4))
        held -= tiles[-1]
    return tuple(tiles)


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
    codes = acts.contiguous(), latents.contiguous(), latents if row_offsets is None else row_offsets
    tile = row_tile(d_in, k, n_groups > 1, sum_dtype.itemsize)
    if torch.version.hip is not None:  # AMD counts registers otherwise
        tile.pop("maxnreg", None)
    kind = {"K": k, "PREFIXES": n_groups > 1, "CENTRE": centred is None, "ACC": ACC}
    row_kernel[(n_rows if k else 2 * n_rows,)](
        x_BD.contiguous(), *codes, group_ends_G, W_dec_SD, b_dec_D, *rows, n_rows, n_groups, d_in, **kind, **tile
    )
    return rows
