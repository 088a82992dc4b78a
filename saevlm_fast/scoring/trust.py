"""The Monosemanticity Score with what makes it worth something: interval, null, correction, guarded best (two passes).

    trusted = trusted_score(activations, embeddings, sae)
    trusted.summary().mean, trusted.summary().mean_interval      # over defined latents; clustered by image
    trusted.table()                                              # one row a latent

What it can tell and what it cannot: docs/concepts/monosemanticity.md. The maths is in second_pass.py and null.py.

Shape suffixes: N images, S latents or neurons, W weighted sums.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Literal, NamedTuple

import pyarrow as pa
import torch
from torch import Tensor

from saevlm_fast.data.codes import Rows
from saevlm_fast.data.rows import Matrix
from saevlm_fast.errors import check_kind, require, whole_number
from saevlm_fast.peers import Peers
from saevlm_fast.runtime import exact_defaults
from saevlm_fast.sae import SparseAutoencoder
from saevlm_fast.scoring.monosemanticity import MonosemanticityScores, ScoreSummary, stream
from saevlm_fast.scoring.ranks import found_at, spearman
from saevlm_fast.scoring.second_pass import Certainty, SecondPass, change_error
from saevlm_fast.scoring.source import Pool, ScoredImages
from saevlm_fast.scoring.sums import STATUSES

FEWEST_IMAGES, LEAST_EFFECTIVE = 10, 5.0  # of a latent that may be called best
NORMAL_95 = 1.959963984540054
FALSE_SHARE = 0.05
_DEFINED = STATUSES.index("defined")


class Interval(NamedTuple):
    """Of 95 %: estimate +- 1.96 standard errors."""

    low: float
    high: float


def interval(estimate: float, error: float) -> Interval:
    """The interval of 95 % about an estimate with that standard error."""
    return Interval(estimate - NORMAL_95 * error, estimate + NORMAL_95 * error)


class GuardedBest(NamedTuple):
    """The best latent by the images of even number, and its score there and on the others, which did not choose it.

    Only latents on at least FEWEST_IMAGES images, of n_eff at least LEAST_EFFECTIVE, may be chosen. latent is -1 and
    the rest NaN if there is none.
    """

    latent: int
    chosen_at: float
    held_out: float


@dataclass(frozen=True)
class TrustSummary(ScoreSummary):
    """Of the defined latents, as ScoreSummary, and:

    Attributes:
        mean_interval: of the mean over defined latents; clustered by image. NaN without intervals, as every interval.
        mean_with_null, mean_with_null_interval: of the mean over all latents, undefined ones counted as mean_cosine.
        mean_cosine: of two different images; the null's mean.
        corrected_mean: (mean - mean_cosine) / (1 - mean_cosine). NaN for dot.
        guarded_best: see GuardedBest.
        split_half: Spearman correlation of the scores over even and over odd images, of latents defined in both.
        above_null: share of the defined latents that are above chance at a false discovery share of 5 %.
        above_99: share of the defined latents above the null's 99 % point (p below 0.01). Both NaN without null.
    """

    mean_interval: Interval
    mean_with_null: float
    mean_with_null_interval: Interval
    mean_cosine: float
    corrected_mean: float
    guarded_best: GuardedBest
    split_half: float
    above_null: float
    above_99: float


@dataclass(frozen=True)
class TrustedScores(MonosemanticityScores):
    """Scores of S latents or neurons with their certainty; tensors [S] float64 on the CPU, NaN where undefined.

    Attributes:
        n_eff: (sum b)^2 / sum b^2 of b = a - min a: the number of images if all weighed the same.
        half_ms_2S: the scores over the images of even and of odd number alone.
        mean_cosine: mean similarity of two different images.
        se: jackknife standard error over images; NaN below three images above the minimum. None without intervals.
        null_sd, p: of codes shuffled over the images: standard deviation of the score, and the chance of one as high;
            below 10 images counted over 2,000 drawn sets (so at least 1 / 2001), else by a law of the null's
            deviation and skewness (null.py). None without null.
        mean_changes_N, null_mean_changes_N: how the two means change without each image; None without intervals. The
            difference of two SAEs on the same images has the error `change_error(a - b)`.
        weighted_NW: the same for the weights that were given.
    """

    n_eff: Tensor
    half_ms_2S: Tensor
    mean_cosine: float
    se: Tensor | None
    null_sd: Tensor | None
    p: Tensor | None
    mean_changes_N: Tensor | None
    null_mean_changes_N: Tensor | None
    weighted_NW: Tensor

    @classmethod
    def of(cls, certainty: Certainty) -> "TrustedScores":
        """From what a second pass found."""
        scores = {field.name: getattr(certainty.scores, field.name) for field in fields(MonosemanticityScores)}
        undefined_S = certainty.scores.status != _DEFINED
        return cls(
            **scores,
            n_eff=certainty.n_eff_S.masked_fill(undefined_S, torch.nan),
            half_ms_2S=certainty.half_ms_2S,
            mean_cosine=certainty.mean_similarity,
            se=certainty.se_S,
            null_sd=certainty.null_sd_S,
            p=None if certainty.p_S is None else certainty.p_S.masked_fill(undefined_S, torch.nan),
            mean_changes_N=certainty.mean_changes_N,
            null_mean_changes_N=certainty.null_mean_changes_N,
            weighted_NW=certainty.weighted_NW,
        )

    @property
    def corrected(self) -> Tensor:
        """(ms - mean_cosine) / (1 - mean_cosine): 0 is chance, 1 identical images; encoders compare. NaN for dot."""
        scale = 1 - self.mean_cosine if self.similarity == "cosine" else math.nan
        return (self.ms - self.mean_cosine) / scale

    @property
    def z(self) -> Tensor | None:
        """(ms - mean_cosine) / null_sd; NaN where all images are equally alike."""
        if self.null_sd is None:
            return None
        return ((self.ms - self.mean_cosine) / self.null_sd).masked_fill(self.null_sd == 0, torch.nan)

    @property
    def above_null(self) -> Tensor | None:
        """bool [S]: above chance, at most 5 % of these wrongly so in expectation (Benjamini-Hochberg)."""
        return None if self.p is None else found_at(self.p, FALSE_SHARE)

    def table(self) -> pa.Table:
        """The columns of MonosemanticityScores, and corrected, n_eff, se, ms_low, ms_high, null_sd, z, p, above_null.

        Without intervals se, ms_low and ms_high are missing, without null the last four. Metadata has mean_cosine too.
        """
        table = super().table()
        columns = {"corrected": self.corrected, "n_eff": self.n_eff}
        if self.se is not None:
            low, high = self.ms - NORMAL_95 * self.se, self.ms + NORMAL_95 * self.se
            columns |= {"se": self.se, "ms_low": low, "ms_high": high}
        if self.null_sd is not None and self.z is not None and self.p is not None and self.above_null is not None:
            columns |= {"null_sd": self.null_sd, "z": self.z, "p": self.p, "above_null": self.above_null}
        for name, values_S in columns.items():
            table = table.append_column(name, pa.array(values_S.numpy()))
        return table.replace_schema_metadata({**(table.schema.metadata or {}), "mean_cosine": repr(self.mean_cosine)})

    def summary(self, n_extreme: int = 10, fewest_images: int = 0) -> TrustSummary:
        """Statistics of the defined scores; extremes as MonosemanticityScores.summary, unguarded."""
        plain = super().summary(n_extreme, fewest_images)
        n_latents, n_defined = len(self.ms), plain.counts["defined"]
        total = float(self.ms.nan_to_num(0.0).sum()) + (n_latents - n_defined) * self.mean_cosine
        with_null = total / n_latents if n_latents else math.nan
        defined_S = self.status == _DEFINED
        return TrustSummary(
            **{field.name: getattr(plain, field.name) for field in fields(ScoreSummary)},
            mean_interval=_mean_interval(plain.mean, self.mean_changes_N),
            mean_with_null=with_null,
            mean_with_null_interval=_mean_interval(with_null, self.null_mean_changes_N),
            mean_cosine=self.mean_cosine,
            corrected_mean=float(self.corrected[defined_S].mean()),
            guarded_best=self.guarded_best(),
            split_half=self.split_half(),
            above_null=math.nan if self.above_null is None else _share(self.above_null[defined_S]),
            above_99=math.nan if self.p is None else _share(self.p[defined_S] < 0.01),
        )

    def guarded_best(self) -> GuardedBest:
        """The best latent without the luck of being chosen among many: see GuardedBest."""
        chosen_S, held_out_S = self.half_ms_2S
        able_S = (self.n_active >= FEWEST_IMAGES) & (self.n_eff >= LEAST_EFFECTIVE)
        able_S = able_S & ~(chosen_S.isnan() | held_out_S.isnan())
        if not bool(able_S.any()):
            return GuardedBest(-1, math.nan, math.nan)
        latent = int(chosen_S.masked_fill(~able_S, -torch.inf).argmax())
        return GuardedBest(latent, float(chosen_S[latent]), float(held_out_S[latent]))

    def split_half(self, fewest: int = 2, most: int | None = None) -> float:
        """Spearman correlation of the halves' scores, of latents on `fewest` to `most` images; NaN below two."""
        both_S = ~self.half_ms_2S.isnan().any(0) & (self.n_active >= fewest)
        both_S &= self.n_active <= (self.n_images if most is None else most)
        return spearman(*self.half_ms_2S[:, both_S]) if int(both_S.sum()) > 1 else math.nan


