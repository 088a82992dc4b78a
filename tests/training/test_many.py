"""Several SAEs in one pass over the data: each is, to the bit, the one that is trained alone."""

import json

import pytest
import torch
from small_runs import same_weights

from saevlm_fast.config import SAEConfig, TrainConfig
from saevlm_fast.data.rows import Activations
from saevlm_fast.data.synthetic import PlantedConcepts
from saevlm_fast.errors import Interrupted
from saevlm_fast.training import memory as memory_module
from saevlm_fast.training.checkpoints import checkpoints
from saevlm_fast.training.many import train_many
from saevlm_fast.training.run import train

D_IN = 16
SAES = {
    "topk-k2": SAEConfig.sized(D_IN, d_sae=48, k=2, architecture="topk"),
    "batch_topk-k4": SAEConfig.sized(D_IN, d_sae=64, k=4),
    "matryoshka-k4": SAEConfig.sized(D_IN, d_sae=64, k=4, architecture="matryoshka"),
    "relu": SAEConfig.sized(D_IN, d_sae=32, architecture="relu"),
}
RECIPE = {"steps": 16, "batch_size": 64, "lr": 5e-3, "seed": 1, "dead_after": 300, "threshold_start": 6}
RUN = {"device": "cpu", "checkpoint_every": 5, "log_every": 4}


@pytest.fixture(scope="module")
def x_ND():
    return torch.from_numpy(PlantedConcepts(D_IN, 8, 30, seed=1).sample(1500)[0])


def test_each_is_to_the_bit_the_one_that_is_trained_alone(x_ND, tmp_path):
    trained = train_many(x_ND, SAES, output=tmp_path / "grid", validation=x_ND[:300], **RECIPE, **RUN)
    assert list(trained) == list(SAES)
    for name, config in SAES.items():
        alone, metrics = train(x_ND, config, output=tmp_path / name, validation=x_ND[:300], **RECIPE, **RUN)
        assert same_weights(trained[name].sae, alone), name
        assert trained[name].metrics == metrics
        ours = sorted(path.relative_to(tmp_path / "grid" / name) for path in (tmp_path / "grid" / name).rglob("*"))
        assert ours == sorted(path.relative_to(tmp_path / name) for path in (tmp_path / name).rglob("*"))
        for file in ("metrics.jsonl", "sae_weights.safetensors"):
            assert (tmp_path / "grid" / name / file).read_bytes() == (tmp_path / name / file).read_bytes(), file


def test_the_rows_are_read_once(x_ND, monkeypatch):
    read = []
    rows = Activations.rows
    monkeypatch.setattr(Activations, "rows", lambda self, indices, out=None: read.append(1) or rows(self, indices, out))
    train_many(x_ND, {"a": SAES["topk-k2"]}, device="cpu", **RECIPE)
    one, several = len(read), {f"k{k}": SAEConfig.sized(D_IN, d_sae=48, k=k, architecture="topk") for k in (1, 2, 3)}
    read.clear()
    train_many(x_ND, several, device="cpu", **RECIPE)
    assert len(read) == one


def test_interrupted_or_killed_they_go_on_from_where_each_is(x_ND, tmp_path):
    """One of them has a checkpoint less, as after a kill between two writes: it is brought up first."""
    whole = train_many(x_ND, SAES, **RECIPE, device="cpu")
    seen = []

    def stop(step):
        seen.append(step)
        if step == 13:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_many(x_ND, SAES, output=tmp_path, on_step=stop, **RECIPE, **RUN)
    newest = checkpoints(tmp_path / "batch_topk-k4")[-1]
    assert newest.name == "step_00000010"
    for file in newest.iterdir():
        file.unlink()
    newest.rmdir()
    seen.clear()
    resumed = train_many(x_ND, SAES, output=tmp_path, resume=True, on_step=seen.append, **RECIPE, **RUN)
    assert seen[0] == 6
    assert all(same_weights(whole[name].sae, resumed[name].sae) for name in SAES)
    steps = [json.loads(line)["step"] for line in (tmp_path / "topk-k2" / "metrics.jsonl").read_text().splitlines()]
    assert steps == [4, 8, 12, 16, 16]


