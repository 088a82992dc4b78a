"""The picture of a grid of SAEs, as SVG: explained variance against L0; with scores, MS against both."""

import math
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

_SIZE, _LEFT, _TOP, _GAP = 300, 62, 34, 84
_COLOURS = ("#1b6ca8", "#d1495b", "#3a7d44", "#8a5a9e", "#c97b1a", "#3f3f46")
_LABELS = {"l0": "L0", "explained_variance": "explained variance", "ms_mean": "mean Monosemanticity Score"}


def write_picture(path: Path, rows: Sequence[dict[str, Any]], note: str = "") -> None:
    """rows: name, architecture, l0, explained_variance, and ms_mean where there are scores. note: below the picture."""
    panels = [("l0", "explained_variance")]
    if all("ms_mean" in row for row in rows):
        panels += [("l0", "ms_mean"), ("explained_variance", "ms_mean")]
    kinds = list(dict.fromkeys(row["architecture"] for row in rows))
    colours = {kind: _COLOURS[i % len(_COLOURS)] for i, kind in enumerate(kinds)}
    parts = [_panel(i, x, y, rows, colours) for i, (x, y) in enumerate(panels)]
    width, height = _LEFT + len(panels) * (_SIZE + _GAP), _TOP + _SIZE + 92
    legend = [
        f'<circle cx="{_LEFT + 8 + 120 * i}" cy="14" r="5" fill="{colours[kind]}"/>'
        f'<text x="{_LEFT + 18 + 120 * i}" y="18">{escape(kind)}</text>'
        for i, kind in enumerate(kinds)
    ]
    said = f'<text x="{_LEFT}" y="{height - 12}" class="small">{escape(note)}</text>' if note else ""
    text = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}">'
        "<style>text{font:12px sans-serif;fill:#222}.small{font-size:10px;fill:#555}.end{text-anchor:end}"
        ".middle{text-anchor:middle}</style>"
        f'<rect width="{width}" height="{height}" fill="white"/>{"".join(legend)}{"".join(parts)}{said}</svg>\n'
    )
    from saevlm_fast.files import atomic_write

    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _panel(place: int, x: str, y: str, rows: Sequence[dict[str, Any]], colours: dict[str, str]) -> str:
    left, bottom = _LEFT + place * (_SIZE + _GAP), _TOP + _SIZE
    points = [row for row in rows if math.isfinite(row[x]) and math.isfinite(row[y])]
    (x_low, x_high), (y_low, y_high) = (_range([row[key] for row in points]) for key in (x, y))
    parts = [f'<path d="M{left},{_TOP}V{bottom}H{left + _SIZE}" fill="none" stroke="#222"/>']
    for share in (0, 0.5, 1):
        across, up = left + share * _SIZE, bottom - share * _SIZE
        x_text, y_text = _number(x_low + share * (x_high - x_low)), _number(y_low + share * (y_high - y_low))
        parts.append(f'<text x="{across:.0f}" y="{bottom + 18}" class="small middle">{x_text}</text>')
        parts.append(f'<text x="{left - 6}" y="{up + 4:.0f}" class="small end">{y_text}</text>')
        parts.append(f'<path d="M{left},{up:.1f}H{left + _SIZE}M{across:.1f},{_TOP}V{bottom}" stroke="#e4e4e7"/>')
    parts.append(f'<text x="{left + _SIZE / 2:.0f}" y="{bottom + 38}" class="middle">{_LABELS[x]}</text>')
    turned = f'transform="translate({left - 46},{_TOP + _SIZE / 2:.0f}) rotate(-90)"'
    parts.append(f'<text {turned} class="middle">{_LABELS[y]}</text>')
    for row in points:
        across = left + (row[x] - x_low) / (x_high - x_low) * _SIZE
        up = bottom - (row[y] - y_low) / (y_high - y_low) * _SIZE
        end = across > left + 0.7 * _SIZE
        parts.append(f'<circle cx="{across:.1f}" cy="{up:.1f}" r="5" fill="{colours[row["architecture"]]}"/>')
        parts.append(
            f'<text x="{across + (-8 if end else 8):.1f}" y="{up + 4:.1f}" class="small{" end" if end else ""}">'
            f"{escape(row['name'])}</text>"
        )
    return "".join(parts)


def _range(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values, default=0.0), max(values, default=1.0)
    margin = (high - low) * 0.08 or max(abs(high) * 0.08, 1e-3)
    return low - margin, high + margin


def _number(value: float) -> str:
    return f"{value:.3g}"
