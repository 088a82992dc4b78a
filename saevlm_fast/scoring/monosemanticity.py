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
pairwise_similarity.py. The sums are in sums.py, their checks in intake.py.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import pyarrow as pa
import torch
from torch import Tensor

from saevlm_fast.data.codes import Rows
from saevlm_fast.data.rows import Matrix
from saevlm_fast.errors import real_number, require
from saevlm_fast.kernels.common import check_similarity, on_gpu
from saevlm_fast.kernels.pairwise_similarity import default_gamma
from saevlm_fast.peers import Peers
from saevlm_fast.runtime import exact_defaults
from saevlm_fast.sae import SparseAutoencoder
from saevlm_fast.scoring.intake import CodesIntake, DenseIntake, Scores, embeddings_on
from saevlm_fast.scoring.merging import merge_ranks
from saevlm_fast.scoring.source import Pool, ScoredImages
from saevlm_fast.scoring.sums import (
    STATUSES,
    ActivationRange,
    CodesRange,
    HalvedSums,
    KeptPairs,
    Pairs,
    ShiftedSums,
    status_of,
)
from saevlm_fast.sparse_codes import SparseCodes

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)

# Sparse codes are folded in when as many images have come as there are latents, or this many: the pass over the state
# (d_sae x E float64) is then small beside the sums, and the images waiting take no more memory than the state. On a GPU
# some forty launches and waits a time come to more than that pass: 65,536 images wait, 0.3 GB of 1024 floats and k 20.
_SPARSE_BLOCK_ROWS = {"cpu": 4096, "cuda": 65536}


@dataclass(frozen=True)
class MonosemanticityScores:
    """Scores of S latents or neurons, one row each: tensors [S] on the CPU.

    Attributes:
        ms: the score, float64 in [-1, 1] for cosine, NaN unless status is defined.
        status: int8 index into STATUSES. Of the images' activations, dead: all are 0; constant: all are equal, not 0;
            single: exactly one is above the minimum; defined: two or more are.
        n_active: int64, images with a > 0 (also for raw neurons, whose minimum may be negative).
        max_activation: float64, in the units of the activations.
        n_images: N. similarity: of embeddings. variant: paper, or one of variants.py.
    """

    ms: Tensor
    status: Tensor
    n_active: Tensor
    max_activation: Tensor
    n_images: int
    similarity: str
    variant: str = field(default="paper", kw_only=True)

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
        metadata |= {} if self.variant == "paper" else {"variant": self.variant}
        return pa.table(columns).replace_schema_metadata(metadata)

    def summary(self, n_extreme: int = 10, fewest_images: int = 0) -> "ScoreSummary":
        """Statistics of the defined scores and the n_extreme best and worst latents (ties to the lower latent).

        fewest_images: on which a latent fires that may be one of these.
        """
        defined_S = self.status == STATUSES.index("defined")
        scores = self.ms[defined_S].sort(descending=True).values
        latents = torch.nonzero(defined_S & (self.n_active >= fewest_images)).squeeze(1)
        ranked = self.ms[latents]
        orders = (ranked.sort(descending=down, stable=True).indices[:n_extreme] for down in (True, False))
        best, worst = ([(int(latents[i]), float(ranked[i])) for i in order] for order in orders)
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


def _of_sums(seen: ActivationRange, num_S: Tensor, den_S: Tensor) -> Scores:
    """Score, maximum, images that fire and status of every latent."""
    status_S = status_of(seen.low_S, seen.high_S, seen.n_above())
    ms_S = (num_S / den_S).masked_fill_(status_S != STATUSES.index("defined"), float("nan"))
    return ms_S, seen.high_S.clone(), seen.n_active_S.clone(), status_S


