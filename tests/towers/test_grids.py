"""Where the grid of a tower says that a patch is, there it is on the picture: heat maps are laid on pictures by it."""

import json

import numpy as np
import pytest
import torch
from narrow_towers import N_PATCHES, OPEN_CLIP, PREFIX, SIZE, TIMM, randomised, save_open_clip
from PIL import Image

from saevlm_fast.scoring.geometry import PatchGrid, covered, patch_grid
from saevlm_fast.scoring.image_rows import ImageTable
from saevlm_fast.towers.from_timm import wrap_timm
from saevlm_fast.towers.load import load_tower
from saevlm_fast.towers.tokens import Tokens, select_tokens
from saevlm_fast.towers.tower import HookPoint

FIRST = HookPoint("residual", 0)


def marked_picture(size, region, grid, place, marked):
    """Plain; or with noise where a patch of the tower's picture lies, if `region` is what the tower sees of it."""
    width, height = size
    pixels = np.full((height, width, 3), 128, np.uint8)
    if marked:
        left, top, right, bottom = region[0] * width, region[1] * height, region[2] * width, region[3] * height
        high, wide = (bottom - top) / grid[0], (right - left) / grid[1]
        ys = slice(round(top + place[0] * high), round(top + (place[0] + 1) * high))
        xs = slice(round(left + place[1] * wide), round(left + (place[1] + 1) * wide))
        pixels[ys, xs] = np.random.default_rng(0).choice([0, 255], pixels[ys, xs].shape)
    return Image.fromarray(pixels)


def check_grid(tower, n_prefix, side=SIZE):
    """Of a square picture, a wide one and a high one, the mark is seen at the token of its patch."""
    with tower.hooked([FIRST]) as run:
        layout = run.layout
        assert layout.n_prefix == n_prefix
        assert layout.grid is not None
        for size in ((side, side), (3 * side, 2 * side), (side, 2 * side)):
            check_mark(tower, run, layout, size)


def check_mark(tower, run, layout, size):
    place = 1, layout.grid[1] - 1
    region = covered({"model": tower.description()}, *size)
    pictures = [marked_picture(size, region, layout.grid, place, marked) for marked in (False, True)]
    acts_BTD = run(tower.preprocess(pictures))[FIRST]
    for text in ("all", "patches"):
        chosen = select_tokens(acts_BTD, Tokens.parse(text), layout, ["plain", "marked"], 0, None)
        tokens_2T = np.asarray(chosen.positions, np.int32).reshape(2, -1)
        n = tokens_2T.shape[1]
        table = ImageTable(np.arange(3) * n, tokens_2T.reshape(-1), None, None)
        grid = patch_grid(json.loads(json.dumps({"layout": layout.description()})), table)
        assert grid == PatchGrid(*layout.grid, layout.n_prefix)
        plain_TD, seen_TD = chosen.rows_MD.view(2, n, -1)
        moved_T = torch.linalg.vector_norm(seen_TD - plain_TD, dim=1).numpy()
        patch_T = tokens_2T[0] - grid.n_prefix
        patch = patch_T[np.where(patch_T >= 0, moved_T, -1).argmax()]
        assert divmod(int(patch), grid.columns) == place, size


@pytest.mark.parametrize("name", [name for name in PREFIX if name != "naflex"])
def test_of_transformers(saved, name):
    check_grid(load_tower(f"hf:{saved(name)[0]}"), PREFIX[name])


def test_naflex_has_a_grid_for_each_image_and_no_heat_maps(saved):
    with load_tower(f"hf:{saved('naflex')[0]}").hooked([FIRST]) as run:
        description = run.layout.description()
    table = ImageTable(np.arange(3) * N_PATCHES, np.tile(np.arange(N_PATCHES, dtype=np.int32), 2), None, None)
    assert patch_grid({"layout": description}, table) == "every image has a grid of its own"


@pytest.mark.parametrize("name", TIMM)
def test_of_timm(name):
    import timm

    options, n_prefix = TIMM[name]
    model = randomised(timm.create_model(name, num_classes=0, **options))
    side = timm.data.resolve_model_data_config(model)["input_size"][-1]
    check_grid(wrap_timm(model, f"timm:{name}"), n_prefix, side)


@pytest.mark.parametrize("name", OPEN_CLIP)
def test_of_open_clip(tmp_path, name):
    save_open_clip(tmp_path, name)
    check_grid(load_tower(f"open_clip:local-dir:{tmp_path}"), 1, OPEN_CLIP[name]["image_size"])
