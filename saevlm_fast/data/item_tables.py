"""What a shard says of its rows, made of what a caller gives: image, token and label of each."""

from collections.abc import Mapping
from numbers import Integral
from typing import Any

import numpy as np
import pyarrow as pa
from torch import Tensor

from saevlm_fast.data.store import ITEM_SCHEMA, TOKEN_SCHEMA
from saevlm_fast.errors import first_line, require, shown

Items = Mapping[str, Any]  # column name -> one value a row (a sequence or a tensor); a pyarrow table will do too


def item_table(items: Items, n_rows: int) -> pa.Table:
    """Items as a shard's table has them, a column that may be left out as null. ValueError: they do not fit."""
    table: Any = items if isinstance(items, pa.Table) else None
    columns = dict(items) if table is None else dict(zip(table.column_names, table.columns))
    schema = TOKEN_SCHEMA if "modality" in columns else ITEM_SCHEMA
    known = {"image", "token"} <= set(columns) <= set(schema.names)
    require(known, f"items has columns {sorted(columns)}; needed: image, token and, if any, label")
    for name in TOKEN_SCHEMA.names[len(ITEM_SCHEMA) :] if schema is TOKEN_SCHEMA else ():
        columns.setdefault(name, [None] * n_rows)
    columns.setdefault("label", [None] * n_rows)
    columns = {name: c.tolist() if isinstance(c, Tensor | np.ndarray) else c for name, c in columns.items()}
    columns |= {name: _texts(columns[name]) for name in ("image", "label")}
    lengths = {name: len(column) for name, column in columns.items()}
    same = set(lengths.values()) == {n_rows}
    require(same, f"items has columns of lengths {lengths}; the batch has {n_rows} rows")
    token: Any = columns["token"]
    tokens = token.to_pylist() if isinstance(token, pa.Array | pa.ChunkedArray) else token
    parts = [each for each in tokens if isinstance(each, float | np.floating) and each % 1 != 0]
    require(not parts, f"items do not fit: token {shown(parts[0] if parts else None)} is no whole number")
    try:
        return pa.table(columns, schema=schema)
    except (pa.ArrowException, UnicodeEncodeError, OverflowError) as error:
        raise ValueError(
            f"items do not fit image (string), token (int32), label (string): {first_line(error)}"
        ) from error


def _texts(column: Any) -> Any:
    """Names and labels: a whole number is its digits, as a label is in LabelSet.of."""
    if isinstance(column, pa.Array | pa.ChunkedArray):
        return column.cast(pa.string()) if pa.types.is_integer(column.type) else column
    column = [each.item() if getattr(each, "ndim", None) == 0 else each for each in column]
    whole = [isinstance(each, Integral) and not isinstance(each, bool) for each in column]
    return [str(each) if number else each for each, number in zip(column, whole)] if any(whole) else column
