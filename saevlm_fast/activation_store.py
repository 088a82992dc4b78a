"""The activation store on disk: its index, its writer, its checks.

A store is a directory:

    index.json               {"format", "version", "complete", "shape": [N, d_in], "dtype", "source": {...}, "shards"}
                             one record a shard: {"number", "rows", "file", "sha256", "items", "items_sha256"}
    shard-00000.safetensors  one tensor "activations" [rows, d_in] in float16, bfloat16 or float32
    items-00000.parquet      image (string), token (int32), label (string or null) of every row of the shard

Row i of the store is row i of its shards laid end to end in the order of their numbers. Every file is written
atomically, and the index after every shard, so a writer killed at any moment leaves a store that can be resumed, and
that readers refuse until it is ("complete": false). Numbers belong to the work, not to the process: several ranks may
each write some of the numbers, keep their records in index.part-RANK.json, and `merge_parts` joins them.
"""

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from saevlm_fast.files import atomic_write, remove_leftovers, save_safetensors_atomic, sha256_file, write_json_atomic
from saevlm_fast.matrix_files import (
    SAFETENSORS_DTYPES,
    ActivationError,
    check_finite,
    dtype_names,
    first_line,
    safetensors_header,
)

FORMAT, VERSION = "saevlm-fast activations", 1
STORE_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
ITEM_SCHEMA = pa.schema([("image", pa.string()), ("token", pa.int32()), ("label", pa.string())])

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
    """What index.json says. `source` is free-form: model, layer, point, tokens ..."""

    d_in: int
    dtype: torch.dtype
    source: dict[str, Any]
    shards: tuple[Shard, ...] = ()
    complete: bool = False

    def __post_init__(self) -> None:
        if self.d_in < 1:
            raise ActivationError(f"d_in is {self.d_in}; at least 1 is needed")
        if self.dtype not in STORE_DTYPES.values():
            raise ActivationError(f"dtype is {self.dtype}; a store holds {dtype_names(STORE_DTYPES.values())}")

    @property
    def n_rows(self) -> int:
        return sum(shard.rows for shard in self.shards)


def read_index(path: str | os.PathLike[str]) -> StoreIndex:
    """The index of the store at `path`, complete or not. Raises ActivationError if there is none or it is damaged."""
    if not (Path(path) / "index.json").is_file():
        raise ActivationError(f"{path}: no index.json in it: not an activation store")
    return _read_index_file(Path(path) / "index.json")


def _read_index_file(file: Path) -> StoreIndex:
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
        if raw["format"] != FORMAT or raw["version"] != VERSION:
            raise ValueError(
                f"format {raw['format']!r} version {raw['version']!r}; needed {FORMAT!r} version {VERSION}"
            )
        shards = tuple(Shard(**record) for record in raw["shards"])
        n_rows, d_in = (int(length) for length in raw["shape"])
        index = StoreIndex(d_in, STORE_DTYPES[raw["dtype"]], dict(raw["source"]), shards, bool(raw["complete"]))
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
        "format": FORMAT,
        "version": VERSION,
        "complete": index.complete,
        "shape": [index.n_rows, index.d_in],
        "dtype": str(index.dtype).removeprefix("torch."),
        "source": index.source,
        "shards": [asdict(shard) for shard in index.shards],
    }
    write_json_atomic(file, value)


def map_shard(path: Path, shard: Shard, index: StoreIndex) -> Tensor:
    """The shard's tensor, after the cheap checks. Unlike np.memmap, from_file keeps no file open: thousands fit."""
    for file in (path / shard.file, path / shard.items):
        if not file.is_file():
            raise ActivationError(f"{file}: missing, but the store's index lists it")
    file = path / shard.file
    entries, data_start = safetensors_header(file)
    entry = entries.get("activations", {"dtype": "nothing", "shape": []})
    dtype, shape = SAFETENSORS_DTYPES.get(entry["dtype"]), [shard.rows, index.d_in]
    if dtype != index.dtype or entry["shape"] != shape or len(entries) != 1:
        raise ActivationError(
            f"{file}: holds {entry['dtype']} {entry['shape']}; the store's index says {index.dtype} {shape}"
        )
    raw = torch.from_file(str(file), shared=False, size=file.stat().st_size, dtype=torch.uint8)
    return raw[data_start:].view(index.dtype).view(shape)


