"""Sparse encoding: the activations that TopK, BatchTopK or a threshold keeps, never the dense [B, d_sae] matrix.

    pre = relu((x - b_dec) @ W_enc + b_enc)                       docs/recipe.md section 1
    acts, latents = pre.topk(k)                                   topk_encode
    acts, flat    = pre.flatten().topk(B * k), zeros dropped      batch_topk_encode
    flat          = (pre > threshold).flatten().nonzero()         threshold_encode: one for all latents, or [d_sae]

(kernels/reference.py has them in full, with the layout of the codes and the order of ties.) Method (docs/kernels.md,
section 1): the GEMM's epilogue also leaves the maximum of every group of 64 contiguous latents; the k best groups
contain the top k, so only k * 64 candidates are ever looked at again. Rows go in chunks, so that memory is bounded. Of
float32 inputs a 16-bit product proposes, with bounds, and float32 decides: float16 on a GPU, bfloat16 on a CPU where
that is fast. NaN ranks above every number and is returned.

Gradients flow to active latents only (act above zero, or NaN). With da [M] the gradient of their acts,

    db_enc[s]    = sum of da over the entries of latent s
    dW_enc[:, s] = sum of da * (x_row - b_dec) over the entries of latent s
    db_dec       = -W_enc @ db_enc
    dx[b]        = sum of da * W_enc[:, latent] over the entries of row b

all of them segment sums: deterministic, and O(M * d_in).
"""

import math
from typing import Any

import torch
from torch import Tensor

from . import topk_encode_cpu as plain
from . import topk_encode_cuda as gpu
from . import topk_encode_screened as screened
from .common import check, check_same_kind, custom_op, fixed_row_offsets
from .grouping import entry_rows, group_by_latent
from .segment_sum import segment_sum

CUDA_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# --- public functions ------------------------------------------------------------------------------------------------


def topk_encode(
    x_BD: Tensor, W_enc_DS: Tensor, b_enc_S: Tensor, b_dec_D: Tensor, k: int, *, buffer_bytes: int | None = None
) -> tuple[Tensor, Tensor]:
    """(acts [B, K], latents [B, K] int64): the k largest activations of every row, ties to the lower latent.

    Latents ascend within a row. A row with fewer than k positive pre-activations is filled with zero activations at its
    lowest latents of value zero. One floating dtype and one device for all four tensors (float64 on CPU only); W_enc in
    any strides, [d_sae, d_in] order in memory (a transposed view) being the fastest. Float32 is float32, also where
    torch.backends lets torch's own products run in TF32. buffer_bytes bounds the chunk of pre-activations held at a
    time (default: 64 MiB on CPU; on a GPU 1 GiB, or 512 MiB where nothing is screened), at least one row; on a CPU 64
    columns more are not counted. ValueError: shapes, dtypes, k outside 1..d_sae (on a GPU also above 1024).
    """
    _check(x_BD, W_enc_DS, b_enc_S, b_dec_D, buffer_bytes)
    _check_k(k, W_enc_DS.shape[1])
    return topk_encode_op(x_BD, W_enc_DS, b_enc_S, b_dec_D, k, buffer_bytes)


