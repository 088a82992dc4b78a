"""Reconstruction and sparsity of a whole set in one pass: measured on rows as they come, never averaged over batches.

Explained variance is 1 - sum_d Var(x - x_hat) / sum_d Var(x) over the set. Relative bias is E|x_hat|^2 / E[x x_hat]
(1 where reconstructions are neither too long nor too short), the norm ratio E|x_hat| / E|x|. A latent that fires on
none of N rows fires on less than 3 / N of all (95 %). Shape suffixes: B rows of a chunk, D d_in, S latents, G prefixes.
"""

import math
from functools import partial

import numpy as np
import torch
from torch import Tensor

from saevlm_fast.measures.codes import KeptCodes
from saevlm_fast.measures.results import Figures, Measured
from saevlm_fast.peers import Peers, summed
from saevlm_fast.scoring.sums import STATUSES
from saevlm_fast.sparse_codes import SparseCodes

DECILES = tuple(round(0.1 * i, 1) for i in range(11))
DENSE = (0.01, 0.1)  # firing rates above which a latent is called dense


class ReconstructionSums:
    """Sums over rows: `add` chunk by chunk, then `result`. They depend on neither order nor chunks beyond rounding.

    Args:
        n_latents: S. group_ends: where the prefixes end, the last at S. shift_D: near the mean, for rounding.
    """

    def __init__(self, n_latents: int, group_ends: tuple[int, ...], shift_D: Tensor) -> None:
        self.n_latents, self.group_ends, self.shift_D = n_latents, group_ends, shift_D.detach().double()
        n_groups, d_in = len(group_ends), len(shift_D)
        zeros = partial(torch.zeros, dtype=torch.float64, device=shift_D.device)
        self.n_rows = 0
        self.x_2D = zeros(2, d_in)  # sums of x - shift, squared
        self.error_G2D = zeros(n_groups, 2, d_in)
        self.lengths_5 = zeros(5)  # |x|, |x_hat|, |x_hat|^2, x x_hat, ratio
        self.n_fired_S = torch.zeros(n_latents, dtype=torch.int64)
        self.mass_S = torch.zeros(n_latents, dtype=torch.float64)
        self.l0_hist = np.zeros(1, np.int64)
        self.l0_G = np.zeros(n_groups)

    def add(self, x_BD: Tensor, codes: SparseCodes, x_hat_GBD: Tensor) -> None:
        """Rows, their codes, and what each prefix reconstructs of them."""
        centred_BD = x_BD.double() - self.shift_D
        self.x_2D += torch.stack([centred_BD.sum(0), (centred_BD**2).sum(0)])
        error_GBD = x_BD.double() - x_hat_GBD.double()
        self.error_G2D += torch.stack([error_GBD.sum(1), (error_GBD**2).sum(1)], 1)
        self._add_lengths(x_BD.double(), x_hat_GBD[-1].double())
        self._add_codes(codes)
        self.n_rows += len(x_BD)

    def _add_lengths(self, x_BD: Tensor, x_hat_BD: Tensor) -> None:
        x_B, x_hat_B = x_BD.norm(dim=1), x_hat_BD.norm(dim=1)
        ratio_B = torch.where(x_B > 0, x_hat_B / x_B, torch.ones_like(x_B))
        products = [x_B, x_hat_B, x_hat_B**2, (x_BD * x_hat_BD).sum(1), ratio_B]
        self.lengths_5 += torch.stack([each.sum() for each in products])

    def _add_codes(self, codes: SparseCodes) -> None:
        codes = codes.rows().to("cpu").compact()
        acts_M, latents_M, _ = codes.csr()
        self.n_fired_S += torch.bincount(latents_M, minlength=self.n_latents)
        self.mass_S.index_add_(0, latents_M, acts_M.double())
        hist = np.bincount(codes.l0().numpy())
        if len(hist) > len(self.l0_hist):
            self.l0_hist = np.pad(self.l0_hist, (0, len(hist) - len(self.l0_hist)))
        self.l0_hist[: len(hist)] += hist
        ascending = latents_M.sort().values
        self.l0_G += torch.searchsorted(ascending, torch.tensor(self.group_ends)).numpy()

    def merge_ranks(self, peers: Peers) -> None:
        """Takes in the other ranks' rows, rank after rank."""
        self.x_2D, self.error_G2D = summed(peers, self.x_2D), summed(peers, self.error_G2D)
        self.lengths_5, self.mass_S = summed(peers, self.lengths_5), summed(peers, self.mass_S)
        self.n_fired_S = summed(peers, self.n_fired_S)
        known = peers.collect((self.n_rows, self.l0_hist, self.l0_G))
        self.n_rows, self.l0_G = sum(n for n, _, _ in known), np.sum([each for _, _, each in known], axis=0)
        self.l0_hist = np.zeros(max(len(each) for _, each, _ in known), np.int64)
        for _, each, _ in known:
            self.l0_hist[: len(each)] += each

    def result(self, k: int | None, images: KeptCodes) -> Measured:
        """The figures. k: that the SAE was trained for, if any. images: the same codes, pooled to images."""
        n = max(self.n_rows, 1)
        ev_G, total = self.explained()
        x, x_hat, x_hat_2, product, ratio = (self.lengths_5 / n).tolist()
        deciles = hist_quantiles(self.l0_hist, DECILES)
        l0 = float((self.l0_hist * np.arange(len(self.l0_hist))).sum() / n)
        figures: Figures = {
            "rows": self.n_rows,
            "explained_variance": ev_G[-1],
            "variance": total,
            "norm_ratio": x_hat / x if x else math.nan,
            "mean_norm_ratio": ratio,
            "relative_bias": x_hat_2 / product if product > 0 else math.nan,
            "k": k,
            "l0": l0,
            "l0_deciles": deciles,
            "threshold_drift": l0 / k - 1 if k else math.nan,
            "prefixes": [
                {"latents": end, "explained_variance": ev, "l0": float(l0_g / n)}
                for end, ev, l0_g in zip(self.group_ends, ev_G, self.l0_G)
            ],
        }
        rate_S = self.n_fired_S.numpy() / n
        figures |= usage(rate_S, self.mass_S.numpy(), self.n_rows)
        counts_S = images.counts_S
        return Measured(figures, self._columns(rate_S, counts_S, images))

    def _columns(self, rate_S: np.ndarray, counts_S: np.ndarray, images: KeptCodes) -> dict[str, np.ndarray]:
        most_S = np.zeros(self.n_latents, np.float32)
        np.maximum.at(most_S, images.latents_M, images.acts_M)
        fired_S = self.n_fired_S.numpy()
        return {
            "status": np.array(STATUSES)[images.status_S],
            "n_active": counts_S,
            "rate_images": counts_S / max(images.n_images, 1),
            "rate_rows": rate_S,
            "rows_per_image": np.divide(fired_S, counts_S, out=np.full(len(fired_S), np.nan), where=counts_S > 0),
            "mean_activation": np.divide(
                self.mass_S.numpy(), fired_S, out=np.full(len(fired_S), np.nan), where=fired_S > 0
            ),
            "max_activation": most_S,
        }

    def explained(self) -> tuple[list[float], float]:
        """Explained variance of every prefix, and the variance of the rows; NaN of rows that are all the same."""
        n = max(self.n_rows, 1)
        x_2D, error_G2D = self.x_2D / n, self.error_G2D / n
        total = float((x_2D[1] - x_2D[0] ** 2).sum())
        error_G = (error_G2D[:, 1] - error_G2D[:, 0] ** 2).sum(1)
        return [float(1 - error / total) if total > 0 else math.nan for error in error_G], total


