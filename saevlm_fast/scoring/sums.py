"""What the Monosemanticity Score is made of: the range of every latent's activations, and sums over pairs of images.

The maths is told in monosemanticity.py. Shape suffixes: n images of a chunk, N all images, S latents, K neurons, E
embedding, M entries grouped by latent, A latents that fire on every image.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from saevlm_fast.kernels.pairwise_similarity import distinct_pair_products, pairwise_gram_sums, pairwise_sums
from saevlm_fast.kernels.streamed_cosine import StreamedState, streamed_cosine_state, streamed_cosine_update
from saevlm_fast.sparse_codes import GroupedCodes, SparseCodes

STATUSES = ("defined", "dead", "constant", "single")
_BLOCK_ROWS = 256  # images whose float64 copies stay in cache


# --- embeddings ---


class Embeddings(NamedTuple):
    """Embeddings of n images [n, E] as they came, and their squared norms, float64 [n]."""

    emb_nE: Tensor
    sqnorm_n: Tensor


def row_sums(x_nK: Tensor, squared: bool) -> Tensor:
    """Float64 sum (of squares) of every row, converted a few rows at a time so that the copy stays in cache."""
    blocks = (x_bK.to(torch.float64) for x_bK in x_nK.split(_BLOCK_ROWS))
    sums = [x_bK.square().sum(1) if squared else x_bK.sum(1) for x_bK in blocks]
    return torch.cat(sums) if sums else x_nK.new_zeros(0, dtype=torch.float64)


def unit_embeddings(images: list[Embeddings], similarity: str, device: torch.device) -> Tensor:
    """Float64 vectors whose inner product is the similarity, of all these images in one tensor [N, E]."""
    n_rows, d_emb = sum(len(chunk.emb_nE) for chunk in images), images[0].emb_nE.shape[1]
    unit_NE = torch.empty(n_rows, d_emb, dtype=torch.float64, device=device)
    filled = 0
    for emb_nE, sqnorm_n in images:
        emb_nE, scale_n = emb_nE.to(device), sqnorm_n.rsqrt().to(device)
        for emb_bE, scale_b in zip(emb_nE.split(_BLOCK_ROWS), scale_n.split(_BLOCK_ROWS)):
            block_bE = unit_NE[filled : filled + len(emb_bE)]
            block_bE.copy_(emb_bE)
            if similarity == "cosine":
                block_bE *= scale_b[:, None]
            filled += len(emb_bE)
    return unit_NE


# --- range ---


class ActivationRange:
    """Minimum and maximum of every latent over the images so far; how many images lie above zero and at the minimum.

    Before any image. What comes then is for CodesRange or DenseRange.
    """

    def __init__(self, n_latents: int, device: torch.device) -> None:
        self.n_images = torch.zeros((), dtype=torch.int64, device=device)
        self.low_S = torch.zeros(n_latents, dtype=torch.float64, device=device)
        self.high_S = torch.full_like(self.low_S, -float("inf"))
        self.n_active_S = torch.zeros(n_latents, dtype=torch.int64, device=device)
        self.n_low_S = torch.zeros_like(self.n_active_S)

    def status(self) -> Tensor:
        """Index into STATUSES, int8. Counted, never judged by the sums: images above the minimum carry the weight."""
        n_above_S = self._n_above()
        status_S = torch.zeros_like(n_above_S, dtype=torch.int8)
        status_S[n_above_S == 1] = STATUSES.index("single")
        status_S[n_above_S == 0] = STATUSES.index("constant")
        none = self.n_images == 0
        status_S[none | ((self.low_S == 0) & (self.high_S == 0))] = STATUSES.index("dead")
        return status_S

    def max_activation(self) -> Tensor:
        """[S] float64; 0 without images."""
        return torch.where(self.n_images > 0, self.high_S, 0.0)

    def _n_above(self) -> Tensor:
        """Images whose activation is above the minimum."""
        return self.n_images - self.n_low_S

    def _merge(self, low_S: Tensor, high_S: Tensor, at_low_S: Tensor, n_rows: int) -> Tensor:
        """Takes in the range of n_rows images; returns by how much every minimum fell (0 for the first images)."""
        before_S = torch.where(self.n_images > 0, self.low_S, low_S)
        self.n_low_S = torch.where(before_S <= low_S, self.n_low_S, 0) + torch.where(low_S <= before_S, at_low_S, 0)
        self.low_S = torch.minimum(before_S, low_S)
        self.high_S = torch.maximum(self.high_S, high_S)
        self.n_images += n_rows
        return before_S - self.low_S


class CodesRange(ActivationRange):
    """The range of sparse codes: low_S is 0 for a latent unless it has fired on every image.

    n_low_S counts images at the minimum only where that is above 0: elsewhere every image that does not fire is at it.
    """

    def observe(self, grouped: GroupedCodes, n_rows: int) -> Tensor:
        """Takes n_rows >= 1 images in, activations float64; returns by how much every latent's minimum fell."""
        counts_S = grouped.offsets_S1.diff()
        always = torch.nonzero(counts_S == n_rows).squeeze(1)
        acts_An = grouped.acts_M[grouped.offsets_S1[always, None] + torch.arange(n_rows, device=always.device)]
        chunk_low_S = torch.zeros_like(self.low_S)
        chunk_low_S[always] = acts_An.amin(1)
        at_low_S = torch.zeros_like(self.n_low_S)
        at_low_S[always] = (acts_An == chunk_low_S[always, None]).sum(1)
        high_S = torch.zeros_like(self.high_S).scatter_reduce_(0, grouped.latents_M, grouped.acts_M, "amax")
        self.n_active_S += counts_S
        return self._merge(chunk_low_S, high_S, at_low_S, n_rows)

    def _n_above(self) -> Tensor:
        return torch.where(self.low_S > 0, self.n_images - self.n_low_S, self.n_active_S)


