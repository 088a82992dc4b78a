"""Triton kernel of QuickGELU, x * sigmoid(1.702 x), in one pass over memory where torch's three operations take three.

Every step is rounded to x's dtype, as those operations do, so that half-precision results are theirs. saevlm_fast's
towers/forwards.py compares them before the kernel is used.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024
NUM_WARPS = 4


@triton.jit(do_not_specialize=["n_elements"])
def quick_gelu_kernel(x_ptr, out_ptr, n_elements, BLOCK: tl.constexpr):
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + o, mask=o < n_elements, other=0.0).to(tl.float32)
    scaled = (1.702 * x).to(dtype).to(tl.float32)
    gate = (1.0 / (1.0 + tl.exp(-scaled))).to(dtype).to(tl.float32)
    tl.store(out_ptr + o, (x * gate).to(dtype), mask=o < n_elements)


def launch_quick_gelu(x: Tensor) -> Tensor:
    """x, float and contiguous on a GPU, of any shape -> the same shape and dtype."""
    out = torch.empty_like(x)
    if x.numel() > 0:
        with torch.cuda.device_of(x):  # Triton launches on the current device
            quick_gelu_kernel[(triton.cdiv(x.numel(), BLOCK),)](x, out, x.numel(), BLOCK=BLOCK, num_warps=NUM_WARPS)
    return out
