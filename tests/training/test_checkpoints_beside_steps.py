"""Checkpoints written while steps go on, as a GPU's are: the same files, and nothing is lost on the way out."""

import threading
from contextlib import nullcontext

import pytest
import torch
from safetensors.torch import load_file

from saevlm_fast.config import RunOptions, SAEConfig, TrainConfig
from saevlm_fast.data.rows import Activations
from saevlm_fast.data.synthetic import PlantedConcepts
from saevlm_fast.errors import Interrupted
from saevlm_fast.training import run as run_module
from saevlm_fast.training import saved_state
from saevlm_fast.training.checkpoints import RunDirectory, checkpoints
from saevlm_fast.training.memory import Written
from saevlm_fast.training.run import train
from saevlm_fast.training.saved_state import check_checkpoint
from saevlm_fast.training.step import Stepper

SAE = SAEConfig.sized(16, expansion=4, k=4)


@pytest.fixture(scope="module")
def data():
    return Activations.from_tensor(PlantedConcepts(16, 8, 30, seed=3).sample(1500)[0])


@pytest.fixture
def beside(monkeypatch):
    monkeypatch.setattr(RunDirectory, "_written_by", lambda self, device: Written.BESIDE_STEPS)


@pytest.fixture
def slow(beside, monkeypatch):
    """Writing begins when it is told to, or after a while."""
    write, go = RunDirectory._write, threading.Event()

    def wait_and_write(*args):
        go.wait(0.5)
        write(*args)

    monkeypatch.setattr(RunDirectory, "_write", wait_and_write)
    return go


def run(data, output, on_step=lambda step: None, **options):
    recipe = TrainConfig(steps=40, batch_size=128, lr=3e-3)
    options = RunOptions(output, "cpu", **{"checkpoint_every": 10, "log_every": 1} | options)
    return train(data, SAE, recipe, options, on_step=on_step)


def spoiled_from(step, device_step):
    def spoiled(stepper, x_BD, e_BE=None):
        return device_step(stepper, x_BD * torch.nan if stepper.n_steps >= step else x_BD, e_BE)

    return spoiled


def test_the_files_are_those_of_checkpoints_between_steps(data, tmp_path, monkeypatch, slow):
    run(data, tmp_path / "beside")
    monkeypatch.setattr(RunDirectory, "_written_by", lambda self, device: Written.IN_TURN)
    run(data, tmp_path / "between")
    for step in (30, 40):
        pair = [checkpoints(tmp_path / name)[step // 10 - 3] for name in ("beside", "between")]
        assert [check_checkpoint(path) for path in pair] == [(step, step * 128)] * 2
        for file in ("train_state.safetensors", "sae_weights.safetensors"):
            beside_steps, between = (load_file(path / file) for path in pair)
            assert beside_steps.keys() == between.keys()
            assert all(torch.equal(tensor, between[name]) for name, tensor in beside_steps.items())


def test_a_checkpoint_knows_the_log_as_it_was_and_a_run_resumes_from_it(data, tmp_path, slow):
    class Stop(Exception):
        pass

    def stop(step):
        if step == 23:
            raise Stop

    whole, _ = run(data, tmp_path / "whole")
    with pytest.raises(Stop):
        run(data, tmp_path / "run", on_step=stop)
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["step_00000010", "step_00000020"], "waited for"
    resumed, _ = run(data, tmp_path / "run", resume=True)
    assert torch.equal(whole.W_dec, resumed.W_dec)


def test_an_interrupt_waits_for_its_checkpoint(data, tmp_path, slow, monkeypatch):
    event = threading.Event()
    monkeypatch.setattr(run_module, "interruptible", lambda: nullcontext(event))
    with pytest.raises(Interrupted, match="interrupted after step 17"):
        run(data, tmp_path / "run", on_step=lambda step: event.set() if step == 17 else None)
    assert checkpoints(tmp_path / "run")[-1].name == "step_00000017"


def test_what_is_left_of_a_run_is_said_once_it_is_written(data, tmp_path, slow, monkeypatch):
    monkeypatch.setattr(Stepper, "device_step", spoiled_from(12, Stepper.device_step))
    with pytest.raises(ValueError, match=r"at step 12; the last good checkpoint is .*step_00000010"):
        run(data, tmp_path / "run")


def test_a_checkpoint_that_cannot_be_written_ends_the_run(data, tmp_path, beside, monkeypatch):
    def full(path, *args, **kwargs):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(saved_state, "save_safetensors_atomic", full)
    steps, before = [], set(threading.enumerate())
    with pytest.raises(OSError, match="No space left on device"):
        run(data, tmp_path / "run", on_step=steps.append)
    assert 10 <= steps[-1] <= 20
    assert checkpoints(tmp_path / "run") == []
    assert not list((tmp_path / "run" / "checkpoints").iterdir())
    begun = set(threading.enumerate()) - before
    assert not [thread for thread in begun if thread.name.startswith("checkpoint")]
