"""A picture of latents: one row each, with its names, its score and the images on which it is most active.

A row may also be images with a few words under each, as the answers of a steered model.

A sheet is a column of blocks (title, headings, rows) whose sizes are measured with the font before anything is drawn,
so no text is cut off and nothing overlaps. The font is Pillow's own, which needs no file and has the ASCII characters
and a few more; an accented letter is shown without its accent, what has no likeness as "?". Sizes are in pixels.
"""

import math
import os
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saevlm_fast.errors import require
from saevlm_fast.files import atomic_write

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw

_PAPER, _INK, _GREY, _RULE, _TRACK, _BAR = "#ffffff", "#17212b", "#64707d", "#d9dfe5", "#eaeef2", "#2f6fb5"
_MARGIN, _TILE_GAP, _TEXT_GAP, _ROW_GAP, _SECTION_GAP = 36, 6, 28, 20, 34
_BAR_GAP, _BAR_HEIGHT = 5, 4
_TITLE, _HEADING, _NAME, _SMALL = 28, 19, 19, 14  # sizes of type
_LEADING = 1.32  # height of a line, of its size of type
_LEAST_TEXT, _MOST_TEXT = 150, 230  # width of the column of text: of its widest line, within these
_LEAST_WIDTH = 640  # of what is within the margins: titles need room
_MOST_LINES = 2  # of a name, and of the other names
_BAR_NOTE = "Bar under an image: its activation, as a share of the row's largest."
_PLAIN = str.maketrans({"\u2013": "-", "\u2014": "-", "\u2212": "-", "\u00d7": "x", "ß": "ss", "ø": "o", "ł": "l"})


@dataclass(frozen=True)
class LatentRow:
    """One latent.

    Attributes:
        latent: its number. score: MS, NaN where it is not defined; None where nobody has measured it. n_active: images
            on which it fires.
        names: its nearest words, the nearest first; none is fine.
        images: of any mode and size, the most active first. activations: one for each image.
        note: what else is known of the latent.
    """

    latent: int
    score: float | None
    n_active: int
    names: Sequence[str]
    images: Sequence["Image"]
    activations: Sequence[float]
    note: str = ""

    def __post_init__(self) -> None:
        n_images, n_acts = len(self.images), len(self.activations)
        require(n_images == n_acts, f"activations: {n_acts} for the {n_images} images of latent {self.latent}")


@dataclass(frozen=True)
class Captioned:
    """Images with words under each.

    Attributes:
        title, notes: what stands beside the images.
        captions: lines of text for every image, the last of which is emphasised; equally many for all.
    """

    title: str
    notes: Sequence[str]
    images: Sequence["Image"]
    captions: Sequence[Sequence[str]]

    def __post_init__(self) -> None:
        n_images, n_captions = len(self.images), len(self.captions)
        require(n_images == n_captions, f"captions: {n_captions} for the {n_images} images of {self.title!r}")
        require(len({len(lines) for lines in self.captions}) <= 1, f"captions: not equally many lines, {self.title!r}")


@dataclass(frozen=True)
class Section:
    """Rows under a heading; unit is what they are called: latent, or neuron."""

    title: str
    rows: Sequence[LatentRow | Captioned]
    unit: str = "latent"


def draw_sheet(title: str, caption: str, sections: Sequence[Section], columns: int = 10, tile: int = 96) -> "Image":
    """The sheet as an RGB image; equal arguments give equal pixels.

    Args:
        caption: what is shown: the SAE, the layer, the number of images.
        columns: images shown of each row, at most. tile: the side of an image; others are cropped to a square and
            scaled, pixel by pixel if tile is a multiple of their side.

    Raises:
        ValueError: columns below 1, tile below 16.
    """
    from PIL import Image, ImageDraw

    require(columns >= 1, f"columns: {columns} must be at least 1")
    require(tile >= 16, f"tile: {tile} must be at least 16")
    blocks, inner_width = _blocks(title, caption, sections, columns, tile)
    height = sum(block.space_above + block.height for block in blocks)
    sheet = Image.new("RGB", (inner_width + 2 * _MARGIN, height + 2 * _MARGIN), _PAPER)
    draw, y = ImageDraw.Draw(sheet), _MARGIN
    for block in blocks:
        y += block.space_above
        block.draw(sheet, draw, y)
        y += block.height
    return sheet


def save_sheet(sheet: "Image", path: str | os.PathLike[str]) -> None:
    """Writes a PNG, atomically. ValueError: a path that does not end in .png."""
    require(Path(path).suffix.lower() == ".png", f"path: {path} must end in .png")
    with atomic_write(path) as temporary:
        sheet.save(temporary, format="PNG", optimize=True)


