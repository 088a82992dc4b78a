"""What the score of a latent is by chance: its activations shuffled over the images (a permutation null).

Every way to place the latent's activations on the images is equally likely. With b the activations above the minimum,
p_m = sum_i b_i^m, s_ij the similarities, U = sum_i u_i, G = sum_i u_i u_i^T, (N)_m = N (N - 1) ... (N - m + 1),

    A0 = p1^2 - p2      A1 = p2^2 - p4      A2 = p1^2 p2 - 2 p1 p3 + p4      R_i = sum_{j != i} s_ij
    S0 = sum_{i != j} s_ij      S1c = sum_{i != j} (s_ij - s_mean)^2      S2c = sum_i (R_i - R_mean)^2

    E[MS] = S0 / (N)_2 = s_mean
    Var[MS] = (2 A1 S1c / (N)_2 + 4 (A2 - A1) (S2c - S1c) / (N)_3 + (A0^2 + 2 A1 - 4 A2) (2 S1c - 4 S2c) / (N)_4) / A0^2

exactly. Under few images the score's distribution is skewed, so below FEW_IMAGES its tail is counted instead: the
latent's own activations on sets of images drawn at random, the same sets for all latents.

This null is weak: it asks whether the images of a latent are more alike than any images are, which almost every
direction in activation space satisfies. The untrained SAE of controls.py is the null that counts.

Shape suffixes: n images of a chunk, N all images, S latents, M entries, E embedding, R draws, W images of a draw.
"""

from functools import lru_cache

import torch
from torch import Tensor

FEW_IMAGES = 30
N_DRAWS = 2000
_GRAM_COLUMNS = 256  # G is symmetric: only blocks on and above its diagonal are made
_DRAWS_AT_ONCE = 64
_ELEMENTS_AT_ONCE = 1 << 21
_ROUNDING = 1e-13  # of float64 sums of similarities, generously
_TIE = 1e-6  # drawn scores from float32 embeddings that are this little below count as equal: few values have many ties


class SimilarityMoments:
    """S0, S1c and S2c of all images, from their vectors u in chunks.

    Args:
        sum_E: U. square_sum: sum_i |u_i|^2. n_images: N. All of them, known from the first pass.
    """

    def __init__(self, sum_E: Tensor, square_sum: Tensor, n_images: int) -> None:
        d_emb = len(sum_E)
        self.n_images, self.sum_E = n_images, sum_E
        self.pair_sum = sum_E @ sum_E - square_sum
        self._gram_EE = sum_E.new_zeros(d_emb, d_emb)
        self._fourth, self.spread = sum_E.new_zeros(2).unbind()
        self._mean = self.pair_sum / max(n_images, 1)

    def add(self, unit_nE: Tensor, square_n: Tensor) -> Tensor:
        """Vectors of the next images and their squared norms; returns R_n, each one's similarities summed."""
        rows_n = unit_nE @ self.sum_E - square_n
        self.spread += (rows_n - self._mean).square().sum()
        self._fourth += square_n.square().sum()
        for first in range(0, unit_nE.shape[1], _GRAM_COLUMNS):
            block = slice(first, first + _GRAM_COLUMNS)
            self._gram_EE[block, first:].addmm_(unit_nE[:, block].T, unit_nE[:, first:])
        return rows_n

    @property
    def mean_similarity(self) -> float:
        """s_mean over ordered pairs of different images; NaN below two."""
        n = self.n_images
        return float(self.pair_sum) / (n * (n - 1)) if n > 1 else float("nan")

    def centred(self) -> tuple[float, float]:
        """S1c and S2c."""
        n = self.n_images
        squares = torch.zeros_like(self.spread)
        for first in range(0, len(self._gram_EE), _GRAM_COLUMNS):
            block = slice(first, first + _GRAM_COLUMNS)
            last = first + len(self._gram_EE[block])
            squares += self._gram_EE[block, block].square().sum() + 2 * self._gram_EE[block, last:].square().sum()
        pairs = float(squares - self._fourth) - float(self.pair_sum) ** 2 / max(n * (n - 1), 1)
        # Where all pairs are equally alike both are rounding, of which no deviation must be made.
        pairs = pairs if pairs > _ROUNDING * float(squares) else 0.0
        spread = float(self.spread)
        return pairs, spread if spread > n * (_ROUNDING * float(self._mean)) ** 2 else 0.0


