"""One pass gives the rows of every layer and token, as transformers gives them, in any batches."""

from dataclasses import replace

import pytest
import torch
from PIL import Image
from small_harvests import (
    N_IMAGES,
    POINTS,
    codes_harvest,
    dense_codes,
    digests,
    rows_and_items,
    run_harvest,
    small_units,
)

from saevlm_fast.data.rows import open_activations
from saevlm_fast.harvesting.config import HarvestConfig
from saevlm_fast.provenance import sae_mismatch
from saevlm_fast.sae import SparseAutoencoder, with_metadata
from saevlm_fast.towers.load import load_tower
from saevlm_fast.towers.tokens import Tokens
from saevlm_fast.towers.tower import HookPoint
from tiny_tower import N_BLOCKS, N_TOKENS, PROJECTED, WIDTH


@pytest.fixture(scope="module")
def truth(model, photos):
    """Ids, hidden states [N, L + 1, T, D] and projected embeddings of every photo by itself, from transformers."""
    from transformers import CLIPImageProcessor, CLIPModel

    clip, processor = CLIPModel.from_pretrained(model).eval(), CLIPImageProcessor.from_pretrained(model)
    files = sorted(photos.rglob("*.png"), key=lambda file: file.relative_to(photos).as_posix())
    hidden, embeddings = [], []
    with torch.no_grad():
        for file in files:
            pixels = processor(Image.open(file).convert("RGB"), return_tensors="pt")["pixel_values"]
            output = clip.vision_model(pixels, output_hidden_states=True)
            hidden.append(torch.stack(output.hidden_states, 1)[0])
            embeddings.append(clip.visual_projection(output.pooler_output)[0])
    ids = [file.relative_to(photos).as_posix() for file in files]
    return ids, torch.stack(hidden), torch.stack(embeddings)


@pytest.fixture(scope="module")
def harvested(tower, photos, tmp_path_factory):
    output = tmp_path_factory.mktemp("harvest") / "out"
    summary = run_harvest(tower, photos, output)
    return output, summary


def test_one_pass_gives_every_layer_s_rows(harvested, truth):
    output, summary = harvested
    ids, hidden_NLTD, embeddings_NE = truth
    assert (summary.n_images, summary.n_skipped, summary.n_done_here) == (N_IMAGES, 0, N_IMAGES)
    assert len(summary.stores) == 2 * N_BLOCKS + 1
    for layer in range(N_BLOCKS):
        rows_ND, items = rows_and_items(output / f"residual-{layer}-cls")
        torch.testing.assert_close(rows_ND, hidden_NLTD[:, layer + 1, 0], atol=1e-5, rtol=1e-5)
        assert items == {"image": ids, "token": [0] * N_IMAGES, "label": [name.split("/")[0] for name in ids]}
    rows_NE, items = rows_and_items(output / "projection")
    torch.testing.assert_close(rows_NE, embeddings_NE, atol=1e-5, rtol=1e-5)
    assert (items["image"], items["token"]) == (ids, [-1] * N_IMAGES)


def test_random_tokens_are_those_the_index_names(harvested, truth):
    output, _ = harvested
    ids, hidden_NLTD, _ = truth
    rows_ND, items = rows_and_items(output / "residual-1-random3")
    images = torch.tensor([ids.index(name) for name in items["image"]])
    positions = torch.tensor(items["token"])
    torch.testing.assert_close(rows_ND, hidden_NLTD[images, 2, positions], atol=1e-5, rtol=1e-5)
    assert images.tolist() == torch.arange(N_IMAGES).repeat_interleave(3).tolist()
    chosen = positions.view(N_IMAGES, 3)
    assert int(chosen.min()) >= 1 and int(chosen.max()) < N_TOKENS  # noqa: PT018
    assert all(len(set(row)) == 3 for row in chosen.tolist())
    assert len({tuple(row) for row in chosen.tolist()}) > N_IMAGES // 2
    _, other_layer = rows_and_items(output / "residual-2-random3")
    assert other_layer["token"] == items["token"]


