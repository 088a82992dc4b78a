"""Triton kernel of a training step's rows: decoder, losses and what they pass back, from one gather of W_dec's rows.

For row b with entries (act a, latent s), Matryoshka group j of an entry, and prefixes g of G (one otherwise):

    x_hat_g  = b_dec + sum of a * W_dec[s] over the entries of groups up to g         squared[b] = sum_g |x_hat_g - x|^2
    suffix_g = 2 / (B G) * sum over h >= g of (x_hat_h - x)                           the gradient of mse for group g
    dact     = <suffix_j, W_dec[s]> where a > 0, else 0

A program owns a row. Its latents ascend, so the entries of a group lie together, and a prefix is where the sum stands
behind them. It meets every entry twice: in the sum, and by the suffix of its group, the last group first. Without
groups the rows of W_dec of the first entries stay in registers in between; all others are read again. The program also
writes every entry's bag, b * G + j. Long ragged rows come first.
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
# that are. None are beside Matryoshka's residuals.
HELD_ALL, HELD_SOME = 192, 64
CHUNK = tl.constexpr(32)  # latents that a warp compares with the groups' ends at once
LONG = tl.constexpr(24)  # entries of a ragged row that is begun before the others
STEP_K = 4  # of the others at a time; one where an entry is 16 values
REGISTERS = 128  # of a thread of four warps, for four programs a processor
MAX_WIDTH = 8192  # of a row that one program holds without spilling


@triton.jit
def load_latents(codes, o, end):
    """Latents of a row's entries o, 0 from `end` on."""
    return tl.load(codes[1] + o, mask=o < end, other=0)


@triton.jit
def load_acts(codes, o, end, ACC: tl.constexpr):
    """Activations of a row's entries o, 0 from `end` on."""
    return tl.load(codes[0] + o, mask=o < end, other=0.0).to(ACC)


@triton.jit
def load_rows(codes, latents, o, end, columns, ACC: tl.constexpr):
    """The rows of W [P, D] of the entries o."""
    d_in, o_d, m_d = columns
    at = codes[2] + latents[:, None] * d_in + o_d[None, :]
    return tl.load(at, mask=(o < end)[:, None] & m_d[None, :], other=0.0).to(ACC)


@triton.jit
def borders_of(codes, end, group_ends_ptr, G: tl.constexpr):
    """Where the entries of each group of a row begin, and where the last ends: latents ascend within a row."""
    below = ()
    for _ in tl.static_range(1, G):
        below += (tl.zeros([CHUNK], tl.int32),)  # type: ignore[assignment]
    for p in range(0, end, CHUNK):
        o = p + tl.arange(0, CHUNK)
        latents, counted = load_latents(codes, o, end), ()
        for g in tl.static_range(1, G):
            inside = (o < end) & (latents < tl.load(group_ends_ptr + g - 1))
            counted += (below[g - 1] + inside.to(tl.int32),)  # type: ignore[assignment]
        below = counted
    borders = (0,)
    for g in tl.static_range(1, G):
        borders += (tl.sum(below[g - 1], axis=0),)  # type: ignore[assignment]
    borders += (end,)  # type: ignore[assignment]
    return borders


@triton.jit
def add_entries(x_hat, smallest, acts, w):
    """(x_hat with these entries, the smallest positive activation so far)."""
    x_hat += tl.sum(acts[:, None] * w, axis=0)
    return x_hat, tl.minimum(smallest, tl.min(tl.where(acts > 0, acts, float("inf")), axis=0))


@triton.jit
def add_others(x_hat, smallest, codes, first, end, columns, STEP_K: tl.constexpr, ACC: tl.constexpr):
    """The same with the entries from `first` on. Latents are read a step ahead."""
    o_l = tl.arange(0, STEP_K)
    latents = load_latents(codes, first + o_l, end)
    for p in range(first, end, STEP_K):
        o = p + o_l
        following = load_latents(codes, o + STEP_K, end)
        acts, w = load_acts(codes, o, end, ACC), load_rows(codes, latents, o, end, columns, ACC)
        x_hat, smallest = add_entries(x_hat, smallest, acts, w)
        latents = following
    return x_hat, smallest


@triton.jit
def store_entries(suffix, acts, w, kept, bag, o, end):
    """Stores dacts and bags of the entries o."""
    dacts_ptr, bags_ptr = kept
    dacts = tl.sum(w * suffix[None, :], axis=1)
    tl.store(dacts_ptr + o, tl.where(acts > 0, dacts, 0.0), mask=o < end)
    tl.store(bags_ptr + o, bag.to(tl.int32) + tl.zeros_like(o), mask=o < end)


@triton.jit
def store_others(suffix, codes, kept, bag, first, end, columns, STEP_K: tl.constexpr, ACC: tl.constexpr):
    """The same of the entries from `first` on."""
    o_l = tl.arange(0, STEP_K)
    latents = load_latents(codes, first + o_l, end)
    for p in range(first, end, STEP_K):
        o = p + o_l
        following = load_latents(codes, o + STEP_K, end)
        acts, w = load_acts(codes, o, end, ACC), load_rows(codes, latents, o, end, columns, ACC)
        store_entries(suffix, acts, w, kept, bag, o, end)
        latents = following