def _mean_interval(mean: float, changes_N: Tensor | None) -> Interval:
    return interval(mean, math.nan if changes_N is None else change_error(changes_N))


def _share(found_L: Tensor) -> float:
    return float(found_L.to(torch.float64).mean()) if len(found_L) else math.nan


@exact_defaults()
def trusted_score(
    activations: Rows,
    embeddings: Matrix,
    sae: SparseAutoencoder | None = None,
    *,
    similarity: Literal["cosine", "dot"] = "cosine",
    pool: Pool | None = None,
    intervals: bool = True,
    null: bool = True,
    batch_rows: int = 4096,
    device: torch.device | str = "cpu",
    seed: int = 0,
    on_rows: Callable[[int], None] = lambda done: None,
) -> TrustedScores:
    """`score` with intervals, null, n_eff and scores of halves, in two passes over the images.

    Codes of an SAE are kept from the first pass to the second up to 1 GiB; what does not fit is encoded again.

    Args:
        activations, embeddings, sae, batch_rows, device: as `score`.
        similarity: cosine or dot. rbf is refused: it is no inner product, so there is no T to compare an image with.
        pool: None: one row an image. max or mean: a store has several rows of an image, neighbours of each other, whose
            codes (or neurons) are pooled, an absent code counting as 0; embeddings have one row an image, found by its
            id where they have ids, else in the order in which images appear.
        intervals: jackknife standard errors. null: the permutation null.
        seed: of the images that the null draws.
        on_rows: called with the number of images done, in both passes: up to 2 N.

    Raises:
        ValueError: what `score` refuses; rbf; a pool of rows without ids; an image without an embedding.
    """
    return trusted_scores(
        activations,
        {"": embeddings},
        sae,
        similarity=similarity,
        pool=pool,
        intervals=intervals,
        null=null,
        batch_rows=batch_rows,
        device=device,
        seed=seed,
        on_rows=on_rows,
    )[""]


