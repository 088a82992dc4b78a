"""Triton kernels of the score's second pass: what each image changes in the scores of the latents that fire on it.

The formulas stand in scoring/second_pass.py, whose CPU path is the same in torch:

    centred_rows_kernel        v = u - mean u and <v, mean u>, u = scale * e
    latent_deviations_kernel   a latent: sums of powers of b, of delta and of delta^2; and delta of every entry
    image_deviations_kernel    an image: its sums of delta, of the scores that it alone keeps defined, of weighted delta

All sums are float64 and in a fixed order, where torch.bincount adds on a GPU in any order.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import cdiv

ROWS_BLOCK_N = 4
ROWS_BLOCK_E = 256
ROWS_WARPS = 4
LATENT_BLOCK = 128
LATENT_WARPS = 1
IMAGE_BLOCK = 32
IMAGE_WARPS = 1


@triton.jit(do_not_specialize=["n_rows"])
def centred_rows_kernel(
    emb_ptr, scale_ptr, mean_ptr, v_ptr, along_ptr, n_rows, d_emb, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr
):
    """v = scale * emb - mean in v's dtype, along = <v, mean> of v before it is rounded."""
    o_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < n_rows
    scale = tl.load(scale_ptr + o_n, mask=m_n, other=0.0)
    b_along = tl.zeros([BLOCK_N, BLOCK_E], dtype=tl.float64)
    for e in range(0, d_emb, BLOCK_E):
        o_e = e + tl.arange(0, BLOCK_E)
        m_e = o_e < d_emb
        offsets, mask = o_n[:, None] * d_emb + o_e[None, :], m_n[:, None] & m_e[None, :]
        mean = tl.load(mean_ptr + o_e, mask=m_e, other=0.0)
        b_emb = tl.load(emb_ptr + offsets, mask=mask, other=0.0).to(tl.float64)
        b_v = tl.where(mask, b_emb * scale[:, None] - mean[None, :], 0.0)
        tl.store(v_ptr + offsets, b_v.to(v_ptr.dtype.element_ty), mask=mask)
        b_along += b_v * mean[None, :]
    tl.store(along_ptr + o_n, tl.sum(b_along, axis=1), mask=m_n)


@triton.jit
def _change(b, others, rest, ms, den):
    """second_pass._change: the score without an image, less the score; NaN where rounding leaves no denominator."""
    left = den - 2 * b * rest
    return tl.where(left > 1e-12 * den, -2 * b * (others - ms * rest) / left, float("nan"))


