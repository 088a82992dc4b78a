"""MonoLoss: the Monosemanticity Score of a batch as a training signal, on sparse codes (arXiv 2602.12403).

Of a latent with activations a_i on the batch's rows, u_i = e_i / |e_i| (0 of a row of zeros), T = sum_i a_i u_i:

    MS = sum_i a_i c_i / den     c_i = u_i . T - a_i |u_i|^2     den = (sum a)^2 - sum a^2 = sum_i a_i (p1 - a_i)
    dMS/da_i = 2 (c_i - MS (p1 - a_i)) / den                     p1 = sum a
    loss = weight (1 - mean MS over the latents that have one)

which is recipe.md's closed form without the scaling to [0, 1]: a quotient does not see the division by the maximum, and
the minimum is 0 of every latent that is silent on one row; of one that fires on all rows nothing is subtracted. It has
a score if it fires on two rows or more, none of which outweighs all others by more than 1 / (64 eps): below that,
rounding is all there is. Others have no gradient and no part in the mean.

sum_i a_i dMS/da_i = 0: a latent's scale earns nothing, and what a decoder's gradient holds of its own rows stays as it
is. Beside T two sums over the entries are all that is needed: a segment sum and a dot product each, of rows of x
itself, with 1 / |x| in the weights.

Shape suffixes: B rows, E embedding, S d_sae, M entries.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from saevlm_fast.kernels.common import Workspace
from saevlm_fast.kernels.latent_gradient import row_blocks
from saevlm_fast.kernels.segment_sum import segment_sum_into, segment_sum_op
from saevlm_fast.kernels.sparse_decode import gather_dot_op

_sums = Workspace()


class Embeddings(NamedTuple):
    """Of the batch's rows: rows_BE as they are, and 1 / their norms [B], 0 of rows of zeros."""

    rows_BE: Tensor
    inverse_B: Tensor

    @classmethod
    def of(cls, rows_BE: Tensor) -> "Embeddings":
        norm_B = torch.linalg.vector_norm(rows_BE, dim=1)
        return cls(rows_BE, torch.where(norm_B > 0, 1 / norm_B, 0))


def _as_it_is(numbers: Tensor) -> Tensor:
    return numbers


class MonoTerm(NamedTuple):
    """What a step needs for it: the batch's embeddings, the loss's weight; and what makes of sums over latents those
    over all, where others have some of them."""

    embeddings: Embeddings
    weight: float
    of_all: Callable[[Tensor], Tensor] = _as_it_is


class Mono(NamedTuple):
    """The loss (0-d), weight included, and its gradient to every entry."""

    loss: Tensor
    of_acts_M: Tensor


class _Scores(NamedTuple):
    """What the gradient takes from every latent: -weight / n * 2 / den (0 without a score), MS, p1 [S]; the loss."""

    scale_S: Tensor
    ms_S: Tensor
    p1_S: Tensor
    loss: Tensor

    @classmethod
    def of(
        cls,
        p1_S: Tensor,
        den_S: Tensor,
        num_S: Tensor,
        n_S: Tensor,
        weight: float,
        of_all: Callable[[Tensor], Tensor] = _as_it_is,
    ) -> "_Scores":
        defined_S = (n_S >= 2) & (den_S > 64 * torch.finfo(p1_S.dtype).eps * p1_S.square())
        ms_S = torch.where(defined_S, num_S / torch.where(defined_S, den_S, 1), 0)
        n_defined, total = of_all(torch.stack([defined_S.sum().to(ms_S.dtype), ms_S.sum()]))
        some = n_defined.clamp(min=1)
        loss = torch.where(n_defined > 0, weight * (1 - total / some), 0)
        scale_S = torch.where(defined_S, -2 * weight / some / torch.where(defined_S, den_S, 1), 0)
        return cls(scale_S, ms_S, p1_S, loss.to(p1_S.dtype))

    def gradient(self, acts_M: Tensor, c_M: Tensor, latents_M: Tensor) -> Tensor:
        """Of entries."""
        rest_M = self.p1_S[latents_M] - acts_M
        gradient_M = self.scale_S[latents_M] * (c_M - self.ms_S[latents_M] * rest_M)
        return torch.where(acts_M > 0, gradient_M, 0)


