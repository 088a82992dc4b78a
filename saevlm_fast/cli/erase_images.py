"""Images of `erase`: which of them choose latents and which are asked about, so that each class is in both."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from saevlm_fast.cli.erase_labels import labels_of
from saevlm_fast.cli.erase_options import WORDS, EraseArguments
from saevlm_fast.cli.terminal import warn
from saevlm_fast.errors import ImageError, require

if TYPE_CHECKING:
    from saevlm_fast.images.sources import ImageSource

_LEAST = 10  # images of each use
_COMPARED = 8  # images of equal ids


@dataclass(frozen=True)
class _Use:
    """What images are for: the option that they are of, words for it, the labels that tell them apart."""

    argument: str
    use: str
    labels: str


def argument_of(options: EraseArguments, labels: str) -> str:
    """Of which option labels are."""
    return {options.labels: "labels", options.what: "what"}.get(labels, "also")


def halves_of(
    options: EraseArguments, source: "ImageSource", asked: "ImageSource"
) -> "tuple[tuple[ImageSource, list[int]], tuple[ImageSource, list[int]]]":
    """Images that can be read and have a label, at most --limit for each use.

    Raises:
        ValueError: too few; a class without an image for one of the uses; images for choosing that are asked about.
    """
    from saevlm_fast.data.label_sets import halves

    labels = {WORDS: options.labels}.get(options.what, options.what)
    uses = _Use("images", "for choosing", labels), _Use("test_images", "to ask about", options.labels)
    train, test = (_classes(options, use.labels, each) for use, each in zip(uses, (source, asked)))
    if asked is source:
        half = dict(zip(train, halves([source.image_id(i) for i in train])))
        parts = {i: train[i] for i in train if half[i]}, {i: test[i] for i in test if not half.get(i, False)}
        for use, whole, part in zip(uses, (train, test), parts):
            _check_split(options, use, whole, part)
        train, test = parts
    chosen, others = (_drawn(options, use, each, of) for use, each, of in zip(uses, (source, asked), (train, test)))
    if asked is not source:
        check_apart(source, chosen, asked, others)
    return (source, chosen), (asked, others)


def _classes(options: EraseArguments, labels: str, source: "ImageSource") -> dict[int, str]:
    """The class of every image that has one, by its number."""
    found = labels_of(argument_of(options, labels), labels, source, range(len(source)))
    return {i: found.names[label] for i, label in enumerate(found.single().tolist()) if label >= 0}


def _check_split(options: EraseArguments, use: _Use, whole: dict[int, str], part: dict[int, str]) -> None:
    """ValueError: all images of a class are in the other half. Halves are by the images' ids."""
    if len(part) < _LEAST:
        return  # which is said later, with how many can be read
    lost = sorted(set(whole.values()) - set(part.values()))
    n = sum(name == lost[0] for name in whole.values()) if lost else 0
    require(
        not lost,
        f"{argument_of(options, use.labels)}: class {lost[:1]} of {use.labels} has {n} of --images, and none of them "
        f"is in the half {use.use}; each class needs 1 there: give --test-images, more of it, or no label to it",
    )


def _drawn(options: EraseArguments, use: _Use, source: "ImageSource", class_of: dict[int, str]) -> list[int]:
    """Numbers of images that can be decoded, drawn by chance: one of each class, then others, at most --limit.

    One damaged file must not end a run; how many there are is said. ValueError: too few are left, or none of a class.
    """
    order = _shuffled(list(class_of), options)
    by_class: dict[str, list[int]] = {}
    for i in order:
        by_class.setdefault(class_of[i], []).append(i)
    n_classes = len(by_class)
    few = f"limit: {options.limit} images {use.use} are fewer than the {n_classes} classes of {use.labels}"
    require(n_classes <= options.limit, f"{few}; each class needs 1")
    reading = _Reading(source)
    firsts = {i for of_it in by_class.values() for i in reading.sound(of_it, 1)}
    rest = reading.sound((i for i in order if i not in firsts), options.limit - len(firsts))
    found = sorted([*firsts, *rest])
    least = f"can be read and have a label of {use.labels}; {_LEAST} at least are needed"
    require(len(found) >= _LEAST, f"{use.argument}: {len(found)} {use.use} {least}")
    for name in sorted(by_class):
        _check_left(use, name, by_class[name], reading.damaged, found)
    if reading.damaged:
        n, first = len(reading.damaged), next(iter(reading.damaged.values()))
        left_out = f"{n} of {len(found) + n} {use.use} are not usable and were left out, the first is {first}"
        warn(f"{use.argument}: {left_out}")
    return found


def _check_left(use: _Use, name: str, of_it: list[int], damaged: dict[int, str], found: list[int]) -> None:
    """ValueError: no image of the class is left."""
    why = next((damaged[i] for i in of_it if i in damaged), "")
    require(
        not set(of_it).isdisjoint(found),
        f"{use.argument}: none of the {len(of_it)} images {use.use} of the class {name!r} ({use.labels}) is usable, "
        f"and each class needs 1; the first is {why}",
    )


class _Reading:
    """Which images can be decoded. damaged: by number the id, and why it cannot."""

    def __init__(self, source: "ImageSource") -> None:
        self.source = source
        self.damaged: dict[int, str] = {}

    def sound(self, numbers: Iterable[int], at_most: int) -> list[int]:
        """The first of them that can be decoded."""
        from saevlm_fast.images.decode import decode

        found: list[int] = []
        for number in numbers:
            if len(found) == at_most:
                break
            if number in self.damaged:
                continue
            try:
                decode(self.source.read(number))
                found.append(number)
            except ImageError as error:
                self.damaged[number] = f"{self.source.image_id(number)}: {error}"
        return found


def _shuffled(numbers: list[int], options: EraseArguments) -> list[int]:
    """In an order by chance: folders are sorted by class, so that the first are of few."""
    import numpy as np

    order = np.random.default_rng([options.seed, 4]).permutation(len(numbers))
    return [numbers[i] for i in order.tolist()]


def check_apart(source: "ImageSource", train: list[int], asked: "ImageSource", test: list[int]) -> None:
    """ValueError: images that chose latents are asked about. Ids that are the same may be of other folders' images."""
    number = {source.image_id(i): i for i in train}
    both = [(number[name], i) for i in test if (name := asked.image_id(i)) in number]
    same = sum(source.read(i) == asked.read(j) for i, j in both[:_COMPARED])
    require(
        same == 0,
        f"test_images: {same} of {min(len(both), _COMPARED)} looked at are images that choose latents; without "
        "--test-images the half of --images is asked about that does not choose",
    )
