"""Every family of towers at every point: what its own library gives there, row by row, image by image."""

import pytest
import torch
from many_towers import FAMILIES, harvested
from tower_makers import SIZE, pictures, prepared
from tower_table import PAGE, page_with, table

from saevlm_fast.data.rows import open_activations
from saevlm_fast.towers.tokens import Tokens
from saevlm_fast.towers.tower import HookPoint

CASES = [
    pytest.param(number, id=f"{family.library} {family.name}", marks=[pytest.mark.families] if family.marked else [])
    for number, family in enumerate(FAMILIES)
]


@pytest.fixture(autouse=True)
def _asked_for(request):
    if request.node.get_closest_marker("families") and "families" not in request.config.getoption("markexpr"):
        pytest.skip("needs no code of its own: pytest -m families")


def own_tokens(acts, mask):
    return [x if mask is None else x[mask[i]] for i, x in enumerate(acts)]


@pytest.mark.parametrize("number", CASES)
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


@pytest.mark.parametrize("number", CASES)
def test_attention_and_mlp_add_up(number):
    family, tower, _, _, acts, mask = harvested(number)
    if family.stages or not family.adds_up or "mlp" not in family.kinds:
        pytest.skip("its blocks scale what they add, or are stages")
    for layer in range(1, tower.n_blocks):
        parts = [acts[HookPoint("residual", layer - 1)], *(acts[HookPoint(p, layer)] for p in ("attention", "mlp"))]
        total = own_tokens(sum(parts), mask)
        assert close(own_tokens(acts[HookPoint("residual", layer)], mask), total)


@pytest.mark.parametrize("number", CASES)
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


@pytest.mark.parametrize("number", CASES)
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


@pytest.mark.parametrize("number", CASES)
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
    page = PAGE.read_text(encoding="utf-8").splitlines()
    assert [row for row in table(marked=False).splitlines() if row not in page] == [], (
        "run tests/helpers/tower_table.py"
    )


@pytest.mark.families
def test_the_whole_table_of_towers_is_what_is_found():
    assert PAGE.read_text(encoding="utf-8") == page_with(table(marked=True)), "run tests/helpers/tower_table.py"


@pytest.mark.parametrize("name", ["Qwen2.5-VL", "SigLIP 2 NaFlex", "Pixtral, Mistral3", "CLIP"])
def test_squares_have_one_grid_and_heat_maps(name, tmp_path):
    """From harvest to the map of a picture: the corner that was changed is where the map says."""
    from saevlm_fast.config import HarvestOptions
    from saevlm_fast.harvesting.config import HarvestConfig
    from saevlm_fast.harvesting.run import harvest
    from saevlm_fast.images.open import open_images
    from saevlm_fast.scoring.geometry import PatchGrid, covered, patch_grid
    from saevlm_fast.scoring.image_rows import image_table

    (family,) = [each for each in FAMILIES if (each.name, each.library) == (name, "transformers")]
    (tmp_path / "photos").mkdir()
    for i, picture in enumerate(pictures()):
        picture.save(tmp_path / "photos" / f"{i}.png")
    tower = family.make()
    source, options = open_images(tmp_path / "photos"), HarvestOptions(output=tmp_path / "out", workers=0)
    config = HarvestConfig(points=(HookPoint("residual", 1),), tokens=(Tokens("patches"),), square=SIZE, batch_size=3)
    harvest(source, tower, config, options)
    rows = open_activations(tmp_path / "out")
    grid = patch_grid(rows.source, image_table(rows))
    assert grid == PatchGrid(4, 4, family.prefix)
    assert covered(rows.source, 640, 480) == (0, 0, 1, 1)
    assert rows.source["model"]["square"] == SIZE
    maps = rows.rows(torch.arange(rows.n_rows)).view(5, 16, -1)
    row, column = divmod(int((maps[4] - maps[3]).norm(dim=1).argmax()), 4)
    assert (row, column) == (0, 3)
    assert tower.anatomy.one_grid is False  # of the tower that was given nothing has changed


def test_the_part_of_a_picture_that_patches_are_of():
    """Mllama fills a tile up to the right and below; a square is seen whole, or as its preprocessing crops it."""
    from saevlm_fast.scoring.geometry import covered

    mllama = {"preprocess": {"size": {"height": 32, "width": 32}, "max_image_tiles": 1}}
    assert covered({"model": mllama}, 640, 480) == (0, 0, 1, pytest.approx(4 / 3))
    crop = {"size": {"shortest_edge": 40}, "do_center_crop": True, "crop_size": {"height": 32, "width": 32}}
    whole = pytest.approx((0.1, 0.1, 0.9, 0.9))
    assert covered({"model": {"preprocess": crop, "square": 64}}, 640, 480) == whole
    assert covered({"model": {"preprocess": crop}}, 640, 480) != whole
