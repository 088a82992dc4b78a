"""Statistics, neighbours, heat maps and regions of a report: against the plain way."""

import numpy as np
import pytest
import torch

from saevlm_fast.look.geometry import PatchGrid, covered, patch_grid
from saevlm_fast.look.heat import heat_map, heat_maps
from saevlm_fast.look.image_rows import ImageTable
from saevlm_fast.look.neighbours import co_firing, decoder_neighbours
from saevlm_fast.look.spill import Spill
from saevlm_fast.look.stats import LOWEST_OCTAVE, N_BANDS, latent_stats
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
            found = stats.bands[latent * N_BANDS + band].images.tolist()
            assert set(found) <= set(inside)
            assert len(found) == min(3, len(inside))


def test_neighbours(dense, tmp_path):
    fires = (dense > 0).double()
    both = fires.T @ fires
    either = fires.sum(0)[:, None] + fires.sum(0)[None] - both
    jaccard = (both / either.clamp(min=1)).fill_diagonal_(-1)
    found, counted = co_firing(spilled(tmp_path / "s", dense), 4)
    assert counted == N
    torch.testing.assert_close(found.values.double(), jaccard.topk(4).values.clamp(min=0), rtol=1e-6, atol=1e-6)
    assert found.latents[4].tolist() == [-1] * 4
    directions = torch.randn(9, 5, generator=torch.Generator().manual_seed(0))
    near = decoder_neighbours(directions, 3)
    unit = torch.nn.functional.normalize(directions, dim=1)
    torch.testing.assert_close(near.values, (unit @ unit.T).fill_diagonal_(-2).topk(3).values)


@pytest.mark.parametrize("step", [1, 7])
def test_both_ways_to_count_pairs_agree(step, dense, tmp_path):
    from saevlm_fast.look.neighbours import _dense_pairs, _sparse_pairs

    spill = spilled(tmp_path / "s", dense)
    (one, n_one), (other, n_other) = _dense_pairs(spill, step), _sparse_pairs(spill, step)
    assert n_one == n_other == len(range(0, N, step))
    joined = [torch.cat([both for _, both, _ in blocks]) for blocks in (one, other)]
    fires = (dense[::step] > 0).float()
    assert torch.equal(joined[0], fires.T @ fires)
    assert torch.equal(joined[0], joined[1])


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
        whole = heat_map(chunks, table, grid, int(image), [int(latent)])
        torch.testing.assert_close(whole, expected.view(1, 2, 3))


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
