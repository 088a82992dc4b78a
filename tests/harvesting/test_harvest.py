"""The whole way from image files to stores: rows, order, labels, skipped images, codes, interrupts, several ranks."""

import json
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace

import pytest
import torch
from PIL import Image

from command import run
from damage import edit_record
from saevlm_fast import outputs
from saevlm_fast.cli import main
from saevlm_fast.config import HarvestOptions, SAEConfig
from saevlm_fast.data.codes import open_codes
from saevlm_fast.data.rows import open_activations
from saevlm_fast.data.store import read_index, verify
from saevlm_fast.errors import Interrupted
from saevlm_fast.harvesting import run as run_module
from saevlm_fast.harvesting.config import HarvestConfig
from saevlm_fast.harvesting.plan import sampled_digest
from saevlm_fast.harvesting.run import harvest
from saevlm_fast.harvesting.stores import HarvestStores
from saevlm_fast.images.decode import decode
from saevlm_fast.images.open import open_images
from saevlm_fast.provenance import sae_mismatch
from saevlm_fast.sae import SparseAutoencoder, with_metadata
from saevlm_fast.towers.load import load_tower
from saevlm_fast.towers.tokens import Tokens
from saevlm_fast.towers.tower import HookedTower, HookPoint
from tiny_tower import N_BLOCKS, N_TOKENS, PROJECTED, WIDTH, save_clip, save_photos

N_IMAGES = 22
POINTS = (*(HookPoint("residual", layer) for layer in range(N_BLOCKS)), HookPoint("projection"))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return save_photos(tmp_path_factory.mktemp("photos"), N_IMAGES)


@pytest.fixture(scope="module")
def tower(model):
    return load_tower(f"hf:{model}")


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


def run_harvest(tower, photos, output, config=None, **options):
    config = config or HarvestConfig(POINTS, (Tokens.parse("cls"), Tokens.parse("random:3")), batch_size=4)
    options = {"workers": 0} | options
    return harvest(open_images(str(photos)), tower, config, HarvestOptions(output, **options))


def rows_and_items(path):
    store = open_activations(path)
    return store.rows(torch.arange(store.n_rows)), store.items().to_pydict()


def digests(directory):
    """(store, shard number, SHA-256 of its two files) of all stores in a directory: the rows and their order."""
    return sorted(
        (index.parent.name, shard.number, shard.sha256, shard.items_sha256)
        for index in directory.rglob("index.json")
        for shard in read_index(index.parent).shards
    )


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


def small_units():
    tokens = (Tokens.parse("cls"), Tokens.parse("random:3"))
    return HarvestConfig((HookPoint("residual", 0), HookPoint("projection")), tokens, batch_size=2, images_per_shard=4)


@pytest.fixture(scope="module")
def whole(tower, photos, tmp_path_factory):
    """The harvest of small units, uninterrupted."""
    output = tmp_path_factory.mktemp("whole") / "out"
    run_harvest(tower, photos, output, small_units())
    return output


@pytest.mark.parametrize("stop_after", [1, 3, 5, 6, 11])
def test_interrupted_and_resumed_gives_the_same_rows(tower, photos, whole, tmp_path, stop_after):
    output, batches = tmp_path / "out", []

    def stop(done, total, skipped):
        batches.append(done)
        if len(batches) == stop_after:
            os.kill(os.getpid(), signal.SIGINT)

    source, options = open_images(str(photos)), HarvestOptions(output, workers=0)
    if stop_after < 11:
        with pytest.raises(Interrupted, match="--resume"):
            harvest(source, tower, small_units(), options, on_images=stop)
        with pytest.raises(ValueError, match="incomplete"):
            open_activations(output / "projection")
    before = {path: path.stat().st_mtime_ns for path in output.rglob("shard-*")}
    summary = run_harvest(tower, photos, output, small_units(), resume=True)
    assert summary.n_images == N_IMAGES
    assert all(path.stat().st_mtime_ns == changed for path, changed in before.items())
    assert digests(output) == digests(whole)
    assert not [path.name for path in output.rglob("*") if path.name.startswith((".writing", "skipped-", "index.part"))]


