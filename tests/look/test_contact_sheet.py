"""Contact sheets: where tiles, bars and text are, found in the pixels; text that does not fit; files."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from saevlm_fast.look.contact_sheet import Captioned, LatentRow, Section, draw_sheet, save_sheet

COLOURS = [(200, 40 + 20 * i, 250 - 25 * i) for i in range(9)]  # none is a colour of the sheet's own
BAR, TRACK = (47, 111, 181), (234, 238, 242)
LONG = "Donaudampfschifffahrtsgesellschaftskapitän " * 9


def plain(colour, size=(48, 48)) -> Image.Image:
    return Image.new("RGB", size, colour)


def row(n_images: int = 3, latent: int = 7, names=("red", "star"), size=(48, 48)) -> LatentRow:
    images = [plain(COLOURS[i], size) for i in range(n_images)]
    return LatentRow(latent, 0.8125, 1234, list(names), images, [1.0 / (i + 1) for i in range(n_images)])


def where(sheet: Image.Image, colour) -> tuple[int, int, int, int]:
    """(left, top, right, bottom), the last two exclusive, of the pixels of a colour."""
    y, x = np.nonzero((np.asarray(sheet) == colour).all(axis=2))
    return x.min(), y.min(), x.max() + 1, y.max() + 1


def ink(sheet: Image.Image, left: int, top: int, right: int, bottom: int) -> int:
    """Pixels within a rectangle that are not paper."""
    return int((np.asarray(sheet)[top:bottom, left:right] != 255).any(axis=2).sum())


@pytest.mark.parametrize("tile", [96, 64])
@pytest.mark.parametrize("size", [(48, 48), (500, 336), (30, 41), (96, 96)])
def test_tiles_stand_in_a_row_equally_large_and_apart(tile, size):
    sheet = draw_sheet("Title", "caption", [Section("Best", [row(9, size=size)])], columns=8, tile=tile)
    boxes = [where(sheet, colour) for colour in COLOURS[:8]]
    assert all((right - left, bottom - top) == (tile, tile) for left, top, right, bottom in boxes)
    assert len({top for _, top, _, _ in boxes}) == 1
    steps = {second[0] - first[0] for first, second in itertools.pairwise(boxes)}
    assert len(steps) == 1
    assert steps.pop() > tile
    assert boxes[-1][2] < sheet.width
    assert not (np.asarray(sheet) == COLOURS[8]).all(axis=2).any()


def test_bars_are_as_long_as_the_activations():
    images = [plain(colour) for colour in COLOURS[:5]]
    sheet = draw_sheet("", "", [Section("", [LatentRow(0, 0.5, 9, [], images, [8.0, 4.0, 0.0, -1.0, float("nan")])])])
    lengths, pixels = [], np.asarray(sheet)
    for colour in COLOURS[:5]:
        left, _, right, bottom = where(sheet, colour)
        bar = pixels[bottom : bottom + 12, left:right]
        lengths.append(int((bar == BAR).all(axis=2).any(axis=0).sum()))
        assert ((bar == BAR) | (bar == TRACK)).all(axis=2).any(axis=0).all()
    assert lengths == [96, 48, 0, 0, 0]


def test_small_images_are_enlarged_pixel_by_pixel_and_photos_cropped_in_the_middle():
    noise = np.random.default_rng(0).integers(1, 250, (48, 48, 3), dtype=np.uint8)
    wide = np.zeros((100, 300, 3), dtype=np.uint8)
    wide[:, :100], wide[:, 100:200], wide[:, 200:] = COLOURS[1], COLOURS[2], COLOURS[3]
    images = [plain(COLOURS[0]), Image.fromarray(noise), Image.fromarray(wide)]
    sheet = draw_sheet("", "", [Section("", [LatentRow(0, 0.5, 3, [], images, [3.0, 2.0, 1.0])])])
    left, top, right, _ = where(sheet, COLOURS[0])
    x = right + (where(sheet, COLOURS[2])[0] - right - 96) // 2  # the gaps left and right of the second are equal
    enlarged = np.asarray(sheet)[top : top + 96, x : x + 96]
    assert (enlarged == noise.repeat(2, axis=0).repeat(2, axis=1)).all()
    left, _, right, _ = where(sheet, COLOURS[2])
    assert right - left >= 94
    assert not (np.asarray(sheet) == COLOURS[1]).all(axis=2).any()


def test_other_modes_become_rgb():
    images = [Image.new(mode, (48, 48)) for mode in ("L", "RGBA", "P", "1", "CMYK")]
    sheet = draw_sheet("t", "c", [Section("s", [LatentRow(0, 0.5, 5, ["x"], images, [1.0] * 5)])])
    assert sheet.mode == "RGB"


@pytest.mark.parametrize("names", [[], ["red"], ["a b c"] * 40, [LONG, LONG, LONG]])
def test_text_is_there_and_touches_neither_tiles_nor_edges(names):
    sheet = draw_sheet(LONG, LONG, [Section(LONG, [row(names=names), row(2, names=names)])])
    left, top, _, bottom = where(sheet, COLOURS[0])
    assert ink(sheet, 36, top, left - 20, bottom) > 300
    assert ink(sheet, left - 20, top, left, sheet.height) == 0
    assert ink(sheet, 36, 30, sheet.width - 36, top) > 1000
    for edge in ((0, 0, 30, sheet.height), (sheet.width - 30, 0, sheet.width, sheet.height)):
        assert ink(sheet, *edge) == 0
    assert ink(sheet, 0, 0, sheet.width, 30) == ink(sheet, 0, sheet.height - 30, sheet.width, sheet.height) == 0


def test_rows_do_not_overlap_when_text_is_higher_than_tiles():
    """Between two rows there are lines without any ink."""
    high = LatentRow(1, 0.5, 3, [LONG, LONG], [plain(COLOURS[0])], [1.0])
    sheet = draw_sheet("", "", [Section("", [high, LatentRow(2, 0.5, 3, ["x"], [plain(COLOURS[1])], [1.0])])], tile=32)
    empty = (np.asarray(sheet) == 255).all(axis=(1, 2))
    first, second = where(sheet, COLOURS[0]), where(sheet, COLOURS[1])
    runs = np.diff(np.flatnonzero(np.diff(empty[first[3] : second[1] + 1].astype(int))))
    assert second[1] - first[1] > 100
    assert (runs >= 10).any()


def test_heights_add_up():
    heights = [draw_sheet("t", "c", [Section("s", [row()] * n)]).height for n in (1, 2, 5)]
    step = heights[1] - heights[0]
    assert heights[2] == heights[0] + 4 * step
    assert 96 < step < 160
    twice = draw_sheet("t", "c", [Section("s", [row()]), Section("s", [row()])]).height
    assert twice > heights[1]


def test_columns_of_all_sections_line_up():
    sections = [Section("a", [row(1, names=["x"])]), Section("b", [row(2, names=["a much longer name"])], "neuron")]
    sheet = draw_sheet("t", "c", sections)
    pixels = (np.asarray(sheet) == COLOURS[0]).all(axis=2)
    assert len({tuple(np.flatnonzero(line)) for line in pixels if line.any()}) == 1
    assert pixels.sum() == 2 * 96 * 96


@pytest.mark.parametrize(
    "sections", [[], [Section("none", [])], [Section("dead", [LatentRow(3, float("nan"), 0, [], [], [])])]]
)
def test_a_sheet_without_images(sections):
    sheet = draw_sheet("Title", "caption", sections)
    assert sheet.width > 400
    assert ink(sheet, 0, 0, *sheet.size) > 200


@pytest.mark.parametrize(
    "name", ["日本語", "café naïve", "😀", "a\nb\tc\0", "e\u0301\u200d", "\u2013\u2212\xd7ß", "", " ", "\ud800"]
)
def test_any_character_can_be_drawn(name):
    sheet = draw_sheet(name, name, [Section(name, [row(names=[name, name])])])
    assert where(sheet, COLOURS[0])[2] > 0


def test_accents_are_left_out_and_the_rest_is_a_question_mark():
    drawn, plainly = (draw_sheet(text, "c", []) for text in ("café \u2013 naïve 日", "cafe - naive ?"))
    assert drawn == plainly


def test_equal_arguments_equal_pixels_and_bytes(tmp_path):
    first, second = (draw_sheet("Title", "c", [Section("s", [row(), row(1)])]) for _ in range(2))
    assert first == second
    for name, sheet in (("a.png", first), ("b.PNG", second)):
        save_sheet(sheet, tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.PNG").read_bytes()
    with Image.open(tmp_path / "a.png") as read:
        assert read.format == "PNG"
        assert (np.asarray(read) == np.asarray(first)).all()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.png", "b.PNG"]


def test_bad_input_is_refused_in_one_line(tmp_path):
    with pytest.raises(ValueError, match=r"^path: .*sheet.jpg must end in .png"):
        save_sheet(plain(COLOURS[0]), tmp_path / "sheet.jpg")
    with pytest.raises(ValueError, match=r"^columns: 0 must be at least 1"):
        draw_sheet("t", "c", [], columns=0)
    with pytest.raises(ValueError, match=r"^tile: 8 must be at least 16"):
        draw_sheet("t", "c", [], tile=8)
    with pytest.raises(ValueError, match=r"^activations: 1 for the 2 images of latent 5"):
        LatentRow(5, 0.5, 2, [], [plain(COLOURS[0])] * 2, [1.0])


def test_long_words_are_broken_and_nothing_of_a_title_is_lost():
    empty, once, tenfold = (
        ink(sheet, 0, 0, *sheet.size) for sheet in (draw_sheet("W" * n, "", []) for n in (0, 15, 150))
    )
    assert empty == 0
    assert tenfold == pytest.approx(10 * once, rel=0.05)


def test_words_stand_under_their_image_and_no_wider():
    images = [plain(COLOURS[0]), plain(COLOURS[1])]
    captioned = Captioned("teal", ["latent 3"], images, [("", "a long answer " * 9), ("cyan", "teal")])
    sheet = draw_sheet("Steering", "", [Section("answers", [captioned])])
    bare = draw_sheet("Steering", "", [Section("answers", [replace(captioned, captions=[(), ()])])])
    assert sheet.height > bare.height
    tiles = [where(sheet, colour) for colour in COLOURS[:2]]
    for left, _, right, bottom in tiles:
        assert ink(sheet, left, bottom, right, sheet.height) > 50 > ink(bare, left, bottom, right, bare.height) == 0
    assert ink(sheet, tiles[0][2], tiles[0][3], tiles[1][0], sheet.height) == 0  # between the images nothing
    with pytest.raises(ValueError, match="captions: 1 for the 2 images of 'teal'"):
        replace(captioned, captions=[("cyan",)])
    with pytest.raises(ValueError, match="captions: not equally many lines, 'teal'"):
        replace(captioned, captions=[("cyan",), ("cyan", "teal")])
