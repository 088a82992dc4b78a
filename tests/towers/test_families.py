"""Every family of towers at every point: what its own library gives there, row by row, image by image."""

import pytest
import torch
from many_towers import FAMILIES, harvested, pictures, prepared
from tower_table import PAGE, page_with, table

from saevlm_fast.towers.tokens import Tokens
from saevlm_fast.towers.tower import HookPoint

IDS = [f"{family.library} {family.name}" for family in FAMILIES]


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
def test_a_corner_that_changes_is_where_its_patches_are(number):
    """Of the patches of the last two pictures those in the upper right change most: rows run across."""
    _, tower, points, run, acts, _ = harvested(number)
    inputs, layout = tower.preprocess(pictures()[3:]), run.layouts[points[0]]
    grids = tower.anatomy.form.grids(inputs) or [layout.grid or tuple(inputs["spatial_shapes"][0].tolist())]
    height, width = grids[0]
    before, after = (acts[points[0]][i, layout.n_prefix :][: height * width] for i in (3, 4))
    row, column = divmod(int((after - before).norm(dim=1).argmax()), width)
    assert row < max(1, height / 2)
    assert column >= width / 2 or width == 1


@pytest.mark.parametrize("number", range(len(FAMILIES)), ids=IDS)
def test_points_of_the_whole_image_are_what_the_library_gives(number):
    family, tower, _, _, acts, _ = harvested(number)
    if not {"pooled", "projection"} & {point.point for point in acts}:
        pytest.skip("it has none")
    with torch.inference_mode():
        inputs = prepared(tower, pictures())
        output = family.pooled(tower, inputs)
    for name, expected in zip(("projection", "pooled"), output):
        if HookPoint(name) in acts:
            assert close([acts[HookPoint(name)]], [expected])


def test_the_table_of_towers_is_what_is_found():
    assert PAGE.read_text(encoding="utf-8") == page_with(table()), "run python tests/helpers/tower_table.py"
