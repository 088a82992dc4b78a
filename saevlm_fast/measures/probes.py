"""How much of a representation's linear readability is kept: one logistic probe, asked of what takes its place.

The probe is fitted on the original vectors of one half of the images (standardised, C chosen on a fifth of that half)
and asked of the other half: of the original, and of the vectors in its place. kept = (accuracy - chance) / (accuracy of
the original - chance), never clamped, withheld where the original is hardly above chance. Chance is the share of the
most frequent label. A probe that is fitted anew says what can still be read at all.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saevlm_fast.data.label_sets import LabelSet
from saevlm_fast.data.rows import Activations
from saevlm_fast.measures.codes import KeptCodes
from saevlm_fast.measures.results import Figures, Measured, mean_figure, ratio, share
from saevlm_fast.measures.retrieval import NEIGHBOURS, nearest, overlap, queries_of, votes
from saevlm_fast.measures.subjects import ImageRows, Model, reconstruct
from saevlm_fast.peers import Peers, shared_chunks, summed

CS = (0.001, 0.01, 0.1, 1.0)
LEAST_MARGIN = 0.05  # of the original's accuracy over chance, below which no ratio is given
LEAST_OF_LABEL = 4  # images in the half to fit on
MOST_IMAGES = 5000


@dataclass(frozen=True)
class Probe:
    """A fitted probe: mean_D, sd_D of what it was fitted on, scikit-learn's model, the C that was chosen."""

    mean_D: np.ndarray | None
    sd_D: np.ndarray
    model: Any
    c: float

    @classmethod
    def fit(cls, x_ND: Any, y_N: np.ndarray, cs: Sequence[float] = CS) -> "Probe":
        """On vectors (an array, or a sparse one, which is not centred) and labels, numbers of two kinds at least."""
        dense = isinstance(x_ND, np.ndarray)
        mean_D = np.asarray(x_ND.mean(0)).reshape(-1)
        squares_D = np.zeros(0) if dense else np.asarray((x_ND**2).mean(0)).reshape(-1)
        # Of a constant column rounding may leave less than nothing.
        sd_D = x_ND.std(0) if dense else np.sqrt(np.maximum(squares_D - mean_D**2, 0.0))
        sd_D = np.where(sd_D > 1e-8 * max(float(sd_D.max()), 1e-30), sd_D, 1.0)
        where = mean_D if dense else None
        z_ND = _standardised(x_ND, where, sd_D)
        checked_N = np.arange(len(y_N)) % 5 == 4
        usable = len(np.unique(y_N[~checked_N])) > 1 and checked_N.any()
        scores = (
            [(_logistic(z_ND[~checked_N], y_N[~checked_N], c).score(z_ND[checked_N], y_N[checked_N]), -c) for c in cs]
            if usable
            else [(0.0, -cs[-1])]
        )
        c = -max(scores)[1]
        return cls(where, sd_D, _logistic(z_ND, y_N, c), c)

    def right(self, x_ND: Any, y_N: np.ndarray) -> np.ndarray:
        """bool [N]: whether it names each one's label."""
        return self.model.predict(_standardised(x_ND, self.mean_D, self.sd_D)) == y_N


def _standardised(x_ND: Any, mean_D: np.ndarray | None, sd_D: np.ndarray) -> Any:
    return (x_ND - mean_D) / sd_D if mean_D is not None else (x_ND * (1 / sd_D)).tocsr()


def _logistic(x_ND: np.ndarray, y_N: np.ndarray, c: float) -> Any:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return LogisticRegression(C=c, max_iter=300).fit(x_ND, y_N)


@dataclass(frozen=True)
class ProbeSet:
    """One label set's images, split for probes.

    Attributes:
        y_N: int64, the label of each image, -1 of those that are left out. fit_N, test_N: bool. chance: of test_N.
    """

    y_N: np.ndarray
    fit_N: np.ndarray
    test_N: np.ndarray
    chance: float

    @classmethod
    def of(cls, labels: LabelSet, half_N: np.ndarray) -> "ProbeSet | None":
        """None where an image has several labels, or fewer than two labels have enough images."""
        if np.diff(labels.offsets_N1).max(initial=0) > 1:
            return None
        y_N = labels.single()
        counts = [np.bincount(y_N[side & (y_N >= 0)], minlength=len(labels.names)) for side in (half_N, ~half_N)]
        enough_L = (counts[0] >= LEAST_OF_LABEL) & (counts[1] > 0)
        if enough_L.sum() < 2:
            return None
        y_N = np.where((y_N >= 0) & enough_L[y_N], y_N, -1)
        test_N = ~half_N & (y_N >= 0)
        chance = np.bincount(y_N[test_N]).max() / test_N.sum()
        return cls(y_N, half_N & (y_N >= 0), test_N, float(chance))

    def fit(self, x_ND: Any) -> Probe:
        """A probe of the half to fit on."""
        return Probe.fit(x_ND[self.fit_N], self.y_N[self.fit_N])

    def right(self, probe: Probe, x_ND: Any) -> np.ndarray:
        """bool, of the other half."""
        return probe.right(x_ND[self.test_N], self.y_N[self.test_N])


def kept(found_N: np.ndarray, original_N: np.ndarray, chance: float) -> Figures:
    """(accuracy - chance) / (accuracy of the original - chance): a ratio, of bools of the same images."""
    return ratio(found_N.astype(float) - chance, original_N.astype(float) - chance, LEAST_MARGIN)


