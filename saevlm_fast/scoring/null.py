"""What the score of a latent is by chance: its activations shuffled over the images (a permutation null).

Every way to place the latent's activations on the images is equally likely. With b the activations above the minimum,
p_m = sum_i b_i^m, s_ij the similarities, U = sum_i u_i, G = sum_i u_i u_i^T, (N)_m = N (N - 1) ... (N - m + 1),

    A0 = p1^2 - p2      A1 = p2^2 - p4      A2 = p1^2 p2 - 2 p1 p3 + p4      R_i = sum_{j != i} s_ij
    S0 = sum_{i != j} s_ij      S1c = sum_{i != j} (s_ij - s_mean)^2      S2c = sum_i (R_i - R_mean)^2

    E[MS] = S0 / (N)_2 = s_mean
    Var[MS] = (2 A1 S1c / (N)_2 + 4 (A2 - A1) (S2c - S1c) / (N)_3 + (A0^2 + 2 A1 - 4 A2) (2 S1c - 4 S2c) / (N)_4) / A0^2

exactly. Its law is skewed to the right where images come in kinds. From FEW_IMAGES on its tail is that of the Pearson
type III law of this deviation and of a skewness in closed form (null_skewness), below it the tail is counted: the
latent's own activations on sets of images drawn at random, the same sets for all latents.

Measured over 20,000 shuffles of several embeddings, of latents on 10 to 100 images (bench/scoring/null_tail.py): p is
below .01 for .008 to .011 of them, below .001 for .0006 to .0016. By the normal law it was up to .02 and .0055.

This null is weak: it asks whether the images of a latent are more alike than any images are, which almost every
direction in activation space satisfies. The untrained SAE of controls.py is the null that counts.

Shape suffixes: n images of a chunk, N all images, S latents, M entries, E embedding, R draws, W images of a draw.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from saevlm_fast.kernels.common import on_gpu
from saevlm_fast.peers import Peers, summed

FEW_IMAGES = 10
N_DRAWS = 2000
N_POWERS = 6  # p1 .. p6
_MOST_OF_THIRD_ORDER = 1024
_LEAST_SKEWNESS = 1e-3  # below it the gamma law is the normal one
_MOST_SKEWNESS = 20.0
_GRAM_COLUMNS = 128  # G is symmetric: only blocks on and above its diagonal are made
_DRAWS_AT_ONCE = 64
_CPU_ROWS = 256  # whose float64 copies stay in cache
_ELEMENTS_AT_ONCE = 1 << 21
_ROUNDING = 1e-13  # of float64 sums of similarities, generously
_ROUNDING_32 = 1e-6  # of those of float32 products
_TIE = 1e-6  # drawn scores from float32 embeddings that are this little below count as equal: few values have many ties


class SimilarityMoments:
    """S0, S1c and S2c of all images, from their centred vectors v = u - mean u in chunks.

    s_ij = <v_i, v_j> + a_i + a_j + c with a_i = <v_i, mean u> and c = |mean u|^2, so with V = sum_i v_i v_i^T and
    q_i = |u_i|^2 the sum of s_ij^2 over all i and j is |V|^2 + 2 N sum a^2 + N^2 c^2: nothing of the mean is in V.

    Args:
        sum_E: U. square_sum: sum_i q_i. n_images: N. All of them, known from the first pass.
    """

    def __init__(self, sum_E: Tensor, square_sum: Tensor, n_images: int) -> None:
        self.n_images, self.mean_E = n_images, sum_E / max(n_images, 1)
        self.square_sum, self.level = float(square_sum), float(self.mean_E @ self.mean_E)
        self.pair_sum = float(sum_E @ sum_E) - self.square_sum
        self._products_EE: Tensor | None = None  # V, in the dtype of v
        self._fourth, self._along, self.spread = sum_E.new_zeros(3).unbind()
        self._rounding = _ROUNDING

    def centred_rows(self, emb_nE: Tensor, scale_n: Tensor) -> tuple[Tensor, Tensor]:
        """(v [n, E], float32 unless the embeddings are float64; a [n] float64) of u = scale * emb.

        Rounded once they are centred: where all images are nearly alike the difference is what counts.
        """
        dtype = torch.float64 if emb_nE.dtype == torch.float64 else torch.float32
        if on_gpu(emb_nE):
            from saevlm_fast.kernels.deviations_triton import launch_centred_rows

            with torch.cuda.device_of(emb_nE):  # Triton launches on the current device
                return launch_centred_rows(emb_nE, scale_n, self.mean_E, dtype)
        v_nE, along_n = torch.empty_like(emb_nE, dtype=dtype), torch.empty_like(scale_n)
        pieces = (each.split(_CPU_ROWS) for each in (emb_nE, scale_n, v_nE, along_n))
        for emb_bE, scale_b, v_bE, along_b in zip(*pieces):
            unit_bE = torch.addcmul(-self.mean_E, emb_bE.to(torch.float64), scale_b[:, None])
            v_bE.copy_(unit_bE)
            torch.mv(unit_bE, self.mean_E, out=along_b)
        return v_nE, along_n

    def summed(self, along_n: Tensor, square_n: Tensor) -> Tensor:
        """R [n]: each image's similarities with the others, summed."""
        return self.n_images * (along_n + self.level) - square_n

    def add(self, v_nE: Tensor, along_n: Tensor, square_n: Tensor) -> None:
        """v, a and q of the next images."""
        if self._products_EE is None:
            self._products_EE = v_nE.new_zeros(v_nE.shape[1], v_nE.shape[1])
            self._rounding = _ROUNDING if v_nE.dtype == torch.float64 else _ROUNDING_32
        deviation_n = self.n_images * along_n - square_n + self.square_sum / max(self.n_images, 1)
        self.spread += deviation_n.square().sum()
        self._along += along_n.square().sum()
        self._fourth += square_n.square().sum()
        for first in range(0, v_nE.shape[1], _GRAM_COLUMNS):
            block = slice(first, first + _GRAM_COLUMNS)
            self._products_EE[block, first:].addmm_(v_nE[:, block].T, v_nE[:, first:])

    def merge_ranks(self, peers: Peers) -> None:
        """Takes in the other ranks' images, which count from the same mean."""
        self.spread, self._along, self._fourth = summed(peers, torch.stack([self.spread, self._along, self._fourth]))
        known = peers.collect(None if self._products_EE is None else self._products_EE.dtype)
        dtype = next(each for each in known if each is not None)  # there is at least one image
        if self._products_EE is None:
            d_emb = len(self.mean_E)
            self._products_EE = self.mean_E.new_zeros(d_emb, d_emb, dtype=dtype)
        self._rounding = _ROUNDING if dtype == torch.float64 else _ROUNDING_32
        self._products_EE = summed(peers, self._products_EE)

    @property
    def mean_similarity(self) -> float:
        """s_mean over ordered pairs of different images; NaN below two."""
        n = self.n_images
        return self.pair_sum / (n * (n - 1)) if n > 1 else float("nan")

    def centred(self) -> tuple[float, float]:
        """S1c and S2c."""
        n, squares = self.n_images, 0.0
        V_EE = self.mean_E.new_zeros(0, 0) if self._products_EE is None else self._products_EE
        for first in range(0, len(V_EE), _GRAM_COLUMNS):
            block = slice(first, first + _GRAM_COLUMNS)
            last = first + len(V_EE[block])
            on, off = (part.to(torch.float64).square().sum() for part in (V_EE[block, block], V_EE[block, last:]))
            squares += float(on + 2 * off)
        squares += 2 * n * float(self._along)
        whole = (n * self.level) ** 2
        pairs = squares + (whole - self.pair_sum**2 / max(n * (n - 1), 1) - float(self._fourth))
        # Where all pairs are equally alike both are rounding, of which no deviation must be made.
        pairs = pairs if pairs > _ROUNDING * (squares + whole) else 0.0
        spread, mean = float(self.spread), self.pair_sum / max(n, 1)
        return pairs, spread if spread > n * (self._rounding * mean) ** 2 else 0.0


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


