"""The table of steering scores: its columns, its means, the blocks of rows it grows from, and the way back from a file.

A block is a record (records.py) of the rows of some latents, sealed, with null for what is not a number.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv

from saevlm_fast.data.parquet import open_table
from saevlm_fast.errors import first_line, require, while_writing
from saevlm_fast.records import NUMBER, TEXT, Each, Fields, optional, read_record, whole, write_record

CONDITIONS = ("steered", "sae_attached", "unsteered", "random_latent", "sign_flip", "difference_of_means")
N_TOP = 16
EMPTY = "_empty"
MEASURES = (*CONDITIONS, *(name + EMPTY for name in CONDITIONS))
_KINDS = {"latent": pa.int64(), "n_top": pa.int64(), "other_latent": pa.int64(), "answer": pa.string()}
COLUMNS = pa.schema({**_KINDS, **dict.fromkeys(("answer_share", *MEASURES), pa.float64())})
_ROW = Fields(
    {"latent": whole(), "n_top": whole(), "other_latent": optional(whole()), "answer": optional(TEXT)}
    | {name: optional(NUMBER) for name in ("answer_share", *MEASURES)},
    others=False,
)
_BLOCK = Fields({"rows": Each(_ROW)}, others=False)

Row = dict[str, Any]


class SteeringScores(NamedTuple):
    """One row a latent: latent, n_top, other_latent, answer, answer_share, and two columns for every condition.

    other_latent: the one of the condition random_latent. answer: the most frequent steered answer, answer_share: how
    often. CONDITION: the score, CONDITION_empty: the share of answers that are empty, of which a score means nothing. A
    latent that never fires has NaN.
    """

    table: pa.Table

    def summary(self) -> dict[str, tuple[float, float]]:
        """Condition -> mean and standard deviation over latents that fire on at least N_TOP images.

        NaN: the mean of none, the standard deviation of fewer than two.
        """
        columns = {name: self._well_defined(name) for name in CONDITIONS}
        nan = float("nan")
        return {
            name: (float(x.mean()) if len(x) else nan, float(x.std()) if len(x) > 1 else nan)
            for name, x in columns.items()
        }

    def empty_answers(self) -> dict[str, float]:
        """Condition -> share of empty answers, over the same latents."""
        columns = {name: self._well_defined(name + EMPTY) for name in CONDITIONS}
        return {name: float(x.mean()) if len(x) else float("nan") for name, x in columns.items()}

    def figures(self) -> dict[str, Any]:
        """JSON: how many latents, and of every condition mean, std and the share of empty answers."""
        empty = self.empty_answers()
        return {
            "latents": len(self.table),
            "latents_with_16_top_images": self.n_well_defined,
            "conditions": {
                name: {"mean": mean, "std": std, "empty_answers": empty[name]}
                for name, (mean, std) in self.summary().items()
            },
        }

    @property
    def n_well_defined(self) -> int:
        return len(self._well_defined("n_top"))

    def _well_defined(self, name: str) -> np.ndarray:
        return np.asarray(self.table[name])[np.asarray(self.table["n_top"]) >= N_TOP]


def scores_of_rows(rows: Sequence[Row], metadata: dict[str, str]) -> SteeringScores:
    """The table of all blocks' rows; None stands for NaN in them."""
    columns = {name: [row[name] for row in rows] for name in COLUMNS.names}
    for name in ("answer_share", *MEASURES):
        columns[name] = [float("nan") if value is None else value for value in columns[name]]
    return SteeringScores(pa.table(columns, COLUMNS).replace_schema_metadata(metadata))


def write_block(path: Path, rows: Sequence[Row]) -> None:
    """Atomically."""
    with while_writing("a block of latents", "blocks before it are whole, and resume (--resume) goes on after them"):
        write_record(path, {"rows": list(rows)})


def read_block(path: Path, latents: Sequence[int]) -> list[Row]:
    """The rows of these latents. ValueError: altered, damaged or of others; it says what to do."""
    try:
        rows = read_record(path, _BLOCK)["rows"]
        found = [row["latent"] for row in rows]
        require(found == list(latents), f"{path}: of latents {found[:3]}..., not {list(latents)[:3]}...")
    except ValueError as error:
        raise ValueError(f"resume: {error}; delete that file and its latents are scored again") from None
    return rows


def read_scores(path: str | os.PathLike[str]) -> SteeringScores:
    """The scores in a finished table. ValueError: no table of steering scores, or damaged."""
    path = Path(path)
    try:
        table = _read_table(path)
        require(table.column_names == COLUMNS.names, "its columns are others")
        return scores_of_rows(table.cast(COLUMNS).to_pylist(), {})
    except (OSError, ValueError, KeyError, TypeError, RecursionError, pa.ArrowException) as error:
        raise ValueError(f"{path}: not a table of steering scores ({first_line(error)})") from None


def _read_table(path: Path) -> pa.Table:
    if path.suffix == ".parquet":
        with open_table(path) as file:
            return file.read(use_threads=False)
    if path.suffix == ".csv":
        null = {"strings_can_be_null": True, "quoted_strings_can_be_null": False}
        with pa.OSFile(os.fsencode(path)) as file:
            return pa_csv.read_csv(file, convert_options=pa_csv.ConvertOptions(column_types=COLUMNS, **null))
    return pa.Table.from_pylist(json.loads(path.read_text(encoding="utf-8"))["latents"], COLUMNS)