def usage(rate_S: np.ndarray, mass_S: np.ndarray, n_rows: int) -> Figures:
    """Which latents are used: dead, dense, how evenly; and a histogram of log10 of the firing rate, .1 a bin.

    density_histogram: {"start": log10 of the first bin's lower edge, "counts": of the bins}; the dead are not in it.
    effective_latents: exp of the entropy of the latents' shares in all that fires.
    """
    alive_S = rate_S > 0
    logs = np.floor(np.log10(rate_S[alive_S]) * 10 + 1e-9).astype(int)
    start = int(logs.min()) if len(logs) else 0
    mass = mass_S.sum()
    figures: Figures = {
        "dead": int((~alive_S).sum()),
        "dead_fraction": float((~alive_S).mean()),
        "dead_rate_below": 3 / n_rows if n_rows else math.nan,
        "density_histogram": {"start": start / 10, "counts": np.bincount(logs - start).tolist() if len(logs) else []},
    }
    for rate in DENSE:
        dense_S = rate_S > rate
        figures[f"dense_{rate:g}"] = {
            "share": float(dense_S.mean()),
            "share_of_mass": float(mass_S[dense_S].sum() / mass) if mass > 0 else math.nan,
        }
    share = rate_S[alive_S] / rate_S.sum() if alive_S.any() else np.zeros(0)
    entropy = float(-(share * np.log(share)).sum())
    ascending = np.sort(rate_S)
    places, n = np.arange(1, len(rate_S) + 1), len(rate_S)
    gini = float((2 * places - n - 1) @ ascending / (n * ascending.sum())) if alive_S.any() else math.nan
    figures |= {"usage_entropy": entropy, "effective_latents": math.exp(entropy) if len(share) else 0.0, "gini": gini}
    return figures


def hist_quantiles(hist: np.ndarray, quantiles: tuple[float, ...]) -> list[int]:
    """Of whole numbers 0, 1, ... with their counts: the least number with at least that share at or below it."""
    if not hist.sum():
        return []
    ends = hist.cumsum()
    places = [max(1, math.ceil(round(q * ends[-1], 9))) for q in quantiles]
    return [int(np.searchsorted(ends, place)) for place in places]
