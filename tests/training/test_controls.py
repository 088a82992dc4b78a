"""Controls: each against dense autograd on every path, frozen parts bit for bit, runs that go on, what they say."""

import json
from dataclasses import replace

import pytest
import test_penalised_step as penalised
import torch

import test_step as selecting
from saevlm_fast.config import CONTROLS, SAEConfig, TrainConfig
from saevlm_fast.data.rows import Activations
from saevlm_fast.errors import Interrupted
from saevlm_fast.kernels import latent_gradient
from saevlm_fast.kernels.common import Cone
from saevlm_fast.sae import SparseAutoencoder
from saevlm_fast.training import checkpoints
from saevlm_fast.training.control import shuffled
from saevlm_fast.training.run import train
from saevlm_fast.training.step import Stepper

STEPS = ("frozen-decoder", "soft-frozen", "frozen-encoder")  # what changes the step
COSINE = 0.995  # that 30 steps reach
COSINE_AT_ONCE = 1 - 1e-6  # that two do


def make(architecture, control, **settings):
    module = penalised if architecture in penalised.RECIPES else selecting
    if control == "soft-frozen":
        settings.setdefault("control_cosine", COSINE)
    return module.make(architecture, dtype=torch.float64, control=control, **settings)


def gpu_step(stepper, x):
    """Through the interpreter. Of k = 1 and a frozen decoder, W_enc's gradient would be rounding alone."""
    stepper.announce(len(x))
    with torch.no_grad():
        return stepper._gpu_step(x, stepper._mono(x))


def check_steps(step, stepper, dense, data, n_steps, tolerance=1e-9, rows=61):
    first, n_dead = {name: p.clone() for name, p in stepper.parameters().items()}, 0
    for start in range(0, n_steps * rows, rows):
        x = data[start : start + rows]
        loss, expected = float(step(stepper, x).losses.overall), dense.step(x)
        if stepper.sae.config.architecture == "relu":  # whose auxiliary loss has no gradient and is not counted
            expected -= float(dense.aux.detach())
        assert loss == pytest.approx(expected, rel=tolerance)
        n_dead = max(n_dead, dense.n_dead)
    assert n_dead > 0, "the auxiliary loss was not tried"
    for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
        found, expected = getattr(stepper.sae, name), getattr(dense, name)
        torch.testing.assert_close(found.detach(), expected.detach(), atol=tolerance, rtol=tolerance)
    frozen = {"frozen-decoder": "W_dec", "frozen-encoder": "W_enc"}.get(stepper.config.control)
    for name, parameter in stepper.parameters().items():
        assert torch.equal(parameter, first[name]) == (name == frozen), name
    if stepper.config.control == "soft-frozen":
        cosine_S = (stepper.sae.W_dec.detach() * first["W_dec"]).sum(1)
        assert float(cosine_S.min()) >= COSINE - 1e-12
        assert float(cosine_S.min()) < COSINE + 1e-9, "no row came to the edge"


@pytest.mark.parametrize("architecture", ["topk", "batch_topk", "matryoshka"])
@pytest.mark.parametrize("control", STEPS)
def test_steps_are_the_dense_steps(control, architecture, monkeypatch):
    if architecture == "matryoshka":  # in blocks of a few rows
        monkeypatch.setattr(latent_gradient, "_BLOCK_BYTES", 500)
    stepper, dense, data = make(architecture, control, dead_after=150)
    check_steps(Stepper.step, stepper, dense, data, 30)


@pytest.mark.parametrize("path", penalised.PATHS)
@pytest.mark.parametrize(
    ("control", "architecture"), [*((control, "jumprelu") for control in STEPS), ("frozen-decoder", "relu")]
)
def test_penalised_steps_are_the_dense_steps(control, architecture, path, monkeypatch):
    step, choose = penalised.PATHS[path]
    choose(monkeypatch)
    stepper, dense, data = make(architecture, control, dead_after=150)
    if architecture == "jumprelu":
        for never in (stepper.sae.threshold, dense.theta):
            never.data[::5] = 9.0
    if architecture == "relu":
        for never in (stepper.sae.b_enc, dense.b_enc):
            never.data[::5] = -9.0
    check_steps(step or Stepper.step, stepper, dense, data, 30)


