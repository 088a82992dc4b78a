"""From images to SAEs in one pass: rows are a harvest's, every SAE is the one trained alone, a kill changes nothing."""

import multiprocessing
import os
import signal
from contextlib import contextmanager
from threading import Event

import numpy as np
import pytest
import torch
from small_runs import same_weights

from saevlm_fast.config import SAESize, StreamSettings, TrainConfig
from saevlm_fast.data.rows import open_activations
from saevlm_fast.data.store import verify
from saevlm_fast.errors import Interrupted
from saevlm_fast.harvesting.api import harvest
from saevlm_fast.harvesting.stream import ShuffledImages
from saevlm_fast.images.open import open_images
from saevlm_fast.runtime import resolve_device
from saevlm_fast.sae import SparseAutoencoder
from saevlm_fast.towers.load import load_tower
from saevlm_fast.training.checkpoints import checkpoints
from saevlm_fast.training.evaluate import evaluate
from saevlm_fast.training.one_pass import train_from_images
from tiny_tower import save_clip, save_photos

N_IMAGES = 40
SAES = {"a": SAESize(k=3, d_sae=48), "b": SAESize(k=4, d_sae=32, architecture="topk")}
ONE = {"": SAES["a"]}
KNOWN = {"steps": 9, "batch_size": 16, "lr": 5e-3, "device": "cpu", "threshold_start": 3, "dead_after": 100}
# Five places: windows are of 3 steps, forwards of 7 images; the projection has a row an image, the others three.
STREAM = {"layer": (0, 2), "point": ("residual", "mlp", "projection"), "tokens": "random:3", "buffer": "50"}
STREAM |= {"workers": 0, "image_batch": 7}
PLACES = ("residual-0-random3", "residual-2-random3", "mlp-0-random3", "mlp-2-random3", "projection")
HERE = {"layer": 2, "point": "residual"}
TWO = {"layer": 2, "point": ("residual", "projection")}


@pytest.fixture(scope="module")
def tower(tmp_path_factory):
    return load_tower(f"hf:{save_clip(tmp_path_factory.mktemp('clip'))}", resolve_device("cpu"))


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return save_photos(tmp_path_factory.mktemp("photos"), N_IMAGES)


@pytest.fixture(scope="module")
def run(tower, photos):
    """Trains on the photos, by default SAES at PLACES."""

    def train(saes=SAES, images=photos, **settings):
        return train_from_images(tower, images, saes, **KNOWN | STREAM | settings)

    return train


@pytest.fixture(scope="module")
def whole(run):
    """All places and SAEs at once, uninterrupted."""
    return run()


def check_same(found, whole, output):
    """That a run is the uninterrupted one: what it returned and what it left."""
    assert list(found) == list(whole)
    for name, trained in whole.items():
        assert same_weights(found[name].sae, trained.sae), name
        assert found[name].metrics == trained.metrics, name
        assert same_weights(SparseAutoencoder.from_pretrained(output / name), trained.sae)


def cut_at(stop):
    def on_step(done, total):
        if done >= stop:
            raise KeyboardInterrupt

    return on_step


def test_every_place_has_every_sae_and_each_is_the_one_trained_alone(run, whole):
    assert list(whole) == [f"{place}/{name}" for place in PLACES for name in SAES]
    layers = run({"a": SAES["a"]}, point="mlp", tokens=("cls", "random:3"))
    assert list(layers) == ["mlp-0-cls/a", "mlp-0-random3/a", "mlp-2-cls/a", "mlp-2-random3/a"]
    alone = run(ONE, layer=2, point="mlp")[""]
    for there in (whole["mlp-2-random3/a"], layers["mlp-2-random3/a"]):
        assert same_weights(alone.sae, there.sae)
        assert alone.metrics == there.metrics
    source = whole["mlp-2-random3/a"].sae.config.metadata["source"]
    assert (source["point"], source["layer"], source["tokens"]) == ("mlp", 2, "random3")


@pytest.mark.parametrize("where", ["device", "host"])
def test_where_the_buffer_is_and_how_its_size_is_told_change_nothing(run, whole, where):
    known = {"saes": ONE, "layer": 0, "point": "residual", "buffer_on": where}
    for buffer in ("50 rows", "3 batches"):
        trained = run(buffer=buffer, **known)[""]
        assert same_weights(trained.sae, whole["residual-0-random3/a"].sae)
        assert trained.metrics == whole["residual-0-random3/a"].metrics
    in_bytes, in_rows = run(buffer="1MiB", **known)[""], run(buffer="144", **known)[""]
    assert same_weights(in_bytes.sae, in_rows.sae), "all 144 rows are one window"
    assert in_bytes.metrics["rows"] == 144
    assert not same_weights(in_bytes.sae, whole["residual-0-random3/a"].sae)


