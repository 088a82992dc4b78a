"""Steering against the truth: `python -m bench.steering.steering_vs_truth --model TINY_LLAVA_DIR --output FILE.md`.

Scenes have labels, so it is known which value of which factor a latent stands for, and what the right answer is. An SAE
is trained on the vision block that the language model reads, over tokens of scenes of the split `train`. A latent is
well defined if it fires on 16 scenes of `test` or more and the 16 most activating ones all show one value, of any
factor: nothing of how it steers enters the choice, and no latent, seed or image is left out. Every such latent is
clamped on other scenes, of one object, that do not show its value (there are none without "one" object: such latents
are counted, not tried). A success is an answer that is the value, word for word. What else the model knew of the image
(another factor) is asked as well.

Controls: the untouched model, the SAE attached without an edit, a random latent that fires, clamped at the same value
(decoder rows have unit norm, so the change is as large), and the sign flipped.
"""

import argparse
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from saevlm_fast.box.scenes import SCENE_FACTORS, SceneBatch, Scenes
from saevlm_fast.box_making.architecture import PATCH_SIZE
from saevlm_fast.box_making.language import questions
from saevlm_fast.config import HarvestOptions, RunOptions, SAEConfig, TrainConfig
from saevlm_fast.data.codes import StoredCodes, open_codes
from saevlm_fast.data.rows import open_activations
from saevlm_fast.demo.ground_truth import CONCEPTS, FACTORS, concept_presence, shared_value
from saevlm_fast.files import atomic_write, write_json_atomic
from saevlm_fast.harvesting.config import HarvestConfig
from saevlm_fast.harvesting.run import harvest
from saevlm_fast.images.scenes import PREFIX, open_scenes, scene_labels
from saevlm_fast.sae import SparseAutoencoder
from saevlm_fast.scoring.top_images import top_images
from saevlm_fast.steering.answers import SteeredAnswers, SteeredRow
from saevlm_fast.steering.edits import Edit, clamp
from saevlm_fast.steering.score import firing_latents
from saevlm_fast.steering.site import blocks_read
from saevlm_fast.steering.table import N_TOP
from saevlm_fast.towers.load import load_tower
from saevlm_fast.towers.text import load_llava
from saevlm_fast.towers.tokens import Tokens
from saevlm_fast.towers.tower import HookPoint
from saevlm_fast.training.run import train

TOKEN_CHOICES, ERRORS = ("all", "object"), ("drop", "keep")
LONGEST = 3  # tokens of an answer: "top left" and its end


@dataclass(frozen=True)
class Meaning:
    """A well-defined latent: the value it stands for, and the largest activation of a token over the test scenes."""

    latent: int
    concept: int
    largest: float

    @property
    def factor(self) -> str:
        return CONCEPTS[self.concept].factor

    @property
    def word(self) -> str:
        return CONCEPTS[self.concept].name

    @property
    def beside(self) -> str:
        """The factor that is asked about to see what is kept."""
        return "colour" if self.factor == "shape" else "shape"


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    llava, processor = load_llava(f"hf:{options.model}")
    layer = max(blocks_read(llava, llava.config.vision_config.num_hidden_layers) or {0})
    with tempfile.TemporaryDirectory() as folder:
        sae, pooled, largest_S = sae_and_codes(layer, Path(folder), options)
        labels = scene_labels(pooled.items()["image"].to_pylist())
        meanings, alive = well_defined(pooled, largest_S, *labels), firing_latents(pooled).tolist()
    print(f"layer {layer}: {len(alive)} of {sae.config.d_sae} latents fire, {len(meanings)} well defined", flush=True)
    scenes, results = one_object_scenes(options.seed, options.test_scenes, options.asked), []
    for error in ERRORS:
        answerer = SteeredAnswers(llava, processor, sae, layer, error=error, batch_size=256, max_new_tokens=LONGEST)
        results += list(measure(answerer, meanings, alive, scenes, options))
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
    parser.add_argument("--asked", type=int, default=20, help="scenes of one object; a latent's own value is left out")
    parser.add_argument("--strengths", type=float, nargs="+", default=[1, 2, 4], help="times the largest seen")
    parser.add_argument("--control-strength", type=float, default=2, help="of the random latent and the flipped sign")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    if options.control_strength not in options.strengths:
        parser.error("--control-strength must be one of --strengths, to compare with")
    return options


