"""A store on disk, of activations or of sparse codes: its index, its writer, its checks.

A store is a directory:

    index.json               {"format", "version", "complete", "shape": [N, width], "dtype", "source": {...}, "shards"}
                             one record a shard: {"number", "rows", "file", "sha256", "items", "items_sha256"}
    shard-00000.safetensors  of activations (width is d_in): "activations" [rows, d_in]
                             of codes (width is d_sae), CSR: "acts" [M], "latents" [M], uint16 up to d_sae 65536, then
                             int32, and "row_offsets" [rows + 1], int32 unless M needs int64
    items-00000.parquet      image (string), token (int32), label (string or null) of every row of the shard

Activations and acts are float16, bfloat16 or float32. Row i of the store is row i of its shards laid end to end in the
order of their numbers. Every file is written atomically, and the index after every shard, so a writer killed at any
moment leaves a store that can be resumed, and that readers refuse until it is ("complete": false). Numbers belong to
the work, not to the process: several ranks may each write some of the numbers, keep their records in
index.part-RANK.json, and `merge_parts` joins them. Codes are written and checked in data/codes.py.
"""

import json
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from saevlm_fast.data.matrix import SAFETENSORS_DTYPES, check_finite, dtype_names, safetensors_header
from saevlm_fast.errors import ActivationError, first_line
from saevlm_fast.files import atomic_write, remove_leftovers, save_safetensors_atomic, sha256_file

ACTIVATIONS, CODES, VERSION = "saevlm-fast activations", "saevlm-fast codes", 1
WIDTH_NAMES = {ACTIVATIONS: "d_in", CODES: "d_sae"}
STORE_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
ITEM_SCHEMA = pa.schema([("image", pa.string()), ("token", pa.int32()), ("label", pa.string())])

_TENSOR_DTYPES = SAFETENSORS_DTYPES | {"U16": torch.uint16, "I32": torch.int32, "I64": torch.int64}

Items = Mapping[str, Any]  # column name -> one value a row (a sequence or a tensor); a pyarrow table will do too


@dataclass(frozen=True)
class Shard:
    """One record of the index: the shard's number in the order of rows, its rows, its two files and their SHA-256."""

    number: int
    rows: int
    file: str
    sha256: str
    items: str
    items_sha256: str


@dataclass(frozen=True)
class StoreIndex:
    """What index.json says. `source` is free-form: model, layer, point, tokens ...; width is d_in, of codes d_sae."""

    format: str
    width: int
    dtype: torch.dtype
    source: dict[str, Any]
    shards: tuple[Shard, ...] = ()
    complete: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.width < 1 << 31:
            raise ActivationError(f"{WIDTH_NAMES[self.format]} is {self.width}; 1 to 2^31 - 1 is needed")
        if self.dtype not in STORE_DTYPES.values():
            raise ActivationError(f"dtype is {self.dtype}; a store holds {dtype_names(STORE_DTYPES.values())}")

    @property
    def n_rows(self) -> int:
        return sum(shard.rows for shard in self.shards)

    @property
    def latents_dtype(self) -> torch.dtype:
        """Of codes on disk: the smallest that holds every latent."""
        return torch.uint16 if self.width <= 1 << 16 else torch.int32

    def layout(self, rows: int, n_entries: int) -> dict[str, tuple[tuple[torch.dtype, ...], list[int]]]:
        """What a shard's file holds: name -> (dtypes allowed, shape); n_entries is M of codes."""
        if self.format == ACTIVATIONS:
            return {"activations": ((self.dtype,), [rows, self.width])}
        return {
            "acts": ((self.dtype,), [n_entries]),
            "latents": ((self.latents_dtype,), [n_entries]),
            "row_offsets": ((torch.int32, torch.int64), [rows + 1]),
        }


def read_index(path: str | os.PathLike[str]) -> StoreIndex:
    """The index of the store at `path`, complete or not. Raises ActivationError if there is none or it is damaged."""
    if not (Path(path) / "index.json").is_file():
        raise ActivationError(f"{path}: no index.json in it: not a store of activations or codes")
    return _read_index_file(Path(path) / "index.json")


