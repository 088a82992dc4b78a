"""Triton kernels that decide the clip factor of a step on the device, mostly without making a gradient row.

From the totals of every latent (step_totals_triton.py) follow b_enc's and b_dec's part of the norm exactly, with

    db_dec = sum of suffix[first bag of a row] - W_enc^T db_enc

and W_enc's and W_dec's part within a bound. Where all of it stays below the limit nothing is clipped (decide_kernel);
only otherwise does clip_kernel make the rows, of latents with several entries, and write none of them.
docs/kernels.md section 4
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .latent_update_triton import moved
from .segment_sum_triton import CHUNK, accumulator
from .step_entries_triton import Entries, latent_row, register_limit
from .step_rows_triton import Rows, whole_row_block
from .step_totals_triton import Totals, added_rows

DB_ROWS, BLOCK_C = 32, 256  # parts of b_dec's gradient that a program of decide_kernel adds; their columns
NORM_PROGRAMS, WIDE_REGISTERS = 1024, 128
DECIDE_BLOCK, CLIP_BLOCK = 4096, 2048


@triton.jit
def last_to_arrive(arrivals_ptr, n_programs):
    """Whether this program is the last of n_programs to come here: then it can read what all have stored before.

    The counter is zero again afterwards.
    """
    tl.debug_barrier()  # all threads have stored
    last = tl.atomic_add(arrivals_ptr, 1, sem="acq_rel") == n_programs - 1
    if last:
        tl.store(arrivals_ptr, 0)
    return last


@triton.jit
def store_losses(
    mse,
    aux_ptr,
    losses_ptr,
    step_index_ptr,
    bad_step_ptr,
    ALPHA: tl.constexpr,
    HAS_AUX: tl.constexpr,
    ACC: tl.constexpr,
):
    """Writes (overall, mse, aux), and the step's index as the first bad one if it is that; returns the index."""
    aux = tl.full([], 0.0, ACC)
    if HAS_AUX:
        aux = tl.load(aux_ptr).to(ACC)
    overall = mse + ALPHA * aux
    tl.store(losses_ptr, overall)
    tl.store(losses_ptr + 1, mse)
    tl.store(losses_ptr + 2, aux)
    step, bad = tl.load(step_index_ptr), tl.load(bad_step_ptr)
    finite = tl.abs(overall) < float("inf")
    tl.store(bad_step_ptr, tl.where((bad < 0) & (finite == 0), step, bad))
    return step


@triton.jit
def move_threshold(threshold_ptr, least, step, start, BETA: tl.constexpr):
    """After step `start`: the threshold towards the batch's smallest activation, infinite where there is none."""
    least = tl.where(least == float("inf"), 0.0, least).to(tl.float32)
    old = tl.load(threshold_ptr)
    new = tl.where(old < 0, least, BETA * old + (1 - BETA) * least)
    tl.store(threshold_ptr, tl.where(step > start, new, old))


@triton.jit
def part_sums(parts_ptr, n_parts, BLOCK: tl.constexpr, ACC: tl.constexpr):
    """(the sum of exact squares, of bounded ones) over square_parts."""
    o = tl.arange(0, BLOCK)
    exact = tl.zeros([BLOCK], dtype=ACC)
    bound = tl.zeros([BLOCK], dtype=ACC)
    for p in range(0, n_parts, BLOCK):
        m = p + o < n_parts
        exact += tl.load(parts_ptr + 2 * (p + o), mask=m, other=0.0)
        bound += tl.load(parts_ptr + 2 * (p + o) + 1, mask=m, other=0.0)
    return tl.sum(exact, axis=0), tl.sum(bound, axis=0)


