"""What is wrong with a chunk of sparse codes and with the images' embeddings, counted by one kernel on a GPU.

Of entries (activation, latent), the row offsets of CSR codes and the embeddings' |e|^2 it counts what breaks a rule of
SparseCodes.check, or of scoring/refusals.py. Nobody is named here: a chunk in which anything is counted is checked
again by those. Entries after the last row offset are padding, of which nothing is asked.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import cdiv

BLOCK = 1024
MOST_PROGRAMS = 128
NUM_WARPS = 4


@triton.jit(do_not_specialize=["n_entries", "n_images", "n_latents"])
def code_faults_kernel(
    acts_ptr,
    latents_ptr,
    offsets_ptr,
    sqnorm_ptr,
    counts_ptr,
    n_entries,
    n_images,
    n_latents,
    CSR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """counts[program] = CodeFaults of its share of entries and images."""
    program = tl.program_id(0).to(tl.int64)
    step = tl.num_programs(0).to(tl.int64) * BLOCK
    b_zero = tl.zeros([BLOCK], dtype=tl.int64)
    b_unfit = tl.zeros([BLOCK], dtype=tl.int64)
    b_wrong = tl.zeros([BLOCK], dtype=tl.int64)
    b_silent = tl.zeros([BLOCK], dtype=tl.int64)
    end = tl.zeros([], dtype=tl.int64) + n_entries
    outside = tl.zeros([], dtype=tl.int64)
    if CSR:
        last = tl.load(offsets_ptr + n_images)
        outside = ((tl.load(offsets_ptr) != 0) | (last > end)).to(tl.int64)
        end = tl.minimum(last, end)
    for first in range(program * BLOCK, n_images, step):
        o_n = first + tl.arange(0, BLOCK)
        m_n = o_n < n_images
        square = tl.load(sqnorm_ptr + o_n, mask=m_n, other=1.0)
        b_zero += (square == 0).to(tl.int64)
        b_unfit += ((square < float("inf")) == 0).to(tl.int64)  # NaN too
        if CSR:
            begins = tl.load(offsets_ptr + o_n, mask=m_n, other=0)
            b_wrong += (tl.load(offsets_ptr + o_n + 1, mask=m_n, other=0) < begins).to(tl.int64)
    for first in range(program * BLOCK, end, step):
        o_m = first + tl.arange(0, BLOCK)
        m_m = o_m < end
        act = tl.load(acts_ptr + o_m, mask=m_m, other=1.0).to(tl.float64)
        latent = tl.load(latents_ptr + o_m, mask=m_m, other=0)
        b_wrong += (((act >= 0) & (act < float("inf"))) == 0).to(tl.int64)
        b_wrong += ((latent < 0) | (latent >= n_latents)).to(tl.int64)
        b_silent += (act == 0).to(tl.int64)
    counts_ptr += program * 5
    tl.store(counts_ptr, tl.sum(b_zero, axis=0))
    tl.store(counts_ptr + 1, tl.sum(b_unfit, axis=0))
    tl.store(counts_ptr + 2, tl.sum(b_wrong, axis=0) + outside)
    tl.store(counts_ptr + 3, tl.sum(b_silent, axis=0))
    tl.store(counts_ptr + 4, tl.where(program == 0, end, 0))


# --- launch wrapper --------------------------------------------------------------------------------------------------


class CodeFaults(NamedTuple):
    """How many embeddings are zero and how many not finite; broken rules; entries of activation 0; entries of rows."""

    zero: int
    unfit: int
    wrong: int
    silent: int
    n_entries: int


def code_faults(
    acts: Tensor, latents: Tensor, row_offsets: Tensor | None, sqnorm_n: Tensor, n_latents: int
) -> CodeFaults:
    """Of codes of n images, flat as kernels take them, and |e|^2 float64 [n]. The device is waited for once."""
    n_entries, n_images = latents.numel(), len(sqnorm_n)
    programs = min(MOST_PROGRAMS, max(1, cdiv(max(n_entries, n_images), BLOCK)))
    counts = torch.empty(programs, 5, dtype=torch.int64, device=latents.device)
    code_faults_kernel[(programs,)](
        acts.contiguous(),
        latents.contiguous(),
        None if row_offsets is None else row_offsets.contiguous(),
        sqnorm_n.contiguous(),
        counts,
        n_entries,
        n_images,
        n_latents,
        CSR=row_offsets is not None,
        BLOCK=BLOCK,
        num_warps=NUM_WARPS,
    )
    return CodeFaults(*counts.cpu().numpy().sum(0).tolist())