@exact_defaults()
def trusted_scores(
    activations: Rows,
    embeddings: Mapping[str, Matrix],
    sae: SparseAutoencoder | None = None,
    *,
    similarity: Literal["cosine", "dot"] = "cosine",
    pool: Pool | None = None,
    intervals: bool = True,
    null: bool = True,
    batch_rows: int = 4096,
    device: torch.device | str = "cpu",
    seed: int = 0,
    on_rows: Callable[[int], None] = lambda done: None,
    peers: Peers | None = None,
) -> dict[str, TrustedScores]:
    """`trusted_score` by several encoders at once, encoding the activations once; `rank_agreement` compares them.

    embeddings: of each encoder by its name. peers: the ranks that share the images, all of which call this, each with
    its own device; each is given the scores over all images. Memory: sums S x E of each. Everything else as
    `trusted_score`.

    Raises:
        ValueError: as `trusted_score`; no embeddings.
    """
    check_kind("embeddings", embeddings, Mapping, "a mapping of encoders' names to embeddings")
    seed = whole_number("seed", seed, 0)
    require(len(embeddings) > 0, "embeddings: at least one encoder's are needed")
    images = ScoredImages(activations, embeddings, sae, pool=pool, batch_rows=batch_rows, peers=peers)
    measured = TwoPasses(images, similarity, device, on_rows)
    return measured.second(intervals=intervals, null=null, seed=seed)


class TwoPasses:
    """The first pass is done when this is made; the second may be given weights that follow from the first.

    Args:
        images: what is scored. similarity, device, on_rows: as trusted_score.

    Attributes:
        scores: of the first pass, by encoder.
    """

    def __init__(
        self,
        images: ScoredImages,
        similarity: str = "cosine",
        device: torch.device | str = "cpu",
        on_rows: Callable[[int], None] = lambda done: None,
    ) -> None:
        require(similarity != "rbf", "similarity: rbf has no intervals and no null; cosine and dot have")
        self._images, self._on_rows = images, on_rows
        self._first = stream(images, similarity, halves=True, device=device, on_rows=on_rows)
        self.scores = {name: first.result() for name, first in self._first.items()}

    def second(
        self, weights_SW: Tensor | None = None, *, intervals: bool = True, null: bool = True, seed: int = 0
    ) -> dict[str, TrustedScores]:
        """The second pass, once: it takes over the sums of the first. weights_SW: as SecondPass."""
        first, self._first = self._first, {}
        require(bool(first), "second: was called before, and took over the sums of the first pass")
        passes = {
            name: SecondPass(one, weights_SW, intervals=intervals, null=null, seed=seed) for name, one in first.items()
        }
        done = next(iter(self.scores.values())).n_images
        for start, values, emb_nE in self._images.chunks():
            for name, one in passes.items():
                one.update(values, emb_nE[name])
            self._on_rows(done + self._images.done(start + len(next(iter(emb_nE.values())))))
        return {name: TrustedScores.of(second.result(self._images.peers)) for name, second in passes.items()}


def rank_agreement(scores: Mapping[str, MonosemanticityScores]) -> dict[tuple[str, str], float]:
    """Spearman correlation of the scores by each two encoders, of latents defined in both; NaN below two latents.

    A latent that is high by one encoder alone is suspect.

    Raises:
        ValueError: scores of different numbers of latents.
    """
    check_kind("scores", scores, Mapping, "a mapping of names to scores")
    for one in scores.values():
        check_kind("scores", one, MonosemanticityScores, "MonosemanticityScores; score gives them")
    require(len({len(one.ms) for one in scores.values()}) <= 1, "scores: of different numbers of latents")
    names = list(scores)
    agreement = {}
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            both_S = ~(scores[a].ms.isnan() | scores[b].ms.isnan())
            pair = scores[a].ms[both_S], scores[b].ms[both_S]
            agreement[a, b] = spearman(*pair) if len(pair[0]) > 1 else math.nan
    return agreement