@triton.jit
def row_results(squared_ptr, smallest_ptr, n_rows, THRESHOLD: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr):
    """(sum of the rows' squared residuals, the smallest of their smallest activations)."""
    o = tl.arange(0, BLOCK)
    squared = tl.zeros([BLOCK], dtype=ACC)
    smallest = tl.full([BLOCK], float("inf"), ACC)
    for p in range(0, n_rows, BLOCK):
        squared += tl.load(squared_ptr + p + o, mask=p + o < n_rows, other=0.0)
        if THRESHOLD:
            smallest = tl.minimum(smallest, tl.load(smallest_ptr + p + o, mask=p + o < n_rows, other=float("inf")))
    return tl.sum(squared, axis=0), tl.min(smallest, axis=0)


@triton.jit(do_not_specialize=["n_rows", "n_groups", "n_parts", "n_squares", "n_sums", "n_programs", "threshold_start"])
def decide_kernel(
    db_parts_ptr,
    sums_ptr,
    square_parts_ptr,
    squared_ptr,
    smallest_ptr,
    aux_ptr,
    aux_db_ptr,
    db_dec_ptr,
    exact_ptr,
    needed_ptr,
    losses_ptr,
    step_index_ptr,
    bad_step_ptr,
    threshold_ptr,
    arrivals_ptr,
    n_rows,
    n_groups,
    n_parts,
    n_squares,
    n_sums,
    n_programs,
    threshold_start,
    d_in,
    LIMIT: tl.constexpr,
    ALPHA: tl.constexpr,
    BETA: tl.constexpr,
    HAS_AUX: tl.constexpr,
    THRESHOLD: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
):
    """sums[program] = the sum of ROWS rows of db_parts. The last program then has: db_dec, whether the norm has to be
    computed, losses, first bad step, moving threshold.

    aux: (loss, squared norm of its gradients but for b_dec's part, which is aux_db).
    """
    program = tl.program_id(0)
    o_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < d_in
    last = tl.minimum(program * ROWS + ROWS, n_parts)
    total = added_rows(db_parts_ptr, program * ROWS, last, d_in, o_c, m_c, ROWS, BLOCK_C, ACC)
    tl.store(sums_ptr + program.to(tl.int64) * d_in + o_c, total, mask=m_c)
    if last_to_arrive(arrivals_ptr, n_programs):
        exact, bound = part_sums(square_parts_ptr, n_squares, BLOCK, ACC)
        o_d = tl.arange(0, BLOCK_D)
        m_d = o_d < d_in
        db_dec = added_rows(sums_ptr, 0, n_sums, d_in, o_d, m_d, STEP, BLOCK_D, ACC)
        if HAS_AUX:
            db_dec -= tl.load(aux_db_ptr + o_d, mask=m_d, other=0.0).to(ACC)
            exact += tl.load(aux_ptr + 1).to(ACC)
        tl.store(db_dec_ptr + o_d, db_dec, mask=m_d)
        exact += tl.sum(db_dec * db_dec, axis=0)
        tl.store(exact_ptr, exact)
        below = tl.sqrt(exact + bound) < 0.999 * LIMIT - 1e-6  # NaN is not
        tl.store(needed_ptr, tl.where(below, 0, 1))

        squared, least = row_results(squared_ptr, smallest_ptr, n_rows, THRESHOLD, BLOCK, ACC)
        mse = squared / n_rows / n_groups
        step = store_losses(mse, aux_ptr, losses_ptr, step_index_ptr, bad_step_ptr, ALPHA, HAS_AUX, ACC)
        if THRESHOLD:
            move_threshold(threshold_ptr, least, step, threshold_start, BETA)


@triton.jit
def add_squares(
    total,
    weights_ptr,
    ids_ptr,
    source_ptr,
    partials_ptr,
    along_ptr,
    s,
    segment,
    columns,
    ALONG: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
):
    """total + the square of latent s's gradient row; without the part along W_dec's row (ALONG)."""
    start, end = segment
    d_in, o_d, m_d = columns
    g = latent_row(weights_ptr, ids_ptr, source_ptr, partials_ptr, start, end, d_in, o_d, m_d, CHUNK, BLOCK_D, ACC)
    square = tl.sum(g * g, axis=0)
    if ALONG:
        par = tl.load(along_ptr + s)
        square -= par * par
        square = tl.where(square < 0, 0.0, square)
    return total + square


