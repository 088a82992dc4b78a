"""One table, measures x SAEs and controls, and whether an SAE stands apart from what cannot have learned.

d' = (mean of the SAEs - mean of the controls) / pooled standard deviation over seeds, of three seeds or more. Below 2
the measure does not separate. With fewer seeds there is no d': that is said, and that a control is as good, if it is.
Measures of single latents are also compared at matched firing counts: the control's latents are weighted so that their
counts are distributed as the SAE's (a third of a decade a bin), since counts alone move most of these measures.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from saevlm_fast.measures.results import Figures

LEAST_SEEDS = 3
SEPARATES = 2.0  # d' from which a measure tells them apart
_LEAST_OF_BIN = 5  # latents of either side
_LEAST_MATCHED = 0.5  # share of the SAE's latents from which means at matched firing counts are the fair ones


class Headline(NamedTuple):
    """A row of the table: its name, where the figure is, which way is better (1, -1; 0: neither), and the column of
    latents behind it, if it is a mean of one."""

    name: str
    path: tuple[str, ...]
    better: int = 0
    column: str | None = None


def headlines(label_sets: Sequence[str], embeddings: Sequence[str], spliced_sets: Sequence[str] = ()) -> list[Headline]:
    """The rows, as the inputs have them. spliced_sets: label sets of the images that a tower is shown."""
    rows = [
        Headline("explained variance", ("reconstruction", "explained_variance"), 1),
        Headline("L0", ("reconstruction", "l0")),
        Headline("norm ratio", ("reconstruction", "norm_ratio")),
        Headline("dead fraction", ("reconstruction", "dead_fraction"), -1),
        Headline("dense share (> 10 %)", ("reconstruction", "dense_0.1", "share"), -1),
        Headline("effective latents", ("reconstruction", "effective_latents"), 1),
    ]
    for name in embeddings:
        rows.append(Headline(f"MS, {name}", ("monosemanticity", name, "ms_10", "mean"), 1, f"ms:{name}"))
    rows += [
        Headline("J > 0 of top-16 sets", ("uniqueness", "share_above_0"), -1),
        Headline("redundant (J > .5)", ("uniqueness", "redundant_share"), -1),
        Headline("distinct top-16 images", ("uniqueness", "distinct_images_share"), 1),
        Headline("LCA depth", ("hierarchy", "depth"), 1, "lca_depth"),
        Headline("depth trend over levels", ("hierarchy", "trend"), 1),
    ]
    at = ("patches",)
    rows += [
        Headline("purity excess of patches", (*at, "excess", "mean"), 1, "purity_excess:patches"),
        Headline("AUROC of patch labels", (*at, "selection", "auroc"), 1),
        Headline("AP of patch labels", (*at, "selection", "ap"), 1),
        Headline("coverage of patch labels", (*at, "selection", "coverage"), 1),
        Headline("R of one latent, patches", (*at, "selection", "R"), 1),
    ]
    for name in label_sets:
        rows += _of_labels(name)
    rows += [
        Headline("nearest decoder cosine", ("geometry", "nearest_cosine", "mean")),
        Headline("best co-firing phi", ("geometry", "cofiring", "mean_best_phi")),
        Headline("neighbours kept by x_hat", ("kept", "overlap", "x_hat", "value"), 1),
    ]
    rows += [
        Headline(f"probe kept by x_hat, {name}", ("kept", "sets", name, "probe", "kept", "x_hat", "value"), 1)
        for name in label_sets
    ]
    rows += [
        Headline("spliced: cosine of the output", ("behaviour", "main", "cosine", "value"), 1),
        Headline("spliced: neighbours kept", ("behaviour", "main", "overlap", "value"), 1),
    ]
    for name in spliced_sets:
        main, recovered = ("behaviour", "main", "sets", name), ("behaviour", "main", "recovered", name)
        rows += [
            Headline(f"spliced: CE recovered (zero), {name}", (*recovered, "ce", "zero", "value"), 1),
            Headline(f"spliced: CE recovered (mean), {name}", (*recovered, "ce", "mean", "value"), 1),
            Headline(f"spliced: KL, {name}", (*main, "kl", "value"), -1),
            Headline(f"spliced: top-1 agreement, {name}", (*main, "agreement", "value"), 1),
            Headline(f"spliced: probe kept, {name}", (*recovered, "probe", "value"), 1),
        ]
    return rows


def _of_labels(name: str) -> list[Headline]:
    """The rows of a label set."""
    of_set = ("labels", name)
    chosen = (*of_set, "selection")
    return [
        Headline(f"purity excess, {name}", (*of_set, "excess", "mean"), 1, f"purity_excess:{name}"),
        Headline(
            f"mutual information, {name}", (*of_set, "mutual_information", "mean"), 1, f"mutual_information:{name}"
        ),
        Headline(f"AUROC of labels, {name}", (*chosen, "auroc"), 1),
        Headline(f"AP of labels, {name}", (*chosen, "ap"), 1),
        Headline(f"coverage at AP .3, {name}", (*chosen, "coverage"), 1),
        Headline(f"purity of chosen, {name}", (*chosen, "purity"), 1),
        Headline(f"R of one latent, {name}", (*chosen, "R"), 1),
        Headline(f"its top-16 purity, {name}", (*chosen, "top16_purity"), 1),
        *(Headline(f"probe of {k}, {name}", ("probing", name, "accuracy", str(k), "mean"), 1) for k in (1, 5, 20)),
    ]


def figure_at(measures: Figures, path: tuple[str, ...]) -> float:
    """The number at a path of nested figures; NaN where there is none."""
    found: Any = measures
    for name in path:
        if isinstance(found, list) and name.isdecimal() and int(name) < len(found):
            found = found[int(name)]
        elif isinstance(found, dict) and name in found:
            found = found[name]
        else:
            return math.nan
    return float(found) if isinstance(found, int | float) else math.nan


def interval_at(measures: Figures, path: tuple[str, ...]) -> tuple[float, float] | None:
    """The 95 % interval that stands beside the number at a path, if one does and is defined."""
    if path[-1] not in ("mean", "value"):
        return None
    low, high = (figure_at(measures, (*path[:-1], "interval", end)) for end in ("0", "1"))
    return (low, high) if math.isfinite(low) and math.isfinite(high) else None


def separation(
    trained: Sequence[float], control: Sequence[float], better: int, matched: Figures | None = None
) -> Figures:
    """Two sets of seeds of one measure.

    Args:
        matched: means at matched firing counts, {sae, control, covered}: how often a latent fires moves a measure by
            itself. Where they cover half of the latents, an SAE that they do not find better is not called so; with
            too few seeds they decide alone.

    Returns:
        difference (trained - control, of means), d_prime (towards better; NaN without seeds), verdict: separates, does
        not separate, better, seeds missing, does not separate: not better (or: not better at matched counts), or not
        judged where neither way is better.
    """
    first, second = (np.array([each for each in values if math.isfinite(each)]) for values in (trained, control))
    if not len(first) or not len(second):
        return {"difference": math.nan, "d_prime": math.nan, "verdict": "not measured"}
    difference = float(first.mean() - second.mean())
    if better == 0:
        return {"difference": difference, "d_prime": math.nan, "verdict": "not judged"}
    fair = better * (matched["sae"] - matched["control"]) if matched and matched["covered"] >= _LEAST_MATCHED else None
    d_prime = _d_prime(first, second, better) if len(first) >= LEAST_SEEDS else math.nan
    if fair is not None and fair <= 0:
        verdict = "does not separate: not better at matched counts"
    elif len(first) >= LEAST_SEEDS:
        verdict = "separates" if d_prime >= SEPARATES else "does not separate"
    else:
        is_better = (better * difference if fair is None else fair) > 0
        verdict = "better, seeds missing" if is_better else "does not separate: not better"
    return {"difference": difference, "d_prime": d_prime, "verdict": verdict}


def _d_prime(first: np.ndarray, second: np.ndarray, better: int) -> float:
    """Difference of means towards better, over the pooled deviation of seeds."""
    difference = float(first.mean() - second.mean())
    squares = [((values - values.mean()) ** 2).sum() for values in (first, second)]
    sd = math.sqrt(float(sum(squares)) / (len(first) + len(second) - 2))
    if sd > 0:
        return better * difference / sd
    return math.copysign(math.inf, better * difference) if difference else 0.0


def matched_mean(
    values_S: np.ndarray, counts_S: np.ndarray, like_values_S: np.ndarray, like_counts_S: np.ndarray, least: int = 10
) -> tuple[float, float, float]:
    """(mean of the values reweighted to the other's firing counts, mean of the other's there, share of its defined
    latents that is covered).

    Bins of a third of a decade, from `least` images on; those with fewer than 5 latents of either are left out.
    """
    mine, other = (
        np.isfinite(values) & (counts >= least)
        for values, counts in ((values_S, counts_S), (like_values_S, like_counts_S))
    )
    bins, like_bins = (
        np.floor(3 * np.log10(counts) + 1e-9).astype(int) for counts in (counts_S[mine], like_counts_S[other])
    )
    n_bins = int(max(bins.max(initial=0), like_bins.max(initial=0))) + 1
    n, n_like = np.bincount(bins, minlength=n_bins), np.bincount(like_bins, minlength=n_bins)
    sums = np.bincount(bins, values_S[mine], minlength=n_bins)
    like_sums = np.bincount(like_bins, like_values_S[other], minlength=n_bins)
    both = (n >= _LEAST_OF_BIN) & (n_like >= _LEAST_OF_BIN)
    covered = float(n_like[both].sum())
    if not covered:
        return math.nan, math.nan, 0.0
    matched = float((sums[both] / n[both] * n_like[both]).sum() / covered)
    n_defined = int((np.isfinite(like_values_S) & (like_counts_S > 0)).sum())
    return matched, float(like_sums[both].sum() / covered), covered / n_defined
