"""What `erase` found, as a table with one row a number, and as a picture: accuracy by k, layer beside layer."""

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

_WIDTH, _HEIGHT, _LEFT, _TOP, _GAP = 220, 110, 96, 62, 42
_LINES = {
    "latents": ("#1b6ca8", ""),
    "random": ("#8a8a93", ""),
    "magnitude": ("#c97b1a", ""),
    "pca": ("#3a7d44", ""),
    "probe": ("#8a5a9e", "2 3"),
    "nothing": ("#222", "6 4"),
}
_SHOWN_TO = 22  # letters of a question beside its panels


def flat(layers: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    """Columns, one row for each layer, removal, k and question; worst: of its group. None where there is none."""
    columns: dict[str, list[Any]] = {name: [] for name in _COLUMNS}
    for layer in layers:
        for row in layer["table"]:
            for question in _questions([layer]):
                figures, worst = row[question], row[question].get("worst") or {}
                low, high = figures["interval"]
                said = (layer["layer"], layer["sae"], row["removal"], row["k"], question, figures["value"], low, high)
                for column, value in zip(
                    columns.values(), (*said, figures["n"], worst.get("group"), worst.get("value"))
                ):
                    column.append(value)
    return columns


_COLUMNS = ("layer", "sae", "removal", "k", "asked", "accuracy", "low", "high", "n", "worst_group", "worst")


def write_accuracies(path: Path, layers: Sequence[dict[str, Any]]) -> None:
    """The table as CSV."""
    import pyarrow as pa

    from saevlm_fast.scoring.tables import write_table

    write_table(pa.table(flat(layers)), path)


def write_accuracy_picture(path: Path, layers: Sequence[dict[str, Any]], title: str) -> None:
    """One column of panels a layer (or SAE), one row a question, as SVG."""
    from saevlm_fast.files import atomic_write

    questions = _questions(layers)
    legend, right = _legend(layers)
    width = max(_LEFT + len(layers) * (_WIDTH + _GAP), right, _LEFT + 7 * len(title))
    height = _TOP + len(questions) * (_HEIGHT + _GAP) + 14
    parts = [f'<text x="{_LEFT}" y="18">{escape(title)}</text>', *legend]
    several = len({layer["layer"] for layer in layers}) < len(layers)
    for column, layer in enumerate(layers):
        of_sae = f", {Path(layer['sae']).name[-_SHOWN_TO:]}" if several else ""
        left = _LEFT + column * (_WIDTH + _GAP)
        above = f"layer {layer['layer']}{escape(of_sae)}"
        parts.append(f'<text x="{left + _WIDTH / 2}" y="{_TOP - 8}" class="middle">{above}</text>')
        for line, question in enumerate(questions):
            top = _TOP + line * (_HEIGHT + _GAP)
            parts += _panel(left, top, layer["table"], question)
            if column == 0:
                said = question if len(question) <= _SHOWN_TO else f"…{question[1 - _SHOWN_TO :]}"
                turned = f'transform="translate({left - 44},{top + _HEIGHT / 2:.0f}) rotate(-90)"'
                parts.append(f'<text {turned} class="middle">{escape(said)}</text>')
            if line == len(questions) - 1:
                below = top + _HEIGHT + 30
                parts.append(f'<text x="{left + _WIDTH / 2}" y="{below}" class="small middle">taken out, k</text>')
    text = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}">'
        "<style>text{font:12px sans-serif;fill:#222}.small{font-size:10px;fill:#555}.end{text-anchor:end}"
        f'.middle{{text-anchor:middle}}</style><rect width="{width}" height="{height}" fill="white"/>'
        f"{''.join(parts)}</svg>\n"
    )
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _questions(layers: Sequence[dict[str, Any]]) -> list[str]:
    return [name for name in layers[0]["table"][0] if name not in ("removal", "k")]


def _legend(layers: Sequence[dict[str, Any]]) -> tuple[list[str], int]:
    """The lines' names, and where the last of them ends: one layer's panel is narrower."""
    there = {row["removal"] for layer in layers for row in layer["table"]}
    parts, x = [], _LEFT
    for name, (colour, dashes) in _LINES.items():
        if name in there:
            parts.append(f'<path d="M{x},34H{x + 18}" stroke="{colour}" stroke-width="2" stroke-dasharray="{dashes}"/>')
            parts.append(f'<text x="{x + 22}" y="38" class="small">{name}</text>')
            x += 34 + 6 * len(name)
    return parts, x


def _panel(left: int, top: int, rows: Sequence[dict[str, Any]], question: str) -> list[str]:
    """Accuracies from 0 to 1 by k, each k as far from the next; what has no k of its own is a level line."""
    bottom = top + _HEIGHT
    ks = sorted({row["k"] for row in rows if row["removal"] == "latents"})
    across = {k: left + _WIDTH * (i + 0.5) / len(ks) for i, k in enumerate(ks)}
    parts = [f'<path d="M{left},{top}V{bottom}H{left + _WIDTH}" fill="none" stroke="#222"/>']
    for level in (0, 0.5, 1):
        up = bottom - level * _HEIGHT
        parts.append(f'<path d="M{left},{up}H{left + _WIDTH}" stroke="#e4e4e7"/>')
        parts.append(f'<text x="{left - 6}" y="{up + 4}" class="small end">{level:.0%}</text>')
    parts += [f'<text x="{x:.0f}" y="{bottom + 15}" class="small middle">{k}</text>' for k, x in across.items()]
    for name, (colour, dashes) in reversed(_LINES.items()):
        said = [
            (row["k"], bottom - row[question]["value"] * _HEIGHT)
            for row in rows
            if row["removal"] == name and row[question]["value"] is not None
        ]
        if name in ("nothing", "probe"):
            places = [(x, up) for _, up in said for x in (float(left), float(left + _WIDTH))]
        else:
            places = [(across[k], up) for k, up in said]
            parts += [f'<circle cx="{x:.1f}" cy="{up:.1f}" r="3" fill="{colour}"/>' for x, up in places]
        line = " ".join(f"{x:.1f},{up:.1f}" for x, up in places)
        style = f'stroke="{colour}" stroke-width="1.6" stroke-dasharray="{dashes}"'
        parts.append(f'<polyline points="{line}" fill="none" {style}/>')
    return parts
