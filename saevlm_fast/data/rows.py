"""Activations for reading: one interface over a store and a matrix file, the order of training rows, reading ahead.

A store is a directory of shards (data/store.py), a matrix file one [N, d_in] tensor (data/matrix.py). Everything
is memory-mapped: opening reads headers only, and the data may be larger than memory. What leaves this module is float32
and finite. Shape suffixes: N rows, B rows of a batch, D d_in.
"""

import os
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache, wraps
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from saevlm_fast.data.matrix import check_finite, map_matrix, read_randomly, will_need
from saevlm_fast.data.store import (
    ACTIVATIONS,
    ITEM_SCHEMA,
    ActivationWriter,
    StoreIndex,
    map_shard,
    merge_parts,
    read_index,
    read_items,
    verify,
)
from saevlm_fast.errors import ActivationError

__all__ = [
    "ActivationError",
    "ActivationWriter",
    "Activations",
    "ShuffledRows",
    "StoreIndex",
    "StoredRows",
    "batches",
    "check_finite",
    "loader_threads",
    "merge_parts",
    "open_activations",
    "prefetch",
    "read_index",
    "verify",
]


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


class Rows(Protocol):
    """What an order needs to know of the data; Activations is one."""

    @property
    def n_rows(self) -> int: ...

    @property
    def row_bytes(self) -> int:
        """Bytes of one row on disk."""