def drawn_pairs(draws_RW: Tensor, v_UE: Tensor, along_U: Tensor, moments: SimilarityMoments) -> Tensor:
    """s_ij - s_mean of all pairs within each draw, float32 [pairs, R]: of the first n images the first n (n - 1) / 2.

    draws_RW: rows of v_UE and along_U, v and a of the images that are drawn.
    """
    width = draws_RW.shape[1]
    later, earlier = torch.tril_indices(width, width, -1, device=v_UE.device)
    level = moments.level - moments.mean_similarity
    pieces = []
    for draws_rW in draws_RW.split(_DRAWS_AT_ONCE):
        v_rWE, along_rW = v_UE[draws_rW], along_U[draws_rW].to(torch.float32)
        pieces.append((v_rWE @ v_rWE.mT)[:, later, earlier] + (along_rW[:, later] + along_rW[:, earlier] + level))
    return torch.cat(pieces).T.contiguous()


def _count(found_lR: Tensor) -> Tensor:
    """True ones of each row, int64 [l]: eight bytes are added at a time (torch's sum makes int64 of each)."""
    width = found_lR.shape[1]
    if width % 8 or width > 8 * 255:  # a byte counts to 255
        return found_lR.sum(1)
    return found_lR.view(torch.int64).sum(1)[:, None].view(torch.uint8).sum(1)


