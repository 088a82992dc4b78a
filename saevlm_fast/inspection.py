"""What lies at a path: a store of activations or codes, an SAE, a training run, a matrix file, a result of a command,
or a folder of these.

`inspect` reads headers, indices and item tables and returns a plain dict, ready for JSON; `verify_inspected` reads
everything the dict speaks of. cli/inspect_table.py turns it into the short table that the command prints.
"""

import shlex
import tomllib
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from saevlm_fast.data.matrix import SUFFIXES
from saevlm_fast.data.rows import open_activations
from saevlm_fast.data.store import (
    ACTIVATIONS,
    CODES,
    WIDTH_NAMES,
    StoreIndex,
    joined_index,
    map_shard,
    meant_in,
    read_items,
    verify,
)
from saevlm_fast.errors import ActivationError, require
from saevlm_fast.formats import registry
from saevlm_fast.formats.hub import resolve
from saevlm_fast.formats.sae_header import read_sae_header
from saevlm_fast.formats.source import Source
from saevlm_fast.harvesting.stores import HARVEST_FILE
from saevlm_fast.outputs import workplace
from saevlm_fast.records import Fields, check_record, read_record, whole
from saevlm_fast.results import found as results
from saevlm_fast.results.made import SETTINGS_FILE, has_record, is_record
from saevlm_fast.sae import CONFIG_FILE, SparseAutoencoder
from saevlm_fast.training.checkpoints import (
    METRICS_FILE,
    RUN_FILE,
    STORE_FILE,
    check_metrics,
    checkpoints,
    diverged_at,
    read_settings,
)
from saevlm_fast.training.saved_state import CHECKPOINT_FILE, check_checkpoint, holds_sae

_RUN = Fields({"train": Fields({"steps": whole(1)}), "sae": Fields({"d_in": whole(1), "d_sae": whole(1)})})
KINDS = (
    "a store (index.json), an SAE (cfg.json, or files of other libraries: docs/formats.md), a training run (run.json), "
    "a folder holding some of these, a matrix file (.npy, .safetensors, .pt), or what a command wrote, as ms-score's "
    "tables and an evaluation"
)
_WITHOUT_SETTINGS = {  # how what was cut goes on, where no command has left its settings
    "train": "the same call and resume=True",
    "evaluate": "the same command and --resume, or in Python the same call",
}
_TENSORS = (".safetensors", ".pt", ".pth", ".bin", ".npz")  # files that may be half an SAE
Description = dict[str, Any]


def inspect(path: str | Path) -> Description:
    """Describes what is at `path` (or of the Hub, an SAE), without reading its numbers. Stores may be incomplete.

    Returns "path", "kind" (activations, codes, sae, run, matrix, result or folder), "bytes" on disk, and what belongs
    to the kind; a folder has "contents", descriptions of what lies directly in it, and of runs in a folder of no other
    kind there. What was cut short has "way_on".

    Raises:
        ValueError: nothing of a known kind, or damaged. OSError: not readable.
    """
    local, spec = resolve(path), path
    path = local.path.parent if local.path.name in (STORE_FILE, RUN_FILE) and local.path.is_file() else local.path
    describe = _describer(path)
    if describe is _sae and local.assume:  # what a list says of it, and its files do not
        return _sae(path, spec)
    if describe is not None:
        return describe(path)
    if not path.is_dir():
        return _matrix_or_sae(path)
    children = [each for child in sorted(path.iterdir()) if not child.name.startswith(".") for each in _runs_in(child)]
    is_output = (path / SETTINGS_FILE).is_file()  # whose tables have no settings of their own
    looked = {
        child: _sound_or_damaged(child)
        for child in children
        if child.is_dir() or has_record(child) or (is_output and child.suffix in results.SUFFIXES)
    }
    described = [item for item in looked.values() if item is not None]
    if not described:
        nearly = registry.nearly(Source(path))
        meant = meant_in(sorted(path.iterdir()))
        raise ValueError(f"{path}: nothing to inspect in it; {nearly or f'known are {KINDS}'}{meant}")
    return {
        "path": str(path),
        "kind": "folder",
        "bytes": sum(item["bytes"] for item in described),
        "contents": described,
        "others": sum(looked.get(child) is None and not is_record(child) for child in children),
    } | _way_on_of_all(path, described)


