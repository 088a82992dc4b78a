"""Sparse codes: written to a store, read from one, pooled over the tokens of an image.

A store of codes is a store (data/store.py) whose shards hold rows in CSR form: row b owns entries
row_offsets[b]:row_offsets[b + 1] of acts (finite, above 0) and latents (ascending within a row, each at most once).
ImageNet's 1.28 M CLS tokens with k = 20 take 20 * (2 + 2) + 4 bytes a row in float16 with d_sae <= 65536: 108 MB, and
their item ids about a tenth of that. Shape suffixes: N rows or images, M entries, S d_sae.
"""

import os
from collections.abc import Generator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from saevlm_fast.data.matrix import SUFFIXES
from saevlm_fast.data.prefetch import prefetch
from saevlm_fast.data.remote_store import RemoteStore, open_remote_store
from saevlm_fast.data.row_numbers import bounds_of, check_chunk
from saevlm_fast.data.rows import Activations, Matrix, StoredRows, activations_of, split_key
from saevlm_fast.data.store import CODES, StoreIndex, check_usable, map_shard, open_index, read_index
from saevlm_fast.data.writing import StoreWriter
from saevlm_fast.errors import ActivationError, require
from saevlm_fast.settings import path_of
from saevlm_fast.sparse_codes import SparseCodes
from saevlm_fast.urls import is_url

__all__ = ["CodesWriter", "StoredCodes", "mean_pool_codes", "open_codes", "pool_codes"]

# Pooling -------------------------------------------------------------------------------------------------------------


def mean_pool_codes(codes: SparseCodes, image_of_row: Tensor, n_images: int) -> SparseCodes:
    """The mean over every image's tokens of the dense codes, as codes: what picks the top images.

    docs/recipe.md section 2. Arguments, result and errors are those of pool_codes.
    """
    return pool_codes(codes, image_of_row, n_images, "mean")


def pool_codes(codes: SparseCodes, image_of_row: Tensor, n_images: int, pool: Literal["mean", "max"]) -> SparseCodes:
    """The mean or the maximum over every image's tokens of the dense codes, as codes.

    Args:
        codes: one row a token, on any device.
        image_of_row: int64 [N tokens], the image of every row, in any order, each image any number of times.
        n_images: rows of the result; an image without tokens has none that fire.
        pool: mean or max; a latent that does not fire on a token counts as 0 there.

    Returns:
        Codes [n_images, d_sae] in CSR form. Sums of means are float64, rounded once to the dtype of top_acts; a latent
        that fires on a token stays above 0.

    Raises:
        ValueError: image_of_row of another dtype or length, or outside 0 .. n_images - 1.
    """
    _check_images(image_of_row, codes.n_rows, n_images)  # where it is: from the host it costs no wait for a device
    acts_M, latents_M, row_offsets = codes.csr()
    image_of_row = image_of_row.to(latents_M.device, non_blocking=True)
    rows_M = codes.entry_rows()
    inside_M = (rows_M < codes.n_rows) & (acts_M != 0)
    acts_M, latents_M, images_M = acts_M[inside_M], latents_M[inside_M], image_of_row[rows_M[inside_M]]
    if len(latents_M) == 0:
        return SparseCodes.from_flat(acts_M, latents_M, row_offsets.new_zeros(n_images + 1), codes.d_sae)
    keys_M, order_M = (images_M * codes.d_sae + latents_M).sort(stable=True)
    keys_P, counts_P = torch.unique_consecutive(keys_M, return_counts=True)  # P pairs of image and latent
    images_P = keys_P // codes.d_sae
    if pool == "mean":
        sums_P = torch.segment_reduce(acts_M[order_M].double(), "sum", lengths=counts_P)
        means_P = sums_P / torch.bincount(image_of_row, minlength=n_images)[images_P]
        pooled_P = _rounded(means_P, acts_M.dtype)
    else:
        pooled_P = torch.segment_reduce(acts_M[order_M], "max", lengths=counts_P)
    row_offsets = pad(torch.bincount(images_P, minlength=n_images).cumsum(0), (1, 0))
    return SparseCodes.from_flat(pooled_P, keys_P % codes.d_sae, row_offsets, codes.d_sae)


def _check_images(image_of_row: Tensor, n_rows: int, n_images: int) -> None:
    require(
        image_of_row.shape == (n_rows,) and image_of_row.dtype == torch.int64,
        f"image_of_row: {image_of_row.dtype} {list(image_of_row.shape)}; int64 [{n_rows}] is needed, one a row",
    )
    low, high = (int(bound) for bound in image_of_row.aminmax()) if n_rows else (0, -1)
    require(low >= 0 and high < n_images, f"image_of_row: {low} to {high} is not within 0 to {n_images - 1}")


def _rounded(acts_M: Tensor, dtype: torch.dtype) -> Tensor:
    """To dtype. What is above 0 stays so, as the smallest positive number: a latent that fires must not become dead."""
    rounded_M = acts_M.to(dtype)
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    smallest = torch.ones(1, dtype=bits, device=acts_M.device).view(dtype)
    return torch.where((rounded_M == 0) & (acts_M > 0), smallest, rounded_M)


# Writing -------------------------------------------------------------------------------------------------------------