# --- blocks, from top to bottom ---


def _blocks(
    title: str, caption: str, sections: Sequence[Section], columns: int, tile: int
) -> tuple[list["_Heading | _RowBlock"], int]:
    """The blocks, and the width within the margins."""
    texts = [[_row_lines(row, section.unit) for row in section.rows] for section in sections]
    text_width = max([_LEAST_TEXT, *(math.ceil(line.width) for lines in texts for row in lines for line in row)])
    n_shown = max([min(len(row.images), columns) for section in sections for row in section.rows], default=0)
    tiles_x = _MARGIN + text_width + _TEXT_GAP
    width = max(_LEAST_WIDTH, tiles_x + n_shown * (tile + _TILE_GAP) - _TILE_GAP - _MARGIN)
    notes = (
        [_BAR_NOTE]
        if n_shown and any(isinstance(row, LatentRow) for section in sections for row in section.rows)
        else []
    )
    captions = [line for text in [caption, *notes] for line in _wrapped(text, _SMALL, _GREY, width)]
    blocks: list[_Heading | _RowBlock] = [_Heading(_wrapped(title, _TITLE, _INK, width) + captions, 0)]
    for section, section_texts in zip(sections, texts):
        blocks.append(_Heading(_wrapped(section.title, _HEADING, _INK, width), _SECTION_GAP, width))
        if not section.rows:
            blocks.append(_Heading([_Line(f"no {section.unit}s", _SMALL, _GREY)], _ROW_GAP))
        blocks += [_RowBlock(row, lines, tiles_x, columns, tile) for row, lines in zip(section.rows, section_texts)]
    return blocks, width


@dataclass(frozen=True)
class _Heading:
    """Lines of text, and a rule below them if its width is not 0."""

    lines: Sequence["_Line"]
    space_above: int
    rule_width: int = 0

    @property
    def height(self) -> int:
        return _height(self.lines) + (6 if self.rule_width else 0)

    def draw(self, sheet: "Image", draw: "ImageDraw", y: int) -> None:
        _draw_lines(draw, self.lines, _MARGIN, y)
        if self.rule_width:
            bottom = y + self.height - 1
            draw.line([(_MARGIN, bottom), (_MARGIN + self.rule_width - 1, bottom)], fill=_RULE)


@dataclass(frozen=True)
class _RowBlock:
    """A latent: its text, and beside it the images from left to right, each above its bar or its caption."""

    row: LatentRow | Captioned
    lines: Sequence["_Line"]
    tiles_x: int
    columns: int
    tile: int
    space_above: int = _ROW_GAP

    @property
    def height(self) -> int:
        below = _BAR_HEIGHT if isinstance(self.row, LatentRow) else max(map(_height, self._captions), default=0)
        return max(_height(self.lines), self.tile + _BAR_GAP + below)

    @property
    def _captions(self) -> list[list["_Line"]]:
        if isinstance(self.row, LatentRow):
            return []
        return [
            [
                _fitted(text, _SMALL, _INK if i == len(caption) - 1 else _GREY, self.tile)
                for i, text in enumerate(caption)
            ]
            for caption in self.row.captions[: self.columns]
        ]

    def draw(self, sheet: "Image", draw: "ImageDraw", y: int) -> None:
        _draw_lines(draw, self.lines, _MARGIN, y - 2)  # the ink of a line begins a little below its top
        shown = self.row.images[: self.columns]
        xs, below = [self.tiles_x + i * (self.tile + _TILE_GAP) for i in range(len(shown))], y + self.tile + _BAR_GAP
        for x, image in zip(xs, shown):
            sheet.paste(_square(image, self.tile), (x, y))
        for x, lines in zip(xs, self._captions):
            _draw_lines(draw, lines, x, below - 2)
        if isinstance(self.row, LatentRow):
            largest = max(self.row.activations, default=0.0)
            for x, act in zip(xs, self.row.activations):
                self._draw_bar(draw, x, below, act / largest if largest > 0 else 0.0)

    def _draw_bar(self, draw: "ImageDraw", x: int, y: int, share: float) -> None:
        """A share of 0 or below, or NaN, is an empty bar."""
        draw.rectangle((x, y, x + self.tile - 1, y + _BAR_HEIGHT - 1), fill=_TRACK)
        length = round(self.tile * share) if share > 0 else 0
        if length:
            draw.rectangle((x, y, x + length - 1, y + _BAR_HEIGHT - 1), fill=_BAR)


