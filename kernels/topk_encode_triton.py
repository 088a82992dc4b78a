"""Triton kernels of topk_encode: pre-activations with group maxima, and the exact top k of every row.

    pre = relu((x - b_dec) @ W_enc + b_enc)              preactivation_kernel, which also writes, for every row and
    maxima = key(pre.unflatten(1, (-1, 64))).amax(2)         group of 64 latents, the largest key of the stored values
    groups = maxima.topk(k)                              best_groups_kernel
    acts, latents = pre[groups].topk(k)                  topk_of_groups_kernel

Keys are the bits of the stored, ReLU'd value as float32: integers that order values as the values do, since none is
negative; every NaN gets one key above infinity's. A k-th largest key is found bit by bit, from the highest: keep the
bit if at least k keys are as large with it. Ties then go by prefix sums to the lower index. Exact for any k.
"""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import GROUP, MAX_K
from .topk_encode_rows_triton import launch_topk_of_rows

BUFFER_BYTES = 512 * 2**20
MAX_STRIDE = 2**22
BLOCK_K = 128 if torch.version.hip is None else 64  # k * 64 candidates in one program: more would spill
NAN_KEY = tl.constexpr(0x7FC00000)


@triton.jit
def float_keys(values):
    """int32 that orders non-negative values; NaN canonical and largest."""
    wide = values.to(tl.float32)
    return tl.where(wide != wide, NAN_KEY, wide.to(tl.int32, bitcast=True))


@triton.jit
def kth_largest_key(keys, k):
    """The k-th largest of a 1-D block of keys >= -1; 0 if fewer than k are positive."""
    threshold = 0
    for step in range(31):
        trial = threshold | (1 << (30 - step))
        threshold = tl.where(tl.sum((keys >= trial).to(tl.int32), axis=0) >= k, trial, threshold)
    return threshold


@triton.jit
def largest_slots(keys, k):
    """(kept, slot): which keys are among the k largest, ties to the lower index, and the rank by index of the kept.

    Keys of -1 are never kept.
    """
    threshold = kth_largest_key(keys, k)
    above = (keys > threshold).to(tl.int32)
    equal = (keys == threshold).to(tl.int32)
    needed = k - tl.sum(above, axis=0)
    kept = (above > 0) | ((equal > 0) & (tl.cumsum(equal, axis=0) <= needed))
    return kept, tl.cumsum(kept.to(tl.int32), axis=0) - 1


# --- pre-activations and group maxima --------------------------------------------------------------------------------


