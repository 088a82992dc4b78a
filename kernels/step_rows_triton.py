"""Triton kernel of a training step's rows: decoder, losses and what they pass back, from one gather of W_dec's rows.

For row b with entries (act a, latent s), Matryoshka group j of an entry, and prefixes g of G (one otherwise):

    x_hat_g  = b_dec + sum of a * W_dec[s] over the entries of groups up to g         squared[b] = sum_g |x_hat_g - x|^2
    suffix_g = 2 / (B G) * sum over h >= g of (x_hat_h - x)                           the gradient of mse for group g
    dact     = <suffix_j, W_dec[s]> where a > 0, else 0

A program owns a row. It meets every entry twice: by the prefixes' sums, which grow side by side, and by the suffix of
its group. The rows of W_dec of the first entries stay in registers in between; those of the others are read again. The
program also writes every entry's bag, b * G + j. Long ragged rows come first.
docs/kernels.md section 4
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import check
from .segment_sum_triton import accumulator

# Values of W_dec in the registers of a thread, 8 or 16 an entry: of a row whose few entries are all held; else of those
# that are, fewer beside Matryoshka's prefixes.
HELD_ALL, HELD_SOME, HELD_BESIDE_PREFIXES = 192, 64, 8
LONG = tl.constexpr(24)  # entries of a ragged row that is begun before the others
STEP_K = 4  # of the others at a time; one where an entry is 16 values
REGISTERS = 128  # of a thread of four warps, for four programs a processor
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
def load_latents(codes, o, end):
    """Latents of the entries o, 0 behind the end of their row."""
    return tl.load(codes[1] + o, mask=o < end, other=0)


@triton.jit
def load_acts(codes, o, end, ACC: tl.constexpr):
    """Activations of the entries o, 0 behind the end of their row."""
    return tl.load(codes[0] + o, mask=o < end, other=0.0).to(ACC)


@triton.jit
def load_rows(codes, latents, o, end, columns, ACC: tl.constexpr):
    """The rows of W [P, D] of the entries o."""
    d_in, o_d, m_d = columns
    at = codes[2] + latents[:, None] * d_in + o_d[None, :]
    return tl.load(at, mask=(o < end)[:, None] & m_d[None, :], other=0.0).to(ACC)


@triton.jit
def load_held(codes, start, end, columns, TILES: tl.constexpr, ACC: tl.constexpr):
    """(the rows of W, the activations) of a row's first entries, tile by tile."""
    held, acts = (), ()
    for t in tl.static_range(len(TILES)):
        o = start + tl.arange(0, TILES[t])
        held += (load_rows(codes, load_latents(codes, o, end), o, end, columns, ACC),)  # type: ignore[assignment]
        acts += (load_acts(codes, o, end, ACC),)  # type: ignore[assignment]
        start += TILES[t]
    return held, acts


@triton.jit
def range_of(groups, inside, G: tl.constexpr):
    """(lowest, highest) group of the entries inside: most often the same, as latents ascend."""
    return tl.min(tl.where(inside, groups, G), axis=0), tl.max(tl.where(inside, groups, -1), axis=0)


@triton.jit
def add_entries(sums, smallest, acts, latents, w, ends, inside, G: tl.constexpr):
    """(the groups' sums with these entries, the smallest positive activation so far)."""
    groups, added = groups_of(latents, ends, G), ()
    lowest, highest = range_of(groups, inside, G)
    for g in tl.static_range(G):
        x_hat = sums[g]
        if G == 1:
            x_hat += tl.sum(acts[:, None] * w, axis=0)
        else:
            if (lowest <= g) & (g <= highest):
                x_hat += tl.sum(tl.where(groups == g, acts, 0.0)[:, None] * w, axis=0)
        added += (x_hat,)  # type: ignore[assignment]
    return added, tl.minimum(smallest, tl.min(tl.where(acts > 0, acts, float("inf")), axis=0))


@triton.jit
def add_others(sums, smallest, codes, first, end, columns, STEP_K: tl.constexpr, G: tl.constexpr, ACC: tl.constexpr):
    """The same with the entries from `first` on. Latents are read a step ahead."""
    o_l = tl.arange(0, STEP_K)
    latents = load_latents(codes, first + o_l, end)
    for p in range(first, end, STEP_K):
        o = p + o_l
        following = load_latents(codes, o + STEP_K, end)
        acts, w = load_acts(codes, o, end, ACC), load_rows(codes, latents, o, end, columns, ACC)
        sums, smallest = add_entries(sums, smallest, acts, latents, w, codes[3], o < end, G)
        latents = following
    return sums, smallest


