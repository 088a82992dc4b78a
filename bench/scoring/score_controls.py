"""Trained SAEs beside untrained ones at equal firing counts.

    python -m bench.scoring.score_controls --output FILE.md

On the box's scenes, by two encoders: tiny-clip's own projection, and the labels themselves (one number for each value
of each factor, 1 where a scene shows it): the ideal encoder, which sees exactly what a scene is made of. For each k, as
many trained BatchTopK SAEs as seeds, each beside an untrained one of the same L0; latents are matched by the rule of
saevlm_fast/scoring/controls.py. The interval is by image, of the mean difference over seeds; the seeds' own spread
stands beside it. Purity, as bench/scoring/metric_vs_truth.py has it but divided by what is possible (1 - base), is
weighed in the same way. What comes out is written as it is.
"""

import argparse
import math
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from bench.helpers.arguments import of_scenes
from bench.helpers.scenes import LabelledScenes
from saevlm_fast.config import RunOptions, SAEConfig, TrainConfig
from saevlm_fast.data.rows import Activations
from saevlm_fast.files import atomic_write
from saevlm_fast.scoring.controls import Match, untrained_like
from saevlm_fast.scoring.ranks import spearman
from saevlm_fast.scoring.second_pass import change_error
from saevlm_fast.scoring.source import ScoredImages
from saevlm_fast.scoring.sums import STATUSES
from saevlm_fast.scoring.trust import NORMAL_95, TrustedScores, TwoPasses
from saevlm_fast.training.run import train

IDEAL, OWN = "labels", "tiny-clip"


@dataclass(frozen=True)
class Seed:
    """One trained SAE and its untrained one: scores of both by encoder, purity, and weights of all matched means."""

    scores: list[dict[str, TrustedScores]]
    purity: list[Tensor]
    weights: list[Tensor]
    ranges: list[tuple[int, int]]
    explained: float


def main() -> None:
    options = parse()
    data = LabelledScenes.of("train", options.train_scenes).activations
    test = LabelledScenes.of("test", options.test_scenes)
    encoders = {OWN: test.embeddings, IDEAL: test.ideal()}
    lines = []
    for k in options.k:
        started = time.monotonic()
        seeds = [one_seed(data, test, encoders, k, seed, options) for seed in range(options.seeds)]
        lines += report(k, seeds)
        print(f"k {k}: {time.monotonic() - started:.0f} s", flush=True)
    text = "\n".join(
        [
            f"{options.train_scenes:,} scenes to train on, {options.test_scenes:,} others to measure on; BatchTopK x4, "
            f"{options.steps:,} steps of {options.batch_size}; {options.seeds} seeds.\n",
            HEAD,
            "|---|---|---|---:|---:|---:|---:|---:|---:|---:|---:|",
            *lines,
            "",
        ]
    )
    print(text)
    with atomic_write(Path(options.output)) as temporary:
        temporary.write_text(text, encoding="utf-8")


def parse() -> argparse.Namespace:
    parser = of_scenes(__doc__, train=10_000, test=5000, steps=1200, seeds=4)
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--k", type=int, nargs="+", default=[5, 10, 20])
    return parser.parse_args()


def one_seed(
    data: Activations,
    test: LabelledScenes,
    encoders: dict[str, Activations],
    k: int,
    seed: int,
    options: argparse.Namespace,
) -> Seed:
    config = SAEConfig.sized(data.d, expansion=4, k=k, architecture="batch_topk")
    recipe = TrainConfig(steps=options.steps, batch_size=options.batch_size, seed=seed, dead_after=100_000)
    with tempfile.TemporaryDirectory() as output:
        where = RunOptions(Path(output) / "run", device="cpu", checkpoint_every=options.steps)
        sae, metrics = train(data, config, recipe, where, validation=test.activations)
    saes = [sae.eval(), untrained_like(sae, test.activations, seed=1000 + seed)[0]]
    passes = [TwoPasses(ScoredImages(test.activations, encoders, each)) for each in saes]
    match = Match(*(one_or_list(p, i) for i, p in enumerate(passes)))
    weights = match.weights()
    scores = [each.second(weights_SW) for each, weights_SW in zip(passes, weights)]
    pure = [test.purity(each) for each in saes]
    return Seed(scores, pure, weights, octaves(match), metrics["explained_variance"])


def one_or_list(passes: TwoPasses, i: int):
    scores = passes.scores[OWN]
    return scores if i == 0 else [scores]


def octaves(match: Match) -> list[tuple[int, int]]:
    """Images of each weighted mean: of all, then octave by octave."""
    bins = [chosen_B.nonzero().flatten().tolist() for chosen_B in match.ranges]
    return [(max(10, math.ceil(2 ** (b[0] / 4))), math.ceil(2 ** ((b[-1] + 1) / 4)) - 1) for b in bins]


HEAD = (
    "| k | images a latent | by | latents, untrained | MS | untrained MS | difference | 95 % interval, by image | "
    "sd over seeds | purity | untrained purity |"
)


