"""Every architecture and every normalisation of the input through the module and all that uses its codes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import plain_forward
from saevlm_fast.config import SAEConfig
from saevlm_fast.data.codes import CodesWriter, open_codes
from saevlm_fast.data.rows import Activations
from saevlm_fast.formats.plain import PlainSAE
from saevlm_fast.sae import SparseAutoencoder
from saevlm_fast.scoring.monosemanticity import score
from saevlm_fast.scoring.top_images import top_images
from saevlm_fast.sparse_codes import SparseCodes
from saevlm_fast.steering.edits import Edit, EditPlan, Encoded, add, clamp, edit_tokens, encode_tokens, scale, zero
from saevlm_fast.training.evaluate import evaluate

D, S, N = 12, 61, 40
NORMS = ("none", "layer_norm", "token_norm")


def plain(activation="relu", input_norm="none", dtype=torch.float64, seed=0, **changed):
    """Of any rows' norms and an eps that shows; a third of the thresholds is below 0."""
    draw = lambda *size: torch.randn(*size, generator=generator, dtype=torch.float64).to(dtype)  # noqa: E731
    generator = torch.Generator().manual_seed(seed)
    nested = activation == "matryoshka"
    activation = "batch_topk" if nested else activation
    threshold = {"jumprelu": 0.5 * draw(S), "batch_topk": draw(1).abs()[0]}.get(activation)
    made = {
        "W_enc": draw(D, S),
        "b_enc": 0.2 * draw(S),
        "W_dec": draw(S, D),
        "b_dec": 0.2 * draw(D),
        "activation": activation,
        "k": {"relu": None, "jumprelu": None}.get(activation, 4),
        "threshold": threshold,
        "input_norm": input_norm,
        "eps": 0.03 if input_norm == "layer_norm" else 1e-5,
        "group_sizes": (20, S - 20) if nested else (),
        "metadata": {"layer": 3},
    }
    return PlainSAE(**made | changed)


def rows(n=N, seed=1):
    x_ND = torch.randn(n, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return 3 * x_ND + 0.7


@pytest.fixture(params=["relu", "jumprelu", "batch_topk", "matryoshka", "topk"])
def activation(request):
    return request.param


@pytest.fixture(params=NORMS)
def input_norm(request):
    return request.param


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)], ids=str)
def test_the_module_is_the_plain_form(activation, input_norm, dtype, tolerance):
    """Codes, which latents fire, and reconstruction, against a forward written from the definition alone."""
    form = plain(activation, input_norm, dtype)
    sae, x_ND = SparseAutoencoder.from_plain(form), rows()
    assert not sae.training
    assert sae.config.architecture == activation
    z_NS = plain_forward.encode(form, x_ND)
    codes = sae.encode(x_ND.to(dtype).view(4, -1, D))
    torch.testing.assert_close(codes.dense().double().view(N, S), z_NS, rtol=tolerance, atol=tolerance)
    x_hat_ND = sae(x_ND.to(dtype)).double()
    torch.testing.assert_close(x_hat_ND, plain_forward.forward(form, x_ND), rtol=tolerance, atol=tolerance)
    prefixes = sae.decode_prefixes(sae.encode(x_ND.to(dtype)), sae.input_statistics(x_ND.to(dtype)))
    torch.testing.assert_close(prefixes[-1].double(), x_hat_ND, rtol=tolerance, atol=tolerance)
    assert torch.equal(sae(x_ND.to(dtype)[:0]), x_ND.to(dtype)[:0])


def test_to_plain_and_back(activation, input_norm):
    form = plain(activation, input_norm, doubts=("it was guessed",))
    sae = SparseAutoencoder.from_plain(form)
    assert sae.config.metadata == {"layer": 3, "doubts": ["it was guessed"]}
    back = sae.to_plain()
    assert (back.activation, back.k, back.input_norm, back.eps) == (form.activation, form.k, input_norm, form.eps)
    assert (back.group_sizes, back.doubts, dict(back.metadata)) == (form.group_sizes, form.doubts, {"layer": 3})
    for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
        assert torch.equal(getattr(back, name), getattr(form, name))
    again = SparseAutoencoder.from_plain(back)
    assert again.config == sae.config
    assert torch.equal(again(rows()), sae(rows()))


def test_save_and_load(activation, input_norm, tmp_path):
    sae = SparseAutoencoder.from_plain(plain(activation, input_norm, torch.float32))
    sae.save_pretrained(tmp_path / "sae")
    loaded = SparseAutoencoder.from_pretrained(tmp_path / "sae")
    assert loaded.config == sae.config
    x_ND = rows().float()
    assert torch.equal(loaded(x_ND), sae(x_ND))
    assert torch.equal(loaded.encode(x_ND).dense(), sae.encode(x_ND).dense())