def read_items(file: Path) -> pa.Table:
    try:
        return pq.read_table(file, schema=ITEM_SCHEMA)
    except (OSError, pa.ArrowException) as error:
        raise ActivationError(f"{file}: damaged item table: {first_line(error)}") from error


def verify(path: str | os.PathLike[str]) -> StoreIndex:
    """Reads the whole store (complete or not) and compares it with its index: sizes, shapes, dtypes, every SHA-256.

    Returns the index of a sound store; raises ActivationError naming each missing, truncated or altered file.
    """
    index = read_index(path)
    damage = [problem for shard in index.shards for problem in _shard_damage(Path(path), shard, index)]
    if damage:
        more = f"; and {len(damage) - 5} more" if len(damage) > 5 else ""
        raise ActivationError("; ".join(damage[:5]) + more)
    return index


def _shard_damage(path: Path, shard: Shard, index: StoreIndex) -> Iterator[str]:
    try:
        map_shard(path, shard, index)
        for name, digest in ((shard.file, shard.sha256), (shard.items, shard.items_sha256)):
            if sha256_file(path / name) != digest:
                yield f"{path / name}: altered, its SHA-256 is not the one in the store's index"
                return
        if len(read_items(path / shard.items)) != shard.rows:
            yield f"{path / shard.items}: not {shard.rows} rows, as the store's index says"
    except ActivationError as error:
        yield str(error)


