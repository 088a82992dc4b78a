"""Triton kernel of a training step's rows: decoder, losses and what they pass back, from one gather of W_dec's rows.

For row b with entries (act a, latent s), Matryoshka group j of an entry, and prefixes g of G (one otherwise):

    x_hat_g  = b_dec + sum of a * W_dec[s] over the entries of groups up to g         squared[b] = sum_g |x_hat_g - x|^2
    suffix_g = 2 / (B G) * sum over h >= g of (x_hat_h - x)                           the gradient of mse for group g
    dact     = <suffix_j, W_dec[s]> where a > 0, else 0

A program owns a row, and holds the rows of W_dec of up to BLOCK_K entries in registers. A longer row is gone through
twice. The program also writes every entry's sort key and its bag b * G + j. docs/kernels.md section 4
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .segment_sum_triton import accumulator

HELD_ENTRIES = 32  # of a row, whose rows of W_dec stay in registers
HELD_ELEMENTS = 1 << 15  # of such a tile, with 8 warps: 128 registers a thread; twice that with 16 warps
MAX_WIDTH = 8192  # of a row that one program holds without spilling


@triton.jit
def group_size(latents_ptr, group_ends_ptr, start, end, g, BLOCK: tl.constexpr):
    """How many entries of a row belong to the first g Matryoshka groups, int32: the first so many."""
    first = tl.load(group_ends_ptr + g - 1, mask=g > 0, other=0)
    size = 0
    for p in range(start, end, BLOCK):
        o = p + tl.arange(0, BLOCK)
        latents = tl.load(latents_ptr + o, mask=o < end, other=0)
        size += tl.sum(((o < end) & (latents < first)).to(tl.int32), axis=0)
    return size


@triton.jit
def load_entries(acts_ptr, latents_ptr, W_ptr, o, m, d_in, o_d, m_d, ACC: tl.constexpr):
    """(act, latent, row of W [P, D]) of the entries o."""
    latents = tl.load(latents_ptr + o, mask=m, other=0).to(tl.int32)  # every thread holds all of them
    acts = tl.load(acts_ptr + o, mask=m, other=0.0).to(ACC)
    at = W_ptr + latents.to(tl.int64)[:, None] * d_in + o_d[None, :]
    w = tl.load(at, mask=m[:, None] & m_d[None, :], other=0.0)
    return acts, latents, w.to(ACC)


@triton.jit
def store_entries(dacts_ptr, bags_ptr, keys_ptr, o, m, dacts, acts, latents, bags, shift):
    """What is kept of the entries o."""
    tl.store(dacts_ptr + o, tl.where(acts > 0, dacts, 0.0).to(dacts_ptr.dtype.element_ty), mask=m)
    tl.store(bags_ptr + o, bags.to(tl.int32), mask=m)
    tl.store(keys_ptr + o, (latents - shift).to(keys_ptr.dtype.element_ty), mask=m)


@triton.jit(do_not_specialize=["n_rows", "n_entries", "n_groups", "k", "n_latents", "shift", "n_padding"])
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
    centred_ptr,
    dacts_ptr,
    bags_ptr,
    keys_ptr,
    squared_ptr,
    norms_ptr,
    x_norms_ptr,
    smallest_ptr,
    n_rows,
    n_entries,
    n_groups,
    k,
    n_latents,
    shift,
    n_padding,
    d_in,
    CSR: tl.constexpr,
    PREFIXES: tl.constexpr,
    CENTRE: tl.constexpr,
    HOLD: tl.constexpr,
    LONG: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STEP_K: tl.constexpr,
    BLOCK_PAD: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
):
    """One row. HOLD: rows of up to BLOCK_K entries stay in registers. LONG: there may be others."""
    row = tl.program_id(0).to(tl.int64)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < d_in
    if CSR:
        start, end = tl.load(row_offsets_ptr + row), tl.load(row_offsets_ptr + row + 1)
        # Padding sorts behind every entry: at the last latent, whose own entries come before it.
        o_pad = tl.load(row_offsets_ptr + n_rows) + row * n_padding + tl.arange(0, BLOCK_PAD)
        m_pad = (tl.arange(0, BLOCK_PAD) < n_padding) & (o_pad < n_entries)
        last = tl.full([BLOCK_PAD], 0, tl.int32) + (n_latents - 1 - shift)
        tl.store(keys_ptr + o_pad, last.to(keys_ptr.dtype.element_ty), mask=m_pad)
    else:
        start, end = row * k, row * k + k
    x = tl.load(x_ptr + row * d_in + o_d, mask=m_d, other=0.0).to(ACC)
    b = tl.load(b_ptr + o_d, mask=m_d, other=0.0).to(ACC)
    scale = (tl.full([], 2.0, ACC) / n_rows) / n_groups
    bag = row * n_groups

    if HOLD:
        if end - start <= BLOCK_K:
            o_k = tl.arange(0, BLOCK_K)
            o = start + o_k
            m = o < end
            acts, latents, w = load_entries(acts_ptr, latents_ptr, W_ptr, o, m, d_in, o_d, m_d, ACC)
            tl.store(smallest_ptr + row, tl.min(tl.where(acts > 0, acts, float("inf")), axis=0))
            if PREFIXES:
                x_hat = b
                squared = tl.zeros([BLOCK_D], dtype=ACC)
                low = 0
                for g in range(n_groups):
                    high = group_size(latents_ptr, group_ends_ptr, start, end, g + 1, BLOCK_K)
                    x_hat += tl.sum(tl.where((o_k >= low) & (o_k < high), acts, 0.0)[:, None] * w, axis=0)
                    low = high
                    e = tl.where(m_d, x_hat - x, 0.0)
                    squared += e * e
                    tl.store(suffix_ptr + (bag + g) * d_in + o_d, e.to(suffix_ptr.dtype.element_ty), mask=m_d)
                suffix = tl.zeros([BLOCK_D], dtype=ACC)
                high = group_size(latents_ptr, group_ends_ptr, start, end, n_groups, BLOCK_K)
                for i in range(n_groups):
                    g = n_groups - 1 - i
                    low = group_size(latents_ptr, group_ends_ptr, start, end, g, BLOCK_K)
                    at = suffix_ptr + (bag + g) * d_in + o_d  # written above, by the same threads
                    suffix += scale * tl.load(at, mask=m_d, other=0.0).to(ACC)
                    tl.store(at, suffix.to(suffix_ptr.dtype.element_ty), mask=m_d)
                    tl.store(norms_ptr + bag + g, tl.sqrt(tl.sum(suffix * suffix, axis=0)))
                    dacts = tl.sum(w * suffix[None, :], axis=1)
                    again = tl.load(latents_ptr + o, mask=m, other=0).to(tl.int32)  # fewer registers than to keep them
                    a = tl.load(acts_ptr + o, mask=m, other=0.0).to(ACC)
                    m_g = (o_k >= low) & (o_k < high)
                    store_entries(dacts_ptr, bags_ptr, keys_ptr, o, m_g, dacts, a, again, bag + g + again * 0, shift)
                    high = low
            else:
                x_hat = b + tl.sum(acts[:, None] * w, axis=0)
                e = tl.where(m_d, x_hat - x, 0.0)
                squared = e * e
                suffix = scale * e
                dacts = tl.sum(w * suffix[None, :], axis=1)
                tl.store(suffix_ptr + bag * d_in + o_d, suffix.to(suffix_ptr.dtype.element_ty), mask=m_d)
                tl.store(norms_ptr + bag, tl.sqrt(tl.sum(suffix * suffix, axis=0)))
                store_entries(dacts_ptr, bags_ptr, keys_ptr, o, m, dacts, acts, latents, bag + latents * 0, shift)
            tl.store(squared_ptr + row, tl.sum(squared, axis=0))
            tl.store(x_hat_ptr + row * d_in + o_d, x_hat.to(x_hat_ptr.dtype.element_ty), mask=m_d)

    if LONG:
        if (end - start > BLOCK_K) | (HOLD == 0):
            x_hat = b
            squared = tl.zeros([BLOCK_D], dtype=ACC)
            smallest = tl.full([STEP_K], float("inf"), ACC)
            low, high = start, end
            for g in range(n_groups):
                if PREFIXES:
                    high = start + group_size(latents_ptr, group_ends_ptr, start, end, g + 1, 128)
                for p in range(low, high, STEP_K):
                    o = p + tl.arange(0, STEP_K)
                    m = o < high
                    acts, latents, w = load_entries(acts_ptr, latents_ptr, W_ptr, o, m, d_in, o_d, m_d, ACC)
                    x_hat += tl.sum(acts[:, None] * w, axis=0)
                    smallest = tl.minimum(smallest, tl.where(acts > 0, acts, float("inf")))
                e = tl.where(m_d, x_hat - x, 0.0)
                squared += e * e
                tl.store(suffix_ptr + (bag + g) * d_in + o_d, e.to(suffix_ptr.dtype.element_ty), mask=m_d)
                low = high
            suffix = tl.zeros([BLOCK_D], dtype=ACC)
            low, high = start, end
            for i in range(n_groups):
                g = n_groups - 1 - i
                at = suffix_ptr + (bag + g) * d_in + o_d
                suffix += scale * tl.load(at, mask=m_d, other=0.0).to(ACC)
                tl.store(at, suffix.to(suffix_ptr.dtype.element_ty), mask=m_d)
                tl.store(norms_ptr + bag + g, tl.sqrt(tl.sum(suffix * suffix, axis=0)))
                if PREFIXES:
                    low = start + group_size(latents_ptr, group_ends_ptr, start, end, g, 128)
                for p in range(low, high, STEP_K):
                    o = p + tl.arange(0, STEP_K)
                    m = o < high
                    acts, latents, w = load_entries(acts_ptr, latents_ptr, W_ptr, o, m, d_in, o_d, m_d, ACC)
                    dacts = tl.sum(w * suffix[None, :], axis=1)
                    bags = bag + g + latents * 0
                    store_entries(dacts_ptr, bags_ptr, keys_ptr, o, m, dacts, acts, latents, bags, shift)
                high = low
            tl.store(squared_ptr + row, tl.sum(squared, axis=0))
            tl.store(smallest_ptr + row, tl.min(smallest, axis=0))
            tl.store(x_hat_ptr + row * d_in + o_d, x_hat.to(x_hat_ptr.dtype.element_ty), mask=m_d)

    if CENTRE:
        c = tl.where(m_d, x - b, 0.0)
        tl.store(centred_ptr + row * d_in + o_d, c.to(centred_ptr.dtype.element_ty), mask=m_d)
        tl.store(x_norms_ptr + row, tl.sqrt(tl.sum(c * c, axis=0)))


# --- launch wrapper --------------------------------------------------------------------------------------------------


class Rows(NamedTuple):
    """What row_kernel leaves, in the sums' dtype but for x_hat (x's); flat entries as in the codes.

    x_hat_BD of the last prefix; suffix_RD [B * G, D] and the norms of its rows; x - b_dec and the norms of its rows;
    of every entry dact, bag (int32) and sort key (`key_type`); of every row the sum of the squared residuals, and the
    smallest positive activation (infinity if there is none).
    """

    x_hat_BD: Tensor
    suffix_RD: Tensor
    norms_R: Tensor
    centred_BD: Tensor
    x_norms_B: Tensor
    dacts_M: Tensor
    bags_M: Tensor
    keys_M: Tensor
    squared_B: Tensor
    smallest_B: Tensor


def key_type(n_latents: int) -> tuple[torch.dtype, int]:
    """(dtype, shift) of sort keys latent - shift: 16 bits take half the passes of 32."""
    return (torch.int16, 1 << 15) if n_latents <= 1 << 16 else (torch.int32, 0)


def whole_row_block(d_in: int, elements_per_thread: int) -> tuple[int, int]:
    """(BLOCK_D, num_warps) of a kernel whose program owns a row."""
    if d_in > MAX_WIDTH:
        raise ValueError(f"d_in: {d_in} is above {MAX_WIDTH}, the widest row that the training step updates on a GPU")
    block_d = triton.next_power_of_2(d_in)
    return block_d, max(1, min(16, block_d // (32 * elements_per_thread)))


def row_tile(d_in: int, k: int | None) -> dict[str, int | bool]:
    """Constants of row_kernel for rows of k entries (None: ragged)."""
    block_d, _ = whole_row_block(d_in, 4)
    block_k = triton.next_power_of_2(min(k or HELD_ENTRIES, HELD_ENTRIES))
    hold = block_k * block_d <= 2 * HELD_ELEMENTS
    warps = 4 if block_k * block_d < HELD_ELEMENTS // 2 else 8
    if hold and block_k * block_d > HELD_ELEMENTS or not hold and block_d > 4096:
        warps = 16
    return {
        "HOLD": hold,
        "LONG": k is None or k > block_k or not hold,
        "BLOCK_K": block_k,
        "STEP_K": 4 if block_d <= 2048 else 2,
        "BLOCK_D": block_d,
        "num_warps": warps,
    }


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
    """Codes as in reference.py: [B, K] without row_offsets, or [M] with. centred: (x - b_dec, its norms) if at hand."""
    (n_rows, d_in), n_groups, n_latents = x_BD.shape, len(group_ends_G), len(W_dec_SD)
    sum_dtype, ACC = accumulator(W_dec_SD.dtype)
    device, n_entries = x_BD.device, latents.numel()
    key_dtype, shift = key_type(n_latents)
    new = lambda *shape: torch.empty(shape, dtype=sum_dtype, device=device)  # noqa: E731
    rows = Rows(
        x_hat_BD=torch.empty_like(x_BD),
        suffix_RD=new(n_rows * n_groups, d_in),
        norms_R=new(n_rows * n_groups),
        centred_BD=new(n_rows, d_in) if centred is None else centred[0],
        x_norms_B=new(n_rows) if centred is None else centred[1],
        dacts_M=new(n_entries),
        bags_M=torch.empty(n_entries, dtype=torch.int32, device=device),
        keys_M=torch.empty(n_entries, dtype=key_dtype, device=device),
        squared_B=new(n_rows),
        smallest_B=new(n_rows),
    )
    csr = row_offsets is not None
    n_padding = triton.cdiv(n_entries, n_rows)
    row_kernel[(n_rows,)](
        x_BD.contiguous(),
        acts.contiguous(),
        latents.contiguous(),
        latents if row_offsets is None else row_offsets,
        group_ends_G,
        W_dec_SD,
        b_dec_D,
        rows.x_hat_BD,
        rows.suffix_RD,
        rows.centred_BD,
        rows.dacts_M,
        rows.bags_M,
        rows.keys_M,
        rows.squared_B,
        rows.norms_R,
        rows.x_norms_B,
        rows.smallest_B,
        n_rows,
        n_entries,
        n_groups,
        0 if csr else latents.shape[1],
        n_latents,
        shift,
        n_padding,
        d_in,
        CSR=csr,
        PREFIXES=n_groups > 1,
        CENTRE=centred is None,
        BLOCK_PAD=triton.next_power_of_2(max(n_padding, 1)),
        ACC=ACC,
        **row_tile(d_in, None if csr else latents.shape[1]),
    )
    return rows