@triton.jit
def store_entries(suffixes, acts, latents, w, ends, kept, bag, o, end, G: tl.constexpr):
    """Stores dacts and bags of the entries o."""
    dacts_ptr, bags_ptr = kept
    groups = groups_of(latents, ends, G)
    lowest, highest = range_of(groups, o < end, G)
    for g in tl.static_range(G):
        if G == 1:
            w *= suffixes[0][None, :]
        else:
            if (lowest <= g) & (g <= highest):
                w = tl.where((groups == g)[:, None], w * suffixes[G - 1 - g][None, :], w)
    dacts = tl.sum(w, axis=1)
    tl.store(dacts_ptr + o, tl.where(acts > 0, dacts, 0.0), mask=o < end)
    tl.store(bags_ptr + o, bag.to(tl.int32) + groups, mask=o < end)


@triton.jit
def store_others(
    suffixes, codes, kept, bag, first, end, columns, STEP_K: tl.constexpr, G: tl.constexpr, ACC: tl.constexpr
):
    """The same of the entries from `first` on."""
    o_l = tl.arange(0, STEP_K)
    latents = load_latents(codes, first + o_l, end)
    for p in range(first, end, STEP_K):
        o = p + o_l
        following = load_latents(codes, o + STEP_K, end)
        acts, w = load_acts(codes, o, end, ACC), load_rows(codes, latents, o, end, columns, ACC)
        store_entries(suffixes, acts, latents, w, codes[3], kept, bag, o, end, G)
        latents = following


@triton.jit
def prefixes_of(sums, G: tl.constexpr):
    """x_hat of every prefix from the sums of the groups."""
    x_hat = sums[0]
    x_hats = (x_hat,)
    for g in tl.static_range(1, G):
        x_hat += sums[g]
        x_hats += (x_hat,)  # type: ignore[assignment]
    return x_hats


@triton.jit
def suffixes_of(x_hats, x, m_d, scale, n_groups, G: tl.constexpr):
    """(the suffixes, the last group's first; the squared residuals [D], summed over the prefixes)."""
    squared, suffix, suffixes = tl.zeros_like(x), tl.zeros_like(x), ()
    for i in tl.static_range(G):
        e = tl.where(m_d & (G - 1 - i < n_groups), x_hats[G - 1 - i] - x, 0.0)
        squared += e * e
        suffix += scale * e
        suffixes += (suffix,)  # type: ignore[assignment]
    return suffixes, squared


