"""The decoder on sparse codes, its gradients, and Matryoshka prefix reconstructions.

    x_hat[b]    = b_dec + sum over row b's entries of act * W_dec[latent]
    d_act[p]    = <g[row of p], W_dec[latent of p]>                              (gather_dot)
    d_W_dec[s]  = sum over latent s's entries of act * g[row]                    (segment_sum of the grouped entries)
    d_b_dec     = sum over rows of g

equals, in plain torch, `densify(acts, latents, row_offsets, S) @ W_dec + b_dec` and its autograd. Matryoshka prefix g
uses latents below group_ends[g] only. A row's entries ascend by latent, so each (row, group) is a contiguous bag of
entries: one pass over the bags with a running sum gives every prefix, and an entry of group j receives the suffix sum
over g >= j of the prefixes' gradients. The plain decoder is the case of one group. docs/kernels.md section 3
"""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from .common import check, check_codes, check_same_kind, custom_op, fixed_row_offsets, n_code_rows
from .grouping import entry_rows, group_by_latent
from .segment_sum import segment_sum_cpu, segment_sum_op

# --- public functions ------------------------------------------------------------------------------------------------


def sparse_decode(
    acts: Tensor, latents: Tensor, row_offsets: Tensor | None, W_dec_SD: Tensor, b_dec_D: Tensor
) -> Tensor:
    """x_hat_BD = b_dec + sum of act * W_dec[latent] over a row's entries; differentiable in acts, W_dec and b_dec.

    Codes as in kernels/reference.py: [B, K] with row_offsets None, or CSR [M] with row_offsets [B + 1] (padding is
    ignored). W_dec_SD contiguous; acts, W_dec and b_dec share a dtype, in which x_hat comes back; sums in float32
    (float64 for float64). Latents outside W_dec raise on CPU and are undefined on a GPU. d_W_dec is dense [S, D], zero
    rows where no entry fired; no float atomics, so a repeat run is bit-identical. ValueError: layout, shapes, dtypes or
    devices that do not fit, a W_dec that is not contiguous.
    """
    check_decode(acts, latents, row_offsets, W_dec_SD, b_dec_D)
    return sparse_decode_op(acts, latents, row_offsets, W_dec_SD, b_dec_D, 1).squeeze(1)


def matryoshka_decode(
    acts: Tensor,
    latents: Tensor,
    row_offsets: Tensor | None,
    W_dec_SD: Tensor,
    b_dec_D: Tensor,
    group_ends: list[int],
) -> Tensor:
    """Prefix reconstructions [G, B, D] (a view of [B, G, D]): the g-th uses latents below group_ends[g] only.

    group_ends: strictly ascending, the last equal to d_sae. Latents must ascend within a row (not checked).
    Otherwise sparse_decode. ValueError: as there, and for such group_ends.
    """
    check_decode(acts, latents, row_offsets, W_dec_SD, b_dec_D)
    d_sae = W_dec_SD.shape[0]
    ascending = all(low < high for low, high in pairwise([0, *group_ends]))
    check(
        len(group_ends) > 0 and ascending and group_ends[-1] == d_sae,
        f"group_ends: {list(group_ends)} must ascend strictly from above 0 and end at d_sae {d_sae}",
    )
    bag_offsets = group_bag_offsets(latents, row_offsets, group_ends, d_sae)
    codes = acts.flatten(), latents.flatten()
    return sparse_decode_op(*codes, bag_offsets, W_dec_SD, b_dec_D, len(group_ends)).transpose(0, 1)


