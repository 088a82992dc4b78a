"""--center: the mean of the data is subtracted, which mends what a large mean does, and nothing of it shows outside."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from saevlm_fast.cli.inspect_table import summary_rows
from saevlm_fast.config import SAEConfig, TrainConfig
from saevlm_fast.data.rows import Activations
from saevlm_fast.data.synthetic import PlantedConcepts
from saevlm_fast.inspection import inspect
from saevlm_fast.sae import SparseAutoencoder
from saevlm_fast.training.checkpoints import checkpoints
from saevlm_fast.training.run import train
from saevlm_fast.training.scale import Scale, mean_of_rows
from saevlm_fast.training.state import TrainingState

D_IN = 16


@pytest.fixture(scope="module")
def x_ND():
    """Spread 1.7, mean of length 1000."""
    x_ND = torch.from_numpy(PlantedConcepts(D_IN, 8, 30, seed=1).sample(2000)[0])
    return x_ND - x_ND.mean(0) + 1000 / D_IN**0.5


def sae_config(architecture="topk"):
    return SAEConfig.sized(D_IN, d_sae=64, k=3, architecture=architecture)


def run(x_ND, architecture="topk", **settings):
    known = {"steps": 60, "batch_size": 256, "lr": 1e-2, "device": "cpu", "dead_after": 10_000}
    return train(x_ND, sae_config(architecture), **known | settings)


@pytest.mark.parametrize("architecture", ["topk", "matryoshka", "jumprelu"])
def test_a_large_mean_collapses_an_sae_and_center_mends_it(x_ND, architecture):
    size = {"k": None} if architecture == "jumprelu" else {"k": 3}
    config = SAEConfig.sized(D_IN, d_sae=64, architecture=architecture, **size)
    known = {"steps": 60, "batch_size": 256, "lr": 1e-2, "device": "cpu", "dead_after": 10_000}
    known |= {"target_l0": 3.0} if architecture == "jumprelu" else {}
    _, collapsed = train(x_ND, config, **known)
    _, mended = train(x_ND, config, center=True, **known)
    assert collapsed["l2"] > 2 * mended["l2"]  # measured: 4 times and more
    assert mended["explained_variance"] > 0.55  # measured: 0.72 to 0.77


def test_an_exported_sae_is_a_plain_one_in_raw_units(x_ND):
    """Acts are norm_factor times those of training, the reconstruction is in the units of the data."""
    config = TrainConfig(steps=20, batch_size=256, center=True)
    state = TrainingState(Activations.from_tensor(x_ND), sae_config(), config, torch.device("cpu"))
    state.initialise()
    for x_BD in state.batches(0, 20):
        state.stepper.step(state.normalised(x_BD))
    trained, exported = state.stepper.sae.eval(), state.export()
    y_BD = state.normalised(x_ND[:50])
    f, codes, expected = state.scale.norm_factor, exported.encode(x_ND[:50]), trained.encode(y_BD)
    assert torch.equal(codes.top_indices, expected.top_indices)
    torch.testing.assert_close(codes.top_acts, expected.top_acts * f, rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(exported(x_ND[:50]), trained(y_BD) * f + x_ND.mean(0), rtol=0, atol=2e-3)
    assert exported.config.metadata["mean_norm"] == pytest.approx(1000, rel=1e-3)


def test_the_scale_is_that_of_what_is_left(x_ND):
    state = TrainingState(
        Activations.from_tensor(x_ND), sae_config(), TrainConfig(batch_size=2000, center=True), torch.device("cpu")
    )
    state.initialise()
    x_ND64 = x_ND.double().numpy()
    spread = np.sqrt((((x_ND64 - x_ND64.mean(0)) ** 2).sum(1)).mean())
    assert state.scale.norm_factor == pytest.approx(spread, rel=1e-5)
    y_ND = state.normalised(x_ND)
    assert float(y_ND.mean(0).abs().max()) < 1e-4
    assert float(y_ND.square().sum(1).mean()) == pytest.approx(1, rel=1e-4)


def test_the_mean_is_summed_in_float64():
    """In float32 a sum of 10,001 rows of 20,000,000.0 and one of 2 would be off."""
    x_ND = torch.full((10_001, 2), 2e7)
    x_ND[5000] = 2e7 + 2
    x_ND[:, 1] = torch.arange(10_001) * 1000.0
    expected = x_ND.double().numpy().mean(0).astype(np.float32)
    assert np.array_equal(mean_of_rows(Activations.from_tensor(x_ND)).numpy(), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_rows_are_widened_before_the_mean_is_taken_off(dtype):
    x_BD, mean_D = torch.randn(8, 4).to(dtype), torch.randn(4)
    expected = (x_BD.float() - mean_D) / 3.7
    out = torch.empty(8, 4)
    assert Scale(3.7, mean_D).normalised(x_BD, out) is out
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(Scale(3.7, mean_D).normalised(x_BD), expected, rtol=1e-6, atol=1e-6)


def test_resumed_it_goes_on_with_its_mean(x_ND, tmp_path):
    known = {"architecture": "batch_topk", "center": True, "steps": 30, "checkpoint_every": 10}
    whole, _ = run(x_ND, output=tmp_path / "whole", **known)
    with pytest.raises(KeyboardInterrupt):
        run(x_ND, output=tmp_path / "cut", on_step=_stop_after(25), **known)
    assert "mean" in load_file(checkpoints(tmp_path / "cut")[-1] / "train_state.safetensors")
    with pytest.raises(ValueError, match="center"):
        run(x_ND, output=tmp_path / "cut", resume=True, **known | {"center": False})
    resumed, _ = run(x_ND, output=tmp_path / "cut", resume=True, **known)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


def _stop_after(step):
    def on_step(n):
        if n == step:
            raise KeyboardInterrupt

    return on_step


def test_inspect_says_that_a_mean_is_in_b_dec(x_ND, tmp_path):
    run(x_ND, output=tmp_path / "run", steps=5, center=True)
    rows = dict(summary_rows(inspect(tmp_path / "run")))
    assert rows["centred"] == "trained less the mean of its data, of norm 1000, which b_dec holds"
    sae = SparseAutoencoder.from_pretrained(tmp_path / "run")
    assert float(sae.b_dec.detach().norm()) == pytest.approx(1000, rel=0.05)
    run(x_ND, output=tmp_path / "plain", steps=5)
    assert "centred" not in dict(summary_rows(inspect(tmp_path / "plain")))


def test_nothing_but_the_mean_is_refused():
    with pytest.raises(ValueError, match=r"every row of tensor .* read so far is their mean"):
        run(torch.ones(300, D_IN), steps=5, center=True)
