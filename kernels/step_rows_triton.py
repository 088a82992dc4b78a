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
def groups_of(latents, ends, G: tl.constexpr):
    """The Matryoshka group of each latent, int32."""
    group_ends_ptr, n_groups = ends
    groups = tl.zeros_like(latents).to(tl.int32)
    for g in tl.static_range(G - 1):
        end = tl.load(group_ends_ptr + g, mask=g < n_groups, other=1 << 62)
        groups += (latents >= end).to(tl.int32)
    return groups


@triton.jit
def load_rows(codes, o, end, columns, ACC: tl.constexpr):
    """The rows of W [P, D] of the entries o."""
    _, latents_ptr, W_ptr, _ = codes
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
def load_acts(codes, o, end, G: tl.constexpr, ACC: tl.constexpr):
    """(activations, groups) of the entries o; activations of 0 behind the end of their row."""
    acts_ptr, latents_ptr, _, ends = codes
    acts = tl.load(acts_ptr + o, mask=o < end, other=0.0).to(ACC)
    groups = tl.zeros_like(o).to(tl.int32)
    if G > 1:
        groups = groups_of(tl.load(latents_ptr + o, mask=o < end, other=0), ends, G)
    return acts, groups


@triton.jit
def add_held(x_hats, held, codes, start, end, TILES: tl.constexpr, G: tl.constexpr, ACC: tl.constexpr):
    """(the prefixes' x_hats with the entries held, the smallest positive activation among them)."""
    smallest = tl.full([], float("inf"), ACC)
    for t in tl.static_range(len(TILES)):
        acts, groups = load_acts(codes, start + tl.arange(0, TILES[t]), end, G, ACC)
        sums = ()
        for g in tl.static_range(G):
            sums = sums + (x_hats[g] + tl.sum(tl.where(groups <= g, acts, 0.0)[:, None] * held[t], axis=0),)
        x_hats = sums
        smallest = tl.minimum(smallest, tl.min(tl.where(acts > 0, acts, float("inf")), axis=0))
        start += TILES[t]
    return x_hats, smallest


@triton.jit
def add_others(x_hats, smallest, codes, first, end, columns, G: tl.constexpr, STAGES: tl.constexpr, ACC: tl.constexpr):
    """The same of the entries from `first` on, which are not held."""
    acts_ptr, latents_ptr, W_ptr, ends = codes
    d_in, o_d, m_d = columns
    for p in tl.range(first, end, num_stages=STAGES):
        act, latent = tl.load(acts_ptr + p).to(ACC), tl.load(latents_ptr + p)
        w = tl.load(W_ptr + latent * d_in + o_d, mask=m_d, other=0.0).to(ACC)
        group = groups_of(latent, ends, G)
        sums = ()
        for g in tl.static_range(G):
            sums = sums + (x_hats[g] + tl.where(group <= g, act, 0.0) * w,)
        x_hats = sums
        smallest = tl.minimum(smallest, tl.where(act > 0, act, float("inf")))
    return x_hats, smallest


@triton.jit
def store_entries(w, suffixes, codes, kept, bag, o, end, G: tl.constexpr, ACC: tl.constexpr):
    """Stores dacts and bags of the entries o, whose rows of W are w."""
    dacts_ptr, bags_ptr = kept
    acts, groups = load_acts(codes, o, end, G, ACC)
    suffix = suffixes[0][None, :]
    for g in tl.static_range(1, G):
        suffix = tl.where((groups == g)[:, None], suffixes[g][None, :], suffix)
    dacts = tl.sum(w * suffix, axis=1)
    tl.store(dacts_ptr + o, tl.where(acts > 0, dacts, 0.0), mask=o < end)
    tl.store(bags_ptr + o, bag.to(tl.int32) + groups, mask=o < end)


@triton.jit
def stack(rows, G: tl.constexpr):
    """G blocks [D] as one [G, D]."""
    o_g = tl.arange(0, G)
    block = rows[0][None, :] + tl.zeros_like(o_g).to(rows[0].dtype)[:, None]
    for g in tl.static_range(1, G):
        block = tl.where((o_g == g)[:, None], rows[g][None, :], block)
    return block


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
    CENTRE: tl.constexpr,
    G: tl.constexpr,
    TILES: tl.constexpr,
    HELD: tl.constexpr,
    STEP_K: tl.constexpr,
    STAGES: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
):
    """One row of K entries; or (K 0) of a ragged number, in a grid of two programs a row: long ones come first."""
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

    codes, kept, columns = (
        (acts_ptr, latents_ptr, W_ptr, (group_ends_ptr, n_groups)),
        (dacts_ptr, bags_ptr),
        (d_in, o_d, m_d),
    )
    held = load_held(codes, start, end, columns, TILES, ACC)
    x_hats = ()
    for g in tl.static_range(G):
        x_hats = x_hats + (b,)
    x_hats, smallest = add_held(x_hats, held, codes, start, end, TILES, G, ACC)
    if STEP_K > 0:
        x_hats, smallest = add_others(x_hats, smallest, codes, start + HELD, end, columns, G, STAGES, ACC)
    tl.store(x_hat_ptr + row * d_in + o_d, x_hats[G - 1].to(x_hat_ptr.dtype.element_ty), mask=m_d)

    squared, suffix, suffixes = tl.zeros_like(b), tl.zeros_like(b), ()
    for i in tl.static_range(G):
        e = tl.where(m_d, x_hats[G - 1 - i] - x, 0.0)
        if G > 1:
            e = tl.where(G - 1 - i < n_groups, e, 0.0)
        squared += e * e
        suffix += scale * e
        suffixes = (suffix,) + suffixes
    for t in tl.static_range(len(TILES)):
        store_entries(held[t], suffixes, codes, kept, bag, start + tl.arange(0, TILES[t]), end, G, ACC)
        start += TILES[t]
    if STEP_K > 0:
        for p in tl.range(start, end, STEP_K, num_stages=STAGES):
            o = p + tl.arange(0, STEP_K)
            store_entries(load_rows(codes, o, end, columns, ACC), suffixes, codes, kept, bag, o, end, G, ACC)
    o_g = tl.arange(0, G)
    block = stack(suffixes, G)
    m_g = o_g < n_groups
    tl.store(suffix_ptr + (bag + o_g)[:, None] * d_in + o_d[None, :], block, mask=m_g[:, None] & m_d[None, :])
    tl.store(norms_ptr + bag + o_g, tl.sqrt(tl.sum(block * block, axis=1)), mask=m_g)
    tl.store(squared_ptr + row, tl.sum(squared, axis=0))
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
    kind = {"K": k, "G": triton.next_power_of_2(n_groups), "CENTRE": centred is None, "ACC": ACC}
    row_kernel[(n_rows if k else 2 * n_rows,)](
        x_BD.contiguous(), *codes, group_ends_G, W_dec_SD, b_dec_D, *rows, n_rows, n_groups, d_in, **kind, **tile
    )
    return rows
