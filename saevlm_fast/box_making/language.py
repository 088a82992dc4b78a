"""What is said about scenes: descriptions, whole and in part, and questions with their answers; and the words for it.

Descriptions train tiny-clip, questions tiny-llava. Both models share one vocabulary of whole words, so that a latent's
nearest words are words. Shape suffixes: N scenes, C captions per scene, O object slots, F factors of an object.
"""

from dataclasses import dataclass

import numpy as np

from saevlm_fast.box.scenes import COUNTS, OBJECT_FACTORS, SCENE_FACTORS, SHAPES, SIZES, VALUES, SceneBatch, describe

PAD, BOS, EOS, UNKNOWN, IMAGE = "<pad>", "<bos>", "<eos>", "<unk>", "<image>"
CAPTIONS_PER_SCENE = 2  # a rich description and a poor one
ONE_WORD = "What is shown in this image? Use exactly one word!"
DESCRIBE = "Describe the image."
CHAT = "user: <image> {question} assistant:"
_QUESTIONS = {
    "shape": "What shape is {}?",
    "colour": "What colour is {}?",
    "texture": "What texture is {}?",
    "size": "What size is {}?",
    "place": "Where is {}?",
    "background": "What colour is the background?",
    "backdrop": "What pattern is the background?",
    "count": "How many objects are there?",
}
_OTHER_WORDS = (
    "a an and at on in of to the thing things scene object objects photo picture background something with no"
)


_SAID = np.array([0.9, 0.6, 0.8, 0.7, 0.7])  # how often a rich description says each of OBJECT_FACTORS


def vocabulary() -> list[str]:
    """Special tokens first, then every word of every description, question and answer, once."""
    said = [*_QUESTIONS.values(), ONE_WORD, DESCRIBE, "user : assistant", "color", _OTHER_WORDS]
    said += [value for values in VALUES.values() for value in values]
    text = " ".join(said).lower().replace("{}", " ")
    for mark in "?!.:":
        text = text.replace(mark, f" {mark} ")
    # transformers reads a CLIP text whose <eos> is number 2 in an old, wrong way: <eos> must not come third.
    return [PAD, UNKNOWN, BOS, EOS, IMAGE, *dict.fromkeys(text.split())]


@dataclass(frozen=True)
class Descriptions:
    """Descriptions of scenes in which factors are left out: labels as in SceneBatch, -1 where nothing is said.

    Attributes: objects: int64 [M, O, F]. setting: int64 [M, 3]. scene: int64 [M], the scene that each describes.
    """

    objects: np.ndarray
    setting: np.ndarray
    scene: np.ndarray

    def texts(self) -> list[str]:
        """The descriptions in words."""
        return [describe(objects, setting) for objects, setting in zip(self.objects, self.setting)]

    def fit(self, scenes: SceneBatch) -> np.ndarray:
        """bool [N, M]: whether scene n is as description m says; then m is no wrong caption of n.

        Every object that is mentioned has a counterpart in the scene; two may have the same one.
        """
        said = self.objects[None, :, :, None, :]
        agrees = ((said < 0) | (said == scenes.objects[:, None, None, :, :])).all(axis=-1)
        is_object = scenes.objects[:, None, None, :, 0] >= 0
        found = np.any(agrees & is_object, axis=-1) | np.all(self.objects < 0, axis=-1)
        ground = (self.setting[None] < 0) | (self.setting[None] == scenes.setting[:, None])
        return np.all(found, axis=-1) & np.all(ground, axis=-1)


def partial_descriptions(scenes: SceneBatch, rng: np.random.Generator) -> Descriptions:
    """CAPTIONS_PER_SCENE * N descriptions: a rich one of every scene, then a poor one of every scene."""
    rich, poor = _rich(scenes, rng), _poor(scenes, rng)
    objects, setting = (np.concatenate(pair) for pair in zip(rich, poor))
    return Descriptions(objects, setting, np.tile(np.arange(len(scenes)), CAPTIONS_PER_SCENE))


def _rich(scenes: SceneBatch, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Most factors of most objects; all of all in a fifth of the scenes. What is easily seen is said less often."""
    n, whole = len(scenes), rng.random(len(scenes)) < 0.2
    mentioned = rng.random(scenes.objects.shape[:2]) < 0.85
    kept = (rng.random(scenes.objects.shape) < _SAID) & mentioned[:, :, None] | whole[:, None, None]
    kept_setting = (rng.random((n, 3)) < 0.4) | whole[:, None]
    objects = np.where(kept, scenes.objects, -1)
    kept_setting[:, 2] &= (objects < 0).all(axis=(1, 2))
    return objects, np.where(kept_setting, scenes.setting, -1)


def _poor(scenes: SceneBatch, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """One or two factors of one object (77 %), of the background (15 %), or the number of objects (8 %)."""
    n = len(scenes)
    kind, number = rng.random(n), rng.integers(1, 3, n)
    order = rng.random((n, len(OBJECT_FACTORS))).argsort(axis=1)
    slot = rng.integers(0, 2**30, n) % (scenes.setting[:, 2] + 1)
    kept = np.zeros(scenes.objects.shape, bool)
    kept[np.arange(n), slot] = (order < number[:, None]) & (kind < 0.77)[:, None]
    of_ground = (kind >= 0.77) & (kind < 0.92)
    only = rng.integers(0, 3, n)  # background, backdrop, both
    kept_setting = np.stack([of_ground & (only != 1), of_ground & (only != 0), kind >= 0.92], axis=1)
    return np.where(kept, scenes.objects, -1), np.where(kept_setting, scenes.setting, -1)


@dataclass(frozen=True)
class Question:
    """A question about a scene, its one right answer, and what it asks for: a factor, `word` or `caption`."""

    text: str
    answer: str
    asks: str


def questions(objects: np.ndarray, setting: np.ndarray) -> list[Question]:
    """Every question with one right answer about a scene, from its labels, objects [O, F] and setting [3]."""
    present = objects[objects[:, 0] >= 0]
    asked = [Question(_QUESTIONS[name], VALUES[name][setting[f]], name) for f, name in enumerate(SCENE_FACTORS)]
    for f, factor in enumerate(OBJECT_FACTORS):
        for labels in present:
            answer = VALUES[factor][labels[f]]
            asked += [Question(_QUESTIONS[factor].format(who), answer, factor) for who in _names(labels, present, f)]
    largest = present[present[:, SIZE] == present[:, SIZE].max()]
    if len(largest) == 1:
        asked.append(Question(ONE_WORD, SHAPES[largest[0, 0]], "word"))
    asked.append(Question(DESCRIBE, describe(objects, setting), "caption"))
    return asked


SIZE = OBJECT_FACTORS.index("size")
assert list(SIZES) == ["small", "medium", "big"]
assert len(COUNTS) == 3


def _names(labels: np.ndarray, present: np.ndarray, asked: int) -> list[str]:
    """What to call an object without saying the factor that is asked for, so that no other object is meant."""
    if len(present) == 1:
        return ["the object"]
    unique = [f for f in range(len(OBJECT_FACTORS)) if f != asked and (present[:, f] == labels[f]).sum() == 1]
    return [_name(OBJECT_FACTORS[f], VALUES[OBJECT_FACTORS[f]][labels[f]]) for f in unique]


def _name(factor: str, value: str) -> str:
    if factor == "shape":
        return f"the {value}"
    return f"the object at the {value}" if factor == "place" else f"the {value} object"
