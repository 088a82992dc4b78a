"""The kinds of results: by which columns or entries each is known, and its main numbers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from saevlm_fast.measures.results import Figures
from saevlm_fast.records import object_of
from saevlm_fast.steering.table import COLUMNS, scores_of_rows

_BEST = 3  # latents that are named
_REMOVAL = ("removal", "k")  # of a row of erase; the others are what is asked


class Result(NamedTuple):
    """A kind of result.

    Attributes:
        command: that wrote it. what: it is, for people. entries: that no other has. figures: its main numbers.
        file: that tells it, where it is a directory. beside: the file of whose settings it is a part.
        columns: of a table that may be large, those that the numbers are of; all if none.
    """

    command: str
    what: str
    entries: tuple[str, ...]
    figures: Callable[[Any], Figures]
    file: str | None = None
    beside: Callable[[Path], Path] | None = None
    columns: tuple[str, ...] = ()


# Numbers -------------------------------------------------------------------------------------------------------------


def _column(table: pa.Table, name: str) -> np.ndarray:
    """As float64; NaN where it has no number."""
    return np.asarray(table[name].cast(pa.float64()).to_numpy(), dtype=np.float64)


def _counts(table: pa.Table) -> dict[str, int]:
    return {each["values"]: each["counts"] for each in table["status"].value_counts().to_pylist()}


def _best(table: pa.Table, by: str, *names: str) -> list[dict[str, Any]]:
    """The latents of the largest numbers, with some columns of theirs."""
    values = _column(table, by)
    order = np.argsort(np.where(np.isnan(values), -np.inf, values), kind="stable")[::-1][:_BEST]
    rows = table.select([*names, by]).take(order[~np.isnan(values[order])])
    return list(rows.to_pylist())


def _scores(table: pa.Table) -> Figures:
    ms, images = _column(table, "ms"), (table.schema.metadata or {}).get(b"n_images")
    figures: Figures = {"latents": len(table)} | ({} if images is None else {"images": int(images)})
    known_ms = ms[~np.isnan(ms)]
    figures |= {"counts": _counts(table), "mean": known_ms.mean() if len(known_ms) else np.nan}
    if "above_null" in table.column_names and len(known_ms):
        figures["above_null"] = float(_column(table, "above_null")[~np.isnan(ms)].mean())
    return figures | {"best_latents": _best(table, "ms", "latent", "n_active")}


def _steering_scores(table: pa.Table) -> Figures:
    return scores_of_rows(table.select(COLUMNS.names).cast(COLUMNS).to_pylist(), {}).figures()


def _steerability(table: pa.Table) -> Figures:
    unit = "latent" if "latent" in table.column_names else "neuron"
    s, counts = _column(table, "s"), _counts(table)
    asked = len(table) - counts.get("dead", 0) - counts.get("not asked", 0)
    mean = float(np.nanmean(s)) if np.isfinite(s).any() else np.nan
    figures: Figures = {"units": len(table), "asked": asked, "dead": counts.get("dead", 0), "s": mean}
    return figures | {f"best_{unit}s": _best(table, "s", unit, "concept")}


def _names_of_latents(table: pa.Table) -> Figures:
    own = table.filter(table["name"].is_valid())
    return {"latents": len(table), "named": len(own), "best": _best(own, "score", "latent", "name")}


def _top_images(table: pa.Table) -> Figures:
    return {name: len(table[column].unique()) for name, column in (("latents", "latent"), ("images_shown", "image"))}


def _pairs_of_evaluation(table: pa.Table) -> Figures:
    kinds = table["kind"].value_counts().to_pylist()
    return {"latent_pairs": len(table), "kinds": {each["values"]: each["counts"] for each in kinds}}


def _latents_of_evaluation(table: pa.Table) -> Figures:
    return {"latents": len(table), "counts": _counts(table)}


def _evaluation(document: dict[str, Any]) -> Figures:
    """Of its SAEs; how they stand beside controls is in the file."""
    subjects, inputs = document["subjects"], object_of(document.get("inputs"))
    by_kind = {kind: [each["name"] for each in subjects if each["kind"] == kind] for kind in ("sae", "control")}
    headlines = {
        row["measure"]: {name: row["values"][name] for name in by_kind["sae"] if name in row["values"]}
        for row in document["table"]
    }
    given = {name: inputs[name] for name in ("rows", "images") if name in inputs}
    return given | {"saes": by_kind["sae"], "controls": by_kind["control"], "headlines": headlines}


def _erased(document: dict[str, Any]) -> Figures:
    return {"what": document["what"], "layers": _layers(document["layers"])}


def _layers(found: list[dict[str, Any]]) -> list[Figures]:
    """Of every SAE what is told before, and without the most latents. Version 1 has its table as rows."""
    layers = []
    for each in found:
        row_of = {(row["removal"], row["k"]): row for row in each["table" if "table" in each else "rows"]}
        most = max(k for removal, k in row_of if removal == "latents")
        before, after = row_of["nothing", 0], row_of["latents", most]
        told = {asked: [before[asked]["value"], after[asked]["value"]] for asked in before if asked not in _REMOVAL}
        layers.append({"sae": each["sae"], "layer": each["layer"], "k": most, **told})
    return layers


def _erased_table(table: pa.Table) -> Figures:
    """The same of the table."""
    rows_of: dict[tuple[Any, Any], dict[tuple[str, int], Figures]] = {}
    for each in table.to_pylist():
        rows = rows_of.setdefault((each["sae"], each["layer"]), {})
        row = rows.setdefault((each["removal"], each["k"]), {"removal": each["removal"], "k": each["k"]})
        row[each["asked"]] = {"value": each["accuracy"]}
    layers = [{"sae": sae, "layer": layer, "table": list(rows.values())} for (sae, layer), rows in rows_of.items()]
    return {"layers": _layers(layers)}


def _agreements(document: dict[str, Any]) -> Figures:
    pooled = {name: each["pooled"]["value"] for name, each in document["scores"].items()}
    return {"pairs": document["pairs"], "neurons": document["neurons"], "pooled": pooled}


def _cross_modal(document: dict[str, Any]) -> Figures:
    names = ("pairs", "kept", "wrong", "latents", "latent_kinds", "detection")
    figures = {name: document[name] for name in names if name in document}
    if isinstance(kinds := figures.get("latents"), dict):  # of an older version
        figures |= {"latents": kinds.pop("all"), "latent_kinds": kinds}
    return figures


def _omegas(table: pa.Table) -> Figures:
    omega = _column(table, "omega")
    scored = omega[~np.isnan(omega)]
    figures: Figures = {"latents": len(table), "scored": len(scored), "omega": scored.mean() if len(scored) else np.nan}
    return figures | {"best_latents": _best(table, "omega", "latent")}


def _pairs_of_text_and_image(table: pa.Table) -> Figures:
    counts = {name: int(_column(table, name).sum()) for name in ("kept", "wrong") if name in table.column_names}
    return {"pairs": len(table), **counts}


def _image_tokens(table: pa.Table) -> Figures:
    kept = int(_column(table, "kept").sum())
    return {"pairs": len(table["sample"].unique()), "image_tokens": len(table), "kept_tokens": kept}


def _patch_test(table: pa.Table) -> Figures:
    """What the model says of the captions, by filter and share of the image tokens."""
    means = table.group_by(["filter", "share"]).aggregate([("log_prob", "mean"), ("right", "mean")]).to_pylist()
    said = {
        f"{row['filter']} {row['share']:g}": {"log_prob": row["log_prob_mean"], "right": row["right_mean"]}
        for row in means
    }
    return {"pairs": len(table["image"].unique()), "filters": said}


def _report(document: dict[str, Any]) -> Figures:
    return {name: document[name] for name in ("title", "latents", "images")}


def _grid(document: dict[str, Any]) -> Figures:
    names = ("explained_variance", "l0", "ms_mean")
    saes = {each["name"]: {name: each[name] for name in names if name in each} for each in document["saes"]}
    return {name: document[name] for name in ("rows",) if name in document} | {"saes": saes}


def _grid_table(table: pa.Table) -> Figures:
    return _grid({"saes": table.to_pylist()})


# The list ------------------------------------------------------------------------------------------------------------

EVALUATION = Result("evaluate", "evaluation of SAEs", ("subjects", "table", "left_out"), _evaluation, "evaluation.json")
RESULTS = (
    Result("ms-score", "Monosemanticity Scores", ("latent", "ms", "status", "n_active"), _scores),
    EVALUATION,
    Result("evaluate", "latents of an evaluation", ("latent", "status", "rate_images"), _latents_of_evaluation),
    Result(
        "evaluate", "pairs of latents of an evaluation", ("kind", "latent", "other", "support"), _pairs_of_evaluation
    ),
    Result("report", "report, pages about latents", ("format", "title", "latents", "images"), _report, "report.json"),
    Result("top-images", "top images of latents", ("latent", "rank", "image"), _top_images, "top_images.parquet"),
    Result("name", "names of latents", ("latent", "name", "score", "margin"), _names_of_latents),
    Result("steering-score", "steering scores", ("latent", "n_top", "steered", "unsteered"), _steering_scores),
    Result(
        "steerability",
        "what a CLIP says when units move",
        ("latent", "status", "density", "s", "concept"),
        _steerability,
    ),
    Result(
        "steerability",
        "what a CLIP says when neurons move",
        ("neuron", "status", "s", "concept"),
        _steerability,
        beside=lambda path: path.with_name(path.name.replace(".neurons.", ".")),
    ),
    Result("erase", "what a CLIP says without latents", ("what", "layers"), _erased),
    Result(
        "erase",
        "what a CLIP says without latents, a row a number",
        ("removal", "k", "asked", "accuracy"),
        _erased_table,
        beside=lambda path: path.with_suffix(".json"),
    ),
    Result("cross-modal", "latents and pairs of SAE-V", ("pairs", "kept", "latents"), _cross_modal, "cross_modal.json"),
    Result("cross-modal", "latents of SAE-V", ("latent", "omega", "n_text", "n_image"), _omegas),
    Result(
        "cross-modal", "image tokens of SAE-V", ("sample", "patch", "kept"), _image_tokens, columns=("sample", "kept")
    ),
    Result("cross-modal", "pairs of SAE-V", ("image", "shuffled", "co_occurrence", "kept"), _pairs_of_text_and_image),
    Result("cross-modal", "test of patch filters", ("image", "filter", "share", "log_prob"), _patch_test),
    Result("human-agreement", "scores against people", ("benchmark", "pairs", "scores"), _agreements),
    Result("train", "SAEs of one pass", ("rows", "of", "saes"), _grid),
    Result(
        "train",
        "SAEs of one pass, a row an SAE",
        ("name", "architecture", "d_sae", "explained_variance", "l0", "l2"),
        _grid_table,
    ),
)
