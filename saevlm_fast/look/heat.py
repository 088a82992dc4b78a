"""Where on its images a latent fires: the activations of the image's own patches, for the images that are shown.

Values are kept as bytes, 255 is the latent's largest activation on any image: one scale a latent, so that maps of one
latent can be compared. Where a latent fires, not why it does.

Shape suffixes: W wanted pairs of image and latent, M entries, P patches.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from torch import Tensor

from saevlm_fast.scoring.geometry import PatchGrid
from saevlm_fast.scoring.image_rows import ImageTable
from saevlm_fast.sparse_codes import SparseCodes


class HeatMaps(NamedTuple):
    """Sparse maps of W pairs: pair w owns entries offsets_W1[w]:offsets_W1[w + 1] of patches (uint16) and values
    (uint8, 1 .. 255)."""

    offsets_W1: np.ndarray
    patches_M: np.ndarray
    values_M: np.ndarray

    def of(self, w: int) -> tuple[np.ndarray, np.ndarray]:
        """(patches, values) of a pair."""
        low, high = self.offsets_W1[w], self.offsets_W1[w + 1]
        return self.patches_M[low:high], self.values_M[low:high]


def heat_maps(
    chunks: Iterable[tuple[int, SparseCodes]],
    table: ImageTable,
    grid: PatchGrid,
    images_W: np.ndarray,
    latents_W: np.ndarray,
    max_S: Tensor,
) -> HeatMaps:
    """The patches on which latents fire in images.

    Args:
        chunks: (first row, codes) of all rows, in order.
        images_W, latents_W: the pairs, sorted by image.
        max_S: of each latent the activation that becomes 255.
    """
    size = len(max_S)
    row_image = np.repeat(np.arange(table.n_images), np.diff(table.offsets_N1))
    first_W = np.searchsorted(images_W, np.arange(table.n_images + 1))
    tokens_R = table.tokens_R
    assert tokens_R is not None  # patch_grid has seen to it
    found: list[tuple[np.ndarray, ...]] = []
    for start, codes in chunks:
        acts_M, latents_M, _ = codes.csr()
        rows = row_image[start : start + codes.n_rows]
        low, high = int(rows[0]), int(rows[-1]) + 1
        pair_of = np.full((high - low) * size, -1, np.int32)
        mine = slice(first_W[low], first_W[high])
        pair_of[(images_W[mine] - low) * size + latents_W[mine]] = np.arange(mine.start, mine.stop)
        rows_M = codes.entry_rows().numpy()
        pairs_M = pair_of[(rows[rows_M] - low) * size + latents_M.numpy()]
        patches_M = tokens_R[start : start + codes.n_rows][rows_M] - grid.n_prefix
        kept = np.flatnonzero((pairs_M >= 0) & (patches_M >= 0) & (patches_M < grid.n_patches))
        share_M = acts_M.numpy()[kept] / max_S.numpy()[latents_M.numpy()[kept]]
        values_M = np.clip(np.rint(share_M * 255), 1, 255).astype(np.uint8)
        found.append((pairs_M[kept], patches_M[kept].astype(np.uint16), values_M))
    return _grouped(found, len(images_W))


def _grouped(found: list[tuple[np.ndarray, ...]], n_pairs: int) -> HeatMaps:
    pairs_M = np.concatenate([np.empty(0, np.int32), *(each[0] for each in found)])
    order = np.argsort(pairs_M, kind="stable")
    offsets_W1 = np.concatenate([[0], np.cumsum(np.bincount(pairs_M, minlength=n_pairs))])
    patches = np.concatenate([np.empty(0, np.uint16), *(each[1] for each in found)])
    values = np.concatenate([np.empty(0, np.uint8), *(each[2] for each in found)])
    return HeatMaps(offsets_W1, patches[order], values[order])