def report(k: int, seeds: list[Seed]) -> list[str]:
    lines = []
    by_range: dict[tuple[int, int], list[tuple[Seed, int]]] = {}
    for seed in seeds:
        for w, (_, high) in enumerate(seed.ranges):
            key = (0, 0) if w == 0 else (2 ** int(math.log2(high)), 2 ** (int(math.log2(high)) + 1) - 1)
            by_range.setdefault(key, []).append((seed, w))
    for key, members in sorted(by_range.items()):
        if len(members) < len(seeds):  # a seed has nothing that matches there
            continue
        for encoder in (OWN, IDEAL):
            lines.append(line(k, key, encoder, members))
    for encoder in (OWN, IDEAL):
        lines.append(unmatched(k, encoder, seeds))
    for encoder in (OWN, IDEAL):
        print(f"k {k}, by {encoder}: {ranks_of(encoder, seeds)}", flush=True)
    return lines


def line(k: int, key: tuple[int, int], encoder: str, members: list[tuple[Seed, int]]) -> str:
    """Means over seeds of the weighted means; the change of the mean difference without each image."""
    sums, changes, counts = [], [], []
    for seed, w in members:
        weights = [weights_SW[:, w] for weights_SW in seed.weights]
        ms = [float(s[encoder].ms.nan_to_num(0.0) @ w_S) for s, w_S in zip(seed.scores, weights)]
        pure = [float(p_S.nan_to_num(0.0) @ w_S) for p_S, w_S in zip(seed.purity, weights)]
        sums.append([*ms, *pure])
        changes.append(seed.scores[0][encoder].weighted_NW[:, w] - seed.scores[1][encoder].weighted_NW[:, w])
        counts.append([int((w_S > 0).sum()) for w_S in weights])
    sums_R4, counts_R2 = torch.tensor(sums), torch.tensor(counts).sum(0).tolist()
    ms, control, pure, control_pure = sums_R4.mean(0).tolist()
    error = change_error(torch.stack(changes).mean(0))
    spread = float((sums_R4[:, 0] - sums_R4[:, 1]).std())
    where = "all matched" if key == (0, 0) else f"{max(key[0], 10)} to {key[1]}"
    numbers = [ms, control, ms - control, error, spread, pure, control_pure]
    return row(k, where, encoder, counts_R2, numbers)


def row(k: int, where: str, encoder: str, counts: list[int], numbers: list[float]) -> str:
    """A line of the table; numbers: both scores, their difference, its error, its spread, both purities."""
    ms, control, d, error, spread, pure, control_pure = numbers
    interval = f"[{d - NORMAL_95 * error:+.3f}, {d + NORMAL_95 * error:+.3f}]"
    cells = [k, where, encoder, f"{counts[0]}, {counts[1]}", f"{ms:.3f}", f"{control:.3f}", f"{d:+.3f}", interval]
    cells += [f"{value:.3f}" for value in (spread, pure, control_pure)]
    return "| " + " | ".join(map(str, cells)) + " |"


def unmatched(k: int, encoder: str, seeds: list[Seed]) -> str:
    """Plain means over defined latents, as scores are usually given."""
    means = torch.tensor([[float(s[encoder].ms.nanmean()) for s in seed.scores] for seed in seeds], dtype=torch.float64)
    pure = torch.tensor([[float(p_S.nanmean()) for p_S in seed.purity] for seed in seeds]).mean(0).tolist()
    changes = [s.scores[0][encoder].mean_changes_N - s.scores[1][encoder].mean_changes_N for s in seeds]
    defined = [sum(int((s.scores[i][encoder].status == 0).sum()) for s in seeds) for i in (0, 1)]
    (ms, control), error = means.mean(0).tolist(), change_error(torch.stack(changes).mean(0))
    d, spread = ms - control, float((means[:, 0] - means[:, 1]).std())
    return row(k, "all defined, not matched", encoder, defined, [ms, control, d, error, spread, *pure])


def ranks_of(encoder: str, seeds: list[Seed]) -> str:
    """What a trained SAE's scores go with, and how they repeat: means over seeds."""
    rows = []
    for seed in seeds:
        trained = seed.scores[0][encoder]
        many_S = (trained.status == STATUSES.index("defined")) & (trained.n_active >= 10)
        ms_L, n_L = trained.ms[many_S], trained.n_active[many_S].double()
        other = OWN if encoder == IDEAL else IDEAL
        halves = [trained.split_half(low, high) for low, high in ((2, 9), (10, 99), (100, None))]
        summary = trained.summary()
        rows.append(
            {
                "Spearman with n": spearman(ms_L, n_L),
                "with purity": spearman(ms_L, seed.purity[0][many_S]),
                "with the other encoder": spearman(ms_L, seed.scores[0][other].ms[many_S]),
                "split-half 2-9": halves[0],
                "10-99": halves[1],
                "100+": halves[2],
                "mean cosine": trained.mean_cosine,
                "above null": summary.above_null,
                "best chosen at": summary.guarded_best.chosen_at,
                "held out": summary.guarded_best.held_out,
                "plain best": summary.best,
                "explained variance": seed.explained,
            }
        )
    means = torch.tensor([list(row.values()) for row in rows], dtype=torch.float64).nanmean(0).tolist()
    return ", ".join(f"{name} {value:.3f}" for name, value in zip(rows[0], means))


if __name__ == "__main__":
    main()
