"""What a CLIP still knows when latents are taken out: read words (a defence), or a factor of the images.

`words`: latents chosen on half of the images by what a drawn word makes fire; asked on the other half, with fonts and
places that were not used before, are accuracies without a word, with one, and with nonsense in its place. `factor`:
latents chosen by a label, as the background; asked is how well that label and another one are still told.

Every number stands beside the same for random latents of the same density, the largest latents, principal directions
and a probe's direction. Shape suffixes: N images, C classes, D width, K latents.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch

from saevlm_fast.clip_steering.attacks import TEST, TRAIN, AttackedSource, Style, wrong_words
from saevlm_fast.clip_steering.removal import (
    Features,
    Removal,
    features,
    gains,
    most_gained,
    of_same_density,
    predictions,
    principal_directions,
    probe_directions,
)
from saevlm_fast.clip_steering.stream import Stream, Vocabulary
from saevlm_fast.clip_steering.units import Latents
from saevlm_fast.errors import require
from saevlm_fast.images.sources import ImageSource
from saevlm_fast.measures.results import Figures, share

LEAST_OF_GROUP = 5  # images of which an accuracy is given

OnImages = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Told:
    """Images and the class of each: numbers of the source, y_N (into classes), and groups for the worst of them.

    Attributes:
        y_N, group_N: int64, -1 of images without one. groups: their names.
    """

    source: ImageSource
    numbers: list[int]
    y_N: np.ndarray
    groups: tuple[str, ...]
    group_N: np.ndarray

    @property
    def ids(self) -> list[str]:
        """Of the images."""
        return [self.source.image_id(i) for i in self.numbers]


@dataclass(frozen=True)
class Question:
    """What is asked of the images that are asked about: what they are, and the classes to choose from."""

    told: Told
    classes: Vocabulary


@dataclass(frozen=True)
class Choice:
    """How latents are chosen, and how many.

    Attributes:
        ks: numbers of latents, ascending. select: as of `removal.gains`. seed: of words and random latents.
    """

    ks: tuple[int, ...]
    select: Literal["difference", "auroc"] = "difference"
    seed: int = 0


@dataclass(frozen=True)
class Writing:
    """How wrong words are written: for choosing, and where it is asked.

    Attributes:
        words, test_words: of each class; none is its name.
    """

    style: Style = TRAIN
    test_style: Style = TEST
    words: tuple[str, ...] = field(default=())
    test_words: tuple[str, ...] = field(default=())


def erase_words(
    stream: Stream,
    units: Latents,
    train: Told,
    asked: Question,
    choice: Choice,
    writing: Writing,
    also: Mapping[str, Question],
    on_images: OnImages = lambda what, done, total: None,
) -> Figures:
    """Rows of (removal, k): accuracies clean, attacked, nonsense; `reads`: the share classed as the drawn word.

    Args:
        also: by name what else is asked of the same images, clean: what a removal costs besides.

    Raises:
        ValueError: unusable images, more latents asked for than fire on words.
    """
    names, test = asked.classes.words, asked.told
    wrong_N = wrong_words(names, train.y_N, train.ids, choice.seed)
    drawn = _each_word(train, wrong_N, writing.words or names)
    attacked = AttackedSource(train.source, drawn, writing.style, choice.seed)
    clean = _features(stream, units, train.source, train, "train: clean", on_images)
    seen = _features(stream, units, attacked, train, "train: attacked", on_images)
    both, label_N = Features.join([clean, seen]), np.repeat([0, 1], len(train.y_N))
    directions = {
        "pca": (principal_directions(seen.stream_ND - clean.stream_ND, max(choice.ks)), both),
        "probe": (probe_directions(both.stream_ND, label_N), clean),
    }
    removals = _removals(units, both, gains(both, label_N, [1], units, choice.select), directions, choice)
    wrong_N = wrong_words(names, test.y_N, test.ids, choice.seed)
    drawn = _each_word(test, wrong_N, writing.test_words or names)
    shown: dict[str, ImageSource] = {"clean": test.source}
    shown["attacked"] = AttackedSource(test.source, drawn, writing.test_style, choice.seed)
    shown["nonsense"] = AttackedSource(test.source, drawn, writing.test_style, choice.seed, nonsense=True)
    found: dict[str, tuple[np.ndarray, Told]] = {}
    for name, source in shown.items():
        questions = {name: asked, **(also if name == "clean" else {})}
        found |= _answers(stream, units, source, test, questions, removals, on_images)
    figures = _figures(removals, found, len(train.y_N))
    attacked_RN = found["attacked"][0]
    answered_N = (attacked_RN[0] >= 0) & (wrong_N >= 0)
    for row, classes_N in zip(figures["table"], attacked_RN):
        row["reads"] = share((classes_N == wrong_N)[answered_N])
    return figures


def erase_factor(
    stream: Stream,
    units: Latents,
    train: Told,
    questions: Mapping[str, Question],
    choice: Choice,
    on_images: OnImages = lambda what, done, total: None,
) -> Figures:
    """Rows of (removal, k): accuracies of every question by name, all of the same images.

    Latents are chosen by train's classes: a latent's gain is that of the class which it tells best from the others.

    Raises:
        ValueError: the images for choosing have a single class.
    """
    seen = _features(stream, units, train.source, train, "train", on_images)
    values = np.unique(train.y_N).tolist()
    require(len(values) >= 2, "what: the label that is erased has a single value on the images for choosing")
    means_VD = torch.stack([seen.stream_ND[torch.from_numpy(train.y_N == v)].mean(0) for v in values])
    directions = {
        "pca": (principal_directions(means_VD - seen.stream_ND.mean(0), max(choice.ks)), seen),
        "probe": (probe_directions(seen.stream_ND, train.y_N), seen),
    }
    removals = _removals(units, seen, gains(seen, train.y_N, values, units, choice.select), directions, choice)
    test = next(iter(questions.values())).told
    found = _answers(stream, units, test.source, test, questions, removals, on_images)
    return _figures(removals, found, len(train.y_N))


def _removals(
    units: Latents,
    seen: Features,
    gain_S: np.ndarray,
    directions: Mapping[str, tuple[torch.Tensor, Features]],
    choice: Choice,
) -> list[Removal]:
    """Of every k: the chosen latents, and the controls. seen: images of both kinds, for densities and sizes.

    directions: orthonormal ones, and images whose mean they start from. The probe's are taken out together.
    """
    size_S = seen.mean_S() * units.W_SD.double().norm(dim=1).cpu().numpy()
    order_S = torch.from_numpy(np.argsort(-size_S, kind="stable").copy())
    chosen = most_gained(gain_S, max(choice.ks))
    random = of_same_density(chosen, seen.density_S, choice.seed)
    pca_KD, of_pca = directions["pca"]
    found = []
    for k in choice.ks:
        found.append(Removal("latents", k, chosen[:k]))
        found.append(Removal("random", k, random[:k]))
        found.append(Removal("magnitude", k, order_S[:k]))
        if k <= len(pca_KD):
            found.append(Removal("pca", k, None, pca_KD[:k], of_pca.stream_ND.mean(0)))
    probe_KD, of_probe = directions["probe"]
    if len(probe_KD):
        found.append(Removal("probe", len(probe_KD), None, probe_KD, of_probe.stream_ND.mean(0)))
    return found


def _answers(
    stream: Stream,
    units: Latents,
    source: ImageSource,
    test: Told,
    questions: Mapping[str, Question],
    removals: Sequence[Removal],
    on_images: OnImages,
) -> dict[str, tuple[np.ndarray, Told]]:
    """By question the classes [1 + R, N], and what is right. ValueError: a class of which no image is usable."""
    counted = _counted(f"test: {next(iter(questions))}", len(test.numbers), on_images)
    vocabularies = [question.classes for question in questions.values()]
    found = predictions(stream, source, test.numbers, units, removals, vocabularies, counted)
    for (name, question), classes_RN in zip(questions.items(), found):
        _check_classes(name, question, classes_RN[0] >= 0, stream.skipped)
    return {name: (each, questions[name].told) for name, each in zip(questions, found)}


def _check_classes(name: str, question: Question, answered_N: np.ndarray, skipped: Mapping[int, str]) -> None:
    """ValueError: a class of which there are images, and none of them was answered for."""
    told = question.told
    for y in np.unique(told.y_N[told.y_N >= 0]).tolist():
        of_it = told.y_N == y
        number = told.numbers[int(np.flatnonzero(of_it)[0])]
        require(
            bool(answered_N[of_it].any()),
            f"test_images: none of the {int(of_it.sum())} images of the class {question.classes.words[y]!r} is usable "
            f"({name}); the first is {told.source.image_id(number)}: {skipped.get(number, '')}",
        )


def _figures(removals: Sequence[Removal], found: Mapping[str, tuple[np.ndarray, Told]], n_train: int) -> Figures:
    rows = []
    for r, (removal, k) in enumerate([("nothing", 0), *((each.name, each.k) for each in removals)]):
        row: Figures = {"removal": removal, "k": k}
        rows.append(row | {name: _accuracy(classes_RN, r, told) for name, (classes_RN, told) in found.items()})
    latents = [each.latents_K for each in removals if each.name == "latents" and each.latents_K is not None]
    return {
        "chosen_latents": max(latents, key=len).tolist(),
        "images_for_choosing": n_train,
        "images_asked_about": max(len(told.numbers) for _, told in found.values()),
        "table": rows,
    }


def _each_word(told: Told, wrong_N: np.ndarray, words: Sequence[str]) -> list[str | None]:
    """By the number of the image in the source."""
    found: list[str | None] = [None] * len(told.source)
    for number, wrong in zip(told.numbers, wrong_N):
        found[number] = words[int(wrong)] if wrong >= 0 else None
    return found


def _features(
    stream: Stream, units: Latents, source: ImageSource, told: Told, what: str, on_images: OnImages
) -> Features:
    return features(stream, source, told.numbers, units, _counted(what, len(told.numbers), on_images))


def _counted(what: str, total: int, on_images: OnImages) -> Callable[[int], None]:
    return lambda done: on_images(what, done, total)


def _accuracy(classes_RN: np.ndarray, r: int, told: Told) -> Figures:
    """Share of right ones, and that of the worst group that has LEAST_OF_GROUP images.

    Of images with a class that the model as it is answers for; one that a removal leaves without an answer is wrong.
    """
    usable_N = (classes_RN[0] >= 0) & (told.y_N >= 0)
    right_N = classes_RN[r] == told.y_N
    groups = [
        (name, share(right_N[mask]))
        for g, name in enumerate(told.groups)
        if (mask := usable_N & (told.group_N == g)).sum() >= LEAST_OF_GROUP
    ]
    worst = min(groups, key=lambda each: each[1]["value"], default=None)
    figures = share(right_N[usable_N])
    return figures | {"worst": None if worst is None else {"group": worst[0], **worst[1]}}