@pytest.mark.parametrize(
    ("control", "clip_norm"),
    [("frozen-decoder", 1e3), ("frozen-decoder", 1e-2), ("soft-frozen", 1e-2), ("frozen-encoder", 1e-2)],
)
def test_gpu_steps_are_the_dense_steps(control, clip_norm):
    if torch.cuda.is_available():
        pytest.skip("the tensors are on the CPU: only the interpreter takes them")
    more = {"d_sae": 17, "d_in": 6, "k": 2, "dead_after": 20, "warmup_steps": 0}
    more |= {"control_cosine": COSINE_AT_ONCE} if control == "soft-frozen" else {}
    stepper, dense, data = make("batch_topk", control, clip_norm=clip_norm, **more)
    first = {name: p.clone() for name, p in stepper.parameters().items()}
    for start in (0, 11):
        x = data[start : start + 11]
        assert float(gpu_step(stepper, x).losses.overall) == pytest.approx(dense.step(x), rel=1e-10)
    assert dense.n_dead > 0
    for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
        found, expected = getattr(stepper.sae, name), getattr(dense, name)
        torch.testing.assert_close(found.detach(), expected.detach(), atol=1e-10, rtol=1e-10)
    same = [name for name, p in stepper.parameters().items() if torch.equal(p, first[name])]
    assert same == {"frozen-decoder": ["W_dec"], "frozen-encoder": ["W_enc"], "soft-frozen": []}[control]
    if control == "soft-frozen":
        cosine_S = (stepper.sae.W_dec.detach() * first["W_dec"]).sum(1)
        assert float(cosine_S.min()) == pytest.approx(COSINE_AT_ONCE, abs=1e-12)


@pytest.mark.gpu
@pytest.mark.parametrize("architecture", ["topk", "batch_topk", "matryoshka"])
@pytest.mark.parametrize("control", STEPS)
def test_gpu_captured_steps_are_the_dense_steps(device, control, architecture):
    from saevlm_fast.training.capture import CapturedSteps

    stepper, dense, data = selecting.make(architecture, control=control, dead_after=150)
    stepper = Stepper(stepper.sae.to(device), stepper.config)
    steps = CapturedSteps(stepper)
    if control == "soft-frozen":
        dense.config = replace(dense.config, control_cosine=0.8)
    for start in range(0, 20 * 61, 61):
        x = data[start : start + 61]
        assert float(steps.step(x.to(device)).losses.overall) == pytest.approx(dense.step(x), rel=1e-4)
    assert steps.n_replayed > 0