@triton.jit
def preactivation_kernel(
    x_ptr,
    W_enc_ptr,
    b_enc_ptr,
    pre_ptr,
    maxima_ptr,
    n_rows,
    d_in,
    d_sae,
    stride_W_d,
    stride_W_s,
    n_groups,
    PRECISION: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BAND: tl.constexpr,
):
    """One [BLOCK_B, BLOCK_S] tile of pre [B, S] and of maxima [B, n_groups]; x [B, D] is centred and contiguous."""
    # Bands of BAND row blocks walk over all latents together, so that a band of x and a panel of W stay in L2.
    n_blocks_b, n_blocks_s = tl.cdiv(n_rows, BLOCK_B), tl.cdiv(d_sae, BLOCK_S)
    band = tl.program_id(0) // (BAND * n_blocks_s)
    band_rows = min(n_blocks_b - band * BAND, BAND)
    within = tl.program_id(0) % (BAND * n_blocks_s)
    first_b = (band * BAND + within % band_rows) * BLOCK_B
    first_s = (within // band_rows) * BLOCK_S
    # Offsets inside a tile are int32, from an int64 base: half the registers.
    o_b, o_s, o_d = tl.arange(0, BLOCK_B), tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_D)
    m_b, m_s = o_b < n_rows - first_b, o_s < d_sae - first_s

    p_x = x_ptr + first_b.to(tl.int64) * d_in
    p_W = W_enc_ptr + first_s.to(tl.int64) * stride_W_s
    o_x = o_b[:, None] * d_in + o_d[None, :]
    o_W = o_d[:, None] * stride_W_d + o_s[None, :] * stride_W_s
    acc = tl.zeros([BLOCK_B, BLOCK_S], dtype=tl.float32)
    for d in range(0, d_in, BLOCK_D):
        m_d = o_d < d_in - d
        b_x = tl.load(p_x + o_x, mask=m_b[:, None] & m_d[None, :], other=0.0)
        b_W = tl.load(p_W + o_W, mask=m_d[:, None] & m_s[None, :], other=0.0)
        acc = tl.dot(b_x, b_W, acc, input_precision=PRECISION)
        p_x += BLOCK_D
        p_W += BLOCK_D * stride_W_d

    acc += tl.load(b_enc_ptr + first_s + o_s, mask=m_s, other=0.0).to(tl.float32)[None, :]
    acc = tl.where(acc <= 0, 0.0, acc)  # tl.maximum would swallow NaN
    stored = acc.to(pre_ptr.dtype.element_ty)
    p_pre = pre_ptr + first_b.to(tl.int64) * d_sae + first_s
    tl.store(p_pre + o_b[:, None] * d_sae + o_s[None, :], stored, mask=m_b[:, None] & m_s[None, :])

    keys = tl.where(m_s[None, :], float_keys(stored), -1)
    b_maxima = tl.max(tl.reshape(keys, [BLOCK_B, BLOCK_S // GROUP, GROUP]), axis=2)
    first_g, o_g = first_s // GROUP, tl.arange(0, BLOCK_S // GROUP)
    m_bg = m_b[:, None] & (o_g < n_groups - first_g)[None, :]
    p_maxima = maxima_ptr + first_b.to(tl.int64) * n_groups + first_g
    tl.store(p_maxima + o_b[:, None] * n_groups + o_g[None, :], b_maxima, mask=m_bg)


def gemm_config(dtype: torch.dtype, hip: bool) -> dict[str, Any]:
    """Tile and launch options of preactivation_kernel; none spills (tests/test_topk_encode.py), 128x256 tiles would."""
    config = {"PRECISION": "ieee", "BAND": 32, "BLOCK_B": 128, "BLOCK_S": 128, "num_warps": 8}
    if dtype != torch.float32:
        config |= {"BLOCK_D": 64, "num_stages": 4}
    else:
        config |= {"BLOCK_D": 16, "num_stages": 3}
    if hip:  # 64 KiB of shared memory
        config |= {"num_stages": 2}
    return config


def launch_preactivations(x_RD: Tensor, W_enc_DS: Tensor, b_enc_S: Tensor, pre_RS: Tensor, maxima_RG: Tensor) -> None:
    """Writes pre and maxima (int32 keys) of centred, contiguous rows x."""
    (n_rows, d_in), d_sae = x_RD.shape, W_enc_DS.shape[1]
    widest = max(d_in, d_sae, *W_enc_DS.stride())
    if widest > MAX_STRIDE:
        raise ValueError(
            f"W_enc: width or stride {widest} is above {MAX_STRIDE}, the most that int32 tile offsets hold"
        )
    config = gemm_config(x_RD.dtype, torch.version.hip is not None)
    n_tiles = triton.cdiv(n_rows, config["BLOCK_B"]) * triton.cdiv(d_sae, config["BLOCK_S"])
    preactivation_kernel[(n_tiles,)](
        x_RD,
        W_enc_DS,
        b_enc_S,
        pre_RS,
        maxima_RG,
        n_rows,
        d_in,
        d_sae,
        W_enc_DS.stride(0),
        W_enc_DS.stride(1),
        maxima_RG.shape[1],
        GROUP=GROUP,
        **config,
    )


def preactivation_chunks(
    x_BD: Tensor, W_enc_DS: Tensor, b_enc_S: Tensor, b_dec_D: Tensor, buffer_bytes: int | None
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(first row, pre [R, S], maxima [R, G]) of every row chunk; both are overwritten by the next chunk."""
    n_rows, d_sae = x_BD.shape[0], W_enc_DS.shape[1]
    max_rows = min((buffer_bytes or BUFFER_BYTES) // (d_sae * x_BD.element_size()), (2**31 - 1) // d_sae)
    n_chunks = triton.cdiv(n_rows, max(max_rows, 1))
    chunk_rows = triton.cdiv(n_rows, max(n_chunks, 1))
    pre_RS = x_BD.new_empty(chunk_rows, d_sae)
    maxima_RG = torch.empty(chunk_rows, triton.cdiv(d_sae, GROUP), dtype=torch.int32, device=x_BD.device)
    for start in range(0, n_rows, max(chunk_rows, 1)):
        x_RD = (x_BD[start : start + chunk_rows] - b_dec_D).contiguous()
        rows = len(x_RD)
        launch_preactivations(x_RD, W_enc_DS, b_enc_S.contiguous(), pre_RS[:rows], maxima_RG[:rows])
        yield start, pre_RS[:rows], maxima_RG[:rows]


# --- top k of every row ----------------------------------------------------------------------------------------------


@triton.jit
def best_groups_kernel(maxima_ptr, groups_ptr, n_groups, k, BLOCK_G: tl.constexpr):
    """groups [B, k]: the k best groups of a row by (maximum, index), in ascending order. k is at most n_groups."""
    row = tl.program_id(0).to(tl.int64)
    o_g = tl.arange(0, BLOCK_G)
    m_g = o_g < n_groups
    keys = tl.load(maxima_ptr + row * n_groups + o_g, mask=m_g, other=-1)
    kept, slot = largest_slots(keys, k)
    tl.store(groups_ptr + row * k + slot, o_g, mask=kept & m_g)


@triton.jit
def topk_of_groups_kernel(
    pre_ptr,
    groups_ptr,
    acts_ptr,
    latents_ptr,
    d_sae,
    n_chosen,
    k,
    GROUP: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """acts, latents [B, k]: the top k of a row's chosen groups; candidates and hence latents ascend."""
    row = tl.program_id(0).to(tl.int64)
    o_c = tl.arange(0, BLOCK_C)
    m_c = o_c < n_chosen * GROUP
    groups = tl.load(groups_ptr + row * n_chosen + o_c // GROUP, mask=m_c, other=0)
    latents = groups * GROUP + o_c % GROUP
    m_c = m_c & (latents < d_sae)
    values = tl.load(pre_ptr + row * d_sae + latents, mask=m_c, other=0.0)
    kept, slot = largest_slots(tl.where(m_c, float_keys(values), -1), k)
    m_kept = kept & m_c
    tl.store(acts_ptr + row * k + slot, values, mask=m_kept)
    tl.store(latents_ptr + row * k + slot, latents.to(tl.int64), mask=m_kept)


def group_warps(block: int) -> int:
    return min(max(block // 1024, 1), 16)


def candidate_warps(block: int) -> int:
    return min(max(block // 512, 1), 16)


def launch_topk_rows(pre_RS: Tensor, maxima_RG: Tensor, acts_RK: Tensor, latents_RK: Tensor) -> None:
    """Writes the codes of a chunk: by its best groups, for a large k by whole rows."""
    (n_rows, d_sae), n_groups, k = pre_RS.shape, maxima_RG.shape[1], acts_RK.shape[1]
    if k > BLOCK_K:
        launch_topk_of_rows(pre_RS, acts_RK, latents_RK)
        return
    n_chosen = min(k, n_groups)
    groups = torch.empty(n_rows, n_chosen, dtype=torch.int32, device=pre_RS.device)
    block = triton.next_power_of_2(n_groups)
    best_groups_kernel[(n_rows,)](maxima_RG, groups, n_groups, n_chosen, BLOCK_G=block, num_warps=group_warps(block))
    block = triton.next_power_of_2(n_chosen) * GROUP
    topk_of_groups_kernel[(n_rows,)](
        pre_RS,
        groups,
        acts_RK,
        latents_RK,
        d_sae,
        n_chosen,
        k,
        GROUP=GROUP,
        BLOCK_C=block,
        num_warps=candidate_warps(block),
    )


def launch_topk_encode(
    x_BD: Tensor, W_enc_DS: Tensor, b_enc_S: Tensor, b_dec_D: Tensor, k: int, buffer_bytes: int | None
) -> tuple[Tensor, Tensor]:
    if k > MAX_K:
        raise ValueError(f"k: {k} is above {MAX_K}, the most of a row on a GPU")
    acts_BK = x_BD.new_empty(x_BD.shape[0], k)
    latents_BK = torch.empty(x_BD.shape[0], k, dtype=torch.int64, device=x_BD.device)
    for start, pre_RS, maxima_RG in preactivation_chunks(x_BD, W_enc_DS, b_enc_S, b_dec_D, buffer_bytes):
        rows = slice(start, start + len(pre_RS))
        launch_topk_rows(pre_RS, maxima_RG, acts_BK[rows], latents_BK[rows])
    return acts_BK, latents_BK
