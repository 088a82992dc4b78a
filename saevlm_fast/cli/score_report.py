"""What `ms-score` prints and gives as JSON."""

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from saevlm_fast.cli.terminal import print_table, print_wide_table, say, say_list

if TYPE_CHECKING:
    from saevlm_fast.scoring.controls import Comparison, Stratum
    from saevlm_fast.scoring.monosemanticity import MonosemanticityScores
    from saevlm_fast.scoring.trust import TrustSummary


def figures_of(
    scores: "Mapping[str, MonosemanticityScores]", comparisons: "Mapping[str, Comparison]"
) -> dict[str, Any]:
    """JSON: the summary by the first encoder; with several, that of each, and their rank agreement."""
    from saevlm_fast.scoring.trust import rank_agreement

    found = {name: _summary_figures(each) | _interval_figures(each) for name, each in scores.items()}
    figures = dict(next(iter(found.values())))
    if len(found) > 1:
        figures["encoders"] = found
        agreement = rank_agreement(scores)
        figures["rank_agreement"] = [{"a": a, "b": b, "spearman": _number(rho)} for (a, b), rho in agreement.items()]
    if comparisons:
        figures["controls"] = {name: _comparison_figures(each) for name, each in comparisons.items()}
    return figures


def _summary_figures(scores: "MonosemanticityScores") -> dict[str, Any]:
    figures = asdict(scores.summary())
    figures = {"images": figures.pop("n_images"), **figures}
    for name in ("best_latents", "worst_latents"):
        figures[name] = [
            {"latent": latent, "ms": ms, "n_active": int(scores.n_active[latent])} for latent, ms in figures[name]
        ]
    if "guarded_best" in figures:
        figures["guarded_best"] = {name: _number(x) for name, x in figures["guarded_best"]._asdict().items()}
        for name in ("mean_interval", "mean_with_null_interval"):
            figures[name] = [_number(x) for x in figures[name]]
        for name in ("mean_with_null", "mean_cosine", "corrected_mean", "split_half", "above_null", "above_99"):
            figures[name] = _number(figures[name])
    return figures


def _interval_figures(scores: "MonosemanticityScores") -> dict[str, Any]:
    """Of scores over patches; others' are in their summary."""
    from saevlm_fast.scoring.patch_score import PatchScores

    return {"mean_interval": [_number(x) for x in scores.mean_interval]} if isinstance(scores, PatchScores) else {}


def _comparison_figures(comparison: "Comparison") -> dict[str, Any]:
    return {
        "matched": _stratum_figures(comparison.matched),
        "strata": [_stratum_figures(each) for each in comparison.strata],
        "by_seed": [_number(x) for x in comparison.by_seed],
        "untrained": [_summary_figures(each) for each in comparison.controls],
    }


def _stratum_figures(stratum: "Stratum") -> dict[str, Any]:
    figures = {name: _number(x) for name, x in asdict(stratum).items() if name != "difference_interval"}
    return figures | {"difference_interval": [_number(x) for x in stratum.difference_interval]}


def _number(x: Any) -> Any:
    """JSON has no NaN."""
    return None if isinstance(x, float) and not math.isfinite(x) else x


def print_scores(
    scores: "Mapping[str, MonosemanticityScores]", comparisons: "Mapping[str, Comparison]", what: str
) -> None:
    """The summary by each encoder, their agreement, and the untrained SAE beside it."""
    from saevlm_fast.scoring.trust import rank_agreement

    for name, each in scores.items():
        _print_summary(each, what, f" by {name}" if len(scores) > 1 else "")
        if name in comparisons:
            _print_comparison(comparisons[name])
    if not comparisons:
        say("no untrained SAE beside it: a score alone does not tell what was learned (--controls, with an SAE)")
    for (a, b), rho in rank_agreement(scores).items():
        say(f"rank agreement of {a} and {b} (Spearman)  {rho:.3f}")


