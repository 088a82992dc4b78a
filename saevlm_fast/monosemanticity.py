"""Monosemanticity Score of every latent or neuron in one pass (arXiv 2504.02821 section 3).

    MS_k = sum_{i<j} r_ik r_jk s_ij / sum_{i<j} r_ik r_jk,    r = (a - min a) / (max a - min a) over the images

The quotient does not see the division by max - min, so the score is that of a - min a. The minimum is known only at the
end; `StreamedScore` sums a - low with the minimum *so far*, and when a chunk brings a lower one it moves the sums by
d = old low - new low > 0 first. With V = sum a u, A = sum a, Q_a = sum a ||u||^2 of the shifted activations, and
U = sum u, Q = sum ||u||^2, T = sum_{i<j} s_ij over the n images so far,

    num += d (<V, U> - Q_a) + d^2 T      den += d (n - 1) A + d^2 n (n - 1) / 2      V += d U    A += d n    Q_a += d Q

exactly. Every weight stays non-negative, so nothing cancels, whatever the offset of the activations or their order.
For sparse codes the minimum is 0 as soon as an image does not fire, so all but the latents that fire on every image are
sums of non-zeros.

Sums are float64 (streamed_cosine.py); memory does not depend on the number of images for cosine and dot. rbf is no
inner product: codes (O(nnz)), or dense activations, and embeddings are kept, and scored at the end by
pairwise_similarity.py.
"""

import json
import math
import os
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import torch
from torch import Tensor

from saevlm_fast.activation_store import ITEM_SCHEMA
from saevlm_fast.activations import Activations, StoredRows
from saevlm_fast.codes import Codes
from saevlm_fast.config import require
from saevlm_fast.files import atomic_write
from saevlm_fast.kernels.common import check_similarity
from saevlm_fast.kernels.pairwise_similarity import (
    default_gamma,
    distinct_pair_products,
    pairwise_gram_sums,
    pairwise_sums,
)
from saevlm_fast.kernels.streamed_cosine import StreamedState, streamed_cosine_state, streamed_cosine_update
from saevlm_fast.sae import SparseAutoencoder, evaluating

STATUSES = ("defined", "dead", "constant", "single")
SUFFIXES = (".parquet", ".csv", ".json")
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)

# Sparse codes are folded in when as many images have come as there are latents, or this many: the pass over the state
# (d_sae x E float64) is then small beside the sums, and the images waiting take no more memory than the state.
_SPARSE_BLOCK_ROWS = 4096
# Dense activations go in blocks that stay in cache.
_DENSE_BLOCK_ROWS = 256


@dataclass(frozen=True)
class MonosemanticityScores:
    """One row per latent: tensors [S] on the CPU.

    ms: the score, float64, NaN unless status is defined. status: index into STATUSES. Of the images' activations,
    dead: all are 0; constant: all are equal, not 0; single: exactly one is above the minimum; defined: two or more are.
    n_active: images with a > 0 (also for raw neurons, whose minimum may be negative). max_activation: float64.
    """

    ms: Tensor
    status: Tensor
    n_active: Tensor
    max_activation: Tensor
    n_images: int
    similarity: str

    def table(self) -> pa.Table:
        """Columns latent, ms, status (string), n_active, max_activation; schema metadata similarity and n_images."""
        columns = {
            "latent": pa.array(range(len(self.ms)), pa.int64()),
            "ms": pa.array(self.ms.numpy()),
            "status": pa.array([STATUSES[code] for code in self.status.tolist()], pa.string()),
            "n_active": pa.array(self.n_active.numpy()),
            "max_activation": pa.array(self.max_activation.numpy()),
        }
        metadata = {"similarity": self.similarity, "n_images": str(self.n_images)}
        return pa.table(columns).replace_schema_metadata(metadata)

    def summary(self, n_extreme: int = 10) -> "ScoreSummary":
        """What ms-score prints: statistics of the defined scores and the extreme latents (ties to the lower latent)."""
        latents = torch.nonzero(self.status == STATUSES.index("defined")).squeeze(1)
        scores, order = self.ms[latents].sort(descending=True, stable=True)
        best = [(int(latents[i]), float(self.ms[latents[i]])) for i in order[:n_extreme]]
        ascending = self.ms[latents].sort(stable=True).indices[:n_extreme]
        worst = [(int(latents[i]), float(self.ms[latents[i]])) for i in ascending]
        counts = torch.bincount(self.status.long(), minlength=len(STATUSES)).tolist()
        nan = float("nan")
        return ScoreSummary(
            n_images=self.n_images,
            similarity=self.similarity,
            counts=dict(zip(STATUSES, counts)),
            mean=float(scores.mean()) if len(scores) else nan,
            std=float(scores.std(correction=0)) if len(scores) else nan,
            best=float(scores[0]) if len(scores) else nan,
            quantiles={q: _sorted_quantile(scores.flip(0), q) for q in QUANTILES},
            best_latents=best,
            worst_latents=worst,
        )


