"""The Monosemanticity Score against the truth: `python -m bench.scoring.metric_vs_truth --output FILE.md`.

Scenes have labels, so of every latent it is known which concept it stands for and how purely. SAEs of several kinds are
trained on tiny-clip's activations of scenes of the split `train`; raw neurons and all latents are then scored, and
compared with the labels, on scenes of the split `test`. What comes out is written as it is.
"""

import argparse
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
from saevlm_fast.demo.ground_truth import LatentConcepts, best_factor_depth, chance_depth, common_depth, latent_concepts
from saevlm_fast.files import atomic_write
from saevlm_fast.sae import SparseAutoencoder
from saevlm_fast.scoring.monosemanticity import MonosemanticityScores, score
from saevlm_fast.scoring.ranks import spearman
from saevlm_fast.scoring.sums import STATUSES
from saevlm_fast.scoring.top_images import top_images
from saevlm_fast.training.evaluate import Metrics
from saevlm_fast.training.run import train

# (architecture, expansion, k): width at k 10, k at expansion 4, and nested groups.
GRID = (
    ("batch_topk", 1, 10), ("batch_topk", 4, 10), ("batch_topk", 16, 10),
    ("batch_topk", 4, 1), ("batch_topk", 4, 5), ("batch_topk", 4, 20),
    ("matryoshka", 4, 10), ("matryoshka", 16, 10),
)  # fmt: skip
CONTROL = ("batch_topk", 4, 10)  # measured untrained, too: what sparse random directions give by themselves
MANY_IMAGES = 50  # of 5,000: a latent that fires on few has a best value by luck, the luckier the fewer


@dataclass(frozen=True)
class Measured:
    """Raw neurons (group_ends of one group) or the latents of one SAE."""

    name: str
    group_ends: list[int]
    scores: MonosemanticityScores
    truth: LatentConcepts
    depth_S: Tensor
    evaluation: Metrics

    @property
    def defined_S(self) -> Tensor:
        return self.scores.status == STATUSES.index("defined")


def main() -> None:
    options = parse()
    train_split = LabelledScenes.of("train", options.train_scenes, options.layer, options.tokens)
    test_split = LabelledScenes.of("test", options.test_scenes, options.layer, options.tokens)
    measured = [measure("raw neurons", test_split, None, {})]
    for architecture, expansion, k in GRID:
        for seed in range(options.seeds):
            config = sae_config(architecture, expansion, k, train_split)
            if (architecture, expansion, k) == CONTROL:
                measured.append(train_one("untrained ", config, recipe(1, seed, options), train_split, test_split))
            trained = recipe(options.steps, seed, options)
            measured.append(train_one("", config, trained, train_split, test_split))
    text = report(measured, test_split, options)
    print(text)
    with atomic_write(Path(options.output)) as temporary:
        temporary.write_text(text, encoding="utf-8")


def parse() -> argparse.Namespace:
    parser = of_scenes(__doc__, train=15_000, test=5000, steps=1500, seeds=2)
    parser.add_argument("--layer", type=int, default=3, help="of the residual stream")
    parser.add_argument("--tokens", default="cls", help="cls or mean")
    parser.add_argument("--batch-size", type=int, default=256)
    return parser.parse_args()


def sae_config(architecture: str, expansion: int, k: int, split: LabelledScenes) -> SAEConfig:
    return SAEConfig.sized(split.activations.d, expansion=expansion, k=k, architecture=architecture)