def _print_summary(scores: "MonosemanticityScores", what: str, by: str) -> None:
    from saevlm_fast.scoring.patch_score import PatchScores
    from saevlm_fast.scoring.trust import FEWEST_IMAGES, TrustedScores

    summary = scores.summary()
    variant = "" if scores.variant == "paper" else f"{scores.variant}, "
    say(f"Monosemanticity Score ({variant}{summary.similarity}, {summary.n_images:,} images) of {what}{by}")
    rows = [("mean +- std", f"{summary.mean:.4f} +- {summary.std:.4f}")]
    if isinstance(scores, TrustedScores):
        rows += _certainty_rows(scores.summary())
    if isinstance(scores, PatchScores) and scores.se is not None:
        rows += [("95 % interval of the mean", _interval(scores.mean_interval))]
    rows += [("best", f"{summary.best:.4f}")]
    rows += [(f"quantile {q:g}", f"{value:.4f}") for q, value in summary.quantiles.items()]
    rows += [(status, f"{count:,}") for status, count in summary.counts.items()]
    print_table(("measure", "value"), rows)
    if not summary.best_latents:
        say(f"no latent has a defined score ({summary.n_images:,} images)")
        return
    often = scores.summary(fewest_images=FEWEST_IMAGES)  # a latent on two images has a high score by luck
    on = f" on {FEWEST_IMAGES} images or more" if often.best_latents else ""
    summary = often if often.best_latents else summary
    for label, extremes in (("best", summary.best_latents), ("worst", summary.worst_latents)):
        listed = (f"{latent}: {value:.3f} ({int(scores.n_active[latent]):,})" for latent, value in extremes)
        say_list(f"{label} latents{on} (images it fires on)", listed)


def _certainty_rows(summary: "TrustSummary") -> list[tuple[str, str]]:
    best = summary.guarded_best
    guarded = "no latent on 10 images, n_eff 5"
    if best.latent >= 0:
        guarded = f"latent {best.latent}: {best.held_out:.4f} (chosen at {best.chosen_at:.4f})"
    return [
        ("95 % interval of the mean", _interval(summary.mean_interval)),
        ("mean, undefined as chance", f"{summary.mean_with_null:.4f}  {_interval(summary.mean_with_null_interval)}"),
        ("chance: mean cosine", f"{summary.mean_cosine:.4f}"),
        ("corrected mean", f"{summary.corrected_mean:.4f}"),
        ("above chance, FDR 5 %", f"{summary.above_null:.1%}"),
        ("above chance, 99 % point", f"{summary.above_99:.1%}"),
        ("split-half rank correlation", f"{summary.split_half:.3f}"),
        ("best on the other half", guarded),
    ]


def _interval(interval: tuple[float, float]) -> str:
    return f"[{interval[0]:.4f}, {interval[1]:.4f}]"


def _print_comparison(comparison: "Comparison") -> None:
    n = len(comparison.controls)
    say(f"Beside {n} untrained SAE{'s' if n > 1 else ''} of the same L0, at the same number of images a latent")
    rows = [
        (
            f"{each.low:,} to {each.high:,}" if each is not comparison.matched else "all matched",
            f"{each.n_trained:,}",
            f"{each.n_control:,}",
            f"{each.trained:.4f}",
            f"{each.control:.4f}",
            f"{each.difference:+.4f}",
            _interval(each.difference_interval),
        )
        for each in (*comparison.strata, comparison.matched)
    ]
    print_wide_table(("images", "latents", "untrained", "MS", "untrained MS", "difference", "95 % interval"), rows)
    say(_verdict(comparison.matched))
    say(f"untrained, by seed, matched: {', '.join(f'{each:.4f}' for each in comparison.by_seed)}")
    unmatched = ", ".join(f"{each.summary().mean:.4f}" for each in comparison.controls)
    say(f"means without matching: {comparison.trained.summary().mean:.4f}, untrained {unmatched}")


def _verdict(matched: "Stratum") -> str:
    """Of one SAE there is no spread of seeds, so it can be told that the score does not separate, not that it does."""
    low, _ = matched.difference_interval
    if math.isnan(matched.difference):
        return "not compared: no number of images, 10 or more, that latents of both have"
    if not low > 0:
        return "NO: the score does not separate it from untrained SAEs (the interval is not above 0)"
    return "above untrained SAEs, by these images; another training seed may differ by more: evaluate, of three SAEs"
