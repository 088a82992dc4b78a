"""Steering against the truth: `python bench/steering_vs_truth.py --model DIR --output FILE.md`, DIR being tiny-llava.

Scenes have labels, so it is known which value of which factor a latent stands for, and what the right answer is. An SAE
is trained on the vision block that the language model reads, over tokens of scenes of the split `train`. A latent is
well defined if it fires on 16 scenes of `test` or more and the 16 most activating ones all show one value: nothing
of how it steers enters the choice, and no latent, seed or image is left out. Every such latent is clamped, at every
strength and choice of tokens, on images that do not show its value; a success is an answer that is the value, word for
word. Controls: no edit with the SAE attached, a random latent that fires, the sign flipped. What else the model knew of
the image (another factor of the same object) is asked as well.
"""

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saevlm_fast.activations import open_activations
from saevlm_fast.box_language import questions
from saevlm_fast.box_models import PATCH_SIZE
from saevlm_fast.codes import codes_of_rows, mean_pool_codes
from saevlm_fast.config import SAEConfig, TrainConfig
from saevlm_fast.files import atomic_write, write_json_atomic
from saevlm_fast.sae import SparseAutoencoder
from saevlm_fast.scenes import OBJECT_FACTORS, SCENE_FACTORS, VALUES, SceneBatch, Scenes
from saevlm_fast.steered_answers import Row, SteeredAnswers
from saevlm_fast.steering import blocks_read, clamp
from saevlm_fast.text_models import load_llava
from saevlm_fast.tokens import Tokens
from saevlm_fast.tower import HookPoint
from saevlm_fast.train import RunOptions, train
from saevlm_fast.vision import load_tower

FACTORS = ("colour", "shape", "texture", "background")
BESIDE = {"colour": "shape", "shape": "colour", "texture": "shape", "background": "shape"}  # asked to see what is kept
TOKEN_CHOICES, ERRORS = ("all", "patches", "object"), ("drop", "keep")
N_TOP = 16


@dataclass(frozen=True)
class Meaning:
    """A well-defined latent: what it stands for, and the largest activation of a token over the test scenes."""

    latent: int
    factor: str
    value: int
    largest: float

    @property
    def word(self) -> str:
        return VALUES[self.factor][self.value]


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    spec = f"hf:{options.model}"
    llava, processor = load_llava(spec)
    layer = max(blocks_read(llava, llava.config.vision_config.num_hidden_layers) or {0})
    sae = trained_sae(spec, layer, options)
    test = Scenes(options.seed, "test").batch(0, options.test_scenes)
    pooled_NS, largest_S = codes_of_scenes(spec, layer, sae, test, options)
    meanings = well_defined(pooled_NS, largest_S, test)
    alive = (pooled_NS > 0).any(0).nonzero().squeeze(1).tolist()
    asked = one_object_scenes(options.seed, options.test_scenes, options.asked)
    print(f"layer {layer}: {len(alive)} of {sae.config.d_sae} latents fire, {len(meanings)} well defined", flush=True)
    results = []
    for error in ERRORS:
        asking = SteeredAnswers(llava, processor, sae, layer, error=error, batch_size=256, max_new_tokens=2)
        results += list(measure(asking, meanings, alive, asked, options))
    write_json_atomic(Path(options.output).with_suffix(".json"), results)
    text = report(results, meanings, layer, len(alive), options)
    print(text)
    with atomic_write(options.output) as temporary:
        temporary.write_text(text, encoding="utf-8")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="directory of tiny-llava")
    parser.add_argument("--output", required=True, help="markdown file; per-latent results beside it, in JSON")
    parser.add_argument("--sae", type=Path, help="directory of a trained SAE instead of a new one")
    parser.add_argument("--train-scenes", type=int, default=20_000)
    parser.add_argument("--tokens", default="random:4:all", help="of every training scene")
    parser.add_argument("--expansion", type=int, default=4)
    parser.add_argument("--k", type=int, default=10)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--test-scenes", type=int, default=3000)
    parser.add_argument("--asked", type=int, default=64, help="scenes of one object; a latent's own value is left out")
    parser.add_argument("--strengths", type=float, nargs="+", default=[0.5, 1, 2, 4], help="times the largest seen")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


# The SAE and what its latents mean -----------------------------------------------------------------------------------


def residuals(spec: str, layer: int, scenes: SceneBatch, tokens: str, name: str) -> Iterator[tuple[Tensor, Tensor]]:
    """(rows [M, D], scene of every row [M], counted from 0), 256 scenes at a time."""
    from PIL import Image

    tower = load_tower(spec)
    point = HookPoint("residual", layer)
    with tower.hooked([point]) as hooked:
        for start in range(0, len(scenes), 256):
            images = [Image.fromarray(image) for image in scenes.images[start : start + 256]]
            ids = [f"{name}/{start + i}" for i in range(len(images))]
            selected = hooked.select(hooked(tower.preprocess(images))[point], Tokens.parse(tokens), ids)
            yield selected.rows_MD, start + selected.image_of_row


