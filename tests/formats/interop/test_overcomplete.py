"""State dicts that overcomplete itself makes, against its own forward in evaluation mode."""

import sys
import types

import pytest
import torch

from foreign_files import D, Made, S, assert_same, rows

# Its pictures, which nothing here needs, cannot be imported beside matplotlib 3.11.
pictures = types.ModuleType("overcomplete.visualization")
pictures.__getattr__ = lambda name: None  # type: ignore[method-assign]
sys.modules.setdefault("overcomplete.visualization", pictures)
sae = pytest.importorskip("overcomplete.sae")
pytestmark = pytest.mark.interop
ENCODERS = ["linear", "mlp_bn_1"]


def trained(module, generator_seed=0):
    """Weights off their initial values, with running statistics; then evaluated, as a user saves it."""
    torch.manual_seed(generator_seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    module.train()
    for seed in range(4):
        module(rows(seed).float())
    return module.eval()


def forward_of(module):
    def forward(x_BD):
        _, z_BS, x_hat_BD = module.double()(x_BD)
        return z_BS.detach(), x_hat_BD.detach()

    return forward


def made(module, assume=None, inside=False):
    state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    value = {"model_state_dict": state, "epoch": 3} if inside else state
    return Made("overcomplete", {"sae.pth": value}, forward_of(module), assume or {})


def check(tmp_path, one):
    plain = one.read(tmp_path)
    # The library fuses its dictionary in float32; its forward then runs in float64.
    assert_same(plain, one, torch.float32)
    return plain


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("inside", [True, False])
def test_sae_topk_and_jump(tmp_path, encoder, inside):
    for name, module, assume in (
        ("relu", sae.SAE(D, S, encoder_module=encoder), {"activation": "relu"}),
        ("topk", sae.TopKSAE(D, S, top_k=4, encoder_module=encoder), {"k": 4}),
        ("jump", sae.JumpSAE(D, S, encoder_module=encoder), {}),
    ):
        check(tmp_path / name, made(fused(trained(module)), assume, inside))


def fused(module):
    """In float64 from here on, the dictionary too."""
    module.double().train()
    return module.eval()


def test_batch_topk_with_its_running_threshold(tmp_path):
    module = fused(trained(sae.BatchTopKSAE(D, S, top_k=200)))
    one = made(module, {"threshold": float(module.running_threshold)})
    assert check(tmp_path, one).activation == "batch_topk"


@pytest.mark.parametrize("multiplier", [True, False])
def test_multiplier_and_other_norms(tmp_path, multiplier):
    module = sae.TopKSAE(D, S, top_k=4, dictionary_params={"use_multiplier": multiplier})
    check(tmp_path / "l2", made(fused(trained(module)), {"k": 4}))


@pytest.mark.parametrize("kind", ["RATopKSAE", "RAJumpSAE"])
def test_archetypal(tmp_path, kind):
    points = rows(3, 8).float()
    module = getattr(sae, kind)(D, S, points=points, **({"top_k": 4} if kind == "RATopKSAE" else {}))
    # The archetypal dictionary's train() returns nothing, so neither does eval().
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    module.double().train()
    module.eval()
    check(tmp_path, made(module, {"k": 4} if kind == "RATopKSAE" else {}))


@pytest.mark.parametrize("bias", [True, False])
def test_untied_and_tied_encoders(tmp_path, bias):
    module = sae.TopKSAE(D, S, top_k=4).untied(bias=bias)
    check(tmp_path / "untied", made(fused(trained(module)), {"k": 4}))
    if bias:
        torch.manual_seed(0)
        module = sae.TopKSAE(D, S, top_k=4).tied(bias=True)
        check(tmp_path / "tied", made(fused(trained(module)), {"k": 4}))


def test_weights_saved_before_evaluation_are_normalised(tmp_path):
    """The last optimiser step leaves rows of any norm in the file; in use they are unit."""
    module = sae.TopKSAE(D, S, top_k=4).double()
    with torch.no_grad():
        module.dictionary._weights.mul_(torch.linspace(0.5, 2, S).double()[:, None])
    state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    one = Made("overcomplete", {"sae.pt": state}, forward_of(module.train().eval()), {"k": 4})
    plain = one.read(tmp_path)
    assert_same(plain, one, torch.float32)
    assert "rows of dictionary._weights have norms of 0." in plain.doubts[0]


def test_a_stale_decoder_of_the_library_is_not_ours(tmp_path):
    """load_state_dict on a module in evaluation keeps the decoder of before; the file's is read here."""
    one, stale = (fused(trained(sae.TopKSAE(D, S, top_k=4), seed)) for seed in (1, 2))
    stale.load_state_dict(one.state_dict())
    assert not torch.allclose(stale(rows())[2], one(rows())[2])
    theirs = made(stale, {"k": 4})
    theirs.forward = forward_of(one)
    assert_same(theirs.read(tmp_path), theirs, torch.float32)


@pytest.mark.parametrize("encoder", ["mlp_ln_1", "mlp_bn_3", "mlp_ln_3"])
def test_other_encoders_are_refused(tmp_path, encoder):
    module = sae.TopKSAE(D, S, top_k=4, encoder_module=encoder)
    with pytest.raises(ValueError, match=r"overcomplete: .*(layer norm|several layers)"):
        made(module, {"k": 4}).read(tmp_path)


def test_matching_pursuit_and_quantised_are_refused(tmp_path):
    for name, module, why in (
        ("mp", sae.MpSAE(D, S, k=3), "matching pursuit"),
        ("omp", sae.OMPSAE(D, S, k=3), "matching pursuit"),
        ("q", sae.QSAE(D, S), "quantised"),
    ):
        with pytest.raises(ValueError, match=why):
            made(module, {"k": 4}).read(tmp_path / name)


def test_a_whole_module_is_refused(tmp_path):
    one = Made("overcomplete", {"sae.pt": sae.TopKSAE(D, S, top_k=4)}, forward_of(None))
    with pytest.raises(ValueError, match=r"a pickle that needs overcomplete\.sae.*plain state dict"):
        one.read(tmp_path)
