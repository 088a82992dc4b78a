"""Labels of patches from segmentation masks: pictures of the images' own size, whose pixels are numbers of classes.

The rule. A patch is asked at 16 x 16 points, evenly spaced in the part of the picture that it sees after the tower's
resizing and cropping, each of the pixel that it lies in. It has the class that at least `share` of these points have
(of two that have half each, the lower number). If none has, the patch is left out: it is mixed, or too much of it is
unknown. Pixels of a value in `ignore` are unknown, and so is what the tower pads around the picture. Rows that are no
patches (CLS, registers) and images without a mask are left out.

A class such as 0, for background, is a label like any other unless it is in `ignore`.
Shape suffixes: N images, R rows (patches) of all images, P patches of an image, Q points of a patch.
"""

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from saevlm_fast.data.label_sets import LabelSet
from saevlm_fast.data.rows import Activations
from saevlm_fast.errors import first_line, require
from saevlm_fast.scoring.geometry import PatchGrid, Region, covered, patch_grid
from saevlm_fast.scoring.image_rows import image_table

POINTS = 16  # a side: the patches of a ViT/16 at its own resolution
SET = "patches"  # the name of the label set
_SUFFIXES = (".png", ".bmp", ".tif", ".tiff", ".gif")
_MODES = ("1", "L", "P", "I", "I;16")
_MOST_PIXELS = 1 << 28


@dataclass(frozen=True)
class MaskRule:
    """How pixels become a label: see the module.

    share: of a patch, from .5 to 1. ignore: values that say nothing. names: of values; others are called by number.

    Raises:
        ValueError: a share below .5, by which a patch could have two labels, or above 1.
    """

    share: float = 0.5
    ignore: tuple[int, ...] = (255,)
    names: Mapping[int, str] | None = None

    def __post_init__(self) -> None:
        require(0.5 <= self.share <= 1, f"mask_share: {self.share} is not from 0.5 to 1")

    def name(self, value: int) -> str:
        return (self.names or {}).get(value, str(value))


def patch_labels(activations: Activations, folder: Path, rule: MaskRule) -> tuple[LabelSet, int]:
    """(labels of the rows of a store of patches, how many images have a mask).

    folder/ID with another suffix (.png, say) is the mask of image ID.

    Raises:
        ValueError: a store that has not all patches of its images, no masks, a mask that is damaged or in colours.
    """
    require(folder.is_dir(), f"masks: {folder} is not a directory")
    table = image_table(activations)
    grid = patch_grid(activations.source, table)
    if isinstance(grid, str):
        raise ValueError(f"masks: {activations.path}: {grid}; labels of patches need a store of all patches")
    assert table.ids is not None  # patch_grid has seen to it
    assert table.tokens_R is not None
    value_R = np.full(table.offsets_N1[-1], -1, np.int64)
    n_found = 0
    for i, (start, end) in enumerate(zip(table.offsets_N1, table.offsets_N1[1:])):
        path = _mask_of(folder, table.ids[i].as_py())
        if path is None:
            continue
        n_found += 1
        mask = read_mask(path)
        value_P = values_of_patches(mask, covered(activations.source, mask.shape[1], mask.shape[0]), grid, rule)
        place_R = table.tokens_R[start:end] - grid.n_prefix
        inside = place_R >= 0
        value_R[start:end][inside] = value_P[place_R[inside]]
    require(n_found > 0, f"masks: {folder} has no mask of any image, such as {table.ids[0].as_py()!r} with .png")
    known = value_R >= 0
    require(bool(known.any()), f"masks: {folder}: no patch has one class on {rule.share:.0%} of it")
    return _label_set(value_R, known, rule), n_found


def _label_set(value_R: np.ndarray, known_R: np.ndarray, rule: MaskRule) -> LabelSet:
    by_name: dict[str, list[int]] = {}
    for value in np.unique(value_R[known_R]).tolist():
        by_name.setdefault(rule.name(value), []).append(value)
    names = sorted(by_name)
    number = {value: i for i, name in enumerate(names) for value in by_name[name]}
    values, places = np.unique(value_R[known_R], return_inverse=True)
    labels_M = np.array([number[value] for value in values.tolist()], np.int32)[places]
    return LabelSet(SET, tuple(names), labels_M, np.concatenate([[0], known_R.cumsum()]), known_R)


