"""ReLU, JumpReLU and micro-batches on a GPU: through the interpreter, and at real sizes on the chip in float64."""

import pytest
import test_accumulate
import test_penalised_step
import torch

from saevlm_fast.config import SAEConfig, TrainConfig
from saevlm_fast.kernels import reference
from saevlm_fast.kernels.low_weights import LowWeights
from saevlm_fast.kernels.topk_encode_cuda import Centred, candidates_above
from saevlm_fast.sae import SparseAutoencoder
from saevlm_fast.training import gpu_codes, gpu_dense, step
from saevlm_fast.training.capture import CapturedSteps
from saevlm_fast.training.step import Stepper
from static_compile import TARGETS, Case, assert_no_spills

interpreted = pytest.mark.skipif(
    torch.cuda.is_available(), reason="the tensors are on the CPU: only the interpreter takes them"
)
NAMES = "W_enc", "b_enc", "W_dec", "b_dec"


def gpu_step(stepper, x_BD):
    stepper.announce(len(x_BD))
    with torch.no_grad():
        return stepper._gpu_step(x_BD)


def with_dead(architecture, dtype, **sizes):
    """A stepper and a dense trainer, some of whose latents never fire."""
    stepper, dense, data = test_penalised_step.make(architecture, dtype=dtype, dead_after=15, **sizes)
    never = (stepper.sae.threshold, dense.theta), (stepper.sae.b_enc, dense.b_enc)
    for each in never[0] if architecture == "jumprelu" else never[1]:
        each.data[::5] = 9.0 if architecture == "jumprelu" else -9.0
    return stepper, dense, data


def assert_equal_steps(stepper, dense, batches, tolerance):
    for x_BD in batches:
        output, expected = gpu_step(stepper, x_BD), dense.step(x_BD)
        relu = stepper.sae.config.architecture == "relu"  # its dead latents have no gradient
        expected -= float(dense.aux.detach()) if relu else 0
        assert float(output.losses.overall) == pytest.approx(expected, rel=tolerance)
        assert output.n_dead == (0 if relu else dense.n_dead)
    assert dense.n_dead > 0
    for name in NAMES:
        torch.testing.assert_close(getattr(stepper.sae, name), getattr(dense, name), atol=tolerance, rtol=tolerance)
    if stepper.sae.config.architecture == "jumprelu":
        torch.testing.assert_close(stepper.sae.threshold, dense.theta.detach(), atol=tolerance, rtol=tolerance)
    assert torch.equal(stepper.idle_S, dense.idle)
    return output


@interpreted
@pytest.mark.parametrize("architecture", test_penalised_step.RECIPES)
def test_sparse_steps_are_the_dense_steps(architecture, monkeypatch):
    """Float64, by the kernels of entries; clipped."""
    monkeypatch.setattr(gpu_codes, "SPARSE_SHARE", 1.0)
    stepper, dense, data = with_dead(architecture, torch.float64, d_in=7, d_sae=13, clip_norm=0.3, sparsity_warmup=0)
    output = assert_equal_steps(stepper, dense, data[:22].split(11), 1e-10)
    assert output.codes is not None


@interpreted
@pytest.mark.parametrize("architecture", test_penalised_step.RECIPES)
def test_steps_by_split_products_are_the_dense_steps(architecture, monkeypatch):
    """Float32, in chunks of seven rows."""
    monkeypatch.setattr(gpu_codes, "SPARSE_SHARE", 0.0)
    monkeypatch.setattr(step, "screens_cuda", lambda *_: True)
    monkeypatch.setattr(gpu_dense, "_CHUNK_BYTES", 7 * 13 * 4)
    stepper, dense, data = with_dead(architecture, torch.float32, d_in=7, d_sae=13, clip_norm=0.3, sparsity_warmup=0)
    output = assert_equal_steps(stepper, dense, data[:22].split(11), 1e-5)
    assert output.codes is None
    fires = stepper.counted(output)[0]
    assert 0 < fires == int(output.n_fired) < 11 * 13


