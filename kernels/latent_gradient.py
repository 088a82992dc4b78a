"""Gradient rows of a weight matrix by latent: segment sums of sparse codes' entries, projection, the global norm.

For a weight matrix W [S, D] whose row s belongs to latent s, with w_hat = W (decoder rows are unit),

    g = segment sums of the sparse codes' gradient                                   # segment_sum.py
    g -= (g * w_hat).sum(1, keepdim=True) * w_hat                                    # decoder only
    clip = min(1, clip_norm / (global_norm + 1e-6))                                  # over all parameters

g is never held: an `EntryGradient` makes a block of rows when it is needed, a sparse product that is cheaper than
writing it to memory and reading it again, and makes none for the norm where a bound shows that nothing is clipped.
latent_update.py walks W with them. This is the CPU's path; a GPU's is in step_entries_triton.py and
gradient_norm_triton.py. docs/kernels.md section 4, docs/recipe.md section 2
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .common import Workspace
from .segment_sum import segment_sum_cpu, segment_sum_into

_BLOCK_BYTES = 4 << 20  # of one block of rows on the CPU
_BOUND_SLACK = 1 + 1e-4  # more than the rounding of a norm, which taking off a long parallel part would blow up
block_rows = Workspace()  # fresh memory for every block would be 12,000 page faults a step (d_in 1024, d_sae 6144)

# --- public functions ------------------------------------------------------------------------------------------------


class RowGradient(NamedTuple):
    """Compact gradient of a [S, D] matrix: rows_AD belong to the ascending, distinct latents_A.

    On a GPU, latents_A may end in padding: latents of S, with zero rows.
    """

    latents_A: Tensor
    rows_AD: Tensor
    squared_norm: Tensor


class EntryGradient(NamedTuple):
    """The same as the entries whose segment sums are its rows: segment s belongs to latent s.

    From row s the parallel_S[s]-fold of W's own row is still to be taken off (None: nothing), which the norms take into
    account. norm_R: of source's rows, if they are known.
    """

    weights_M: Tensor
    ids_M: Tensor
    offsets_S1: Tensor
    source_RD: Tensor
    parallel_S: Tensor | None
    norm_R: Tensor | None = None

    @property
    def squared_norm(self) -> Tensor:
        """Of the whole gradient (0-d). Makes the rows of all latents of several entries, block by block."""
        norms_S, counts_S = self._norm_bounds(), self.offsets_S1.diff()
        (several_S,) = (counts_S > 1).nonzero(as_tuple=True)
        norms_S[several_S] = _norms(*_some_segments(several_S, self.weights_M, self.ids_M, counts_S), self.source_RD)
        return self._squared(norms_S)

    def squared_norm_bound(self) -> Tensor:
        """At least the squared norm, by the triangle inequality (unit rows given); no row is made for it."""
        return self._squared(self._norm_bounds() * _BOUND_SLACK)

    def _norm_bounds(self) -> Tensor:
        """Of every segment sum; exact where it has one entry."""
        norm_R = torch.linalg.vector_norm(self.source_RD, dim=1) if self.norm_R is None else self.norm_R
        norms_M = norm_R[self.ids_M] * self.weights_M.abs()
        return segment_totals(norms_M, self.offsets_S1)

    def _squared(self, norms_S: Tensor) -> Tensor:
        if self.parallel_S is None:
            return norms_S.square().sum()
        return (norms_S.square() - self.parallel_S.square()).clamp_(min=0).sum()  # Pythagoras: rows are unit


def entry_gradient(
    weights_M: Tensor,
    ids_M: Tensor,
    offsets_S1: Tensor,
    source_RD: Tensor,
    dots_M: Tensor | None = None,
    norm_R: Tensor | None = None,
) -> EntryGradient:
    """The gradient of every latent, on a CPU: segment sums of entries, projected if dots are given.

    Args:
        weights_M: of entries, as segment_sum takes them; so are the next three.
        ids_M: rows of source_RD.
        offsets_S1: segment s belongs to latent s.
        source_RD: the rows that are summed.
        dots_M: <source[ids], W_dec[latent]> of every entry, rows of W_dec being unit: remove the component of every
            gradient row along its own row. The rows are renormalised after every step, so that component could only be
            undone (docs/recipe.md section 2). It is the weighted sum of the dots: W_dec is not read.
        norm_R: of source's rows, if they are known.

    Nothing is checked.
    """
    end = int(offsets_S1[-1])  # padding lies behind
    weights_M, ids_M = weights_M[:end], ids_M[:end]
    parallel_S = None if dots_M is None else segment_totals(weights_M * dots_M[:end], offsets_S1)
    return EntryGradient(weights_M, ids_M, offsets_S1, source_RD, parallel_S, norm_R)


def dense_gradient_rows(latents_A: Tensor, rows_AD: Tensor, unit_rows_SD: Tensor | None = None) -> RowGradient:
    """The same for rows_AD of latents_A (int64) that are already there (the auxiliary loss); projected in place.

    On a GPU, latents_A may end in padding: latents of S with zero rows.
    """
    if unit_rows_SD is not None:
        _remove_parallel_(rows_AD, unit_rows_SD[latents_A.clamp(max=len(unit_rows_SD) - 1)])
    return RowGradient(latents_A, rows_AD, torch.linalg.vector_norm(rows_AD).square())


def clip_coefficient(
    gradients: Sequence[RowGradient | EntryGradient], vectors: Sequence[Tensor], clip_norm: float
) -> Tensor:
    """min(1, clip_norm / (global norm + 1e-6)) of all of them, 0-d.

    The norm is taken only where a bound of it does not show that the factor is 1 (docs/decisions.md).
    """
    squares = [vector.square().sum() for vector in vectors]
    bounds = [g.squared_norm_bound() if isinstance(g, EntryGradient) else g.squared_norm for g in gradients]
    if torch.stack(bounds + squares).sum().sqrt() < 0.999 * clip_norm - 1e-6:
        return torch.ones_like(bounds[0])
    squares += [gradient.squared_norm for gradient in gradients]
    return (clip_norm / (torch.stack(squares).sum().sqrt() + 1e-6)).clamp(max=1.0)


def latent_slots(latents_A: Tensor, n_latents: int) -> Tensor:
    """int32 [n_latents]: the position of every latent in latents_A, -1 if it is not there."""
    positions_A = torch.arange(len(latents_A), dtype=torch.int32, device=latents_A.device)
    slots_S1 = torch.full((n_latents + 1,), -1, dtype=torch.int32, device=latents_A.device)  # the last is for padding
    return slots_S1.scatter_(0, latents_A, positions_A)[:n_latents]


# --- CPU -------------------------------------------------------------------------------------------------------------


def row_blocks(n_rows: int, like_RD: Tensor) -> list[tuple[int, int]]:
    """Ranges of rows like these that stay in cache."""
    size = max(1, _BLOCK_BYTES // max(1, like_RD.shape[1] * like_RD.element_size()))
    return [(start, min(start + size, n_rows)) for start in range(0, max(n_rows, 1), size)]


def _remove_parallel_(g_AD: Tensor, w_AD: Tensor) -> None:
    g_AD.addcmul_(w_AD, torch.linalg.vecdot(g_AD, w_AD)[:, None], value=-1)


def segment_totals(values_M: Tensor, offsets_S1: Tensor) -> Tensor:
    """The sum of every segment's values [S], on a CPU."""
    ids_M, one = torch.zeros(len(values_M), dtype=torch.int64), values_M.new_ones(1, 1)
    return segment_sum_cpu(values_M, ids_M, offsets_S1, one).squeeze(1)


def _some_segments(
    segments_A: Tensor, weights_M: Tensor, ids_M: Tensor, counts_S: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Weights, ids and offsets of these segments alone."""
    counts_A = counts_S[segments_A]
    taken_S = torch.zeros_like(counts_S, dtype=torch.bool).index_fill_(0, segments_A, True)
    taken_M = taken_S.repeat_interleave(counts_S)
    return weights_M[taken_M], ids_M[taken_M], torch.nn.functional.pad(counts_A.cumsum(0), (1, 0))


def _norms(weights_M: Tensor, ids_M: Tensor, offsets_A1: Tensor, source_RD: Tensor) -> Tensor:
    norms_A = source_RD.new_empty(len(offsets_A1) - 1)
    blocks = row_blocks(len(norms_A), source_RD)
    buffer = block_rows.get(blocks[0][1] * source_RD.shape[1], source_RD.dtype).view(-1, source_RD.shape[1])
    for start, stop in blocks:
        rows_AD = buffer[: stop - start]
        segment_sum_into(rows_AD, weights_M, ids_M, offsets_A1[start : stop + 1], source_RD)
        torch.linalg.vector_norm(rows_AD, dim=1, out=norms_A[start:stop])
    return norms_A
