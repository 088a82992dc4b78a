"""Tables of one row a latent, of this program's or another's making: read, checked, spread over all latents."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv

from saevlm_fast.data.parquet import MAX_TEXT_BYTES, open_table
from saevlm_fast.errors import first_line, require


def read_latents_table(path: Path, d_sae: int) -> pa.Table:
    """A .parquet, .csv or .json table with a column `latent`, each within 0 .. d_sae - 1 and at most once.

    JSON is what write_table writes ({"latents": [{...}]}), or a list of rows.

    Raises:
        ValueError: it cannot be read, has no such column, or is of another SAE.
    """
    table = read_table(path)
    require("latent" in table.column_names, f"{path}: it has no column latent")
    column = table["latent"]
    require(pa.types.is_integer(column.type) and column.null_count == 0, f"{path}: latent must be whole numbers")
    latents = column.to_numpy()
    low, high = (int(latents.min()), int(latents.max())) if len(latents) else (0, 0)
    require(low >= 0 and high < d_sae, f"{path}: latent {low if low < 0 else high} is not within 0 to {d_sae - 1}")
    require(len(np.unique(latents)) == len(latents), f"{path}: a latent has several rows")
    return table


def read_table(path: Path, columns: tuple[str, ...] = ()) -> pa.Table:
    """A .parquet, .csv or .json table, as read_latents_table says. ValueError: it cannot be read.

    columns: of parquet, those that are read; all if none.
    """
    require(path.is_file(), f"{path}: no such file")
    try:
        return _read(path, columns)
    except (
        OSError,
        UnicodeError,
        pa.ArrowException,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        RecursionError,
    ) as error:
        raise ValueError(f"{path}: not a table of latents: {first_line(error)}") from None


def _read(path: Path, columns: tuple[str, ...]) -> pa.Table:
    if path.suffix == ".parquet":
        with open_table(str(path)) as file:
            return _plain(file.read(list(columns) or None))
    size = path.stat().st_size
    require(size <= MAX_TEXT_BYTES, f"{size} bytes; a table has at most {MAX_TEXT_BYTES}")
    if path.suffix == ".csv":
        return pa_csv.read_csv(path)
    require(path.suffix == ".json", "its name ends in none of .parquet, .csv, .json")
    value = json.loads(path.read_text(encoding="utf-8"))
    return pa.Table.from_pylist(value["latents"] if isinstance(value, dict) else value)


def _plain(table: pa.Table) -> pa.Table:
    """Without dictionaries, which texts of parquet are read as."""
    for i, field in enumerate(table.schema):
        if pa.types.is_dictionary(field.type):
            table = table.set_column(i, field.name, table[field.name].cast(field.type.value_type))
    return table


def spread(table: pa.Table, name: str, d_sae: int) -> np.ndarray:
    """A numeric column as float64 [d_sae]; NaN where the table has no row, or null."""
    values = np.full(d_sae, np.nan)
    values[table["latent"].to_numpy()] = table[name].cast(pa.float64()).to_numpy()
    return values


def numeric_columns(table: pa.Table) -> list[str]:
    """Names of the columns of numbers, and of what is true or false, without `latent`."""
    kinds = {field.name: field.type for field in table.schema}
    tests = (pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean)
    return [name for name, kind in kinds.items() if name != "latent" and any(test(kind) for test in tests)]
