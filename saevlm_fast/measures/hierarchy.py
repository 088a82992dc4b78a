"""How specific latents are, level by level: the mean depth of the lowest common ancestor of their top images' labels.

Section 4 of arXiv 2504.02821: the depth of a pair of images is the number of nodes that their labels' paths share from
the root down. The mean over the pairs of a latent's 16 images is, with c_v of them below node v,

    sum over depths d, nodes v at d, of C(c_v, 2) / C(16, 2)

exactly. It is not rounded; `rounded` is the mean of rounded ones, as the reference does it. The null is the same over
all pairs of images. A trend over levels must beat three controls: levels shuffled, levels of the same sizes cut by
firing rate, and an SAE without levels cut in the same way. Shape suffixes: T latents, P tops, L labels, S latents.
"""

import math
from collections.abc import Sequence

import numpy as np

from saevlm_fast.config import MATRYOSHKA_FRACTIONS, group_sizes_from_fractions
from saevlm_fast.data.label_sets import LabelSet
from saevlm_fast.errors import require
from saevlm_fast.measures.codes import TOP, KeptCodes
from saevlm_fast.measures.results import Figures, Measured, bootstrap_mean
from saevlm_fast.measures.taxonomy import Taxonomy

_SHUFFLES = 500
_UNKNOWN = -1


def hierarchy(codes: KeptCodes, labels: LabelSet, taxonomy: Taxonomy, group_sizes: Sequence[int]) -> Measured:
    """The mean depth of every latent's top images, of each level, and of the controls of levels.

    Args:
        codes: of N images. labels: of the same images, one each; images of none, or of one that the taxonomy lacks, are
            left out of a latent's pairs. group_sizes: of the SAE's levels; of an SAE with one level, those of the paper
            are cut (levels_are: cut).

    Returns:
        figures: levels [{latents, depth, interval, rounded, shuffled, shuffled_interval, by_rate}], depth (of all
            latents), null, trend and trend_by_rate (Spearman of level and depth), trend_p. latents: lca_depth, level.

    Raises:
        ValueError: no image has a label that the taxonomy has; several labels an image.
    """
    label_N = labels.single()
    known = [name in taxonomy.paths for name in labels.names]
    names = [name for name, there in zip(labels.names, known) if there]
    require(bool(names), f"taxonomy: {taxonomy.origin} has none of the labels of {labels.name}")
    renumber = np.append(np.where(known, np.cumsum(known) - 1, _UNKNOWN), _UNKNOWN)
    label_N = renumber[label_N]
    latents_T, images_TP = codes.top_images(TOP)
    depth_T = mean_depths(label_N[images_TP], names, taxonomy)
    depth_S = np.full(codes.n_latents, np.nan)
    depth_S[latents_T] = depth_T
    sizes, levels_are = _levels(group_sizes, codes.n_latents)
    level_S = np.repeat(np.arange(len(sizes)), sizes)
    figures: Figures = {
        "status": "defined" if np.isfinite(depth_T).any() else "too few",
        "labels": len(names),
        "images": int((label_N >= 0).sum()),
        "left_out": int(codes.n_latents - np.isfinite(depth_S).sum()),
        "rule": "the one path" if taxonomy.is_tree else "the deepest node shared on any of the paths",
        "depth": float(np.nanmean(depth_T)) if np.isfinite(depth_T).any() else math.nan,
        "interval": bootstrap_mean(depth_T[np.isfinite(depth_T)]),
        "null": null_depth(label_N, names, taxonomy),
        "levels_are": levels_are,
    }
    figures |= _by_level(depth_S, level_S, codes.counts_S)
    return Measured(figures, {"lca_depth": depth_S, "level": level_S.astype(np.int16)})


def _levels(group_sizes: Sequence[int], n_latents: int) -> tuple[list[int], str]:
    if len(group_sizes) > 1:
        return list(group_sizes), "the SAE's groups"
    try:
        return list(group_sizes_from_fractions(MATRYOSHKA_FRACTIONS, n_latents)), "cut as the paper's groups"
    except ValueError:  # too few latents for them
        return [n_latents], "one"


def mean_depths(label_TP: np.ndarray, names: Sequence[str], taxonomy: Taxonomy) -> np.ndarray:
    """[T]: of the pairs of the P images with a label (not -1) in each row; NaN where fewer than two have one."""
    n_T = (label_TP >= 0).sum(1)
    pairs_T = n_T * (n_T - 1) // 2
    if taxonomy.is_tree:
        sums_T = _tree_sums(label_TP, taxonomy.nodes(names))
    else:
        sums_T = _matrix_sums(label_TP, taxonomy.depths(names))
    return np.divide(sums_T, pairs_T, out=np.full(len(sums_T), np.nan), where=pairs_T > 0)


