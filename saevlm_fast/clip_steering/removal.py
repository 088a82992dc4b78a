"""Latents, or directions, taken out of the stream, and what a CLIP then says: the part that defences share.

    latents     x - sum over k latents of z_f W_dec[f]: zeroed, what the SAE does not reconstruct is kept
    directions  x - (x - mean) Q Q^T, Q [D, k] orthonormal

on the chosen tokens. Latents are chosen by how much more they fire on the images of one kind than of another (a train
split), beside k random latents of the same density, the k that are largest, and directions found from the same images.

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
from saevlm_fast.data.label_sets import LabelSet
from saevlm_fast.errors import require
from saevlm_fast.images.sources import ImageSource
from saevlm_fast.measures.codes import CodesGathering, KeptCodes
from saevlm_fast.measures.label_scores import label_scores
from saevlm_fast.sparse_codes import SparseCodes

_RANK = 1e-5  # a direction is one above this share of the largest: streams are of float32
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
            latents_K = self.latents_K.to(x_ND.device)
            change_ND = values(latents_K) @ units.directions(latents_K)
            return x_ND - (change_ND if scale is None else change_ND * scale)
        assert self.directions_KD is not None
        assert self.mean_D is not None
        directions_KD = self.directions_KD.to(x_ND)
        return x_ND - ((x_ND - self.mean_D.to(x_ND)) @ directions_KD.T) @ directions_KD


class Features(NamedTuple):
    """Of N images, means over the chosen tokens: of latents, sparse, and of the stream [N, D] float32; on the host.

    density_S: float64, share of all their chosen tokens on which each latent fires. (Of images nearly every one has a
    token of a common latent, so that they tell such latents from no others.)
    """

    codes: KeptCodes
    stream_ND: Tensor
    density_S: np.ndarray

    def mean_S(self, of_N: np.ndarray | None = None) -> np.ndarray:
        """float64 [S]: means of the latents over all images, or over some (bool [N])."""
        acts_M, n = self.codes.acts_M.astype(np.float64), len(self.stream_ND)
        if of_N is not None:
            acts_M, n = acts_M * of_N[self.codes.images_M], int(of_N.sum())
        return np.bincount(self.codes.latents_M, acts_M, self.codes.n_latents) / max(n, 1)

    @classmethod
    def join(cls, pieces: "Sequence[Features]") -> "Features":
        """The images of all pieces in order."""
        codes = SparseCodes.join([piece.codes.by_image() for piece in pieces], pieces[0].codes.n_latents)
        stream_ND = torch.cat([piece.stream_ND for piece in pieces])
        density_S = sum(len(piece.stream_ND) * piece.density_S for piece in pieces) / max(len(stream_ND), 1)
        return cls(KeptCodes.of(codes), stream_ND, np.asarray(density_S))


@torch.no_grad()
def features(
    stream: Stream,
    source: ImageSource,
    chosen: Sequence[int],
    units: Latents,
    on_images: Callable[[int], None] = lambda done: None,
) -> Features:
    """Of the chosen images. ValueError: one of them is not usable."""
    gathering, means, done = None, [], 0
    fires_S, n_tokens = torch.zeros(units.n, dtype=torch.int64), 0
    for batch in stream.batches(source, chosen):
        mask_BT = stream.mask(batch.x_BTD)[:, :, 0]
        x_BTD = batch.x_BTD[mask_BT].view(len(batch), -1, batch.x_BTD.shape[2])
        if gathering is None:
            image_N = np.arange(len(chosen)).repeat(x_BTD.shape[1])
            gathering = CodesGathering(image_N, len(chosen), units.n, "mean")
        tokens = units.read(x_BTD.flatten(0, 1))
        gathering.add(tokens.codes)
        fires_S += torch.bincount(tokens.positive()[1], minlength=units.n).cpu()
        n_tokens += tokens.codes.n_rows
        means.append(x_BTD.float().mean(1).cpu())
        done += len(batch)
        on_images(done)
    bad = next((f"{source.image_id(number)}: {why}" for number, why in stream.skipped.items()), "")
    require(done == len(chosen), f"images: {len(chosen) - done} are not usable; leave them out, the first is {bad}")
    assert gathering is not None
    return Features(gathering.result(), torch.cat(means), fires_S.numpy() / n_tokens)


def gains(seen: Features, y_N: np.ndarray, values: Sequence[int], units: Latents, select: str) -> np.ndarray:
    """float64 [S]: how much each latent tells a value of y_N from the others, that of the value it tells best.

    Args:
        select: difference, of the means with and without the value times the length of the direction; or auroc, of the
            image's mean, less one half (measures/label_scores.py).
    """
    if select == "auroc":
        found_S = np.full(units.n, -0.5)
        labels = LabelSet.of([str(value) if value in values else "other" for value in y_N.tolist()])
        scores = label_scores(seen.codes, labels)
        asked_Q = np.isin(np.array(labels.names)[scores.label], [str(value) for value in values])
        auroc_Q = np.nan_to_num(scores.auroc[asked_Q], nan=0.5)
        np.maximum.at(found_S, scores.latent[asked_Q], auroc_Q - 0.5)
        return found_S
    differences = [seen.mean_S(y_N == value) - seen.mean_S(y_N != value) for value in values]
    return np.max(differences, 0) * units.W_SD.double().norm(dim=1).cpu().numpy()


def most_gained(gain_S: np.ndarray, n: int) -> Tensor:
    """int64 [n]: the latents of the largest gains above 0; of equal ones the lower. ValueError: fewer than n."""
    n_more = int((gain_S > 0).sum())
    require(n_more >= n, f"k: {n} latents are asked for, but only {n_more} fire more on one kind of image")
    return torch.from_numpy(np.argsort(-gain_S, kind="stable")[:n].copy())


def of_same_density(chosen_K: Tensor, density_S: np.ndarray, seed: int = 0) -> Tensor:
    """int64 [K]: for each chosen latent another of the 10 nearest in density, none twice, none of the chosen.

    Raises:
        ValueError: fewer than K others fire.
    """
    log_S = np.log(np.maximum(density_S, 1e-9))
    random = np.random.default_rng(seed)
    free_S = density_S > 0
    free_S[chosen_K.numpy()] = False
    n_free = int(free_S.sum())
    require(n_free >= len(chosen_K), f"k: {len(chosen_K)} others that fire are needed as a control, {n_free} do")
    found = []
    for latent in chosen_K.tolist():
        distance_S = np.where(free_S, np.abs(log_S - log_S[latent]), np.inf)
        near = np.argsort(distance_S, kind="stable")[: min(10, int(free_S.sum()))]
        found.append(int(near[random.integers(len(near))]))
        free_S[found[-1]] = False
    return torch.tensor(found)


def principal_directions(differences_ND: Tensor, at_most: int) -> Tensor:
    """[n, D] orthonormal, of the largest uncentred variance: at most so many, and no more than the differences have."""
    _, sizes, directions_ND = torch.linalg.svd(differences_ND.double(), full_matrices=False)
    rank = int((sizes > _RANK * sizes[0]).sum()) if sizes[0] > 0 else 0
    return directions_ND[: min(at_most, rank)].float()


def probe_directions(x_ND: Tensor, y_N: np.ndarray) -> Tensor:
    """[V - 1, D] orthonormal: what linear discriminants of V values read, their covariance a little rounder."""
    x_ND, values_N = x_ND.double(), torch.from_numpy(y_N)
    values = values_N.unique().tolist()
    means_VD = torch.stack([x_ND[values_N == value].mean(0) for value in values])
    centred_ND = x_ND - means_VD[torch.searchsorted(values_N.unique(), values_N)]
    covariance_DD = centred_ND.T @ centred_ND / len(centred_ND)
    round_DD = torch.eye(len(covariance_DD), dtype=torch.float64) * (
        _RIDGE * covariance_DD.diagonal().mean().clamp_min(1e-30)
    )
    read_VD = torch.linalg.solve(covariance_DD + round_DD, (means_VD - means_VD.mean(0)).T).T
    return principal_directions(read_VD, len(values) - 1)


@torch.no_grad()
def predictions(
    stream: Stream,
    source: ImageSource,
    chosen: Sequence[int],
    units: Latents,
    removals: Sequence[Removal],
    vocabularies: Sequence[Vocabulary],
    on_images: Callable[[int], None] = lambda done: None,
) -> list[np.ndarray]:
    """Of each vocabulary int64 [1 + R, N]: the class of each image, as the model is and after each removal.

    -1 of images that are unusable, or where the model gives no number.
    """
    found = [np.full((1 + len(removals), len(chosen)), -1) for _ in vocabularies]
    place = {number: i for i, number in enumerate(chosen)}
    for done, batch in enumerate(stream.batches(source, chosen), 1):
        places = [place[number] for number in batch.numbers]
        tokens = units.read(batch.x_BTD.flatten(0, 1))
        for r, removal in enumerate((None, *removals)):
            out_BE = batch.out_BE
            if removal is not None:
                x_ND = removal.apply(units, batch.x_BTD.flatten(0, 1).float(), tokens.values, tokens.scale)
                out_BE = _output(stream, batch, x_ND)
            for each, classes in zip(found, vocabularies):
                each[r, places] = _classes(classes, out_BE)
        on_images(min(done * stream.batch_size, len(chosen)))
    return found


def _output(stream: Stream, batch: ImageBatch, x_ND: Tensor) -> Tensor:
    x_BTD = x_ND.to(batch.x_BTD.dtype).view_as(batch.x_BTD)
    return stream.output(batch, torch.where(stream.mask(batch.x_BTD), x_BTD, batch.x_BTD))


def _classes(classes: Vocabulary, out_BE: Tensor) -> np.ndarray:
    p_BC = classes.probabilities(out_BE)
    return torch.where(p_BC.isfinite().all(1), p_BC.argmax(1), -1).cpu().numpy()
