"""Which images of a latent a page shows: its top images and those of its bands, as pairs of latent and image.

Lists of many latents lie end to end: 65,536 latents have 720,000 of them.

Shape suffixes: L lists, M entries of all lists, W pairs, each once, sorted by image.
"""

from dataclasses import dataclass

import numpy as np

from saevlm_fast.look.spill import Spill
from saevlm_fast.scoring.top_images import BestImages


@dataclass(frozen=True)
class Lists:
    """L lists of images: list i owns offsets_L1[i]:offsets_L1[i + 1] of images_M (int64) and acts_M (float32)."""

    images_M: np.ndarray
    acts_M: np.ndarray
    offsets_L1: np.ndarray

    @classmethod
    def of(cls, best: BestImages) -> "Lists":
        """The images of every slot."""
        counts_L = np.bincount(best.slots_M.numpy(), minlength=best.n_slots)
        return cls(best.images_M.numpy(), best.acts_M.numpy(), _offsets(counts_L))

    def __len__(self) -> int:
        return len(self.offsets_L1) - 1

    def __getitem__(self, i: int) -> np.ndarray:
        """The images of a list."""
        return self.images_M[self.offsets_L1[i] : self.offsets_L1[i + 1]]

    @property
    def counts_L(self) -> np.ndarray:
        return np.diff(self.offsets_L1)

    @property
    def list_M(self) -> np.ndarray:
        """The list of every entry."""
        return np.repeat(np.arange(len(self)), self.counts_L)

    def first(self, n: int) -> "Lists":
        """At most n of each."""
        rank_M = np.arange(len(self.images_M)) - self.offsets_L1[self.list_M]
        kept_M = rank_M < n
        return Lists(self.images_M[kept_M], self.acts_M[kept_M], _offsets(np.minimum(self.counts_L, n)))


def _offsets(counts_L: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], counts_L.cumsum()]).astype(np.int64)


@dataclass(frozen=True)
class Shown:
    """Pair w is image images_W[w] and latent latents_W[w], acts_W its activation."""

    images_W: np.ndarray
    latents_W: np.ndarray
    acts_W: np.ndarray
    _places: tuple[np.ndarray, np.ndarray]  # of the pairs, for each entry of top lists and bands
    _offsets: tuple[np.ndarray, np.ndarray]
    _n_bands: int

    def tops(self, latent: int) -> np.ndarray:
        """Pairs of a latent's top images, the most active first."""
        low, high = self._offsets[0][latent : latent + 2]
        return self._places[0][low:high]

    def band(self, latent: int, band: int) -> np.ndarray:
        """Pairs of the images of one band; 0 is the lowest."""
        slot = latent * self._n_bands + band
        low, high = self._offsets[1][slot : slot + 2]
        return self._places[1][low:high]

    def all_of(self, latent: int) -> np.ndarray:
        """Pairs of top images, and of the bands from the highest down."""
        bands = (self.band(latent, band) for band in reversed(range(self._n_bands)))
        return np.concatenate([self.tops(latent), *bands])


def shown_pairs(tops: Lists, bands: Lists, codes: Spill) -> Shown:
    """Each pair once, with its activation by the codes.

    Args:
        tops: a list of each latent. bands: as many lists of each latent, one after the other.
    """
    size = codes.d_sae
    n_bands = len(bands) // size
    latents_M = np.concatenate([tops.list_M, bands.list_M // max(n_bands, 1)])
    keys_M = np.concatenate([tops.images_M, bands.images_M]) * size + latents_M
    keys_W, places_M = np.unique(keys_M, return_inverse=True)
    images_W, acts_W = keys_W // size, np.zeros(len(keys_W), np.float32)
    first = np.searchsorted(images_W, np.arange(codes.n_rows + 1))
    for start, chunk in codes.chunks():
        acts_m, latents_m, _ = chunk.csr()
        keys_m = (chunk.entry_rows().numpy() + start) * size + latents_m.numpy()
        order = np.argsort(keys_m, kind="stable")  # of codes whose latents ascend in a row: as they are
        mine = slice(first[start], first[start + chunk.n_rows])
        if mine.stop > mine.start:
            acts_W[mine] = acts_m.numpy()[order][np.searchsorted(keys_m[order], keys_W[mine])]
    places = places_M[: len(tops.images_M)], places_M[len(tops.images_M) :]
    return Shown(images_W, keys_W % size, acts_W, places, (tops.offsets_L1, bands.offsets_L1), n_bands)
