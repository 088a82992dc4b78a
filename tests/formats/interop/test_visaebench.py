"""VISAEBench's own loader and wrapper, on files of its layouts, against ours; inputs standardised outside of it."""

import pytest
import torch

from foreign_files import D, Made, S, assert_same, random_weights
from foreign_vision import overcomplete_state

hub = pytest.importorskip("visaebench.hub")
pytestmark = pytest.mark.interop
MEAN_D, STD = torch.linspace(-1, 1, D).double(), 1.7


def files(names, activation, settings, weights="sae.pt"):
    w = random_weights(31)
    if names == "simple":
        state = {"encoder.weight": w.W_enc.T.contiguous(), "encoder.bias": w.b_enc, "decoder.weight": w.W_dec}
    elif names == "with bias":
        state = {"encoder.weight": w.W_enc.T.contiguous(), "encoder.bias": w.b_enc, "decoder.weight": w.W_dec}
        state["decoder.bias"] = w.b_dec
    else:
        state = overcomplete_state(w)
    if activation == "jumprelu":
        state["jump_thresholds"] = w.theta
    config = {"architecture": activation, "backbone": "clip_vitb16", "d_model": D, "dict_size": S, "k": 5}
    config |= {"threshold": 0.5} if activation == "batchtopk" else {}
    return {settings: config, weights: state}


@pytest.mark.parametrize("weights", ["sae.pt", "model.safetensors"])
@pytest.mark.parametrize("settings", ["config.json", "config.yaml"])
@pytest.mark.parametrize("activation", ["topk", "batchtopk", "jumprelu"])
@pytest.mark.parametrize("names", ["simple", "with bias", "overcomplete"])
def test_equal_to_its_wrapper(tmp_path, names, activation, settings, weights):
    def forward(x_BD):
        theirs = hub.load_sae(str(tmp_path), device="cpu").double()
        z_BS, x_hat_BD = theirs((x_BD - MEAN_D) / STD)
        return z_BS, x_hat_BD * STD + MEAN_D

    made = Made(
        "visaebench",
        files(names, activation, settings, weights),
        forward,
        {"input_mean": MEAN_D, "input_std": STD},
    )
    assert_same(made.read(tmp_path), made, torch.float32)


@pytest.mark.parametrize("where", ["tensor", "nowhere"])
def test_thresholds_that_settings_do_not_hold(tmp_path, where):
    made = Made("visaebench", files("overcomplete", "batchtopk", "config.json"), lambda x_BD: None)
    made.assume = {"input_mean": 0, "input_std": 1}
    del made.files["config.json"]["threshold"]
    if where == "tensor":
        made.files["sae.pt"]["_running_threshold"] = torch.tensor(0.5)
    made.forward = lambda x_BD: hub.load_sae(str(tmp_path), device="cpu").double()(x_BD)
    plain = made.read(tmp_path)
    assert_same(plain, made, torch.float32)
    assert len(plain.doubts) == (where == "nowhere")