def test_a_store_that_is_behind_catches_up(tower, photos, whole, tmp_path):
    """Killed between the shards of two stores: the unit is done again, and written where it is missing."""
    output = tmp_path / "out"
    run_harvest(tower, photos, output, small_units())
    index = output / "projection" / "index.json"
    value = json.loads(index.read_text())
    edit_record(index, complete=False, shards=value["shards"][:2], shape=[8, PROJECTED])
    assert run_harvest(tower, photos, output, small_units(), resume=True).n_done_here == N_IMAGES - 8
    assert digests(output) == digests(whole)


def test_resume_of_a_finished_harvest_does_nothing(tower, photos, whole):
    assert run_harvest(tower, photos, whole, small_units(), resume=True).n_done_here == 0


@pytest.mark.parametrize("change", ["seed", "images", "batch", "pixels"])
def test_resume_refuses_other_settings(tower, photos, whole, tmp_path, change):
    config = small_units()
    if change == "pixels":  # the same names, other pictures
        photos = save_photos(tmp_path / "photos", N_IMAGES)
        Image.new("RGB", (40, 36)).save(sorted(photos.rglob("*.png"))[5])
    if change == "seed":
        config = replace(config, seed=1)
    if change == "batch":
        config = replace(config, batch_size=4)
    if change == "images":
        photos = save_photos(tmp_path / "photos", N_IMAGES - 1)
    with pytest.raises(ValueError, match=r"resume: .* but the run was started with"):
        run_harvest(tower, photos, whole, config, resume=True)


def test_resume_refuses_before_the_first_forward_and_a_new_harvest_does_not_wait(
    tower, photos, whole, tmp_path, monkeypatch
):
    """Of a new one the weights are hashed beside the forwards; so slowly here that all of these come first."""
    output, order = tmp_path / "out", []
    forward, begin = run_module._Loop._forward, HarvestStores.begin

    def noted(self, *args):
        order.append("forward")
        forward(self, *args)

    def slow(self):
        while "slowly" in order and order.count("forward") < 2:
            time.sleep(0.01)
        begin(self)
        order.append("begun")

    monkeypatch.setattr(run_module._Loop, "_forward", noted)
    monkeypatch.setattr(HarvestStores, "begin", slow)
    with pytest.raises(ValueError, match="but the run was started with"):
        run_harvest(tower, photos, whole, replace(small_units(), seed=1), resume=True)
    assert order == []
    order.append("slowly")
    run_harvest(tower, photos, output, small_units())
    assert order.index("begun") >= 2
    assert digests(output) == digests(whole)


@pytest.mark.parametrize("workers", [0, 2])
def test_stores_that_cannot_be_begun_end_the_harvest(tower, photos, tmp_path, monkeypatch, workers):
    def full(self):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(HarvestStores, "begin", full)
    with pytest.raises(OSError, match="No space left"):
        run_harvest(tower, photos, tmp_path / "out", small_units(), workers=workers)
    assert not multiprocessing.active_children()
    assert not (tmp_path / "out").exists()


def test_an_output_in_use_is_left_alone(tower, photos, whole, tmp_path):
    before = digests(whole)
    with pytest.raises(ValueError, match="--resume to continue or --force to replace"):
        run_harvest(tower, photos, whole, small_units())
    assert digests(whole) == before
    (tmp_path / "thesis.txt").write_text("mine")
    for options in ({}, {"force": True}, {"resume": True}):
        with pytest.raises(ValueError, match="not empty and holds no harvest"):
            run_harvest(tower, photos, tmp_path, small_units(), **options)
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_force_replaces_the_stores_and_nothing_else(tower, photos, tmp_path):
    output = tmp_path / "out"
    run_harvest(tower, photos, output, small_units())
    (output / "notes.txt").write_text("mine")
    one = HarvestConfig((HookPoint("residual", 1),), batch_size=4)
    run_harvest(tower, photos, output, one, force=True)
    assert (output / "notes.txt").read_text() == "mine"
    assert not (output / "projection").exists()
    assert open_activations(output).n_rows == N_IMAGES


def stop_at_third(done, total, skipped):
    if done > 10:
        os.kill(os.getpid(), signal.SIGINT)