def test_an_interrupt_leaves_a_checkpoint_of_every_one(x_ND, tmp_path, monkeypatch):
    from contextlib import contextmanager
    from threading import Event

    event = Event()

    @contextmanager
    def interruptible():
        yield event

    monkeypatch.setattr("saevlm_fast.training.many.interruptible", interruptible)
    with pytest.raises(Interrupted, match="interrupted after step 7; continue with --resume"):
        train_many(
            x_ND, SAES, output=tmp_path, on_step=lambda step: event.set() if step == 7 else None, **RECIPE, **RUN
        )
    assert [checkpoints(tmp_path / name)[-1].name for name in SAES] == ["step_00000007"] * len(SAES)


def test_recipes_may_differ_but_for_what_decides_the_batches(x_ND):
    configs = {"a": TrainConfig(steps=3, batch_size=64, lr=1e-3), "b": TrainConfig(steps=3, batch_size=64, lr=5e-3)}
    saes = {"a": SAES["topk-k2"], "b": SAES["topk-k2"]}
    trained = train_many(x_ND, saes, configs, device="cpu")
    assert not same_weights(trained["a"].sae, trained["b"].sae)
    for name, value in {"steps": 4, "batch_size": 32, "seed": 3, "center": True}.items():
        configs["b"] = TrainConfig(**{"steps": 3, "batch_size": 64} | {name: value})
        with pytest.raises(ValueError, match=f"{name}: {value} of b, but .* of a; all see the same batches"):
            train_many(x_ND, saes, configs, device="cpu")


def test_what_is_refused(x_ND, tmp_path, monkeypatch):
    for saes, message in (
        ({}, "saes: there is none"),
        ({"a/b": SAES["relu"]}, "saes: 'a/b' is not the name of a directory"),
        ({"..": SAES["relu"]}, "saes: '..' is not the name of a directory"),
        ({"a": 3}, r"saes\['a'\]: 3 is not an SAEConfig"),
        ([SAES["relu"]], "saes: .* is not SAEConfigs by name"),
        ({"a": SAEConfig.sized(8, k=2)}, "d_in: 8 does not fit activations of width 16"),
    ):
        with pytest.raises(ValueError, match=message):
            train_many(x_ND, saes, steps=2, device="cpu")
    with pytest.raises(ValueError, match="config: b must be in both saes and config"):
        train_many(x_ND, {"a": SAES["relu"]}, {"a": TrainConfig(), "b": TrainConfig()})
    train_many(x_ND, {"a": SAES["relu"]}, steps=2, output=tmp_path, device="cpu")
    with pytest.raises(ValueError, match="a already holds a run"):
        train_many(x_ND, {"a": SAES["relu"]}, steps=2, output=tmp_path, device="cpu")
    monkeypatch.setattr(memory_module, "free_memory", lambda device: 1 << 20)
    with pytest.raises(ValueError, match=r"memory: 4 together take .* MB, and 1.0 MB are free on cpu; the largest is"):
        train_many(x_ND, SAES, steps=2, batch_size=4096, device="cpu")


def test_rows_on_the_device_must_fit_beside_all_of_them(x_ND, monkeypatch):
    saes, config = {name: SAES["topk-k2"] for name in "abcd"}, TrainConfig(steps=2, control="soft-frozen")
    each, rows = memory_module.memory_of(SAES["topk-k2"], config, len(x_ND)), 4 * x_ND.numel()
    assert each > rows
    monkeypatch.setattr(memory_module, "free_memory", lambda device: 4 * each + rows)
    train_many(x_ND, saes, config, device="cpu", data_on="device")
    monkeypatch.setattr(memory_module, "free_memory", lambda device: 4 * each + rows - 1)
    with pytest.raises(ValueError, match="data_on: device, but the rows take"):
        train_many(x_ND, saes, config, device="cpu", data_on="device")
    monkeypatch.setattr(memory_module, "free_memory", lambda device: 4 * each - 1)
    with pytest.raises(ValueError, match="memory: 4 together take"):
        train_many(x_ND, saes, config, device="cpu")
