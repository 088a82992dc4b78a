"""Images that Python holds: PIL images, arrays of pixels, encoded bytes and paths, in a list."""

import hashlib
import io
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeAlias, Union

import numpy as np

from saevlm_fast.errors import ImageError, first_line, require, shown
from saevlm_fast.images.sources import Names, check_size, not_empty, read_file, read_image
from saevlm_fast.urls import is_url, redacted

if TYPE_CHECKING:
    from PIL.Image import Image

GivenImage: TypeAlias = Union["Image", np.ndarray, bytes, str, os.PathLike[str]]
_WANTED = "a PIL image, a uint8 array [H, W], [H, W, 3] or [H, W, 4], encoded bytes, or a path"
_PNG_MODES = ("1", "L", "RGB", "RGBA", "I;16")  # what a PNG holds as it is
_COLOURS = ("P", "CMYK", "YCbCr", "HSV", "LAB", "RGBX")  # converted before


class _Damaged(NamedTuple):
    """In place of a PIL image that cannot be loaded, nor pickled."""

    reason: str


class GivenImages(Names):
    """A list of images. The id of a path is the path as it is written. That of others is their number in the list and
    the beginning of a SHA-256 of what they hold, so that rows of other images are not taken for theirs.

    Pixels are taken as they are: a PIL image is not turned by its EXIF orientation, as its own `show` does not. One
    that is open and not yet loaded is loaded now: its file could not be read by several processes. The images must not
    change while they are used.
    """

    def __init__(self, given: Sequence[GivenImage]):
        """ValueError: none, something that is no image, the same path twice."""
        for number, image in enumerate(given):
            require(_is_image(image), f"images: {shown(image)} at place {number} is not {_WANTED}")
        self._given = tuple(map(_loaded, given))
        ids = (_id(image, number) for number, image in enumerate(self._given))
        super().__init__(f"a list of {len(given)}", ids, [None] * len(given))

    def read(self, i: int) -> bytes:
        """Raises ImageError, OSError; pixels come as a PNG."""
        image = self._given[i]
        if isinstance(image, _Damaged):
            raise ImageError(image.reason)
        if isinstance(image, str | os.PathLike):
            path = os.fspath(image)
            return read_image(path) if is_url(path) else read_file(path)
        if isinstance(image, bytes):
            check_size(len(image))
            return not_empty(image)
        try:
            return _png(image)
        except (ImageError, MemoryError):
            raise
        except Exception as error:
            raise ImageError(first_line(error)) from error


def _is_image(image: object) -> bool:
    from PIL.Image import Image

    if isinstance(image, np.ndarray):
        pixels = image.ndim == 2 or (image.ndim == 3 and image.shape[2] in (3, 4))
        return pixels and image.dtype == np.uint8
    return isinstance(image, Image | bytes | str) or (
        isinstance(image, os.PathLike) and isinstance(os.fspath(image), str)
    )


def _loaded(image: GivenImage) -> GivenImage | _Damaged:
    if isinstance(image, np.ndarray | bytes | str | os.PathLike):
        return image
    try:
        image.load()
    except MemoryError:
        raise
    except Exception as error:  # as decode: Pillow raises some fifteen kinds
        return _Damaged(first_line(error))
    return image


def _id(image: "GivenImage | _Damaged", number: int) -> str:
    if isinstance(image, str | os.PathLike):
        return redacted(os.fspath(image))
    digest = hashlib.sha256()
    if isinstance(image, bytes):
        digest.update(image)
    elif isinstance(image, np.ndarray):
        digest.update(f"{image.shape}".encode() + np.ascontiguousarray(image).tobytes())
    elif not isinstance(image, _Damaged):
        palette = image.palette.tobytes() if image.palette is not None else b""
        shape = f"{image.mode} {image.size} {image.info.get('transparency')}"
        digest.update(shape.encode() + palette + image.tobytes())
    return f"{number}-{digest.hexdigest()[:8]}"


def _png(given: "Image | np.ndarray") -> bytes:
    """Without loss, and not compressed: it is decoded at once. ImageError: a mode that is not 8- or 16-bit unsigned."""
    from PIL import Image

    image = Image.fromarray(given) if isinstance(given, np.ndarray) else given
    require(0 not in image.size, "no pixels", ImageError)
    if image.has_transparency_data and not image.mode.startswith("I"):
        image = image.convert("RGBA")
    elif image.mode in _COLOURS:
        image = image.convert("RGB")
    elif image.mode.startswith("I;16"):  # of any order of bytes
        image = Image.fromarray(np.asarray(image).astype(np.uint16))
    advice = "8- or 16-bit unsigned samples are needed; scale them to 0 to 255, and convert to L or RGB"
    require(image.mode in _PNG_MODES, f"mode {image.mode}: {advice}", ImageError)
    encoded = io.BytesIO()
    image.save(encoded, "PNG", compress_level=0, exif=b"")
    return encoded.getvalue()
