"""The numbers of VISAEBench 0.1.0 as its wheel computes them, for comparison with what others print; faults included.

Ours beside them are what to trust. What is computed, on a store of all patches of every image:

    M1 Moran's I of codes on the grid of patches, 8 neighbours, over latents with 50 images of 5 to 90 % of the patches
       (of each the first 200, in batches of 64 images). No null: raw tokens are alike side by side too.
    M2 share of variance not explained. Its variances subtract the square of the summed means of the dimensions, not the
       sum of their squares: wrong wherever rows are not centred. Ours: reconstruction.
    M3 accuracy of a probe on mean-pooled x_hat over that on x, clamped to 0 and 2. Ours: kept.
    M4 area under accuracies of k-sparse probes, k 1 to 100. Latents are ranked on all images, the tested ones too, and
       k counts by its size, so that large k decide. Ours: probing.
    M5 score over each latent's 16 most active images, 1,000 random latents that fire; those without a pair are dropped.
       Ours: monosemanticity, with all images and intervals.
    M6 is left out: it needs EuroSAT and DTD, which are not here.
    M7 share of classes whose latents are those of their siblings, or whose 4-latent probe has an F1 more than .1 above
       that of 1 latent; fitted and asked on the same images. Siblings: labels of one parent in the taxonomy.

Rows are standardised as there: less the mean of each dimension, over one standard deviation of everything. Sums are
float64 here, float32 there. Shape suffixes: N images, P patches, D width, F latents, L labels.
"""

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from saevlm_fast.data.label_sets import LabelSet
from saevlm_fast.data.rows import Activations
from saevlm_fast.errors import require
from saevlm_fast.measures.results import Figures, Measured
from saevlm_fast.measures.subjects import ImageRows, Model, reconstruct
from saevlm_fast.measures.taxonomy import Taxonomy
from saevlm_fast.records import object_of

SEED = 42
KS = (1, 5, 10, 20, 50, 100)
_GROUP = 64  # images at a time, by which M1 counts its 200
_MOST_BYTES = 4 << 30  # of codes, all of them in memory


class Grid(NamedTuple):
    """Patches of an image, row by row."""

    height: int
    width: int

    def neighbours(self) -> Tensor:
        """float64 [P, P] of ones between patches that touch, corners too."""
        rows, columns = np.divmod(np.arange(self.height * self.width), self.width)
        near = (abs(rows[:, None] - rows) <= 1) & (abs(columns[:, None] - columns) <= 1)
        np.fill_diagonal(near, False)
        return torch.from_numpy(near.astype(np.float64))


def grid_of(activations: Activations, rows: ImageRows) -> Grid | str:
    """The grid of a store of all patches; or why there is none."""
    if rows.image_of_row is None:
        return "it needs a store of all patches of every image (harvest --tokens patches)"
    n_images = len(rows.ids)
    n_patches, rest = divmod(activations.n_rows, n_images)
    if rest or not np.array_equal(rows.image_of_row, np.repeat(np.arange(n_images), n_patches)):
        return "images have different numbers of rows; harvest --tokens patches"
    source = object_of(activations.source)
    grid = object_of(source.get("layout") or source.get("token_layout")).get("grid")
    side = math.isqrt(n_patches)
    height, width = grid if isinstance(grid, list) and len(grid) == 2 else (side, side)
    if source.get("tokens") not in (None, "patches") or height * width != n_patches:
        return f"{n_patches} rows an image of tokens {source.get('tokens')} are no grid of patches"
    return Grid(int(height), int(width))


class Pass(NamedTuple):
    """What one pass over the rows gives: codes_NF, max-pooled; means x_ND, x_hat_ND; and figures of M1 and M2."""

    codes_NF: np.ndarray
    x_ND: np.ndarray
    x_hat_ND: np.ndarray
    moran: Figures
    fvu: Figures