def test_a_row_goes_to_the_nearest_that_is_in_the_cone():
    """Against a search over the circle through both rows; rows inside keep their bits."""
    generator = torch.Generator().manual_seed(0)
    first = torch.nn.functional.normalize(torch.randn(40, 5, generator=generator, dtype=torch.float64), dim=1)
    W = torch.nn.functional.normalize(first + torch.randn(40, 5, generator=generator, dtype=torch.float64), dim=1)
    W[0], W[1] = -first[0], first[1]
    held = W.clone()
    Cone(first, 0.8).hold_(held)
    cosine, before = (held * first).sum(1), (W * first).sum(1)
    assert torch.equal(held[before >= 0.8], W[before >= 0.8])
    torch.testing.assert_close(held.norm(dim=1), torch.ones(40, dtype=torch.float64))
    assert torch.equal(held[0], first[0])
    outside = (before < 0.8) & (torch.arange(40) > 0)
    assert 5 < int(outside.sum()) < 39
    torch.testing.assert_close(cosine[outside], torch.full((int(outside.sum()),), 0.8, dtype=torch.float64))
    angle = torch.linspace(0, torch.pi, 20_001, dtype=torch.float64)
    for s in outside.nonzero().flatten().tolist():
        across = torch.nn.functional.normalize(W[s] - before[s] * first[s], dim=0)
        circle = torch.cos(angle)[:, None] * first[s] + torch.sin(angle)[:, None] * across
        best = circle[torch.where(torch.cos(angle) >= 0.8, circle @ W[s], -2).argmax()]
        torch.testing.assert_close(held[s], best, atol=2e-4, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_row_opposite_to_its_first_one_becomes_that(dtype):
    """What is across is rounding then, as much along the first row: of 2000 rows half were 0.2 or 1.4 long."""
    generator = torch.Generator().manual_seed(0)
    first = torch.nn.functional.normalize(torch.randn(2000, 64, generator=generator, dtype=dtype), dim=1)
    held = -first
    Cone(first, 0.8).hold_(held)
    assert torch.equal(held, first)
    near = torch.nn.functional.normalize(1e-3 * torch.randn(2000, 64, generator=generator, dtype=dtype) - first, dim=1)
    Cone(first, 0.8).hold_(near)
    torch.testing.assert_close(near.norm(dim=1), torch.ones(2000, dtype=dtype), atol=1e-3, rtol=0)
    torch.testing.assert_close((near * first).sum(1), torch.full((2000,), 0.8, dtype=dtype), atol=1e-3, rtol=0)


# Runs -----------------------------------------------------------------------------------------------------------------


def rows(n=500, d=12, seed=3):
    generator = torch.Generator().manual_seed(seed)
    features, strength = torch.randn(30, d, generator=generator), torch.rand(n, 30, generator=generator)
    return Activations.from_tensor((strength * (strength > 0.85)) @ features + 0.5)


def config(control, **more):
    cosine = {"control_cosine": 0.99} if control == "soft-frozen" else {}
    recipe = {"steps": 24, "batch_size": 64, "lr": 3e-3, "seed": 5, "threshold_start": 4, "control": control}
    return TrainConfig(**recipe | cosine | more)


SIZES = {name: SAEConfig(12, 40, 4, name, (8, 32) if name == "matryoshka" else ()) for name in selecting.GROUPS}
SIZES |= {name: SAEConfig(12, 40, None, name) for name in ("relu", "jumprelu")}


@pytest.mark.parametrize("control", CONTROLS)
def test_a_run_that_was_cut_ends_with_the_same_bits(control, tmp_path):
    whole, _ = train(rows(), SIZES["batch_topk"], config(control), output=tmp_path / "whole")
    cut = {"output": tmp_path / "cut", "checkpoint_every": 7}

    def stop(step):
        if step == 15:
            raise Interrupted("here")

    if control == "untrained":
        train(rows(), SIZES["batch_topk"], config(control), **cut)
    else:
        with pytest.raises(Interrupted):
            train(rows(), SIZES["batch_topk"], config(control), **cut, on_step=stop)
        assert checkpoints.latest_checkpoint(tmp_path / "cut").name == "step_00000014"
    resumed, _ = train(rows(), SIZES["batch_topk"], config(control), **cut, resume=True)
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name
    with pytest.raises(ValueError, match=f"resume: control is None, but the run was started with {control}"):
        train(rows(), SIZES["batch_topk"], config(None), **cut, resume=True)
    opened = SparseAutoencoder.from_pretrained(tmp_path / "cut")
    assert opened.config.metadata["training"]["control"] == control
    assert json.loads((tmp_path / "cut" / "run.json").read_text())["train"]["control"] == control


@pytest.mark.parametrize("architecture", [name for name in SIZES if name != "relu"])
def test_untrained_is_how_training_begins_at_the_wanted_l0(architecture):
    more = {"target_l0": 4.5} if architecture == "jumprelu" else {}
    sae, metrics = train(rows(2000), SIZES[architecture], config("untrained", batch_size=2000, **more))
    first = SparseAutoencoder(SIZES[architecture])
    first.reset_parameters(5)
    assert torch.equal(sae.W_dec, first.W_dec)
    assert torch.equal(sae.W_enc, first.W_enc)
    assert not bool(sae.b_enc.any())
    assert sae.config.metadata["steps"] == 0
    assert metrics["l0"] == pytest.approx(4.5 if architecture == "jumprelu" else 4, abs=0.01)


@pytest.mark.parametrize("control", ["frozen-decoder", "frozen-encoder"])
def test_what_is_frozen_is_how_training_begins(control):
    sae, _ = train(rows(), SIZES["matryoshka"], config(control))
    first = SparseAutoencoder(SIZES["matryoshka"])
    first.reset_parameters(5)
    assert torch.equal(sae.W_dec, first.W_dec) == (control == "frozen-decoder")
    assert torch.equal(sae.W_enc, first.W_enc) == (control == "frozen-encoder")


def test_shuffled_permutes_every_dimension_alone():
    x = torch.arange(64 * 12, dtype=torch.float32).view(64, 12)
    y = shuffled(x, 5, 3)
    assert torch.equal(y.sort(0).values, x)
    from_row = (y // 12).long()
    assert int((from_row == from_row[:, :1]).all(1).sum()) == 0
    together = torch.stack(
        [(shuffled(x, 5, step) // 12 == (shuffled(x, 5, step) // 12)[:, :1]).float() for step in range(300)]
    )
    assert float(together[:, :, 1:].mean()) == pytest.approx(1 / 64, rel=0.3), "as independent permutations"
    assert torch.equal(y, shuffled(x, 5, 3))
    assert not torch.equal(y, shuffled(x, 5, 4))
    assert not torch.equal(y, shuffled(x, 6, 3))


def test_shuffled_activations_have_marginals_and_nothing_else():
    """Planted rows of rank one: shuffled, an SAE cannot explain them from few latents; their variances stay."""
    strength = torch.randn(4096, 1, generator=torch.Generator().manual_seed(0))
    x = strength @ torch.ones(1, 12)
    y = shuffled(x, 0, 0)
    torch.testing.assert_close(y.var(0), x.var(0))
    covariance = y.T.cov()
    assert float((covariance - torch.diag(covariance.diagonal())).abs().max()) < 0.1
    sae, _ = train(x[:640], SIZES["topk"], config("shuffled"))
    plain, _ = train(x[:640], SIZES["topk"], config(None))
    assert not torch.equal(sae.W_dec, plain.W_dec)


@pytest.mark.parametrize(
    ("architecture", "settings", "message"),
    [
        ("relu", {"control": "untrained"}, "control: untrained has its threshold set for an L0, and a relu SAE has no"),
        ("topk", {"control_cosine": 0.9}, "control_cosine: 0.9 is of --control soft-frozen, not of None"),
        ("topk", {"control": "shuffled", "control_cosine": 0.9}, "0.9 is of --control soft-frozen, not of shuffled"),
        ("topk", {"control": "soft-frozen", "control_cosine": 1.0}, r"control_cosine: 1.0 must be in \[0, 1\)"),
        ("topk", {"control": "frozen"}, "control: 'frozen' is not one of frozen-decoder, soft-frozen, frozen-encoder"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(architecture, settings, message):
    with pytest.raises(ValueError, match=message):
        train(rows(), SIZES[architecture], steps=3, **settings)
