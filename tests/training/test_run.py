"""Runs: directories, checkpoints, quality, data, what ends a run in one line."""

import json
import os

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from small_runs import D_IN, K, run, sae_config, weights

from saevlm_fast.config import RunOptions, SAEConfig, TrainConfig
from saevlm_fast.data.rows import open_activations
from saevlm_fast.inspection import inspect
from saevlm_fast.runtime import resolve_device
from saevlm_fast.sae import SparseAutoencoder
from saevlm_fast.training import checkpoints as checkpoints_module
from saevlm_fast.training.checkpoints import Cadence, RunDirectory, checkpoints
from saevlm_fast.training.evaluate import evaluate
from saevlm_fast.training.run import train


@pytest.mark.parametrize("architecture", ["topk", "batch_topk", "matryoshka"])
def test_run_directory_and_quality(matrix, tmp_path, architecture):
    sae, metrics = run(matrix, tmp_path / "run", architecture, steps=200)
    assert metrics["explained_variance"] > 0.7
    assert metrics["l0"] == pytest.approx(K, rel=0.1), "inference L0 is near k although the run ended before step 1000"
    names = sorted(p.name for p in (tmp_path / "run").iterdir())
    assert names == [
        "cfg.json",
        "checkpoints",
        "metrics.jsonl",
        "metrics.jsonl.sha256",
        "run.json",
        "sae_weights.safetensors",
    ]
    assert [p.name for p in checkpoints(tmp_path / "run")] == ["step_00000175", "step_00000200"]
    loaded = SparseAutoencoder.from_pretrained(tmp_path / "run")
    x = open_activations(matrix).rows(torch.arange(50))
    assert torch.equal(loaded(x), sae(x))
    assert loaded.config.metadata["training"]["steps"] == 200
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [*range(20, 201, 20), 200]
    assert {"losses/overall_loss", "metrics/explained_variance", "metrics/l0", "sparsity/dead_features"} < set(lines[0])
    assert lines[9]["losses/overall_loss"] < lines[0]["losses/overall_loss"] / 2


def test_every_checkpoint_is_a_usable_sae(matrix, tmp_path):
    run(matrix, tmp_path / "run")
    for checkpoint in checkpoints(tmp_path / "run"):
        metrics = evaluate(SparseAutoencoder.from_pretrained(checkpoint), open_activations(matrix))
        assert metrics["l0"] == pytest.approx(K, rel=0.15)


class FakeClock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def advance(self, seconds):
        self.now += seconds


def steps_with_checkpoints(matrix, output, monkeypatch, every, step_seconds, checkpoint_seconds, steps=60):
    """After which steps a run writes a checkpoint, if steps and checkpoints take that long."""
    clock, written = FakeClock(), []
    checkpoint = RunDirectory.checkpoint

    def slow_checkpoint(directory, state):
        checkpoint(directory, state)
        written.append(state.stepper.n_steps)
        clock.advance(checkpoint_seconds)

    monkeypatch.setattr(checkpoints_module, "monotonic", clock)
    monkeypatch.setattr(RunDirectory, "checkpoint", slow_checkpoint)
    config = TrainConfig(steps=steps, batch_size=16)
    options = RunOptions(output, "cpu", checkpoint_every=every)
    train(open_activations(matrix), sae_config(), config, options, on_step=lambda step: clock.advance(step_seconds))
    return written


@pytest.mark.parametrize(
    ("every", "step_seconds", "checkpoint_seconds", "expected"),
    [
        (None, 100, 1, list(range(3, 61, 3))),  # cheap beside the steps: twenty
        (None, 10, 1, list(range(3, 61, 3))),  # a twentieth of the run takes just 30 s
        (None, 9, 1, list(range(4, 61, 4))),  # 27 s are too few
        (None, 10, 5, [3, *range(13, 60, 10), 60]),  # 20 times 5 s: 10 steps
        (None, 0.1, 5, [60]),  # a short run: the last step's
        (7, 0.1, 5, [*range(7, 60, 7), 60]),  # asked for: obeyed
    ],
)
def test_checkpoints_cost_a_twentieth_unless_asked_for(
    matrix, tmp_path, monkeypatch, every, step_seconds, checkpoint_seconds, expected
):
    found = steps_with_checkpoints(matrix, tmp_path / "run", monkeypatch, every, step_seconds, checkpoint_seconds)
    assert found == expected