def visaebench_numbers(
    model: Model,
    activations: Activations,
    rows: ImageRows,
    label_sets: Sequence[LabelSet] = (),
    embeddings: Mapping[str, Activations] | None = None,
    taxonomy: Taxonomy | None = None,
) -> Measured:
    """M1 to M7 but M6. Of the first label set with one label an image, and the first embeddings.

    Raises:
        ValueError: the codes of all images take more than 4 GB.
    """
    grid = grid_of(activations, rows)
    if isinstance(grid, str):
        return Measured({"status": grid})
    n_bytes = 4 * len(rows.ids) * len(model.W_dec)
    require(
        n_bytes <= _MOST_BYTES,
        f"compat: codes of {len(rows.ids):,} images x {len(model.W_dec):,} latents take {n_bytes / 1e9:.1f} GB as "
        "visaebench keeps them, more than 4; give fewer images",
    )
    passed = _pass(model, activations, len(rows.ids), grid)
    figures: Figures = {"status": "defined", "version": "0.1.0", "M1": passed.moran, "M2": passed.fvu}
    shared = (each for each in label_sets if each.counts_L.max(initial=0) > 1)  # captions are not
    labels = next((each for each in shared if np.diff(each.offsets_N1).max(initial=0) <= 1), None)
    no_labels = "no label set has one label an image, and a label on two images"
    figures["M3"] = _missing(no_labels) if labels is None else _probe_kept(passed, labels)
    figures["M4"] = _missing(no_labels) if labels is None else _sparse_probes(passed.codes_NF, labels)
    name = next(iter(embeddings), None) if embeddings else None
    figures["M5"] = (
        _missing("no embeddings were given")
        if name is None or not embeddings
        else _score(passed.codes_NF, embeddings[name])
    )
    figures["M6"] = _missing("EuroSAT and DTD are not here")
    groups = {} if labels is None or taxonomy is None else sibling_groups(labels, taxonomy)
    figures["M7"] = (
        _absorption(passed.codes_NF, labels, groups)
        if groups and labels is not None
        else _missing("it needs labels and a taxonomy with three siblings")
    )
    return Measured(figures)


def _missing(why: str) -> Figures:
    return {"value": math.nan, "n": 0, "status": why}


def _figure(value: float, n: int, **more: Any) -> Figures:
    return {"value": value if n else math.nan, "n": n, "status": "defined" if n else "too few", **more}


# The pass: M1 and M2 --------------------------------------------------------------------------------------------------


def _images(activations: Activations, n_patches: int) -> Iterator[tuple[int, Tensor]]:
    """(first image, x [n, P, D]) of groups of images."""
    with closing(activations.chunks(_GROUP * n_patches)) as chunks:
        for start, x_BD in chunks:
            yield start // n_patches, x_BD.view(-1, n_patches, x_BD.shape[1])


def _standard(activations: Activations) -> tuple[Tensor, float]:
    """The mean of every dimension, and the standard deviation of all numbers around these."""
    total_D, squares, n = torch.zeros(activations.d, dtype=torch.float64), 0.0, activations.n_rows
    with closing(activations.chunks(1 << 14)) as chunks:
        for _, x_BD in chunks:
            total_D += x_BD.double().sum(0)
            squares += float(x_BD.double().pow(2).sum())
    mean_D = total_D / n
    return mean_D, math.sqrt(max(squares / (n * activations.d) - float(mean_D.pow(2).mean()), 1e-30))


@torch.no_grad()
def _pass(model: Model, activations: Activations, n_images: int, grid: Grid) -> Pass:
    n_patches, n_latents = grid.height * grid.width, len(model.W_dec)
    mean_D, std = _standard(activations)
    codes_NF = np.zeros((n_images, n_latents), np.float32)
    means = np.zeros((2, n_images, activations.d), np.float32)
    moran, sums, l0 = _Moran(grid, n_latents), np.zeros(4), 0.0
    for first, x_nPD in _images(activations, n_patches):
        held_BD = x_nPD.flatten(0, 1).to(model.b_dec)
        codes, x_hat_BD = reconstruct(model, held_BD)
        z_nPF = codes.dense().cpu().float().view(len(x_nPD), n_patches, n_latents)
        part = slice(first, first + len(x_nPD))
        codes_NF[part] = z_nPF.amax(1).numpy()
        both = [((each.cpu().double() - mean_D) / std) for each in (held_BD, x_hat_BD)]
        for kept, each in zip(means, both):
            kept[part] = each.view(len(x_nPD), n_patches, -1).mean(1).float().numpy()
        error = both[0] - both[1]
        sums += [float(each) for each in (both[0].sum(), both[0].pow(2).sum(), error.sum(), error.pow(2).sum())]
        l0 += float((z_nPF != 0).sum())
        moran.add(z_nPF)
    n = activations.n_rows
    variance, lost = sums[1] / n - (sums[0] / n) ** 2, sums[3] / n - (sums[2] / n) ** 2
    alive = int((codes_NF > 0).any(0).sum())
    fvu = _figure(lost / variance if variance > 0 else math.inf, n, l0=l0 / n, dead=n_latents - alive)
    return Pass(codes_NF, means[0], means[1], moran.figures(), fvu)


