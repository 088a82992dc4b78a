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

import math
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass
from typing import Any, NamedTuple

import pyarrow as pa
import torch
from torch import Tensor

from saevlm_fast.data.codes import Codes
from saevlm_fast.data.pairing import check_sides, checked_ids
from saevlm_fast.data.rows import Activations
from saevlm_fast.kernels.common import check_similarity
from saevlm_fast.kernels.pairwise_similarity import (
    default_gamma,
    pairwise_gram_sums,
    pairwise_sums,
)
from saevlm_fast.sae import SparseAutoencoder, evaluating
from saevlm_fast.scoring.sums import _DENSE_BLOCK_ROWS, STATUSES, _ActivationRange, _row_sums, _ShiftedSums, _unit

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)

# Sparse codes are folded in when as many images have come as there are latents, or this many: the pass over the state
# (d_sae x E float64) is then small beside the sums, and the images waiting take no more memory than the state.
_SPARSE_BLOCK_ROWS = 4096


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
