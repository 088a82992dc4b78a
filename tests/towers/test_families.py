"""Every family of towers at every point: what its own library gives there, row by row, image by image."""

import functools

import numpy as np
import pytest
import torch
from many_towers import FAMILIES, SIZE, pictures, pooled_of, prepared
from PIL import Image

from saevlm_fast.towers.tokens import Tokens
from saevlm_fast.towers.tower import HookPoint

IDS = [f"{family.library} {family.name}" for family in FAMILIES]


@functools.cache
def harvested(number):
    """(family, tower, its points, run's shapes and layouts, activations of three pictures, mask of padding)."""
    family = FAMILIES[number]
    tower = family.make()
    kinds = ("residual",) if family.stages else ("residual", "attention", "mlp")
    points = [HookPoint(kind, layer) for layer in range(tower.n_blocks) for kind in kinds]
    points += [HookPoint(name) for name in tower.anatomy.image_points if given(family, tower, name)]
    with tower.hooked(points) as run:
        inputs = tower.preprocess(pictures())
        return family, tower, points, run, run(inputs), tower.token_mask(inputs)


def given(family, tower, name):
    """Whether the library gives the point: some outputs of transformers have no pooler_output."""
    if family.library != "transformers":
        return True
    with torch.inference_mode():
        return pooled_of(tower, prepared(tower, pictures(1))) is not None


def own_tokens(acts, mask):
    return [x if mask is None else x[mask[i]] for i, x in enumerate(acts)]


@pytest.mark.parametrize("number", range(len(FAMILIES)), ids=IDS)
def test_residuals_are_what_the_library_gives(number):
    family, tower, _, _, acts, mask = harvested(number)
    with torch.inference_mode():
        states = family.states(tower, prepared(tower, pictures()))
    assert len(states) == tower.n_blocks
    last = tower.n_blocks - 1
    for layer, expected in enumerate(states):
        found = own_tokens(acts[HookPoint("residual", layer)], mask)
        if layer == last and found[0].shape == expected[0].shape and not close(found, expected):
            norm = tower_norm(tower)  # some families put it into the last state
            found = [norm(x) for x in found]
        assert close(found, expected), f"layer {layer}"
    assert len({tuple(x.shape) for x in own_tokens(acts[HookPoint("residual", 0)], mask)}) > (family.grid is None)


def close(found, expected):
    pairs = list(zip(found, expected, strict=True))
    return all(x.shape == y.shape and torch.allclose(x, y, atol=1e-4, rtol=1e-4) for x, y in pairs)


def tower_norm(tower):
    names = ("norm", "layernorm", "layer_norm", "post_layernorm", "rms_norm", "ln_post", "fc_norm")
    inner = [tower.model, *(module for _, module in tower.model.named_children())]
    return next(getattr(module, name) for module in inner for name in names if hasattr(module, name))


@pytest.mark.parametrize("number", range(len(FAMILIES)), ids=IDS)
def test_attention_and_mlp_add_up(number):
    family, tower, _, _, acts, mask = harvested(number)
    if family.stages or not family.adds_up:
        pytest.skip("its blocks scale what they add, or are stages")
    for layer in range(1, tower.n_blocks):
        parts = [acts[HookPoint("residual", layer - 1)], *(acts[HookPoint(p, layer)] for p in ("attention", "mlp"))]
        total = own_tokens(sum(parts), mask)
        assert close(own_tokens(acts[HookPoint("residual", layer)], mask), total)


@pytest.mark.parametrize("number", range(len(FAMILIES)), ids=IDS)
def test_tokens_and_grid(number):
    family, _, points, run, acts, mask = harvested(number)
    residual = [point for point in points if point.point == "residual"]
    layout = run.layouts[residual[-1]]
    assert (layout.n_prefix, layout.has_cls, layout.grid) == (family.prefix, family.cls, family.grid)
    if family.grid is not None:
        assert run.rows_per_image(residual[-1], Tokens("patches")) == family.grid[0] * family.grid[1]
        assert layout.n_tokens == acts[residual[-1]].shape[1]
    else:
        assert run.rows_per_image(residual[-1], Tokens("patches")) >= int(mask.sum(1).max())
    assert not any(x.requires_grad for x in acts.values())


@pytest.mark.parametrize("number", range(len(FAMILIES)), ids=IDS)
def test_a_bright_square_is_where_its_patches_are(number):
    """The patch that changes most when one corner of a picture changes is the one in that corner: rows run across."""
    _, tower, points, _, _, _ = harvested(number)
    grey = np.full((SIZE, SIZE, 3), 128, np.uint8)
    corner = grey.copy()
    corner[: SIZE // 4, -SIZE // 4 :] = np.random.default_rng(0).integers(0, 256, (SIZE // 4, SIZE // 4, 3))
    with tower.hooked(points[:1]) as run:
        inputs = tower.preprocess([Image.fromarray(grey), Image.fromarray(corner)])
        acts = run(inputs)[points[0]]
        layout, grids = run.layouts[points[0]], tower.anatomy.form.grids(inputs)
    grid = grids[0] if grids else layout.grid
    if grid is None:  # NaFlex says its own
        grid = tuple(inputs["spatial_shapes"][0].tolist())
    change = (acts[1] - acts[0]).norm(dim=1)[layout.n_prefix :][: grid[0] * grid[1]].view(grid)
    row, column = divmod(int(change.argmax()), grid[1])
    assert (row < grid[0] / 2, column >= grid[1] / 2 or grid[1] == 1) == (True, True), change