@dataclass(frozen=True)
class ScoreSummary:
    """Statistics of the defined latents (NaN where there are none): population std, linear quantiles, (latent, ms)."""

    n_images: int
    similarity: str
    counts: dict[str, int]
    mean: float
    std: float
    best: float
    quantiles: dict[float, float]
    best_latents: list[tuple[int, float]]
    worst_latents: list[tuple[int, float]]


def _sorted_quantile(ascending: Tensor, q: float) -> float:
    """Linear quantile; torch.quantile refuses more than 16 million values."""
    if len(ascending) == 0:
        return float("nan")
    position = q * (len(ascending) - 1)
    low = math.floor(position)
    high = min(low + 1, len(ascending) - 1)
    return float(ascending[low] + (ascending[high] - ascending[low]) * (position - low))


class StreamedScore:
    """Accumulates the score over chunks of images: `update` for sparse codes or `update_dense`, then `result`.

    n_latents: latents or neurons. similarity: cosine, dot or rbf; gamma: of rbf, exp(-gamma ||e_i - e_j||^2) on the
    embeddings as they come, 1 / E unless given. device: where sums live (S x E float64 for cosine and dot); chunks are
    moved there. block_rows: how many images of sparse codes are gathered before they are folded in, by default
    max(4096, n_latents); the scores do not depend on it, nor on how images are split into chunks, beyond rounding.

    ValueError, naming the argument and the image row: embeddings or activations that are NaN or infinite, sparse
    activations below 0, zero embeddings under cosine (it is undefined there), latents outside [0, n_latents), shapes
    that do not match. A failed update leaves the sums as they were.
    """

    def __init__(
        self,
        n_latents: int,
        similarity: str = "cosine",
        gamma: float | None = None,
        device: torch.device | str = "cpu",
        block_rows: int | None = None,
    ) -> None:
        check_similarity(similarity)
        block_rows = max(_SPARSE_BLOCK_ROWS, n_latents) if block_rows is None else block_rows
        if n_latents < 0 or block_rows < 1:
            raise ValueError(f"n_latents, block_rows: {n_latents} and {block_rows} are not at least 0 and 1")
        self.n_latents, self.similarity, self.gamma = n_latents, similarity, gamma
        default_gamma(gamma, 1)
        self.device = torch.device(device)
        self.block_rows = block_rows
        self.n_images = 0
        self._d_emb: int | None = None
        self._sparse: bool | None = None
        self._range = _ActivationRange(n_latents, self.device)
        self._sums: _ShiftedSums | None = None
        self._pending: list[_Codes] = []
        self._kept: list[_Codes] = []
        self._kept_dense: list[tuple[Tensor, Tensor]] = []

    def update(self, acts: Tensor, latents: Tensor, row_offsets: Tensor | None, emb_nE: Tensor) -> None:
        """Adds n images: sparse codes (layout of kernels/reference.py, a latent at most once a row), embeddings [n, E].

        For rbf, and until block_rows images have come, the embeddings are referred to, not copied: do not change them.
        """
        self._check_kind(sparse=True)
        n_rows = len(latents) if row_offsets is None else len(row_offsets) - 1
        sqnorm_n = self._check_embeddings(emb_nE, n_rows)
        codes = self._check_codes(acts, latents, row_offsets, emb_nE, sqnorm_n)
        self._sparse, self._d_emb = True, emb_nE.shape[1]
        self.n_images += n_rows
        self._pending.append(codes)
        if sum(codes.n_rows for codes in self._pending) >= self.block_rows:
            self._flush()

    def update_dense(self, acts_nK: Tensor, emb_nE: Tensor) -> None:
        """Adds n images with an activation for every neuron, [n, K] of any sign, and embeddings [n, E]."""
        self._check_kind(sparse=False)
        if acts_nK.dim() != 2 or acts_nK.shape[1] != self.n_latents:
            raise ValueError(f"acts_nK: shape {tuple(acts_nK.shape)} is not [n, {self.n_latents}]")
        sqnorm_n = self._check_embeddings(emb_nE, len(acts_nK))
        self._check_finite("acts_nK", acts_nK)
        self._sparse, self._d_emb = False, emb_nE.shape[1]
        self.n_images += len(acts_nK)
        if len(acts_nK) == 0:
            return
        acts_nK = acts_nK.to(self.device)
        drop_K = self._range.observe_dense(acts_nK)
        if self.similarity == "rbf":
            self._kept_dense.append((acts_nK, emb_nE))
            return
        sums = self._shifted_sums()
        sums.lower(drop_K)
        for first in range(0, len(acts_nK), _DENSE_BLOCK_ROWS):
            block = slice(first, first + _DENSE_BLOCK_ROWS)
            unit_bE = _unit([(emb_nE[block], sqnorm_n[block])], self.similarity, self.device)
            sums.add_dense(acts_nK[block].to(torch.float64) - self._range.low_S, unit_bE)

    def result(self) -> MonosemanticityScores:
        """Scores of the images so far; more may follow."""
        if self._pending:
            self._flush()
        num_S, den_S = self._pair_sums()
        status_S = self._range.status(sparse=self._sparse is not False)
        undefined_S = status_S != STATUSES.index("defined")
        return MonosemanticityScores(
            ms=(num_S / den_S).masked_fill_(undefined_S, float("nan")).cpu(),
            status=status_S.cpu(),
            n_active=self._range.n_active_S.cpu().clone(),
            max_activation=torch.where(self._range.n_images > 0, self._range.high_S, 0.0).cpu(),
            n_images=self.n_images,
            similarity=self.similarity,
        )

    def mean_embedding(self) -> Tensor:
        """sum_i r_ik e_i / sum_i r_ik, [S, E] float64 on the CPU, NaN where the score is not defined.

        e_i are the embeddings as they came for dot, scaled to length 1 for cosine. ValueError: rbf keeps no such sums.
        """
        if self.similarity == "rbf":
            raise ValueError("similarity: rbf has no mean embedding, only cosine and dot")
        undefined_S = self.result().status != STATUSES.index("defined")
        sums_SE, _, _, total_S = self._shifted_sums().state
        return (sums_SE / total_S[:, None]).cpu().masked_fill_(undefined_S[:, None], float("nan"))

    def mean_of_images(self) -> Tensor:
        """The plain mean of the images' e_i, [E] float64 on the CPU; e_i and ValueError as for mean_embedding."""
        if self.similarity == "rbf":
            raise ValueError("similarity: rbf has no mean embedding, only cosine and dot")
        if self._pending:
            self._flush()
        sums = self._shifted_sums()
        return (sums.unit_sum_E / sums.n_images).cpu()

    def _pair_sums(self) -> tuple[Tensor, Tensor]:
        low_S = self._range.low_S
        if self._sums is not None:
            return self._sums.state.num_S, self._sums.state.den_S
        if self._kept:
            codes = _group(self._kept, self.n_latents)
            emb_NE = torch.cat([codes.emb_nE for codes in self._kept]).to(self.device)
            shifted_M = codes.acts_M - low_S[codes.latents_M]
            return pairwise_gram_sums(shifted_M, codes.images_M, codes.offsets_S1, emb_NE, self.similarity, self.gamma)
        if self._kept_dense:
            acts_NK = torch.cat([acts_nK.to(torch.float64) - low_S for acts_nK, _ in self._kept_dense])
            emb_NE = torch.cat([emb_nE for _, emb_nE in self._kept_dense]).to(self.device)
            return pairwise_sums(acts_NK, emb_NE, self.similarity, self.gamma)
        nothing_S = torch.zeros_like(low_S)
        return nothing_S, nothing_S

    def _flush(self) -> None:
        grouped = _group(self._pending, self.n_latents)
        drop_S = self._range.observe_sparse(grouped)
        pending, self._pending = self._pending, []
        if grouped.n_rows == 0:
            return
        if self.similarity == "rbf":
            self._kept += pending
            return
        sums = self._shifted_sums()
        sums.lower(drop_S)
        low_S = self._range.low_S
        unit_nE = _unit([(codes.emb_nE, codes.sqnorm_n) for codes in pending], self.similarity, self.device)
        sums.add_sparse(grouped, low_S, unit_nE)

    def _shifted_sums(self) -> "_ShiftedSums":
        if self._sums is None:
            assert self._d_emb is not None
            self._sums = _ShiftedSums(self.n_latents, self._d_emb, self.device)
        return self._sums

    def _check_kind(self, sparse: bool) -> None:
        if self._sparse is not None and self._sparse != sparse:
            raise ValueError(
                "update and update_dense: one StreamedScore takes sparse codes or dense activations, not both"
            )

    def _check_embeddings(self, emb_nE: Tensor, n_rows: int) -> Tensor:
        if emb_nE.dim() != 2 or len(emb_nE) != n_rows:
            raise ValueError(f"emb_nE: shape {tuple(emb_nE.shape)} is not [{n_rows}, E], one row for each image")
        if self._d_emb is not None and emb_nE.shape[1] != self._d_emb:
            raise ValueError(f"emb_nE: width {emb_nE.shape[1]} differs from the {self._d_emb} of the images before")
        sqnorm_n = _row_sums(emb_nE, squared=True)
        self._raise_at(~sqnorm_n.isfinite(), "embedding is NaN, infinite or too large to square")
        if self.similarity == "cosine":
            self._raise_at(sqnorm_n == 0, "embedding is zero, where cosine is undefined")
        return sqnorm_n

    def _check_finite(self, name: str, acts_nK: Tensor) -> None:
        # A sum is not finite when a term is not; finite float32 terms cannot overflow a float64 sum.
        self._raise_at(~_row_sums(acts_nK, squared=False).isfinite(), f"{name} holds NaN or infinity")

    def _check_codes(
        self, acts: Tensor, latents: Tensor, row_offsets: Tensor | None, emb_nE: Tensor, sqnorm_n: Tensor
    ) -> "_Codes":
        if acts.shape != latents.shape or acts.dim() != (2 if row_offsets is None else 1):
            raise ValueError(
                f"acts, latents: shapes {tuple(acts.shape)} and {tuple(latents.shape)} are not sparse codes"
            )
        acts, latents = acts.to(self.device), latents.to(self.device)
        if row_offsets is None:
            n_rows, width = latents.shape
            images_M = torch.arange(n_rows, device=self.device).repeat_interleave(width)
        else:
            counts_n = row_offsets.to(self.device).diff()
            n_rows, images_M = len(counts_n), torch.repeat_interleave(counts_n)
        acts_M, latents_M = acts.flatten()[: len(images_M)], latents.flatten()[: len(images_M)]
        bad_M = ~((acts_M >= 0) & (acts_M < float("inf")))
        self._raise_at_entry(bad_M, images_M, "sparse activation is negative, NaN or infinite")
        bad_M = (latents_M < 0) | (latents_M >= self.n_latents)
        self._raise_at_entry(bad_M, images_M, f"latent is not in [0, {self.n_latents})")
        fires_M = acts_M > 0
        if not bool(fires_M.all()):
            acts_M, latents_M, images_M = acts_M[fires_M], latents_M[fires_M], images_M[fires_M]
        return _Codes(acts_M, latents_M, images_M, n_rows, emb_nE, sqnorm_n)

    def _raise_at(self, bad_n: Tensor, message: str) -> None:
        if bool(bad_n.any()):
            raise ValueError(f"image {self.n_images + int(bad_n.nonzero()[0])}: {message}")

    def _raise_at_entry(self, bad_M: Tensor, images_M: Tensor, message: str) -> None:
        if bool(bad_M.any()):
            raise ValueError(f"image {self.n_images + int(images_M[bad_M][0])}: {message}")


