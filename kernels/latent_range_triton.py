"""Triton kernel of latent_range.py: one program a latent walks its entries, and again where their minimum counts."""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 128
NUM_WARPS = 1


@triton.jit(do_not_specialize=["n_images"])
def latent_range_kernel(acts_ptr, offsets_ptr, low_ptr, high_ptr, n_low_ptr, n_images, BLOCK: tl.constexpr):
    latent = tl.program_id(0).to(tl.int64)
    begin, end = tl.load(offsets_ptr + latent), tl.load(offsets_ptr + latent + 1)
    b_low = tl.full([BLOCK], float("inf"), dtype=acts_ptr.dtype.element_ty)
    b_high = tl.zeros([BLOCK], dtype=acts_ptr.dtype.element_ty)
    for t in range(begin, end, BLOCK):
        o_t = t + tl.arange(0, BLOCK)
        b_low = tl.minimum(b_low, tl.load(acts_ptr + o_t, mask=o_t < end, other=float("inf")))
        b_high = tl.maximum(b_high, tl.load(acts_ptr + o_t, mask=o_t < end, other=0.0))
    tl.store(high_ptr + latent, tl.max(b_high, axis=0))
    low = tl.min(b_low, axis=0)
    always = (end - begin == n_images) & (end > begin)
    b_count = tl.zeros([BLOCK], dtype=tl.int64)
    for t in range(begin, tl.where(always, end, begin), BLOCK):
        o_t = t + tl.arange(0, BLOCK)
        b_count += (tl.load(acts_ptr + o_t, mask=o_t < end, other=float("inf")) == low).to(tl.int64)
    tl.store(low_ptr + latent, tl.where(always, low, 0.0))
    tl.store(n_low_ptr + latent, tl.sum(b_count, axis=0))


# --- launch wrapper --------------------------------------------------------------------------------------------------


def launch_latent_range(acts_M: Tensor, offsets_S1: Tensor, n_images: int) -> tuple[Tensor, Tensor, Tensor]:
    """low_S, high_S, n_low_S of latent_range.latent_range."""
    acts_M, offsets_S1 = acts_M.contiguous(), offsets_S1.contiguous()
    n_latents = len(offsets_S1) - 1
    low_S, high_S = acts_M.new_empty(n_latents), acts_M.new_empty(n_latents)
    n_low_S = torch.empty(n_latents, dtype=torch.int64, device=acts_M.device)
    if n_latents > 0:
        latent_range_kernel[(n_latents,)](
            acts_M, offsets_S1, low_S, high_S, n_low_S, n_images, BLOCK=BLOCK, num_warps=NUM_WARPS
        )
    return low_S, high_S, n_low_S
