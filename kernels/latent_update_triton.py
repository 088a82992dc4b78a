"""Triton kernel of a training step's update: one pass of Adam over all latents, each row's gradient made on the way.

    g = sum over latent s's entries of act * suffix[bag]  - parallel[s] * W[s]       decoder
    g = sum over latent s's entries of dact * centred[row]                           encoder
    W[s], m[s], v[s] = Adam(clip * (g + auxiliary row));  W[s] /= |W[s]| + eps       (unit norm: decoder)
    low[s], |w|, |w - low|; b_enc[s] by Adam on clip * db_enc[s]                     (encoder)
    W[s] into the cone of its first row                                              (a soft-frozen decoder)
    b_enc[s] alone                                                                   (a frozen encoder)

No gradient row is written. What changes from step to step (the clip factor, the learning rate with its bias correction)
is read from the device: a captured CUDA graph can be replayed. docs/kernels.md section 4
"""

import math
import struct
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import TINY, Cone
from .segment_sum_triton import CHUNK, accumulator
from .step_entries_triton import Entries, latent_row, register_limit
from .step_rows_triton import whole_row_block

BLOCK_S = 1024  # biases of a program
PER_THREAD, REGISTERS = 8, 64  # elements of a row, registers


@triton.jit
def adam(p, exp_avg, exp_avg_sq, g, schedule_ptr, BETA1: tl.constexpr, BETA2: tl.constexpr, EPS: tl.constexpr):
    """(p, exp_avg, exp_avg_sq) after one step; schedule is (lr / bias correction 1, sqrt(bias correction 2))."""
    step_size = tl.load(schedule_ptr).to(p.dtype)
    bias2_sqrt = tl.load(schedule_ptr + 1).to(p.dtype)
    exp_avg = BETA1 * exp_avg + (1 - BETA1) * g
    exp_avg_sq = BETA2 * exp_avg_sq + (1 - BETA2) * g * g
    p -= step_size * exp_avg / (tl.sqrt(exp_avg_sq) / bias2_sqrt + EPS)
    return p, exp_avg, exp_avg_sq


@triton.jit
def load_state(p_ptr, exp_avg_ptr, exp_avg_sq_ptr, o, m, ACC: tl.constexpr):
    """(p, exp_avg, exp_avg_sq) of some numbers."""
    p, exp_avg = tl.load(p_ptr + o, mask=m, other=0.0), tl.load(exp_avg_ptr + o, mask=m, other=0.0)
    return p.to(ACC), exp_avg.to(ACC), tl.load(exp_avg_sq_ptr + o, mask=m, other=0.0).to(ACC)


@triton.jit
def store_state(p_ptr, exp_avg_ptr, exp_avg_sq_ptr, o, m, p, exp_avg, exp_avg_sq):
    """The reverse."""
    tl.store(p_ptr + o, p.to(p_ptr.dtype.element_ty), mask=m)
    tl.store(exp_avg_ptr + o, exp_avg.to(exp_avg_ptr.dtype.element_ty), mask=m)
    tl.store(exp_avg_sq_ptr + o, exp_avg_sq.to(exp_avg_sq_ptr.dtype.element_ty), mask=m)


@triton.jit
def moved(
    p_ptr,
    exp_avg_ptr,
    exp_avg_sq_ptr,
    o,
    m,
    g,
    schedule_ptr,
    BETA1: tl.constexpr,
    BETA2: tl.constexpr,
    EPS: tl.constexpr,
):
    """Adam on some numbers in place."""
    p, exp_avg, exp_avg_sq = load_state(p_ptr, exp_avg_ptr, exp_avg_sq_ptr, o, m, g.dtype)
    p, exp_avg, exp_avg_sq = adam(p, exp_avg, exp_avg_sq, g, schedule_ptr, BETA1, BETA2, EPS)
    store_state(p_ptr, exp_avg_ptr, exp_avg_sq_ptr, o, m, p, exp_avg, exp_avg_sq)


@triton.jit
def held_in_cone(w, first, COSINE: tl.constexpr, SINE: tl.constexpr, ROUNDING: tl.constexpr):
    """A unit row; if its cosine with a first one is below COSINE, the nearest of that cosine (common.Cone)."""
    cosine = tl.sum(w * first, axis=0)
    across = w - cosine * first
    length = tl.sqrt(tl.sum(across * across, axis=0))
    edge = COSINE * first + SINE * across / tl.where(length == 0, 1.0, length)
    edge = tl.where(length <= ROUNDING, first, edge)
    return tl.where(cosine < COSINE, edge, w)


@triton.jit
def load_once(ptr, o, m, ACC: tl.constexpr):
    """What is read once a step: it is not kept in the cache."""
    return tl.load(ptr + o, mask=m, other=0.0, eviction_policy="evict_first").to(ACC)