def _tree_sums(label_TP: np.ndarray, node_LD: np.ndarray) -> np.ndarray:
    """Depths of all pairs of each row, by how many of its images are below each node."""
    sums_T = np.zeros(len(label_TP))
    row_TP = np.broadcast_to(np.arange(len(label_TP))[:, None], label_TP.shape)
    for node_L in node_LD.T:
        node_TP = np.append(node_L, _UNKNOWN)[label_TP]
        inside = node_TP >= 0
        n_nodes = int(node_L.max()) + 1
        keys, counts = np.unique(row_TP[inside] * n_nodes + node_TP[inside], return_counts=True)
        sums_T += np.bincount(keys // n_nodes, counts * (counts - 1) / 2, minlength=len(sums_T))
    return sums_T


def _matrix_sums(label_TP: np.ndarray, depth_LL: np.ndarray) -> np.ndarray:
    """The same by the matrix of depths, for labels of several paths."""
    padded = np.pad(depth_LL, (0, 1))  # -1 is the last: of depth 0 with all
    sums_T = np.zeros(len(label_TP))
    for i in range(label_TP.shape[1]):
        for j in range(i):
            sums_T += padded[label_TP[:, i], label_TP[:, j]]
    return sums_T


def null_depth(label_N: np.ndarray, names: Sequence[str], taxonomy: Taxonomy) -> float:
    """The mean depth of all pairs of images with a label: sum over nodes of n_v (n_v - 1) / (N (N - 1))."""
    count_L = np.bincount(label_N[label_N >= 0], minlength=len(names)).astype(np.float64)
    n = count_L.sum()
    if n < 2:
        return math.nan
    if not taxonomy.is_tree:
        depth_LL = taxonomy.depths(names)
        return float((count_L @ depth_LL @ count_L - count_L @ depth_LL.diagonal()) / (n * (n - 1)))
    total = 0.0
    for node_L in taxonomy.nodes(names).T:
        inside = node_L >= 0
        n_v = np.bincount(node_L[inside], count_L[inside])
        total += float((n_v * (n_v - 1)).sum())
    return total / (n * (n - 1))


def _by_level(depth_S: np.ndarray, level_S: np.ndarray, counts_S: np.ndarray) -> Figures:
    """Each level, beside levels shuffled and levels cut by firing rate (the most frequent first), of the same sizes."""
    from scipy.stats import rankdata

    generator = np.random.default_rng(0)
    by_rate_S = np.empty_like(level_S)
    by_rate_S[np.lexsort((generator.random(len(counts_S)), -counts_S))] = level_S  # ties must not follow the levels
    defined = np.isfinite(depth_S)
    depth, level, by_rate = depth_S[defined], level_S[defined], by_rate_S[defined]
    n_levels = int(level_S.max()) + 1
    trend, trend_by_rate = _spearman(level, depth), _spearman(by_rate, depth)
    level_ranks, depth_ranks = (_unit(rankdata(each)) for each in (level, depth))
    drawn = np.empty((_SHUFFLES, n_levels))
    trends = np.empty(_SHUFFLES)
    for i in range(_SHUFFLES):
        order = generator.permutation(len(level))
        drawn[i] = _means(depth, level[order], n_levels)
        trends[i] = level_ranks[order] @ depth_ranks
    rounded, rate_means = np.rint(depth), _means(depth, by_rate, n_levels)
    levels = []
    for g in range(n_levels):
        own = depth[level == g]
        levels.append(
            {
                "latents": int((level_S == g).sum()),
                "defined": len(own),
                "depth": float(own.mean()) if len(own) else math.nan,
                "interval": bootstrap_mean(own),
                "rounded": float(rounded[level == g].mean()) if len(own) else math.nan,
                "shuffled": float(drawn[:, g].mean()) if len(own) else math.nan,
                "shuffled_interval": [float(q) for q in np.quantile(drawn[:, g], [0.025, 0.975])] if len(own) else [],
                "by_rate": float(rate_means[g]),
            }
        )
    beaten = float((np.abs(trends) >= abs(trend) - 1e-12).sum() + 1) / (_SHUFFLES + 1)
    return {
        "levels": levels,
        "trend": trend,
        "trend_p": beaten if math.isfinite(trend) else math.nan,
        "trend_by_rate": trend_by_rate,
    }


def _means(values: np.ndarray, level: np.ndarray, n_levels: int) -> np.ndarray:
    counts = np.bincount(level, minlength=n_levels)
    sums = np.bincount(level, values, minlength=n_levels)
    return np.divide(sums, counts, out=np.full(n_levels, np.nan), where=counts > 0)


def _unit(values: np.ndarray) -> np.ndarray:
    """Centred and of length 1: the product of two is their correlation. Zeros of what does not vary."""
    centred = values - values.mean() if len(values) else values
    return centred / max(float(np.linalg.norm(centred)), 1e-300)


def _spearman(first: np.ndarray, second: np.ndarray) -> float:
    from scipy.stats import rankdata

    return _correlation(rankdata(first), rankdata(second))


def _correlation(first: np.ndarray, second: np.ndarray) -> float:
    """NaN where one does not vary, or of fewer than 3."""
    if len(first) < 3 or np.ptp(first) == 0 or np.ptp(second) == 0:
        return math.nan
    return float(np.corrcoef(first, second)[0, 1])
