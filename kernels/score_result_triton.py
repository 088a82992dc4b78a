"""The Monosemanticity Score of every latent from its sums, on a GPU, laid out for one copy to the host.

A host that made it would wake all its threads for a few numbers a latent: at 65,536 latents that took several
milliseconds, as long as the sums of 200,000 images.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import cdiv

BLOCK = 256
NUM_WARPS = 4


@triton.jit
def score_and_status(
    num,
    den,
    low,
    high,
    above,
    DEFINED: tl.constexpr,
    DEAD: tl.constexpr,
    CONSTANT: tl.constexpr,
    SINGLE: tl.constexpr,
):
    """num / den, NaN unless defined, and status_of (scoring/sums.py), int8. above: images above the minimum."""
    status = tl.where(above == 1, SINGLE, DEFINED)
    status = tl.where(above == 0, CONSTANT, status)
    status = tl.where((low == 0) & (high == 0), DEAD, status)
    return tl.where(status == DEFINED, num / den, float("nan")), status.to(tl.int8)


@triton.jit(do_not_specialize=["n_images", "n_latents"])
def score_result_kernel(
    num_ptr,
    den_ptr,
    low_ptr,
    high_ptr,
    active_ptr,
    at_low_ptr,
    ms_ptr,
    new_high_ptr,
    new_active_ptr,
    status_ptr,
    n_images,
    n_latents,
    SPARSE: tl.constexpr,
    DEFINED: tl.constexpr,
    DEAD: tl.constexpr,
    CONSTANT: tl.constexpr,
    SINGLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """score_and_status of every latent. SPARSE: at_low counts where low is above 0."""
    o_s = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_s = o_s < n_latents
    low, high = tl.load(low_ptr + o_s, mask=m_s, other=0.0), tl.load(high_ptr + o_s, mask=m_s, other=0.0)
    active = tl.load(active_ptr + o_s, mask=m_s, other=0)
    above = n_images - tl.load(at_low_ptr + o_s, mask=m_s, other=0)
    if SPARSE:
        above = tl.where(low > 0, above, active)
    num, den = tl.load(num_ptr + o_s, mask=m_s, other=0.0), tl.load(den_ptr + o_s, mask=m_s, other=1.0)
    ms, status = score_and_status(num, den, low, high, above, DEFINED, DEAD, CONSTANT, SINGLE)
    tl.store(ms_ptr + o_s, ms, mask=m_s)
    tl.store(new_high_ptr + o_s, high, mask=m_s)
    tl.store(new_active_ptr + o_s, active, mask=m_s)
    tl.store(status_ptr + o_s, status, mask=m_s)


# --- launch wrapper --------------------------------------------------------------------------------------------------


def score_result(
    num_S: Tensor,
    den_S: Tensor,
    low_S: Tensor,
    high_S: Tensor,
    n_active_S: Tensor,
    n_low_S: Tensor,
    n_images: int,
    sparse: bool,
    statuses: tuple[str, ...],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """ms and maximum (float64), n_active (int64) and status (int8), [S] on the host, which waits once."""
    n_latents = len(num_S)
    sizes = [8 * n_latents] * 3 + [n_latents]
    packed = torch.empty(sum(sizes), dtype=torch.uint8, device=num_S.device)

    def parts(of: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        ms, high, active, status = of.split(sizes)
        return ms.view(torch.float64), high.view(torch.float64), active.view(torch.int64), status.view(torch.int8)

    if n_latents > 0:
        codes = {name.upper(): number for number, name in enumerate(statuses)}
        score_result_kernel[(cdiv(n_latents, BLOCK),)](
            *(t.contiguous() for t in (num_S, den_S, low_S, high_S, n_active_S, n_low_S)),
            *parts(packed),
            n_images,
            n_latents,
            SPARSE=sparse,
            **codes,
            BLOCK=BLOCK,
            num_warps=NUM_WARPS,
        )
    return parts(packed.cpu())
