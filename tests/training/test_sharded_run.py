"""Whole runs of several ranks, as threads, against those of one process: what they write, refuse, and go on with."""

import json
import shutil
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from thread_peers import together

from saevlm_fast import outputs
from saevlm_fast.config import RunOptions, SAEConfig, TrainConfig
from saevlm_fast.data.rows import Activations, open_activations
from saevlm_fast.data.synthetic import PlantedConcepts
from saevlm_fast.errors import Interrupted, size_text
from saevlm_fast.inspection import inspect, verify_inspected
from saevlm_fast.peers import Ranks
from saevlm_fast.sae import SparseAutoencoder
from saevlm_fast.training import sharded_directory, sharded_run, sharded_state, shards
from saevlm_fast.training.checkpoints import checkpoints
from saevlm_fast.training.many import Look, train_many
from saevlm_fast.training.memory import Written, training_disk
from saevlm_fast.training.run import train
from saevlm_fast.training.saved_state import check_checkpoint, read_state
from saevlm_fast.training.sharded_directory import SharedRunDirectory
from saevlm_fast.training.sharded_many import train_many_shared
from saevlm_fast.training.sharded_run import train_shared
from saevlm_fast.training.shards import Shard, starting_sae

CONFIG = TrainConfig(steps=30, batch_size=100, lr=3e-3, seed=1, dead_after=600, threshold_start=5)
GROUPS = {"topk": (), "batch_topk": (), "matryoshka": (10, 30, 25), "jumprelu": ()}


def sae_config(architecture="batch_topk"):
    return SAEConfig(16, 65, None if architecture == "jumprelu" else 4, architecture, GROUPS[architecture])


