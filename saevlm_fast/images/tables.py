"""Images in Hugging Face data sets: the parquet shards of a hub snapshot, and what datasets' save_to_disk writes."""

import json
import os
import re
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from saevlm_fast.errors import ImageError, first_line, require
from saevlm_fast.images.sources import Names, not_empty, read_file, refuse_split, relative_paths

if TYPE_CHECKING:
    from datasets import Dataset


class ParquetSource(Names):
    """Rows of parquet files with one image column, read a row group at a time."""

    def __init__(
        self,
        name: str,
        files: list[str],
        column: str,
        groups: list[tuple[int, int, int]],
        ids: list[str],
        labels: list[str | None],
    ):
        self._files, self._column = [os.path.abspath(file) for file in files], column
        # file, number within the file and first row (of all) of every row group
        self._file_G, self._number_G, self._start_G = np.array(groups, np.int64).reshape(-1, 3).T
        self._group: tuple[int, pa.ChunkedArray] | None = None
        super().__init__(name, ids, labels)

    def read(self, i: int) -> bytes:
        group = int(np.searchsorted(self._start_G, i, side="right")) - 1
        loaded = self._group
        if loaded is None or loaded[0] != group:
            loaded = self._group = (group, self._load(group))
        cell = loaded[1][i - int(self._start_G[group])].as_py()
        data = cell["bytes"] if isinstance(cell, dict) else cell
        require(data is not None, "no bytes are stored", ImageError)
        return not_empty(data)

    def _load(self, group: int) -> pa.ChunkedArray:
        path = self._files[self._file_G[group]]
        try:
            # No threads, no read-ahead: in a forked process Arrow's threads are not there.
            with pq.ParquetFile(path, pre_buffer=False) as file:
                number = int(self._number_G[group])
                return file.read_row_group(number, columns=[self._column], use_threads=False).column(0)
        except pa.ArrowException as error:
            raise ImageError(f"damaged row group in {os.path.basename(path)}: {first_line(error)}") from error

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_group": None}


def open_parquet(files: list[str], name: str, split: str) -> ParquetSource:
    relative = relative_paths(files)
    chosen = _files_of_split(relative, name, split)
    files, relative = [files[number] for number in chosen], [relative[number] for number in chosen]
    column = ""
    groups: list[tuple[int, int, int]] = []
    rows: list[str] = []
    paths: list[str | None] = []
    labels: list[str | None] = []
    for number, (file, short) in enumerate(zip(files, relative)):
        try:
            with pq.ParquetFile(file) as table:
                column = _same(column, _image_column(table.schema_arrow, file), file)
                first = len(rows)
                rows += [f"{short}/{row}" for row in range(table.metadata.num_rows)]
                for group in range(table.num_row_groups):
                    groups.append((number, group, first))
                    first += table.metadata.row_group(group).num_rows
                paths += _stored_paths(table, column)
                labels += _stored_labels(table, file)
        except pa.ArrowException as error:
            raise ValueError(f"images: {file}: damaged parquet file: {first_line(error)}") from error
    return ParquetSource(name, files, column, groups, _paths_or_rows(paths, rows), labels)


def _files_of_split(files: list[str], name: str, split: str) -> list[int]:
    """Numbers of the files called SPLIT-00000-of-00014.parquet, as on the hub; of all files if none is called so."""
    matches = [re.fullmatch(r"(?:.*/)?([^/]+)-\d+-of-\d+\.parquet", file) for file in files]
    splits = sorted({match[1] for match in matches if match})
    what = f"no split {split!r}" if split else "holds several splits"
    known = split in splits or (not split and len(splits) <= 1)
    require(known, f"images: {name}: {what}; add ::SPLIT, one of: {', '.join(splits) or '(none)'}")
    return [number for number, match in enumerate(matches) if not split or (match and match[1] == split)]


def _same(column: str, found: str, file: str) -> str:
    same = column in ("", found)
    require(same, f"images: {file}: the image column is {found!r}, in the files before it {column!r}")
    return found


def _image_column(schema: pa.Schema, file: str) -> str:
    """The one column that stores images as datasets does, {"bytes", "path"}, or as plain binary."""
    structs = [f.name for f in schema if pa.types.is_struct(f.type) and f.type.get_field_index("bytes") >= 0]
    binary = [f.name for f in schema if pa.types.is_binary(f.type) or pa.types.is_large_binary(f.type)]
    return _only(structs or binary, ", ".join(schema.names), file)


def _only(columns: list[str], existing: str, file: str) -> str:
    what = f"several image columns ({', '.join(columns)})" if columns else f"no image column among {existing}"
    clear = len(columns) == 1 or "image" in columns
    require(clear, f"images: {file}: {what}; one is needed, or one called image")
    return "image" if "image" in columns else columns[0]


