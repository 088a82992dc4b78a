"""--accumulate: micro-batches whose gradients are summed make the step that the whole batch makes."""

import weakref

import pytest
import torch

from dense_trainer import DenseTrainer
from saevlm_fast.config import SAEConfig, TrainConfig
from saevlm_fast.data.synthetic import PlantedConcepts
from saevlm_fast.sae import SparseAutoencoder
from saevlm_fast.training.memory import training_memory
from saevlm_fast.training.run import train
from saevlm_fast.training.state import geometric_median
from saevlm_fast.training.step import Stepper

D_IN, D_SAE, K, N_ROWS = 16, 60, 3, 50
GROUPS = {"matryoshka": (4, 16, 40)}
RECIPES = {"relu": {"l1": 0.05, "sparsity_warmup": 3}, "jumprelu": {"target_l0": 4.0, "sparsity_warmup": 3}}


class InMicroBatches(DenseTrainer):
    """The dense trainer, selecting within every n-th row."""

    n = 1

    def select(self, pre):
        acts = torch.zeros_like(pre)
        for i in range(self.n):
            acts[i :: self.n] = super().select(pre[i :: self.n])
        return acts


def make(architecture, accumulate, dtype=torch.float64, **more):
    recipe = {"steps": 100, "lr": 3e-3, "warmup_steps": 2, "batch_size": N_ROWS, "dead_after": 60}
    config = TrainConfig(**recipe | RECIPES.get(architecture, {}) | more, accumulate=accumulate)
    k = None if architecture in RECIPES else K
    config_of_sae = SAEConfig(D_IN, D_SAE, k, architecture, GROUPS.get(architecture, ()))
    sae = SparseAutoencoder(config_of_sae, dtype=dtype)
    sae.reset_parameters(0)
    x_ND = torch.from_numpy(PlantedConcepts(D_IN, 8, 30, seed=1).sample(N_ROWS * 12)[0]).to(dtype) / 4
    sae.b_dec.data.copy_(geometric_median(x_ND[:100]))
    return Stepper(sae, config), x_ND.split(N_ROWS)


def parameters(stepper):
    return {name: parameter.clone() for name, parameter in stepper.parameters().items()}


