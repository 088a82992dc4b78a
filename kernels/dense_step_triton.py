"""Triton kernels between the matrix products of a step whose codes are hardly sparse (training/gpu_dense.py).

    halves   v = (hi + lo) / scale, float16: beside each other, for one product of three times the depth    split_kernel
    fired    z = h where it fires, in halves; of every latent how often, and the sum of z                   fired_kernel
    passed   dh = dz + l1 where it fires, in halves; of every latent the sums that its gradients need      passed_kernel

of h = (x - b_dec) W_enc + b_enc, whose product comes without bias and times the scales of its factors. Sums are of
blocks of rows, which the caller adds up: the same order of additions every time.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, TILE_ROWS, BLOCK_S = 64, 4, 256  # rows of a program, rows of a tile, latents


@triton.jit
def halves(v, scale):
    """(hi, lo) float16 of v * scale, whose magnitude is below 2^15."""
    scaled = v * scale
    hi = scaled.to(tl.float16)
    return hi, (scaled - hi.to(tl.float32)).to(tl.float16)


@triton.jit
def split_kernel(source_ptr, scale_ptr, out_ptr, width, LEFT: tl.constexpr, BLOCK: tl.constexpr):
    """out [n, 3 width] of a row: hi, lo, hi of the left factor of a product, and lo, hi, hi of the right one."""
    row = tl.program_id(0).to(tl.int64)
    scale = tl.load(scale_ptr)
    for first in range(0, width, BLOCK):
        o = first + tl.arange(0, BLOCK)
        m = o < width
        hi, lo = halves(tl.load(source_ptr + row * width + o, mask=m, other=0.0), scale)
        out = out_ptr + row * 3 * width + o
        tl.store(out, hi if LEFT else lo, mask=m)
        tl.store(out + width, lo if LEFT else hi, mask=m)
        tl.store(out + 2 * width, hi, mask=m)


@triton.jit
def load_tile(h_ptr, unscale, bias, row, n_rows, o_s, m_s, n_latents, TILE_ROWS: tl.constexpr):
    """(h, offsets, mask) [TILE_ROWS, BLOCK_S]; 0 outside. NaN stays."""
    o_r = row + tl.arange(0, TILE_ROWS)
    o = o_r.to(tl.int64)[:, None] * n_latents + o_s[None, :]
    m = (o_r < n_rows)[:, None] & m_s[None, :]
    return tl.where(m, tl.load(h_ptr + o, mask=m, other=0.0) * unscale + bias[None, :], 0.0), o, m


@triton.jit(do_not_specialize=["n_rows"])
def fired_kernel(
    h_ptr,
    unscale_ptr,
    bias_ptr,
    threshold_ptr,
    scale_ptr,
    hi_ptr,
    lo_ptr,
    counts_ptr,
    sums_ptr,
    n_rows,
    n_latents,
    ROWS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """z in halves; counts int32 and sums [P, S]. threshold: of every latent, at least 0."""
    o_s = tl.program_id(1) * BLOCK_S + tl.arange(0, BLOCK_S)
    m_s = o_s < n_latents
    bias = tl.load(bias_ptr + o_s, mask=m_s, other=0.0)
    threshold = tl.load(threshold_ptr + o_s, mask=m_s, other=0.0)
    unscale, scale = tl.load(unscale_ptr), tl.load(scale_ptr)
    counts, sums = tl.zeros([BLOCK_S], dtype=tl.int32), tl.zeros([BLOCK_S], dtype=tl.float32)
    for r in range(0, ROWS, TILE_ROWS):
        row = tl.program_id(0) * ROWS + r
        h, o, m = load_tile(h_ptr, unscale, bias, row, n_rows, o_s, m_s, n_latents, TILE_ROWS)
        rests = h <= threshold[None, :]  # NaN does not: it reaches the loss
        z = tl.where(rests, 0.0, h)
        hi, lo = halves(z, scale)
        tl.store(hi_ptr + o, hi, mask=m)
        tl.store(lo_ptr + o, lo, mask=m)
        counts += tl.sum((m & (rests == 0)).to(tl.int32), axis=0)
        sums += tl.sum(z, axis=0)
    out = tl.program_id(0).to(tl.int64) * n_latents + o_s
    tl.store(counts_ptr + out, counts, mask=m_s)
    tl.store(sums_ptr + out, sums, mask=m_s)


@triton.jit(do_not_specialize=["n_rows", "bandwidth"])
def passed_kernel(
    h_ptr,
    dz_ptr,
    unscale_ptr,
    dz_unscale_ptr,
    bias_ptr,
    threshold_ptr,
    theta_ptr,
    of_step_ptr,
    l1_ptr,
    scale_ptr,
    hi_ptr,
    lo_ptr,
    sums_ptr,
    n_rows,
    n_latents,
    bandwidth,
    BAND: tl.constexpr,
    ROWS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """dh in halves; sums [3, P, S] of dh, of z dz, and (BAND) of what the thresholds theta have for a gradient."""
    o_s = tl.program_id(1) * BLOCK_S + tl.arange(0, BLOCK_S)
    m_s = o_s < n_latents
    bias = tl.load(bias_ptr + o_s, mask=m_s, other=0.0)
    threshold = tl.load(threshold_ptr + o_s, mask=m_s, other=0.0)
    unscale, dz_unscale, scale = tl.load(unscale_ptr), tl.load(dz_unscale_ptr), tl.load(scale_ptr)
    l1 = tl.load(l1_ptr)
    of_b = tl.zeros([BLOCK_S], dtype=tl.float32)
    along, of_theta = tl.zeros_like(of_b), tl.zeros_like(of_b)
    if BAND:
        theta, of_step = tl.load(theta_ptr + o_s, mask=m_s, other=0.0), tl.load(of_step_ptr)
        half = bandwidth / 2
        low = tl.maximum(theta - half, 0.0)
        high = theta + half
    for r in range(0, ROWS, TILE_ROWS):
        row = tl.program_id(0) * ROWS + r
        h, o, m = load_tile(h_ptr, unscale, bias, row, n_rows, o_s, m_s, n_latents, TILE_ROWS)
        dz = tl.load(dz_ptr + o, mask=m, other=0.0) * dz_unscale
        fires = m & (h > threshold[None, :])
        dh = tl.where(fires, dz + l1, 0.0)
        hi, lo = halves(dh, scale)
        tl.store(hi_ptr + o, hi, mask=m)
        tl.store(lo_ptr + o, lo, mask=m)
        of_b += tl.sum(dh, axis=0)
        along += tl.sum(tl.where(fires, h * dz, 0.0), axis=0)
        if BAND:
            inside = m & (h > low[None, :]) & (h < high[None, :])
            of_theta -= tl.sum(tl.where(inside, (theta[None, :] * dz + of_step) / bandwidth, 0.0), axis=0)
    out = tl.program_id(0).to(tl.int64) * n_latents + o_s
    stride = tl.num_programs(0).to(tl.int64) * n_latents
    tl.store(sums_ptr + out, of_b, mask=m_s)
    tl.store(sums_ptr + stride + out, along, mask=m_s)
    if BAND:
        tl.store(sums_ptr + 2 * stride + out, of_theta, mask=m_s)


# --- launch wrappers -------------------------------------------------------------------------------------------------


def launch_split(source: Tensor, scale: Tensor, left: bool) -> Tensor:
    """float16 [n, 3 width]."""
    n, width = source.shape
    out = torch.empty(n, 3 * width, dtype=torch.float16, device=source.device)
    block = min(triton.next_power_of_2(width), 2048)
    split_kernel[(n,)](source.contiguous(), scale, out, width, LEFT=left, BLOCK=block, num_warps=4)
    return out


def launch_fired(
    h_RS: Tensor, unscale: Tensor, bias_S: Tensor, threshold_S: Tensor, scale: Tensor, halves_2RS: Tensor
) -> tuple[Tensor, Tensor]:
    """Writes z in halves; returns of every latent how often it fires, int64, and the sum of z, [S]."""
    n_rows, n_latents = h_RS.shape
    n_programs = triton.cdiv(n_rows, ROWS)
    counts_PS = torch.empty(n_programs, n_latents, dtype=torch.int32, device=h_RS.device)
    sums_PS = torch.empty_like(counts_PS, dtype=torch.float32)
    fired_kernel[(n_programs, triton.cdiv(n_latents, BLOCK_S))](
        h_RS,
        unscale,
        bias_S,
        threshold_S,
        scale,
        halves_2RS[0],
        halves_2RS[1],
        counts_PS,
        sums_PS,
        n_rows,
        n_latents,
        ROWS=ROWS,
        TILE_ROWS=TILE_ROWS,
        BLOCK_S=BLOCK_S,
        num_warps=4,
    )
    return counts_PS.sum(0), sums_PS.sum(0)


def launch_passed(
    h_RS: Tensor,
    dz_RS: Tensor,
    unscales: tuple[Tensor, Tensor],
    bias_S: Tensor,
    threshold_S: Tensor,
    l1: Tensor,
    band: tuple[Tensor, Tensor, float] | None,
    scale: Tensor,
    halves_2RS: Tensor,
) -> Tensor:
    """Writes dh in halves; returns [3, S] the sums of dh, of z dz, and of the thresholds' gradient.

    unscales: what h and dz have to be multiplied by. band: theta [S], d loss / d 1[fires] (0-d), and the bandwidth.
    """
    n_rows, n_latents = h_RS.shape
    n_programs = triton.cdiv(n_rows, ROWS)
    sums_3PS = torch.empty(3 if band else 2, n_programs, n_latents, dtype=torch.float32, device=h_RS.device)
    theta_S, of_step, bandwidth = band or (bias_S, scale, 1.0)
    passed_kernel[(n_programs, triton.cdiv(n_latents, BLOCK_S))](
        h_RS,
        dz_RS,
        *unscales,
        bias_S,
        threshold_S,
        theta_S,
        of_step,
        l1,
        scale,
        halves_2RS[0],
        halves_2RS[1],
        sums_3PS,
        n_rows,
        n_latents,
        bandwidth,
        BAND=band is not None,
        ROWS=ROWS,
        TILE_ROWS=TILE_ROWS,
        BLOCK_S=BLOCK_S,
        num_warps=4,
    )
    return sums_3PS.sum(1)
