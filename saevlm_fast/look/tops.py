"""The most active images of latents, from stores of one or several rows an image, as a table and as pictures."""

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from saevlm_fast.data.codes import StoredCodes
from saevlm_fast.data.rows import Activations
from saevlm_fast.errors import require
from saevlm_fast.look.contact_sheet import LatentRow, Section, draw_sheet
from saevlm_fast.look.store_images import StoreImages, shown
from saevlm_fast.sae import SparseAutoencoder
from saevlm_fast.scoring.encoding import n_latents
from saevlm_fast.scoring.image_rows import ImageTable, image_chunks, image_table
from saevlm_fast.scoring.source import Pool
from saevlm_fast.scoring.top_images import BestImages, TopImages

if TYPE_CHECKING:
    from PIL.Image import Image

ROWS_OF_A_SHEET = 50
COLUMNS = {
    "latent": pa.int64(),
    "rank": pa.int64(),
    "image": pa.string(),
    "number": pa.int64(),
    "activation": pa.float32(),
    "label": pa.string(),
}


@dataclass(frozen=True)
class LatentTops:
    """Of all S latents: tops; n_active_S int64, images on which each fires; max_S float32; and of which images."""

    tops: list[TopImages]
    n_active_S: Tensor
    max_S: Tensor
    table: ImageTable


def latent_tops(
    rows: Activations | StoredCodes,
    sae: SparseAutoencoder | None,
    n: int,
    pool: Pool = "max",
    *,
    batch_rows: int = 4096,
    on_images: Callable[[int], None] = lambda done: None,
) -> LatentTops:
    """The n most active images of every latent, each image once; of equally active ones the earlier first.

    Memory: S x n, and one batch of rows.

    Args:
        rows: activations, with the SAE that encodes them; or codes. Several rows of an image lie together.
        pool: an image's activation is its largest row's (max), or the mean of its rows'.
        on_images: called with the number of images done.

    Raises:
        ValueError: n below 1, an SAE of another width, rows of one image apart.
    """
    require(n >= 1, f"n: {n} must be at least 1")
    size, table = n_latents(rows, sae), image_table(rows)
    best, n_active_S, max_S = BestImages(size, n), torch.zeros(size, dtype=torch.int64), torch.zeros(size)
    with closing(image_chunks(rows, sae, table, pool, batch_rows)) as chunks:
        for chunk in chunks:
            acts_M, latents_M, _ = chunk.codes.csr()
            best.add(acts_M, latents_M, chunk.codes.entry_rows() + chunk.first)
            n_active_S += torch.bincount(latents_M, minlength=size)
            max_S.scatter_reduce_(0, latents_M, acts_M, "amax")
            on_images(chunk.first + chunk.codes.n_rows)
    return LatentTops(best.result(), n_active_S, max_S, table)


def tops_table(found: LatentTops, latents: Sequence[int]) -> pa.Table:
    """One row for each of the latents' top images: COLUMNS, with the image's number in the store."""
    tops = [found.tops[latent] for latent in latents]
    counts = [len(top.images) for top in tops]
    numbers = torch.cat([torch.empty(0, dtype=torch.int64), *(top.images for top in tops)]).numpy()
    acts = torch.cat([torch.empty(0), *(top.acts for top in tops)]).numpy()
    ids, labels = found.table.ids, found.table.labels
    nothing = pa.nulls(len(numbers), pa.string())
    columns = [
        np.repeat(np.asarray(latents, np.int64), counts),
        np.concatenate([np.arange(0), *(np.arange(count) for count in counts)]),
        nothing if ids is None else ids.take(pa.array(numbers)),
        numbers,
        acts,
        nothing if labels is None else labels.take(pa.array(numbers)),
    ]
    return pa.table({name: pa.array(column, kind) for (name, kind), column in zip(COLUMNS.items(), columns)})


@dataclass(frozen=True)
class Captions:
    """Of a sheet: title, caption, and of every latent its score and names, where they are known."""

    title: str
    caption: str
    scores: dict[int, float]
    names: dict[int, list[str]]


def tops_sheet(found: LatentTops, latents: Sequence[int], images: StoreImages, captions: Captions, n: int) -> "Image":
    """A contact sheet of latents, one row each; placeholders for images that are not there."""
    rows = []
    for latent in latents:
        top = found.tops[latent]
        numbers = top.images[:n].tolist()
        rows.append(
            LatentRow(
                latent=latent,
                score=captions.scores.get(latent, float("nan")) if captions.scores else None,
                n_active=int(found.n_active_S[latent]),
                names=captions.names.get(latent, []),
                images=shown(images, [found.table.name(i) for i in numbers], numbers),
                activations=top.acts[:n].tolist(),
                note=f"largest activation {float(found.max_S[latent]):.3g}",
            )
        )
    return draw_sheet(captions.title, captions.caption, [Section(f"{len(rows)} latents", rows)], columns=n)
