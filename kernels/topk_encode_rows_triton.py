"""Triton kernel of the exact top k of whole rows, for any k: the digits of the k-th key, then one pass that writes.

Zeros compete here, as everything does: ties, among them zeros, go to the lower latent. NaN ranks above every number.
"""

import triton
import triton.language as tl
from torch import Tensor

from .topk_encode_choose_triton import digit_where, value_keys


@triton.jit
def kth_key_of_row(p_z, width, k, BLOCK: tl.constexpr):
    """(the k-th largest key of `width` values, none negative, k at most width; how many of its equals are taken)."""
    o_b = tl.arange(0, BLOCK)
    key, wanted = 0, k
    for i in tl.static_range(4):
        counts = tl.zeros([256], dtype=tl.int32)
        for p in range(0, width, BLOCK):
            m_b = p + o_b < width
            keys = value_keys(tl.load(p_z + p + o_b, mask=m_b, other=0.0).to(tl.float32))
            if i > 0:
                m_b = m_b & ((keys >> (31 - 8 * i)) == (key >> (31 - 8 * i)))
            counts += tl.histogram((keys >> (23 - 8 * i)) & 255 if i < 3 else keys & 127, 256, mask=m_b)
        digit, wanted = digit_where(counts, wanted)
        key |= digit << (23 - 8 * i if i < 3 else 0)
    return key, wanted


@triton.jit
def topk_of_row(p_z, width, k, p_acts, p_latents, BLOCK: tl.constexpr):
    """The k largest of `width` values, none negative, k at most width; latents ascend."""
    o_b = tl.arange(0, BLOCK)
    key, wanted = kth_key_of_row(p_z, width, k, BLOCK)
    equal_before, written = 0, 0
    for p in range(0, width, BLOCK):
        m_b = p + o_b < width
        z = tl.load(p_z + p + o_b, mask=m_b, other=0.0)
        keys = value_keys(z.to(tl.float32))
        equal = (m_b & (keys == key)).to(tl.int32)
        kept = (m_b & (keys > key)) | ((equal > 0) & (equal_before + tl.cumsum(equal, axis=0) <= wanted))
        slot = written + tl.cumsum(kept.to(tl.int32), axis=0) - 1
        tl.store(p_acts + slot, z, mask=kept)
        tl.store(p_latents + slot, (p + o_b).to(tl.int64), mask=kept)
        equal_before += tl.sum(equal, axis=0)
        written += tl.sum(kept.to(tl.int32), axis=0)


@triton.jit(do_not_specialize=["k"])
def topk_of_rows_kernel(z_ptr, acts_ptr, latents_ptr, width, k, BLOCK: tl.constexpr):
    """acts, latents [R, k] of z [R, width]."""
    row = tl.program_id(0).to(tl.int64)
    topk_of_row(z_ptr + row * width, width, k, acts_ptr + row * k, latents_ptr + row * k, BLOCK)


def launch_topk_of_rows(z_RS: Tensor, acts_RK: Tensor, latents_RK: Tensor) -> None:
    """Writes the codes of non-negative values of any floating dtype up to float32."""
    (n_rows, width), k = z_RS.shape, acts_RK.shape[1]
    topk_of_rows_kernel[(n_rows,)](z_RS, acts_RK, latents_RK, width, k, BLOCK=1024, num_warps=8)
