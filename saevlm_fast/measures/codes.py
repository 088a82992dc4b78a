"""The codes of all images, encoded once and kept latent by latent: what every measure of an SAE's latents reads.

8 bytes an entry (26 million entries, ImageNet's 1.28 million images at L0 20, are 0.2 GB), three times that while they
are sorted, twice once somebody has asked for their order by activation.
Shape suffixes: N images, S latents, M entries, T latents with enough images, P tops of each.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from saevlm_fast.errors import require
from saevlm_fast.peers import Peers, laid_end_to_end
from saevlm_fast.scoring.source import Pool
from saevlm_fast.scoring.sums import STATUSES
from saevlm_fast.sparse_codes import SparseCodes

TOP = 16  # images of a latent, as the paper takes them (section 4)


@dataclass(frozen=True)
class KeptCodes:
    """Entries above 0 of S latents on N images, latent by latent, images ascending within each.

    Attributes:
        acts_M: float32. images_M: int32. offsets_S1: int64, latent s owns offsets_S1[s]:offsets_S1[s + 1].
        n_images: N.
    """

    acts_M: np.ndarray
    images_M: np.ndarray
    offsets_S1: np.ndarray
    n_images: int

    @classmethod
    def of(cls, codes: SparseCodes) -> "KeptCodes":
        """ValueError: codes that are unsound."""
        codes.check("codes")
        codes = codes.rows().to("cpu").compact()
        grouped = codes.by_latent()
        images_M = codes.entry_rows()[grouped.order_M].to(torch.int32)
        acts_M = grouped.acts_M.to(torch.float32)
        return cls(acts_M.numpy(), images_M.numpy(), grouped.offsets_S1.numpy(), codes.n_rows)

    @classmethod
    def of_dense(cls, acts_NS: np.ndarray) -> "KeptCodes":
        """Of a dense matrix, for small uses."""
        return cls.of(dense_codes(torch.as_tensor(acts_NS)))

    @property
    def n_latents(self) -> int:
        return len(self.offsets_S1) - 1

    @property
    def counts_S(self) -> np.ndarray:
        """n_k: images on which each latent fires."""
        return np.diff(self.offsets_S1)

    @cached_property
    def latents_M(self) -> np.ndarray:
        """The latent of every entry, int32."""
        return np.repeat(np.arange(self.n_latents, dtype=np.int32), self.counts_S)

    @cached_property
    def order_M(self) -> np.ndarray:
        """int64, places of the entries: latent by latent, the largest activation first, ties by image."""
        # One number of both is sorted many times faster than two keys: bits of floats above 0 are in their order.
        bits_M = self.acts_M.astype(np.float32).view(np.int32).astype(np.int64)
        return np.argsort((self.latents_M.astype(np.int64) << 32) - bits_M, kind="stable")

    @cached_property
    def status_S(self) -> np.ndarray:
        """int8 index into STATUSES, as the score's: dead, constant, single, defined."""
        low_S = np.zeros(self.n_latents, np.float32)
        always = self.counts_S == self.n_images if self.n_images else np.zeros(self.n_latents, bool)
        for latent in np.flatnonzero(always):
            low_S[latent] = self.acts_M[self.offsets_S1[latent] : self.offsets_S1[latent + 1]].min()
        above_M = self.acts_M > low_S[self.latents_M]
        n_above_S = np.bincount(self.latents_M[above_M], minlength=self.n_latents)
        status_S = np.full(self.n_latents, STATUSES.index("defined"), np.int8)
        status_S[n_above_S == 1] = STATUSES.index("single")
        status_S[n_above_S == 0] = STATUSES.index("constant")
        status_S[self.counts_S == 0] = STATUSES.index("dead")
        return status_S

    def matrix(self, values_M: np.ndarray | None = None) -> Any:
        """scipy's CSR matrix [S, N] of the activations, or of values_M."""
        from scipy.sparse import csr_array

        values_M = self.acts_M if values_M is None else values_M
        return csr_array((values_M, self.images_M, self.offsets_S1), shape=(self.n_latents, self.n_images))

    def part(self, keep_N: np.ndarray) -> "KeptCodes":
        """Those of some images, numbered anew in their order."""
        kept_M = keep_N[self.images_M]
        offsets_S1 = np.concatenate([[0], kept_M.cumsum()])[self.offsets_S1]
        renumbered_N = np.cumsum(keep_N) - 1
        images_M = renumbered_N[self.images_M[kept_M]].astype(np.int32)
        return KeptCodes(self.acts_M[kept_M], images_M, offsets_S1.astype(np.int64), int(keep_N.sum()))

    def by_image(self) -> SparseCodes:
        """The same as codes [N, S] in CSR form, for what takes images in turn."""
        order_M = np.argsort(self.images_M, kind="stable")
        offsets_N1 = np.concatenate([[0], np.bincount(self.images_M, minlength=self.n_images).cumsum()])
        acts_M, latents_M = (torch.from_numpy(each[order_M]) for each in (self.acts_M, self.latents_M))
        return SparseCodes.from_flat(acts_M, latents_M.long(), torch.from_numpy(offsets_N1), self.n_latents)

    def top_images(self, n: int = TOP) -> tuple[np.ndarray, np.ndarray]:
        """(latents [T], images [T, n]): the n most active images of the latents that fire on as many; ties by image.

        Latents whose n-th activation is 0 are left out, as the paper leaves them out.
        """
        enough_S = self.counts_S >= n
        latents_T = np.flatnonzero(enough_S)
        if not len(latents_T):
            return latents_T, np.zeros((0, n), np.int32)
        places_TP = self.offsets_S1[latents_T, None] + np.arange(n)
        return latents_T, self.images_M[self.order_M[places_TP]]