@pytest.mark.gpu
def test_gpu_a_buffer_on_the_host_gives_the_same_bits(tower, photos):
    on_gpu = load_tower(tower.spec, resolve_device("cuda"))
    known = KNOWN | STREAM | {"device": "cuda", "layer": 0, "point": "residual"}
    one, other = (train_from_images(on_gpu, photos, ONE, **known, buffer_on=where)[""] for where in ("device", "host"))
    assert same_weights(one.sae, other.sae)
    assert one.metrics == other.metrics


@pytest.mark.parametrize("stops", [(6, 13), (17,)])
def test_cut_anywhere_it_goes_on_to_the_bit(run, whole, tmp_path, stops):
    """Windows are of 3 steps, checkpoints and forwards are not. The places go at their own pace."""
    known = {"output": tmp_path, "checkpoint_every": 2} | TWO
    for stop in stops:
        with pytest.raises(KeyboardInterrupt):
            run(resume=stop != stops[0], on_step=cut_at(stop), **known)
    found = run(resume=True, **known)
    check_same(found, {name: whole[name] for name in found}, tmp_path)


def test_a_finished_run_is_evaluated_again_and_another_one_is_refused(run, whole, tmp_path):
    known = {"saes": ONE, "output": tmp_path, **HERE}
    run(**known)
    assert run(resume=True, **known)[""].metrics == whole["residual-2-random3/a"].metrics
    with pytest.raises(ValueError, match="resume: buffer is 64, but the run was started with 50"):
        run(resume=True, buffer="64", **known)
    with pytest.raises(ValueError, match="resume: images is 30, but the run was started with 40"):
        run(resume=True, limit=30, **known)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_after_kill_9_all_of_it_goes_on_to_the_bit_and_so_does_the_store_that_is_kept(
    tower, photos, run, whole, tmp_path
):
    """Layers, points and SAEs at once; what is kept has the rows of a harvest, in the order of the pass."""
    known = {"output": tmp_path / "run", "keep_store": tmp_path / "kept", "checkpoint_every": 2}

    def killed():
        torch.set_num_threads(1)
        run(on_step=lambda done, total: os.kill(os.getpid(), signal.SIGKILL) if done == 17 else None, **known)

    process = multiprocessing.get_context("fork").Process(target=killed)
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    newest = {name: [path.name for path in checkpoints(tmp_path / "run" / name)][-1:] for name in whole}
    assert newest["residual-0-random3/a"] == ["step_00000004"]
    assert newest["projection/a"] == [], "its buffer was not full"
    check_same(run(resume=True, **known), whole, tmp_path / "run")
    for place in (tmp_path / "kept").iterdir():
        if place.is_dir():
            verify(place)
    more = {"layer": (0, 2), "point": ("residual", "mlp", "projection"), "tokens": "random:3", "workers": 0}
    harvest(tower, photos, output=tmp_path / "store", **more)
    for place in PLACES:
        check_same_rows(open_activations(tmp_path / "kept" / place), open_activations(tmp_path / "store" / place))


def check_same_rows(kept, stored):
    rows = [
        {(item["image"], item["token"]): i for i, item in enumerate(each.items().to_pylist())}
        for each in (kept, stored)
    ]
    assert len(rows[0]) == kept.n_rows == stored.n_rows
    assert rows[0].keys() == rows[1].keys()
    assert rows[0] != rows[1], "in another order"
    order = torch.tensor([rows[1][key] for key in rows[0]])
    torch.testing.assert_close(kept.rows(torch.arange(kept.n_rows)), stored.rows(order), atol=1e-4, rtol=1e-4)


def test_an_interrupt_leaves_checkpoints_of_all_that_have_begun(run, whole, tmp_path, monkeypatch):
    event = Event()

    @contextmanager
    def interruptible(patient=False):
        yield event

    monkeypatch.setattr("saevlm_fast.training.one_pass.interruptible", interruptible)
    known = TWO | {"output": tmp_path}
    with pytest.raises(Interrupted):
        run(on_step=lambda done, total: event.set() if done == 5 else None, **known)
    assert checkpoints(tmp_path / "residual-2-random3" / "b")
    event.clear()
    resumed = run(resume=True, **known)
    assert len(resumed) == 4
    assert all(same_weights(trained.sae, whole[name].sae) for name, trained in resumed.items())


def test_every_epoch_has_its_own_order_of_all_images(photos):
    source = open_images(photos)
    orders = [[ShuffledImages(source, 40, 0, epoch).image_id(i) for i in range(40)] for epoch in (0, 0, 1)]
    assert orders[0] == orders[1]
    assert orders[0] != orders[2]
    assert all(sorted(order) == sorted(source.image_id(i) for i in range(40)) for order in orders)