def trained_sae(spec: str, layer: int, options: argparse.Namespace) -> SparseAutoencoder:
    if options.sae is not None:
        return SparseAutoencoder.from_pretrained(options.sae)
    scenes = Scenes(options.seed, "train").batch(0, options.train_scenes)
    rows = torch.cat([rows for rows, _ in residuals(spec, layer, scenes, options.tokens, "train")])
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "activations.npy"
        np.save(file, rows.numpy())
        d_in = rows.shape[1]
        config = SAEConfig(d_in, options.expansion * d_in, options.k, "batch_topk")
        batch = 512
        recipe = TrainConfig(
            steps=options.steps, batch_size=batch, seed=options.seed, warmup_steps=options.steps // 10, lr=1e-3,
            dead_after=options.steps * batch // 20,
        )  # fmt: skip
        sae, metrics = train(open_activations(file), config, recipe, RunOptions(Path(folder) / "sae", device="cpu"))
    print({name: round(value, 3) for name, value in metrics.items()}, flush=True)
    return sae.eval()


@torch.no_grad()
def codes_of_scenes(
    spec: str, layer: int, sae: SparseAutoencoder, scenes: SceneBatch, options: argparse.Namespace
) -> tuple[Tensor, Tensor]:
    """Codes averaged over all tokens of every scene [N, S], and every latent's largest activation of one token [S]."""
    pooled_NS, largest_S = torch.zeros(len(scenes), sae.config.d_sae), torch.zeros(sae.config.d_sae)
    for rows_MD, scene_M in residuals(spec, layer, scenes, "all", "test"):
        codes = codes_of_rows(sae.encode(rows_MD.clone(), use_threshold=True))
        end, first, n = int(codes.row_offsets[-1]), int(scene_M[0]), int(scene_M[-1] - scene_M[0]) + 1
        largest_S.scatter_reduce_(0, codes.latents[:end], codes.acts[:end], "amax")
        pooled = mean_pool_codes(codes, scene_M - first, n)
        rows_P = torch.arange(n).repeat_interleave(pooled.row_offsets.diff())
        pooled_NS[first + rows_P, pooled.latents] = pooled.acts
    return pooled_NS, largest_S


def shown(scenes: SceneBatch, factor: str) -> np.ndarray:
    """bool [N, V]: whether a scene shows a value."""
    n_values = np.arange(len(VALUES[factor]))
    if factor in SCENE_FACTORS:
        return scenes.setting[:, SCENE_FACTORS.index(factor), None] == n_values
    return (scenes.objects[:, :, OBJECT_FACTORS.index(factor), None] == n_values).any(1)


def well_defined(pooled_NS: Tensor, largest_S: Tensor, scenes: SceneBatch) -> list[Meaning]:
    """Of values that all 16 top scenes show, the rarest is meant."""
    meanings = []
    for latent in ((pooled_NS > 0).sum(0) >= N_TOP).nonzero().squeeze(1).tolist():
        top = pooled_NS[:, latent].topk(N_TOP).indices.numpy()
        found = []
        for factor in FACTORS:
            shown_NV = shown(scenes, factor)
            common = np.flatnonzero(shown_NV[top].all(0))
            found += [(float(shown_NV[:, v].mean()), factor, int(v)) for v in common]
        if found:
            _, factor, value = min(found)
            meanings.append(Meaning(latent, factor, value, float(largest_S[latent])))
    return meanings


# Asking --------------------------------------------------------------------------------------------------------------


def one_object_scenes(seed: int, start: int, n: int) -> SceneBatch:
    """The next n scenes of one object of the split test, none of which a meaning was taken from."""
    scenes = Scenes(seed, "test").batch(start, 6 * n)
    return scenes.take(np.flatnonzero(scenes.setting[:, SCENE_FACTORS.index("count")] == 0)[:n])


def object_tokens(scenes: SceneBatch, i: int, n_prefix: int) -> Tensor:
    """bool [T]: patches of which the object covers a quarter or more."""
    mask_HW = torch.from_numpy(scenes.masks[i].any(0)).float()
    covered = torch.nn.functional.avg_pool2d(mask_HW[None], PATCH_SIZE)[0].flatten() >= 0.25
    return torch.cat([torch.zeros(n_prefix, dtype=torch.bool), covered])


