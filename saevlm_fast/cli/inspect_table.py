"""What saevlm-fast inspect prints of a description (inspection.py): names and values, or a line for each of several."""

from pathlib import Path
from typing import Any

from saevlm_fast.cli.inspect_results import result_rows
from saevlm_fast.files import human_bytes
from saevlm_fast.inspection import Description


def summary_rows(description: Description) -> list[tuple[str, str]]:
    """(name, value) of the short table; of a folder, what its contents share (contents_rows has the others)."""
    rows = [("kind", _KIND_NAMES[description["kind"]])]
    if description["kind"] == "folder":
        rows += _shared_rows(description) + _unfinished_rows(description)
        if description["others"]:
            rows.append(("not listed", f"{description['others']} other files and folders"))
    elif description["kind"] == "run":
        rows += _run_rows(description)
    elif description["kind"] == "sae":
        rows += _sae_rows(description)
    elif description["kind"] == "result":
        rows += result_rows(description)
    else:
        rows += _data_rows(description)
    rows.append(("on disk", human_bytes(description["bytes"])))
    if "complete" in description:
        rows.append(("state", "complete" if description["complete"] else _unfinished_text(description)))
    if "replacement" in description:
        rows.append(("its replacement", _unfinished_text(description["replacement"])))
    if "verified" in description:
        rows.append(("verified", description["verified"]))
    return rows


def contents_rows(description: Description) -> list[tuple[str, str, str, str, str, str]]:
    """(name, kind, shape, dtype, size on disk, complete) of what is in a folder."""
    return [
        (
            _name_in(description, item),
            item.get("command", item["kind"]),
            shape_text(item) if item["kind"] not in ("damaged", "result") else "",
            item.get("dtype") or (item.get("sae") or {}).get("dtype", ""),
            human_bytes(item["bytes"]),
            "yes" if item.get("complete", True) else "NO" if item.get("diverged_at") is None else "DIVERGED",
        )
        for item in description["contents"]
    ]


def _shared_rows(description: Description) -> list[tuple[str, str]]:
    """What every store in the folder says of its source and its images."""
    stores = [item for item in description["contents"] if "source" in item]
    rows = [[(f"source: {name}", value) for name, value in short_values(item["source"])] for item in stores]
    rows = [[*row, ("labels", _labels_text(item))] for row, item in zip(rows, stores)]
    return [row for row in (rows[0] if rows else []) if all(row in others for others in rows)]


def _name_in(folder: Description, item: Description) -> str:
    return str(Path(item["path"]).relative_to(folder["path"]))


def _unfinished_rows(description: Description) -> list[tuple[str, str]]:
    """Of a folder: what is damaged, diverged or cut short in it, and how that goes on."""
    rows = []
    for item in description["contents"]:
        name, together = _name_in(description, item), "way_on" in description and item["kind"] == "run"
        if item["kind"] == "damaged":
            rows.append((f"DAMAGED: {name}", item["damage"]))
        elif not item.get("complete", True):
            rows.append((name, _unfinished_text(item, together)))
    return rows + ([("continue with", description["way_on"])] if "way_on" in description else [])


def _unfinished_text(item: Description, with_others: bool = False) -> str:
    """How far a run or a store came, and how it goes on. with_others: which is said of all of them at once."""
    if item["kind"] == "run" and item["diverged_at"] is not None:
        return f"DIVERGED at step {item['diverged_at']:,} of {item['steps']:,}; {item['way_on']}"
    came = f", step {item['steps_taken']:,} of {item['steps']:,}" if item["kind"] == "run" else ""
    if "finished" in item:
        came = f", {sum(map(len, item['finished'].values())):,} measures are finished"
    return f"INCOMPLETE{came}" + ("" if with_others else f"; continue with {item['way_on']}")


_KIND_NAMES = {
    "activations": "store of activations",
    "codes": "store of sparse codes",
    "sae": "sparse autoencoder",
    "run": "training run",
    "matrix": "matrix file",
    "result": "result of a command",
    "folder": "folder",
}