@triton.jit(do_not_specialize=["n_latents"])
def latent_deviations_kernel(
    acts_ptr,
    images_ptr,
    order_ptr,
    offsets_ptr,
    products_ptr,
    along_ptr,
    square_ptr,
    low_ptr,
    total_ptr,
    level_ptr,
    ms_ptr,
    den_ptr,
    above_ptr,
    powers_ptr,
    change_sums_ptr,
    changes_ptr,
    n_latents,
    POWERS: tl.constexpr,
    INTERVALS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """powers [POWERS, S] += sums of b^m; change_sums [2, S] += delta, delta^2; changes[order] = delta, NaN as 0."""
    latent = tl.program_id(0).to(tl.int64)
    begin, end = tl.load(offsets_ptr + latent), tl.load(offsets_ptr + latent + 1)
    if begin < end:
        low, total = tl.load(low_ptr + latent), tl.load(total_ptr + latent)
        level, ms, den = tl.load(level_ptr + latent), tl.load(ms_ptr + latent), tl.load(den_ptr + latent)
        several = tl.load(above_ptr + latent) > 2
        b_1 = tl.zeros([BLOCK], dtype=tl.float64)
        b_2 = tl.zeros([BLOCK], dtype=tl.float64)
        b_3 = tl.zeros([BLOCK], dtype=tl.float64)
        b_4 = tl.zeros([BLOCK], dtype=tl.float64)
        b_5 = tl.zeros([BLOCK], dtype=tl.float64)
        b_6 = tl.zeros([BLOCK], dtype=tl.float64)
        b_change = tl.zeros([BLOCK], dtype=tl.float64)
        b_squares = tl.zeros([BLOCK], dtype=tl.float64)
        for t in range(begin, end, BLOCK):
            o_t = t + tl.arange(0, BLOCK)
            mask = o_t < end
            b = tl.where(mask, tl.load(acts_ptr + o_t, mask=mask, other=0.0) - low, 0.0)
            b_1 += b
            b_2 += b * b
            if POWERS > 2:
                b_3 += b * b * b
                b_4 += b * b * b * b
                b_5 += b * b * b * b * b
                b_6 += b * b * b * b * b * b
            if INTERVALS:
                image = tl.load(images_ptr + o_t, mask=mask, other=0)
                others = tl.load(products_ptr + o_t, mask=mask, other=0.0).to(tl.float64)
                others += total * tl.load(along_ptr + image, mask=mask, other=0.0) + level
                others -= b * tl.load(square_ptr + image, mask=mask, other=0.0)
                change = _change(b, others, total - b, ms, den)
                change = tl.where(mask & several, change, 0.0)
                b_change += change
                b_squares += change * change
                told = tl.where(change == change, change, 0.0)
                tl.store(changes_ptr + tl.load(order_ptr + o_t, mask=mask, other=0), told, mask=mask)
        powers_ptr += latent
        tl.store(powers_ptr, tl.load(powers_ptr) + tl.sum(b_1, axis=0))
        tl.store(powers_ptr + n_latents, tl.load(powers_ptr + n_latents) + tl.sum(b_2, axis=0))
        if POWERS > 2:
            tl.store(powers_ptr + 2 * n_latents, tl.load(powers_ptr + 2 * n_latents) + tl.sum(b_3, axis=0))
            tl.store(powers_ptr + 3 * n_latents, tl.load(powers_ptr + 3 * n_latents) + tl.sum(b_4, axis=0))
            tl.store(powers_ptr + 4 * n_latents, tl.load(powers_ptr + 4 * n_latents) + tl.sum(b_5, axis=0))
            tl.store(powers_ptr + 5 * n_latents, tl.load(powers_ptr + 5 * n_latents) + tl.sum(b_6, axis=0))
        if INTERVALS:
            change_sums_ptr += latent
            tl.store(change_sums_ptr, tl.load(change_sums_ptr) + tl.sum(b_change, axis=0))
            tl.store(change_sums_ptr + n_latents, tl.load(change_sums_ptr + n_latents) + tl.sum(b_squares, axis=0))


@triton.jit(do_not_specialize=["stride", "n_weights"])
def image_deviations_kernel(
    acts_ptr,
    latents_ptr,
    offsets_ptr,
    changes_ptr,
    low_ptr,
    ms_ptr,
    above_ptr,
    weights_ptr,
    lost_ptr,
    weighted_ptr,
    stride,
    n_weights,
    BLOCK: tl.constexpr,
):
    """lost [3, stride]: sums of delta, of the scores of latents that are on two images, and their number.

    weighted [n, W]: sums of delta by weights [S, W].
    """
    image = tl.program_id(0).to(tl.int64)
    begin, end = tl.load(offsets_ptr + image), tl.load(offsets_ptr + image + 1)
    b_change = tl.zeros([BLOCK], dtype=tl.float64)
    b_score = tl.zeros([BLOCK], dtype=tl.float64)
    b_two = tl.zeros([BLOCK], dtype=tl.float64)
    for t in range(begin, end, BLOCK):
        o_t = t + tl.arange(0, BLOCK)
        mask = o_t < end
        latent = tl.load(latents_ptr + o_t, mask=mask, other=0)
        act = tl.load(acts_ptr + o_t, mask=mask, other=0.0).to(tl.float64)
        two = mask & (tl.load(above_ptr + latent, mask=mask, other=0) == 2)
        two = two & (act > tl.load(low_ptr + latent, mask=mask, other=0.0))
        b_change += tl.load(changes_ptr + o_t, mask=mask, other=0.0)
        b_score += tl.load(ms_ptr + latent, mask=two, other=0.0)
        b_two += tl.where(two, 1.0, 0.0)
    tl.store(lost_ptr + image, tl.sum(b_change, axis=0))
    tl.store(lost_ptr + stride + image, tl.sum(b_score, axis=0))
    tl.store(lost_ptr + 2 * stride + image, tl.sum(b_two, axis=0))
    for w in range(n_weights):
        b_weighted = tl.zeros([BLOCK], dtype=tl.float64)
        for t in range(begin, end, BLOCK):
            o_t = t + tl.arange(0, BLOCK)
            latent = tl.load(latents_ptr + o_t, mask=o_t < end, other=0)
            change = tl.load(changes_ptr + o_t, mask=o_t < end, other=0.0)
            b_weighted += change * tl.load(weights_ptr + latent * n_weights + w, mask=o_t < end, other=0.0)
        tl.store(weighted_ptr + image * n_weights + w, tl.sum(b_weighted, axis=0))


# --- launch wrappers -------------------------------------------------------------------------------------------------


class Latents(NamedTuple):
    """Of S latents, float64 [S]: minimum; T's sum of b and <mean u, T>; score; denominator. Images above it, int64."""

    low_S: Tensor
    total_S: Tensor
    level_S: Tensor
    ms_S: Tensor
    den_S: Tensor
    n_above_S: Tensor


def launch_centred_rows(emb_nE: Tensor, scale_n: Tensor, mean_E: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """v [n, E] in that dtype and <v, mean u> [n] float64."""
    emb_nE, scale_n = emb_nE.contiguous(), scale_n.contiguous()
    n_rows, d_emb = emb_nE.shape
    v_nE, along_n = torch.empty_like(emb_nE, dtype=dtype), torch.empty_like(scale_n)
    if n_rows > 0:
        centred_rows_kernel[(cdiv(n_rows, ROWS_BLOCK_N),)](
            emb_nE,
            scale_n,
            mean_E,
            v_nE,
            along_n,
            n_rows,
            d_emb,
            BLOCK_N=ROWS_BLOCK_N,
            BLOCK_E=ROWS_BLOCK_E,
            num_warps=ROWS_WARPS,
        )
    return v_nE, along_n


def launch_latent_deviations(
    entries: tuple[Tensor, Tensor, Tensor, Tensor],
    of_images: tuple[Tensor, Tensor, Tensor] | None,
    latents: Latents,
    powers_PS: Tensor,
    change_2S: Tensor,
) -> Tensor:
    """Adds to powers and change in place; returns delta of every entry [M] where it stands in the codes.

    entries: activations (float64), images, places in the codes and offsets, latent by latent. of_images: <v, T - p1
    mean u> of every entry, <v, mean u> and |u|^2 of every image; None: no delta is asked for, and none returned.
    """
    acts_M, images_M, order_M, offsets_S1 = entries
    changes_M = torch.empty_like(acts_M) if of_images else acts_M.new_empty(0)
    n_latents = len(offsets_S1) - 1
    latent_deviations_kernel[(n_latents,)](
        acts_M.contiguous(),
        images_M.contiguous(),
        order_M,
        offsets_S1,
        *(of_images or (None, None, None)),
        *latents,
        powers_PS,
        change_2S,
        changes_M,
        n_latents,
        POWERS=len(powers_PS),
        INTERVALS=of_images is not None,
        BLOCK=LATENT_BLOCK,
        num_warps=LATENT_WARPS,
    )
    return changes_M


def launch_image_deviations(
    codes: tuple[Tensor, Tensor, Tensor],
    changes_M: Tensor,
    latents: Latents,
    weights_SW: Tensor,
    lost_3N: Tensor,
    weighted_NW: Tensor,
    first: int,
) -> None:
    """Writes columns of lost and rows of weighted, from `first` on, of codes in CSR form and delta of their entries."""
    acts_M, latents_M, row_offsets = (t.contiguous() for t in codes)
    n_images = len(row_offsets) - 1
    if n_images > 0:
        image_deviations_kernel[(n_images,)](
            acts_M,
            latents_M,
            row_offsets,
            changes_M,
            latents.low_S,
            latents.ms_S,
            latents.n_above_S,
            weights_SW.contiguous(),
            lost_3N[:, first:],
            weighted_NW[first:],
            lost_3N.stride(0),
            weights_SW.shape[1],
            BLOCK=IMAGE_BLOCK,
            num_warps=IMAGE_WARPS,
        )