# Of the rows of a store: x and what the SAE makes of it ---------------------------------------------------------------


def representation_kept(
    model: Model,
    activations: Activations,
    rows: ImageRows,
    codes: KeptCodes,
    label_sets: Sequence[LabelSet],
    half_N: np.ndarray,
    batch_rows: int = 4096,
    most_images: int = MOST_IMAGES,
    peers: Peers | None = None,
) -> Callable[[], Measured]:
    """Probe, neighbours and nearest-neighbour accuracy of x_hat (and of codes) in place of x.

    The pass over the rows is done now, by all ranks of peers; what is returned makes the measure of it, on any of them.

    Both are averaged over the rows of an image; codes are those that were kept, pooled. Of at most most_images images,
    evenly spaced.
    """
    chosen = queries_of(len(rows.ids), most_images).numpy()
    if len(chosen) <= NEIGHBOURS:
        return lambda: Measured({"status": "too few", "n": len(chosen)})
    both = _both(model, activations, rows, chosen, batch_rows, peers)
    return lambda: _kept(*both, chosen, codes, label_sets, half_N)


def _kept(
    x_ND: Tensor,
    x_hat_ND: Tensor,
    chosen: np.ndarray,
    codes: KeptCodes,
    label_sets: Sequence[LabelSet],
    half_N: np.ndarray,
) -> Measured:
    """Of the chosen images among those of the codes."""
    keep_N = np.zeros(codes.n_images, bool)
    keep_N[chosen] = True
    codes = codes.part(keep_N)
    codes_NS = codes.matrix().T.tocsr()
    near, found = nearest(x_ND), {"x_hat": nearest(x_hat_ND), "codes": nearest(codes_NS)}
    figures: Figures = {
        "status": "defined",
        "n": len(chosen),
        "neighbours": NEIGHBOURS,
        "overlap_chance": NEIGHBOURS / (len(chosen) - 1),
        "overlap": {name: mean_figure(overlap(near, each).numpy()) for name, each in found.items()},
        "sets": {},
    }
    for labels in label_sets:
        split = ProbeSet.of(labels.part(keep_N), half_N[keep_N])
        if split is None:
            figures["sets"][labels.name] = {"status": "too few"}
            continue
        one = _probed(split, x_ND, x_hat_ND, codes_NS) | _voted(split, len(labels.names), near, found)
        figures["sets"][labels.name] = {"status": "defined", "chance": split.chance} | one
    return Measured(figures)


def _probed(split: ProbeSet, x_ND: Tensor, x_hat_ND: Tensor, codes_NS: Any) -> Figures:
    x, x_hat = x_ND.double().numpy(), x_hat_ND.double().numpy()
    probe = split.fit(x)
    original_N = split.right(probe, x)
    found = {
        "x_hat": split.right(probe, x_hat),
        "x_hat_refitted": split.right(split.fit(x_hat), x_hat),
        "codes_refitted": split.right(split.fit(codes_NS), codes_NS),
    }
    return {
        "probe": {
            "c": probe.c,
            "accuracy": {"x": share(original_N)} | {name: share(each) for name, each in found.items()},
            "kept": {name: kept(each, original_N, split.chance) for name, each in found.items()},
        }
    }


def _voted(split: ProbeSet, n_labels: int, near: Tensor, found: dict[str, Tensor]) -> Figures:
    """Nearest-neighbour accuracy of the images with a label."""
    known_N, labels_N = split.y_N >= 0, torch.from_numpy(split.y_N)
    voted = {"x": near, **found}
    right = {name: (votes(each, labels_N, n_labels).numpy() == split.y_N)[known_N] for name, each in voted.items()}
    chance = float(np.bincount(split.y_N[known_N]).max() / known_N.sum())
    return {
        "knn": {
            "chance": chance,
            "accuracy": {name: share(each) for name, each in right.items()},
            "kept": {name: kept(right[name], right["x"], chance) for name in found},
        }
    }


def _both(
    model: Model,
    activations: Activations,
    rows: ImageRows,
    chosen: np.ndarray,
    batch_rows: int,
    peers: Peers | None,
) -> tuple[Tensor, Tensor]:
    """float32 [n, D] twice: x and x_hat of the chosen images, means over their rows."""
    place_N = np.full(len(rows.ids), -1)
    place_N[chosen] = np.arange(len(chosen))
    image_of_row = np.arange(activations.n_rows) if rows.image_of_row is None else rows.image_of_row
    place_of_row = torch.from_numpy(place_N[image_of_row])
    sums = torch.zeros(2, len(chosen), activations.d, dtype=torch.float64)
    with torch.no_grad():
        for start, x_BD in shared_chunks(peers, activations.chunks, activations.n_rows, batch_rows):
            places = place_of_row[start : start + len(x_BD)]
            x_BD, places = x_BD[places >= 0], places[places >= 0]
            if not len(x_BD):
                continue
            sums[0].index_add_(0, places, x_BD.double())
            sums[1].index_add_(0, places, reconstruct(model, x_BD)[1].to("cpu", torch.float64))
    sums = sums if peers is None else summed(peers, sums)
    counts = torch.bincount(place_of_row[place_of_row >= 0], minlength=len(chosen))[:, None]
    return (sums[0] / counts).float(), (sums[1] / counts).float()
