"""Rows become images, images are ranked, latents are chosen: against the plain way, on random codes."""

import pyarrow.parquet as pq
import pytest
import torch

import saevlm_fast as sf
from command import run, run_json
from saevlm_fast.config import SAEConfig
from saevlm_fast.data.codes import CodesWriter, open_codes
from saevlm_fast.data.rows import open_activations
from saevlm_fast.data.writing import ActivationWriter
from saevlm_fast.errors import Interrupted
from saevlm_fast.look import tops as tops_module
from saevlm_fast.look.chosen import check_latents, chosen_latents
from saevlm_fast.look.store_images import StoreImages
from saevlm_fast.look.tops import latent_tops
from saevlm_fast.sae import SparseAutoencoder
from saevlm_fast.scoring import tables as tables_module
from saevlm_fast.scoring.image_rows import image_chunks, image_table

N, PATCHES, D, S = 11, 4, 6, 20


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A store of patches with an SAE of it, and its codes; everything dense beside them."""
    root = tmp_path_factory.mktemp("look")
    x = torch.randn(N * PATCHES, D, generator=torch.Generator().manual_seed(0))
    items = {
        "image": [f"{i // PATCHES}.png" for i in range(len(x))],
        "token": [1 + i % PATCHES for i in range(len(x))],
        "label": [f"class {i // PATCHES % 3}" for i in range(len(x))],
    }
    with ActivationWriter(root / "store", D, torch.float32, {"layer": 1}, 10) as writer:
        writer.append(x, items)
    sae = SparseAutoencoder(SAEConfig(D, S, 3, "topk"))
    sae.reset_parameters(0)
    sae.save_pretrained(root / "sae")
    with torch.no_grad():
        codes = sae.encode(x)
    with CodesWriter(root / "codes", S, torch.float32, {"layer": 1}) as writer:
        writer.write_shard(0, codes, items)
    return root, sae, codes.dense().view(N, PATCHES, S)


@pytest.mark.parametrize("pool", ["max", "mean"])
@pytest.mark.parametrize("batch_rows", [3, 7, 100])
@pytest.mark.parametrize("coded", [True, False])
def test_images_have_their_largest_row_or_the_mean(pool, batch_rows, coded, world):
    root, sae, dense = world
    rows = open_codes(root / "codes") if coded else open_activations(root / "store")
    table = image_table(rows)
    chunks = list(image_chunks(rows, None if coded else sae, table, pool, batch_rows))
    found = torch.cat([chunk.codes.dense() for chunk in chunks])
    expected = dense.amax(1) if pool == "max" else dense.mean(1)
    torch.testing.assert_close(found, expected)
    assert [chunk.first for chunk in chunks] == sorted({chunk.first for chunk in chunks})
    torch.testing.assert_close(torch.cat([chunk.row_codes.dense() for chunk in chunks]), dense.view(-1, S))
    assert (table.n_images, table.rows_per_image, table.name(3), table.label(4)) == (N, PATCHES, "3.png", "class 1")


def test_rows_of_an_image_that_lie_apart_are_refused(tmp_path):
    with ActivationWriter(tmp_path / "s", 2, torch.float32, {}, 10) as writer:
        writer.append(torch.ones(3, 2), {"image": ["a", "b", "a"], "token": [0, 0, 1], "label": [None] * 3})
    with pytest.raises(ValueError, match="1 images come twice"):
        image_table(open_activations(tmp_path / "s"))


def test_every_image_comes_once_and_the_most_active_first(world):
    root, sae, dense = world
    found = latent_tops(open_activations(root / "store"), sae, 4, batch_rows=7)
    per_image = dense.amax(1)
    for latent, top in enumerate(found.tops):
        order = per_image[:, latent].argsort(descending=True, stable=True)
        firing = [int(i) for i in order if per_image[i, latent] > 0][:4]
        assert top.images.tolist() == firing
        torch.testing.assert_close(top.acts, per_image[firing, latent])
    assert found.n_active_S.tolist() == (per_image > 0).sum(0).tolist()
    torch.testing.assert_close(found.max_S, per_image.amax(0))


@pytest.mark.parametrize(
    ("text", "expected"),
    [("1:3", [1, 2]), (":2", [0, 1]), ("3:", [3, 4]), ("4,0", [4, 0]), ("top:2", [3, 1]), ("top:9", [3, 1, 0, 4])],
)
def test_latents_are_chosen(text, expected):
    ranks = torch.tensor([1.0, 2.0, -torch.inf, 5.0, 0.5])
    assert chosen_latents(check_latents("latents", text), ranks) == expected


@pytest.mark.parametrize("text", ["a", "1:2:3", "top:0", "top:x", "1,1", "7", "0:9", "5:", "-1", "1,,2"])
def test_latents_that_are_not_there(text):
    with pytest.raises(ValueError, match="latents"):
        chosen_latents(check_latents("latents", text), torch.zeros(5))


def test_missing_images_are_counted_and_shown_as_placeholders(world, tmp_path):
    root = world[0]
    words = ("top-images", "--sae", root / "sae", "--codes", root / "codes", "--latents", "0:3", "--n", 2)
    said = run_json(*words, "--output", tmp_path / "out")
    assert (said["latents"], said["chosen_latents"]) == (3, [0, 1, 2])
    assert said["missing"] > 0
    none = run(*words, "--images", "none", "--output", tmp_path / "none")
    assert "images are missing" not in none
    assert (tmp_path / "out" / "latents-0000.png").stat().st_size > 1000
    table = pq.read_table(tmp_path / "out" / "top_images.parquet").to_pydict()
    assert table["image"] == [f"{number}.png" for number in table["number"]]
    assert table["rank"][:2] == [0, 1]
    for name in ("t.csv", "t.json", "s.png"):
        run(*words, "--output", tmp_path / name)
        assert (tmp_path / name).stat().st_size > 100
        assert "already exists; --force replaces it" in run(*words, "--output", tmp_path / name, code=2)


def test_old_sheets_stay_until_the_new_are_whole(world, tmp_path, monkeypatch):
    root, out = world[0], tmp_path / "out"
    words = ("top-images", "--sae", root / "sae", "--codes", root / "codes", "--n", 2, "--output", out)
    monkeypatch.setattr(tops_module, "ROWS_OF_A_SHEET", 2)
    run(*words, "--latents", "0:4")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert sorted(before) == ["latents-0000.png", "latents-0001.png", "settings.toml", "top_images.parquet"]

    def stop(*arguments):
        raise Interrupted("interrupted")

    with monkeypatch.context() as patch:
        patch.setattr(tables_module, "write_table", stop)
        run(*words, "--latents", "0:1", "--force", code=130)
    assert {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()} == before
    run(*words, "--latents", "0:1", "--force")
    assert sorted(path.name for path in out.iterdir()) == ["latents-0000.png", "settings.toml", "top_images.parquet"]


def test_a_place_of_images_that_is_none_is_refused_before_anything_is_read(world, tmp_path):
    """That of the store may be gone; one that is named may be misspelt."""
    root, nowhere = world[0], tmp_path / "nowhere"
    out = ("--images", nowhere, "--output", tmp_path / "out")
    words = ("top-images", "--sae", root / "sae", "--codes", root / "codes", *out)
    for more in ((), ("--dry-run",)):
        assert f"images: {nowhere}: no such file or folder" in run(*words, *more, code=2)
    sae = ("report", "--sae", root / "sae", "--codes", root / "codes", *out)
    assert f"images: {nowhere}: no such file or folder" in run(*sae, code=2)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match=r"images: .*no such file or folder"):
        sf.show(0, open_codes(root / "codes"), images=str(nowhere))


def test_images_of_another_place(tmp_path):
    from PIL import Image

    (tmp_path / "a").mkdir()
    Image.new("RGB", (5, 3), "red").save(tmp_path / "a" / "1.png")
    source = {"images": {"path": "/nowhere"}}
    there = StoreImages(source, str(tmp_path))
    picture = there.read("a/1.png", 7)
    assert picture is not None
    assert picture.size == (5, 3)
    assert there.read("../secret.png", 0) is None
    assert list(there.missing) == ["../secret.png"]
    assert "/nowhere" in str(StoreImages(source).problem)
    assert StoreImages(source, "none").wanted is False
    assert StoreImages(source, tmp_path).path == str(tmp_path)
    assert StoreImages(None).problem is not None
