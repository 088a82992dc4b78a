"""From images to SAEs in one pass: rows are a harvest's, every SAE is the one trained alone, a kill changes nothing."""

import os
import signal
import subprocess
import sys

import pytest
import torch

from command import ROOT
from saevlm_fast.config import SAESize, StreamSettings, TrainConfig
from saevlm_fast.data.rows import open_activations
from saevlm_fast.data.store import verify
from saevlm_fast.errors import Interrupted
from saevlm_fast.harvesting.api import harvest
from saevlm_fast.images.open import open_images
from saevlm_fast.runtime import resolve_device
from saevlm_fast.sae import SparseAutoencoder
from saevlm_fast.towers.load import load_tower
from saevlm_fast.training.checkpoints import checkpoints
from saevlm_fast.training.one_pass import train_from_images

IMAGES = "scenes:train:40"
SAES = {"a": SAESize(k=3, d_sae=48), "b": SAESize(k=4, d_sae=32, architecture="topk")}
KNOWN = {"steps": 9, "batch_size": 16, "lr": 5e-3, "device": "cpu", "threshold_start": 3, "dead_after": 100}
STREAM = {"layer": 3, "tokens": ("cls", "random:3"), "buffer": "50", "workers": 0, "image_batch": 7}


@pytest.fixture(scope="module")
def tower():
    return load_tower("hf:tiny-clip", resolve_device("cpu"))


def run(tower, saes=SAES, images=IMAGES, **settings):
    return train_from_images(tower, images, saes, **KNOWN | STREAM | settings)


@pytest.fixture(scope="module")
def whole(tower):
    """All places and SAEs at once, uninterrupted."""
    return run(tower)


def same(one, other):
    return all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in one.state_dict().items())


def test_every_place_has_every_sae_and_each_is_the_one_trained_alone(tower, whole):
    places = ["residual-3-cls", "residual-3-random3"]
    assert list(whole) == [f"{place}/{name}" for place in places for name in SAES]
    layers = run(tower, layer=(1, 3), point=("residual", "mlp"), tokens="cls", saes={"a": SAES["a"]})
    assert list(layers) == ["residual-1-cls/a", "residual-3-cls/a", "mlp-1-cls/a", "mlp-3-cls/a"]
    alone = run(tower, {"": SAES["a"]}, tokens="cls")[""]
    for there in (whole["residual-3-cls/a"], layers["residual-3-cls/a"]):
        assert same(alone.sae, there.sae)
        assert alone.metrics == there.metrics
    source = whole["residual-3-cls/a"].sae.config.metadata["source"]
    assert (source["point"], source["layer"], source["tokens"]) == ("residual", 3, "cls")


@pytest.mark.parametrize("stops", [(3, 10), (17,)])
def test_cut_anywhere_it_goes_on_to_the_bit(tower, whole, tmp_path, stops):
    """Windows are of 3 steps, checkpoints and forwards are not. The places go at their own pace."""
    for stop in stops:

        def cut(done, total, stop=stop):
            if done >= stop:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            run(tower, output=tmp_path, checkpoint_every=2, resume=stop != stops[0], on_step=cut)
    resumed = run(tower, output=tmp_path, checkpoint_every=2, resume=True)
    for name, trained in whole.items():
        assert same(resumed[name].sae, trained.sae), name
        assert resumed[name].metrics == trained.metrics, name
        assert same(SparseAutoencoder.from_pretrained(tmp_path / name), trained.sae)
    again = run(tower, output=tmp_path, checkpoint_every=2, resume=True)  # all steps are done: evaluated again
    assert {name: each.metrics for name, each in again.items()} == {n: each.metrics for n, each in whole.items()}
    with pytest.raises(ValueError, match="resume: buffer is 64, but the run was started with 50"):
        run(tower, output=tmp_path, resume=True, buffer="64")
    with pytest.raises(ValueError, match="resume: images is 30, but the run was started with 40"):
        run(tower, output=tmp_path, resume=True, limit=30)


_KILLED = f"""
import os, signal
from saevlm_fast.config import SAESize
from saevlm_fast.training.one_pass import train_from_images
def kill(done, total):
    if done == 7:
        os.kill(os.getpid(), signal.SIGKILL)
train_from_images("hf:tiny-clip", "{IMAGES}", {{"": SAESize(k=3, d_sae=48)}}, output="run", checkpoint_every=2,
                  layer=3, on_step=kill, **{KNOWN | {k: v for k, v in STREAM.items() if k not in ("layer", "tokens")}})
"""


