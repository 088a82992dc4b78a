"""harvest by names: what is opened, where it lies, what is refused."""

import gc
import tempfile
import warnings
from pathlib import Path

import pytest
import torch

import saevlm_fast as sf
from saevlm_fast.config import SAEConfig
from saevlm_fast.errors import Doubt
from saevlm_fast.images.open import open_images
from saevlm_fast.towers.load import load_tower

MODEL, SCENES = "hf:tiny-clip", "scenes:test:12"


@pytest.fixture(scope="module")
def tower():
    return load_tower(MODEL)


def test_a_model_and_images_by_name_give_an_opened_store(tmp_path, tower):
    store = sf.harvest(MODEL, SCENES, layer=3, output=tmp_path / "store", device="cpu")
    assert isinstance(store, sf.Activations)
    assert store.n_rows == 12
    assert (store.source["point"], store.source["layer"], store.source["tokens"]) == ("residual", 3, "cls")
    assert store.source["images"]["path"] == SCENES
    again = sf.open_activations(tmp_path / "store")
    other = sf.harvest(tower, open_images(SCENES), layer=3, output=str(tmp_path / "other"))  # both opened already
    rows = torch.arange(12)
    assert torch.equal(store.rows(rows), again.rows(rows))
    assert torch.equal(store.rows(rows), other.rows(rows))
    assert store.items() == other.items()


def test_lists_give_a_dict_of_stores(tmp_path, tower):
    done = []
    where = {"layer": [1, 3], "point": ["residual", "projection"], "tokens": ["cls", "mean"]}
    stores = sf.harvest(
        tower, SCENES, **where, output=tmp_path / "stores", limit=5, on_images=lambda *n: done.append(n)
    )
    assert list(stores) == ["residual-1-cls", "residual-1-mean", "residual-3-cls", "residual-3-mean", "projection"]
    assert {store.n_rows for store in stores.values()} == {5}
    assert done[-1] == (5, 5, 0)
    assert list(sf.harvest(tower, SCENES, layer=[2], output=tmp_path / "one", limit=2)) == ["residual-2-cls"]


def test_codes_of_an_sae(tmp_path, tower):
    width = sf.harvest(tower, SCENES, layer=3).d
    sae = sf.SparseAutoencoder(SAEConfig.sized(width, expansion=2, k=4, architecture="topk"))
    sae.save_pretrained(tmp_path / "sae")
    codes = sf.harvest(tower, SCENES, layer=3, sae=tmp_path / "sae", output=tmp_path / "codes", limit=7)
    assert isinstance(codes, sf.StoredCodes)
    assert (codes.n_rows, codes.d_sae) == (7, 2 * width)


def test_without_an_output_the_stores_go_with_what_was_returned(tmp_path, tower, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    first = sf.harvest(tower, SCENES, layer=3)
    several = sf.harvest(tower, SCENES, layer=[1, 2], limit=3)
    assert len(list(tmp_path.iterdir())) == 2
    kept = several["residual-2-cls"]
    del first, several
    gc.collect()
    assert [Path(kept.path).parent] == list(tmp_path.iterdir())
    assert kept.items()["image"].to_pylist() == [open_images(SCENES).image_id(i) for i in range(3)]
    del kept
    gc.collect()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"layers": 3}, "layers: no setting of harvest"),
        ({"layer": 3, "batchsize": 3}, "batchsize: no setting of harvest; did you mean 'batch_size'?"),
        ({"layer": 99}, "layer"),
        ({"layer": 3, "tokens": "heads"}, "heads"),
        ({"layer": "3"}, "layer: '3' is not a whole number"),
        ({"layer": 3.0}, "layer: 3.0 is not a whole number"),
        ({"layer": {1, 2}}, "layer: {1, 2} is not a list, tuple or array"),
        ({"layer": [1, 1]}, "^layer: 1 is listed twice"),
        ({"layer": 3, "point": ["mlp", "mlp"]}, "^point: mlp is listed twice"),
        ({"layer": 3, "limit": 0}, "limit: 0 must be at least 1"),
        ({"layer": 3, "square": 999_999}, "square: 999999 must be between 1 and 8192"),
    ],
)
def test_what_does_not_fit_is_refused_and_leaves_nothing(tmp_path, tower, monkeypatch, more, message):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        sf.harvest(tower, SCENES, **more)
    gc.collect()
    assert not list(tmp_path.iterdir())


