"""Which units, moved, change what a CLIP says of images (docs/papers/steering-clip.md; after arXiv 2504.08729).

A unit f is moved to alpha times its 99th percentile (of its values above 0 on the tokens of the reference images) on
all chosen tokens; what the SAE does not reconstruct is kept. With P_i(c) the softmax over C words of image i,

    S           mean_i sum_c (P'_ic - P_ic)^2
    specificity max_c sum_i |P'_ic - P_ic| / sum_c sum_i |P'_ic - P_ic|
    consistency the share of images whose most changed word is the most frequent such word

beside controls of the same unit: its change on each token along a random direction of the same length (S_random); the
change reversed (S_reversed); the unit nearest in density (S_density); texts that have nothing to do with images
(S_shuffled); the same move where what the SAE does not reconstruct is dropped, before as after (S_without_error). A
unit is steerable where at most 1 in 100 random directions has an S as large, among those of the 199
controls whose change is nearest in length.

Shape suffixes: B images of a batch, N tokens, T tokens of an image, D width, J units, S all units, C words, Q controls.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from saevlm_fast.clip_steering.stream import ImageBatch, Stream, Vocabulary
from saevlm_fast.clip_steering.units import Tokens, Units
from saevlm_fast.errors import require

QUANTILE = 0.99  # of a unit's values above 0, that alpha multiplies
CHANCE = 0.01
ENOUGH = round(1 / CHANCE) - 1  # random directions in all, from which a unit above all of them is 1 in 100
NEAREST = 199  # controls that a unit is held against; with 99, the largest of all would just be 1 in 100


class Reference(NamedTuple):
    """Of every unit on the chosen tokens of the reference images: 99th percentile of its values above 0 (NaN where it
    has none), and share of tokens with one; arrays [S]."""

    q99_S: Tensor
    density_S: Tensor


class ReferenceSums:
    """Of images that come batch by batch: what `Reference` is made of.

    Args:
        n_images: how many will come, about; of neurons, which have a value on every token, a sample is enough.
    """

    def __init__(self, units: Units, n_images: int) -> None:
        self.units, self.n_images = units, n_images
        self._kept: list[tuple[Tensor, Tensor]] = []
        self._n_tokens = self._skip = 0

    def add(self, x_BTD: Tensor, mask_BT: Tensor) -> None:
        """The streams of B images, and which tokens are chosen."""
        x_ND = x_BTD[mask_BT]
        every = self.units.sample_every(self.n_images * len(x_ND) // len(x_BTD))
        sampled_ND = x_ND[self._skip :: every]
        self._skip = (self._skip - len(x_ND)) % every
        if len(sampled_ND):
            self._n_tokens += len(sampled_ND)
            values_M, units_M = self.units.read(sampled_ND).positive()
            self._kept.append((values_M.cpu(), units_M.cpu()))

    def result(self) -> Reference:
        """ValueError: no image was usable."""
        require(len(self._kept) > 0, "images: none of them is usable")
        values_M, units_M = (torch.cat(each) for each in zip(*self._kept))
        counts_S = torch.bincount(units_M, minlength=self.units.n)
        return Reference(_quantiles(values_M, units_M, self.units.n), counts_S.double() / self._n_tokens)


def _quantiles(values_M: Tensor, units_M: Tensor, n: int) -> Tensor:
    """[S] float32: of each unit's values, between neighbours as torch.quantile has it; NaN of none."""
    order_M = torch.argsort(values_M)
    order_M = order_M[torch.argsort(units_M[order_M], stable=True)]
    counts_S = torch.bincount(units_M, minlength=n)
    first_S = counts_S.cumsum(0) - counts_S
    place_S = QUANTILE * (counts_S - 1).clamp_min(0).double()
    below_S = place_S.floor().long()
    sorted_M = torch.cat([values_M[order_M].double(), torch.full((1,), torch.nan)])
    last = len(sorted_M) - 1
    low_S = sorted_M[torch.where(counts_S > 0, first_S + below_S, last)]
    high_S = sorted_M[torch.where(counts_S > 0, (first_S + below_S + 1).minimum(first_S + counts_S - 1), last)]
    return (low_S + (place_S - below_S) * (high_S - low_S)).float()


@dataclass(frozen=True)
class Changes:
    """What moving J units does, one row a unit; S of `controls` random directions each, [J, Q].

    concept: number of the most changed word; concept_change: mean of P'_ic - P_ic of it. length: root of the mean over
    chosen tokens of |dx|^2; lengths of the controls are the same. s_without_error: NaN of neurons, which have no error.
    """

    s: np.ndarray
    specificity: np.ndarray
    consistency: np.ndarray
    concept: np.ndarray
    concept_change: np.ndarray
    s_reversed: np.ndarray
    s_shuffled: np.ndarray
    s_without_error: np.ndarray
    length: np.ndarray
    s_random_JQ: np.ndarray

    def columns(self) -> dict[str, np.ndarray]:
        """By name, the controls' as s_random_0, s_random_1, ..."""
        named = {name: value for name, value in vars(self).items() if name != "s_random_JQ"}
        return named | {f"s_random_{q}": column for q, column in enumerate(self.s_random_JQ.T)}

    @classmethod
    def join(cls, columns: Sequence[dict[str, np.ndarray]]) -> "Changes":
        """Of blocks of units, in order."""
        joined = {name: np.concatenate([each[name] for each in columns]) for name in columns[0]}
        n_controls = sum(name.startswith("s_random_") for name in joined)
        random_JQ = np.stack([joined.pop(f"s_random_{q}") for q in range(n_controls)], 1)
        return cls(**joined, s_random_JQ=random_JQ)


