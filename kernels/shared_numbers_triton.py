"""Triton kernels of the few numbers by which ranks agree on a step: b_dec's gradient, the losses, the clip factor.

    numbers_kernel   of a rank [D + 2]: - W_enc^T db_enc of its latents, its rows' squared error, and the squared norm
                     of the gradients of its latents
                     ranks tell each other these
    settle_kernel    of all ranks, added rank after rank: the clip factor, b_dec's step, losses, moving threshold

A single process decides by a bound whether it has to make the rows of the norm (gradient_norm_triton.py). A rank makes
its own always: to tell the bounds first would be one more exchange, which takes longer. docs/kernels.md section 4
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .gradient_norm_triton import (
    DB_ROWS,
    NORM_PROGRAMS,
    WIDE_REGISTERS,
    add_squares,
    last_to_arrive,
    move_threshold,
    part_sums,
    row_results,
    store_losses,
)
from .latent_update_triton import Scalars, moved
from .segment_sum_triton import CHUNK, accumulator
from .step_entries_triton import Entries, register_limit
from .step_rows_triton import Rows, whole_row_block
from .step_totals_triton import Totals, added_rows

BLOCK = 1024
NUMBERS = ["n_latents", "n_programs", "n_squares", "n_totals", "n_parts", "n_sums", "n_row_sums", "n_rows"]


@triton.jit(do_not_specialize=NUMBERS)
def numbers_kernel(
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
    db_parts_ptr,
    square_parts_ptr,
    squared_ptr,
    aux_ptr,
    aux_db_ptr,
    sums_ptr,
    squares_ptr,
    arrivals_ptr,
    numbers_ptr,
    of_rows_ptr,
    n_latents,
    n_programs,
    n_squares,
    n_totals,
    n_parts,
    n_sums,
    n_row_sums,
    n_rows,
    d_in,
    FIRST: tl.constexpr,
    HAS_AUX: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
):
    """squares[side - FIRST, program] of the gradient rows of latents with several entries; sums of ROWS rows of
    db_parts, of latents and of rows apart, by the first programs. The last one then has the numbers [D + 2], and the
    sum of rows [D]. Sides: 0 of W_dec, 1 of W_enc.

    aux: (loss, squared norm of its gradients but for b_dec's part, which is aux_db).
    """
    program, side = tl.program_id(0), tl.program_id(1) + FIRST
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < d_in
    columns = d_in, o_d, m_d
    total = tl.full([], 0.0, ACC)
    for s in range(program, n_latents, n_programs):
        segment = tl.load(offsets_ptr + s), tl.load(offsets_ptr + s + 1)
        if segment[1] - segment[0] > 1:
            if side == 0:
                total = add_squares(
                    total,
                    acts_ptr,
                    bags_ptr,
                    suffix_ptr,
                    dec_partials_ptr,
                    parallel_ptr,
                    s,
                    segment,
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
                    segment,
                    columns,
                    False,
                    CHUNK,
                    BLOCK_D,
                    ACC,
                )
    tl.store(squares_ptr + (side - FIRST) * n_programs + program, total)
    if side == FIRST:
        for p in range(program, n_sums + n_row_sums, n_programs):
            of_rows = p >= n_sums
            first = tl.where(of_rows, n_totals + (p - n_sums) * ROWS, p * ROWS)
            last = tl.minimum(first + ROWS, tl.where(of_rows, n_parts, n_totals))
            added = added_rows(db_parts_ptr, first, last, d_in, o_d, m_d, STEP, BLOCK_D, ACC)
            tl.store(sums_ptr + p * d_in + o_d, added, mask=m_d)
    if last_to_arrive(arrivals_ptr, n_squares):
        of_rows = added_rows(sums_ptr, n_sums, n_sums + n_row_sums, d_in, o_d, m_d, STEP, BLOCK_D, ACC)
        tl.store(of_rows_ptr + o_d, of_rows, mask=m_d)
        db_dec = added_rows(sums_ptr, 0, n_sums, d_in, o_d, m_d, STEP, BLOCK_D, ACC)
        norm, _ = part_sums(square_parts_ptr, n_totals, BLOCK, ACC)
        squares, _ = row_results(squares_ptr, squares_ptr, n_squares, False, BLOCK, ACC)
        squared, _ = row_results(squared_ptr, squared_ptr, n_rows, False, BLOCK, ACC)
        norm += squares
        if HAS_AUX:
            db_dec -= tl.load(aux_db_ptr + o_d, mask=m_d, other=0.0).to(ACC)
            norm += tl.load(aux_ptr + 1).to(ACC)
        tl.store(numbers_ptr + o_d, db_dec, mask=m_d)
        tl.store(numbers_ptr + d_in, squared)
        tl.store(numbers_ptr + d_in + 1, norm)


@triton.jit(do_not_specialize=["n_ranks", "n_batch_rows", "n_groups", "threshold_start"])
def settle_kernel(
    numbers_ptr,
    of_rows_ptr,
    aux_ptr,
    smallest_ptr,
    losses_ptr,
    clip_ptr,
    schedule_ptr,
    step_index_ptr,
    bad_step_ptr,
    threshold_ptr,
    b_ptr,
    exp_avg_ptr,
    exp_avg_sq_ptr,
    n_ranks,
    n_batch_rows,
    n_groups,
    threshold_start,
    d_in,
    LIMIT: tl.constexpr,
    ALPHA: tl.constexpr,
    BETA: tl.constexpr,
    BETA1: tl.constexpr,
    BETA2: tl.constexpr,
    EPS: tl.constexpr,
    HAS_AUX: tl.constexpr,
    THRESHOLD: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
):
    """One program, of the numbers [R, D + 2] of all ranks: the same bits on each of them."""
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < d_in
    db_dec = tl.load(of_rows_ptr + o_d, mask=m_d, other=0.0) + tl.load(numbers_ptr + o_d, mask=m_d, other=0.0)
    squared, norm = tl.load(numbers_ptr + d_in), tl.load(numbers_ptr + d_in + 1)
    for rank in range(1, n_ranks):
        here = numbers_ptr + rank * (d_in + 2)
        db_dec += tl.load(here + o_d, mask=m_d, other=0.0)
        squared += tl.load(here + d_in)
        norm += tl.load(here + d_in + 1)
    clip = LIMIT / (tl.sqrt(norm + tl.sum(db_dec * db_dec, axis=0)) + 1e-6)
    clip = tl.where(clip > 1.0, 1.0, clip).to(ACC)
    tl.store(clip_ptr, clip)
    mse = squared / n_batch_rows / n_groups
    step = store_losses(mse, aux_ptr, losses_ptr, step_index_ptr, bad_step_ptr, ALPHA, HAS_AUX, ACC)
    if THRESHOLD:
        move_threshold(threshold_ptr, tl.load(smallest_ptr), step, threshold_start, BETA)
    moved(b_ptr, exp_avg_ptr, exp_avg_sq_ptr, o_d, m_d, db_dec * clip, schedule_ptr, BETA1, BETA2, EPS)


# --- launch wrappers -------------------------------------------------------------------------------------------------


def launch_numbers(
    entries: Entries, rows: Rows, totals: Totals, frozen: str | None = None, aux: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """numbers [D + 2] of this rank, and the part of b_dec's gradient that is of all rows [D], which every rank has.

    rows.squared_B: of the rank's share of the rows. frozen: as of launch_totals.

    aux: of the auxiliary loss (its value, squared norm of its gradients but for b_dec's) [2], and its W_enc^T db_enc.
    """
    n_latents, n_totals, (n_parts, d_in) = len(totals.db_enc_S), len(totals.square_parts), totals.db_parts.shape
    sum_dtype, ACC = accumulator(entries.acts_M.dtype)
    block_d, num_warps = whole_row_block(d_in, elements_per_thread=4)
    n_programs, n_sides = min(NORM_PROGRAMS, n_latents), 2 if frozen is None else 1
    n_squares = n_sides * n_programs
    n_sums, n_row_sums = triton.cdiv(n_totals, DB_ROWS), triton.cdiv(n_parts - n_totals, DB_ROWS)
    new = lambda *shape: torch.empty(shape, dtype=sum_dtype, device=entries.acts_M.device)  # noqa: E731
    sums, squares, numbers, of_rows_D = new(n_sums + n_row_sums, d_in), new(n_squares), new(d_in + 2), new(d_in)
    numbers_kernel[(n_programs, n_sides)](
        *entries[:7],
        entries.partials[0],
        entries.partials[1],
        totals.parallel_S,
        totals.db_parts,
        totals.square_parts,
        rows.squared_B,
        *((sums, sums) if aux is None else aux),
        sums,
        squares,
        totals.arrivals,
        numbers,
        of_rows_D,
        n_latents,
        n_programs,
        n_squares,
        n_totals,
        n_parts,
        n_sums,
        n_row_sums,
        len(rows.squared_B),
        d_in,
        FIRST=1 if frozen == "W_dec" else 0,
        HAS_AUX=aux is not None,
        CHUNK=CHUNK,
        ROWS=DB_ROWS,
        STEP=step_of(block_d, num_warps),
        BLOCK=BLOCK,
        BLOCK_D=block_d,
        ACC=ACC,
        num_warps=num_warps,
        **register_limit(block_d, sum_dtype, wide=WIDE_REGISTERS),
    )
    return numbers, of_rows_D


def step_of(block_d: int, num_warps: int) -> int:
    """Rows that a program adds at a time: 16 registers a thread."""
    return max(1, 512 * num_warps // block_d)


def launch_settle(
    numbers: Tensor,
    of_rows_D: Tensor,
    scalars: Scalars,
    counters: tuple[Tensor, Tensor, Tensor],
    b_dec: tuple[Tensor, Tensor, Tensor],
    sizes: tuple[int, int],
    clip_norm: float,
    auxk_alpha: float,
    moving: tuple[Tensor, float, int] | None = None,
    aux: Tensor | None = None,
) -> Tensor:
    """Losses [3] (overall, mse, aux) of all ranks' numbers [R, D + 2]. Moves b_dec, its moments and the counters.

    Args:
        numbers: as launch_numbers leaves them.
        of_rows_D: the part of b_dec's gradient that every rank has whole, of launch_numbers.
        scalars: of which clip is written.
        counters: step_index and bad_step (int64), and threshold (float32).
        b_dec: with its moments.
        sizes: rows of the whole batch, Matryoshka groups.
        clip_norm, auxk_alpha: of the recipe.
        moving: the smallest activation that any rank keeps, and how the threshold moves with it: beta, start.
        aux: of launch_numbers, its first.
    """
    d_in = numbers.shape[1] - 2
    _, ACC = accumulator(numbers.dtype)
    losses = torch.empty(3, dtype=numbers.dtype, device=numbers.device)
    block_d, num_warps = whole_row_block(d_in, 4)
    settle_kernel[(1,)](
        numbers,
        of_rows_D,
        numbers if aux is None else aux,
        numbers if moving is None else moving[0],
        losses,
        scalars.clip,
        scalars.schedule,
        *counters,
        *b_dec,
        len(numbers),
        *sizes,
        0 if moving is None else moving[2],
        d_in,
        LIMIT=clip_norm,
        ALPHA=auxk_alpha,
        BETA=0.0 if moving is None else moving[1],
        BETA1=scalars.betas[0],
        BETA2=scalars.betas[1],
        EPS=scalars.eps,
        HAS_AUX=aux is not None,
        THRESHOLD=moving is not None,
        BLOCK_D=block_d,
        ACC=ACC,
        num_warps=num_warps,
    )
    return losses
