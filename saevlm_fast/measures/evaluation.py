"""SAEs and controls beside each other: what `measure` gives, its table of verdicts, and evaluation.json."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle

import numpy as np

from saevlm_fast.measures.results import VERSION, Figures, plain
from saevlm_fast.measures.separation import Headline, figure_at, interval_at, matched_mean, separation
from saevlm_fast.measures.subjects import Subject


@dataclass(frozen=True)
class Result:
    """All measures of one subject.

    Attributes:
        subject: what was measured. figures: measure -> figures. latents: columns [S]. pairs: columns.
    """

    subject: Subject
    figures: Figures
    latents: dict[str, np.ndarray]
    pairs: dict[str, np.ndarray]


@dataclass(frozen=True)
class Evaluation:
    """What `measure` gives.

    Attributes:
        results: of the SAEs, then of the controls. left_out: measure -> why. compared: of pairs of SAEs.
        headlines: rows of the table.
    """

    results: list[Result]
    left_out: dict[str, str]
    compared: list[Figures]
    headlines: list[Headline]

    def table(self) -> list[Figures]:
        """One row a headline: values and intervals by subject, and a verdict against each control of each group."""
        rows = []
        for headline in self.headlines:
            values = {each.subject.name: figure_at(each.figures, headline.path) for each in self.results}
            against = list(self._against(headline, values))
            if any(np.isfinite(value) for value in values.values()):
                row: Figures = {"measure": headline.name, "better": headline.better, "values": values}
                ends = {each.subject.name: interval_at(each.figures, headline.path) for each in self.results}
                row["intervals"] = {name: list(each) for name, each in ends.items() if each is not None}
                rows.append(row | {"against": against})
        return rows

    def _against(self, headline: Headline, values: Mapping[str, float]) -> Iterator[Figures]:
        for group in dict.fromkeys(each.subject.group for each in self.results):
            members = [each for each in self.results if each.subject.group == group]
            saes = [each for each in members if each.subject.kind == "sae"]
            for control in dict.fromkeys(each.subject.control for each in members if each.subject.control):
                controls = [each for each in members if each.subject.control == control]
                mine, theirs = ([values[each.subject.name] for each in side] for side in (saes, controls))
                matched = _matched(headline, saes, controls)
                judged = separation(mine, theirs, headline.better, matched)
                yield {"group": group, "control": control, **judged, **({"matched": matched} if matched else {})}

    def as_json(self) -> Figures:
        """evaluation.json; docs/how-to/evaluate.md has its schema."""
        subjects = []
        for each in self.results:
            subject = each.subject
            known: Figures = {
                "name": subject.name,
                "kind": subject.kind,
                "control": subject.control,
                "group": subject.group,
            }
            known |= {"seed": subject.seed, "latents": subject.n_latents, "k": subject.k}
            known |= {"group_sizes": list(subject.group_sizes), "record": subject.record or {}}
            subjects.append(known | {"measures": each.figures})
        left_out = [{"measure": name, "why": why} for name, why in self.left_out.items()]
        return plain(
            {
                "format": "saevlm-fast evaluation",
                "version": VERSION,
                "subjects": subjects,
                "table": self.table(),
                "compared": self.compared,
                "left_out": left_out,
            }
        )


def _matched(headline: Headline, saes: Sequence[Result], controls: Sequence[Result]) -> Figures | None:
    """SAEs and controls at matched firing counts, each with the control of its place: means; None without a column."""
    column, found = headline.column, []
    for sae, control in zip(saes, cycle(controls)):
        if column in sae.latents and column in control.latents:
            mine, theirs = (each.latents for each in (sae, control))
            found.append(matched_mean(theirs[column], theirs["n_active"], mine[column], mine["n_active"]))
    if not found:
        return None
    covered = [each for each in found if each[2] > 0]
    means = [float(np.mean([each[i] for each in covered])) if covered else math.nan for i in (0, 1)]
    return {"control": means[0], "sae": means[1], "covered": float(np.mean([each[2] for each in found]))}
