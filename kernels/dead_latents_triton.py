"""Triton kernels of the auxiliary loss: dead latents reconstruct the residual (training/dead_latents.py).

    rows      x - b_dec split in two, sums of the residual, its variance            rows_kernel, scalars_kernel
    latents   W_enc's and W_dec's rows of dead latents, split in two                latents_kernel
    acts      relu((x - b_dec) W_enc + b_enc)                                       acts_kernel
    keep      the largest of every row, split in two                                keep_kernel, keep_wide_kernel
    error     acts W_dec - residual                                                 error_kernel
    split     the error, split in two                                               error_rows_kernel
    W_dec     acts^T error                                                          gradient_kernel
    dacts     error W_dec^T where a latent is active, split in two in acts' place   dacts_kernel
    W_enc     dacts^T (x - b_dec)                                                   gradient_kernel
    finish    parts added up, scaled, projected; squared norms                      finish_kernel, numbers_kernel

Products are those of split_product_triton.py; what goes over rows is in dead_rows_triton.py. A row b of acts is kept
times a power of two, P_b, and so is one of x - b_dec, C_b. Where the batch is summed over, the other factor must have
the opposite one: the error is kept times g / P_b, dacts times g' / C_b, with one g and one g' for all rows, by the
largest of the batch.
"""

import triton
import triton.language as tl

from .dead_rows_triton import UNIT
from .split_product_triton import halves, power_below, power_of_two, split_dots, tile_of

DACTS = tl.constexpr(14)  # dacts, scaled, are below 2^15


@triton.jit
def acts_kernel(
    c_hi_ptr,
    c_lo_ptr,
    c_inverse_ptr,
    w_hi_ptr,
    w_lo_ptr,
    w_inverse_ptr,
    bias_ptr,
    acts_ptr,
    n_rows,
    n_dead,
    d_in,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BAND: tl.constexpr,
):
    """acts [B, A]; NaN kept."""
    o_b, o_a = tile_of(n_rows, n_dead, BLOCK_M, BLOCK_N, BAND)
    z = split_dots(
        c_hi_ptr,
        c_lo_ptr,
        w_hi_ptr,
        w_lo_ptr,
        o_b,
        o_a,
        n_rows,
        n_dead,
        0,
        d_in,
        d_in,
        1,
        d_in,
        1,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
    )
    m_b, m_a = o_b < n_rows, o_a < n_dead
    z *= tl.load(c_inverse_ptr + o_b, mask=m_b, other=0.0)[:, None]
    z *= tl.load(w_inverse_ptr + o_a, mask=m_a, other=0.0)[None, :]
    z += tl.load(bias_ptr + o_a, mask=m_a, other=0.0)[None, :]
    z = tl.where(z <= 0, 0.0, z)  # tl.maximum would swallow NaN
    tl.store(acts_ptr + o_b.to(tl.int64)[:, None] * n_dead + o_a[None, :], z, mask=m_b[:, None] & m_a[None, :])


@triton.jit
def error_kernel(
    acts_ptr,
    inverse_ptr,
    w_hi_ptr,
    w_lo_ptr,
    x_ptr,
    x_hat_ptr,
    error_ptr,
    largest_ptr,
    stride_x,
    n_rows,
    n_dead,
    d_in,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BAND: tl.constexpr,
):
    """error [B, D] = acts W_dec - (x - x_hat); the largest of |error| / P_b into largest[0], as float32 bits."""
    o_b, o_d = tile_of(n_rows, d_in, BLOCK_M, BLOCK_N, BAND)
    acts_ptr = acts_ptr.to(tl.pointer_type(tl.float16))
    acc = split_dots(
        acts_ptr,
        acts_ptr + n_dead,
        w_hi_ptr,
        w_lo_ptr,
        o_b,
        o_d,
        n_rows,
        d_in,
        0,
        n_dead,
        2 * n_dead,
        1,
        1,
        d_in,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
    )
    m_b = o_b < n_rows
    mask = m_b[:, None] & (o_d < d_in)[None, :]
    inverse = tl.load(inverse_ptr + o_b, mask=m_b, other=0.0)
    first = tl.min(o_b, axis=0)
    row, inside = first.to(tl.int64), (o_b - first)[:, None]  # places inside a tile: 32 bits
    residual = tl.load(x_ptr + row * stride_x + (inside * stride_x + o_d[None, :]), mask=mask, other=0.0)
    residual -= tl.load(x_hat_ptr + row * d_in + (inside * d_in + o_d[None, :]), mask=mask, other=0.0)
    error = acc * (inverse / UNIT)[:, None] - residual
    tl.store(error_ptr + row * d_in + (inside * d_in + o_d[None, :]), error, mask=mask)
    largest = tl.max(tl.max(tl.where(mask, tl.abs(error) * inverse[:, None], 0.0), axis=1), axis=0)
    tl.atomic_max(largest_ptr, largest.to(tl.int32, bitcast=True), sem="relaxed")