def test_after_kill_9_it_goes_on_to_the_bit(tower, whole, tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run([sys.executable, "-c", _KILLED], cwd=tmp_path, env=environment, timeout=300)
    assert ended.returncode == -signal.SIGKILL
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["step_00000004", "step_00000006"]
    resumed = run(
        tower, {"": SAES["a"]}, layer=3, tokens="cls", output=tmp_path / "run", checkpoint_every=2, resume=True
    )
    assert same(resumed[""].sae, whole["residual-3-cls/a"].sae)


def test_an_interrupt_leaves_checkpoints_of_all_that_have_begun(tower, tmp_path, monkeypatch):
    from contextlib import contextmanager
    from threading import Event

    event = Event()

    @contextmanager
    def interruptible():
        yield event

    monkeypatch.setattr("saevlm_fast.training.one_pass.interruptible", interruptible)
    with pytest.raises(Interrupted):
        run(tower, output=tmp_path, on_step=lambda done, total: event.set() if done == 5 else None)
    assert checkpoints(tmp_path / "residual-3-random3" / "b")
    event.clear()
    resumed = run(tower, output=tmp_path, resume=True)
    assert len(resumed) == 4


def test_what_is_kept_is_a_harvest_of_the_images(tower, whole, tmp_path):
    """Kept while it trains, through a cut; the same rows as a harvest's, image by image. Training is the same."""

    def cut(done, total):
        if done >= 12:
            raise KeyboardInterrupt

    known = {"tokens": "random:3", "keep_store": tmp_path / "kept", "output": tmp_path / "run"}
    known |= {"checkpoint_every": 2}
    one = {"": SAES["a"]}
    with pytest.raises(KeyboardInterrupt):
        run(tower, one, on_step=lambda done, total: cut(done + 6, total), **known)
    trained = run(tower, one, resume=True, **known)[""]
    assert same(trained.sae, whole["residual-3-random3/a"].sae)
    verify(tmp_path / "kept")
    kept = open_activations(tmp_path / "kept")
    stored = harvest(tower, IMAGES, layer=3, tokens="random:3", output=tmp_path / "store", workers=0)
    assert kept.n_rows == stored.n_rows == 120
    rows = [
        {(item["image"], item["token"]): i for i, item in enumerate(each.items().to_pylist())}
        for each in (kept, stored)
    ]
    assert rows[0].keys() == rows[1].keys()
    assert rows[0] != rows[1], "in another order"
    order = torch.tensor([rows[1][key] for key in rows[0]])
    torch.testing.assert_close(kept.rows(torch.arange(120)), stored.rows(order), atol=1e-4, rtol=1e-4)


def test_every_epoch_has_its_own_order_of_all_images(tower):
    from saevlm_fast.harvesting.stream import ShuffledImages

    source = open_images(IMAGES)
    orders = [[ShuffledImages(source, 40, 0, epoch).image_id(i) for i in range(40)] for epoch in (0, 0, 1)]
    assert orders[0] == orders[1]
    assert orders[0] != orders[2]
    assert all(sorted(order) == sorted(source.image_id(i) for i in range(40)) for order in orders)


def test_held_out_images_are_what_is_evaluated(tower, tmp_path):
    one = {"": SAES["a"]}
    trained = run(tower, one, layer=3, tokens="cls", validation_images="scenes:test:30")[""]
    from saevlm_fast.training.evaluate import evaluate

    stored = harvest(tower, "scenes:test:30", layer=3, output=tmp_path / "store", workers=0, batch_size=8)
    expected = evaluate(trained.sae, stored)
    assert trained.metrics["rows"] == 30
    assert trained.metrics["explained_variance"] == pytest.approx(expected["explained_variance"], rel=1e-4)
    trained = run(tower, one, layer=3, tokens="cls")[""]
    assert trained.metrics["rows"] == 48, "the last window, of three steps"


def test_center_and_micro_batches_go_with_it(tower):
    centred = run(tower, {"": SAES["a"]}, layer=3, tokens="cls", center=True, accumulate=2)[""]
    assert centred.sae.config.metadata["mean_norm"] > 1


def test_images_that_cannot_be_used_are_left_out_up_to_a_share(tower, tmp_path):
    from tiny_tower import save_photos

    save_photos(tmp_path / "photos", 20)
    broken = sorted((tmp_path / "photos").rglob("*.png"))[3]
    broken.write_bytes(b"no image")
    known = {"layer": 3, "tokens": "cls", "steps": 4, "batch_size": 8, "buffer": "16"}
    one = {"": SAES["a"]}
    trained = run(tower, one, str(tmp_path / "photos"), max_skipped=0.1, **known)[""]
    assert trained.sae.config.metadata["n_training_samples"] == 32
    with pytest.raises(ValueError, match=r"max_skipped: 1 of 20 images could not be used, more than 1.00%"):
        run(tower, one, str(tmp_path / "photos"), **known)


def test_what_is_refused(tower, tmp_path):
    one = {"": SAES["a"]}
    for more, message in (
        ({"layer": 9}, "layer: 9 of hf:tiny-clip, whose blocks are 0 to 4"),
        ({"buffer": "15"}, "buffer: 15 are 15 rows, which must be at least batch_size = 16"),
        ({"buffer": "much"}, "buffer: 'much' is not a number of rows"),
        ({"layer": ()}, "layer: residual needs a layer"),
        ({"control": "shuffled"}, "control: shuffled is of a run from a store"),
        ({"layer": (3, 3)}, "point, layer: the same hook point is asked for twice"),
        ({"tokens": "some"}, "tokens: 'some' is not one of"),
        ({"saes": {"a": SAES["a"], "": SAES["b"]}}, "saes: '' is not the name of a directory"),
        ({"saes": {"a": SAESize(k=200, d_sae=48)}}, "k"),
        ({"stepz": 3}, "stepz: no setting of train_from_images; did you mean 'steps'"),
        ({"buffer": "400GiB", "steps": 10**9}, "memory: 4 together take"),
    ):
        with pytest.raises(ValueError, match=message):
            run(tower, **{"saes": one} | more)
    with pytest.raises(ValueError, match="model: 3 is not"):
        train_from_images(3, IMAGES, one, layer=3)
    with pytest.raises(ValueError, match="layer: given beside stream"):
        train_from_images(tower, IMAGES, one, TrainConfig(steps=2), stream=StreamSettings(), layer=3)


def test_buffers_of_bytes_rows_and_batches():
    for text, rows in (("64 batches", 64 * 100), ("300", 300), ("300 rows", 300), ("1MiB", 1024), ("2 GiB", 5000)):
        assert StreamSettings(buffer=text).buffer_rows(100, 1024, 5000 if "G" in text else 10**9) == rows