@pytest.mark.parametrize("workers", [1, 2])
def test_worker_processes_change_nothing(tower, photos, harvested, tmp_path, workers):
    run_harvest(tower, photos, tmp_path / "out", workers=workers)
    assert digests(tmp_path / "out") == digests(harvested[0])


def test_batch_size_changes_no_choice(tower, photos, harvested, tmp_path):
    config = HarvestConfig(POINTS, (Tokens.parse("cls"), Tokens.parse("random:3")), batch_size=7)
    run_harvest(tower, photos, tmp_path / "out", config)
    for name in ("residual-2-random3", "projection"):
        rows_ND, items = rows_and_items(tmp_path / "out" / name)
        expected_ND, expected_items = rows_and_items(harvested[0] / name)
        assert items == expected_items
        torch.testing.assert_close(rows_ND, expected_ND, atol=1e-5, rtol=1e-5)


def test_limit_takes_the_first_images(tower, photos, whole, tmp_path):
    run_harvest(tower, photos, tmp_path / "out", replace(small_units(), limit=5))
    rows_ND, items = rows_and_items(tmp_path / "out" / "projection")
    expected_ND, expected = rows_and_items(whole / "projection")
    assert items["image"] == expected["image"][:5]
    torch.testing.assert_close(rows_ND, expected_ND[:5], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_autocast_stays_close_and_stores_its_dtype(tower, photos, whole, tmp_path, dtype):
    run_harvest(tower, photos, tmp_path / "out", replace(small_units(), dtype=dtype))
    store = open_activations(tmp_path / "out" / "projection")
    assert store.dtype == getattr(torch, dtype)
    expected_ND, _ = rows_and_items(whole / "projection")
    error = (store.rows(torch.arange(N_IMAGES)) - expected_ND).norm() / expected_ND.norm()
    assert 0 < float(error) < {"bfloat16": 0.03, "float16": 0.004}[dtype]


@pytest.mark.parametrize("tokens", ["cls", "random:3", "patches"])
def test_codes_are_those_of_the_activations(tower, photos, sae_directory, tmp_path, tokens):
    codes = codes_harvest(tower, photos, tmp_path / "codes", sae_directory, tokens)
    config = HarvestConfig((HookPoint("residual", 1),), (Tokens.parse(tokens),), batch_size=2, images_per_shard=4)
    run_harvest(tower, photos, tmp_path / "dense", config)
    x_ND, items = rows_and_items(tmp_path / "dense")
    with torch.no_grad():
        expected_NS = SparseAutoencoder.from_pretrained(sae_directory).encode(x_ND).dense()
    assert int((expected_NS > 0).sum()) > codes.n_rows  # the test would show nothing on silent latents
    torch.testing.assert_close(dense_codes(codes), expected_NS, atol=0, rtol=2**-11)  # float16 on disk
    assert codes.items().to_pydict() == items
    assert codes.source["pool"] == "none"


def test_pooled_codes_are_an_image_s_mean(tower, photos, sae_directory, tmp_path):
    tokens = codes_harvest(tower, photos, tmp_path / "tokens", sae_directory, "patches")
    images = codes_harvest(tower, photos, tmp_path / "images", sae_directory, "patches", pool="mean")
    expected_NS = dense_codes(tokens).view(N_IMAGES, N_TOKENS - 1, -1).mean(1)
    torch.testing.assert_close(dense_codes(images), expected_NS, atol=0, rtol=2**-10)
    assert images.items()["token"].to_pylist() == [-1] * N_IMAGES


def test_an_sae_of_another_width_is_refused(tower, photos, sae_directory, tmp_path):
    config = HarvestConfig((HookPoint("projection"),), sae=sae_directory)
    with pytest.raises(ValueError, match=f"d_in of .* is {WIDTH}, but projection of .* has {PROJECTED}"):
        run_harvest(tower, photos, tmp_path / "out", config)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"points": ()}, "point: at least one"),
        ({"points": POINTS[:1] * 2}, "points: residual-0 is listed twice"),
        ({"batch_size": 0}, "batch_size: 0 must be at least 1"),
        ({"seed": -1}, "seed: -1"),
        ({"dtype": "int8"}, "dtype: 'int8' is not one of"),
        ({"store_dtype": "float64"}, "store_dtype: 'float64' is not one of"),
        ({"pool": "mean"}, "pool: only codes"),
        ({"sae": "x"}, "an SAE reads one point and one choice of tokens, but 4"),
    ],
)
def test_settings_that_make_no_sense(settings, message):
    with pytest.raises(ValueError, match=message):
        HarvestConfig(**({"points": POINTS} | settings))


