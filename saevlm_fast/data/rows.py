"""Activations for reading: one interface over a store, a matrix file and a matrix in memory.

A store is a directory of shards (data/store.py), a matrix file one [N, d_in] tensor (data/matrix.py). Files are
memory-mapped: opening reads headers only, and the data may be larger than memory. What leaves this module is float32
and finite, and of a store as it was written: a shard is compared with its SHA-256 before its first row is read. Shape
suffixes: N rows, B rows of a batch, D d_in.
"""

import hashlib
import os
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self, SupportsIndex

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from saevlm_fast.data.digests import CheckedFiles, matrix_digest, remembered
from saevlm_fast.data.matrix import SUFFIXES, check_finite, host_matrix, map_matrix, read_randomly, will_need
from saevlm_fast.data.prefetch import prefetch
from saevlm_fast.data.remote_store import AHEAD, RemoteStore, RemoteTensors, open_remote_store
from saevlm_fast.data.row_numbers import bounds_of, check_chunk, checked_rows, whole_numbers
from saevlm_fast.data.store import (
    ACTIVATIONS,
    ITEM_SCHEMA,
    Shard,
    check_usable,
    map_shard,
    open_index,
    read_items,
)
from saevlm_fast.errors import ActivationError, check_kind, require
from saevlm_fast.files import sha256_file
from saevlm_fast.remote.cache import fetched, telling_urls
from saevlm_fast.settings import path_of
from saevlm_fast.urls import is_url, remote_path, url_of