@pytest.mark.parametrize("accumulate", [2, 7])
@pytest.mark.parametrize("architecture", ["topk", "batch_topk", "matryoshka"])
def test_micro_batches_are_the_dense_step_that_selects_within_them(architecture, accumulate):
    """With 7 of 50 rows they are not all of one size."""
    stepper, batches = make(architecture, accumulate)
    sae = stepper.sae
    dense = InMicroBatches(
        sae.W_dec.detach().clone(),
        sae.b_dec.detach().clone(),
        architecture=architecture,
        k=K,
        group_ends=sae.config.group_ends,
        config=stepper.config,
        d_sae=D_SAE,
    )
    dense.n, n_dead = accumulate, 0
    for x_BD in batches:
        output = stepper.step(x_BD)
        assert float(output.losses.overall) == pytest.approx(dense.step(x_BD), rel=1e-9)
        assert output.n_dead == dense.n_dead
        n_dead = max(n_dead, dense.n_dead)
    assert n_dead > 0, "the auxiliary loss takes part"
    assert torch.equal(stepper.idle_S, dense.idle)
    for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
        torch.testing.assert_close(getattr(sae, name), getattr(dense, name), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("architecture", ["topk", "relu"])
def test_it_is_the_step_of_one_big_batch(architecture):
    """Float32 to 1e-5: nothing of a TopK row, or of the L1 penalty, depends on the other rows."""
    whole, batches = make(architecture, 1, torch.float32)
    cut, _ = make(architecture, 4, torch.float32)
    for x_BD in batches[:8]:
        expected, found = whole.step(x_BD), cut.step(x_BD)
        torch.testing.assert_close(found.x_hat_BD, expected.x_hat_BD, atol=1e-5, rtol=1e-5)
        assert float(found.losses.overall) == pytest.approx(float(expected.losses.overall), rel=1e-5)
    for name, parameter in parameters(whole).items():
        torch.testing.assert_close(parameters(cut)[name], parameter, atol=1e-5, rtol=1e-5)
    assert torch.equal(whole.idle_S, cut.idle_S)


def test_jumprelu_has_the_mean_of_the_micro_batches_penalties():
    """(L0 / target - 1)^2 is not linear: the step's penalty is not that of the batch's L0."""
    cut, (x_BD, *_) = make("jumprelu", 2, sparsity_warmup=0)
    first, second = (make("jumprelu", 1, sparsity_warmup=0)[0].step(x_BD[i::2]) for i in range(2))
    losses = cut.step(x_BD).losses
    assert float(losses.penalty) == pytest.approx(float(first.losses.penalty + second.losses.penalty) / 2, rel=1e-9)
    assert float(losses.mse) == pytest.approx(float(first.losses.mse + second.losses.mse) / 2, rel=1e-9)


def test_batch_topk_keeps_its_share_of_every_micro_batch():
    stepper, (x_BD, *_) = make("batch_topk", 5)
    x_BD = x_BD.clone()
    x_BD[::5] *= 100  # in one batch these would take all places
    codes = stepper.step(x_BD).codes
    counts_B = codes.l0()  # the micro-batches one after the other
    assert [int(n) for n in counts_B.view(5, 10).sum(1)] == [10 * K] * 5


def test_the_threshold_follows_the_mean_of_the_micro_batches_cuts():
    stepper, batches = make("batch_topk", 2, threshold_start=0, threshold_beta=0.5)
    expected = None
    for step, x_BD in enumerate(batches[:4]):
        alone = [Stepper(_copied(stepper.sae), stepper.config)._encode(x_BD[i::2])[0] for i in range(2)]
        cut = sum(float(codes.top_acts[codes.top_acts > 0].min()) for codes in alone) / 2
        stepper.step(x_BD)
        if step > 0:
            expected = cut if expected is None else 0.5 * expected + 0.5 * cut
            assert float(stepper.sae.threshold) == pytest.approx(expected, rel=1e-5)


def _copied(sae):
    copy = SparseAutoencoder(sae.config, dtype=sae.b_dec.dtype)
    copy.load_state_dict(sae.state_dict())
    return copy


def test_a_run_in_micro_batches_is_as_good_and_resumes(tmp_path):
    x_ND = torch.from_numpy(PlantedConcepts(D_IN, 8, 30, seed=1).sample(1500)[0])
    known = {"steps": 40, "batch_size": 128, "lr": 1e-2, "device": "cpu"}
    config = SAEConfig.sized(D_IN, d_sae=64, k=3)
    _, whole = train(x_ND, config, **known)
    _, cut = train(x_ND, config, accumulate=4, output=tmp_path / "run", **known)
    assert cut["explained_variance"] > whole["explained_variance"] - 0.05
    assert cut["l0"] == pytest.approx(3, rel=0.15)
    with pytest.raises(ValueError, match="resume: accumulate is None, but the run was started with 4"):
        train(x_ND, config, output=tmp_path / "run", resume=True, **known)


def test_more_micro_batches_than_rows_are_refused():
    with pytest.raises(ValueError, match="accumulate: 9 micro-batches must be at most batch_size = 8 rows"):
        TrainConfig(batch_size=8, accumulate=9)
    with pytest.raises(ValueError, match="accumulate: 0 must be at least 1"):
        TrainConfig(accumulate=0)


def test_fewer_rows_in_all_than_micro_batches():
    x_ND = torch.randn(3, D_IN)
    train(x_ND, SAEConfig.sized(D_IN, d_sae=32, k=2, architecture="topk"), steps=2, accumulate=8, device="cpu")


def test_the_memory_that_is_stated_falls():
    sae = SAEConfig.sized(768, expansion=8, architecture="relu")
    assert training_memory(sae, 4096, accumulate=8) < training_memory(sae, 4096) / 2


def test_the_memory_that_is_stated_holds_the_factors_of_products():
    """Of a single row: two weights, their moments and gradients; both in three halves; a copy in half; a gradient."""
    d_in, d_sae = 768, 6144
    sae = SAEConfig.sized(d_in, d_sae=d_sae, architecture="relu")
    assert training_memory(sae, 1) >= (4 * 2 * 4 + 2 * 3 * 2 + 2 + 4) * d_in * d_sae


@pytest.mark.gpu
@pytest.mark.parametrize("architecture", ["topk", "batch_topk", "matryoshka", "relu"])
def test_a_gpu_takes_the_same_step(device, architecture):
    stepper, batches = make(architecture, 3, torch.float32)
    there = Stepper(_copied(stepper.sae).to(device), stepper.config)
    for x_BD in batches[:5]:
        expected, found = stepper.step(x_BD), there.step(x_BD.to(device))
        assert float(found.losses.overall) == pytest.approx(float(expected.losses.overall), rel=1e-4)


@pytest.mark.parametrize("architecture", ["relu", "jumprelu"])
def test_micro_batches_of_sparse_codes_and_of_half_dense_ones_are_the_same_step(architecture, monkeypatch):
    """Joined in one step, summed in the other: by dtype float64, to rounding."""
    joined, batches = make(architecture, 3)
    monkeypatch.setattr("saevlm_fast.training.step.is_dense", lambda codes: False)
    outputs = [joined.step(x_BD) for x_BD in batches[:4]]
    assert all(output.codes is not None and output.codes.n_rows == N_ROWS for output in outputs)
    summed, _ = make(architecture, 3)
    monkeypatch.setattr("saevlm_fast.training.step.is_dense", lambda codes: True)
    for x_BD, expected in zip(batches, outputs):
        found = summed.step(x_BD)
        assert found.codes is None, "none are held"
        assert int(summed.counted(found)[0]) == int(joined.counted(expected)[0])
        torch.testing.assert_close(found.losses.overall, expected.losses.overall, rtol=1e-9, atol=0)
        torch.testing.assert_close(found.x_hat_BD, expected.x_hat_BD, rtol=1e-9, atol=1e-12)
    for name, parameter in parameters(joined).items():
        torch.testing.assert_close(parameters(summed)[name], parameter, rtol=1e-9, atol=1e-12)


def test_a_batch_that_is_large_beside_the_sae_is_not_held_whole():
    small, large = (torch.randn(n, D_IN, dtype=torch.float64) for n in (4 * D_SAE // 3, 4 * D_SAE // 3 + 1))
    assert make("topk", 2)[0].step(small).codes is not None
    summed, whole = make("topk", 2)[0], make("topk", 1)[0]
    found, expected = summed.step(large), whole.step(large)
    assert found.codes is None
    torch.testing.assert_close(found.x_hat_BD, expected.x_hat_BD, rtol=1e-9, atol=1e-12)
    assert float(found.losses.overall) == pytest.approx(float(expected.losses.overall), rel=1e-9)


@pytest.mark.parametrize("architecture", ["topk", "relu"])
def test_of_summed_micro_batches_the_codes_of_one_are_held(architecture, monkeypatch):
    monkeypatch.setattr("saevlm_fast.training.step.joins", lambda *_: False)
    stepper, (x_BD, *_) = make(architecture, 4)
    encode, made, alive = stepper._encode, [], []

    def counted(piece_BD):
        alive.append(sum(each() is not None for each in made))
        codes, penalty = encode(piece_BD)
        made.append(weakref.ref(codes.top_acts))
        return codes, penalty

    monkeypatch.setattr(stepper, "_encode", counted)
    stepper.step(x_BD)
    assert alive == [0, 0, 0, 0]
