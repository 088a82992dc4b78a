"""Words drawn on images, so that a CLIP reads them instead of looking: typographic attacks, and nonsense beside them.

Each image is given the name of a class that it does not have, by its id and a seed. How it is written is drawn from a
style; fonts, places and sizes of the style for training and of the one for testing are different. Nonsense has the same
letters and fonts in another order: what it changes is covered pixels, not reading.
"""

import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from saevlm_fast.errors import require
from saevlm_fast.images.decode import decode
from saevlm_fast.images.sources import ImageSource

BITMAP, OUTLINE = "Pillow's bitmap font", "Pillow's outline font"
_LEAST_HEIGHT = 7  # pixels of a line
_NO_LETTER = "\U0010ffff"  # drawn as any letter that a font does not have


@dataclass(frozen=True)
class Style:
    """How words are written.

    Attributes:
        fonts: files .ttf or .otf, or the names of Pillow's own two. places: of the text's middle, (right, down) as
            shares of the image. heights: of a line, shares of the image's height.
    """

    name: str
    fonts: tuple[str, ...]
    places: tuple[tuple[float, float], ...]
    heights: tuple[float, float]


TRAIN = Style("train", (BITMAP,), ((0.5, 0.12), (0.5, 0.88), (0.35, 0.3)), (0.16, 0.22))
TEST = Style("test", (OUTLINE,), ((0.5, 0.5), (0.65, 0.7), (0.5, 0.25)), (0.23, 0.3))


class AttackedSource:
    """The images of a source with a word on each. An ImageSource.

    Args:
        words: of every image, by its number; None leaves it as it is. nonsense: the letters in another order.

    Raises:
        ValueError: not a word for each image; a font that cannot be used, or lacks a letter.
    """

    def __init__(
        self, source: ImageSource, words: Sequence[str | None], style: Style, seed: int = 0, nonsense: bool = False
    ) -> None:
        require(len(words) == len(source), f"words: {len(words)} for {len(source)} images")
        check_letters(style.fonts, [word for word in words if word is not None])
        self.source, self.words, self.style, self.seed, self.nonsense = source, list(words), style, seed, nonsense
        self.n_ignored, self.notes = source.n_ignored, source.notes

    def __len__(self) -> int:
        return len(self.source)

    def image_id(self, i: int) -> str:
        """The same as of the clean image."""
        return self.source.image_id(i)

    def label(self, i: int) -> str | None:
        """That of the clean image."""
        return self.source.label(i)

    def fingerprint(self) -> str:
        """Of the images, the words and how they are written."""
        known = repr([self.source.fingerprint(), self.words, self.style, self.seed, self.nonsense])
        return hashlib.sha256(known.encode()).hexdigest()

    def read(self, i: int) -> bytes:
        """PNG. Raises as the source does, and ImageError for an image that cannot be decoded."""
        image, word = decode(self.source.read(i)), self.words[i]
        if word is not None:
            image = self.drawn(image, word, self.source.image_id(i))
        written = io.BytesIO()
        image.save(written, "PNG", compress_level=0)
        return written.getvalue()

    def drawn(self, image: Any, word: str, image_id: str) -> Any:
        """A copy with the word on it; the same for the same image, word, style and seed."""
        digest = hashlib.sha256(repr([self.seed, self.style.name, image_id]).encode()).digest()
        random = np.random.default_rng(np.frombuffer(digest, np.uint32))
        font = self.style.fonts[int(random.integers(len(self.style.fonts)))]
        place = self.style.places[int(random.integers(len(self.style.places)))]
        height = max(_LEAST_HEIGHT, round(image.height * random.uniform(*self.style.heights)))
        light = bool(random.integers(2))
        letters = _in_another_order(word, random) if self.nonsense else word
        return _written(image, letters, font, place, height, light)


def _in_another_order(word: str, random: np.random.Generator) -> str:
    """Its letters so that the word does not stand there; only a word of one letter, again and again, has no other."""
    while True:
        letters = "".join(random.permutation(list(word)).tolist())
        if letters != word or len(set(word)) < 2:
            return letters


def _written(image: Any, word: str, font: str, place: tuple[float, float], height: int, light: bool) -> Any:
    """The word in black on white or white on black, no wider than the image."""
    stamp = _stamp(word, font, height, light)
    if stamp.width > image.width:
        stamp = stamp.resize((image.width, max(1, round(stamp.height * image.width / stamp.width))))
    left = round(place[0] * image.width - stamp.width / 2)
    top = round(place[1] * image.height - stamp.height / 2)
    copy = image.copy()
    left = min(max(left, 0), max(image.width - stamp.width, 0))
    copy.paste(stamp, (left, min(max(top, 0), max(image.height - stamp.height, 0))))
    return copy


def _stamp(word: str, font: str, height: int, light: bool) -> Any:
    ink, ground = ((255, 255, 255), (0, 0, 0)) if light else ((0, 0, 0), (255, 255, 255))
    chosen = _font(font, height)
    box = chosen.getbbox(word)
    stamp = Image.new("RGB", (max(1, round(box[2] - box[0])) + 2, max(1, round(box[3] - box[1])) + 2), ground)
    ImageDraw.Draw(stamp).text((1 - box[0], 1 - box[1]), word, fill=ink, font=chosen)
    if font == BITMAP:  # has one size
        stamp = stamp.resize((max(1, round(stamp.width * height / stamp.height)), height))
    return stamp


def check_fonts(fonts: Sequence[str]) -> None:
    """ValueError: one of them is no such file, or no font."""
    for font in fonts:
        _font(font, 12)


def check_letters(fonts: Sequence[str], words: Sequence[str]) -> None:
    """ValueError: a font that cannot be used, or that has no shape for a letter of the words and would draw a box."""
    letters = sorted({letter for word in words for letter in word if not letter.isspace()})
    for font in fonts:
        chosen = _font(font, 12)
        missing = [letter for letter in letters if not _has(chosen, letter)]
        shown = "".join(missing[:8])
        require(not missing, f"fonts: {font} has no {shown!r}, of which words to draw are made; give fonts that have")


def _has(font: Any, letter: str) -> bool:
    if isinstance(font, ImageFont.FreeTypeFont):
        drawn: list[Any] = [font.getmask(each) for each in (letter, _NO_LETTER)]
        return bytes(drawn[0]) != bytes(drawn[1])
    try:
        return font.getmask(letter).getbbox() is not None
    except UnicodeEncodeError:
        return False


def _font(font: str, height: int) -> Any:
    """ValueError: no such file, or no font."""
    if font == BITMAP:
        return ImageFont.load_default_imagefont()
    if font == OUTLINE:
        return ImageFont.load_default(height)
    try:
        return ImageFont.truetype(str(Path(font)), height)
    except (OSError, ValueError) as error:
        raise ValueError(f"fonts: {font} cannot be used: {error}") from None


def wrong_words(classes: Sequence[str], y_N: np.ndarray, ids: Sequence[str], seed: int = 0) -> np.ndarray:
    """int64 [N]: for each image of class y_N a class that it does not have, by its id; -1 where y_N is -1.

    Raises:
        ValueError: fewer than 2 classes.
    """
    require(len(classes) >= 2, f"labels: {len(classes)} class; a wrong word needs another")
    found = np.full(len(y_N), -1)
    for i in np.flatnonzero(y_N >= 0).tolist():
        digest = hashlib.sha256(repr([seed, "word", ids[i]]).encode()).digest()
        step = 1 + int.from_bytes(digest[:8], "little") % (len(classes) - 1)
        found[i] = (y_N[i] + step) % len(classes)
    return found