def test_gradients_are_autograd_s(activation, input_norm):
    """Also through the normalisation: the statistics are functions of x."""
    sae = SparseAutoencoder.from_plain(plain(activation, input_norm))
    x_ND = rows().requires_grad_()
    fires_NS = (sae.encode(x_ND).dense() > 0).double()
    sae(x_ND).square().sum().backward()
    found = [x_ND.grad, *(p.grad for p in sae.parameters())]
    leaves = [x_ND.detach().requires_grad_(), *(p.detach().clone().requires_grad_() for p in sae.parameters())]
    x, W_enc, b_enc, W_dec, b_dec = leaves
    n, mean, size = plain_forward.normalised(plain(activation, input_norm), x)
    z = ((n - b_dec) @ W_enc + b_enc) * fires_NS
    ((z @ W_dec + b_dec) * size + mean).square().sum().backward()
    for ours, dense in zip(found, leaves):
        torch.testing.assert_close(ours, dense.grad, rtol=1e-8, atol=1e-8)


def test_statistics_that_are_needed_and_missing():
    sae = SparseAutoencoder.from_plain(plain("relu", "layer_norm"))
    with pytest.raises(ValueError, match="statistics: needed by an SAE whose input_norm is layer_norm"):
        sae.decode(sae.encode(rows()))
    with pytest.raises(ValueError, match="input_norm: layer_norm; biases are scaled where"):
        sae.scale_biases_(2.0)
    assert SparseAutoencoder.from_plain(plain()).input_statistics(rows()) is None


def test_rows_without_a_direction():
    """A row of zeros has no norm, and a constant one no deviation: nothing of them is NaN."""
    x_ND = torch.stack([torch.zeros(D), torch.full((D,), 2.0)]).double()
    for norm in ("layer_norm", "token_norm"):
        sae = SparseAutoencoder.from_plain(plain("relu", norm))
        assert bool(sae(x_ND).isfinite().all())
        torch.testing.assert_close(sae(x_ND)[0], torch.zeros(D).double())


def test_a_batch_topk_without_threshold_was_never_calibrated():
    sae = SparseAutoencoder.from_plain(plain("batch_topk", threshold=None))
    with pytest.raises(ValueError, match="threshold: not calibrated"):
        sae.encode(rows())
    assert sae.to_plain().threshold is None
    assert sae.encode(rows(), use_threshold=False).n_entries == 4 * N
    sae = SparseAutoencoder.from_plain(plain("batch_topk", k=None))
    assert sae.encode(rows()).n_rows == N
    with pytest.raises(ValueError, match="k: not known of this batch_topk SAE"):
        sae.encode(rows(), use_threshold=False)
    with pytest.raises(ValueError, match="k: is None; a topk SAE needs it"):
        SAEConfig(8, 16, None, "topk")


@pytest.mark.parametrize("activation", ["batch_topk", "matryoshka", "jumprelu"])
def test_a_threshold_of_float64_is_not_rounded(activation, tmp_path):
    form = plain(activation)
    sae = SparseAutoencoder.from_plain(form)
    assert torch.equal(sae.to_plain().threshold, form.threshold.clamp(min=0))
    sae.save_pretrained(tmp_path)
    loaded = SparseAutoencoder.from_pretrained(tmp_path)
    assert torch.equal(loaded.threshold, sae.threshold)
    assert loaded.threshold.dtype == torch.float64


def test_groups_of_a_jumprelu_sae_are_kept():
    form = plain("jumprelu", group_sizes=(20, S - 20))
    sae = SparseAutoencoder.from_plain(form)
    assert sae.config.group_sizes == (S,)
    assert sae.to_plain().group_sizes == (20, S - 20)


def test_new_ones_start_as_they_are_trained():
    relu, jumprelu = (SparseAutoencoder(SAEConfig(D, S, None, name)) for name in ("relu", "jumprelu"))
    assert float(relu.threshold) == 0
    assert torch.equal(jumprelu.threshold, torch.full((S,), 0.001))
    x_ND = rows().float()
    torch.testing.assert_close(relu.encode(x_ND).dense(), torch.relu(x_ND @ relu.W_enc))
    for sae in (relu, jumprelu):
        before = sae.eval().encode(x_ND).dense()
        torch.testing.assert_close(sae.encode(x_ND, use_threshold=False).dense(), before)
        sae.scale_biases_(7.0)
        torch.testing.assert_close(sae.encode(7 * x_ND).dense(), 7 * before, rtol=1e-4, atol=1e-4)


# --- what uses the codes ---------------------------------------------------------------------------------------------


