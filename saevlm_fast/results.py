"""What a command wrote: which command, of what, when and with which settings, and its main numbers.

A result is known by what it holds: the columns of its table or the entries of its JSON, which RESULTS lists. What made
it stands in a settings.toml in it or beside it (cli/record.py), and of a table also in its metadata. A picture or a
page is known by its settings alone. What has no settings any more is described without.
"""

import os
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv

from saevlm_fast.data.parquet import open_table
from saevlm_fast.errors import first_line, require
from saevlm_fast.look.tables import read_table
from saevlm_fast.measures.results import Figures, plain
from saevlm_fast.records import Fields, object_of, read_record
from saevlm_fast.steering.table import COLUMNS, scores_of_rows

SETTINGS_FILE = "settings.toml"  # of cli/record.py, which stands above
SUFFIXES = (".parquet", ".csv", ".json")
_MADE = "made"
_BEST = 3  # latents that are named
_REMOVAL = ("removal", "k")  # of a row of erase; the others are what is asked

Held = Any  # a pyarrow.Table, or a record


class Result(NamedTuple):
    """A kind of result: the command, what it is for people, entries that no other has, its numbers, and its file where
    it is a directory."""

    command: str
    what: str
    entries: tuple[str, ...]
    figures: Callable[[Any], Figures]
    file: str | None = None


def known(path: Path) -> bool:
    """Whether something is a result, be it a damaged one."""
    main = _main_file(path)
    if path.is_dir() and main == path:
        return False
    try:
        return _kind_of(main) is not None or _recorded(path, RESULTS) is not None
    except (OSError, ValueError):
        return _recorded(path, RESULTS) is not None


def has_record(path: Path) -> bool:
    """Whether settings lie beside a file."""
    return _beside(path).is_file()


def is_record(path: Path) -> bool:
    """Whether something is the settings of a result, not the result."""
    return path.name == SETTINGS_FILE or path.name.endswith(f".{SETTINGS_FILE}")


def describe(path: Path) -> dict[str, Any]:
    """What inspect says of a result beside its path and size: what, command, figures, metadata, settings and made.

    Raises:
        ValueError: it is damaged.
    """
    main = _main_file(path)
    kind, figures, metadata = _kind_of(main), None, {}
    record = _recorded(path, RESULTS if kind is None else (kind,), *_around(path, kind))
    if kind is not None:
        held = _held(main)
        try:
            figures, metadata = kind.figures(held), _metadata(held)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, pa.ArrowException) as error:
            reason = f"damaged, it is not what {kind.command} writes ({first_line(error)})"
            # Without its settings it may as well be somebody else's that has such columns or entries.
            raise ValueError(f"{path}: {'' if record else 'no result of a command, or '}{reason}") from None
    require(kind is not None or record is not None, f"{path}: no result of a command")
    found, settings, made = record or (kind, {}, {})
    assert found is not None
    return {
        "what": found.what,
        "command": found.command,
        "figures": plain(object_of(made.get("resolved")) if figures is None else figures),
        "metadata": metadata,
        "settings": settings,
        "made": made,
    }


def check_whole(path: Path) -> None:
    """Reads every table and every record of a result. ValueError: which one is damaged."""
    for file in sorted(each for each in (path.rglob("*") if path.is_dir() else [path]) if each.suffix in SUFFIXES):
        _held(file)


def _main_file(path: Path) -> Path:
    files = [path / each.file for each in RESULTS if each.file is not None] if path.is_dir() else []
    return next((file for file in files if file.is_file()), path)


def _kind_of(path: Path) -> Result | None:
    """By the columns of a table, or the entries of a record; None of another file. ValueError: it is damaged."""
    names = set(_names(path)) if path.suffix in SUFFIXES and path.is_file() else set()  # a pipe would wait for ever
    return next((each for each in RESULTS if names.issuperset(each.entries)), None)


def _names(path: Path) -> list[str]:
    """Of columns or entries; of a table no more is read, for it may be anybody's, and large."""
    if path.suffix == ".json":
        held = _held(path)
        return list(held) if isinstance(held, dict) else held.column_names
    try:
        if path.suffix == ".parquet":
            with open_table(path) as file:
                return list(file.schema_arrow.names)
        with pa.OSFile(os.fsencode(path)) as file, pa_csv.open_csv(file) as reader:
            return list(reader.schema.names)
    except (OSError, ValueError, pa.ArrowException) as error:
        raise ValueError(f"{path}: not a table: {first_line(error)}") from None