@triton.jit
def store_suffixes(outputs, suffixes, bag, n_groups, columns, G: tl.constexpr):
    """Stores suffixes and their norms."""
    suffix_ptr, norms_ptr = outputs
    d_in, o_d, m_d = columns
    o_g = tl.arange(0, G)
    block = suffixes[G - 1][None, :]
    for g in tl.static_range(1, G):
        block = tl.where((o_g == g)[:, None], suffixes[G - 1 - g][None, :], block)
    m_g = o_g < n_groups
    tl.store(suffix_ptr + (bag + o_g)[:, None] * d_in + o_d[None, :], block, mask=m_g[:, None] & m_d[None, :])
    tl.store(norms_ptr + bag + o_g, tl.sqrt(tl.sum(block * block, axis=1)), mask=m_g)


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
    STEP_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
):
    """One row of K entries; or (K 0) of a ragged number, in a grid of two programs a row: long rows come first.

    G: the number of groups, rounded up. TILES: of so many entries each, the rows of W are held. STEP_K: so
    many of the others at a time, 0 if there are none.
    """
    row = tl.program_id(0).to(tl.int64)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < d_in
    if K == 0:
        row = row % n_rows
        start, end = tl.load(row_offsets_ptr + row), tl.load(row_offsets_ptr + row + 1)
        if (end - start > LONG) != (tl.program_id(0) < n_rows):
            return
    else:
        start, end = row * K, row * K + K
    p_x = x_ptr + row * d_in + o_d
    x = tl.load(p_x, mask=m_d, other=0.0).to(ACC)
    b = tl.load(b_ptr + o_d, mask=m_d, other=0.0).to(ACC)
    scale = (tl.full([], 2.0, ACC) / n_rows) / n_groups
    bag, ends, columns = row * n_groups, (group_ends_ptr, n_groups), (d_in, o_d, m_d)
    codes, kept = (acts_ptr, latents_ptr, W_ptr, ends), (dacts_ptr, bags_ptr)

    held, acts = load_held(codes, start, end, columns, TILES, ACC)
    sums, smallest, first = (b,), tl.full([], float("inf"), ACC), start
    for _ in tl.static_range(1, G):
        sums += (tl.zeros_like(b),)  # type: ignore[assignment]
    for t in tl.static_range(len(TILES)):
        o = first + tl.arange(0, TILES[t])
        latents = load_latents(codes, o, end)
        sums, smallest = add_entries(sums, smallest, acts[t], latents, held[t], ends, o < end, G)
        first += TILES[t]
    if STEP_K > 0:
        sums, smallest = add_others(sums, smallest, codes, first, end, columns, STEP_K, G, ACC)
    x_hats = prefixes_of(sums, G)
    if G > 1:
        x = tl.load(p_x, mask=m_d, other=0.0).to(ACC)  # again: no registers are left to keep it in
    tl.store(x_hat_ptr + row * d_in + o_d, x_hats[G - 1].to(x_hat_ptr.dtype.element_ty), mask=m_d)

    suffixes, squared = suffixes_of(x_hats, x, m_d, scale, n_groups, G)
    total = tl.sum(squared, axis=0)
    tl.store(squared_ptr + row, total)
    first = start
    for t in tl.static_range(len(TILES)):
        o = first + tl.arange(0, TILES[t])
        store_entries(suffixes, acts[t], load_latents(codes, o, end), held[t], ends, kept, bag, o, end, G)
        first += TILES[t]
    if STEP_K > 0:
        store_others(suffixes, codes, kept, bag, first, end, columns, STEP_K, G, ACC)
    if G > 1:
        store_suffixes((suffix_ptr, norms_ptr), suffixes, bag, n_groups, columns, G)
    else:
        tl.store(suffix_ptr + row * d_in + o_d, suffixes[0], mask=m_d)
        tl.store(norms_ptr + row, scale * tl.sqrt(total))
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


def row_tile(d_in: int, k: int, n_groups: int, element_size: int = 4, amd: bool = False) -> dict[str, object]:
    """Constants of row_kernel for rows of k entries, or (k 0) ragged ones."""
    block_d, num_warps = whole_row_block(d_in, 8)
    per_entry = max(block_d * element_size // (4 * 32 * num_warps), 1)  # registers of a thread
    alone = 0 < k * per_entry <= (HELD_ALL if num_warps <= 8 else HELD_ALL // 2)
    some = HELD_SOME if n_groups == 1 else HELD_BESIDE_PREFIXES
    held = k if alone else min(max(some // per_entry, 1), 16)
    step = 1 if per_entry > 8 else STEP_K // 2 if amd and n_groups > 1 else STEP_K  # AMD's compiler spills masks else
    tile: dict[str, object] = {
        "G": triton.next_power_of_2(n_groups),
        "TILES": (triton.next_power_of_2(held),),
        "STEP_K": 0 if alone else step,
        "BLOCK_D": block_d,
        "num_warps": num_warps,
    }
    if not (alone or amd) and element_size == 4 and n_groups <= 4:  # AMD counts registers otherwise
        tile["maxnreg"] = REGISTERS
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
) -> Rows:
    """Codes as in reference.py: [B, K] without row_offsets, or [M] with.

    centred: (x - b_dec, its norms) if at hand.
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
    tile = row_tile(d_in, k, n_groups, sum_dtype.itemsize, torch.version.hip is not None)
    row_kernel[(n_rows if k else 2 * n_rows,)](
        x_BD.contiguous(),
        *codes,
        group_ends_G,
        W_dec_SD,
        b_dec_D,
        *rows,
        n_rows,
        n_groups,
        d_in,
        K=k,
        CENTRE=centred is None,
        ACC=ACC,
        **tile,
    )
    return rows
