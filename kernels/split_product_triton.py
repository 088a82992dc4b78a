"""Triton kernels: products of float32 accuracy on tensor cores, of matrices that are kept as two float16 ones.

    v = (hi + lo) * inverse,  hi = fp16(v / inverse),  lo = fp16(v / inverse - hi),  inverse a power of two
    <a, b> = sum of stretches of <a_hi, b_hi> + <a_hi, b_lo> + <a_lo, b_hi>

Left out is a_lo b_lo, 2^-22 of a term. Tensor cores cut what they add up: a stretch is short, and stretches are added
outside, in float32. docs/kernels.md section 4
"""

import triton
import triton.language as tl

TOP = tl.constexpr(9)  # the largest of a row, scaled, is in [2^9, 2^10): small ones keep their bits
LEAST = tl.constexpr(16)


@triton.jit
def power_below(value):
    """The exponent field of a float32 that is not negative: 127 is that of [1, 2).

    At least LEAST: scales that are made of it are then normal numbers, and opposite ones have the product 1.
    """
    return tl.maximum((value.to(tl.int32, bitcast=True) >> 23) & 255, LEAST)


@triton.jit
def power_of_two(field):
    """The power of two of an exponent field, which is kept among those of normal numbers."""
    return (tl.minimum(tl.maximum(field, 1), 254) << 23).to(tl.float32, bitcast=True)


@triton.jit
def scales_of(largest):
    """(scale, inverse) that brings the largest of a row to [2^9, 2^10)."""
    field = power_below(largest)
    return power_of_two((254 - field) + TOP), power_of_two(field - TOP)


@triton.jit
def halves(scaled):
    """(hi, lo) of float32."""
    hi = scaled.to(tl.float16)
    return hi, (scaled - hi.to(tl.float32)).to(tl.float16)


@triton.jit
def split_dots(
    a_hi_ptr,
    a_lo_ptr,
    b_hi_ptr,
    b_lo_ptr,
    o_m,
    o_n,
    n_m,
    n_n,
    start,
    stop,
    stride_am,
    stride_ak,
    stride_bn,
    stride_bk,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """float32 [BLOCK_M, BLOCK_N]: products over k in start..stop of scaled rows o_m of a and o_n of b."""
    o_k = tl.arange(0, BLOCK_K)
    p_a = o_m[:, None] * stride_am + (start + o_k)[None, :] * stride_ak
    p_b = o_n[None, :] * stride_bn + (start + o_k)[:, None] * stride_bk
    m_m, m_n = (o_m < n_m)[:, None], (o_n < n_n)[None, :]
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for k in range(start, stop, BLOCK_K):
        m_k = o_k < stop - k
        m_a, m_b = m_m & m_k[None, :], m_n & m_k[:, None]
        a_hi = tl.load(a_hi_ptr + p_a, mask=m_a, other=0.0)
        b_hi = tl.load(b_hi_ptr + p_b, mask=m_b, other=0.0)
        a_lo = tl.load(a_lo_ptr + p_a, mask=m_a, other=0.0)
        b_lo = tl.load(b_lo_ptr + p_b, mask=m_b, other=0.0)
        part = tl.dot(a_hi, b_lo)
        part = tl.dot(a_lo, b_hi, part)
        part = tl.dot(a_hi, b_hi, part)
        acc += part
        p_a += BLOCK_K * stride_ak
        p_b += BLOCK_K * stride_bk
    return acc


@triton.jit
def tile_of(n_m, n_n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BAND: tl.constexpr):
    """(o_m, o_n) of a program; programs that follow one another share operands in the cache."""
    pid = tl.program_id(0)
    tiles_m, tiles_n = tl.cdiv(n_m, BLOCK_M), tl.cdiv(n_n, BLOCK_N)
    band = pid // (BAND * tiles_n)
    first = band * BAND
    height = tl.minimum(tiles_m - first, BAND)
    inside = pid % (BAND * tiles_n)
    o_m = (first + inside % height) * BLOCK_M + tl.arange(0, BLOCK_M)
    return o_m, (inside // height) * BLOCK_N + tl.arange(0, BLOCK_N)