def test_evaluate_is_the_dense_measure(activation, input_norm):
    form, x_ND = plain(activation, input_norm, torch.float32), rows().float()
    metrics = evaluate(SparseAutoencoder.from_plain(form), Activations.from_tensor(x_ND), batch_rows=7)
    error_ND = x_ND.double() - plain_forward.forward(form, x_ND)
    z_NS = plain_forward.encode(form, x_ND)
    explained = 1 - error_ND.var(0).sum() / x_ND.double().var(0).sum()
    assert metrics["explained_variance"] == pytest.approx(float(explained), rel=1e-4)
    assert metrics["l0"] == pytest.approx(float((z_NS > 0).double().sum(1).mean()), rel=1e-6)
    assert metrics["l2"] == pytest.approx(float(error_ND.square().sum(1).mean()), rel=1e-4)
    assert metrics["dead_fraction"] == pytest.approx(float((z_NS.amax(0) <= 0).double().mean()))


def test_scores_top_images_and_stored_codes(activation, input_norm, tmp_path):
    """Of the SAE, of its codes on disk, and of the dense codes as neurons: the same."""
    form, x_ND = plain(activation, input_norm, torch.float32), rows().float()
    sae = SparseAutoencoder.from_plain(form)
    embeddings = Activations.from_tensor(torch.randn(N, 5, generator=torch.Generator().manual_seed(2)))
    activations = Activations.from_tensor(x_ND)
    with CodesWriter(tmp_path / "codes", S, torch.float32, {"model": "m", "sae": "s"}) as writer:
        writer.write_shard(0, sae.encode(x_ND), {"image": [f"{i}" for i in range(N)], "token": [0] * N})
    stored = open_codes(tmp_path / "codes")
    neurons = Activations.from_tensor(sae.encode(x_ND).dense().detach())
    scores = [score(activations, embeddings, sae), score(stored, embeddings), score(neurons, embeddings)]
    for other in scores[1:]:
        torch.testing.assert_close(other.ms, scores[0].ms, equal_nan=True, rtol=1e-5, atol=1e-6)
    latents = [0, 5, 60]
    by_sae, by_codes = top_images(activations, latents, 4, sae=sae), top_images(stored, latents, 4)
    for one, other in zip(by_sae, by_codes):
        assert torch.equal(one.images, other.images)
        torch.testing.assert_close(one.acts, other.acts)


def steered(form, x_ND, edits, only, error):
    """Dense codes, a plain change, a plain product, in float64."""
    z_NS = plain_forward.encode(form, x_ND)
    edited_NS = torch.zeros_like(z_NS) if only else z_NS.clone()
    for edit in edits:
        edited_NS[:, edit.latent] = edit.factor * z_NS[:, edit.latent] + edit.offset
    new_ND, x_hat_ND = (plain_forward.decode(form, codes, x_ND) for codes in (edited_NS, z_NS))
    return new_ND if error == "drop" else x_ND + new_ND - x_hat_ND


@pytest.mark.parametrize("error", ["drop", "keep"])
@pytest.mark.parametrize("only", [False, True])
def test_steering_changes_every_token_by_its_own_scale(activation, input_norm, only, error):
    form, x_ND = plain(activation, input_norm), rows()
    sae = SparseAutoencoder.from_plain(form)
    latents = sae.encode(x_ND).top_indices.flatten().unique()[:3].tolist()
    edits: list[Edit] = [clamp(latents[0], 5.0), scale(latents[1], 3.0), zero(latents[2]), add(60, 1.5)]
    plan, row_N = EditPlan.of_rows([edits], sae), torch.zeros(N, dtype=torch.int64)
    pieces = [encode_tokens(sae, part) for part in x_ND.split(13)]
    encoded = Encoded.join(pieces, S)
    with torch.no_grad():
        found_ND = edit_tokens(sae, encoded, plan, row_N, only, error)
    torch.testing.assert_close(found_ND, steered(form, x_ND, edits, only, error), rtol=1e-9, atol=1e-9)


@settings(max_examples=30)
@given(
    activation=st.sampled_from(["relu", "jumprelu", "batch_topk", "matryoshka", "topk"]),
    input_norm=st.sampled_from(NORMS),
    seed=st.integers(0, 10_000),
    size=st.sampled_from([1e-3, 1.0, 1e4]),
)
def test_any_sae_is_its_plain_form(activation, input_norm, seed, size):
    form, x_ND = plain(activation, input_norm, seed=seed), size * rows(5, seed)
    sae = SparseAutoencoder.from_plain(form)
    torch.testing.assert_close(sae(x_ND), plain_forward.forward(form, x_ND), rtol=1e-8, atol=1e-8 * size)
    codes = sae.encode(x_ND)
    assert isinstance(codes, SparseCodes)
    assert torch.equal(codes.l0(), (plain_forward.encode(form, x_ND) > 0).sum(1))
