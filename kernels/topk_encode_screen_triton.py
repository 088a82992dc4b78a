"""Triton kernels of the screening product: float16 copies with their norms, the product, what a bound is made of.

    x~ = 2^e fp16(2^-e x), 2^e the row's norm rounded down to a power of two        low_rows_kernel
    w~ = fp16(w), |w|, |w - w~|                                                     low_weights_kernel
    v  = fp16(<2^-e x~, w~> + 2^-e b), and its maximum over every group             product_kernel, tile_product_kernel
    |z - v| <= slack + R |v|,  slack = 1.001 (|x - x~| A + |x| B + C)               group_factors_kernel, slack_of

z is the float32 dot product that decides, v in the row's units times 2^e. Per group of latents (docs/kernels.md):

    A = max |w~|    B = max (|w - w~| + gamma |w|) + 2^-24    C = max 2^-22 |b| + 2^-40    R = 1.02 * 2^-11
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from . import common

TINY = tl.constexpr(common.TINY)
ROUNDING = tl.constexpr(1.02 * 2.0**-11)  # of what is stored, and of the float32 sum with the bias
LIMIT = tl.constexpr(3e4)  # of |v| + slack in the row's units: beyond it float16 may overflow


@dataclass(frozen=True)
class Screen:
    """The screening product of a chunk of rows [R], and all that bounds its error.

    inverse_R is 2^-e. pre_RP: P is d_sae rounded up to 64, columns from d_sae on are -inf. z_RS: the same memory as
    pre_RP, of which it is the double: float32 pre-activations, where rows have to be done again. zeros: int32, for
    whoever counts in this chunk.
    """

    x_RD: Tensor
    norm_R: Tensor
    error_R: Tensor
    inverse_R: Tensor
    pre_RP: Tensor
    maxima_RG: Tensor
    factors_3G: Tensor
    group: int
    d_sae: int
    z_RS: Tensor
    zeros: Tensor

    def bound_args(self) -> dict[str, Any]:
        """What `slack_of` reads."""
        return {
            "maxima_ptr": self.maxima_RG,
            "factors_ptr": self.factors_3G,
            "norm_ptr": self.norm_R,
            "error_ptr": self.error_R,
            "inverse_ptr": self.inverse_R,
        }


@cache
def multiprocessors(device: torch.device) -> int:
    """1 in the interpreter, where programs run one after another."""
    return 1 if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count


# --- copies, norms, factors ------------------------------------------------------------------------------------------


@triton.jit
def low_weights_kernel(W_ptr, low_ptr, norm_ptr, error_ptr, d_in, width, BLOCK_D: tl.constexpr):
    """fp16(w), |w| and |w - fp16(w)| of one latent. low [S, width]: zeros from d_in on."""
    latent = tl.program_id(0).to(tl.int64)
    squares = tl.zeros([BLOCK_D], dtype=tl.float32)
    errors = tl.zeros([BLOCK_D], dtype=tl.float32)
    for d in range(0, width, BLOCK_D):
        o_d = d + tl.arange(0, BLOCK_D)
        w = tl.load(W_ptr + latent * d_in + o_d, mask=o_d < d_in, other=0.0)
        low = w.to(tl.float16)
        tl.store(low_ptr + latent * width + o_d, low, mask=o_d < width)
        error = w - low.to(tl.float32)
        squares += w * w
        errors += error * error
    tl.store(norm_ptr + latent, tl.sqrt(tl.sum(squares, axis=0)) + TINY)
    tl.store(error_ptr + latent, tl.sqrt(tl.sum(errors, axis=0)) + TINY)


@triton.jit(do_not_specialize=["n_zeros"])
def low_rows_kernel(
    x_ptr,
    b_dec_ptr,
    centred_ptr,
    low_ptr,
    norm_ptr,
    error_ptr,
    inverse_ptr,
    zeros_ptr,
    stride_x,
    d_in,
    width,
    n_zeros,
    BLOCK_D: tl.constexpr,
):
    """x - b_dec of a row, its norm, the power of two below, the float16 copy in its units, its error; and zeros."""
    row = tl.program_id(0).to(tl.int64)
    o_z = row * BLOCK_D + tl.arange(0, BLOCK_D)
    for z in range(0, n_zeros, tl.num_programs(0) * BLOCK_D):
        tl.store(zeros_ptr + z + o_z, tl.zeros([BLOCK_D], dtype=tl.int32), mask=z + o_z < n_zeros)
    squares = tl.zeros([BLOCK_D], dtype=tl.float32)
    for d in range(0, d_in, BLOCK_D):
        o_d = d + tl.arange(0, BLOCK_D)
        m_d = o_d < d_in
        x = tl.load(x_ptr + row * stride_x + o_d, mask=m_d, other=0.0)
        x -= tl.load(b_dec_ptr + o_d, mask=m_d, other=0.0)
        tl.store(centred_ptr + row * d_in + o_d, x, mask=m_d)
        squares += x * x
    norm = tl.sqrt(tl.sum(squares, axis=0))
    exponent = norm.to(tl.int32, bitcast=True) >> 23  # of norm; 254 less it is that of the inverse
    exponent = tl.minimum(tl.maximum(exponent, 27), 227)  # 2^-100 to 2^100
    inverse = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    errors = tl.zeros([BLOCK_D], dtype=tl.float32)
    for d in range(0, width, BLOCK_D):
        o_d = d + tl.arange(0, BLOCK_D)
        m_d = o_d < d_in
        x = tl.load(x_ptr + row * stride_x + o_d, mask=m_d, other=0.0)
        x = (x - tl.load(b_dec_ptr + o_d, mask=m_d, other=0.0)) * inverse
        low = x.to(tl.float16)
        tl.store(low_ptr + row * width + o_d, low, mask=o_d < width)
        error = x - low.to(tl.float32)
        errors += error * error
    tl.store(norm_ptr + row, norm + TINY)
    tl.store(error_ptr + row, tl.sqrt(tl.sum(errors, axis=0)) / inverse + TINY)
    tl.store(inverse_ptr + row, inverse)


@triton.jit
def group_factors_kernel(
    norm_ptr,
    error_ptr,
    b_enc_ptr,
    factors_ptr,
    d_sae,
    n_groups,
    gamma,
    GROUP: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """factors [3, G] = A, B, C of every group; NaN where something of it is not finite: a maximum would swallow it."""
    o_g = tl.program_id(0) * BLOCK_G + tl.arange(0, BLOCK_G)
    latent = o_g[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    mask = latent < d_sae
    norm = tl.load(norm_ptr + latent, mask=mask, other=0.0)
    error = tl.load(error_ptr + latent, mask=mask, other=0.0)
    bias = tl.load(b_enc_ptr + latent, mask=mask, other=0.0)
    bad = tl.sum((norm + error + bias) * 0.0, axis=1)
    m_g = o_g < n_groups
    tl.store(factors_ptr + o_g, tl.max(norm + error, axis=1) + bad, mask=m_g)
    by_norm = tl.max(error + gamma * norm, axis=1) + 5.9604645e-08  # 2^-24: what float16 loses below its normal range
    tl.store(factors_ptr + n_groups + o_g, by_norm + bad, mask=m_g)
    tl.store(factors_ptr + 2 * n_groups + o_g, tl.max(tl.abs(bias), axis=1) * 2.3841858e-07 + TINY + bad, mask=m_g)


@triton.jit
def slack_of(maxima_ptr, factors_ptr, norm_ptr, error_ptr, inverse_ptr, row, o_g, m_g, n_groups):
    """(v, slack) of groups of a row: the largest screened value, and the bound's absolute part, in the units of z."""
    scale = 1.0 / tl.load(inverse_ptr + row)  # powers of two
    v = tl.load(maxima_ptr + row * n_groups + o_g, mask=m_g, other=0.0).to(tl.float32) * scale
    by_error = tl.load(factors_ptr + o_g, mask=m_g, other=0.0)
    by_norm = tl.load(factors_ptr + n_groups + o_g, mask=m_g, other=0.0)
    constant = tl.load(factors_ptr + 2 * n_groups + o_g, mask=m_g, other=0.0)
    slack = tl.load(error_ptr + row) * by_error + tl.load(norm_ptr + row) * by_norm + constant
    return v, 1.001 * slack  # the roundings of the bound itself