@pytest.fixture(scope="module")
def matrix(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "x.npy"
    np.save(path, PlantedConcepts(16, 8, 30, seed=3).sample(730)[0])
    return path


def options(output, **more):
    return RunOptions(output, "cpu", **({"log_every": 10, "checkpoint_every": 20} | more))


def run_ranks(world, matrix, output, architecture="batch_topk", config=CONFIG, on_log=None, replicas=1, **more):
    """[metrics] of every rank."""

    def work(peers):
        data, where = open_activations(matrix), options(output, **more)
        told = {} if on_log is None else {"on_log": on_log}
        return train_shared(peers, data, sae_config(architecture), config, where, **told)

    return together(world, work, replicas)[0]


def check_same_sae(output, expected, tolerance=1e-4):
    """Rounding differs between ranks and one process, and Adam makes 1e-5 of it within 60 steps. A step or a row that
    is missed or taken twice would be a part of the learning rates, which are 3e-3 and more."""
    found, wanted = (SparseAutoencoder.from_pretrained(path) for path in (output, expected))
    for name, parameter in wanted.state_dict().items():
        torch.testing.assert_close(found.state_dict()[name], parameter, atol=tolerance, rtol=tolerance)
    assert replace(found.config, metadata={}) == replace(wanted.config, metadata={})
    assert found.config.metadata.keys() == wanted.config.metadata.keys()


def logged(output):
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def alone(matrix, tmp_path_factory):
    """The run of one process, of each architecture."""
    folder = tmp_path_factory.mktemp("alone")
    for architecture in GROUPS:
        train(open_activations(matrix), sae_config(architecture), CONFIG, options(folder / architecture))
    return folder


@pytest.mark.parametrize(
    ("architecture", "world", "replicas"),
    [("topk", 2, 1), ("batch_topk", 3, 1), ("matryoshka", 4, 2), ("jumprelu", 2, 2), ("topk", 6, 3)],
)
def test_the_run_of_one_process(alone, matrix, tmp_path, architecture, world, replicas):
    data_on = "device" if world in (3, 4) else "host"
    metrics = run_ranks(world, matrix, tmp_path / "run", architecture, replicas=replicas, data_on=data_on)
    assert all(each == metrics[0] for each in metrics)
    check_same_sae(tmp_path / "run", alone / architecture)
    found, wanted = logged(tmp_path / "run"), logged(alone / architecture)
    assert [line.keys() for line in found] == [line.keys() for line in wanted]
    for line, expected in zip(found, wanted):
        for name, value in expected.items():
            assert line[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name
    names = {path.name for path in (alone / architecture).iterdir()}
    assert {path.name for path in (tmp_path / "run").iterdir()} == names
    verify_inspected(inspect(tmp_path / "run"))
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["step_00000020", "step_00000030"]


SETTINGS = {
    "centred": ("topk", {"center": True}),
    "micro-batches": ("batch_topk", {"accumulate": 3}),
    "shuffled": ("matryoshka", {"control": "shuffled"}),
    "untrained": ("batch_topk", {"control": "untrained"}),
    "untrained jumprelu": ("jumprelu", {"control": "untrained", "target_l0": 3.3}),
    "MonoLoss by other embeddings": ("batch_topk", {"mono_weight": 0.3}),
}


@pytest.mark.parametrize(("architecture", "more"), SETTINGS.values(), ids=SETTINGS.keys())
def test_settings_of_one_process_are_those_of_ranks(matrix, tmp_path, architecture, more):
    """Rows far from 0, and a threshold that starts late: a centred run needs its mean, a short one calibrates."""
    config = replace(CONFIG, steps=8, threshold_start=100, dead_after=300, **more)
    data, sae = Activations.from_tensor(np.load(matrix) + 5), sae_config(architecture)
    embeddings = torch.randn(730, 6, generator=torch.Generator().manual_seed(0))
    told = {"mono_embeddings": Activations.from_tensor(embeddings)} if config.mono_weight else {}
    wanted = train(data, sae, config, options(tmp_path / "alone"), **told)[1]

    def work(peers):
        data_on = "device" if config.control == "shuffled" else "auto"
        return train_shared(peers, data, sae, config, options(tmp_path / "run", data_on=data_on), **told)

    found, _ = together(4, work, 2)
    assert all(metrics == pytest.approx(wanted, rel=1e-4) for metrics in found)
    check_same_sae(tmp_path / "run", tmp_path / "alone")
    for line, expected in zip(logged(tmp_path / "run"), logged(tmp_path / "alone"), strict=True):
        assert line == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_a_run_goes_on_with_any_number_of_ranks(alone, matrix, tmp_path):
    """Three ranks begin, two go on, two replicas of two, one process; and three replicas with what one process left."""
    output = tmp_path / "run"
    stop = {"checkpoint_every": 5}
    run_ranks(3, matrix, output, **stop)
    keep_until(output, 25)  # a checkpoint before the last one
    run_ranks(2, matrix, output, resume=True, checkpoint_every=3)
    check_same_sae(output, alone / "batch_topk")
    keep_until(output, 27)
    run_ranks(4, matrix, output, resume=True, replicas=2, checkpoint_every=1)
    check_same_sae(output, alone / "batch_topk")
    keep_until(output, 29)
    train(open_activations(matrix), sae_config(), CONFIG, options(output, resume=True))
    check_same_sae(output, alone / "batch_topk")

    shutil.copytree(alone / "batch_topk", tmp_path / "other")
    keep_until(tmp_path / "other", 20)
    run_ranks(3, matrix, tmp_path / "other", resume=True, replicas=3)
    check_same_sae(tmp_path / "other", alone / "batch_topk")
    steps = [line["step"] for line in logged(tmp_path / "other")]
    assert steps == [10, 20, 30, 30]


def keep_until(output, step):
    """As it was after that step's checkpoint."""
    for path in checkpoints(output):
        if int(path.name[5:]) > step:
            shutil.rmtree(path)
    assert checkpoints(output)[-1].name == f"step_{step:08d}"
    for name in ("cfg.json", "sae_weights.safetensors", "metrics.jsonl.sha256"):
        (output / name).unlink()


def test_a_grid_of_ranks_is_that_of_one_process(matrix, tmp_path):
    """Two replicas of two ranks, then three ranks from checkpoints of different steps; one threshold is calibrated."""
    saes = {"a": sae_config(), "b": sae_config("topk"), "c": sae_config("matryoshka")}
    recipes = {"a": CONFIG, "b": replace(CONFIG, lr=1e-3), "c": replace(CONFIG, threshold_start=100)}
    data, looked_at = open_activations(matrix), []
    wanted = train_many(data, saes, recipes, options(tmp_path / "alone"))

    def look(finished):
        looked_at.append([finished[name].config.d_sae for name in saes])
        return {"b": Look({"ms_mean": 0.5})}

    def work(peers, **more):
        where = options(tmp_path / "run", **more)
        return train_many_shared(peers, data, saes, recipes, where, on_finished=look)

    ranks = [together(4, work, 2)[0]]
    for name, step in (("a", 20), ("b", 20), ("c", 30)):
        if step < 30:
            keep_until(tmp_path / "run" / name, step)
    ranks.append(together(3, lambda peers: work(peers, resume=True, data_on="device"))[0])
    assert looked_at == [[65, 65, 65]] * 2, "by rank 0 alone, of whole SAEs"
    for found in ranks:
        assert found[0]["b"].metrics["ms_mean"] == 0.5
        for name, (_, metrics) in wanted.items():
            check_same_sae(tmp_path / "run" / name, tmp_path / "alone" / name)
            more = {"ms_mean": 0.5} if name == "b" else {}
            assert found[0][name].metrics == pytest.approx(metrics | more, rel=1e-4)
            assert found[1][name].metrics == pytest.approx(metrics, rel=1e-4)


def test_ranks_ask_for_the_room_that_their_checkpoints_take(matrix, monkeypatch, tmp_path):
    """The most that was there when a checkpoint had just been written, before others went; less is refused."""
    saes, most = {"a": sae_config(), "b": sae_config("topk")}, []
    drop = SharedRunDirectory._drop_old

    def measured(self):
        most.append(sum(file.stat().st_size for file in tmp_path.rglob("*.safetensors")))
        drop(self)

    def work(peers):
        where = options(tmp_path / "run", checkpoint_every=5)
        return train_many_shared(peers, open_activations(matrix), saes, CONFIG, where)

    needed = training_disk(*saes.values(), written=Written.BY_RANKS)
    with monkeypatch.context() as patch:
        patch.setattr(outputs.shutil, "disk_usage", lambda path: (10**9, 0, needed - 1))
        with pytest.raises(ValueError, match=rf"^output: 2 SAEs with 3 checkpoints each take {size_text(needed)}, and"):
            together(2, work)
    assert not list(tmp_path.rglob("*.safetensors"))
    monkeypatch.setattr(SharedRunDirectory, "_drop_old", measured)
    together(2, work)
    assert needed <= max(most) <= needed + 20_000, "headers, idle steps and counters apart"


def test_shards_are_the_whole_state(matrix, tmp_path):
    run_ranks(4, matrix, tmp_path / "run", replicas=2)
    newest = checkpoints(tmp_path / "run")[-1]
    device = torch.device("cpu")
    whole = read_state(newest, device)
    assert len(whole["W_enc"]) == len(whole["idle"]) == 65
    for start, stop in ((0, 65), (3, 4), (20, 50), (43, 65), (21, 43)):
        part = read_state(newest, device, start, stop)
        for name, tensor in whole.items():
            expected = tensor[start:stop] if len(tensor.shape) and len(tensor) == 65 else tensor
            assert torch.equal(part[name], expected), name


@pytest.mark.parametrize("damage", ["altered", "missing", "gap"])
def test_a_damaged_shard_is_refused_by_who_needs_it(matrix, tmp_path, damage):
    run_ranks(3, matrix, tmp_path / "run")
    newest = checkpoints(tmp_path / "run")[-1]
    last = newest / "train_state_0002_of_0003.safetensors"
    if damage == "altered":
        data = bytearray(last.read_bytes())
        data[-5] ^= 1
        last.write_bytes(data)
    elif damage == "missing":
        last.unlink()
    else:
        record = json.loads((newest / "checkpoint.json").read_text())
        del record["shards"][1], record["sha256"]
        (newest / "checkpoint.json").write_text(json.dumps(record))
    if damage != "gap":
        assert check_checkpoint(newest, 0, 43) == (30, 3000), "the other shards are whole"
    with pytest.raises(ValueError, match=r"0002_of_0003|do not have all latents"):
        check_checkpoint(newest)
    with pytest.raises(ValueError, match="is damaged, delete it to resume from the one before"):
        run_ranks(2, matrix, tmp_path / "run", resume=True)


@pytest.mark.parametrize(
    ("sae", "more", "message"),
    [
        (SAEConfig(16, 2, 1, "topk"), {}, "d_sae: 2 latents for 3 ranks"),
        (SAEConfig(15, 65, 4, "topk"), {}, "d_in: 15 does not fit"),
        (sae_config(), {"batch_size": 2}, "data_parallel: 3 replicas of 2 rows in 1 micro-batches"),
        (sae_config(), {"batch_size": 8, "accumulate": 3}, "data_parallel: 3 replicas of 8 rows in 3 micro-batches"),
    ],
)
def test_what_ranks_do_not_train_is_refused(matrix, tmp_path, sae, more, message):
    """Three ranks; replicas where it is about them."""
    recipe = {name: more.pop(name) for name in ("batch_size", "accumulate") if name in more}
    data, where = open_activations(matrix), options(tmp_path / "run", **more)
    config, replicas = TrainConfig(steps=5, **recipe), 3 if recipe else 1
    with pytest.raises(ValueError, match=message):
        together(3, lambda peers: train_shared(peers, data, sae, config, where), replicas)
    assert not (tmp_path / "run").exists()


def test_a_setting_that_the_sharded_step_does_not_know_is_refused(monkeypatch):
    """What is added to the recipe of one process is not left out without a word."""
    monkeypatch.setattr(shards, "_KNOWN", shards._KNOWN - {"clip_norm"})
    ranks = Ranks.of(SimpleNamespace(world=2))
    shards.check_shardable(sae_config(), TrainConfig(), ranks)
    with pytest.raises(ValueError, match=r"clip_norm: 2.0 is for one process, and torchrun started 2"):
        shards.check_shardable(sae_config(), TrainConfig(clip_norm=2.0), ranks)


def test_a_rank_with_other_rows_is_named(matrix, tmp_path):
    rows = torch.from_numpy(np.load(matrix))

    def work(peers):
        data = Activations.from_tensor(rows if peers.rank != 1 else rows + 1)
        return train_shared(peers, data, sae_config(), CONFIG, options(tmp_path / "run"))

    with pytest.raises(ValueError, match="rank 1 reads 730 rows of width 16 that are not rank 0's"):
        together(3, work)
    assert not (tmp_path / "run" / "run.json").exists()


def test_a_rank_without_room_is_what_all_ranks_tell_of(matrix, tmp_path, monkeypatch):
    """Nobody removes the checkpoint that others still write to, who would tell of that."""
    write, removed = sharded_directory.write_state, []

    def written(file, tensors, counts):
        if "0000_of" in file.name:
            raise OSError(28, "No space left on device", str(file))
        time.sleep(0.2)
        removed.append(not file.parent.is_dir())
        return write(file, tensors, counts)

    monkeypatch.setattr(sharded_directory, "write_state", written)

    def work(peers):
        with pytest.raises(OSError, match=r"^rank 0: .*: No space left on device, while its part of a checkpoint"):
            train_shared(peers, open_activations(matrix), sae_config(), CONFIG, options(tmp_path / "run"))

    together(2, work)
    assert removed == [False]
    assert not checkpoints(tmp_path / "run")
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


def test_every_rank_stops_after_the_same_step(matrix, tmp_path, monkeypatch):
    """A signal at one rank alone, during its seventh step."""
    signalled = threading.local()

    @contextmanager
    def interruptible(patient):
        assert patient
        signalled.event = threading.Event()
        yield signalled.event

    def work(peers):
        def on_step(step):
            if (peers.rank, step) == (1, 7):
                signalled.event.set()

        data, where = open_activations(matrix), options(tmp_path / "run")
        return train_shared(peers, data, sae_config(), CONFIG, where, on_step=on_step)

    monkeypatch.setattr(sharded_run, "interruptible", interruptible)
    with pytest.raises(Interrupted, match="interrupted after step 7"):
        together(2, work)
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["step_00000007"]


def test_the_initial_weights_do_not_depend_on_the_ranks(monkeypatch):
    monkeypatch.setattr(shards, "_BLOCK_NUMBERS", 300)
    whole = SparseAutoencoder(sae_config())
    whole.reset_parameters(5)
    for world in (1, 2, 3):
        parts = [starting_sae(Shard(sae_config(), rank, world), 5, torch.device("cpu")) for rank in range(world)]
        torch.testing.assert_close(torch.cat([part.W_dec for part in parts]), whole.W_dec, atol=1e-7, rtol=0)
        torch.testing.assert_close(torch.cat([part.W_enc for part in parts], 1), whole.W_enc, atol=1e-7, rtol=0)


@pytest.mark.parametrize(("parts", "replicas"), [(1, 1), (2, 1), (7, 1), (1, 3), (3, 2), (2, 7)])
def test_shares_of_rows_are_the_batch(matrix, parts, replicas):
    data, config = open_activations(matrix), TrainConfig(batch_size=100)
    first = Shard(sae_config(), 0, parts, 0, replicas)
    shares = [sharded_state.ShareOfRows(data, config, shard) for shard in first.of_everyone()]
    whole = super(sharded_state.ShareOfRows, shares[0]).batch(5)
    assert torch.equal(torch.cat([share.batch(5) for share in shares]), whole)
    assert [len(share.batch(5)) for share in shares] == shares[0].counts


def test_a_rank_has_its_part_of_the_blocks_read():
    """Of a store that is permuted in blocks: all blocks are somebody's, and few are everybody's."""
    data = SimpleNamespace(n_rows=64_000, row_bytes=512, block_rows=100)
    config, first = TrainConfig(batch_size=1000), Shard(sae_config(), 0, 2, 0, 2)
    shares = [sharded_state.ShareOfRows(data, config, shard) for shard in first.of_everyone()]
    whole, parts = super(sharded_state.ShareOfRows, shares[0]).blocks_begun(0), [s.blocks_begun(0) for s in shares]
    assert {block for part in parts for block in part} == set(whole)
    assert all(len(part) <= len(whole) / 4 + 3 for part in parts)