@pytest.mark.parametrize("settings", [{}, {"pool": "mean"}])
def test_tokens_the_tower_does_not_have_are_refused_before_anything_is_written(
    tower, photos, sae_directory, tmp_path, settings
):
    config = HarvestConfig((HookPoint("residual", 1),), (Tokens.parse("random:17"),), sae=sae_directory, **settings)
    with pytest.raises(ValueError, match="there are 16 to draw from"):
        run_harvest(tower, photos, tmp_path / "out", config)
    assert not (tmp_path / "out").exists()


def test_large_photos_are_preprocessed_a_few_at_a_time(tower, photos, whole, tmp_path, monkeypatch):
    monkeypatch.setattr("saevlm_fast.images.batches._PIXELS_AT_A_TIME", 3000)  # a photo has 1440
    config = replace(small_units(), batch_size=8, images_per_shard=8)
    run_harvest(tower, photos, tmp_path / "out", config)
    rows_ND, items = rows_and_items(tmp_path / "out" / "projection")
    expected_ND, expected_items = rows_and_items(whole / "projection")
    assert items == expected_items
    torch.testing.assert_close(rows_ND, expected_ND, atol=1e-5, rtol=1e-5)


def test_an_sae_of_another_place_is_told(tower, sae_directory, tmp_path):
    point, cls = HookPoint("residual", 1), Tokens.parse("cls")
    assert sae_mismatch(sae_directory, tower, point, cls) is None  # it does not say where it is from
    sae = SparseAutoencoder.from_pretrained(sae_directory)
    for free_form in ("somewhere", {"model": "clip"}):
        with_metadata(sae, source=free_form).save_pretrained(tmp_path)
        assert sae_mismatch(tmp_path, tower, point, cls) is None
    source = {"point": "residual", "layer": 1, "tokens": "random2", "model": tower.description()}
    with_metadata(sae, source=source).save_pretrained(tmp_path)
    assert sae_mismatch(tmp_path, tower, point, Tokens.parse("random:2")) is None
    assert "trained on residual of layer 1, tokens random2" in sae_mismatch(tmp_path, tower, point, cls)
    with_metadata(sae, source=source | {"model": {"weights_sha256": "0"}}).save_pretrained(tmp_path)
    assert "of another model" in sae_mismatch(tmp_path, tower, point, Tokens.parse("random:2"))


@pytest.mark.gpu
def test_rows_of_a_gpu_tower_are_those_of_a_cpu_one(model, photos, whole, tmp_path):
    run_harvest(load_tower(f"hf:{model}", "cuda"), photos, tmp_path / "out", small_units(), workers=2)
    for store in ("residual-0-cls", "residual-0-random3", "projection"):
        rows_ND, items = rows_and_items(tmp_path / "out" / store)
        expected_ND, expected_items = rows_and_items(whole / store)
        assert items == expected_items
        torch.testing.assert_close(rows_ND, expected_ND, atol=1e-4, rtol=1e-4)


@pytest.mark.gpu
def test_pooled_codes_of_a_gpu_tower_are_those_of_a_cpu_one(tower, model, photos, sae_directory, tmp_path):
    on_gpu = load_tower(f"hf:{model}", "cuda")
    found = codes_harvest(on_gpu, photos, tmp_path / "gpu", sae_directory, "patches", pool="mean")
    expected = codes_harvest(tower, photos, tmp_path / "cpu", sae_directory, "patches", pool="mean")
    torch.testing.assert_close(dense_codes(found), dense_codes(expected), atol=1e-3, rtol=1e-3)
