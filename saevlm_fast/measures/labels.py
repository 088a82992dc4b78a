"""Latents against labels: purity beyond chance, and each label's latent, chosen on one half, reported on the other.

Purity is the share of a latent's images that have its most frequent label. Chance grows as n_k falls, so it is compared
with random images of the same number: in a permuted order of all images, the largest count of any label among the
first n is what n random images give, for every n at once. k-means is pure and finds few labels: coverage, the share of
labels that have a latent of average precision .3 or more, stands beside purity always.
Shape suffixes: S latents, N images, L labels, M entries, R permutations.
"""

import math
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from saevlm_fast.data.label_sets import LabelSet
from saevlm_fast.data.passes import Pass
from saevlm_fast.errors import require
from saevlm_fast.measures.codes import TOP, KeptCodes
from saevlm_fast.measures.information import mutual_information
from saevlm_fast.measures.label_scores import LabelScores, label_scores, without_meeting
from saevlm_fast.measures.matching import TOP_CANDIDATES, row_of_entries, sparse_assignment, top_of_groups
from saevlm_fast.measures.one_latent import CANDIDATES, told_by_one_latent
from saevlm_fast.measures.results import Figures, Measured, bootstrap_mean, mean_both_ways
from saevlm_fast.scoring.sums import STATUSES
from saevlm_fast.scoring.trust import NORMAL_95

LEAST_IMAGES = 10  # of a latent, below which its purity says nothing
COVERED = 0.3  # average precision from which a label counts as covered
_NO_LABEL = ""


def labels_of_latents(
    codes: KeptCodes, labels: LabelSet, half_N: np.ndarray, n_permutations: int = 200, n_shuffles: int = 3
) -> Measured:
    """Purity, and the latents of labels, of one label set.

    Args:
        codes: of N images. labels: of the same images; those of which nothing is known are left out.
        half_N: bool, the half for choosing (label_sets.halves). n_permutations: for chance. n_shuffles: labels
            shuffled, and the whole selection repeated.

    Returns:
        figures: purity, weighted_purity, top16_purity, entropy, mutual_information (each over latents that are defined
            and with undefined ones as chance), excess, selection {auroc, ap, f1, coverage, purity, R, top16_purity,
            top16_labels, one_to_one, one_latent, null}. latents: purity, purity_chance, purity_excess, purity_z,
            weighted_purity, top16_purity, label_entropy, mutual_information, purity_label, and, held out, best_label
            (by F1 on the half for choosing), best_auroc, best_ap, best_f1. Names end in the name of the set.
    """
    known_N = labels.known_N
    codes, labels, half_N = codes.part(known_N), labels.part(known_N), half_N[known_N]
    reading = Pass(f"labels {labels.name}", (1 + n_shuffles) * len(codes.acts_M), "entries")
    pure = purity(codes, labels, chance_purity(labels, codes.counts_S, n_permutations))
    figures, columns = purity_figures(pure, codes, labels, codes.counts_S)
    halves = codes.part(half_N), codes.part(~half_N)  # sorted once, whatever the labels
    chosen, best = selection(halves, labels, half_N, reading)
    generator = np.random.default_rng(0)
    nulls = [selection(halves, labels.shuffled(generator), half_N, reading)[0] for _ in range(n_shuffles)]
    figures["selection"] = chosen | beside_null(nulls, "labels shuffled over images")
    figures |= {"labels": len(labels.names), "images": labels.n_images, "least_images": LEAST_IMAGES}
    named = {f"{name}:{labels.name}": column for name, column in (columns | best).items()}
    return Measured(figures, named)


def beside_null(nulls: list[Figures], how: str) -> Figures:
    """Means of the figures of repeated selections."""
    known = {name: [null[name] for null in nulls if math.isfinite(null[name])] for name in AVERAGED} if nulls else {}
    means = {name: float(np.mean(values)) if values else math.nan for name, values in known.items()}
    return {"null": means, "null_is": f"{how}, the whole selection repeated {len(nulls)} times"}


# Purity ---------------------------------------------------------------------------------------------------------------


