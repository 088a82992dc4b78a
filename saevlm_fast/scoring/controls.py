"""An untrained SAE of the same L0 beside a trained one, compared at the same number of images a latent.

Sparsity raises the score by itself, and how often a latent fires moves it, so two means say nothing unless L0 and
firing counts are the same (docs/concepts/untrained-saes.md). The rule of matching:

    strata    latents by n_active, a quarter of an octave each: floor(4 log2 n), from 10 images on
    matched   a stratum counts where both SAEs have a defined latent in it
    weights   each stratum has the share of the matched trained latents that are in it, in both means

Both means, and their difference, are weighted sums of scores, so the second pass gives their intervals, by image: what
an image does to both SAEs is taken off. Strata are held as they are. The interval does not cover the seed: take several
controls, which are pooled, and look at by_seed.

Shape suffixes: S latents, N images, W weighted sums (all, then octave by octave), C controls, n rows drawn.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from saevlm_fast.config import SAEConfig
from saevlm_fast.data.codes import StoredCodes
from saevlm_fast.data.rows import Activations, Matrix, activations_of
from saevlm_fast.errors import require
from saevlm_fast.peers import Peers
from saevlm_fast.sae import SparseAutoencoder, inferred
from saevlm_fast.scoring.monosemanticity import MonosemanticityScores
from saevlm_fast.scoring.second_pass import change_error
from saevlm_fast.scoring.source import Pool, ScoredImages
from saevlm_fast.scoring.sums import STATUSES
from saevlm_fast.scoring.trust import FEWEST_IMAGES, Interval, TrustedScores, TwoPasses, interval

FIRST_SEED = 1_000_003  # no seed that an SAE was likely trained from: the untrained one would be where that began
_DRAWN_ELEMENTS = 1 << 25  # pre-activations from which the threshold is taken
_KEPT_BYTES = 1 << 30


def untrained_like(
    sae: SparseAutoencoder, activations: Matrix, seed: int = FIRST_SEED
) -> tuple[SparseAutoencoder, float]:
    """An untrained SAE of the same size that selects as `sae` does and has its L0; and that L0.

    Of a TopK SAE it is one of TopK, of any other one with a threshold (`select_`). Under a threshold some rows have
    many latents and others none, which moves the score by itself.

    Random unit directions as every training here begins with (W_enc = W_dec^T); b_dec is the mean of the rows, where
    the recipe has their geometric median.
    The L0 is that of up to 33 million pre-activations of rows drawn at random.

    Raises:
        ValueError: another width.
    """
    activations, config = activations_of(activations, "activations"), sae.config
    require(config.d_in == activations.d, f"sae: d_in is {config.d_in}, but the activations have width {activations.d}")
    n = min(activations.n_rows, max(_DRAWN_ELEMENTS // config.d_sae, 256))
    drawn = torch.randperm(activations.n_rows, generator=torch.Generator().manual_seed(seed))[:n].sort().values
    x_nD = activations.rows(drawn).to(sae.b_dec)
    n_entries = int((inferred(sae, x_nD).top_acts > 0).sum())
    sized = untrained_config(config, n_entries / n)
    untrained = SparseAutoencoder(sized, device=sae.b_dec.device, dtype=sae.b_dec.dtype, random=False)
    untrained.reset_parameters(seed)
    with torch.no_grad():
        untrained.b_dec.copy_(x_nD.mean(0))
        select_(untrained, x_nD, n_entries)
    return untrained.eval(), n_entries / n


def untrained_config(like: SAEConfig, l0: float) -> SAEConfig:
    """Of its size: TopK with its k, Matryoshka with its groups, else BatchTopK."""
    if like.architecture == "topk":
        return SAEConfig(like.d_in, like.d_sae, like.k, "topk")
    k = min(max(1, round(l0)), like.d_sae)
    if like.architecture == "matryoshka":
        return SAEConfig(like.d_in, like.d_sae, k, "matryoshka", like.group_sizes)
    return SAEConfig(like.d_in, like.d_sae, k, "batch_topk")


@torch.no_grad()
def select_(untrained: SparseAutoencoder, x_nD: Tensor, n_entries: int) -> None:
    """Sets what lets so many latents fire on these rows: of TopK one bias of all latents, by which a row has at most k;
    of any other SAE the threshold. Where fewer are positive these fire."""
    pre_nS = (x_nD - untrained.b_dec) @ untrained.W_enc
    if untrained.config.architecture != "topk":
        untrained.threshold.copy_(_above(pre_nS.flatten(), n_entries).clamp(min=0))
        return
    kept_M = pre_nS.topk(int(untrained.config.k or 1), dim=1).values.flatten()
    if n_entries < int((kept_M > 0).sum()):
        untrained.b_enc.fill_(-_above(kept_M, n_entries))


def _above(values_M: Tensor, n: int) -> Tensor:
    """Between the n-th largest and the next."""
    kept = values_M.topk(min(n + 1, len(values_M))).values
    return (kept[-1] + kept[max(len(kept) - 2, 0)]) / 2


@dataclass(frozen=True)
class Stratum:
    """Latents on low to high images: how many are matched, their mean scores at matched counts, and the difference."""

    low: int
    high: int
    n_trained: int
    n_control: int
    trained: float
    control: float
    difference: float
    difference_interval: Interval


@dataclass(frozen=True)
class Comparison:
    """A trained SAE beside untrained ones, by one encoder; NaN where nothing matches.

    Attributes:
        trained, controls: all scores.
        matched: over all matched latents. strata: octave by octave of n_active.
        by_seed: the matched mean of each control alone, over the strata that it has, with the trained SAE's weights.
    """

    trained: TrustedScores
    controls: list[TrustedScores]
    matched: Stratum
    strata: list[Stratum]
    by_seed: list[float]


def compare_with_untrained(
    activations: Activations,
    embeddings: Mapping[str, Matrix],
    sae: SparseAutoencoder,
    *,
    n_controls: int = 1,
    similarity: str = "cosine",
    pool: Pool | None = None,
    batch_rows: int = 4096,
    device: torch.device | str = "cpu",
    seed: int = 0,
    on_rows: Callable[[int], None] = lambda done: None,
    peers: Peers | None = None,
) -> dict[str, Comparison]:
    """Scores `sae` and n_controls untrained SAEs on the same images, and compares them; by encoder.

    Memory: the sums of all 1 + n_controls at once (two S x E float64 each, and encoder). on_rows: of each of the
    2 (1 + n_controls) passes; other arguments as trust.trusted_scores.

    Raises:
        ValueError: as trust.trusted_scores; codes or raw neurons, which have no untrained SAE; no controls.
    """
    require(n_controls >= 1, f"n_controls: {n_controls} must be at least 1")
    require(
        not isinstance(activations, StoredCodes) and isinstance(sae, SparseAutoencoder),
        "controls: an untrained SAE beside it needs an SAE and activations, not codes or raw neurons",
    )
    saes = [sae] + [untrained_like(sae, activations, FIRST_SEED + seed + c)[0] for c in range(n_controls)]
    passes: list[TwoPasses] = []
    progress = _Progress(len(saes), on_rows)
    for each in saes:
        kept = _KEPT_BYTES // len(saes)
        common: dict[str, Any] = {"pool": pool, "batch_rows": batch_rows, "kept_bytes": kept, "peers": peers}
        images = ScoredImages(activations, embeddings, each, **common)
        passes.append(TwoPasses(images, similarity, device, progress.of(len(passes))))
        progress.n_images = next(iter(passes[0].scores.values())).n_images
    first = [next(iter(each.scores.values())) for each in passes]  # statuses are the same by every encoder
    match = Match(first[0], first[1:])
    trusted = [each.second(weights_SW, seed=seed) for each, weights_SW in zip(passes, match.weights())]
    return {name: match.compare([each[name] for each in trusted]) for name in embeddings}


class _Progress:
    """Images done in all passes: first those of every SAE, then the second ones. n_images: known after the first."""

    def __init__(self, n_saes: int, on_rows: Callable[[int], None]) -> None:
        self.n_saes, self.on_rows, self.n_images = n_saes, on_rows, 0

    def of(self, sae: int) -> Callable[[int], None]:
        """What the two passes of an SAE call with 1 .. 2 n_images."""

        def tell(done: int) -> None:
            in_second = self.n_images > 0 and done > self.n_images
            self.on_rows(done + self.n_images * (sae + (self.n_saes - 1 if in_second else 0)))

        return tell


class Match:
    """Which latents are compared, and the weights of all means: the rule of the module."""

    def __init__(self, trained: MonosemanticityScores, controls: list[MonosemanticityScores]) -> None:
        self.strata = [_strata(scores) for scores in (trained, *controls)]
        n_bins = 4 * 64
        counts_CB = torch.stack([torch.bincount(bins_S[bins_S >= 0], minlength=n_bins) for bins_S in self.strata])
        self.trained_B, self.control_CB = counts_CB[0], counts_CB[1:]
        self.both_B = (self.trained_B > 0) & (self.control_CB.sum(0) > 0)
        octaves = sorted({int(b) // 4 for b in self.both_B.nonzero().flatten()})
        bins_B = torch.arange(n_bins)
        self.ranges = [self.both_B] + [self.both_B & (bins_B // 4 == octave) for octave in octaves]

    def weights(self) -> list[Tensor]:
        """[S, W] of the trained SAE and of each control, so that their sums are the matched means."""
        return [
            torch.stack([self._weights(c, chosen_B, self.control_CB.sum(0)) for chosen_B in self.ranges], dim=1)
            for c in range(len(self.strata))
        ]

    def _weights(self, c: int, chosen_B: Tensor, control_B: Tensor) -> Tensor:
        """[S]; c = 0 is the trained SAE. control_B: of how many control latents each bin's mean is."""
        share_B = self.trained_B.double() * chosen_B / max(int((self.trained_B * chosen_B).sum()), 1)
        each_B = share_B / (self.trained_B if c == 0 else control_B).clamp(min=1)
        bins_S = self.strata[c]
        return torch.where(bins_S >= 0, each_B[bins_S.clamp(min=0)], 0.0)

    def compare(self, scores: list[TrustedScores]) -> Comparison:
        """Of the second pass with these weights: the trained SAE first."""
        weights, all_strata = self.weights(), []
        for w, chosen_B in enumerate(self.ranges):
            sums = [float(each.ms.nan_to_num(0.0) @ w_SW[:, w]) for each, w_SW in zip(scores, weights)]
            changes_N = scores[0].weighted_NW[:, w] - sum(each.weighted_NW[:, w] for each in scores[1:])
            trained, control = sums[0], sum(sums[1:])
            if not bool(chosen_B.any()):
                trained = control = math.nan
            bins = chosen_B.nonzero().flatten().tolist()
            all_strata.append(
                Stratum(
                    low=max(math.ceil(2 ** (bins[0] / 4)), FEWEST_IMAGES) if bins else 0,
                    high=math.ceil(2 ** ((bins[-1] + 1) / 4)) - 1 if bins else 0,
                    n_trained=int((self.trained_B * chosen_B).sum()),
                    n_control=int((self.control_CB * chosen_B).sum()),
                    trained=trained,
                    control=control,
                    difference=trained - control,
                    difference_interval=interval(trained - control, change_error(changes_N)),
                )
            )
        by_seed = [self._alone(c, each) for c, each in enumerate(scores[1:])]
        return Comparison(scores[0], scores[1:], all_strata[0], all_strata[1:], by_seed)

    def _alone(self, c: int, scores: TrustedScores) -> float:
        chosen_B = self.both_B & (self.control_CB[c] > 0)
        if not bool(chosen_B.any()):
            return math.nan
        return float(scores.ms.nan_to_num(0.0) @ self._weights(c + 1, chosen_B, self.control_CB[c]))


def _strata(scores: MonosemanticityScores) -> Tensor:
    """int64 [S]: floor(4 log2 n_active), or -1 for latents that are not compared."""
    compared_S = (scores.status == STATUSES.index("defined")) & (scores.n_active >= FEWEST_IMAGES)
    bins_S = (4 * scores.n_active.clamp(min=1).double().log2()).floor().long()
    return torch.where(compared_S, bins_S, -1)