class _Moran:
    """M1: sums over images, latent by latent."""

    def __init__(self, grid: Grid, n_latents: int) -> None:
        self.near_PP = grid.neighbours()
        self.n_patches = len(self.near_PP)
        self.most = int(0.9 * self.n_patches)
        self.sum_F, self.count_F = np.zeros(n_latents), np.zeros(n_latents, np.int64)

    def add(self, z_nPF: Tensor) -> None:
        """A group of images; latents that have 200 already are passed over."""
        active_nF = (z_nPF != 0).sum(1)
        wanted_F = ((active_nF >= 5) & (active_nF <= self.most)).any(0).numpy() & (self.count_F < 200)
        some = torch.from_numpy(np.flatnonzero(wanted_F))
        z_nPf, active_nf = z_nPF[:, :, some].double(), active_nF[:, some]
        centred = z_nPf - z_nPf.mean(1, keepdim=True)
        below_nf = centred.pow(2).sum(1)
        above_nf = (centred * torch.einsum("pq,nqf->npf", self.near_PP, centred)).sum(1)
        valid_nf = (active_nf >= 5) & (active_nf <= self.most) & (below_nf > 1e-10)
        moran_nf = self.n_patches / float(self.near_PP.sum()) * above_nf / below_nf.clamp_min(1e-10)
        self.sum_F[some.numpy()] += torch.where(valid_nf, moran_nf, 0.0).sum(0).numpy()
        self.count_F[some.numpy()] += valid_nf.sum(0).numpy()

    def figures(self) -> Figures:
        """Of 500 latents at most."""
        chosen = np.flatnonzero(self.count_F >= 50)
        if len(chosen) > 500:
            chosen = np.sort(np.random.RandomState(SEED).choice(chosen, size=500, replace=False))
        moran_f = self.sum_F[chosen] / self.count_F[chosen]
        if not len(chosen):
            return _figure(math.nan, 0)
        expected = -1 / (self.n_patches - 1)
        return _figure(
            float(moran_f.mean()), len(chosen), non_localised=float((moran_f < 0.1).mean()), of_random_patches=expected
        )


# Of pooled codes ------------------------------------------------------------------------------------------------------


def _known(labels: LabelSet) -> tuple[np.ndarray, np.ndarray]:
    """Images with a label, and their labels."""
    y_N = labels.single()
    known = np.flatnonzero(y_N >= 0)
    return known, y_N[known]


def _split(places: np.ndarray, y_N: np.ndarray) -> list[np.ndarray]:
    """80 and 20 %, stratified where every label has two images."""
    from sklearn.model_selection import train_test_split

    stratify = y_N if np.bincount(y_N).min() >= 2 else None
    return train_test_split(places, y_N, test_size=0.2, stratify=stratify, random_state=SEED)


def _logistic(x_ND: np.ndarray, y_N: np.ndarray, most: int) -> Any:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return LogisticRegression(solver="lbfgs", max_iter=most, C=1.0, random_state=SEED).fit(x_ND, y_N)


def _ranked(codes_NF: np.ndarray, y_N: np.ndarray) -> np.ndarray:
    """Latents by ANOVA's F, the largest first."""
    from sklearn.feature_selection import f_classif

    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        return np.argsort(np.nan_to_num(f_classif(codes_NF, y_N)[0], nan=-np.inf))[::-1]


def _probe_kept(passed: Pass, labels: LabelSet) -> Figures:
    known, y_n = _known(labels)
    if len(np.unique(y_n)) < 2:
        return _missing("a single label")
    train, test, y_train, y_test = _split(known, y_n)
    probe = _logistic(passed.x_ND[train], y_train, 1000)
    accuracy, spliced = (float(probe.score(each[test], y_test)) for each in (passed.x_ND, passed.x_hat_ND))
    raw = spliced / accuracy if accuracy > 0 else 0.0
    return _figure(min(max(raw, 0.0), 2.0), len(test), unclamped=raw, accuracy=accuracy, accuracy_of_x_hat=spliced)


