"""Whole runs: what they write, what they refuse, and that being killed changes nothing."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from command import ROOT
from command import run as run_command
from damage import edit_record
from saevlm_fast import outputs
from saevlm_fast.config import RunOptions, SAEConfig, TrainConfig, group_sizes_from_fractions
from saevlm_fast.data.rows import Activations, open_activations
from saevlm_fast.data.synthetic import PlantedConcepts
from saevlm_fast.files import sha256_file
from saevlm_fast.runtime import resolve_device
from saevlm_fast.sae import SparseAutoencoder
from saevlm_fast.training import checkpoints as checkpoints_module
from saevlm_fast.training.checkpoints import Cadence, RunDirectory, checkpoints
from saevlm_fast.training.evaluate import evaluate
from saevlm_fast.training.run import train

D_IN, D_SAE, K = 32, 128, 6


@pytest.fixture(scope="module")
def matrix(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "x.npy"
    np.save(path, PlantedConcepts(D_IN, 16, 60, seed=3).sample(3000)[0])
    return path


def sae_config(architecture="batch_topk"):
    groups = group_sizes_from_fractions((0.25, 0.25, 0.5), D_SAE) if architecture == "matryoshka" else ()
    return SAEConfig(D_IN, D_SAE, K, architecture, groups)


def run(matrix, output, architecture="batch_topk", *, options=None, validation=None, **settings):
    config = TrainConfig(**{"steps": 60, "batch_size": 256, "lr": 3e-3, "seed": 1} | settings)
    options = RunOptions(output, "cpu", **({"log_every": 20, "checkpoint_every": 25} | (options or {})))
    return train(open_activations(matrix), sae_config(architecture), config, options, validation=validation)


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


COMMAND = [sys.executable, "-m", "saevlm_fast.cli", "train", "--device", "cpu", "--d-sae", "128", "--k", "6",
           "--steps", "150", "--batch-size", "256", "--lr", "3e-3", "--checkpoint-every", "10", "--log-every", "5",
           "--dead-after", "5000"]  # fmt: skip


def start(matrix, output, *more):
    command = [*COMMAND, "--activations", str(matrix), "--output", str(output), *more]
    environment = os.environ | {"OMP_NUM_THREADS": "2"}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def wait_for_checkpoint(process, output, n_steps):
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if any(int(p.name[5:]) >= n_steps for p in checkpoints(output)):
            return
        time.sleep(0.005)
    raise AssertionError(f"no checkpoint: {process.communicate()[0]}")


def weights(output):
    return (output / "sae_weights.safetensors").read_bytes()


@pytest.fixture(scope="module")
def uninterrupted(matrix, tmp_path_factory):
    output = tmp_path_factory.mktemp("whole") / "run"
    process = start(matrix, output)
    text = process.communicate()[0]
    assert process.returncode == 0, text
    return output


def test_killed_and_resumed_is_bit_identical(matrix, uninterrupted, tmp_path):
    output = tmp_path / "run"
    for n_steps, more in ((30, ()), (100, ("--resume",))):  # killed twice, at whatever instant that happens to be
        process = start(matrix, output, *more)
        wait_for_checkpoint(process, output, n_steps)
        process.send_signal(signal.SIGKILL)
        process.wait()
    process = start(matrix, output, "--resume")
    text = process.communicate()[0]
    assert process.returncode == 0, text
    assert "newest checkpoint step_000" in text
    assert weights(output) == weights(uninterrupted)
    assert (output / "metrics.jsonl").read_text() == (uninterrupted / "metrics.jsonl").read_text()


def test_interrupt_ends_with_a_checkpoint_and_a_hint(matrix, uninterrupted, tmp_path):
    output = tmp_path / "run"
    process = start(matrix, output)
    wait_for_checkpoint(process, output, 20)
    process.send_signal(signal.SIGINT)
    text = process.communicate()[0]
    assert process.returncode == 130, text
    assert "--resume" in text
    assert "Traceback" not in text
    process = start(matrix, output, "--resume")
    assert process.wait() == 0
    assert weights(output) == weights(uninterrupted)


def test_resume_of_a_finished_run_changes_nothing(matrix, tmp_path):
    run(matrix, tmp_path / "run")
    before = weights(tmp_path / "run"), (tmp_path / "run" / "metrics.jsonl").read_text()
    run(matrix, tmp_path / "run", options={"resume": True})
    assert (weights(tmp_path / "run"), (tmp_path / "run" / "metrics.jsonl").read_text()) == before


def test_directory_in_use(matrix, tmp_path):
    run(matrix, tmp_path / "run", steps=5)
    with pytest.raises(ValueError, match=r"already holds a run; use --resume .* or --force"):
        run(matrix, tmp_path / "run", steps=5)
    run(matrix, tmp_path / "run", steps=7, options={"force": True})
    assert [p.name for p in checkpoints(tmp_path / "run")] == ["step_00000007"]


def test_a_second_process_is_refused_and_the_first_goes_on(matrix, tmp_path, monkeypatch):
    """By the lock; a resumed run, and one that would replace it."""
    output = tmp_path / "run"
    first = start(matrix, output, "--steps", "100000", "--checkpoint-every", "100000")
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (output / "metrics.jsonl").exists():
        assert first.poll() is None, first.communicate()[0]
        time.sleep(0.02)
    monkeypatch.setattr(outputs, "LOCK_SECONDS", 0.1)
    for more in ("--resume", "--force"):  # this process is the second
        text = run_command(*COMMAND[3:], "--activations", matrix, "--output", output, more, code=2)
        assert text.startswith(f"error: output: {output} is in use: process {first.pid} on ")
        assert text.count("\n") == 1
    assert first.poll() is None
    first.kill()
    first.wait()
    steps = [json.loads(line)["step"] for line in (output / "metrics.jsonl").read_text().splitlines()[:-1]]
    assert steps == list(range(5, 5 * len(steps) + 1, 5))


class Stopped(Exception):
    pass


def stop_at(step):
    def on_step(now):
        if now == step:
            raise Stopped

    return on_step


def test_the_old_run_stays_until_the_new_sae_is_finished(matrix, tmp_path):
    output = tmp_path / "run"
    run(matrix, output, steps=5)
    (output / "checkpoints" / "mine.txt").write_text("mine")
    (output / "scores.parquet").write_text("mine")
    before = weights(output)
    config = TrainConfig(steps=60, batch_size=256, lr=3e-3, seed=1)
    force = RunOptions(output, "cpu", log_every=20, checkpoint_every=25, force=True)
    with pytest.raises(Stopped):
        train(open_activations(matrix), sae_config(), config, force, on_step=stop_at(30))
    assert weights(output) == before
    assert [path.name for path in checkpoints(output)] == ["step_00000005"]
    with pytest.raises(ValueError, match="already holds a run"):
        run(matrix, output)
    begun = []
    resume = RunOptions(output, "cpu", log_every=20, checkpoint_every=25, resume=True)
    train(open_activations(matrix), sae_config(), config, resume, on_step=begun.append)
    assert begun[0] == 26
    run(matrix, tmp_path / "whole")
    assert weights(output) == weights(tmp_path / "whole")
    assert (output / "metrics.jsonl").read_text() == (tmp_path / "whole" / "metrics.jsonl").read_text()
    assert [path.name for path in checkpoints(output)] == ["step_00000050", "step_00000060"]
    assert (output / "checkpoints" / "mine.txt").read_text() == (output / "scores.parquet").read_text() == "mine"
    assert not list(output.glob(".*"))


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


def test_resume_needs_the_same_run(matrix, tmp_path):
    run(matrix, tmp_path / "nothing", steps=5, options={"resume": True})  # killed before it wrote anything: it starts
    assert checkpoints(tmp_path / "nothing")
    run(matrix, tmp_path / "run", steps=5)
    with pytest.raises(ValueError, match="resume: seed is 2, but the run was started with 1"):
        run(matrix, tmp_path / "run", steps=5, seed=2, options={"resume": True})


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


def test_resume_refuses_other_data_and_damaged_state(matrix, tmp_path):
    run(matrix, tmp_path / "run", steps=50)
    np.save(tmp_path / "other.npy", np.load(matrix) * 2)
    with pytest.raises(ValueError, match="resume: digest of the activations is"):
        run(tmp_path / "other.npy", tmp_path / "run", steps=50, options={"resume": True})
    newest = checkpoints(tmp_path / "run")[-1]
    state = newest / "train_state.safetensors"
    whole = state.read_bytes()
    altered = bytearray(whole)
    altered[-5] ^= 16  # a weight, still a number
    for damaged in (whole[:5000], bytes(altered)):
        state.write_bytes(damaged)
        with pytest.raises(ValueError, match=f"resume: {newest} is damaged.*train_state.safetensors: altered"):
            run(matrix, tmp_path / "run", steps=50, options={"resume": True})
    before = weights(tmp_path / "run")
    shutil.rmtree(newest)
    run(matrix, tmp_path / "run", steps=50, options={"resume": True})
    assert weights(tmp_path / "run") == before


@pytest.mark.parametrize("batch_size", [1, 8])
def test_calibration_does_not_depend_on_a_small_batch(matrix, tmp_path, batch_size):
    _, metrics = run(matrix, tmp_path / "run", steps=200, batch_size=batch_size)
    assert metrics["l0"] == pytest.approx(K, rel=0.1)


def test_resume_clears_what_a_kill_left_behind(matrix, tmp_path):
    run(matrix, tmp_path / "run", steps=5)
    left = tmp_path / "run" / "checkpoints" / ".writing-deadbeef-step_00000003"
    left.mkdir()
    run(matrix, tmp_path / "run", steps=5, options={"resume": True})
    assert not left.exists()


def test_metrics_are_strict_json_even_where_undefined(matrix, tmp_path):
    np.save(tmp_path / "one.npy", np.load(matrix)[:1])
    run(tmp_path / "one.npy", tmp_path / "run", steps=3)
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


# Digests ------------------------------------------------------------------------------------------------------------


def test_a_checkpoint_and_a_finished_run_say_what_their_files_are(matrix, tmp_path):
    run(matrix, tmp_path / "run", steps=5)
    (checkpoint,) = checkpoints(tmp_path / "run")
    record = json.loads((checkpoint / "checkpoint.json").read_text())
    names = ("cfg.json", "sae_weights.safetensors", "train_state.safetensors")
    assert record["files"] == {name: sha256_file(checkpoint / name) for name in names}
    assert (record["n_steps"], record["n_rows_seen"]) == (5, 5 * 256)
    metrics = tmp_path / "run" / "metrics.jsonl"
    logged = metrics.read_bytes()[: record["metrics"]["bytes"]]
    assert record["metrics"]["sha256"] == hashlib.sha256(logged).hexdigest()
    assert (tmp_path / "run" / "metrics.jsonl.sha256").read_text() == f"{sha256_file(metrics)}  metrics.jsonl\n"


def test_resume_notices_any_row_that_was_replaced(matrix, tmp_path):
    run(matrix, tmp_path / "run", steps=5)
    x = np.load(matrix)
    x[len(x) // 2 + 1, 3] *= 1.01  # none of the 64 rows that were compared once
    np.save(tmp_path / "other.npy", x)
    with pytest.raises(ValueError, match="resume: digest of the activations is"):
        run(tmp_path / "other.npy", tmp_path / "run", steps=5, options={"resume": True})
    moved = shutil.copy(matrix, tmp_path / "moved.npy")
    run(Path(moved), tmp_path / "run", steps=5, options={"resume": True})


def test_metrics_that_were_altered_are_named_and_may_be_moved_away(matrix, tmp_path):
    run(matrix, tmp_path / "run", steps=5, options={"log_every": 1})
    metrics = tmp_path / "run" / "metrics.jsonl"
    good = metrics.read_text()
    metrics.write_text(good.replace("2", "3", 1))
    with pytest.raises(ValueError, match=r"metrics\.jsonl: altered, .*; move it away"):
        run(matrix, tmp_path / "run", steps=5, options={"resume": True})
    metrics.unlink()
    run(matrix, tmp_path / "run", steps=5, options={"resume": True})


def test_a_run_of_before_the_digests_resumes(matrix, tmp_path):
    """It knows its data by 64 rows, and has neither seals nor checkpoint.json."""
    run(matrix, tmp_path / "whole", steps=10, options={"checkpoint_every": 5})
    run(matrix, tmp_path / "run", steps=10, options={"checkpoint_every": 5})
    old = tmp_path / "run"
    settings = json.loads((old / "run.json").read_text())
    del settings["data"]["digest of the activations"]
    rows = open_activations(matrix).rows(
        torch.linspace(0, open_activations(matrix).n_rows - 1, 64, dtype=torch.float64).long()
    )
    fingerprint = hashlib.sha256(rows.numpy().tobytes()).hexdigest()[:16]
    edit_record(old / "run.json", data=settings["data"] | {"fingerprint of the activations": fingerprint})
    for directory in (old, *checkpoints(old)):
        edit_record(directory / "cfg.json")
        (directory / "checkpoint.json").unlink(missing_ok=True)
    (old / "metrics.jsonl.sha256").unlink()
    shutil.rmtree(checkpoints(old)[-1])
    run(matrix, old, steps=10, options={"resume": True, "checkpoint_every": 5})
    assert weights(old) == weights(tmp_path / "whole")
    np.save(tmp_path / "other.npy", np.load(matrix) * 2)
    with pytest.raises(ValueError, match="resume: fingerprint of the activations is"):
        run(tmp_path / "other.npy", old, steps=10, options={"resume": True})


def test_a_run_of_before_with_a_dtype_resumes_if_that_was_float32(matrix, tmp_path):
    run(matrix, tmp_path / "whole", steps=10, options={"checkpoint_every": 5})
    old = tmp_path / "run"
    run(matrix, old, steps=10, options={"checkpoint_every": 5})
    shutil.rmtree(checkpoints(old)[-1])
    recipe = json.loads((old / "run.json").read_text())["train"]
    for dtype in ("tf32", "bfloat16"):
        edit_record(old / "run.json", train=recipe | {"dtype": dtype})
        wanted = rf"run.json: dtype: '{dtype}' is gone, 'float32' is all there is; train anew \(--force\)$"
        with pytest.raises(ValueError, match=wanted):
            run(matrix, old, steps=10, options={"resume": True})
    edit_record(old / "run.json", train=recipe | {"dtype": "float32"})
    run(matrix, old, steps=10, options={"resume": True, "checkpoint_every": 5})
    assert weights(old) == weights(tmp_path / "whole")


@pytest.mark.parametrize("damage", ["gone", "shape", "dtype", "nan", "more", "steps", "rows"])
def test_a_state_that_cannot_be_of_the_run_is_refused(matrix, tmp_path, damage):
    """Also one without a digest, of before."""
    run(matrix, tmp_path / "run", steps=5)
    (checkpoint,) = checkpoints(tmp_path / "run")
    (checkpoint / "checkpoint.json").unlink()
    file = checkpoint / "train_state.safetensors"
    tensors, header = load_file(file), {"n_steps": "5", "n_rows_seen": "1280"}
    if damage == "gone":
        del tensors["b_dec.exp_avg"]
    if damage in ("shape", "dtype", "nan"):
        name, value = {"shape": ("W_dec.exp_avg", torch.zeros(3)), "dtype": ("idle", tensors["idle"].float()),
                       "nan": ("b_dec", tensors["b_dec"] * torch.nan)}[damage]  # fmt: skip
        tensors[name] = value
    if damage == "more":
        tensors["x"] = torch.zeros(2)
    header |= {"steps": {"n_steps": "4"}, "rows": {"n_rows_seen": "1281"}}.get(damage, {})
    save_file(tensors, file, header)
    with pytest.raises(ValueError, match=f"resume: {checkpoint} is damaged, delete it") as caught:
        run(matrix, tmp_path / "run", steps=5, options={"resume": True})
    assert "\n" not in str(caught.value)


def test_force_over_checkpoints_behind_a_link_unlinks_it_and_leaves_what_it_leads_to(tmp_path):
    output, elsewhere = tmp_path / "run", tmp_path / "scratch"
    activations, config = Activations.from_tensor(torch.randn(64, 8)), SAEConfig.sized(8, expansion=2, k=2)
    train(activations, config, steps=3, batch_size=16, output=output)
    (output / "checkpoints").rename(elsewhere)
    (output / "checkpoints").symlink_to(elsewhere)
    train(activations, config, steps=2, batch_size=16, output=output, force=True)
    assert [path.name for path in elsewhere.iterdir()] == ["step_00000003"]
    assert [path.name for path in (output / "checkpoints").iterdir()] == ["step_00000002"]
    assert not (output / "checkpoints").is_symlink()
