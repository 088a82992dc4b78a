"""Training without a directory: the same weights, nothing written, settings by name."""

import json
import os
import shutil
import signal
import warnings

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from saevlm_fast.config import RunOptions, SAEConfig, TrainConfig
from saevlm_fast.data.rows import Activations, open_activations
from saevlm_fast.data.synthetic import PlantedConcepts
from saevlm_fast.data.writing import ActivationWriter
from saevlm_fast.errors import Doubt, Interrupted
from saevlm_fast.training.checkpoints import RUN_FILE
from saevlm_fast.training.evaluate import evaluate
from saevlm_fast.training.run import train
from stores import items_of, write_store

SAE = SAEConfig.sized(16, expansion=4, k=4)
FEW = {"steps": 40, "batch_size": 128, "lr": 3e-3}


@pytest.fixture(scope="module")
def x_ND():
    return torch.from_numpy(PlantedConcepts(16, 8, 30, seed=3).sample(1500)[0]).float()


@pytest.fixture(autouse=True)
def _nothing_is_written_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("architecture", ["topk", "batch_topk", "matryoshka"])
def test_a_run_in_memory_is_the_run_on_disk(x_ND, tmp_path, architecture):
    config = SAEConfig.sized(16, expansion=4, k=4, architecture=architecture)
    sae, metrics = train(Activations.from_tensor(x_ND), config, **FEW)
    assert not list(tmp_path.iterdir())
    np.save(tmp_path / "x.npy", x_ND.numpy())
    options = RunOptions(tmp_path / "run", checkpoint_every=7)
    on_disk, metrics_on_disk = train(open_activations(tmp_path / "x.npy"), config, TrainConfig(**FEW), options)
    for name, tensor in on_disk.state_dict().items():
        torch.testing.assert_close(sae.state_dict()[name], tensor, rtol=1e-6, atol=1e-6)
    assert metrics == pytest.approx(metrics_on_disk, rel=1e-6)
    assert metrics == pytest.approx(evaluate(sae, Activations.from_tensor(x_ND)))
    assert not sae.training
    assert sae.config.metadata["source"] == {"path": "tensor [1500, 16]"}
    assert sae.config.metadata["training"]["steps"] == 40


def test_a_matrix_in_memory_trains_into_a_directory_and_resumes(x_ND, tmp_path):
    data = Activations.from_tensor(x_ND)
    sae, _ = train(data, SAE, output=tmp_path / "run", **FEW)
    assert json.loads((tmp_path / "run" / RUN_FILE).read_text())["data"]["path"] == "tensor [1500, 16]"
    again, _ = train(Activations.from_tensor(x_ND.numpy()), SAE, output=str(tmp_path / "run"), resume=True, **FEW)
    assert torch.equal(sae.W_dec, again.W_dec)
    with pytest.raises(ValueError, match="resume: digest of the activations is"):
        train(Activations.from_tensor(x_ND * 2), SAE, output=tmp_path / "run", resume=True, **FEW)


def test_validation_rows_are_the_ones_evaluated(x_ND):
    _, metrics = train(Activations.from_tensor(x_ND), SAE, validation=Activations.from_tensor(x_ND[:77]), **FEW)
    assert metrics["rows"] == 77


