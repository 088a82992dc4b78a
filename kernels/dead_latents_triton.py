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

Products are those of split_product_triton.py. A row b of acts is kept times a power of two, P_b, and so is one of
x - b_dec, C_b. Where the batch is summed over, the other factor must have the opposite one: the error is kept times
g / P_b, dacts times g' / C_b, with one g and one g' for all rows, by the largest of the batch.
"""

import triton
import triton.language as tl

from .split_product_triton import halves, power_below, power_of_two, scales_of, split_dots, tile_of
from .topk_encode_choose_triton import value_keys
from .topk_encode_rows_triton import kth_key_of_row

UNIT = tl.constexpr(2.0**8)  # by which rows of W_dec, which are unit, are scaled
DACTS = tl.constexpr(14)  # dacts, scaled, are below 2^15


@triton.jit
def rows_kernel(
    x_ptr,
    x_hat_ptr,
    b_dec_ptr,
    hi_ptr,
    lo_ptr,
    inverse_ptr,
    sums_ptr,
    squares_ptr,
    stride_x,
    n_rows,
    d_in,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """hi, lo [B, D], inverse [B] of x - b_dec; float64 sums [P, D] of the residual less its first row, squares [P]."""
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < d_in
    b_dec = tl.load(b_dec_ptr + o_d, mask=m_d, other=0.0)
    first = tl.load(x_ptr + o_d, mask=m_d, other=0.0) - tl.load(x_hat_ptr + o_d, mask=m_d, other=0.0)
    sums, squares = tl.zeros([BLOCK_D], dtype=tl.float64), tl.zeros([BLOCK_D], dtype=tl.float64)
    start = tl.program_id(0) * ROWS
    for b in range(start, tl.minimum(start + ROWS, n_rows)):
        row = tl.cast(b, tl.int64)
        x = tl.load(x_ptr + row * stride_x + o_d, mask=m_d, other=0.0)
        shifted = (x - tl.load(x_hat_ptr + row * d_in + o_d, mask=m_d, other=0.0) - first).to(tl.float64)
        sums += shifted
        squares += shifted * shifted
        c = x - b_dec
        scale, inverse = scales_of(tl.max(tl.abs(c), axis=0))
        hi, lo = halves(c * scale)
        tl.store(hi_ptr + row * d_in + o_d, hi, mask=m_d)
        tl.store(lo_ptr + row * d_in + o_d, lo, mask=m_d)
        tl.store(inverse_ptr + row, inverse)
    tl.store(sums_ptr + tl.program_id(0).to(tl.int64) * d_in + o_d, sums, mask=m_d)
    tl.store(squares_ptr + tl.program_id(0), tl.sum(squares, axis=0))


@triton.jit(do_not_specialize=["n_sums", "n_rows"])
def scalars_kernel(
    sums_ptr,
    squares_ptr,
    number_ptr,
    parts_ptr,
    counter_ptr,
    scalars_ptr,
    n_sums,
    n_rows,
    d_in,
    alpha,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    """scalars, float64: 1 / (n variance), and 2 alpha times that; 0 where there is no variance, or no dead latent.

    Columns are shared among programs; the last to come adds up.
    """
    o_d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    o_p = tl.arange(0, BLOCK_P)
    sums = tl.zeros([BLOCK_P, BLOCK_D], dtype=tl.float64)
    for first in range(0, n_sums, BLOCK_P):
        m = (first + o_p < n_sums)[:, None] & (o_d < d_in)[None, :]
        sums += tl.load(sums_ptr + (first + o_p)[:, None] * d_in + o_d[None, :], mask=m, other=0.0)
    sum_D = tl.sum(sums, axis=0)
    tl.store(parts_ptr + tl.program_id(0), tl.sum(sum_D * sum_D, axis=0))
    tl.debug_barrier()  # what all wrote comes before the tick
    if tl.atomic_add(counter_ptr, 1, sem="acq_rel") == tl.num_programs(0) - 1:
        o = tl.arange(0, PROGRAMS)
        means = tl.sum(tl.load(parts_ptr + o, mask=o < tl.num_programs(0), other=0.0, volatile=True), axis=0)
        squares = tl.zeros([BLOCK_P], dtype=tl.float64)
        for first in range(0, n_sums, BLOCK_P):
            squares += tl.load(squares_ptr + first + o_p, mask=first + o_p < n_sums, other=0.0)
        n_variance = tl.sum(squares, axis=0) - means / n_rows
        defined = (n_variance > 0) & (tl.load(number_ptr) > 0)
        inverse = tl.where(defined, 1.0 / n_variance, 0.0)
        tl.store(scalars_ptr, inverse)
        tl.store(scalars_ptr + 1, inverse * (2.0 * alpha))


@triton.jit
def latents_kernel(
    latents_ptr,
    W_enc_ptr,
    b_enc_ptr,
    W_dec_ptr,
    enc_hi_ptr,
    enc_lo_ptr,
    enc_inverse_ptr,
    bias_ptr,
    dec_hi_ptr,
    dec_lo_ptr,
    d_sae,
    d_in,
    BLOCK_D: tl.constexpr,
):
    """Of one dead latent; zeros of padding."""
    a = tl.program_id(0).to(tl.int64)
    latent = tl.load(latents_ptr + a)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < d_in
    there = m_d & (latent < d_sae)
    w = tl.load(W_enc_ptr + latent * d_in + o_d, mask=there, other=0.0)
    scale, inverse = scales_of(tl.max(tl.abs(w), axis=0))
    hi, lo = halves(w * scale)
    tl.store(enc_hi_ptr + a * d_in + o_d, hi, mask=m_d)
    tl.store(enc_lo_ptr + a * d_in + o_d, lo, mask=m_d)
    tl.store(enc_inverse_ptr + a, inverse)
    tl.store(bias_ptr + a, tl.load(b_enc_ptr + latent, mask=latent < d_sae, other=0.0))
    hi, lo = halves(tl.load(W_dec_ptr + latent * d_in + o_d, mask=there, other=0.0) * UNIT)
    tl.store(dec_hi_ptr + a * d_in + o_d, hi, mask=m_d)
    tl.store(dec_lo_ptr + a * d_in + o_d, lo, mask=m_d)


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
def store_active(split_ptr, row, n_dead, o_a, z, scale):
    """Splits values of a row: hi [A], then lo [A]."""
    hi, lo = halves(z * scale)
    hi = tl.where((z > 0) & (hi == 0), 2.0**-24, hi)  # what is active stays so
    p_half = split_ptr.to(tl.pointer_type(tl.float16)) + row * 2 * n_dead + o_a
    tl.store(p_half, hi.to(tl.float16), mask=o_a < n_dead)
    tl.store(p_half + n_dead, lo, mask=o_a < n_dead)


@triton.jit
def keep_kernel(acts_ptr, split_ptr, inverse_ptr, n_dead, k, BLOCK: tl.constexpr):
    """A row's k largest, ties to the lower latent, split in two; the others 0. split may be the same memory as acts."""
    row = tl.program_id(0).to(tl.int64)
    o_a = tl.arange(0, BLOCK)
    m_a = o_a < n_dead
    z = tl.load(acts_ptr + row * n_dead + o_a, mask=m_a, other=0.0)
    keys = value_keys(z)
    threshold, bit = 0, 30
    if tl.sum((keys > 0).to(tl.int32), axis=0) > k:
        while bit >= 0:
            trial = threshold | (1 << bit)
            n_above = tl.sum((keys >= trial).to(tl.int32), axis=0)
            threshold = tl.where(n_above >= k, trial, threshold)
            bit = tl.where(n_above == k, -1, bit - 1)
        kept = keys >= threshold
        if tl.sum(kept.to(tl.int32), axis=0) > k:
            equal = (keys == threshold).to(tl.int32)
            wanted = k - tl.sum((keys > threshold).to(tl.int32), axis=0)
            kept = (keys > threshold) | ((equal > 0) & (tl.cumsum(equal, axis=0) <= wanted))
        z = tl.where(kept, z, 0.0)
    scale, inverse = scales_of(tl.max(z, axis=0))
    tl.debug_barrier()  # the row has been read
    store_active(split_ptr, row, n_dead, o_a, z, scale)
    tl.store(inverse_ptr + row, inverse)


