"""How well a few latents tell a label: k-sparse probes, as SAEBench fits them.

One label against the rest, balanced: all its images and as many others. The k latents whose means of the two differ
most on one half are given to a logistic regression (L2, C 1), whose accuracy on the other half counts. Half by ids
(label_sets.halves), others drawn by id as well, so that no order matters. Chance is .5.
"""

import math
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from saevlm_fast.data.label_sets import LabelSet
from saevlm_fast.measures.codes import KeptCodes
from saevlm_fast.measures.results import Figures, Measured, bootstrap_mean

KS = (1, 2, 5, 10, 20)
LEAST_POSITIVES = 8  # of a label, in each half
_MOST_IMAGES = 2000  # of each class, to fit on
_MOST_LABELS = 50  # spread evenly over those that have enough images, which are sorted


def sparse_probing(
    codes: KeptCodes,
    labels: LabelSet,
    half_N: np.ndarray,
    ids: Sequence[str],
) -> Measured:
    """Accuracy of probes of k latents, mean over labels.

    Args:
        codes, labels: of the same N images. half_N: the half to fit on. ids: of the images.

    Returns:
        figures: labels, accuracy {"1": {mean, interval}, ...}, chance. The status says where too few have enough.
    """
    known_N = labels.known_N
    codes, labels, half_N = codes.part(known_N), labels.part(known_N), half_N[known_N]
    draw_N = np.array([zlib.crc32(f"drawn {each}".encode()) for each, known in zip(ids, known_N) if known], np.int64)
    fits_L = np.minimum(labels.part(half_N).counts_L, labels.part(~half_N).counts_L) >= LEAST_POSITIVES
    chosen = np.flatnonzero(fits_L)
    chosen = chosen[np.linspace(0, len(chosen) - 1, min(_MOST_LABELS, len(chosen))).round().astype(int)]
    # Fewer images of the rest than of the label, as of one that nearly all have, cannot be balanced.
    by_image = codes.matrix().T.tocsr()
    probed = (_label(by_image, labels, half_N, draw_N, label) for label in chosen)
    accuracy = [each for each in probed if each is not None]
    found = np.array(accuracy).reshape(len(accuracy), len(KS))
    figures: Figures = {
        "status": "defined" if len(found) else "too few",
        "labels": len(found),
        "labels_with_enough": int(fits_L.sum()),
        "chance": 0.5,
        "accuracy": {
            str(k): {"mean": float(column.mean()) if len(column) else math.nan, "interval": bootstrap_mean(column)}
            for k, column in zip(KS, found.T)
        },
    }
    return Measured(figures)


def _label(by_image: Any, labels: LabelSet, half_N: np.ndarray, draw_N: np.ndarray, label: int) -> list[float] | None:
    has_N = np.zeros(labels.n_images, bool)
    has_N[labels.images_M[labels.labels_M == label]] = True
    sides = [_balanced(has_N, half, draw_N) for half in (half_N, ~half_N)]
    if min(len(side) for side in sides) < 2 * LEAST_POSITIVES:
        return None
    fit, test = (by_image[side] for side in sides)
    fit_has, test_has = (has_N[side] for side in sides)
    difference_S = np.abs(_means(fit[fit_has]) - _means(fit[~fit_has]))
    ranked = np.argsort(-difference_S, kind="stable")
    return [_accuracy(fit, fit_has, test, test_has, ranked[:k]) for k in KS]


def _means(matrix: Any) -> np.ndarray:
    return np.asarray(matrix.mean(0)).reshape(-1)


def _balanced(has_N: np.ndarray, half_N: np.ndarray, draw_N: np.ndarray) -> np.ndarray:
    """Images of a half, as many with the label as without, those of the lowest draws, ascending."""
    sides = [np.flatnonzero(half_N & which) for which in (has_N, ~has_N)]
    n = min(*(len(side) for side in sides), _MOST_IMAGES)
    drawn = [side[np.argsort(draw_N[side], kind="stable")[:n]] for side in sides]
    return np.sort(np.concatenate(drawn))


def _accuracy(fit: Any, fit_has: np.ndarray, test: Any, test_has: np.ndarray, latents: np.ndarray) -> float:
    from sklearn.linear_model import LogisticRegression

    x_fit, x_test = (each[:, latents].toarray().astype(np.float64) for each in (fit, test))
    mean, sd = x_fit.mean(0), x_fit.std(0)
    x_fit, x_test = ((each - mean) / np.where(sd > 0, sd, 1) for each in (x_fit, x_test))
    probe = LogisticRegression(C=1.0, max_iter=1000).fit(x_fit, fit_has)
    return float((((x_test @ probe.coef_[0] + probe.intercept_[0]) > 0) == test_has).mean())
