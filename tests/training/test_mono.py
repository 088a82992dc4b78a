"""MonoLoss: its gradient against autograd of the definition, and steps on every path against the dense trainer."""

import pytest
import test_penalised_step as penalised
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_controls import gpu_step, rows

import test_step as selecting
from saevlm_fast.config import SAEConfig
from saevlm_fast.errors import Interrupted
from saevlm_fast.kernels import reference
from saevlm_fast.sparse_codes import SparseCodes
from saevlm_fast.training.mono import DenseMono, Embeddings, MonoTerm, mono_of_entries
from saevlm_fast.training.run import train
from saevlm_fast.training.step import Stepper

WEIGHT = 0.7
SIZE = SAEConfig(12, 40, 4)


def sparse(z_BS):
    row, latent = z_BS.nonzero(as_tuple=True)
    offsets = torch.searchsorted(row, torch.arange(len(z_BS) + 1))
    return SparseCodes.from_flat(z_BS[row, latent], latent, offsets, z_BS.shape[1])


def of_entries(z_BS, e_BE):
    """loss and the gradient as a matrix."""
    codes = sparse(z_BS)
    acts_M, latents_M, order_M, offsets_S1 = codes.by_latent()
    rows_M = codes.entry_rows()[order_M]
    loss, of_acts_M = mono_of_entries(acts_M, rows_M, latents_M, offsets_S1, MonoTerm(Embeddings.of(e_BE), WEIGHT))
    return loss, torch.zeros_like(z_BS).index_put((rows_M, latents_M), of_acts_M)


def of_products(z_BS, e_BE):
    dense = DenseMono(z_BS.shape[1], Embeddings.of(e_BE), WEIGHT)
    pieces = [slice(start, start + 7) for start in range(0, len(z_BS), 7)]
    for piece in pieces:
        dense.add(piece, z_BS[piece])
    scores = dense.scores()
    return scores.loss, torch.cat([dense.gradient(scores, piece, z_BS[piece]) for piece in pieces])


def of_autograd(z_BS, e_BE):
    z_BS = z_BS.clone().requires_grad_()
    u_BE = torch.where(e_BE.norm(dim=1, keepdim=True) > 0, e_BE / e_BE.norm(dim=1, keepdim=True), 0)
    pairs_BB = (u_BE @ u_BE.T).fill_diagonal_(0)
    several_S = (z_BS > 0).sum(0) > 1
    num, den = (z_BS * (pairs_BB @ z_BS)).sum(0), z_BS.sum(0).square() - z_BS.square().sum(0)
    if not bool(several_S.any()):
        return torch.zeros(()), torch.zeros_like(z_BS)
    loss = WEIGHT * (1 - (num[several_S] / den[several_S]).mean())
    loss.backward()
    return loss.detach(), torch.where(z_BS > 0, z_BS.grad, 0).detach()