def _data_rows(description: Description) -> list[tuple[str, str]]:
    rows = [(f"source: {name}", value) for name, value in short_values(description.get("source", {}))]
    rows.append(("shape", shape_text(description)))
    if description.get("entries") is not None and description["rows"]:
        rows.append(("latents per row", f"{description['entries'] / description['rows']:.2f} on average"))
    rows.append(("dtype", description["dtype"]))
    if "shards" in description:
        rows.append(("shards", f"{description['shards']:,}"))
        rows.append(("images", _images_text(description)))
        rows.append(("labels", _labels_text(description)))
    return rows


def shape_text(description: Description) -> str:
    """[rows, width] of stores and matrices, [d_in, d_sae] of SAEs."""
    if "rows" in description:
        return f"{description['rows']:,} x {description.get('d_in') or description.get('d_sae'):,}"
    sae = description.get("sae", description) or description["settings"]["sae"]
    return f"{sae['d_in']:,} -> {sae['d_sae']:,}"


def _images_text(description: Description) -> str:
    if description["rows_per_image"] is None:
        return "0"
    fewest, most = description["rows_per_image"]
    each = f"{fewest:,}" if fewest == most else f"{fewest:,} to {most:,}"
    return f"{description['images']:,}, rows of each: {each}"


def _labels_text(description: Description) -> str:
    if not description["labels"]:
        return "none"
    without = description["rows_without_label"]
    return f"{description['labels']:,} distinct" + (f"; {without:,} rows without" if without else "")


def _sae_rows(description: Description) -> list[tuple[str, str]]:
    threshold, groups, norm = description["threshold"], description["group_sizes"], description["input_norm"]
    between = isinstance(threshold, tuple)
    shown = f"{threshold[0]:.6g} to {threshold[1]:.6g}, one a latent" if between else f"{threshold or 0:.6g}"
    k, control = description["k"], description["control"]
    return [
        ("format", description["format"]),
        ("architecture", description["architecture"]),
        *([("control", control)] if control is not None else []),
        ("d_in -> d_sae", shape_text(description)),
        ("k", "not known" if k is None else str(k)),
        *([("groups", ", ".join(f"{size:,}" for size in groups))] if len(groups) > 1 else []),
        *([("threshold", shown)] if threshold is not None else []),
        *([("input", norm)] if norm != "none" else []),
        *([("centred", _centred_text(description["metadata"]))] if "mean_norm" in description["metadata"] else []),
        ("dtype", description["dtype"]),
        ("SHA-256", description["weights_sha256"] or "no digest recorded"),
        *((f"metadata: {name}", value) for name, value in short_values(description["metadata"])),
        *(("DOUBT", doubt) for doubt in description["doubts"]),
    ]


def _centred_text(metadata: dict[str, Any]) -> str:
    return f"trained less the mean of its data, of norm {metadata['mean_norm']:.6g}, which b_dec holds"


def _run_rows(description: Description) -> list[tuple[str, str]]:
    train, data = description["settings"]["train"], description["settings"].get("data", {})
    batch, there = train.get("batch_size", "?"), data.get("rows")
    if isinstance(batch, int) and isinstance(there, int):
        batch = min(batch, there)  # a batch has each row once at most
    saved = ", ".join(f"{step:,}" for step in description["checkpoints"]) or "none"
    rows = [("steps", f"{description['steps']:,} of {batch} rows"), ("checkpoints", saved)]
    rows += [(f"data: {name}", value) for name, value in short_values(data)]
    if description["sae"] is not None:
        return rows + _sae_rows(description["sae"])
    return [*rows, ("d_in -> d_sae", shape_text(description))]


def short_values(values: dict[str, Any]) -> list[tuple[str, str]]:
    """Names and values fit for a line: a nested record is its spec or its path (all of it is in the JSON)."""
    rows = []
    for name, value in values.items():
        if isinstance(value, dict):
            value = value.get("spec") or value.get("path")
        if value is not None and not isinstance(value, list):
            rows.append((name, f"{value:.6g}" if isinstance(value, float) else str(value)))
    return rows
