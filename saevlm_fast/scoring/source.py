"""What is scored beside the embeddings of its images: read as often as asked, one row an image or several, pooled.

Shape suffixes: n images of a chunk, B rows of a chunk, E embedding.
"""

from collections.abc import Generator, Iterator, Mapping
from contextlib import ExitStack, closing
from itertools import repeat
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from saevlm_fast.data.codes import Rows, StoredCodes, as_rows, pool_codes
from saevlm_fast.data.pairing import begins_image, check_images_once, check_sides, checked_ids
from saevlm_fast.data.rows import Activations, Matrix, StoredRows, activations_of
from saevlm_fast.errors import require, shown, whole_number
from saevlm_fast.peers import Peers, in_step, rows_of_share
from saevlm_fast.provenance import check_rows_of
from saevlm_fast.runtime import resolve_device
from saevlm_fast.sae import SparseAutoencoder, check_sae, inferred
from saevlm_fast.scoring.encoding import n_latents
from saevlm_fast.sparse_codes import SparseCodes

Pool = Literal["max", "mean"]


def check_pool(pool: object) -> None:
    """ValueError: it is none."""
    require(isinstance(pool, str) and pool in ("max", "mean"), f"pool: {shown(pool)} is not one of max, mean")


def row_of_image(embeddings: Activations) -> dict[str, int]:
    """Where the row of every image is. ValueError: an image has several."""
    ids = embeddings.items()["image"].to_pylist()
    rows = {image: row for row, image in enumerate(ids)}
    message = f"embeddings: {embeddings.path} has several rows of an image; one row an image is needed"
    require(len(rows) == len(ids), message)
    return rows


_KEPT_BYTES = 1 << 30
_IDS = 4096  # read at a time where images are counted


