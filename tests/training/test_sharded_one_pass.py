"""One pass over images by several ranks, as threads, against that of one process."""

import shutil
import threading
from contextlib import closing, contextmanager
from dataclasses import replace
from itertools import islice

import pytest
import torch
from test_sharded_run import check_same_sae
from thread_peers import together

from saevlm_fast.config import HarvestOptions, RunOptions, SAESize, StreamSettings, TrainConfig
from saevlm_fast.data.rows import open_activations
from saevlm_fast.data.store import read_index
from saevlm_fast.errors import Interrupted
from saevlm_fast.harvesting import plan
from saevlm_fast.images.open import open_images
from saevlm_fast.runtime import resolve_device
from saevlm_fast.towers.load import load_tower
from saevlm_fast.training import sharded_one_pass
from saevlm_fast.training.checkpoints import checkpoints
from saevlm_fast.training.many import Look
from saevlm_fast.training.one_pass import harvest_config, train_from_images
from saevlm_fast.training.sharded_one_pass import SharedTowerStream, train_from_images_shared
from tiny_tower import save_clip, save_photos

SAES = {"a": SAESize(k=3, d_sae=47), "b": SAESize(k=4, d_sae=32, architecture="topk")}
# eps: Adam would make a whole step of a gradient that is rounding alone (a latent whose one entry has a dot near 0).
CONFIG = TrainConfig(steps=8, batch_size=15, lr=5e-3, eps=1e-5, threshold_start=100, dead_after=60, center=True)
# Forwards of 7 of 38 images, of which one cannot be used: six an epoch, of 3 rows an image or one. Windows of 3 steps.
STREAM = {"layer": (2,), "point": ("residual", "projection"), "tokens": ("random:3",), "buffer": "50"}
STREAM = StreamSettings(**STREAM, workers=0, image_batch=7, max_skipped=0.05)


@pytest.fixture(scope="module")
def spec(tmp_path_factory):
    return f"hf:{save_clip(tmp_path_factory.mktemp('clip'))}"


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = save_photos(tmp_path_factory.mktemp("photos"), 38)
    sorted(folder.rglob("*.png"))[5].write_bytes(b"no image")
    return folder


def options(output, **more):
    return RunOptions(output, "cpu", **({"log_every": 4, "checkpoint_every": 2} | more))


@pytest.fixture(scope="module")
def alone(spec, photos, tmp_path_factory):
    """Directory, and what is returned, of one process."""
    output, tower = tmp_path_factory.mktemp("alone"), load_tower(spec, resolve_device("cpu"))
    return output, train_from_images(tower, photos, SAES, CONFIG, options(output), STREAM)


@pytest.fixture
def run(spec, photos, tmp_path):
    """What every rank returns."""

    def train(world, replicas=1, saes=SAES, stream=STREAM, config=CONFIG, on_step=None, on_finished=None, **more):
        def work(peers):
            tower, images = load_tower(spec, resolve_device("cpu")), more.get("images", photos)
            images = images[peers.rank] if isinstance(images, list) else images
            told = {} if on_step is None else {"on_step": lambda done, total: on_step(peers, done)}
            told |= {} if on_finished is None else {"on_finished": on_finished}
            where = options(tmp_path / "run", resume=more.get("resume", False))
            own = stream[peers.rank] if isinstance(stream, list) else stream
            given = open_images(images), saes, dict.fromkeys(saes, config), where, own
            return train_from_images_shared(peers, tower, *given, images_path=str(photos), **told)

        return together(world, work, replicas)[0]

    return train


def check_same(output, alone):
    for name in alone[1]:
        check_same_sae(output / name, alone[0] / name)


@pytest.mark.parametrize(("world", "replicas"), [(2, 2), (3, 1)])
def test_the_pass_of_one_process(run, alone, tmp_path, world, replicas):
    looked_at = []

    def look(saes):
        looked_at.append({name: sae.config.d_sae for name, sae in saes.items()})
        return {"projection/b": Look({"ms_mean": 0.5})}

    ranks = run(world, replicas, on_finished=look)
    check_same(tmp_path / "run", alone)
    assert looked_at == [{name: each.sae.config.d_sae for name, each in alone[1].items()}], "whole ones, by rank 0"
    for name, each in alone[1].items():
        more = {"ms_mean": 0.5} if name == "projection/b" else {}
        assert ranks[0][name].metrics == pytest.approx(each.metrics | more, rel=1e-4)
        assert ranks[-1][name].metrics == pytest.approx(each.metrics, rel=1e-4)


def test_rows_are_those_of_one_process_to_the_bit(spec, photos):
    """Forwards are whole batches of one process; an epoch has six, so that four ranks are in two epochs at once. Who
    has not made a forward knows how many rows it has."""

    def work(peers):
        tower, harvest = load_tower(spec, resolve_device("cpu")), harvest_config(STREAM, CONFIG)
        with tower.hooked(harvest.points, False) as run:
            engine = HarvestOptions("store", str(photos), workers=0, max_skipped=0.05)
            stream = SharedTowerStream(peers, open_images(photos), tower, run, harvest, engine)
            with closing(stream.forwards(1)) as forwards:
                return [
                    (each.number, [rows.values.clone() for rows in each.rows], sorted(stream.skipped))
                    for each in islice(forwards, 9)
                ]

    ((one,), _), (four, _) = together(1, work), together(4, work)
    assert [number for number, _, _ in one] == list(range(1, 10))
    assert len(one[-1][2]) == 1, "the image that cannot be used"
    for rank, found in enumerate(four):
        for (number, rows, skipped), (n, expected, names) in zip(found, one, strict=True):
            assert (number, skipped) == (n, names)
            same = torch.equal if number % 4 == rank else lambda ours, theirs: ours.shape == (len(theirs), 0)
            assert all(same(ours, theirs) for ours, theirs in zip(rows, expected, strict=True))


