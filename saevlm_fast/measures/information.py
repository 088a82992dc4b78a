"""How much firing tells of a label: mutual information in nats, with the correction of Miller and Madow.

The table of a latent is firing or silent x label, over the images; an image without a label is of a label of its own,
one of several labels counts once for each. Entropies of counts are too low by about (cells - 1) / (2 N), so

    I = H(fires) + H(label) - H(both) + (K_fires + K_label - K_both - 1) / (2 N)

with K the cells that are not empty. Of a latent that tells nothing the mean is then about 0, and values below 0 occur.
Shape suffixes: S latents, L labels, M (latent, label) pairs that meet.
"""

from typing import Any

import numpy as np

from saevlm_fast.data.label_sets import LabelSet
from saevlm_fast.measures.codes import KeptCodes
from saevlm_fast.measures.matching import row_of_entries


def mutual_information(codes: KeptCodes, labels: LabelSet) -> np.ndarray:
    """[S], nats. 0 of latents that fire on no image or on all of them; NaN without images.

    Args:
        codes: of N images. labels: of the same ones, of which all are taken to be known.
    """
    several_N = np.diff(labels.offsets_N1)
    counts_L = np.append(labels.counts_L, (several_N == 0).sum()).astype(np.float64)
    total = counts_L.sum()
    if not total:
        return np.full(codes.n_latents, np.nan)
    met = _met(codes, labels, several_N)
    latent_M, both_M, of_label_M = row_of_entries(met), met.data, counts_L[met.indices]
    fires_S = np.asarray(met.sum(1)).reshape(-1).astype(np.float64)
    silent_S, rest_M = total - fires_S, of_label_M - both_M
    # Labels that are not met are silent altogether.
    unmet_S = total - np.bincount(latent_M, of_label_M, minlength=codes.n_latents)
    information_S = unmet_S * np.log(total / np.maximum(silent_S, 1))
    for count_M, sums_S in ((both_M, fires_S), (rest_M, silent_S)):
        terms_M = _term(count_M, sums_S[latent_M] * of_label_M, total)
        information_S += np.bincount(latent_M, terms_M, minlength=codes.n_latents)
    cells_S = (counts_L > 0).sum() - np.bincount(latent_M[rest_M == 0], minlength=codes.n_latents)
    cells_S += np.diff(met.indptr)
    kinds_S = (fires_S > 0).astype(int) + (silent_S > 0)
    found_S = (information_S + (kinds_S + (counts_L > 0).sum() - cells_S - 1) / 2) / total
    return np.where(kinds_S == 2, found_S, 0.0)


def _met(codes: KeptCodes, labels: LabelSet, several_N: np.ndarray) -> Any:
    """scipy's CSR matrix [S, L + 1]: how often a latent fires on an image of each label, the last one of none."""
    from scipy.sparse import csr_array, hstack

    without = csr_array((several_N == 0).astype(np.float64)[:, None])
    met = (codes.matrix(np.ones(len(codes.acts_M))) @ hstack([labels.matrix(), without], format="csr")).tocsr()
    met.eliminate_zeros()
    return met


def _term(count: np.ndarray, product: np.ndarray, total: float) -> np.ndarray:
    """n log(n N / product), 0 of no count."""
    there = count > 0
    quotient = np.divide(count * total, product, out=np.ones(len(count)), where=there)
    return count * np.log(quotient)
