"""What `saevlm-fast evaluate` prints: figures with intervals, verdicts against controls, what was left out."""

import math
from collections import Counter
from typing import TYPE_CHECKING, Any

from saevlm_fast.cli.evaluate_model import print_behaviour
from saevlm_fast.cli.terminal import print_table, print_wide_table, say

if TYPE_CHECKING:
    from saevlm_fast.measures.evaluation import Evaluation
    from saevlm_fast.measures.inputs import Inputs
    from saevlm_fast.measures.subjects import Subject

_MARK = "  NO"  # after a measure that does not separate
_HARDEST = ("untrained", "soft-frozen")  # a measure that does not separate from these says nothing of learning
_SHORT = {
    "better, seeds missing": "better?",
    "does not separate: not better": "NO",
    "does not separate: not better at matched counts": "NO",
}


def print_evaluation(evaluation: "Evaluation", inputs: "Inputs") -> None:
    """To the terminal, a table for each shape of SAE."""
    rows = evaluation.table()
    groups = list(dict.fromkeys(each.subject.group for each in evaluation.results))
    for group in groups:
        members = [each.subject for each in evaluation.results if each.subject.group == group]
        if len(groups) > 1:
            say(f"SAEs of one shape: {group}")
        names = {row["measure"]: row["measure"] + _mark(row, group) for row in rows}
        _print_values(members, rows, names, _chances(evaluation, group))
        _print_intervals(members, rows, names)
        _print_verdicts(group, rows, names)
        _print_few_seeds(members)
    judged = [each["verdict"] for row in rows for each in row["against"]]
    if any(each.startswith("does not separate") for each in judged):
        say("NO: does not separate from what cannot have learned (d' below 2, or not better, by")
        say("means at matched firing counts where these cover half of its latents)")
        say(f"NO after a measure: not from {' or '.join(_HARDEST)}, or where there are neither, from another control")
    if not judged:
        say("no controls: nothing here tells what was learned; --controls all makes some")
    if any("seeds missing" in each for each in judged):
        say("better?: d' needs three SAEs or more that differ by their seed alone; a difference may be chance")
    seeds = {each.subject.name: each.subject.seed for each in evaluation.results}
    for pair in evaluation.compared:
        seed = seeds[pair["first"]]
        began = "; of one seed: they began alike" if seed is not None and seed == seeds[pair["other"]] else ""
        say(
            f"{pair['first']} and {pair['other']}: {pair['shared_share']:.1%} of latents shared (cosine .7), "
            f"{pair['mutual_nearest']:.1%} mutual nearest, mean largest cosine {pair['mmcs'][0]:.3f} "
            f"(random directions {pair['random'][0]:.3f}{began})"
        )
    if inputs.behaviour is not None:
        print_behaviour(evaluation)
    if "hierarchy" not in evaluation.left_out and (gaps := inputs.beside_the_taxonomy()) is not None:
        say(f"taxonomy: {gaps}")
    for name, why in evaluation.left_out.items():
        say(f"left out: {name}: {why}")


def _mark(row: dict[str, Any], group: str) -> str:
    """Of a measure that does not separate from the controls that are hardest to tell apart, or if there are none of
    these, from any."""
    mine = [each for each in row["against"] if each["group"] == group]
    hardest = [each for each in mine if each["control"] in _HARDEST] or mine
    return _MARK if any(each["verdict"].startswith("does not separate") for each in hardest) else ""


def _print_few_seeds(members: "list[Subject]") -> None:
    """Which controls that have chance in them are of one seed, where there are several SAEs."""
    counts = Counter(each.control for each in members)
    once = [f"{name}" for name, n in counts.items() if name not in (None, "raw", "pca") and n == 1]
    if once and counts[None] > 1:
        say(f"one seed: {', '.join(once)}; d' against one rests on the spread of the SAEs alone")