# The SAE and what its latents mean -----------------------------------------------------------------------------------


def sae_and_codes(
    layer: int, folder: Path, options: argparse.Namespace
) -> tuple[SparseAutoencoder, StoredCodes, Tensor]:
    """The SAE; codes of the test scenes, averaged over tokens; every latent's largest activation of one token [S]."""
    train_on, test_on = (
        f"{PREFIX}{split}:{n}:{options.seed}"
        for split, n in (("train", options.train_scenes), ("test", options.test_scenes))
    )
    if options.sae is None:
        train_sae(harvested(options.model, layer, train_on, options.tokens, folder / "train"), folder / "sae", options)
    saved = options.sae or folder / "sae"
    pooled = harvested(options.model, layer, test_on, "all", folder / "pooled", sae=saved, pool="mean")
    single = harvested(options.model, layer, test_on, "all", folder / "single", sae=saved)
    sae = SparseAutoencoder.from_pretrained(saved).eval()
    return sae, open_codes(pooled), largest_activations(open_codes(single))


def harvested(model: str, layer: int, scenes: str, tokens: str, output: Path, **sae: Any) -> Path:
    """The store of what one block of the model's vision tower gives for scenes:SPLIT:N:SEED."""
    points, choice = (HookPoint("residual", layer),), (Tokens.parse(tokens),)
    config = HarvestConfig(points, choice, batch_size=128, store_dtype="float32", **sae)
    return harvest(open_scenes(scenes), load_tower(f"hf:{model}"), config, HarvestOptions(output, scenes)).stores[0]


def train_sae(activations: Path, output: Path, options: argparse.Namespace) -> None:
    data, batch_size = open_activations(activations), 512
    recipe = TrainConfig(
        steps=options.steps, batch_size=batch_size, seed=options.seed, warmup_steps=options.steps // 10, lr=1e-3,
        dead_after=options.steps * batch_size // 20,
    )  # fmt: skip
    config = SAEConfig(data.d, options.expansion * data.d, options.k, "batch_topk")
    _, metrics = train(data, config, recipe, RunOptions(output, device="cpu"))
    print({name: round(value, 3) for name, value in metrics.items()}, flush=True)


def largest_activations(codes: StoredCodes) -> Tensor:
    largest_S = torch.zeros(codes.d_sae)
    with closing(codes.chunks(65536)) as chunks:
        for _, some in chunks:
            largest_S.scatter_reduce_(0, some.top_indices, some.top_acts, "amax")
    return largest_S


def well_defined(
    codes: StoredCodes, largest_S: Tensor, objects_NOF: np.ndarray, setting_NF: np.ndarray
) -> list[Meaning]:
    """Of values that all 16 top scenes show, the rarest is meant."""
    tops = top_images(codes, range(codes.d_sae), N_TOP)
    return [
        Meaning(latent, CONCEPTS.index(value), float(largest_S[latent]))
        for latent, (top, value) in enumerate(zip(tops, shared_value(tops, objects_NOF, setting_NF)))
        if value is not None and len(top.images) == N_TOP
    ]


# Asking --------------------------------------------------------------------------------------------------------------


def one_object_scenes(seed: int, start: int, n: int) -> SceneBatch:
    """The next n scenes of one object of the split test, none of which a meaning was taken from."""
    scenes = Scenes(seed, "test").batch(start, 12 * n)  # a third has one object
    return scenes.take(np.flatnonzero(scenes.setting[:, SCENE_FACTORS.index("count")] == 0)[:n])


