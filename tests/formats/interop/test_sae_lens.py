"""SAEs that the real SAELens makes and saves against its own forward, and ours in its hands."""

import warnings
from dataclasses import replace

import pytest
import torch

from foreign_files import D, S, assert_same, rows
from foreign_trainers import K, Made
from saevlm_fast.formats import sae_lens as ours
from saevlm_fast.formats.registry import read

sae_lens = pytest.importorskip("sae_lens", reason="install the extra [interop]")
pytestmark = [pytest.mark.interop, pytest.mark.filterwarnings("ignore")]
BASE = {"d_in": D, "d_sae": S, "device": "cpu"}
INFERENCE = {
    "standard": (sae_lens.StandardSAE, sae_lens.StandardSAEConfig, {}),
    "topk": (sae_lens.TopKSAE, sae_lens.TopKSAEConfig, {"k": K}),
    "topk by norm": (sae_lens.TopKSAE, sae_lens.TopKSAEConfig, {"k": K, "rescale_acts_by_decoder_norm": True}),
    "jumprelu": (sae_lens.JumpReLUSAE, sae_lens.JumpReLUSAEConfig, {}),
    "gated": (sae_lens.GatedSAE, sae_lens.GatedSAEConfig, {}),
}


def filled(sae):
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            value = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.4
            parameter.copy_(value.abs() if "threshold" in name else value)
    return sae


def with_forward(sae):
    """Its own encode and forward, of float64 rows in its dtype."""
    dtype = sae.W_enc.dtype

    def forward(x_BD):
        with torch.no_grad():
            return sae.encode(x_BD.to(dtype)).double(), sae(x_BD.to(dtype)).double()

    return Made("saelens", {}, forward)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("norm", ["none", "layer_norm", "constant_norm_rescale"])
@pytest.mark.parametrize("apply", [True, False])
@pytest.mark.parametrize("name", INFERENCE)
def test_what_it_saves(tmp_path, name, apply, norm, dtype):
    cls, config, more = INFERENCE[name]
    cfg = config(**BASE, **more, dtype=dtype, apply_b_dec_to_input=apply, normalize_activations=norm)
    sae = filled(cls(cfg))
    sae.save_model(tmp_path)
    assert_same(read(tmp_path), with_forward(sae), getattr(torch, dtype))


@pytest.mark.parametrize("nested", [False, True])
def test_batchtopk_in_training_and_finished(tmp_path, nested):
    """Its checkpoint has a running threshold; what it exports is a jumprelu SAE."""
    more = {"matryoshka_widths": [8]} if nested else {}
    prefix = "MatryoshkaBatchTopK" if nested else "BatchTopK"
    config = getattr(sae_lens, f"{prefix}TrainingSAEConfig")(**BASE, **more, dtype="float32", k=K)
    sae = filled(getattr(sae_lens, f"{prefix}TrainingSAE")(config))
    sae.topk_threshold.fill_(0.3)
    sae.save_model(tmp_path / "training")
    sae.save_inference_model(tmp_path / "finished")
    finished = sae_lens.SAE.load_from_disk(str(tmp_path / "finished"))
    for folder in ("training", "finished"):
        plain = read(tmp_path / folder)
        assert (plain.activation, plain.k) == ("batch_topk", K)
        assert plain.group_sizes == ((8, S - 8) if nested else ())
        assert_same(plain, with_forward(finished), torch.float32)


@pytest.mark.parametrize("name", INFERENCE)
@pytest.mark.parametrize("norm", ["none", "layer_norm", "constant_norm_rescale"])
def test_ours_in_its_hands(tmp_path, name, norm):
    """Read here, written here, opened there: the same forward."""
    cls, config, more = INFERENCE[name]
    sae = filled(cls(config(**BASE, **more, dtype="float32", apply_b_dec_to_input=False, normalize_activations=norm)))
    sae.save_model(tmp_path / "theirs")
    (tmp_path / "ours").mkdir()
    ours.write(read(tmp_path / "theirs"), tmp_path / "ours")
    again = sae_lens.SAE.load_from_disk(str(tmp_path / "ours"))
    before, after = with_forward(sae).forward(rows()), with_forward(again).forward(rows())
    torch.testing.assert_close(after, before, atol=1e-5, rtol=1e-5)


def test_a_scale_of_inputs_that_it_folds_itself(tmp_path):
    from sae_lens.training.activation_scaler import ActivationScaler

    config = sae_lens.JumpReLUTrainingSAEConfig(
        **BASE, dtype="float64", normalize_activations="expected_average_only_in"
    )
    sae = filled(sae_lens.JumpReLUTrainingSAE(config))
    sae.save_model(tmp_path)
    ActivationScaler(0.3).save(str(tmp_path / "activation_scaler.json"))
    plain = read(tmp_path)
    sae.fold_activation_norm_scaling_factor(0.3)
    assert_same(plain, with_forward(sae), torch.float64)


def test_whitening_that_it_folds_itself(tmp_path):
    from sae_lens.training.activation_scaler import ActivationScaler, ActivationWhitening

    config = sae_lens.StandardSAEConfig(**BASE, dtype="float64", normalize_activations="covariance_whitening")
    sae = filled(sae_lens.StandardSAE(config))
    sae.save_model(tmp_path)
    matrix, mean = torch.randn(D, D, dtype=torch.float64), torch.randn(D, dtype=torch.float64)
    whitening = ActivationWhitening(mean, matrix, matrix.inverse())
    ActivationScaler(whitening=whitening).save(str(tmp_path / "activation_scaler.json"))
    plain = read(tmp_path)
    sae.fold_activation_whitening(mean, matrix, matrix.inverse())
    assert_same(plain, with_forward(sae), torch.float64)


def test_a_legacy_directory_reads_as_it_reads_it(tmp_path):
    from foreign_trainers import SAE_LENS

    for name in ("legacy", "legacy topk"):
        made = SAE_LENS[name](torch.float32)
        made.files["cfg.json"] |= {"model_name": "gpt2", "hook_head_index": None, "prepend_bos": True, "device": "cpu"}
        made.files["cfg.json"] |= {"dataset_path": "d", "context_size": 8}
        path = made.write(tmp_path / name)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs = sae_lens.SAE.load_from_disk(str(path))
        assert_same(read(path), replace(made, forward=with_forward(theirs).forward), torch.float32)
