"""Weighted sums of gathered rows, segment by segment: the primitive under the decoder and both weight gradients.

    out[l] = sum over p in offsets[l]:offsets[l + 1] of weights[p] * source[ids[p]]

equals, in plain torch, `torch.zeros(L, D).index_add(0, segment_of_p, weights[:, None] * source[ids])`. With rows as
segments it is the decoder (ids are latents, source is W_dec); with entries grouped by latent it is a weight gradient
(ids are rows, source is the gradient of x_hat for dW_dec and x - b_dec for dW_enc; kernels.md section 2).

No atomics anywhere: a repeat run is bit-identical. Not differentiable by itself; sparse_decode registers its own.
"""

import warnings

import numpy as np
import torch
from torch import Tensor

with warnings.catch_warnings():  # torch says once that CSR is in beta: here, where nobody has to read it
    warnings.simplefilter("ignore", UserWarning)
    torch.sparse_csr_tensor(torch.tensor([0, 1]), torch.tensor([0]), torch.ones(1), (1, 1))


def check(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def check_same_kind(**tensors: Tensor) -> None:
    """Every named floating tensor shares one floating dtype, and all tensors one device."""
    first_name, first = next(iter(tensors.items()))
    for name, tensor in tensors.items():
        check(tensor.is_floating_point(), f"{name}: dtype {tensor.dtype} is not a floating type")
        check(tensor.dtype == first.dtype, f"{name}: dtype {tensor.dtype} differs from {first_name}'s {first.dtype}")
        check(tensor.device == first.device, f"{name}: on {tensor.device}, {first_name} on {first.device}")


def check_indices(**tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        check(tensor.dtype == torch.int64, f"{name}: dtype {tensor.dtype}, must be torch.int64")


# --- segment_sum -----------------------------------------------------------------------------------------------------


@torch.library.custom_op("saevlm_fast::segment_sum", mutates_args=(), device_types="cuda")
def segment_sum_op(weights_M: Tensor, ids_M: Tensor, offsets_L1: Tensor, source_RD: Tensor) -> Tensor:
    from .segment_sum_triton import launch_segment_sum

    with torch.cuda.device_of(source_RD):  # Triton launches on the current device
        return launch_segment_sum(weights_M, ids_M, offsets_L1, source_RD)


@segment_sum_op.register_kernel("cpu")
def segment_sum_cpu(weights_M: Tensor, ids_M: Tensor, offsets_L1: Tensor, source_RD: Tensor) -> Tensor:
    start, end = int(offsets_L1[0]), int(offsets_L1[-1])
    if start == end:
        return source_RD.new_zeros(offsets_L1.numel() - 1, source_RD.shape[1])
    # embedding_bag wants bags that start at 0 and cover every index it is given. It fills what it allocates twice;
    # segment_sum_into does not, but knows two dtypes only.
    return torch.nn.functional.embedding_bag(
        ids_M[start:end],
        source_RD,
        offsets_L1 - start if start else offsets_L1,
        mode="sum",
        per_sample_weights=weights_M[start:end],
        include_last_offset=True,
    )


def segment_sum_into(
    out_LD: Tensor, weights_M: Tensor, ids_M: Tensor, offsets_L1: Tensor, source_RD: Tensor, added: bool = False
) -> None:
    """segment_sum on a CPU, into memory that is there: written to out_LD, or added to what it holds.

    In float32 and float64 a segment is a row of a sparse CSR matrix, and MKL multiplies it into place: half the time of
    embedding_bag, and the same bits, whatever the number of threads (measured).
    """
    if out_LD.dtype not in (torch.float32, torch.float64):  # MKL knows no others
        sums_LD = segment_sum_cpu(weights_M, ids_M, offsets_L1, source_RD)
        out_LD.add_(sums_LD) if added else out_LD.copy_(sums_LD)
        return
    start, end = int(offsets_L1[0]), int(offsets_L1[-1])
    weights_M, ids_M = weights_M[start:end], ids_M[start:end]
    if start == end:
        if not added:
            out_LD.zero_()
        return
    low, high = ids_M.aminmax()
    check(bool(low >= 0) and bool(high < len(source_RD)), f"ids: {low}..{high} is outside {len(source_RD)} rows")
    shape = out_LD.shape[0], source_RD.shape[0]
    segments = torch.sparse_csr_tensor(offsets_L1 - start, ids_M, weights_M, shape, check_invariants=False)
    torch.addmm(out_LD, segments, source_RD, beta=int(added), out=out_LD)


@segment_sum_op.register_fake
def segment_sum_fake(weights_M: Tensor, ids_M: Tensor, offsets_L1: Tensor, source_RD: Tensor) -> Tensor:
    return source_RD.new_empty(offsets_L1.shape[0] - 1, source_RD.shape[1])


def segment_sum(weights_M: Tensor, ids_M: Tensor, offsets_L1: Tensor, source_RD: Tensor) -> Tensor:
    """out_LD: the weighted sum of source rows of every segment, in source's dtype, accumulated in float32 (float64).

    weights_M: floating, source's dtype. ids_M: int64 rows of source (out of range: undefined on a GPU).
    offsets_L1: int64, ascending; entries before offsets[0] and from offsets[L] on belong to no segment, so a slice of
    the offsets sums a slice of the segments. source_RD: contiguous. Empty segments are zero rows.
    """
    check_same_kind(source=source_RD, weights=weights_M)
    check_indices(ids=ids_M, offsets=offsets_L1)
    check(weights_M.ndim == 1, f"weights: shape {tuple(weights_M.shape)}, must be [M]")
    check(ids_M.shape == weights_M.shape, f"ids: shape {tuple(ids_M.shape)}, must be weights' {tuple(weights_M.shape)}")
    check(offsets_L1.ndim == 1 and offsets_L1.numel() > 0, f"offsets: shape {tuple(offsets_L1.shape)}, must be [L + 1]")
    check(source_RD.ndim == 2, f"source: shape {tuple(source_RD.shape)}, must be [R, D]")
    check(source_RD.is_contiguous(), f"source: strides {source_RD.stride()}, must be contiguous")
    return segment_sum_op(weights_M, ids_M, offsets_L1, source_RD)


# --- entry_rows ------------------------------------------------------------------------------------------------------


def entry_rows_cuda(row_offsets: Tensor, n_entries: int) -> Tensor:
    positions = torch.arange(n_entries, device=row_offsets.device)
    return torch.searchsorted(row_offsets[1:].contiguous(), positions, right=True)


entry_rows_op = torch.library.custom_op(
    "saevlm_fast::entry_rows", entry_rows_cuda, mutates_args=(), device_types="cuda"
)


@entry_rows_op.register_kernel("cpu")
def entry_rows_cpu(row_offsets: Tensor, n_entries: int) -> Tensor:
    n_rows = row_offsets.numel() - 1
    counts = torch.diff(row_offsets, append=torch.tensor([n_entries]))  # the last count is the padding
    return torch.arange(n_rows + 1).repeat_interleave(counts, output_size=n_entries)


@entry_rows_op.register_fake
def entry_rows_fake(row_offsets: Tensor, n_entries: int) -> Tensor:
    return row_offsets.new_empty(n_entries)


def entry_rows(latents: Tensor, row_offsets: Tensor | None) -> Tensor:
    """The row of every entry, flat [M] int64; B, one past the last row, for padding. No host synchronisation."""
    if row_offsets is None:
        n_rows, k = latents.shape
        rows = torch.arange(n_rows, device=latents.device)
        return rows[:, None].expand(n_rows, k).reshape(n_rows * k)
    return entry_rows_op(row_offsets, latents.numel())


# --- group_by_latent -------------------------------------------------------------------------------------------------


def group_by_latent_cuda(latents_M: Tensor, row_offsets: Tensor | None, d_sae: int) -> tuple[Tensor, Tensor]:
    keys = latents_M.to(torch.int32)  # half the radix passes of int64
    if row_offsets is not None:
        positions = torch.arange(keys.numel(), device=keys.device)
        keys = torch.where(positions < row_offsets[-1], keys, d_sae)  # padding sorts behind every latent
    sorted_keys, order_M = torch.sort(keys, stable=True)
    bounds = torch.arange(d_sae + 1, device=keys.device, dtype=torch.int32)
    return order_M, torch.searchsorted(sorted_keys, bounds)


group_by_latent_op = torch.library.custom_op(
    "saevlm_fast::group_by_latent", group_by_latent_cuda, mutates_args=(), device_types="cuda"
)


@group_by_latent_op.register_kernel("cpu")
def group_by_latent_cpu(latents_M: Tensor, row_offsets: Tensor | None, d_sae: int) -> tuple[Tensor, Tensor]:
    n_entries = latents_M.numel()
    n_inside = n_entries if row_offsets is None else int(row_offsets[-1])
    keys = latents_M[:n_inside].numpy()
    # NumPy's stable sort is a radix sort for 16-bit keys only: 3 to 9 times as fast as torch.sort (measured).
    order = np.argsort(keys.astype(np.uint16), kind="stable")
    if d_sae > 1 << 16:
        order = order[np.argsort((keys[order] >> 16).astype(np.uint16), kind="stable")]
    order_M = torch.cat([torch.from_numpy(order), torch.arange(n_inside, n_entries)])
    counts = np.bincount(keys, minlength=d_sae)
    check(counts.size == d_sae, f"latents: {counts.size - 1} is not below d_sae {d_sae}")
    latent_offsets_S1 = torch.zeros(d_sae + 1, dtype=torch.int64)
    torch.cumsum(torch.from_numpy(counts), 0, out=latent_offsets_S1[1:])
    return order_M, latent_offsets_S1


@group_by_latent_op.register_fake
def group_by_latent_fake(latents_M: Tensor, row_offsets: Tensor | None, d_sae: int) -> tuple[Tensor, Tensor]:
    return latents_M.new_empty(latents_M.shape[0]), latents_M.new_empty(d_sae + 1)


def group_by_latent(latents: Tensor, row_offsets: Tensor | None, d_sae: int) -> tuple[Tensor, Tensor]:
    """(order_M, offsets_S1): entries of latent s are order[offsets[s]:offsets[s + 1]], in row order.

    latents: int64 [B, K] (row_offsets None) or [M] (CSR). order is a permutation of all M flat positions; padding comes
    last and belongs to no latent. One grouping a step serves both weight gradients:
    `segment_sum(acts.flatten()[order], entry_rows(latents, row_offsets)[order], offsets, grad_BD)`.
    Stable, no host synchronisation on a GPU. Latents outside 0..d_sae - 1 raise on CPU and are undefined on a GPU.
    """
    check(0 < d_sae < 2**31, f"d_sae: {d_sae} is outside 1..2^31 - 1")
    check_codes(latents, row_offsets)
    return group_by_latent_op(latents.flatten(), row_offsets, d_sae)


def check_codes(latents: Tensor, row_offsets: Tensor | None) -> None:
    """Layout of sparse codes (kernels/reference.py): [B, K] alone, or [M] with row_offsets [B + 1]."""
    check_indices(latents=latents)
    shape = tuple(latents.shape)
    if row_offsets is None:
        check(latents.ndim == 2, f"latents: shape {shape}, must be [B, K] when row_offsets is None")
    else:
        check(latents.ndim == 1, f"latents: shape {shape}, must be [M] when row_offsets is given")
        check_indices(row_offsets=row_offsets)
        offsets_shape = tuple(row_offsets.shape)
        check(len(offsets_shape) == 1 and offsets_shape[0] > 0, f"row_offsets: shape {offsets_shape}, must be [B + 1]")
