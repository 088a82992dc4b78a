"""Rows of W_enc rounded to float16, with bounds of that rounding: what a GPU's screening product needs of the weights.

On a CPU, which screens in bfloat16, nothing is kept of W_enc from step to step (topk_encode_screened.py). On a GPU both
types run at one rate, and float16 rounds eight times finer.
"""

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

CUDA_DTYPE = torch.float16
ALIGNMENT = 8  # columns of a copy: its rows then begin at multiples of 16 bytes, as TMA asks
# AMD's whose float16 matrix instructions keep subnormal factors and sums (CDNA 3 and 4). Those of MI200 (gfx90a) flush
# them to zero, as AMD documents; of the others nothing is documented.
AMD_KEEPING_SUBNORMALS = ("gfx942", "gfx950")


def keeps_subnormals(amd_architecture: str | None) -> bool:
    """Whether a chip's float16 products lose no subnormal number, which the bound of screening takes for granted.

    amd_architecture: torch's gcnArchName, as gfx90a:sramecc+:xnack-; None: NVIDIA's, whose tensor cores keep them.
    """
    return amd_architecture is None or amd_architecture.split(":")[0] in AMD_KEEPING_SUBNORMALS


@cache
def screening_is_sound(device: torch.device) -> bool:
    """Whether the bound of screening holds on this GPU."""
    hip = torch.version.hip is not None
    return keeps_subnormals(torch.cuda.get_device_properties(device).gcnArchName if hip else None)


class LowWeights(NamedTuple):
    """Rows of W_enc in 16 bits, with upper bounds of |w| and |w - w~|: what a product needs of them besides b_enc.

    W_SD: [S, P] contiguous; P is d_in rounded up to a multiple of 8, and columns from d_in on are zero.
    norm_S, error_S: float32 [S]; the norm, taken in float32, plus TINY.
    """

    W_SD: Tensor
    norm_S: Tensor
    error_S: Tensor

    @staticmethod
    def empty(d_sae: int, d_in: int, device: torch.device | str) -> "LowWeights":
        """Memory for d_sae rows."""
        width = -(-d_in // ALIGNMENT) * ALIGNMENT
        allocate = torch.empty if width == d_in else torch.zeros
        norms = torch.empty(2, d_sae, dtype=torch.float32, device=device)
        return LowWeights(allocate(d_sae, width, dtype=CUDA_DTYPE, device=device), *norms)

    def rows(self, start: int, stop: int) -> "LowWeights":
        return LowWeights(*(tensor[start:stop] for tensor in self))

    def write_(self, start: int, W_CD: Tensor) -> None:
        """Rows from `start` on become those of W_CD, float32."""
        from .topk_encode_screen_triton import launch_low_weights

        launch_low_weights(W_CD, *self.rows(start, start + len(W_CD)))
