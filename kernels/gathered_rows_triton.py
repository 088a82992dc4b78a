"""Triton kernel of a training batch: rows of a matrix, widened and divided by one number, in one pass over memory.

The bits are torch's: index_select, then a division in float32 that is rounded once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_D = 1024
NUM_WARPS = 4


@triton.jit(do_not_specialize=["divisor"])
def gathered_rows_kernel(x_ptr, rows_ptr, out_ptr, divisor, d_in, BLOCK_D: tl.constexpr):
    b = tl.program_id(0).to(tl.int64)
    row = tl.load(rows_ptr + b)
    for d in range(0, d_in, BLOCK_D):
        o_d = d + tl.arange(0, BLOCK_D)
        x = tl.load(x_ptr + row * d_in + o_d, mask=o_d < d_in, other=0.0).to(tl.float32)
        tl.store(out_ptr + b * d_in + o_d, tl.div_rn(x, divisor), mask=o_d < d_in)


def launch_gathered_rows(x_ND: Tensor, rows_B: Tensor, divisor: float, out_BD: Tensor) -> Tensor:
    """float32 out_BD = x_ND[rows_B] / divisor. x_ND is float32 or half precision, rows_B int64; all are contiguous."""
    d_in = x_ND.shape[1]
    block = min(BLOCK_D, triton.next_power_of_2(d_in))
    with torch.cuda.device_of(x_ND):  # Triton launches on the current device
        gathered_rows_kernel[(len(rows_B),)](x_ND, rows_B, out_BD, divisor, d_in, BLOCK_D=block, num_warps=NUM_WARPS)
    return out_BD
