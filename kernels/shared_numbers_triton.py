"""Triton kernels of the few numbers by which ranks agree on a step: b_dec's gradient, the losses, the clip factor.

    numbers_kernel   of a rank [D + 2]: its part of b_dec's gradient, its rows' squared error, and the squared norm of
                     the gradients of its latents
                     ranks tell each other these
    settle_kernel    of all ranks, added rank after rank: the clip factor, b_dec's step, losses, moving threshold

A single process decides by a bound whether it has to make the rows of the norm (gradient_norm_triton.py). A rank makes
its own always: to tell the bounds first would be one more exchange, which takes longer. docs/kernels.md section 4
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .gradient_norm_triton import added_rows, launch_column_sums, launch_norm, move_threshold, store_losses, sum_step
from .latent_update_triton import Scalars, adam
from .segment_sum_triton import accumulator
from .step_entries_triton import Entries
from .step_rows_triton import Rows, whole_row_block
from .step_totals_triton import Totals

BLOCK = 2048


@triton.jit
def total_of(ptr, n, stride, BLOCK: tl.constexpr, ACC: tl.constexpr):
    """The sum of n numbers, each so many places after the last."""
    o = tl.arange(0, BLOCK)
    acc = tl.zeros([BLOCK], dtype=ACC)
    for p in range(0, n, BLOCK):
        acc += tl.load(ptr + stride * (p + o), mask=p + o < n, other=0.0).to(ACC)
    return tl.sum(acc, axis=0)


@triton.jit(do_not_specialize=["n_first", "n_second", "n_totals", "n_squares", "n_rows"])
def numbers_kernel(
    sums_ptr,
    square_parts_ptr,
    squares_ptr,
    squared_ptr,
    aux_ptr,
    aux_db_ptr,
    numbers_ptr,
    n_first,
    n_second,
    n_totals,
    n_squares,
    n_rows,
    d_in,
    HAS_AUX: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
):
    """One program: numbers [D + 2]. aux: (loss, squared norm of its gradients but for b_dec's part, aux_db)."""
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < d_in
    db_dec = added_rows(sums_ptr, 0, n_first, d_in, o_d, m_d, STEP, BLOCK_D, ACC)
    db_dec -= added_rows(sums_ptr, n_first, n_first + n_second, d_in, o_d, m_d, STEP, BLOCK_D, ACC)
    norm = total_of(square_parts_ptr, n_totals, 2, BLOCK, ACC) + total_of(squares_ptr, n_squares, 1, BLOCK, ACC)
    if HAS_AUX:
        db_dec -= tl.load(aux_db_ptr + o_d, mask=m_d, other=0.0).to(ACC)
        norm += tl.load(aux_ptr + 1).to(ACC)
    tl.store(numbers_ptr + o_d, db_dec, mask=m_d)
    tl.store(numbers_ptr + d_in, total_of(squared_ptr, n_rows, 1, BLOCK, ACC))
    tl.store(numbers_ptr + d_in + 1, norm)


@triton.jit(do_not_specialize=["n_ranks", "n_batch_rows", "n_groups", "threshold_start"])
def settle_kernel(
    numbers_ptr,
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
    db_dec = tl.load(numbers_ptr + o_d, mask=m_d, other=0.0)
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
    b = tl.load(b_ptr + o_d, mask=m_d, other=0.0).to(ACC)
    exp_avg = tl.load(exp_avg_ptr + o_d, mask=m_d, other=0.0).to(ACC)
    exp_avg_sq = tl.load(exp_avg_sq_ptr + o_d, mask=m_d, other=0.0).to(ACC)
    b, exp_avg, exp_avg_sq = adam(b, exp_avg, exp_avg_sq, db_dec * clip, schedule_ptr, BETA1, BETA2, EPS)
    tl.store(b_ptr + o_d, b.to(b_ptr.dtype.element_ty), mask=m_d)
    tl.store(exp_avg_ptr + o_d, exp_avg.to(exp_avg_ptr.dtype.element_ty), mask=m_d)
    tl.store(exp_avg_sq_ptr + o_d, exp_avg_sq.to(exp_avg_sq_ptr.dtype.element_ty), mask=m_d)


# --- launch wrappers -------------------------------------------------------------------------------------------------


def launch_numbers(
    entries: Entries,
    rows: Rows,
    own_suffix: Tensor,
    totals: Totals,
    frozen: str | None = None,
    aux: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """numbers [D + 2] of this rank. own_suffix: [rows of its share, G, D]. frozen: as of launch_totals.

    aux: of the auxiliary loss (its value, squared norm of its gradients but for b_dec's) [2], and its W_enc^T db_enc.
    """
    d_in = own_suffix.shape[2]
    sum_dtype, ACC = accumulator(own_suffix.dtype)
    sums, n_first, n_second = launch_column_sums(own_suffix, totals.db_parts)
    squares = launch_norm(entries, totals, None, frozen)
    numbers = torch.empty(d_in + 2, dtype=sum_dtype, device=sums.device)
    block_d, _ = whole_row_block(d_in, 4)
    numbers_kernel[(1,)](
        sums,
        totals.square_parts,
        squares,
        rows.squared_B,
        *((sums, sums) if aux is None else aux),
        numbers,
        n_first,
        n_second,
        len(totals.square_parts),
        len(squares),
        len(rows.squared_B),
        d_in,
        HAS_AUX=aux is not None,
        STEP=sum_step(block_d),
        BLOCK=BLOCK,
        BLOCK_D=block_d,
        ACC=ACC,
        num_warps=16,
    )
    return numbers


def launch_settle(
    numbers: Tensor,
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
