"""Writing a store: whole shards by number, the index after each, and the joining of what several ranks wrote.

The files are described in data/store.py; codes are written in data/codes.py.
"""

import os
import re
import weakref
from abc import ABC, abstractmethod
from collections.abc import Container, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from saevlm_fast.data.item_tables import Items, item_table
from saevlm_fast.data.label_sets import Marks
from saevlm_fast.data.matrix import check_finite, dtype_names, host_matrix
from saevlm_fast.data.store import (
    ACTIVATIONS,
    WIDTH_NAMES,
    Shard,
    StoreIndex,
    check_format,
    joined_index,
    map_shard,
    part_files,
    part_name,
    read_index,
    write_index_file,
)
from saevlm_fast.errors import (
    ActivationError,
    Line,
    check_dense,
    check_kind,
    doubt,
    require,
    users_line,
    while_writing,
    whole_number,
)
from saevlm_fast.files import atomic_write, remove_leftovers, save_safetensors_atomic, sha256_file
from saevlm_fast.outputs import output_lock
from saevlm_fast.settings import path_of
from saevlm_fast.torchrun import world_size

# Files of a store beside its index; a checkpoint's shard-00001-of-00005.safetensors is none of them.
_INDEX = "index.json"
ITEM_COMPRESSION = "zstd"
_PATIENCE_SECONDS = 60.0  # of a writer whose store another one writes to
_OURS = re.compile(r"shard-\d{5,}\.safetensors|items-\d{5,}\.parquet|index\.part-\d+\.json")

Writer = TypeVar("Writer", bound="StoreWriter")


@dataclass
class _Unwritten:
    """Rows that were appended to a writer and that no shard has. line: that made the writer."""

    path: Path
    rows: int = 0
    line: Line = field(default_factory=users_line)
    process: int = field(default_factory=os.getpid)

    def dropped(self) -> None:
        """Warns of them: nobody has closed the writer, which is gone, or whose process ends."""
        if self.rows and os.getpid() == self.process:  # or it is a fork's copy of it
            what = f"the last {self.rows:,} rows that were appended to it are not on the disk"
            doubt(f"{self.path}: its writer was never closed: {what}; `with` closes it", line=self.line)