@triton.jit
def store_centred(centred_ptr, x_norms_ptr, row, x, b, columns):
    """A row without b_dec, and its norm."""
    d_in, o_d, m_d = columns
    c = tl.where(m_d, x - b, 0.0)
    tl.store(centred_ptr + row * d_in + o_d, c, mask=m_d)
    tl.store(x_norms_ptr + row, tl.sqrt(tl.sum(c * c, axis=0)))


@triton.jit(do_not_specialize=["n_rows"])
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
    d_in,
    K: tl.constexpr,
    CENTRE: tl.constexpr,
    G: tl.constexpr,
    HELD: tl.constexpr,
    STEP_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
):
    """One row of K entries; or (K 0) of a ragged number, in a grid of two programs a row: long rows come first.

    HELD: of so many entries the rows of W are held, of none where G is above 1. STEP_K: so many of the others at a
    time, 0 if there are none.
    """
    tl.static_assert(G == 1 or HELD == 0)
    row, length = tl.program_id(0), tl.full([], K, tl.int32)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < d_in
    if K == 0:
        long = row < n_rows
        row = tl.where(long, row, row - n_rows)
        start = tl.load(row_offsets_ptr + row)
        length = (tl.load(row_offsets_ptr + row + 1) - start).to(tl.int32)
        if (length > LONG) != long:
            return
        row = row.to(tl.int64)
    else:
        row = row.to(tl.int64)
        start = row * K
    x = tl.load(x_ptr + row * d_in + o_d, mask=m_d, other=0.0).to(ACC)
    b = tl.load(b_ptr + o_d, mask=m_d, other=0.0).to(ACC)
    scale = (tl.full([], 2.0, ACC) / n_rows) / G
    columns, codes = (d_in, o_d, m_d), (acts_ptr + start, latents_ptr + start, W_ptr)
    kept = dacts_ptr + start, bags_ptr + start

    if CENTRE:
        store_centred(centred_ptr, x_norms_ptr, row, x, b, columns)
    borders = (0, length)
    if G > 1:
        borders = borders_of(codes, length, group_ends_ptr, G)
    x_hat, smallest, residuals = b, tl.full([], float("inf"), ACC), ()
    if HELD > 0:
        o_h = tl.arange(0, HELD)
        acts = load_acts(codes, o_h, length, ACC)
        held = load_rows(codes, load_latents(codes, o_h, length), o_h, length, columns, ACC)
        x_hat, smallest = add_entries(x_hat, smallest, acts, held)
    for g in tl.static_range(G):
        if STEP_K > 0:
            x_hat, smallest = add_others(
                x_hat, smallest, codes, borders[g] + HELD, borders[g + 1], columns, STEP_K, ACC
            )
        residuals += (tl.where(m_d, x_hat - x, 0.0),)  # type: ignore[assignment]
    tl.store(x_hat_ptr + row * d_in + o_d, x_hat.to(x_hat_ptr.dtype.element_ty), mask=m_d)
    squared = tl.zeros_like(b)
    for g in tl.static_range(G):
        squared += residuals[g] * residuals[g]
    total = tl.sum(squared, axis=0)
    tl.store(squared_ptr + row, total)

    suffix = tl.zeros_like(b)
    for i in tl.static_range(G):  # the last group first
        bag = row * G + (G - 1 - i)
        suffix += scale * residuals[G - 1 - i]
        if HELD > 0:
            store_entries(suffix, acts, held, kept, bag, o_h, length)
        if STEP_K > 0:
            first, last = borders[G - 1 - i] + HELD, borders[G - i]
            store_others(suffix, codes, kept, bag, first, last, columns, STEP_K, ACC)
        tl.store(suffix_ptr + bag * d_in + o_d, suffix, mask=m_d)
        if G == 1:
            tl.store(norms_ptr + bag, scale * tl.sqrt(total))
        else:
            tl.store(norms_ptr + bag, tl.sqrt(tl.sum(suffix * suffix, axis=0)))
    if K == 0:
        tl.store(smallest_ptr + row, smallest)


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
    alone = n_groups == 1 and 0 < k * per_entry <= (HELD_ALL if num_warps <= 8 else HELD_ALL // 2)
    held = 0 if n_groups > 1 else k if alone else min(max(HELD_SOME // per_entry, 1), 16)
    tile: dict[str, object] = {
        "G": n_groups,
        "HELD": triton.next_power_of_2(held) if held else 0,
        "STEP_K": 0 if alone else 1 if per_entry > 8 else STEP_K,
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
        d_in,
        K=k,
        CENTRE=centred is None,
        ACC=ACC,
        **tile,
    )
    return rows