def test_a_resumed_run_counts_its_checkpoints_from_where_it_continues(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(checkpoints_module, "monotonic", lambda: now[0])
    cadence = Cadence(None, 200, last=37)  # a twentieth: 10 steps
    now[0] = 1000.0
    assert not cadence.due(46)
    assert cadence.due(47)
    with cadence.writing(47):
        now[0] += 5.0
    now[0] += 99.0
    assert not cadence.due(100)
    now[0] += 1.0
    assert cadence.due(100)


def test_moving_threshold_follows_the_batch_minimum(matrix, tmp_path):
    sae, metrics = run(matrix, tmp_path / "run", steps=300, threshold_start=100)
    stored = load_file(tmp_path / "run" / "checkpoints" / "step_00000300" / "train_state.safetensors")["threshold"]
    norm = sae.config.metadata["norm_factor"]
    assert float(sae.threshold) == pytest.approx(float(stored) * norm, rel=1e-5)
    assert metrics["l0"] == pytest.approx(K, rel=0.2)


def test_evaluation_is_over_the_whole_set(matrix):
    sae = SparseAutoencoder(sae_config("topk")).eval().requires_grad_(False)
    data = open_activations(matrix)
    x = data.rows(torch.arange(data.n_rows)).double()
    codes = sae.encode(x.float())
    error = x - sae.decode(codes)
    expected = 1 - error.var(0).sum() / x.var(0).sum()
    for batch_rows in (7, 512, 5000):
        metrics = evaluate(sae, data, batch_rows)
        assert metrics["explained_variance"] == pytest.approx(float(expected), abs=1e-6)
        assert metrics["l0"] == pytest.approx(float(codes.l0().double().mean()))
        assert metrics["l2"] == pytest.approx(float(error.pow(2).sum(1).mean()), rel=1e-5)


def test_fewer_rows_than_a_batch(matrix, tmp_path):
    np.save(tmp_path / "few.npy", np.load(matrix)[:40])
    _, metrics = run(tmp_path / "few.npy", tmp_path / "run")
    assert metrics["rows"] == 40
    assert metrics["explained_variance"] > 0.5


def test_validation_rows_are_the_ones_evaluated(matrix, tmp_path):
    np.save(tmp_path / "held.npy", np.load(matrix)[:123])
    _, metrics = run(matrix, tmp_path / "run", validation=open_activations(tmp_path / "held.npy"))
    assert metrics["rows"] == 123


def test_half_precision_data_trains(matrix, tmp_path):
    np.save(tmp_path / "half.npy", np.load(matrix).astype(np.float16))
    _, metrics = run(tmp_path / "half.npy", tmp_path / "run", steps=150)
    assert metrics["explained_variance"] > 0.6


@pytest.mark.parametrize("row", [0, 5999])
def test_held_out_rows_are_looked_at_first(matrix, tmp_path, row):
    held_out = np.ones((6000, D_IN), np.float32)
    held_out[row, 3] = np.inf
    np.save(tmp_path / "held.npy", held_out)
    with pytest.raises(ValueError, match=f"row {row}"):
        run(matrix, tmp_path / "run", validation=open_activations(tmp_path / "held.npy"))
    assert not (tmp_path / "run").exists()


def test_an_evaluation_that_fails_leaves_the_sae(matrix, tmp_path):
    """A row that is not looked at first: in the evenly spread 4096 of 6000 rows, number 3 is not."""
    held_out = np.ones((6000, D_IN), np.float32)
    held_out[3, 3] = np.nan
    np.save(tmp_path / "held.npy", held_out)
    message = rf"row 3.*; that is of the evaluation alone: the SAE is finished and saved in {tmp_path / 'run'}$"
    with pytest.raises(ValueError, match=message):
        run(matrix, tmp_path / "run", validation=open_activations(tmp_path / "held.npy"))
    run(matrix, tmp_path / "whole")
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")
    with pytest.raises(ValueError, match=r"row 3"):  # nothing would be left of it: all rows are looked at
        run(matrix, None, options={"checkpoint_every": None}, validation=open_activations(tmp_path / "held.npy"))


def test_nan_in_the_data_names_the_row(matrix, tmp_path):
    x = np.load(matrix)
    x[1234, 5] = np.nan
    np.save(tmp_path / "bad.npy", x)
    with pytest.raises(ValueError, match="1234"):
        run(tmp_path / "bad.npy", tmp_path / "run")


def test_diverging_loss_names_the_step_and_keeps_the_last_good_checkpoint(matrix, tmp_path):
    with pytest.raises(ValueError, match=r"at step \d+; the last good checkpoint is .*step_0") as e:
        run(matrix, tmp_path / "diverges", lr=1e38, warmup_steps=4, steps=200, options={"checkpoint_every": 1})
    last = str(e.value).split("checkpoint is ")[1].split(".")[0]
    state = load_file(os.path.join(last, "train_state.safetensors"))
    assert all(t.isfinite().all() for t in state.values())
    found = inspect(tmp_path / "diverges")
    assert found["diverged_at"] == int(str(e.value).split("at step ")[1].split(";")[0])
    assert found["steps_taken"] == int(last[-8:])
    assert found["steps_taken"] < found["diverged_at"]


def test_a_run_that_diverged_and_goes_on_is_one_no_more(matrix, tmp_path):
    run(matrix, tmp_path / "run", steps=20)
    (tmp_path / "run" / "metrics.jsonl.sha256").unlink()
    RunDirectory(tmp_path / "run", None, True, False).diverged(21)
    assert inspect(tmp_path / "run")["diverged_at"] == 21
    run(matrix, tmp_path / "run", steps=20, options={"resume": True})
    assert inspect(tmp_path / "run")["diverged_at"] is None


def test_a_step_after_which_weights_are_no_numbers_stands_once_in_the_log(matrix, tmp_path):
    options = {"checkpoint_every": 1, "log_every": 1}
    with pytest.raises(ValueError, match=r"NaN or inf after step \d+"):
        run(matrix, tmp_path / "run", lr=1e39, warmup_steps=2, options=options)
    logged = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in logged] == list(range(1, len(logged) + 1))
    assert logged[-1] == {"step": len(logged), "losses/overall_loss": None}
    assert all(line["losses/overall_loss"] is not None for line in logged[:-1])


