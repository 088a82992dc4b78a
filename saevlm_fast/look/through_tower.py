"""SAEs looked at through the tower that they are of: scores and top images, while images pass; nothing is stored.

    looks = look_through_tower(tower, source, "photos", harvest, {"k5": ("residual-11-cls", sae)}, by=own_point(tower))

Every image counts once: of several rows its activation is the largest one's. Shape suffixes: n images of a batch, E
embedding, S d_sae.
"""

from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from saevlm_fast.config import HarvestOptions
from saevlm_fast.data.codes import pool_codes
from saevlm_fast.data.rows import Activations
from saevlm_fast.errors import require
from saevlm_fast.harvesting.config import COMPUTE_DTYPES, HarvestConfig
from saevlm_fast.harvesting.stores import BatchRows
from saevlm_fast.harvesting.stream import TowerStream
from saevlm_fast.images.sources import ImageSource
from saevlm_fast.look.tops import LatentTops
from saevlm_fast.sae import SparseAutoencoder, inferred
from saevlm_fast.scoring.image_rows import ImageTable
from saevlm_fast.scoring.monosemanticity import MonosemanticityScores, StreamedScore
from saevlm_fast.scoring.source import row_of_image
from saevlm_fast.scoring.top_images import BestImages
from saevlm_fast.sparse_codes import SparseCodes
from saevlm_fast.towers.tower import IMAGE_POINTS, HookPoint, Tower

# Embeddings [n, E] of images by their numbers, or the point of the tower that gives them.
Embedder = Callable[[Tensor], Tensor]


class Seen(NamedTuple):
    """Of one SAE: scores, where there are embeddings; tops, where they are asked for."""

    scores: MonosemanticityScores | None
    tops: LatentTops | None


def own_point(tower: Tower) -> HookPoint | None:
    """Where the tower itself embeds images: its projection, or else its pooled output; None of one without either."""
    return next((HookPoint(name) for name in IMAGE_POINTS if name in tower.anatomy.image_points), None)


def embedder(embeddings: Activations, source: ImageSource, n_images: int) -> Embedder:
    """Rows of a file for images of a source, of which the first n_images are meant: by their ids, where the file has
    such, else row i of image i.

    Raises:
        ValueError: another number of rows, several rows of an image; when it is called, an image without a row.
    """
    if not embeddings.has_items:
        require(
            embeddings.n_rows == n_images,
            f"embeddings: {embeddings.n_rows:,} rows of {embeddings.path}, but {n_images:,} images; row i is image i",
        )
        return embeddings.rows
    places = row_of_image(embeddings)

    def rows(numbers_n: Tensor) -> Tensor:
        wanted = [source.image_id(number) for number in numbers_n.tolist()]
        missing = next((image for image in wanted if image not in places), None)
        require(missing is None, f"embeddings: {embeddings.path} has no row of image {missing!r}")
        return embeddings.rows(torch.tensor([places[image] for image in wanted]))

    return rows


def look_through_tower(
    tower: Tower,
    images: ImageSource,
    path: str,
    config: HarvestConfig,
    saes: Mapping[str, tuple[str, SparseAutoencoder]],
    by: HookPoint | Embedder | None,
    n_top: int = 0,
    *,
    workers: int | None = None,
    max_skipped: float = 0.01,
) -> dict[str, Seen]:
    """The Monosemanticity Score of SAEs and their top images, of images that pass once through their tower.

    Args:
        images: each once, in their order. path: what messages call them.
        config: points and tokens, and how the forward is made.
        saes: by name, each with the store of `config.store_names` whose rows it encodes.
        by: a point of the tower that embeds images, or what gives rows [n, E] of images by their numbers in `images`;
            None: there are no scores. Sums of a score are d_sae x E float64 on the host, of every SAE.
        n_top: images that are kept of every latent; 0: none.

    Raises:
        ValueError: too many unusable images, embeddings that are not finite or of length 0.
    """
    looks = {name: _Look(sae, by is not None, n_top) for name, (_, sae) in saes.items()}
    points = config.points + ((by,) if isinstance(by, HookPoint) and by not in config.points else ())
    config = replace(config, points=points)
    given = HarvestOptions(Path("store"), path, workers=workers, max_skipped=max_skipped)
    with tower.hooked(points, False, COMPUTE_DTYPES[config.dtype], config.dtype == "tf32") as run:
        stream = TowerStream(images, tower, run, config, given)
        with closing(stream.in_order(images, path)) as batches:
            for batch in batches:
                if batch:  # else no image of it is usable
                    _add(looks, saes, dict(zip(config.store_names, batch)), by)
    ids = [images.image_id(i) for i in range(len(images))]
    labels = [images.label(i) for i in range(len(images))]
    table = ImageTable(np.arange(len(ids) + 1), None, pa.array(ids, pa.string()), pa.array(labels, pa.string()))
    return {name: look.seen(table) for name, look in looks.items()}


def _add(
    looks: Mapping[str, "_Look"],
    saes: Mapping[str, tuple[str, SparseAutoencoder]],
    rows: Mapping[str, BatchRows],
    by: HookPoint | Embedder | None,
) -> None:
    """A batch of images, by the names of the stores; rows of a store are moved and copied once for all its SAEs."""
    numbers_n = next(iter(rows.values())).image_of_row.unique_consecutive()
    emb_nE = None
    if by is not None:
        emb_nE = _values(rows[by.name]) if isinstance(by, HookPoint) else by(numbers_n)
    for store in dict.fromkeys(store for store, _ in saes.values()):
        x_MD, image_of_row = _values(rows[store]), torch.bucketize(rows[store].image_of_row, numbers_n)
        for name, (of, sae) in saes.items():
            if of == store:
                looks[name].add(_pooled(inferred(sae, x_MD), image_of_row, len(numbers_n)), numbers_n, emb_nE)


class _Look:
    """What is summed of one SAE."""

    def __init__(self, sae: SparseAutoencoder, scored: bool, n_top: int):
        size = sae.config.d_sae
        self.score = StreamedScore(size) if scored else None
        self.best = BestImages(size, n_top) if n_top else None
        self.n_active_S, self.max_S = torch.zeros(size, dtype=torch.int64), torch.zeros(size)

    def add(self, codes: SparseCodes, numbers_n: Tensor, emb_nE: Tensor | None) -> None:
        """Some images."""
        if self.score is not None and emb_nE is not None:
            self.score.update(codes, emb_nE)
        if self.best is not None:
            acts_M, latents_M, _ = codes.csr()
            self.best.add(acts_M, latents_M, numbers_n[codes.entry_rows()])
            self.n_active_S += torch.bincount(latents_M, minlength=len(self.max_S))
            self.max_S.scatter_reduce_(0, latents_M, acts_M, "amax")

    def seen(self, table: ImageTable) -> Seen:
        """Of all images."""
        tops = None if self.best is None else LatentTops(self.best.result(), self.n_active_S, self.max_S, table)
        return Seen(None if self.score is None else self.score.result(), tops)


def _values(rows: BatchRows) -> Tensor:
    assert isinstance(rows.values, Tensor)
    return rows.values.float().clone()  # no tensor of inference mode


def _pooled(codes: SparseCodes, image_of_row: Tensor, n_images: int) -> SparseCodes:
    codes = codes.to("cpu", torch.float32)
    if codes.n_rows == n_images:
        return codes.rows().compact()
    return pool_codes(codes, image_of_row, n_images, "max")
