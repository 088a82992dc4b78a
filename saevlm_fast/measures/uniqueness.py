"""Whether latents see different images: the shared images of the top-16 sets of all pairs of latents, exactly.

Section 4 of arXiv 2504.02821: the sets of latents i and j share c of 16 images, their Jaccard index is c / (32 - c).
Latents with fewer than 16 images are left out. A set is a row of a sparse matrix A [T, N] of ones, so c of all pairs is
A A^T, block of rows by block: work and memory are those of the pairs that share something, sum over images of L^2
where L latents list an image. What shares nothing follows by subtraction.

Chance: two random 16-sets of N images share 256 / N. With the popularity of the images as it is, all pairs together
share sum_images C(L, 2) (an identity), and chance spreads that evenly over the P pairs: Poisson.
Shape suffixes: T latents with a full set, N images, M entries.
"""

import math
from typing import Any

import numpy as np

from saevlm_fast.measures.codes import TOP, KeptCodes
from saevlm_fast.measures.results import Figures, Measured

_BLOCK_PAIRS = 8_000_000  # entries of the product held at a time, counted generously
_NO_PARTNER = -1


def uniqueness(codes: KeptCodes, n_top: int = TOP, n_closest: int = 1000) -> Measured:
    """The histogram of shared images over all pairs, against chance; the closest pairs; each latent's nearest.

    Args:
        codes: of N images. n_top: size of the sets. n_closest: pairs that are listed, ties to the lower latents.

    Returns:
        figures: status (defined; too few: fewer than two latents with n_top images), latents, pairs, histogram
            [n_top + 1], expected_uniform, expected_popular, jaccard_above {"0": pairs, "0.5": pairs}, redundant_share
            (latents with any J above .5), distinct_images_share, popularity (histogram of L), shared (sum of
            c hist(c)). latents: top16_shared, top16_nearest (-1: none), top16_jaccard. pairs: kind jaccard.
    """
    latents_T, images_TP = codes.top_images(n_top)
    n_sets, n_latents = len(latents_T), codes.n_latents
    listed_N = np.bincount(images_TP.reshape(-1), minlength=codes.n_images)
    found = _shared(images_TP, codes.n_images, n_closest)
    n_pairs = n_sets * (n_sets - 1) // 2
    hist = found.hist
    hist[0] = n_pairs - hist[1:].sum()
    shared_S, nearest_S = np.zeros(n_latents, np.int16), np.full(n_latents, _NO_PARTNER, np.int64)
    shared_S[latents_T] = found.shared_T
    nearest_S[latents_T] = np.where(found.shared_T > 0, latents_T[found.nearest_T], _NO_PARTNER) if n_sets else []
    jaccard_S = np.full(n_latents, np.nan)
    jaccard_S[latents_T] = found.shared_T / (2 * n_top - found.shared_T)
    figures: Figures = {
        "status": "defined" if n_pairs else "too few",
        "latents": n_sets,
        "left_out": n_latents - n_sets,
        "n_top": n_top,
        "pairs": n_pairs,
        "histogram": hist.tolist(),
        **_against_chance(hist, listed_N, n_pairs, codes.n_images, n_top),
        "redundant_share": float((2 * n_top - found.shared_T < 2 * found.shared_T).mean()) if n_pairs else math.nan,
        "distinct_images_share": float((listed_N > 0).sum() / (n_top * n_sets)) if n_sets else math.nan,
        "popularity": np.bincount(listed_N[listed_N > 0]).tolist() if n_sets else [],
    }
    columns: dict[str, np.ndarray] = {"top16_shared": shared_S, "top16_nearest": nearest_S, "top16_jaccard": jaccard_S}
    first, second, shared = found.closest
    pairs: dict[str, np.ndarray] = {
        "kind": np.full(len(shared), "jaccard"),
        "latent": latents_T[first],
        "rank": np.arange(len(shared)),
        "other": latents_T[second],
        "value": shared / (2 * n_top - shared),
        "support": shared.astype(np.int64),
    }
    return Measured(figures, columns, pairs)


