"""SAEs looked at through their tower: the scores and top images of a store that was harvested and read."""

import numpy as np
import pytest
import torch

from saevlm_fast.config import SAEConfig
from saevlm_fast.data.rows import Activations
from saevlm_fast.harvesting.api import harvest
from saevlm_fast.harvesting.config import HarvestConfig
from saevlm_fast.images.open import open_images
from saevlm_fast.look.through_tower import embedder, look_through_tower, own_point
from saevlm_fast.look.tops import latent_tops
from saevlm_fast.sae import SparseAutoencoder
from saevlm_fast.scoring.monosemanticity import score
from saevlm_fast.towers.load import load_tower
from saevlm_fast.towers.tokens import Tokens
from saevlm_fast.towers.tower import HookPoint
from tiny_tower import WIDTH, save_clip, save_photos

N = 11
CONFIG = HarvestConfig(
    points=(HookPoint("residual", 1),), tokens=(Tokens.parse("cls"), Tokens.parse("patches")), batch_size=4
)
STORES = {"cls": "residual-1-cls", "patches": "residual-1-patches"}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The tower, photos of which one cannot be used, and an SAE."""
    folder = tmp_path_factory.mktemp("look")
    photos = save_photos(folder / "photos", N)
    sorted(photos.rglob("*.png"))[5].write_bytes(b"no image")
    torch.manual_seed(0)
    sae = SparseAutoencoder(SAEConfig(WIDTH, 24, 3, architecture="topk"))
    torch.nn.init.normal_(sae.W_enc)
    return load_tower(f"hf:{save_clip(folder / 'clip')}"), photos, sae.eval(), folder


def look(world, by, n_top=0, **more):
    tower, photos, sae, _ = world
    saes = {name: (store, sae) for name, store in STORES.items()}
    more = {"workers": 0, "max_skipped": 0.2} | more
    return look_through_tower(tower, open_images(str(photos)), str(photos), CONFIG, saes, by, n_top, **more)


def test_scores_and_tops_are_those_of_stores(world, tmp_path):
    tower, photos, sae, _ = world
    assert own_point(tower).name == "projection"
    known = {"workers": 0, "max_skipped": 0.2}
    stored = {name: harvest(tower, photos, layer=1, tokens=name, output=tmp_path / name, **known) for name in STORES}
    projected = harvest(tower, photos, point="projection", output=tmp_path / "projection", **known)
    for name, seen in look(world, own_point(tower), 3).items():
        expected = score(stored[name], projected, sae, pool="max")
        assert seen.scores.n_images == N - 1
        assert torch.equal(seen.scores.n_active, expected.n_active)
        torch.testing.assert_close(seen.scores.ms, expected.ms, equal_nan=True, rtol=1e-3, atol=1e-4)
        tops = latent_tops(stored[name], sae, 3)
        assert torch.equal(seen.tops.n_active_S, tops.n_active_S)
        for ours, theirs in zip(seen.tops.tops, tops.tops, strict=True):
            assert [seen.tops.table.name(i) for i in ours.images] == [tops.table.name(i) for i in theirs.images]
            torch.testing.assert_close(ours.acts, theirs.acts, rtol=1e-4, atol=1e-4)
    assert all(seen.scores is None for seen in look(world, None, 1).values())


def test_embeddings_are_found_by_number_or_by_id(world, tmp_path):
    tower, photos, _, _ = world
    source = open_images(str(photos))
    projected = harvest(tower, photos, point="projection", output=tmp_path / "store", workers=0, max_skipped=0.2)
    by_id = look(world, embedder(projected, source, N))
    rows = np.ones((N, projected.d), np.float32)
    places = {source.image_id(i): i for i in range(N)}
    for i, image in enumerate(projected.items()["image"].to_pylist()):
        rows[places[image]] = projected.rows(torch.tensor([i])).numpy()
    by_number = look(world, embedder(Activations.from_tensor(rows), source, N))
    for name, seen in look(world, own_point(tower)).items():
        for other in (by_id, by_number):
            torch.testing.assert_close(other[name].scores.ms, seen.scores.ms, equal_nan=True, rtol=1e-3, atol=1e-4)


def test_what_is_refused(world, tmp_path):
    tower, photos, _, _ = world
    source = open_images(str(photos))
    with pytest.raises(ValueError, match=r"embeddings: 5 rows of .*, but 11 images; row i is image i"):
        embedder(Activations.from_tensor(np.ones((5, 3), np.float32)), source, N)
    some = harvest(tower, photos, point="projection", output=tmp_path / "some", workers=0, limit=3)
    with pytest.raises(ValueError, match=r"embeddings: .*some has no row of image"):
        look(world, embedder(some, source, N))
    patches = harvest(tower, photos, layer=1, tokens="patches", output=tmp_path / "patches", workers=0, limit=3)
    with pytest.raises(ValueError, match="has several rows of an image; one row an image is needed"):
        embedder(patches, source, N)
    with pytest.raises(ValueError, match="max_skipped: 1 of 11 images"):
        look(world, None, max_skipped=0.0)
