"""Triton kernels of threshold_encode with a threshold for every latent: what is above its own, exactly, in order.

    kept   = (pre > max(threshold_S, 0)) | isnan(pre)
    counts = kept.unflatten(1, (-1, 64)).sum(2)          above_kernel
    ends   = counts.flatten().cumsum(0)
    acts, latents at ends - counts ...                   write_above_kernel

pre are the ReLU'd pre-activations of a chunk of rows, as preactivation_kernel leaves them. Compared are the bits of
float32 as integers (`float_keys`), which order what is not negative as the numbers do: a threshold is not rounded to
pre's dtype. Units are 64 contiguous latents of one row. Counts are integers, so the result is deterministic.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import GROUP
from .topk_encode_triton import float_keys, preactivation_chunks

BLOCK_U = 32
_ABOVE_ALL = 0x7FC00000 - 1  # the key below NaN's: infinity's is smaller


@triton.jit
def kept_of_units(
    pre_ptr, keys_ptr, first_u, n_units, d_sae, units_per_row, GROUP: tl.constexpr, BLOCK_U: tl.constexpr
):
    """(values, kept, latents) [U, 64] of a block of units, and the units' numbers and mask [U]."""
    o_u = first_u + tl.arange(0, BLOCK_U)
    m_u = o_u < n_units
    row, unit = (o_u // units_per_row).to(tl.int64), o_u % units_per_row
    latents = unit[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    mask = m_u[:, None] & (latents < d_sae)
    values = tl.load(pre_ptr + row[:, None] * d_sae + latents, mask=mask, other=0.0)
    bounds = tl.load(keys_ptr + latents, mask=mask, other=0)
    kept = mask & (float_keys(values) > bounds)
    return values, kept, latents, o_u, m_u


@triton.jit
def above_kernel(
    pre_ptr, keys_ptr, counts_ptr, n_units, d_sae, units_per_row, GROUP: tl.constexpr, BLOCK_U: tl.constexpr
):
    """counts [n_units]: entries above their latent's threshold."""
    first_u = tl.program_id(0) * BLOCK_U
    _, kept, _, o_u, m_u = kept_of_units(pre_ptr, keys_ptr, first_u, n_units, d_sae, units_per_row, GROUP, BLOCK_U)
    tl.store(counts_ptr + o_u, tl.sum(kept.to(tl.int32), axis=1), mask=m_u)


@triton.jit
def write_above_kernel(
    pre_ptr,
    keys_ptr,
    ends_ptr,
    acts_ptr,
    latents_ptr,
    n_units,
    d_sae,
    units_per_row,
    GROUP: tl.constexpr,
    BLOCK_U: tl.constexpr,
):
    """Values and latents of the same entries, a unit's before ends[unit]."""
    first_u = tl.program_id(0) * BLOCK_U
    values, kept, latents, o_u, m_u = kept_of_units(
        pre_ptr, keys_ptr, first_u, n_units, d_sae, units_per_row, GROUP, BLOCK_U
    )
    ones = kept.to(tl.int32)
    start = tl.load(ends_ptr + o_u, mask=m_u, other=0) - tl.sum(ones, axis=1)
    slot = start[:, None] + tl.cumsum(ones, axis=1) - 1
    tl.store(acts_ptr + slot, values, mask=kept)
    tl.store(latents_ptr + slot, latents.to(tl.int64), mask=kept)


def threshold_keys(threshold_S: Tensor) -> Tensor:
    """int32 [d_sae]: what a key must be above; NaN as a threshold lets NaN alone pass."""
    wide_S = threshold_S.float()
    keys_S = torch.where(wide_S > 0, wide_S, 0.0).contiguous().view(torch.int32)  # of -0.0 the bits are below every key
    return torch.where(wide_S.isnan(), _ABOVE_ALL, keys_S)


def launch_latent_threshold_encode(
    x_BD: Tensor, W_enc_DS: Tensor, b_enc_S: Tensor, b_dec_D: Tensor, threshold_S: Tensor, buffer_bytes: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    d_sae, device = W_enc_DS.shape[1], x_BD.device
    keys_S, units_per_row = threshold_keys(threshold_S), triton.cdiv(d_sae, GROUP)
    acts, latents = [x_BD.new_empty(0)], [torch.empty(0, dtype=torch.int64, device=device)]
    offsets = [torch.zeros(1, dtype=torch.int64, device=device)]
    n_entries = 0
    for _, pre_RS, _ in preactivation_chunks(x_BD, W_enc_DS, b_enc_S, b_dec_D, buffer_bytes):
        n_units = len(pre_RS) * units_per_row
        counts = torch.empty(n_units, dtype=torch.int32, device=device)
        grid, sizes = (triton.cdiv(n_units, BLOCK_U),), (n_units, d_sae, units_per_row, GROUP, BLOCK_U)
        above_kernel[grid](pre_RS, keys_S, counts, *sizes)
        ends = counts.cumsum(0)  # int64
        row_ends = ends.view(-1, units_per_row)[:, -1]
        n = int(ends[-1])
        acts.append(x_BD.new_empty(n))
        latents.append(torch.empty(n, dtype=torch.int64, device=device))
        write_above_kernel[grid](pre_RS, keys_S, ends, acts[-1], latents[-1], *sizes)
        offsets.append(row_ends + n_entries)
        n_entries += n
    return torch.cat(acts), torch.cat(latents), torch.cat(offsets)