def _against_chance(hist: np.ndarray, listed_N: np.ndarray, n_pairs: int, n_images: int, n_top: int) -> Figures:
    """J > 0, .1, ..., .9 as pairs, and what the two kinds of chance expect of every c."""
    from scipy.stats import hypergeom, poisson

    c = np.arange(n_top + 1)
    jaccard = c / (2 * n_top - c)
    shared = int((listed_N.astype(np.int64) * (listed_N - 1) // 2).sum())
    uniform = hypergeom.pmf(c, n_images, n_top, n_top) if n_images >= n_top else np.zeros(len(c))
    popular = poisson.pmf(c, shared / n_pairs) if n_pairs else np.zeros(len(c))
    tail = float(hist[2:].sum())
    expected = float(n_pairs * popular[2:].sum())
    return {
        "shared": shared,
        "jaccard_above": {f"{j:g}": int(hist[jaccard > j].sum()) for j in np.arange(0, 10) / 10},
        "expected_uniform": (n_pairs * uniform).tolist(),
        "expected_popular": (n_pairs * popular).tolist(),
        "share_above_0": float(hist[1:].sum() / n_pairs) if n_pairs else math.nan,
        "two_or_more_over_chance": tail / expected if expected > 0 else math.nan,
    }


class _Shared:
    """Pairs by shared images: the histogram (its first number is filled by the caller), each latent's nearest."""

    def __init__(self, n_sets: int, n_top: int) -> None:
        self.hist = np.zeros(n_top + 1, np.int64)
        self.shared_T, self.nearest_T = np.zeros(n_sets, np.int64), np.zeros(n_sets, np.int64)
        self.closest = np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.int64)
        self._least = 1

    def add(self, first: int, product: Any, n_closest: int) -> None:
        """Rows first, first + 1, ... of A A^T."""
        n_sets, rows = len(self.shared_T), product.shape[0]
        row_M = np.repeat(np.arange(first, first + rows), np.diff(product.indptr))
        other_M, c_M = product.indices.astype(np.int64), product.data.astype(np.int64)
        c_M[other_M == row_M] = 0  # itself; every row has that entry, so none is empty
        keys_M = c_M * n_sets + (n_sets - 1 - other_M)
        best = np.maximum.reduceat(keys_M, product.indptr[:-1])
        self.shared_T[first : first + rows] = best // n_sets
        self.nearest_T[first : first + rows] = n_sets - 1 - best % n_sets
        above_M = other_M > row_M
        self.hist += np.bincount(c_M[above_M], minlength=len(self.hist))
        kept_M = above_M & (c_M >= self._least)
        self._keep(row_M[kept_M], other_M[kept_M], c_M[kept_M], n_closest)

    def _keep(self, row_M: np.ndarray, other_M: np.ndarray, c_M: np.ndarray, n_closest: int) -> None:
        columns = [np.concatenate(pair) for pair in zip(self.closest, (row_M, other_M, c_M))]
        order = np.lexsort((columns[1], columns[0], -columns[2]))[:n_closest]
        self.closest = columns[0][order], columns[1][order], columns[2][order]
        if len(order) == n_closest and n_closest:
            self._least = int(self.closest[2][-1])


def _shared(images_TP: np.ndarray, n_images: int, n_closest: int) -> _Shared:
    from scipy.sparse import csr_array

    n_sets, n_top = images_TP.shape
    found = _Shared(n_sets, n_top)
    if not n_sets:
        return found
    offsets = np.arange(n_sets + 1, dtype=np.int64) * n_top
    sets = csr_array((np.ones(images_TP.size, np.int16), images_TP.reshape(-1), offsets), shape=(n_sets, n_images))
    by_image = sets.T.tocsr()
    work_T = np.diff(by_image.indptr)[images_TP].sum(1)  # at most so many partners has a set
    for first, last in blocks(work_T, _BLOCK_PAIRS):
        found.add(first, sets[first:last] @ by_image, n_closest)
    return found


def blocks(work: np.ndarray, most: int) -> list[tuple[int, int]]:
    """Ranges of neighbours whose work together is at most `most`, or of one alone that is more."""
    ends = work.cumsum()
    found, first = [], 0
    while first < len(work):
        done = int(ends[first - 1]) if first else 0
        last = max(first + 1, int(np.searchsorted(ends, done + most, side="right")))
        found.append((first, last))
        first = last
    return found
