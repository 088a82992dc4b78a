"""The entries of sparse codes by row and by latent: how codes meet segment_sum.

    entry_rows:       rows_M   = torch.searchsorted(row_offsets[1:], torch.arange(M), right=True)
    group_by_latent:  order_M  = latents.flatten().argsort(stable=True)
                      offsets  = torch.searchsorted(latents.flatten()[order_M], torch.arange(d_sae + 1))

with padding (reference.py) in row B and behind every latent. One grouping a step serves both weight gradients:
`segment_sum(acts.flatten()[order], entry_rows(latents, row_offsets)[order], offsets, grad_BD)`.
docs/kernels.md section 2
"""

import numpy as np
import torch
from torch import Tensor

from .common import check, check_codes, custom_op

# --- public functions ------------------------------------------------------------------------------------------------


def entry_rows(latents: Tensor, row_offsets: Tensor | None) -> Tensor:
    """The row of every entry, flat int64 [M]; B, one past the last row, for padding.

    latents: int64 [B, K] (row_offsets None) or [M] (row_offsets int64 [B + 1]); not checked. On any device, without
    host synchronisation.
    """
    if row_offsets is None:
        n_rows, k = latents.shape
        rows = torch.arange(n_rows, device=latents.device)
        return rows[:, None].expand(n_rows, k).reshape(n_rows * k)
    return entry_rows_op(row_offsets, latents.numel())


def group_by_latent(latents: Tensor, row_offsets: Tensor | None, d_sae: int) -> tuple[Tensor, Tensor]:
    """(order_M, offsets_S1): entries of latent s are order[offsets[s]:offsets[s + 1]], in row order. Both int64.

    latents: int64 [B, K] (row_offsets None) or [M] (row_offsets int64 [B + 1]). order is a permutation of all M flat
    positions; padding comes last and belongs to no latent. Stable, no host synchronisation on a GPU. ValueError: layout
    or dtype of the codes, d_sae outside 1..2^31 - 1, latents that are not below d_sae (undefined on a GPU).
    """
    check(0 < d_sae < 2**31, f"d_sae: {d_sae} is outside 1..2^31 - 1")
    check_codes(latents, row_offsets)
    return group_by_latent_op(latents.flatten(), row_offsets, d_sae)


# --- custom ops: CUDA ------------------------------------------------------------------------------------------------


def entry_rows_cuda(row_offsets: Tensor, n_entries: int) -> Tensor:
    positions = torch.arange(n_entries, device=row_offsets.device)
    return torch.searchsorted(row_offsets[1:].contiguous(), positions, right=True)


entry_rows_op = custom_op("entry_rows")(entry_rows_cuda)


def group_by_latent_cuda(latents_M: Tensor, row_offsets: Tensor | None, d_sae: int) -> tuple[Tensor, Tensor]:
    keys = latents_M.to(torch.int32)  # half the radix passes of int64
    if row_offsets is not None:
        positions = torch.arange(keys.numel(), device=keys.device)
        keys = torch.where(positions < row_offsets[-1], keys, d_sae)  # padding sorts behind every latent
    sorted_keys, order_M = torch.sort(keys, stable=True)
    bounds = torch.arange(d_sae + 1, device=keys.device, dtype=torch.int32)
    return order_M, torch.searchsorted(sorted_keys, bounds)


group_by_latent_op = custom_op("group_by_latent")(group_by_latent_cuda)


# --- CPU -------------------------------------------------------------------------------------------------------------


@entry_rows_op.register_kernel("cpu")
def entry_rows_cpu(row_offsets: Tensor, n_entries: int) -> Tensor:
    n_rows = row_offsets.numel() - 1
    counts = torch.diff(row_offsets, append=torch.tensor([n_entries]))  # the last count is the padding
    return torch.arange(n_rows + 1).repeat_interleave(counts, output_size=n_entries)


@group_by_latent_op.register_kernel("cpu")
def group_by_latent_cpu(latents_M: Tensor, row_offsets: Tensor | None, d_sae: int) -> tuple[Tensor, Tensor]:
    n_entries = latents_M.numel()
    n_inside = n_entries if row_offsets is None else int(row_offsets[-1])
    order_M = order_by_latent(latents_M[:n_inside], d_sae)
    if n_inside < n_entries:
        order_M = torch.cat([order_M, torch.arange(n_inside, n_entries)])
    counts = np.bincount(latents_M[:n_inside].numpy(), minlength=d_sae)
    check(counts.size == d_sae, f"latents: {counts.size - 1} is not below d_sae {d_sae}")
    latent_offsets_S1 = torch.zeros(d_sae + 1, dtype=torch.int64)
    torch.cumsum(torch.from_numpy(counts), 0, out=latent_offsets_S1[1:])
    return order_M, latent_offsets_S1


def order_by_latent(latents_M: Tensor, d_sae: int) -> Tensor:
    """The stable order alone, int64 [M], of latents below d_sae."""
    keys = latents_M.numpy()
    # NumPy's stable sort is a radix sort for 16-bit keys only: 3 to 9 times as fast as torch.sort (measured).
    order = np.argsort(keys.astype(np.uint16), kind="stable")
    if d_sae > 1 << 16:
        order = order[np.argsort((keys[order] >> 16).astype(np.uint16), kind="stable")]
    return torch.from_numpy(order)


# --- fakes -----------------------------------------------------------------------------------------------------------


@entry_rows_op.register_fake
def entry_rows_fake(row_offsets: Tensor, n_entries: int) -> Tensor:
    return row_offsets.new_empty(n_entries)


@group_by_latent_op.register_fake
def group_by_latent_fake(latents_M: Tensor, row_offsets: Tensor | None, d_sae: int) -> tuple[Tensor, Tensor]:
    return latents_M.new_empty(latents_M.shape[0]), latents_M.new_empty(d_sae + 1)


def joined_places(sizes: list[int], row_offsets: list[Tensor]) -> tuple[Tensor, Tensor]:
    """(places [M], row_offsets) of CSR codes of several batches as one: where each of their entries, padding among
    them, goes. Padding goes behind all others. No device is waited for."""
    device = row_offsets[0].device
    ends_P = torch.stack([offsets[-1] for offsets in row_offsets])
    starts_P = ends_P.cumsum(0) - ends_P
    total, places, before = ends_P.sum(), [], 0
    for size, start, end in zip(sizes, starts_P, ends_P):
        entry_M = torch.arange(size, device=device)
        places.append(entry_M + torch.where(entry_M < end, start, total + before - start - end))
        before += size
    ends = [offsets[:-1] + start for offsets, start in zip(row_offsets, starts_P)]
    return torch.cat(places), torch.cat([*ends, total[None]])


def placed(values_M: Tensor, places_M: Tensor) -> Tensor:
    """The values, each at its place."""
    return torch.empty_like(values_M).index_copy_(0, places_M, values_M)
