"""A label told by one latent: logistic regression on its activation, as saev (arXiv 2511.17735) reports it.

On one half of the images every label gets the latent of least logistic loss, out of those of largest average precision
there (saev tries all latents). On the other half R = 1 - L / L_bias says how much of the loss of knowing the label's
share alone the latent takes away: sums of both over the labels, so rare labels weigh as little as they cost. Beside it
stand mean average precision, the share of the label among the latent's 16 most active images, and the share of labels
with an average precision of .3 or more.

The fit: x is the activation over its root mean square where it is not 0; sum of log losses + w^2 / 2, as
scikit-learn's LogisticRegression with C = 1. All fits go on side by side by Newton's steps, on the active images alone:
the silent ones share one term. Shape suffixes: Q (latent, label) pairs, E active images of each.
"""

import math
from typing import NamedTuple

import numpy as np

from saevlm_fast.data.label_sets import LabelSet
from saevlm_fast.measures.codes import TOP, KeptCodes
from saevlm_fast.measures.results import Figures

CANDIDATES = 8
LEAST_LABELS = 5  # of which a mean of top images is told, if there are so many
_MOST_STEPS = 60
_BLOCK_ENTRIES = 4_000_000


class Fits(NamedTuple):
    """Of Q pairs: scale (root mean square), weight, bias; loss, summed over the images it was fitted on."""

    scale_Q: np.ndarray
    weight_Q: np.ndarray
    bias_Q: np.ndarray
    loss_Q: np.ndarray


class _Table(NamedTuple):
    """The images of Q pairs: of the active ones, pair after pair, activation and label; of the silent ones how many,
    and how many have the label."""

    counts_Q: np.ndarray
    x_E: np.ndarray
    has_E: np.ndarray
    silent_Q: np.ndarray
    silent_has_Q: np.ndarray

    def spread(self, values_Q: np.ndarray) -> np.ndarray:
        """[E]: each pair's value at its images."""
        return np.repeat(values_Q, self.counts_Q)

    def sums(self, values_E: np.ndarray) -> np.ndarray:
        """[Q]."""
        total_Q, some_Q = np.zeros(len(self.counts_Q)), self.counts_Q > 0
        if some_Q.any():
            total_Q[some_Q] = np.add.reduceat(values_E, (self.counts_Q.cumsum() - self.counts_Q)[some_Q])
        return total_Q

    def loss(self, weight_Q: np.ndarray, bias_Q: np.ndarray) -> np.ndarray:
        """[Q], summed over all images."""
        z_E = self.spread(weight_Q) * self.x_E + self.spread(bias_Q)
        active_Q = self.sums(_softplus(z_E) - self.has_E * z_E)
        return active_Q + self.silent_Q * _softplus(bias_Q) - self.silent_has_Q * bias_Q


