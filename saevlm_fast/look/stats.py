"""What is known of every latent from the codes of its images, in two passes over them.

The first finds how often a latent fires, how strongly, on which images most, on which classes, and the histogram of its
activations; the second, with the largest activation known, samples images of every tenth of its range. Top images alone
flatter a latent: what it does at half its strength is seen in the bands.

Shape suffixes: S latents, N images, M entries, C classes.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from saevlm_fast.kernels.common import sums_at
from saevlm_fast.look.shown import Lists
from saevlm_fast.look.spill import Spill
from saevlm_fast.scoring.top_images import BestImages
from saevlm_fast.sparse_codes import SparseCodes

N_BANDS = 10
BINS_PER_OCTAVE, LOWEST_OCTAVE, N_BINS = 4, -24, 192  # of the histogram: from 2^-24 to 2^24
_MOST_CLASS_SUMS = 1 << 27
_FEWEST_ROWS, _ENTRIES = 1 << 12, 1 << 22  # read at a time: what is best so far is sorted with every chunk
_PROBES = 64  # images among which a latent's silent ones are looked for
_HASH = 0x9E3779B97F4A7C15  # of Fibonacci hashing


@dataclass(frozen=True)
class LatentStats:
    """Of all S latents.

    Attributes:
        n_active_S: images on which each fires. max_S, sum_S: of its activations (0 where it never fires).
        bins_SB: int32, images in each bin of the logarithm of the activation: N_BINS, BINS_PER_OCTAVE an octave.
        tops: the most active images. band_counts: int64 [S, N_BANDS], images with an activation in that tenth of the
        range from 0 to max. bands: N_BANDS of each latent, sampled. silent: images on which it does not fire.
        classes_SC: activation summed over the images of each class; None where there are none, or too many.
    """

    n_images: int
    n_active_S: Tensor
    max_S: Tensor
    sum_S: Tensor
    bins_SB: Tensor
    tops: Lists
    band_counts: Tensor
    bands: Lists
    silent: list[list[int]]
    classes_SC: Tensor | None


def latent_stats(
    codes: Spill,
    n_top: int,
    n_band: int,
    class_N: Tensor | None = None,
    n_classes: int = 0,
    on_images: Callable[[int], None] = lambda done: None,
) -> LatentStats:
    """Two passes over the images' codes. Memory: S x (n_top + 10 n_band + 192), and S x n_classes.

    Args:
        n_top, n_band: images of each latent: the most active, and of each band.
        class_N: int64, the class of every image, -1 for none.
        on_images: called with images done, of both passes.
    """
    size, n = codes.d_sae, codes.n_rows
    at_once = max(_FEWEST_ROWS, n * _ENTRIES // max(codes.n_entries, 1))
    first = _First(size, n, n_top, n_classes if class_N is not None else 0)
    for start, chunk in codes.chunks(at_once):
        first.add(start, chunk, None if class_N is None else class_N[start : start + chunk.n_rows])
        on_images(start + chunk.n_rows)
    band_counts, bands = torch.zeros(size * N_BANDS, dtype=torch.int64), BestImages(size * N_BANDS, n_band)
    for start, chunk in codes.chunks(at_once):
        acts_M, latents_M, _ = chunk.csr()
        images_M = chunk.entry_rows() + start
        tenth_M = (acts_M / first.max_S[latents_M] * N_BANDS).ceil().long().clamp_(1, N_BANDS) - 1
        slots_M = latents_M * N_BANDS + tenth_M
        band_counts += torch.bincount(slots_M, minlength=size * N_BANDS)
        bands.add(-_hashed(images_M), slots_M, images_M)
        on_images(n + start + chunk.n_rows)
    return LatentStats(
        n,
        first.n_active_S,
        first.max_S,
        first.sum_S,
        first.bins_SB.view(size, N_BINS),
        Lists.of(first.best),
        band_counts.view(size, N_BANDS),
        Lists.of(bands),
        first.silent(),
        first.classes_SC,
    )


def _hashed(images_M: Tensor) -> Tensor:
    """A number in [0, 1) for every image, the same for all latents: so they have samples in common, and fewer pictures
    are shown."""
    mixed = images_M.numpy().astype(np.uint64) * np.uint64(_HASH)
    mixed = (mixed ^ (mixed >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
    return torch.from_numpy(
        ((mixed ^ (mixed >> np.uint64(32))) >> np.uint64(40)).astype(np.float32) / np.float32(1 << 24)
    )


class _First:
    """Sums of the first pass."""

    def __init__(self, size: int, n: int, n_top: int, n_classes: int):
        self.size, self.n = size, n
        self.n_active_S = torch.zeros(size, dtype=torch.int64)
        self.max_S, self.sum_S = torch.zeros(size), torch.zeros(size, dtype=torch.float64)
        self.bins_SB = torch.zeros(size * N_BINS, dtype=torch.int32)
        self.best = BestImages(size, n_top)
        few = n_classes > 0 and size * n_classes <= _MOST_CLASS_SUMS
        self.classes_SC = torch.zeros(size, n_classes) if few else None
        self.probes = np.unique(np.random.default_rng(0).integers(0, n, _PROBES)) if n else np.empty(0, np.int64)
        self.fires_PS = torch.zeros(len(self.probes), size, dtype=torch.bool)

    def add(self, start: int, chunk: SparseCodes, class_n: Tensor | None) -> None:
        acts_M, latents_M, _ = chunk.csr()
        rows_M = chunk.entry_rows()
        self.best.add(acts_M, latents_M, rows_M + start)
        self.n_active_S += torch.bincount(latents_M, minlength=self.size)
        self.sum_S += sums_at(latents_M, acts_M.double(), self.size)
        self.max_S.scatter_reduce_(0, latents_M, acts_M, "amax")
        bins_M = ((acts_M.log2() - LOWEST_OCTAVE) * BINS_PER_OCTAVE).floor().long().clamp_(0, N_BINS - 1)
        places_M = latents_M * N_BINS + bins_M
        self.bins_SB.scatter_add_(0, places_M, torch.ones(1, dtype=torch.int32).expand_as(places_M))
        if self.classes_SC is not None and class_n is not None:
            class_M = class_n[rows_M]
            known_M = class_M >= 0
            places_M = (latents_M * self.classes_SC.shape[1] + class_M)[known_M]
            self.classes_SC.view(-1).scatter_add_(0, places_M, acts_M[known_M])
        offsets = chunk.csr()[2]
        for i, probe in enumerate(self.probes):
            if start <= probe < start + chunk.n_rows:
                low, high = int(offsets[probe - start]), int(offsets[probe - start + 1])
                self.fires_PS[i, latents_M[low:high]] = True

    def silent(self) -> list[list[int]]:
        """Of every latent up to 5 images among the probes on which it does not fire, others for every latent."""
        quiet_SP = (~self.fires_PS).T.numpy()
        found = []
        for latent, quiet in enumerate(quiet_SP):
            places = np.flatnonzero(quiet)
            found.append(self.probes[np.roll(places, -latent % max(len(places), 1))[:5]].tolist())
        return found