class _Codes(NamedTuple):
    """Non-zeros of n_rows images in the order of rows, and the images' embeddings."""

    acts_M: Tensor
    latents_M: Tensor
    images_M: Tensor
    n_rows: int
    emb_nE: Tensor
    sqnorm_n: Tensor


class _Grouped(NamedTuple):
    """Non-zeros of n_rows images grouped by latent, rows ascending within each; activations float64."""

    acts_M: Tensor
    latents_M: Tensor
    images_M: Tensor
    offsets_S1: Tensor
    n_rows: int


def _group(chunks: list[_Codes], n_latents: int) -> _Grouped:
    starts = torch.tensor([0, *(codes.n_rows for codes in chunks)]).cumsum(0).tolist()
    images_M = _cat([codes.images_M + start if start else codes.images_M for codes, start in zip(chunks, starts)])
    # int32 keys: half the sort's memory traffic.
    latents_M, order_M = _cat([codes.latents_M for codes in chunks]).to(torch.int32).sort(stable=True)
    acts_M = _cat([codes.acts_M for codes in chunks])[order_M].to(torch.float64)
    offsets_S1 = torch.nn.functional.pad(torch.bincount(latents_M, minlength=n_latents).cumsum(0), (1, 0))
    return _Grouped(acts_M, latents_M.long(), images_M[order_M], offsets_S1, starts[-1])


