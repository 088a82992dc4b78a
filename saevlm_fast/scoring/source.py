"""What is scored beside the embeddings of its images: read as often as asked, one row an image or several, pooled.

Shape suffixes: n images of a chunk, B rows of a chunk, E embedding.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing
from itertools import chain
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from saevlm_fast.data.codes import StoredCodes, pool_codes
from saevlm_fast.data.pairing import check_sides, checked_ids
from saevlm_fast.data.rows import Activations, Matrix, activations_of
from saevlm_fast.errors import require
from saevlm_fast.provenance import check_rows_of
from saevlm_fast.runtime import resolve_device
from saevlm_fast.sae import SparseAutoencoder, evaluating
from saevlm_fast.scoring.encoding import n_latents
from saevlm_fast.sparse_codes import SparseCodes

Pool = Literal["max", "mean"]
_KEPT_BYTES = 1 << 30


class ScoredImages:
    """Codes, or raw neurons, of images in order, each chunk with the embeddings of the same images by each encoder.

    Args:
        activations, embeddings, sae, pool, batch_rows: as trust.trusted_scores.
        kept_bytes: codes of an SAE that are kept for the next reading; what does not fit is encoded again.

    Raises:
        ValueError: what monosemanticity.score refuses before it reads rows; no embeddings; a pool of rows without ids.
    """

    def __init__(
        self,
        activations: Matrix | StoredCodes,
        embeddings: Mapping[str, Matrix],
        sae: SparseAutoencoder | None = None,
        *,
        pool: Pool | None = None,
        batch_rows: int = 4096,
        kept_bytes: int = _KEPT_BYTES,
    ) -> None:
        if not isinstance(activations, StoredCodes):
            activations = activations_of(activations, "activations")
        require(len(embeddings) > 0, "embeddings: at least one encoder's are needed")
        if sae is not None and not isinstance(sae, SparseAutoencoder):
            raise ValueError(f"sae: {type(sae).__name__} is not a SparseAutoencoder; from_pretrained(DIR) opens one")
        require(pool in (None, "max", "mean"), f"pool: {pool!r} is not one of max, mean")
        self.activations, self.sae, self.pool, self.batch_rows = activations, sae, pool, batch_rows
        self.encoders = {name: activations_of(matrix, "embeddings") for name, matrix in embeddings.items()}
        if pool is None:
            for encoder in self.encoders.values():
                check_sides(activations, encoder)
        else:
            require(
                activations.has_items,
                f"pool: {activations.path} has no image ids, so nobody knows which rows are of one image; a store has",
            )
        if sae is not None:
            check_rows_of(sae, activations)
        self.n_latents = n_latents(activations, sae)
        self._kept: list[SparseCodes] = []
        self._room = kept_bytes
        self._places: dict[str, dict[str, int]] = {}

    def device_of(self, device: torch.device | str) -> torch.device:
        """Where sums live."""
        return resolve_device(device) if isinstance(device, str) else device

    def chunks(self) -> Iterator[tuple[int, SparseCodes | Tensor, dict[str, Tensor]]]:
        """(first image, codes or neurons [n, S], embeddings [n, E] by encoder) of every chunk, in order.

        Raises:
            ValueError: image ids that differ, several rows of an image without a pool, an image without embedding.
        """
        return self._one_row_each() if self.pool is None else self._pooled()

    def _one_row_each(self) -> Iterator[tuple[int, SparseCodes | Tensor, dict[str, Tensor]]]:
        ids = zip(*(checked_ids(self.batch_rows, self.activations, encoder) for encoder in self.encoders.values()))
        with ExitStack() as stack:
            images = [stack.enter_context(closing(e.chunks(self.batch_rows))) for e in self.encoders.values()]
            for (start, values), *parts, _ in zip(self._encoded(), *images, ids):
                yield start, values, dict(zip(self.encoders, (emb_nE for _, emb_nE in parts)))

    def _encoded(self) -> Iterator[tuple[int, SparseCodes | Tensor]]:
        """Chunks of rows as codes, those of an SAE kept as long as there is room."""
        with closing(self.activations.chunks(self.batch_rows)) as chunks:
            for number, (start, values) in enumerate(chunks):
                if self.sae is None or isinstance(values, SparseCodes):
                    yield start, values
                elif number < len(self._kept):
                    codes = self._kept[number]
                    yield start, codes._replace(top_indices=codes.top_indices.long())
                else:
                    with evaluating(self.sae):
                        codes = self.sae.encode(values.to(self.sae.b_dec))
                    self._keep(codes, number)
                    yield start, codes

    def _keep(self, codes: SparseCodes, number: int) -> None:
        n_bytes = codes.top_acts.nbytes + codes.top_indices.nbytes // 2
        if number == len(self._kept) and n_bytes <= self._room:
            self._room -= n_bytes
            self._kept.append(codes._replace(top_indices=codes.top_indices.int()))

    # Several rows an image ---------------------------------------------------------------------------------------

    def _pooled(self) -> Iterator[tuple[int, SparseCodes | Tensor, dict[str, Tensor]]]:
        """The last image of a chunk of rows may go on in the next, so its rows wait."""
        done, waiting, names = 0, None, pa.array([], pa.string())
        items = self.activations.item_chunks(self.batch_rows)
        for (_, values), table in zip(self._encoded(), items):
            rows = values if waiting is None else joined(waiting, values)
            names = pa.concat_arrays([names, *table["image"].chunks])
            starts = image_starts(names)
            ready, left = rows_between(rows, 0, starts[-1]), rows_between(rows, starts[-1], len(names))
            if len(starts) > 1:
                yield done, self._pool(ready, starts), self._embeddings(names.take(starts[:-1]), done)
                done += len(starts) - 1
            waiting, names = left, names[int(starts[-1]) :]
        if waiting is not None:
            yield done, self._pool(waiting, np.array([0, len(names)])), self._embeddings(names[:1], done)
            done += 1
        for encoder in self.encoders.values():
            require(
                encoder.has_items or encoder.n_rows == done,
                f"embeddings: {encoder.n_rows} rows ({encoder.path}), but {done} images in {self.activations.path}",
            )

    def _pool(self, rows: SparseCodes | Tensor, starts: np.ndarray) -> SparseCodes | Tensor:
        """One row an image, of rows whose images begin at starts[:-1]."""
        lengths = torch.from_numpy(np.diff(starts))
        if isinstance(rows, SparseCodes):
            assert self.pool is not None
            return pool_codes(rows, torch.repeat_interleave(lengths), len(lengths), self.pool)
        return torch.segment_reduce(rows, self.pool, lengths=lengths, axis=0)

    def _embeddings(self, names: pa.Array, first: int) -> dict[str, Tensor]:
        return {name: self._embeddings_of(name, encoder, names, first) for name, encoder in self.encoders.items()}

    def _embeddings_of(self, name: str, encoder: Activations, images: pa.Array, first: int) -> Tensor:
        if not encoder.has_items:
            require(
                first + len(images) <= encoder.n_rows,
                f"embeddings: {encoder.n_rows} rows ({encoder.path}), fewer than images in {self.activations.path}",
            )
            return encoder.rows(torch.arange(first, first + len(images)))
        if name not in self._places:
            ids = encoder.items()["image"].to_pylist()
            self._places[name] = dict(zip(reversed(ids), reversed(range(len(ids)))))
            require(
                len(self._places[name]) == len(ids),
                f"embeddings: {encoder.path} has several rows of an image; one row an image is needed",
            )
        places = [self._places[name].get(image) for image in images.to_pylist()]
        if None in places:
            missing = images[places.index(None)].as_py()
            raise ValueError(f"embeddings: {encoder.path} has no row of image {missing!r} of {self.activations.path}")
        return encoder.rows(torch.tensor(places))


def image_starts(names: pa.Array) -> np.ndarray:
    """Where the images of neighbouring rows begin: those rows whose name is not that of the row before."""
    changes = pc.not_equal(names[1:], names[:-1]).fill_null(True).to_numpy(zero_copy_only=False)
    return np.fromiter(chain([0], np.flatnonzero(changes) + 1), dtype=np.int64)


def joined(a: SparseCodes | Tensor, b: SparseCodes | Tensor) -> SparseCodes | Tensor:
    """The rows of both."""
    if isinstance(a, SparseCodes) and isinstance(b, SparseCodes):
        return SparseCodes.join([a, b], a.d_sae)
    assert isinstance(a, Tensor)
    assert isinstance(b, Tensor)
    return torch.cat([a, b])


def rows_between(rows: SparseCodes | Tensor, start: int, stop: int) -> SparseCodes | Tensor:
    """Rows start .. stop - 1."""
    if isinstance(rows, Tensor):
        return rows[start:stop]
    acts_M, latents_M, offsets = rows.csr()
    low, high = int(offsets[start]), int(offsets[stop])
    return SparseCodes.from_flat(acts_M[low:high], latents_M[low:high], offsets[start : stop + 1] - low, rows.d_sae)
