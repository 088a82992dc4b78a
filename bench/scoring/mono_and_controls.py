"""MonoLoss and controls on the box: what each measure says of SAEs trained in these ways.

    python -m bench.scoring.mono_and_controls --output FILE.md

On scenes, BatchTopK: plain, with MonoLoss of several weights, and every control, each with the same seeds. Measured on
scenes that none was trained on: the score by the SAE's own input (what MonoLoss raises), by tiny-clip's projection
(other numbers of the same tower) and by the labels themselves (one number a factor value: an encoder that saw no
activation); purity of a latent's best value as a share of what is possible; pairs of latents that share a top-16 image.
Means over latents that fire on --least scenes or more. What comes out is written as it is, after every seed.
"""

import argparse
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bench.helpers.arguments import of_scenes
from bench.helpers.scenes import LabelledScenes
from saevlm_fast.config import CONTROLS, SAEConfig
from saevlm_fast.data.rows import Activations
from saevlm_fast.files import atomic_write
from saevlm_fast.measures.subjects import ImageRows, Subject, encode_all
from saevlm_fast.measures.uniqueness import uniqueness
from saevlm_fast.sae import SparseAutoencoder
from saevlm_fast.scoring.monosemanticity import score
from saevlm_fast.training.run import train

COLUMNS = (
    "explained variance",
    "L0",
    "dead",
    "latents",
    "MS own input",
    "MS tiny-clip",
    "MS labels",
    "purity",
    "J > 0",
)


def main() -> None:
    options = parse()
    data = LabelledScenes.of("train", options.train_scenes).activations
    test = LabelledScenes.of("test", options.test_scenes)
    encoders = [test.activations, test.embeddings, test.ideal()]
    ways: dict[str, dict[str, Any]] = {"plain": {}}
    ways |= {f"MonoLoss {weight:g}": {"mono_weight": weight} for weight in options.weights}
    ways |= {control: {"control": control} for control in options.controls}
    found: dict[str, list[list[float]]] = {name: [] for name in ways}
    for seed in range(options.seeds):
        for name, way in ways.items():
            sae, metrics = train(
                data,
                SAEConfig.sized(data.d, expansion=4, k=options.k),
                validation=test.activations,
                steps=options.steps,
                batch_size=512,
                dead_after=100_000,
                seed=seed,
                device="cpu",
                **way,
            )
            found[name].append(measured(sae, metrics, test, encoders, options.least))
            print(f"seed {seed}, {name}: {found[name][-1]}", flush=True)
        write(found, seed + 1, options)


def parse() -> argparse.Namespace:
    parser = of_scenes(__doc__, train=10_000, test=5000, steps=1200, seeds=3)
    parser.add_argument("--k", type=int, default=10)
    parser.add_argument("--least", type=int, default=50)
    parser.add_argument("--weights", type=float, nargs="*", default=[0.1, 1.0])
    parser.add_argument("--controls", nargs="*", default=list(CONTROLS), choices=CONTROLS)
    return parser.parse_args()


def measured(
    sae: SparseAutoencoder,
    metrics: dict[str, float],
    test: LabelledScenes,
    encoders: list[Activations],
    least: int,
) -> list[float]:
    """A number for each of COLUMNS."""
    scores = [score(test.activations, encoder, sae) for encoder in encoders]
    seen_S = scores[0].ms.isfinite() & (scores[0].n_active >= least)
    purity_S, rows = test.purity(sae), test.activations
    _, codes = encode_all(Subject("sae", "sae", sae, "", ""), rows, ImageRows.of(rows))
    pairs = uniqueness(codes).figures
    shared = sum(pairs["histogram"][1:]) / max(pairs["pairs"], 1)
    means = [float(each.ms[seen_S].mean()) for each in scores]
    figures = [metrics["explained_variance"], metrics["l0"], metrics["dead_fraction"], float(seen_S.sum())]
    return [*figures, *means, float(purity_S[seen_S].nanmean()), shared]


def write(found: dict[str, list[list[float]]], n_seeds: int, options: argparse.Namespace) -> None:
    lines = [
        f"{options.train_scenes:,} scenes to train on, {options.test_scenes:,} others to measure on; BatchTopK x4, "
        f"k {options.k}, {options.steps:,} steps of 512; means ± standard deviation over {n_seeds} seeds; latents that "
        f"fire on {options.least} scenes or more.\n",
        f"| | {' | '.join(COLUMNS)} |",
        f"|---|{'---|' * len(COLUMNS)}",
        *(f"| {name} | {' | '.join(cells(rows))} |" for name, rows in found.items()),
    ]
    with atomic_write(Path(options.output)) as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")


def cells(rows: list[list[float]]) -> Iterable[str]:
    """Means over seeds with their spread, to three places; whole latents."""
    for name, values in zip(COLUMNS, zip(*rows)):
        mean, spread = statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0
        yield f"{mean:.0f}" if name == "latents" else f"{mean:.3f} ±{spread:.3f}"


if __name__ == "__main__":
    main()