def _read_index_file(file: Path) -> StoreIndex:
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
        if raw["format"] not in WIDTH_NAMES or raw["version"] != VERSION:
            known = " or ".join(map(repr, WIDTH_NAMES))
            raise ValueError(f"format {raw['format']!r} version {raw['version']!r}; needed {known} version {VERSION}")
        shards = tuple(Shard(**record) for record in raw["shards"])
        n_rows, width = (int(length) for length in raw["shape"])
        dtype, source = STORE_DTYPES[raw["dtype"]], dict(raw["source"])
        index = StoreIndex(raw["format"], width, dtype, source, shards, bool(raw["complete"]))
        if index.n_rows != n_rows or any(shard.rows < 0 for shard in shards):
            raise ValueError(f"shape says {n_rows} rows, the shards {index.n_rows}")
        if any(Path(name).name != name for shard in shards for name in (shard.file, shard.items)):
            raise ValueError("a shard's file lies outside the store")
        if [shard.number for shard in shards] != sorted({shard.number for shard in shards}):
            raise ValueError("shard numbers do not ascend")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ActivationError(f"{file}: damaged index: {type(error).__name__}: {first_line(error)}") from error
    return index


def _write_index_file(file: Path, index: StoreIndex) -> None:
    value = {
        "format": index.format,
        "version": VERSION,
        "complete": index.complete,
        "shape": [index.n_rows, index.width],
        "dtype": str(index.dtype).removeprefix("torch."),
        "source": index.source,
    }
    # A line for each shard: the file is written after every one of maybe ten thousand, and json's indentation is slow.
    lines = ",\n".join(json.dumps(vars(shard)) for shard in index.shards)
    head = json.dumps(value, indent=2, allow_nan=False).removesuffix("\n}")
    with atomic_write(file) as temporary:
        temporary.write_text(f'{head},\n  "shards": [\n{lines}\n  ]\n}}\n', encoding="utf-8")


def joined_index(path: str | os.PathLike[str]) -> StoreIndex:
    """The index together with what ranks have written and nobody has merged yet. Nothing on the disk changes."""
    index = read_index(path)
    shards = {shard.number: shard for part in _part_files(Path(path)) for shard in _read_index_file(part).shards}
    shards |= {shard.number: shard for shard in index.shards}
    return replace(index, shards=tuple(shards[number] for number in sorted(shards)))


def map_shard(path: Path, shard: Shard, index: StoreIndex) -> dict[str, Tensor]:
    """The shard's tensors by name, after the cheap checks: files, shapes and dtypes, not what is in them.

    Unlike np.memmap, from_file keeps no file open: thousands fit.
    """
    for file in (path / shard.file, path / shard.items):
        if not file.is_file():
            raise ActivationError(f"{file}: missing, but the store's index lists it")
    file = path / shard.file
    entries, data_start = safetensors_header(file)
    _check_layout(file, entries, shard, index)
    raw = torch.from_file(str(file), shared=False, size=file.stat().st_size, dtype=torch.uint8)
    return {name: _tensor_at(file, name, raw[data_start:], entry) for name, entry in entries.items()}


def _check_layout(file: Path, entries: Mapping[str, Mapping[str, Any]], shard: Shard, index: StoreIndex) -> None:
    acts_shape = entries.get("acts", {"shape": []})["shape"]
    expected = index.layout(shard.rows, math.prod(acts_shape))
    found = {name: (_TENSOR_DTYPES.get(entry["dtype"]), entry["shape"]) for name, entry in entries.items()}
    fits = set(found) == set(expected) and all(
        found[name][0] in dtypes and found[name][1] == shape for name, (dtypes, shape) in expected.items()
    )
    if not fits:
        holds = ", ".join(f"{name} {entry['dtype']} {entry['shape']}" for name, entry in list(entries.items())[:4])
        needed = ", ".join(
            f"{name} {' or '.join(map(_dtype_name, dtypes))} {shape}" for name, (dtypes, shape) in expected.items()
        )
        raise ActivationError(f"{file}: holds {holds or 'nothing'}; the store's index says {needed}")


def _tensor_at(file: Path, name: str, data: Tensor, entry: Mapping[str, Any]) -> Tensor:
    dtype, (begin, end) = _TENSOR_DTYPES[entry["dtype"]], entry["data_offsets"]
    offset = data.storage_offset() + begin
    if end - begin != math.prod(entry["shape"]) * dtype.itemsize or offset % dtype.itemsize:
        raise ActivationError(f"{file}: damaged safetensors header: {name} lies at {begin} to {end}")
    return data[begin:end].view(dtype).view(entry["shape"])


