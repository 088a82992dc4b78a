"""The pictures behind a store's rows: read from where the store says they are, or from another place.

A picture that cannot be had is None, and counted: nothing that is shown fails for want of it. A place that was asked
for, and is none, is refused.
"""

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from saevlm_fast.errors import ImageError, first_line
from saevlm_fast.images.decode import decode
from saevlm_fast.images.open import Images, open_images
from saevlm_fast.images.sources import ImageSource
from saevlm_fast.records import object_of
from saevlm_fast.urls import redacted_text

if TYPE_CHECKING:
    from PIL.Image import Image

NONE = "none"
_GREY = "#9aa3ad"


class StoreImages:
    """Pictures by id.

    Attributes:
        path: where they are read; None where no place is known, none are wanted, or they are of a list.
        wanted: False with images="none".
        problem: why none can be had, in a line; None where the source is there.
        missing: ids that could not be read so far -> why.
    """

    def __init__(self, source: dict[str, Any] | None, images: Images | None = None):
        """source: the store's record, whose images.path is used unless `images` names another place, or "none".

        Raises:
            ValueError: `images` is no place with images. That of the store need not be one: stores outlive pictures.
        """
        self.wanted = not (isinstance(images, str) and images == NONE)
        stored = object_of((source or {}).get("images")).get("path")
        place = (images if images is not None else stored or None) if self.wanted else None  # stored as "": of a list
        self.path = redacted_text(os.fspath(place)) if isinstance(place, str | os.PathLike) else None
        self.missing: dict[str, str] = {}
        self.problem: str | None = None
        self._source: ImageSource | None = None
        self._numbers: dict[str, int] | None = None
        if not self.wanted:
            self.problem = "images: none are wanted"
        elif place is None:
            self.problem = "images: the store does not say where they are; give --images"
        else:
            try:
                self._source = open_images(place)
            except (ValueError, OSError) as error:
                if images is not None:
                    raise ValueError(first_line(error)) from error
                self.problem = first_line(error)

    def read(self, image_id: str, number: int, at_least: int | None = None) -> "Image | None":
        """The picture of an id, an upright RGB image; number: where it stood in the store, tried first.

        at_least: a large one may come smaller, no side below that.
        """
        if self._source is None:
            self.missing[image_id] = self.problem or ""
            return None
        place = self._place(image_id, number)
        if place is None:
            self.missing[image_id] = f"no such image in {self.path or 'the images given'}"
            return None
        try:
            return decode(self._source.read(place), at_least)
        except (ImageError, OSError, ValueError) as error:
            self.missing[image_id] = first_line(error)
            return None

    def _place(self, image_id: str, number: int) -> int | None:
        source = self._source
        assert source is not None
        if number < len(source) and source.image_id(number) == image_id:
            return number
        if self._numbers is None:
            self._numbers = {source.image_id(i): i for i in range(len(source))}
        return self._numbers.get(image_id)


def placeholder(side: int = 96) -> "Image":
    """What stands for a picture that is not there: grey, with a cross."""
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (side, side), _GREY)
    draw = ImageDraw.Draw(image)
    for line in ((0, 0, side - 1, side - 1), (0, side - 1, side - 1, 0)):
        draw.line(line, fill="#7b8590", width=max(1, side // 48))
    return image


def shown(images: StoreImages, ids: Sequence[str], numbers: Sequence[int]) -> "list[Image]":
    """The pictures of ids, with placeholders for those that are missing."""
    found = (images.read(image_id, number) for image_id, number in zip(ids, numbers))
    return [placeholder() if picture is None else picture for picture in found]