def _sparse_probes(codes_NF: np.ndarray, labels: LabelSet) -> Figures:
    known, y_n = _known(labels)
    if len(np.unique(y_n)) < 2:
        return _missing("a single label")
    ranked = _ranked(codes_NF[known], y_n)
    train, test, y_train, y_test = _split(known, y_n)
    ks = [k for k in KS if k <= codes_NF.shape[1]]
    found = []
    for k in ks:
        probe = _logistic(codes_NF[np.ix_(train, ranked[:k])], y_train, 500)
        found.append(float(probe.score(codes_NF[np.ix_(test, ranked[:k])], y_test)))
    area = float(np.trapezoid(found, x=ks) / (ks[-1] - ks[0])) if len(ks) > 1 else found[0]
    return _figure(area, len(test), accuracy={str(k): each for k, each in zip(ks, found)})


def _score(codes_NF: np.ndarray, embeddings: Activations) -> Figures:
    high_F, low_F = codes_NF.max(0), codes_NF.min(0)
    alive = np.flatnonzero(high_F > 0)
    if len(alive) > 1000:
        alive = np.sort(np.random.RandomState(SEED).choice(alive, size=1000, replace=False))
    k = min(16, len(codes_NF))
    range_F = np.where(high_F > low_F, high_F - low_F, 1.0)
    found = []
    for latent in alive:
        column = codes_NF[:, latent]
        tops = np.argpartition(column, -k)[-k:]
        weights = torch.from_numpy((column[tops] - low_F[latent]) / range_F[latent]).double()
        unit_kE = torch.nn.functional.normalize(embeddings.rows(torch.from_numpy(tops)).double(), dim=1)
        pairs = torch.outer(weights, weights).triu(1)
        if float(pairs.sum()) > 0:
            found.append(float((pairs * (unit_kE @ unit_kE.T)).sum() / pairs.sum()))
    return _figure(float(np.mean(found)) if found else math.nan, len(found), dropped=len(alive) - len(found))


def sibling_groups(labels: LabelSet, taxonomy: Taxonomy) -> dict[str, list[int]]:
    """Labels of one parent, three at least: of several paths the first."""
    found: dict[str, list[int]] = {}
    for number, name in enumerate(labels.names):
        paths = taxonomy.paths.get(name)
        if paths:
            found.setdefault("/".join(paths[0][:-1]), []).append(number)
    return {parent: members for parent, members in found.items() if len(members) >= 3}


def _absorption(codes_NF: np.ndarray, labels: LabelSet, groups: Mapping[str, Sequence[int]]) -> Figures:
    known, y_n = _known(labels)
    absorbed, overlaps = [], []
    for members in groups.values():
        inside = np.isin(y_n, members)
        if inside.sum() < 10:
            continue
        codes_GF, y_G = codes_NF[known[inside]], y_n[inside]
        tops = set(np.argsort(codes_GF.mean(axis=0))[-10:])
        for label in members:
            mine_G = (y_G == label).astype(np.int64)
            if min(mine_G.sum(), len(mine_G) - mine_G.sum()) < 3:
                continue
            own = set(np.argsort(codes_GF[y_G == label].mean(axis=0))[-10:])
            overlaps.append(len(own & tops) / len(own | tops))
            ranked = _ranked(codes_GF, mine_G)
            f1, f4 = (_f1(codes_GF[:, ranked[:k]], mine_G) for k in (1, 4))
            absorbed.append(f4 - f1 > 0.1 or overlaps[-1] > 0.5)
    if not absorbed:
        return _missing("no group of siblings has ten images, and three of a label")
    return _figure(float(np.mean(absorbed)), len(absorbed), groups=len(groups), mean_overlap=float(np.mean(overlaps)))


def _f1(x_Nk: np.ndarray, y_N: np.ndarray) -> float:
    from sklearn.metrics import f1_score

    return float(f1_score(y_N, _logistic(x_Nk, y_N, 500).predict(x_Nk), average="binary", zero_division=0.0))