def read_items(file: Path, rows: int) -> pa.Table:
    """The item table of a shard of so many rows."""
    try:
        table = pq.read_table(file, schema=ITEM_SCHEMA)
    except (OSError, pa.ArrowException) as error:
        raise ActivationError(f"{file}: damaged item table: {first_line(error)}") from error
    if len(table) != rows:
        raise ActivationError(f"{file}: {len(table)} rows; the store's index says {rows}")
    return table


def verify(path: str | os.PathLike[str], on_bytes: Callable[[int], None] = lambda done: None) -> StoreIndex:
    """Reads the whole store (complete or not) and compares it with its index: sizes, shapes, dtypes, every SHA-256.

    on_bytes: called after every shard with the bytes read so far. Returns the index of a sound store (joined_index);
    raises ActivationError naming each missing, truncated or altered file.
    """
    path, index = Path(path), joined_index(path)
    damage, done = [], 0
    for shard in index.shards:
        problem = _shard_damage(path, shard, index)
        if problem:
            damage.append(problem)
        else:
            done += (path / shard.file).stat().st_size + (path / shard.items).stat().st_size
        on_bytes(done)
    if damage:
        more = f"; and {len(damage) - 5} more" if len(damage) > 5 else ""
        raise ActivationError("; ".join(damage[:5]) + more)
    return index


def _shard_damage(path: Path, shard: Shard, index: StoreIndex) -> str | None:
    try:
        map_shard(path, shard, index)
        for name, digest in ((shard.file, shard.sha256), (shard.items, shard.items_sha256)):
            if sha256_file(path / name) != digest:
                return f"{path / name}: altered, its SHA-256 is not the one in the store's index"
        read_items(path / shard.items, shard.rows)
    except ActivationError as error:
        return str(error)
    return None


Writer = TypeVar("Writer", bound="StoreWriter")


class StoreWriter(ABC):
    """What writing activations and writing codes have in common: whole shards, by number.

    Alone, a process numbers its shards from 0 and closes (leaving the `with` block without an exception closes). After
    a crash `resume(path)` goes on; its `n_rows` rows are on the disk and must not come again. Several processes: rank 0
    creates the store, every rank resumes it with its own `part` and writes shards by number, skipping those in `done`;
    in the end rank 0 calls `merge_parts(path, complete=True)`.
    """

    FORMAT: ClassVar[str]

    def __init__(
        self,
        path: str | Path,
        width: int,
        dtype: torch.dtype,
        source: Mapping[str, Any],
        *,
        force: bool = False,
    ):
        """Starts an empty store. A directory that is not empty is refused; `force` deletes the store in it."""
        index = StoreIndex(self.FORMAT, width, dtype, dict(source))
        _claim_directory(Path(path), force)
        _write_index_file(Path(path) / "index.json", index)
        self._start(Path(path), index, part=None)

    @classmethod
    def resume(cls: type[Writer], path: str | Path, *, part: int | None = None) -> Writer:
        """Continues a store after the shards its index lists. part: this rank, if several processes write.

        Alone (part None), it first merges the parts that ranks of an earlier run left. Ranks must not resume before
        rank 0 has called merge_parts.
        """
        path = Path(path)
        index = merge_parts(path) if part is None else read_index(path)
        if index.format != cls.FORMAT:
            raise ActivationError(
                f"{path}: a store of {index.format.split()[1]}; needed is one of {cls.FORMAT.split()[1]}"
            )
        for shard in index.shards:
            map_shard(path, shard, index)
        writer = cls.__new__(cls)
        writer._start(path, index, part)
        return writer

    def _start(self, path: Path, index: StoreIndex, part: int | None) -> None:
        self.path, self.part = path, part
        self._index = index
        self._others = frozenset(shard.number for shard in index.shards) if part is not None else frozenset()
        if part is not None:
            self._index = replace(index, shards=())

    @property
    def n_rows(self) -> int:
        """Rows on the disk (of this part): those that survive a crash."""
        return self._index.n_rows

    @property
    def done(self) -> frozenset[int]:
        """Numbers of the shards that are on the disk, whoever wrote them."""
        return self._others | {shard.number for shard in self._index.shards}

    @property
    def complete(self) -> bool:
        return self._index.complete

    def write_shard(self, number: int, rows: Any, items: Items) -> None:
        """Writes shard `number` (its place in the order of rows) durably; it may have any number of rows, even none.

        rows: activations [rows, d_in], or codes, on any device. items: columns image, token and, if any, label.
        """
        if number < 0 or number in self.done:
            raise ValueError(f"number is {number}; needed: one from 0 up that is not on the disk yet")
        self._check_open()
        file, items_file = self.path / f"shard-{number:05d}.safetensors", self.path / f"items-{number:05d}.parquet"
        n_rows, tensors = self._shard_tensors(rows, f"{file} as {_dtype_name(self._index.dtype)}")
        table = _item_table(items, n_rows)
        with atomic_write(items_file) as temporary:
            pq.write_table(table, temporary, compression="zstd")
        save_safetensors_atomic(file, tensors)
        record = Shard(number, n_rows, file.name, sha256_file(file), items_file.name, sha256_file(items_file))
        shards = sorted([*self._index.shards, record], key=lambda shard: shard.number)
        self._save(replace(self._index, shards=tuple(shards)))

    @abstractmethod
    def _shard_tensors(self, rows: Any, where: str) -> tuple[int, dict[str, Tensor]]:
        """The number of rows and the tensors of a shard's file, in the store's dtype; where: for error messages."""

    def _check_open(self) -> None:
        if self.complete:
            raise ValueError(f"{self.path}: the store is complete; rows can no longer be added")

    def _save(self, index: StoreIndex) -> None:
        _write_index_file(self.path / ("index.json" if self.part is None else _part_name(self.part)), index)
        self._index = index

    def close(self) -> None:
        """Declares the store complete (a part: merge_parts does that)."""
        if not self.complete and self.part is None:
            self._save(_completed(self.path, self._index))

    def __enter__(self: Writer) -> Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """After an exception rows that are not on the disk are dropped, as a crash would."""
        if kind is None:
            self.close()