def _held(path: Path) -> Held:
    """The table, or the record, in a file; JSON may be a record of a table's metadata and rows. ValueError: neither."""
    if path.suffix != ".json":
        return read_table(path)
    record = read_record(path, Fields())
    if not (isinstance(record.get("metadata"), dict) and isinstance(record.get("latents"), list)):
        return record
    return read_table(path).replace_schema_metadata({name: str(value) for name, value in record["metadata"].items()})


def _metadata(held: Held) -> dict[str, str]:
    if isinstance(held, dict):
        return {}
    return {key.decode(): value.decode() for key, value in (held.schema.metadata or {}).items() if key != b"pandas"}


# What made it --------------------------------------------------------------------------------------------------------


def _beside(path: Path) -> Path:
    return path.with_name(f"{path.name}.{SETTINGS_FILE}")


def _around(path: Path, kind: Result | None) -> Iterator[Path]:
    """Settings of directories that a file may be a part of, as evaluation.json and its tables are."""
    if kind is not None and path.is_file():
        yield from (folder / SETTINGS_FILE for folder in path.absolute().parents[:2])


def _recorded(path: Path, kinds: tuple[Result, ...], *also: Path) -> tuple[Result, Figures, Figures] | None:
    """Which of `kinds` has its settings in a result, beside it or in `also`; these, and by what it was made."""
    own = path / SETTINGS_FILE if path.is_dir() else _beside(path)
    for file in (own, *also):
        try:
            document = tomllib.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            continue  # what a result holds is told without
        for kind in kinds:
            if isinstance(document.get(kind.command), dict):
                return kind, document[kind.command], object_of(document.get(_MADE))
    return None


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
    """Of every SAE what is told before, and without the most latents."""
    layers = []
    for each in document["layers"]:
        row_of = {(row["removal"], row["k"]): row for row in each["rows"]}
        most = max(k for removal, k in row_of if removal == "latents")
        before, after = row_of["nothing", 0], row_of["latents", most]
        told = {asked: [before[asked]["value"], after[asked]["value"]] for asked in before if asked not in _REMOVAL}
        layers.append({"sae": each["sae"], "layer": each["layer"], "k": most, **told})
    return {"what": document["what"], "layers": layers}


def _agreements(document: dict[str, Any]) -> Figures:
    pooled = {name: each["pooled"]["value"] for name, each in document["scores"].items()}
    return {"pairs": document["pairs"], "neurons": document["neurons"], "pooled": pooled}


def _cross_modal(document: dict[str, Any]) -> Figures:
    return {name: document[name] for name in ("pairs", "kept", "wrong", "latents", "detection") if name in document}


def _report(document: dict[str, Any]) -> Figures:
    return {name: document[name] for name in ("title", "latents", "images")}


def _grid(document: dict[str, Any]) -> Figures:
    names = ("explained_variance", "l0", "ms_mean")
    saes = {each["name"]: {name: each[name] for name in names if name in each} for each in document["saes"]}
    return {"rows": document["rows"], "saes": saes}


RESULTS = (
    Result("ms-score", "Monosemanticity Scores", ("latent", "ms", "status", "n_active"), _scores),
    Result("evaluate", "evaluation of SAEs", ("subjects", "table", "left_out"), _evaluation, "evaluation.json"),
    Result("evaluate", "latents of an evaluation", ("latent", "status", "rate_images"), _latents_of_evaluation),
    Result("report", "report, pages about latents", ("format", "title", "latents", "images"), _report, "report.json"),
    Result("top-images", "top images of latents", ("latent", "rank", "image"), _top_images, "top_images.parquet"),
    Result("name", "names of latents", ("latent", "name", "score", "margin"), _names_of_latents),
    Result("steering-score", "steering scores", ("latent", "n_top", "steered", "unsteered"), _steering_scores),
    Result("steerability", "what a CLIP says when units move", ("status", "density", "s", "concept"), _steerability),
    Result("erase", "what a CLIP says without latents", ("what", "layers"), _erased),
    Result("cross-modal", "latents and pairs of SAE-V", ("pairs", "kept", "latents"), _cross_modal, "cross_modal.json"),
    Result("human-agreement", "scores against people", ("benchmark", "pairs", "scores"), _agreements),
    Result("train", "SAEs of one pass", ("rows", "of", "saes"), _grid),
)