def test_held_out_images_are_what_is_evaluated(tower, run, whole, tmp_path):
    held_out = save_photos(tmp_path / "held out", 9)
    trained = run(ONE, tokens="cls", validation_images=str(held_out), **HERE)[""]
    stored = harvest(tower, held_out, layer=2, tokens="cls", output=tmp_path / "store", workers=0, batch_size=4)
    expected = evaluate(trained.sae, stored)
    assert trained.metrics["rows"] == 9
    assert trained.metrics["explained_variance"] == pytest.approx(expected["explained_variance"], rel=1e-4)
    assert whole["projection/a"].metrics["rows"] == 48, "the last window, of three steps"


def test_the_secrets_of_a_url_are_written_nowhere(run, photos, tmp_path):
    url = "https://me:s3cret@example.org/photos.tar?X-Amz-Signature=5ecret"
    run(ONE, open_images(photos), **HERE, images_path=url, output=tmp_path / "run", keep_store=tmp_path / "store")
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert any(b"example.org/photos.tar" in file.read_bytes() for file in files)
    assert not [file for file in files if b"s3cret" in file.read_bytes() or b"5ecret" in file.read_bytes()]


def test_center_and_micro_batches_go_with_it(run):
    centred = run(ONE, center=True, accumulate=2, **HERE)[""]
    assert centred.sae.config.metadata["mean_norm"] > 1


def test_images_that_cannot_be_used_are_left_out_up_to_a_share(run, tmp_path):
    save_photos(tmp_path / "photos", 20)
    broken = sorted((tmp_path / "photos").rglob("*.png"))[3]
    broken.write_bytes(b"no image")
    known = {"tokens": "cls", "steps": 4, "batch_size": 8, "buffer": "16", **HERE}
    trained = run(ONE, str(tmp_path / "photos"), max_skipped=0.1, **known)[""]
    assert trained.sae.config.metadata["n_training_samples"] == 32
    with pytest.raises(ValueError, match=r"max_skipped: 1 of 20 images could not be used, more than 1.00%"):
        run(ONE, str(tmp_path / "photos"), **known)


def test_what_is_refused(tower, photos, run):
    for more, message in (
        ({"layer": 9}, "layer: 9 of hf:.*, whose blocks are 0 to 2"),
        ({"buffer": "15"}, "buffer: 15 are 15 rows, which must be at least batch_size = 16"),
        ({"buffer": "much"}, "buffer: 'much' is not a number of rows"),
        ({"layer": ()}, "layer: residual needs a layer"),
        ({"control": "shuffled"}, "control: shuffled is of a run from a store"),
        ({"layer": (2, 2)}, "layer: 2 is listed twice"),
        ({"layer": np.int64(9)}, "layer: 9 of hf:.*, whose blocks are 0 to 2"),
        ({"layer": 2.0}, "layer: 2.0 is not a whole number"),
        ({"tokens": "some"}, "tokens: 'some' is not one of"),
        ({"saes": {"a": SAES["a"], "": SAES["b"]}}, "saes: '' is not the name of a directory"),
        ({"saes": {"a": SAESize(k=200, d_sae=48)}}, "k"),
        ({"stepz": 3}, "stepz: no setting of train_from_images; did you mean 'steps'"),
        ({"buffer": "400GiB", "steps": 10**9, "tokens": ("cls", "mean")}, "memory: 4 together take"),
    ):
        with pytest.raises(ValueError, match=message):
            run(**{"saes": ONE, **HERE} | more)
    with pytest.raises(ValueError, match="model: 3 is not"):
        train_from_images(3, photos, ONE, layer=2)
    with pytest.raises(ValueError, match="layer: residual needs a layer"):
        train_from_images("hf:there-is-no-such-model", photos, ONE)
    with pytest.raises(ValueError, match="layer: given beside stream"):
        train_from_images(tower, photos, ONE, TrainConfig(steps=2), stream=StreamSettings(), layer=2)


def test_one_row_of_one_image_teaches_nothing(tower, photos, tmp_path):
    sizes, more = {"": SAESize(expansion=2, k=2)}, {"steps": 2, "batch_size": 4, "layer": 1}
    image = next(photos.rglob("*.png"))
    with pytest.raises(ValueError, match=r"^images: one row of residual-1-cls in .*: there is nothing to learn$"):
        train_from_images(tower, [image], sizes, output=tmp_path / "run", **more)
    assert not (tmp_path / "run").exists()
    trained = train_from_images(tower, [image], sizes, tokens="patches", **more)[""]
    assert trained.metrics["rows"] > 1, "patches of one image are several rows"


def test_buffers_of_bytes_rows_and_batches():
    for text, rows in (("64 batches", 64 * 100), ("300", 300), ("300 rows", 300), ("1MiB", 1024), ("2 GiB", 5000)):
        assert StreamSettings(buffer=text).buffer_rows(100, 1024, 5000 if "G" in text else 10**9) == rows