def dense_codes(acts_NS: torch.Tensor) -> SparseCodes:
    """Codes of a dense matrix of activations of at least 0."""
    rows_M, latents_M = acts_NS.nonzero(as_tuple=True)
    offsets_N1 = torch.cat([torch.zeros(1, dtype=torch.int64), (acts_NS != 0).sum(1).cumsum(0)])
    return SparseCodes.from_flat(acts_NS[rows_M, latents_M], latents_M, offsets_N1, acts_NS.shape[1])


class CodesGathering:
    """Codes of rows as they come, pooled to images, and kept.

    Args:
        image_of_row: int64, the image of every row; None where each row is an image.
        n_images, n_latents: N, S. pool: max or mean over the rows of an image (those that are silent count as 0).
        most_entries: ValueError above that many. first_row: number of the first that comes.
    """

    def __init__(
        self,
        image_of_row: np.ndarray | None,
        n_images: int,
        n_latents: int,
        pool: Pool,
        most_entries: int = 1 << 40,
        first_row: int = 0,
    ) -> None:
        self.image_of_row, self.n_images, self.n_latents = image_of_row, n_images, n_latents
        self.pool, self.most_entries = pool, most_entries
        self.n_entries, self._first_row = 0, first_row
        self._parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []  # images, latents, acts

    def add(self, codes: SparseCodes) -> None:
        """Codes of the next rows. ValueError: there would be more than most_entries."""
        codes = codes.rows().to("cpu", torch.float32).compact()
        acts_M, latents_M, _ = codes.csr()
        images_M = codes.entry_rows().numpy() + self._first_row
        entries: tuple[np.ndarray, ...] = (images_M, latents_M.numpy(), acts_M.numpy())
        if self.image_of_row is not None:
            entries = self._pooled([(self.image_of_row[entries[0]], *entries[1:])])
        self._first_row += codes.n_rows
        self._count(len(entries[0]))
        self._parts.append((entries[0].astype(np.int32), entries[1].astype(np.int32), entries[2]))

    def _count(self, n: int) -> None:
        self.n_entries += n
        require(
            self.n_entries <= self.most_entries,
            f"codes: more than {self.most_entries:,} entries above 0 do not fit into memory (about "
            f"{24 * self.most_entries / 1e9:.1f} GB); give fewer images, or an SAE of a smaller L0",
        )

    def merge_ranks(self, peers: Peers) -> None:
        """Takes in the other ranks' rows, those of the first rank first. ValueError: as add."""
        counts = peers.collect(self.n_entries)
        self._count(sum(counts) - self.n_entries)
        told = [laid_end_to_end(peers, torch.from_numpy(column)).numpy() for column in _joined(self._parts)]
        self._parts = [(told[0], told[1], told[2])]

    def result(self) -> KeptCodes:
        """All of them, latent by latent."""
        images_M, latents_M, acts_M = (
            self._pooled(self._parts) if self.image_of_row is not None else _joined(self._parts)
        )
        self._parts = []
        if self.image_of_row is not None and self.pool == "mean":
            rows_N = np.bincount(self.image_of_row, minlength=self.n_images)
            acts_M = (acts_M / rows_N[images_M]).astype(np.float32)
            acts_M = np.maximum(acts_M, np.finfo(np.float32).smallest_subnormal)  # a latent that fires stays alive
        order_M = np.lexsort((images_M, latents_M))
        offsets_S1 = np.concatenate([[0], np.bincount(latents_M, minlength=self.n_latents).cumsum()]).astype(np.int64)
        return KeptCodes(acts_M[order_M], images_M[order_M].astype(np.int32), offsets_S1, self.n_images)

    def _pooled(self, parts: Sequence[tuple[np.ndarray, ...]]) -> tuple[np.ndarray, ...]:
        """One entry for each image and latent: the largest, or the sum."""
        images_M, latents_M, acts_M = _joined(parts)
        keys_M = images_M.astype(np.int64) * self.n_latents + latents_M
        order_M = np.argsort(keys_M, kind="stable")
        keys_M = keys_M[order_M]
        starts_P = np.flatnonzero(np.diff(keys_M, prepend=-1))
        if not len(starts_P):
            return images_M, latents_M, acts_M
        reduce = np.maximum if self.pool == "max" else np.add
        acts_P = reduce.reduceat(acts_M[order_M].astype(np.float64), starts_P).astype(np.float32)
        return keys_M[starts_P] // self.n_latents, keys_M[starts_P] % self.n_latents, acts_P


def _joined(parts: Sequence[tuple[np.ndarray, ...]]) -> tuple[np.ndarray, ...]:
    if not parts:
        return np.zeros(0, np.int32), np.zeros(0, np.int32), np.zeros(0, np.float32)
    return tuple(np.concatenate(columns) for columns in zip(*parts))