class DenseRange(ActivationRange):
    """The range of neurons with an activation, of any sign, on every image."""

    def observe(self, acts_nK: Tensor) -> Tensor:
        """Takes n >= 1 images in; returns by how much every neuron's minimum fell."""
        low_K, high_K = (extreme_K.to(torch.float64) for extreme_K in torch.aminmax(acts_nK, dim=0))
        self.n_active_S += (acts_nK > 0).sum(0)
        return self._merge(low_K, high_K, (acts_nK == low_K.to(acts_nK.dtype)).sum(0), len(acts_nK))


# --- sums over pairs ---


class ShiftedSums:
    """Sums of a - low for an inner-product similarity, and those of the images alone that lowering low needs.

    Memory does not depend on the number of images: n_latents x d_emb float64.
    """

    def __init__(self, n_latents: int, d_emb: int, similarity: str, device: torch.device) -> None:
        self.similarity, self.device = similarity, device
        self.state: StreamedState = streamed_cosine_state(n_latents, d_emb, device)
        self.self_S = torch.zeros_like(self.state.num_S)
        self.n_images = 0
        self.unit_sum_E = torch.zeros(d_emb, dtype=torch.float64, device=device)
        self.pair_sum = torch.zeros((), dtype=torch.float64, device=device)
        self.square_sum = torch.zeros((), dtype=torch.float64, device=device)

    def lower(self, drop_S: Tensor) -> None:
        """Lowers low by drop >= 0: every activation so far rises by as much. The formulas of the module's docstring."""
        rows = torch.nonzero(drop_S).squeeze(1)
        if len(rows) == 0:
            return
        sums_SE, num_S, den_S, total_S = self.state
        drop_R, n = drop_S[rows], self.n_images
        cross_R = sums_SE[rows] @ self.unit_sum_E - self.self_S[rows]
        num_S[rows] += drop_R * cross_R + drop_R.square() * self.pair_sum
        den_S[rows] += drop_R * (n - 1) * total_S[rows] + drop_R.square() * (n * (n - 1) / 2)
        sums_SE[rows] += drop_R[:, None] * self.unit_sum_E
        total_S[rows] += drop_R * n
        self.self_S[rows] += drop_R * self.square_sum

    def add_codes(self, codes: SparseCodes, grouped: GroupedCodes, low_S: Tensor, images: list[Embeddings]) -> None:
        """Adds a chunk of codes, also grouped with float64 activations.

        low_S is above 0 only for latents that fire on every image so far, this chunk's too.
        """
        unit_nE = unit_embeddings(images, self.similarity, self.device)
        acts_M, sqnorm_n = grouped.acts_M, row_sums(unit_nE, squared=True)
        images_M = codes.entry_rows()[grouped.order_M]
        always = torch.nonzero(low_S > 0).squeeze(1)
        if len(always) > 0:
            acts_M = acts_M - low_S[grouped.latents_M]
            positions_An = grouped.offsets_S1[always, None] + torch.arange(codes.n_rows, device=always.device)
            sqnorm_An = sqnorm_n[images_M[positions_An]]
            # Q_a is needed only where low may still fall, and there only.
            self.self_S[always] += (acts_M[positions_An] * sqnorm_An).sum(1)
        streamed_cosine_update(self.state, acts_M, images_M, grouped.offsets_S1, unit_nE)
        self._add_images(unit_nE, sqnorm_n)

    def add_dense(self, acts_nK: Tensor, low_K: Tensor, images: Embeddings) -> None:
        """Adds a chunk of activations, a few images at a time."""
        for first in range(0, len(acts_nK), _BLOCK_ROWS):
            block = slice(first, first + _BLOCK_ROWS)
            of_block = Embeddings(images.emb_nE[block], images.sqnorm_n[block])
            unit_bE = unit_embeddings([of_block], self.similarity, self.device)
            self._add_block(acts_nK[block].to(torch.float64) - low_K, unit_bE)

    def _add_block(self, acts_nK: Tensor, unit_nE: Tensor) -> None:
        """Adds a block of shifted activations >= 0: pairs within it through their similarity matrix, and the merge."""
        sums_SE, num_S, den_S, total_S = self.state
        block_KE, block_total_K = acts_nK.T @ unit_nE, acts_nK.sum(0)
        within_nK = (unit_nE @ unit_nE.T).triu_(1) @ acts_nK
        num_S += (acts_nK * within_nK).sum(0) + (block_KE * sums_SE).sum(1)
        den_S += distinct_pair_products(acts_nK[None])[0] + block_total_K * total_S
        sums_SE += block_KE
        total_S += block_total_K
        sqnorm_n = unit_nE.square().sum(1)
        self.self_S += sqnorm_n @ acts_nK
        self._add_images(unit_nE, sqnorm_n)

    def _add_images(self, unit_nE: Tensor, sqnorm_n: Tensor) -> None:
        """Sums of a neuron that is 1 on every image. Weights are equal, so the closed form is safe within the chunk."""
        chunk_E, squares = unit_nE.sum(0), sqnorm_n.sum()
        within = (chunk_E @ chunk_E - squares) / 2 if len(unit_nE) > 1 else torch.zeros_like(squares)
        self.pair_sum += within + chunk_E @ self.unit_sum_E
        self.unit_sum_E += chunk_E
        self.square_sum += squares
        self.n_images += len(unit_nE)

    def pair_sums(self, low_S: Tensor) -> tuple[Tensor, Tensor]:
        """num and den [S] of the score, whose low_S these sums have already."""
        return self.state.num_S, self.state.den_S

    def mean_embedding(self) -> Tensor:
        """sum_i r_ik u_i / sum_i r_ik, [S, E]."""
        return self.state.sums_SE / self.state.total_S[:, None]

    def mean_of_images(self) -> Tensor:
        """[E]."""
        return self.unit_sum_E / self.n_images


