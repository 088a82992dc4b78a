"""Harvests interrupted, resumed, replaced, in each other's way."""

import json
import multiprocessing
import os
import shutil
import signal
import time
from dataclasses import replace

import pytest
from held_locks import held
from PIL import Image
from small_harvests import N_IMAGES, digests, run_harvest, small_units, stop_at_third

from damage import edit_record
from saevlm_fast import outputs
from saevlm_fast.config import HarvestOptions
from saevlm_fast.data.rows import open_activations
from saevlm_fast.data.store import read_index
from saevlm_fast.errors import Interrupted
from saevlm_fast.harvesting import run as run_module
from saevlm_fast.harvesting.config import HarvestConfig
from saevlm_fast.harvesting.run import harvest
from saevlm_fast.harvesting.stores import HarvestStores
from saevlm_fast.images.open import open_images
from saevlm_fast.towers.tower import HookPoint
from tiny_tower import PROJECTED, WIDTH, save_photos


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
    before = set(multiprocessing.active_children())
    with pytest.raises(OSError, match="No space left"):
        run_harvest(tower, photos, tmp_path / "out", small_units(), workers=workers)
    assert not set(multiprocessing.active_children()) - before
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
    monkeypatch.setattr(outputs, "LOCK_SECONDS", 0.1)
    refused = pytest.raises(ValueError, match=r"^output: .*out is in use: another process writes to it$")
    with held(output / ".lock", "shared"), refused:
        run_harvest(tower, photos, output, small_units(), resume=True)
    run_harvest(tower, photos, output, small_units(), resume=True)