class ActivationWriter(StoreWriter):
    """Writes a store of activations. Alone, a process may append rows and leave the cutting into shards to the writer:

    with ActivationWriter(path, d_in, torch.float16, {"model": ...}) as writer:
        writer.append(batch_BD, {"image": [...], "token": [...], "label": [...]})
    """

    FORMAT = ACTIVATIONS

    def __init__(
        self,
        path: str | Path,
        d_in: int,
        dtype: torch.dtype,
        source: Mapping[str, Any],
        rows_per_shard: int = 65536,
        *,
        force: bool = False,
    ):
        """Starts an empty store, as StoreWriter does. rows_per_shard: of rows that are appended."""
        _check_rows_per_shard(rows_per_shard)
        super().__init__(path, d_in, dtype, source, force=force)
        self.rows_per_shard = rows_per_shard

    @classmethod
    def resume(cls, path: str | Path, rows_per_shard: int = 65536, *, part: int | None = None) -> "ActivationWriter":
        """Continues a store, as StoreWriter.resume does."""
        _check_rows_per_shard(rows_per_shard)
        writer = super().resume(path, part=part)
        writer.rows_per_shard = rows_per_shard
        return writer

    def _start(self, path: Path, index: StoreIndex, part: int | None) -> None:
        super()._start(path, index, part)
        self._buffer_ND: Tensor | None = None
        self._tables: list[pa.Table] = []
        self._filled = 0

    def append(self, batch_BD: Tensor, items: Items) -> None:
        """Adds rows [B, d_in] (any float dtype and device) and their items: columns image, token and, if any, label."""
        if self.part is not None:
            raise ValueError(f"part is {self.part}; append is for one process alone, ranks use write_shard")
        self._check_open()
        self._check_rows(batch_BD)
        table = _item_table(items, len(batch_BD))
        if self._buffer_ND is None:
            self._buffer_ND = torch.empty(self.rows_per_shard, self._index.width, dtype=self._index.dtype)
        taken = 0
        while taken < len(batch_BD):
            n = min(len(batch_BD) - taken, self.rows_per_shard - self._filled)
            self._buffer_ND[self._filled : self._filled + n].copy_(batch_BD[taken : taken + n])
            self._tables.append(table.slice(taken, n))
            self._filled, taken = self._filled + n, taken + n
            if self._filled == self.rows_per_shard:
                self._flush()

    def _flush(self) -> None:
        assert self._buffer_ND is not None
        number = len(_contiguous(self.path, self._index).shards)
        self.write_shard(number, self._buffer_ND[: self._filled], pa.concat_tables(self._tables))
        self._filled = 0
        self._tables.clear()

    def _shard_tensors(self, rows: Any, where: str) -> tuple[int, dict[str, Tensor]]:
        self._check_rows(rows)
        stored_ND = rows.detach().to("cpu", self._index.dtype)
        check_finite(stored_ND, range(len(stored_ND)), where)
        return len(stored_ND), {"activations": stored_ND}

    def _check_rows(self, batch_BD: Tensor) -> None:
        if batch_BD.ndim != 2 or batch_BD.shape[1] != self._index.width or not batch_BD.is_floating_point():
            raise ValueError(
                f"rows are {batch_BD.dtype} {list(batch_BD.shape)}; floats [rows, {self._index.width}] are needed"
            )

    def close(self) -> None:
        """Writes the rows that do not fill a shard and declares the store complete (a part: merge_parts does that)."""
        if self._filled and not self.complete:
            self._flush()
        super().close()


