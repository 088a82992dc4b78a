"""How sure a score is, in one more pass over the same images: jackknife, permutation null, effective number of images.

Per latent, with b = a - min a over the images, p_m = sum b^m, T = sum b u, t_i = <u_i, T>, q_i = |u_i|^2,
Num = |T|^2 - sum b^2 q and Den = p1^2 - p2, the score is MS = Num / Den, and without image i

    MS_(-i) = (Num - 2 b_i (t_i - b_i q_i)) / (Den - 2 b_i (p1 - b_i))

so delta_i = MS_(-i) - MS takes one product <u_i, T> for each non-zero, O(nnz E), and an image on which the latent is
silent changes nothing. The products are of centred vectors v = u - mean u, in float32 unless the embeddings are
float64: <u_i, T> = <v_i, T - p1 mean u> + p1 <v_i, mean u> + <mean u, T>, of which only the first needs all dimensions.
The jackknife's variance is (N - 1) / N (sum delta^2 - (sum delta)^2 / N). It covers the images,
not the seed of the SAE's training. The minimum is held: it is 0 for all latents but those that fire on every image.

The same deltas give intervals of means over latents, by image (clustered: an image moves all latents that it is on):
without image i the mean over defined latents, the mean that counts undefined ones as chance, and any weighted sum of
scores are what they are, exactly, latents that are left with one image counted as undefined.

docs/concepts/monosemanticity.md. Memory: T (S x E float64; while it is centred also as float32), E x E, 8 bytes an
image and mean, the images that the null draws (at most 2000 x 9 x E float32), and the block of images at hand as in
the first pass.

Shape suffixes: n images of a chunk, N all images, S latents, K neurons, M entries grouped by latent, E embedding, W
weighted sums, R draws, U drawn images.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from saevlm_fast.errors import require
from saevlm_fast.kernels.common import on_gpu, sums_at
from saevlm_fast.kernels.sparse_decode import gather_dot_op
from saevlm_fast.peers import Peers, laid_end_to_end, summed
from saevlm_fast.scoring.intake import CodesIntake, DenseIntake
from saevlm_fast.scoring.monosemanticity import MonosemanticityScores, StreamedScore
from saevlm_fast.scoring.null import (
    FEW_IMAGES,
    N_POWERS,
    SimilarityMoments,
    drawn_images,
    drawn_pairs,
    null_deviation,
    null_skewness,
    sampled_tail,
    skewed_tail,
    third_order,
)
from saevlm_fast.scoring.sums import STATUSES, Embeddings
from saevlm_fast.sparse_codes import GroupedCodes, SparseCodes

_CPU_ROWS = 256
_DEFINED = STATUSES.index("defined")


@dataclass(frozen=True)
class Certainty:
    """What the second pass finds; tensors on the CPU, float64, NaN where undefined.

    Attributes:
        scores: of the first pass.
        half_ms_2S: scores over the images of even and of odd number alone.
        n_eff_S: p1^2 / p2, the number of images if all of them weighed the same.
        mean_similarity: of two different images: the score of a latent that fires on all alike, and the null's mean.
        se_S: jackknife standard error of the score; NaN below three images. None without intervals.
        mean_changes_N, null_mean_changes_N: how the mean over defined latents, and the mean that counts undefined ones
            as mean_similarity, change without image i. None without intervals.
        weighted_NW: the same of the weighted sums of scores that were asked for.
        null_sd_S, p_S: standard deviation of the null, and the share of it at or above the score. None without null.
    """

    scores: MonosemanticityScores
    half_ms_2S: Tensor
    n_eff_S: Tensor
    mean_similarity: float
    se_S: Tensor | None
    mean_changes_N: Tensor | None
    null_mean_changes_N: Tensor | None
    weighted_NW: Tensor
    null_sd_S: Tensor | None
    p_S: Tensor | None


class SecondPass:
    """Takes the images of a finished StreamedScore once more, in the same order: `update`, then `result`.

    Args:
        first: with halves=True and all images in it. Its sums are taken over: it is of no use afterwards.
        weights_SW: of weighted sums of scores whose jackknife is asked for, float64; latents on fewer than three images
            are held.
        intervals, null: what is computed beside n_eff and the scores of halves.
        seed: of the images that the null draws.

    Raises:
        ValueError: a first pass without halves or images, weights of another number of latents.
    """

    def __init__(
        self,
        first: StreamedScore,
        weights_SW: Tensor | None = None,
        *,
        intervals: bool = True,
        null: bool = True,
        seed: int = 0,
    ) -> None:
        scores = first.result()
        weights_SW = torch.zeros(len(scores.ms), 0) if weights_SW is None else weights_SW
        require(
            weights_SW.ndim == 2 and len(weights_SW) == len(scores.ms),
            f"weights_SW: shape {tuple(weights_SW.shape)} is not [{len(scores.ms)}, W]",
        )
        self._pairs = _Deviations(first, scores, weights_SW, intervals=intervals, null=null, seed=seed)
        self._first, self.n_images = first, 0
        self._intake: CodesIntake | DenseIntake | None = None

    def update(self, activations: SparseCodes | Tensor, emb_nE: Tensor) -> None:
        """The next n images, which the first pass has checked.

        Raises:
            ValueError: more images than the first pass had, embeddings of another shape, and what StreamedScore.update
                says of activations.
        """
        pairs = self._pairs
        n_rows = activations.n_rows if isinstance(activations, SparseCodes) else len(activations)
        sqnorm_n = pairs.sqnorm_N[self.n_images : self.n_images + n_rows]
        same = emb_nE.shape == (n_rows, pairs.d_emb) and len(sqnorm_n) == n_rows
        require(same, f"emb_nE: shape {tuple(emb_nE.shape)} is not that of the first pass's images")
        emb_nE = emb_nE.detach().to(pairs.device)
        first = self._first.first_image + self.n_images
        if self._intake is None:
            n_latents, block_rows = self._first.n_latents, self._first.block_rows
            sparse = isinstance(activations, SparseCodes)
            self._intake = CodesIntake(n_latents, block_rows, pairs) if sparse else DenseIntake(n_latents, pairs)
        self._intake.add(activations, emb_nE, first, sqnorm_n)
        self.n_images += n_rows

    def result(self, peers: Peers | None = None) -> Certainty:
        """What was asked for, by all ranks, each of which has taken the images of its first pass.

        Raises:
            ValueError: other images than those of the first pass, as far as their number tells.
        """
        if self._intake is not None:
            self._intake.flush()
        n_images = len(self._pairs.sqnorm_N)
        require(self.n_images == n_images, f"second pass: {self.n_images} images, but {n_images} in the first")
        if peers is not None:
            self._pairs.merge_ranks(peers)
        return self._pairs.result()


class _Deviations:
    """Takes checked images in (sums.Pairs): everything that needs T as it is in the end."""

    def __init__(
        self,
        first: StreamedScore,
        scores: MonosemanticityScores,
        weights_SW: Tensor,
        *,
        intervals: bool,
        null: bool,
        seed: int,
    ) -> None:
        seen, halves, self.sqnorm_N = first.halved()
        self.first_image, n_own = first.first_image, len(self.sqnorm_N)
        self.scores, self.similarity, self.device = scores, first.similarity, first.device
        self.half_ms_2S = halves.half_scores().cpu()
        sums, other_SE = halves.merged()
        self.half_sums: tuple[Tensor, ...] = (sums.state.sums_SE, other_SE)  # T is their sum
        # A copy: it lies in the memory of T, which goes once T is centred.
        self.total_S, self.d_emb = sums.state.total_S.clone(), sums.state.sums_SE.shape[1]
        self.level_S = torch.zeros_like(self.total_S)  # <mean u, T>
        self.centred_SE: Tensor | None = None
        self.den_S, self.low_S, self.n_above_S = 2 * sums.state.den_S, seen.low_S, seen.n_above()
        self.ms_S = scores.ms.to(self.device)
        self.shifted = bool((self.low_S != 0).any())
        self.intervals, self.null, self.n_images = intervals, null, 0
        self.moments = SimilarityMoments(sums.unit_sum_E, sums.square_sum, scores.n_images)
        n, n_latents = scores.n_images, len(scores.ms)
        self.powers_PS = self.total_S.new_zeros(N_POWERS if null else 2, n_latents)
        self.change_2S = self.total_S.new_zeros(2, n_latents)  # sum of delta, and of its square
        self.weights_SW = weights_SW.to(self.total_S)
        self.changes_NW = self.total_S.new_zeros(n_own, weights_SW.shape[1])
        # Of an image: sum delta, MS lost, their number; and R.
        self.lost_3N = self.total_S.new_zeros(3 if intervals else 0, n_own)
        self.similar_N = self.total_S.new_zeros(n_own if intervals else 0)
        self.draws_RW = drawn_images(n, seed) if null else torch.zeros(0, 0, dtype=torch.int64)
        self.drawn_U = self.draws_RW.unique()
        self.drawn: list[tuple[Tensor, Tensor]] = []  # v and <v, mean u> of the images of the draws
        self.few_S = (self.n_above_S < FEW_IMAGES) & (self.n_above_S > 1) & ~self.ms_S.isnan()
        self.any_few = null and bool(self.few_S.any())
        self.few: list[tuple[Tensor, Tensor]] = []

    def lower(self, drop_S: Tensor) -> None:
        """The minimum is known."""

    def add_codes(self, codes: SparseCodes, grouped: GroupedCodes, low_S: Tensor, images: list[Embeddings]) -> None:
        joined, latents_M = Embeddings.join(images), grouped.latents_M
        images_M = codes.entry_rows()[grouped.order_M]
        v_nE, along_n, square_n = self._centred(joined)
        products_M = None
        if self.intervals:
            products_M = gather_dot_op(self._centred_sums(v_nE.dtype), latents_M, images_M, v_nE)
        if on_gpu(images_M):
            self._launch_deviations(codes, grouped, images_M, products_M, along_n, square_n)
        else:
            self._add_deviations(codes.n_rows, grouped, images_M, products_M, along_n, square_n)
        if self.any_few:
            few_F = (self.few_S[latents_M] & (grouped.acts_M > self.low_S[latents_M])).nonzero().squeeze(1)
            latents_F = latents_M[few_F]
            self.few.append((latents_F, grouped.acts_M[few_F] - self.low_S[latents_F]))
        self._add_images(v_nE, along_n, square_n)

    def _launch_deviations(
        self,
        codes: SparseCodes,
        grouped: GroupedCodes,
        images_M: Tensor,
        products_M: Tensor | None,
        along_n: Tensor,
        square_n: Tensor,
    ) -> None:
        """_add_deviations on a GPU."""
        from saevlm_fast.kernels import deviations_triton as kernels

        latents = kernels.Latents(self.low_S, self.total_S, self.level_S, self.ms_S, self.den_S, self.n_above_S)
        entries = grouped.acts_M, images_M, grouped.order_M, grouped.offsets_S1
        of_images = None if products_M is None else (products_M, along_n, square_n)
        with torch.cuda.device_of(images_M):  # Triton launches on the current device
            changes_M = kernels.launch_latent_deviations(entries, of_images, latents, self.powers_PS, self.change_2S)
            if products_M is not None:
                told = self.weights_SW, self.lost_3N, self.changes_NW
                kernels.launch_image_deviations(codes.csr(), changes_M, latents, *told, self.n_images)

    def _add_deviations(
        self,
        n_rows: int,
        grouped: GroupedCodes,
        images_M: Tensor,
        products_M: Tensor | None,
        along_n: Tensor,
        square_n: Tensor,
    ) -> None:
        latents_M = grouped.latents_M
        b_M = grouped.acts_M - self.low_S[latents_M] if self.shifted else grouped.acts_M
        n_latents = len(self.total_S)
        powers_M = b_M
        for power_S in self.powers_PS:
            power_S += sums_at(latents_M, powers_M, n_latents)
            powers_M = powers_M * b_M
        if products_M is not None:
            total_M = self.total_S[latents_M]
            t_M = products_M.to(torch.float64)
            t_M += total_M * along_n[images_M] + self.level_S[latents_M]
            rest_M = total_M - b_M
            change_M = _change(b_M, t_M - b_M * square_n[images_M], rest_M, self.ms_S[latents_M], self.den_S[latents_M])
            several_M = self.n_above_S[latents_M] > 2
            change_M = change_M.masked_fill(~several_M, 0.0)
            self.change_2S[0] += sums_at(latents_M, change_M, n_latents)
            self.change_2S[1] += sums_at(latents_M, change_M.square(), n_latents)
            two_M = (self.n_above_S[latents_M] == 2) & (b_M > 0)
            self._add_lost(n_rows, images_M, change_M.nan_to_num(0.0), two_M, latents_M)

    def _add_lost(self, n_rows: int, images_M: Tensor, change_M: Tensor, two_M: Tensor, latents_M: Tensor) -> None:
        """What means over latents lose without each image."""
        rows = slice(self.n_images, self.n_images + n_rows)
        self.lost_3N[0, rows] += sums_at(images_M, change_M, n_rows)
        images_T = images_M[two_M]
        self.lost_3N[1, rows] += sums_at(images_T, self.ms_S[latents_M[two_M]], n_rows)
        self.lost_3N[2, rows] += torch.bincount(images_T, minlength=n_rows)
        for w, weights_S in enumerate(self.weights_SW.unbind(1)):
            weighted_M = change_M * weights_S[latents_M]
            self.changes_NW[rows, w] += sums_at(images_M, weighted_M, n_rows)

    def add_dense(self, acts_nK: Tensor, low_K: Tensor, images: Embeddings) -> None:
        v_nE, along_n, square_n = self._centred(images)
        b_nK = acts_nK.to(torch.float64) - self.low_S
        powers_nK = b_nK
        for power_S in self.powers_PS:
            power_S += powers_nK.sum(0)
            powers_nK = powers_nK * b_nK
        if self.intervals:
            others_nK = (v_nE @ self._centred_sums(v_nE.dtype).T).to(torch.float64)
            others_nK += along_n[:, None] * self.total_S + self.level_S - b_nK * square_n[:, None]
            change_nK = _change(b_nK, others_nK, self.total_S - b_nK, self.ms_S, self.den_S)
            change_nK = change_nK.masked_fill_(self.n_above_S <= 2, 0.0)
            self.change_2S[0] += change_nK.sum(0)
            self.change_2S[1] += change_nK.square().sum(0)
            change_nK = change_nK.nan_to_num_(0.0)
            two_nK = ((self.n_above_S == 2) & (b_nK > 0)).to(torch.float64)
            rows = slice(self.n_images, self.n_images + len(acts_nK))
            self.lost_3N[0, rows] += change_nK.sum(1)
            self.lost_3N[1, rows] += two_nK @ self.ms_S.nan_to_num(0.0)
            self.lost_3N[2, rows] += two_nK.sum(1)
            self.changes_NW[rows] += change_nK @ self.weights_SW
        if self.null:
            latents_M, images_M = (self.few_S & (b_nK > 0)).T.nonzero(as_tuple=True)
            self.few.append((latents_M, b_nK[images_M, latents_M]))
        self._add_images(v_nE, along_n, square_n)

    def _centred(self, images: Embeddings) -> tuple[Tensor, Tensor, Tensor]:
        """v [n, E], float32 unless the embeddings are float64; <v, mean u> and |u|^2 [n], float64."""
        scale_n, square_n = images.scales(self.similarity)
        v_nE, along_n = self.moments.centred_rows(images.emb_nE, scale_n)
        return v_nE, along_n, square_n

    def _centred_sums(self, dtype: torch.dtype) -> Tensor:
        """T - p1 mean u, in place of T, and the first time <mean u, T>; in blocks of latents that stay in cache."""
        if self.centred_SE is None:
            first_SE, second_SE = self.half_sums
            self.centred_SE = torch.empty_like(first_SE, dtype=dtype)
            rows = max(1, len(first_SE)) if first_SE.is_cuda else _CPU_ROWS
            pieces = (first_SE, second_SE, self.total_S, self.level_S, self.centred_SE)
            for a_sE, b_sE, total_s, level_s, centred_sE in zip(*(each.split(rows) for each in pieces)):
                a_sE += b_sE
                torch.mv(a_sE, self.moments.mean_E, out=level_s)
                centred_sE.copy_(a_sE.addr_(total_s, self.moments.mean_E, alpha=-1))
            self.half_sums = ()
        return self.centred_SE

    def _add_images(self, v_nE: Tensor, along_n: Tensor, square_n: Tensor) -> None:
        rows = slice(self.n_images, self.n_images + len(v_nE))
        if self.null:
            self.moments.add(v_nE, along_n, square_n)
            numbers = torch.tensor([rows.start, rows.stop]) + self.first_image
            first, last = torch.searchsorted(self.drawn_U, numbers).tolist()
            places_u = (self.drawn_U[first:last] - numbers[0]).to(self.device)
            self.drawn.append((v_nE[places_u].to(torch.float32), along_n[places_u]))
        if self.intervals:
            self.similar_N[rows] = self.moments.summed(along_n, square_n)
        self.n_images += len(v_nE)

    def merge_ranks(self, peers: Peers) -> None:
        """Takes in what the other ranks have found: sums rank after rank, images one after the other."""
        self.powers_PS, self.change_2S = summed(peers, self.powers_PS), summed(peers, self.change_2S)
        self.changes_NW = laid_end_to_end(peers, self.changes_NW)
        if self.intervals:
            self.lost_3N = laid_end_to_end(peers, self.lost_3N.T).T
            self.similar_N = laid_end_to_end(peers, self.similar_N)
        if self.null:
            self.moments.merge_ranks(peers)
            none = torch.zeros(0, self.d_emb, device=self.device), self.total_S.new_zeros(0)
            self.drawn = [_told_of_all(peers, self.drawn, none)]
            none = torch.zeros(0, dtype=torch.int64, device=self.device), self.total_S.new_zeros(0)
            self.few = [_told_of_all(peers, self.few, none)]

    def result(self) -> Certainty:
        n_eff_S = self.powers_PS[0].square() / self.powers_PS[1]
        mean, null_mean = self._mean_changes() if self.intervals else (None, None)
        deviation_S = null_deviation(self.powers_PS[:4], self.moments) if self.null else None
        return Certainty(
            scores=self.scores,
            half_ms_2S=self.half_ms_2S,
            n_eff_S=n_eff_S.cpu(),
            mean_similarity=self.moments.mean_similarity,
            se_S=self._standard_errors() if self.intervals else None,
            mean_changes_N=mean,
            null_mean_changes_N=null_mean,
            weighted_NW=self.changes_NW.cpu(),
            null_sd_S=None if deviation_S is None else deviation_S.masked_fill(self.ms_S.isnan(), torch.nan).cpu(),
            p_S=None if deviation_S is None else self._p_values(deviation_S).cpu(),
        )

    def _standard_errors(self) -> Tensor:
        enough_S = (self.n_above_S > 2) & ~self.ms_S.isnan()
        return jackknife_error(self.change_2S, self.scores.n_images).masked_fill(~enough_S, torch.nan).cpu()

    def _mean_changes(self) -> tuple[Tensor, Tensor]:
        """Of the mean over defined latents, and of the one that counts undefined ones as the mean similarity."""
        n, defined_S = self.scores.n_images, ~self.ms_S.isnan()
        n_latents, n_defined, total = len(self.ms_S), int(defined_S.sum()), self.ms_S[defined_S].sum()
        changed_N, lost_N, gone_N = self.lost_3N
        left_N = total + changed_N - lost_N
        mean_N = left_N / (n_defined - gone_N) - total / n_defined
        chance = self.moments.mean_similarity
        pair_sum = float(self.moments.pair_sum)
        chance_N = (pair_sum - 2 * self.similar_N) / max((n - 1) * (n - 2), 1)
        with_null_N = left_N + (n_latents - n_defined + gone_N) * chance_N - total - (n_latents - n_defined) * chance
        return mean_N.cpu(), (with_null_N / n_latents).cpu()

    def _p_values(self, deviation_S: Tensor) -> Tensor:
        """Of chance alone: by a law of the null's deviation and skewness, and by drawn images for latents on few."""
        z_S, mean = (self.ms_S - self.moments.mean_similarity) / deviation_S, self.moments.mean_similarity
        drawn_UE, along_U = (torch.cat(parts) for parts in zip(*self.drawn))
        skewness_S = null_skewness(self.powers_PS, third_order(drawn_UE, along_U), deviation_S, self.scores.n_images)
        p_S = skewed_tail(z_S, skewness_S).masked_fill((deviation_S == 0) & ~self.ms_S.isnan(), 1.0)
        if not self.few or not bool(self.few_S.any()):
            return p_S
        places_RW = torch.searchsorted(self.drawn_U, self.draws_RW.contiguous()).to(self.device)
        pairs_PR = drawn_pairs(places_RW, drawn_UE, along_U, self.moments)
        latents_M, b_M = (torch.cat(parts) for parts in zip(*self.few))
        latents_M, order_M = latents_M.sort(stable=True)
        b_M = b_M[order_M]
        starts_S = torch.searchsorted(latents_M, torch.arange(len(p_S), device=self.device))
        for n in range(2, FEW_IMAGES):
            (latents_L,) = (self.few_S & (self.n_above_S == n)).nonzero(as_tuple=True)
            if len(latents_L):
                b_Ln = b_M[starts_S[latents_L, None] + torch.arange(n, device=self.device)]
                p_S[latents_L] = sampled_tail(b_Ln, self.ms_S[latents_L] - mean, pairs_PR)
        return p_S