def null_deviation(powers_4S: Tensor, moments: SimilarityMoments) -> Tensor:
    """Standard deviation [S] of the score under the null, from p1 .. p4; NaN below 4 images, or without a pair.

    0 where all pairs of images are equally alike.
    """
    n = moments.n_images
    p1, p2, p3, p4 = powers_4S
    if n < 4:
        return torch.full_like(p1, torch.nan)
    s1, s2 = moments.centred()
    falling = [float(n * (n - 1))]
    for m in (2, 3):
        falling.append(falling[-1] * (n - m))
    a0, a1, a2 = p1.square() - p2, p2.square() - p4, p1.square() * p2 - 2 * p1 * p3 + p4
    variance_S = 2 * a1 * (s1 / falling[0]) + 4 * (a2 - a1) * ((s2 - s1) / falling[1])
    variance_S += (a0.square() + 2 * a1 - 4 * a2) * ((2 * s1 - 4 * s2) / falling[2])
    return (variance_S / a0.square()).clamp_(min=0).sqrt_()


@lru_cache(maxsize=2)  # of the same images for every SAE, control and encoder
def drawn_images(n_images: int, seed: int, n_draws: int = N_DRAWS) -> Tensor:
    """int64 [R, W]: sets of W = min(FEW_IMAGES - 1, N) different images; the first n of a set are a set of n.

    Do not change it: who asks for the same is given the same tensor.
    """
    width, generator = min(FEW_IMAGES - 1, n_images), torch.Generator().manual_seed(seed)
    if n_images <= 8 * FEW_IMAGES:
        return torch.rand(n_draws, n_images, generator=generator).argsort(1)[:, :width]
    images_RW = torch.randint(n_images, (n_draws, width), generator=generator)
    while True:
        ascending_RW = images_RW.sort(1).values
        (again,) = (ascending_RW[:, 1:] == ascending_RW[:, :-1]).any(1).nonzero(as_tuple=True)
        if len(again) == 0:
            return images_RW
        images_RW[again] = torch.randint(n_images, (len(again), width), generator=generator)


def drawn_pairs(draws_RW: Tensor, unit_UE: Tensor) -> Tensor:
    """Similarities of all pairs within each draw, [pairs, R]: those of the first n images are the first n (n - 1) / 2.

    draws_RW: rows of unit_UE, the vectors of the images that are drawn.
    """
    width = draws_RW.shape[1]
    later, earlier = torch.tril_indices(width, width, -1, device=unit_UE.device)
    pieces = []
    for draws_rW in draws_RW.split(_DRAWS_AT_ONCE):
        unit_rWE = unit_UE[draws_rW].to(torch.float64)
        pieces.append((unit_rWE @ unit_rWE.mT)[:, later, earlier])
    return torch.cat(pieces).T.contiguous()


def _count(found_lR: Tensor) -> Tensor:
    """True ones of each row, int64 [l]: eight bytes are added at a time (torch's sum makes int64 of each)."""
    width = found_lR.shape[1]
    if width % 8 or width > 8 * 255:  # a byte counts to 255
        return found_lR.sum(1)
    return found_lR.view(torch.int64).sum(1)[:, None].view(torch.uint8).sum(1)


def sampled_tail(weights_Ln: Tensor, scores_L: Tensor, pairs_PR: Tensor) -> Tensor:
    """p [L]: the share of draws whose score is at least the latent's, it itself counted as one of them.

    weights_Ln: b of latents that fire on n images.
    """
    n = weights_Ln.shape[1]
    later, earlier = torch.tril_indices(n, n, -1, device=weights_Ln.device)
    pairs_PR, n_draws = pairs_PR[: len(later)], pairs_PR.shape[1]
    shares = []
    for b_ln, scores_l in zip(*(t.split(max(1, _ELEMENTS_AT_ONCE // n_draws)) for t in (weights_Ln, scores_L))):
        b_ln = b_ln / b_ln.sum(1, keepdim=True)
        products_lP = b_ln[:, later] * b_ln[:, earlier]
        drawn_lR = products_lP @ pairs_PR
        limit_l = (scores_l - _TIE) * products_lP.sum(1)
        shares.append((_count(drawn_lR >= limit_l[:, None]) + 1) / (n_draws + 1))
    return torch.cat(shares).to(torch.float64) if shares else scores_L