@triton.jit
def dacts_kernel(
    e_hi_ptr,
    e_lo_ptr,
    w_hi_ptr,
    w_lo_ptr,
    inverse_ptr,
    c_inverse_ptr,
    largest_ptr,
    acts_ptr,
    sums_ptr,
    n_rows,
    n_dead,
    d_in,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BAND: tl.constexpr,
):
    """dacts times g' / C_b, split in two, in the place of acts; sums [B / BLOCK_M, A] of dacts over a tile's rows."""
    o_b, o_a = tile_of(n_rows, n_dead, BLOCK_M, BLOCK_N, BAND)
    acc = split_dots(
        e_hi_ptr,
        e_lo_ptr,
        w_hi_ptr,
        w_lo_ptr,
        o_b,
        o_a,
        n_rows,
        n_dead,
        0,
        d_in,
        d_in,
        1,
        d_in,
        1,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
    )
    m_b, m_a = o_b < n_rows, o_a < n_dead
    mask = m_b[:, None] & m_a[None, :]
    p_half = acts_ptr.to(tl.pointer_type(tl.float16)) + o_b.to(tl.int64)[:, None] * (2 * n_dead) + o_a[None, :]
    active = tl.load(p_half, mask=mask, other=0.0) > 0
    inverse_g = power_of_two(power_below(tl.load(largest_ptr).to(tl.float32, bitcast=True)) - 9)
    g = power_of_two((254 - power_below(tl.load(largest_ptr + 1).to(tl.float32, bitcast=True))) + DACTS)
    inverse = tl.load(inverse_ptr + o_b, mask=m_b, other=1.0)
    dacts = tl.where(active, acc * (inverse_g / inverse / UNIT)[:, None], 0.0)
    tl.store(sums_ptr + (tl.min(o_b, axis=0) // BLOCK_M) * n_dead + o_a, tl.sum(dacts, axis=0), mask=m_a)
    hi, lo = halves(dacts * (tl.load(c_inverse_ptr + o_b, mask=m_b, other=0.0) * g)[:, None])
    tl.store(p_half, hi, mask=mask)
    tl.store(p_half + n_dead, lo, mask=mask)


@triton.jit(do_not_specialize=["add"])
def gradient_kernel(
    acts_ptr,
    r_hi_ptr,
    r_lo_ptr,
    largest_ptr,
    parts_ptr,
    n_rows,
    n_dead,
    d_in,
    size,
    add,
    TOP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BAND: tl.constexpr,
):
    """parts [P, A, D] of acts^T rows over stretches of `size` rows, or added to what is there. TOP: of g."""
    o_a, o_d = tile_of(n_dead, d_in, BLOCK_M, BLOCK_N, BAND)
    acts_ptr = acts_ptr.to(tl.pointer_type(tl.float16))
    start = tl.program_id(1) * size
    stop = tl.minimum(start + size, n_rows)
    acc = split_dots(
        acts_ptr,
        acts_ptr + n_dead,
        r_hi_ptr,
        r_lo_ptr,
        o_a,
        o_d,
        n_dead,
        d_in,
        start,
        stop,
        1,
        2 * n_dead,
        1,
        d_in,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
    )
    acc *= power_of_two(power_below(tl.load(largest_ptr).to(tl.float32, bitcast=True)) - TOP)
    mask = (o_a < n_dead)[:, None] & (o_d < d_in)[None, :]
    p_part = parts_ptr + (tl.program_id(1).to(tl.int64) * n_dead + o_a[:, None]) * d_in + o_d[None, :]
    if add:
        acc += tl.load(p_part, mask=mask, other=0.0)
    tl.store(p_part, acc, mask=mask)