def _chances(evaluation: "Evaluation", group: str) -> dict[str, float]:
    """measure -> what chance gives the first SAE of a group, where it is known; docs/how-to/evaluate.md says which."""
    from saevlm_fast.measures.separation import figure_at

    saes = [each for each in evaluation.results if each.subject.group == group and not each.subject.control]
    first = saes[0] if saes else None
    found = {}
    for headline in evaluation.headlines if first is not None else ():
        path = headline.path
        beside = {"monosemanticity": (*path[:2], "mean_cosine"), "probing": (*path[:2], "chance")}.get(path[0])
        if path == ("hierarchy", "depth"):
            beside = ("hierarchy", "null")
        elif path[:2] == ("kept", "overlap"):
            beside = ("kept", "overlap_chance")
        elif "selection" in path:
            beside = (*path[:-1], "null", path[-1])
        if beside is not None and first is not None:
            found[headline.name] = figure_at(first.figures, beside)
    return {name: value for name, value in found.items() if value == value}


def _print_values(
    members: "list[Subject]", rows: list[dict[str, Any]], shown: dict[str, str], chances: dict[str, float]
) -> None:
    """A column an SAE, and one for each control, the mean of its seeds; before them chance, where any is known."""
    columns = {each.name: [each.name] for each in members if each.control is None}
    for each in members:
        if each.control is not None:
            columns.setdefault(each.control, []).append(each.name)
    several = [name for name, names in columns.items() if len(names) > 1]
    cells = [
        (
            shown[row["measure"]],
            *(_number(_mean([row["values"][name] for name in names])) for names in columns.values()),
        )
        for row in rows
    ]
    if chances:
        cells = [
            (name, _number(chances.get(row["measure"], math.nan)), *rest) for (name, *rest), row in zip(cells, rows)
        ]
    print_wide_table(("measure", *(["chance"] if chances else []), *columns), cells)
    if several:
        say(f"means of {max(map(len, columns.values()))} seeds: {', '.join(several)}")


def _print_intervals(members: "list[Subject]", rows: list[dict[str, Any]], shown: dict[str, str]) -> None:
    """Of the SAEs, 95 %, where there are any: what each covers is in docs/how-to/evaluate.md."""
    names = [each.name for each in members if each.control is None]
    cells = []
    for row in rows:
        ends = [row["intervals"].get(name, (float("nan"),) * 2) for name in names]
        if any(low == low for low, _ in ends):
            cells.append((shown[row["measure"]], *(f"{_number(low)} to {_number(high)}" for low, high in ends)))
    if cells:
        print_wide_table(("95 % interval", *names), cells)


def _mean(values: list[float]) -> float:
    """Of the numbers that are defined; NaN of none."""
    known = [value for value in values if value == value]
    return sum(known) / len(known) if known else float("nan")


def _print_verdicts(group: str, rows: list[dict[str, Any]], shown: dict[str, str]) -> None:
    """What does not separate, in words, and d' where there are seeds."""
    cells: dict[str, dict[str, str]] = {}
    for row in rows:
        for each in row["against"]:
            if each["group"] != group or each["verdict"] in ("not judged", "not measured"):
                continue
            judged: str = each["verdict"]
            verdict = _SHORT.get(judged, judged)
            if each["d_prime"] == each["d_prime"]:
                verdict = _d_prime(each["d_prime"]) + ("" if verdict == "separates" else " NO")
            cells.setdefault(row["measure"], {})[each["control"]] = verdict
    controls = list(dict.fromkeys(control for found in cells.values() for control in found))
    if controls:
        lines = [(name, *(found.get(control, "-") for control in controls)) for name, found in cells.items()]
        print_wide_table(("against", *controls), lines)
    at_matched = [
        (row["measure"], *_matched_cells(each["matched"], row["better"]))
        for row in rows
        for each in row["against"]
        if each["group"] == group and each["control"] == "untrained" and each.get("matched", {}).get("covered")
    ]
    if at_matched:
        print_table(("at matched firing counts", "SAE", "untrained", ""), at_matched)


def _d_prime(value: float) -> str:
    """Of one that does not separate never 2.0."""
    from saevlm_fast.measures.separation import SEPARATES

    just_below = value < SEPARATES <= round(value, 1)
    return f"d' {min(value, SEPARATES - 0.01):.2f}" if just_below else f"d' {value:.1f}"


def _matched_cells(matched: dict[str, float], better: int) -> tuple[str, str, str]:
    """The SAE, the control, and NO where the SAE is not better."""
    mine, control = matched["sae"], matched["control"]
    return _number(mine), _number(control), "NO" if better * (mine - control) <= 0 and better else ""


def _number(value: float) -> str:
    return "-" if value != value else f"{value:.3f}" if abs(value) < 100 else f"{value:,.0f}"
