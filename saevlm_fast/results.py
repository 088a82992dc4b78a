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
from saevlm_fast.files import human_bytes
from saevlm_fast.look.tables import read_table
from saevlm_fast.measures.parts import finished_measures
from saevlm_fast.measures.results import Figures, plain
from saevlm_fast.records import LARGEST, Fields, object_of, read_record
from saevlm_fast.steering.table import COLUMNS, scores_of_rows

SETTINGS_FILE = "settings.toml"  # of cli/record.py, which stands above
SUFFIXES = (".parquet", ".csv", ".json")
_MADE = "made"
_BEST = 3  # latents that are named
_OF = ("sae", "activations", "codes", "embeddings")  # paths that a table and its settings name
_REMOVAL = ("removal", "k")  # of a row of erase; the others are what is asked

Held = Any  # a pyarrow.Table, or a record


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


class Found(NamedTuple):
    """A result, be it a damaged one, before its numbers are looked at.

    Attributes:
        path: of the result. contents: of it, or of its main file. kind: as its columns or entries tell; None of a
            picture or a page. damage: why they tell nothing. recorded: by the settings beside it.
    """

    path: Path
    contents: "_Contents"
    kind: "Result | None"
    damage: ValueError | None
    recorded: "tuple[Result, Figures, Figures] | None"


def find(path: Path) -> Found | None:
    """A result, and what was read to know it, so that it is read once; None of what is none."""
    main = _main_file(path)
    if path.is_dir() and main == path:
        return None
    contents, kind, damage = _Contents(main), None, None
    try:
        kind = contents.kind()
    except (OSError, ValueError) as error:
        damage = error if isinstance(error, ValueError) else ValueError(f"{main}: {first_line(error)}")
    recorded = _recorded(path, RESULTS if kind is None else (kind,), *_around(path, kind))
    is_one = kind is not None or recorded is not None or isinstance(damage, _TooLarge)
    return Found(path, contents, kind, damage, recorded) if is_one else None


def has_record(path: Path) -> bool:
    """Whether settings lie beside a file."""
    return _beside(path).is_file()


def is_record(path: Path) -> bool:
    """Whether something is the settings of a result, not the result."""
    return path.name == SETTINGS_FILE or path.name.endswith(f".{SETTINGS_FILE}")


def describe(found: Found) -> dict[str, Any]:
    """What inspect says of a result beside its path and size: what, command, figures, metadata, settings and made.

    "misfit": why the settings beside it are not its own, and not told, as where a table was replaced without them.

    Raises:
        ValueError: it is damaged.
    """
    if found.damage is not None:
        raise found.damage
    kind, figures, metadata = found.kind, None, {}
    if kind is not None:
        try:
            held = found.contents.held(kind.columns)
            figures, metadata = kind.figures(held), _metadata(held)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, pa.ArrowException) as error:
            reason = f"damaged, it is not what {kind.command} writes ({first_line(error)})"
            # Without its settings it may as well be somebody else's that has such columns or entries.
            doubt = "" if found.recorded else "no result of a command, or "
            raise ValueError(f"{found.path}: {doubt}{reason}") from None
    told, settings, made = found.recorded or (kind, {}, {})
    assert told is not None
    misfit = _misfit(metadata, settings, made)
    if misfit is not None:
        settings, made = {}, {}
    return ({} if misfit is None else {"misfit": misfit}) | {
        "what": told.what,
        "command": told.command,
        "figures": plain(object_of(made.get("resolved")) if figures is None else figures),
        "metadata": metadata,
        "settings": settings,
        "made": made,
    }


def describe_cut(path: Path) -> dict[str, Any] | None:
    """The same of an evaluation that was cut short, and "finished": by subject, measures; None where there is none."""
    finished = finished_measures(path)
    if not finished or _main_file(path) != path:
        return None
    _, settings, made = _recorded(path, (_EVALUATION,)) or (_EVALUATION, {}, {})
    said = {"what": _EVALUATION.what, "command": _EVALUATION.command, "settings": settings, "made": made}
    return said | {"figures": {}, "metadata": {}, "finished": finished}


def check_whole(path: Path) -> None:
    """Reads every table and every record of a result. ValueError: which one is damaged."""
    for file in sorted(each for each in (path.rglob("*") if path.is_dir() else [path]) if each.suffix in SUFFIXES):
        _Contents(file).held()


def _main_file(path: Path) -> Path:
    files = [path / each.file for each in RESULTS if each.file is not None] if path.is_dir() else []
    return next((file for file in files if file.is_file()), path)


class _TooLarge(ValueError):
    """JSON that is not read: whose it is stays unknown."""


