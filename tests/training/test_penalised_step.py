"""ReLU with L1 and JumpReLU: the sparse step against dense autograd, and the gradients of its penalties one by one."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dense_trainer import DenseTrainer, Jump, Step
from saevlm_fast.config import SAEConfig, TrainConfig
from saevlm_fast.sae import SparseAutoencoder
from saevlm_fast.training import any_device
from saevlm_fast.training.dead_latents import DeadLatents
from saevlm_fast.training.gradients import loss_and_gradients
from saevlm_fast.training.penalty import encode_penalised
from saevlm_fast.training.state import geometric_median
from saevlm_fast.training.step import Stepper

RECIPES = {
    "relu": {"l1": 0.05, "sparsity_warmup": 7},
    "jumprelu": {"target_l0": 6.0, "bandwidth": 0.1, "sparsity_warmup": 7},
}
ROWS = 61
NO_DEAD = DeadLatents(torch.zeros(0, dtype=torch.int64), 0)


def make(architecture, *, d_in=24, d_sae=97, seed=0, dtype=torch.float64, theta=0.05, **train):
    recipe = {"steps": 100, "lr": 3e-3, "warmup_steps": 5, "seed": seed, **RECIPES[architecture]}
    config = TrainConfig(**recipe | train)
    sae = SparseAutoencoder(SAEConfig(d_in, d_sae, None, architecture), dtype=dtype)
    sae.reset_parameters(seed)
    if architecture == "jumprelu":
        sae.threshold.fill_(theta)
    generator = torch.Generator().manual_seed(seed + 1)
    features = torch.randn(40, d_in, generator=generator)
    mask = torch.rand(64 * 40, 40, generator=generator) < 0.1
    data = (mask * torch.rand(mask.shape, generator=generator)) @ features + 0.3
    data /= data.square().sum(1).mean().sqrt()
    sae.b_dec.data.copy_(geometric_median(data[:64]))
    dense = DenseTrainer(
        sae.W_dec.detach().clone(),
        sae.b_dec.detach().clone(),
        architecture=architecture,
        k=None,
        group_ends=[d_sae],
        config=config,
        d_sae=d_sae,
        theta=theta,
    )
    return Stepper(sae, config), dense, data.to(dtype)


def whole_step(stepper, x_BD):
    """The path of a GPU, on whatever device."""
    stepper.announce(len(x_BD))
    with torch.no_grad():
        codes, penalty = stepper._encode(x_BD)
        stepper._track(codes.fired(), len(x_BD), stepper._smallest(codes))
        return stepper._whole_step(x_BD, codes, stepper._dead_latents(), penalty, stepper._mono(x_BD))


def by_entries(monkeypatch):
    """However many fire."""
    monkeypatch.setattr(any_device, "_DENSE_SHARE", 2.0)


def by_products(monkeypatch):
    """However few fire, seven rows at a time."""
    monkeypatch.setattr(any_device, "_DENSE_SHARE", -1.0)
    monkeypatch.setattr(any_device, "_CHUNK_BYTES", 7 * 97 * 8)


PATHS = {"blocks": (Stepper.step, by_entries), "entries": (whole_step, by_entries), "products": (None, by_products)}


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("dead_after", [10_000_000, 150], ids=["no-dead", "auxk"])
@pytest.mark.parametrize("architecture", RECIPES)
@pytest.mark.parametrize(("dtype", "n_steps", "tolerance"), [(torch.float64, 30, 1e-9), (torch.float32, 8, 1e-5)])
def test_same_losses_and_weights_as_dense_autograd(
    architecture, dead_after, dtype, n_steps, tolerance, name, monkeypatch
):
    path, choose = PATHS[name]
    path = path or Stepper.step
    choose(monkeypatch)
    stepper, dense, data = make(architecture, dead_after=dead_after, dtype=dtype)
    if dead_after == 150:  # some never fire
        for never in (stepper.sae.threshold, dense.theta) if architecture == "jumprelu" else ():
            never.data[::5] = 9.0
        for never in (stepper.sae.b_enc, dense.b_enc) if architecture == "relu" else ():
            never.data[::5] = -9.0
    n_dead = 0
    for start in range(0, n_steps * ROWS, ROWS):
        x = data[start : start + ROWS]
        output = path(stepper, x)
        expected = dense.step(x)
        if architecture == "relu":  # its dead latents have no act, so that the auxiliary loss has no gradient
            expected -= float(dense.aux.detach())
        assert float(output.losses.overall) == pytest.approx(expected, rel=tolerance)
        n_dead = max(n_dead, dense.n_dead)
    assert (n_dead > 0) == (dead_after == 150)
    for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
        torch.testing.assert_close(getattr(stepper.sae, name), getattr(dense, name), atol=tolerance, rtol=tolerance)
    if architecture == "jumprelu":
        torch.testing.assert_close(stepper.sae.threshold, dense.theta.detach(), atol=tolerance, rtol=tolerance)
    assert torch.equal(stepper.idle_S, dense.idle)


def listed(architecture, seed=3, **changed):
    """A step's parts in float64, in the middle of a warm-up."""
    stepper, _, data = make(architecture, seed=seed, **changed)
    generator = torch.Generator().manual_seed(seed)
    sae = stepper.sae
    sae.b_enc.data.copy_(0.05 * torch.randn(97, generator=generator, dtype=torch.float64))
    if architecture == "jumprelu":
        sae.threshold.copy_(0.1 * torch.rand(97, generator=generator, dtype=torch.float64))
        sae.threshold[::9] = 0.0
    x = data[:ROWS]
    with torch.no_grad():
        codes, penalty = encode_penalised(sae, stepper.config, 5, x)
        _, losses, gradients = loss_and_gradients(sae, x, codes, NO_DEAD, 0.0, penalty)
    return sae, stepper.config, x, codes, losses, gradients