@triton.jit(do_not_specialize=["n_latents", "n_programs", "n_squares"])
def clip_kernel(
    acts_ptr,
    dacts_ptr,
    bags_ptr,
    rows_ptr,
    offsets_ptr,
    suffix_ptr,
    centred_ptr,
    dec_partials_ptr,
    enc_partials_ptr,
    parallel_ptr,
    squares_ptr,
    exact_ptr,
    needed_ptr,
    arrivals_ptr,
    clip_ptr,
    db_dec_ptr,
    schedule_ptr,
    b_ptr,
    exp_avg_ptr,
    exp_avg_sq_ptr,
    n_latents,
    n_programs,
    n_squares,
    d_in,
    FIRST: tl.constexpr,
    LIMIT: tl.constexpr,
    BETA1: tl.constexpr,
    BETA2: tl.constexpr,
    EPS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
):
    """clip = min(1, limit / (norm + 1e-6)), or 1 where no norm is needed; and b_dec's step.

    If it is needed: squares[side - FIRST, program] of the gradient rows of latents with several entries, and the last
    program has the rest; else the first one. Sides: 0 of W_dec, 1 of W_enc.
    """
    program, side = tl.program_id(0), tl.program_id(1) + FIRST
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < d_in
    needed = tl.load(needed_ptr) != 0
    mine = (program == 0) & (side == FIRST)
    if needed:
        total = tl.full([], 0.0, ACC)
        columns = d_in, o_d, m_d
        for s in range(program, n_latents, n_programs):
            start, end = tl.load(offsets_ptr + s), tl.load(offsets_ptr + s + 1)
            if end - start > 1:
                if side == 0:
                    total = add_squares(
                        total,
                        acts_ptr,
                        bags_ptr,
                        suffix_ptr,
                        dec_partials_ptr,
                        parallel_ptr,
                        s,
                        (start, end),
                        columns,
                        True,
                        CHUNK,
                        BLOCK_D,
                        ACC,
                    )
                else:
                    total = add_squares(
                        total,
                        dacts_ptr,
                        rows_ptr,
                        centred_ptr,
                        enc_partials_ptr,
                        parallel_ptr,
                        s,
                        (start, end),
                        columns,
                        False,
                        CHUNK,
                        BLOCK_D,
                        ACC,
                    )
        tl.store(squares_ptr + (side - FIRST) * n_programs + program, total)
        mine = last_to_arrive(arrivals_ptr, n_squares)
    if mine:
        clip = tl.full([], 1.0, ACC)
        if needed:
            o = tl.arange(0, BLOCK)
            acc = tl.zeros([BLOCK], dtype=ACC)
            for p in range(0, n_squares, BLOCK):
                acc += tl.load(squares_ptr + p + o, mask=p + o < n_squares, other=0.0)
            clip = LIMIT / (tl.sqrt(tl.sum(acc, axis=0) + tl.load(exact_ptr)) + 1e-6)
            clip = tl.where(clip > 1.0, 1.0, clip).to(ACC)
        tl.store(clip_ptr, clip)
        g = tl.load(db_dec_ptr + o_d, mask=m_d, other=0.0) * clip
        moved(b_ptr, exp_avg_ptr, exp_avg_sq_ptr, o_d, m_d, g, schedule_ptr, BETA1, BETA2, EPS)


# --- launch wrappers -------------------------------------------------------------------------------------------------


class Decision(NamedTuple):
    """db_dec [D]; squares known exactly [1]; whether the norm is needed int32 [1]; losses [3]: overall, mse, aux."""

    db_dec_D: Tensor
    exact: Tensor
    needed: Tensor
    losses: Tensor