def gather_dot(g_BD: Tensor, latents: Tensor, row_offsets: Tensor | None, W_SD: Tensor) -> Tensor:
    """<g[row of p], W[latent of p]> for every entry p, in the shape of latents and the dtype of g; 0 for padding.

    The gradient of a decode with respect to acts, and an encoder's pre-activations at chosen latents. g_BD any
    strides, W_SD contiguous, same dtype; sums in float32 (float64 for float64). Not differentiable by itself.
    ValueError: layout, shapes, dtypes or devices that do not fit; on a CPU latents outside W too.
    """
    check_codes(latents, row_offsets)
    check_same_kind(W=W_SD, g=g_BD)
    n_rows = n_code_rows(latents, row_offsets)
    check(W_SD.ndim == 2 and W_SD.is_contiguous(), f"W: shape {tuple(W_SD.shape)}, must be [S, D] and contiguous")
    expected = (n_rows, W_SD.shape[1])
    check(tuple(g_BD.shape) == expected, f"g: shape {tuple(g_BD.shape)}, must be [B, D] = {expected}")
    rows_M = entry_rows(latents, row_offsets)
    return gather_dot_op(g_BD.contiguous(), rows_M, latents.flatten(), W_SD).view(latents.shape)


def group_bag_offsets(latents: Tensor, row_offsets: Tensor | None, group_ends: list[int], d_sae: int) -> Tensor:
    """Offsets [B * G + 1] of the bags (row, group), row-major, from codes whose latents ascend within a row.

    group_ends as in matryoshka_decode; nothing is checked. No host synchronisation on a GPU.
    """
    n_rows = n_code_rows(latents, row_offsets)
    # row * d_sae + latent ascends over all entries, and padding (row B) stays behind every row.
    keys_M = entry_rows(latents, row_offsets) * d_sae + latents.flatten()
    row_keys_B = torch.arange(n_rows, device=latents.device) * d_sae
    # Not torch.tensor(group_ends): a copy from the host would wait for the device.
    bounds_BG = torch.stack([row_keys_B + end for end in group_ends], dim=1)
    return torch.nn.functional.pad(torch.searchsorted(keys_M, bounds_BG.flatten()), (1, 0))


def check_decode(acts: Tensor, latents: Tensor, row_offsets: Tensor | None, W_dec_SD: Tensor, b_dec_D: Tensor) -> None:
    """ValueError unless these are codes, their acts and a decoder in one dtype on one device."""
    check_codes(latents, row_offsets)
    check_same_kind(W_dec=W_dec_SD, acts=acts, b_dec=b_dec_D)
    check(acts.shape == latents.shape, f"acts: shape {tuple(acts.shape)}, must be latents' {tuple(latents.shape)}")
    shape = tuple(W_dec_SD.shape)
    check(len(shape) == 2 and W_dec_SD.is_contiguous(), f"W_dec: shape {shape}, must be [S, D] and contiguous")
    check(tuple(b_dec_D.shape) == shape[1:], f"b_dec: shape {tuple(b_dec_D.shape)}, must be [D] = {shape[1:]}")


# --- custom ops: CUDA ------------------------------------------------------------------------------------------------


@custom_op("sparse_decode")
def sparse_decode_op(
    acts: Tensor, latents: Tensor, bag_offsets: Tensor | None, W_dec_SD: Tensor, b_dec_D: Tensor, n_groups: int
) -> Tensor:
    """[B, G, D] running sums over each row's G bags. bag_offsets: [B * G + 1], or None for [B, K] codes and G = 1."""
    from .sparse_decode_triton import launch_sparse_decode

    with torch.cuda.device_of(W_dec_SD):
        return launch_sparse_decode(acts, latents, bag_offsets, W_dec_SD, b_dec_D, n_groups)


@custom_op("gather_dot")
def gather_dot_op(g_RD: Tensor, rows_M: Tensor, latents_M: Tensor, W_SD: Tensor) -> Tensor:
    from .sparse_decode_triton import launch_gather_dot

    with torch.cuda.device_of(W_SD):  # Triton launches on the current device
        return launch_gather_dot(g_RD, rows_M, latents_M, W_SD)


# --- CPU -------------------------------------------------------------------------------------------------------------


