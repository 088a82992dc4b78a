"""SAEs that Llamascopium itself saves, against its normalize, encode, decode and denormalize."""

import math

import pytest
import torch

from foreign_files import D, Made, S, assert_same, rows
from foreign_language import HOOK, NORM
from saevlm_fast.formats.registry import read

models = pytest.importorskip("llamascopium.models.sae")
pytestmark = pytest.mark.interop


def saved(folder, activation, norm, norms, *, suffix=".safetensors", measured=True, **more):
    """(module, forward) of an SAE that the library saved into a folder."""
    config = models.SAEConfig(
        hook_point_in=HOOK,
        hook_point_out=HOOK,
        d_model=D,
        expansion_factor=S / D,
        act_fn=activation,
        norm_activation=norm,
        sparsity_include_decoder_norm=norms,
        top_k=5,
        device="cpu",
        dtype=torch.float32,
        **more,
    )
    theirs = models.SparseAutoEncoder(config)
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.5)
    if measured:
        theirs.set_dataset_average_activation_norm({HOOK: NORM})
    folder.mkdir(parents=True, exist_ok=True)
    theirs.save_checkpoint(folder / f"sae_weights{suffix}")
    theirs.cfg.save_hyperparameters(folder)
    theirs = theirs.double()
    if activation == "jumprelu":
        theirs.activation_function.dtype = torch.float64

    def forward(x_BD):
        batch, scale = theirs.normalize_activations({HOOK: x_BD}, return_scale_factor=True)
        z_BS = theirs.encode(batch[HOOK])
        x_hat_BD = theirs.denormalize_activations({HOOK: theirs.decode(z_BS)}, scale)[HOOK]
        z_BS = z_BS / scale[HOOK] if norm == "dataset-wise" else z_BS
        return z_BS.detach(), x_hat_BD.detach()

    scaled = norms and activation == "topk"
    factor = 1 / theirs.W_D.detach().norm(dim=1) if scaled else 1.0
    return theirs, Made("llamascopium", {}, forward, factor=factor)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("norms", [True, False])
@pytest.mark.parametrize("norm", ["dataset-wise", "token-wise", "inference"])
@pytest.mark.parametrize("activation", ["relu", "topk", "jumprelu"])
def test_equal_to_its_own_forward(tmp_path, activation, norm, norms, suffix):
    _, made = saved(tmp_path, activation, norm, norms, suffix=suffix)
    assert_same(made.read(tmp_path), made, torch.float32)


def test_without_decoder_bias(tmp_path):
    _, made = saved(tmp_path, "relu", "dataset-wise", True, use_decoder_bias=False)
    assert_same(made.read(tmp_path), made, torch.float32)


def test_norms_that_were_never_measured_are_refused(tmp_path, monkeypatch):
    """The library writes whatever was in memory."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, **how: empty(*shape, **how).fill_(1e-35))
    saved(tmp_path, "jumprelu", "dataset-wise", True, measured=False)
    with pytest.raises(
        ValueError, match=r"Llamascopium: the norm of inputs in the data is 1e-35: it was never measured"
    ):
        read(tmp_path)


def test_its_own_fold_forgets_thresholds(tmp_path):
    """So the file before the fold is the one to be read; one that was folded is marked."""
    theirs, made = saved(tmp_path / "before", "jumprelu", "dataset-wise", True)
    x_BD = rows()
    x_hat_BD = made.forward(x_BD)[1]
    assert_same(made.read(tmp_path / "before"), made, torch.float32)
    theirs.standardize_parameters_of_dataset_norm()
    folded_BD = theirs.decode(theirs.encode(x_BD)).detach()
    difference = float((folded_BD - x_hat_BD).norm() / x_hat_BD.norm())
    assert difference > 0.01
    assert math.isclose(NORM, theirs.dataset_average_activation_norm[HOOK])
    theirs.save_checkpoint(tmp_path / "before" / "sae_weights.safetensors")
    theirs.cfg.save_hyperparameters(tmp_path / "before")
    assert "left thresholds as they were" in read(tmp_path / "before").doubts[0]


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"use_glu_encoder": True}, "GLU encoder"),
        ({"hook_point_out": "blocks.15.hook_mlp_out"}, "a transcoder from"),
        ({"norm_activation": "batch-wise"}, "norm_activation 'batch-wise'"),
        ({"act_fn": "batchtopk"}, "no threshold is stored"),
    ],
)
def test_what_cannot_be_exact_is_refused(tmp_path, more, why):
    settings = {"hook_point_in": HOOK, "hook_point_out": HOOK, "d_model": D, "expansion_factor": S / D, **more}
    theirs = models.SparseAutoEncoder(models.SAEConfig(device="cpu", dtype=torch.float32, **settings))
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.fill_(0.5)
    theirs.set_dataset_average_activation_norm({name: NORM for name in theirs.cfg.associated_hook_points})
    theirs.save_pretrained(tmp_path)
    theirs.cfg.save_hyperparameters(tmp_path)
    with pytest.raises(ValueError, match=why):
        read(tmp_path)