def _stored_paths(table: pq.ParquetFile, column: str) -> list[str | None]:
    field = table.schema_arrow.field(column).type
    if not pa.types.is_struct(field) or field.get_field_index("path") < 0:
        return [None] * table.metadata.num_rows
    stored = table.read(columns=[f"{column}.path"]).column(0)
    return pc.struct_field(stored, "path").to_pylist()


def _paths_or_rows(paths: list[str | None], rows: list[str]) -> list[str]:
    """Stored paths say more and outlive a new sharding; they serve as ids only if every row has its own."""
    own = [path for path in paths if path]
    return own if len(own) == len(rows) == len(set(own)) else rows


def _stored_labels(table: pq.ParquetFile, file: str) -> list[str | None]:
    names = _class_names(table.schema_arrow, file)
    column = "label" if "label" in table.schema_arrow.names else next(iter(names)) if len(names) == 1 else None
    if column is None or not _can_be_label(table.schema_arrow.field(column).type):
        return [None] * table.metadata.num_rows
    return [_label_name(value, names.get(column)) for value in table.read(columns=[column]).column(0).to_pylist()]


def _can_be_label(kind: pa.DataType) -> bool:
    values = kind.value_type if pa.types.is_dictionary(kind) else kind
    return pa.types.is_integer(values) or pa.types.is_string(values) or pa.types.is_large_string(values)


def _class_names(schema: pa.Schema, file: str) -> dict[str, list[str]]:
    """{column: names of its classes} from the features that datasets leaves in the schema."""
    try:
        info = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        features = info.get("info", {}).get("features", {}).items()
        return {
            column: [str(name) for name in feature["names"]]
            for column, feature in features
            if isinstance(feature, dict) and feature.get("_type") == "ClassLabel" and column in schema.names
        }
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"images: {file}: damaged Hugging Face metadata: {first_line(error)}") from error


def _label_name(value: int | str | None, names: list[str] | None) -> str | None:
    """The class's name; -1 is how a test split says that there is none."""
    if value is None or not isinstance(value, int) or names is None:
        return None if value is None or value == "" else str(value)
    return names[value] if 0 <= value < len(names) else None


class SavedDatasetSource(Names):
    """Rows of a datasets.Dataset that save_to_disk wrote."""

    def __init__(self, name: str, dataset: "Dataset", column: str, ids: list[str], labels: list[str | None]):
        self._dataset, self._column = dataset, column
        super().__init__(name, ids, labels)

    def read(self, i: int) -> bytes:
        cell = self._dataset[i][self._column]
        require(cell is not None, "no image is stored", ImageError)
        if cell["bytes"] is None:
            return read_file(cell["path"] or "")
        return not_empty(cell["bytes"])


def open_saved_dataset(folder: str, split: str) -> SavedDatasetSource:
    try:
        import datasets
    except ImportError as error:
        raise ValueError(
            f"images: {folder}: a saved Hugging Face dataset needs the package datasets: "
            "pip install 'saevlm-fast[datasets]'"
        ) from error
    try:
        dataset = datasets.load_from_disk(_folder_of_split(folder, split))
    except (ValueError, OSError, KeyError, TypeError, pa.ArrowException) as error:
        raise ValueError(f"images: {folder}: {first_line(error).removeprefix(f'images: {folder}: ')}") from error
    images = [name for name, feature in dataset.features.items() if isinstance(feature, datasets.Image)]
    column = _only(images, ", ".join(dataset.column_names), folder)
    labels = _dataset_labels(dataset, folder)
    only_images = dataset.select_columns([column]).cast_column(column, datasets.Image(decode=False))
    ids = _paths_or_rows(_dataset_paths(only_images, column), [str(row) for row in range(len(dataset))])
    return SavedDatasetSource(folder, only_images, column, ids, labels)


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


def _dataset_paths(dataset: "Dataset", column: str) -> list[str | None]:
    paths: list[str | None] = []
    for table in dataset.with_format("arrow").iter(batch_size=1000):  # columns stay mapped: the bytes are not touched
        paths += pc.struct_field(table.column(column), "path").to_pylist()
    return paths


def _dataset_labels(dataset: "Dataset", folder: str) -> list[str | None]:
    names = {name: f.names for name, f in dataset.features.items() if type(f).__name__ == "ClassLabel"}
    column = "label" if "label" in dataset.column_names else next(iter(names)) if len(names) == 1 else None
    if column is None or not _can_be_label(dataset.features.arrow_schema.field(column).type):
        return [None] * len(dataset)
    return [_label_name(value, names.get(column)) for value in dataset.with_format("arrow")[column].to_pylist()]