def test_the_old_harvest_stays_until_the_new_is_complete(tower, photos, spoiled_photos, whole, tmp_path):
    output = tmp_path / "out"
    one = HarvestConfig((HookPoint("residual", 1),), batch_size=4)
    run_harvest(tower, photos, output, one)
    (output / "notes.txt").write_text("mine")
    before = digests(output)
    with pytest.raises(ValueError, match="max_skipped"):
        run_harvest(tower, spoiled_photos[0], output, one, force=True)
    source, options = open_images(str(photos)), HarvestOptions(output, workers=0, force=True)
    with pytest.raises(Interrupted, match=f"--resume --output {output}$"):
        harvest(source, tower, small_units(), options, on_images=stop_at_third)
    assert [each for each in digests(output) if each[0] == "out"] == before
    assert open_activations(output).n_rows == N_IMAGES
    with pytest.raises(ValueError, match="already holds a harvest"):
        run_harvest(tower, photos, output, small_units())
    assert run_harvest(tower, photos, output, small_units(), resume=True).n_done_here < N_IMAGES
    assert digests(output) == digests(whole)
    names = {path.name for path in output.iterdir()}
    stores = {path.name for path in whole.iterdir() if path.is_dir()}
    assert names == stores | {"notes.txt", "harvest.json", "skipped.jsonl"}


@pytest.mark.parametrize("name", ["..", "../other", "/etc", "a/../../other", "", "a/"])
def test_harvest_json_names_nothing_outside_the_harvest(tower, photos, tmp_path, name):
    run_harvest(tower, photos, tmp_path, HarvestConfig((HookPoint("residual", 1),), batch_size=4))
    inner = tmp_path / "inner"
    inner.mkdir()
    (inner / "harvest.json").write_text(json.dumps({"harvest": {"stores": [name]}}))
    before = digests(tmp_path)
    with pytest.raises(ValueError, match=r"stores\[0\] is .*; '.' or the name of a directory beside it is needed"):
        run_harvest(tower, photos, inner, small_units(), force=True)
    assert digests(tmp_path) == before
    assert [path.name for path in inner.iterdir()] == ["harvest.json"]


def test_what_is_in_the_way_of_a_new_store_is_left_alone(tower, photos, tmp_path):
    """A store of another hand, and a link that has taken the place of a store."""
    output, one = tmp_path / "out", HarvestConfig((HookPoint("residual", 1),), batch_size=4)
    run_harvest(tower, photos, output, one)
    run_harvest(tower, photos, output / "projection", one)
    with pytest.raises(ValueError, match=r"out/projection is there and not of the harvest that --force replaces"):
        run_harvest(tower, photos, output, small_units(), force=True)
    moved = tmp_path / "moved"
    (output / "projection").rename(moved)
    run_harvest(tower, photos, output, small_units(), force=True)
    shutil.rmtree(output / "projection")
    (output / "projection").symlink_to(moved)
    run_harvest(tower, photos, output, small_units(), force=True)
    assert not (output / "projection").is_symlink()
    assert open_activations(moved).d == WIDTH


@pytest.fixture
def spoiled_photos(tmp_path):
    """Of 22 photos, three cannot be used: truncated, empty, and 3,000 times as wide as high."""
    photos = save_photos(tmp_path / "spoiled", N_IMAGES)
    files = sorted(photos.rglob("*.png"))
    files[2].write_bytes(files[2].read_bytes()[:200])
    files[9].write_bytes(b"")
    Image.new("RGB", (3000, 1)).save(files[21])
    return photos, [files[i].relative_to(photos).as_posix() for i in (2, 9, 21)]