def sampled_tail(weights_Ln: Tensor, excess_L: Tensor, pairs_PR: Tensor) -> Tensor:
    """p [L]: the share of draws whose score is at least the latent's, it itself counted as one of them.

    weights_Ln: b of latents that fire on n images. excess_L: their scores less s_mean. pairs_PR: of drawn_pairs.
    """
    n = weights_Ln.shape[1]
    later, earlier = torch.tril_indices(n, n, -1, device=weights_Ln.device)
    pairs_PR, n_draws = pairs_PR[: len(later)], pairs_PR.shape[1]
    shares = []
    for b_ln, excess_l in zip(*(t.split(max(1, _ELEMENTS_AT_ONCE // n_draws)) for t in (weights_Ln, excess_L))):
        b_ln = b_ln / b_ln.sum(1, keepdim=True)
        products_lP = b_ln[:, later] * b_ln[:, earlier]
        drawn_lR = products_lP.to(torch.float32) @ pairs_PR
        limit_l = ((excess_l - _TIE) * products_lP.sum(1)).to(torch.float32)
        shares.append((_count(drawn_lR >= limit_l[:, None]) + 1) / (n_draws + 1))
    return torch.cat(shares).to(torch.float64) if shares else excess_L


# The tail of latents on many images -----------------------------------------------------------------------------------


class ThirdOrder(NamedTuple):
    """Means over pairs and triples of different images, of a = <v, mean u> and h_ij = <v_i, v_j>.

    With similarities split as s_ij = s_mean + a_i + a_j + h_ij these are all that a third moment is made of.
    """

    aaa: float  # of a^3
    aah: float  # of a_i a_j h_ij
    ahh: float  # of a_i h_ij^2
    hhh: float  # of h_ij h_jk h_ki
    cubes: float  # of h_ij^3


def third_order(v_UE: Tensor, along_U: Tensor) -> ThirdOrder:
    """Of at most 1,024 images, drawn at random and evenly spaced here. Float32 products, summed in float64."""
    n = min(len(v_UE), _MOST_OF_THIRD_ORDER)
    chosen = torch.linspace(0, max(len(v_UE) - 1, 0), n, dtype=torch.float64).round().long().to(v_UE.device)
    a_n, v_nE = along_U[chosen], v_UE[chosen]
    if n < 3:
        return ThirdOrder(*(0.0,) * 5)
    h_nn = (v_nE @ v_nE.T).fill_diagonal_(0.0)
    squares_n, pairs = h_nn.square().sum(1).to(torch.float64), n * (n - 1)
    return ThirdOrder(
        aaa=float(a_n.pow(3).mean()),
        aah=float(a_n @ (h_nn @ a_n.to(h_nn.dtype)).to(torch.float64)) / pairs,
        ahh=float(a_n @ squares_n) / pairs,
        hhh=float(((h_nn @ h_nn) * h_nn).sum(1).to(torch.float64).sum()) / (pairs * (n - 2)),
        cubes=float(h_nn.pow(3).sum(1).to(torch.float64).sum()) / pairs,
    )


def null_skewness(powers_6S: Tensor, third: ThirdOrder, deviation_S: Tensor, n_images: int) -> Tensor:
    """Skewness [S] of the score under the null, as of images drawn with replacement; NaN where undefined.

    With c_i = 2 b_i (p1 - b_i), the weight of a_i in the sum of b_i b_j s_ij over ordered pairs, the third moment is

        sum c^3 <aaa> + 6 sum' c_i b_i c_j b_j <aah> + 12 sum' c_i b_i^2 b_j^2 <ahh> + 8 sum'' b^2 b^2 b^2 <hhh>
        + 4 sum' b^3 b^3 <cubes>

    over A0^3, sum' of different images. Images are drawn without replacement: with f = n_eff / N of all images that is
    (1 - f) (1 - 2 f) of it, exactly so for a sum of equal weights.
    """
    p1, p2, p3, p4, p5, p6 = powers_6S
    cubed = 8 * (p1.pow(3) * p3 - 3 * p1.square() * p4 + 3 * p1 * p5 - p6)
    crossed = 4 * ((p1 * p2 - p3).square() - (p1.square() * p4 - 2 * p1 * p5 + p6))
    squared = 2 * ((p1 * p3 - p4) * p2 - (p1 * p5 - p6))
    triples = p2.pow(3) - 3 * p2 * p4 + 2 * p6
    moment_S = cubed * third.aaa + 6 * crossed * third.aah + 12 * squared * third.ahh
    moment_S += 8 * triples * third.hhh + 4 * (p3.square() - p6) * third.cubes
    share_S = (p1.square() / p2 / max(n_images, 1)).clamp(max=1.0)
    moment_S *= (1 - share_S) * (1 - 2 * share_S)
    return moment_S / ((p1.square() - p2) * deviation_S).pow(3)


def skewed_tail(z_S: Tensor, skewness_S: Tensor) -> Tensor:
    """p [S] at z of the Pearson type III law of that skewness (a shifted gamma law); of none, the normal law."""
    size_S = skewness_S.abs()
    shape_S = 4 / size_S.clamp(min=_LEAST_SKEWNESS, max=_MOST_SKEWNESS).square()
    point_S = (shape_S + skewness_S.sign() * z_S * shape_S.sqrt()).clamp(min=0.0)
    upper_S, lower_S = torch.special.gammaincc(shape_S, point_S), torch.special.gammainc(shape_S, point_S)
    skewed_S = torch.where(skewness_S > 0, upper_S, lower_S)
    return torch.where(size_S < _LEAST_SKEWNESS, torch.special.erfc(z_S / 2**0.5) / 2, skewed_S)
