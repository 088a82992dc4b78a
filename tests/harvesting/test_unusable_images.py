"""Images and preprocessing that fail: what is skipped and listed, what ends the harvest in one line."""

import json
import multiprocessing
import os
import signal
import time
from dataclasses import replace

import pytest
import torch
from PIL import Image
from small_harvests import N_IMAGES, Upset, rows_and_items, run_harvest, small_units

from damage import edit_record
from saevlm_fast.config import HarvestOptions
from saevlm_fast.harvesting.plan import sampled_digest
from saevlm_fast.harvesting.run import harvest
from saevlm_fast.images.decode import decode
from saevlm_fast.images.open import open_images
from saevlm_fast.images.sources import FolderSource
from saevlm_fast.towers.tower import HookedTower
from tiny_tower import PROJECTED


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
    with pytest.raises(OSError, match=r"^workers: DataLoader worker \(pid.*try fewer --workers\)$"):
        harvest(open_images(str(photos)), tower, small_units(), options, on_images=kill)


class OutOfFiles(FolderSource):
    """A class of a module, which workers that are no forks import."""

    def read(self, i):
        raise OSError(24, "Too many open files")


@pytest.mark.parametrize("workers", [0, 1])
def test_what_is_no_fault_of_an_image_ends_the_harvest_in_one_line(tower, photos, tmp_path, monkeypatch, workers):
    source = open_images(str(photos))
    source.__class__ = OutOfFiles
    monkeypatch.setattr("saevlm_fast.harvesting.plan.sampled_digest", lambda *_: "")
    with pytest.raises(OSError, match=r"images: OSError: \[Errno 24\] Too many open files$"):
        harvest(source, tower, small_units(), HarvestOptions(tmp_path / "out", workers=workers))


def test_overflow_names_the_image_and_a_way_out(tower, photos, tmp_path, monkeypatch):
    run = HookedTower.__call__
    monkeypatch.setattr(HookedTower, "__call__", lambda self, x: {p: a * 1e6 for p, a in run(self, x).items()})
    with pytest.raises(ValueError, match=r"image class_0/photo_000.png, token .*try --store-dtype bfloat16"):
        run_harvest(tower, photos, tmp_path / "out", replace(small_units(), store_dtype="float16"))