@triton.jit
def store_once(ptr, o, m, value):
    """The same of what is written."""
    tl.store(ptr + o, value.to(ptr.dtype.element_ty), mask=m, eviction_policy="evict_first")


@triton.jit
def auxiliary_row(aux_rows_ptr, aux_slots_ptr, s, d_in, o_d, ACC: tl.constexpr):
    """Latent s's part of the auxiliary loss's gradient; zeros where it has no slot."""
    slot = tl.load(aux_slots_ptr + s).to(tl.int64)
    m_aux = o_d < tl.where(slot >= 0, d_in, 0)
    return tl.load(aux_rows_ptr + slot * d_in + o_d, mask=m_aux, other=0.0).to(ACC)


@triton.jit
def added_pairs(a, b, c, d):
    return a + c, b + d


@triton.jit
def store_low(low_ptr, low_norm_ptr, low_error_ptr, s, stride, o_d, m_d, w, TINY: tl.constexpr, ACC: tl.constexpr):
    """The float16 copy of a row of W_enc; upper bounds of its norm and of what the copy is off by."""
    low = w.to(tl.float32).to(low_ptr.dtype.element_ty)
    tl.store(low_ptr + s * stride + o_d, low, mask=m_d)
    e = w - low.to(ACC)
    squared, off = tl.reduce((w * w, e * e), 0, added_pairs)
    tl.store(low_norm_ptr + s, (tl.sqrt(squared) + TINY).to(tl.float32))
    tl.store(low_error_ptr + s, (tl.sqrt(off) + TINY).to(tl.float32))


@triton.jit(do_not_specialize=["first", "second", "third"])
def announce_kernel(numbers_ptr, first, second, third):
    """Three int64 from the host, without a copy: numbers that come with the launch."""
    tl.store(numbers_ptr, first.to(tl.int64))
    tl.store(numbers_ptr + 1, second.to(tl.int64))
    tl.store(numbers_ptr + 2, third.to(tl.int64))


