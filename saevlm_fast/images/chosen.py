"""Some of a source's images, by a list of ids: what `cross-modal` keeps, and any other choice."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from saevlm_fast.errors import require, shown
from saevlm_fast.images.sources import ImageSource


class ChosenImages:
    """Images of another source, in its order; with captions if it has them. An ImageSource."""

    def __init__(self, source: ImageSource, numbers: Sequence[int]):
        self._source: Any = source
        self._numbers = np.asarray(numbers, np.int64)
        self.n_ignored, self.notes = source.n_ignored, source.notes

    def __len__(self) -> int:
        return len(self._numbers)

    def image_id(self, i: int) -> str:
        return self._source.image_id(int(self._numbers[i]))

    def label(self, i: int) -> str | None:
        return self._source.label(int(self._numbers[i]))

    def read(self, i: int) -> bytes:
        return self._source.read(int(self._numbers[i]))

    def caption(self, i: int) -> str | None:
        return self._source.caption(int(self._numbers[i])) if hasattr(self._source, "caption") else None

    def fingerprint(self) -> str:
        return hashlib.sha256(self._source.fingerprint().encode() + self._numbers.tobytes()).hexdigest()


def chosen_images(source: ImageSource, path: Path) -> ChosenImages:
    """The images whose ids a text file lists, one a line.

    Raises:
        ValueError: no such file, not UTF-8, no id in it, one that is listed twice or that no image has.
    """
    require(path.is_file(), f"only: {path} is not a file")
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
        ids = [id for line in lines if (id := line.removesuffix("\r")).strip()]
    except UnicodeDecodeError as error:
        raise ValueError(f"only: {path}: not UTF-8 text: {error.reason} at byte {error.start}") from error
    require(len(ids) > 0, f"only: {path} lists no id")
    wanted = set(ids)
    require(len(wanted) == len(ids), f"only: {path} lists an id twice")
    numbers = [i for i in range(len(source)) if source.image_id(i) in wanted]
    if len(numbers) < len(wanted):
        missing = sorted(wanted - {source.image_id(i) for i in numbers})
        raise ValueError(f"only: {path} lists {shown(missing[0])}, which no image has, and {len(missing) - 1} others")
    return ChosenImages(source, numbers)