def test_rows_of_which_some_are_trained_on_are_told_of(x_ND, tmp_path):
    """Of stores by their shards' digests, of a file that is a shard, of rows in memory by where they are."""
    first, more = x_ND[:300], torch.cat([x_ND[:200], x_ND[700:900]])
    for name, rows in (("trained", first), ("held", more), ("other", x_ND[700:900])):
        write_store(tmp_path / name, rows, 100, batch=100)
    for name, rows in (("hole", x_ND[:50]), ("too", x_ND[50:100])):  # the empty shards are alike
        with ActivationWriter(tmp_path / name, x_ND.shape[1], torch.float32, {}) as writer:
            writer.write_shard(0, rows, items_of(0, 50))
            writer.write_shard(1, rows[:0], items_of(0, 0))
    shutil.copy(tmp_path / "trained" / "shard-00001.safetensors", tmp_path / "copy.safetensors")
    shard = tmp_path / "trained" / "shard-00002.safetensors"
    for trained, held_out, common in (
        (tmp_path / "trained", tmp_path / "held", "2 of the 3 shards of .*trained are in .*held, too"),
        (
            tmp_path / "trained",
            tmp_path / "copy.safetensors",
            r"\S+copy\.safetensors is shard-00001\.safetensors of \S+trained,",
        ),
        (tmp_path / "trained", shard, r"\S+shard-00002\.safetensors is shard-00002\.safetensors of \S+trained,"),
        (shard, tmp_path / "trained", r"\S+shard-00002\.safetensors is shard-00002\.safetensors of \S+trained,"),
        (x_ND, x_ND[:77], "some rows are those that are trained on"),
        (x_ND[::2], x_ND[700:], "some rows are those that are trained on"),
        (x_ND.bfloat16(), x_ND.bfloat16()[:77], None),
        (x_ND[100:], x_ND[:100], None),
        (x_ND[::2], x_ND[1::2], None),
        (tmp_path / "trained", tmp_path / "other", None),
        (tmp_path / "hole", tmp_path / "too", None),
        (x_ND, tmp_path / "trained", None),
    ):
        if common is None:
            with warnings.catch_warnings(action="error"):
                train(trained, SAE, validation=held_out, **FEW)
            continue
        told = f"^validation: {common}.*; what is measured on these is not of rows held out"
        with pytest.warns(Doubt, match=told):
            train(trained, SAE, validation=held_out, **FEW)


def test_rows_that_are_trained_on_are_not_held_out(x_ND, tmp_path):
    """Nor are copies of them. Other rows of the same shape are."""
    data = Activations.from_tensor(x_ND)
    held_out = {"the same": x_ND, "a view": x_ND[:], "opened": data, "opened anew": Activations.from_tensor(x_ND)}
    for same in held_out.values():
        with pytest.raises(ValueError, match=r"validation: tensor \[1500, 16\] is what is trained on; without"):
            train(x_ND, SAE, validation=same, **FEW)
    train(data, SAE, validation=Activations.from_tensor(x_ND + 1), **FEW)
    np.save(tmp_path / "x.npy", x_ND.numpy())
    shutil.copy(tmp_path / "x.npy", tmp_path / "y.npy")
    (tmp_path / "link.npy").symlink_to(tmp_path / "x.npy")
    (tmp_path / "hard.npy").hardlink_to(tmp_path / "x.npy")
    rows = open_activations(tmp_path / "x.npy")
    assert rows.is_same_as(open_activations(tmp_path / "link.npy"))
    assert rows.is_same_as(open_activations(tmp_path / "hard.npy"))
    assert not rows.is_same_as(open_activations(tmp_path / "y.npy")), "which is known by reading it alone"
    for copied in (tmp_path / "y.npy", str(tmp_path / "y.npy"), x_ND.clone()):
        with pytest.raises(ValueError, match=r"validation: .*x.npy is what is trained on; without"):
            train(tmp_path / "x.npy", SAE, validation=copied, **FEW)
    save_file({"a": x_ND, "b": x_ND + 1}, tmp_path / "two.safetensors")
    save_file({"a": x_ND}, tmp_path / "one.safetensors")
    a, b = (open_activations(f"{tmp_path / 'two.safetensors'}::{name}") for name in "ab")
    assert not a.is_same_as(b)
    whole, named = open_activations(tmp_path / "one.safetensors"), open_activations(f"{tmp_path}/one.safetensors::a")
    assert whole.is_same_as(named)
    assert not named.is_same_as(a)
    (tmp_path / "hard.npy").unlink()
    gone = open_activations(tmp_path / "y.npy")
    (tmp_path / "y.npy").unlink()
    assert not rows.is_same_as(gone)
    half_ND = x_ND.half()
    assert not Activations.from_tensor(half_ND).is_same_as(Activations.from_tensor(half_ND.view(torch.bfloat16)))
    assert not rows.is_same_as(data)
    for name, shown in (("a", x_ND), ("b", x_ND), ("c", x_ND + 1)):
        with ActivationWriter(tmp_path / name, 16, torch.float32, {}, 700) as writer:
            writer.append(shown, {"image": [str(i) for i in range(1500)], "token": [0] * 1500})
    a, b, c = (open_activations(tmp_path / name) for name in "abc")
    assert [a.is_same_as(other) for other in (a, b, c, rows)] == [True, True, False, False]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"step": 5}, "step: no setting of train; did you mean 'steps'?"),
        ({"learning": 5}, "learning: no setting of train"),
        ({"steps": 0}, "steps: 0 must be at least 1"),
        ({"resume": True}, "resume: of a run without an output directory nothing is kept"),
        ({"checkpoint_every": 5}, "checkpoint_every: of a run without an output"),
        ({"steps": 5, "config": TrainConfig(steps=5)}, "steps: given beside config"),
        ({"device": "cpu", "options": RunOptions()}, "device: given beside options"),
    ],
)
def test_settings_that_do_not_fit_are_refused_by_name(x_ND, settings, message):
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        train(Activations.from_tensor(x_ND), SAE, **settings)