class StoreWriter(ABC):
    """What writing activations and writing codes have in common: whole shards, by number.

    Alone, a process numbers its shards from 0 and closes (leaving the `with` block without an exception closes). One
    that is dropped unclosed warns of the rows that no shard has yet, at the line that made it. After a crash
    `resume(path)` goes on; its `n_rows` rows are on the disk and must not come again. Several processes: rank 0 creates
    the store, every rank resumes it with its own `part` and writes shards by number, skipping those in `done`; in the
    end rank 0 calls `merge_parts(path, complete=True)`.

    A new store without rows goes when its writer gives up, in `with` or by `close`; not under torchrun, where other
    ranks may be about to resume it. One whose writer was dropped stays, as if it were about to get its first shard.
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
        path = path_of("path", path)
        width = whole_number(WIDTH_NAMES[self.FORMAT], width)
        check_kind("dtype", dtype, torch.dtype, "a torch.dtype")
        check_kind("source", source, Mapping, "a mapping")
        index = StoreIndex(self.FORMAT, width, dtype, dict(source))
        _claim_directory(path, force)
        write_index_file(path / _INDEX, index)
        self._start(path, index, part=None)
        self._is_new = True

    @classmethod
    def resume(cls: type[Writer], path: str | Path, *, part: int | None = None) -> Writer:
        """Continues a store after the shards its index lists. part: this rank, if several processes write.

        Alone (part None), it first merges the parts that ranks of an earlier run left. Ranks must not resume before
        rank 0 has called merge_parts.
        """
        path = path_of("path", path)
        index = merge_parts(path) if part is None else read_index(path)
        check_format(path, index, cls.FORMAT)
        for shard in index.shards:
            map_shard(path, shard, index)
        writer = cls.__new__(cls)
        writer._start(path, index, part)
        return writer

    def _start(self, path: Path, index: StoreIndex, part: int | None) -> None:
        self.path, self.part, self._is_new = path, part, False
        self._index, self._written = _as_written(path) if part is None else (index, b"")
        self._others = frozenset(shard.number for shard in index.shards) if part is not None else frozenset()
        if part is not None:
            self._index = replace(index, shards=())
        self._marks: Marks | None = Marks() if part in (None, 0) else None  # of ranks the first tells of them
        self._in_the_way = False  # of the next try: a new store, empty though rows have come
        self._has_failed = False  # rows were dropped, without which more would not be what was meant
        self._unwritten = _Unwritten(path)
        weakref.finalize(self, self._unwritten.dropped)

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

        rows: activations [rows, d_in], or codes, on any device. items: columns image, token and, if any, label, texts
            or whole numbers for image and label; of a language model modality, token_id and text too.

        Raises:
            ValueError: a number that is on the disk, rows or items that do not fit, a store that is complete.
            ActivationError: rows that are not finite in the store's dtype. OSError: a full disk.
        """
        new = number >= 0 and number not in self.done
        require(new, f"number is {number}; needed: one from 0 up that is not on the disk yet")
        self._check_open()
        file, items_file = self.path / f"shard-{number:05d}.safetensors", self.path / f"items-{number:05d}.parquet"
        with self._refusing():
            n_rows, tensors = self._shard_tensors(rows, f"{file} as {dtype_names([self._index.dtype])}")
            table = item_table(items, n_rows)
        self._in_the_way = False  # a write that fails says how it goes on
        kept = f"the {self.n_rows:,} rows of shards before it are whole, and resume (--resume) goes on after them"
        with while_writing(f"shard {number} of a store", kept), self._alone():
            # Opened here: a path with a colon pyarrow would take for a URI.
            with atomic_write(items_file) as temporary, open(temporary, "wb") as opened:
                pq.write_table(table, opened, compression=ITEM_COMPRESSION)
            save_safetensors_atomic(file, tensors)
            record = Shard(number, n_rows, file.name, sha256_file(file), items_file.name, sha256_file(items_file))
            shards = sorted([*self._index.shards, record], key=lambda shard: shard.number)
            self._save(replace(self._index, shards=tuple(shards)))
        self._look_at_labels(table["label"].unique().to_pylist())

    def _look_at_labels(self, labels: Iterable[str | None] = (), whole: bool = False) -> None:
        """A Doubt, once, of what `evaluate` would refuse; whole: there are no others."""
        if self._marks is not None and (mark := self._marks.add(labels).found(whole)):
            self._marks = None
            doubt(
                f"items: label {mark} is below 0, as unlabelled images are marked, and is stored as any other; "
                "evaluate refuses such labels: give None where nothing is known of an image, or a class a name"
            )

    @abstractmethod
    def _shard_tensors(self, rows: Any, where: str) -> tuple[int, dict[str, Tensor]]:
        """The number of rows and the tensors of a shard's file, in the store's dtype; where: for error messages."""

    def _check_open(self) -> None:
        require(not self.complete, f"{self.path}: the store is complete; rows can no longer be added")
        require(not self._has_failed, f"{self.path}: its writer ended with an exception; resume the store to go on")

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """No other writer of the store in between. ValueError: it is not as this one left it."""
        if self.part is not None:  # whose file is its own
            yield
            return
        index = self.path / _INDEX
        with output_lock(index, directory=False, patience=_PATIENCE_SECONDS):
            require(index.is_file(), f"{self.path}: its {_INDEX} is gone, without which there is no store to add to")
            as_left = index.read_bytes() == self._written
            require(as_left, f"{self.path}: another process or thread has written to it; resume the store to go on")
            yield

    def _save(self, index: StoreIndex) -> None:
        file = self.path / (_INDEX if self.part is None else part_name(self.part))
        write_index_file(file, index)
        self._index, self._written = index, file.read_bytes()

    def close(self) -> None:
        """Declares the store complete (a part: merge_parts does that); a new one without rows goes, and is refused."""
        if not self.complete and self.part is None:
            self._check_open()
            self._met_rows()  # or none ever will
            try:
                with self._alone():
                    self._save(_completed(self.path, self._index))
            except ActivationError:
                self._give_up()
                raise
            self._look_at_labels(whole=self._is_new)

    def __enter__(self: Writer) -> Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """After an exception rows that are not on the disk are dropped; a new store without any goes, if rows came."""
        if kind is None:
            self.close()
            return
        self._unwritten.rows, self._has_failed = 0, True  # the exception says enough
        self._give_up()

    @contextmanager
    def _refusing(self) -> Iterator[None]:
        try:
            yield
        except ValueError:
            self._met_rows()
            raise

    def _met_rows(self) -> None:
        """From the first rows on, an empty store of a writer that gives up is in the way."""
        self._in_the_way = self._is_new and not self.done and world_size() == 1  # ranks may be about to resume it

    def _give_up(self) -> None:
        """An empty store would be in the way of the next try. One that others have gone on with stays."""
        if self._in_the_way:
            with suppress(OSError, ValueError), self._alone():
                if not part_files(self.path):
                    (self.path / _INDEX).unlink()


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
        whole_number("rows_per_shard", rows_per_shard)
        super().__init__(path, d_in, dtype, source, force=force)
        self.rows_per_shard = rows_per_shard

    @classmethod
    def resume(cls, path: str | Path, rows_per_shard: int = 65536, *, part: int | None = None) -> "ActivationWriter":
        """Continues a store, as StoreWriter.resume does."""
        whole_number("rows_per_shard", rows_per_shard)
        writer = super().resume(path, part=part)
        writer.rows_per_shard = rows_per_shard
        return writer

    def _start(self, path: Path, index: StoreIndex, part: int | None) -> None:
        super()._start(path, index, part)
        self._buffer_ND: Tensor | None = None
        self._tables: list[pa.Table] = []
        self._filled = 0

    def append(self, batch_BD: Tensor | np.ndarray, items: Items) -> None:
        """Adds rows [B, d_in] (any float dtype and device) and their items: columns image, token and, if any, label.

        From one thread at a time.

        Raises:
            ValueError: rows or items that do not fit, a store that is complete, a writer of a part.
            ActivationError: rows that are not finite in the store's dtype, when their shard is written.
        """
        alone = self.part is None
        require(alone, f"part is {self.part}; append is for one process alone, ranks use write_shard")
        self._check_open()
        with self._refusing():
            batch_BD = self._checked(batch_BD)
            table = item_table(items, len(batch_BD))
        self._met_rows()
        buffer_ND = self._buffer_ND
        if buffer_ND is None:
            buffer_ND = torch.empty(self.rows_per_shard, self._index.width, dtype=self._index.dtype, device="cpu")
            self._buffer_ND = buffer_ND
        taken = 0
        while taken < len(batch_BD):
            n = min(len(batch_BD) - taken, self.rows_per_shard - self._filled)
            buffer_ND[self._filled : self._filled + n].copy_(batch_BD[taken : taken + n])
            self._tables.append(table.slice(taken, n))
            self._filled, taken = self._filled + n, taken + n
            self._unwritten.rows = self._filled
            if self._filled == self.rows_per_shard:
                self._flush()

    def _flush(self) -> None:
        assert self._buffer_ND is not None
        self._unwritten.rows = 0  # a write that fails says so itself
        number = len(_contiguous(self.path, self._index).shards)
        self.write_shard(number, self._buffer_ND[: self._filled], pa.concat_tables(self._tables))
        self._filled = 0
        self._tables.clear()

    def _shard_tensors(self, rows: Any, where: str) -> tuple[int, dict[str, Tensor]]:
        rows_ND = self._checked(rows)
        stored_ND = rows_ND.detach().to("cpu", self._index.dtype)
        check_finite(stored_ND, range(len(stored_ND)), where)
        return len(stored_ND), {"activations": stored_ND}

    def _checked(self, batch_BD: Tensor | np.ndarray) -> Tensor:
        check_kind("rows", batch_BD, (Tensor, np.ndarray), "a tensor or an array [rows, d_in]")
        if isinstance(batch_BD, np.ndarray):
            rows_BD = host_matrix(batch_BD, "rows") if batch_BD.size else torch.from_numpy(batch_BD)
        else:
            check_dense("rows", batch_BD)
            require(not batch_BD.is_meta, "rows: on the meta device, which holds no numbers")
            rows_BD = batch_BD
        width, shape = self._index.width, list(rows_BD.shape)
        fits = rows_BD.ndim == 2 and shape[1] == width and rows_BD.is_floating_point()
        require(fits, f"rows are {rows_BD.dtype} {shape}; floats [rows, {width}] are needed")
        return rows_BD

    def close(self) -> None:
        """Writes the rows that do not fill a shard and declares the store complete (a part: merge_parts does that)."""
        if self._filled and not self.complete:
            self._flush()
        super().close()


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
        write_index_file(path / _INDEX, merged)
    for part in part_files(path):
        part.unlink()
    return merged