class Asked:
    """Every scene, asked about every factor.

    Attributes:
        number: factor -> the question's number for every scene. right: factor -> the right answers. masks: choice of
            tokens -> bool [T] for every scene. present_NC: which of CONCEPTS each scene shows. plain: (factor, whether
            the SAE is attached) -> the answers without an edit.
    """

    def __init__(self, answerer: SteeredAnswers, scenes: SceneBatch):
        self.present_NC = concept_presence(scenes.objects, scenes.setting)
        pictures = [Image.fromarray(image) for image in scenes.images]
        found = [{q.asks: q for q in questions(*labels)} for labels in zip(scenes.objects, scenes.setting)]
        self.right = {f: [of_scene[f].answer for of_scene in found] for f in FACTORS}
        self.number = {f: [answerer.ask(p, of_scene[f].text) for p, of_scene in zip(pictures, found)] for f in FACTORS}
        self.masks = self._masks(scenes, answerer.site.anatomy.n_prefix)
        self.plain = {
            (f, attached): answerer.answers([SteeredRow(number, () if attached else None) for number in self.number[f]])
            for f in FACTORS for attached in (False, True)
        }  # fmt: skip

    @staticmethod
    def _masks(scenes: SceneBatch, n_prefix: int) -> dict[str, list[Tensor]]:
        """Of the object: patches of which it covers a quarter or more."""
        masks_N1HW = torch.from_numpy(scenes.masks.any(1, keepdims=True)).float()
        covered_NP = torch.nn.functional.avg_pool2d(masks_N1HW, PATCH_SIZE).flatten(1) >= 0.25
        object_NT = torch.nn.functional.pad(covered_NP, (n_prefix, 0), value=False)
        return {"all": list(torch.ones_like(object_NT)), "object": list(object_NT)}


@dataclass(frozen=True)
class Trial:
    """One way in which a latent is tried."""

    tokens: str
    strength: float
    condition: str
    edit: Edit

    def rows(self, asked: Asked, factor: str, scenes: Sequence[int]) -> list[SteeredRow]:
        return [SteeredRow(asked.number[factor][i], (self.edit,), mask=asked.masks[self.tokens][i]) for i in scenes]


def trials(m: Meaning, alive: Sequence[int], options: argparse.Namespace) -> list[Trial]:
    rng = np.random.default_rng((options.seed, m.latent))
    random = int(rng.choice([k for k in alive if k != m.latent]))
    at = options.control_strength
    found = []
    for tokens in TOKEN_CHOICES:
        found += [Trial(tokens, s, "steered", clamp(m.latent, s * m.largest)) for s in options.strengths]
        found.append(Trial(tokens, at, "random", clamp(random, at * m.largest)))
        found.append(Trial(tokens, at, "flipped", clamp(m.latent, -at * m.largest)))
    return found