def sum_step(block_d: int) -> int:
    """Rows that decide_kernel's last program adds at a time: 64 registers a thread."""
    return min(32, (1 << 14) // block_d)


def launch_decide(
    rows: Rows,
    totals: Totals,
    counters: tuple[Tensor, Tensor, Tensor],
    clip_norm: float,
    auxk_alpha: float,
    moving: tuple[float, int] | None = None,
    aux: tuple[Tensor, Tensor] | None = None,
) -> Decision:
    """counters: step_index and bad_step (int64), and threshold (float32), which moves with `moving`: (beta, start).

    aux: of the auxiliary loss (its value, squared norm of its gradients but for b_dec's) [2], and its W_enc^T db_enc.
    """
    n_rows, d_in = rows.centred_BD.shape
    n_groups = len(rows.suffix_RD) // n_rows
    sum_dtype, ACC = accumulator(rows.suffix_RD.dtype)
    new = lambda *shape: torch.empty(shape, dtype=sum_dtype, device=rows.suffix_RD.device)  # noqa: E731
    n_parts = len(totals.db_parts)
    grid = triton.cdiv(n_parts, DB_ROWS), triton.cdiv(d_in, BLOCK_C)
    sums = new(grid[0], d_in)
    needed = torch.empty(1, dtype=torch.int32, device=sums.device)
    decision = Decision(new(d_in), new(1), needed, new(3))
    block_d, _ = whole_row_block(d_in, 4)
    decide_kernel[grid](
        totals.db_parts,
        sums,
        totals.square_parts,
        rows.squared_B,
        rows.smallest_B,
        *((sums, sums) if aux is None else aux),
        *decision,
        *counters,
        totals.arrivals,
        n_rows,
        n_groups,
        n_parts,
        len(totals.square_parts),
        grid[0],
        grid[0] * grid[1],
        0 if moving is None else moving[1],
        d_in,
        LIMIT=clip_norm,
        ALPHA=auxk_alpha,
        BETA=0.0 if moving is None else moving[0],
        HAS_AUX=aux is not None,
        THRESHOLD=moving is not None,
        ROWS=DB_ROWS,
        BLOCK_C=BLOCK_C,
        STEP=sum_step(block_d),
        BLOCK=DECIDE_BLOCK,
        BLOCK_D=block_d,
        ACC=ACC,
        num_warps=8,
    )
    return decision


def launch_clip(
    entries: Entries,
    totals: Totals,
    decision: Decision,
    clip_norm: float,
    schedule: Tensor,
    betas: tuple[float, float],
    eps: float,
    b_dec: tuple[Tensor, Tensor, Tensor],
    frozen: str | None = None,
) -> Tensor:
    """The clip factor [1]; and b_dec with its moments moved in place. frozen: as of launch_totals."""
    n_latents, d_in = len(totals.db_enc_S), entries.centred_BD.shape[1]
    sum_dtype, ACC = accumulator(entries.acts_M.dtype)
    block_d, num_warps = whole_row_block(d_in, elements_per_thread=4)
    n_programs = min(NORM_PROGRAMS, n_latents)
    n_sides = 2 if frozen is None else 1
    squares = torch.empty(n_sides * n_programs, dtype=sum_dtype, device=entries.acts_M.device)
    clip = torch.empty(1, dtype=sum_dtype, device=squares.device)
    clip_kernel[(n_programs, n_sides)](
        *entries[:7],
        entries.partials[0],
        entries.partials[1],
        totals.parallel_S,
        squares,
        decision.exact,
        decision.needed,
        totals.arrivals[1:],
        clip,
        decision.db_dec_D,
        schedule,
        *b_dec,
        n_latents,
        n_programs,
        n_sides * n_programs,
        d_in,
        FIRST=1 if frozen == "W_dec" else 0,
        LIMIT=clip_norm,
        BETA1=betas[0],
        BETA2=betas[1],
        EPS=eps,
        CHUNK=CHUNK,
        BLOCK=CLIP_BLOCK,
        BLOCK_D=block_d,
        ACC=ACC,
        num_warps=num_warps,
        **register_limit(block_d, sum_dtype, wide=WIDE_REGISTERS),
    )
    return clip
