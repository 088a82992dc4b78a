"""A picture of an evaluation: density of every subject, and its main figures side by side."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from saevlm_fast.files import atomic_write

if TYPE_CHECKING:
    from saevlm_fast.measures.evaluation import Evaluation

_MOST_ROWS = 12


def draw(evaluation: "Evaluation", path: Path) -> bool:
    """Writes a PNG; False where matplotlib is not installed."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        return False
    figure = Figure(figsize=(12, 6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for each in evaluation.results:
        hist = each.figures["reconstruction"]["density_histogram"]
        edges = hist["start"] + 0.1 * np.arange(len(hist["counts"]))
        left.step(edges, hist["counts"], where="post", label=each.subject.name)
    left.set(xlabel="log10 of the firing rate", ylabel="latents", yscale="symlog")
    left.legend(fontsize="small")
    rows = [row for row in evaluation.table() if row["better"] and all(abs(v) <= 1 for v in row["values"].values())]
    rows = rows[:_MOST_ROWS]
    names = [each.subject.name for each in evaluation.results]
    for i, name in enumerate(names):
        places = np.arange(len(rows)) + 0.8 * i / max(len(names), 1)
        right.barh(places, [row["values"][name] for row in rows], height=0.8 / max(len(names), 1), label=name)
    right.set_yticks(np.arange(len(rows)) + 0.4, [row["measure"] for row in rows], fontsize="small")
    right.invert_yaxis()
    with atomic_write(path) as temporary:
        FigureCanvasAgg(figure).print_png(str(temporary))
    return True
