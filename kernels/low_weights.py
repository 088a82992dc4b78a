"""Rows of W_enc rounded to 16 bits, with bounds of that rounding: what a screening product needs of the weights.

A CPU screens in bfloat16 (topk_encode_screened.py), a GPU in float16 (topk_encode_cuda.py): there both run at one rate,
and float16 rounds eight times finer.
"""

from typing import NamedTuple

import torch
from torch import Tensor

CPU_DTYPE, CUDA_DTYPE = torch.bfloat16, torch.float16
CPU_ROUNDOFF = 2.0**-8
ALIGNMENT = 8  # columns of a float16 copy: its rows then begin at multiples of 16 bytes, as TMA asks
TINY = {torch.bfloat16: 2.0**-50, torch.float16: 2.0**-40}  # more than underflow and flushing to zero take from a norm
_CAST_ROWS = 256  # latents rounded at a time on a CPU: they stay in cache


class LowWeights(NamedTuple):
    """Rows of W_enc in 16 bits, with upper bounds of |w| and |w - w~|: what a product needs of them besides b_enc.

    W_SD: [S, P] contiguous. On a GPU P is d_in rounded up to a multiple of 8, and columns from d_in on are zero.
    norm_S, error_S: float32 [S]; the norm, taken in float32, plus TINY of the dtype. On a CPU the error is not taken:
    its bound is what bfloat16 makes of such a norm at most, two to three times as much.
    """

    W_SD: Tensor
    norm_S: Tensor
    error_S: Tensor

    @staticmethod
    def empty(
        d_sae: int, d_in: int, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
    ) -> "LowWeights":
        """Memory for d_sae rows; dtype: float16 on a GPU, bfloat16 on a CPU unless another is given."""
        if dtype is None:
            dtype = CPU_DTYPE if torch.device(device).type == "cpu" else CUDA_DTYPE
        width = -(-d_in // ALIGNMENT) * ALIGNMENT if dtype == CUDA_DTYPE else d_in
        allocate = torch.empty if width == d_in else torch.zeros
        norms = torch.empty(2, d_sae, dtype=torch.float32, device=device)
        return LowWeights(allocate(d_sae, width, dtype=dtype, device=device), *norms)

    def rows(self, start: int, stop: int) -> "LowWeights":
        return LowWeights(*(tensor[start:stop] for tensor in self))

    def write_(self, start: int, W_CD: Tensor) -> None:
        """Rows from `start` on become those of W_CD, float32."""
        rows = self.rows(start, start + len(W_CD))
        if self.W_SD.dtype == CUDA_DTYPE:
            from .topk_encode_screen_triton import launch_low_weights

            launch_low_weights(W_CD, *rows)
        else:
            rows._write_cpu(W_CD)

    def _write_cpu(self, W_CD: Tensor) -> None:
        """Block by block while they are in cache."""
        for o in range(0, len(W_CD), _CAST_ROWS):
            w_CD = W_CD[o : o + _CAST_ROWS]
            low_CD, norm_C, error_C = self.rows(o, o + len(w_CD))
            low_CD.copy_(w_CD)
            torch.linalg.vector_norm(w_CD, dim=1, out=norm_C).add_(TINY[CPU_DTYPE])
            torch.mul(norm_C, CPU_ROUNDOFF, out=error_C)  # the error itself would take three passes more