def _runs_in(child: Path) -> list[Path]:
    """Runs of a place in a model, which stand in a directory of that place; else what was asked for itself."""
    runs = [run for run in sorted(child.iterdir()) if (run / RUN_FILE).is_file()] if child.is_dir() else []
    return [child] if not runs or _describer(child) is not None else runs


def _sound_or_damaged(child: Path) -> Description | None:
    """Of one among several what it is, or what is wrong with it; None of what is nothing that is known."""
    try:
        describe = _describer(child)
        return None if describe is None else describe(child)
    except (ValueError, OSError) as error:
        return {"path": str(child), "kind": "damaged", "bytes": 0, "complete": False, "damage": str(error)}


def _describer(path: Path) -> Callable[[Path], Description] | None:
    for name, describe in ((STORE_FILE, _store), (RUN_FILE, _run), (CONFIG_FILE, _sae)):
        if (path / name).is_file():
            return describe
    found = results.find(path) if path.exists() else None
    if found is not None:
        return partial(_result, found=found)
    cut = results.describe_cut(workplace(path)) if path.is_dir() else None
    if cut is not None:
        return partial(_cut_evaluation, cut=cut)
    return _sae if _is_sae(path) else None


def _is_sae(path: Path) -> bool:
    """Of another library, as names of files and tensors tell; what cannot be read is not one, nor a file beside one."""
    if not path.exists() or path.suffix == ".npy":
        return False
    try:
        source = Source(path)
        if registry.find(source) is None or path.is_dir() or source.file is not None:
            return registry.find(source) is not None
        registry.read_header(source)  # a JSON file stands for its folder, if it is one of those that make the SAE
        return path.name in source.opened
    except (ValueError, OSError):
        return False


# Stores --------------------------------------------------------------------------------------------------------------


def _store(path: Path) -> Description:
    index = joined_index(path)
    description: Description = {
        "path": str(path),
        "kind": {ACTIVATIONS: "activations", CODES: "codes"}[index.format],
        "bytes": _size(path / name for name in (STORE_FILE, *_shard_files(index))),
        "rows": index.n_rows,
        WIDTH_NAMES[index.format]: index.width,
        "dtype": str(index.dtype).removeprefix("torch."),
        "shards": len(index.shards),
        "complete": index.complete,
    }
    if not index.complete:
        description["way_on"] = "the command that writes it, and --resume"
    if index.format == CODES:
        description["entries"] = sum(len(map_shard(path, shard, index)["acts"]) for shard in index.shards)
    return description | _items(path, index) | {"source": index.source}


def _shard_files(index: StoreIndex) -> list[str]:
    return [name for shard in index.shards for name in (shard.file, shard.items)]


def _items(path: Path, index: StoreIndex) -> Description:
    """How many images there are, rows of each, and labels. Memory grows with the images, not with the rows."""
    counts, labels, unlabelled = [], [], 0
    for shard in index.shards:
        table = read_items(path / shard.items, shard.rows, shard.items_sha256)
        counts.append(table.group_by("image").aggregate([("image", "count")]))
        labels.append(pc.unique(table["label"]))
        unlabelled += table["label"].null_count
    if not counts:
        return {"images": 0, "rows_per_image": None, "labels": 0, "rows_without_label": 0}
    rows_of_image = pa.concat_tables(counts).group_by("image").aggregate([("image_count", "sum")])["image_count_sum"]
    fewest_most = pc.min_max(rows_of_image).as_py()
    return {
        "images": len(rows_of_image),
        "rows_per_image": [fewest_most["min"], fewest_most["max"]] if len(rows_of_image) else None,
        "labels": len(pc.unique(pa.chunked_array(labels)).drop_null()),
        "rows_without_label": unlabelled,
    }


