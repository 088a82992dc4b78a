"""Latents, or directions, taken out of the stream, and what a CLIP then says: the part that defences share.

    latents     x - sum over k latents of z_f W_dec[f]: zeroed, what the SAE does not reconstruct is kept
    directions  x - (x - mean) Q Q^T, Q [D, k] orthonormal

on all tokens. Latents are chosen by how much more they fire on the images of one kind than of another (a train split),
beside k random latents of the same density, the k that are largest, and directions found from the same images.

Shape suffixes: N images, T tokens, D width, S latents, K of them, C classes, R removals.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from saevlm_fast.clip_steering.stream import ImageBatch, Stream, Vocabulary
from saevlm_fast.clip_steering.units import Latents
from saevlm_fast.errors import require
from saevlm_fast.images.sources import ImageSource

CONTROLS = ("random", "magnitude", "pca", "probe")
_RIDGE = 1e-2  # of the probe, times the mean variance


@dataclass(frozen=True)
class Removal:
    """What is taken out: latents [K], or orthonormal directions [K, D] from mean_D."""

    name: str
    k: int
    latents_K: Tensor | None = None
    directions_KD: Tensor | None = None
    mean_D: Tensor | None = None

    def apply(self, units: Latents, x_ND: Tensor, values: Callable[[Tensor], Tensor], scale: Tensor | None) -> Tensor:
        """The stream without it. values: of latents, [N, K], as the SAE has them."""
        if self.latents_K is not None:
            change_ND = values(self.latents_K) @ units.directions(self.latents_K)
            return x_ND - (change_ND if scale is None else change_ND * scale)
        assert self.directions_KD is not None
        assert self.mean_D is not None
        directions_KD = self.directions_KD.to(x_ND)
        return x_ND - ((x_ND - self.mean_D.to(x_ND)) @ directions_KD.T) @ directions_KD


class Features(NamedTuple):
    """Of N images, means over their tokens: of latents [N, S], and of the stream [N, D]; float32 on the host."""

    latents_NS: Tensor
    stream_ND: Tensor


@torch.no_grad()
def features(
    stream: Stream,
    source: ImageSource,
    chosen: Sequence[int],
    units: Latents,
    on_images: Callable[[int], None] = lambda done: None,
) -> Features:
    """Of the chosen images. ValueError: one of them is not usable."""
    latents, means = [], []
    for batch in stream.batches(source, chosen):
        n, n_tokens, _ = batch.x_BTD.shape
        image_N = torch.arange(n).repeat_interleave(n_tokens).to(batch.x_BTD.device)
        values_M, units_M, rows_M = units.read(batch.x_BTD.flatten(0, 1)).entries()
        sums = torch.zeros(n * units.n, device=values_M.device)
        sums.index_add_(0, image_N[rows_M] * units.n + units_M, values_M)
        latents.append((sums.view(n, units.n) / n_tokens).cpu())
        means.append(batch.x_BTD.mean(1).float().cpu())
        on_images(sum(map(len, latents)))
    require(sum(map(len, latents)) == len(chosen), f"images: {len(stream.skipped)} are not usable; leave them out")
    return Features(torch.cat(latents), torch.cat(means))


def largest_differences(more: Features, less: Features, units: Latents, n: int) -> Tensor:
    """int64 [n]: latents whose mean differs most, times the length of their direction.

    Only those that fire more in `more`; of equal ones the lower. ValueError: fewer than n do.
    """
    length_S = units.W_SD.norm(dim=1).cpu()
    gain_S = (more.latents_NS.double().mean(0) - less.latents_NS.double().mean(0)) * length_S
    n_more = int((gain_S > 0).sum())
    require(n_more >= n, f"k: {n} latents are asked for, but only {n_more} fire more on one kind of image")
    return gain_S.argsort(descending=True, stable=True)[:n]


def of_same_density(chosen_K: Tensor, seen: Features, seed: int = 0) -> Tensor:
    """int64 [K]: for each chosen latent another of the 10 nearest in density, none twice, none of the chosen."""
    density_S = (seen.latents_NS > 0).double().mean(0)
    log_S = density_S.clamp_min(1e-9).log()
    random = np.random.default_rng(seed)
    free_S = density_S > 0
    free_S[chosen_K] = False
    require(int(free_S.sum()) >= len(chosen_K), f"k: {len(chosen_K)} others that fire are needed as a control")
    found = []
    for latent in chosen_K.tolist():
        distance_S = torch.where(free_S, (log_S - log_S[latent]).abs(), torch.inf)
        near = distance_S.argsort(stable=True)[: min(10, int(free_S.sum()))]
        found.append(int(near[random.integers(len(near))]))
        free_S[found[-1]] = False
    return torch.tensor(found)


def principal_directions(differences_ND: Tensor, n: int) -> Tensor:
    """[n, D] orthonormal, of the largest uncentred variance. ValueError: there are not so many."""
    rank = int(torch.linalg.matrix_rank(differences_ND.double()))
    require(rank >= n, f"k: {n} directions are asked for, the differences of images have {rank}")
    return torch.linalg.svd(differences_ND.double(), full_matrices=False).Vh[:n].float()


def probe_direction(more_ND: Tensor, less_ND: Tensor) -> Tensor:
    """[1, D] of unit length: of the linear discriminant of the two kinds of images, its covariance a little rounder."""
    more_ND, less_ND = more_ND.double(), less_ND.double()
    centred_ND = torch.cat([more_ND - more_ND.mean(0), less_ND - less_ND.mean(0)])
    covariance_DD = centred_ND.T @ centred_ND / len(centred_ND)
    round_DD = torch.eye(len(covariance_DD), dtype=torch.float64) * (_RIDGE * covariance_DD.diagonal().mean())
    direction_D = torch.linalg.solve(covariance_DD + round_DD, more_ND.mean(0) - less_ND.mean(0))
    return torch.nn.functional.normalize(direction_D, dim=0)[None].float()


@torch.no_grad()
def predictions(
    stream: Stream,
    source: ImageSource,
    chosen: Sequence[int],
    units: Latents,
    removals: Sequence[Removal],
    classes: Vocabulary,
    on_images: Callable[[int], None] = lambda done: None,
) -> np.ndarray:
    """int64 [1 + R, N]: the class of each image, as the model is and after each removal; -1 of unusable images."""
    found = np.full((1 + len(removals), len(chosen)), -1)
    place = {number: i for i, number in enumerate(chosen)}
    for done, batch in enumerate(stream.batches(source, chosen), 1):
        places = [place[number] for number in batch.numbers]
        found[0, places] = _classes(classes, batch.out_BE)
        tokens = units.read(batch.x_BTD.flatten(0, 1))
        for r, removal in enumerate(removals, 1):
            x_ND = removal.apply(units, batch.x_BTD.flatten(0, 1).float(), tokens.values, tokens.scale)
            found[r, places] = _classes(classes, _output(stream, batch, x_ND))
        on_images(min(done * stream.batch_size, len(chosen)))
    return found


def _output(stream: Stream, batch: ImageBatch, x_ND: Tensor) -> Tensor:
    x_BTD = x_ND.to(batch.x_BTD.dtype).view_as(batch.x_BTD)
    return stream.output(batch, torch.where(stream.mask(batch.x_BTD), x_BTD, batch.x_BTD))


def _classes(classes: Vocabulary, out_BE: Tensor) -> np.ndarray:
    return classes.probabilities(out_BE).argmax(1).cpu().numpy()