class CodesWriter(StoreWriter):
    """Writes a store of codes, shard by shard; `width` is d_sae:

        with CodesWriter(path, d_sae, torch.float16, {"model": ..., "sae": ...}) as writer:
            writer.write_shard(0, sae.encode(x_BD), {"image": [...], "token": [...], "label": [...]})

    Takes SparseCodes, whose leading dimensions are flattened. Zeros and padding are dropped. An act too small for the
    store's dtype becomes its smallest positive number, since a latent that fires must not become dead.
    """

    FORMAT = CODES

    def _shard_tensors(self, rows: Any, where: str) -> tuple[int, dict[str, Tensor]]:
        require(isinstance(rows, SparseCodes), f"rows: {type(rows).__name__}; a store of codes takes SparseCodes")
        codes: SparseCodes = rows.map(Tensor.detach).to("cpu")
        d_sae = self._index.width
        require(codes.d_sae == d_sae, f"rows: codes of {codes.d_sae} latents; the store's are of {d_sae}")
        codes.check_layout(where)
        codes = codes.compact()
        codes.check(where, as_stored=True)
        acts_M, latents_M, row_offsets = codes.csr()
        stored_M = _rounded(acts_M, self._index.dtype)
        _check_overflow(stored_M, codes, where)
        (latents_dtype,), _ = self._index.layout(codes.n_rows, len(stored_M))["latents"]
        offsets_dtype = torch.int32 if len(stored_M) < 1 << 31 else torch.int64
        return codes.n_rows, {
            "acts": stored_M,
            "latents": latents_M.to(latents_dtype),
            "row_offsets": row_offsets.to(offsets_dtype),
        }


def _check_overflow(stored_M: Tensor, codes: SparseCodes, where: str) -> None:
    over_M = stored_M.isinf()
    if bool(over_M.any()):
        entry, largest = int(over_M.nonzero()[0]), torch.finfo(stored_M.dtype).max
        wider = "; use bfloat16 or float32" if stored_M.dtype == torch.float16 else ""
        row, latent, act = codes.row_of(entry), int(codes.top_indices[entry]), float(codes.top_acts[entry])
        raise ActivationError(f"{where}: row {row}, latent {latent} is {act:g}; the largest is {largest:g}{wider}")


# Reading -------------------------------------------------------------------------------------------------------------


class StoredCodes(StoredRows):
    """The rows of a store of codes. Made by `open_codes`.

    Attributes: those of StoredRows; d_sae; n_entries, latents that fire, summed over the rows.
    """

    def __init__(
        self, path: Path, index: StoreIndex, shards: Sequence[dict[str, Tensor]], remote: RemoteStore | None = None
    ):
        super().__init__(path, [shard.rows for shard in index.shards], index.dtype, index.source, index.shards, remote)
        self.d_sae = index.width
        self._shards, self._names = shards, [shard.file for shard in index.shards]

    @cached_property
    def n_entries(self) -> int:
        """Of a store elsewhere every shard is fetched for it."""
        return sum(len(shard["acts"]) for shard in self._shards)

    def chunks(self, n: int, rows: range | None = None) -> Generator[tuple[int, SparseCodes], None, None]:
        """Every row once, in order, <= n rows at a time, read ahead in the background; of `rows` those alone.

        Yields:
            The number of the first row, and codes [<= n, d_sae] in CSR form, activations float32.

        Raises:
            ActivationError: a damaged shard, naming its file and the row.
            ValueError: n below 1, rows that are not there.
        """
        check_chunk(n)
        first, end = bounds_of(rows, self.n_rows)
        return prefetch(lambda start: (start, self._slice(start, min(start + n, end))), range(first, end, n))

    def _slice(self, start: int, stop: int) -> SparseCodes:
        self._fetch_ahead(start, stop)
        return SparseCodes.join([self._read(*piece) for piece in self._pieces(start, stop)], self.d_sae)

    def _read(self, shard: int, low: int, high: int) -> SparseCodes:
        """Rows low .. high - 1 of a shard, checked."""
        self._check([shard])
        tensors, where = self._shards[shard], str(self.path / self._names[shard])
        first_row = int(self._starts[shard]) + low
        offsets, n_entries = tensors["row_offsets"], len(tensors["acts"])
        begin, end = int(offsets[low]), int(offsets[high])
        at_start, at_end = low > 0 or begin == 0, high < len(offsets) - 1 or end == n_entries
        require(
            0 <= begin <= end <= n_entries and at_start and at_end,
            f"{where}: row_offsets of rows {first_row} to {first_row + high - low - 1} go from {begin} to {end}, "
            f"which does not fit the file's {n_entries} entries",
            ActivationError,
        )
        acts_M, latents_M = tensors["acts"][begin:end].float(), tensors["latents"][begin:end].long()
        codes = SparseCodes.from_flat(acts_M, latents_M, offsets[low : high + 1].long() - begin, self.d_sae)
        codes.check(where, first_row, as_stored=True)
        return codes


Rows = Matrix | StoredCodes


def as_rows(x: Rows, name: str) -> Activations | StoredCodes:
    """Activations, as of activations_of, or stored codes, also of a path. Raises as activations_of and open_codes."""
    if isinstance(x, StoredCodes):
        return x
    if isinstance(x, str | os.PathLike) and _format(split_key(path_of(name, x))[0]) == CODES:
        return open_codes(x)
    return activations_of(x, name)


def _format(path: Path) -> str | None:
    """Of a store; None of what is none."""
    if is_url(path):
        return None if path.suffix in SUFFIXES else open_remote_store(path).index.format
    return read_index(path).format if path.is_dir() else None


def open_codes(path: str | os.PathLike[str]) -> StoredCodes:
    """Opens a store of codes: headers only, the rest is memory-mapped.

    Raises:
        ActivationError: anything that is not usable: no store, one of activations, incomplete, damaged.
        RemoteError: what is elsewhere and cannot be read.
    """
    path = path_of("path", path)
    if is_url(path):
        remote = open_remote_store(path)
        check_usable(path, remote.index, CODES)
        return StoredCodes(path, remote.index, remote.shards, remote).opened_by(open_codes, path)
    index = open_index(path, CODES)
    shards = [map_shard(path, shard, index) for shard in index.shards]
    return StoredCodes(path, index, shards).opened_by(open_codes, path)