class StoredRows:
    """What activations and codes have in common: shards laid end to end, and the items of their rows.

    Attributes:
        path: of the store or the file; of a matrix in memory what stands for it in messages, `tensor [N, d]`.
        n_rows: N.
        dtype: on disk, or in memory; what is read from it is float32.
        source: the store's record of model, layer, point and tokens; None without a store.
        has_items: whether rows have an image, a token and a label: those of stores do.
    """

    def __init__(
        self,
        path: Path,
        shard_rows: Sequence[int],
        dtype: torch.dtype,
        source: dict[str, Any] | None,
        shards: Sequence[Shard] = (),
        remote: RemoteStore | None = None,
    ):
        """shards: of a store, what its index says of them. remote: of a store that is elsewhere."""
        self.path, self.dtype, self.source = path, dtype, source
        self.has_items = bool(shards)
        self.n_rows = sum(shard_rows)
        self._remote = remote
        files, items = [path / shard.file for shard in shards], [path / shard.items for shard in shards]
        self._files = remote.files if remote else CheckedFiles(files, [shard.sha256 for shard in shards])
        self._items = remote.items if remote else CheckedFiles(items, [shard.items_sha256 for shard in shards])
        self._starts = np.cumsum([0, *shard_rows])  # shard s owns rows starts[s]:starts[s + 1]
        self._opened: tuple[Callable[[str], StoredRows], str] | None = None

    def opened_by(self, opener: "Callable[[str], StoredRows]", path: Path, key: str = "") -> Self:
        """Itself, which knows from now on how another process opens it: a URL with its password, if it has one."""
        self._opened = opener, (url_of(path) if is_url(path) else str(path.absolute())) + (key and f"::{key}")
        return self

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        """Of what was opened its place goes to another process, and not what is mapped. A copy is opened anew."""
        return super().__reduce_ex__(protocol) if self._opened is None else (self._opened[0], self._opened[1:])

    @property
    def block_rows(self) -> int | None:
        """Rows that are fetched together, of a store elsewhere; None of one that is here."""
        return int(np.diff(self._starts).max()) if self._remote else None

    @property
    def index_file(self) -> Path:
        """The index of a store, on this machine."""
        return self._remote.index_file if self._remote else self.path / "index.json"

    def items(self, rows: Tensor | Sequence[int] | None = None, schema: pa.Schema = ITEM_SCHEMA) -> pa.Table:
        """image, token and label of `rows` in their order; of all rows if None (iter_items is lighter on memory).

        schema: as of iter_items.

        Reads the item tables of the shards that these rows are in, no others.
        """
        check_kind("schema", schema, pa.Schema, "a pyarrow schema: ITEM_SCHEMA or TOKEN_SCHEMA")
        if rows is None:
            return pa.concat_tables(self.iter_items(schema))
        indices, places = checked_rows(whole_numbers("rows", rows), self.n_rows, self.path).sort()
        bounds = np.searchsorted(indices.numpy(), self._starts)
        tables = [schema.empty_table()]
        for shard in np.flatnonzero(np.diff(bounds)).tolist():
            local = indices[bounds[shard] : bounds[shard + 1]].numpy() - self._starts[shard]
            tables.append(self._shard_items(shard, schema).take(local))
        return pa.concat_tables(tables).take(places.argsort().numpy())

    def iter_items(self, schema: pa.Schema = ITEM_SCHEMA) -> Iterator[pa.Table]:
        """The item table of each shard in turn; laid end to end they describe the rows 0 .. n_rows - 1.

        schema: the columns; store.TOKEN_SCHEMA adds what rows of a language model have, null in other stores.
        """
        return (self._shard_items(shard, schema) for shard in range(len(self._starts) - 1))

    def item_chunks(self, n: int, schema: pa.Schema = ITEM_SCHEMA, rows: range | None = None) -> Iterator[pa.Table]:
        """The items of the rows of each of chunks(n, rows), in turn; schema as of iter_items."""
        check_chunk(n)
        waiting, rows = schema.empty_table(), range(self.n_rows) if rows is None else rows
        for shard, low, high in self._pieces(rows.start, rows.stop):
            waiting = pa.concat_tables([waiting, self._shard_items(shard, schema).slice(low, high - low)])
            while len(waiting) >= n:
                yield waiting.slice(0, n)
                waiting = waiting.slice(n)
        if len(waiting):
            yield waiting

    def _check(self, shards: Iterable[int]) -> None:
        if self.has_items:
            self._files.check(shards)

    def _shard_items(self, shard: int, schema: pa.Schema = ITEM_SCHEMA) -> pa.Table:
        require(self.has_items, f"{self.path}: a matrix has no item ids; only a store does", ActivationError)
        self._items.check([shard])
        return read_items(self._items.files[shard], int(self._starts[shard + 1] - self._starts[shard]), schema=schema)

    def check_whole(self) -> None:
        """Compares every shard of a store with its SHA-256 now, in a few threads; otherwise each is when first read.

        Raises:
            ActivationError: a file that was altered since it was written.
        """
        self._files.check_all()

    def check_whole_shared(self, rank: int, collect: Callable[[Any], list[Any]]) -> None:
        """The same by several processes, each some of the shards (CheckedFiles.check_shared), of the same store."""
        self._files.check_shared(rank, collect)

    def _fetch_ahead(self, start: int, stop: int) -> None:
        """Of a store elsewhere: have the shards of these rows fetched in the background, and the few that follow."""
        if self._remote:
            shards = [shard for shard, _, _ in self._pieces(start, stop)]
            self._remote.ahead(range(shards[0], min(shards[-1] + 1 + AHEAD, len(self._starts) - 1)))

    def _pieces(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """(shard, low, high): where rows start .. stop - 1 lie, counted within the shard."""
        for shard in range(int(np.searchsorted(self._starts, start, side="right")) - 1, len(self._starts) - 1):
            first, end = int(self._starts[shard]), int(self._starts[shard + 1])
            if first >= stop:
                return
            yield shard, max(start, first) - first, min(stop, end) - first


class Activations(StoredRows):
    """Rows of activations [N, d_in] in one interface, wherever they are: see `open_activations` and `from_tensor`.

    Attributes: those of StoredRows; d, the width d_in.
    """

    def __init__(
        self,
        path: Path,
        tensors: Sequence[Tensor],
        source: dict[str, Any] | None = None,
        shards: Sequence[Shard] = (),
        key: str | None = None,
        remote: RemoteStore | None = None,
        file: Path | None = None,
    ):
        """tensors: of each shard, or of the one file, whose tensor `key` it is. remote: instead of tensors. file: where
        the matrix is on this machine, if path is a URL."""
        index = remote.index if remote else None
        rows = [shard.rows for shard in shards] if index else [len(t) for t in tensors]
        super().__init__(path, rows, index.dtype if index else tensors[0].dtype, source, shards, remote)
        self.d = index.width if index else tensors[0].shape[1]
        self._tensors: Sequence[Tensor] = RemoteTensors(remote, "activations") if remote else tensors
        self._shards, self._key, self._file = shards, key, file or path

    @classmethod
    def from_tensor(cls, x: Tensor | np.ndarray, name: str = "x") -> "Activations":
        """Activations in memory: a torch tensor or a NumPy array [N, d_in], of which nothing is copied.

        float16, bfloat16, float32 or float64, strided in any way; it must not change while it is read. Copied to the
        host is a tensor on a GPU. As in a file, rows are checked when they are read: NaN or infinity is an
        ActivationError there that names the row. name: what messages call it.

        Raises:
            ActivationError: not a tensor or an array, another dtype, not 2-D, or without rows or columns.
        """
        x_ND = host_matrix(x, name)
        return cls(Path(f"tensor {list(x_ND.shape)}"), [x_ND])

    def __repr__(self) -> str:
        return f"Activations({self.n_rows:,} x {self.d:,}, {str(self.dtype).removeprefix('torch.')}, {self.path})"

    @property
    def row_bytes(self) -> int:
        """Bytes of one row on disk."""
        return self.d * self.dtype.itemsize

    def digest(self) -> str:
        """SHA-256 by which the rows are known again: of a store, of its shards' digests in order; of a matrix, of its
        bytes (each file's is remembered: data/digests.py), the same in a file and in memory."""
        if self._shards:
            listed = "".join(f"{shard.rows} {shard.sha256}\n" for shard in self._shards)
            return hashlib.sha256(listed.encode()).hexdigest()
        if self._key is None:
            return matrix_digest(self._tensors[0])
        return remembered(self._file, f"::{self._key}", lambda: matrix_digest(self._tensors[0], str(self.path)))

    def is_same_as(self, other: "Activations") -> bool:
        """Whether these are known to be the same rows without reading any: the same memory, one file, or stores of
        equal digests."""
        if self is other:
            return True
        if self._shards or other._shards:
            return bool(self._shards and other._shards) and self.digest() == other.digest()
        if self._key is None or other._key is None:
            one, two = ([(t.data_ptr(), t.dtype, t.shape, t.stride()) for t in x._tensors] for x in (self, other))
            return self._key == other._key and one == two
        same_key = self._key == other._key or "" in (self._key, other._key)  # "": the only tensor of its file
        try:
            return same_key and self._file.samefile(other._file)
        except OSError:  # removed since it was opened
            return same_key and self._file.absolute() == other._file.absolute()

    def in_common_with(self, other: "Activations") -> str:
        """What is known to be in both, by digests of shards or by where rows are in memory; "" if nothing is. Rows of
        files that were cut or rounded otherwise are not known."""
        if self._shards and other._shards:
            theirs = {shard.sha256 for shard in other._shards if shard.rows}
            n = sum(shard.sha256 in theirs for shard in self._shards)
            return f"{n:,} of the {len(self._shards):,} shards of {self.path} are in {other.path}, too" if n else ""
        if self._shards or other._shards:
            matrix, store = (other, self) if self._shards else (self, other)
            shard = matrix._shard_of(store)
            return f"{matrix.path} is {shard} of {store.path}, or a copy of it" if shard else ""
        in_memory = self._key is None and other._key is None
        shared = in_memory and _share_memory(self._tensors[0], other._tensors[0])
        return "some rows are those that are trained on" if shared else ""

    def _shard_of(self, store: "Activations") -> str:
        """The shard that a file is, or is a copy of."""
        if self._key is None or store._remote:
            return ""
        try:
            size = self._file.stat().st_size
            alike = [shard for shard in store._shards if (store.path / shard.file).stat().st_size == size]
            digest = remembered(self._file, "file", lambda: sha256_file(self._file)) if alike else ""
        except OSError:  # gone since it was opened
            return ""
        return next((shard.file for shard in alike if shard.sha256 == digest), "")

    @property
    def kept_dtype(self) -> torch.dtype:
        """In which rows are kept for training: that on disk; float64 is rounded to float32."""
        return torch.float32 if self.dtype == torch.float64 else self.dtype

    def rows(self, indices: Tensor, out: Tensor | None = None) -> Tensor:
        """The rows at `indices` (int64 [B], any order, repeats allowed) as float32 [B, d_in], into `out` if given,
        which may also be of kept_dtype.

        Raises:
            ValueError: indices or out of another dtype or shape, a row that is not there. ActivationError: NaN or
                infinity, naming the row.
        """
        check_kind("indices", indices, Tensor, "a tensor int64 [B]")
        indices = checked_rows(indices, self.n_rows, self.path)
        out_BD = torch.empty(len(indices), self.d, dtype=torch.float32, device="cpu") if out is None else out
        known = out_BD.dtype in (torch.float32, self.kept_dtype)
        fits = out_BD.shape == (len(indices), self.d) and known and out_BD.is_contiguous()
        require(fits, f"out is {list(out_BD.shape)} {out_BD.dtype}; needs contiguous float32 {[len(indices), self.d]}")
        if bool((indices[1:] >= indices[:-1]).all()):
            self._gather(indices, out_BD)
        else:
            ascending, places = indices.sort()
            out_BD.index_copy_(0, places, self._gather(ascending, torch.empty_like(out_BD)))
        check_finite(out_BD, indices, self.path)
        return out_BD

    def _gather(self, ascending: Tensor, out_BD: Tensor) -> Tensor:
        """Ascending rows lie shard after shard, so each shard is one index_select into one slice."""
        rows_BD = out_BD if self.dtype == out_BD.dtype else torch.empty_like(out_BD, dtype=self.dtype)
        bounds = np.searchsorted(ascending.numpy(), self._starts)
        shards = np.flatnonzero(np.diff(bounds)).tolist()
        self._check(shards)
        if self._remote:
            self._remote.ahead(shards)
        for shard in shards:
            begin, end = int(bounds[shard]), int(bounds[shard + 1])
            local = ascending[begin:end] - int(self._starts[shard])
            torch.index_select(self._tensors[shard], 0, local, out=rows_BD[begin:end])
        return out_BD if rows_BD is out_BD else out_BD.copy_(rows_BD)

    def will_need(self, start: int, stop: int) -> None:
        """Have the rows start .. stop - 1 read from the disk, or fetched from elsewhere, in the background."""
        if self._remote:
            self._remote.ahead(shard for shard, _, _ in self._pieces(start, stop))
            return
        for shard, low, high in self._pieces(start, stop):
            will_need(self._tensors[shard][low:high])

    def chunks(self, n: int, rows: range | None = None) -> Generator[tuple[int, Tensor], None, None]:
        """Every row once, in order: (number of the first row, float32 [<= n, d_in]), read ahead in the background.

        rows: those from start to stop alone; all if None.

        Raises:
            ValueError: n is below 1, rows is no range of rows that are there. ActivationError: NaN or infinity, naming
                the row.
        """
        check_chunk(n)
        first, end = bounds_of(rows, self.n_rows)
        return prefetch(lambda start: (start, self._slice(start, min(start + n, end))), range(first, end, n))

    def _slice(self, start: int, stop: int) -> Tensor:
        out_BD = torch.empty(stop - start, self.d, dtype=torch.float32, device="cpu")
        self.copy_rows(start, out_BD)
        check_finite(out_BD, range(start, stop), self.path)
        return out_BD

    def copy_rows(self, start: int, out_BD: Tensor) -> None:
        """The rows start .. start + len(out_BD) - 1 into out_BD, of any dtype. Nobody has checked that they are finite.

        Raises:
            ActivationError: a file that was altered since it was written.
        """
        stop, filled = start + len(out_BD), 0
        self._fetch_ahead(start, stop)
        self.will_need(start, stop)
        for shard, low, high in self._pieces(start, stop):
            self._check([shard])
            out_BD[filled : filled + high - low].copy_(self._tensors[shard][low:high])
            filled += high - low


Matrix = Activations | Tensor | np.ndarray | str | os.PathLike[str]


def activations_of(x: Matrix, name: str) -> Activations:
    """`x`, `from_tensor(x)` or `open_activations(x)`: nothing has to be wrapped where activations are taken.

    Raises:
        ValueError: anything else, naming the argument. Others as of these.
    """
    if isinstance(x, Tensor | np.ndarray):
        return Activations.from_tensor(x, name)
    if isinstance(x, str | os.PathLike):
        return open_activations(x)
    check_kind(name, x, Activations, "Activations, a tensor or an array [N, d], or a path of some")
    return x


def open_activations(path: str | os.PathLike[str]) -> Activations:
    """Opens a store directory or a matrix file without reading its rows: [N, d_in] in .npy, .safetensors or .pt.

    Either may be a URL (docs/how-to/remote.md): a store's shards are fetched as they are needed, a matrix's file now.

    Of several tensors in a .safetensors or .pt file FILE::NAME names one. float64 matrices are accepted and rounded to
    float32 batch by batch. A Fortran-ordered matrix is read correctly, but slowly: its rows are scattered over the
    file. Never unpickles anything but plain tensors.

    Raises:
        ActivationError: everything that is not usable, an incomplete store included.
        RemoteError: what is elsewhere and cannot be read.
    """
    file, key = split_key(path)
    if is_url(file):
        return _open_remote(file, key)
    if file.is_dir():
        index = open_index(file, ACTIVATIONS)
        tensors = [map_shard(file, shard, index)["activations"] for shard in index.shards]
        opened = Activations(file, tensors, index.source, index.shards)
    else:
        tensors = [map_matrix(file, key)]
        opened = Activations(file, tensors, key=key)
    for tensor in tensors:  # what is read in order is announced by will_need
        read_randomly(tensor)
    return opened.opened_by(open_activations, file, key)


def _open_remote(path: Path, key: str) -> Activations:
    if path.suffix not in SUFFIXES:
        remote = open_remote_store(path)
        check_usable(path, remote.index, ACTIVATIONS)
        opened = Activations(path, (), remote.index.source, remote.index.shards, remote=remote)
        return opened.opened_by(open_activations, path)
    file = fetched(url_of(path)).path  # stays as long as this process
    with telling_urls():
        tensor_ND = map_matrix(file, key)
    read_randomly(tensor_ND)
    return Activations(path, [tensor_ND], key=key, file=file).opened_by(open_activations, path, key)


def split_key(path: str | os.PathLike[str]) -> tuple[Path, str]:
    """FILE and NAME of FILE::NAME. Names of files may hold :: too: of several ways to cut, the longest that exists."""
    if is_url(path):
        url, _, key = url_of(path).partition("::")
        return remote_path(url), key
    parts = str(path_of("path", path)).split("::")
    lengths = [n for n in range(len(parts), 0, -1) if Path("::".join(parts[:n])).exists()]
    n = lengths[0] if lengths else 1
    return Path("::".join(parts[:n])), "::".join(parts[n:])


def _share_memory(x_ND: Tensor, y_MD: Tensor) -> bool:
    """Whether a number is in both; False where that is hard to say."""
    x, y = (each.view(torch.uint8).numpy() if each.stride(1) == 1 else None for each in (x_ND, y_MD))
    try:
        return x is not None and y is not None and np.shares_memory(x, y, max_work=1000)  # type: ignore[arg-type]
    except np.exceptions.TooHardError:
        return False