def _cat(tensors: list[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


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

    def observe_sparse(self, codes: _Grouped) -> Tensor:
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

    def add_sparse(self, codes: _Grouped, low_S: Tensor, unit_nE: Tensor) -> None:
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


def score(
    activations: Activations | Codes,
    embeddings: Activations,
    sae: SparseAutoencoder | None = None,
    *,
    similarity: str = "cosine",
    gamma: float | None = None,
    batch_rows: int = 4096,
    device: torch.device | str = "cpu",
    on_rows: Callable[[int], None] = lambda done: None,
) -> MonosemanticityScores:
    """Scores of an SAE's latents, or of the activations' own neurons (the paper's baseline), in one pass over the rows.

    Args:
        activations, embeddings: row i of both belongs to image i; read chunk by chunk, never held (rbf: see above).
            Codes are what an SAE made of the activations: their latents are scored.
        sae: encodes activations at inference (threshold or row-wise top k); None scores raw neurons, or codes.
        similarity, gamma, device: as StreamedScore. batch_rows: rows read and encoded at a time.
        on_rows: called with the number of images done.

    Raises:
        ValueError: different numbers of rows, image ids (where both sides are stores) that differ, several rows of one
            image, an SAE of another width, and everything StreamedScore refuses.
    """
    return accumulate(
        activations, embeddings, sae, similarity=similarity, gamma=gamma, batch_rows=batch_rows, device=device,
        on_rows=on_rows,
    ).result()  # fmt: skip


def accumulate(
    activations: Activations | Codes,
    embeddings: Activations,
    sae: SparseAutoencoder | None = None,
    *,
    similarity: str = "cosine",
    gamma: float | None = None,
    batch_rows: int = 4096,
    device: torch.device | str = "cpu",
    on_rows: Callable[[int], None] = lambda done: None,
) -> StreamedScore:
    """The sums behind `score`, with all images in them; arguments and errors are those of `score`."""
    check_sides(activations, embeddings, sae)
    scores = StreamedScore(_n_latents(activations, sae), similarity, gamma, device)
    chunks: Generator[tuple[Any, ...], None, None] = activations.chunks(batch_rows)
    ids = checked_ids(batch_rows, activations, embeddings)
    with closing(chunks) as acts, closing(embeddings.chunks(batch_rows)) as images:
        for (start, *rows), (_, emb_nE), _ in zip(acts, images, ids):
            _update(scores, rows, emb_nE, sae)
            on_rows(start + len(emb_nE))
    return scores


def _update(scores: StreamedScore, rows: list[Tensor], emb_nE: Tensor, sae: SparseAutoencoder | None) -> None:
    """rows: [activations], or [acts, latents, row_offsets]."""
    if len(rows) == 3:
        scores.update(rows[0], rows[1], rows[2], emb_nE)
    elif sae is None:
        scores.update_dense(rows[0], emb_nE)
    else:
        with evaluating(sae):
            codes = sae.encode(rows[0].to(scores.device, sae.b_dec.dtype))
        scores.update(*codes.flat(), emb_nE)


def _n_latents(activations: Activations | Codes, sae: SparseAutoencoder | None) -> int:
    if isinstance(activations, Codes):
        return activations.d_sae
    return activations.d if sae is None else sae.config.d_sae


def check_sides(activations: Activations | Codes, embeddings: Activations, sae: SparseAutoencoder | None) -> None:
    what = "codes" if isinstance(activations, Codes) else "activations"
    if embeddings.n_rows != activations.n_rows:
        for side in (activations, embeddings):
            if side.has_items:  # the likely reason
                _check_one_row_per_image(side, side.items(range(min(side.n_rows, 4096))), 0)
        raise ValueError(
            f"embeddings: {embeddings.n_rows} rows ({embeddings.path}), but {activations.n_rows} {what} "
            f"({activations.path}); row i of both must be image i"
        )
    require(sae is None or what == "activations", "sae: codes are encoded already; give activations or no SAE")
    d_in = activations.d if isinstance(activations, Activations) else 0
    require(
        sae is None or sae.config.d_in == d_in,
        f"sae: d_in is {sae.config.d_in if sae else 0}, but the activations have width {d_in}",
    )


def checked_ids(n: int, *sides: StoredRows) -> Iterator[None]:
    """Once for each chunk of n rows: whether the sides that are stores have one row an image, and the same images."""
    start, last = 0, [ITEM_SCHEMA.empty_table()] * len(sides)
    for tables in zip(*(side.item_chunks(n) if side.has_items else repeat(None) for side in sides)):
        for i, (side, table) in enumerate(zip(sides, tables)):
            if table is not None:
                _check_one_row_per_image(side, pa.concat_tables([last[i], table]), start - len(last[i]))
                last[i] = table.slice(len(table) - 1)
        if len(sides) == 2 and None not in tables:
            _check_same_images(sides, [table["image"] for table in tables], start)
        start += n
        yield


def _check_same_images(sides: tuple[StoredRows, ...], images: list[pa.ChunkedArray], start: int) -> None:
    row = pc.index(pc.equal(*images).fill_null(False), False).as_py()
    if row >= 0:
        first, second = (column[row].as_py() for column in images)
        raise ValueError(
            f"embeddings: row {start + row} is image {second!r} ({sides[1].path}), but {first!r} in {sides[0].path}; "
            "row i of both must be the same image"
        )


def _check_one_row_per_image(side: StoredRows, items: pa.Table, start: int) -> None:
    """Neighbours of one image are different tokens of it; an image that is listed twice has the same token twice."""
    before, after = items.slice(0, max(len(items) - 1, 0)), items.slice(1)
    same_image = pc.equal(before["image"], after["image"])
    found = pc.index(pc.and_(same_image, pc.not_equal(before["token"], after["token"])).fill_null(False), True).as_py()
    if found >= 0:
        row = start + found
        images = side.items(range(row, min(row + 4096, side.n_rows)))["image"].to_pylist()
        count = next((i for i, image in enumerate(images) if image != images[0]), len(images))
        raise ValueError(
            f"{side.path}: {count} rows of image {images[0]!r} (from row {row}); the score needs one row per image: "
            "harvest with --tokens cls or mean, --point pooled, or codes with --pool mean"
        )


def check_scores_path(path: str | os.PathLike[str]) -> Path:
    """The path if write_scores can write there. ValueError: a suffix not in SUFFIXES, a directory, a missing parent."""
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise ValueError(f"output: {str(path)!r} does not end in one of {', '.join(SUFFIXES)}")
    if path.is_dir():
        raise ValueError(f"output: {str(path)!r} is a directory")
    if not path.absolute().parent.is_dir():
        raise ValueError(f"output: {str(path.absolute().parent)!r} is not a directory")
    return path


def write_scores(
    scores: MonosemanticityScores, path: str | os.PathLike[str], metadata: Mapping[str, str] | None = None
) -> None:
    """Writes the table as .parquet, .csv or .json, whole or not at all (temporary file, fsync, rename).

    metadata (the SAE and its data, say) joins similarity and n_images: in Parquet's schema metadata, in JSON under
    "metadata" ({"metadata": {...}, "latents": [{column: value}]}, ms null where undefined), nowhere in CSV (ms "nan").
    """
    table = scores.table()
    write_table(table.replace_schema_metadata({**(table.schema.metadata or {}), **(metadata or {})}), path)


def write_table(table: pa.Table, path: str | os.PathLike[str]) -> None:
    """Writes a table with schema metadata as write_scores does; a NaN of any column is null in JSON."""
    path = check_scores_path(path)
    with atomic_write(path) as temporary, open(temporary, "wb") as file:
        _write_table(table, path.suffix, file)


def _write_table(table: pa.Table, suffix: str, file: BinaryIO) -> None:
    if suffix == ".parquet":
        pq.write_table(table, file)
    elif suffix == ".csv":
        pa_csv.write_csv(table, file)
    else:
        rows = [{name: _json_value(value) for name, value in row.items()} for row in table.to_pylist()]
        metadata = {key.decode(): value.decode() for key, value in table.schema.metadata.items()}
        file.write(json.dumps({"metadata": metadata, "latents": rows}, allow_nan=False).encode())


def _json_value(value: Any) -> Any:
    return None if isinstance(value, float) and math.isnan(value) else value  # JSON has no NaN