class Steering:
    """Images asked about, and what their streams do when units are moved.

    Args:
        batches: the images. vocabulary: words. controls: random directions a unit. seed: theirs.
    """

    def __init__(
        self,
        stream: Stream,
        batches: Sequence[ImageBatch],
        units: Units,
        vocabulary: Vocabulary,
        controls: int = 1,
        seed: int = 0,
    ) -> None:
        self.stream, self.units, self.controls, self.seed = stream, units, controls, seed
        self.batches, self.vocabulary, self.unrelated = list(batches), vocabulary, vocabulary.shuffled(seed)
        # Units that are moved together: as many rows as a batch of images has.
        self.at_once = max(1, stream.batch_size // max((len(batch) for batch in self.batches), default=1))
        self.n_images = sum(len(batch) for batch in self.batches)
        self._tokens: list[Tokens] = [units.read(batch.x_BTD.flatten(0, 1)) for batch in self.batches]
        self._without_error: list[tuple[Tensor, Tensor] | None] = [
            self._reconstructed(batch, tokens) for batch, tokens in zip(self.batches, self._tokens)
        ]

    @torch.no_grad()
    def changes(self, units_J: Tensor, target_J: Tensor) -> Changes:
        """Of some units. Results do not depend on which are asked together, but for rounding."""
        parts = [
            self._together(units_J[i : i + self.at_once], target_J[i : i + self.at_once]).columns()
            for i in range(0, len(units_J), self.at_once)
        ]
        return Changes.join(parts)

    def _together(self, units_J: Tensor, target_J: Tensor) -> Changes:
        directions_JD = self.units.directions(units_J.to(self.stream.tower.device))
        along = [directions_JD, -directions_JD, *self._random(units_J, directions_JD)]
        sums = [_Sums(len(units_J), len(self.vocabulary.words)) for _ in along]
        unrelated, without_error = (_Sums(len(units_J), len(self.vocabulary.words)) for _ in range(2))
        squares_J, n_tokens = torch.zeros(len(units_J), dtype=torch.float64), 0
        for batch, tokens, reconstructed in zip(self.batches, self._tokens, self._without_error):
            mask_BT1 = self.stream.mask(batch.x_BTD)
            change_JBT1 = self._change(batch, tokens, units_J, target_J, mask_BT1)
            squares_J += change_JBT1.double().pow(2).sum((1, 2, 3)).cpu()
            n_tokens += int(mask_BT1.sum())
            before_BC = self.vocabulary.probabilities(batch.out_BE)
            for found, direction_JD in zip(sums, along):
                out_RE = self._moved(batch, batch.x_BTD, change_JBT1, direction_JD)
                found.add(self.vocabulary.probabilities(out_RE), before_BC)
                if found is sums[0]:
                    unrelated.add(self.unrelated.probabilities(out_RE), self.unrelated.probabilities(batch.out_BE))
            if reconstructed is not None:
                out_RE = self._moved(batch, reconstructed[0], change_JBT1, directions_JD)
                without_error.add(self.vocabulary.probabilities(out_RE), reconstructed[1])
        own, reversed_, *random = sums
        length_J = (squares_J / n_tokens).sqrt() * directions_JD.norm(dim=1).cpu().double()
        specificity, consistency, concept, concept_change = own.concept(self.n_images)
        return Changes(
            own.s(self.n_images),
            specificity,
            consistency,
            concept,
            concept_change,
            reversed_.s(self.n_images),
            unrelated.s(self.n_images),
            np.where(self._without_error[0] is None, np.nan, without_error.s(self.n_images)),
            length_J.numpy(),
            np.stack([each.s(self.n_images) for each in random], 1),
        )

    @torch.no_grad()
    def _reconstructed(self, batch: ImageBatch, tokens: Tokens) -> tuple[Tensor, Tensor] | None:
        """The stream [B, T, D] without what the SAE does not reconstruct, and the probabilities [B, C] then."""
        if tokens.reconstruction_ND is None:
            return None
        x_hat_BTD = tokens.reconstruction_ND.to(batch.x_BTD).view_as(batch.x_BTD)
        x_BTD = torch.where(self.stream.mask(batch.x_BTD), x_hat_BTD, batch.x_BTD)
        return x_BTD, self.vocabulary.probabilities(self.stream.output(batch, x_BTD))

    def _moved(self, batch: ImageBatch, x_BTD: Tensor, change_JBT1: Tensor, direction_JD: Tensor) -> Tensor:
        """[R, E], R = J * B: the output with each unit's change along its direction."""
        x_JBTD = x_BTD + change_JBT1 * direction_JD[:, None, None, :]
        return self.stream.output(batch, x_JBTD.flatten(0, 1).to(batch.x_BTD.dtype))

    def _change(self, batch: ImageBatch, tokens: Tokens, units_J: Tensor, target_J: Tensor, mask_BT1: Tensor) -> Tensor:
        """[J, B, T, 1]: by how much each unit's value moves on each token, 0 on those that are left alone."""
        values_NJ = tokens.values(units_J.to(batch.x_BTD.device))
        change_NJ = target_J.to(values_NJ) - values_NJ
        if tokens.scale is not None:
            change_NJ = change_NJ * tokens.scale
        n_images, n_tokens = batch.x_BTD.shape[:2]
        return change_NJ.T.reshape(-1, n_images, n_tokens, 1) * mask_BT1

    def _random(self, units_J: Tensor, directions_JD: Tensor) -> Iterator[Tensor]:
        """Directions [J, D] of the units' own lengths; those of a unit are the same in every run."""
        length_J1, width = directions_JD.norm(dim=1, keepdim=True), self.units.width
        for q in range(self.controls):
            drawn = [np.random.default_rng((self.seed, unit, q)).standard_normal(width) for unit in units_J.tolist()]
            random_JD = torch.from_numpy(np.stack(drawn)).to(directions_JD)
            yield torch.nn.functional.normalize(random_JD, dim=1) * length_J1


class _Sums:
    """Over images, of J units: sum of squares, |change| and change by word, most changed word of each image."""

    def __init__(self, n_units: int, n_words: int) -> None:
        self.squares_J = torch.zeros(n_units, dtype=torch.float64)
        self.size_JC = torch.zeros(n_units, n_words, dtype=torch.float64)
        self.sum_JC = torch.zeros(n_units, n_words, dtype=torch.float64)
        self.most_JI: list[Tensor] = []

    def add(self, after_RC: Tensor, before_BC: Tensor) -> None:
        """R = J * B, unit by unit."""
        change_JBC = (after_RC.view(len(self.squares_J), *before_BC.shape) - before_BC).cpu()
        self.squares_J += change_JBC.pow(2).sum((1, 2))
        self.size_JC += change_JBC.abs().sum(1)
        self.sum_JC += change_JBC.sum(1)
        self.most_JI.append(change_JBC.abs().argmax(2))

    def s(self, n_images: int) -> np.ndarray:
        """[J]."""
        return (self.squares_J / n_images).numpy()

    def concept(self, n_images: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """specificity, consistency, the word and its mean change; the first two NaN where nothing changes."""
        most_J, concept_J = self.size_JC.max(1)
        total_J = self.size_JC.sum(1)
        nothing_J = total_J == 0
        specificity_J = torch.where(nothing_J, torch.nan, most_J / total_J)
        counts = [row.bincount().max() for row in torch.cat(self.most_JI, 1)]
        consistency_J = torch.where(nothing_J, torch.nan, torch.stack(counts) / n_images)
        change_J = self.sum_JC.gather(1, concept_J[:, None])[:, 0] / n_images
        return specificity_J.numpy(), consistency_J.numpy(), concept_J.numpy(), change_J.numpy()


def chances(s_J: np.ndarray, length_J: np.ndarray, s_random_JQ: np.ndarray) -> np.ndarray:
    """(1 + controls with an S as large) / (1 + controls), among the NEAREST whose change is nearest in length.

    A length is compared by its ratio; of equally near ones the earlier unit's.
    """
    n_units, n_controls = s_random_JQ.shape
    log_J = np.log(np.maximum(length_J, 1e-30))
    at_most = min(NEAREST, n_units * n_controls)
    n_near = -(-at_most // n_controls)
    order_J = np.argsort(log_J, kind="stable")
    sorted_J = log_J[order_J]
    found = np.empty(n_units)
    for place, j in enumerate(order_J):
        beside = np.abs(sorted_J[max(0, place - n_near) : place + n_near + 1] - log_J[j])
        furthest = np.partition(beside, n_near - 1)[n_near - 1] * (1 + 1e-9)
        low, high = np.searchsorted(sorted_J, (log_J[j] - furthest, np.nextafter(log_J[j] + furthest, np.inf)))
        near = np.sort(order_J[low:high])
        near = near[np.argsort(np.abs(log_J[near] - log_J[j]), kind="stable")[:n_near]]
        controls = s_random_JQ[near].ravel()[:at_most]
        as_large = ~(controls < s_J[j])  # so is what is no number
        found[j] = (1 + int(as_large.sum())) / (1 + len(controls))
    return found


def nearest_in_density(density_J: np.ndarray) -> np.ndarray:
    """Of each unit the place of another one, the nearest by the ratio of densities; -1 of a single unit."""
    log_J = np.log(np.maximum(density_J, 1e-30))
    order = np.argsort(log_J, kind="stable")
    found = np.full(len(order), -1)
    for place, j in enumerate(order):
        beside = [order[p] for p in (place - 1, place + 1) if 0 <= p < len(order)]
        if beside:
            found[j] = min(beside, key=lambda other: abs(log_J[other] - log_J[j]))
    return found