def batch_topk_encode(
    x_BD: Tensor, W_enc_DS: Tensor, b_enc_S: Tensor, b_dec_D: Tensor, k: int, *, buffer_bytes: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(acts [M], latents [M] int64, row_offsets [B + 1] int64): the B * k largest of the batch, M = B * k.

    Ties go to the lower flat position b * d_sae + s; zeros never compete, so entries at or after row_offsets[B] may be
    padding (activation 0, latent 0). No host synchronisation on a GPU. Over several row chunks each keeps its own best
    B * k (12 bytes apiece) and the last step chooses among these; otherwise as topk_encode.
    """
    _check(x_BD, W_enc_DS, b_enc_S, b_dec_D, buffer_bytes)
    _check_k(k, W_enc_DS.shape[1])
    return batch_topk_encode_op(x_BD, W_enc_DS, b_enc_S, b_dec_D, k, buffer_bytes)


def threshold_encode(
    x_BD: Tensor,
    W_enc_DS: Tensor,
    b_enc_S: Tensor,
    b_dec_D: Tensor,
    threshold: float | Tensor,
    *,
    buffer_bytes: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(acts [M], latents [M] int64, row_offsets [B + 1] int64): every activation above max(threshold, 0), and NaN.

    BatchTopK at inference; ReLU, whose threshold is 0; and JumpReLU, whose threshold is a tensor [d_sae] of any
    floating dtype (on a GPU at most float32). It is compared with an activation as numbers are, nothing rounded. M is
    exact, for which a GPU is asked once per row chunk. Otherwise as topk_encode. No gradient flows to the threshold.
    """
    _check(x_BD, W_enc_DS, b_enc_S, b_dec_D, buffer_bytes)
    if not isinstance(threshold, Tensor):
        check(not math.isnan(threshold), "threshold: is NaN")
        return threshold_encode_op(x_BD, W_enc_DS, b_enc_S, b_dec_D, threshold, buffer_bytes)
    _check_thresholds(threshold, x_BD, W_enc_DS.shape[1])
    return latent_threshold_encode_op(x_BD, W_enc_DS, b_enc_S, b_dec_D, threshold.detach(), buffer_bytes)


def _check_thresholds(threshold_S: Tensor, x_BD: Tensor, d_sae: int) -> None:
    check(threshold_S.shape == (d_sae,), f"threshold: shape {tuple(threshold_S.shape)}, must be [{d_sae}], or a number")
    check(threshold_S.is_floating_point(), f"threshold: dtype {threshold_S.dtype}, must be floating point")
    check(threshold_S.device == x_BD.device, f"threshold: on {threshold_S.device}, but x is on {x_BD.device}")
    wide = threshold_S.dtype == torch.float64 and x_BD.device.type != "cpu"
    check(not wide, f"threshold: dtype {threshold_S.dtype} on {x_BD.device}, float64 is for cpu only")


def rounded_down(threshold: float, dtype: torch.dtype) -> float:
    """The largest number of that dtype that is not above a threshold: the same numbers of the dtype are above both."""
    if not 0 < threshold < math.inf or dtype == torch.float64:
        return threshold
    info = torch.finfo(dtype)
    if threshold >= info.max:
        return info.max
    spacing = max(math.ldexp(info.eps, math.frexp(threshold)[1] - 1), info.smallest_normal * info.eps)
    return math.floor(threshold / spacing) * spacing


def _check(x_BD: Tensor, W_enc_DS: Tensor, b_enc_S: Tensor, b_dec_D: Tensor, buffer_bytes: int | None) -> None:
    check_same_kind(x=x_BD, W_enc=W_enc_DS, b_enc=b_enc_S, b_dec=b_dec_D)
    check(x_BD.ndim == 2 and x_BD.shape[1] > 0, f"x: shape {tuple(x_BD.shape)}, must be [B, d_in]")
    d_in = x_BD.shape[1]
    check(
        W_enc_DS.ndim == 2 and W_enc_DS.shape[0] == d_in and W_enc_DS.shape[1] > 0,
        f"W_enc: shape {tuple(W_enc_DS.shape)}, must be [d_in, d_sae] with x's d_in {d_in}",
    )
    d_sae = W_enc_DS.shape[1]
    check(b_enc_S.shape == (d_sae,), f"b_enc: shape {tuple(b_enc_S.shape)}, must be [{d_sae}]")
    check(b_dec_D.shape == (d_in,), f"b_dec: shape {tuple(b_dec_D.shape)}, must be [{d_in}]")
    check(
        x_BD.device.type == "cpu" or x_BD.dtype in CUDA_DTYPES,
        f"x: dtype {x_BD.dtype} on {x_BD.device}, must be float32, bfloat16 or float16 (float64 on cpu only)",
    )
    check(buffer_bytes is None or buffer_bytes > 0, f"buffer_bytes: {buffer_bytes} is below 1")


def _check_k(k: int, d_sae: int) -> None:
    check(1 <= k <= d_sae, f"k: {k} is outside 1..d_sae = {d_sae}")


# --- custom ops: CUDA ------------------------------------------------------------------------------------------------


@custom_op("topk_encode")
def topk_encode_op(
    x_BD: Tensor, W_enc_DS: Tensor, b_enc_S: Tensor, b_dec_D: Tensor, k: int, buffer_bytes: int | None
) -> tuple[Tensor, Tensor]:
    if gpu.screens_cuda(x_BD, W_enc_DS, k):
        return gpu.topk_encode_screened_cuda(x_BD, W_enc_DS, b_enc_S, b_dec_D, k, buffer_bytes)
    from .topk_encode_triton import launch_topk_encode

    with torch.cuda.device_of(x_BD):  # Triton launches on the current device
        return launch_topk_encode(x_BD, W_enc_DS, b_enc_S, b_dec_D, k, buffer_bytes)


@custom_op("batch_topk_encode")
def batch_topk_encode_op(
    x_BD: Tensor, W_enc_DS: Tensor, b_enc_S: Tensor, b_dec_D: Tensor, k: int, buffer_bytes: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    if gpu.screens_cuda(x_BD, W_enc_DS, k):
        return gpu.batch_topk_encode_screened_cuda(x_BD, W_enc_DS, b_enc_S, b_dec_D, k, buffer_bytes)
    from .topk_encode_batch_triton import launch_batch_topk_encode

    with torch.cuda.device_of(x_BD):
        return launch_batch_topk_encode(x_BD, W_enc_DS, b_enc_S, b_dec_D, k, buffer_bytes)


@custom_op("threshold_encode")
def threshold_encode_op(
    x_BD: Tensor, W_enc_DS: Tensor, b_enc_S: Tensor, b_dec_D: Tensor, threshold: float, buffer_bytes: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    threshold = rounded_down(threshold, x_BD.dtype)
    if gpu.screens_cuda(x_BD, W_enc_DS):
        return gpu.threshold_encode_screened_cuda(x_BD, W_enc_DS, b_enc_S, b_dec_D, threshold, buffer_bytes)
    from .topk_encode_batch_triton import launch_threshold_encode

    with torch.cuda.device_of(x_BD):
        return launch_threshold_encode(x_BD, W_enc_DS, b_enc_S, b_dec_D, threshold, buffer_bytes)


@custom_op("latent_threshold_encode")
def latent_threshold_encode_op(
    x_BD: Tensor, W_enc_DS: Tensor, b_enc_S: Tensor, b_dec_D: Tensor, threshold_S: Tensor, buffer_bytes: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """NaN as a threshold is none that anything is above, NaN apart."""
    from .topk_encode_latent_triton import launch_latent_threshold_encode

    with torch.cuda.device_of(x_BD):
        return launch_latent_threshold_encode(x_BD, W_enc_DS, b_enc_S, b_dec_D, threshold_S, buffer_bytes)


# --- CPU -------------------------------------------------------------------------------------------------------------


@topk_encode_op.register_kernel("cpu")
def topk_encode_cpu(
    x_BD: Tensor, W_enc_DS: Tensor, b_enc_S: Tensor, b_dec_D: Tensor, k: int, buffer_bytes: int | None
) -> tuple[Tensor, Tensor]:
    if screened.screens(x_BD, W_enc_DS, k):
        return screened.topk_encode_screened(x_BD, W_enc_DS, b_enc_S, b_dec_D, k, buffer_bytes)
    return plain.topk_encode_cpu(x_BD, W_enc_DS, b_enc_S, b_dec_D, k, buffer_bytes)


@batch_topk_encode_op.register_kernel("cpu")
def batch_topk_encode_cpu(
    x_BD: Tensor, W_enc_DS: Tensor, b_enc_S: Tensor, b_dec_D: Tensor, k: int, buffer_bytes: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    if screened.screens(x_BD, W_enc_DS, k):
        return screened.batch_topk_encode_screened(x_BD, W_enc_DS, b_enc_S, b_dec_D, k, buffer_bytes)
    return plain.batch_topk_encode_cpu(x_BD, W_enc_DS, b_enc_S, b_dec_D, k, buffer_bytes)


@threshold_encode_op.register_kernel("cpu")
def threshold_encode_cpu(
    x_BD: Tensor, W_enc_DS: Tensor, b_enc_S: Tensor, b_dec_D: Tensor, threshold: float, buffer_bytes: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    threshold = rounded_down(threshold, x_BD.dtype)
    if threshold > 0 and screened.screens(x_BD, W_enc_DS):  # of a bound of 0 a screen cannot be sure
        return screened.threshold_encode_screened(x_BD, W_enc_DS, b_enc_S, b_dec_D, threshold, buffer_bytes)
    return plain.threshold_encode_cpu(x_BD, W_enc_DS, b_enc_S, b_dec_D, threshold, buffer_bytes)


@latent_threshold_encode_op.register_kernel("cpu")
def latent_threshold_encode_cpu(
    x_BD: Tensor, W_enc_DS: Tensor, b_enc_S: Tensor, b_dec_D: Tensor, threshold_S: Tensor, buffer_bytes: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    return plain.threshold_encode_cpu(x_BD, W_enc_DS, b_enc_S, b_dec_D, threshold_S, buffer_bytes)


# --- fakes -----------------------------------------------------------------------------------------------------------


@topk_encode_op.register_fake
def topk_encode_fake(
    x_BD: Tensor, W_enc_DS: Tensor, b_enc_S: Tensor, b_dec_D: Tensor, k: int, buffer_bytes: int | None
) -> tuple[Tensor, Tensor]:
    shape = (x_BD.shape[0], k)
    return x_BD.new_empty(shape), x_BD.new_empty(shape, dtype=torch.int64)


@batch_topk_encode_op.register_fake
def batch_topk_encode_fake(
    x_BD: Tensor, W_enc_DS: Tensor, b_enc_S: Tensor, b_dec_D: Tensor, k: int, buffer_bytes: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_csr(x_BD, x_BD.shape[0] * k)


@threshold_encode_op.register_fake
def threshold_encode_fake(
    x_BD: Tensor, W_enc_DS: Tensor, b_enc_S: Tensor, b_dec_D: Tensor, threshold: float, buffer_bytes: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_csr(x_BD, torch.library.get_ctx().new_dynamic_size())


@latent_threshold_encode_op.register_fake
def latent_threshold_encode_fake(
    x_BD: Tensor, W_enc_DS: Tensor, b_enc_S: Tensor, b_dec_D: Tensor, threshold_S: Tensor, buffer_bytes: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_csr(x_BD, torch.library.get_ctx().new_dynamic_size())


def _empty_csr(x_BD: Tensor, capacity: int | torch.SymInt) -> tuple[Tensor, Tensor, Tensor]:
    return (
        x_BD.new_empty(capacity),
        x_BD.new_empty(capacity, dtype=torch.int64),
        x_BD.new_empty(x_BD.shape[0] + 1, dtype=torch.int64),
    )


# --- gradients -------------------------------------------------------------------------------------------------------


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x_BD, W_enc_DS, _, b_dec_D, *_ = inputs
    acts, latents, *row_offsets = output
    ctx.save_for_backward(x_BD, W_enc_DS, b_dec_D, acts, latents, *row_offsets)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_acts: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_acts is None:
        return None, None, None, None, None, None
    x_BD, W_enc_DS, b_dec_D, acts, latents, *row_offsets = ctx.saved_tensors
    return (
        *encode_gradients(
            grad_acts,
            acts,
            latents,
            row_offsets[0] if row_offsets else None,
            x_BD,
            W_enc_DS,
            b_dec_D,
            ctx.needs_input_grad,
        ),
        None,
        None,
    )


def encode_gradients(
    grad_acts: Tensor,
    acts: Tensor,
    latents: Tensor,
    row_offsets: Tensor | None,
    x_BD: Tensor,
    W_enc_DS: Tensor,
    b_dec_D: Tensor,
    needed: tuple[bool, ...] = (True, True, True, True),
) -> tuple[Tensor | None, ...]:
    """(dx, dW_enc, db_enc, db_dec) from the gradient of the codes' acts; None where `needed` is False.

    dW_enc [d_in, d_sae] is the transposed view of a [d_sae, d_in] tensor.
    """
    d_sae = W_enc_DS.shape[1]
    grad_M = torch.where(acts != 0, grad_acts, 0).flatten()
    grad_x_BD = grad_W_DS = grad_b_enc_S = grad_b_dec_D = None
    if any(needed[1:4]):
        order_M, latent_offsets_S1 = group_by_latent(latents, row_offsets, d_sae)
        ordered_M = grad_M[order_M]
        rows_M = entry_rows(latents, row_offsets)[order_M]
        if needed[1]:
            grad_W_DS = segment_sum(ordered_M, rows_M, latent_offsets_S1, (x_BD - b_dec_D).contiguous()).t()
        ones_B1 = x_BD.new_ones(x_BD.shape[0], 1)
        grad_b_enc_S = segment_sum(ordered_M, rows_M, latent_offsets_S1, ones_B1).squeeze(1)
        grad_b_dec_D = -(W_enc_DS @ grad_b_enc_S) if needed[3] else None
    if needed[0]:
        if row_offsets is None:
            row_offsets = fixed_row_offsets(latents)
        grad_x_BD = segment_sum(grad_M, latents.flatten(), row_offsets, W_enc_DS.t().contiguous())
    return grad_x_BD, grad_W_DS, grad_b_enc_S if needed[2] else None, grad_b_dec_D


def _refuse_vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
    raise NotImplementedError("torch.vmap: parts may differ in how many entries they have; rows go as [B, d_in]")


for _ragged in (batch_topk_encode_op, threshold_encode_op, latent_threshold_encode_op):
    _ragged.register_vmap(_refuse_vmap)
for _op in (topk_encode_op, batch_topk_encode_op, threshold_encode_op, latent_threshold_encode_op):
    _op.register_autograd(_backward, setup_context=_save_for_backward)