def test_a_finite_loss_before_a_bad_update_does_not_make_a_good_checkpoint(matrix, tmp_path):
    with pytest.raises(ValueError, match=r"NaN or inf (at|after) step \d+") as caught:
        run(matrix, tmp_path / "run", lr=1e39, warmup_steps=2, options={"checkpoint_every": 1})
    assert "the last good checkpoint" in str(caught.value)
    for checkpoint in checkpoints(tmp_path / "run"):
        state = load_file(checkpoint / "train_state.safetensors")
        assert all(t.isfinite().all() for t in state.values())


@pytest.mark.parametrize("damage", ["nan", "zero"])
def test_bad_data_touches_nothing_on_disk(matrix, tmp_path, damage):
    x = np.load(matrix)
    x[:] = np.nan if damage == "nan" else 0
    np.save(tmp_path / "bad.npy", x)
    with pytest.raises(ValueError, match=r"row|zero"):
        run(tmp_path / "bad.npy", tmp_path / "run")
    assert not (tmp_path / "run").exists()
    run(matrix, tmp_path / "run", steps=5)
    before = weights(tmp_path / "run")
    with pytest.raises(ValueError, match=r"row|zero"):
        run(tmp_path / "bad.npy", tmp_path / "run", steps=5, options={"force": True})
    assert weights(tmp_path / "run") == before
    assert len(checkpoints(tmp_path / "run")) == 1


@pytest.mark.parametrize("batch_size", [1, 8])
def test_calibration_does_not_depend_on_a_small_batch(matrix, tmp_path, batch_size):
    np.save(tmp_path / "some.npy", np.load(matrix)[:800])
    _, metrics = run(tmp_path / "some.npy", tmp_path / "run", steps=200, batch_size=batch_size)
    assert metrics["l0"] == pytest.approx(K, rel=0.1)


def test_metrics_are_strict_json_even_where_undefined(matrix, tmp_path):
    """Of a batch of one row there is no explained variance."""
    np.save(tmp_path / "two.npy", np.load(matrix)[:2])
    run(tmp_path / "two.npy", tmp_path / "run", steps=3, batch_size=1)
    assert "null" in (tmp_path / "run" / "metrics.jsonl").read_text()
    for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines():
        assert "NaN" not in line
        json.loads(line)


def test_a_half_precision_sae_is_evaluated(matrix, tmp_path):
    run(matrix, tmp_path / "run", steps=50)
    sae = SparseAutoencoder.from_pretrained(tmp_path / "run", dtype=torch.bfloat16)
    assert evaluate(sae, open_activations(matrix))["l0"] == pytest.approx(K, rel=0.3)


@pytest.mark.gpu
def test_gpu_run_resumes(matrix, tmp_path):
    config = TrainConfig(steps=40, batch_size=256, lr=3e-3)
    for more in ({}, {"resume": True}):
        options = RunOptions(tmp_path / "run", "cuda", log_every=10, checkpoint_every=10, **more)
        sae, metrics = train(open_activations(matrix), sae_config(), config, options)
    assert metrics["l0"] == pytest.approx(K, rel=0.2)
    assert sae.W_dec.is_cuda


def test_width_mismatch(matrix, tmp_path):
    with pytest.raises(ValueError, match="d_in: 33 does not fit activations of width 32"):
        train(open_activations(matrix), SAEConfig(33, 64, 4), TrainConfig(steps=1), RunOptions(tmp_path / "run", "cpu"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["tpu9", "mps", "meta"])
def test_unknown_device(name):
    with pytest.raises(ValueError, match=f"device: '{name}'"):
        resolve_device(name)