def test_an_output_in_use_is_refused_before_a_model_is_loaded(tmp_path):
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "mine.txt").write_text("")
    with pytest.raises(ValueError, match="is not empty and holds no harvest"):
        sf.harvest("hf:there-is-no-such-model", SCENES, layer=3, output=tmp_path / "store")


def test_a_temporary_store_is_gone_with_the_last_of_its_stores_and_nobody_is_warned(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # where no other test makes any
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stores = sf.harvest("hf:tiny-clip", "scenes:test:4", layer=[1, 3])
        folder = stores["residual-1-cls"].path.parent
        kept = stores.pop("residual-3-cls")
        del stores
        gc.collect()
        assert folder.is_dir()
        assert kept.rows(torch.arange(2)).shape == (2, kept.d)
        del kept
        gc.collect()
        assert not folder.exists()
        with pytest.raises(ValueError, match="no such"):
            sf.harvest("hf:tiny-clip", "/no/such/folder", layer=3)
        gc.collect()
        assert not list(tmp_path.iterdir())


def test_too_small_a_disk_is_refused_before_the_images(tmp_path, tower, monkeypatch):
    from saevlm_fast import outputs

    given = {"layer": 3, "output": tmp_path / "store", "device": "cpu"}
    monkeypatch.setattr(outputs.shutil, "disk_usage", lambda path: (10**9, 0, 2_000))
    with pytest.raises(ValueError, match=r"^output: what is left to write takes \S+ kB, and 2\.0 kB are free on"):
        sf.harvest(tower, SCENES, **given)
    assert not list(tmp_path.rglob("shard-*"))
    monkeypatch.setattr(outputs.shutil, "disk_usage", lambda path: (10**9, 0, 12 * 128 * 4 + 500))
    with pytest.raises(ValueError, match=r"^output: what is left to write takes"):
        sf.harvest(tower, SCENES, **given)  # rows alone would fit
    monkeypatch.setattr(outputs.shutil, "disk_usage", lambda path: (10**9, 0, 12 * 128 * 4 + 5_000))
    sf.harvest(tower, SCENES, **given)
    monkeypatch.setattr(outputs.shutil, "disk_usage", lambda path: (10**9, 0, 0))
    sf.harvest(tower, SCENES, **given, resume=True)  # all is there


def free_bytes(monkeypatch, n):
    from saevlm_fast import outputs

    monkeypatch.setattr(outputs.shutil, "disk_usage", lambda path: (10**9, 0, n))


@pytest.mark.parametrize(("architecture", "latents"), [("topk", 2), ("topk", 1 << 10), ("batch_topk", 2), ("relu", 2)])
def test_codes_are_counted_before_the_images(tmp_path, tower, monkeypatch, architecture, latents):
    """By k, which is the most that rows of topk have: there is a doubt. Of relu there is nothing to count by."""
    k = None if architecture == "relu" else 100
    sae = sf.SparseAutoencoder(SAEConfig.sized(128, expansion=latents, k=k, architecture=architecture))
    sae.threshold.fill_(0.01)
    sae.save_pretrained(tmp_path / "sae")
    given = {"layer": 3, "sae": tmp_path / "sae", "output": tmp_path / "codes", "device": "cpu", "max_skipped": 0.0}
    latent_bytes = 2 if latents * 128 <= 1 << 16 else 4
    rows = 12 * (100 * (2 + latent_bytes) + 4)
    free_bytes(monkeypatch, rows + 500)
    if architecture != "relu":
        told = r"^output: what is left to write may take \S+ kB by estimate, and \S+ kB are free on .*--resume goes on"
        with pytest.warns(Doubt, match=told):
            sf.harvest(tower, SCENES, **given)
    else:
        free_bytes(monkeypatch, rows + 6_000)
        with warnings.catch_warnings(action="error"):
            sf.harvest(tower, SCENES, **given)
    if architecture == "topk":
        (shard,) = (tmp_path / "codes").glob("shard-*.safetensors")
        assert rows - 100 < shard.stat().st_size < rows + 500
    free_bytes(monkeypatch, 0)
    with warnings.catch_warnings(action="error"):
        sf.harvest(tower, SCENES, **given, resume=True)  # all is there