class KeptPairs:
    """For a similarity that is no inner product: activations and embeddings kept, all pairs evaluated at the end."""

    def __init__(self, n_latents: int, similarity: str, gamma: float | None, device: torch.device) -> None:
        self.n_latents, self.similarity, self.gamma, self.device = n_latents, similarity, gamma, device
        self._codes: list[SparseCodes] = []
        self._dense: list[Tensor] = []
        self._images: list[Embeddings] = []

    def lower(self, drop_S: Tensor) -> None:
        """Nothing is shifted before the end."""

    def add_codes(self, codes: SparseCodes, grouped: GroupedCodes, low_S: Tensor, images: list[Embeddings]) -> None:
        self._codes.append(codes)
        self._images += images

    def add_dense(self, acts_nK: Tensor, low_K: Tensor, images: Embeddings) -> None:
        self._dense.append(acts_nK)
        self._images.append(images)

    def pair_sums(self, low_S: Tensor) -> tuple[Tensor, Tensor]:
        """num and den [S] of the score over all images."""
        if not self._images:
            return torch.zeros_like(low_S), torch.zeros_like(low_S)
        emb_NE = torch.cat([images.emb_nE for images in self._images]).to(self.device)
        if self._dense:
            acts_NK = torch.cat([acts_nK.to(torch.float64) - low_S for acts_nK in self._dense])
            return pairwise_sums(acts_NK, emb_NE, self.similarity, self.gamma)
        codes = SparseCodes.join(self._codes, self.n_latents)
        grouped, rows_M = codes.by_latent(), codes.entry_rows()
        shifted_M = grouped.acts_M.to(torch.float64) - low_S[grouped.latents_M]
        images_M = rows_M[grouped.order_M]
        return pairwise_gram_sums(shifted_M, images_M, grouped.offsets_S1, emb_NE, self.similarity, self.gamma)
