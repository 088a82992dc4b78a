"""Statistics, neighbours, heat maps and regions of a report: against the plain way."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from saevlm_fast.config import SAEConfig
from saevlm_fast.data.label_sets import LabelSet
from saevlm_fast.data.rows import activations_of
from saevlm_fast.images.decode import decode
from saevlm_fast.look import near
from saevlm_fast.look.heat import heat_maps
from saevlm_fast.look.neighbours import co_firing, decoder_neighbours
from saevlm_fast.look.sets import top_sets
from saevlm_fast.look.spill import Spill
from saevlm_fast.look.sprites import thumbnail
from saevlm_fast.look.stats import LOWEST_OCTAVE, N_BANDS, latent_stats
from saevlm_fast.measures.codes import KeptCodes
from saevlm_fast.measures.hierarchy import hierarchy
from saevlm_fast.measures.results import wilson
from saevlm_fast.measures.taxonomy import Taxonomy
from saevlm_fast.measures.uniqueness import uniqueness
from saevlm_fast.sae import SparseAutoencoder
from saevlm_fast.scoring.geometry import PatchGrid, covered, patch_grid
from saevlm_fast.scoring.image_rows import ImageTable
from saevlm_fast.sparse_codes import SparseCodes

N, S = 60, 12


def sparse(dense):
    rows, latents = dense.nonzero(as_tuple=True)
    offsets = torch.nn.functional.pad((dense > 0).sum(1).cumsum(0), (1, 0))
    return SparseCodes.from_flat(dense[rows, latents], latents, offsets, dense.shape[1])


def spilled(path, dense, at_once=17):
    spill = Spill(path, dense.shape[1])
    assert not spill.is_finished
    for start in range(0, len(dense), at_once):
        spill.append(sparse(dense[start : start + at_once]))
    spill.finish()
    assert spill.is_finished
    return spill


@pytest.fixture(scope="module")
def dense():
    random = torch.Generator().manual_seed(3)
    values = torch.rand(N, S, generator=random) * 5
    values[torch.rand(N, S, generator=random) < 0.6] = 0
    values[:, 4] = 0  # never fires
    return values


def test_what_is_spilled_comes_back(dense, tmp_path):
    spill = spilled(tmp_path / "s", dense)
    assert torch.equal(torch.cat([chunk.dense() for _, chunk in spill.chunks(7)]), dense)
    assert Spill(tmp_path / "s", S).is_finished
    assert not Spill(tmp_path / "s", S + 1).is_finished


def test_statistics(dense, tmp_path):
    class_N = torch.arange(N) % 3
    class_N[0] = -1
    stats = latent_stats(spilled(tmp_path / "s", dense), 5, 3, class_N, 3)
    assert stats.n_active_S.tolist() == (dense > 0).sum(0).tolist()
    torch.testing.assert_close(stats.max_S, dense.amax(0))
    torch.testing.assert_close(stats.sum_S.float(), dense.sum(0))
    assert stats.bins_SB.sum(1).tolist() == stats.n_active_S.tolist()
    for latent in range(S):
        act = float(dense[:, latent].max())
        if act:
            assert stats.bins_SB[latent].nonzero().max() == int((np.log2(act) - LOWEST_OCTAVE) * 4)
    expected = torch.stack([dense[class_N == c].sum(0) for c in range(3)], 1)
    torch.testing.assert_close(stats.classes_SC, expected)
    assert all(float(dense[i, latent]) == 0 for latent in range(S) for i in stats.silent[latent])


def test_bands_are_tenths_of_the_range_and_samples_lie_in_them(dense, tmp_path):
    stats = latent_stats(spilled(tmp_path / "s", dense), 5, 3)
    for latent in range(S):
        acts, largest = dense[:, latent], float(dense[:, latent].max())
        tenth = (acts / max(largest, 1e-9) * N_BANDS).ceil().clamp(1, N_BANDS).long() - 1
        for band in range(N_BANDS):
            inside = ((tenth == band) & (acts > 0)).nonzero().flatten().tolist()
            assert stats.band_counts[latent, band] == len(inside)
            found = stats.bands[latent * N_BANDS + band].tolist()
            assert set(found) <= set(inside)
            assert len(found) == min(3, len(inside))


def plain_pairs(dense):
    """Images on which both fire, and either, of all pairs of latents."""
    fires = (dense > 0).double()
    return fires.T @ fires, fires.sum(0)


def test_neighbours(dense, tmp_path):
    both, n_S = plain_pairs(dense)
    either = n_S[:, None] + n_S[None] - both
    jaccard = (both / either.clamp(min=1)).fill_diagonal_(-1)
    found = co_firing(spilled(tmp_path / "s", dense), 4)
    assert found.counted == N
    torch.testing.assert_close(
        found.together.values.double(), jaccard.topk(4).values.clamp(min=0), rtol=1e-6, atol=1e-6
    )
    assert found.together.latents[4].tolist() == [-1] * 4
    directions = torch.randn(9, 5, generator=torch.Generator().manual_seed(0))
    nearest = decoder_neighbours(directions, 3)
    unit = torch.nn.functional.normalize(directions, dim=1)
    torch.testing.assert_close(nearest.values, (unit @ unit.T).fill_diagonal_(-2).topk(3).values)


def test_parents_fire_where_their_children_do(tmp_path):
    """Latent 0 fires on a third of the images, 1 on half of these, 2 on as many images elsewhere, 3 everywhere."""
    dense = torch.zeros(120, 5)
    dense[:40, 0], dense[:20, 1], dense[80:100, 2], dense[:, 3] = 1, 1, 1, 1
    dense[0:3, 4] = 1  # too few to say anything
    found = co_firing(spilled(tmp_path / "s", dense), 4)
    assert found.parents.latents[1].tolist() == [0, -1, -1, -1], "3 fires everywhere: that is chance"
    assert found.parents.values[1, 0] == pytest.approx((wilson(1, 20)[0] - 40 / 120) / (1 - 40 / 120), abs=1e-5)
    assert found.children.latents[0].tolist() == [1, -1, -1, -1]
    assert [found.parents.latents[k].max().item() for k in (0, 2, 3, 4)] == [-1] * 4
    dense[18:20, 0] = 0  # on 18 of the 20 images of latent 1, and on 38 in all
    found = co_firing(spilled(tmp_path / "t", dense), 4)
    assert found.parents.values[1, 0] == pytest.approx((wilson(0.9, 20)[0] - 38 / 120) / (1 - 38 / 120), abs=1e-5)


@pytest.mark.parametrize("step", [1, 7])
def test_both_ways_to_count_pairs_agree(step, dense, tmp_path):
    from saevlm_fast.look.neighbours import _dense_blocks, _likeness, _sparse_blocks

    spill = spilled(tmp_path / "s", dense)
    both, n_S = plain_pairs(dense[::step])
    jaccard = (both / (n_S[:, None] + n_S[None] - both).clamp(min=1)).fill_diagonal_(-1)
    for ways in (_dense_blocks, _sparse_blocks):
        blocks, counted = ways(spill, step)
        assert counted == len(range(0, N, step))
        found = [block.best(_likeness(block, counted)[0], 3) for block in blocks]
        values = torch.cat([each.values for each in found])
        torch.testing.assert_close(values.double(), jaccard.topk(3).values.clamp(min=0), rtol=1e-6, atol=1e-6)
        latents = torch.cat([each.latents for each in found])
        chosen = jaccard.gather(1, latents.clamp(min=0))[latents >= 0]
        torch.testing.assert_close(chosen, values.double()[latents >= 0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("architecture", ["topk", "matryoshka"])
def test_near_misses_are_the_highest_of_the_silent_images(architecture, monkeypatch):
    """Against pre-activations of all rows, densely; several rows an image, blocks of two images."""
    monkeypatch.setattr(near, "_DENSE", 2 * 3 * 10)
    sizes = (4, 6) if architecture == "matryoshka" else ()
    sae = SparseAutoencoder(SAEConfig(6, 10, 3, architecture, sizes))
    sae.reset_parameters(0)
    sae.threshold.fill_(0.4)
    random = torch.Generator().manual_seed(1)
    x_RD = torch.randn(24, 6, generator=random)
    table = ImageTable(np.arange(9) * 3, None, None, None)
    found = near.look_near(activations_of(x_RD, "x"), sae, table)
    assert (found.n_images, found.n_rows) == (8, 24)
    sae.eval()
    with torch.no_grad():
        pre_RS = (x_RD - sae.b_dec) @ sae.W_enc + sae.b_enc
        codes = sae.encode(x_RD)
        fires_NS = (codes.dense() > 0).view(8, 3, 10).any(1)
    highest_NS = pre_RS.view(8, 3, 10).amax(1).masked_fill(fires_NS, -torch.inf)
    expected = highest_NS.topk(5, dim=0).values.T
    torch.testing.assert_close(found.values_S5, expected)
    for latent in range(10):
        there = int((expected[latent] > -torch.inf).sum())
        assert (found.images_S5[latent] >= 0).tolist() == [True] * there + [False] * (5 - there)
        images = found.images_S5[latent, :there]
        torch.testing.assert_close(highest_NS[images, latent], expected[latent, :there])
    ends = sae.config.group_ends
    with torch.no_grad():
        dense_RS = codes.dense()
        errors = [x_RD - dense_RS[:, :end] @ sae.W_dec[:end] - sae.b_dec for end in ends]
    expected_ev = [1 - float(error.var(0, correction=0).sum() / x_RD.var(0, correction=0).sum()) for error in errors]
    assert found.explained == pytest.approx(expected_ev, abs=1e-5)


def test_an_even_choice_of_images_where_all_would_be_too_much(monkeypatch):
    monkeypatch.setattr(near, "_WORK", 70 * 6 * 10)
    sae = SparseAutoencoder(SAEConfig(6, 10, 3, "topk"))
    x_RD = torch.randn(200, 6, generator=torch.Generator().manual_seed(1))
    table = ImageTable(np.arange(201), None, None, None)
    found = near.look_near(activations_of(x_RD, "x"), sae, table)
    assert found.n_images == 70
    assert 0 in found.images_S5
    assert found.images_S5.max() > 150


def test_uniqueness_and_depth_are_those_of_evaluate(tmp_path):
    """From top images alone, as from all codes; latents with fewer than 16 have none."""
    random = torch.Generator().manual_seed(5)
    dense = torch.rand(80, 9, generator=random) * (torch.rand(80, 9, generator=random) < 0.6)
    dense[:, 3] = dense[:, 2] * 2
    dense[15:, 7] = 0
    names = [f"class {i}" for i in range(5)]
    class_N = np.arange(80) % 6 - 1
    taxonomy = Taxonomy.of({f"class {i}": ["root", f"half {i // 2}", f"class {i}"] for i in range(4)})
    stats = latent_stats(spilled(tmp_path / "s", dense), 16, 1)
    found = top_sets(stats.tops, 80, class_N, names, taxonomy)
    codes = KeptCodes.of_dense(dense.numpy())
    expected = uniqueness(codes).latents
    np.testing.assert_allclose(found.uniqueness_S, 1 - expected["top16_jaccard"])
    assert found.nearest_S.tolist() == expected["top16_nearest"].tolist()
    assert (found.uniqueness_S[2], found.nearest_S[2]) == (0, 3)
    assert np.isnan(found.uniqueness_S[7])
    labels = LabelSet.of([None if c < 0 else names[c] for c in class_N])
    np.testing.assert_allclose(found.depth_S, hierarchy(codes, labels, taxonomy, [9]).latents["lca_depth"])
    with pytest.raises(ValueError, match="taxonomy: paths has none of the classes, as 'class 0'"):
        top_sets(stats.tops, 80, class_N, names, Taxonomy.of({"other": ["other"]}))


def table_of(n_images, n_tokens, first=0):
    tokens = np.tile(np.arange(first, first + n_tokens, dtype=np.int32), n_images)
    return ImageTable(np.arange(n_images + 1) * n_tokens, tokens, None, None)


def test_heat_maps_are_the_patches_of_the_image():
    grid, table = PatchGrid(2, 3, 1), table_of(4, 7)  # a CLS before the patches
    dense = torch.rand(28, 5, generator=torch.Generator().manual_seed(1))
    dense[dense < 0.3] = 0
    images, latents = np.array([0, 0, 2, 3]), np.array([1, 4, 0, 2])
    chunks = [(start, sparse(dense[start : start + 7])) for start in range(0, 28, 7)]
    maps = heat_maps(chunks, table, grid, images, latents, torch.ones(5))
    for w, (image, latent) in enumerate(zip(images, latents)):
        patches, values = maps.of(w)
        expected = dense[7 * image + 1 : 7 * image + 7, latent]
        found = np.zeros(6)
        found[patches] = values
        np.testing.assert_allclose(found / 255, expected, atol=0.5 / 255 + 1e-6)


@pytest.mark.parametrize(
    ("layout", "table", "expected"),
    [
        ({"n_tokens": 7, "n_prefix": 1, "grid": [2, 3]}, table_of(2, 7), PatchGrid(2, 3, 1)),
        ({"n_tokens": 7, "n_prefix": 1, "grid": [2, 3]}, table_of(2, 6, 1), PatchGrid(2, 3, 1)),
        ({"n_tokens": 7, "n_prefix": 1, "grid": [2, 3]}, table_of(2, 5, 1), "lacks some"),
        ({"n_tokens": 7, "n_prefix": 1, "grid": None}, table_of(2, 7), "a grid of its own"),
        (None, table_of(2, 17), PatchGrid(4, 4, 1)),
        (None, table_of(2, 16, 5), PatchGrid(4, 4, 5)),
        (None, table_of(2, 15, 5), "does not say"),
        (None, table_of(3, 1), "one row an image"),
    ],
)
def test_the_grid_of_a_store(layout, table, expected):
    found = patch_grid({"layout": layout} if layout else {}, table)
    assert found == expected if isinstance(expected, PatchGrid) else expected in str(found)


SIDE = {"height": 224, "width": 224}
CLIP = {"do_resize": True, "size": {"shortest_edge": 224}, "do_center_crop": True, "crop_size": SIDE}
DINO = CLIP | {"size": {"shortest_edge": 256}}


@pytest.mark.parametrize(
    ("settings", "size", "expected"),
    [
        (CLIP, (400, 200), (0.25, 0, 0.75, 1)),
        (CLIP, (200, 400), (0, 0.25, 1, 0.75)),
        (DINO, (256, 256), (1 / 16, 1 / 16, 15 / 16, 15 / 16)),
        ({"do_resize": True, "size": SIDE}, (400, 200), (0, 0, 1, 1)),
        ({"size": [224, 224], "resize_mode": "shortest"}, (400, 200), (0.25, 0, 0.75, 1)),
        ({"size": [224, 224], "resize_mode": "longest"}, (400, 200), (0, -0.5, 1, 1.5)),
        ({"size": [224, 224], "resize_mode": "squash"}, (400, 200), (0, 0, 1, 1)),
        ({"input_size": [3, 224, 224], "crop_pct": 0.875}, (300, 300), (1 / 16,) * 2 + (15 / 16,) * 2),
        ({"anything": 3}, (10, 20), (0, 0, 1, 1)),
    ],
)
def test_the_part_of_a_picture_that_a_tower_sees(settings, size, expected):
    found = covered({"model": {"preprocess": {"name": "x", **settings}}}, *size)
    assert found == pytest.approx(expected)


def test_a_thumbnail_from_a_reduced_picture_is_the_same_to_the_eye():
    """At its own size by decode alone, and never below what is asked."""
    coarse = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    picture = Image.fromarray(coarse).resize((800, 600), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=95)
    whole, reduced = decode(buffer.getvalue()), decode(buffer.getvalue(), 128)
    assert whole.size == (800, 600)
    assert reduced.size < whole.size
    assert min(reduced.size) >= 128
    one, other = (np.asarray(thumbnail(each, 128), np.float32) for each in (whole, reduced))
    assert one.shape == other.shape == (96, 128, 3)
    assert np.abs(one - other).mean() < 3
