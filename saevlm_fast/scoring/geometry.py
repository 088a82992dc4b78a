"""Where on a picture the patches of a tower lie: the grid of a store's tokens, and the part of a picture it covers.

A tower sees a resized and cropped picture. What of the original that was follows from the preprocessing that the store
records, so patch values can be laid on the picture as it is, at its own aspect.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from saevlm_fast.records import object_of
from saevlm_fast.scoring.image_rows import ImageTable

_MOST_PREFIX = 16  # CLS and registers, where a store does not say how many
Region = tuple[float, float, float, float]  # left, top, right, bottom as shares of the picture; beyond 0 .. 1: padding
WHOLE: Region = (0.0, 0.0, 1.0, 1.0)


@dataclass(frozen=True)
class PatchGrid:
    """rows x columns patches, row by row; n_prefix: positions before the first patch (CLS, registers)."""

    rows: int
    columns: int
    n_prefix: int

    @property
    def n_patches(self) -> int:
        return self.rows * self.columns


def patch_grid(source: Mapping[str, Any] | None, table: ImageTable) -> PatchGrid | str:
    """The grid, if the store has all patches of every image; else why there are no heat maps, in words."""
    if table.tokens_R is None:
        return "the rows have no token positions (a matrix file)"
    sizes = np.diff(table.offsets_N1)
    n_rows = int(sizes[0])
    if n_rows < 4 or table.rows_per_image == 1:
        return "the store has one row an image, not its patches"
    if not bool((sizes == n_rows).all()):
        return "images differ in their number of tokens (padding, or a choice of tokens)"
    positions = table.tokens_R.reshape(-1, n_rows)
    if not bool((positions == positions[0]).all()) or not bool((np.diff(positions[0]) == 1).all()):
        return "the store has a choice of tokens, not all patches"
    layout = (source or {}).get("layout")
    if isinstance(layout, dict):
        grid = layout.get("grid")
        if grid is None:
            return "every image has a grid of its own"
        found = PatchGrid(int(grid[0]), int(grid[1]), int(layout["n_prefix"]))
    else:  # of an older store
        side = math.isqrt(n_rows)
        n_prefix = n_rows - side * side if positions[0][0] == 0 else int(positions[0][0])
        if n_prefix > _MOST_PREFIX or positions[0][-1] + 1 != n_prefix + side * side:
            return "the store does not say how its patches lie"
        found = PatchGrid(side, side, n_prefix)
    first, last = int(positions[0][0]), int(positions[0][-1])
    whole = first <= found.n_prefix and last + 1 == found.n_prefix + found.n_patches
    return found if whole else "the store lacks some of the patches"


def covered(source: Mapping[str, Any] | None, width: int, height: int) -> Region:
    """The part of a picture of that size that the tower sees, by the preprocessing in the store's record.

    Of a preprocessing that is not understood: the whole.
    """
    model = object_of((source or {}).get("model"))
    preprocess = object_of(model.get("preprocess"))
    settings = preprocess.get("settings", preprocess)
    if model.get("square"):  # what is cropped then is cropped from a square
        width = height = int(model["square"])
    try:
        return _covered(settings, width, height)
    except (KeyError, TypeError, ValueError, IndexError, ZeroDivisionError):
        return WHOLE


def _covered(settings: Mapping[str, Any], width: int, height: int) -> Region:
    if "resize_mode" in settings:  # open_clip
        side = _pair(settings["size"])
        return _region(_resized(settings["resize_mode"], side, width, height), side)
    if "crop_pct" in settings or "input_size" in settings:  # timm
        crop = tuple(int(each) for each in settings["input_size"][-2:])
        if settings.get("crop_mode", "center") == "squash":
            return WHOLE
        share = float(settings.get("crop_pct") or 1.0)
        return _region(_resized("shortest", (int(crop[0] / share), int(crop[1] / share)), width, height), crop)
    if settings.get("image_grid_pinpoints") is not None or settings.get("do_resize") is False:
        return WHOLE  # of tiles the first is the whole picture
    size = settings.get("size") or {}
    filled_up = settings.get("pad_size") if "mask_pad_size" in settings else None  # SAM's
    if filled_up or "max_image_tiles" in settings or "resize_to_max_canvas" in settings:  # Mllama's, Llama 4's
        tile = _pair(filled_up or size)  # in whose upper left the picture is
        height_, width_ = _resized("longest", tile, width, height)
        return 0.0, 0.0, tile[1] / width_, tile[0] / height_
    if size.get("shortest_edge"):
        resized = _resized("shortest", (int(size["shortest_edge"]),) * 2, width, height)
    elif size.get("longest_edge"):
        resized = _resized("longest", (int(size["longest_edge"]),) * 2, width, height)
    else:
        resized = (float(size["height"]), float(size["width"]))
    if not settings.get("do_center_crop"):
        return WHOLE
    return _region(resized, _pair(settings["crop_size"]))


def _pair(value: Any) -> tuple[int, int]:
    """(height, width) of a number, a list or a mapping."""
    if isinstance(value, Mapping):
        if "height" in value:
            return int(value["height"]), int(value["width"])
        return int(value["shortest_edge"]), int(value["shortest_edge"])
    return (int(value), int(value)) if isinstance(value, int) else (int(value[0]), int(value[1]))


def _resized(mode: str, side: tuple[int, ...], width: int, height: int) -> tuple[float, float]:
    """(height, width) after resizing to a target of (height, width)."""
    if mode == "squash":
        return float(side[0]), float(side[1])
    scales = (side[0] / height, side[1] / width)
    scale = max(scales) if mode == "shortest" else min(scales)
    return height * scale, width * scale


def _region(resized: tuple[float, float], crop: tuple[int, ...]) -> Region:
    """Of a resized picture, both (height, width), the crop in the middle, as shares of it."""
    y, x = (1 - crop[0] / resized[0]) / 2, (1 - crop[1] / resized[1]) / 2
    return x, y, 1 - x, 1 - y