def test_a_signal_at_one_rank_stops_all_and_others_go_on(run, alone, spec, photos, tmp_path, monkeypatch):
    """Three ranks begin, two replicas go on from the middle of a window, one process ends it."""
    signalled, stops = threading.local(), [5, 9]

    @contextmanager
    def interruptible(patient):
        assert patient
        signalled.event = threading.Event()
        yield signalled.event

    def on_step(peers, done):
        if peers.rank == 1 and done == stops[0]:
            signalled.event.set()

    monkeypatch.setattr(sharded_one_pass, "interruptible", interruptible)
    with pytest.raises(Interrupted, match="interrupted after step 0"):  # the projection's buffer is not full
        run(3, on_step=on_step)
    assert [path.name for path in checkpoints(tmp_path / "run" / "residual-2-random3" / "a")][-1] == "step_00000005"
    del stops[0]
    with pytest.raises(Interrupted, match="interrupted after step"):
        run(2, 2, on_step=on_step, resume=True)
    tower = load_tower(spec, resolve_device("cpu"))
    shutil.copytree(tmp_path / "run", tmp_path / "other")
    train_from_images(tower, photos, SAES, CONFIG, options(tmp_path / "other", resume=True), STREAM)
    check_same(tmp_path / "other", alone)
    stops.append(99)
    del stops[0]
    run(3, resume=True)
    check_same(tmp_path / "run", alone)


@pytest.mark.parametrize(("world", "replicas"), [(2, 1), (4, 2)])
def test_held_out_images_are_shared_too(run, spec, photos, tmp_path, monkeypatch, world, replicas):
    """Four forwards, of which one image cannot be used; the last is of two images, for four ranks."""
    held_out, made = save_photos(tmp_path / "held out", 23), []
    sorted(held_out.rglob("*.png"))[5].write_bytes(b"no image")
    stream, one = replace(STREAM, validation_images=str(held_out), point=("projection",), layer=()), {"": SAES["a"]}
    tower = load_tower(spec, resolve_device("cpu"))
    wanted = train_from_images(tower, photos, one, CONFIG, RunOptions(None, "cpu"), stream)[""].metrics
    through = SharedTowerStream.through

    def counted(self, plan, ranges, n_local=1):
        made.append((len(plan.source), self.peers.rank, len(ranges)))
        return through(self, plan, ranges, n_local)

    monkeypatch.setattr(SharedTowerStream, "through", counted)
    for each in run(world, replicas, saes=one, stream=stream):
        assert each[""].metrics == pytest.approx(wanted, rel=1e-4)
    assert wanted["rows"] == 22
    assert sorted(each[1:] for each in made if each[0] == 23) == [(rank, 4 // world) for rank in range(world)]


def test_the_store_that_is_kept_is_that_of_one_process(run, spec, photos, tmp_path, monkeypatch):
    """Units of two forwards, dealt among ranks. Three ranks stop before the first epoch is over, and two go on."""
    monkeypatch.setattr(plan, "_ROWS_PER_SHARD", 14 * 3)
    ones = {"": SAES["a"]}
    stream = replace(STREAM, keep_store=tmp_path / "wanted")
    tower = load_tower(spec, resolve_device("cpu"))
    train_from_images(tower, photos, ones, CONFIG, options(tmp_path / "alone"), stream)

    def stopped(peers, done):
        if done == 3:
            raise Interrupted("as by a signal")

    stream = replace(STREAM, keep_store=tmp_path / "kept")
    with pytest.raises(Interrupted):
        run(3, saes=ones, stream=stream, on_step=stopped)
    left = sorted(path.name for path in (tmp_path / "kept").rglob("*-0*.safetensors"))
    assert 0 < len(left) < 6
    assert not any(read_index(path.parent).complete for path in (tmp_path / "kept").rglob("index.json"))
    run(2, saes=ones, stream=stream, resume=True)
    for place in ("residual-2-random3", "projection"):
        ours, theirs = (open_activations(tmp_path / which / place) for which in ("kept", "wanted"))
        assert torch.equal(ours.rows(torch.arange(ours.n_rows)), theirs.rows(torch.arange(theirs.n_rows)))
        assert ours.items() == theirs.items()
        assert read_index(tmp_path / "kept" / place).complete
    for file in ("harvest.json", "skipped.jsonl"):
        assert (tmp_path / "kept" / file).read_bytes() == (tmp_path / "wanted" / file).read_bytes()


def test_what_ranks_do_not_do_is_refused_on_all(run, photos, tmp_path):
    fewer = save_photos(tmp_path / "fewer", 30)
    for more, message in (
        ({"images": [photos, fewer]}, "images: images is 30 for rank 1, but 38 for rank 0"),
        ({"config": replace(CONFIG, control="shuffled")}, "control: shuffled is of a run from a store"),
        ({"saes": {"": SAESize(k=1, d_sae=1)}}, "d_sae: 1 latents for 2 ranks"),
        ({"config": replace(CONFIG, accumulate=9), "replicas": 2}, "data_parallel: 2 replicas of 15 rows in 9"),
    ):
        with pytest.raises(ValueError, match=message):
            run(2, **more)
    apart = [replace(STREAM, keep_store=tmp_path / f"store-{rank}") for rank in range(2)]
    with pytest.raises(ValueError, match=r"store-1/harvest.json is not there for rank 1; all ranks need the same disk"):
        run(2, stream=apart)
    assert not list((tmp_path / "run").glob("**/run.json"))
    with pytest.raises(ValueError, match="max_skipped: 1 of 38 images could not be used"):
        run(2, stream=replace(STREAM, max_skipped=0.0))
