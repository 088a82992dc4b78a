"""Runs that are killed, interrupted, resumed, refused or replaced."""

import hashlib
import json
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from small_runs import WORDS, Stopped, run, sae_config, start, stop_at, wait_for_checkpoint, weights

from command import run as run_command
from damage import edit_record
from saevlm_fast import outputs
from saevlm_fast.config import RunOptions, SAEConfig, TrainConfig
from saevlm_fast.data.rows import Activations, open_activations
from saevlm_fast.files import sha256_file
from saevlm_fast.training.checkpoints import checkpoints
from saevlm_fast.training.run import train


@pytest.fixture(scope="module")
def uninterrupted(matrix, tmp_path_factory):
    output = tmp_path_factory.mktemp("whole") / "run"
    code, text = start(matrix, output).end()
    assert code == 0, text
    return output


def test_killed_and_resumed_is_bit_identical(matrix, uninterrupted, tmp_path):
    output = tmp_path / "run"
    for n_steps, more in ((30, ()), (100, ("--resume",))):  # killed twice, at whatever instant that happens to be
        process = start(matrix, output, *more, slow_from=n_steps + 20)
        wait_for_checkpoint(process, output, n_steps)
        process.kill()
        assert process.end()[0] == -signal.SIGKILL
    code, text = start(matrix, output, "--resume").end()
    assert code == 0, text
    assert "newest checkpoint step_000" in text
    assert weights(output) == weights(uninterrupted)
    assert (output / "metrics.jsonl").read_text() == (uninterrupted / "metrics.jsonl").read_text()


def test_interrupt_ends_with_a_checkpoint_and_a_hint(matrix, uninterrupted, tmp_path):
    output = tmp_path / "run"
    process = start(matrix, output, slow_from=40)
    wait_for_checkpoint(process, output, 20)
    process.interrupt()
    code, text = process.end()
    assert code == 130, text
    assert "--resume" in text
    assert "Traceback" not in text
    code, text = start(matrix, output, "--resume").end()
    assert code == 0, text
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
    first = start(matrix, output, "--steps", 100_000, "--checkpoint-every", 100_000, slow_from=1000)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (output / "metrics.jsonl").exists():
        assert first.is_alive(), first.end()
        time.sleep(0.02)
    monkeypatch.setattr(outputs, "LOCK_SECONDS", 0.1)
    for more in ("--resume", "--force"):  # this process is the second
        text = run_command(*WORDS, "--activations", matrix, "--output", output, more, code=2)
        assert text.startswith(f"error: output: {output} is in use: process {first.pid} on ")
        assert text.count("\n") == 1
    assert first.is_alive()
    first.kill()
    first.join()
    steps = [json.loads(line)["step"] for line in (output / "metrics.jsonl").read_text().splitlines()[:-1]]
    assert steps == list(range(5, 5 * len(steps) + 1, 5))


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


def test_resume_needs_the_same_run(matrix, tmp_path):
    run(matrix, tmp_path / "nothing", steps=5, options={"resume": True})  # killed before it wrote anything: it starts
    assert checkpoints(tmp_path / "nothing")
    run(matrix, tmp_path / "run", steps=5)
    with pytest.raises(ValueError, match="resume: seed is 2, but the run was started with 1"):
        run(matrix, tmp_path / "run", steps=5, seed=2, options={"resume": True})


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


def test_resume_clears_what_a_kill_left_behind(matrix, tmp_path):
    run(matrix, tmp_path / "run", steps=5)
    left = tmp_path / "run" / "checkpoints" / ".writing-deadbeef-step_00000003"
    left.mkdir()
    run(matrix, tmp_path / "run", steps=5, options={"resume": True})
    assert not left.exists()


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