def _completed(path: Path, index: StoreIndex) -> StoreIndex:
    require(index.n_rows > 0, f"{path}: no rows were written; a complete store has at least 1", ActivationError)
    return replace(_contiguous(path, index), complete=True)


def _contiguous(path: Path, index: StoreIndex) -> StoreIndex:
    there = {shard.number for shard in index.shards}
    missing = [number for number in range(max(there, default=-1) + 1) if number not in there]
    if missing:
        raise ActivationError(
            f"{path}: shard {missing[0]} is not written yet ({len(missing)} below {max(there)} are missing)"
        )
    return index


def _claim_directory(path: Path, force: bool) -> None:
    require(path.is_dir() or not path.exists(), f"{path}: exists and is not a directory", ActivationError)
    path.mkdir(parents=True, exist_ok=True)
    require(
        force or not any(path.iterdir()),
        f"{path}: the directory is not empty; resume the store in it, or use force to replace it",
        ActivationError,
    )
    clear_store(path)


def _as_written(path: Path) -> tuple[StoreIndex, bytes]:
    """The index of a store, and its file's bytes, of one moment."""
    while True:
        written, index = (path / _INDEX).read_bytes(), read_index(path)
        if written == (path / _INDEX).read_bytes():
            return index, written


def clear_store(path: str | Path) -> None:
    """Deletes the store in a directory, if there is one, and what killed writers left; other files stay."""
    (Path(path) / _INDEX).unlink(missing_ok=True)  # first: without it what is left is no store
    for file in Path(path).glob("*-[0-9]*.*"):
        if _OURS.fullmatch(file.name):
            file.unlink()
    remove_leftovers(path)
