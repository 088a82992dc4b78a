"""omega of a latent: how alike the tokens of the two modalities are on which it fires most (2502.17514 Eq. 7).

    omega_k = mean over the K x K pairs of cos(h_text, h_image) = mean of the unit vectors of one . mean of the other

h: the harvested residual stream. All tokens of the store are candidates, whatever other latents fire there. A latent
with fewer than K tokens in one modality is unimodal and has no omega.

Shape suffixes: S latents, K tokens of a modality, D width.
"""

import numpy as np
import torch

from saevlm_fast.data.rows import Activations

_LATENTS_AT_ONCE = 256


class TopTokens:
    """Of every latent the K rows where it fires most, so far; of equal ones the earlier.

    Attributes: row_SK int64, -1 where there are fewer; act_SK float64; n_S int64, rows on which it fires.
    """

    def __init__(self, n_latents: int, k: int):
        self.row_SK = np.full((n_latents, k), -1, np.int64)
        self.act_SK = np.zeros((n_latents, k))
        self.n_S = np.zeros(n_latents, np.int64)

    def add(self, act_M: np.ndarray, latent_M: np.ndarray, row_M: np.ndarray) -> None:
        """Entries above 0 of rows that come after all that were added."""
        self.n_S += np.bincount(latent_M, minlength=len(self.n_S))
        better = act_M > self.act_SK[latent_M, -1]
        act_M, latent_M, row_M = act_M[better], latent_M[better], row_M[better]
        touched = np.unique(latent_M)
        k = self.row_SK.shape[1]
        act = np.concatenate([self.act_SK[touched].ravel(), act_M])
        row = np.concatenate([self.row_SK[touched].ravel(), row_M])
        latent = np.concatenate([np.repeat(touched, k), latent_M])
        there = row >= 0
        act, row, latent = act[there], row[there], latent[there]
        order = np.lexsort((row, -act, latent))
        act, row, latent = act[order], row[order], latent[order]
        begins = np.flatnonzero(np.diff(latent, prepend=-1))
        rank = np.arange(len(latent)) - np.repeat(begins, np.diff(begins, append=len(latent)))
        kept = rank < k
        self.act_SK[touched], self.row_SK[touched] = 0.0, -1
        self.act_SK[latent[kept], rank[kept]], self.row_SK[latent[kept], rank[kept]] = act[kept], row[kept]

    @property
    def full_S(self) -> np.ndarray:
        """Which latents have K rows."""
        return self.row_SK[:, -1] >= 0


def omegas(activations: Activations, text: TopTokens, image: TopTokens) -> np.ndarray:
    """float64 [S]; NaN where there are fewer than K tokens of a modality. Memory: the tops of 256 latents."""
    omega_S = np.full(len(text.n_S), np.nan)
    scored = np.flatnonzero(text.full_S & image.full_S)
    for start in range(0, len(scored), _LATENTS_AT_ONCE):
        latents = scored[start : start + _LATENTS_AT_ONCE]
        means = [_mean_directions(activations, tops.row_SK[latents]) for tops in (text, image)]
        omega_S[latents] = (means[0] * means[1]).sum(1)
    return omega_S


def _mean_directions(activations: Activations, row_SK: np.ndarray) -> np.ndarray:
    """float64 [S, D]: the mean of K unit vectors; a row of zeros has no direction, and counts as zeros."""
    known, places = np.unique(row_SK, return_inverse=True)
    x = activations.rows(torch.from_numpy(known)).double().numpy()
    norms = np.linalg.norm(x, axis=1, keepdims=True)
    unit = np.divide(x, norms, out=np.zeros_like(x), where=norms > 0)
    return unit[places.reshape(row_SK.shape)].mean(1)
