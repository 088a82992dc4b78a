"""The SAE module: shapes, selection rules, gradients, and the files it writes and reads."""

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.utils import parametrize, prune

import saevlm_fast as sf
from damage import DIGESTS, edit_record
from saevlm_fast.config import SAEConfig
from saevlm_fast.errors import Doubt
from saevlm_fast.files import sha256_file
from saevlm_fast.formats.sae_header import read_sae_header
from saevlm_fast.kernels import reference
from saevlm_fast.sae import CONFIG_FILE, WEIGHTS_FILE, SparseAutoencoder, inferred
from saevlm_fast.scoring.controls import untrained_like
from saevlm_fast.training.step import Stepper

ARCHITECTURES = {"topk": (), "batch_topk": (), "matryoshka": (7, 30, 60)}


def make(architecture="batch_topk", d_in=13, d_sae=97, k=5, dtype=torch.float32, threshold=0.4):
    config = SAEConfig(d_in, d_sae, k, architecture, ARCHITECTURES[architecture], {"layer": 22, "norm_factor": 1.5})
    sae = SparseAutoencoder(config, dtype=dtype)
    generator = torch.Generator().manual_seed(5)
    sae.b_enc.data.copy_(0.1 * torch.randn(d_sae, generator=generator))
    sae.b_dec.data.copy_(0.1 * torch.randn(d_in, generator=generator))
    if architecture != "topk":
        sae.threshold.fill_(threshold)
    return sae


@pytest.fixture(params=ARCHITECTURES)
def architecture(request):
    return request.param


@pytest.mark.parametrize("lead", [(), (6,), (2, 3), (0,), (3, 0, 2), (1, 1, 1)])
@pytest.mark.parametrize("training", [True, False])
def test_any_leading_dimensions(architecture, lead, training):
    sae = make(architecture).train(training)
    x = torch.randn(*lead, 13)
    codes = sae.encode(x)
    assert codes.dense().shape == (*lead, 97)
    assert codes.l0().shape == lead
    assert torch.equal(codes.l0(), (codes.dense() > 0).sum(-1))
    x_hat = sae.decode(codes)
    assert x_hat.shape == x.shape
    torch.testing.assert_close(x_hat, codes.dense() @ sae.W_dec + sae.b_dec, atol=1e-5, rtol=1e-5)
    prefixes = sae.decode_prefixes(codes)
    assert prefixes.shape == (len(sae.config.group_sizes), *lead, 13)
    torch.testing.assert_close(prefixes[-1], x_hat, atol=1e-5, rtol=1e-5)


def test_codes_are_the_reference_selection(architecture):
    """In float64, as all tests here whose two ways must agree on which latents fire."""
    sae = make(architecture, dtype=torch.float64)
    x = torch.randn(11, 13, dtype=torch.float64)
    pre = reference.preactivations(x, sae.W_enc, sae.b_enc, sae.b_dec)
    select = reference.topk_select if architecture == "topk" else reference.batch_topk_select
    expected = select(pre, 5)
    expected = reference.densify(*expected, *([None] if len(expected) == 2 else []), 97)
    torch.testing.assert_close(sae.encode(x, use_threshold=False).dense(), expected, atol=1e-6, rtol=1e-6)
    if architecture != "topk":
        above = torch.where(pre > 0.4, pre, 0)
        torch.testing.assert_close(sae.eval().encode(x).dense(), above, atol=1e-6, rtol=1e-6)


def test_rows_are_independent_at_inference(architecture):
    """Above a threshold, or the row's own top k: what else is in the batch must not matter."""
    sae = make(architecture, dtype=torch.float64).eval()
    x = torch.randn(9, 13, dtype=torch.float64)
    whole, single = sae.encode(x).dense(), torch.cat([sae.encode(row[None]).dense() for row in x])
    torch.testing.assert_close(whole, single, atol=1e-6, rtol=1e-6)