def measure(
    asking: SteeredAnswers, meanings: Sequence[Meaning], alive: Sequence[int], scenes: SceneBatch,
    options: argparse.Namespace,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """One result for every latent, choice of tokens, strength and condition."""
    n_prefix = asking.site.anatomy.n_prefix
    asked = {f: [question_about(asking, scenes, i, f) for i in range(len(scenes))] for f in FACTORS}
    masks = {"all": [None] * len(scenes), "object": [object_tokens(scenes, i, n_prefix) for i in range(len(scenes))]}
    n_tokens = len(masks["object"][0])
    masks["patches"] = [torch.arange(n_tokens) >= n_prefix] * len(scenes)
    plain = {
        f: asking.answers([Row(q, edits) for edits in (None, ()) for q, _ in asked[f]]) for f in FACTORS
    }  # untouched first, then with the SAE attached
    for m in meanings:
        others = [i for i in range(len(scenes)) if not shown(scenes, m.factor)[i, m.value]]
        rng = np.random.default_rng((options.seed, m.latent))
        random = int(rng.choice([k for k in alive if k != m.latent]))
        for tokens in TOKEN_CHOICES:
            for strength in options.strengths:
                alpha = strength * m.largest
                edits = {"steered": clamp(m.latent, alpha), "random": clamp(random, alpha)}
                edits["flipped"] = clamp(m.latent, -alpha)
                for condition, edit in edits.items():
                    factors = (m.factor, BESIDE[m.factor])
                    rows = [Row(asked[f][i][0], (edit,), mask=masks[tokens][i]) for f in factors for i in others]
                    answers = asking.answers(rows)
                    direct, beside = answers[: len(others)], answers[len(others) :]
                    yield {
                        "latent": m.latent, "factor": m.factor, "value": m.word, "error": asking.error,
                        "tokens": tokens, "strength": strength, "condition": condition,
                        "success": share(a == m.word for a in direct),
                        "beside": share(a == asked[factors[1]][i][1] for a, i in zip(beside, others)),
                        "base": share(plain[m.factor][i] == m.word for i in others),
                        "base_sae": share(plain[m.factor][len(scenes) + i] == m.word for i in others),
                        "beside_plain": share(plain[factors[1]][i] == asked[factors[1]][i][1] for i in others),
                        "beside_sae": share(
                            plain[factors[1]][len(scenes) + i] == asked[factors[1]][i][1] for i in others
                        ),
                    }  # fmt: skip


def question_about(asking: SteeredAnswers, scenes: SceneBatch, i: int, factor: str) -> tuple[int, str]:
    """(number of the question, the right answer)."""
    found = next(q for q in questions(scenes.objects[i], scenes.setting[i]) if q.asks == factor)
    from PIL import Image

    return asking.ask(Image.fromarray(scenes.images[i]), found.text), found.answer


def share(hits: Iterator[bool]) -> float:
    return float(np.mean(list(hits)))


# The report ----------------------------------------------------------------------------------------------------------


INTRODUCTION = """# Steering against the truth

Block {layer}; {n_alive} latents fire, {n} of them are well defined (all 16 top scenes show one value): {counts}.
{n_asked} scenes of one object are asked about, without those that show the value. Strength: times the latent's largest
activation. In percent, means over latents: success, the answer is the latent's value; half, latents that succeed on
half of the scenes or more; kept, another question is answered right; before, the same by the untouched model.

| factor | error | tokens | strength | success | half | no edit | SAE alone | random | flipped | kept | before |
|---|---|---|---|---|---|---|---|---|---|---|---|"""


def report(
    results: list[dict[str, Any]], meanings: Sequence[Meaning], layer: int, n_alive: int, options: argparse.Namespace
) -> str:
    counts = {f: sum(m.factor == f for m in meanings) for f in FACTORS}
    lines = INTRODUCTION.format(
        layer=layer, n_alive=n_alive, n=len(meanings), n_asked=options.asked,
        counts=", ".join(f"{factor} {count}" for factor, count in counts.items()),
    ).splitlines()  # fmt: skip
    for factor in FACTORS:
        for error in ERRORS:
            for tokens in TOKEN_CHOICES:
                for strength in options.strengths:
                    key = {"factor": factor, "error": error, "tokens": tokens, "strength": strength}
                    chosen = [r for r in results if all(r[name] == value for name, value in key.items())]
                    if chosen:
                        lines.append("| " + " | ".join([*map(str, key.values()), *cells(chosen)]) + " |")
    return "\n".join(lines) + "\n"


def cells(results: list[dict[str, Any]]) -> list[str]:
    of = {c: [r for r in results if r["condition"] == c] for c in ("steered", "random", "flipped")}
    steered = of["steered"]
    mean = lambda rows, name: f"{100 * np.mean([row[name] for row in rows]):.0f}"  # noqa: E731
    half = f"{100 * np.mean([row['success'] >= 0.5 for row in steered]):.0f}"
    return [
        mean(steered, "success"), half, mean(steered, "base"), mean(steered, "base_sae"), mean(of["random"], "success"),
        mean(of["flipped"], "success"), mean(steered, "beside"), mean(steered, "beside_plain"),
    ]  # fmt: skip


if __name__ == "__main__":
    main()
