"""Where decoder rows lie, which latents fire together, and how far two SAEs found the same.

Neighbours are exact, block by block: 2 S^2 D multiplications. Co-firing is the sparse product of the firing sets, of
which only pairs with some support are kept: phi is the correlation of the two indicators, 0 where they are independent.
Shape suffixes: S latents, F those of the other SAE, D d_in, N images, M entries.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from saevlm_fast.errors import require
from saevlm_fast.measures.codes import KeptCodes
from saevlm_fast.measures.matching import TOP_CANDIDATES, row_of_entries, sparse_assignment, top_of_groups
from saevlm_fast.measures.results import Figures, Measured
from saevlm_fast.measures.uniqueness import blocks

SHARED = 0.7  # cosine from which two latents count as the same, the usual rule
_BLOCK = 2048
_BLOCK_PAIRS = 8_000_000
_RANDOM_ROWS = 1024
_ROUNDING = 1e-12


def geometry(
    codes: KeptCodes, W_dec_SD: Tensor, W_enc_DS: Tensor | None, n_neighbours: int = 8, least_support: int = 10
) -> Measured:
    """Decoder neighbours and co-firing of every latent.

    Args:
        codes: of N images. W_dec_SD: decoder rows of any length. W_enc_DS: encoder columns, None of what has none.
        n_neighbours: kept of each latent, of either kind. least_support: images that a co-firing pair shares.

    Returns:
        figures: nearest_cosine {mean, median, above_0.7}, random (the same of random directions), bound,
            encoder_cosine, cofiring {pairs, pairs_with_support, mean_best_phi}. latents: decoder_nearest,
            decoder_cosine, decoder_norm, encoder_cosine, cofiring_nearest (-1: none), cofiring_phi, cofiring_support.
            pairs: decoder, cofiring.
    """
    rows_SD = normalize(W_dec_SD.detach().float().cpu(), dim=1)
    n, d = rows_SD.shape
    cosine_SK, other_SK = nearest(rows_SD, rows_SD, n_neighbours, same=True)
    best_S = cosine_SK[:, 0] if cosine_SK.shape[1] else np.full(n, np.nan)
    figures: Figures = {
        "nearest_cosine": _spread(best_S),
        "random": random_level(n, n, d, same=True),
        "bound": math.sqrt(1 - n ** (-2 / (d - 1))) if d > 1 and n > 1 else math.nan,
    }
    columns: dict[str, np.ndarray] = {
        "decoder_nearest": other_SK[:, 0] if other_SK.shape[1] else np.full(n, -1),
        "decoder_cosine": best_S,
        "decoder_norm": W_dec_SD.detach().float().cpu().norm(dim=1).numpy(),
    }
    if W_enc_DS is not None:
        aligned_S = (normalize(W_enc_DS.detach().float().cpu().T, dim=1) * rows_SD).sum(1).numpy()
        columns["encoder_cosine"] = aligned_S
        figures["encoder_cosine"] = float(aligned_S.mean())
    together = cofiring(codes, n_neighbours, least_support)
    figures["cofiring"] = together.figures
    pairs = {
        "kind": np.full(cosine_SK.size, "decoder"),
        "latent": np.repeat(np.arange(n), cosine_SK.shape[1]),
        "rank": np.tile(np.arange(cosine_SK.shape[1]), n),
        "other": other_SK.reshape(-1),
        "value": cosine_SK.reshape(-1).astype(np.float64),
        "support": np.zeros(cosine_SK.size, np.int64),
    }
    joined = {name: np.concatenate([pairs[name], together.pairs[name]]) for name in pairs}
    return Measured(figures, columns | together.latents, joined)


def _spread(best_S: np.ndarray) -> Figures:
    there = best_S[np.isfinite(best_S)]
    if not len(there):
        return {"mean": math.nan, "median": math.nan, "above_0.7": math.nan}
    return {
        "mean": float(there.mean()),
        "median": float(np.median(there)),
        "above_0.7": float((there > SHARED).mean()),
    }


def nearest(rows_SD: Tensor, others_FD: Tensor, k: int, same: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """(cosines [S, k], which [S, k]) of the nearest of unit rows, the nearest first. same: a row is not its own."""
    k = min(k, len(others_FD) - same)
    if k <= 0:
        return np.zeros((len(rows_SD), 0), np.float32), np.zeros((len(rows_SD), 0), np.int64)
    cosines, which = [], []
    for first in range(0, len(rows_SD), _BLOCK):
        product = rows_SD[first : first + _BLOCK] @ others_FD.T
        if same:
            own = torch.arange(len(product))
            product[own, own + first] = -2.0
        top = product.topk(k, dim=1)
        cosines.append(top.values)
        which.append(top.indices)
    return torch.cat(cosines).numpy(), torch.cat(which).numpy()


def random_level(n: int, n_others: int, d: int, same: bool = False) -> float:
    """The mean cosine of a random direction to the nearest of n_others random ones, of some of n."""
    generator = torch.Generator().manual_seed(0)
    others_FD = normalize(torch.randn(n_others, d, generator=generator), dim=1)
    some = min(n, _RANDOM_ROWS)
    rows_SD = others_FD[:some] if same else normalize(torch.randn(some, d, generator=generator), dim=1)
    cosines, _ = nearest(rows_SD, others_FD, 1, same=same)
    return float(cosines.mean()) if cosines.size else math.nan


# Co-firing ------------------------------------------------------------------------------------------------------------


def cofiring(codes: KeptCodes, n_neighbours: int = 8, least_support: int = 10) -> Measured:
    """Pairs of latents by phi, among those that fire on least_support images together."""
    matrix = codes.matrix(np.ones(len(codes.acts_M), np.int32))
    by_image = matrix.T.tocsr()
    work_S = np.zeros(codes.n_latents, np.int64)
    np.add.at(work_S, codes.latents_M, np.diff(by_image.indptr)[codes.images_M])
    n_pairs = n_supported = 0
    kept: list[tuple[np.ndarray, ...]] = []
    for first, last in blocks(work_S, _BLOCK_PAIRS):
        product = matrix[first:last] @ by_image
        rows, others, support = row_of_entries(product) + first, product.indices.astype(np.int64), product.data
        n_pairs += int((others != rows).sum())
        supported = (others != rows) & (support >= least_support)
        rows, others, support = rows[supported], others[supported], support[supported].astype(np.int64)
        n_supported += len(rows)
        phi = phi_of(support, codes.counts_S[rows], codes.counts_S[others], codes.n_images)
        top = top_of_groups(rows, phi, n_neighbours, others)
        kept.append((rows[top], others[top], phi[top], support[top]))
    rows, others, phi, support = (
        (np.concatenate(columns) for columns in zip(*kept)) if kept else (np.zeros(0, np.int64),) * 4
    )
    starts = np.flatnonzero(np.append(True, rows[1:] != rows[:-1])) if len(rows) else np.zeros(0, np.int64)
    columns = _best(codes.n_latents, rows[starts], others[starts], phi[starts], support[starts])
    ranks = np.arange(len(rows)) - np.repeat(starts, np.diff(np.append(starts, len(rows))))
    best = columns["cofiring_phi"]
    figures: Figures = {
        "pairs": n_pairs // 2,
        "pairs_with_support": n_supported // 2,
        "least_support": least_support,
        "latents_with_a_partner": len(starts),
        "mean_best_phi": float(np.nanmean(best)) if len(starts) else math.nan,
    }
    values = {"rank": ranks, "other": others, "value": phi.astype(np.float64), "support": support}
    pairs = {"kind": np.full(len(rows), "cofiring"), "latent": rows, **values}
    return Measured(figures, columns, pairs)


def _best(
    n_latents: int, rows: np.ndarray, others: np.ndarray, phi: np.ndarray, support: np.ndarray
) -> dict[str, np.ndarray]:
    other_S, phi_S = np.full(n_latents, -1, np.int64), np.full(n_latents, np.nan)
    support_S = np.zeros(n_latents, np.int64)
    other_S[rows], phi_S[rows], support_S[rows] = others, phi, support
    return {"cofiring_nearest": other_S, "cofiring_phi": phi_S, "cofiring_support": support_S}


def phi_of(both: np.ndarray, first: np.ndarray, second: np.ndarray, n: int) -> np.ndarray:
    """The correlation of two firing indicators from their counts; 0 where one of them is constant."""
    both, first, second = (each.astype(np.float64) for each in (both, first, second))
    spread = np.sqrt(first * (n - first) * second * (n - second))
    return np.divide(n * both - first * second, spread, out=np.zeros(len(both)), where=spread > 0)


# Two SAEs -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Side:
    """One of two that are compared: its decoder, its encoder if it has one, its codes of the same images."""

    W_dec_SD: Tensor
    W_enc_DS: Tensor | None
    codes: KeptCodes


def compare(first: Side, second: Side) -> Figures:
    """How far two SAEs found the same latents.

    Args:
        first, second: of S and F latents on the same activations and the same N images.

    Returns:
        mmcs (mean of the largest cosine, both ways), random (of random directions, both ways), shared_share (cosine of
        .7 or more among those matched by the Hungarian method on 32 candidates each way, of the smaller SAE's latents),
        shared_share_both (the encoder's cosine too), frequency_weighted (weighted by the first one's firing counts),
        matched_cosine, mutual_nearest (share of the first one's latents that are each other's nearest, and of those the
        mean cosine), code_correlation (mean over the matched that fire). Shares of dictionaries of unlike size do not
        compare: chance rises with size.

    Raises:
        ValueError: other widths, or other numbers of images.
    """
    d, d_other = first.W_dec_SD.shape[1], second.W_dec_SD.shape[1]
    require(d == d_other, f"compare: decoders of widths {d} and {d_other}")
    n, n_other = first.codes.n_images, second.codes.n_images
    require(n == n_other, f"compare: codes of {n} and {n_other} images")
    rows, others = (normalize(side.W_dec_SD.detach().float().cpu(), dim=1) for side in (first, second))
    there, back = nearest(rows, others, TOP_CANDIDATES), nearest(others, rows, TOP_CANDIDATES)
    matched = _matched(there, back, (len(rows), len(others)))
    cosine = (rows[matched[0]] * others[matched[1]]).sum(1).numpy()
    smaller = min(len(rows), len(others))
    same = cosine >= SHARED
    weights = first.codes.counts_S.astype(np.float64)
    own = np.arange(len(rows))
    mutual = back[1][there[1][:, 0], 0] == own
    figures: Figures = {
        "latents": [len(rows), len(others)],
        "mmcs": [float(there[0][:, 0].mean()), float(back[0][:, 0].mean())],
        "random": [random_level(len(rows), len(others), d), random_level(len(others), len(rows), d)],
        "matched": len(matched[0]),
        "matched_cosine": float(cosine.mean()) if len(cosine) else math.nan,
        "shared_share": float(same.sum() / smaller),
        "frequency_weighted": float(weights[matched[0]][same].sum() / weights.sum()) if weights.sum() else math.nan,
        "mutual_nearest": float(mutual.mean()),
        "mutual_nearest_cosine": float(there[0][mutual, 0].mean()) if mutual.any() else math.nan,
    }
    if first.W_enc_DS is not None and second.W_enc_DS is not None:
        encoders = [normalize(side.W_enc_DS.detach().float().cpu().T, dim=1) for side in (first, second)]  # type: ignore[union-attr]
        both = same & ((encoders[0][matched[0]] * encoders[1][matched[1]]).sum(1).numpy() >= SHARED)
        figures["shared_share_both"] = float(both.sum() / smaller)
    figures["code_correlation"] = _code_correlation(first.codes, second.codes, *matched)
    return figures


def _matched(
    there: tuple[np.ndarray, np.ndarray], back: tuple[np.ndarray, np.ndarray], shape: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Hungarian on the candidates of both directions."""
    n_first, n_second = shape
    rows = np.concatenate([np.repeat(np.arange(n_first), there[1].shape[1]), back[1].reshape(-1)])
    columns = np.concatenate([there[1].reshape(-1), np.repeat(np.arange(n_second), back[1].shape[1])])
    weights = np.concatenate([there[0].reshape(-1), back[0].reshape(-1)])
    _, once = np.unique(rows * n_second + columns, return_index=True)
    return sparse_assignment(rows[once], columns[once], weights[once], shape)


def _code_correlation(first: KeptCodes, second: KeptCodes, rows: np.ndarray, columns: np.ndarray) -> float:
    """The mean Pearson correlation of matched latents' activations over all images, of those that vary."""
    if not len(rows):
        return math.nan
    mine, other = (codes.matrix(codes.acts_M.astype(np.float64)) for codes in (first, second))
    mine, other = mine[rows], other[columns]
    n = first.n_images
    product = np.asarray(mine.multiply(other).sum(1)).reshape(-1)
    moments = [(np.asarray(m.sum(1)).reshape(-1), np.asarray(m.power(2).sum(1)).reshape(-1)) for m in (mine, other)]
    (sum_a, square_a), (sum_b, square_b) = moments
    variance = (n * square_a - sum_a**2) * (n * square_b - sum_b**2)
    varies = variance > _ROUNDING * n * n * square_a * square_b  # a constant latent's is rounding
    correlation = (n * product - sum_a * sum_b)[varies] / np.sqrt(variance[varies])
    return float(correlation.mean()) if len(correlation) else math.nan