def _mask_of(folder: Path, identity: str) -> Path | None:
    """ID.png, or ID with its own suffix replaced; never outside of the folder."""
    inside = folder / identity
    if not inside.resolve().is_relative_to(folder.resolve()):
        return None
    candidates = [path for suffix in _SUFFIXES for path in (inside.with_suffix(suffix), Path(f"{inside}{suffix}"))]
    return next((path for path in candidates if path.is_file()), None)


def read_mask(path: Path) -> np.ndarray:
    """Numbers of classes [H, W], int64. ValueError: damaged, in colours, or too large."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as picture:
            require(
                picture.mode in _MODES,
                f"masks: {path} has colours (mode {picture.mode}); a mask has one number a pixel",
            )
            require(
                picture.width * picture.height <= _MOST_PIXELS,
                f"masks: {path} has {picture.width} x {picture.height} pixels, more than {_MOST_PIXELS:,}",
            )
            return np.asarray(picture).astype(np.int64)
    except (OSError, UnidentifiedImageError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"masks: {path}: {first_line(error)}") from None


def values_of_patches(mask_HW: np.ndarray, region: Region, grid: PatchGrid, rule: MaskRule) -> np.ndarray:
    """[P]: the class of every patch, row by row; -1 of those that are left out."""
    left, top, right, bottom = region
    height, width = mask_HW.shape
    x = np.floor(width * (left + (right - left) * _middles(grid.columns))).astype(np.int64)
    y = np.floor(height * (top + (bottom - top) * _middles(grid.rows))).astype(np.int64)
    seen = ((y >= 0) & (y < height))[:, None] & ((x >= 0) & (x < width))[None]
    found = mask_HW[np.clip(y, 0, height - 1)[:, None], np.clip(x, 0, width - 1)[None]]
    found = np.where(seen & ~np.isin(found, rule.ignore) & (found >= 0), found, -1)
    sides = grid.rows, POINTS, grid.columns, POINTS
    points_PQ = np.sort(found.reshape(sides).transpose(0, 2, 1, 3).reshape(grid.n_patches, -1), axis=1)
    # Of sorted values a class that has half of them or more stands at the middle, or just before it.
    need, n = int(np.ceil(rule.share * POINTS**2 - 1e-9)), POINTS**2
    value_P = np.full(grid.n_patches, -1, np.int64)
    for candidate in (points_PQ[:, n // 2], points_PQ[:, n // 2 - 1]):
        enough = ((points_PQ == candidate[:, None]).sum(1) >= need) & (candidate >= 0)
        value_P = np.where(enough, candidate, value_P)
    return value_P


def _middles(n: int) -> np.ndarray:
    """Of n x POINTS equal parts of 0 .. 1."""
    return (np.arange(n * POINTS) + 0.5) / (n * POINTS)


def read_names(path: Path) -> dict[int, str]:
    """Names of values: lines `value,name`, a header or none. ValueError: another file, a value twice."""
    require(path.is_file(), f"mask_names: {path} is not a file")
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            lines = [[cell.strip() for cell in line] for line in csv.reader(file, strict=True) if line]
    except (OSError, ValueError, csv.Error) as error:
        raise ValueError(f"mask_names: {path}: {first_line(error)}") from None
    lines = lines[1:] if lines and not _is_number(lines[0][0]) else lines
    found: dict[int, str] = {}
    for number, line in enumerate(lines, 1):
        fits = len(line) == 2 and _is_number(line[0]) and line[1] != ""
        require(fits, f"mask_names: {path}: line {number} is not a value and a name: {line}")
        require(int(line[0]) not in found, f"mask_names: {path}: value {line[0]} stands twice")
        found[int(line[0])] = line[1]
    require(bool(found), f"mask_names: {path} has no line of a value and a name")
    return found


def _is_number(cell: Any) -> bool:
    return isinstance(cell, str) and cell.isdecimal()
