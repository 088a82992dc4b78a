"""Weighted sums of gathered rows, segment by segment: the primitive under the decoder and both weight gradients.

    out[l] = sum over p in offsets[l]:offsets[l + 1] of weights[p] * source[ids[p]]

equals, in plain torch, `torch.zeros(L, D).index_add(0, segment_of_p, weights[:, None] * source[ids])`. With rows as
segments it is the decoder (ids are latents, source is W_dec); with entries grouped by latent it is a weight gradient
(ids are rows, source is the gradient of x_hat for dW_dec and x - b_dec for dW_enc). docs/kernels.md section 2

No atomics anywhere: a repeat run is bit-identical. Not differentiable by itself; sparse_decode registers its own.
"""

import warnings

import torch
from torch import Tensor

from .common import check, check_indices, check_same_kind, custom_op

with warnings.catch_warnings():  # torch says once that CSR is in beta: here, where nobody has to read it
    warnings.simplefilter("ignore", UserWarning)
    torch.sparse_csr_tensor(torch.tensor([0, 1]), torch.tensor([0]), torch.ones(1), (1, 1))

# --- public functions ------------------------------------------------------------------------------------------------


def segment_sum(weights_M: Tensor, ids_M: Tensor, offsets_L1: Tensor, source_RD: Tensor) -> Tensor:
    """out_LD: the weighted sum of source rows of every segment, in source's dtype, accumulated in float32 (float64).

    weights_M: floating, source's dtype. ids_M: int64 rows of source (out of range: undefined on a GPU).
    offsets_L1: int64, ascending; entries before offsets[0] and from offsets[L] on belong to no segment, so a slice of
    the offsets sums a slice of the segments. source_RD: contiguous. Empty segments are zero rows. ValueError: shapes,
    dtypes, devices, strides of source.
    """
    check_same_kind(source=source_RD, weights=weights_M)
    check_indices(ids=ids_M, offsets=offsets_L1)
    check(weights_M.ndim == 1, f"weights: shape {tuple(weights_M.shape)}, must be [M]")
    check(ids_M.shape == weights_M.shape, f"ids: shape {tuple(ids_M.shape)}, must be weights' {tuple(weights_M.shape)}")
    check(offsets_L1.ndim == 1 and offsets_L1.numel() > 0, f"offsets: shape {tuple(offsets_L1.shape)}, must be [L + 1]")
    check(source_RD.ndim == 2, f"source: shape {tuple(source_RD.shape)}, must be [R, D]")
    check(source_RD.is_contiguous(), f"source: strides {source_RD.stride()}, must be contiguous")
    return segment_sum_op(weights_M, ids_M, offsets_L1, source_RD)


def segment_sum_into(
    out_LD: Tensor, weights_M: Tensor, ids_M: Tensor, offsets_L1: Tensor, source_RD: Tensor, added: bool = False
) -> None:
    """segment_sum on a CPU, into memory that is there: written to out_LD, or added to what it holds.

    Shapes as in segment_sum, not checked; ValueError: ids outside source. In float32 and float64 a segment is a row of
    a sparse CSR matrix, and MKL multiplies it into place. The bits do not depend on the number of threads (measured).
    When this is faster than segment_sum: docs/kernels.md section 2.
    """
    check_ids(ids_M[int(offsets_L1[0]) : int(offsets_L1[-1])], len(source_RD))
    unchecked_segment_sum_into(out_LD, weights_M, ids_M, offsets_L1, source_RD, added)


def check_ids(ids_M: Tensor, n_rows: int) -> None:
    """ValueError: one that is not in 0 .. n_rows - 1."""
    if len(ids_M):
        low, high = (int(bound) for bound in ids_M.aminmax())  # a message of tensors takes 30 us to make
        check(low >= 0 and high < n_rows, f"ids: {low}..{high} is outside {n_rows} rows")


def unchecked_segment_sum_into(
    out_LD: Tensor, weights_M: Tensor, ids_M: Tensor, offsets_L1: Tensor, source_RD: Tensor, added: bool = False
) -> None:
    """segment_sum_into, of ids that the caller knows to be in source: MKL would read what lies beyond it."""
    if out_LD.dtype not in (torch.float32, torch.float64):  # MKL knows no others
        sums_LD = segment_sum_cpu(weights_M, ids_M, offsets_L1, source_RD)
        out_LD.add_(sums_LD) if added else out_LD.copy_(sums_LD)
        return
    start, end = int(offsets_L1[0]), int(offsets_L1[-1])
    if start == end:
        if not added:
            out_LD.zero_()
        return
    shape = out_LD.shape[0], source_RD.shape[0]
    entries = offsets_L1 - start, ids_M[start:end], weights_M[start:end]
    segments = torch.sparse_csr_tensor(*entries, shape, check_invariants=False)
    torch.addmm(out_LD, segments, source_RD, beta=int(added), out=out_LD)


# --- custom ops: CUDA ------------------------------------------------------------------------------------------------


@custom_op("segment_sum")
def segment_sum_op(weights_M: Tensor, ids_M: Tensor, offsets_L1: Tensor, source_RD: Tensor) -> Tensor:
    from .segment_sum_triton import launch_segment_sum

    with torch.cuda.device_of(source_RD):  # Triton launches on the current device
        return launch_segment_sum(weights_M, ids_M, offsets_L1, source_RD)


# --- CPU -------------------------------------------------------------------------------------------------------------


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


# --- fakes -----------------------------------------------------------------------------------------------------------


@segment_sum_op.register_fake
def segment_sum_fake(weights_M: Tensor, ids_M: Tensor, offsets_L1: Tensor, source_RD: Tensor) -> Tensor:
    return source_RD.new_empty(offsets_L1.shape[0] - 1, source_RD.shape[1])