def test_unusable_images_are_skipped_and_listed(tower, whole, spoiled_photos, tmp_path):
    photos, spoiled = spoiled_photos
    summary = run_harvest(tower, photos, tmp_path / "out", small_units(), max_skipped=0.2)
    assert (summary.n_images, summary.n_skipped) == (N_IMAGES, 3)
    listed = [json.loads(line) for line in (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()]
    assert [line["image"] for line in listed] == spoiled
    assert "truncated" in listed[0]["reason"]
    rows_ND, items = rows_and_items(tmp_path / "out" / "projection")
    expected_ND, expected_items = rows_and_items(whole / "projection")
    kept = [i for i, name in enumerate(expected_items["image"]) if name not in spoiled]
    assert items["image"] == [expected_items["image"][i] for i in kept]
    torch.testing.assert_close(rows_ND, expected_ND[kept], atol=1e-5, rtol=1e-5)


def test_too_many_unusable_images_fail_the_harvest(tower, spoiled_photos, tmp_path):
    photos, spoiled = spoiled_photos
    output = tmp_path / "out"
    with pytest.raises(ValueError, match=r"max_skipped: 1 of 22 images could not be used, more than 1.00%; .*trunc"):
        run_harvest(tower, photos, output, small_units())
    assert spoiled[0] in (output / "skipped.jsonl").read_text()
    summary = run_harvest(tower, photos, output, small_units(), resume=True, max_skipped=0.2)
    assert summary.n_skipped == 3
    assert len((output / "skipped.jsonl").read_text().splitlines()) == 3


def test_skipped_images_of_units_done_earlier_still_count(tower, spoiled_photos, tmp_path):
    photos, _ = spoiled_photos
    with pytest.raises(ValueError, match="max_skipped: 3 of 22"):  # the last image of all
        run_harvest(tower, photos, tmp_path / "out", small_units(), max_skipped=0.1)
    with pytest.raises(ValueError, match="max_skipped: 3 of 22"):
        run_harvest(tower, photos, tmp_path / "out", small_units(), max_skipped=0.1, resume=True)


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


@pytest.fixture(scope="module")
def sae_directory(tmp_path_factory):
    """An SAE of the tower's width, with random weights."""
    directory = tmp_path_factory.mktemp("sae")
    sae = SparseAutoencoder(SAEConfig(WIDTH, 64, k=5))
    sae.reset_parameters(3)
    sae.threshold.fill_(0.3)
    sae.save_pretrained(directory)
    return directory


def codes_harvest(tower, photos, output, sae_directory, tokens, **settings):
    config = HarvestConfig((HookPoint("residual", 1),), (Tokens.parse(tokens),), batch_size=2, images_per_shard=4,
                           sae=sae_directory, **settings)  # fmt: skip
    run_harvest(tower, photos, output, config)
    return open_codes(output)


def dense_codes(store):
    """All codes of a store as a dense matrix [N, d_sae]."""
    return torch.cat([codes.dense() for _, codes in store.chunks(7)])


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
        ({"points": POINTS[:1] * 2}, "same hook point"),
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


def test_resume_refuses_another_sae(tower, photos, sae_directory, tmp_path):
    """Its weights may be the same: k, say, is in cfg.json."""
    directory = tmp_path / "sae"
    shutil.copytree(sae_directory, directory)
    config = HarvestConfig((HookPoint("residual", 1),), batch_size=4, sae=directory)
    run_harvest(tower, photos, tmp_path / "out", config)
    settings = json.loads((directory / "cfg.json").read_text())
    settings["metadata"]["k"] = 7
    edit_record(directory / "cfg.json", metadata=settings["metadata"])
    with pytest.raises(ValueError, match="resume: sae is"):
        run_harvest(tower, photos, tmp_path / "out", config, resume=True)


@pytest.mark.parametrize("settings", [{}, {"pool": "mean"}])
def test_tokens_the_tower_does_not_have_are_refused_before_anything_is_written(
    tower, photos, sae_directory, tmp_path, settings
):
    config = HarvestConfig((HookPoint("residual", 1),), (Tokens.parse("random:17"),), sae=sae_directory, **settings)
    with pytest.raises(ValueError, match="there are 16 to draw from"):
        run_harvest(tower, photos, tmp_path / "out", config)
    assert not (tmp_path / "out").exists()


def test_an_image_that_can_be_read_again_is_in_all_stores_or_none(tower, spoiled_photos, tmp_path):
    """Killed between two stores of a unit with an unreadable image, which is readable when the unit is done anew."""
    photos, spoiled = spoiled_photos
    output = tmp_path / "out"
    run_harvest(tower, photos, output, small_units(), max_skipped=0.2)
    index = output / "projection" / "index.json"
    value = json.loads(index.read_text())
    edit_record(index, complete=False, shards=value["shards"][1:], shape=[value["shape"][0] - 3, PROJECTED])
    (output / "skipped.jsonl").rename(output / "skipped-00000.jsonl")  # as if the run had not ended
    with Image.open(photos / "class_1" / "photo_001.png") as good:
        good.save(photos / spoiled[0])
    harvest_file = output / "harvest.json"
    settings = json.loads(harvest_file.read_text())
    settings["images"]["content"] = sampled_digest(open_images(str(photos)), N_IMAGES)  # only a sample is compared
    edit_record(harvest_file, images=settings["images"])
    run_harvest(tower, photos, output, small_units(), resume=True, max_skipped=0.2)
    for store in ("residual-0-cls", "projection"):
        assert spoiled[0] in rows_and_items(output / store)[1]["image"]
    assert spoiled[0] not in (output / "skipped.jsonl").read_text()


def test_force_clears_a_harvest_that_was_only_begun(tower, photos, whole, tmp_path):
    output = tmp_path / "out"
    run_harvest(tower, photos, output, small_units())
    shutil.rmtree(output / "projection")
    run_harvest(tower, photos, output, small_units(), force=True)
    assert digests(output) == digests(whole)


def test_stores_without_all_units_are_not_declared_complete(tower, photos, tmp_path, monkeypatch):
    write = HarvestStores._write_shard
    monkeypatch.setattr(HarvestStores, "_write_shard", lambda self, unit, *rest: unit == 5 or write(self, unit, *rest))
    with pytest.raises(ValueError, match="1 of 6 shards are missing"):
        run_harvest(tower, photos, tmp_path / "out", small_units())
    assert not read_index(tmp_path / "out" / "projection").complete


def test_two_harvests_do_not_share_an_output(photos, tower, tmp_path, monkeypatch):
    """The other one is another process, as a lock is this process's own."""
    output = tmp_path / "out"
    run_harvest(tower, photos, output, small_units())
    holder = subprocess.Popen(
        [sys.executable, "-c", "import fcntl, sys, time; f = open(sys.argv[1], 'a+'); fcntl.lockf(f, fcntl.LOCK_SH); "
         "print('held', flush=True); time.sleep(60)", str(output / ".lock")], stdout=subprocess.PIPE,
    )  # fmt: skip
    holder.stdout.readline()
    monkeypatch.setattr(outputs, "LOCK_SECONDS", 0.1)
    with pytest.raises(ValueError, match=r"^output: .*out is in use: another process writes to it$"):
        run_harvest(tower, photos, output, small_units(), resume=True)
    holder.kill()
    holder.wait()
    run_harvest(tower, photos, output, small_units(), resume=True)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_picture_that_upsets_the_preprocessing_is_skipped(tower, photos, whole, tmp_path, monkeypatch, workers):
    bad = open_images(str(photos)).read(6)
    monkeypatch.setattr(tower, "preprocess", Upset(tower.preprocess, decode(bad).getpixel((0, 0))))
    summary = run_harvest(tower, photos, tmp_path / "out", small_units(), workers=workers, max_skipped=0.1)
    assert summary.n_skipped == 1
    assert "preprocessing failed: no such luck" in (tmp_path / "out" / "skipped.jsonl").read_text()
    assert len(rows_and_items(tmp_path / "out" / "projection")[0]) == N_IMAGES - 1


def test_running_out_of_memory_is_no_fault_of_the_images(tower, photos, tmp_path, monkeypatch):
    def exhausted(pictures):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(tower, "preprocess", Once(tower.preprocess, exhausted))
    with pytest.raises(OSError, match="images: RuntimeError: DefaultCPUAllocator: can't allocate memory"):
        run_harvest(tower, photos, tmp_path / "out", small_units(), max_skipped=1.0)


class Once:
    """Preprocessing for the images that the tower is tried with, together and alone, and another afterwards."""

    def __init__(self, first, others):
        self.calls = iter([first] * 3)
        self.others = others

    def __call__(self, pictures):
        return next(self.calls, self.others)(pictures)


def test_a_worker_that_dies_ends_the_harvest_in_one_line(tower, photos, tmp_path):
    def kill(done, total, skipped):
        for worker in multiprocessing.active_children():
            os.kill(worker.pid, signal.SIGKILL)
        time.sleep(30)  # until torch's handler of the child's end raises, here and not in what comes after

    options = HarvestOptions(tmp_path / "out", workers=1)
    with pytest.raises(OSError, match=r"^workers: DataLoader worker \(pid .*try fewer --workers\)$"):
        harvest(open_images(str(photos)), tower, small_units(), options, on_images=kill)


class Upset:
    """Preprocessing that fails for the picture whose first pixel is this."""

    def __init__(self, preprocess, pixel):
        self.preprocess, self.pixel = preprocess, pixel

    def __call__(self, pictures):
        if any(picture.getpixel((0, 0)) == self.pixel for picture in pictures):
            raise ValueError("no such luck")
        return self.preprocess(pictures)


@pytest.mark.parametrize("workers", [0, 1])
def test_what_is_no_fault_of_an_image_ends_the_harvest_in_one_line(tower, photos, tmp_path, monkeypatch, workers):
    source = open_images(str(photos))
    monkeypatch.setattr(type(source), "read", lambda self, i: (_ for _ in ()).throw(OSError(24, "Too many open files")))
    monkeypatch.setattr("saevlm_fast.harvesting.plan.sampled_digest", lambda source, n_images: "")
    with pytest.raises(OSError, match=r"images: OSError: \[Errno 24\] Too many open files$"):
        run_harvest(tower, photos, tmp_path / "out", small_units(), workers=workers)


def test_large_photos_are_preprocessed_a_few_at_a_time(tower, photos, whole, tmp_path, monkeypatch):
    monkeypatch.setattr("saevlm_fast.images.batches._PIXELS_AT_A_TIME", 3000)  # a photo has 1440
    config = replace(small_units(), batch_size=8, images_per_shard=8)
    run_harvest(tower, photos, tmp_path / "out", config)
    rows_ND, items = rows_and_items(tmp_path / "out" / "projection")
    expected_ND, expected_items = rows_and_items(whole / "projection")
    assert items == expected_items
    torch.testing.assert_close(rows_ND, expected_ND, atol=1e-5, rtol=1e-5)


def test_overflow_names_the_image_and_a_way_out(tower, photos, tmp_path, monkeypatch):
    run = HookedTower.__call__
    monkeypatch.setattr(HookedTower, "__call__", lambda self, x: {p: a * 1e6 for p, a in run(self, x).items()})
    with pytest.raises(ValueError, match=r"image class_0/photo_000.png, token .*try --store-dtype bfloat16"):
        run_harvest(tower, photos, tmp_path / "out", replace(small_units(), store_dtype="float16"))


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


# From here on: the command, in processes of its own.


class Rank(multiprocessing.get_context("fork").Process):
    """The command as one of torchrun's processes: torchrun's environment, without importing torch and all anew."""

    def __init__(self, rank, world, port, arguments, log):
        super().__init__()
        self.arguments, self.log = ["saevlm-fast", *map(str, arguments)], log
        self.environment = {
            "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world,
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
        }  # fmt: skip

    def run(self):
        os.environ.update({name: str(value) for name, value in self.environment.items()})
        with open(self.log, "w", buffering=1) as log, redirect_stdout(log), redirect_stderr(log):
            sys.argv = self.arguments
            main()


def start_ranks(world, arguments, logs):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [Rank(rank, world, port, arguments, logs / f"rank-{rank}.log") for rank in range(world)]
    for rank in ranks:
        rank.start()
    return ranks


def harvest_arguments(model, photos, output, *more):
    return (
        "harvest", "--model", f"hf:{model}", "--images", photos, "--output", output, "--layer", "0", "--point",
        "residual,projection", "--tokens", "cls,random:3", "--batch-size", 2, "--images-per-shard", 4, *more,
    )  # fmt: skip


def test_the_command_prints_what_it_did(model, photos, whole, tmp_path):
    text = run(*harvest_arguments(model, photos, tmp_path / "out"))
    for word in ("22 images", "residual-0-cls", "residual-0-random3", "projection", "images/s", "waiting"):
        assert word in text
    assert digests(tmp_path / "out") == digests(whole)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("--layer", "3"), "layer"),
        (("--layer", "x"), "layer: 'x' is not a whole number"),
        (("--point", "nose"), "point"),
        (("--tokens", "random:0"), "tokens"),
        (("--tokens", "random:17"), "tokens"),
        (("--model", "CLIP"), "model"),
        (("--images", "/nowhere"), "/nowhere"),
        (("--max-skipped", "2"), "max_skipped: 2.0 must be between 0 and 1"),
        (("--device", "tpu"), "device"),
    ],
)
def test_bad_input_ends_in_one_line(model, photos, tmp_path, change, message):
    arguments = list(harvest_arguments(model, photos, tmp_path / "out"))
    if change[0] in arguments:
        arguments[arguments.index(change[0]) + 1] = change[1]
    else:
        arguments += change
    *before, error = run(*arguments, code=2).splitlines()
    assert error.startswith("error:")
    assert message in error
    assert len(before) <= 1  # what model and images were found
    assert not (tmp_path / "out").exists()