def test_gradients_match_dense_autograd(architecture):
    sae = make(architecture, dtype=torch.float64).train()
    x = torch.randn(17, 13, dtype=torch.float64, requires_grad=True)
    (sae(x) - x).pow(2).sum().backward()
    got = [x.grad.clone()] + [p.grad.clone() for p in sae.parameters()]
    x.grad = None
    sae.zero_grad()
    mask = (sae.encode(x).dense() > 0).double().detach()
    acts = reference.preactivations(x, sae.W_enc, sae.b_enc, sae.b_dec) * mask
    (acts @ sae.W_dec + sae.b_dec - x).pow(2).sum().backward()
    for ours, dense in zip(got, [x.grad, *[p.grad for p in sae.parameters()]]):
        torch.testing.assert_close(ours, dense, atol=1e-10, rtol=1e-10)


def test_same_seed_same_weights_and_tied_unit_start():
    a, b = make(), make()
    assert torch.equal(a.W_dec, b.W_dec)
    assert torch.equal(a.W_enc, a.W_dec.T)
    torch.testing.assert_close(a.W_dec.norm(dim=1), torch.ones(97))
    assert a.W_enc.stride() == (1, 13), "latent-major"
    a.reset_parameters(1)
    assert not torch.equal(a.W_dec, b.W_dec)


def test_uncalibrated_threshold_is_an_error():
    sae = make(threshold=-1.0).eval()
    with pytest.raises(ValueError, match="threshold: not calibrated"):
        sae.encode(torch.randn(2, 13))


def test_save_refuses_an_uncalibrated_threshold(tmp_path):
    with pytest.raises(ValueError, match="threshold: not calibrated"):
        make(threshold=-1.0).save_pretrained(tmp_path / "sae")
    assert not (tmp_path / CONFIG_FILE).exists()
    assert not (tmp_path / "sae").exists()


@pytest.mark.parametrize("shape", [(3, 12), (14,), ()])
def test_wrong_width(shape):
    with pytest.raises(ValueError, match="d_in = 13"):
        make().encode(torch.zeros(shape))


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "sparse_coo": Tensor.to_sparse,
    "sparse_csr": Tensor.to_sparse_csr,
    "nested": lambda x: torch.nested.nested_tensor([x, x[:1]]),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_not_dense_is_named(layout):
    x = LAYOUTS[layout](torch.ones(3, 13))
    for function in (make().encode, make(), make().pre_activations, make().input_statistics):
        with pytest.raises(ValueError, match=f"x: a tensor of layout {layout}, must be dense"):
            function(x)


def test_vmap_is_refused_where_parts_differ_in_their_entries(architecture):
    sae, x = make(architecture), torch.randn(4, 3, 13)
    for mode in (True, False):
        if architecture == "topk":
            torch.testing.assert_close(torch.vmap(sae.train(mode))(x), sae(x))
        else:
            with pytest.raises(NotImplementedError, match=r"torch\.vmap: parts may differ in how many entries"):
                torch.vmap(sae.train(mode))(x)


def test_another_device_is_named():
    for function in (make().encode, make().pre_activations):
        with pytest.raises(ValueError, match="x: on meta, the SAE is on cpu"):
            function(torch.ones(3, 13, device="meta"))


def test_codes_of_inference_in_any_mode():
    sae, x = make(dtype=torch.float64).train(), torch.randn(11, 13, dtype=torch.float64)
    codes = inferred(sae, x)
    assert sae.training
    assert not codes.top_acts.requires_grad
    torch.testing.assert_close(codes.dense(), sae.eval().encode(x).dense())


USES: dict[str, Callable[[SparseAutoencoder, Tensor], Any]] = {
    "score": lambda sae, x: sf.score(x, x, sae).ms,
    "evaluate": lambda sae, x: sf.evaluate(sae, x),
    "measure": lambda sae, x: sf.measure({"a": sae}, x, controls=("untrained",)).table(),
    "untrained": lambda sae, x: untrained_like(sae, x)[1],
}


@pytest.mark.parametrize("name", USES)
def test_what_uses_an_sae_leaves_its_mode_alone(name, monkeypatch):
    """Another thread may train it."""
    sae, x = make("batch_topk", threshold=0.7), torch.randn(40, 13, generator=torch.Generator().manual_seed(0))
    expected, modes, train = USES[name](sae.eval(), x), [], SparseAutoencoder.train
    sae.train()
    monkeypatch.setattr(SparseAutoencoder, "train", lambda self, mode=True: (modes.append(self), train(self, mode))[1])
    found = USES[name](sae, x)
    assert sae.training
    assert not any(each is sae for each in modes)
    if isinstance(expected, Tensor):
        torch.testing.assert_close(found, expected, equal_nan=True)
    else:
        assert repr(found) == repr(expected)