def mono_of_entries(acts_M: Tensor, rows_M: Tensor, latents_M: Tensor, offsets_S1: Tensor, term: MonoTerm) -> Mono:
    """Of entries latent by latent; those behind the last offset are padding, of no gradient. A GPU is asked nothing."""
    (rows_BE, inverse_B), weight, of_all = term
    inside_M = torch.arange(len(acts_M), device=acts_M.device) < offsets_S1[-1]
    acts_M, rows_M = torch.where(inside_M, acts_M, 0), torch.where(inside_M, rows_M, 0)
    latents_M, inverse_M = torch.where(inside_M, latents_M, 0), inverse_B[rows_M]
    weights_M = acts_M * inverse_M
    dots = _dots_in_blocks if acts_M.device.type == "cpu" else _dots
    dots_M = dots(weights_M, rows_M, latents_M, offsets_S1, rows_BE)
    c_M = dots_M * inverse_M - torch.where(inverse_M > 0, acts_M, 0)
    p1_S = _totals(acts_M, offsets_S1)
    den_S = _totals(acts_M * (p1_S[latents_M] - acts_M), offsets_S1)
    fires_S = _totals((acts_M > 0).to(acts_M.dtype), offsets_S1)
    scores = _Scores.of(p1_S, den_S, _totals(acts_M * c_M, offsets_S1), fires_S, weight, of_all)
    return Mono(scores.loss, scores.gradient(acts_M, c_M, latents_M))


def _totals(values_M: Tensor, offsets_S1: Tensor) -> Tensor:
    one = values_M.new_ones(1, 1)
    return segment_sum_op(values_M, torch.zeros_like(values_M, dtype=torch.int64), offsets_S1, one).squeeze(1)


def _dots(weights_M: Tensor, rows_M: Tensor, latents_M: Tensor, offsets_S1: Tensor, rows_BE: Tensor) -> Tensor:
    """<e of the entry's row, T of its latent>."""
    sums_SE = segment_sum_op(weights_M, rows_M, offsets_S1, rows_BE)
    return gather_dot_op(sums_SE, latents_M, rows_M, rows_BE)


def _dots_in_blocks(
    weights_M: Tensor, rows_M: Tensor, latents_M: Tensor, offsets_S1: Tensor, rows_BE: Tensor
) -> Tensor:
    """The same on a CPU, of latents whose T stay in cache."""
    dots_M = torch.zeros_like(weights_M)
    blocks = row_blocks(len(offsets_S1) - 1, rows_BE)
    buffer = _sums.get(blocks[0][1] * rows_BE.shape[1], rows_BE.dtype).view(-1, rows_BE.shape[1])
    for start, stop in blocks:
        offsets = offsets_S1[start : stop + 1]
        low, high = int(offsets[0]), int(offsets[-1])
        if low == high:
            continue
        sums_SE = buffer[: stop - start]
        segment_sum_into(sums_SE, weights_M, rows_M, offsets, rows_BE)
        dots_M[low:high] = gather_dot_op(sums_SE, latents_M[low:high] - start, rows_M[low:high], rows_BE)
    return dots_M


class DenseMono:
    """The same by matrix products, chunk by chunk of rows: for codes that are hardly sparse.

    `add` is given every chunk's dense codes [R, S]; then `gradient` those of every chunk again.
    """

    def __init__(self, d_sae: int, embeddings: Embeddings, weight: float):
        self.rows_BE, self.inverse_B = embeddings
        self.weight = weight
        self.sums_SE = self.rows_BE.new_zeros(d_sae, self.rows_BE.shape[1])
        self.p1_S, self.squares_S, self.unit_squares_S, self.n_S = self.rows_BE.new_zeros(4, d_sae)

    def add(self, rows: slice, z_RS: Tensor) -> None:
        """T and the sums of a, a^2, a^2 |u|^2 and of what fires."""
        inverse_R1 = self.inverse_B[rows, None]
        self.sums_SE.addmm_((z_RS * inverse_R1).T, self.rows_BE[rows])
        squares_RS = z_RS.square()
        self.p1_S += z_RS.sum(0)
        self.squares_S += squares_RS.sum(0)
        self.unit_squares_S += torch.where(inverse_R1 > 0, squares_RS, 0).sum(0)
        self.n_S += (z_RS > 0).sum(0)

    def scores(self) -> _Scores:
        """Once all chunks were added."""
        den_S, num_S = self.p1_S.square() - self.squares_S, self.sums_SE.square().sum(1) - self.unit_squares_S
        return _Scores.of(self.p1_S, den_S, num_S, self.n_S, self.weight)

    def gradient(self, scores: _Scores, rows: slice, z_RS: Tensor) -> Tensor:
        """[R, S]."""
        inverse_R1 = self.inverse_B[rows, None]
        c_RS = (self.rows_BE[rows] @ self.sums_SE.T) * inverse_R1 - torch.where(inverse_R1 > 0, z_RS, 0)
        gradient_RS = scores.scale_S * (c_RS - scores.ms_S * (scores.p1_S - z_RS))
        return torch.where(z_RS > 0, gradient_RS, 0)