class Purity(NamedTuple):
    """Of S latents; NaN where there are no images, or none of it with a label."""

    purity_S: np.ndarray
    weighted_S: np.ndarray
    top_S: np.ndarray
    entropy_S: np.ndarray
    information_S: np.ndarray  # mutual information of firing and label, nats
    label_S: np.ndarray  # the most frequent one, the first of several; -1 without
    chance: "Chance"


class Chance(NamedTuple):
    """Purity of random images, as many as each of S latents has: R draws for each of U numbers of images.

    The draws are the same for all latents, so the error of their mean does not fall with the number of latents.
    """

    draws_RU: np.ndarray  # NaN of no images
    place_S: np.ndarray  # which of the numbers a latent has

    def mean(self) -> np.ndarray:
        """[S]."""
        return self._of(self.draws_RU.mean(0))

    def sd(self) -> np.ndarray:
        """[S]."""
        return self._of(self.draws_RU.std(0))

    def error_of_mean(self, some_S: np.ndarray) -> float:
        """Standard error of the mean chance of some latents, of the draws alone."""
        weights_U = np.bincount(self.place_S[some_S], minlength=self.draws_RU.shape[1]) / max(int(some_S.sum()), 1)
        means_R = self.draws_RU[:, weights_U > 0] @ weights_U[weights_U > 0]
        return float(means_R.std(ddof=1) / math.sqrt(len(means_R))) if len(means_R) > 1 else math.nan

    def _of(self, each_U: np.ndarray) -> np.ndarray:
        return each_U[self.place_S]


def purity(codes: KeptCodes, labels: LabelSet, chance: "Chance") -> Purity:
    """Of every latent: counted, weighted by activation, of its 16 images; the labels' entropy; beside chance."""
    label_NL = labels.matrix()
    n_S = codes.counts_S
    counts = codes.matrix(np.ones(len(codes.acts_M))) @ label_NL
    most_S, label_S = _row_max(counts)
    mass_S = np.bincount(codes.latents_M, codes.acts_M, minlength=codes.n_latents)
    weight_S, _ = _row_max(codes.matrix(codes.acts_M.astype(np.float64)) @ label_NL)
    latents_T, images_TP = codes.top_images(TOP)
    top_S = np.full(codes.n_latents, np.nan)
    if len(latents_T):
        tops = codes.matrix()  # its layout, with the tops alone
        tops = type(tops)(
            (np.ones(images_TP.size), images_TP.reshape(-1), np.arange(len(latents_T) + 1) * TOP),
            shape=(len(latents_T), codes.n_images),
        )
        top_S[latents_T] = _row_max(tops @ label_NL)[0] / TOP
    return Purity(
        _share(most_S, n_S),
        _share(weight_S, mass_S),
        top_S,
        _entropy(counts, len(labels.names)),
        mutual_information(codes, labels),
        label_S,
        chance,
    )


def counted_purity(codes: KeptCodes, labels: LabelSet) -> np.ndarray:
    """[S]: the share of each latent's images with its most frequent label; NaN of dead ones."""
    return _share(_row_max(codes.matrix(np.ones(len(codes.acts_M))) @ labels.matrix())[0], codes.counts_S)


def _share(part_S: np.ndarray, whole_S: np.ndarray) -> np.ndarray:
    return np.divide(part_S, whole_S, out=np.full(len(part_S), np.nan), where=whole_S > 0)


def _row_max(matrix: Any) -> tuple[np.ndarray, np.ndarray]:
    """(the largest entry of each row, its lowest column); 0 and -1 of rows without entries."""
    most, which = np.zeros(matrix.shape[0]), np.full(matrix.shape[0], -1, np.int64)
    kept = top_of_groups(row_of_entries(matrix), matrix.data, 1, matrix.indices)
    rows = row_of_entries(matrix)[kept]
    most[rows], which[rows] = matrix.data[kept], matrix.indices[kept]
    return most, which


