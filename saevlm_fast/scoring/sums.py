"""What the Monosemanticity Score sums up, and the range of the activations that shifts it."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from saevlm_fast.kernels.pairwise_similarity import distinct_pair_products
from saevlm_fast.kernels.streamed_cosine import StreamedState, streamed_cosine_state, streamed_cosine_update

if TYPE_CHECKING:
    from saevlm_fast.scoring.monosemanticity import _Grouped

STATUSES = ("defined", "dead", "constant", "single")
_DENSE_BLOCK_ROWS = 256  # dense activations go in blocks that stay in cache


class _ActivationRange:
    """Minimum and maximum of every latent over the images so far; how many images lie above zero and at the minimum.

    low_S is 0 for a latent of sparse codes unless it has fired on every image. n_low_S counts images at the minimum:
    for sparse codes only where the minimum is above 0 (elsewhere every image that does not fire is at it).
    """

    def __init__(self, n_latents: int, device: torch.device) -> None:
        self.n_images = torch.zeros((), dtype=torch.int64, device=device)
        self.low_S = torch.zeros(n_latents, dtype=torch.float64, device=device)
        self.high_S = torch.full_like(self.low_S, -float("inf"))
        self.n_active_S = torch.zeros(n_latents, dtype=torch.int64, device=device)
        self.n_low_S = torch.zeros_like(self.n_active_S)

    def observe_sparse(self, codes: "_Grouped") -> Tensor:
        """Takes one chunk in; returns by how much every latent's minimum fell (0 for the first chunk)."""
        if codes.n_rows == 0:
            return torch.zeros_like(self.low_S)
        counts_S = codes.offsets_S1.diff()
        always = torch.nonzero(counts_S == codes.n_rows).squeeze(1)
        rows = torch.arange(codes.n_rows, device=always.device)
        acts_An = codes.acts_M[codes.offsets_S1[always, None] + rows]
        chunk_low_S = torch.zeros_like(self.low_S)
        chunk_low_S[always] = acts_An.amin(1)
        at_low_S = torch.zeros_like(self.n_low_S)
        at_low_S[always] = (acts_An == chunk_low_S[always, None]).sum(1)
        high_S = torch.zeros_like(self.high_S).scatter_reduce_(0, codes.latents_M, codes.acts_M, "amax")
        self.n_active_S += counts_S
        return self._merge(chunk_low_S, high_S, at_low_S, codes.n_rows)

    def observe_dense(self, acts_nK: Tensor) -> Tensor:
        """The same for n images with an activation for every neuron; n is at least 1."""
        low_K, high_K = (extreme_K.to(torch.float64) for extreme_K in torch.aminmax(acts_nK, dim=0))
        self.n_active_S += (acts_nK > 0).sum(0)
        return self._merge(low_K, high_K, (acts_nK == low_K.to(acts_nK.dtype)).sum(0), len(acts_nK))

    def _merge(self, low_S: Tensor, high_S: Tensor, at_low_S: Tensor, n_rows: int) -> Tensor:
        before_S = torch.where(self.n_images > 0, self.low_S, low_S)
        self.n_low_S = torch.where(before_S <= low_S, self.n_low_S, 0) + torch.where(low_S <= before_S, at_low_S, 0)
        self.low_S = torch.minimum(before_S, low_S)
        self.high_S = torch.maximum(self.high_S, high_S)
        self.n_images += n_rows
        return before_S - self.low_S

    def status(self, sparse: bool) -> Tensor:
        """Index into STATUSES, int8. Counted, never judged by the sums: images above the minimum carry the weight."""
        n_above_S = self.n_images - self.n_low_S
        if sparse:
            n_above_S = torch.where(self.low_S > 0, n_above_S, self.n_active_S)
        status_S = torch.zeros_like(n_above_S, dtype=torch.int8)
        status_S[n_above_S == 1] = STATUSES.index("single")
        status_S[n_above_S == 0] = STATUSES.index("constant")
        none = self.n_images == 0
        status_S[none | ((self.low_S == 0) & (self.high_S == 0))] = STATUSES.index("dead")
        return status_S


class _ShiftedSums:
    """Sums of a - low for an inner-product similarity, and those of the images alone that lowering low needs."""

    def __init__(self, n_latents: int, d_emb: int, device: torch.device) -> None:
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

    def add_sparse(self, codes: "_Grouped", low_S: Tensor, unit_nE: Tensor) -> None:
        """Adds a chunk of codes; low_S is above 0 only for latents that fire on every image so far, this one's too."""
        acts_M, sqnorm_n = codes.acts_M, _row_sums(unit_nE, squared=True)
        always = torch.nonzero(low_S > 0).squeeze(1)
        if len(always) > 0:
            acts_M = acts_M - low_S[codes.latents_M]
            positions_An = codes.offsets_S1[always, None] + torch.arange(codes.n_rows, device=always.device)
            sqnorm_An = sqnorm_n[codes.images_M[positions_An]]
            # Q_a is needed only where low may still fall, and there only.
            self.self_S[always] += (acts_M[positions_An] * sqnorm_An).sum(1)
        streamed_cosine_update(self.state, acts_M, codes.images_M, codes.offsets_S1, unit_nE)
        self._add_images(unit_nE, sqnorm_n)

    def add_dense(self, acts_nK: Tensor, unit_nE: Tensor) -> None:
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


def _row_sums(x_nK: Tensor, squared: bool) -> Tensor:
    """Float64 sum (of squares) of every row, converted a few rows at a time so that the copy stays in cache."""
    blocks = (x_bK.to(torch.float64) for x_bK in x_nK.split(_DENSE_BLOCK_ROWS))
    sums = [x_bK.square().sum(1) if squared else x_bK.sum(1) for x_bK in blocks]
    return torch.cat(sums) if sums else x_nK.new_zeros(0, dtype=torch.float64)


def _unit(chunks: list[tuple[Tensor, Tensor]], similarity: str, device: torch.device) -> Tensor:
    """Float64 vectors whose inner product is the similarity, of chunks (embeddings, squared norms), in one tensor."""
    n_rows, d_emb = sum(len(emb_nE) for emb_nE, _ in chunks), chunks[0][0].shape[1]
    unit_NE = torch.empty(n_rows, d_emb, dtype=torch.float64, device=device)
    filled = 0
    for emb_nE, sqnorm_n in chunks:
        emb_nE, scale_n = emb_nE.to(device), sqnorm_n.rsqrt().to(device)
        for emb_bE, scale_b in zip(emb_nE.split(_DENSE_BLOCK_ROWS), scale_n.split(_DENSE_BLOCK_ROWS)):
            block_bE = unit_NE[filled : filled + len(emb_bE)]
            block_bE.copy_(emb_bE)
            if similarity == "cosine":
                block_bE *= scale_b[:, None]
            filled += len(emb_bE)
    return unit_NE