def _size(files: Iterable[Path]) -> int:
    total = 0
    for file in files:
        require(file.is_file(), f"{file}: missing, but the store's index lists it", ActivationError)
        total += file.stat().st_size
    return total


# SAEs, runs, matrices ------------------------------------------------------------------------------------------------


def _sae(path: Path, spec: str | Path | None = None) -> Description:
    header = read_sae_header(path if spec is None else spec)
    config = header.config
    return {
        "path": str(path),
        "kind": "sae",
        "bytes": sum(file.stat().st_size for file in header.files),
        "format": header.format,
        "architecture": config.architecture,
        "d_in": config.d_in,
        "d_sae": config.d_sae,
        "k": config.k,
        "control": config.control,
        "group_sizes": list(config.group_sizes),
        "threshold": header.threshold,
        "input_norm": config.input_norm,
        "dtype": header.dtype,
        "weights_sha256": header.weights_sha256,
        "metadata": {name: value for name, value in config.metadata.items() if name != "doubts"},
        "doubts": config.metadata.get("doubts", []),
    }


def _run(path: Path) -> Description:
    """A run whose SAE is there is complete; one that was stopped has checkpoints, or nothing yet; so has the one
    that is to replace it."""
    settings = read_settings(path)
    check_record(settings, _RUN, path / RUN_FILE, ValueError)
    saved = [int(checkpoint.name.removeprefix("step_")) for checkpoint in checkpoints(path)]
    complete, diverged = (path / CONFIG_FILE).is_file(), diverged_at(path)
    description = {
        "path": str(path),
        "kind": "run",
        "bytes": _bytes_in(path),
        "complete": complete,
        "steps": settings["train"]["steps"],
        "steps_taken": settings["train"]["steps"] if complete else max(saved, default=0),
        "diverged_at": diverged,
        "checkpoints": saved,
        "logged": (path / METRICS_FILE).is_file(),
        "settings": settings,
        "sae": _sae(path) if complete else None,
    }
    replacement = workplace(path)
    if replacement != path and (replacement / RUN_FILE).is_file() and not (replacement / CONFIG_FILE).is_file():
        description["replacement"] = _run(replacement)
    if diverged is not None:
        return description | {"way_on": "begin anew with a smaller lr, and --force"}
    return description if complete else description | {"way_on": _resumed(path)}


def _resumed(path: Path, command: str = "train") -> str:
    """What goes on with a run or an evaluation, also where it was moved, or is a copy."""
    settings = path / SETTINGS_FILE
    if not settings.is_file():
        return _WITHOUT_SETTINGS[command]
    here = path.parent if workplace(path.parent) == path else path
    try:
        output = Path(tomllib.loads(settings.read_text(encoding="utf-8"))[command]["output"])
        moved = not (output.exists() and output.samefile(here))
    except (OSError, ValueError, KeyError, TypeError):
        moved = False  # whoever resumes with it is told what is wrong
    to = f" --output {shlex.quote(str(here))}" if moved else ""
    return f"saevlm-fast {command} --config {shlex.quote(str(settings))}{to} --resume"


def _way_on_of_all(path: Path, contents: list[Description]) -> Description:
    """Of a folder whose runs one command began, unless one has diverged, which it would again."""
    runs = [item for item in contents if item["kind"] == "run"]
    cut = not all(item["complete"] for item in runs) and all(item["diverged_at"] is None for item in runs)
    return {"way_on": _resumed(path)} if cut and (path / SETTINGS_FILE).is_file() else {}


def _matrix_or_sae(path: Path) -> Description:
    """A matrix file; if it is none, what speaks for an SAE, or that it is nothing that is known."""
    try:
        return _matrix(str(path))
    except ActivationError as error:
        if not path.is_file() or path.suffix == ".npy":
            raise
        nearly = registry.nearly(Source(path)) if path.suffix in _TENSORS else ""
        if nearly:
            raise ValueError(f"{path}: neither a matrix nor an SAE; {nearly}") from error
        if path.suffix in SUFFIXES:
            raise
        raise ValueError(
            f"{path}: neither store, SAE, run, matrix nor result of a command; known are {KINDS}"
        ) from None