def _entropy(counts: Any, n_labels: int) -> np.ndarray:
    """Of the labels of each latent's images, over ln L: 0 where all have one, NaN where none has any."""
    totals = np.asarray(counts.sum(1)).reshape(-1)
    rows = row_of_entries(counts)
    share = counts.data / totals[rows]
    entropy_S = np.bincount(rows, -share * np.log(share), minlength=len(totals)) / max(math.log(n_labels), 1e-300)
    return np.where(totals > 0, np.abs(entropy_S) if n_labels > 1 else 0.0, np.nan)


def chance_purity(labels: LabelSet, n_S: np.ndarray, n_permutations: int) -> Chance:
    """The purity of n random images, for each n. ValueError: no permutations."""
    require(n_permutations >= 1, f"n_permutations: {n_permutations} must be at least 1")
    numbers, places = np.unique(n_S, return_inverse=True)
    purity_RU = np.full((n_permutations, len(numbers)), np.nan)
    generator = np.random.default_rng(0)
    above = numbers > 0
    for row in purity_RU:
        most_N = _running_most(labels, generator.permutation(labels.n_images))
        row[above] = most_N[numbers[above] - 1] / numbers[above]
    return Chance(purity_RU, places)


def _running_most(labels: LabelSet, order_N: np.ndarray) -> np.ndarray:
    """[N]: the largest count of any label among the first 1, 2, ... images of an order."""
    place_N = np.empty_like(order_N)
    place_N[order_N] = np.arange(len(order_N))
    place_M = place_N[labels.images_M]
    order_M = np.lexsort((place_M, labels.labels_M))
    label_M = labels.labels_M[order_M]
    starts = np.flatnonzero(np.append(True, label_M[1:] != label_M[:-1]))
    counted_M = np.arange(len(label_M)) - np.repeat(starts, np.diff(np.append(starts, len(label_M)))) + 1
    most_N = np.zeros(len(order_N), np.int64)
    np.maximum.at(most_N, place_M[order_M], counted_M)
    return np.maximum.accumulate(most_N)


def purity_figures(
    pure: Purity, codes: KeptCodes, labels: LabelSet, images_S: np.ndarray
) -> tuple[Figures, dict[str, np.ndarray]]:
    """Means over the latents that fire on LEAST_IMAGES images; and columns.

    images_S: of each latent; where rows are patches, fewer than rows.
    """
    alive_S = codes.status_S == STATUSES.index("defined")
    enough_S = alive_S & (images_S >= LEAST_IMAGES)
    chance_S, chance_sd_S = pure.chance.mean(), pure.chance.sd()
    excess_S = pure.purity_S - chance_S
    z_S = np.divide(excess_S, chance_sd_S, out=np.full(len(excess_S), np.nan), where=chance_sd_S > 0)
    base = float(labels.counts_L.max() / max(labels.n_images, 1))
    figures: Figures = {
        "purity": mean_both_ways(pure.purity_S, enough_S, base),
        "chance": mean_both_ways(chance_S, enough_S, base),
        "excess": mean_both_ways(excess_S, enough_S, 0.0)
        | {"interval": _excess_interval(excess_S, enough_S, pure.chance)},
        "weighted_purity": mean_both_ways(pure.weighted_S, enough_S, base),
        "top16_purity": mean_both_ways(pure.top_S, np.isfinite(pure.top_S), base),
        "entropy": mean_both_ways(pure.entropy_S, enough_S & np.isfinite(pure.entropy_S), 1.0),
        "mutual_information": mean_both_ways(pure.information_S, enough_S, 0.0),
        "share_above_chance": float((z_S[enough_S] > 2.326).mean()) if enough_S.any() else math.nan,
        "by_images": _by_images((pure.purity_S, chance_S, excess_S), enough_S, codes.counts_S),
        "counts": {name: int((codes.status_S == i).sum()) for i, name in enumerate(STATUSES)}
        | {"too few": int((alive_S & ~enough_S).sum())},
    }
    names = np.array([*labels.names, _NO_LABEL])
    columns = {
        "purity": pure.purity_S,
        "purity_chance": chance_S,
        "purity_excess": excess_S,
        "purity_z": z_S,
        "weighted_purity": pure.weighted_S,
        "top16_purity": pure.top_S,
        "label_entropy": pure.entropy_S,
        "mutual_information": pure.information_S,
        "purity_label": names[pure.label_S],
    }
    return figures, columns


