"""Images in Hugging Face data sets: the parquet shards of a hub snapshot, and what datasets' save_to_disk writes."""

import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from saevlm_fast.data.parquet import (
    MAX_TEXT_BYTES,
    open_table,
    plain_schema,
    read_text_columns,
    too_large,
    unpacked_bytes,
    written_out_bytes,
)
from saevlm_fast.errors import ImageError, first_line, require
from saevlm_fast.images.arrow_files import check_arrow_file
from saevlm_fast.images.captions import caption_column, caption_text
from saevlm_fast.images.columns import LabelColumn, image_bytes, image_column, is_text
from saevlm_fast.images.sources import Names, refuse_split, relative_paths, require_regular
from saevlm_fast.records import is_name
from saevlm_fast.remote.answers import RemoteError
from saevlm_fast.remote.files import RemoteFiles

if TYPE_CHECKING:
    from datasets import Dataset


# A row group of at most this is unpacked at once and kept; a larger one passes through in pieces of about this size.
GROUP_BYTES = 256 << 20
MAX_JSON_BYTES = 64 << 20  # of what datasets writes beside its files
# Above GROUP_BYTES, unpacked against stored. Images are compressed already: theirs is about 1, of plain bitmaps 10.
MAX_RATIO = 100
_AT_ONCE = 8  # files elsewhere that are indexed at the same time


class ParquetSource(Names):
    """Rows of parquet files with one image column, read a row group at a time, or a piece of a large one."""

    def __init__(self, name: str, column: str, files: Sequence[str], groups: list["_Group"], names: "_RowNames"):
        self._column, self._files, self._groups = column, files, groups
        self._start_G = np.cumsum([0, *(group.rows for group in groups)])[:-1]
        self._idle: list[_Rows] = []  # what the last reader left; a thread takes it out while it reads
        self._texts: tuple[int, Any] | None = None  # the captions of the row group that was asked last
        super().__init__(name, names.ids(), names.labels, notes=dict.fromkeys(names.notes))

    def caption(self, i: int) -> str | None:
        """Of the column that holds captions, if there is one."""
        number = int(np.searchsorted(self._start_G, i, side="right")) - 1
        group, texts = self._groups[number], self._texts
        if group.captions is None:
            return None
        if texts is None or texts[0] != number:
            texts = self._texts = number, _captions_of(self._files[group.file], group)
        return caption_text(texts[1][i - int(self._start_G[number])].as_py())

    def content(self) -> str:
        return self._files.content() if isinstance(self._files, RemoteFiles) else ""

    def read(self, i: int) -> bytes:
        number = int(np.searchsorted(self._start_G, i, side="right")) - 1
        group, row = self._groups[number], i - int(self._start_G[number])
        try:
            rows = self._reader(group, row)
            cell = rows.cell(row)
        except (pa.ArrowException, OSError, ValueError) as error:
            if _of_the_system(error):
                raise
            reason = f"damaged row group in {os.path.basename(self._files[group.file])}: {first_line(error)}"
            raise ImageError(reason) from error
        self._idle[:] = [rows]
        return image_bytes(cell, os.path.dirname(self._files[group.file]))

    def _reader(self, group: "_Group", row: int) -> "_Rows":
        """The idle one where it stands at or before this row; another thread may have it."""
        try:
            rows = self._idle.pop()
        except IndexError:
            rows = None
        same = rows is not None and rows.group is group and row >= rows.first
        return rows if rows is not None and same else _Rows(self._files[group.file], group, self._column)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_idle": [], "_texts": None}


class _Group(NamedTuple):
    """Row group `number` of file number `file`: its rows, what its images take unpacked, its column of captions."""

    file: int
    number: int
    rows: int
    unpacked: int
    captions: str | None


def _captions_of(file: str, group: _Group) -> pa.ChunkedArray:
    """The captions of a row group. ValueError: more text than a file may have, damage."""
    column = group.captions or ""
    with open_table(file) as table:
        _, unpacked = unpacked_bytes(table, [column], [group.number])
        require(unpacked <= MAX_TEXT_BYTES, f"images: {file}: {too_large(column, unpacked)}")
        try:
            return table.read_row_group(group.number, columns=[column], use_threads=False).column(0)
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"images: {file}: damaged column {column}: {first_line(error)}") from error


