"""Parquet files of others, opened and read without trusting what they unpack to.

Parquet compresses twice: a page of zeros shrinks ten-thousandfold, and a value that repeats is stored once. Here text
and bytes stay dictionaries (a value that repeats is in memory once), so a row group takes what its metadata says, and
that is looked at first.
"""

import os
import stat
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from saevlm_fast.errors import require

# Of text (names, labels) in one file, unpacked. A million names have 0.1 GiB; a hub file has some thousand rows.
MAX_TEXT_BYTES = 1 << 30


def open_table(path: str | os.PathLike[str], rows: int | None = None) -> pq.ParquetFile:
    """The parquet file, opened by its bare name (whatever characters it has) for reading without threads.

    rows: how many there must be, where that is known from elsewhere. Rows that repeat (the tokens of an image) may then
    be more than the file has bits.

    Raises (messages without the file's name, here and below):
        ValueError: not a regular file, another number of rows, or, of an unknown number, more rows than bits.
        OSError: missing. pa.ArrowException: damaged.
    """
    status = os.stat(path)
    require(stat.S_ISREG(status.st_mode), "not a regular file")
    return open_table_in(lambda: _opened(path), status.st_size, rows)


def open_table_in(opened: Callable[[], Any], size: int, rows: int | None = None) -> pq.ParquetFile:
    """The same of a file that `opened` opens anew whenever it is called; size: in bytes.

    Raises:
        ValueError: more rows than bytes can hold, or another number than `rows`.
    """
    # No read-ahead: in a forked process Arrow's threads are not there.
    with pq.ParquetFile(opened(), pre_buffer=False) as file:
        metadata, columns = file.metadata, file.schema
    found = metadata.num_rows
    require(rows is not None or found <= 8 * size, f"{found} rows in {size} bytes")
    require(rows in (None, found), f"{found} rows; the store's index says {rows}")
    leaves = [columns.column(i) for i in range(len(columns))]
    text = [leaf.path for leaf in leaves if leaf.physical_type == "BYTE_ARRAY"]
    return pq.ParquetFile(opened(), metadata=metadata, pre_buffer=False, read_dictionary=text)


def _opened(path: str | os.PathLike[str]) -> pa.NativeFile:
    """Given a name as text, pyarrow takes what stands before a colon for a protocol, and refuses what is not UTF-8."""
    return pa.OSFile(os.fsencode(path))


def plain_schema(file: pq.ParquetFile) -> pa.Schema:
    """The file's schema with text as text, as the writer declared it."""
    return file.metadata.schema.to_arrow_schema()


def unpacked_bytes(file: pq.ParquetFile, columns: Iterable[str], groups: Iterable[int]) -> tuple[int, int]:
    """What columns (nested ones by their beginning) of these row groups take: (in the file, unpacked)."""
    wanted = [f"{column}." for column in columns]
    stored = unpacked = 0
    for number in groups:
        group = file.metadata.row_group(number)
        for i in range(group.num_columns):
            chunk = group.column(i)
            if f"{chunk.path_in_schema}.".startswith(tuple(wanted)):
                stored, unpacked = stored + chunk.total_compressed_size, unpacked + chunk.total_uncompressed_size
    return stored, unpacked


def read_text_columns(file: pq.ParquetFile, columns: Sequence[str]) -> pa.Table:
    """Whole columns of names, labels and numbers; text comes as dictionaries.

    Raises:
        ValueError: above MAX_TEXT_BYTES, in the file or with what repeats written out.
    """
    _, unpacked = unpacked_bytes(file, columns, range(file.num_row_groups))
    listed = ", ".join(columns)
    require(unpacked <= MAX_TEXT_BYTES, too_large(listed, unpacked))
    # One by one: Arrow does not join the dictionaries of row groups inside a struct.
    groups = [file.read_row_group(i, columns=list(columns), use_threads=False) for i in range(file.num_row_groups)]
    table = pa.concat_tables(groups) if groups else file.read(columns=list(columns))
    for name, column in zip(table.column_names, table.columns):
        size = written_out_bytes(column)
        require(size <= MAX_TEXT_BYTES, too_large(name, size))
    return table


def too_large(columns: str, size: int) -> str:
    """What is wrong with text of that size."""
    return f"{columns} unpacks to {size} bytes; names and labels of a file may take {MAX_TEXT_BYTES}"


def written_out_bytes(column: pa.ChunkedArray) -> int:
    """Bytes of a column's text once every repetition stands on its own (0 for numbers)."""
    if pa.types.is_struct(column.type):
        return sum(written_out_bytes(pc.struct_field(column, [i])) for i in range(column.type.num_fields))
    if not pa.types.is_dictionary(column.type):
        return 0
    size = 0
    for chunk in column.chunks:
        lengths = pc.binary_length(chunk.dictionary).cast(pa.int64())
        size += pc.sum(lengths.take(chunk.indices)).as_py() or 0
    return size


def read_small_table(path: Path, schema: pa.Schema, rows: int) -> pa.Table:
    """The columns of `schema` in a parquet file of `rows` rows, in the schema's types; a column it lacks is null.

    Raises:
        ValueError: another number of rows (seen before anything is read), above MAX_TEXT_BYTES, another type.
        OSError, pa.ArrowException: missing, damaged.
    """
    with open_table(path, rows) as file:
        names = [name for name in schema.names if name in file.schema_arrow.names]
        table = read_text_columns(file, names)
    columns = [table.column(f.name).cast(f.type) if f.name in names else pa.nulls(rows, f.type) for f in schema]
    return pa.table(columns, schema=schema)