@triton.jit
def keep_wide_kernel(acts_ptr, split_ptr, inverse_ptr, n_dead, k, BLOCK: tl.constexpr):
    """The same of a row that does not fit in registers; elsewhere."""
    row = tl.program_id(0).to(tl.int64)
    o_b = tl.arange(0, BLOCK)
    p_z = acts_ptr + row * n_dead
    key, wanted = kth_key_of_row(p_z, n_dead, k, BLOCK)
    largest = tl.zeros([BLOCK], dtype=tl.float32)
    for p in range(0, n_dead, BLOCK):
        largest = tl.maximum(largest, tl.load(p_z + p + o_b, mask=p + o_b < n_dead, other=0.0))
    scale, inverse = scales_of(tl.max(largest, axis=0))
    equal_before = 0
    for p in range(0, n_dead, BLOCK):
        z = tl.load(p_z + p + o_b, mask=p + o_b < n_dead, other=0.0)
        keys = value_keys(z)
        equal = (keys == key).to(tl.int32)
        kept = (keys > key) | ((equal > 0) & (equal_before + tl.cumsum(equal, axis=0) <= wanted))
        store_active(split_ptr, row, n_dead, p + o_b, tl.where(kept, z, 0.0), scale)
        equal_before += tl.sum(equal, axis=0)
    tl.store(inverse_ptr + row, inverse)


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
def error_rows_kernel(
    error_ptr,
    inverse_ptr,
    c_inverse_ptr,
    hi_ptr,
    lo_ptr,
    squares_ptr,
    largest_ptr,
    d_in,
    BLOCK_D: tl.constexpr,
):
    """A row times g / P_b, split in two; its square [B]; the largest of |error_b| C_b^-1 into largest[1]."""
    row = tl.program_id(0).to(tl.int64)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < d_in
    error = tl.load(error_ptr + row * d_in + o_d, mask=m_d, other=0.0)
    square = tl.sum(error * error, axis=0)
    g = power_of_two((254 + 9) - power_below(tl.load(largest_ptr).to(tl.float32, bitcast=True)))
    hi, lo = halves(error * tl.load(inverse_ptr + row) * g)
    tl.store(hi_ptr + row * d_in + o_d, hi, mask=m_d)
    tl.store(lo_ptr + row * d_in + o_d, lo, mask=m_d)
    tl.store(squares_ptr + row, square)
    norm = tl.sqrt(square) * 1.02 * tl.load(c_inverse_ptr + row)  # rows of W_dec are unit within 0.01
    tl.atomic_max(largest_ptr + 1, norm.to(tl.int32, bitcast=True), sem="relaxed")


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