def test_rows_that_are_not_finite_are_named(x_ND):
    bad_ND = x_ND.clone()
    bad_ND[123, 4] = torch.inf
    with pytest.raises(ValueError, match=r"tensor \[1500, 16\]: row 123, column 4 is inf"):
        train(Activations.from_tensor(bad_ND), SAE, **FEW)
    with pytest.raises(ValueError, match=r"every row of tensor \[50, 16\] read so far is zero"):
        train(Activations.from_tensor(torch.zeros(50, 16)), SAE, **FEW)


def test_an_interrupt_says_that_nothing_was_saved(x_ND, tmp_path):
    def press(step):
        if step == 3:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted, match="interrupted after step 3; nothing was saved"):
        train(Activations.from_tensor(x_ND), SAE, on_step=press, **FEW)
    assert not list(tmp_path.iterdir())


def test_a_diverging_loss_says_that_nothing_was_saved(x_ND):
    with pytest.raises(ValueError, match=r"loss: NaN or inf at step \d+; nothing was saved. Try a smaller lr"):
        train(Activations.from_tensor(x_ND), SAE, **FEW | {"lr": 1e38, "warmup_steps": 4})


def test_progress_is_one_line_and_quiet_is_the_default(x_ND, capsys):
    train(Activations.from_tensor(x_ND), SAE, **FEW)
    assert capsys.readouterr() == ("", "")
    logged = []
    train(
        Activations.from_tensor(x_ND),
        SAE,
        progress=True,
        log_every=10,
        on_log=lambda step, _: logged.append(step),
        **FEW,
    )
    out, line = capsys.readouterr()
    assert out == ""
    assert line.endswith("\n")
    assert line.count("\n") == 1
    last = line.strip().split("\r")[-1]
    assert last.startswith("step 40/40  ")
    assert "it/s  0 s left  loss 0." in last
    assert logged == [10, 20, 30, 40]


@pytest.mark.parametrize("given", [torch.ones(1, 8), torch.arange(8.0).expand(500, 8)])
def test_rows_that_are_all_one_teach_nothing(given):
    with pytest.raises(ValueError, match=r"^activations: .* there is nothing to learn$"):
        train(given, SAEConfig(8, 16, 4), steps=2, batch_size=64)


def test_validation_of_another_layer_is_refused_and_of_other_tokens_told(tmp_path):
    def store(name, **source):
        with ActivationWriter(tmp_path / name, 8, torch.float32, {"point": "residual"} | source) as writer:
            writer.append(torch.randn(64, 8), {"image": list(map(str, range(64))), "token": [0] * 64})
        return open_activations(tmp_path / name)

    config = SAEConfig.sized(8, expansion=2, k=2)
    train_on = store("patches", layer=11, tokens="patches")
    with pytest.raises(ValueError, match=r"validation: .* are of residual of layer 5, but the SAE was trained on"):
        train(train_on, config, steps=2, batch_size=16, validation=store("other", layer=5, tokens="patches"))
    with pytest.warns(Doubt, match="validation: the SAE was trained on residual of layer 11, tokens patches; "):
        train(train_on, config, steps=2, batch_size=16, validation=store("cls", layer=11, tokens="cls"))
