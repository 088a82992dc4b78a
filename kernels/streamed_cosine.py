"""Streamed pair sums of sparse codes for inner-product similarities, in time linear in the non-zeros.

For s_ij = <u_i, u_j> (cosine: u_i = e_i / ||e_i||; dot: u_i = e_i) a latent's pair sums follow from running sums:

    num += a_t <u_t, S>      den += a_t A      S += a_t u_t      A += a_t          (image by image)

This is the closed form (||S||^2 - sum a^2 ||u||^2) / 2 without its subtraction, which loses every digit when a latent
fires on few images or one activation dominates (docs/recipe.md section 3). States of disjoint sets of images merge by

    num = num_1 + num_2 + <S_1, S_2>      den = den_1 + den_2 + A_1 A_2      S = S_1 + S_2      A = A_1 + A_2

so images may come in any chunks and heavy latents may be split. Every error is about 1e-16 of sum_{i<j} |a_i||a_j|
||u_i||||u_j||; for non-negative activations and cosine that is den, so the score num / den is good to that.

In torch, for one latent with activations a [n] and u [n, E]:

    pairs = torch.triu(u @ u.T, 1); num += a @ pairs @ a + (a @ u) @ S; S += a @ u

CUDA: streamed_cosine_triton.py. CPU: S of the chunk by a sparse-dense product (MKL), a panel of latents at a time,
merged while the panel is in cache; pairs within the chunk by the closed form where it loses at most three digits, else
by folding halves. Both accumulate in float64. The operator mutates the state and is not differentiable.
"""

import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from .common import check, custom_op, sums_at, zeros_of
from .pairwise_similarity import distinct_pair_products, well_conditioned
from .scaled_rows import scaled_rows, squared_norms

_CPU_PANEL_ELEMENTS = 1 << 19
_CPU_FOLD_ELEMENTS = 1 << 22

# --- public functions ------------------------------------------------------------------------------------------------


class StreamedState(NamedTuple):
    """Running sums of S latents over the images so far, all float64: S, num, den and A of the module's docstring."""

    sums_SE: Tensor
    num_S: Tensor
    den_S: Tensor
    total_S: Tensor


def streamed_cosine_state(n_latents: int, d_emb: int, device: torch.device | str = "cpu") -> StreamedState:
    """The state before any image: zeros."""
    return StreamedState(*zeros_of(device, (n_latents, d_emb), *[(n_latents,)] * 3))


def streamed_cosine_update(
    state: StreamedState,
    acts_M: Tensor,
    images_M: Tensor,
    offsets_S1: Tensor,
    emb_NE: Tensor,
    scale_N: Tensor | None = None,
    half: int = -1,
) -> None:
    """Folds one chunk of images into the state, in place; of its images of even number (half 0) or odd (1), or all.

    Codes grouped by latent: latent s fires on images[offsets[s]:offsets[s + 1]] (int64, rows of emb_NE, not checked)
    with activations acts [M] (any float dtype); offsets [S + 1] int64 ascend from 0, entries at or after offsets[S] are
    ignored. The chunk's vectors u are scale [N] (float64, 1 by default) times the rows of emb [N, E] (any float dtype):
    embeddings and 1 / their norms for cosine. Deterministic: no atomics. ValueError: shapes that do not match.
    """
    n_latents, d_emb = state.sums_SE.shape
    shapes = tuple(acts_M.shape), tuple(images_M.shape)
    fits = acts_M.ndim == 1 and shapes[0] == shapes[1]
    check(fits, f"acts_M, images_M: shapes {shapes[0]} and {shapes[1]} are not [M] and [M]")
    check(offsets_S1.shape == (n_latents + 1,), f"offsets_S1: shape {tuple(offsets_S1.shape)} is not [{n_latents + 1}]")
    fits = emb_NE.ndim == 2 and emb_NE.shape[1] == d_emb
    check(fits, f"emb_NE: shape {tuple(emb_NE.shape)} is not [N, {d_emb}]")
    fits = scale_N is None or (scale_N.shape == emb_NE.shape[:1] and scale_N.dtype == torch.float64)
    check(fits, f"scale_N: must be float64 [{len(emb_NE)}], one for each row of emb_NE")
    streamed_cosine_update_op(*state, acts_M, images_M, offsets_S1, emb_NE, scale_N, half)


# --- custom ops: CUDA ------------------------------------------------------------------------------------------------


@custom_op("streamed_cosine_update", mutates_args=("sums_SE", "num_S", "den_S", "total_S"))
def streamed_cosine_update_op(
    sums_SE: Tensor,
    num_S: Tensor,
    den_S: Tensor,
    total_S: Tensor,
    acts_M: Tensor,
    images_M: Tensor,
    offsets_S1: Tensor,
    emb_NE: Tensor,
    scale_N: Tensor | None,
    half: int,
) -> None:
    from .streamed_cosine_triton import launch_streamed_update

    if scale_N is None:
        scale_N = num_S.new_ones(len(emb_NE))
    with torch.cuda.device_of(sums_SE):  # Triton launches on the current device
        launch_streamed_update(sums_SE, num_S, den_S, total_S, acts_M, images_M, offsets_S1, emb_NE, scale_N, half)


# --- CPU -------------------------------------------------------------------------------------------------------------