def measure(
    answerer: SteeredAnswers, meanings: Sequence[Meaning], alive: Sequence[int], scenes: SceneBatch,
    options: argparse.Namespace,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """One result for every latent, choice of tokens, strength and condition; shares of the scenes asked about."""
    asked, started, n_answers = Asked(answerer, scenes), time.monotonic(), 0
    for m in meanings:
        others = np.flatnonzero(~asked.present_NC[:, m.concept]).tolist()
        if not others:
            continue
        tried = trials(m, alive, options)
        rows = [row for trial in tried for factor in (m.factor, m.beside) for row in trial.rows(asked, factor, others)]
        answers = iter(answerer.answers(rows))
        n_answers += len(rows)
        for trial in tried:
            direct, beside = ([next(answers) for _ in others] for _ in range(2))
            yield {
                "latent": m.latent, "factor": m.factor, "value": m.word, "error": answerer.error,
                "tokens": trial.tokens, "strength": trial.strength, "condition": trial.condition, "n": len(others),
                "success": share(answer == m.word for answer in direct),
                "kept": share(answer == asked.right[m.beside][i] for answer, i in zip(beside, others)),
                **{
                    f"{name}_{what}": share(asked.plain[factor, attached][i] == wanted for i, wanted in expected)
                    for name, attached in (("plain", False), ("sae", True))
                    for what, factor, expected in (
                        ("success", m.factor, [(i, m.word) for i in others]),
                        ("kept", m.beside, [(i, asked.right[m.beside][i]) for i in others]),
                    )
                },
            }  # fmt: skip
    print(f"error={answerer.error}: {n_answers:,} answers in {time.monotonic() - started:.0f} s", flush=True)


def share(hits: Iterator[bool]) -> float:
    return float(np.mean(list(hits)))


# The report ----------------------------------------------------------------------------------------------------------


INTRODUCTION = """# Steering against the truth

Written by `bench/steering/steering_vs_truth.py`. Block {layer}; {n_alive} latents fire, {n} are well defined (16 of
16 top scenes show one value): {counts}. The {n_tried} of them that scenes of one object can be asked about are tried,
on those of {n_asked} such scenes that do not show the value. Strength: times the latent's largest activation. In
percent, means over latents: success, the answer is the latent's value; half, latents that succeed on half of the
scenes or more; kept, a question about another factor is answered right. Untouched, SAE: the same of the model as it
is, and with the SAE attached but no edit. Random, flipped: success of another latent, and of the negative value.
(Patches without CLS are not tried apart from all tokens: the language model is not given CLS.)
"""
COLUMNS = (
    "success", "half", "untouched", "SAE", "random", "flipped", "kept", "kept, untouched", "kept, SAE",
)  # fmt: skip


def report(
    results: list[dict[str, Any]], meanings: Sequence[Meaning], layer: int, n_alive: int, options: argparse.Namespace
) -> str:
    counts = {f: sum(m.factor == f for m in meanings) for f in FACTORS}
    n_tried = len({result["latent"] for result in results})
    introduction = INTRODUCTION.format(
        layer=layer, n_alive=n_alive, n=len(meanings), n_tried=n_tried, n_asked=options.asked,
        counts=", ".join(f"{factor} {count}" for factor, count in counts.items()),
    )  # fmt: skip
    at = options.control_strength
    factors = f"By factor, at strength {at:g}; drop and all are the paper's way, keep and object the gentlest."
    return "\n".join([
        introduction, *table(results, ("error", "tokens", "strength")), "", factors, "",
        *table([r for r in results if r["strength"] == at and (r["error"], r["tokens"]) in
                (("drop", "all"), ("keep", "object"))], ("factor", "error", "tokens")), "",
    ])  # fmt: skip


def table(results: list[dict[str, Any]], keys: tuple[str, ...]) -> list[str]:
    """A line for every combination of the keys' values, in the order in which they come."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for result in results:
        groups.setdefault(tuple(result[key] for key in keys), []).append(result)
    order = sorted(groups, key=lambda group: [str(value) for value in group])
    lines = [(*keys, *COLUMNS), ("---",) * (len(keys) + len(COLUMNS))]
    return ["| " + " | ".join(line) + " |" for line in [*lines, *((*map(str, g), *cells(groups[g])) for g in order)]]


def cells(results: list[dict[str, Any]]) -> list[str]:
    of = {c: [r for r in results if r["condition"] == c] for c in ("steered", "random", "flipped")}

    def percent(condition: str, name: str) -> str:
        return f"{100 * np.mean([row[name] for row in of[condition]]):.0f}" if of[condition] else ""

    half = f"{100 * np.mean([row['success'] >= 0.5 for row in of['steered']]):.0f}"
    return [
        percent("steered", "success"), half, percent("steered", "plain_success"), percent("steered", "sae_success"),
        percent("random", "success"), percent("flipped", "success"),
        percent("steered", "kept"), percent("steered", "plain_kept"), percent("steered", "sae_kept"),
    ]  # fmt: skip


if __name__ == "__main__":
    main()