@triton.jit(do_not_specialize=["n_latents"])
def bias_kernel(
    totals_ptr,
    clip_ptr,
    schedule_ptr,
    b_ptr,
    exp_avg_ptr,
    exp_avg_sq_ptr,
    n_latents,
    BETA1: tl.constexpr,
    BETA2: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """b_enc alone, of a frozen encoder."""
    o = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    m = o < n_latents
    g = tl.load(totals_ptr + o, mask=m, other=0.0) * tl.load(clip_ptr)
    moved(b_ptr, exp_avg_ptr, exp_avg_sq_ptr, o, m, g, schedule_ptr, BETA1, BETA2, EPS)


@triton.jit
def update_kernel(
    weights_ptr,
    ids_ptr,
    offsets_ptr,
    source_ptr,
    partials_ptr,
    totals_ptr,
    clip_ptr,
    schedule_ptr,
    aux_rows_ptr,
    aux_slots_ptr,
    W_ptr,
    exp_avg_ptr,
    exp_avg_sq_ptr,
    b_ptr,
    b_exp_avg_ptr,
    b_exp_avg_sq_ptr,
    low_ptr,
    low_norm_ptr,
    low_error_ptr,
    first_ptr,
    low_stride,
    d_in,
    DECODER: tl.constexpr,
    CONE: tl.constexpr,
    COSINE: tl.constexpr,
    SINE: tl.constexpr,
    ROUNDING: tl.constexpr,
    HAS_AUX: tl.constexpr,
    HAS_LOW: tl.constexpr,
    BETA1: tl.constexpr,
    BETA2: tl.constexpr,
    EPS: tl.constexpr,
    NORM_EPS: tl.constexpr,
    TINY: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
):
    """A latent of one side. totals: parallel (decoder) or db_enc (encoder)."""
    s = tl.program_id(0).to(tl.int64)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < d_in
    o = s * d_in + o_d
    clip = tl.load(clip_ptr)  # a clip of NaN reaches every latent, as in the dense step
    start, end, total = tl.load(offsets_ptr + s), tl.load(offsets_ptr + s + 1), tl.load(totals_ptr + s)
    w = load_once(W_ptr, o, m_d, ACC)
    m = load_once(exp_avg_ptr, o, m_d, ACC)
    v = load_once(exp_avg_sq_ptr, o, m_d, ACC)
    if not DECODER:
        b, b_m, b_v = load_state(b_ptr, b_exp_avg_ptr, b_exp_avg_sq_ptr, s, True, ACC)
    g = latent_row(weights_ptr, ids_ptr, source_ptr, partials_ptr, start, end, d_in, o_d, m_d, CHUNK, BLOCK_D, ACC)
    if DECODER:
        g -= total * w
    if HAS_AUX:
        g += auxiliary_row(aux_rows_ptr, aux_slots_ptr, s, d_in, o_d, ACC)
    w, m, v = adam(w, m, v, g * clip, schedule_ptr, BETA1, BETA2, EPS)
    store_once(exp_avg_ptr, o, m_d, m)
    store_once(exp_avg_sq_ptr, o, m_d, v)
    w = tl.where(m_d, w, 0.0)  # a NaN step size makes NaN of the lanes behind the row too
    if DECODER:
        w *= 1.0 / (tl.sqrt(tl.sum(w * w, axis=0)) + NORM_EPS)
        if CONE:
            w = held_in_cone(w, load_once(first_ptr, o, m_d, ACC), COSINE, SINE, ROUNDING)
    store_once(W_ptr, o, m_d, w)
    if not DECODER:
        b, b_m, b_v = adam(b, b_m, b_v, total * clip, schedule_ptr, BETA1, BETA2, EPS)
        store_state(b_ptr, b_exp_avg_ptr, b_exp_avg_sq_ptr, s, True, b, b_m, b_v)
        if HAS_LOW:
            store_low(low_ptr, low_norm_ptr, low_error_ptr, s, low_stride, o_d, m_d, w, TINY, ACC)


# --- launch wrapper --------------------------------------------------------------------------------------------------


def launch_announce(numbers_3: Tensor, schedule: tuple[float, float], step: int) -> None:
    """Writes the bits of Adam's schedule (float64) and the step's index into int64 [3]."""
    bits = struct.unpack("2q", struct.pack("2d", *schedule))
    announce_kernel[(1,)](numbers_3, *bits, step, num_warps=1)


class Scalars(NamedTuple):
    """clip [1] and Adam's schedule float64 [2] on the device; its constants."""

    clip: Tensor
    schedule: Tensor
    betas: tuple[float, float]
    eps: float


def launch_update(
    entries: Entries,
    totals_S: Tensor,
    scalars: Scalars,
    W: tuple[Tensor, Tensor, Tensor],
    b: tuple[Tensor, Tensor, Tensor] | None,
    aux: tuple[Tensor, Tensor] | None = None,
    low: tuple[Tensor, Tensor, Tensor] | None = None,
    cone: Cone | None = None,
) -> None:
    """W_dec (b None) or W_enc with b_enc, each with its moments, in place. aux: rows [A, D] and slots int32 [S].

    low: where the encoder's copy of W_enc goes, [S, at least D], and upper bounds of |w| and |w - low|, float32 [S].
    cone: that the rows of W_dec are held in.
    """
    n_latents, d_in = W[0].shape
    sum_dtype, ACC = accumulator(W[0].dtype)
    block_d, num_warps = whole_row_block(d_in, PER_THREAD)
    decoder = b is None
    nothing = entries.offsets_S1
    partials = entries.partials[0 if decoder else 1]
    weights = entries.acts_M if decoder else entries.dacts_M
    ids, source = (entries.bags_M, entries.suffix_RD) if decoder else (entries.rows_M, entries.centred_BD)
    update_kernel[(n_latents,)](
        weights,
        ids,
        entries.offsets_S1,
        source,
        partials,
        totals_S,
        scalars.clip,
        scalars.schedule,
        *(aux or (source, nothing)),
        *W,
        *(b or W),
        *(low or W),
        W[0] if cone is None else cone.rows_SD,
        d_in if low is None else low[0].stride(0),
        d_in,
        DECODER=decoder,
        CONE=cone is not None,
        COSINE=0.0 if cone is None else cone.cosine,
        SINE=0.0 if cone is None else math.sqrt(1 - cone.cosine**2),
        ROUNDING=0.0 if cone is None else cone.rounding,
        HAS_AUX=aux is not None,
        HAS_LOW=low is not None,
        BETA1=scalars.betas[0],
        BETA2=scalars.betas[1],
        EPS=scalars.eps,
        NORM_EPS=torch.finfo(W[0].dtype).eps,
        TINY=TINY,
        CHUNK=CHUNK,
        BLOCK_D=block_d,
        ACC=ACC,
        num_warps=num_warps,
        **register_limit(block_d, sum_dtype, REGISTERS),
    )


def launch_bias(totals_S: Tensor, scalars: Scalars, b: tuple[Tensor, Tensor, Tensor]) -> None:
    """b_enc with its moments, in place, where W_enc does not learn."""
    bias_kernel[(triton.cdiv(len(totals_S), BLOCK_S),)](
        totals_S,
        scalars.clip,
        scalars.schedule,
        *b,
        len(totals_S),
        BETA1=scalars.betas[0],
        BETA2=scalars.betas[1],
        EPS=scalars.eps,
        BLOCK_S=BLOCK_S,
        num_warps=4,
    )
