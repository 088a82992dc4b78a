"""The score over patches: rows with embeddings of their own, pairs of patches of one image left out.

With w_I = sum over the rows of image I of a u, A_I of a, T = sum w_I and A = sum A_I,

    MS = (|T|^2 - sum |w_I|^2) / (A^2 - sum A_I^2)

An image is one piece here, so the jackknife over images is exact in one more pass, as in second_pass.py:

    MS_(-I) = (Num - 2 (<w_I, T> - |w_I|^2)) / (Den - 2 A_I (A - A_I))

There is no null: patches of an image are no more exchangeable with others' than its pixels are, and whole images have
different numbers of active patches, so codes cannot be shuffled in a closed form.

Shape suffixes: n images of a chunk, N images, S latents, M entries grouped by latent, P pairs of a latent and an image,
E embedding.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import pyarrow as pa
import torch
from torch import Tensor
from torch.nn.functional import pad

from saevlm_fast.data.codes import Rows
from saevlm_fast.data.rows import Matrix
from saevlm_fast.kernels.common import sums_at
from saevlm_fast.kernels.scaled_rows import scaled_rows
from saevlm_fast.kernels.segment_sum import segment_sum
from saevlm_fast.kernels.streamed_cosine import StreamedState, streamed_cosine_state, streamed_cosine_update
from saevlm_fast.peers import Peers, laid_end_to_end, summed
from saevlm_fast.runtime import exact_defaults
from saevlm_fast.sae import SparseAutoencoder
from saevlm_fast.scoring.intake import checked_embeddings
from saevlm_fast.scoring.merging import merge_states
from saevlm_fast.scoring.monosemanticity import MonosemanticityScores
from saevlm_fast.scoring.second_pass import change_error, jackknife_error
from saevlm_fast.scoring.source import ScoredPatches, rows_between
from saevlm_fast.scoring.sums import Embeddings, status_of
from saevlm_fast.scoring.trust import NORMAL_95, Interval, interval
from saevlm_fast.sparse_codes import SparseCodes

_PATCH_ELEMENTS = 1 << 25  # float64 numbers of pooled patches at a time


@dataclass(frozen=True)
class PatchScores(MonosemanticityScores):
    """Scores [S] over patches, with jackknife over images.

    Attributes:
        se: standard error, float64; NaN below three images. None without intervals.
        mean_interval: 95 %, of the mean over defined latents; NaN without intervals.
    """

    se: Tensor | None
    mean_interval: Interval

    def table(self) -> pa.Table:
        """With se, ms_low and ms_high after the columns of MonosemanticityScores, where there are intervals."""
        table = super().table()
        if self.se is None:
            return table
        ends = self.ms - NORMAL_95 * self.se, self.ms + NORMAL_95 * self.se
        for name, values_S in zip(("se", "ms_low", "ms_high"), (self.se, *ends)):
            table = table.append_column(name, pa.array(values_S.numpy()))
        return table


class _Pairs(NamedTuple):
    """Of a run of whole images, each latent and image that it fires on, latents ascending.

    acts_P: A_I. images_P: within the run. sums_PE: w_I. offsets_S1: of the latents. high_S: their maximum.
    """

    acts_P: Tensor
    images_P: Tensor
    sums_PE: Tensor
    offsets_S1: Tensor
    high_S: Tensor

    @property
    def latents_P(self) -> Tensor:
        return torch.repeat_interleave(self.offsets_S1.diff())


@exact_defaults()
def patch_score(
    activations: Rows,
    embeddings: Matrix,
    sae: SparseAutoencoder | None = None,
    *,
    intervals: bool = True,
    batch_rows: int = 4096,
    device: torch.device | str = "cpu",
    on_rows: Callable[[int], None] = lambda done: None,
    peers: Peers | None = None,
) -> PatchScores:
    """The score over rows of a store with several an image, each with an embedding, without pairs within an image.

    n_active counts images. A latent that fires in one image only is single. Codes are made anew in the second pass.

    Args:
        activations: a store of several rows an image, neighbours of each other. embeddings: as many rows, row i of the
            same patch (the same image and token, where both sides have ids).
        intervals: a second pass, for the jackknife over images.
        on_rows: called with the number of images done, in both passes.
        peers: the ranks that share the images, all of which call this; each is given the scores over all images.

    Raises:
        ValueError: raw neurons; rows without ids; another number of rows or other ids; and as monosemanticity.score.
    """
    patches = ScoredPatches(activations, embeddings, sae, batch_rows=batch_rows, peers=peers)
    patches.check_ids()
    target = patches.device_of(device)
    state, n_active_S, high_S, n_images = _summed(patches, target, on_rows)
    status_S = status_of(torch.zeros_like(high_S), high_S, n_active_S)
    ms_S = (state.num_S / state.den_S).cpu().masked_fill(status_S != 0, torch.nan)
    se_S, mean_interval = None, interval(math.nan, math.nan)
    if intervals:
        n_own = n_images if peers is None else patches.images.n_own
        jackknife = _Jackknife(state, ms_S.to(target), n_active_S.to(target), n_own)
        for first, n, pairs in _runs(patches, target):
            if pairs is not None:
                jackknife.add(pairs, first - patches.images.first_image, n)
            on_rows(n_images + patches.images.done(first + n))
        if peers is not None:
            jackknife.merge_ranks(peers)
        se_S = jackknife.standard_errors().cpu()
        mean_interval = interval(float(ms_S.nanmean()), change_error(jackknife.mean_changes()))
    return PatchScores(
        ms=ms_S,
        status=status_S,
        n_active=n_active_S,
        max_activation=high_S,
        n_images=n_images,
        similarity="cosine",
        variant="patch",
        se=se_S,
        mean_interval=mean_interval,
    )


def _summed(
    patches: ScoredPatches, target: torch.device, on_rows: Callable[[int], None]
) -> tuple[StreamedState, Tensor, Tensor, int]:
    """The first pass: sums over pairs of images; of each latent on how many it fires, and its maximum; all images'
    number."""
    state = streamed_cosine_state(patches.n_latents, patches.d_emb, target)
    n_active_S = torch.zeros(patches.n_latents, dtype=torch.int64)
    high_S, n_images = torch.zeros(patches.n_latents, dtype=torch.float64), 0
    for first, n, pairs in _runs(patches, target):
        n_images = first + n
        if pairs is not None:
            places_P = torch.arange(len(pairs.acts_P), device=target)
            vectors_PE = pairs.sums_PE / pairs.acts_P[:, None]
            streamed_cosine_update(state, pairs.acts_P, places_P, pairs.offsets_S1, vectors_PE)
            n_active_S += pairs.offsets_S1.diff().cpu()
            high_S = torch.maximum(high_S, pairs.high_S.cpu())
        on_rows(patches.images.done(n_images))
    if patches.peers is not None:
        merge_states(state, patches.peers)
        parts_R2S = patches.peers.gather(torch.stack([n_active_S.double(), high_S]))  # counts are exact
        n_active_S, high_S = parts_R2S[:, 0].sum(0).long(), parts_R2S[:, 1].amax(0)
        n_images = patches.images.n_images
    return state, n_active_S, high_S, n_images


class _Jackknife:
    """What scores are without each image."""

    def __init__(self, state: StreamedState, ms_S: Tensor, n_active_S: Tensor, n_images: int) -> None:
        self.state, self.ms_S, self.n_active_S = state, ms_S, n_active_S
        self.change_2S = ms_S.new_zeros(2, len(ms_S))
        self.lost_3N = ms_S.new_zeros(3, n_images)  # of an image: sum of changes, MS of latents it undoes, their number

    def add(self, pairs: _Pairs, first: int, n: int) -> None:
        """The next n images."""
        latents_P, rest_P = pairs.latents_P, self.state.total_S[pairs.latents_P] - pairs.acts_P
        others_P = torch.linalg.vecdot(pairs.sums_PE, self.state.sums_SE[latents_P]) - pairs.sums_PE.square().sum(1)
        den_P, gone_P = 2 * self.state.den_S[latents_P], 2 * pairs.acts_P * rest_P
        change_P = -(2 * others_P - self.ms_S[latents_P] * gone_P) / (den_P - gone_P)
        several_P = self.n_active_S[latents_P] > 2
        change_P = change_P.masked_fill(~several_P, 0.0)
        n_latents, images = len(self.ms_S), slice(first, first + n)
        self.change_2S[0] += sums_at(latents_P, change_P, n_latents)
        self.change_2S[1] += sums_at(latents_P, change_P.square(), n_latents)
        two_P = self.n_active_S[latents_P] == 2
        self.lost_3N[0, images] += sums_at(pairs.images_P, change_P, n)
        images_T = pairs.images_P[two_P]
        self.lost_3N[1, images] += sums_at(images_T, self.ms_S[latents_P[two_P]], n)
        self.lost_3N[2, images] += torch.bincount(images_T, minlength=n)

    def merge_ranks(self, peers: Peers) -> None:
        """Takes in the other ranks' images."""
        self.change_2S, self.lost_3N = summed(peers, self.change_2S), laid_end_to_end(peers, self.lost_3N.T).T

    def standard_errors(self) -> Tensor:
        """[S]; NaN below three images."""
        return jackknife_error(self.change_2S, self.lost_3N.shape[1]).masked_fill(self.n_active_S < 3, torch.nan)

    def mean_changes(self) -> Tensor:
        """Of the mean over defined latents without each image, [N]."""
        n_defined, total = int((~self.ms_S.isnan()).sum()), self.ms_S.nansum()
        changed_N, lost_N, gone_N = self.lost_3N
        return (total + changed_N - lost_N) / (n_defined - gone_N) - total / n_defined


