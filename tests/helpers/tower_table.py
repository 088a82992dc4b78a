"""The table of towers in docs/how-to/harvest.md, made by harvesting a small model of every family.

python tests/helpers/tower_table.py, where tests/helpers is on the path, writes it anew.
"""

from pathlib import Path

from many_towers import FAMILIES, harvested

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "how-to" / "harvest.md"
BEGIN, END = "<!-- table: tests/helpers/tower_table.py -->", "<!-- end of table -->"
HEAD = "| tower | library | layers | points | before the patches | grid of patches | checked by |"


def table(marked: bool) -> str:
    """marked: with the families that only `pytest -m families` looks at."""
    lines = [HEAD, "|---" * 7 + "|"]
    for number, family in enumerate(FAMILIES):
        if family.marked and not marked:
            continue
        _, _, points, run, _, _ = harvested(number)
        kinds = list(dict.fromkeys(point.point for point in points))
        layout = run.layouts[points[0]]
        n_others = layout.n_prefix - layout.has_cls
        before = ["CLS"] * layout.has_cls + [f"{n_others} more"] * bool(n_others)
        cells = [
            family.name,
            family.library,
            "stages" if family.stages else "blocks",
            ", ".join(kinds),
            ", ".join(before) or "none",
            "each image its own" if layout.grid is None else "of the tower",
            family.checked_by,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def page_with(text: str) -> str:
    """docs/how-to/harvest.md with another table."""
    page = PAGE.read_text(encoding="utf-8")
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n\n{text}\n\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    PAGE.write_text(page_with(table(marked=True)), encoding="utf-8")