class ScoredImages:
    """Codes, or raw neurons, of images in order, each chunk with the embeddings of the same images by each encoder.

    Args:
        activations, embeddings, sae, pool, batch_rows: as trust.trusted_scores.
        kept_bytes: codes of an SAE that are kept for the next reading; what does not fit is encoded again.
        peers: the ranks among which the images are shared, each of which makes this with the same arguments.

    Attributes:
        rows: of the activations, the rank's. first_image: number of the first image there. n_own, n_images: how many
            the rank and all ranks have; known of several ranks alone.

    Raises:
        ValueError: what monosemanticity.score refuses before it reads rows; a pool of rows without ids; an image whose
            rows do not lie together.
    """

    def __init__(
        self,
        activations: Rows,
        embeddings: Mapping[str, Matrix],
        sae: SparseAutoencoder | None = None,
        *,
        pool: Pool | None = None,
        batch_rows: int = 4096,
        kept_bytes: int = _KEPT_BYTES,
        peers: Peers | None = None,
    ) -> None:
        activations = as_rows(activations, "activations")
        if sae is not None:
            check_sae(sae)
        batch_rows = whole_number("batch_rows", batch_rows)
        if pool is not None:
            check_pool(pool)
        self.activations, self.sae, self.batch_rows = activations, sae, batch_rows
        self.pool: Pool | None = pool
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
        for side in (activations,) if activations.has_items or pool else self.encoders.values():  # of the same images
            check_images_once(side)
        self.n_latents = n_latents(activations, sae)
        self._kept: list[SparseCodes] = []
        self._room = kept_bytes
        self._places: dict[str, dict[str, int]] = {}
        self.peers, self.first_image, self.most_chunks = peers, 0, 0
        self.n_own = self.n_images = 0
        self.rows = rows_of_share(peers, activations.n_rows, batch_rows)
        if peers is not None:
            self._share(peers)

    def _share(self, peers: Peers) -> None:
        """Which rows are the rank's, and where these stand among all images."""
        if self.pool is not None:
            self.rows = range(*(first_of_image(self.activations, row) for row in (self.rows.start, self.rows.stop)))
        self.n_own = len(self.rows) if self.pool is None else count_images(self.activations, self.rows)
        known = peers.collect((len(self.rows), self.n_own))
        self.first_image = sum(n for _, n in known[: peers.rank])
        self.n_images = sum(n for _, n in known)
        self.most_chunks = 1 + max(-(-n // self.batch_rows) for n, _ in known)

    @property
    def sparse(self) -> bool:
        """Whether chunks are codes, and not raw neurons."""
        return self.sae is not None or isinstance(self.activations, StoredCodes)

    def done(self, image: int) -> int:
        """How many images are done once the rank's before that number are; of ranks, if all are as far as this one."""
        return image if self.peers is None else self.n_images * (image - self.first_image) // max(self.n_own, 1)

    def device_of(self, device: torch.device | str) -> torch.device:
        """Where sums live."""
        return device if isinstance(device, torch.device) else resolve_device(device)

    def chunks(self) -> Iterator[tuple[int, SparseCodes | Tensor, dict[str, Tensor]]]:
        """(first image, codes or neurons [n, S], embeddings [n, E] by encoder) of every chunk, in order.

        Raises:
            ValueError: image ids that differ, several rows of an image without a pool, an image without embedding.
        """
        chunks = self._one_row_each() if self.pool is None else self._pooled()
        return in_step(self.peers, chunks, self.most_chunks)

    def _one_row_each(self) -> Iterator[tuple[int, SparseCodes | Tensor, dict[str, Tensor]]]:
        sides: list[tuple[StoredRows, ...]] = [(self.activations, encoder) for encoder in self.encoders.values()]
        pairs = sides or [(self.activations,)]
        ids = zip(*(checked_ids(self.batch_rows, *pair, rows=self.rows) for pair in pairs))
        with ExitStack() as stack:
            chunks = [encoder.chunks(self.batch_rows, self.rows) for encoder in self.encoders.values()]
            images = [stack.enter_context(closing(each)) for each in chunks]
            for (start, values), *parts, _ in zip(self._encoded(), *images, ids):
                yield start, values, dict(zip(self.encoders, (emb_nE for _, emb_nE in parts)))

    def _encoded(self) -> Iterator[tuple[int, SparseCodes | Tensor]]:
        """Chunks of rows as codes, those of an SAE kept as long as there is room."""
        chunks: Generator[tuple[int, SparseCodes | Tensor]] = self.activations.chunks(self.batch_rows, self.rows)
        with closing(chunks):
            for number, (start, values) in enumerate(chunks):
                if self.sae is None or isinstance(values, SparseCodes):
                    yield start, values
                elif number < len(self._kept):
                    codes = self._kept[number]
                    yield start, codes._replace(top_indices=codes.top_indices.long())
                else:
                    codes = inferred(self.sae, values)
                    self._keep(codes, number)
                    yield start, codes

    def _keep(self, codes: SparseCodes, number: int) -> None:
        n_bytes = codes.top_acts.nbytes + codes.top_indices.nbytes // 2
        if number == len(self._kept) and n_bytes <= self._room:
            self._room -= n_bytes
            self._kept.append(codes._replace(top_indices=codes.top_indices.int()))

    # Several rows an image ---------------------------------------------------------------------------------------

    def _pooled(self) -> Iterator[tuple[int, SparseCodes | Tensor, dict[str, Tensor]]]:
        done = self.first_image
        for rows, starts, names, _ in self.whole_images():
            yield done, self._pool(rows, starts), self._embeddings(names, done)
            done += len(names)
        n_images = done if self.peers is None else self.n_images
        for encoder in self.encoders.values():
            require(
                encoder.has_items or encoder.n_rows == n_images,
                f"embeddings: {encoder.n_rows} rows ({encoder.path}), but {n_images} images in {self.activations.path}",
            )

    def whole_images(
        self, beside: Activations | None = None
    ) -> Iterator[tuple[SparseCodes | Tensor, np.ndarray, pa.Array, Tensor | None]]:
        """(rows, where each of their n images begins and the last ends [n + 1], names of the images, beside's rows).

        The last image of a chunk of rows may go on in the next, so its rows wait.

        Args:
            beside: rows of the same number.
        """
        items = self.activations.item_chunks(self.batch_rows, rows=self.rows)
        waiting, names = None, pa.array([], pa.string())
        with ExitStack() as stack:
            others: Iterator[tuple[int, Tensor | None]] = repeat((0, None))
            if beside is not None:
                others = stack.enter_context(closing(beside.chunks(self.batch_rows, self.rows)))
            for (_, rows), (_, other), table in zip(self._encoded(), others, items):
                if waiting is not None:
                    rows, other = joined(waiting[0], rows), _both(waiting[1], other)
                names = pa.concat_arrays([names, *table["image"].chunks])
                starts = image_starts(names)
                last = int(starts[-1])
                if len(starts) > 1:
                    yield rows_between(rows, 0, last), starts, names.take(starts[:-1]), _rows(other, 0, last)
                waiting = rows_between(rows, last, len(names)), _rows(other, last, len(names))
                names = names[last:]
        if waiting is not None:
            yield waiting[0], np.array([0, len(names)]), names[:1], waiting[1]

    def _pool(self, rows: SparseCodes | Tensor, starts: np.ndarray) -> SparseCodes | Tensor:
        """One row an image, of rows whose images begin at starts[:-1]."""
        lengths = torch.from_numpy(np.diff(starts))
        assert self.pool is not None
        if isinstance(rows, SparseCodes):
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
            self._places[name] = row_of_image(encoder)
        places = [self._places[name].get(image) for image in images.to_pylist()]
        if None in places:
            missing = images[places.index(None)].as_py()
            raise ValueError(f"embeddings: {encoder.path} has no row of image {missing!r} of {self.activations.path}")
        return encoder.rows(torch.tensor(places))


def image_starts(names: pa.Array) -> np.ndarray:
    """Where the images of neighbouring rows begin: those rows whose name is not that of the row before."""
    return np.flatnonzero(begins_image(names)) if len(names) else np.zeros(1, np.int64)


def first_of_image(activations: StoredRows, row: int) -> int:
    """The first row from `row` on with which an image begins; or the end."""
    names = pa.array([], pa.string())
    if row > 0:
        for table in activations.item_chunks(_IDS, rows=range(row - 1, activations.n_rows)):
            names = pa.concat_arrays([names, *table["image"].chunks])
            starts = image_starts(names)
            if len(starts) > 1:
                return row - 1 + int(starts[1])
    return activations.n_rows if row > 0 else 0


def count_images(activations: StoredRows, rows: range) -> int:
    """Of rows that begin with an image."""
    n, names = 0, pa.array([], pa.string())
    for table in activations.item_chunks(_IDS, rows=rows):
        names = pa.concat_arrays([names[-1:], *table["image"].chunks])
        n += len(image_starts(names)) - (n > 0)
    return n


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


def _rows(rows: Tensor | None, start: int, stop: int) -> Tensor | None:
    return None if rows is None else rows[start:stop]


def _both(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return None if a is None or b is None else torch.cat([a, b])


class ScoredPatches:
    """Codes of all rows of whole images in order, each chunk with the rows' own embeddings.

    Args:
        activations, embeddings, sae, batch_rows, peers: as patch_score.patch_score.

    Raises:
        ValueError: raw neurons, rows without ids, another number of rows; and what monosemanticity.score refuses.
    """

    def __init__(
        self,
        activations: Rows,
        embeddings: Matrix,
        sae: SparseAutoencoder | None = None,
        *,
        batch_rows: int = 4096,
        peers: Peers | None = None,
    ) -> None:
        activations = as_rows(activations, "activations")
        require(
            activations.has_items,
            f"variant: patch: {activations.path} has no image ids, so nobody knows which rows are of one image",
        )
        self._embeddings = activations_of(embeddings, "embeddings")
        # How images are pooled is not asked: patches are taken as they are, by whole images.
        images = ScoredImages(activations, {}, sae, pool="max", batch_rows=batch_rows, kept_bytes=0, peers=peers)
        self.images, self.peers = images, peers
        self.n_latents, rows = images.n_latents, images.activations
        require(images.sparse, "variant: patch takes codes, whose zeros carry no weight; give an SAE or codes")
        require(
            self._embeddings.n_rows == rows.n_rows,
            f"embeddings: {self._embeddings.n_rows} rows ({self._embeddings.path}), but {rows.n_rows} in {rows.path}; "
            "row i of both must be the same patch",
        )

    def device_of(self, device: torch.device | str) -> torch.device:
        """Where sums live."""
        return self.images.device_of(device)

    @property
    def d_emb(self) -> int:
        """E."""
        return self._embeddings.d

    def chunks(self) -> Iterator[tuple[SparseCodes, Tensor, list[int]]]:
        """(codes of the rows, their embeddings, where each of the n images begins and the last ends [n + 1]).

        Raises:
            ValueError: rows of both sides, where both have ids, that are not the same patch.
        """
        chunks = self.images.whole_images(self._embeddings)
        for rows, starts, _, emb_BE in in_step(self.peers, chunks, self.images.most_chunks):
            assert isinstance(rows, SparseCodes)
            assert emb_BE is not None
            yield rows, emb_BE, starts.tolist()

    def check_ids(self) -> None:
        """That row i of both sides is the same image and token, where both have ids. Reads all ids."""
        a, b = self.images.activations, self._embeddings
        if not (a.has_items and b.has_items):
            return
        n, rows = self.images.batch_rows, self.images.rows
        tables = zip(a.item_chunks(n, rows=rows), b.item_chunks(n, rows=rows))
        for start, (ours, theirs) in zip(range(rows.start, rows.stop, n), tables):
            for name in ("image", "token"):
                row = pc.index(pc.equal(ours[name], theirs[name]).fill_null(False), False).as_py()
                require(
                    row < 0,
                    f"embeddings: row {start + row} is not the same {name} in {b.path} as in {a.path}; row i of both "
                    "must be the same patch",
                )