def _runs(patches: ScoredPatches, target: torch.device) -> Iterator[tuple[int, int, _Pairs | None]]:
    """(first image, number of images, their pairs; None without any) of runs of images that fit in memory."""
    done = patches.images.first_image
    for codes, emb_nE, starts in patches.chunks():
        for first, last in _blocks(codes, starts, emb_nE.shape[1]):
            low, high = starts[first], starts[last]
            some = rows_between(codes, low, high)
            assert isinstance(some, SparseCodes)
            images = checked_embeddings(emb_nE[low:high], high - low, 0, target)
            lengths = torch.tensor([b - a for a, b in pairwise(starts[first : last + 1])])
            yield done + first, last - first, _pooled(some.to(target), images, lengths.to(target))
        done += len(starts) - 1


def _blocks(codes: SparseCodes, starts: list[int], d_emb: int) -> list[tuple[int, int]]:
    """Runs of whole images (first, one past the last) whose entries, pooled, fit in memory."""
    offsets, most = codes.csr()[2], max(1, _PATCH_ELEMENTS // max(d_emb, 1))
    ends = offsets[torch.tensor(starts)].tolist()
    runs, first = [], 0
    for image in range(1, len(starts)):
        if ends[image] - ends[first] > most and image - 1 > first:
            runs.append((first, image - 1))
            first = image - 1
    return [*runs, (first, len(starts) - 1)]


def _pooled(codes: SparseCodes, images: Embeddings, lengths: Tensor) -> _Pairs | None:
    """Each latent's rows of an image as one vector."""
    codes = codes.compact()
    codes.check("codes")
    if codes.n_entries == 0:
        return None
    grouped = codes.to(dtype=torch.float64).by_latent()
    rows_M = codes.entry_rows()[grouped.order_M]
    image_of_row = torch.repeat_interleave(lengths)
    keys_M = grouped.latents_M * len(lengths) + image_of_row[rows_M]  # ascending: rows ascend within a latent
    keys_P, counts_P = torch.unique_consecutive(keys_M, return_counts=True)
    scale_n, _ = images.scales("cosine")
    unit_nE = scaled_rows(images.emb_nE, scale_n)
    latents_P = keys_P // len(lengths)
    return _Pairs(
        acts_P=torch.segment_reduce(grouped.acts_M, "sum", lengths=counts_P),
        images_P=keys_P % len(lengths),
        sums_PE=segment_sum(grouped.acts_M, rows_M, pad(counts_P.cumsum(0), (1, 0)), unit_nE),
        offsets_S1=pad(torch.bincount(latents_P, minlength=codes.d_sae).cumsum(0), (1, 0)),
        high_S=torch.segment_reduce(grouped.acts_M, "max", lengths=grouped.offsets_S1.diff(), initial=0.0),
    )