def recipe(steps: int, seed: int, options: argparse.Namespace) -> TrainConfig:
    """A latent is dead after a twentieth of the run. A warm-up begins with rate 0: one step trains nothing."""
    batch_size = options.batch_size
    dead_after, warmup_steps = max(steps * batch_size // 20, 1), max(steps // 10, 1)
    return TrainConfig(
        steps=steps, batch_size=batch_size, seed=seed, dead_after=dead_after, warmup_steps=warmup_steps
    )  # fmt: skip


def train_one(
    prefix: str, config: SAEConfig, settings: TrainConfig, train_split: LabelledScenes, test_split: LabelledScenes
) -> Measured:
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as output:
        where = RunOptions(Path(output) / "run", device="cpu", checkpoint_every=settings.steps)
        data, held_out = train_split.activations, test_split.activations
        sae, evaluation = train(data, config, settings, where, validation=held_out)
    name = f"{prefix}{config.architecture} x{config.d_sae // config.d_in}, k {config.k}"
    found = measure(name, test_split, sae, evaluation)
    print(f"{time.monotonic() - started:5.0f} s  {' '.join(mean_rows([cells(found)]))}", flush=True)
    return found


def measure(name: str, split: LabelledScenes, sae: SparseAutoencoder | None, evaluation: Metrics) -> Measured:
    scores = score(split.activations, split.embeddings, sae)
    truth = latent_concepts(split.activations, *split.labels, sae)
    depth_SF = common_depth(top_images(split.activations, range(len(scores.ms)), 16, sae), *split.labels)
    depth_S = best_factor_depth(depth_SF, chance_depth(*split.labels))
    ends = [len(scores.ms)] if sae is None else sae.config.group_ends
    return Measured(name, ends, scores, truth, depth_S, evaluation)


# The report ----------------------------------------------------------------------------------------------------------

COLUMNS = (
    "", "latents", "defined", "R2", "L0", "MS", "MS std", "MS best", "purity", "Spearman",
    f"on {MANY_IMAGES}+ images", "MS", "purity", "Spearman",
)  # fmt: skip
GROUP_COLUMNS = (
    "", "group", "latents", "defined", "fires on", "MS", "purity", "concept depth", "of pure latents", "common depth",
)  # fmt: skip


def report(measured: list[Measured], split: LabelledScenes, options: argparse.Namespace) -> str:
    names = list(dict.fromkeys(m.name for m in measured))
    runs = {name: [m for m in measured if m.name == name] for name in names}
    nested = [name for name in names if len(runs[name][0].group_ends) > 1]
    groups = [mean_rows([group_cells(m, g) for m in runs[name]]) for name in nested for g in range(4)]
    return INTRODUCTION.format(
        layer=options.layer, tokens=options.tokens, train=options.train_scenes, test=options.test_scenes,
        steps=options.steps, batch=options.batch_size, seeds=options.seeds, chance=chance_score(split.embeddings),
        many=MANY_IMAGES, table=markdown(COLUMNS, [mean_rows([cells(m) for m in runs[name]]) for name in names]),
        groups=markdown(GROUP_COLUMNS, groups),
    )  # fmt: skip


def cells(m: Measured) -> list[str | float]:
    ms_L, purity_L = m.scores.ms[m.defined_S], m.truth.purity_S[m.defined_S]
    many_L = m.scores.n_active[m.defined_S] >= MANY_IMAGES
    return [
        m.name, len(m.scores.ms), len(ms_L),
        m.evaluation.get("explained_variance", float("nan")), m.evaluation.get("l0", float("nan")),
        float(ms_L.mean()), float(ms_L.std(correction=0)), float(ms_L.max()), float(purity_L.mean()),
        rank_correlation(ms_L, purity_L), int(many_L.sum()), float(ms_L[many_L].mean()), float(purity_L[many_L].mean()),
        rank_correlation(ms_L[many_L], purity_L[many_L]),
    ]  # fmt: skip


def rank_correlation(ms_L: Tensor, purity_L: Tensor) -> float:
    return spearman(ms_L, purity_L) if len(ms_L) >= 2 else float("nan")


def group_cells(m: Measured, group: int) -> list[str | float]:
    """One Matryoshka group; a pure latent is one of the better half of the whole SAE by its purity."""
    defined_S, latents_S = m.defined_S, torch.arange(len(m.scores.ms))
    here_S = defined_S & (latents_S < m.group_ends[group]) & (latents_S >= ([0, *m.group_ends][group]))
    pure_S = here_S & (m.truth.purity_S >= m.truth.purity_S[defined_S].median())
    fires_S = m.scores.n_active / m.scores.n_images
    return [
        m.name, group + 1, m.group_ends[group] - [0, *m.group_ends][group], int(here_S.sum()),
        float(fires_S[here_S].mean()), float(m.scores.ms[here_S].mean()), float(m.truth.purity_S[here_S].mean()),
        float(m.truth.depth_S[here_S].mean()), float(m.truth.depth_S[pure_S].mean()),
        float(m.depth_S[here_S].nanmean()),
    ]  # fmt: skip


def mean_rows(rows: list[list[str | float]]) -> list[str]:
    """The mean over seeds, and how far from it the furthest seed is."""
    texts = []
    for values in zip(*rows):
        if isinstance(values[0], str):
            texts.append(values[0])
            continue
        mean = sum(values) / len(values)
        furthest = max(abs(value - mean) for value in values)
        if all(isinstance(value, int) for value in values):
            texts.append(f"{mean:.0f}")
        elif mean != mean:
            texts.append("")
        else:
            texts.append(f"{mean:.3f}" + (f" ±{furthest:.3f}" if furthest >= 0.0005 else ""))
    return texts


def chance_score(embeddings: Activations) -> float:
    """Mean cosine of two images: the score of a latent that fires on all alike."""
    unit_NE = torch.cat([torch.nn.functional.normalize(e_nE.double(), dim=1) for _, e_nE in embeddings.chunks(4096)])
    n = len(unit_NE)
    return float((unit_NE.sum(0).square().sum() - n) / (n * (n - 1)))


def markdown(columns: tuple[str, ...], rows: list[list[str]]) -> str:
    lines = [columns, ["---"] + ["---:"] * (len(columns) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


INTRODUCTION = """# The Monosemanticity Score against the truth

Written by `bench/scoring/metric_vs_truth.py`. tiny-clip, residual stream after block {layer} (from 0), tokens {tokens};
{train:,} scenes to train on, {test:,} other ones to measure on; {steps:,} steps of {batch:,} rows; {seeds} seeds: the
numbers are means over seeds, ± the distance of the furthest. (tiny-clip's own training has
seen the former, not the latter.) The score's embedding is tiny-clip's own projected one, in which two images have a
mean cosine of {chance:.3f}: the score of a latent that fires on all images alike.

Purity: the activation-weighted share of the images that show a latent's best factor value, above the share of that
value among all images. A latent that fires on exactly the images of a value has purity 1 - base, and bases differ: 0.13
for a background, 0.19 for a shape or a colour, 0.35 for a texture, 0.50 for a place, 0.53 for a size.

A latent that fires on a few images has a high purity by luck, whatever it stands for: of 47 values it has the best. So
the columns on the right are of latents that fire on {many} images or more.

"Untrained" is an SAE with its initial random directions and a threshold that keeps k of them.

{table}

## Matryoshka groups

Concept depth: of the concept, value (2) or group of values (1), that a latent's activations correlate with most.
Common depth: how deep in the taxonomy pairs of its 16 most activating images meet, in its best factor. Pure latents:
the half of the whole SAE's latents with the higher purity.

{groups}
"""


if __name__ == "__main__":
    main()
