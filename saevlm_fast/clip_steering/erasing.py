"""What a CLIP still knows when latents are taken out: read words (a defence), or a factor of the images.

`words`: latents chosen on half of the images by what a drawn word makes fire; asked on the other half, with fonts and
places that were not used before, are accuracies without a word, with one, and with nonsense in its place. `factor`:
latents chosen by a label, as the background; asked is how well that label and another one are still told.

Every number stands beside the same for random latents of the same density, the largest latents, principal directions
and a probe's direction. Shape suffixes: N images, C classes, D width, K latents.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from saevlm_fast.clip_steering.attacks import AttackedSource, Style, wrong_words
from saevlm_fast.clip_steering.removal import (
    Features,
    Removal,
    features,
    largest_differences,
    of_same_density,
    predictions,
    principal_directions,
    probe_direction,
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
        group_N: int64, or None to take the classes as groups. groups: their names.
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


def erase_words(
    stream: Stream,
    units: Latents,
    train: Told,
    test: Told,
    classes: Vocabulary,
    ks: Sequence[int],
    styles: tuple[Style, Style],
    seed: int = 0,
    on_images: OnImages = lambda what, done, total: None,
) -> Figures:
    """Rows of (removal, k): accuracies clean, attacked, nonsense; `reads`: the share classed as the drawn word.

    Raises:
        ValueError: unusable images, more latents asked for than fire on words.
    """
    words = wrong_words(classes.words, train.y_N, train.ids, seed)
    attacked = AttackedSource(train.source, _each_word(train, words, classes), styles[0], seed)
    clean_seen = _features(stream, units, train.source, train, "train: clean", on_images)
    seen = _features(stream, units, attacked, train, "train: attacked", on_images)
    differences_ND = seen.stream_ND - clean_seen.stream_ND
    removals = _removals(units, seen, clean_seen, differences_ND, ks, seed)
    removals.append(_directions("probe", probe_direction(seen.stream_ND, clean_seen.stream_ND), clean_seen))
    words = wrong_words(classes.words, test.y_N, test.ids, seed)
    drawn = _each_word(test, words, classes)
    shown: dict[str, ImageSource] = {"clean": test.source}
    shown["attacked"] = AttackedSource(test.source, drawn, styles[1], seed)
    shown["nonsense"] = AttackedSource(test.source, drawn, styles[1], seed, nonsense=True)
    found = {
        name: predictions(
            stream, source, test.numbers, units, removals, classes, _told(f"test: {name}", len(test.y_N), on_images)
        )
        for name, source in shown.items()
    }
    rows = []
    for r, (name, k) in enumerate([("nothing", 0), *((each.name, each.k) for each in removals)]):
        row: Figures = {"removal": name, "k": k}
        for condition, classes_RN in found.items():
            row[condition] = _accuracy(classes_RN[r], test)
        row["reads"] = share(found["attacked"][r] == words)
        rows.append(row)
    return {"latents": _chosen(removals), "images": {"train": len(train.y_N), "test": len(test.y_N)}, "rows": rows}


def erase_factor(
    stream: Stream,
    units: Latents,
    train: Told,
    tests: dict[str, tuple[Told, Vocabulary]],
    ks: Sequence[int],
    seed: int = 0,
    on_images: OnImages = lambda what, done, total: None,
) -> Figures:
    """Rows of (removal, k): accuracies of every test by name; latents are chosen by train's classes.

    A latent's gain is that of the class on which it fires most, beside the images of all other classes.
    """
    seen = _features(stream, units, train.source, train, "train", on_images)
    values = [v for v in range(int(train.y_N.max()) + 1) if 0 < (train.y_N == v).sum() < len(train.y_N)]
    require(len(values) >= 2, "labels: what is erased has a single value on the images for choosing")
    of_value = [torch.from_numpy(train.y_N == v) for v in values]
    means_VD = torch.stack([seen.stream_ND[mask].mean(0) for mask in of_value]) - seen.stream_ND.mean(0)
    best_S = torch.stack([seen.latents_NS[m].mean(0) - seen.latents_NS[~m].mean(0) for m in of_value]).amax(0)
    # The same choice as of two kinds of images, of which one has this gain and the other nothing.
    more, less = (
        Features(best_S[None], seen.stream_ND[:1]),
        Features(torch.zeros_like(best_S)[None], seen.stream_ND[:1]),
    )
    removals = _removals(units, more, less, means_VD, ks, seed, seen)
    found = {
        name: predictions(
            stream,
            told.source,
            told.numbers,
            units,
            removals,
            classes,
            _told(f"test: {name}", len(told.y_N), on_images),
        )
        for name, (told, classes) in tests.items()
    }
    rows = []
    for r, (removal, k) in enumerate([("nothing", 0), *((each.name, each.k) for each in removals)]):
        row: Figures = {"removal": removal, "k": k}
        for name, (told, _) in tests.items():
            row[name] = _accuracy(found[name][r], told)
        rows.append(row)
    images = {name: len(told.y_N) for name, (told, _) in tests.items()}
    return {"latents": _chosen(removals), "images": {"train": len(train.y_N), **images}, "rows": rows}


def _removals(
    units: Latents,
    more: Features,
    less: Features,
    differences_ND: Tensor,
    ks: Sequence[int],
    seed: int,
    seen: Features | None = None,
) -> list[Removal]:
    """Of every k: the chosen latents, and the controls. seen: images of both kinds, for densities and sizes."""
    if seen is None:
        seen = Features(*(torch.cat(pair) for pair in zip(more, less)))
    largest_S = seen.latents_NS.double().mean(0) * units.W_SD.norm(dim=1).cpu()
    order_S = largest_S.argsort(descending=True, stable=True)
    chosen = largest_differences(more, less, units, max(ks))
    random = of_same_density(chosen, seen, seed)
    directions_KD = principal_directions(differences_ND, min(max(ks), *differences_ND.shape))
    found = []
    for k in ks:
        found.append(Removal("latents", k, chosen[:k]))
        found.append(Removal("random", k, random[:k]))
        found.append(Removal("magnitude", k, order_S[:k]))
        if k <= len(directions_KD):
            found.append(_directions("pca", directions_KD[:k], seen))
    return found


def _directions(name: str, directions_KD: Tensor, seen: Features) -> Removal:
    return Removal(name, len(directions_KD), None, directions_KD, seen.stream_ND.mean(0))


def _chosen(removals: Sequence[Removal]) -> list[int]:
    """The latents of the largest k, the strongest first."""
    latents = [each.latents_K for each in removals if each.name == "latents" and each.latents_K is not None]
    return max(latents, key=len).tolist()


def _each_word(told: Told, words_N: np.ndarray, classes: Vocabulary) -> list[str | None]:
    """By the number of the image in the source."""
    found: list[str | None] = [None] * len(told.source)
    for number, word in zip(told.numbers, words_N):
        found[number] = classes.words[int(word)] if word >= 0 else None
    return found


def _features(
    stream: Stream, units: Latents, source: ImageSource, told: Told, what: str, on_images: OnImages
) -> Features:
    return features(stream, source, told.numbers, units, _told(what, len(told.numbers), on_images))


def _told(what: str, total: int, on_images: OnImages) -> Callable[[int], None]:
    return lambda done: on_images(what, done, total)


def _accuracy(predicted_N: np.ndarray, told: Told) -> Figures:
    """Share of right ones, and that of the worst group that has LEAST_OF_GROUP images."""
    usable_N = predicted_N >= 0
    right_N = predicted_N == told.y_N
    groups = [
        (name, share(right_N[mask]))
        for g, name in enumerate(told.groups)
        if (mask := usable_N & (told.group_N == g)).sum() >= LEAST_OF_GROUP
    ]
    worst = min(groups, key=lambda each: each[1]["value"], default=None)
    figures = share(right_N[usable_N])
    return figures | {"worst": None if worst is None else {"group": worst[0], **worst[1]}}