def case(seed, n=23, d_sae=11, width=5, density=0.2):
    """Float64. Latent 0 is dead, 1 fires once, 2 twice and equally, 3 on all rows; rows 4 and 5 have no embedding."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *size: torch.rand(*size, generator=generator, dtype=torch.float64)  # noqa: E731
    z_BS = (0.02 + draw(n, d_sae)) * (draw(n, d_sae) < density)
    z_BS[:, :4] = 0
    z_BS[0, 1] = z_BS[3, 2] = z_BS[9, 2] = 0.25
    z_BS[:, 3] = 0.1 + draw(n)
    z_BS[4:6, 5] = 1.0
    e_BE = torch.randn(n, width, generator=generator, dtype=torch.float64) + 0.4
    e_BE[4:6] = 0
    return z_BS, e_BE


@settings(max_examples=15)
@given(seed=st.integers(0, 10_000), density=st.sampled_from([0.0, 0.05, 0.3, 1.0]))
@pytest.mark.parametrize("way", [of_entries, of_products])
def test_the_gradient_is_autograds(way, seed, density):
    z_BS, e_BE = case(seed, density=density)
    (loss, gradient), (expected, of_loss) = way(z_BS, e_BE), of_autograd(z_BS, e_BE)
    torch.testing.assert_close(loss, expected, atol=1e-12, rtol=1e-10, check_dtype=False)
    torch.testing.assert_close(gradient, of_loss, atol=1e-9, rtol=1e-9)
    assert not bool(gradient[:, :2].any()), "dead, or of one image"
    torch.testing.assert_close((z_BS * gradient).sum(0), torch.zeros(11, dtype=torch.float64), atol=1e-12, rtol=0)


def test_it_is_the_score_that_is_reported_elsewhere():
    z_BS, e_BE = case(7)
    z_BS[0, 3] = 0.0  # the reference takes the minimum off
    e_BE[4:6] = 1.0  # and has no rows of zeros
    ms_S = reference.monosemanticity(z_BS, e_BE)
    assert float(of_entries(z_BS, e_BE)[0]) == pytest.approx(WEIGHT * (1 - float(ms_S.nanmean())), rel=1e-12)


@pytest.mark.parametrize("way", [of_entries, of_products])
def test_in_float32_what_is_rounding_alone_is_left_out(way):
    """One activation outweighs the other by ten million: their quotient would be noise."""
    z_BS = torch.zeros(4, 2)
    z_BS[0, 0], z_BS[1, 0], z_BS[:3, 1] = 1.0, 1e-7, 1.0
    e_BE = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    loss, gradient = way(z_BS, e_BE)
    assert not bool(gradient[:, 0].any())
    assert float(gradient[:, 1].abs().sum()) > 0
    assert float(loss) == pytest.approx(float(way(z_BS[:, 1:], e_BE)[0]), rel=1e-5)


def test_no_entries_no_loss():
    for way in (of_entries, of_products):
        loss, gradient = way(torch.zeros(5, 3), torch.ones(5, 2))
        assert float(loss) == 0
        assert not bool(gradient.any())


# Steps ----------------------------------------------------------------------------------------------------------------


def check_steps(step, stepper, dense, data, n_steps, n_rows=61, tolerance=1e-9):
    for start in range(0, n_steps * n_rows, n_rows):
        x = data[start : start + n_rows].clone()
        x[3] = 0
        losses, expected = step(stepper, x).losses, dense.step(x)
        if stepper.sae.config.architecture == "relu":
            expected -= float(dense.aux.detach() if torch.is_tensor(dense.aux) else dense.aux)
        assert float(losses.overall) == pytest.approx(expected, rel=tolerance)
        assert float(losses.mono) == pytest.approx(WEIGHT * (1 - float(dense.ms.detach().mean())), rel=1e-8)
    for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
        found, there = getattr(stepper.sae, name).detach(), getattr(dense, name).detach()
        torch.testing.assert_close(found, there, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("architecture", ["topk", "batch_topk", "matryoshka"])
def test_steps_are_the_dense_steps(architecture):
    stepper, dense, data = selecting.make(architecture, dtype=torch.float64, mono_weight=WEIGHT, dead_after=150)
    check_steps(Stepper.step, stepper, dense, data, 30)


@pytest.mark.parametrize("path", penalised.PATHS)
@pytest.mark.parametrize("architecture", penalised.RECIPES)
def test_penalised_steps_are_the_dense_steps(architecture, path, monkeypatch):
    step, choose = penalised.PATHS[path]
    choose(monkeypatch)
    stepper, dense, data = penalised.make(architecture, mono_weight=WEIGHT)
    check_steps(step or Stepper.step, stepper, dense, data, 12)
    if architecture == "jumprelu":
        torch.testing.assert_close(stepper.sae.threshold, dense.theta.detach(), atol=1e-9, rtol=1e-9)


def test_gpu_steps_are_the_dense_steps(monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("the tensors are on the CPU: only the interpreter takes them")
    monkeypatch.setitem(selecting.GROUPS, "matryoshka", (3, 5, 9))
    more = {"d_in": 6, "d_sae": 17, "k": 2, "warmup_steps": 0, "mono_weight": WEIGHT, "dead_after": 20}
    stepper, dense, data = selecting.make("matryoshka", dtype=torch.float64, **more)
    check_steps(gpu_step, stepper, dense, data, 2, n_rows=11)


def test_embeddings_of_their_own():
    """A batch of them in a step, and rows in a run: as they are paired, so it is trained; a run goes on to the bit."""
    stepper, dense, data = selecting.make("batch_topk", dtype=torch.float64, mono_weight=WEIGHT, warmup_steps=0)
    other = torch.randn(61, 3, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    mono = dense.mono
    dense.mono = lambda acts, x: mono(acts, other)
    for start in (0, 61, 122):
        x = data[start : start + 61]
        assert float(stepper.step(x, other).losses.overall) == pytest.approx(dense.step(x), rel=1e-9)


def test_runs_with_embeddings(tmp_path):
    recipe = {"steps": 12, "batch_size": 64, "lr": 3e-3, "seed": 1, "mono_weight": 0.5}
    other = torch.randn(500, 3, generator=torch.Generator().manual_seed(4))
    own, _ = train(rows(), SIZE, **recipe)
    same, _ = train(rows(), SIZE, **recipe, mono_embeddings=rows())
    for name, value in own.state_dict().items():  # normalised twice in one of them
        torch.testing.assert_close(same.state_dict()[name], value, atol=1e-4, rtol=1e-4)
    whole, _ = train(rows(), SIZE, **recipe, mono_embeddings=other)
    assert float((whole.W_enc - own.W_enc).detach().abs().max()) > 1e-3
    cut = {"output": tmp_path / "run", "checkpoint_every": 5}

    def stop(step):
        if step == 8:
            raise Interrupted("here")

    with pytest.raises(Interrupted):
        train(rows(), SIZE, **recipe, **cut, mono_embeddings=other, on_step=stop)
    for wrong in (None, other + 1):
        with pytest.raises(ValueError, match="resume: digest of the MonoLoss embeddings is"):
            train(rows(), SIZE, **recipe, **cut, resume=True, mono_embeddings=wrong)
    resumed, _ = train(rows(), SIZE, **recipe, **cut, resume=True, mono_embeddings=other)
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name


@pytest.mark.parametrize(
    ("settings", "n", "message"),
    [
        ({}, 500, "mono_embeddings: of no use without mono_weight"),
        ({"mono_weight": 0.1, "control": "shuffled"}, 500, "mono_embeddings: a shuffled row is of no image"),
        ({"mono_weight": 0.1}, 499, "embeddings: 499 rows .*, but 500 activations"),
    ],
)
def test_embeddings_that_do_not_fit_are_refused(settings, n, message):
    with pytest.raises(ValueError, match=message):
        train(rows(), SIZE, steps=2, **settings, mono_embeddings=torch.ones(n, 3))


def test_a_loss_that_is_not_finite_is_noted_at_its_step(device):
    stepper, _, data = selecting.make("topk", mono_weight=WEIGHT)
    stepper = Stepper(stepper.sae.to(device), stepper.config)
    x = data[:61].to(device)
    stepper.step(x)
    assert int(stepper.bad_step) == -1
    stepper.step(x, torch.full_like(x, float("nan")))
    assert int(stepper.bad_step) == 1


def test_a_batch_without_a_score_logs_none():
    logged = []
    train(rows(), SIZE, steps=2, batch_size=1, mono_weight=1.0, on_log=lambda step, metrics: logged.append(metrics))
    assert [metrics["losses/mono_loss"] for metrics in logged] == [0, 0]
    assert all("metrics/batch_ms" not in metrics for metrics in logged)


@pytest.mark.gpu
@pytest.mark.parametrize("architecture", ["topk", "batch_topk", "matryoshka"])
def test_gpu_captured_steps_are_the_dense_steps(device, architecture):
    from saevlm_fast.training.capture import CapturedSteps

    stepper, dense, data = selecting.make(architecture, mono_weight=WEIGHT)
    steps = CapturedSteps(Stepper(stepper.sae.to(device), stepper.config))
    for start in range(0, 20 * 61, 61):
        x = data[start : start + 61]
        assert float(steps.step(x.to(device)).losses.overall) == pytest.approx(dense.step(x), rel=1e-4)
    assert steps.n_replayed > 0


def test_a_run_logs_it_and_scores_higher():
    logged = []
    with_mono = {"mono_weight": 1.0}
    settings = {"steps": 60, "batch_size": 100, "lr": 3e-3, "seed": 1}
    train(rows(), SIZE, **settings, **with_mono, on_log=lambda step, metrics: logged.append(metrics))
    assert logged[-1]["metrics/batch_ms"] > logged[0]["metrics/batch_ms"]
    assert logged[-1]["losses/mono_loss"] == pytest.approx(1 - logged[-1]["metrics/batch_ms"])
    with pytest.raises(ValueError, match=r"mono_weight: 1\.0 is of no use to an untrained control"):
        train(rows(), SIZE, **settings, **with_mono, control="untrained")