class StreamedScore:
    """Accumulates the score over chunks of images: `update`, then `result` (arXiv 2504.02821 section 3).

    Args:
        n_latents: S latents or neurons.
        similarity: cosine, dot or rbf.
        gamma: of rbf, exp(-gamma ||e_i - e_j||^2) on the embeddings as they come; 1 / E unless given.
        device: where sums live (S x E float64 for cosine and dot); chunks are moved there.
        block_rows: how many images of sparse codes are gathered before they are folded in, by default
            max(4096, n_latents), on a GPU max(65,536, n_latents). Scores do not depend on it, nor on the split into
            chunks, beyond rounding.
        halves: keep the images of even and of odd number apart too, at twice the memory: what SecondPass takes over.
        first_image: number of the first image; of several ranks each begins with its own.

    Raises:
        ValueError: another similarity, gamma not above 0, sizes below 0 and 1, halves of rbf.
    """

    def __init__(
        self,
        n_latents: int,
        similarity: str = "cosine",
        gamma: float | None = None,
        device: torch.device | str = "cpu",
        block_rows: int | None = None,
        halves: bool = False,
        first_image: int = 0,
    ) -> None:
        check_similarity(similarity)
        require(not (halves and similarity == "rbf"), "similarity: rbf keeps no sums that could be halved")
        self.device = torch.device(device)
        least = _SPARSE_BLOCK_ROWS["cuda" if self.device.type == "cuda" else "cpu"]
        block_rows = max(least, n_latents) if block_rows is None else block_rows
        require(
            n_latents >= 0 and block_rows >= 1,
            f"n_latents, block_rows: {n_latents} and {block_rows} are not at least 0 and 1",
        )
        default_gamma(gamma, 1)
        self.n_latents, self.similarity, self.gamma = n_latents, similarity, gamma
        self.block_rows, self.halves = block_rows, halves
        self.n_images, self.first_image = 0, first_image
        self._d_emb: int | None = None
        self._intake: CodesIntake | DenseIntake | None = None  # of the kind of the first chunk
        self._pairs: ShiftedSums | HalvedSums | KeptPairs | None = None
        self._sqnorms: list[Tensor] = []

    def update(self, activations: SparseCodes | Tensor, emb_nE: Tensor) -> None:
        """Adds n images; no gradient goes through the sums.

        For rbf, and until block_rows images of codes have come, the embeddings are referred to, not copied: do not
        change them.

        Args:
            activations: codes of n rows, a latent at most once a row (not checked); or an activation of every neuron,
                [n, S] of any sign. Always of one kind.
            emb_nE: embeddings [n, E], floating.

        Raises:
            ValueError: naming the argument and the image's row: embeddings or activations that are NaN or infinite,
                codes below 0, zero embeddings under cosine (it is undefined there), latents that are not there, shapes
                that do not match, both kinds of activations. The sums stay as they were.
        """
        n_rows = activations.n_rows if isinstance(activations, SparseCodes) else len(activations)
        first = self.first_image + self.n_images
        images_nE = embeddings_on(emb_nE, n_rows, self._d_emb, self.device)
        pairs = self._pairs or self._new_pairs(emb_nE.shape[1])
        intake = self._intake or self._new_intake(isinstance(activations, SparseCodes), pairs)
        sqnorm_n = intake.add(activations, images_nE, first)
        self._intake, self._pairs, self._d_emb = intake, pairs, emb_nE.shape[1]
        if self.halves:
            self._sqnorms.append(sqnorm_n)
        self.n_images += n_rows

    def merge_ranks(self, peers: Peers, sparse: bool, d_emb: int) -> None:
        """Takes in what the other ranks have, which call this too; no images may follow.

        sparse: whether activations are codes. d_emb: E. A rank without images has been told neither.
        """
        pairs = self._pairs or self._new_pairs(d_emb)
        intake = self._intake or self._new_intake(sparse, pairs)
        intake.flush()
        self.n_images = merge_ranks(intake.range, pairs, sparse, peers)
        self._intake, self._pairs, self._d_emb = intake, pairs, d_emb

    def result(self) -> MonosemanticityScores:
        """Scores of the images so far; more may follow."""
        scores = self._intake.scores() if isinstance(self._intake, DenseIntake) else None
        if scores is None:
            sums = self._of_every_latent()
            scores = self._on_host(*sums) if on_gpu(sums[0].low_S) else _of_sums(*sums)
        ms_S, high_S, n_active_S, status_S = scores
        return MonosemanticityScores(
            ms=ms_S,
            status=status_S,
            n_active=n_active_S,
            max_activation=high_S,
            n_images=self.n_images,
            similarity=self.similarity,
        )

    def _of_every_latent(self) -> tuple[ActivationRange, Tensor, Tensor]:
        """The range; num and den [S]."""
        if self._intake is None:
            seen = ActivationRange.of_none(self.n_latents, self.device)
            return seen, seen.low_S, seen.low_S
        self._intake.flush()
        assert self._pairs is not None
        return self._intake.range, *self._pairs.pair_sums(self._intake.range.low_S)

    def _on_host(self, seen: ActivationRange, num_S: Tensor, den_S: Tensor) -> Scores:
        """_of_sums by a GPU."""
        from saevlm_fast.kernels.score_result_triton import score_result

        with torch.cuda.device_of(num_S):  # Triton launches on the current device
            return score_result(num_S, den_S, *seen.parts, seen.n_images, isinstance(seen, CodesRange), STATUSES)

    def mean_embedding(self) -> Tensor:
        """sum_i r_ik e_i / sum_i r_ik, [S, E] float64 on the CPU, NaN where the score is not defined.

        e_i are the embeddings as they came for dot, scaled to length 1 for cosine.

        Raises:
            ValueError: rbf, which keeps no such sums; no images.
        """
        undefined_S = self.result().status != STATUSES.index("defined")
        return self._sums().mean_embedding().cpu().masked_fill_(undefined_S[:, None], float("nan"))

    def mean_of_images(self) -> Tensor:
        """The plain mean of the images' e_i, [E] float64 on the CPU; e_i and errors as for mean_embedding."""
        return self._sums().mean_of_images().cpu()

    def halved(self) -> tuple[ActivationRange, HalvedSums, Tensor]:
        """The range of all activations and the sums, with all images in them; squared norms [N] of the rank's images.

        Raises:
            ValueError: no halves were kept, or no images have come.
        """
        if self._intake is None or not isinstance(self._pairs, HalvedSums):
            raise ValueError("first: a StreamedScore with halves=True and images is needed")
        self._intake.flush()
        none = self._intake.range.low_S.new_zeros(0)  # of a rank without images
        return self._intake.range, self._pairs, torch.cat([none, *self._sqnorms])

    def _sums(self) -> ShiftedSums:
        """With all images in them."""
        require(self.similarity != "rbf", "similarity: rbf has no mean embedding, only cosine and dot")
        require(not self.halves, "halves: their sums are for SecondPass")
        if self._intake is None or not isinstance(self._pairs, ShiftedSums):
            raise ValueError("mean embedding: no images have come")
        self._intake.flush()
        return self._pairs

    def _new_pairs(self, d_emb: int) -> ShiftedSums | HalvedSums | KeptPairs:
        if self.similarity == "rbf":
            return KeptPairs(self.n_latents, self.similarity, self.gamma, self.device)
        if self.halves:
            return HalvedSums(self.n_latents, d_emb, self.similarity, self.device, self.first_image)
        return ShiftedSums(self.n_latents, d_emb, self.similarity, self.device)

    def _new_intake(self, sparse: bool, pairs: Pairs) -> CodesIntake | DenseIntake:
        if sparse:
            return CodesIntake(self.n_latents, self.block_rows, pairs, self.similarity)
        return DenseIntake(self.n_latents, pairs, self.similarity)