def fit(codes: KeptCodes, labels: LabelSet, latents_Q: np.ndarray, labels_Q: np.ndarray) -> Fits:
    """Logistic regressions of labels on single latents, each latent with an active image."""
    counts_Q = codes.counts_S[latents_Q]
    blocks = np.flatnonzero(np.diff(counts_Q.cumsum() // _BLOCK_ENTRIES)) + 1
    parts = [_fit(codes, labels, *pairs) for pairs in zip(np.split(latents_Q, blocks), np.split(labels_Q, blocks))]
    return Fits(*(np.concatenate(columns) for columns in zip(*parts)))


def _fit(codes: KeptCodes, labels: LabelSet, latents_Q: np.ndarray, labels_Q: np.ndarray) -> Fits:
    table = _table(codes, labels, latents_Q, labels_Q, None)
    scale_Q = np.sqrt(table.sums(table.x_E**2) / np.maximum(codes.counts_S[latents_Q], 1))
    table = table._replace(x_E=table.x_E / table.spread(scale_Q))
    weight_Q, bias_Q = np.zeros(len(latents_Q)), _logit(labels, labels_Q)
    loss_Q = table.loss(weight_Q, bias_Q)
    for _ in range(_MOST_STEPS):
        step_w, step_b = _newton(table, weight_Q, bias_Q)
        size_Q = np.ones(len(weight_Q))
        for _ in range(30):  # halved where a whole step goes too far
            w_Q, b_Q = weight_Q - size_Q * step_w, bias_Q - size_Q * step_b
            next_Q = table.loss(w_Q, b_Q) + w_Q**2 / 2
            worse_Q = next_Q > loss_Q * (1 + 1e-14)
            if not worse_Q.any():
                break
            size_Q = np.where(worse_Q, size_Q / 2, size_Q)
        done = np.all(loss_Q - next_Q <= 1e-12 * loss_Q)
        weight_Q, bias_Q, loss_Q = w_Q, b_Q, next_Q
        if done:
            break
    return Fits(scale_Q, weight_Q, bias_Q, loss_Q - weight_Q**2 / 2)


def _newton(table: _Table, weight_Q: np.ndarray, bias_Q: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The step of each pair: inverse Hessian times gradient."""
    p_E = _logistic(table.spread(weight_Q) * table.x_E + table.spread(bias_Q))
    p_Q, s_E, off_E = _logistic(bias_Q), p_E * (1 - p_E), p_E - table.has_E
    gradient_w = table.sums(off_E * table.x_E) + weight_Q
    gradient_b = table.sums(off_E) + table.silent_Q * p_Q - table.silent_has_Q
    sx_E = s_E * table.x_E
    ww, wb = table.sums(sx_E * table.x_E) + 1, table.sums(sx_E)
    bb = table.sums(s_E) + table.silent_Q * p_Q * (1 - p_Q) + 1e-12
    determinant = ww * bb - wb**2
    step_w = (bb * gradient_w - wb * gradient_b) / determinant
    return step_w, (ww * gradient_b - wb * gradient_w) / determinant


def _logistic(z: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-np.clip(z, -500, 500)))


def _softplus(z: np.ndarray) -> np.ndarray:
    """log(1 + exp z); np.logaddexp takes four times as long."""
    return np.maximum(z, 0) + np.log1p(np.exp(-np.abs(z)))


def _logit(labels: LabelSet, labels_Q: np.ndarray) -> np.ndarray:
    """Of each label's share, one image more and one less than there are at the ends."""
    share_Q = np.clip(labels.counts_L[labels_Q], 0.5, labels.n_images - 0.5) / labels.n_images
    return np.log(share_Q / (1 - share_Q))


def _table(
    codes: KeptCodes, labels: LabelSet, latents_Q: np.ndarray, labels_Q: np.ndarray, scale_Q: np.ndarray | None
) -> _Table:
    counts_Q = codes.counts_S[latents_Q]
    first_Q = codes.offsets_S1[latents_Q] - (counts_Q.cumsum() - counts_Q)
    places_E = np.repeat(first_Q, counts_Q) + np.arange(counts_Q.sum())
    has_E = _has(labels, codes.images_M[places_E], np.repeat(labels_Q, counts_Q))
    x_E = codes.acts_M[places_E].astype(np.float64)
    x_E = x_E if scale_Q is None else x_E / np.repeat(scale_Q, counts_Q)
    silent_Q = (codes.n_images - counts_Q).astype(np.float64)
    table = _Table(counts_Q, x_E, has_E.astype(np.float64), silent_Q, silent_Q)
    return table._replace(silent_has_Q=labels.counts_L[labels_Q] - table.sums(table.has_E))


def _has(labels: LabelSet, images_E: np.ndarray, labels_E: np.ndarray) -> np.ndarray:
    """bool [E]: whether an image has a label."""
    if np.diff(labels.offsets_N1).max(initial=0) <= 1:
        return labels.single()[images_E] == labels_E
    keys = labels.images_M * len(labels.names) + labels.labels_M
    return np.isin(images_E.astype(np.int64) * len(labels.names) + labels_E, keys)


def told_by_one_latent(
    choosing: tuple[KeptCodes, LabelSet],
    held_out: tuple[KeptCodes, LabelSet],
    latents_Q: np.ndarray,
    labels_Q: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, Figures]:
    """(labels, their latents, figures) of the pair of least loss of each label.

    Args:
        choosing, held_out: codes and labels of both halves. latents_Q, labels_Q: candidates, labels ascending.
    """
    nothing = {"R": math.nan, "top16_purity": math.nan, "top16_labels": 0, "labels": 0, "status": "too few"}
    if not len(labels_Q):
        return labels_Q, latents_Q, nothing
    fits = fit(*choosing, latents_Q, labels_Q)
    order = np.lexsort((latents_Q, fits.loss_Q, labels_Q))
    best = order[np.append(True, np.diff(labels_Q[order]) != 0)]
    latents, which = latents_Q[best], labels_Q[best]
    found = Fits(*(each[best] for each in fits))
    loss = _table(*held_out, latents, which, found.scale_Q).loss(found.weight_Q, found.bias_Q)
    zeros = np.zeros(len(which))
    bias = _table(*held_out, latents, which, None).loss(zeros, _logit(choosing[1], which))
    top16_purity, n_top16 = _top_purity(*held_out, latents, which)
    figures: Figures = {
        "R": 1 - float(loss.sum() / bias.sum()),
        "interval_R": _interval(loss, bias),
        "top16_purity": top16_purity,
        "top16_labels": n_top16,
        "labels": len(which),
        "status": "defined",
    }
    return which, latents, figures


def _interval(loss: np.ndarray, bias: np.ndarray) -> list[float]:
    """95 %: labels drawn anew."""
    if len(loss) < 2:
        return [math.nan, math.nan]
    generator = np.random.default_rng(0)
    drawn = generator.multinomial(len(loss), np.full(len(loss), 1 / len(loss)), 1000)
    return [float(each) for each in np.quantile(1 - (drawn @ loss) / (drawn @ bias), [0.025, 0.975])]


def _top_purity(codes: KeptCodes, labels: LabelSet, latents: np.ndarray, which: np.ndarray) -> tuple[float, int]:
    """(mean share of the label among the 16 most active images, labels that it is of): latents on fewer images are left
    out, and where fewer than LEAST_LABELS are left it is NaN."""
    able, images_TP = codes.top_images(TOP)
    place_S = np.full(codes.n_latents, -1)
    place_S[able] = np.arange(len(able))
    kept = place_S[latents] >= 0
    if kept.sum() < min(LEAST_LABELS, max(len(which), 1)):
        return math.nan, int(kept.sum())
    images = images_TP[place_S[latents[kept]]].astype(np.int64)
    keys = labels.images_M * len(labels.names) + labels.labels_M
    return float(np.isin(images * len(labels.names) + which[kept][:, None], keys).mean()), int(kept.sum())
