"""Triton kernels of the auxiliary loss that go over rows: of a batch, or of dead latents (dead_latents_triton.py)."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .split_product_triton import halves, power_below, power_of_two, scales_of
from .topk_encode_choose_triton import value_keys
from .topk_encode_rows_triton import kth_key_of_row

MOST_PARTS = 128  # of a sum over dead latents
LEAST_VARIANCE = tl.constexpr(2.0**-126)  # less is none, as of float32, where 1 / less is not finite
UNIT = tl.constexpr(2.0**8)  # by which rows of W_dec, which are unit, are scaled


@triton.jit(do_not_specialize=["n_zeros"])
def rows_kernel(
    x_ptr,
    x_hat_ptr,
    b_dec_ptr,
    hi_ptr,
    lo_ptr,
    inverse_ptr,
    sums_ptr,
    squares_ptr,
    zeros_ptr,
    stride_x,
    n_rows,
    d_in,
    n_zeros,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """hi, lo [B, D], inverse [B] of x - b_dec; float64 sums [P, D] of the residual less its first row, squares [P].

    zeros [n_zeros]: what later kernels count in.
    """
    if tl.program_id(0) == 0:
        for first_zero in range(0, n_zeros, 128):
            o_z = first_zero + tl.arange(0, 128)
            tl.store(zeros_ptr + o_z, tl.zeros([128], dtype=tl.int32), mask=o_z < n_zeros)
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
        defined = (n_variance > LEAST_VARIANCE) & (tl.load(number_ptr) > 0)
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
def store_active(split_ptr, row, n_dead, o_a, z, scale):
    """Splits values of a row: hi [A], then lo [A]."""
    hi, lo = halves(z * scale)
    hi = tl.where((z > 0) & (hi == 0), 2.0**-24, hi)  # what is active stays so
    p_half = split_ptr.to(tl.pointer_type(tl.float16)) + row * 2 * n_dead + o_a
    tl.store(p_half, hi.to(tl.float16), mask=o_a < n_dead)
    tl.store(p_half + n_dead, lo, mask=o_a < n_dead)


@triton.jit
def counts_at(keys, threshold, shift):
    """How many keys reach the threshold plus 1, 2 and 3 at `shift`: one sum, of 20 bits each."""
    first = (keys >= (threshold | (1 << shift))).to(tl.int64)
    second = (keys >= (threshold | (2 << shift))).to(tl.int64)
    third = (keys >= (threshold | (3 << shift))).to(tl.int64)
    packed = tl.sum(first + (second << 20) + (third << 40), axis=0)
    return packed & 0xFFFFF, (packed >> 20) & 0xFFFFF, packed >> 40


@triton.jit
def keep_kernel(acts_ptr, split_ptr, inverse_ptr, n_dead, k, BLOCK: tl.constexpr):
    """A row's k largest, ties to the lower latent, split in two; the others 0. split may be the same memory as acts."""
    row = tl.program_id(0).to(tl.int64)
    o_a = tl.arange(0, BLOCK)
    keys = value_keys(tl.load(acts_ptr + row * n_dead + o_a, mask=o_a < n_dead, other=0.0))
    n_positive = tl.sum((keys > 0).to(tl.int32), axis=0)
    if n_positive > k:
        threshold, count = 0, n_positive
        n_large = tl.sum((keys >= (1 << 30)).to(tl.int32), axis=0)
        if n_large >= k:
            threshold, count = 1 << 30, n_large
        shift = 28
        while (shift >= 0) & (count > k):
            one, two, three = counts_at(keys, threshold, shift)
            digit = (one >= k).to(tl.int32) + (two >= k).to(tl.int32) + (three >= k).to(tl.int32)
            reached = tl.where(digit == 3, three, tl.where(digit == 2, two, one)).to(tl.int32)
            count = tl.where(digit > 0, reached, count)
            threshold |= digit << shift
            shift -= 2
        end = BLOCK
        if count > k:  # of those equal to the threshold, the first: where they end
            wanted = k - tl.sum((keys > threshold).to(tl.int32), axis=0)
            end, step = 0, BLOCK
            while step > 0:
                n_equal = tl.sum(((keys == threshold) & (o_a < end + step)).to(tl.int32), axis=0)
                end = tl.where(n_equal <= wanted, end + step, end)
                step = step // 2
        keys = tl.where((keys > threshold) | ((keys == threshold) & (o_a < end)), keys, 0)
    z = keys.to(tl.float32, bitcast=True)
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


@triton.jit(do_not_specialize=["size"])
def biases_kernel(
    latents_ptr,
    b_enc_ptr,
    W_enc_ptr,
    db_enc_ptr,
    parts_ptr,
    n_dead,
    d_sae,
    d_in,
    size,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """parts [P, D] of W_enc^T b_enc, of `size` dead latents each, whose b_enc is added to db_enc [S]."""
    o_d = tl.arange(0, BLOCK_D)[None, :]
    acc = tl.zeros([BLOCK_D], dtype=W_enc_ptr.dtype.element_ty)
    start = tl.program_id(0) * size
    for first in range(start, start + size, ROWS):
        o_a = first + tl.arange(0, ROWS)
        latents = tl.load(latents_ptr + o_a, mask=(o_a < start + size) & (o_a < n_dead), other=d_sae)
        there = latents < d_sae
        b_enc = tl.load(b_enc_ptr + o_a, mask=there, other=0.0)
        w = tl.load(W_enc_ptr + latents[:, None] * d_in + o_d, mask=there[:, None] & (o_d < d_in), other=0.0)
        acc += tl.sum(b_enc[:, None] * w, axis=0)
        before = tl.load(db_enc_ptr + latents, mask=there, other=0.0)
        tl.store(db_enc_ptr + latents, before + b_enc.to(before.dtype), mask=there)
    o_d = tl.arange(0, BLOCK_D)
    tl.store(parts_ptr + tl.program_id(0).to(tl.int64) * d_in + o_d, acc, mask=o_d < d_in)


def launch_biases(latents_A: Tensor, b_enc_A: Tensor, W_enc_SD: Tensor, db_enc_S: Tensor) -> Tensor:
    """W_enc^T b_enc [D] of dead latents; their b_enc is added to db_enc. latents: each once, or padding."""
    n_dead, (d_sae, d_in), rows = len(latents_A), W_enc_SD.shape, 4
    size = rows * max(1, triton.cdiv(n_dead, rows * MOST_PARTS))
    n_programs, block = triton.cdiv(n_dead, size), triton.next_power_of_2(d_in)
    parts_PD = torch.empty(n_programs, d_in, dtype=W_enc_SD.dtype, device=W_enc_SD.device)
    biases_kernel[(n_programs,)](
        latents_A,
        b_enc_A,
        W_enc_SD,
        db_enc_S,
        parts_PD,
        n_dead,
        d_sae,
        d_in,
        size,
        ROWS=rows,
        BLOCK_D=block,
        num_warps=min(max(block // 256, 4), 16),
    )
    return parts_PD.sum(0)