Similarity = Literal["cosine", "dot", "rbf"]


@exact_defaults()
def score(
    activations: Rows,
    embeddings: Matrix,
    sae: SparseAutoencoder | None = None,
    *,
    similarity: Similarity = "cosine",
    gamma: float | None = None,
    pool: Pool | None = None,
    batch_rows: int = 4096,
    device: torch.device | str = "cpu",
    on_rows: Callable[[int], None] = lambda done: None,
) -> MonosemanticityScores:
    """Monosemanticity Score of an SAE's latents, or of raw neurons, in one pass (arXiv 2504.02821 section 3).

    `score(activations, embeddings, sae).table()` is one row a latent. `trust.trusted_score` also says how sure each is,
    in two passes; `streamed_score` also gives what names need.

    Args:
        activations: N rows of width d_in, row i of image i, from a file, a store or memory; or stored codes, whose
            latents are scored.
        embeddings: N rows of any width, row i of the same image. Both are read chunk by chunk (for rbf: kept).
        sae: encodes the activations at inference (threshold or row-wise top k); None scores raw neurons, the paper's
            baseline, or codes.
        similarity: of embeddings: cosine (the paper's), dot or rbf. gamma: of rbf, 1 / width unless given.
        pool: None: one row an image. max or mean: a store has several rows of an image, neighbours of each other, whose
            codes (or neurons) are pooled, a latent that does not fire counting as 0; embeddings have one row an image,
            found by its id where they have ids, else in the order in which images appear.
        batch_rows: rows read and encoded at a time.
        device: where the sums live: a torch.device, auto, cpu, cuda or cuda:N.
        on_rows: called with the number of images done.

    Returns:
        Scores [S]: in [-1, 1] for cosine, NaN where undefined.

    Raises:
        ValueError: different numbers of rows, image ids (where both sides have them) that differ, several rows of one
            image without a pool, a pool of rows without ids, an image without an embedding, an SAE of another width,
            hook point or layer, and everything StreamedScore refuses.
    """
    return streamed_score(
        activations,
        embeddings,
        sae,
        similarity=similarity,
        gamma=gamma,
        pool=pool,
        batch_rows=batch_rows,
        device=device,
        on_rows=on_rows,
    ).result()