@pytest.mark.parametrize("narrow", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_narrow_weights_keep_their_threshold(narrow, architecture):
    sae = make(architecture)
    sae.threshold.fill_(1 / 3)
    held = sae.to(narrow)
    assert held is sae
    assert sae.W_enc.dtype == narrow
    assert sae.threshold.dtype == torch.float32
    assert "threshold" in dict(sae.named_buffers())
    torch.testing.assert_close(sae.threshold, torch.full_like(sae.threshold, 1 / 3), rtol=0, atol=0)
    sae.half().eval().encode(torch.randn(3, 13).half()).check("codes")
    sae.double()
    assert sae.threshold.dtype == torch.float64


class Doubled(torch.nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


class PlainEncoder(SparseAutoencoder):
    def encode(self, x: Tensor) -> sf.SparseCodes:
        return super().encode(x)


@pytest.mark.parametrize("name", USES)
def test_a_subclass_whose_encoder_takes_no_threshold_is_used(name):
    sae = PlainEncoder(SAEConfig(13, 97, 5, "topk"))
    USES[name](sae, torch.randn(40, 13, generator=torch.Generator().manual_seed(0)))


def test_a_threshold_that_is_made_of_another():
    sae = make()
    parametrize.register_parametrization(sae, "threshold", Doubled())
    with pytest.raises(ValueError, match="sae: threshold is parametrised"):
        sae.scale_biases_(2.0)
    assert sae.half().W_enc.dtype == torch.float16


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("made", ["parametrised", "pruned", "weight-normed"])
def test_weights_that_are_made_of_others(made, tmp_path):
    """As they are now: prune and the older weight_norm make them where the module is called, and nowhere else."""
    sae = make("topk")
    if made == "parametrised":
        parametrize.register_parametrization(sae, "b_enc", Doubled())
    elif made == "pruned":
        prune.random_unstructured(sae, "b_enc", 0.5)
        sae.b_enc_orig.data.add_(1.0)
    else:
        torch.nn.utils.weight_norm(sae, "W_dec")
        sae.W_dec_g.data.mul_(2.0)
    sae.save_pretrained(tmp_path)
    x_SD = torch.eye(13)
    decoded, pre_SS = sae.decode(sae.encode(x_SD)), sae.pre_activations(x_SD)
    expected = sae(x_SD)
    torch.testing.assert_close(decoded, expected)
    torch.testing.assert_close(pre_SS, (x_SD - sae.b_dec) @ sae.W_enc + sae.b_enc)
    opened, x = SparseAutoencoder.from_pretrained(tmp_path), torch.randn(5, 13)
    torch.testing.assert_close(opened(x_SD), expected)
    torch.testing.assert_close(opened(x), sae(x))
    for write in (sae.reset_parameters, lambda: sae.scale_biases_(2.0), lambda: Stepper(sae, sf.TrainConfig())):
        with pytest.raises(ValueError, match=r"sae: [Wb]_(enc|dec) is parametrised or pruned"):
            write()


def test_scale_biases_moves_to_raw_units(architecture):
    sae = make(architecture, dtype=torch.float64).eval()
    x = torch.randn(8, 13, dtype=torch.float64)
    before = sae.encode(x).dense(), sae(x)
    sae.scale_biases_(7.0)
    after = sae.encode(7 * x).dense(), sae(7 * x)
    torch.testing.assert_close(after[0], 7 * before[0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(after[1], 7 * before[1], atol=1e-4, rtol=1e-4)


def test_round_trip(architecture, tmp_path):
    sae = make(architecture).eval()
    sae.save_pretrained(tmp_path)
    loaded = SparseAutoencoder.from_pretrained(tmp_path)
    assert loaded.config == sae.config
    assert loaded.W_enc.stride() == (1, 13)
    assert not loaded.training
    x = torch.randn(4, 13)
    assert torch.equal(loaded(x), sae(x))
    assert sorted(p.name for p in tmp_path.iterdir()) == [CONFIG_FILE, WEIGHTS_FILE]


def test_layout_is_sae_lens_v6(architecture, tmp_path):
    make(architecture).save_pretrained(tmp_path)
    cfg = json.loads((tmp_path / CONFIG_FILE).read_text())
    tensors = load_file(tmp_path / WEIGHTS_FILE)
    assert tensors["W_enc"].shape == (13, 97)
    assert tensors["W_dec"].shape == (97, 13)
    assert cfg["architecture"] == ("topk" if architecture == "topk" else "jumprelu")
    assert cfg["metadata"]["k"] == 5
    assert cfg["metadata"]["layer"] == 22
    if architecture == "topk":
        assert cfg["k"] == 5
        assert "threshold" not in tensors
    else:
        assert tensors["threshold"].tolist() == pytest.approx([0.4] * 97)


def test_their_settings_are_folded_in_exactly(tmp_path):
    """rescale_acts_by_decoder_norm and apply_b_dec_to_input = false are changes of weights."""
    sae = make("topk", dtype=torch.float64)
    sae.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS_FILE)
    tensors["W_dec"] *= torch.linspace(0.5, 2, 97, dtype=torch.float64)[:, None]
    save_file(tensors, tmp_path / WEIGHTS_FILE)
    edit_record(tmp_path / CONFIG_FILE, rescale_acts_by_decoder_norm=True, apply_b_dec_to_input=False)
    x = torch.randn(6, 13, dtype=torch.float64)
    norm = tensors["W_dec"].norm(dim=1)
    acts = torch.relu((x @ tensors["W_enc"] + tensors["b_enc"]) * norm)
    values, indices = acts.topk(5)
    dense = torch.zeros_like(acts).scatter(1, indices, values)
    expected = (dense / norm) @ tensors["W_dec"] + tensors["b_dec"]
    torch.testing.assert_close(SparseAutoencoder.from_pretrained(tmp_path)(x), expected)


def _edit(name):
    def change(directory):
        cfg = json.loads((directory / CONFIG_FILE).read_text())
        cfg = {key: value for key, value in cfg.items() if key not in DIGESTS}
        tensors = load_file(directory / WEIGHTS_FILE)
        if name == "no config":
            return (directory / CONFIG_FILE).unlink()
        if name == "no weights":
            return (directory / WEIGHTS_FILE).unlink()
        if name == "broken json":
            return (directory / CONFIG_FILE).write_text("{")
        if name == "truncated":
            return (directory / WEIGHTS_FILE).write_bytes((directory / WEIGHTS_FILE).read_bytes()[:-9])
        if name == "architecture":
            cfg["architecture"] = "gated"
            cfg["metadata"] = {}
        if name == "normalised":
            cfg["normalize_activations"] = "batch_norm"
        if name == "no k":  # which a threshold would do without
            cfg |= {"architecture": "topk", "metadata": {}}
            del tensors["threshold"]
        if name == "shape":
            cfg["d_in"] = 14
        if name == "missing tensor":
            del tensors["b_enc"]
        if name == "nan":
            tensors["W_dec"][3, 3] = float("nan")
        if name in ("text d_in", "null d_sae", "list metadata", "number groups", "contradiction"):
            cfg |= {"text d_in": {"d_in": "13"}, "null d_sae": {"d_sae": None}, "list metadata": {"metadata": [1]},
                    "number groups": {"metadata": cfg["metadata"] | {"group_sizes": 64}},
                    "contradiction": {"architecture": "topk"}}[name]  # fmt: skip
        if name == "threshold shape":
            tensors["threshold"] = torch.zeros(98)
        if name == "many thresholds":
            tensors["threshold"][4] = 9.0
        save_file(tensors, directory / WEIGHTS_FILE)
        return edit_record(directory / CONFIG_FILE, **cfg)

    return pytest.param(change, id=name)


@pytest.mark.parametrize(
    "damage",
    [_edit(n) for n in ("no config", "no weights", "broken json", "truncated", "architecture", "normalised", "no k",
                        "shape", "missing tensor", "nan", "many thresholds", "text d_in", "null d_sae", "list metadata",
                        "number groups", "contradiction", "threshold shape")],
)  # fmt: skip
def test_damaged_directories_are_one_clear_error(damage, tmp_path):
    make().save_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises(ValueError, match=str(tmp_path)) as caught:
        SparseAutoencoder.from_pretrained(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.interop
def test_the_real_sae_lens_reconstructs_the_same(architecture, tmp_path):
    sae_lens = pytest.importorskip("sae_lens", reason="install the extra [interop]")
    sae = make(architecture).eval()
    sae.save_pretrained(tmp_path)
    theirs = sae_lens.SAE.load_from_disk(str(tmp_path))
    x = torch.randn(50, 13)
    with torch.no_grad():
        torch.testing.assert_close(theirs.encode(x), sae.encode(x).dense(), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(theirs(x), sae(x), atol=1e-5, rtol=1e-5)


# Digests, and what SAELens trains -----------------------------------------------------------------------------------


def test_weights_that_were_altered_are_refused_and_files_without_digests_load(architecture, tmp_path):
    sae = make(architecture)
    sae.save_pretrained(tmp_path)
    cfg, weights = tmp_path / CONFIG_FILE, tmp_path / WEIGHTS_FILE
    recorded = json.loads(cfg.read_text())
    assert recorded["weights_sha256"] == sha256_file(weights)
    assert list(recorded)[-1] == "sha256"
    good = weights.read_bytes()
    altered = bytearray(good)
    altered[-2] ^= 1
    weights.write_bytes(altered)
    with pytest.raises(ValueError, match=r"altered, its SHA-256 is not the weights_sha256 in cfg\.json"):
        SparseAutoencoder.from_pretrained(tmp_path)
    weights.write_bytes(good)
    for name in DIGESTS:
        cfg.write_text(json.dumps({key: value for key, value in recorded.items() if key != name}, indent=2))
        with pytest.raises(ValueError, match="altered"):
            SparseAutoencoder.from_pretrained(tmp_path)
    edit_record(cfg)
    assert torch.equal(SparseAutoencoder.from_pretrained(tmp_path).W_enc, sae.W_enc)


@pytest.mark.parametrize("widths", [[16, 32, 64], [16, 32]])
def test_batch_topk_saes_of_sae_lens_load(tmp_path, widths):
    """It saves them as jumprelu, and says k and the groups among the details of their training."""
    details = {"k": 5.0, "rescale_acts_by_decoder_norm": True}
    weights = {"W_enc": torch.randn(16, 64), "W_dec": torch.randn(64, 16), "b_enc": torch.randn(64) * 0.1}
    weights |= {"b_dec": torch.randn(16) * 0.1, "threshold": torch.full((64,), 0.4)}
    save_file(weights, tmp_path / WEIGHTS_FILE)
    cfg = {"architecture": "jumprelu", "d_in": 16, "d_sae": 64, "dtype": "float32", "apply_b_dec_to_input": True}
    cfg |= {"normalize_activations": "none", "reshape_activations": "none"}
    x = torch.randn(20, 16)
    pre = (x - weights["b_dec"]) @ weights["W_enc"] + weights["b_enc"]
    expected = (pre * (pre > 0.4)) @ weights["W_dec"] + weights["b_dec"]
    for theirs, more, ours, groups in (
        ("batchtopk", {}, "batch_topk", (64,)),
        ("matryoshka_batchtopk", {"matryoshka_widths": widths}, "matryoshka", (16, 16, 32)),
    ):
        metadata = {"training_architecture": theirs, "training_architecture_details": details | more}
        (tmp_path / CONFIG_FILE).write_text(json.dumps(cfg | {"metadata": metadata}))
        sae = SparseAutoencoder.from_pretrained(tmp_path)
        assert (sae.config.architecture, sae.config.k, sae.config.group_sizes) == (ours, 5, groups)
        torch.testing.assert_close(sae(x), expected, atol=1e-4, rtol=1e-5)
        assert read_sae_header(tmp_path).config == sae.config
    metadata["training_architecture_details"]["k"] = 5.5
    (tmp_path / CONFIG_FILE).write_text(json.dumps(cfg | {"metadata": metadata}))
    with pytest.warns(Doubt, match=r"k is 5\.5, not a whole number; it is left out") as warned:
        assert SparseAutoencoder.from_pretrained(tmp_path).config.k is None
    assert warned[0].filename == __file__


def test_weights_that_do_not_fit_in_memory_are_one_error():
    with pytest.raises(ValueError, match=r"d_sae: an SAE of 2147483647 x 2147483647 has twice .* GB of weights"):
        SparseAutoencoder(SAEConfig(2**31 - 1, 2**31 - 1))