class ActivationWriter:
    """Writes a store. One process appends rows, then closes (leaving the `with` block without an exception closes):

        with ActivationWriter(path, d_in, torch.float16, {"model": ...}) as writer:
            writer.append(batch_BD, {"image": [...], "token": [...], "label": [...]})

    After a crash `ActivationWriter.resume(path)` goes on; its `n_rows` rows are on the disk and must not come again.
    Several processes: rank 0 creates the store, every rank resumes it with its own `part` and writes whole shards by
    number with `write_shard`, skipping those in `done`; in the end rank 0 calls `merge_parts(path, complete=True)`.
    """

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
        """Starts an empty store. A directory that is not empty is refused; `force` deletes the store in it."""
        index = StoreIndex(d_in, dtype, dict(source))
        _claim_directory(Path(path), force)
        _write_index_file(Path(path) / "index.json", index)
        self._start(Path(path), index, rows_per_shard, part=None)

    @classmethod
    def resume(cls, path: str | Path, rows_per_shard: int = 65536, *, part: int | None = None) -> "ActivationWriter":
        """Continues a store after the shards its index lists. part: this rank, if several processes write.

        Alone (part None), it first merges the parts that ranks of an earlier run left. Ranks must not resume before
        rank 0 has called merge_parts.
        """
        path = Path(path)
        index = merge_parts(path) if part is None else read_index(path)
        for shard in index.shards:
            map_shard(path, shard, index)
        writer = cls.__new__(cls)
        writer._start(path, index, rows_per_shard, part)
        return writer

    def _start(self, path: Path, index: StoreIndex, rows_per_shard: int, part: int | None) -> None:
        if rows_per_shard < 1:
            raise ValueError(f"rows_per_shard is {rows_per_shard}; at least 1 is needed")
        self.path, self.rows_per_shard, self.part = path, rows_per_shard, part
        self._index = index
        self._others = frozenset(shard.number for shard in index.shards) if part is not None else frozenset()
        if part is not None:
            self._index = replace(index, shards=())
        self._buffer_ND: Tensor | None = None
        self._tables: list[pa.Table] = []
        self._filled = 0

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

    def append(self, batch_BD: Tensor, items: Items) -> None:
        """Adds rows [B, d_in] (any float dtype and device) and their items: columns image, token and, if any, label."""
        if self.part is not None:
            raise ValueError(f"part is {self.part}; append is for one process alone, ranks use write_shard")
        table = self._checked(batch_BD, items)
        if self._buffer_ND is None:
            self._buffer_ND = torch.empty(self.rows_per_shard, self._index.d_in, dtype=self._index.dtype)
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

    def write_shard(self, number: int, activations_ND: Tensor, items: Items) -> None:
        """Writes shard `number` (its place in the order of rows) durably; it may have any number of rows, even none."""
        if number < 0 or number in self.done:
            raise ValueError(f"number is {number}; needed: one from 0 up that is not on the disk yet")
        table = self._checked(activations_ND, items)
        file, items_file = self.path / f"shard-{number:05d}.safetensors", self.path / f"items-{number:05d}.parquet"
        stored_ND = activations_ND.detach().to("cpu", self._index.dtype)
        check_finite(stored_ND, range(len(stored_ND)), f"{file} as {self._index.dtype}")
        with atomic_write(items_file) as temporary:
            pq.write_table(table, temporary, compression="zstd")
        save_safetensors_atomic(file, {"activations": stored_ND})
        record = Shard(number, len(stored_ND), file.name, sha256_file(file), items_file.name, sha256_file(items_file))
        shards = sorted([*self._index.shards, record], key=lambda shard: shard.number)
        self._save(replace(self._index, shards=tuple(shards)))

    def _checked(self, batch_BD: Tensor, items: Items) -> pa.Table:
        if self.complete:
            raise ValueError(f"{self.path}: the store is complete; rows can no longer be added")
        if batch_BD.ndim != 2 or batch_BD.shape[1] != self._index.d_in or not batch_BD.is_floating_point():
            raise ValueError(
                f"rows are {batch_BD.dtype} {list(batch_BD.shape)}; floats [rows, {self._index.d_in}] are needed"
            )
        return _item_table(items, len(batch_BD))

    def _save(self, index: StoreIndex) -> None:
        _write_index_file(self.path / ("index.json" if self.part is None else _part_name(self.part)), index)
        self._index = index

    def close(self) -> None:
        """Writes the rows that do not fill a shard and declares the store complete (a part: merge_parts does that)."""
        if self.complete or self.part is not None:
            return
        if self._filled:
            self._flush()
        self._save(_completed(self.path, self._index))

    def __enter__(self) -> "ActivationWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """After an exception rows that are not on the disk are dropped, as a crash would."""
        if kind is None:
            self.close()


def merge_parts(path: str | Path, complete: bool = False) -> StoreIndex:
    """Joins the ranks' index.part-*.json into index.json; complete=True declares the store complete.

    For one process, while no other writes: it also deletes the temporary files of killed writers. Safe to repeat.
    """
    path, index = Path(path), read_index(path)
    remove_leftovers(path)
    parts = sorted(path.glob(_part_name("*")))
    shards = {shard.number: shard for part in parts for shard in _read_index_file(part).shards}
    shards |= {shard.number: shard for shard in index.shards}
    merged = replace(index, shards=tuple(shards[number] for number in sorted(shards)))
    if complete and not index.complete:
        merged = _completed(path, merged)
    if merged != index:
        _write_index_file(path / "index.json", merged)
    for part in parts:
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


def _claim_directory(path: Path, force: bool) -> None:
    if path.exists() and not path.is_dir():
        raise ActivationError(f"{path}: exists and is not a directory")
    path.mkdir(parents=True, exist_ok=True)
    if any(path.iterdir()) and not force:
        raise ActivationError(f"{path}: the directory is not empty; resume the store in it, or use force to replace it")
    # The index goes first: without it what is left is no store.
    for pattern in ("index.json", _part_name("*"), "shard-*.safetensors", "items-*.parquet"):
        for file in path.glob(pattern):
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
