"""Few steps on a GPU of every kind: captured and eager, with data on the device and on the host, saved meanwhile."""

from functools import partial

import pytest
import test_penalised_step
import torch
from test_capture import keep, on_gpu, same_state

from saevlm_fast.config import RunOptions, SAEConfig, TrainConfig
from saevlm_fast.data.rows import Activations
from saevlm_fast.data.synthetic import PlantedConcepts
from saevlm_fast.sae import SparseAutoencoder
from saevlm_fast.training.capture import CapturedSteps
from saevlm_fast.training.run import train
from saevlm_fast.training.step import Stepper

KINDS = ["topk", "batch_topk", "matryoshka", "relu", "jumprelu"]
WAYS = {
    "device": {"data_on": "device"},
    "host": {"data_on": "host"},
    "eager": {"data_on": "device", "capture": False},
    "saved": {"data_on": "host", "checkpoint_every": 3},
    "second": {"data_on": "host", "device": "cuda:1"},
}


def stepper_of(architecture, dead_after):
    if architecture in ("relu", "jumprelu"):
        stepper, _, data = test_penalised_step.make(architecture, dtype=torch.float32, dead_after=dead_after)
        return Stepper(stepper.sae.to("cuda"), stepper.config), data.to("cuda")
    return on_gpu(architecture, "cuda", dead_after=dead_after)


@pytest.mark.gpu
@pytest.mark.filterwarnings("error:steps are not captured")
@pytest.mark.parametrize("architecture", KINDS)
@pytest.mark.parametrize("dead_after", [10_000_000, 100], ids=["no-dead", "auxk"])
def test_captured_steps_are_the_eager_steps(architecture, dead_after):
    eager, data = stepper_of(architecture, dead_after)
    captured, _ = stepper_of(architecture, dead_after)
    steps = CapturedSteps(captured)
    for start in range(0, 5 * 31, 31):
        x = data[start : start + 31]
        expected, found = eager.step(x), steps.step(x)
        assert torch.equal(expected.losses.overall, found.losses.overall), f"step {start // 31}"
        assert int(expected.n_dead) == int(found.n_dead)
    same_state(eager, captured)
    assert steps.n_replayed >= 1, f"{steps.n_eager} eager, {steps.n_captured} graphs"


@pytest.mark.gpu
@pytest.mark.filterwarnings("error:steps are not captured")
@pytest.mark.parametrize("architecture", ["batch_topk", "jumprelu"])
def test_runs_are_the_same_wherever_data_is_and_however_steps_are_taken(architecture, tmp_path):
    x_ND = torch.from_numpy(PlantedConcepts(16, 8, 30, seed=3).sample(200)[0]).half()
    config = SAEConfig.sized(16, expansion=2, architecture=architecture, **({"k": 3} if "topk" in architecture else {}))
    recipe = TrainConfig(steps=8, batch_size=32, lr=3e-3, dead_after=100)
    found = {}
    for name, way in WAYS.items():
        if name == "second" and torch.cuda.device_count() < 2:
            continue
        logged: list = []
        options = RunOptions(**({"device": "cuda", "output": tmp_path / name if name == "saved" else None} | way))
        sae, metrics = train(Activations.from_tensor(x_ND), config, recipe, options, on_log=partial(keep, logged))
        found[name] = sae.state_dict(), metrics
    for name, (state, metrics) in found.items():
        for key, tensor in state.items():
            assert tensor.device == torch.device("cuda:1" if name == "second" else "cuda:0")
            assert torch.equal(tensor.cpu(), found["device"][0][key].cpu()), (name, key)
        assert metrics == found["device"][1], name
    written = SparseAutoencoder.from_pretrained(tmp_path / "saved")
    for key, tensor in written.state_dict().items():
        assert torch.equal(tensor, found["saved"][0][key].cpu()), key