@interpreted
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("architecture", test_penalised_step.RECIPES)
def test_a_bad_row_is_told_by_a_step_of_split_products(architecture, bad, monkeypatch):
    """Of a norm of 2^64 or more there is no square in float32: halves are then not finite, and neither is the loss."""
    monkeypatch.setattr(gpu_codes, "SPARSE_SHARE", 0.0)
    monkeypatch.setattr(step, "screens_cuda", lambda *_: True)
    stepper, _, data = with_dead(architecture, torch.float32, d_in=7, d_sae=13, sparsity_warmup=0)
    gpu_step(stepper, data[:11])
    assert int(stepper.bad_step) == -1
    x_BD = data[:11].clone()
    x_BD[4, 2] = bad
    assert gpu_step(stepper, x_BD).codes is None
    assert int(stepper.bad_step) == 1


@interpreted
@pytest.mark.parametrize("architecture", ["batch_topk", "jumprelu"])
def test_micro_batches_are_those_of_a_cpu(architecture, monkeypatch):
    """Two micro-batches of seven rows, not of one size."""
    monkeypatch.setattr(gpu_codes, "SPARSE_SHARE", 1.0)
    monkeypatch.setattr(step, "is_dense", lambda codes: False)
    made = [
        test_accumulate.make(architecture, 2, dead_after=5, threshold_start=0, threshold_beta=0.5) for _ in range(2)
    ]
    (expected, batches), (found, _) = made
    for x_BD in batches[:2]:
        whole, cut = expected.step(x_BD[:7]), gpu_step(found, x_BD[:7])
        torch.testing.assert_close(cut.x_hat_BD, whole.x_hat_BD, atol=1e-10, rtol=1e-10)
        assert float(cut.losses.overall) == pytest.approx(float(whole.losses.overall), rel=1e-10)
        assert torch.equal(cut.codes.compact().dense() > 0, whole.codes.compact().dense() > 0)
    for name, parameter in expected.parameters().items():
        torch.testing.assert_close(found.parameters()[name], parameter, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(found.sae.threshold, expected.sae.threshold, atol=1e-6, rtol=1e-6)
    assert torch.equal(found.idle_S, expected.idle_S)


@interpreted
def test_split_products_of_micro_batches(monkeypatch):
    """Of JumpReLU, each of which has a penalty of its own."""
    monkeypatch.setattr(gpu_codes, "SPARSE_SHARE", 0.0)
    monkeypatch.setattr(step, "screens_cuda", lambda *_: True)
    (expected, batches), (found, _) = (test_accumulate.make("jumprelu", 2, torch.float32) for _ in range(2))
    whole, cut = expected.step(batches[0][:7]), gpu_step(found, batches[0][:7])
    assert cut.codes is None
    torch.testing.assert_close(cut.x_hat_BD, whole.x_hat_BD, atol=1e-5, rtol=1e-5)
    assert float(cut.losses.overall) == pytest.approx(float(whole.losses.overall), rel=1e-5)
    for name, parameter in expected.parameters().items():
        torch.testing.assert_close(found.parameters()[name], parameter, atol=1e-5, rtol=1e-5)


@interpreted
def test_a_row_that_is_not_finite_is_noticed(monkeypatch):
    monkeypatch.setattr(step, "screens_cuda", lambda *_: True)
    stepper, _, data = test_penalised_step.make("relu", d_in=7, d_sae=13, dtype=torch.float32)
    x_BD = data[:9].clone()
    x_BD[3, 2] = float("nan")
    gpu_step(stepper, x_BD)
    assert int(stepper.bad_step) == 0


@interpreted
def test_what_a_step_had_asked_that_failed_is_of_no_later_one(monkeypatch):
    """The next one asks nothing: it would take the other's codes."""
    monkeypatch.setattr(gpu_codes, "SPARSE_SHARE", 1.0)
    (found, data), (expected, _) = (test_penalised_step.make("relu", d_in=7, d_sae=13)[::2] for _ in range(2))
    for stepper in (found, expected):
        stepper.announce(9)
    found.asked = gpu_codes.Asked(None, None, n_places=0)
    failing = pytest.raises(RuntimeError, match="no memory")
    with monkeypatch.context() as patched, failing, torch.no_grad():
        patched.setattr(Stepper, "_device_state", lambda self, x_BD: raises(RuntimeError("no memory")))
        found._gpu_step(data[:9])
    losses = [gpu_step(stepper, data[9:18]).losses.overall for stepper in (found, expected)]
    assert torch.equal(*losses)


def raises(error):
    raise error


@interpreted
@pytest.mark.parametrize("of_latents", [False, True])
def test_candidates_give_what_is_above_a_threshold_of_every_latent(of_latents):
    """And padding behind it, of two chunks' worth of places; too small a pool is told."""
    generator = torch.Generator().manual_seed(0)
    x_BD, W_SD = torch.randn(9, 8, generator=generator), torch.randn(70, 8, generator=generator) / 4
    b_enc_S, b_dec_D = torch.randn(70, generator=generator) / 4, torch.randn(8, generator=generator) / 4
    threshold = torch.rand(70, generator=generator) * 2 - 0.3 if of_latents else 0.4
    low, centred = LowWeights.empty(70, 8, "cpu"), Centred.empty(9, 8, "cpu")
    low.write_(0, W_SD)
    inputs = x_BD, W_SD.T, b_enc_S, b_dec_D, threshold
    (candidates,) = candidates_above(*inputs, 70, low, centred)
    n = candidates.counted()
    acts_M, latents_M, row_offsets = candidates.entries(n + 5)
    expected = reference.threshold_encode(*inputs)
    n_entries = int(row_offsets[-1])
    assert 0 < n_entries <= n < 9 * 70
    assert torch.equal(row_offsets, expected[2])
    assert torch.equal(latents_M[:n_entries], expected[1])
    torch.testing.assert_close(acts_M[:n_entries], expected[0])
    assert not acts_M[n_entries:].any() | latents_M[n_entries:].any()
    (too_many,) = candidates_above(*inputs, 1, low, centred)
    assert too_many.counted() is None


@interpreted
@pytest.mark.parametrize("power", [35, 63])
@pytest.mark.parametrize("architecture", test_penalised_step.RECIPES)
def test_a_large_row_is_taken_as_on_a_cpu(architecture, power, monkeypatch):
    """The norm of the gradients is beyond float32 with either: the step is one of nothing, and not of NaN."""
    sizes = {"dtype": torch.float32, "d_in": 7, "d_sae": 13, "sparsity_warmup": 0}
    (expected, _, data), (found, _, _) = (test_penalised_step.make(architecture, **sizes) for _ in range(2))
    x_BD = data[:11].clone()
    x_BD[4] *= 2.0**power / x_BD[4].norm()
    whole = expected.step(x_BD)
    monkeypatch.setattr(gpu_codes, "SPARSE_SHARE", 0.0)
    monkeypatch.setattr(step, "screens_cuda", lambda *_: True)
    output = gpu_step(found, x_BD)
    assert output.codes is None
    assert float(output.losses.overall) == pytest.approx(float(whole.losses.overall), rel=1e-5)
    for name, parameter in expected.parameters().items():
        torch.testing.assert_close(found.parameters()[name], parameter, atol=1e-6, rtol=1e-6)
    assert int(found.bad_step) == int(expected.bad_step) == -1


def test_scales_bring_numbers_below_their_top():
    bounds = torch.tensor([1e-14, 0.999, 1.0, 1.001, 3e14, 1e20])
    scaled = bounds * gpu_dense.scale_below(bounds)
    assert bool(((scaled < 2**13) & (scaled >= 2**12)).all())
    extremes = gpu_dense.scale_below(torch.tensor([0.0, 1e-42, 1e38]))
    assert bool((extremes[:, None] * extremes).isfinite().all() & (extremes > 0).all())


def test_kernels_compile_without_spills():
    module, floats = "saevlm_fast.kernels.dense_step_triton", lambda *names: {f"{name}_ptr": "*fp32" for name in names}
    common = floats("h", "unscale", "bias", "threshold", "scale", "sums")
    common |= {"hi_ptr": "*fp16", "lo_ptr": "*fp16", "n_rows": "i32", "n_latents": "i32:16"}
    passed = common | floats("dz", "dz_unscale", "theta", "of_step", "l1")
    passed |= {"bandwidth": "fp32"}
    split = {"source_ptr": "*fp32", "scale_ptr": "*fp32", "out_ptr": "*fp16", "width": "i32:16"}
    from saevlm_fast.kernels.dense_step_triton import BLOCK_S, ROWS, TILE_ROWS

    tile = {"ROWS": ROWS, "TILE_ROWS": TILE_ROWS, "BLOCK_S": BLOCK_S}
    kernels = [
        ("split_kernel", split, {"LEFT": True, "BLOCK": 1024}),
        ("fired_kernel", common | {"counts_ptr": "*i32"}, tile),
        ("passed_kernel", passed, tile | {"BAND": True}),
        ("passed_kernel", passed, tile | {"BAND": False}),
    ]
    assert_no_spills([Case(module, *kernel[:1], target, *kernel[1:]) for target in TARGETS for kernel in kernels])


# --- on a GPU --------------------------------------------------------------------------------------------------------


def dense_gradients(before, x_BD, stepper):
    """(loss, clipped gradients by name, whether a latent fired) in float64."""
    config, n_rows = stepper.config, len(x_BD)
    p = {name: parameter.double() for name, parameter in before.items()}
    centred_BD = x_BD.double() - p["b_dec"]
    h_BS, theta = centred_BD @ p["W_enc"].T + p["b_enc"], p.get("threshold", torch.zeros_like(p["b_enc"]))
    fires = (h_BS > theta) & (h_BS > 0)
    z_BS = torch.where(fires, h_BS, 0)
    error_BD = z_BS @ p["W_dec"] + p["b_dec"] - x_BD.double()
    mse = error_BD.square().sum() / n_rows
    error_BD *= 2 / n_rows
    dz_BS, gradients = error_BD @ p["W_dec"].T, {}
    if "threshold" in p:
        excess = fires.sum() / n_rows / config.wanted_l0 - 1
        penalty, of_step = excess.square(), 2 * excess / (config.wanted_l0 * n_rows)
        inside = ((h_BS - theta).abs() < config.ste_bandwidth / 2) & (h_BS > 0)
        gradients["threshold"] = -(inside * (theta * dz_BS + of_step)).sum(0) / config.ste_bandwidth
        dh_BS = torch.where(fires, dz_BS, 0)
    else:
        penalty = config.l1_weight * z_BS.sum() / n_rows
        dh_BS = torch.where(fires, dz_BS + config.l1_weight / n_rows, 0)
    dW_dec = z_BS.T @ error_BD
    gradients["W_dec"] = dW_dec - (dW_dec * p["W_dec"]).sum(1, keepdim=True) * p["W_dec"]
    gradients |= {"W_enc": dh_BS.T @ centred_BD, "b_enc": dh_BS.sum(0)}
    gradients["b_dec"] = error_BD.sum(0) - p["W_enc"].T @ gradients["b_enc"]
    norm = torch.stack([g.square().sum() for g in gradients.values()]).sum().sqrt()
    clip = (config.clip_norm / (norm + 1e-6)).clamp(max=1)
    return float(mse + penalty), {name: g * clip for name, g in gradients.items()}, fires.any(0)


def big(architecture, device, d_sae, l0=None, n_rows=4096, **train):
    """A Stepper and a batch; about l0 latents fire on a row, or about half of them.

    Of a batch of 256 rows it is the same ones in float32 and in float64: none of their activations is near the bound.
    """
    d_in = 768
    sae = SparseAutoencoder(SAEConfig(d_in, d_sae, None, architecture)).to(device)
    sae.reset_parameters(0)
    x_BD = torch.randn(n_rows, d_in, device=device, generator=torch.Generator(device=device).manual_seed(1)) / d_in**0.5
    h_M = (x_BD[:256].double() @ sae.W_enc.detach().double()).flatten().sort().values
    place = int(len(h_M) * (1 - (l0 or d_sae / 2.1) / d_sae))
    near_M = h_M[place - len(h_M) // 400 : place + len(h_M) // 400]
    cut = float(near_M[near_M.diff().argmax() :][:2].mean())
    if architecture == "jumprelu":
        sae.threshold.fill_(cut)
    else:
        sae.b_enc.data.fill_(-cut)
    recipe = {"jumprelu": {"target_l0": 20.0, "bandwidth": 0.01}, "relu": {"l1": 0.02}}[architecture]
    known = {"steps": 100, "warmup_steps": 0, "sparsity_warmup": 0}
    return Stepper(sae, TrainConfig(**known | recipe | train)), x_BD


@pytest.mark.gpu
@pytest.mark.parametrize("clip_norm", [1e3, 1e-3], ids=["no-clip", "clip"])
@pytest.mark.parametrize("l0", [20, 300, None])
@pytest.mark.parametrize("architecture", ["relu", "jumprelu"])
def test_gpu_penalised_step_equals_float64(device, architecture, l0, clip_norm):
    """Every gradient by Adam's first moment; a repeat bit for bit."""
    results = []
    for _ in range(2):
        stepper, x_BD = big(architecture, device, 6144, l0, n_rows=256, clip_norm=clip_norm)
        before = {name: parameter.clone() for name, parameter in stepper.parameters().items()}
        output = stepper.step(x_BD)
        moments = {name: moment for name, (moment, _) in stepper.moments.items()}
        results.append([*moments.values(), *stepper.parameters().values(), output.losses.overall])
    assert all(torch.equal(*pair) for pair in zip(*results))
    assert (output.codes is None) == (l0 is None or l0 > 6144 / 32)
    loss, gradients, fired_S = dense_gradients(before, x_BD, stepper)
    assert float(output.losses.overall) == pytest.approx(loss, rel=1e-5)
    for name, g in gradients.items():
        bound = 1e-2 if name == "threshold" else 1e-5  # entries at the edges of the band may be in or out
        assert float((moments[name].double() * 10 - g).norm()) < bound * float(g.norm()), name
    assert float((stepper.idle_S.bool() == fired_S).float().mean()) < 1e-3
    low = LowWeights.empty(6144, 768, device)
    low.write_(0, stepper.sae.W_enc.detach().T)
    assert torch.equal(stepper.low.weights.W_SD, low.W_SD)


@pytest.mark.gpu
@pytest.mark.parametrize("architecture", ["topk", "batch_topk", "matryoshka"])
def test_gpu_micro_batches_are_captured_bit_for_bit(device, architecture):
    eager, batches = test_accumulate.make(architecture, 4, torch.float32)
    there = [Stepper(test_accumulate._copied(eager.sae).to(device), eager.config) for _ in range(2)]
    captured = CapturedSteps(there[1])
    for x_BD in batches[:8]:
        losses = there[0].step(x_BD.to(device)).losses
        assert torch.equal(captured.step(x_BD.to(device)).losses.overall, losses.overall)
    assert captured.n_replayed > 0
    for name, parameter in there[0].parameters().items():
        assert torch.equal(there[1].parameters()[name], parameter), name