def _excess_interval(excess_S: np.ndarray, enough_S: np.ndarray, chance: Chance) -> list[float]:
    """Of the mean: latents drawn with replacement, widened by the error of chance, which they share."""
    low, high = bootstrap_mean(excess_S[enough_S])
    mean, error = float(excess_S[enough_S].mean()) if enough_S.any() else math.nan, chance.error_of_mean(enough_S)
    return [mean - math.hypot(mean - low, NORMAL_95 * error), mean + math.hypot(high - mean, NORMAL_95 * error)]


def _by_images(columns: tuple[np.ndarray, ...], enough_S: np.ndarray, counts_S: np.ndarray) -> list[Figures]:
    """Purity, chance and excess of latents of like n_k."""
    found = []
    edges = [LEAST_IMAGES, 20, 50, 100, 200, 500, 1000, 5000, 1 << 62]
    for low, high in pairwise(edges):
        inside = enough_S & (counts_S >= low) & (counts_S < high)
        if inside.any():
            means = [float(each[inside].mean()) for each in columns]
            found.append(
                {"from": low, "latents": int(inside.sum()), **dict(zip(("purity", "chance", "excess"), means))}
            )
    return found


# The latents of labels ------------------------------------------------------------------------------------------------

AVERAGED = ("auroc", "ap", "f1", "coverage", "purity", "R", "top16_purity")


def selection(
    codes: tuple[KeptCodes, KeptCodes], labels: LabelSet, half_N: np.ndarray, reading: Pass
) -> tuple[Figures, dict[str, np.ndarray]]:
    """Each label's latent, of the largest average precision on one half, as it does on the other; and the reverse.

    codes: of both halves. labels: of all images. reading: counts the entries of codes.
    """
    halves = [(part, labels.part(half)) for part, half in zip(codes, (half_N, ~half_N))]
    if min(part.n_images for part, _ in halves) == 0:
        nothing = dict.fromkeys(AVERAGED, math.nan) | {"status": "too few images", "labels": 0}
        return nothing, {}
    choosing, reporting = (label_scores(*half, reading) for half in halves)
    both_L = np.minimum(*(part.counts_L for _, part in halves)) > 0
    figures = _best_latents(choosing, reporting, halves[1], both_L)
    figures |= _one_latent(choosing, reporting, halves, both_L)
    return figures, _best_labels(choosing, reporting, halves[1])


def _best_latents(
    choosing: LabelScores, reporting: LabelScores, held_out: tuple[KeptCodes, LabelSet], both_L: np.ndarray
) -> Figures:
    codes, labels = held_out
    inside = both_L[choosing.label]
    places = np.flatnonzero(inside)[
        top_of_groups(choosing.label[inside], choosing.ap[inside], 1, choosing.latent[inside])
    ]
    latents, which = choosing.latent[places].astype(np.int64), choosing.label[places].astype(np.int64)
    auroc, ap, f1 = _reported(reporting, codes, labels, latents, which)
    lost = int(both_L.sum()) - len(which)  # labels that no latent meets: AUROC .5, precision P / N, not covered
    n = len(which) + lost
    base = labels.counts_L[np.setdiff1d(np.flatnonzero(both_L), which)] / max(codes.n_images, 1)
    pure = _purity_of(codes, labels, latents, which)
    return {
        "status": "defined" if n else "too few",
        "labels": n,
        "labels_left_out": len(labels.names) - n,
        "auroc": float((np.nansum(auroc) + 0.5 * lost) / n) if n else math.nan,
        "ap": float((ap.sum() + base.sum()) / n) if n else math.nan,
        "f1": float((f1.sum() + (2 * base / (1 + base)).sum()) / n) if n else math.nan,
        "coverage": float((ap >= COVERED).sum() / n) if n else math.nan,
        "purity": float(np.nanmean(pure)) if np.isfinite(pure).any() else math.nan,
        "interval_ap": bootstrap_mean(ap),
        "latents_used": len(np.unique(latents)),
        "one_to_one": _one_to_one(choosing, reporting, held_out, both_L),
    }