class _Contents:
    """A file that may be a result. JSON is read once, however often it is asked; of a table, first its columns alone,
    for it may be anybody's, and large."""

    def __init__(self, path: Path):
        self.path = path
        self._record: dict[str, Any] | None = None

    def kind(self) -> Result | None:
        """By the columns of a table, or the entries of a record; None of another file. ValueError: it is damaged."""
        is_one = self.path.suffix in SUFFIXES and self.path.is_file()  # a pipe would wait for ever
        names = set(self._names()) if is_one else set()
        return next((each for each in RESULTS if names.issuperset(each.entries)), None)

    def held(self, columns: tuple[str, ...] = ()) -> Held:
        """The table, or the record; JSON may be a record of a table's metadata and rows. ValueError: neither.

        columns: of a table, if they are enough.
        """
        if self.path.suffix != ".json":
            return read_table(self.path, columns)
        record = self._json()
        if not _is_table(record):
            return record
        try:
            table = pa.Table.from_pylist(record["latents"])
        except (pa.ArrowException, TypeError, AttributeError) as error:
            raise ValueError(f"{self.path}: not a table of latents: {first_line(error)}") from None
        return table.replace_schema_metadata({name: str(value) for name, value in record["metadata"].items()})

    def _names(self) -> list[str]:
        """Of columns or entries."""
        if self.path.suffix == ".json":
            record = self._json()
            rows = record["latents"] if _is_table(record) else [record]
            return list(rows[0]) if rows and isinstance(rows[0], dict) else []
        try:
            if self.path.suffix == ".parquet":
                with open_table(self.path) as file:
                    return list(file.schema_arrow.names)
            with pa.OSFile(os.fsencode(self.path)) as file, pa_csv.open_csv(file) as reader:
                return list(reader.schema.names)
        except (OSError, ValueError, pa.ArrowException) as error:
            raise ValueError(f"{self.path}: not a table: {first_line(error)}") from None

    def _json(self) -> dict[str, Any]:
        if self._record is None:
            size = self.path.stat().st_size
            message = f"{self.path}: {human_bytes(size)} of JSON; at most {human_bytes(LARGEST)} are read to know whose"
            require(size <= LARGEST, message, _TooLarge)
            self._record = read_record(self.path, Fields())
        return self._record


def _is_table(record: dict[str, Any]) -> bool:
    return isinstance(record.get("metadata"), dict) and isinstance(record.get("latents"), list)


def _metadata(held: Held) -> dict[str, str]:
    if isinstance(held, dict):
        return {}
    return {key.decode(): value.decode() for key, value in (held.schema.metadata or {}).items() if key != b"pandas"}


# What made it --------------------------------------------------------------------------------------------------------


def _beside(path: Path) -> Path:
    return path.with_name(f"{path.name}.{SETTINGS_FILE}")


def _around(path: Path, kind: Result | None) -> Iterator[Path]:
    """Settings of the file, or of directories, that a file may be a part of, as tables of an evaluation are."""
    if kind is not None and path.is_file():
        if kind.beside is not None:
            yield _beside(kind.beside(path))
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


def _misfit(metadata: dict[str, str], settings: Figures, made: Figures) -> str | None:
    """What a table says that it is of, where the settings beside it say otherwise."""
    directory = str(made.get("directory", ""))
    for name in _OF if "calls" not in made else ():  # of one that was resumed the place of each call is not known
        said, asked = metadata.get(name), settings.get(name)
        places: list[Any] = asked if isinstance(asked, list) else [asked]
        if said is None or not places or not all(isinstance(each, str) for each in places):
            continue
        if not _are_same(said.split(","), places, directory):
            return f"{name} is {said} in it, and {', '.join(places)} in {SETTINGS_FILE}"
    return None


def _are_same(pieces: list[str], places: list[str], directory: str) -> bool:
    """Whether what stands between commas names the places, of which each may have commas itself."""
    if not places:
        return not pieces
    for n in range(1, len(pieces) + 1):
        named = ",".join(pieces[:n])
        for each in {named, named.removeprefix(" ")}:  # ms-score has a blank after the comma
            is_it = each == places[0] or _normal(directory, each) == _normal(directory, places[0])
            if is_it and _are_same(pieces[n:], places[1:], directory):
                return True
    return False


def _normal(directory: str, name: str) -> str:
    return os.path.normpath(os.path.join(directory, name))


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


_EVALUATION = Result(
    "evaluate", "evaluation of SAEs", ("subjects", "table", "left_out"), _evaluation, "evaluation.json"
)
RESULTS = (
    Result("ms-score", "Monosemanticity Scores", ("latent", "ms", "status", "n_active"), _scores),
    _EVALUATION,
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