def _result(path: Path, found: results.Found) -> Description:
    described = {"path": str(path), "kind": "result", "bytes": _bytes_in(path)} | results.describe(found)
    replacement = workplace(path)
    cut = results.describe_cut(replacement) if path.is_dir() and replacement != path else None
    return described | ({} if cut is None else {"replacement": _cut_evaluation(replacement, cut)})


def _cut_evaluation(path: Path, cut: Description) -> Description:
    """What was to be an evaluation, or to replace one: what is finished of it, and how it goes on."""
    way_on = _resumed(workplace(path), "evaluate")
    return {"path": str(path), "kind": "result", "bytes": _bytes_in(path), "complete": False, "way_on": way_on} | cut


def _bytes_in(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def _matrix(path: str) -> Description:
    matrix = open_activations(path)
    return {
        "path": path,
        "kind": "matrix",
        "bytes": matrix.path.stat().st_size,
        "rows": matrix.n_rows,
        "d_in": matrix.d,
        "dtype": str(matrix.dtype).removeprefix("torch."),
    }


# Verification --------------------------------------------------------------------------------------------------------


def verify_inspected(description: Description, on_bytes: Callable[[int], None] = lambda done: None) -> str:
    """Reads all of what `inspect` described; returns what was found sound, for the table.

    on_bytes: called with the bytes read so far (of description["bytes"]).

    Raises:
        ValueError: what is missing, truncated, altered or not finite, by name.
    """
    path, kind = Path(description["path"]), description["kind"]
    if (path / HARVEST_FILE).is_file():
        read_record(path / HARVEST_FILE, Fields())
    if kind in ("activations", "codes"):
        verify(path, on_bytes)
        return "every shard is whole"
    if kind == "sae":
        SparseAutoencoder.from_pretrained(path)
        return _weights_text(description["weights_sha256"] is not None)
    if kind == "run":
        return _verify_run(path, description)
    require(kind != "damaged", description.get("damage", ""))
    if kind == "result":
        results.check_whole(path)
        return "every table and record can be read"
    if kind == "matrix":
        return _verify_matrix(description, on_bytes)
    done = 0
    for item in description["contents"]:
        item["verified"] = verify_inspected(item, _after(done, on_bytes))
        done += item["bytes"]
        on_bytes(done)
    return "everything is whole"


def _weights_text(recorded: bool) -> str:
    return "weights complete and finite" + (", as they were written (SHA-256)" if recorded else "; no digest recorded")


def _verify_run(path: Path, description: Description) -> str:
    """The SAE, every checkpoint and the metrics."""
    saved = checkpoints(path)
    for checkpoint in saved:
        check_checkpoint(checkpoint)
    saes = [checkpoint for checkpoint in saved if holds_sae(checkpoint)] + ([path] if description["sae"] else [])
    for directory in saes:
        SparseAutoencoder.from_pretrained(directory)
    check_metrics(path, saved[-1] if saved else None)
    recorded = all(read_sae_header(directory).weights_sha256 for directory in saes)
    recorded = recorded and all((checkpoint / CHECKPOINT_FILE).is_file() for checkpoint in saved)
    if not saes:
        return "every checkpoint is whole" if saved else "nothing saved yet"
    return _weights_text(recorded)


def _after(before: int, on_bytes: Callable[[int], None]) -> Callable[[int], None]:
    return lambda done: on_bytes(before + done)


def _verify_matrix(description: Description, on_bytes: Callable[[int], None]) -> str:
    matrix = open_activations(description["path"])
    for start, x_BD in matrix.chunks(max(1, (16 << 20) // matrix.row_bytes)):
        on_bytes((start + len(x_BD)) * matrix.row_bytes)
    return "every row is finite"