def _square(image: "Image", side: int) -> "Image":
    """Cropped to the square in the middle and scaled: whole pixels enlarged where they fit, smooth else."""
    from PIL import Image, ImageOps

    multiple = image.width == image.height and side % image.width == 0
    filter = Image.Resampling.NEAREST if multiple else Image.Resampling.LANCZOS
    return ImageOps.fit(image.convert("RGB"), (side, side), filter)


# --- text ---


@dataclass(frozen=True)
class _Line:
    """One line of text, in characters that the font has."""

    text: str
    size: int
    colour: str

    @property
    def width(self) -> float:
        return _font(self.size).getlength(self.text)

    @property
    def height(self) -> int:
        return round(self.size * _LEADING)


def _height(lines: Sequence[_Line]) -> int:
    return sum(line.height for line in lines)


def _draw_lines(draw: "ImageDraw", lines: Sequence[_Line], x: int, y: int) -> None:
    for line in lines:
        draw.text((x, y), line.text, fill=line.colour, font=_font(line.size))
        y += line.height


def _row_lines(row: LatentRow | Captioned, unit: str) -> list[_Line]:
    """The nearest word, the others, then the numbers; or the title and the notes."""
    if isinstance(row, Captioned):
        notes = [line for note in row.notes for line in _clipped(note, _SMALL, _GREY)]
        return _clipped(row.title, _NAME, _INK) + notes
    numbers = [f"{unit} {row.latent}"]
    if row.score is not None:
        numbers.append(f"MS {row.score:.3f}" if math.isfinite(row.score) else "MS undefined")
    numbers += [f"active on {row.n_active:,} image{'' if row.n_active == 1 else 's'}"]
    lines = _clipped(row.names[0], _NAME, _INK) if row.names else []
    lines += _clipped(", ".join(row.names[1:]), _SMALL, _INK)
    return lines + [_Line(text, _SMALL, _GREY) for text in numbers] + _clipped(row.note, _SMALL, _GREY)


def _clipped(text: str, size: int, colour: str) -> list[_Line]:
    """At most _MOST_LINES of the column's width; what is left out is an ellipsis."""
    lines = _wrapped(text, size, colour, _MOST_TEXT)
    if len(lines) <= _MOST_LINES:
        return lines
    return [*lines[: _MOST_LINES - 1], _with_ellipsis(lines[_MOST_LINES - 1].text, size, colour, _MOST_TEXT)]


def _fitted(text: str, size: int, colour: str, width: int) -> _Line:
    """One line no wider than `width`."""
    lines = _wrapped(text, size, colour, width)
    return lines[0] if len(lines) == 1 else _with_ellipsis(_printable(text), size, colour, width)


def _with_ellipsis(text: str, size: int, colour: str, width: int) -> _Line:
    while text and _font(size).getlength(f"{text}…") > width:
        text = text[:-1]
    return _Line(f"{text.rstrip(' ,')}…", size, colour)


def _wrapped(text: str, size: int, colour: str, width: int) -> list[_Line]:
    """Lines no wider than `width`, broken between words; a word that is too long is broken within."""
    lines, line = [], ""
    for word in _pieces(_printable(text).split(), size, width):
        if line and _font(size).getlength(f"{line} {word}") > width:
            lines.append(line)
            line = word
        else:
            line = f"{line} {word}" if line else word
    return [_Line(text, size, colour) for text in [*lines, line] if text]


def _pieces(words: Sequence[str], size: int, width: int) -> Iterator[str]:
    for word in words:
        start = 0
        for end in range(1, len(word)):
            if _font(size).getlength(word[start : end + 1]) > width:
                yield word[start:end]
                start = end
        yield word[start:]


@lru_cache
def _font(size: int) -> Any:
    from PIL import ImageFont

    return ImageFont.load_default(size=size)


def _printable(text: str) -> str:
    """In the font's characters: without accents, "?" for what has no nearest."""
    letters = unicodedata.normalize("NFKD", text.translate(_PLAIN))
    shown = (" " if char.isspace() else char if _has_glyph(char) else "?" for char in letters if not _invisible(char))
    return "".join(shown)


def _invisible(char: str) -> bool:
    return unicodedata.category(char) in ("Mn", "Me", "Cf")


@lru_cache(maxsize=4096)
def _has_glyph(char: str) -> bool:
    """Whether the font draws something else than its sign for a missing character."""
    missing, mask = (_font(_SMALL).getmask(c) for c in ("\uffff", char))
    return (mask.size, bytes(mask)) != (missing.size, bytes(missing))
