"""The picture of a grid of SAEs, as SVG: explained variance against L0; with scores, MS against both.

SAEs that differ in their sparsity alone are a series: of one colour and mark, joined in the order of their L0. A point
is labelled with what is its own beside its series, wherever there is room for that.
"""

import math
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

_SIZE, _LEFT, _GAP, _LINE = 300, 66, 88, 17
_COLOURS = ("#1b6ca8", "#d1495b", "#3a7d44", "#8a5a9e", "#c97b1a", "#3f3f46", "#0f8b8d")
_LABELS = {"l0": "L0", "explained_variance": "explained variance", "ms_mean": "mean Monosemanticity Score"}
_LETTER, _HEIGHT = 5.8, 11.0  # of a small letter, in units of the picture
_RADIUS = 4.5
Row = dict[str, Any]
Box = tuple[float, float, float, float]  # left, top, right, bottom


class _Series(NamedTuple):
    """SAEs of one place, architecture and size; what it is called, its colour, and the form of its marks."""

    name: str
    rows: list[Row]
    colour: str
    form: int


def write_picture(path: Path, rows: Sequence[Row], note: str = "") -> None:
    """rows: name, architecture, d_sae, l0, explained_variance, and ms_mean (or None) where there are scores; two of one
    name are one place's. note: below the picture."""
    panels = [("l0", "explained_variance")]
    if any(row.get("ms_mean") is not None for row in rows):
        panels += [("l0", "ms_mean"), ("explained_variance", "ms_mean")]
    series = _series(rows)
    width = _LEFT + len(panels) * (_SIZE + _GAP) - 36
    legend, top = _legend(series, width)
    parts = [_panel(i, top, x, y, series) for i, (x, y) in enumerate(panels)]
    height = top + _SIZE + (72 if note else 54)
    said = f'<text x="{_LEFT}" y="{height - 12}" class="small">{escape(note)}</text>' if note else ""
    text = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}">'
        "<style>text{font:12px sans-serif;fill:#222}.small{font-size:10px;fill:#555}.end{text-anchor:end}"
        ".middle{text-anchor:middle}</style>"
        f'<rect width="{width}" height="{height}" fill="white"/>{legend}{"".join(parts)}{said}</svg>\n'
    )
    from saevlm_fast.files import atomic_write

    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _series(rows: Sequence[Row]) -> list[_Series]:
    found: dict[tuple[str, str, int], list[Row]] = {}
    for row in rows:
        found.setdefault((row["name"].rpartition("/")[0], row["architecture"], row["d_sae"]), []).append(row)
    differ = [len({key[i] for key in found}) > 1 for i in range(3)]
    made = []
    for i, ((place, architecture, d_sae), members) in enumerate(found.items()):
        said = (place, architecture, f"d_sae {d_sae:,}")
        name = ", ".join(text for text, told in zip(said, differ) if told and text) or architecture
        members = sorted(members, key=lambda row: row["l0"])
        made.append(_Series(name, members, _COLOURS[i % len(_COLOURS)], i // len(_COLOURS)))
    return made


def _legend(series: Sequence[_Series], width: float) -> tuple[str, int]:
    """The names of the series in lines of the picture's width, and where the panels begin below them."""
    parts, x, y = [], float(_LEFT), 16
    for each in series:
        wide = 26 + 6.8 * len(each.name)
        if x > _LEFT and x + wide > width:
            x, y = float(_LEFT), y + _LINE
        parts.append(_mark(x + 6, y - 4, each) + f'<text x="{x + 15:.0f}" y="{y}">{escape(each.name)}</text>')
        x += wide
    return "".join(parts), y + 16


def _panel(place: int, top: int, x: str, y: str, series: Sequence[_Series]) -> str:
    left, bottom = _LEFT + place * (_SIZE + _GAP), top + _SIZE
    points = [row for each in series for row in each.rows if _is_number(row.get(x)) and _is_number(row.get(y))]
    (x_low, x_high), (y_low, y_high) = (_range([row[key] for row in points]) for key in (x, y))
    parts = []
    for value in _ticks(x_low, x_high):
        across = left + (value - x_low) / (x_high - x_low) * _SIZE
        parts.append(f'<path d="M{across:.1f},{top}V{bottom}" stroke="#e4e4e7"/>')
        parts.append(f'<text x="{across:.0f}" y="{bottom + 16}" class="small middle">{value:g}</text>')
    for value in _ticks(y_low, y_high):
        up = bottom - (value - y_low) / (y_high - y_low) * _SIZE
        parts.append(f'<path d="M{left},{up:.1f}H{left + _SIZE}" stroke="#e4e4e7"/>')
        parts.append(f'<text x="{left - 6}" y="{up + 4:.0f}" class="small end">{value:g}</text>')
    parts.append(f'<path d="M{left},{top}V{bottom}H{left + _SIZE}" fill="none" stroke="#222"/>')
    parts.append(f'<text x="{left + _SIZE / 2:.0f}" y="{bottom + 36}" class="middle">{_LABELS[x]}</text>')
    turned = f'transform="translate({left - 48},{top + _SIZE / 2:.0f}) rotate(-90)"'
    parts.append(f'<text {turned} class="middle">{_LABELS[y]}</text>')
    places = {
        id(row): (
            left + (row[x] - x_low) / (x_high - x_low) * _SIZE,
            bottom - (row[y] - y_low) / (y_high - y_low) * _SIZE,
        )
        for row in points
    }
    return "".join(parts) + _drawn(series, places, (left + 3, top, left + _SIZE + _GAP - 58, bottom - 1))


def _drawn(series: Sequence[_Series], places: dict[int, tuple[float, float]], room: Box) -> str:
    """Lines, then marks, then labels where nothing else is. places: of rows, by their id."""
    lines, marks, labels = [], [], []
    taken = [(x - 6, y - 6, x + 6, y + 6) for x, y in places.values()]
    for each in series:
        there = [(row, *places[id(row)]) for row in each.rows if id(row) in places]
        way = " ".join(f"{x:.1f},{y:.1f}" for _, x, y in there)
        lines.append(f'<polyline points="{way}" fill="none" stroke="{each.colour}" stroke-opacity="0.35"/>')
        shared = _shared([row["name"] for row in each.rows])
        for row, x, y in there:
            marks.append(_mark(x, y, each, row["name"]))
            text = row["name"][shared:] if len(each.rows) > 1 else ""
            if text and (box := _free(x, y, text, taken, room)):
                taken.append(box)
                labels.append(f'<text x="{box[0]:.1f}" y="{box[3] - 2:.1f}" class="small">{escape(text)}</text>')
    return "".join(lines + marks + labels)


def _shared(names: Sequence[str]) -> int:
    """Letters with which all of a series' names begin, in whole parts of them."""
    first, last = min(names), max(names)
    n = next((i for i, (a, b) in enumerate(zip(first, last)) if a != b), len(first))
    prefix = first[:n]
    return max(prefix.rfind("-"), prefix.rfind("/")) + 1


def _free(x: float, y: float, text: str, taken: Sequence[Box], room: Box) -> Box | None:
    """Where a point's label goes: the first place around it that is within the panel and touches nothing."""
    wide = _LETTER * len(text)
    for away in (8.0, 15.0):
        for across, down in ((1, 0), (-1, 0), (0, -1), (0, 1), (1, -1), (-1, -1), (1, 1), (-1, 1)):
            left = x + (across * away if across >= 0 else -away - wide) - (wide / 2 if across == 0 else 0)
            middle = y + down * (away + 3)
            box = (left, middle - _HEIGHT / 2, left + wide, middle + _HEIGHT / 2)
            inside = box[0] >= room[0] and box[1] >= room[1] and box[2] <= room[2] and box[3] <= room[3]
            if inside and not any(_touch(box, other) for other in taken):
                return box
    return None


def _touch(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _mark(x: float, y: float, series: _Series, said: str = "") -> str:
    """A circle; of series beyond the colours a square, then a triangle. said: what a browser shows over it."""
    r, title = _RADIUS, f"<title>{escape(said)}</title>" if said else ""
    paths = (
        f"M{x - r:.1f},{y:.1f}a{r},{r} 0 1,0 {2 * r},0a{r},{r} 0 1,0 {-2 * r},0",
        f"M{x - r:.1f},{y - r:.1f}h{2 * r}v{2 * r}h{-2 * r}z",
        f"M{x:.1f},{y - r:.1f}l{r},{2 * r}h{-2 * r}z",
    )
    return f'<path class="mark" d="{paths[series.form % 3]}" fill="{series.colour}">{title}</path>'


def _is_number(value: Any) -> bool:
    return value is not None and math.isfinite(value)


def _range(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values, default=0.0), max(values, default=1.0)
    margin = (high - low) * 0.1 or max(abs(high) * 0.1, 1e-3)
    return low - margin, high + margin


def _ticks(low: float, high: float) -> list[float]:
    """Three to seven round numbers within a range."""
    power = 10.0 ** math.floor(math.log10((high - low) / 3))
    step = next(power * times for times in (5, 2, 1) if power * times <= (high - low) / 3)
    first = math.ceil(low / step)
    return [float(f"{n * step:.10g}") for n in range(first, math.floor(high / step) + 1)]