class _Rows:
    """The image cells of a row group, forwards: those that were read last, GROUP_BYTES of them."""

    def __init__(self, file: str, group: _Group, column: str):
        self.group, self.first = group, 0
        self._file = open_table(file)
        self._batches = self._all(column) if group.unpacked <= GROUP_BYTES else self._pieces(column)
        self._cells: Any = ()

    def cell(self, row: int) -> Any:
        """The cell of a row; not before the first one that is kept."""
        while row >= self.first + len(self._cells):
            self.first += len(self._cells)
            self._cells = next(self._batches, None)
            require(self._cells is not None, f"{row} rows; the metadata says {self.group.rows}")
        return self._cells[row - self.first].as_py()

    def _all(self, column: str) -> Iterator[Any]:
        with self._file as file:
            table = file.read_row_group(self.group.number, columns=[column], use_threads=False)
        yield table.column(0)

    def _pieces(self, column: str) -> Iterator[Any]:
        rows = max(1, GROUP_BYTES * self.group.rows // self.group.unpacked)
        with self._file as file:
            for batch in file.iter_batches(rows, [self.group.number], columns=[column], use_threads=False):
                yield batch.column(0)


class _RowNames:
    """Ids and labels, collected file by file."""

    def __init__(self) -> None:
        self.rows: list[str] = []
        self.paths: list[str | None] = []
        self.labels: list[str | None] = []
        self.notes: list[str] = []

    def add(self, other: "_RowNames") -> None:
        """Those of the next file."""
        for mine, its in zip(vars(self).values(), vars(other).values()):
            mine += its

    def ids(self) -> list[str]:
        """Stored paths say more and outlive a new sharding; they serve as ids only if every row has its own."""
        own = [path for path in self.paths if path]
        return own if len(own) == len(self.rows) == len(set(own)) else self.rows

    def add_labels(self, schema: pa.Schema, values_of: Callable[[str], list[Any]], n_rows: int, where: str) -> None:
        column = LabelColumn(schema, where)
        if column.note is not None:
            self.notes.append(column.note)
        if column.name is None:
            self.labels += [None] * n_rows
        else:
            self.labels += [column.text(value) for value in values_of(column.name)]


def open_parquet(
    files: Sequence[str],
    name: str,
    split: str | None,
    relative: list[str] | None = None,
    column: str = "",
    opened: Callable[[int], pq.ParquetFile] | None = None,
) -> ParquetSource:
    """The rows of parquet files, in the order of the files.

    files: their paths; of some that are elsewhere what fetches each when it is asked for. split: None for all of them,
    whatever they are called. relative: what ids call them; if None by their paths. column: that of the images, "" if
    there is no doubt. opened: a file by its number, for its names and labels, where that is less than all of it; some
    are opened at once.

    Raises:
        ValueError: several splits, no image column, a damaged file, one that unpacks far beyond its size.
    """
    here = relative is None
    short = relative_paths(files) if relative is None else relative
    wanted, groups, names = column, list[_Group](), _RowNames()

    def shown(number: int) -> str:
        return files[number] if opened is None else f"{name}: {short[number]}"

    def index(number: int) -> _Indexed:
        return _indexed(opened or (lambda each: open_table(files[each])), shown(number), number, short[number], wanted)

    for number, indexed in _all_indexed(index, _files_of_split(short, name, split), at_once=opened is not None):
        same = column in ("", indexed.column)
        require(
            same, f"images: {shown(number)}: the image column is {indexed.column!r}, in the files before it {column!r}"
        )
        column = indexed.column
        groups += indexed.groups
        names.add(indexed.names)
    return ParquetSource(name, column, [os.path.abspath(file) for file in files] if here else files, groups, names)


class _Indexed(NamedTuple):
    """What is known of a file once its names and labels are read."""

    column: str
    groups: list[_Group]
    names: _RowNames


def _all_indexed(index: Callable[[int], _Indexed], numbers: list[int], at_once: bool) -> Iterator[tuple[int, _Indexed]]:
    if not at_once:
        yield from ((number, index(number)) for number in numbers)
        return
    pool = ThreadPoolExecutor(_AT_ONCE)
    try:
        yield from zip(numbers, pool.map(index, numbers))
    finally:
        pool.shutdown(cancel_futures=True)  # of a file that is refused the others are not waited for


def _indexed(opened: Callable[[int], pq.ParquetFile], file: str, number: int, short: str, column: str) -> _Indexed:
    """A file's image column, which has to be `column` if that is given, its row groups and names."""
    try:
        with opened(number) as table:
            return _index_of(table, file, number, short, column)
    except (pa.ArrowException, OSError) as error:
        if _of_the_system(error):
            raise
        raise ValueError(f"images: {file}: damaged parquet file: {first_line(error)}") from error
    except ValueError as error:
        raise ValueError(f"images: {file}: {first_line(error).removeprefix(f'images: {file}: ')}") from error


def _of_the_system(error: Exception) -> bool:
    """No file's fault. Arrow's own errors about damage are OSErrors too, without a number."""
    return isinstance(error, RemoteError) or (isinstance(error, OSError) and error.errno is not None)


def _index_of(table: pq.ParquetFile, file: str, place: int, short: str, column: str) -> _Indexed:
    schema, n_rows = plain_schema(table), table.metadata.num_rows
    require(column in ("", *schema.names), f"no column {column!r} among {', '.join(schema.names)}")
    found = column or image_column(schema, lambda name: _first_values(table, name), file)
    groups, names = [], _RowNames()
    for number in range(table.num_row_groups):
        stored, unpacked = unpacked_bytes(table, [found], [number])
        bomb = f"row group {number} unpacks from {stored} bytes to {unpacked}, more than {MAX_RATIO} fold"
        require(unpacked <= max(GROUP_BYTES, MAX_RATIO * stored), f"images: {file}: {bomb}: these are no images")
        rows = table.metadata.row_group(number).num_rows
        groups.append(_Group(place, number, rows, unpacked, caption_column(schema)))
    names.rows += [f"{short}/{row}" for row in range(n_rows)]
    names.paths += _stored_paths(table, schema.field(found))
    names.add_labels(schema, lambda name: _text_values(table, name), n_rows, file)
    return _Indexed(found, groups, names)


def _first_values(table: pq.ParquetFile, column: str) -> list[Any]:
    if table.num_row_groups == 0 or unpacked_bytes(table, [column], [0])[1] > MAX_TEXT_BYTES:
        return []
    batches = table.iter_batches(10, [0], columns=[column], use_threads=False)
    return next((batch.column(0).to_pylist() for batch in batches), [])


def _text_values(table: pq.ParquetFile, column: str) -> list[Any]:
    return _pylist(read_text_columns(table, [column]).column(0))


def _pylist(column: pa.ChunkedArray) -> list[Any]:
    """Values that repeat are one object."""
    if not pa.types.is_dictionary(column.type):
        return column.to_pylist()
    values: list[Any] = []
    for chunk in column.chunks:
        known = chunk.dictionary.to_pylist()
        values += [None if i is None else known[i] for i in chunk.indices.to_pylist()]
    return values


def _stored_paths(table: pq.ParquetFile, field: pa.Field) -> list[str | None]:
    if pa.types.is_struct(field.type) and field.type.get_field_index("path") >= 0:
        stored = read_text_columns(table, [f"{field.name}.path"]).column(0)
        return _pylist(pc.struct_field(stored, "path"))
    if is_text(field.type):
        return _text_values(table, field.name)
    return [None] * table.metadata.num_rows


def _files_of_split(files: list[str], name: str, split: str | None) -> list[int]:
    """Numbers of the files called SPLIT-00000-of-00014.parquet, as on the hub; of all files if none is called so."""
    if split is None:
        return list(range(len(files)))
    matches = [re.fullmatch(r"(?:.*/)?([^/]+)-\d+-of-\d+\.parquet", file) for file in files]
    splits = sorted({match[1] for match in matches if match})
    what = f"no split {split!r}" if split else "holds several splits"
    known = split in splits or (not split and len(splits) <= 1)
    require(known, f"images: {name}: {what}; add ::SPLIT, one of: {', '.join(splits) or '(none)'}")
    return [number for number, match in enumerate(matches) if not split or (match and match[1] == split)]


class SavedDatasetSource(Names):
    """Rows of a datasets.Dataset that save_to_disk wrote."""

    def __init__(self, name: str, rows: "Dataset", names: _RowNames, texts: "Dataset | None"):
        """texts: the column of captions, if there is one."""
        self._rows, self._folder, self._texts = rows, os.path.abspath(name), texts
        super().__init__(name, names.ids(), names.labels, notes=names.notes)

    def caption(self, i: int) -> str | None:
        """Of the column that holds captions, if there is one."""
        return None if self._texts is None else caption_text(self._texts[i].column(0)[0].as_py())

    def read(self, i: int) -> bytes:
        return image_bytes(self._rows[i].column(0)[0].as_py(), self._folder)


def open_saved_dataset(folder: str, split: str) -> SavedDatasetSource:
    """The rows of a data set, or of its split.

    Raises:
        ValueError: the package datasets is missing, a damaged data set, no such split, no image column.
    """
    try:
        import datasets
    except ImportError as error:
        raise ValueError(
            f"images: {folder}: a saved Hugging Face dataset needs the package datasets: "
            "pip install 'saevlm-fast[datasets]'"
        ) from error
    stored = _folder_of_split(folder, split)
    _check_files(stored)
    try:
        dataset = datasets.load_from_disk(str(stored))
    except (ValueError, OSError, KeyError, TypeError, pa.ArrowException) as error:
        raise ValueError(f"images: {folder}: {first_line(error).removeprefix(f'images: {folder}: ')}") from error
    schema, tables = dataset.features.arrow_schema, dataset.with_format("arrow")
    column = image_column(schema, lambda name: tables.select_columns([name])[:10].column(0).to_pylist(), folder)
    rows = tables.select_columns([column])
    names = _RowNames()
    names.rows = [str(row) for row in range(len(dataset))]
    names.paths = _dataset_paths(rows, schema.field(column).type)
    names.add_labels(schema, lambda name: _label_values(tables, name, folder), len(dataset), folder)
    captions = caption_column(schema)
    return SavedDatasetSource(stored, rows, names, None if captions is None else tables.select_columns([captions]))


def _check_files(stored: str) -> None:
    """ValueError: a pipe or a device, a description that is none, a file elsewhere, one that unpacks far beyond its
    size. What else is wrong datasets says."""
    for file in sorted(os.listdir(stored)) if os.path.isdir(stored) else ():
        path = os.path.join(stored, file)
        if file.endswith((".arrow", ".json")):
            require_regular(path)
        if file.endswith(".json"):
            size = os.path.getsize(path)
            require(size <= MAX_JSON_BYTES, f"images: {path}: {size} bytes; a description has at most {MAX_JSON_BYTES}")
    for name in _data_files(os.path.join(stored, "state.json")):
        path = os.path.join(stored, name)
        require(is_name(name), f"images: {stored}: its state.json names {name!r}, which is not a file in it")
        if os.path.lexists(path):
            require_regular(path)
            try:
                check_arrow_file(path)
            except ValueError as error:
                raise ValueError(f"images: {error}") from error


def _data_files(state: str) -> list[str]:
    try:
        with open(state, encoding="utf-8") as file:
            return [str(each["filename"]) for each in json.load(file)["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return []


def _chunked(column: Any) -> pa.ChunkedArray:
    return column[:] if not isinstance(column, (pa.ChunkedArray, pa.Array)) else column


def _folder_of_split(folder: str, split: str) -> str:
    index = os.path.join(folder, "dataset_dict.json")
    if not os.path.isfile(index):
        refuse_split(folder, split)
        return folder
    try:
        with open(index, encoding="utf-8") as file:
            splits = [str(name) for name in json.load(file)["splits"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"images: {index}: damaged: {first_line(error)}") from error
    what = f"no split {split!r}" if split else "a dataset with splits"
    require(split in splits, f"images: {folder}: {what}; add ::SPLIT, one of: {', '.join(splits)}")
    return os.path.join(folder, split)


def _label_values(tables: "Dataset", name: str, folder: str) -> list[Any]:
    column = _chunked(tables[name])
    size = written_out_bytes(column)
    require(
        size <= MAX_TEXT_BYTES, f"images: {folder}: {name} unpacks to {size} bytes; labels may take {MAX_TEXT_BYTES}"
    )
    return _pylist(column)


def _dataset_paths(rows: "Dataset", kind: pa.DataType) -> list[str | None]:
    struct = pa.types.is_struct(kind) and kind.get_field_index("path") >= 0
    if not struct and not is_text(kind):
        return [None] * len(rows)
    paths: list[str | None] = []
    for table in rows.iter(batch_size=1000):  # columns stay mapped: the bytes are not touched
        column = table.column(0)
        paths += (pc.struct_field(column, "path") if struct else column).to_pylist()
    return paths