def _one_latent(
    choosing: LabelScores, reporting: LabelScores, halves: list[tuple[KeptCodes, LabelSet]], both_L: np.ndarray
) -> Figures:
    """R and top16_purity of each label's latent of least logistic loss, and under one_latent what stands beside."""
    inside = np.flatnonzero(both_L[choosing.label])
    kept = inside[top_of_groups(choosing.label[inside], choosing.ap[inside], CANDIDATES, choosing.latent[inside])]
    pairs = choosing.latent[kept].astype(np.int64), choosing.label[kept].astype(np.int64)
    which, latents, found = told_by_one_latent(halves[0], halves[1], *pairs)
    _, ap, _ = _reported(reporting, *halves[1], latents, which)
    n = max(int(both_L.sum()), 1)
    found |= {
        "map": float(ap.mean()) if len(ap) else math.nan,
        "coverage": float((ap >= COVERED).sum() / n),
        "candidates": CANDIDATES,
    }
    return {**{name: found[name] for name in ("R", "top16_purity", "top16_labels")}, "one_latent": found}


def _reported(
    scores: LabelScores, codes: KeptCodes, labels: LabelSet, latents: np.ndarray, which: np.ndarray
) -> tuple[np.ndarray, ...]:
    """(auroc, ap, f1) of pairs, whether they meet or not."""
    places = scores.at(latents, which)
    met = places >= 0
    apart = without_meeting(codes, labels, latents, which)
    columns = (scores.auroc, scores.ap, scores.f1)
    return tuple(np.where(met, np.append(column, np.nan)[places], other) for column, other in zip(columns, apart))


def _purity_of(codes: KeptCodes, labels: LabelSet, latents: np.ndarray, which: np.ndarray) -> np.ndarray:
    """The share of each chosen latent's images, on the half that was held out, that have its label."""
    if not len(latents):
        return np.zeros(0)
    counts = codes.matrix(np.ones(len(codes.acts_M))) @ labels.matrix()
    return _share(np.asarray(counts[latents, which]).reshape(-1), codes.counts_S[latents])


def _one_to_one(
    choosing: LabelScores, reporting: LabelScores, held_out: tuple[KeptCodes, LabelSet], both_L: np.ndarray
) -> Figures:
    """No latent for two labels: an assignment over each label's 32 best."""
    inside = np.flatnonzero(both_L[choosing.label])
    kept = inside[top_of_groups(choosing.label[inside], choosing.ap[inside], TOP_CANDIDATES, choosing.latent[inside])]
    shape = len(both_L), held_out[0].n_latents
    which, latents = sparse_assignment(choosing.label[kept], choosing.latent[kept], choosing.ap[kept], shape)
    auroc, ap, _ = _reported(reporting, *held_out, latents, which)
    return {
        "labels": len(which),
        "auroc": float(np.nanmean(auroc)) if np.isfinite(auroc).any() else math.nan,
        "ap": float(ap.mean()) if len(ap) else math.nan,
        "coverage": float((ap >= COVERED).sum() / both_L.sum()) if both_L.any() else math.nan,
    }


def _best_labels(
    choosing: LabelScores, reporting: LabelScores, held_out: tuple[KeptCodes, LabelSet]
) -> dict[str, np.ndarray]:
    """Each latent's label, of the largest F1 on one half, as it does on the other."""
    codes, labels = held_out
    places = top_of_groups(choosing.latent, choosing.f1, 1, choosing.label)
    latents, which = choosing.latent[places].astype(np.int64), choosing.label[places].astype(np.int64)
    reported = _reported(reporting, codes, labels, latents, which)
    best_S = np.full(codes.n_latents, -1, np.int64)
    best_S[latents] = which
    columns: dict[str, np.ndarray] = {"best_label": np.array([*labels.names, _NO_LABEL])[best_S]}
    for name, values in zip(("best_auroc", "best_ap", "best_f1"), reported):
        column = np.full(codes.n_latents, np.nan)
        column[latents] = values
        columns[name] = column
    return columns
