"""The model cards beside the weights, written from the models themselves: `python -m saevlm_fast.box_making.cards`."""

import argparse
import json
import math
from pathlib import Path

from saevlm_fast.box.models import ASSETS, write_checksums
from saevlm_fast.box.scenes import VALUES, SceneBatch, Scenes
from saevlm_fast.box_making.evaluation import answer_accuracy, zero_shot
from saevlm_fast.files import atomic_write

RECORD = "training.json"
_SPLITS = ("test", "novel")

_CLIP_CARD = """# tiny-clip

A `CLIPModel` of saevlm-fast's box: 5 vision blocks and 2 text blocks of width 128, 48-pixel images in patches of 8, a
vocabulary of whole words. It knows drawn scenes (`saevlm_fast/box/scenes.py`) and nothing else.

Trained from scratch with the contrastive loss: two descriptions per scene, and the shortest description of every value
("a star"); one that happens to fit another scene of the batch counts neither for nor against it. Beside it the vision
tower learned from linear classifiers of the factors, of the image and of the patches that an object covers; they are
not part of the model. So its features were taught these factors: it is a ruler for interpretability methods, not an
example of what contrast alone brings forth.

{training}

Again: `python -m saevlm_fast.box_making.training all`. This card: `python -m saevlm_fast.box_making.cards`.

## Accuracy of the nearest text

{n_scenes} scenes of each split. *test*: new scenes. *novel*: every object is a pair of shape and colour that training
never showed. Accuracy: the nearest of the texts "a star", "a red thing", "a scene on teal", ... is right; scenes with
one object for the factors of objects. These texts were part of the training, so this is not zero-shot. Ranking: in
scenes with several objects, how often a value that is shown is nearer than one that is not (50 % is chance).

{table}
"""
_LLAVA_CARD = """# tiny-llava

A `LlavaForConditionalGeneration` of saevlm-fast's box: tiny-clip's vision tower (frozen, features before its last
block, patches only), a projector, and a Llama of 3 blocks of width 128. It describes drawn scenes
(`saevlm_fast/box/scenes.py`), answers short questions about them, and can do nothing else.

Trained on conversations about scenes that tiny-clip was not trained on; the loss counts the answers' words.

{training}

Again: `python -m saevlm_fast.box_making.training all`. This card: `python -m saevlm_fast.box_making.cards`.

## Right answers

Word for word, one question of each kind for each of {n_scenes} scenes of each split, greedy. *test*: new scenes.
*novel*: every object is a pair of shape and colour that training never showed. `word` is "What is shown in this image?
Use exactly one word!", `caption` the whole description: every factor of every object.

{table}
"""


def write_cards(assets: Path, n_scenes: int) -> None:
    """Evaluates the models that stand in `assets` and writes README.md beside their weights."""
    scenes = {split: Scenes(0, split).batch(0, n_scenes) for split in _SPLITS}
    for name, measure, card in (("tiny-clip", _measure_clip, _CLIP_CARD), ("tiny-llava", _measure_llava, _LLAVA_CARD)):
        directory = assets / name
        if directory.exists():
            table = measure(directory, scenes)
            with atomic_write(directory / "README.md") as temporary:
                temporary.write_text(card.format(table=table, training=_training(directory), n_scenes=n_scenes))
            print(f"{directory}\n{table}", flush=True)
    write_checksums(assets)


def _measure_clip(directory: Path, scenes: dict[str, SceneBatch]) -> str:
    from transformers import AutoProcessor, CLIPModel

    model, processor = CLIPModel.from_pretrained(directory).eval(), AutoProcessor.from_pretrained(directory)
    return zero_shot_table(*(zero_shot(model, processor, scenes[split]) for split in _SPLITS))


def _measure_llava(directory: Path, scenes: dict[str, SceneBatch]) -> str:
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    model = LlavaForConditionalGeneration.from_pretrained(directory).eval()
    processor = AutoProcessor.from_pretrained(directory)
    return answer_table(*(answer_accuracy(model, processor, scenes[split]) for split in _SPLITS))


def _training(directory: Path) -> str:
    record = json.loads((directory / RECORD).read_text())
    return (
        f"{record['steps']:,} steps of {record['batch_size']} scenes (seed {record['seed']}, "
        f"{record['steps'] * record['batch_size']:,} different ones) at a peak learning rate of {record['lr']:g} took "
        f"{record['minutes']:g} minutes of two shared CPU cores, pauses included; final loss {record['loss']}. "
        f"torch {record['torch']}, transformers {record['transformers']}."
    )


def zero_shot_table(test: dict[str, tuple[float, float]], novel: dict[str, tuple[float, float]]) -> str:
    """Markdown of two results of `zero_shot`."""
    lines = ["| factor | values | accuracy, test | novel | ranking, test | novel |", "|---|---|---|---|---|---|"]
    for factor, values in VALUES.items():
        cells = [test[factor][0], novel[factor][0], test[factor][1], novel[factor][1]]
        lines.append(f"| {factor} | {len(values)} | {' | '.join(_percent(cell) for cell in cells)} |")
    return "\n".join(lines)


def answer_table(test: dict[str, float], novel: dict[str, float]) -> str:
    """Markdown of two results of `answer_accuracy`."""
    rows = [f"| {asks} | {_percent(share)} | {_percent(novel[asks])} |" for asks, share in test.items()]
    return "\n".join(["| asked for | right, test | novel |", "|---|---|---|", *rows])


def _percent(share: float) -> str:
    return "" if math.isnan(share) else f"{share:.1%}"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--assets", type=Path, default=ASSETS)
    parser.add_argument("--scenes", type=int, default=2000, help="of each split")
    given = parser.parse_args()
    write_cards(given.assets, given.scenes)


if __name__ == "__main__":
    main()
