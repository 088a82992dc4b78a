"""Tables of scores as files: .parquet, .csv or .json, each written whole or not at all."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from saevlm_fast.errors import require, while_writing
from saevlm_fast.files import atomic_write
from saevlm_fast.scoring.monosemanticity import MonosemanticityScores

SUFFIXES = (".parquet", ".csv", ".json")


def check_scores_path(path: str | os.PathLike[str]) -> Path:
    """The path, if write_scores can write there.

    Raises:
        ValueError: a suffix not in SUFFIXES, a directory, a missing parent.
    """
    path = Path(path)
    require(path.suffix in SUFFIXES, f"output: {str(path)!r} does not end in one of {', '.join(SUFFIXES)}")
    require(not path.is_dir(), f"output: {str(path)!r} is a directory")
    parent = path.absolute().parent
    require(parent.is_dir(), f"output: {str(parent)!r} is not a directory")
    return path


def write_scores(
    scores: MonosemanticityScores, path: str | os.PathLike[str], metadata: Mapping[str, str] | None = None
) -> None:
    """Writes scores.table() as .parquet, .csv or .json, whole or not at all (temporary file, fsync, rename).

    Args:
        scores: one row a latent.
        path: what was there is replaced.
        metadata: the SAE and its data, say. It joins similarity and n_images in Parquet's schema metadata, and in JSON
            under "metadata" ({"metadata": {...}, "latents": [{column: value}]}); CSV has none. An undefined ms is null
            in JSON and "nan" in CSV.

    Raises:
        ValueError: as check_scores_path.
    """
    table = scores.table()
    write_table(table.replace_schema_metadata({**(table.schema.metadata or {}), **(metadata or {})}), path)


def scores_table(scores: Mapping[str, MonosemanticityScores], metadata: Mapping[str, str] | None = None) -> pa.Table:
    """The table by the first encoder, and ms_NAME (corrected_NAME, se_NAME, p_NAME where it has them) by the others."""
    (_, first), *others = scores.items()
    table = first.table()
    for name, each in others:
        theirs = each.table()
        for column in ("ms", "corrected", "se", "p"):
            if column in theirs.column_names:
                table = table.append_column(f"{column}_{name}", theirs[column])
    return table.replace_schema_metadata({**(first.table().schema.metadata or {}), **(metadata or {})})


def write_table(table: pa.Table, path: str | os.PathLike[str]) -> None:
    """Writes a table with schema metadata as write_scores does; a NaN of any column is null in JSON."""
    path = check_scores_path(path)
    with while_writing("the table"), atomic_write(path) as temporary, open(temporary, "wb") as file:
        _write_table(table, path.suffix, file)


def _write_table(table: pa.Table, suffix: str, file: BinaryIO) -> None:
    if suffix == ".parquet":
        pq.write_table(table, file)
    elif suffix == ".csv":
        pa_csv.write_csv(table, file)
    else:
        rows = [{name: _json_value(value) for name, value in row.items()} for row in table.to_pylist()]
        metadata = {key.decode(): value.decode() for key, value in table.schema.metadata.items()}
        file.write(json.dumps({"metadata": metadata, "latents": rows}, allow_nan=False).encode())


def _json_value(value: Any) -> Any:
    return None if isinstance(value, float) and math.isnan(value) else value  # JSON has no NaN