def test_ranks_share_the_work_and_give_the_same_rows(model, photos, whole, tmp_path):
    ranks = start_ranks(2, harvest_arguments(model, photos, tmp_path / "out"), tmp_path)
    for rank in ranks:
        rank.join(120)
    said = "".join(rank.log.read_text() for rank in ranks)
    assert [rank.exitcode for rank in ranks] == [0, 0], said
    assert digests(tmp_path / "out") == digests(whole)
    assert said.count("wrote") == 3  # one rank speaks
    for index in (tmp_path / "out").rglob("index.json"):
        verify(index.parent)


def test_torchrun_gives_a_process_what_a_rank_has_here(tmp_path):
    """Its environment, and the command as a module's words."""
    (tmp_path / "told.py").write_text(
        "import json, os, sys\n"
        "names = [name for name in os.environ if 'RANK' in name or 'WORLD' in name or name.startswith('MASTER_')]\n"
        "told = {name: os.environ[name] for name in names} | {'words': sys.argv[1:]}\n"
        "open(os.environ['RANK'] + '.json', 'w').write(json.dumps(told))\n"
    )
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    subprocess.run([*torchrun, "-m", "told", "harvest", "--layer", "1"], cwd=tmp_path, timeout=300, check=True)
    for number in range(2):
        told = json.loads((tmp_path / f"{number}.json").read_text())
        assert told.pop("words") == ["harvest", "--layer", "1"]
        here = Rank(number, 2, int(told["MASTER_PORT"]), [], tmp_path / "log").environment
        here |= {"MASTER_ADDR": told["MASTER_ADDR"]}  # a name of this machine
        assert {name: told[name] for name in here} == {name: str(value) for name, value in here.items()}