@streamed_cosine_update_op.register_kernel("cpu")
def streamed_cosine_update_cpu(
    sums_SE: Tensor,
    num_S: Tensor,
    den_S: Tensor,
    total_S: Tensor,
    acts_M: Tensor,
    images_M: Tensor,
    offsets_S1: Tensor,
    emb_NE: Tensor,
    scale_N: Tensor | None,
    half: int,
) -> None:
    acts_M, unit_NE = acts_M[: offsets_S1[-1]].to(torch.float64), scaled_rows(emb_NE, scale_N)
    images_M = images_M[: offsets_S1[-1]]
    latents_M = torch.repeat_interleave(offsets_S1.diff())
    if half >= 0:
        own_M = (images_M & 1) == half
        acts_M, images_M, latents_M = acts_M[own_M], images_M[own_M], latents_M[own_M]
        counts_S = torch.bincount(latents_M, minlength=len(num_S))
        offsets_S1 = torch.nn.functional.pad(counts_S.cumsum(0), (1, 0))
    chunk = _chunk_weights(acts_M, images_M, latents_M, unit_NE, len(num_S))
    panel = max(1, _CPU_PANEL_ELEMENTS // max(unit_NE.shape[1], 1))
    for first in range(0, len(num_S), panel):
        rows = slice(first, first + panel)
        chunk_PE = _weighted_sums(acts_M, images_M, offsets_S1[first : first + panel + 1], unit_NE)
        within_P = (torch.linalg.vector_norm(chunk_PE, dim=1).square() - chunk.self_S[rows]) / 2
        num_S[rows] += torch.where(chunk.closed_S[rows], within_P, 0.0) + torch.linalg.vecdot(chunk_PE, sums_SE[rows])
        sums_SE[rows] += chunk_PE
    _add_folded(num_S, den_S, acts_M, images_M, offsets_S1, unit_NE, chunk.fold_S)
    den_S += torch.where(chunk.closed_S, chunk.den_S, 0.0) + chunk.total_S * total_S
    total_S += chunk.total_S


class _ChunkWeights(NamedTuple):
    """Sums of a chunk per latent, and how its pairs are to be evaluated: closed form, folding, or neither (no pair)."""

    total_S: Tensor
    self_S: Tensor
    den_S: Tensor
    closed_S: Tensor
    fold_S: Tensor


def _chunk_weights(
    acts_M: Tensor, images_M: Tensor, latents_M: Tensor, unit_NE: Tensor, n_latents: int
) -> _ChunkWeights:
    weights_M = acts_M * squared_norms(unit_NE)[images_M].sqrt()
    total_S, square_S, norm_S, self_S = (
        sums_at(latents_M, values_M, n_latents) for values_M in (acts_M, acts_M.square(), weights_M, weights_M.square())
    )
    den_S = (total_S.square() - square_S) / 2
    closed_S = well_conditioned(total_S, square_S) & well_conditioned(norm_S, self_S)
    several_S = torch.bincount(latents_M, minlength=n_latents) > 1
    return _ChunkWeights(total_S, self_S, den_S, closed_S & several_S, several_S & ~closed_S)


def _weighted_sums(acts_M: Tensor, images_M: Tensor, offsets_P1: Tensor, unit_NE: Tensor) -> Tensor:
    """[P, E]: sum of a * u over each of the P segments."""
    entries = slice(int(offsets_P1[0]), int(offsets_P1[-1]))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta", category=UserWarning)
        acts_PN = torch.sparse_csr_tensor(
            offsets_P1 - offsets_P1[0],
            images_M[entries],
            acts_M[entries],
            size=(len(offsets_P1) - 1, len(unit_NE)),
            check_invariants=False,
        )
    return acts_PN @ unit_NE


def _add_folded(
    num_S: Tensor, den_S: Tensor, acts_M: Tensor, images_M: Tensor, offsets_S1: Tensor, unit_NE: Tensor, fold_S: Tensor
) -> None:
    """Adds the pair sums within the chunk of the badly conditioned latents, padded to equal lengths, by folding."""
    lengths, order = torch.where(fold_S, offsets_S1.diff(), 0).sort(descending=True)
    order = order[: int(fold_S.sum())]
    first = 0
    while first < len(order):
        longest = int(lengths[first])
        size = max(1, _CPU_FOLD_ELEMENTS // (longest * max(unit_NE.shape[1], 1)))
        latents = order[first : first + size]
        positions_BL = offsets_S1[latents, None] + torch.arange(longest)
        inside_BL = positions_BL < offsets_S1[latents + 1, None]
        positions_BL.clamp_max_(len(acts_M) - 1)
        acts_BL = acts_M[positions_BL].masked_fill_(~inside_BL, 0.0)
        num_S[latents] += distinct_pair_products(acts_BL[:, :, None] * unit_NE[images_M[positions_BL]]).sum(1)
        den_S[latents] += distinct_pair_products(acts_BL)
        first += size


# --- fakes -----------------------------------------------------------------------------------------------------------


@streamed_cosine_update_op.register_fake
def streamed_cosine_update_fake(
    sums_SE: Tensor,
    num_S: Tensor,
    den_S: Tensor,
    total_S: Tensor,
    acts_M: Tensor,
    images_M: Tensor,
    offsets_S1: Tensor,
    emb_NE: Tensor,
    scale_N: Tensor | None,
    half: int,
) -> None:
    return None
