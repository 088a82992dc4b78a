"""Scenes as images to harvest: `scenes:SPLIT:N[:SEED]` where a folder of photos could stand.

The id of an image says which scene it is, "test-0-0000042", and its label is the scene's caption, so the truth about
any row of any store is `scene_labels` of its ids.
"""

import hashlib
import os
import re
from collections.abc import Sequence

import numpy as np

from saevlm_fast.box.scenes import IMAGE_SIZE, SPLITS, Scenes, describe
from saevlm_fast.errors import require

PREFIX = "scenes:"
_AT_ONCE = 128  # drawn together: twenty times faster than one by one
_ID = re.compile(rf"({'|'.join(SPLITS)})-(\d+)-(\d{{7,}})")


class SceneSource:
    """The first N scenes of a split: drawn, named and described when they are asked for. An ImageSource."""

    n_ignored = 0
    notes: tuple[str, ...] = ()

    def __init__(self, split: str, n: int, seed: int = 0):
        self._scenes = Scenes(seed, split)
        self.name, self._n = f"{PREFIX}{split}:{n}:{seed}", n
        self._drawn: tuple[int, np.ndarray] = (0, np.empty((0,)))
        self._captions: tuple[int, list[str]] = (0, [])

    def __len__(self) -> int:
        return self._n

    def image_id(self, i: int) -> str:
        """The id from which scene_labels finds the truth."""
        return f"{self._scenes.split}-{self._scenes.seed}-{range(self._n)[i]:07d}"

    def label(self, i: int) -> str:
        """The scene's caption. Those of neighbours are made at once."""
        first, captions = self._captions
        if not first <= i < first + len(captions):
            first = range(self._n)[i] // _AT_ONCE * _AT_ONCE
            objects, setting = self._scenes.labels(first, _AT_ONCE)
            captions = [describe(o, s) for o, s in zip(objects, setting)]
            self._captions = first, captions
        return captions[i - first]

    def caption(self, i: int) -> str:
        """The scene in words, as its label."""
        return self.label(i)

    def fingerprint(self) -> str:
        """SHA-256 of the name, which says all, and of the first captions, should the generator ever change."""
        captions = [self.label(i) for i in range(min(self._n, _AT_ONCE))]
        return hashlib.sha256("\n".join([self.name, *captions]).encode()).hexdigest()

    def read(self, i: int) -> bytes:
        """The scene as a PPM file. Scenes that are read in order are drawn many at once."""
        first, images = self._drawn
        if not first <= i < first + len(images):
            in_order = i == first + len(images)
            first, images = self._drawn = i, self._scenes.batch(i, _AT_ONCE if in_order else 1).images
        return b"P6 %d %d 255\n" % (IMAGE_SIZE, IMAGE_SIZE) + images[i - first].tobytes()


def open_scenes(spec: str) -> SceneSource:
    """The source that `scenes:SPLIT:N[:SEED]` names. ValueError: not of this form, an unknown split, N below 1."""
    parts = spec.removeprefix(PREFIX).split(":")
    numbers = [part for part in parts[1:] if part.isascii() and part.isdigit()]
    require(len(parts) in (2, 3) and len(numbers) == len(parts) - 1, f"images: {spec!r} is not scenes:SPLIT:N[:SEED]")
    require(parts[0] in SPLITS, f"images: {spec}: split {parts[0]!r} is not one of {', '.join(SPLITS)}")
    n, seed = int(numbers[0]), int(numbers[1]) if len(numbers) == 2 else 0
    require(1 <= n <= 10**8, f"images: {spec}: {n} scenes, must be 1 to 100000000")
    return SceneSource(parts[0], n, seed)


def scene_labels(ids: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """The truth about images by their ids: objects int64 [N, O, F] and setting int64 [N, 3], as in SceneBatch.

    Raises:
        ValueError: an id that is not a scene's; ids of several splits or seeds.
    """
    matches = [_ID.fullmatch(os.fspath(name)) for name in ids]
    bad = next((name for name, match in zip(ids, matches) if match is None), None)
    require(bad is None, f"images: {bad!r} is not the id of a scene")
    series = {(match[1], int(match[2])) for match in matches if match}
    require(len(series) == 1, f"images: scenes of {len(series)} splits or seeds, not of one")
    (split, seed), numbers = series.pop(), np.array([int(match[3]) for match in matches if match])
    first, last = int(numbers.min()), int(numbers.max())
    objects, setting = Scenes(seed, split).labels(first, last - first + 1)
    return objects[numbers - first], setting[numbers - first]