def preactivations(sae, x):
    return (x - sae.b_dec.detach()) @ sae.W_enc.detach() + sae.b_enc.detach()


def test_the_three_terms_of_the_straight_through_estimator():
    """dz/dh, dz/dtheta and d step/dtheta, each against its formula written out densely, and their sum."""
    sae, config, x, codes, losses, gradients = listed("jumprelu")
    h, theta, eps = preactivations(sae, x), sae.threshold, config.bandwidth
    fires, inside = (h > theta) & (h > 0), ((h - theta).abs() < eps / 2) & (h > 0)
    z = torch.where(fires, h, 0)
    error = (z @ sae.W_dec + sae.b_dec - x).detach() * 2 / ROWS
    dz = error @ sae.W_dec.detach().T
    assert int((inside & ~fires).sum()) > 0, "entries below their threshold take part"
    torch.testing.assert_close(codes.dense(), z, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(gradients.b_enc, torch.where(fires, dz, 0).sum(0), atol=1e-12, rtol=1e-9)
    through_z = -(theta / eps * inside * dz).sum(0)
    l0, scale = fires.sum().double() / ROWS, 5 / 7
    through_step = -(inside.double() / eps).sum(0) * 2 * scale * (l0 / config.target_l0 - 1) / (config.target_l0 * ROWS)
    assert float(through_z.norm()) > 0
    assert float(through_step.norm()) > 0
    torch.testing.assert_close(gradients.threshold, through_z + through_step, atol=1e-11, rtol=1e-9)
    assert float(losses.penalty) == pytest.approx(scale * float(l0 / config.target_l0 - 1) ** 2, rel=1e-12)


def test_each_term_against_autograd_through_the_rectangle():
    """The oracle's own two functions, each alone."""
    generator = torch.Generator().manual_seed(1)
    h = torch.randn(50, 7, generator=generator, dtype=torch.float64).requires_grad_()
    theta = torch.rand(7, generator=generator, dtype=torch.float64).requires_grad_()
    weights = torch.randn(50, 7, generator=generator, dtype=torch.float64)
    (Jump.apply(h, theta, 0.5) * weights).sum().backward()
    inside = ((h - theta).abs() < 0.25) & (h > 0)
    torch.testing.assert_close(theta.grad, -(theta / 0.5 * inside * weights).sum(0).detach())
    torch.testing.assert_close(h.grad, torch.where((h > theta) & (h > 0), weights, 0))
    h.grad = theta.grad = None
    (Step.apply(h, theta, 0.5) * weights).sum().backward()
    torch.testing.assert_close(theta.grad, -(inside / 0.5 * weights).sum(0))
    assert float(h.grad.abs().sum()) == 0


def test_l1_is_a_constant_on_what_fires():
    sae, config, x, _, losses, gradients = listed("relu")
    h = preactivations(sae, x)
    z = torch.relu(h)
    error = (z @ sae.W_dec + sae.b_dec - x).detach() * 2 / ROWS
    l1 = 5 / 7 * config.l1
    expected = torch.where(h > 0, error @ sae.W_dec.detach().T + l1 / ROWS, 0).sum(0)
    torch.testing.assert_close(gradients.b_enc, expected, atol=1e-12, rtol=1e-9)
    assert float(losses.penalty) == pytest.approx(float(l1 * z.sum(1).mean()), rel=1e-12)
    assert float(losses.overall) == pytest.approx(float(losses.mse + losses.penalty), rel=1e-12)


@settings(max_examples=25)
@given(
    seed=st.integers(0, 1000),
    bandwidth=st.sampled_from([1e-3, 0.05, 0.5]),
    high=st.sampled_from([0.0, 0.05, 0.4]),
    architecture=st.sampled_from(sorted(RECIPES)),
)
def test_all_paths_and_autograd_agree(seed, bandwidth, high, architecture):
    """Of any thresholds, zeros and some so high that nothing fires among them."""
    changed = {"bandwidth": bandwidth} if architecture == "jumprelu" else {}
    results = []
    for path, choose in PATHS.values():
        with pytest.MonkeyPatch.context() as patch:
            choose(patch)
            results.append(three_steps(path or Stepper.step, architecture, seed, high, changed))
    for others in results[1:]:
        for one, other in zip(results[0], others):
            torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-9)


