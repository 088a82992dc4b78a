"""Triton kernels that decide the clip factor of a step on the device, mostly without making a gradient row.

From the totals of every latent (step_totals_triton.py) follow b_enc's and b_dec's part of the norm exactly, with

    db_dec = sum of suffix[first bag of a row] - W_enc^T db_enc

and W_enc's and W_dec's part within a bound. Where all of it stays below the limit nothing is clipped (decide_kernel);
only otherwise does norm_kernel make the rows, of latents with several entries, and write none of them.
docs/kernels.md section 4
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .latent_update_triton import adam
from .segment_sum_triton import CHUNK, accumulator
from .step_entries_triton import Entries, latent_row
from .step_rows_triton import Rows, whole_row_block
from .step_totals_triton import Totals

COLUMN_ROWS, COLUMN_STEP, BLOCK_C = 128, 32, 256  # rows that a program of column_sum_kernel adds; columns
NORM_PROGRAMS, NORM_STEP = 1024, 2
DECIDE_BLOCK, CLIP_BLOCK = 4096, 2048


@triton.jit
def added_rows(source_ptr, first, last, stride, o_c, m_c, STEP: tl.constexpr, BLOCK_C: tl.constexpr, ACC: tl.constexpr):
    """[BLOCK_C] of the sum of rows first:last."""
    acc = tl.zeros([STEP, BLOCK_C], dtype=ACC)
    for r in range(first, last, STEP):
        o_r = r + tl.arange(0, STEP)
        at = source_ptr + o_r.to(tl.int64)[:, None] * stride + o_c[None, :]
        acc += tl.load(at, mask=(o_r < last)[:, None] & m_c[None, :], other=0.0)
    return tl.sum(acc, axis=0)


@triton.jit(do_not_specialize=["n_first", "n_second", "n_programs", "stride_first"])
def column_sum_kernel(
    first_ptr,
    second_ptr,
    out_ptr,
    n_first,
    n_second,
    n_programs,
    stride_first,
    d_in,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ACC: tl.constexpr,
):
    """out[program] = the sum of ROWS rows: the first n_programs of one matrix, the others of another."""
    program = tl.program_id(0)
    o_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < d_in
    if program < n_programs:
        r = program * ROWS
        total = added_rows(first_ptr, r, min(r + ROWS, n_first), stride_first, o_c, m_c, STEP, BLOCK_C, ACC)
    else:
        r = (program - n_programs) * ROWS
        total = added_rows(second_ptr, r, min(r + ROWS, n_second), d_in, o_c, m_c, STEP, BLOCK_C, ACC)
    tl.store(out_ptr + program.to(tl.int64) * d_in + o_c, total, mask=m_c)


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


@triton.jit(do_not_specialize=["n_rows", "n_groups", "n_first", "n_second", "n_totals", "threshold_start"])
def decide_kernel(
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
    n_rows,
    n_groups,
    n_first,
    n_second,
    n_totals,
    threshold_start,
    d_in,
    LIMIT: tl.constexpr,
    ALPHA: tl.constexpr,
    BETA: tl.constexpr,
    HAS_AUX: tl.constexpr,
    THRESHOLD: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
):
    """One program: db_dec, whether the norm has to be computed, losses, first bad step, moving threshold.

    aux: (loss, squared norm of its gradients but for b_dec's part, which is aux_db).
    """
    o = tl.arange(0, BLOCK)
    exact = tl.zeros([BLOCK], dtype=ACC)
    bound = tl.zeros([BLOCK], dtype=ACC)
    for p in range(0, n_totals, BLOCK):
        m = p + o < n_totals
        exact += tl.load(square_parts_ptr + 2 * (p + o), mask=m, other=0.0)
        bound += tl.load(square_parts_ptr + 2 * (p + o) + 1, mask=m, other=0.0)
    exact = tl.sum(exact, axis=0)

    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < d_in
    db_dec = added_rows(sums_ptr, 0, n_first, d_in, o_d, m_d, STEP, BLOCK_D, ACC)
    db_dec -= added_rows(sums_ptr, n_first, n_first + n_second, d_in, o_d, m_d, STEP, BLOCK_D, ACC)
    if HAS_AUX:
        db_dec -= tl.load(aux_db_ptr + o_d, mask=m_d, other=0.0).to(ACC)
        exact += tl.load(aux_ptr + 1).to(ACC)
    tl.store(db_dec_ptr + o_d, db_dec, mask=m_d)
    exact += tl.sum(db_dec * db_dec, axis=0)
    tl.store(exact_ptr, exact)
    below = tl.sqrt(exact + tl.sum(bound, axis=0)) < 0.999 * LIMIT - 1e-6  # NaN is not
    tl.store(needed_ptr, tl.where(below, 0, 1))

    squared = tl.zeros([BLOCK], dtype=ACC)
    smallest = tl.full([BLOCK], float("inf"), ACC)
    for p in range(0, n_rows, BLOCK):
        squared += tl.load(squared_ptr + p + o, mask=p + o < n_rows, other=0.0)
        if THRESHOLD:
            smallest = tl.minimum(smallest, tl.load(smallest_ptr + p + o, mask=p + o < n_rows, other=float("inf")))
    mse = tl.sum(squared, axis=0) / n_rows / n_groups
    step = store_losses(mse, aux_ptr, losses_ptr, step_index_ptr, bad_step_ptr, ALPHA, HAS_AUX, ACC)
    if THRESHOLD:
        move_threshold(threshold_ptr, tl.min(smallest, axis=0), step, threshold_start, BETA)


@triton.jit(do_not_specialize=["n_latents", "n_programs"])
def norm_kernel(
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
    needed_ptr,
    squares_ptr,
    n_latents,
    n_programs,
    d_in,
    ALWAYS: tl.constexpr,
    FIRST: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
):
    """squares[side - FIRST, program]: of the gradient rows of latents with several entries. Nothing where it is not
    needed. Sides: 0 of W_dec, 1 of W_enc."""
    needed = ALWAYS
    if not ALWAYS:
        needed = tl.load(needed_ptr) != 0
    if needed:
        program, side = tl.program_id(0), tl.program_id(1) + FIRST
        o_d = tl.arange(0, BLOCK_D)
        m_d = o_d < d_in
        total = tl.full([], 0.0, ACC)
        for s in range(program, n_latents, n_programs):
            start, end = tl.load(offsets_ptr + s), tl.load(offsets_ptr + s + 1)
            if end - start > 1:
                if side == 0:
                    g = latent_row(
                        acts_ptr,
                        bags_ptr,
                        suffix_ptr,
                        dec_partials_ptr,
                        start,
                        end,
                        d_in,
                        o_d,
                        m_d,
                        CHUNK,
                        BLOCK_P,
                        BLOCK_D,
                        ACC,
                    )
                    par = tl.load(parallel_ptr + s)
                    square = tl.sum(g * g, axis=0) - par * par
                    total += tl.where(square < 0, 0.0, square)
                else:
                    g = latent_row(
                        dacts_ptr,
                        rows_ptr,
                        centred_ptr,
                        enc_partials_ptr,
                        start,
                        end,
                        d_in,
                        o_d,
                        m_d,
                        CHUNK,
                        BLOCK_P,
                        BLOCK_D,
                        ACC,
                    )
                    total += tl.sum(g * g, axis=0)
        tl.store(squares_ptr + (side - FIRST) * n_programs + program, total)


@triton.jit(do_not_specialize=["n_squares"])
def clip_kernel(
    squares_ptr,
    exact_ptr,
    needed_ptr,
    clip_ptr,
    db_dec_ptr,
    schedule_ptr,
    b_ptr,
    exp_avg_ptr,
    exp_avg_sq_ptr,
    n_squares,
    d_in,
    LIMIT: tl.constexpr,
    BETA1: tl.constexpr,
    BETA2: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
):
    """One program: clip = min(1, limit / (norm + 1e-6)), or 1 where no norm was needed; and b_dec's step."""
    clip = tl.full([], 1.0, ACC)
    if tl.load(needed_ptr) != 0:
        o = tl.arange(0, BLOCK)
        acc = tl.zeros([BLOCK], dtype=ACC)
        for p in range(0, n_squares, BLOCK):
            acc += tl.load(squares_ptr + p + o, mask=p + o < n_squares, other=0.0)
        clip = LIMIT / (tl.sqrt(tl.sum(acc, axis=0) + tl.load(exact_ptr)) + 1e-6)
        clip = tl.where(clip > 1.0, 1.0, clip).to(ACC)
    tl.store(clip_ptr, clip)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < d_in
    g = tl.load(db_dec_ptr + o_d, mask=m_d, other=0.0) * clip
    b = tl.load(b_ptr + o_d, mask=m_d, other=0.0).to(ACC)
    exp_avg = tl.load(exp_avg_ptr + o_d, mask=m_d, other=0.0).to(ACC)
    exp_avg_sq = tl.load(exp_avg_sq_ptr + o_d, mask=m_d, other=0.0).to(ACC)
    b, exp_avg, exp_avg_sq = adam(b, exp_avg, exp_avg_sq, g, schedule_ptr, BETA1, BETA2, EPS)
    tl.store(b_ptr + o_d, b.to(b_ptr.dtype.element_ty), mask=m_d)
    tl.store(exp_avg_ptr + o_d, exp_avg.to(exp_avg_ptr.dtype.element_ty), mask=m_d)
    tl.store(exp_avg_sq_ptr + o_d, exp_avg_sq.to(exp_avg_sq_ptr.dtype.element_ty), mask=m_d)


# --- launch wrappers -------------------------------------------------------------------------------------------------


class Decision(NamedTuple):
    """db_dec [D]; squares known exactly [1]; whether the norm is needed int32 [1]; losses [3]: overall, mse, aux."""

    db_dec_D: Tensor
    exact: Tensor
    needed: Tensor
    losses: Tensor


def sum_step(block_d: int) -> int:
    """Rows that decide_kernel adds at a time: 64 registers a thread, or 32 of wide rows."""
    return min(32, (1 << (15 if block_d <= 2048 else 14)) // block_d)


def launch_column_sums(first_NGD: Tensor, second_PD: Tensor) -> tuple[Tensor, int, int]:
    """Sums of COLUMN_ROWS rows each: of the first group of one matrix, then of another; and how many of either."""
    (n_rows, n_groups, d_in), n_parts = first_NGD.shape, len(second_PD)
    _, ACC = accumulator(first_NGD.dtype)
    n_first, n_second = triton.cdiv(n_rows, COLUMN_ROWS), triton.cdiv(n_parts, COLUMN_ROWS)
    sums = torch.empty(n_first + n_second, d_in, dtype=first_NGD.dtype, device=first_NGD.device)
    column_sum_kernel[(n_first + n_second, triton.cdiv(d_in, BLOCK_C))](
        first_NGD,
        second_PD,
        sums,
        n_rows,
        n_parts,
        n_first,
        n_groups * d_in,
        d_in,
        ROWS=COLUMN_ROWS,
        STEP=COLUMN_STEP,
        BLOCK_C=BLOCK_C,
        ACC=ACC,
        num_warps=4,
    )
    return sums, n_first, n_second


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
    sums, n_first, n_second = launch_column_sums(rows.suffix_RD.view(n_rows, n_groups, d_in), totals.db_parts)
    needed = torch.empty(1, dtype=torch.int32, device=sums.device)
    decision = Decision(new(d_in), new(1), needed, new(3))
    block_d, _ = whole_row_block(d_in, 4)
    decide_kernel[(1,)](
        sums,
        totals.square_parts,
        rows.squared_B,
        rows.smallest_B,
        *((sums, sums) if aux is None else aux),
        *decision,
        *counters,
        n_rows,
        n_groups,
        n_first,
        n_second,
        len(totals.square_parts),
        0 if moving is None else moving[1],
        d_in,
        LIMIT=clip_norm,
        ALPHA=auxk_alpha,
        BETA=0.0 if moving is None else moving[0],
        HAS_AUX=aux is not None,
        THRESHOLD=moving is not None,
        STEP=sum_step(block_d),
        BLOCK=DECIDE_BLOCK,
        BLOCK_D=block_d,
        ACC=ACC,
        num_warps=16,
    )
    return decision


def launch_norm(entries: Entries, totals: Totals, needed: Tensor | None, frozen: str | None) -> Tensor:
    """Squares of the gradient rows of latents with several entries; undefined where needed [1] is 0 (None: it is 1)."""
    n_latents, d_in = len(totals.db_enc_S), entries.centred_BD.shape[1]
    sum_dtype, ACC = accumulator(entries.acts_M.dtype)
    block_d, num_warps = whole_row_block(d_in, elements_per_thread=4)
    n_programs, n_sides = min(NORM_PROGRAMS, n_latents), 2 if frozen is None else 1
    squares = torch.empty(n_sides * n_programs, dtype=sum_dtype, device=entries.acts_M.device)
    norm_kernel[(n_programs, n_sides)](
        *entries[:7],
        entries.partials[0],
        entries.partials[1],
        totals.parallel_S,
        entries.offsets_S1 if needed is None else needed,
        squares,
        n_latents,
        n_programs,
        d_in,
        ALWAYS=needed is None,
        FIRST=1 if frozen == "W_dec" else 0,
        CHUNK=CHUNK,
        BLOCK_P=NORM_STEP,
        BLOCK_D=block_d,
        ACC=ACC,
        num_warps=num_warps,
    )
    return squares


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
    d_in = entries.centred_BD.shape[1]
    sum_dtype, ACC = accumulator(entries.acts_M.dtype)
    block_d, _ = whole_row_block(d_in, elements_per_thread=4)
    squares = launch_norm(entries, totals, decision.needed, frozen)
    clip = torch.empty(1, dtype=sum_dtype, device=squares.device)
    clip_kernel[(1,)](
        squares,
        decision.exact,
        decision.needed,
        clip,
        decision.db_dec_D,
        schedule,
        *b_dec,
        len(squares),
        d_in,
        LIMIT=clip_norm,
        BETA1=betas[0],
        BETA2=betas[1],
        EPS=eps,
        BLOCK=CLIP_BLOCK,
        BLOCK_D=block_d,
        ACC=ACC,
        num_warps=8,
    )
    return clip
