"""Where rows are kept: by the memory that is free, by arithmetic that messages show; a run is the same either way."""

import numpy as np
import pytest
import torch

from saevlm_fast.config import RunOptions, SAEConfig, TrainConfig
from saevlm_fast.data.rows import Activations, open_activations
from saevlm_fast.data.synthetic import PlantedConcepts
from saevlm_fast.training import memory
from saevlm_fast.training.memory import rows_go_to_device, training_memory
from saevlm_fast.training.run import train
from saevlm_fast.training.scale import Scale
from saevlm_fast.training.state import TrainingState

SAE = SAEConfig.sized(16, expansion=4, k=4)
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(scope="module")
def x_ND():
    return torch.from_numpy(PlantedConcepts(16, 8, 30, seed=3).sample(1500)[0])


@pytest.mark.parametrize(("missing", "fits"), [(0, True), (1, False)])
@pytest.mark.parametrize(("dtype", "size"), [(torch.float16, 2), (torch.float32, 4), (torch.float64, 4)])
def test_rows_fit_beside_what_training_takes(x_ND, monkeypatch, dtype, size, missing, fits):
    data, config = Activations.from_tensor(x_ND.to(dtype)), TrainConfig(batch_size=128)
    needed = 1500 * 16 * size + training_memory(SAE, 128)
    monkeypatch.setattr(memory, "free_memory", lambda device: needed - missing)
    assert rows_go_to_device(data, SAE, config, CUDA, "auto") == fits
    assert not rows_go_to_device(data, SAE, config, CPU, "auto"), "files are mapped"
    assert not rows_go_to_device(data, SAE, config, CUDA, "host")
    if fits:
        assert rows_go_to_device(data, SAE, config, CUDA, "device")
        return
    with pytest.raises(
        ValueError, match=r"data_on: device, but the rows take 0\.\d MB there and training 0\.\d MB, and"
    ):
        rows_go_to_device(data, SAE, config, CUDA, "device")


def test_a_system_that_does_not_say_is_taken_at_its_word(x_ND, monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda device: None)
    assert rows_go_to_device(Activations.from_tensor(x_ND), SAE, TrainConfig(), CPU, "device")


@pytest.mark.parametrize("architecture", ["topk", "batch_topk", "matryoshka"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_run_is_the_same_wherever_its_rows_are(x_ND, tmp_path, architecture, dtype):
    np.save(tmp_path / "x.npy", x_ND.to(dtype).numpy())
    config = SAEConfig.sized(16, expansion=4, k=4, architecture=architecture)
    recipe = TrainConfig(steps=40, batch_size=128, lr=3e-3)
    runs = [
        train(open_activations(tmp_path / "x.npy"), config, recipe, RunOptions(device="cpu", data_on=data_on))
        for data_on in ("host", "device")
    ]
    for name, tensor in runs[0][0].state_dict().items():
        assert torch.equal(tensor, runs[1][0].state_dict()[name]), name
    assert runs[0][1] == runs[1][1]


def test_a_run_may_be_resumed_with_its_rows_elsewhere(x_ND, tmp_path):
    class Stop(Exception):
        pass

    def stop(step):
        if step == 23:
            raise Stop

    recipe, data = TrainConfig(steps=40, batch_size=128, lr=3e-3), Activations.from_tensor(x_ND)
    whole, _ = train(data, SAE, recipe, device="cpu")
    kept = {"output": tmp_path / "run", "device": "cpu", "checkpoint_every": 10}
    with pytest.raises(Stop):
        train(data, SAE, recipe, RunOptions(**kept, data_on="device"), on_step=stop)
    resumed, _ = train(data, SAE, recipe, RunOptions(**kept, data_on="host", resume=True))
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


def test_rows_that_are_not_finite_are_named_before_training(x_ND):
    x_ND = x_ND.clone()
    x_ND[1234, 5] = torch.nan
    held = Activations.from_tensor(x_ND[:100])
    with pytest.raises(ValueError, match=r"tensor \[1500, 16\]: row 1234, column 5 is nan"):
        train(
            Activations.from_tensor(x_ND), SAE, steps=1, batch_size=8, data_on="device", device="cpu", validation=held
        )


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_rows_are_widened_before_they_are_divided(x_ND, device, dtype):
    state = TrainingState(Activations.from_tensor(x_ND), SAE, TrainConfig(), device)
    state.scale = Scale(3.7)
    x_BD, divisor = x_ND[:64].to(device, dtype), torch.tensor(3.7, device=device)
    out = torch.empty(64, 16, device=device)
    assert state.normalised(x_BD, out=out) is out
    assert torch.equal(out, x_BD.float() / divisor)
    assert torch.equal(state.normalised(x_BD), out)
