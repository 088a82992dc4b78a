"""Triton kernels that decide the clip factor of a step on the device, mostly without making a gradient row.

Of latent s, from its entries alone (totals_kernel; docs/recipe.md section 2):

    db_enc[s] = sum of dacts      parallel[s] = sum of act * dact: how much of W_dec[s] its decoder gradient holds
    |dW_dec[s]| <= sum |act| |suffix[bag]|      |dW_enc[s]| <= sum |dact| |centred[row]|      equal for one entry
    idle[s] = 0 if it fired, else as many rows more

and db_dec = sum of suffix[first bag of a row] - W_enc^T db_enc, of which the rows of latents that fired are read. So
b_enc's and b_dec's part of the norm is known exactly, and W_enc's and W_dec's within a bound. Where all of it stays
below the limit nothing is clipped (decide_kernel); only otherwise does norm_kernel make the rows, of latents with
several entries, and write none of them. docs/kernels.md section 4
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

LATENTS, LATENTS_MANY = 8, 16  # of a program of totals_kernel: few latents, or many
MANY = 1 << 15
TILE_E = 16  # entries of each of them in one load; a latent of more is gone through alone
HEAVY_E = 512
ROWS_W = 4  # rows of W_enc in flight
COLUMN_ROWS, COLUMN_STEP, BLOCK_C = 128, 32, 256  # rows that a program of column_sum_kernel adds; columns
NORM_PROGRAMS, NORM_STEP = 1024, 2
DECIDE_BLOCK, CLIP_BLOCK = 4096, 2048
SLACK = 1 + 1e-4  # more than the rounding of a norm, which taking off a long parallel part would blow up


@triton.jit
def entry_terms(o, m, acts_ptr, dacts_ptr, bags_ptr, rows_ptr, norms_ptr, x_norms_ptr):
    """Of entries o: dact, act * dact, |act| |suffix|, |dact| |centred|, whether it fired (int32)."""
    a = tl.load(acts_ptr + o, mask=m, other=0.0)
    d = tl.load(dacts_ptr + o, mask=m, other=0.0)
    suffix = tl.load(norms_ptr + tl.load(bags_ptr + o, mask=m, other=0), mask=m, other=0.0)
    centred = tl.load(x_norms_ptr + tl.load(rows_ptr + o, mask=m, other=0), mask=m, other=0.0)
    return d, a * d, tl.abs(a) * suffix, tl.abs(d) * centred.to(d.dtype), (a > 0).to(tl.int32)


@triton.jit(do_not_specialize=["n_latents", "n_rows"])
def totals_kernel(
    acts_ptr,
    dacts_ptr,
    bags_ptr,
    rows_ptr,
    offsets_ptr,
    norms_ptr,
    x_norms_ptr,
    W_enc_ptr,
    idle_ptr,
    db_enc_ptr,
    parallel_ptr,
    db_parts_ptr,
    square_parts_ptr,
    n_latents,
    n_rows,
    d_in,
    SLACK: tl.constexpr,
    LATENTS: tl.constexpr,
    TILE_E: tl.constexpr,
    HEAVY_E: tl.constexpr,
    ROWS_W: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
):
    """LATENTS latents: totals of their entries, and db_parts[program] = sum of db_enc * W_enc over them.

    square_parts[program] = (squares that are exact, bound of the others).
    """
    program = tl.program_id(0).to(tl.int64)
    o_s = program * LATENTS + tl.arange(0, LATENTS)
    m_s = o_s < n_latents
    starts = tl.load(offsets_ptr + o_s, mask=m_s, other=0)
    counts = tl.load(offsets_ptr + o_s + 1, mask=m_s, other=0) - starts
    o_e = tl.arange(0, TILE_E)
    m = (o_e[None, :] < counts[:, None]) & (counts <= TILE_E)[:, None]
    o = starts[:, None] + o_e[None, :]
    db, par, dec, enc, fires = entry_terms(o, m, acts_ptr, dacts_ptr, bags_ptr, rows_ptr, norms_ptr, x_norms_ptr)
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
                    t0, t1, t2, t3, f = entry_terms(
                        p + o_h, m_h, acts_ptr, dacts_ptr, bags_ptr, rows_ptr, norms_ptr, x_norms_ptr
                    )
                    db += tl.where(this, tl.sum(t0, axis=0), 0.0)
                    par += tl.where(this, tl.sum(t1, axis=0), 0.0)
                    dec += tl.where(this, tl.sum(t2, axis=0), 0.0)
                    enc += tl.where(this, tl.sum(t3, axis=0), 0.0)
                    fires += tl.where(this, tl.sum(f, axis=0), 0)
    tl.store(db_enc_ptr + o_s, db, mask=m_s)
    tl.store(parallel_ptr + o_s, par, mask=m_s)
    idle = tl.load(idle_ptr + o_s, mask=m_s, other=0)
    tl.store(idle_ptr + o_s, tl.where(fires > 0, 0, idle + n_rows), mask=m_s)

    slack = tl.where(counts > 1, SLACK, 1.0).to(ACC)
    across = dec * slack * dec * slack - par * par  # Pythagoras: rows of W_dec are unit
    squares = tl.where(across < 0, 0.0, across) + enc * slack * enc * slack
    exact = tl.where(counts > 1, 0.0, squares) + db * db
    tl.store(square_parts_ptr + 2 * program, tl.sum(exact, axis=0))
    tl.store(square_parts_ptr + 2 * program + 1, tl.sum(tl.where(counts > 1, squares, 0.0), axis=0))

    tl.debug_barrier()  # read by other threads than wrote it
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < d_in
    acc = tl.zeros([BLOCK_D], dtype=ACC)
    for i in range(0, LATENTS, ROWS_W):
        o_w = program * LATENTS + i + tl.arange(0, ROWS_W)
        weight = tl.load(db_enc_ptr + o_w, mask=o_w < n_latents, other=0.0)
        mask = (weight != 0)[:, None] & m_d[None, :]
        w = tl.load(W_enc_ptr + o_w[:, None] * d_in + o_d[None, :], mask=mask, other=0.0).to(ACC)
        acc += tl.sum(weight[:, None] * w, axis=0)
    tl.store(db_parts_ptr + program * d_in + o_d, acc, mask=m_d)


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


@triton.jit(
    do_not_specialize=["n_rows", "n_groups", "n_first", "n_second", "n_totals", "threshold_start"],
)
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
    if THRESHOLD:
        least = tl.min(smallest, axis=0)
        least = tl.where(least == float("inf"), 0.0, least).to(tl.float32)
        old = tl.load(threshold_ptr)
        new = tl.where(old < 0, least, BETA * old + (1 - BETA) * least)
        tl.store(threshold_ptr, tl.where(step > threshold_start, new, old))


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
    CHUNK: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
):
    """squares[side, program]: of the gradient rows of latents with several entries. Nothing where it is not needed."""
    if tl.load(needed_ptr) != 0:
        program, side = tl.program_id(0), tl.program_id(1)
        o_d = tl.arange(0, BLOCK_D)
        m_d = o_d < d_in
        total = tl.full([], 0.0, ACC)
        for s in range(program, n_latents, n_programs):
            start, end = tl.load(offsets_ptr + s), tl.load(offsets_ptr + s + 1)
            if end - start > 1:
                if side == 0:
                    g = latent_row(
                        acts_ptr, bags_ptr, suffix_ptr, dec_partials_ptr, start, end, d_in, o_d, m_d,
                        CHUNK, BLOCK_P, BLOCK_D, ACC,
                    )  # fmt: skip
                    par = tl.load(parallel_ptr + s)
                    square = tl.sum(g * g, axis=0) - par * par
                    total += tl.where(square < 0, 0.0, square)
                else:
                    g = latent_row(
                        dacts_ptr, rows_ptr, centred_ptr, enc_partials_ptr, start, end, d_in, o_d, m_d,
                        CHUNK, BLOCK_P, BLOCK_D, ACC,
                    )  # fmt: skip
                    total += tl.sum(g * g, axis=0)
        tl.store(squares_ptr + side * n_programs + program, total)


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


class Totals(NamedTuple):
    """Of every latent db_enc [S] and parallel [S]; of every totals_kernel program db_parts [P, D], squares [P, 2]."""

    db_enc_S: Tensor
    parallel_S: Tensor
    db_parts: Tensor
    square_parts: Tensor


class Decision(NamedTuple):
    """db_dec [D]; squares known exactly [1]; whether the norm is needed int32 [1]; losses [3]: overall, mse, aux."""

    db_dec_D: Tensor
    exact: Tensor
    needed: Tensor
    losses: Tensor


def launch_totals(entries: Entries, rows: Rows, W_enc_SD: Tensor, idle_S: Tensor) -> Totals:
    """Totals, and idle_S moved on in place."""
    n_latents, d_in = W_enc_SD.shape
    sum_dtype, ACC = accumulator(W_enc_SD.dtype)
    latents = LATENTS_MANY if n_latents >= MANY else LATENTS
    n_programs = triton.cdiv(n_latents, latents)
    new = lambda *shape: torch.empty(shape, dtype=sum_dtype, device=W_enc_SD.device)  # noqa: E731
    totals = Totals(new(n_latents), new(n_latents), new(n_programs, d_in), new(n_programs, 2))
    block_d, num_warps = whole_row_block(d_in, elements_per_thread=8)
    totals_kernel[(n_programs,)](
        *entries[:5],
        rows.norms_R,
        rows.x_norms_B,
        W_enc_SD,
        idle_S,
        *totals,
        n_latents,
        len(rows.x_norms_B),
        d_in,
        SLACK=SLACK,
        LATENTS=latents,
        TILE_E=TILE_E,
        HEAVY_E=HEAVY_E,
        ROWS_W=ROWS_W,
        BLOCK_D=block_d,
        ACC=ACC,
        num_warps=max(2, num_warps),
    )
    return totals


def sum_step(block_d: int) -> int:
    """Rows that decide_kernel adds at a time: 64 registers a thread, or 32 of wide rows."""
    return min(32, (1 << (15 if block_d <= 2048 else 14)) // block_d)


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
    n_first, n_second = triton.cdiv(n_rows, COLUMN_ROWS), triton.cdiv(len(totals.db_parts), COLUMN_ROWS)
    sums = new(n_first + n_second, d_in)
    column_sum_kernel[(n_first + n_second, triton.cdiv(d_in, BLOCK_C))](
        rows.suffix_RD,
        totals.db_parts,
        sums,
        n_rows,
        len(totals.db_parts),
        n_first,
        n_groups * d_in,
        d_in,
        ROWS=COLUMN_ROWS,
        STEP=COLUMN_STEP,
        BLOCK_C=BLOCK_C,
        ACC=ACC,
        num_warps=4,
    )
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


def launch_clip(
    entries: Entries,
    totals: Totals,
    decision: Decision,
    clip_norm: float,
    schedule: Tensor,
    betas: tuple[float, float],
    eps: float,
    b_dec: tuple[Tensor, Tensor, Tensor],
) -> Tensor:
    """The clip factor [1]; and b_dec with its moments moved in place."""
    n_latents, d_in = len(totals.db_enc_S), entries.centred_BD.shape[1]
    sum_dtype, ACC = accumulator(entries.acts_M.dtype)
    block_d, num_warps = whole_row_block(d_in, elements_per_thread=4)
    n_programs = min(NORM_PROGRAMS, n_latents)
    squares = torch.empty(2 * n_programs, dtype=sum_dtype, device=entries.acts_M.device)
    norm_kernel[(n_programs, 2)](
        *entries[:7],
        entries.partials[0],
        entries.partials[1],
        totals.parallel_S,
        decision.needed,
        squares,
        n_latents,
        n_programs,
        d_in,
        CHUNK=CHUNK,
        BLOCK_P=NORM_STEP,
        BLOCK_D=block_d,
        ACC=ACC,
        num_warps=num_warps,
    )
    clip = torch.empty(1, dtype=sum_dtype, device=squares.device)
    clip_kernel[(1,)](
        squares,
        decision.exact,
        decision.needed,
        clip,
        decision.db_dec_D,
        schedule,
        *b_dec,
        2 * n_programs,
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