def _told_of_all(
    peers: Peers, pieces: list[tuple[Tensor, Tensor]], none: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """The pieces of all ranks, one after the other."""
    first, second = (laid_end_to_end(peers, torch.cat(parts)) for parts in zip(none, *pieces))
    return first, second


def jackknife_error(change_2S: Tensor, n_images: int) -> Tensor:
    """Standard error [S] from the sum of the changes without each image [0], and of their squares [1]."""
    spread_S = change_2S[1] - change_2S[0].square() / max(n_images, 1)
    return (spread_S.clamp(min=0) * ((n_images - 1) / max(n_images, 1))).sqrt()


def change_error(changes_N: Tensor) -> float:
    """Standard error of a number that changes by changes_N without image i."""
    sums_2 = torch.stack([changes_N.sum(), changes_N.square().sum()])
    return float(jackknife_error(sums_2[:, None], len(changes_N)))


def _change(b: Tensor, others: Tensor, rest: Tensor, ms: Tensor, den: Tensor) -> Tensor:
    """MS_(-i) - MS, of others = t - b q and rest = p1 - b; NaN where rounding leaves nothing of the denominator."""
    left = den - 2 * b * rest
    return torch.where(left > 1e-12 * den, -2 * b * (others - ms * rest) / left, torch.nan)
