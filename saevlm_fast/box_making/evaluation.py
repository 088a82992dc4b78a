"""How well tiny-clip and tiny-llava know the truth.

Scenes of the splits `test` (new scenes) and `novel` (pairs of shape and colour never shown in training); both models go
through AutoProcessor, as a user's would.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saevlm_fast.box.scenes import OBJECT_FACTORS, SCENE_FACTORS, VALUES, SceneBatch, value_prompts
from saevlm_fast.box_making.language import CHAT, Question, questions

_BATCH = 256
_LONGEST_ANSWER = 40  # words


@torch.inference_mode()
def zero_shot(clip: Any, processor: Any, scenes: SceneBatch) -> dict[str, tuple[float, float]]:
    """Factor -> (accuracy, ranking), each in [0, 1]; texts are value_prompts, nothing is trained.

    Accuracy: the share of scenes whose nearest text is right, over scenes with one object (all scenes for background,
    backdrop and count). Ranking: over scenes with several objects, the share of pairs (value shown, value not shown)
    of which the shown one is nearer; NaN for background, backdrop and count.
    """
    images_NE = torch.cat([_image_embeddings(clip, processor, scenes.images[i : i + _BATCH]) for i in _starts(scenes)])
    single = scenes.setting[:, SCENE_FACTORS.index("count")] == 0
    results = {}
    for factor in VALUES:
        similarity_NV = (images_NE @ _text_embeddings(clip, processor, value_prompts(factor)).T).numpy()
        nearest = similarity_NV.argmax(axis=1)
        if factor in SCENE_FACTORS:
            truth = scenes.setting[:, SCENE_FACTORS.index(factor)]
            results[factor] = float((nearest == truth).mean()), float("nan")
        else:
            truth_NO = scenes.objects[:, :, OBJECT_FACTORS.index(factor)]
            right = nearest[single] == truth_NO[single, 0]
            results[factor] = float(right.mean()), _ranking(similarity_NV[~single], truth_NO[~single])
    return results


def _ranking(similarity_NV: np.ndarray, truth_NO: np.ndarray) -> float:
    shown_NV = (truth_NO[:, :, None] == np.arange(similarity_NV.shape[1])).any(axis=1)
    pairs = shown_NV[:, :, None] & ~shown_NV[:, None, :]
    return float((similarity_NV[:, :, None] > similarity_NV[:, None, :])[pairs].mean())


def _starts(scenes: SceneBatch) -> range:
    return range(0, len(scenes), _BATCH)


def _image_embeddings(clip: Any, processor: Any, images: np.ndarray) -> Tensor:
    inputs = processor(images=list(images), return_tensors="pt")
    pooled = clip.vision_model(**inputs).pooler_output
    return torch.nn.functional.normalize(clip.visual_projection(pooled), dim=-1)


def _text_embeddings(clip: Any, processor: Any, texts: list[str]) -> Tensor:
    inputs = processor(text=texts, padding=True, return_tensors="pt")
    pooled = clip.text_model(**inputs).pooler_output
    return torch.nn.functional.normalize(clip.text_projection(pooled), dim=-1)


def answer_accuracy(llava: Any, processor: Any, scenes: SceneBatch) -> dict[str, float]:
    """What is asked -> share of right answers, word for word: one question of every kind per scene, at random."""
    rng = np.random.default_rng(0)
    asked: dict[str, list[tuple[int, Question]]] = {}
    for i, (objects, setting) in enumerate(zip(scenes.objects, scenes.setting)):
        possible = questions(objects, setting)
        drawn = {possible[j].asks: possible[j] for j in rng.permutation(len(possible))}
        for question in drawn.values():
            asked.setdefault(question.asks, []).append((i, question))
    return {asks: _share_right(llava, processor, scenes, pairs) for asks, pairs in sorted(asked.items())}


def _share_right(llava: Any, processor: Any, scenes: SceneBatch, pairs: list[tuple[int, Question]]) -> float:
    right = 0
    for part in _parts(pairs):
        replies = reply(llava, processor, [scenes.images[i] for i, _ in part], [question.text for _, question in part])
        right += sum(given == question.answer for given, (_, question) in zip(replies, part))
    return right / len(pairs)


def _parts(pairs: list[tuple[int, Question]]) -> Iterator[list[tuple[int, Question]]]:
    return (pairs[start : start + _BATCH] for start in range(0, len(pairs), _BATCH))


@torch.inference_mode()
def reply(llava: Any, processor: Any, images: list[np.ndarray], asked: list[str]) -> list[str]:
    """One greedy answer per image and question."""
    prompts = [CHAT.format(question=text) for text in asked]
    inputs = processor(text=prompts, images=images, padding=True, return_tensors="pt")
    tokens = llava.generate(**inputs, max_new_tokens=_LONGEST_ANSWER, do_sample=False)
    return processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