def _check_rows_per_shard(rows_per_shard: int) -> None:
    if rows_per_shard < 1:
        raise ValueError(f"rows_per_shard is {rows_per_shard}; at least 1 is needed")


def merge_parts(path: str | Path, complete: bool = False, keep: Container[int] | None = None) -> StoreIndex:
    """Joins the ranks' index.part-*.json into index.json; complete=True declares the store complete.

    keep: numbers of the shards that stay; others are forgotten, as if they had never been written. For one process,
    while no other writes: it also deletes the temporary files of killed writers. Safe to repeat.
    """
    path, index = Path(path), read_index(path)
    remove_leftovers(path)
    merged = joined_index(path)
    if keep is not None and any(shard.number not in keep for shard in merged.shards):
        kept = tuple(shard for shard in merged.shards if shard.number in keep)
        merged = replace(merged, shards=kept, complete=False)
    if complete and not index.complete:
        merged = _completed(path, merged)
    if merged != index:
        _write_index_file(path / "index.json", merged)
    for part in _part_files(path):
        part.unlink()
    return merged


def _completed(path: Path, index: StoreIndex) -> StoreIndex:
    if index.n_rows == 0:
        raise ActivationError(f"{path}: no rows were written; a complete store has at least 1")
    return replace(_contiguous(path, index), complete=True)


def _contiguous(path: Path, index: StoreIndex) -> StoreIndex:
    there = {shard.number for shard in index.shards}
    missing = [number for number in range(max(there, default=-1) + 1) if number not in there]
    if missing:
        raise ActivationError(
            f"{path}: shard {missing[0]} is not written yet ({len(missing)} below {max(there)} are missing)"
        )
    return index


def _part_name(part: int | str) -> str:
    return f"index.part-{part}.json"


def _part_files(path: Path) -> list[Path]:
    return sorted(path.glob(_part_name("*")))


def _dtype_name(dtype: torch.dtype) -> str:
    return dtype_names([dtype])


def _claim_directory(path: Path, force: bool) -> None:
    if path.exists() and not path.is_dir():
        raise ActivationError(f"{path}: exists and is not a directory")
    path.mkdir(parents=True, exist_ok=True)
    if any(path.iterdir()) and not force:
        raise ActivationError(f"{path}: the directory is not empty; resume the store in it, or use force to replace it")
    clear_store(path)


def clear_store(path: str | Path) -> None:
    """Deletes the store in a directory, if there is one, and what killed writers left; other files stay."""
    # The index goes first: without it what is left is no store.
    for pattern in ("index.json", _part_name("*"), "shard-*.safetensors", "items-*.parquet"):
        for file in Path(path).glob(pattern):
            file.unlink()
    remove_leftovers(path)


def _item_table(items: Items, n_rows: int) -> pa.Table:
    columns = dict(zip(items.column_names, items.columns)) if isinstance(items, pa.Table) else dict(items)
    if not {"image", "token"} <= set(columns) <= set(ITEM_SCHEMA.names):
        raise ValueError(f"items has columns {sorted(columns)}; needed: image, token and, if any, label")
    columns.setdefault("label", [None] * n_rows)
    columns = {name: c.tolist() if isinstance(c, Tensor) else c for name, c in columns.items()}
    lengths = {name: len(column) for name, column in columns.items()}
    if set(lengths.values()) != {n_rows}:
        raise ValueError(f"items has columns of lengths {lengths}; the batch has {n_rows} rows")
    try:
        return pa.table(columns, schema=ITEM_SCHEMA)
    except (pa.ArrowException, UnicodeEncodeError) as error:
        raise ValueError(
            f"items do not fit image (string), token (int32), label (string): {first_line(error)}"
        ) from error