def three_steps(path, architecture, seed, high, changed):
    """The parameters after them; losses are compared with autograd's."""
    stepper, dense, data = make(architecture, seed=seed, d_in=7, d_sae=19, **changed)
    theta = high * torch.rand(19, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    theta[3] = 50.0
    if architecture == "jumprelu":
        stepper.sae.threshold.copy_(theta)
        dense.theta.data.copy_(theta)
    for start in (0, 5, 10):
        loss = float(path(stepper, data[start : start + 5]).losses.overall)
        assert loss == pytest.approx(dense.step(data[start : start + 5]) - float(dense.aux.detach()), rel=1e-9)
    return [p.clone() for p in stepper.parameters().values()]


def test_a_threshold_never_leaves_what_has_a_gradient():
    """Pushed below 0 it would act as 0 and stay there."""
    stepper, _, data = make("jumprelu", target_l0=97.0, theta=0.001, bandwidth=0.05, sparsity_warmup=0)
    for _ in range(20):
        stepper.step(data[:ROWS])
        assert float(stepper.sae.threshold.min()) >= 0
    assert float(stepper.sae.threshold.min()) == 0.0


@pytest.mark.parametrize("architecture", RECIPES)
def test_nan_is_noticed_and_no_rows_are_refused(architecture):
    stepper, _, data = make(architecture)
    with pytest.raises(ValueError, match="x_BD: 0 rows; a step needs at least 1"):
        stepper.step(data[:0])
    x = data[:ROWS].clone()
    x[7, 3] = float("nan")
    stepper.step(data[:ROWS])
    stepper.step(x)
    assert int(stepper.bad_step) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", RECIPES)
def test_losses_fall_and_rows_stay_unit(architecture, dtype):
    stepper, _, data = make(architecture, dtype=dtype, steps=40)
    losses = [float(stepper.step(data[:ROWS]).losses.mse) for _ in range(40)]
    assert losses[-1] < losses[0]
    # Of a row one eps is added to its norm, and that, its reciprocal and the row are rounded.
    allowed, unit_S = 3 * torch.finfo(dtype).eps + 1e-6, torch.ones(97, dtype=torch.float64)
    torch.testing.assert_close(stepper.sae.W_dec.detach().double().norm(dim=1), unit_S, atol=allowed, rtol=0)


@pytest.mark.parametrize(
    ("sae", "recipe", "message"),
    [
        (SAEConfig(8, 16, 2, "topk"), {"l1": 0.1}, "l1: 0.1 is of relu, not of topk"),
        (SAEConfig(8, 16, 2), {"sparsity_warmup": 3}, "sparsity_warmup: 3 is of relu and jumprelu, not of batch_topk"),
        (SAEConfig(8, 16, None, "relu"), {"target_l0": 5}, "target_l0: 5 is of jumprelu, not of relu"),
        (SAEConfig(8, 16, None, "jumprelu"), {"target_l0": 17}, "target_l0: 17 must be at most d_sae = 16"),
        (SAEConfig(8, 16, None, "relu"), {"auxk_alpha": 0.1}, "auxk_alpha: 0.1 is of no use: a relu SAE has no aux"),
        (SAEConfig(8, 16, None, "jumprelu"), {"l1": 0.1}, "l1: 0.1 is of relu, not of jumprelu"),
        (SAEConfig(8, 16, None), {}, "k: needed to train a batch_topk SAE"),
        (SAEConfig(8, 16, 2, input_norm="layer_norm"), {}, "input_norm: layer_norm is of SAEs trained elsewhere"),
    ],
)
def test_a_recipe_of_another_architecture_is_refused(sae, recipe, message):
    with pytest.raises(ValueError, match=message):
        Stepper(SparseAutoencoder(sae), TrainConfig(**recipe))


@pytest.mark.parametrize("architecture", RECIPES)
def test_half_dense_codes_go_by_products_and_sparse_ones_by_entries(architecture):
    stepper, _, data = make(architecture)
    stepper.announce(ROWS)
    codes, _ = stepper._encode(data[:ROWS])
    assert any_device.is_dense(codes), "as at the start of every run"
    with torch.no_grad():
        stepper.sae.b_enc -= 1.0
    assert not any_device.is_dense(stepper._encode(data[:ROWS])[0])
