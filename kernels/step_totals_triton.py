"""Triton kernel that sums up every latent's entries: db_enc, its share along W_dec, and a bound of its gradient's norm.

Of latent s, from its entries alone (docs/recipe.md section 2):

    db_enc[s] = sum of dacts      parallel[s] = sum of act * dact: how much of W_dec[s] its decoder gradient holds
    |dW_dec[s]| <= sum |act| |suffix[bag]|      |dW_enc[s]| <= sum |dact| |centred[row]|      equal for one entry
    idle[s] = 0 if it fired, else as many rows more

and, for db_dec, the sum of db_enc * W_enc, of which the rows of latents that fired are read. gradient_norm_triton.py
decides by these. docs/kernels.md section 4
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .segment_sum_triton import accumulator
from .step_entries_triton import Entries, Order, placed_entries, register_limit
from .step_rows_triton import Rows, whole_row_block

LATENTS, PROGRAMS = 16, 528  # of a program at a time; how many programs go through them, at most
REGISTERS = 96  # of a thread
TILE_E = 32  # entries of each latent in one load; a latent of more is gone through alone
HEAVY_E = 512
ROWS_W, ROWS_WIDE = 4, 2  # rows in flight, narrow or wide
ROWS_B = 32  # rows of the batch that a program adds
SLACK = 1 + 1e-4  # more than the rounding of a norm, which taking off a long parallel part would blow up


@triton.jit
def added_rows(source_ptr, first, last, stride, o_c, m_c, STEP: tl.constexpr, BLOCK_C: tl.constexpr, ACC: tl.constexpr):
    """[BLOCK_C] of the sum of rows first:last."""
    acc = tl.zeros([STEP, BLOCK_C], dtype=ACC)
    for r in range(first, last, STEP):
        o_r = r + tl.arange(0, STEP)
        at = source_ptr + o_r.to(tl.int64)[:, None] * stride + o_c[None, :]
        acc += tl.load(at, mask=(o_r < last)[:, None] & m_c[None, :], other=0.0)
    return tl.sum(acc, axis=0)


@triton.jit
def entry_terms(p, m, codes, ordered, norms, n_groups, PREFIXES: tl.constexpr, ACC: tl.constexpr):
    """Of the entries at places p: dact, act * (dact - l1), |act| |suffix|, |dact| |centred|, whether it fired (int32).

    Stores them in latent order, one dependent load less in every gather that follows.
    """
    acts_ptr, dacts_ptr, bags_ptr, rows_ptr = ordered
    norms_ptr, x_norms_ptr, l1 = norms
    a, d, bags, rows = placed_entries(codes, p, m, n_groups, PREFIXES, ACC)
    tl.store(acts_ptr + p, a, mask=m)
    tl.store(dacts_ptr + p, d, mask=m)
    tl.store(bags_ptr + p, bags, mask=m)
    if PREFIXES:
        tl.store(rows_ptr + p, rows, mask=m)
    suffix = tl.load(norms_ptr + bags, mask=m, other=0.0)
    centred = tl.load(x_norms_ptr + rows, mask=m, other=0.0)
    return d, a * (d - l1), tl.abs(a) * suffix, tl.abs(d) * centred.to(ACC), (a > 0).to(tl.int32)


@triton.jit
def entry_sums(
    starts,
    counts,
    codes,
    ordered,
    norms,
    n_groups,
    PREFIXES: tl.constexpr,
    LATENTS: tl.constexpr,
    TILE_E: tl.constexpr,
    HEAVY_E: tl.constexpr,
    ACC: tl.constexpr,
):
    """entry_terms summed over the entries of each of LATENTS latents: all at once, then through those of many alone."""
    o_e = tl.arange(0, TILE_E)
    m = (o_e[None, :] < counts[:, None]) & (counts <= TILE_E)[:, None]
    o = starts[:, None] + o_e[None, :]
    db, par, dec, enc, fires = entry_terms(o, m, codes, ordered, norms, n_groups, PREFIXES, ACC)
    db, par, dec, enc = tl.sum(db, axis=1), tl.sum(par, axis=1), tl.sum(dec, axis=1), tl.sum(enc, axis=1)
    fires = tl.sum(fires, axis=1)
    if tl.max(counts, axis=0) > TILE_E:
        o_h = tl.arange(0, HEAVY_E)
        for i in range(LATENTS):
            this = tl.arange(0, LATENTS) == i
            start, count = tl.sum(tl.where(this, starts, 0), axis=0), tl.sum(tl.where(this, counts, 0), axis=0)
            if count > TILE_E:
                for p in range(start, start + count, HEAVY_E):
                    m_h = p + o_h < start + count
                    t0, t1, t2, t3, f = entry_terms(p + o_h, m_h, codes, ordered, norms, n_groups, PREFIXES, ACC)
                    db += tl.where(this, tl.sum(t0, axis=0), 0.0)
                    par += tl.where(this, tl.sum(t1, axis=0), 0.0)
                    dec += tl.where(this, tl.sum(t2, axis=0), 0.0)
                    enc += tl.where(this, tl.sum(t3, axis=0), 0.0)
                    fires += tl.where(this, tl.sum(f, axis=0), 0)
    return db, par, dec, enc, fires


@triton.jit
def weighted_rows(
    weights_ptr,
    W_ptr,
    first,
    n_latents,
    d_in,
    o_d,
    m_d,
    LATENTS: tl.constexpr,
    ROWS_W: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
):
    """[BLOCK_D] of the sum of weights * W over LATENTS rows from `first` on; rows of no weight are not read."""
    acc = tl.zeros([BLOCK_D], dtype=ACC)
    for i in range(0, LATENTS, ROWS_W):
        o_w = (first + i + tl.arange(0, ROWS_W)).to(tl.int64)
        weight = tl.load(weights_ptr + o_w, mask=o_w < n_latents, other=0.0)
        mask = (weight != 0)[:, None] & m_d[None, :]
        w = tl.load(W_ptr + o_w[:, None] * d_in + o_d[None, :], mask=mask, other=0.0).to(ACC)
        acc += tl.sum(weight[:, None] * w, axis=0)
    return acc


@triton.jit(do_not_specialize=["n_latents", "n_rows", "n_groups", "n_programs"])
def totals_kernel(
    order_ptr,
    acts_ptr,
    dacts_ptr,
    bags_ptr,
    ordered_acts_ptr,
    ordered_dacts_ptr,
    ordered_bags_ptr,
    ordered_rows_ptr,
    offsets_ptr,
    norms_ptr,
    x_norms_ptr,
    suffix_ptr,
    W_enc_ptr,
    idle_ptr,
    db_enc_ptr,
    parallel_ptr,
    db_parts_ptr,
    square_parts_ptr,
    arrivals_ptr,
    l1_ptr,
    n_latents,
    n_rows,
    n_groups,
    n_programs,
    suffix_stride,
    d_in,
    PREFIXES: tl.constexpr,
    HAS_L1: tl.constexpr,
    DECODER: tl.constexpr,
    ENCODER: tl.constexpr,
    SLACK: tl.constexpr,
    LATENTS: tl.constexpr,
    TILE_E: tl.constexpr,
    HEAVY_E: tl.constexpr,
    ROWS_W: tl.constexpr,
    ROWS_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
):
    """Of every n_programs-th LATENTS latents: totals of their entries; db_parts[program] = -sum of db_enc * W_enc.

    square_parts[program] = (squares that are exact, bound of the others), of W_dec's gradient (DECODER) and W_enc's.
    Of the programs from n_programs on: db_parts[program] = sum of ROWS_B rows of suffix.
    """
    program = tl.program_id(0)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < d_in
    acc = tl.zeros([BLOCK_D], dtype=ACC)
    l1 = tl.full([], 0.0, ACC)
    if HAS_L1:
        l1 = tl.load(l1_ptr)
    codes, norms = (order_ptr, acts_ptr, dacts_ptr, bags_ptr), (norms_ptr, x_norms_ptr, l1)
    ordered = ordered_acts_ptr, ordered_dacts_ptr, ordered_bags_ptr, ordered_rows_ptr
    if program < n_programs:
        exact, bound = tl.full([], 0.0, ACC), tl.full([], 0.0, ACC)
        for first in range(program * LATENTS, n_latents, n_programs * LATENTS):
            o_s = first + tl.arange(0, LATENTS)
            m_s = o_s < n_latents
            starts = tl.load(offsets_ptr + o_s, mask=m_s, other=0)
            counts = tl.load(offsets_ptr + o_s + 1, mask=m_s, other=0) - starts
            db, par, dec, enc, fires = entry_sums(
                starts, counts, codes, ordered, norms, n_groups, PREFIXES, LATENTS, TILE_E, HEAVY_E, ACC
            )
            tl.store(db_enc_ptr + o_s, db, mask=m_s)
            tl.store(parallel_ptr + o_s, par, mask=m_s)
            idle = tl.load(idle_ptr + o_s, mask=m_s, other=0)
            tl.store(idle_ptr + o_s, tl.where(fires > 0, 0, idle + n_rows), mask=m_s)

            slack = tl.where(counts > 1, SLACK, 1.0).to(ACC)
            squares = tl.zeros_like(enc)
            if DECODER:
                across = dec * slack * dec * slack - par * par  # Pythagoras: rows of W_dec are unit
                squares += tl.where(across < 0, 0.0, across)
            if ENCODER:
                squares += enc * slack * enc * slack
            exact += tl.sum(tl.where(counts > 1, 0.0, squares) + db * db, axis=0)
            bound += tl.sum(tl.where(counts > 1, squares, 0.0), axis=0)

            tl.debug_barrier()  # read by other threads than wrote it
            acc -= weighted_rows(db_enc_ptr, W_enc_ptr, first, n_latents, d_in, o_d, m_d, LATENTS, ROWS_W, BLOCK_D, ACC)
        tl.store(square_parts_ptr + 2 * program, exact)
        tl.store(square_parts_ptr + 2 * program + 1, bound)
    else:
        r = (program - n_programs) * ROWS_B
        acc += added_rows(suffix_ptr, r, tl.minimum(r + ROWS_B, n_rows), suffix_stride, o_d, m_d, ROWS_W, BLOCK_D, ACC)
    tl.store(db_parts_ptr + program.to(tl.int64) * d_in + o_d, acc, mask=m_d)
    if program == 0:
        tl.store(arrivals_ptr + tl.arange(0, 2), tl.zeros([2], dtype=tl.int32))


# --- launch wrapper --------------------------------------------------------------------------------------------------


class Totals(NamedTuple):
    """Of every latent db_enc [S] and parallel [S].

    db_parts [P, D], which sum to b_dec's gradient; square_parts [Q, 2]; arrivals: zeros int32 [2], which count the
    programs of later kernels.
    """

    db_enc_S: Tensor
    parallel_S: Tensor
    db_parts: Tensor
    square_parts: Tensor
    arrivals: Tensor


def launch_totals(
    entries: Entries,
    acts: Tensor,
    rows: Rows,
    order: Order,
    W_enc_SD: Tensor,
    idle_S: Tensor,
    frozen: str | None = None,
    l1: Tensor | None = None,
) -> Totals:
    """Totals; the entries are written in their order, and idle_S is moved on in place.

    frozen: W_enc or W_dec, whose gradient has no part in the norm. l1: what every dact has beside its dot product, 0-d.
    """
    (n_latents, d_in), n_rows = W_enc_SD.shape, len(rows.x_norms_B)
    n_groups = len(rows.suffix_RD) // n_rows
    sum_dtype, ACC = accumulator(W_enc_SD.dtype)
    n_programs = min(triton.cdiv(n_latents, LATENTS), PROGRAMS)
    n_parts = n_programs + triton.cdiv(n_rows, ROWS_B)
    new = lambda *shape: torch.empty(shape, dtype=sum_dtype, device=W_enc_SD.device)  # noqa: E731
    totals = Totals(
        db_enc_S=new(n_latents),
        parallel_S=new(n_latents),
        db_parts=new(n_parts, d_in),
        square_parts=new(n_programs, 2),
        arrivals=torch.empty(2, dtype=torch.int32, device=W_enc_SD.device),
    )
    block_d, num_warps = whole_row_block(d_in, elements_per_thread=8)
    totals_kernel[(n_parts,)](
        order.order_M,
        acts.contiguous(),
        rows.dacts_M,
        rows.bags_M,
        *entries[:5],
        rows.norms_R,
        rows.x_norms_B,
        rows.suffix_RD,
        W_enc_SD,
        idle_S,
        *totals,
        totals.db_enc_S if l1 is None else l1.to(sum_dtype),
        n_latents,
        n_rows,
        n_groups,
        n_programs,
        n_groups * d_in,
        d_in,
        PREFIXES=n_groups > 1,
        HAS_L1=l1 is not None,
        DECODER=frozen != "W_dec",
        ENCODER=frozen != "W_enc",
        SLACK=SLACK,
        LATENTS=LATENTS,
        TILE_E=TILE_E,
        HEAVY_E=HEAVY_E,
        ROWS_W=ROWS_W if block_d <= 2048 else ROWS_WIDE,
        ROWS_B=ROWS_B,
        BLOCK_D=block_d,
        ACC=ACC,
        num_warps=max(2, num_warps),
        **register_limit(block_d, sum_dtype, REGISTERS),
    )
    return totals