@triton.jit(do_not_specialize=["n_parts", "n_tiles"])
def finish_kernel(
    parts_ptr,
    latents_ptr,
    W_dec_ptr,
    scalars_ptr,
    sums_ptr,
    rows_ptr,
    squares_ptr,
    b_enc_ptr,
    n_parts,
    n_tiles,
    n_dead,
    d_sae,
    d_in,
    DECODER: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """rows [sides, A, D]: parts added up and scaled; squares [sides, A] of them; b_enc [A] from sums of tiles.

    DECODER: the side that is W_dec's, whose part along W_dec's row is taken off.
    """
    a, side = tl.program_id(0).to(tl.int64), tl.program_id(1)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < d_in
    scale = tl.load(scalars_ptr + 1).to(tl.float32)
    g = tl.zeros([BLOCK_D], dtype=tl.float32)
    for part in range(n_parts):
        g += tl.load(parts_ptr + ((side * n_parts + part) * n_dead + a) * d_in + o_d, mask=m_d, other=0.0)
    g *= scale
    if side == DECODER:
        latent = tl.minimum(tl.load(latents_ptr + a), d_sae - 1)
        w = tl.load(W_dec_ptr + latent * d_in + o_d, mask=m_d, other=0.0)
        g -= tl.sum(g * w, axis=0) * w
    tl.store(rows_ptr + (side * n_dead + a) * d_in + o_d, g, mask=m_d)
    tl.store(squares_ptr + side * n_dead + a, tl.sum(g * g, axis=0))
    if side == 0:
        o_t = tl.arange(0, TILES)
        sums = tl.zeros([TILES], dtype=tl.float32)
        for first in range(0, n_tiles, TILES):
            m_t = first + o_t < n_tiles
            sums += tl.load(sums_ptr + (first + o_t) * n_dead + a, mask=m_t, other=0.0)
        tl.store(b_enc_ptr + a, tl.sum(sums, axis=0) * scale)


@triton.jit(do_not_specialize=["n_rows"])
def numbers_kernel(
    row_squares_ptr,
    squares_ptr,
    b_enc_ptr,
    scalars_ptr,
    numbers_ptr,
    n_rows,
    n_dead,
    SIDES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """numbers [4]: the loss; squared norms of all gradients, and of every side's."""
    o = tl.arange(0, BLOCK)
    loss = tl.zeros([BLOCK], dtype=tl.float64)
    for first in range(0, n_rows, BLOCK):
        loss += tl.load(row_squares_ptr + first + o, mask=first + o < n_rows, other=0.0).to(tl.float64)
    tl.store(numbers_ptr, (tl.sum(loss, axis=0) * tl.load(scalars_ptr)).to(tl.float32))
    biases = tl.zeros([BLOCK], dtype=tl.float64)
    for first in range(0, n_dead, BLOCK):
        b = tl.load(b_enc_ptr + first + o, mask=first + o < n_dead, other=0.0).to(tl.float64)
        biases += b * b
    total = tl.sum(biases, axis=0)
    for side in tl.static_range(SIDES):
        squares = tl.zeros([BLOCK], dtype=tl.float64)
        for first in range(0, n_dead, BLOCK):
            p = squares_ptr + side * n_dead + first + o
            squares += tl.load(p, mask=first + o < n_dead, other=0.0).to(tl.float64)
        of_side = tl.sum(squares, axis=0)
        tl.store(numbers_ptr + 2 + side, of_side.to(tl.float32))
        total += of_side
    tl.store(numbers_ptr + 1, total.to(tl.float32))
