"""One SAE of a report: its latents on the images, everything that a page shows of them, computed or read.

Shape suffixes: S latents, N images, W pairs of latent and image that are shown.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from saevlm_fast.data.codes import StoredCodes
from saevlm_fast.data.rows import Activations
from saevlm_fast.errors import require
from saevlm_fast.look.heat import HeatMaps, heat_maps
from saevlm_fast.look.near import Near, look_near
from saevlm_fast.look.neighbours import CoFiring, Neighbours, co_firing, decoder_neighbours
from saevlm_fast.look.sets import TopSets, top_sets
from saevlm_fast.look.settings import ReportSettings
from saevlm_fast.look.shown import Shown, shown_pairs
from saevlm_fast.look.spill import Spill
from saevlm_fast.look.stats import LatentStats, latent_stats
from saevlm_fast.measures.codes import TOP
from saevlm_fast.measures.taxonomy import Taxonomy
from saevlm_fast.sae import SparseAutoencoder
from saevlm_fast.scoring.geometry import PatchGrid, patch_grid
from saevlm_fast.scoring.image_rows import ImageTable, image_chunks
from saevlm_fast.scoring.source import Pool
from saevlm_fast.sparse_codes import SparseCodes

N_NEIGHBOURS = 6
MOST_CLASSES = 2000


@dataclass(frozen=True)
class Subject:
    """An SAE and its rows, opened: activations with the encoder, or codes without.

    Attributes:
        name: what pages call it. labels: class of every image, None for none; None where there are none at all.
        activations: with codes, the activations that they are of and their images, if they are there.
        is_made: a control that follows from the first SAE and the rows, and has no directory.
    """

    name: str
    path: str
    sae: SparseAutoencoder
    rows: Activations | StoredCodes
    encoder: SparseAutoencoder | None
    table: ImageTable
    labels: pa.Array | None
    activations: tuple[Activations, ImageTable] | None = None
    is_made: bool = False

    @property
    def encodable(self) -> tuple[Activations, ImageTable] | None:
        """Rows that the SAE can be asked about again; None where there are codes alone."""
        return (self.rows, self.table) if isinstance(self.rows, Activations) else self.activations


@dataclass(frozen=True)
class Classes:
    """Names of the classes, the class of every image (-1 for none), and their share of the labelled images."""

    names: list[str]
    class_N: Tensor
    share_C: np.ndarray


@dataclass(frozen=True)
class Looked:
    """All that is known of one SAE's latents. row_max_S: largest activation on a row, 255 of the heat maps.

    near: None where there are codes alone.
    """

    subject: Subject
    stats: LatentStats
    row_density_S: np.ndarray
    row_max_S: Tensor
    classes: Classes | None
    shown: Shown
    grid: PatchGrid | str
    heat: HeatMaps | None
    decoder: Neighbours
    firing: CoFiring
    sets: TopSets
    near: Near | None

    @property
    def size(self) -> int:
        return self.subject.sae.config.d_sae

    def missed(self, latent: int) -> tuple[list[int], list[float]]:
        """Near misses: images, the nearest first, and pre-activations."""
        if self.near is None:
            return [], []
        numbers, values = self.near.images_S5[latent].tolist(), self.near.values_S5[latent].tolist()
        there = sum(number >= 0 for number in numbers)
        return numbers[:there], values[:there]


def look_at(
    subject: Subject,
    work: Path,
    settings: ReportSettings,
    taxonomy: Taxonomy | None,
    on_step: Callable[[str], Callable[[int], None]],
) -> tuple[Looked, Spill]:
    """Everything about an SAE's latents; and its images' codes.

    Args:
        work: where codes are spilled; what is whole there is used again.
        on_step: told what begins; gives what is told how many images are done.

    Raises:
        ValueError: a taxonomy that has none of the classes.
    """
    size, batch_rows = subject.sae.config.d_sae, settings.batch_size
    of_images, of_rows = _spilled(subject, work, settings.pool, batch_rows, on_step)
    classes = _classes(subject.labels)
    class_N, names = (None, []) if classes is None else (classes.class_N, classes.names)
    n_top, n_band = max(settings.n, TOP), max(settings.per_band, 1)
    stats = latent_stats(of_images, n_top, n_band, class_N, len(names), on_step("count"))
    sets = top_sets(stats.tops, stats.n_images, None if class_N is None else class_N.numpy(), names, taxonomy)
    shown = shown_pairs(stats.tops.first(settings.n), stats.bands.first(settings.per_band), of_images)
    density_S, row_max_S = _of_rows(of_rows.chunks() if of_rows is not None else subject.rows.chunks(batch_rows), size)
    grid = patch_grid(subject.rows.source, subject.table)
    heat = None
    if isinstance(grid, PatchGrid):
        chunks = _row_chunks(subject, of_rows, batch_rows, on_step("heat maps"))
        heat = heat_maps(chunks, subject.table, grid, shown.images_W, shown.latents_W, row_max_S)
    near = None
    if subject.encodable is not None:
        near = look_near(subject.encodable[0], subject.sae, subject.encodable[1], on_step("near misses"))
    decoder = decoder_neighbours(subject.sae.W_dec, N_NEIGHBOURS, on_step("decoder neighbours"))
    firing = co_firing(of_images, N_NEIGHBOURS)
    return Looked(
        subject, stats, density_S, row_max_S, classes, shown, grid, heat, decoder, firing, sets, near
    ), of_images


def _of_rows(chunks: Iterable[tuple[int, Any]], size: int) -> tuple[np.ndarray, Tensor]:
    """Of every latent, the share of the rows on which it fires and its largest activation on a row."""
    n_active_S, max_S, n_rows = np.zeros(size), torch.zeros(size), 0
    for _, codes in chunks:
        assert isinstance(codes, SparseCodes)
        acts_M, latents_M, _ = codes.to("cpu", torch.float32).csr()
        n_active_S += np.bincount(latents_M.numpy(), minlength=size)
        max_S.scatter_reduce_(0, latents_M, acts_M, "amax")
        n_rows += codes.n_rows
    return n_active_S / n_rows, max_S


def _spilled(
    subject: Subject, work: Path, pool: Pool, batch_rows: int, on_step: Callable[[str], Callable[[int], None]]
) -> tuple[Spill, Spill | None]:
    """Codes of the images; and of the rows, where these are several an image and had to be encoded."""
    size, several = subject.sae.config.d_sae, subject.table.rows_per_image > 1
    of_images, of_rows = Spill(work / "images", size), Spill(work / "rows", size)
    encodes = subject.encoder is not None
    if not (of_images.is_finished and (not (several and encodes) or of_rows.is_finished)):
        of_images, of_rows = Spill(work / "images", size), Spill(work / "rows", size)
        tell = on_step("encode" if encodes else "read codes")
        for chunk in image_chunks(subject.rows, subject.encoder, subject.table, pool, batch_rows):
            of_images.append(chunk.codes)
            if several and encodes:
                of_rows.append(chunk.row_codes)
            tell(chunk.first + chunk.codes.n_rows)
        if several and encodes:
            of_rows.finish()
        of_images.finish()
    return of_images, of_rows if several and encodes else None if several else of_images


def _row_chunks(
    subject: Subject, of_rows: Spill | None, batch_rows: int, tell: Callable[[int], None]
) -> Iterator[tuple[int, SparseCodes]]:
    rows: Any = subject.rows if of_rows is None else of_rows
    starts = subject.table.offsets_N1
    for start, codes in rows.chunks(batch_rows):
        yield start, codes.to("cpu", torch.float32)
        tell(int(np.searchsorted(starts, start + codes.n_rows, side="right")) - 1)


def _classes(labels: pa.Array | None) -> Classes | None:
    """Labels as classes, if they are: fewer than half as many as images, MOST_CLASSES at most (captions are not)."""
    if labels is None or labels.null_count == len(labels):
        return None
    found = labels.dictionary_encode()
    n_classes, n = len(found.dictionary), len(labels)
    if n_classes > MOST_CLASSES or n_classes > n / 2:
        return None
    class_N = torch.from_numpy(found.indices.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64))
    counts = torch.bincount(class_N[class_N >= 0], minlength=n_classes).double().numpy()
    return Classes(found.dictionary.to_pylist(), class_N, counts / counts.sum())


def checked_sizes(subject: Subject) -> None:
    """ValueError: rows of another width than the SAE's."""
    rows, config = subject.rows, subject.sae.config
    width = rows.d_sae if isinstance(rows, StoredCodes) else rows.d
    needed = config.d_sae if isinstance(rows, StoredCodes) else config.d_in
    require(width == needed, f"sae: {subject.path} needs rows of width {needed}, but {rows.path} has {width}")
    if subject.activations is not None:
        beside, d_in = subject.activations[0], config.d_in
        require(beside.d == d_in, f"sae: {subject.path} needs rows of width {d_in}, but {beside.path} has {beside.d}")