def streamed_score(
    activations: Rows,
    embeddings: Matrix,
    sae: SparseAutoencoder | None = None,
    *,
    similarity: Similarity = "cosine",
    gamma: float | None = None,
    pool: Pool | None = None,
    batch_rows: int = 4096,
    device: torch.device | str = "cpu",
    on_rows: Callable[[int], None] = lambda done: None,
) -> StreamedScore:
    """The sums behind `score`, with all images in them; arguments and errors are those of `score`."""
    images = ScoredImages(activations, {"": embeddings}, sae, pool=pool, batch_rows=batch_rows, kept_bytes=0)
    gamma = None if gamma is None else real_number("gamma", gamma)
    return stream(images, similarity, gamma, device=device, on_rows=on_rows)[""]


def stream(
    images: ScoredImages,
    similarity: str = "cosine",
    gamma: float | None = None,
    *,
    halves: bool = False,
    device: torch.device | str = "cpu",
    on_rows: Callable[[int], None] = lambda done: None,
) -> dict[str, StreamedScore]:
    """One pass over images, by all their encoders: the sums of each, of all ranks. Arguments and errors as `score`."""
    target = images.device_of(device)
    common: dict[str, Any] = {"device": target, "halves": halves, "first_image": images.first_image}
    sums = {name: StreamedScore(images.n_latents, similarity, gamma, **common) for name in images.encoders}
    for start, values, emb_nE in images.chunks():
        for name, one in sums.items():
            one.update(values, emb_nE[name])
        on_rows(images.done(start + (values.n_rows if isinstance(values, SparseCodes) else len(values))))
    if images.peers is not None:
        for name, one in sums.items():
            one.merge_ranks(images.peers, images.sparse, images.encoders[name].d)
    return sums