@sparse_decode_op.register_kernel("cpu")
def sparse_decode_cpu(
    acts: Tensor, latents: Tensor, bag_offsets: Tensor | None, W_dec_SD: Tensor, b_dec_D: Tensor, n_groups: int
) -> Tensor:
    if bag_offsets is None:
        bag_offsets = fixed_row_offsets(latents)
    sums = segment_sum_cpu(acts.flatten(), latents.flatten(), bag_offsets, W_dec_SD)
    sums_BGD = sums.view(sums.shape[0] // n_groups, n_groups, sums.shape[1])
    sums_BGD[:, 0] += b_dec_D
    for g in range(1, n_groups):
        sums_BGD[:, g] += sums_BGD[:, g - 1]
    return sums_BGD


@gather_dot_op.register_kernel("cpu")
def gather_dot_cpu(g_RD: Tensor, rows_M: Tensor, latents_M: Tensor, W_SD: Tensor) -> Tensor:
    inside = rows_M < g_RD.shape[0]
    if not inside.all():
        out_M = g_RD.new_zeros(rows_M.shape)
        out_M[inside] = gather_dot_cpu(g_RD, rows_M[inside], latents_M[inside], W_SD)
        return out_M
    if rows_M.numel() == 0:
        return g_RD.new_empty(0)
    low, high = (int(bound) for bound in latents_M.aminmax())
    check(low >= 0 and high < W_SD.shape[0], f"latents: {low}..{high} is outside W's {W_SD.shape[0]} rows")
    # One BLAS dot per entry, parallel over entries, nothing materialised: faster than sampled_addmm (measured).
    # The op wants bag offsets only for their dtype: the bag of every entry is given, and not as an expanded view.
    rows_M = rows_M.contiguous()
    return torch.ops.aten._embedding_bag_per_sample_weights_backward(g_RD, W_SD, latents_M, rows_M[:1], rows_M, 0)


# --- fakes -----------------------------------------------------------------------------------------------------------


@sparse_decode_op.register_fake
def sparse_decode_fake(
    acts: Tensor, latents: Tensor, bag_offsets: Tensor | None, W_dec_SD: Tensor, b_dec_D: Tensor, n_groups: int
) -> Tensor:
    n_rows = latents.shape[0] if bag_offsets is None else (bag_offsets.shape[0] - 1) // n_groups
    return W_dec_SD.new_empty(n_rows, n_groups, W_dec_SD.shape[1])


@gather_dot_op.register_fake
def gather_dot_fake(g_RD: Tensor, rows_M: Tensor, latents_M: Tensor, W_SD: Tensor) -> Tensor:
    return g_RD.new_empty(rows_M.shape[0])


# --- gradients -------------------------------------------------------------------------------------------------------


def sparse_decode_setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    acts, latents, bag_offsets, W_dec_SD, _, _ = inputs
    ctx.save_for_backward(acts, latents, bag_offsets, W_dec_SD)


def sparse_decode_backward(ctx: Any, grad_BGD: Tensor) -> tuple[Tensor | None, ...]:
    acts, latents, bag_offsets, W_dec_SD = ctx.saved_tensors
    needs_acts, _, _, needs_W_dec, needs_b_dec, _ = ctx.needs_input_grad
    n_rows, n_groups, d_in = grad_BGD.shape
    suffix_BGD = grad_BGD.contiguous()
    if n_groups > 1:  # an entry of group j takes part in every prefix from j on
        suffix_BGD = suffix_BGD.clone()
        for g in reversed(range(n_groups - 1)):
            suffix_BGD[:, g] += suffix_BGD[:, g + 1]
    bag_grads = suffix_BGD.view(n_rows * n_groups, d_in)
    bags_M = entry_rows(latents, bag_offsets)
    d_acts = d_W_dec = d_b_dec = None
    if needs_acts:
        d_acts = gather_dot_op(bag_grads, bags_M, latents.flatten(), W_dec_SD).view(acts.shape)
    if needs_W_dec:
        order_M, latent_offsets = group_by_latent(latents, bag_offsets, W_dec_SD.shape[0])
        d_W_dec = segment_sum_op(acts.flatten()[order_M], bags_M[order_M], latent_offsets, bag_grads)
    if needs_b_dec:
        d_b_dec = suffix_BGD[:, 0].sum(0)
    return d_acts, None, None, d_W_dec, d_b_dec, None


sparse_decode_op.register_autograd(sparse_decode_backward, setup_context=sparse_decode_setup_context)
