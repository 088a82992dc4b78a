"""Activations for reading: one interface over a store and a matrix file.

A store is a directory of shards (data/store.py), a matrix file one [N, d_in] tensor (data/matrix.py). Everything
is memory-mapped: opening reads headers only, and the data may be larger than memory. What leaves this module is float32
and finite. Shape suffixes: N rows, B rows of a batch, D d_in.
"""

import os
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from saevlm_fast.data.matrix import check_finite, map_matrix, read_randomly, will_need
from saevlm_fast.data.prefetch import prefetch
from saevlm_fast.data.store import ACTIVATIONS, ITEM_SCHEMA, StoreIndex, map_shard, read_index, read_items
from saevlm_fast.errors import ActivationError


class StoredRows:
    """What activations and codes have in common: shards laid end to end, and the items of their rows.

    Attributes: path; n_rows; dtype (on disk); source (the store's record of model, layer, point and tokens; None for a
    matrix file); has_items (stores do).
    """

    def __init__(
        self,
        path: Path,
        shard_rows: Sequence[int],
        dtype: torch.dtype,
        source: dict[str, Any] | None,
        items: Sequence[Path],
    ):
        self.path, self.dtype, self.source = path, dtype, source
        self.has_items = bool(items)
        self.n_rows = sum(shard_rows)
        self._items = items
        self._starts = np.cumsum([0, *shard_rows])  # shard s owns rows starts[s]:starts[s + 1]

    def items(self, rows: Tensor | Sequence[int] | None = None) -> pa.Table:
        """image, token and label of `rows` in their order; of all rows if None (iter_items is lighter on memory).

        Reads the item tables of the shards that these rows are in, no others.
        """
        if rows is None:
            return pa.concat_tables(self.iter_items())
        indices, places = _checked_rows(torch.as_tensor(rows, dtype=torch.int64), self.n_rows, self.path).sort()
        bounds = np.searchsorted(indices.numpy(), self._starts)
        tables = [ITEM_SCHEMA.empty_table()]
        for shard in np.flatnonzero(np.diff(bounds)).tolist():
            local = indices[bounds[shard] : bounds[shard + 1]].numpy() - self._starts[shard]
            tables.append(self._shard_items(shard).take(local))
        return pa.concat_tables(tables).take(places.argsort().numpy())

    def iter_items(self) -> Iterator[pa.Table]:
        """The item table of each shard in turn; laid end to end they describe the rows 0 .. n_rows - 1."""
        return (self._shard_items(shard) for shard in range(len(self._starts) - 1))

    def item_chunks(self, n: int) -> Iterator[pa.Table]:
        """The items of the rows of each of chunks(n), in turn."""
        check_chunk(n)
        waiting = ITEM_SCHEMA.empty_table()
        for table in self.iter_items():
            waiting = pa.concat_tables([waiting, table])
            while len(waiting) >= n:
                yield waiting.slice(0, n)
                waiting = waiting.slice(n)
        if len(waiting):
            yield waiting

    def _shard_items(self, shard: int) -> pa.Table:
        if not self.has_items:
            raise ActivationError(f"{self.path}: a matrix file has no item ids; only a store does")
        return read_items(self._items[shard], int(self._starts[shard + 1] - self._starts[shard]))

    def _pieces(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """(shard, low, high): where rows start .. stop - 1 lie, counted within the shard."""
        for shard in range(int(np.searchsorted(self._starts, start, side="right")) - 1, len(self._starts) - 1):
            first, end = int(self._starts[shard]), int(self._starts[shard + 1])
            if first >= stop:
                return
            yield shard, max(start, first) - first, min(stop, end) - first


class Activations(StoredRows):
    """The rows of a store or of a matrix file, in one interface. Made by `open_activations`.

    Attributes: those of StoredRows; d, the width d_in.
    """

    def __init__(self, path: Path, tensors: list[Tensor], source: dict[str, Any] | None, items: list[Path]):
        super().__init__(path, [len(t) for t in tensors], tensors[0].dtype, source, items)
        self.d = tensors[0].shape[1]
        self._tensors = tensors
        for tensor in tensors:  # what is read in order is announced by will_need
            read_randomly(tensor)

    @property
    def row_bytes(self) -> int:
        """Bytes of one row on disk."""
        return self.d * self.dtype.itemsize

    def rows(self, indices: Tensor, out: Tensor | None = None) -> Tensor:
        """The rows at `indices` (int64 [B], any order, repeats allowed) as float32 [B, d_in], into `out` if given."""
        indices = _checked_rows(indices, self.n_rows, self.path)
        out_BD = torch.empty(len(indices), self.d) if out is None else out
        if out_BD.shape != (len(indices), self.d) or out_BD.dtype != torch.float32 or not out_BD.is_contiguous():
            raise ValueError(
                f"out is {list(out_BD.shape)} {out_BD.dtype}; needs contiguous float32 {[len(indices), self.d]}"
            )
        if bool((indices[1:] >= indices[:-1]).all()):
            self._gather(indices, out_BD)
        else:
            ascending, places = indices.sort()
            out_BD.index_copy_(0, places, self._gather(ascending, torch.empty_like(out_BD)))
        check_finite(out_BD, indices, self.path)
        return out_BD

    def _gather(self, ascending: Tensor, out_BD: Tensor) -> Tensor:
        """Ascending rows lie shard after shard, so each shard is one index_select into one slice."""
        rows_BD = out_BD if self.dtype == torch.float32 else torch.empty(out_BD.shape, dtype=self.dtype)
        bounds = np.searchsorted(ascending.numpy(), self._starts)
        for shard in np.flatnonzero(np.diff(bounds)).tolist():
            begin, end = int(bounds[shard]), int(bounds[shard + 1])
            local = ascending[begin:end] - int(self._starts[shard])
            torch.index_select(self._tensors[shard], 0, local, out=rows_BD[begin:end])
        return out_BD if rows_BD is out_BD else out_BD.copy_(rows_BD)

    def will_need(self, start: int, stop: int) -> None:
        """Have the rows start .. stop - 1 read from the disk in the background."""
        for shard, low, high in self._pieces(start, stop):
            will_need(self._tensors[shard][low:high])

    def chunks(self, n: int) -> Generator[tuple[int, Tensor], None, None]:
        """Every row once, in order: (number of the first row, float32 [<= n, d_in]), read ahead in the background."""
        check_chunk(n)
        return prefetch(
            lambda start: (start, self._slice(start, min(start + n, self.n_rows))), range(0, self.n_rows, n)
        )

    def _slice(self, start: int, stop: int) -> Tensor:
        self.will_need(start, stop)
        out_BD, filled = torch.empty(stop - start, self.d), 0
        for shard, low, high in self._pieces(start, stop):
            out_BD[filled : filled + high - low].copy_(self._tensors[shard][low:high])
            filled += high - low
        check_finite(out_BD, range(start, stop), self.path)
        return out_BD


def open_activations(path: str | os.PathLike[str]) -> Activations:
    """Opens a store directory or a matrix file (see the module's docstring) without reading its rows.

    float64 matrices are accepted and rounded to float32 batch by batch. A Fortran-ordered matrix is read correctly, but
    slowly: its rows are scattered over the file. Raises ActivationError for everything that is not usable, an
    incomplete store included. Never unpickles anything but plain tensors.
    """
    file, key = split_key(path)
    if not file.is_dir():
        return Activations(file, [map_matrix(file, key)], source=None, items=[])
    index = open_index(file, ACTIVATIONS)
    tensors = [map_shard(file, shard, index)["activations"] for shard in index.shards]
    return Activations(file, tensors, index.source, [file / shard.items for shard in index.shards])


def split_key(path: str | os.PathLike[str]) -> tuple[Path, str]:
    """FILE and NAME of FILE::NAME. Names of files may hold :: too: of several ways to cut, the longest that exists."""
    parts = str(path).split("::")
    lengths = [n for n in range(len(parts), 0, -1) if Path("::".join(parts[:n])).exists()]
    n = lengths[0] if lengths else 1
    return Path("::".join(parts[:n])), "::".join(parts[n:])


def open_index(path: Path, format: str) -> StoreIndex:
    """The index of a store of that format that can be read: complete, with at least 1 row. Else ActivationError."""
    index = read_index(path)
    if index.format != format:
        raise ActivationError(f"{path}: a store of {index.format.split()[1]}; needed is one of {format.split()[1]}")
    if not index.complete:
        raise ActivationError(
            f"{path}: incomplete store, its writing was interrupted: {index.n_rows} rows in {len(index.shards)} shards "
            "are there; resume it first"
        )
    if index.n_rows == 0:
        raise ActivationError(f"{path}: shape is [0, {index.width}]; at least 1 row is needed")
    return index


def check_chunk(n: int) -> None:
    if n < 1:
        raise ValueError(f"chunk size is {n}; at least 1 is needed")


def _checked_rows(indices: Tensor, n_rows: int, path: Path) -> Tensor:
    if indices.dtype != torch.int64 or indices.ndim != 1:
        raise ValueError(f"indices are {indices.dtype} with {indices.ndim} dimensions; a 1-D int64 tensor is needed")
    if len(indices):
        low, high = (int(bound) for bound in indices.aminmax())
        if low < 0 or high >= n_rows:
            raise ValueError(f"{path}: row {low if low < 0 else high} asked for; there are rows 0 to {n_rows - 1}")
    return indices