class ShuffledRows:
    """Which rows make up training step `step`: a pure function of the arguments, so resuming needs no state.

    Every epoch is a new permutation of all rows, cut into n_rows // batch_size batches. The rest, fewer rows than a
    batch, is dropped (other rows in every epoch); a data set smaller than one batch is one batch, whole, every step.
    Batch size does not enter the permutation. Within a batch rows ascend, which makes reading faster; a consumer that
    splits a batch should take every n-th row, since neighbours on disk are often of the same class.

    A set of at most exact_bytes is permuted exactly. A larger one is permuted in blocks of about block_bytes of
    neighbouring rows, and then row by row within windows of window_bytes of such blocks: a window is read when it
    begins (`blocks_begun`) and stays in the page cache while it is used, so the disk is read a block at a time.

    Random numbers are raw Philox words, which numpy promises never to change (its permutations it does not).
    """

    def __init__(
        self,
        activations: Rows,
        batch_size: int,
        seed: int = 0,
        *,
        exact_bytes: int = 8 << 30,
        window_bytes: int = 512 << 20,
        block_bytes: int = 1 << 20,
    ):
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; at least 1 is needed")
        if seed < 0:
            raise ValueError(f"seed is {seed}; at least 0 is needed")
        self.n_rows, self.batch_size, self.seed = activations.n_rows, batch_size, seed
        row_bytes = max(activations.row_bytes, 512)  # bounds the permutations' own memory when rows are tiny
        self._exact = self.n_rows * row_bytes <= exact_bytes
        self._block = max(1, block_bytes // row_bytes)  # rows in a block, blocks in a window
        self._per_window = max(1, window_bytes // (self._block * row_bytes))

    @property
    def batches_per_epoch(self) -> int:
        return max(1, self.n_rows // self.batch_size)

    def batch(self, step: int) -> Tensor:
        """Rows of step `step` (counted from 0 over all epochs): int64 [min(batch_size, n_rows)], ascending."""
        epoch, start, stop = self._span(step)
        rows = self._exact_slice(epoch, start, stop) if self._exact else self._windowed_slice(epoch, start, stop)
        return torch.from_numpy(np.sort(rows))

    def blocks_begun(self, step: int, anew: bool = False) -> list[tuple[int, int]]:
        """The blocks (first row, row after its last), ascending, of the windows that begin in step `step`.

        anew: also of the window that was begun before. [] if the rows are permuted exactly.
        """
        if self._exact:
            return []
        epoch, start, stop = self._span(step)
        order, size = self._block_order(epoch), self._per_window
        windows = [window for window, first in self._windows(epoch, start, stop) if anew or first >= start]
        blocks = np.sort(
            np.concatenate([order[:0], *(order[window * size : (window + 1) * size] for window in windows)])
        )
        return [(first, min(first + self._block, self.n_rows)) for first in (blocks * self._block).tolist()]

    def _span(self, step: int) -> tuple[int, int, int]:
        """The step's epoch, and its first and last + 1 position in that."""
        epoch, position = divmod(step, self.batches_per_epoch)
        start = position * self.batch_size
        return epoch, start, min(start + self.batch_size, self.n_rows)

    def _exact_slice(self, epoch: int, start: int, stop: int) -> np.ndarray:
        return _permutation(self.n_rows, self.seed, epoch)[start:stop]

    def _windowed_slice(self, epoch: int, start: int, stop: int) -> np.ndarray:
        """Positions start:stop of the epoch's windows laid end to end."""
        pieces = []
        for window, first in self._windows(epoch, start, stop):
            rows = _window(self.n_rows, self._block, self._per_window, self.seed, epoch, window)
            pieces.append(rows[max(start - first, 0) : max(stop - first, 0)])
        return np.concatenate(pieces)

    def _block_order(self, epoch: int) -> np.ndarray:
        return _permutation(-(-self.n_rows // self._block), self.seed, epoch)

    def _windows(self, epoch: int, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """(window, position of its first row) of the windows that positions start:stop are in."""
        block, per_window, order = self._block, self._per_window, self._block_order(epoch)
        # All blocks are full but the last one, wherever the permutation put it: its window is shorter.
        missing = len(order) * block - self.n_rows
        short_window = int(np.flatnonzero(order == len(order) - 1)[0]) // per_window
        for window in range(start // (per_window * block), -(-len(order) // per_window)):
            first = window * per_window * block - (missing if window > short_window else 0)
            if first >= stop:
                return
            yield window, first


def _made_once(make: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    """The last few results are kept; who asks while one is made waits, so that several threads do not all make it."""
    kept, asking = lru_cache(maxsize=4)(make), threading.Lock()

    @wraps(make)
    def ask(*args: int) -> np.ndarray:
        with asking:
            return kept(*args)

    return ask


@_made_once
def _window(n_rows: int, block: int, per_window: int, seed: int, epoch: int, window: int) -> np.ndarray:
    """The rows of a window's blocks, permuted."""
    blocks = _permutation(-(-n_rows // block), seed, epoch)[window * per_window : (window + 1) * per_window]
    rows = (blocks[:, None] * block + np.arange(block)).ravel()
    rows = rows[rows < n_rows]
    return rows[_permutation(len(rows), seed, epoch, window)]


@_made_once
def _permutation(n: int, *key: int) -> np.ndarray:
    """A random permutation of range(n) that depends on n and key alone, the same on every machine.

    Sorts random words that carry their index in the low bits: they are all different, so every way of sorting agrees.
    """
    bits = np.uint64(max(1, (n - 1).bit_length()))
    words = np.random.Philox(np.random.SeedSequence(key)).random_raw(n) >> bits << bits
    words |= np.arange(n, dtype=np.uint64)
    words.sort()
    return (words & ((np.uint64(1) << bits) - np.uint64(1))).astype(np.int64)


Job = TypeVar("Job")
Loaded = TypeVar("Loaded")


def batches(
    activations: Activations,
    order: ShuffledRows,
    start_step: int,
    n_steps: int,
    pin_memory: bool = False,
    announce: bool = True,
) -> Generator[tuple[Tensor, Tensor], None, None]:
    """(rows int64 [B], float32 [B, d_in]) of steps start_step .. start_step + n_steps - 1, read ahead in threads.

    pin_memory: batches in page-locked memory, for asynchronous copies to a GPU. announce: have whole windows of blocks
    read from the disk when they begin; not worth it for a few steps of one.
    """
    if order.n_rows != activations.n_rows:
        raise ValueError(f"order is over {order.n_rows} rows; {activations.path} has {activations.n_rows}")

    def load(step: int) -> tuple[Tensor, Tensor]:
        for start, stop in order.blocks_begun(step, anew=step == start_step) if announce else ():
            activations.will_need(start, stop)
        rows = order.batch(step)
        out_BD = torch.empty(len(rows), activations.d, pin_memory=pin_memory)
        return rows, activations.rows(rows, out=out_BD)

    return prefetch(load, range(start_step, start_step + n_steps), n_threads=4)  # each waits for its disk reads


def prefetch(
    load: Callable[[Job], Loaded], jobs: Iterable[Job], n_threads: int | None = None
) -> Generator[Loaded, None, None]:
    """load(job) for every job, in order, at least two ahead of the consumer, in background threads.

    n_threads: by default a quarter of torch's, at most 4, for jobs that compute.

    An exception in load is raised where its result would have come. Closing the generator, or any exception while it
    waits (Ctrl-C), cancels what has not begun and waits for what has.
    """
    n_threads = n_threads or max(1, min(4, torch.get_num_threads() // 4))
    pool = loader_threads(n_threads)
    pending: deque[Future[Loaded]] = deque()
    try:
        for job in jobs:
            pending.append(pool.submit(load, job))
            if len(pending) > n_threads + 1:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _use_one_core() -> None:
    torch.set_num_threads(1)
    torch.get_num_threads()  # fixes it for this thread: torch adopts the process's number at a thread's first question


def loader_threads(n_threads: int) -> ThreadPoolExecutor:
    """Threads in which torch uses one core each: with a team of its own per thread a loader slows the consumer."""
    consumer_threads = torch.get_num_threads()
    started = threading.Barrier(n_threads + 1)
    pool = ThreadPoolExecutor(n_threads, "activations", initializer=_use_one_core)
    for _ in range(n_threads):
        pool.submit(started.wait)
    started.wait()
    torch.set_num_threads(consumer_threads)  # set_num_threads also decides for threads that start later: restore that
    return pool