# --- product ---------------------------------------------------------------------------------------------------------


@triton.jit
def first_of_tile(tile, n_blocks_b, n_blocks_s, BAND: tl.constexpr):
    """(row block, latent block): bands of BAND row blocks walk over all latents together, x and a panel of W in L2."""
    band = tile // (BAND * n_blocks_s)
    band_rows = min(n_blocks_b - band * BAND, BAND)
    within = tile % (BAND * n_blocks_s)
    return band * BAND + within % band_rows, within // band_rows


@triton.jit
def with_bias(
    acc,
    first_b,
    first_s,
    b_enc_ptr,
    inverse_ptr,
    maxima_ptr,
    n_rows,
    d_sae,
    n_groups,
    BLOCK_B: tl.constexpr,
    BLOCK_S: tl.constexpr,
    GROUP: tl.constexpr,
):
    """The tile with the bias in the rows' units, -inf from d_sae on; writes its group maxima. No ReLU."""
    o_b, o_s = first_b + tl.arange(0, BLOCK_B), first_s + tl.arange(0, BLOCK_S)
    inverse = tl.load(inverse_ptr + o_b, mask=o_b < n_rows, other=1.0)
    bias = tl.load(b_enc_ptr + o_s, mask=o_s < d_sae, other=-float("inf"))
    acc += bias[None, :] * inverse[:, None]
    maxima = tl.max(tl.reshape(acc, [BLOCK_B, BLOCK_S // GROUP, GROUP]), axis=2)
    o_g = first_s // GROUP + tl.arange(0, BLOCK_S // GROUP)
    p_maxima = maxima_ptr + o_b.to(tl.int64)[:, None] * n_groups + o_g[None, :]
    tl.store(p_maxima, maxima.to(tl.float16), mask=(o_b < n_rows)[:, None] & (o_g < n_groups)[None, :])
    return acc


@triton.jit(do_not_specialize=["n_rows"])
def product_kernel(
    x_desc,
    W_desc,
    pre_desc,
    b_enc_ptr,
    inverse_ptr,
    maxima_ptr,
    n_rows,
    d_in,
    d_sae,
    n_groups,
    GROUP: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BAND: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    """Persistent, through tensor descriptors (TMA): v [B, P] and its maximum over every group."""
    n_blocks_b, n_blocks_s = tl.cdiv(n_rows, BLOCK_B), tl.cdiv(d_sae, BLOCK_S)
    for tile in tl.range(tl.program_id(0), n_blocks_b * n_blocks_s, PROGRAMS, flatten=True):
        block_b, block_s = first_of_tile(tile, n_blocks_b, n_blocks_s, BAND)
        first_b, first_s = block_b * BLOCK_B, block_s * BLOCK_S
        acc = tl.zeros([BLOCK_B, BLOCK_S], dtype=tl.float32)
        for d in range(0, d_in, BLOCK_D):
            acc = tl.dot(x_desc.load([first_b, d]), W_desc.load([first_s, d]).T, acc)
        acc = with_bias(
            acc,
            first_b,
            first_s,
            b_enc_ptr,
            inverse_ptr,
            maxima_ptr,
            n_rows,
            d_sae,
            n_groups,
            BLOCK_B,
            BLOCK_S,
            GROUP,
        )
        pre_desc.store([first_b, first_s], acc.to(tl.float16))


@triton.jit(do_not_specialize=["n_rows"])
def tile_product_kernel(
    x_ptr,
    W_ptr,
    pre_ptr,
    b_enc_ptr,
    inverse_ptr,
    maxima_ptr,
    n_rows,
    width_in,
    d_sae,
    width_sae,
    n_groups,
    GROUP: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BAND: tl.constexpr,
):
    """The same through pointers, a tile a program. x [B, width_in], W [S, width_in], pre [B, width_sae]."""
    n_blocks_b, n_blocks_s = tl.cdiv(n_rows, BLOCK_B), tl.cdiv(d_sae, BLOCK_S)
    block_b, block_s = first_of_tile(tl.program_id(0), n_blocks_b, n_blocks_s, BAND)
    first_b, first_s = block_b * BLOCK_B, block_s * BLOCK_S
    # Offsets inside a tile are int32, from an int64 base: half the registers.
    o_b, o_s, o_d = tl.arange(0, BLOCK_B), tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_D)
    m_b, m_s = o_b < n_rows - first_b, o_s < d_sae - first_s
    p_x, p_W = x_ptr + first_b.to(tl.int64) * width_in, W_ptr + first_s.to(tl.int64) * width_in
    o_x, o_W = o_b[:, None] * width_in + o_d[None, :], o_d[:, None] + o_s[None, :] * width_in
    acc = tl.zeros([BLOCK_B, BLOCK_S], dtype=tl.float32)
    for d in range(0, width_in, BLOCK_D):
        m_d = o_d < width_in - d
        b_x = tl.load(p_x + o_x, mask=m_b[:, None] & m_d[None, :], other=0.0)
        b_W = tl.load(p_W + o_W, mask=m_d[:, None] & m_s[None, :], other=0.0)
        acc = tl.dot(b_x, b_W, acc)
        p_x += BLOCK_D
        p_W += BLOCK_D
    acc = with_bias(
        acc, first_b, first_s, b_enc_ptr, inverse_ptr, maxima_ptr, n_rows, d_sae, n_groups, BLOCK_B, BLOCK_S, GROUP
    )
    p_pre = pre_ptr + first_b.to(tl.int64) * width_sae + first_s
    m_pre = m_b[:, None] & (o_s < width_sae - first_s)[None, :]
    tl.store(p_pre + o_b[:, None] * width_sae + o_s[None, :], acc.to(tl.float16), mask=m_pre)


# --- launch wrappers -------------------------------------------------------------------------------------------------


def launch_low_weights(W_SD: Tensor, low_SP: Tensor, norm_S: Tensor, error_S: Tensor) -> None:
    """Writes the float16 copy of float32 weights and the norms: LowWeights."""
    W_SD = W_SD.contiguous()
    block = min(triton.next_power_of_2(low_SP.shape[1]), 4096)
    if len(W_SD):
        low_weights_kernel[(len(W_SD),)](W_SD, low_SP, norm_S, error_S, *W_SD.shape[1:], low_SP.shape[1], BLOCK_D=block)


def launch_centred_rows(x_RD: Tensor, b_dec_D: Tensor, width: int, screen: Screen) -> Tensor:
    """Writes x, norm, error, inverse and zeros of the screen; returns the float16 copy [R, width]."""
    n_rows, d_in = x_RD.shape
    low_RP = torch.empty(n_rows, width, dtype=torch.float16, device=x_RD.device)
    low_rows_kernel[(n_rows,)](
        x_RD,
        b_dec_D,
        screen.x_RD,
        low_RP,
        screen.norm_R,
        screen.error_R,
        screen.inverse_R,
        screen.zeros,
        x_RD.stride(0),
        d_in,
        width,
        len(screen.zeros),
        BLOCK_D=min(triton.next_power_of_2(width), 4096),
    )
    return low_RP


def gamma(width_in: int) -> float:
    """Relative error of sums of width_in terms: of tensor cores, which truncate, and of the float32 dots that decide.

    docs/kernels.md, section 1, argues for both.
    """
    truncation = (1.26 if torch.version.hip is None else 2.0) * (-(-width_in // 16) * 16) * 2.0**-23
    return truncation + (64 + width_in / 512) * 2.0**-24


def launch_group_factors(norm_S: Tensor, error_S: Tensor, b_enc_S: Tensor, width_in: int, group: int) -> Tensor:
    """factors [3, G]."""
    d_sae = len(b_enc_S)
    n_groups = triton.cdiv(d_sae, group)
    factors_3G = torch.empty(3, n_groups, dtype=torch.float32, device=b_enc_S.device)
    block = 1024 // group
    group_factors_kernel[(triton.cdiv(n_groups, block),)](
        norm_S, error_S, b_enc_S, factors_3G, d_sae, n_groups, gamma(width_in), GROUP=group, BLOCK_G=block
    )
    return factors_3G


def product_config(device: torch.device) -> tuple[bool, dict[str, Any]]:
    """(through TMA?, tile and launch options); none spills (tests/kernels/test_topk_encode_cuda_compiles.py)."""
    if device.type == "cpu":  # the interpreter
        return False, {"BLOCK_B": 32, "BLOCK_S": 128, "BLOCK_D": 32, "BAND": 2}
    capability = (0, 0) if torch.version.hip is not None else torch.cuda.get_device_capability(device)
    return tile_config(capability)


def tile_config(capability: tuple[int, int]) -> tuple[bool, dict[str, Any]]:
    """product_config of an NVIDIA chip; (0, 0): of an AMD one."""
    if capability[0] in (9, 10):  # 227 KiB of shared memory
        return True, {"BLOCK_B": 128, "BLOCK_S": 256, "BLOCK_D": 64, "BAND": 32, "num_warps": 8, "num_stages": 3}
    stages = 4 if capability == (8, 0) else 2  # 163 KiB; 99 (64 on AMD)
    return False, {"BLOCK_B": 128, "BLOCK_S": 128, "BLOCK_D": 64, "BAND": 32, "num_warps": 8, "num_stages": stages}


def launch_product(low_RP: Tensor, W_low_SP: Tensor, b_enc_S: Tensor, screen: Screen, tma: bool | None = None) -> None:
    """Writes pre and maxima of the screen."""
    has_tma, config = product_config(low_RP.device)
    (n_rows, width_in), (d_sae, n_groups) = low_RP.shape, (len(b_enc_S), screen.maxima_RG.shape[1])
    n_tiles = triton.cdiv(n_rows, config["BLOCK_B"]) * triton.cdiv(d_sae, config["BLOCK_S"])
    tail = b_enc_S, screen.inverse_R, screen.maxima_RG, n_rows, width_in, d_sae
    if has_tma if tma is None else tma:
        x_block, W_block, pre_block = (
            [config[side] for side in sides]
            for sides in (("BLOCK_B", "BLOCK_D"), ("BLOCK_S", "BLOCK_D"), ("BLOCK_B", "BLOCK_S"))
        )
        programs = multiprocessors(low_RP.device)
        product_kernel[(programs,)](
            TensorDescriptor.from_tensor(low_RP, x_block),
            TensorDescriptor.from_tensor(W_low_SP, W_block),
            TensorDescriptor.from_tensor(screen.pre_RP, pre_block),
            *tail,
            n_groups,
            GROUP=screen.group,
            PROGRAMS=programs,
            **config,
        )
    else:
        tile_product_kernel[(n_tiles,)](
            low_RP, W_low_SP, screen.pre_RP, *tail, screen.pre_RP.shape[1], n_groups, GROUP=screen.group, **config
        )