def test_a_rank_that_fails_ends_the_others_in_one_line(model, spoiled_photos, tmp_path):
    """Only rank 1 meets an image that cannot be used."""
    photos, _ = spoiled_photos
    words = harvest_arguments(model, photos, tmp_path / "out", "--limit", 4, "--images-per-shard", 2)
    ranks = start_ranks(2, words, tmp_path)
    for rank in ranks:
        rank.join(120)
    assert [rank.exitcode for rank in ranks] == [130, 2]
    waiting, failing = (rank.log.read_text() for rank in ranks)
    assert "error: max_skipped: 1 of 4 images could not be used" in failing
    assert "another of the 2 ranks has ended" in waiting
    assert "RuntimeError" not in waiting + failing


def test_killed_ranks_are_resumed_by_one_process(tower, model, tmp_path):
    photos = save_photos(tmp_path / "photos", 200)
    run_harvest(tower, photos, tmp_path / "whole", small_units())
    output = tmp_path / "out"
    ranks = start_ranks(2, harvest_arguments(model, photos, output), tmp_path)
    deadline = time.monotonic() + 120
    while len(list((output / "projection").glob("shard-*.safetensors"))) < 3:
        assert all(rank.is_alive() for rank in ranks)
        assert time.monotonic() < deadline
        time.sleep(0.01)
    for rank in ranks:
        rank.kill()
    for rank in ranks:
        rank.join()
    assert not read_index(output / "projection").complete
    summary = run_harvest(tower, photos, output, small_units(), resume=True)
    assert 0 < summary.n_done_here < 200
    assert digests(output) == digests(tmp_path / "whole")
