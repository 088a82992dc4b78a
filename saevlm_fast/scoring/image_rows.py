"""Rows become images: which rows of a store are whose, and an image's codes from those of its tokens.

A store may have several rows an image, as of `--tokens patches`; the score of an image is then its largest token (or
the mean of its tokens), so that every image counts once. Shape suffixes: N images, R rows, S latents, M entries.
"""

from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from saevlm_fast.data.codes import StoredCodes, mean_pool_codes
from saevlm_fast.data.pairing import NOTHING, begins_image, check_once
from saevlm_fast.data.rows import Activations
from saevlm_fast.sae import SparseAutoencoder
from saevlm_fast.scoring.encoding import encoded_chunks
from saevlm_fast.scoring.source import Pool
from saevlm_fast.sparse_codes import SparseCodes

_DENSE = 1 << 25  # numbers of a dense block of images x latents


@dataclass(frozen=True)
class ImageTable:
    """The N images of a store, in its order.

    Attributes:
        offsets_N1: int64, image i owns rows offsets_N1[i]:offsets_N1[i + 1].
        tokens_R: int32, position of every row in the tower's sequence; None without items.
        ids, labels: of every image; None without items (a matrix file).
    """

    offsets_N1: np.ndarray
    tokens_R: np.ndarray | None
    ids: pa.Array | None
    labels: pa.Array | None

    @property
    def n_images(self) -> int:
        return len(self.offsets_N1) - 1

    @property
    def rows_per_image(self) -> int:
        """The most that an image has."""
        return int(np.diff(self.offsets_N1).max())

    def name(self, i: int) -> str:
        """The image's id, or its number where it has none."""
        return f"row {i}" if self.ids is None else self.ids[i].as_py()

    def label(self, i: int) -> str | None:
        return None if self.labels is None else self.labels[i].as_py()


def image_table(rows: Activations | StoredCodes) -> ImageTable:
    """Which rows belong to which image.

    Raises:
        ValueError: rows of one image that do not lie together.
    """
    if not rows.has_items:
        return ImageTable(np.arange(rows.n_rows + 1), None, None, None)
    starts, ids, labels, tokens, first, last = [], [], [], [], 0, NOTHING
    for table in rows.iter_items():
        if len(table) == 0:
            continue
        table = table.combine_chunks()
        images = table["image"].chunk(0)
        new = begins_image(images, last)
        starts.append(first + np.flatnonzero(new))
        ids.append(images.filter(pa.array(new)))
        labels.append(table["label"].chunk(0).filter(pa.array(new)))
        tokens.append(table["token"].to_numpy())
        first, last = first + len(table), images[-1].as_py()
    found = pa.concat_arrays(ids)
    check_once(rows, ids)
    offsets_N1 = np.concatenate([*starts, [first]]).astype(np.int64)
    return ImageTable(offsets_N1, np.concatenate(tokens).astype(np.int32), found, pa.concat_arrays(labels))


class ImageChunk(NamedTuple):
    """Whole images: the number of the first, their codes [n, S], and those of their rows with the first row's number.

    Where an image is one row, both are the same.
    """

    first: int
    codes: SparseCodes
    first_row: int
    row_codes: SparseCodes


def image_chunks(
    rows: Activations | StoredCodes,
    sae: SparseAutoencoder | None,
    table: ImageTable,
    pool: Pool = "max",
    batch_rows: int = 4096,
) -> Generator[ImageChunk, None, None]:
    """Codes of whole images, in order, about batch_rows rows at a time, on the host in float32.

    Args:
        rows: activations, with the SAE that encodes them; or codes, without.
        pool: an image's activation is its largest row's, or the mean of its rows'.
    """
    offsets, first, first_row, waiting = table.offsets_N1, 0, 0, None
    with closing(encoded_chunks(rows, sae, batch_rows)) as chunks:
        for start, values in chunks:
            if not isinstance(values, SparseCodes):
                raise ValueError("sae: needed with activations")
            codes = values.to("cpu", torch.float32).rows()
            if waiting is not None:
                codes = SparseCodes.join([waiting, codes], codes.d_sae)
            end = start + values.n_rows
            until = int(np.searchsorted(offsets, end, side="right")) - 1  # images that are whole
            whole = int(offsets[until]) - first_row
            if until > first:
                mine = rows_of(codes, 0, whole)
                sizes = np.diff(offsets[first : until + 1])
                yield ImageChunk(first, _pooled(mine, sizes, pool), first_row, mine)
            waiting = rows_of(codes, whole, codes.n_rows) if whole < codes.n_rows else None
            first, first_row = until, int(offsets[until])


def rows_of(codes: SparseCodes, low: int, high: int) -> SparseCodes:
    """Rows low .. high - 1 in CSR form."""
    acts_M, latents_M, offsets = codes.csr()
    begin, end = int(offsets[low]), int(offsets[high])
    return SparseCodes.from_flat(acts_M[begin:end], latents_M[begin:end], offsets[low : high + 1] - begin, codes.d_sae)


def _pooled(codes: SparseCodes, sizes: np.ndarray, pool: Pool) -> SparseCodes:
    """Codes of images from those of their rows, of which image i has sizes[i]."""
    if len(sizes) == codes.n_rows and bool((sizes == 1).all()):
        return codes.compact()
    image_of_row = torch.arange(len(sizes)).repeat_interleave(torch.from_numpy(sizes))
    if pool == "mean":
        return mean_pool_codes(codes, image_of_row, len(sizes)).compact()
    pieces, n_at_once = [], max(1, _DENSE // codes.d_sae)
    bounds = np.concatenate([[0], np.cumsum(sizes)])
    for low in range(0, len(sizes), n_at_once):
        high = min(low + n_at_once, len(sizes))
        part = rows_of(codes, int(bounds[low]), int(bounds[high]))
        pieces.append(_max_pooled(part, image_of_row[bounds[low] : bounds[high]] - low, high - low))
    return SparseCodes.join(pieces, codes.d_sae)


def _max_pooled(codes: SparseCodes, image_of_row: Tensor, n_images: int) -> SparseCodes:
    acts_M, latents_M, _ = codes.csr()
    places_M = image_of_row[codes.entry_rows()] * codes.d_sae + latents_M
    largest = torch.zeros(n_images * codes.d_sae).scatter_reduce_(0, places_M, acts_M, "amax")
    found_M = largest.nonzero().squeeze(1)
    per_image = torch.bincount(found_M // codes.d_sae, minlength=n_images)
    offsets = torch.nn.functional.pad(per_image.cumsum(0), (1, 0))
    return SparseCodes.from_flat(largest[found_M], found_M % codes.d_sae, offsets, codes.d_sae)
