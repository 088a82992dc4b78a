"""The crop that README shows: one row of each section of the demo's picture, under a heading of its own.

    python bench/readme_picture.py docs/demo.png docs/demo_row.png

The row is the second of its section where there are several: the first of each section stands for the same word. Bands
of ink are told apart by blank rows, headings by the rule below them, so any picture of the command `demo` will do.
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

HEADINGS = (
    "A raw neuron",
    "A latent of a BatchTopK SAE",
    "A latent of a Matryoshka SAE",
    "A latent clamped: answers before and after",
)
INK, RULE, PAPER = "#17212b", (217, 223, 229), (255, 255, 255)
LEAST_GAP = 14  # blank rows between two bands; lines of text are nearer than that
MARGIN, SPACE, HEADING = 24, 18, 19


def bands(pixels_HW3: np.ndarray) -> list[tuple[int, int]]:
    """(first row, row after the last) of every band of ink."""
    inked = np.flatnonzero((pixels_HW3 != PAPER).any(axis=(1, 2)))
    breaks = np.flatnonzero(np.diff(inked) > LEAST_GAP)
    starts, ends = inked[np.r_[0, breaks + 1]], inked[np.r_[breaks, len(inked) - 1]] + 1
    return list(zip(starts.tolist(), ends.tolist()))


def sections(pixels_HW3: np.ndarray) -> list[list[tuple[int, int]]]:
    """The rows of every section, in order; a band whose last row is a rule is a heading."""
    found: list[list[tuple[int, int]]] = []
    for start, end in bands(pixels_HW3):
        if (pixels_HW3[end - 1] == RULE).all(axis=1).mean() > 0.8:
            found.append([])
        elif found:
            found[-1].append((start, end))
    return found


def crop(sheet: Image.Image) -> Image.Image:
    pixels_HW3 = np.asarray(sheet)
    columns = np.flatnonzero((pixels_HW3 != PAPER).any(axis=(0, 2)))
    left, right = int(columns[0]), int(columns[-1]) + 1
    rows = [section[min(1, len(section) - 1)] for section in sections(pixels_HW3)]
    if len(rows) != len(HEADINGS):
        raise ValueError(f"{len(rows)} sections found, {len(HEADINGS)} expected")
    line = round(HEADING * 1.32) + 10
    height = sum(end - start + line for start, end in rows) + SPACE * (len(rows) - 1)
    picture = Image.new("RGB", (right - left + 2 * MARGIN, height + 2 * MARGIN), PAPER)
    draw, font, y = ImageDraw.Draw(picture), ImageFont.load_default(size=HEADING), MARGIN
    for heading, (start, end) in zip(HEADINGS, rows):
        draw.text((MARGIN, y), heading, fill=INK, font=font)
        picture.paste(sheet.crop((left, start, right, end)), (MARGIN, y + line))
        y += line + end - start + SPACE
    return picture


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sheet", type=Path, help="picture of the demo")
    parser.add_argument("output", type=Path, help="the crop, a PNG")
    options = parser.parse_args()
    picture = crop(Image.open(options.sheet).convert("RGB"))
    # The scenes' noise is most of the file: without its last bit the file is smaller and looks the same.
    picture.point(lambda value: value | 1).save(options.output, optimize=True)
    print(f"wrote {options.output}: {picture.width} x {picture.height}, {options.output.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
